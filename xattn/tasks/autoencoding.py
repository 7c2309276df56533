"""Autoencoding of video with sound and a label, from one set of latents.

    loss = w_image L1(image) + w_audio L1(audio) + w_label CE(label)

Perceiver IO (arXiv 2107.14795, section 4.3) reconstructs all three from latents that are smaller than the input. Each
training step decodes a random part of the video's pixels and of the audio's patches, which costs a small share of
decoding all. The label is hidden from the input in a random share of training examples and in every evaluation, where
it becomes a classification (`train_mask_probs` and `mask_probs` of the model's preprocessor).

Deviations: the training code was never released. The weights (0.03, 1, 1e-4), the share of hidden labels (0.5) and the
512 + 512 points a step are remembered from the paper and were not checked against its text; that a point is drawn with
replacement, and that all examples of a batch share the points of a step, is our choice.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xattn.config import UsageError
from xattn.tasks.common import forward, normalize


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """Loss and metrics of a batch of clips.

    Attributes:
      num_classes: K, of the label.
      samples_per_patch: p, audio samples that one query decodes.
      image_points, audio_points: pixels and audio patches that a training step decodes.
      image_weight, audio_weight, label_weight: of the loss.
    """

    num_classes: int
    samples_per_patch: int = 16
    image_points: int = 512
    audio_points: int = 512
    image_weight: float = 0.03
    audio_weight: float = 1.0
    label_weight: float = 1e-4

    def __post_init__(self):
        for name in ("num_classes", "samples_per_patch", "image_points", "audio_points"):
            if getattr(self, name) < 1:
                raise UsageError(f"config.task.{name} is {getattr(self, name)}: give 1 or more.")

    def inputs(self, batch: Mapping[str, Array]) -> tuple[dict[str, Float[Array, "..."]]]:
        """The model's arguments: video in [0, 1], audio in [-1, 1] and the one-hot label, by modality."""
        image = normalize(batch["video"], 0.0, 1.0)
        return ({"image": image, "audio": batch["audio"], "label": jax.nn.one_hot(batch["label"], self.num_classes)},)

    def __call__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool,
        rngs: dict[str, PRNGKeyArray] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Any]]:
        """Loss of `batch`, a mean over its examples and the decoded points.

        Args:
          model: a Perceiver IO of these three modalities; it hides the labels.
          variables: of the model.
          batch: `video` uint8 [B, T, H, W, 3], `audio` float32 [B, S, 1] in [-1, 1], `label` int32 [B].
          train: decode random points; else decode everything.
          rngs: of the model, "dropout" in training, which also draws the points.

        Returns:
          loss; metrics loss, image_l1, audio_l1, label_loss and accuracy; new batch statistics.
        """
        (inputs,) = self.inputs(batch)
        points = None
        if train:
            assert rngs is not None
            points = self.draw_points(rngs["dropout"], inputs)
        outputs, state = forward(model, variables, (inputs,), train=train, rngs=rngs, subsampled_points=points)
        outputs = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
        targets = self.targets(inputs, points)
        image_l1, audio_l1 = (jnp.abs(outputs[name] - targets[name]).mean() for name in ("image", "audio"))
        label_loss = optax.softmax_cross_entropy(outputs["label"], inputs["label"]).mean()
        loss = self.image_weight * image_l1 + self.audio_weight * audio_l1 + self.label_weight * label_loss
        metrics = {
            "loss": loss,
            "image_l1": image_l1,
            "audio_l1": audio_l1,
            "label_loss": label_loss,
            "accuracy": jnp.mean(outputs["label"].argmax(-1) == batch["label"]),
        }
        return loss, metrics, state

    def draw_points(
        self, rng: PRNGKeyArray, inputs: Mapping[str, Float[Array, "..."]]
    ) -> dict[str, Int[Array, " n"] | None]:
        """Random flat indices of pixels and of audio patches, for `subsampled_points`; the label is always decoded."""
        pixels = inputs["image"][0, ..., 0].size
        patches = inputs["audio"].shape[1] // self.samples_per_patch
        image_rng, audio_rng = jax.random.split(jax.random.fold_in(rng, 2))
        return {
            "image": jax.random.randint(image_rng, (self.image_points,), 0, pixels),
            "audio": jax.random.randint(audio_rng, (self.audio_points,), 0, patches),
            "label": None,
        }

    def targets(
        self, inputs: Mapping[str, Float[Array, "..."]], points: Mapping[str, Int[Array, " n"] | None] | None
    ) -> dict[str, Float[Array, "..."]]:
        """Image and audio as the model gives them: whole, or at `points` only (image [B, n, 3], audio [B, n p, 1])."""
        image, audio = inputs["image"], inputs["audio"]
        if points is None:
            return {"image": image, "audio": audio}
        batch = len(audio)
        patches = audio.reshape(batch, -1, self.samples_per_patch)[:, points["audio"]]
        return {
            "image": image.reshape(batch, -1, image.shape[-1])[:, points["image"]],
            "audio": patches.reshape(batch, -1, 1),
        }
