# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Perceiver IO: weights in and out, what latents look at, optical flow in colours
#
# Perceiver IO (arXiv 2107.14795) lets a small array of latents read any input by cross-attention, and lets queries read
# any output from the latents. Here weights in the layout of transformers are converted and used; a small model learns
# to read digits, and we look at the pixels that its latents attend to; another one learns how textures move. Everything
# runs on a CPU in about two minutes and downloads nothing.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # where the repository was cloned and this notebook opened from its folder colabs/
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "..[digits]"], check=True)

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax.core import meta
from IPython.display import Image, display

import xattn
from xattn import data, interop, models, tasks
from xattn.config import load_config
from xattn.evals.flow_picture import flow_colors
from xattn.evals.optical_flow import predict_flow
from xattn.interop import hf_perceiver
from xattn.tasks.optical_flow import FLOW_SCALE
from xattn.train import train

runs = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Weights of transformers
#
# A model page of Hugging Face holds `config.json` and `model.safetensors`. With these two, `interop.from_torch` gives a
# model that reproduces the outputs of its source. To download nothing, we make a state dict ourselves: small, random,
# but with the names and shapes of `deepmind/vision-perceiver-fourier`.

# %%
hf_config = dict(
    architectures=["PerceiverForImageClassificationFourier"],
    d_latents=32,
    num_latents=16,
    num_blocks=2,
    num_self_attends_per_block=2,
    num_cross_attention_heads=1,
    num_self_attention_heads=8,
    num_labels=10,
)
image = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
random_model = models.build(hf_perceiver.model_config(hf_config))
random_variables = meta.unbox(jax.jit(random_model.init)(jax.random.key(0), image))
state_dict = interop.to_torch("hf_perceiver", hf_config, random_variables)
for name in list(state_dict)[:4]:
    print(f"{name}: {state_dict[name].shape}")
print("...", len(state_dict), "tensors")

# %% [markdown]
# With real files: `state_dict = safetensors.numpy.load_file("model.safetensors")`. The variant "hf", the default here,
# computes as transformers does; "deepmind" computes as the published weights were trained.

# %%
for variant in ("hf", "deepmind"):
    model, variables = interop.from_torch("hf_perceiver", hf_config, state_dict, variant=variant)
    probabilities = jax.nn.softmax(jax.jit(model.apply)(variables, image))[0]
    print(f"{variant:<10} class {probabilities.argmax()} of 10 with probability {probabilities.max():.6f}")

# %% [markdown]
# ## What do latents look at?
#
# `perceiver_io/imagenet_fourier` is the published model and its recipe; its variant `digits` is a small one of the same
# parts, for images of 8 x 8 pixels. We shorten the run.

# %%
config = load_config("perceiver_io/imagenet_fourier:digits")
config.num_steps = 400
results = train(config, runs / "digits")
print(f"test accuracy {100 * results['digits']['accuracy']:.1f}%")

# %% [markdown]
# Attention weights are there for whoever asks for the collection `intermediates`. Latents read 64 pixels with 8 heads;
# one query then reads the latents. The product of the two is how much of each pixel reaches the answer.

# %%
model, variables, config = xattn.load(runs / "digits")
source, task = data.build(config.data.to_dict(), split="test"), tasks.build(config.task.to_dict())
images = np.stack([source.example(index, None)["image"] for index in range(6)])
logits, state = model.apply(variables, *task.inputs({"image": jax.numpy.asarray(images)}), mutable=["intermediates"])
seen = state["intermediates"]
pixels = seen["encoder"]["cross_attend"]["attention"]["attention_weights"][0].mean(1)  # [image, latent, pixel]
latents = seen["decoder"]["cross_attend"]["attention"]["attention_weights"][0][:, 0, 0]  # [image, latent]
reached = np.einsum("bn,bnm->bm", latents, pixels).reshape(-1, 8, 8)

figure, axes = plt.subplots(3, 6, figsize=(9, 4.6))
for column, (digit, answer) in enumerate(zip(images, logits.argmax(-1), strict=True)):
    busiest = latents[column].argmax()
    panels = digit[..., 0], reached[column], pixels[column, busiest].reshape(8, 8)
    for axis, panel, name in zip(axes[:, column], panels, ("digit", "all latents", "one latent"), strict=True):
        axis.imshow(panel, cmap="gray_r" if name == "digit" else "viridis")
        axis.set(xticks=[], yticks=[])
        if column == 0:
            axis.set_ylabel(name)
    axes[0, column].set_title(f"says {answer}")
plt.show()

# %% [markdown]
# ## Optical flow
#
# The same encoder and decoder find where each pixel of one frame is in the next: inputs are the pixels of both frames
# with their surroundings, and the queries are these inputs themselves. The frames are textured planes that move, whose
# flow is known exactly. We shorten the run.

# %%
config = load_config("perceiver_io/optical_flow:planes")
config.num_steps = 1000
train(config, runs / "planes")
display(Image(next((runs / "planes" / "plots").glob("optical_flow_*.png"))))

# %% [markdown]
# Hue is direction and saturation is length (the colours of the Middlebury benchmark). One encoding serves any number of
# decodings: here, of the upper half of the picture alone.

# %%
model, variables, config = xattn.load(runs / "planes")
source, task = data.build(config.data.to_dict(), split="test"), tasks.build(config.task.to_dict())
example = source.example(1, None)
flow = predict_flow(model, variables, task, example["frames"][None])[0]
inputs = task.inputs({"frames": jax.numpy.asarray(example["frames"][None])})
height, width, _ = flow.shape
encoded = model.apply(variables, *inputs, method="encode")
half = np.arange(height * width // 2)
part = model.apply(variables, encoded, *inputs, subsampled_points=half, method="decode")
part = FLOW_SCALE * np.asarray(part).reshape(height // 2, width, 2)
print("decoding a part equals a part of the whole:", np.allclose(part, flow[: height // 2], atol=1e-3))

figure, axes = plt.subplots(1, 3, figsize=(9, 2.4))
longest = np.linalg.norm(example["flow"], axis=-1).max()
for axis, field, title in zip(axes, (example["flow"], flow, part), ("truth", "decoded", "upper half"), strict=True):
    axis.imshow(flow_colors(field, longest))
    axis.set(xticks=[], yticks=[], title=title)
plt.show()
