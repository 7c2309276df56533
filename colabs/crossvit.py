# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CrossViT: what each branch sees of the other
#
# CrossViT (arXiv 2103.14899) cuts an image into patches of two sizes, with a branch for each, and lets the class token
# of one branch ask the patches of the other by cross-attention. Here the published models are built, weights in the
# layout of timm come in and go out again, a small model learns letters, and we look at what its class tokens look at.
# Everything runs on a CPU in a few minutes and downloads nothing.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:  # where the repository was cloned and this notebook opened from its folder colabs/
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", ".."], check=True)

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax.core import meta
from IPython.display import Image, display

import xattn
from xattn import data, interop, models, tasks
from xattn.config import load_config
from xattn.models import crossvit
from xattn.train import train

runs = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The published models
#
# Each is a name, and any keyword of `CrossViT` can be changed. The sizes are known without making any array.

# %%
for name in crossvit.VARIANTS:
    model = models.build({"name": f"crossvit_{name}"})
    images = jax.ShapeDtypeStruct((1, 240, 240, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    print(f"{name:16}{sum(leaf.size for leaf in jax.tree.leaves(shapes)):12,} parameters")

# %% [markdown]
# ## Weights of timm
#
# `interop.from_torch` takes timm's state dict. To download nothing, we make one from a model that has just been
# initialised; `load_file("model.safetensors")` gives a published one. What goes out again is the same, bit by bit, and
# images of another size are resized for each branch.

# %%
config = {"name": "crossvit_9_dagger_240", "num_classes": 10}
images = jax.random.normal(jax.random.key(1), (1, 200, 280, 3))
fresh = meta.unbox(jax.jit(models.build(config).init)(jax.random.key(0), images))
state_dict = interop.to_torch("timm_crossvit", "crossvit_9_dagger_240", fresh)
print(len(state_dict), "arrays, such as", ", ".join(sorted(state_dict)[:3]))

model, variables = interop.from_torch("timm_crossvit", "crossvit_9_dagger_240", state_dict)
again = interop.to_torch("timm_crossvit", "crossvit_9_dagger_240", variables)
assert all(np.array_equal(again[key], state_dict[key]) for key in state_dict)
print(jax.jit(model.apply)(variables, images).shape)

# %% [markdown]
# ## A small one learns letters
#
# 100 letters, 32 x 32 pixels; patches of 16 x 16 in the coarse branch and, so that there is more to see than with the
# config's own 8 x 8, of 4 x 4 in the fine one. With all its steps the config is more accurate; here it gets a few.

# %%
config = load_config("crossvit/letters")
config.model.patch_sizes = (4, 16)
config.num_steps = 400
config.log_every = 100
config.validation.every = 400
results = train(config, runs / "letters")
print(f"test accuracy {100 * results['letters']['accuracy']:.1f} %, chance is 1 %")

# %%
display(Image(runs / "letters" / "plots" / "curves.png"))

# %% [markdown]
# ## What the class tokens look at
#
# Asking for the collection `intermediates` makes the attention weights of every fusion visible. `fusion_0` is the class
# token of the fine branch over the coarse branch's 2 x 2 patches, `fusion_1` that of the coarse branch over 8 x 8 fine
# ones; the first key is the token itself. We show the mean over heads, for the last stage.

# %%
model, variables, config = xattn.load(runs / "letters")
task = tasks.build(config.task.to_dict())
source = data.build(config.data.to_dict(), split="test")
rows = [source.example(40 * label, None) for label in (0, 3, 7, 17, 21)]
letters = jnp.stack([row["image"] for row in rows])
logits, state = model.apply(variables, task.prepare(letters), mutable=["intermediates"])
stage = state["intermediates"][f"stage_{config.model.num_stages - 1}"]

figure, axes = plt.subplots(3, len(rows), figsize=(1.6 * len(rows), 5), layout="constrained")
for column, letter in enumerate(letters):
    axes[0, column].imshow(letter[..., 0], cmap="gray_r")
    for i in range(2):
        weights = stage[f"fusion_{i}"]["attn"]["attention_weights"][0][column, :, 0, 1:].mean(0)
        side = round(len(weights) ** 0.5)
        axes[i + 1, column].imshow(weights.reshape(side, side), cmap="viridis")
for row, title in enumerate(("letter", "fine token,\ncoarse patches", "coarse token,\nfine patches")):
    axes[row, 0].set_ylabel(title)
for axis in axes.ravel():
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What moves a logit
#
# What a token looks at need not matter. Passing the collection `perturbations` makes each attention weight an input, so
# that the gradient tells how the logit of the letter changes with it.

# %%
image = task.prepare(letters[:1])
shapes = jax.eval_shape(lambda: model.apply(variables, image, mutable=["perturbations"])[1]["perturbations"])
zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@jax.jit
def logit(perturbations):
    return model.apply(variables | {"perturbations": perturbations}, image)[0, rows[0]["label"]]


gradient = jax.grad(logit)(zeros)[f"stage_{config.model.num_stages - 1}"]["fusion_1"]["attn"]["attention_weights"]
influence = gradient[0, :, 0, 1:].mean(0)
plt.imshow(influence.reshape(8, 8), cmap="coolwarm", vmin=-jnp.abs(influence).max(), vmax=jnp.abs(influence).max())
plt.colorbar(label="change of the logit per unit of attention")
plt.show()
