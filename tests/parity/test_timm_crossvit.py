"""CrossViT and ViT against timm, and the resize against torch, on random weights and images."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools

import jax
import numpy as np
import pytest

from tests.parity.torchvision_stub import timm
from tests.variables import normal
from xattn import interop
from xattn.interop import timm_crossvit
from xattn.models import build
from xattn.models.crossvit import VARIANTS
from xattn.ops.resize import bicubic_resize

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@functools.cache
def reference(name, **keywords):
    """timm's model, none of its parameters at its first value."""
    import torch

    torch.manual_seed(0)
    model = timm().create_model(name, pretrained=False, **keywords).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def compare(kind, name, size, **keywords):
    """Largest difference of both models' outputs relative to the largest output."""
    import torch

    model = reference(name, **keywords)
    images = normal(2, *size, 3)
    with torch.no_grad():
        expected = model(torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))).numpy()
    pool = "mean" if keywords.get("global_pool") == "avg" else "token"
    state = {key: x.numpy() for key, x in model.state_dict().items()}
    ours, variables = interop.from_torch(kind, name, state, pool=pool)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(ours.apply)(variables, images)
    difference = np.abs(out - expected).max() / np.abs(expected).max()
    print(f"{name} {size} {keywords}: {difference:.1e} of {np.abs(expected).max():.2f}")
    return difference


@pytest.mark.parametrize(
    "name, size",
    [
        ("crossvit_tiny_240", (240, 240)),
        ("crossvit_9_240", (240, 240)),
        ("crossvit_9_240", (200, 280)),
        ("crossvit_9_dagger_240", (240, 240)),
        ("crossvit_9_dagger_240", (256, 224)),
        ("crossvit_15_dagger_408", (408, 408)),
    ],
)
def test_crossvit_computes_what_timm_does(name, size):
    assert compare("timm_crossvit", name, size) < 2e-5


@pytest.mark.parametrize("keywords", [dict(num_classes=0), dict(num_classes=7), dict(global_pool="avg")])
def test_heads_and_pooling_are_those_of_timm(keywords):
    assert compare("timm_crossvit", "crossvit_tiny_240", (240, 240), **keywords) < 2e-5


def test_other_sizes_of_images_are_those_of_timm():
    """timm scales the sizes of both branches with that of its input."""
    assert compare("timm_crossvit", "crossvit_tiny_240", (480, 480), img_size=480) < 2e-5


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_vit_computes_what_timm_does(name):
    assert compare("timm_vit", name, (224, 224)) < 2e-5


@pytest.mark.parametrize("key", [key for key in VARIANTS if not key.endswith("504")])
def test_tensors_are_those_of_timm(key):
    import torch

    with torch.device("meta"):
        model = timm().create_model(f"crossvit_{key}", pretrained=False)
    ours = build(timm_crossvit.model_config(f"crossvit_{key}"))
    tensors = timm_crossvit.tensors(ours, ours.image_sizes[0], timm_crossvit._RULES)
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


@pytest.mark.parametrize("seed", range(8))
def test_resize_is_that_of_torch(seed):
    """Of doubles: in single precision torch's positions of pixels are rounded, too."""
    import torch

    height, width, *size = np.random.default_rng(seed).integers(3, 200, 4).tolist()
    images = normal(2, height, width, 3, seed=seed)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(images).transpose(0, 3, 1, 2)).double(), size, mode="bicubic", align_corners=False
    )
    ours = jax.jit(bicubic_resize, static_argnums=1)(images, tuple(size))
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)
