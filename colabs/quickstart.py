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
# # Train QSFormer, evaluate it, look inside
#
# QSFormer (arXiv 2208.12398) classifies a query image by letting it attend to one example of each class. Here it learns
# to do so on letters of one set of scripts, and is then tested on scripts that it has never seen. Everything runs on a
# CPU in about two minutes and downloads no data: the letters are rendered from the fonts that matplotlib ships.

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
from IPython.display import Image, display

import xattn
from xattn import data, evals, tasks
from xattn.config import load_config
from xattn.evals.episode_picture import draw_episode
from xattn.train import train

# %% [markdown]
# ## The experiment is a config
#
# `qsformer/glyphs` is the main job of the repository. A config is a nested dictionary whose keys are the keywords of
# the constructors. We shorten the run; leave these lines out for the real one (a few minutes on two cores).

# %%
config = load_config("qsformer/glyphs")
config.num_steps = 60
config.validation.update(every=30, num_episodes=20)
config.unlock()
config.evals = {"5way_1shot": dict(name="fewshot", ways=5, shots=1, num_episodes=100)}
print(config.model)

# %% [markdown]
# An *episode* is what the model sees: a few classes, one or more labelled images of each (the support set), and
# queries to classify.

# %%
source = data.build(config.data.to_dict(), split="test")
episode = data.EpisodeSampler(source, seed=0, ways=5, shots=1, queries=2)(0)
figure, axes = plt.subplots(3, 5, figsize=(5, 3))
rows = [episode["support"][:, 0], *episode["query"].reshape(2, 5)]
for row, (title, indices) in enumerate(zip(("support", "query", "query"), rows, strict=True)):
    for axis, image in zip(axes[row], source.images(indices), strict=True):
        axis.imshow(image[..., 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(title)
plt.show()

# %% [markdown]
# ## Train
#
# The run writes its config, metrics, checkpoints and pictures to a folder. Running the cell again would continue from
# the last checkpoint.

# %%
workdir = Path(tempfile.mkdtemp()) / "quickstart"
results = train(config, workdir)
display(Image(workdir / "plots" / "curves.png"))

# %% [markdown]
# ## Load and look
#
# `xattn.load` needs only the folder. The picture shows each query, its prediction and its attention over the classes.

# %%
model, variables, config = xattn.load(workdir)
display(Image(draw_episode(model, variables, config, workdir / "plots" / "episode.png")))

# %% [markdown]
# Attention weights are captured by asking for the collection `intermediates`; no flag of the model is needed. The
# sum of the blocks' weights is the score of the global branch.

# %%
task = tasks.build(config.task.to_dict())
batch = {
    "support": jnp.asarray(source.images(episode["support"])),
    "query": jnp.asarray(source.images(episode["query"])),
}
outputs, state = model.apply(variables, *task.inputs(batch), mutable=["intermediates"])
weights = state["intermediates"]["block_0"]["attention_weights"][0]
print("weights of block 0 [heads, queries, classes]:", weights.shape, "rows sum to", np.asarray(weights.sum(-1))[0, :3])
print("predicted:", outputs["logits"].argmax(-1), " true:", episode["query_labels"])

# %% [markdown]
# What would change if a query attended elsewhere? The collection `perturbations` adds to the weights, so its gradient
# is the sensitivity of any result to each of them: here, of the score of the true class of the first query.

# %%
shapes = jax.eval_shape(lambda: model.apply(variables, *task.inputs(batch), mutable=["perturbations"])[1])
zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["perturbations"])


def score(perturbations):
    """The global score of query 0 for its own class."""
    perturbed = {**variables, "perturbations": perturbations}
    return model.apply(perturbed, *task.inputs(batch))["global_scores"][0, episode["query_labels"][0]]


gradient = jax.grad(score)(zeros)["block_0"]["attention_weights"]
print("d score / d weights of query 0 in block 0:", np.asarray(gradient)[0, 0].round(3))

# %% [markdown]
# ## Is it better than pixels?
#
# Every method is tested on the same numbered episodes, so differences can be measured pair by pair.

# %%
pixels = evals.run(dict(name="fewshot", num_episodes=100, method="pixel_centroid"), model, variables, config)
for name, result in (("QSFormer", results["5way_1shot"]), ("nearest pixel centroid", pixels)):
    print(f"{name:<24}{100 * result['accuracy']:.1f}% +- {100 * result['ci95']:.1f}")
