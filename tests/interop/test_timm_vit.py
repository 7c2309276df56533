"""timm's ViT and DeiT: outputs of timm on weights that a formula fills, and state dicts there and back.

The numbers were printed by timm 1.0.31 with torch 2.13.0, for weights and images of `tests.interop.timm_weights`.
"""

import jax
import numpy as np
import pytest

from tests.interop.timm_weights import image, noise, vit_shapes, wave
from xattn import interop
from xattn.config import UsageError
from xattn.interop import timm_vit
from xattn.models import build

SMALL = dict(width=192, depth=12, image_size=48, classes=3)


def test_outputs_are_those_of_timm():
    model, variables = interop.from_torch("timm_vit", "deit_tiny_patch16_224", wave(vit_shapes(192)))
    (logits,) = jax.jit(model.apply)(variables, image(224))
    np.testing.assert_allclose(logits[:5], (-0.038786, -0.043264, 0.141839, -0.244310, 0.094437), atol=5e-6)
    assert np.abs(logits).sum() == pytest.approx(128.688, abs=2e-3)
    assert logits.argmax() == 53


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("vit_small_patch16_224.augreg_in1k", vit_shapes(384)),
        ("deit_base_patch16_384", vit_shapes(768, image_size=384)),
        ("deit_9_dagger", vit_shapes(256, 9, 3, True)),
    ],
)
def test_every_tensor_has_a_place(name, shapes):
    model = build(timm_vit.model_config(name))
    tensors = timm_vit.tensors(model, model.image_size, timm_vit._RULES)
    assert {key: tensor.shape for key, tensor in tensors.items()} == shapes


@pytest.mark.parametrize("classes", [3, 0])
def test_state_dict_survives_bit_by_bit(classes):
    """With any number of classes and any size of the images, which the weights tell."""
    state = noise(vit_shapes(**SMALL | dict(classes=classes)))
    model, variables = interop.from_torch("timm_vit", "deit_tiny_patch16_224", state)
    assert (model.num_classes, model.image_size) == (classes, 48)
    back = interop.to_torch("timm_vit", "vit_tiny_patch16_224", variables)
    assert set(back) == set(state)
    for name, x in state.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
    weight, kernel = state["blocks.7.attn.qkv.weight"], variables["params"]["block_7"]["attn"]["value"]["kernel"]
    np.testing.assert_array_equal(kernel[:, 1, 5], weight[2 * 192 + 64 + 5])


def test_every_tensor_that_does_not_fit_is_named():
    """Such as the second token of a distilled DeiT."""
    state = noise(vit_shapes(**SMALL))
    del state["blocks.3.mlp.fc2.bias"]
    state["dist_token"] = np.zeros((1, 1, 192), np.float32)
    state["norm.weight"] = np.zeros(191, np.float32)
    with pytest.raises(UsageError) as error:
        interop.from_torch("timm_vit", "deit_tiny_patch16_224", state)
    for part in ("3 tensors", "missing blocks.3.mlp.fc2.bias", "surplus dist_token", "norm.weight has shape [191]"):
        assert part in str(error.value), part
    with pytest.raises(UsageError, match="no vision transformer 'deit_tiny_patch16': did you mean"):
        interop.from_torch("timm_vit", "deit_tiny_patch16", state)
