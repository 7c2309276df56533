"""`xattn convert`: published weights, as files, to a workdir that `xattn eval` and `xattn.load` take."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from xattn.checkpoints import Checkpoints, open_workdir
from xattn.config import Config, UsageError, config_hash, load_config, lookup
from xattn.interop import deepmind_perceiver, hf_perceiver, qsformer, timm_crossvit, timm_vit


class Source(NamedTuple):
    """What a reader makes of published files.

    Attributes:
      config: name of the config whose data, task and evaluations fit.
      model: config of the model.
      variables: of the model.
      changes: what else differs from the config: section to keys and values.
    """

    config: str
    model: Mapping[str, Any]
    variables: Mapping[str, Any]
    changes: Mapping[str, Mapping[str, Any]]


def convert(kind: str, source: Path, destination: Path, data: Path | None = None) -> str:
    """Writes a workdir with `config.json`, `env.json` and `checkpoints/0`, whole or not at all.

    Args:
      kind: a name in `READERS`.
      source: the folder of `config.json` and `model.safetensors`; for "deepmind_perceiver" a file NAME.npz.
      destination: the workdir; it must not exist yet, or be empty.
      data: the folder of the data set, written to `config.data.root`.

    Returns:
      A line that says what was written.

    Raises:
      UsageError: a file is missing or is not what it should be, the weights don't fit their config, `destination`
        holds something, or the config's data is no folder.
    """
    read = lookup(READERS, kind, "kind of weights to convert")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} is no empty folder: choose another, or empty it.")
    found = read(source)
    config = _config(found, data)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        collections = {name: tree for name, tree in found.variables.items() if name not in ("params", "released")}
        model = {"params": found.variables["params"], "model_state": collections, "ema": {}}
        with open_workdir(partial, config), closing(Checkpoints(partial)) as checkpoints:
            checkpoints.save(0, model, {"step": np.zeros((), np.int32)}, {"config_hash": config_hash(config)})
        partial.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(found.variables["params"]))
    return f"{destination}: {count:,} parameters, config {found.config}"


def _config(found: Source, data: Path | None) -> Config:
    config = load_config(found.config)
    config.update(found.changes)
    config.dtype = "float32"  # that in which the weights were published
    if data is not None:
        if "root" not in config.data:
            raise UsageError(f"the data of {found.config} is '{config.data.name}', no folder: leave out --data.")
        config.data.root = str(data.absolute())
    with config.unlocked():
        config.model = dict(found.model)
    return config


def _hf_perceiver(folder: Path) -> Source:
    config, state_dict = _json(folder / "config.json"), _safetensors(folder / "model.safetensors")
    config |= {"architectures": [hf_perceiver.architecture(config, state_dict)]}
    name = hf_perceiver.VARIANT_OF[config["architectures"][0]]
    if config["architectures"][0] == "PerceiverForSequenceClassification":
        raise UsageError("there is no config to evaluate a classifier of text with: use xattn.interop.from_torch.")
    model = hf_perceiver.model_config(config)
    _, variables = hf_perceiver.from_torch(config, state_dict)
    changes: dict[str, Any] = {}
    if name == "language":
        changes["data"] = dict(length=model["input_preprocessor"]["max_positions"])
    elif name == "multimodal":
        queries, outputs = model["decoder"]["queries"], model["output_postprocessor"]["modalities"]
        (frames, side, _), (rows,) = queries["image"]["index_dims"], queries["audio"]["index_dims"]
        patch = outputs["audio"]["samples_per_patch"]
        changes["task"] = dict(num_classes=outputs["label"]["features"], samples_per_patch=patch)
        changes["data"] = dict(frames=frames, image_size=side, audio_length=rows * patch)
    elif name != "optical_flow" and (folder / "preprocessor_config.json").is_file():
        changes = _image_processing(_json(folder / "preprocessor_config.json"))
    return Source(f"perceiver_io/{name}", model, variables, changes)


def _image_processing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' PerceiverImageProcessor does, if it crops as for the published weights."""

    def side(key: str, default: int) -> int:
        size = processor.get(key, default)
        return size["height"] if isinstance(size, Mapping) else size

    size, crop, resample = side("size", 224), side("crop_size", 256), processor.get("resample", 3)
    if crop != size + 32 or resample != 3:
        raise UsageError(
            f"preprocessor_config.json crops {size}/{crop} of the image with resample {resample}: "
            f"only {size}/{size + 32} and 3 (bicubic) are supported."
        )
    # transformers' default for what is left out is ImageNet's, which our config has.
    names = dict(mean="image_mean", std="image_std")
    task = {ours: tuple(processor[theirs]) for ours, theirs in names.items() if theirs in processor}
    return dict(data=dict(image_size=size), task=task)


def _deepmind_perceiver(path: Path) -> Source:
    name = path.stem
    model = deepmind_perceiver.model_config(name)
    try:
        loaded = np.load(path)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("one array")
        with loaded as file:
            arrays = dict(file)
    except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as an npz of arrays: docs/weights.md says how to make one.") from error
    _, variables = deepmind_perceiver.from_haiku(name, arrays)
    return Source(f"perceiver_io/{name}", model, variables, {})


def _qsformer(folder: Path) -> Source:
    config = _json(folder / "config.json")
    _, variables = qsformer.from_torch(config, _safetensors(folder / "model.safetensors"))
    return Source(f"qsformer/{config['dataset']}", qsformer.model_config(config), variables, {})


def _timm_crossvit(folder: Path) -> Source:
    return _timm(folder, timm_crossvit, "crossvit/imagenet")


def _timm_vit(folder: Path) -> Source:
    return _timm(folder, timm_vit, "vit/imagenet")


def _timm(folder: Path, kind: ModuleType, config_name: str) -> Source:
    config = _json(folder / "config.json")
    if "architecture" not in config:
        raise UsageError(f"{folder / 'config.json'} has no 'architecture': add timm's name of the model.")
    name, state_dict = config["architecture"], _safetensors(folder / "model.safetensors")
    pool = lookup({"token": "token", "avg": "mean"}, config.get("global_pool", "token"), "global_pool")
    _, variables = kind.from_torch(name, state_dict, pool=pool)
    model = kind.model_config(name, state_dict, pool=pool)
    size = model["image_size"] if kind is timm_vit else model["image_sizes"][0]
    changes = _timm_processing(config.get("pretrained_cfg", {}), size)
    return Source(f"{config_name}:{kind.variant(name)}", model, variables, changes)


def _timm_processing(processing: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What timm does to the images of evaluation, as far as a `pretrained_cfg` says it."""
    for key, ours in dict(interpolation="bicubic", crop_mode="center", input_size=[3, size, size]).items():
        if (theirs := processing.get(key, ours)) != ours:
            raise UsageError(f"pretrained_cfg {key} of config.json is {theirs!r}: only {ours!r} is supported.")
    data: dict[str, Any] = dict(image_size=size)
    if "crop_pct" in processing:
        data["transform"] = dict(crop_fraction=float(processing["crop_pct"]))
    return dict(data=data, task={key: tuple(processing[key]) for key in ("mean", "std") if key in processing})


READERS = {
    "deepmind_perceiver": _deepmind_perceiver,
    "hf_perceiver": _hf_perceiver,
    "qsformer": _qsformer,
    "timm_crossvit": _timm_crossvit,
    "timm_vit": _timm_vit,
}


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: give the folder of config.json and model.safetensors.") from error
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}): download it again.") from error
    if not isinstance(loaded, Mapping):
        raise UsageError(f"{path} holds a {type(loaded).__name__} where an object is needed: download it again.")
    return dict(loaded)


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("*") if file.suffix in (".bin", ".pth", ".pt", ".ckpt"))
        hint = f"; docs/weights.md says how to make it of {others[0]}" if others else ""
        raise UsageError(f"there is no {path}{hint or ': give the folder that holds it'}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged ({error}): download it again.") from error
