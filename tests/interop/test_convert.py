"""Folders of published weights to workdirs: what load gives, what the config says, what is refused."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import xattn
from tests.interop import test_deepmind_perceiver as haiku
from tests.interop.test_hf_perceiver import ATOL, CONV, FLOW, FOURIER, LEARNED, MASKED_LM, MULTIMODAL, SEQUENCE, given
from tests.interop.test_hf_perceiver import golden as held
from tests.interop.test_qsformer import cheap
from tests.interop.timm_weights import crossvit_shapes, noise, vit_shapes
from xattn.checkpoints import read_config
from xattn.cli import main
from xattn.config import UsageError, load_config
from xattn.interop import convert as module
from xattn.interop import deepmind_perceiver, from_torch
from xattn.interop.convert import convert
from xattn.interop.perceiver import merge
from xattn.models import MODELS
from xattn.models.crossvit import VARIANTS, CrossViT
from xattn.models.vit import VARIANTS as VIT_VARIANTS
from xattn.models.vit import VisionTransformer

PROCESSOR = dict(size=16, crop_size=48, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])


def published(folder, architecture, dtype=np.float32, **changes):
    """A folder as a page of Hugging Face holds it."""
    config, state, _ = held(architecture)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes))
    state = {name: x.astype(dtype) if x.dtype == np.float32 else x for name, x in state.items()}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("architecture", [MASKED_LM, CONV])
def test_loaded_workdir_computes_what_the_reference_does(architecture, tmp_path):
    line = convert("hf_perceiver", published(tmp_path / "from", architecture), tmp_path / "to")
    assert "parameters, config perceiver_io/" in line
    assert {path.name for path in tmp_path.iterdir()} == {"from", "to"}
    assert (tmp_path / "to" / "env.json").is_file()
    model, variables, config = xattn.load(tmp_path / "to")
    assert (config.dtype, config.model.variant) == ("float32", "hf")
    out = jax.jit(model.apply)(variables, **given(architecture))
    np.testing.assert_allclose(out, held(architecture)[2]["hf_"], atol=ATOL[architecture])


def test_config_says_how_inputs_are_prepared(tmp_path):
    image = published(tmp_path / "image", LEARNED)
    (image / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    text, clips = published(tmp_path / "text", MASKED_LM), published(tmp_path / "clips", MULTIMODAL)
    for folder in (image, text, clips):
        convert("hf_perceiver", folder, tmp_path / f"{folder.name}-run", tmp_path)
    config = read_config(tmp_path / "image-run")
    assert (config.task.mean, config.task.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config.data.image_size, config.data.root) == (16, str(tmp_path))
    assert config.model.input_preprocessor.positions.index_dims == (6, 6)
    assert read_config(tmp_path / "text-run").data.length == 12
    config = read_config(tmp_path / "clips-run")
    assert (config.data.frames, config.data.image_size, config.data.audio_length) == (4, 16, 128)
    assert (config.task.num_classes, config.task.samples_per_patch) == (10, 16)
    expected, state, _ = held(MULTIMODAL)
    assert xattn.load(tmp_path / "clips-run")[0] == from_torch("hf_perceiver", expected, state, dtype="float32")[0]


def test_colours_are_those_of_imagenet_unless_said(tmp_path):
    image = published(tmp_path / "image", LEARNED)
    processor = {key: value for key, value in PROCESSOR.items() if not key.startswith("image_")}
    (image / "preprocessor_config.json").write_text(json.dumps(processor))
    convert("hf_perceiver", image, tmp_path / "to")
    task = read_config(tmp_path / "to").task
    assert (task.mean, task.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(dtype, tmp_path):
    convert("hf_perceiver", published(tmp_path / "from", FLOW, dtype), tmp_path / "to")
    _, variables, _ = xattn.load(tmp_path / "to")
    latents = held(FLOW)[1]["perceiver.embeddings.latents"]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(variables["params"]["encoder"]["latents"], latents.astype(dtype).astype(np.float32))


def test_command_line_converts_and_evaluates(tmp_path, capsys):
    source, data = published(tmp_path / "from", FOURIER), tmp_path / "data"
    (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | dict(size=dict(height=16, width=16))))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            folder = data / split / f"class{label}"
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / "0.png")
    workdir = str(tmp_path / "to")
    assert main(["convert", "hf_perceiver", str(source), workdir, f"--data={data}"]) == 0
    assert main(["eval", f"--workdir={workdir}"]) == 0
    assert "imagenet" in capsys.readouterr().out
    result = json.loads((tmp_path / "to" / "evals" / "0" / "imagenet.json").read_text())
    assert len(result["per_example"]) == 10
    assert main(["convert", "hf_perceiver", str(source)]) == 2
    assert "give KIND SOURCE WORKDIR" in capsys.readouterr().err


def test_npz_of_deepmind(tmp_path, monkeypatch):
    small = merge(deepmind_perceiver.VARIANTS["imagenet_conv"], haiku.SMALL["imagenet_conv"])
    monkeypatch.setitem(deepmind_perceiver.VARIANTS, "imagenet_conv", small)
    np.savez(tmp_path / "imagenet_conv.npz", **haiku.arrays("imagenet_conv"))
    convert("deepmind_perceiver", tmp_path / "imagenet_conv.npz", tmp_path / "to")
    model, variables, config = xattn.load(tmp_path / "to")
    assert model.variant == "deepmind" and config.task.mean == (0.485, 0.456, 0.406)
    jax.tree.map(np.testing.assert_array_equal, variables, haiku.converted("imagenet_conv")[1])

    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"pickled", b"", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "language.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"language.npz cannot be read as an npz of arrays: docs/weights.md"):
            convert("deepmind_perceiver", tmp_path / "language.npz", tmp_path / "other")


@pytest.mark.slow
def test_qsformer_loses_what_it_does_not_use(tmp_path):
    source = tmp_path / "from"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(dict(dataset="cub", N=1)))
    state = {name: np.array(x) for name, x in cheap(1).items()}
    save_file(state, source / "model.safetensors")
    convert("qsformer", source, tmp_path / "to")
    model, variables, config = xattn.load(tmp_path / "to")
    assert (model.num_blocks, model.encoder.attn_axis, config.data.name) == (1, "batch", "class_folders")
    assert set(variables) == {"params", "batch_stats"}


# What the hub says of a model of timm's, as far as it is read, and a few keys that are not.
TIMM = dict(
    architecture="crossvit_tiny_240",
    num_classes=3,
    global_pool="token",
    pretrained_cfg=dict(
        tag="in1k",
        input_size=[3, 48, 48],
        interpolation="bicubic",
        crop_pct=0.8,
        crop_mode="center",
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        first_conv=["patch_embed.0.proj", "patch_embed.1.proj"],
    ),
)


@pytest.fixture
def of_timm(tmp_path, monkeypatch):
    """Makes a folder as the hub holds it, of a narrow CrossViT-Ti or a ViT of two blocks, for images of 48 x 48."""
    crossvit = VARIANTS["tiny_240"] | dict(features=(8, 12), num_heads=(2, 2), depths=(1, 1))
    vit = VIT_VARIANTS["vit_tiny_patch16_224"] | dict(features=8, num_heads=2, depth=2)
    monkeypatch.setitem(VARIANTS, "tiny_240", crossvit)
    monkeypatch.setitem(VIT_VARIANTS, "vit_tiny_patch16_224", vit)
    monkeypatch.setitem(MODELS, "crossvit_tiny_240", functools.partial(CrossViT, **crossvit))
    monkeypatch.setitem(MODELS, "vit_tiny_patch16_224", functools.partial(VisionTransformer, **vit))

    def make(**changes):
        config = TIMM | changes | {"pretrained_cfg": TIMM["pretrained_cfg"] | changes.get("pretrained_cfg", {})}
        shapes = crossvit_shapes((8, 12), 1, 4, False, (48, 32), 3)
        if config["architecture"].startswith("vit"):
            shapes = vit_shapes(8, 2, 4, False, 48, 3)
        folder = tmp_path / "from"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(noise(shapes), folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    "kind, architecture, config_name",
    [
        ("timm_crossvit", "crossvit_tiny_240", "crossvit/imagenet:tiny_240"),
        ("timm_vit", "vit_tiny_patch16_224", "vit/imagenet:vit_tiny_patch16_224"),
    ],
)
def test_folder_of_timm(kind, architecture, config_name, of_timm, tmp_path):
    source = of_timm(architecture=architecture)
    assert convert(kind, source, tmp_path / "to", tmp_path).endswith(config_name)
    model, variables, config = xattn.load(tmp_path / "to")
    expected = from_torch(kind, architecture, load_file(source / "model.safetensors"), dtype="float32")
    assert model == expected[0] and model.num_classes == 3
    jax.tree.map(np.testing.assert_array_equal, variables, expected[1])
    assert (config.task.mean, config.task.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config.data.image_size, config.data.root) == (48, str(tmp_path))
    assert (config.data.transform.name, config.data.transform.crop_fraction) == ("timm", 0.8)


def test_what_a_folder_of_timm_leaves_out_is_that_of_the_config(of_timm, tmp_path):
    """As where somebody wrote config.json for a file of IBM's, with a name of IBM's."""
    source = of_timm()
    (source / "config.json").write_text(json.dumps(dict(architecture="crossvit_tiny_224", global_pool="avg")))
    convert("timm_crossvit", source, tmp_path / "to")
    config, published = read_config(tmp_path / "to"), load_config("crossvit/imagenet:tiny_240")
    assert config.task.to_dict() == published.task.to_dict()
    assert config.data.to_dict() == published.data.to_dict() | dict(image_size=48)  # that of the weights
    assert (config.model.num_classes, config.model.image_sizes, config.model.pool) == (3, (48, 32), "mean")


def test_command_line_evaluates_weights_of_timm(of_timm, tmp_path):
    source, data = of_timm(), tmp_path / "data"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(3):
            folder = data / split / f"class{label}"
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (60, 52, 3), np.uint8)).save(folder / "0.png")
    workdir = str(tmp_path / "to")
    assert main(["convert", "timm_crossvit", str(source), workdir, f"--data={data}"]) == 0
    assert main(["eval", f"--workdir={workdir}"]) == 0
    result = json.loads((tmp_path / "to" / "evals" / "0" / "imagenet.json").read_text())
    assert len(result["per_example"]) == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pretrained_cfg=dict(interpolation="bilinear")), "interpolation of .* is 'bilinear': only 'bicubic'"),
        (dict(pretrained_cfg=dict(crop_mode="squash")), "crop_mode of .* is 'squash': only 'center'"),
        (dict(pretrained_cfg=dict(input_size=[3, 48, 60])), r"input_size of .* is \[3, 48, 60\]: only \[3, 48, 48\]"),
        (dict(global_pool="max"), "no global_pool 'max'"),
        (dict(architecture="crossvit_tny_240"), "no CrossViT 'crossvit_tny_240': did you mean 'crossvit_tiny_240'"),
        (dict(architecture="crossvit_9_240"), "do not fit the config"),
    ],
)
def test_folders_of_timm_that_are_refused(changes, message, of_timm, tmp_path):
    with pytest.raises(UsageError, match=message):
        convert("timm_crossvit", of_timm(**changes), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_folder_of_timm_must_say_what_it_holds(of_timm, tmp_path):
    source = of_timm()
    (source / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="config.json has no 'architecture': add timm's name"):
        convert("timm_crossvit", source, tmp_path / "to")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    source, workdir = published(tmp_path / "from", FLOW), tmp_path / "to"
    workdir.mkdir()
    convert("hf_perceiver", source, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="to is no empty folder: choose another, or empty it"):
        convert("hf_perceiver", source, workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
    source = published(tmp_path / "from", FLOW)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(module.Checkpoints, "save", full)
    with pytest.raises(OSError, match="no space"):
        convert("hf_perceiver", source, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def without(name, other=None):
    def change(folder):
        (folder / name).unlink()
        if other:
            (folder / other).touch()

    return change


def writing(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    "architecture, change, message",
    [
        (FLOW, shutil.rmtree, "config.json cannot be read: give the folder of config.json"),
        (FLOW, without("model.safetensors"), "there is no .*model.safetensors: give the folder that holds it"),
        (FLOW, without("model.safetensors", "pytorch_model.bin"), "docs/weights.md says how .* pytorch_model.bin"),
        (FLOW, writing("model.safetensors", "<html>"), "model.safetensors is damaged .* download it again"),
        (FLOW, writing("config.json", "<html>"), "config.json is no JSON"),
        (FLOW, writing("config.json", "[1]"), "config.json holds a list where an object is needed: download it again"),
        (SEQUENCE, lambda folder: None, "no config to evaluate a classifier of text"),
        (
            FOURIER,
            writing("preprocessor_config.json", json.dumps(PROCESSOR | dict(crop_size=16))),
            "crops 16/16 of the image with resample 3: only 16/48 and 3",
        ),
    ],
)
def test_files_that_are_not_what_they_should_be(architecture, change, message, tmp_path):
    source = published(tmp_path / "from", architecture)
    change(source)
    with pytest.raises(UsageError, match=message):
        convert("hf_perceiver", source, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_unknown_kind_is_named(tmp_path):
    with pytest.raises(UsageError, match="kind of weights to convert 'hf_perciever'.*hf_perceiver"):
        convert("hf_perciever", tmp_path, tmp_path / "to")
