"""Configs and split files with mistakes in them end in a model that could be trained, or in one sentence."""

import contextlib
import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from xattn import data, evals, models, tasks
from xattn.cli import main
from xattn.config import UsageError, load_config, to_json
from xattn.train import loop, plan

NAMES = ("protonet/glyphs", "qsformer/glyphs", "crossvit/letters", "perceiver_io/language", "vit/imagenet")
CONFIGS = {name: to_json(load_config(f"{name}:smoke")) for name in NAMES}
VALUES = (-1, 0, 1, 3, 7, 10**12, -0.5, 0.5, 1e30, float("nan"), float("inf"), True, None, "", "nonsense", "3")
VALUES += ([], {}, [1, 2], [0, -1], ["a"], {"name": "nonsense"}, {"name": 3}, {"a": {"b": 1}}, {"every": 0})
# What a `name` may say somewhere.
OTHER_NAMES = (
    *models.MODELS,
    *models.PARTS,
    *tasks.TASKS,
    *data.SOURCES,
    *data.PIPELINES,
    *evals.EVALS,
    "adam",
    "cosine",
    "nonsense",
    3,
)


class Planned(Exception):
    """The shapes of the whole state are known: a step would be traced now, and nothing is written before."""


# Configs.


@st.composite
def mutated_configs(draw: st.DrawFn) -> dict[str, Any]:
    """The smoke variant of a config with one or two mistakes."""
    config = json.loads(CONFIGS[draw(st.sampled_from(NAMES))])
    for _ in range(draw(st.integers(1, 2))):
        node, key = draw(st.sampled_from(_places(config)))
        match draw(st.sampled_from(("delete", "change", "misspell", "nest", "flatten", "move"))):
            case "delete":
                del node[key]
            case "change":
                node[key] = draw(st.sampled_from(OTHER_NAMES if key == "name" else VALUES))
            case "misspell":
                node[f"{key}s"] = node.pop(key)
            case "nest":
                node[key] = {key: node[key]}
            case "flatten":
                value = node.pop(key)
                node |= value if isinstance(value, dict) else {key: [value]}
            case "move":
                elsewhere, _ = draw(st.sampled_from(_places(config)))
                elsewhere[key] = json.loads(json.dumps(node[key]))
    return config


def _places(node: Any) -> list[tuple[dict[str, Any], str]]:
    """Each mapping of a tree with each of its keys."""
    if not isinstance(node, dict):
        return []
    return [(node, key) for key in node] + [place for value in node.values() for place in _places(value)]


def _forward(model: Any, task: Any, *_: Any, **__: Any) -> Callable[..., Any]:
    """In place of a step, whose gradients take seconds to trace: its forward pass."""

    def step(state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        variables = {"params": state.params, **state.model_state}
        loss, metrics, _ = task(model, variables, batch, train=True, rngs={"dropout": key, "sfc": key})
        return state, (loss, metrics)

    return step


def check_config(config: dict[str, Any], folder: Path) -> bool:
    """Whether a run of `config` would start; AssertionError unless it does or is refused with a sentence and code 2."""
    file = folder / "mistaken.py"
    file.write_text(f"from xattn.config import from_json\nget_config = lambda _: from_json({json.dumps(config)!r})\n")
    said = io.StringIO()
    with (
        mock.patch.object(plan, "make_train_step", _forward),
        mock.patch.object(loop, "open_workdir", side_effect=Planned),
        contextlib.redirect_stderr(said),
    ):
        try:
            code = main(["train", f"--config={file}", f"--workdir={folder / 'run'}"])
        except Planned:
            return True
    lines = said.getvalue().strip().splitlines()
    assert (code, len(lines)) == (2, 1) and lines[0].startswith("xattn train: "), f"code {code}: {lines}"
    assert not (folder / "run").exists()
    return False


# Split files and folder listings, as users write them.


def class_folders(root: Path) -> tuple[Callable[[], Any], Path | None]:
    """train/, val/ and test/ with a folder for each class; the tree itself is mutated."""
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            image(root / split / f"{split}_{name}" / "0.png")
    return functools.partial(data.build, dict(name="class_folders", root=str(root), image_size=8), "train"), None


def split_csv(root: Path) -> tuple[Callable[[], Any], Path]:
    (root / "split").mkdir()
    for split in ("train", "val", "test"):
        rows = [f"{split}_{name}.png,{split}_{name}" for name in ("a", "b", "c")]
        for row in rows:
            image(root / "images" / row.partition(",")[0])
        (root / "split" / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    build = functools.partial(data.build, dict(name="class_folders", root=str(root), image_size=8), "train")
    return build, root / "split" / "train.csv"


def pets(root: Path) -> tuple[Callable[[], Any], Path]:
    (root / "annotations").mkdir()
    for name in ("trainval", "test"):
        lines = [f"{breed}_{name}_{number} {number} 1 1" for number, breed in enumerate(("Beagle", "Pug"), start=1)]
        for line in lines:
            image(root / "images" / f"{line.split()[0]}.jpg")
        (root / "annotations" / f"{name}.txt").write_text("# a comment\n" + "\n".join(lines) + "\n")
    return functools.partial(data.build, dict(name="pets", root=str(root)), "train"), root / "annotations/trainval.txt"


def flying_chairs(root: Path) -> tuple[Callable[[], Any], Path]:
    for number in ("00001", "00002"):
        for part in ("img1.ppm", "img2.ppm", "flow.flo"):
            (root / f"{number}_{part}").touch()
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n")
    build = functools.partial(data.build, dict(name="flying_chairs", root=str(root)), "train")
    return build, root / "FlyingChairs_train_val.txt"


LAYOUTS = (class_folders, split_csv, pets, flying_chairs)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


@st.composite
def mistakes(draw: st.DrawFn) -> tuple[Callable, list[Callable[[Path, Path | None], None]]]:
    """A layout, and what happens to its list or its tree."""

    def edit(content: bytes) -> bytes:
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 12)))
        junk = draw(
            st.sampled_from((b"", b",", b"\n", b'"', b"\x00", b"\xff\xfe", b"9" * 30, b"../x", b"   ", b"\r", b"0"))
        )
        return content[:start] + junk * draw(st.integers(1, 3)) + content[stop:]

    def in_list(_: Path, listed: Path | None) -> None:
        if listed:
            listed.write_bytes(edit(listed.read_bytes()))

    def in_tree(root: Path, _: Path | None) -> None:
        path = draw(st.sampled_from(sorted(root.rglob("*"))))
        match draw(st.sampled_from(("remove", "file", "folder", "copy", "odd", "loop"))):
            case "remove":
                remove(path)
            case "file":
                remove(path)
                path.write_bytes(b"nothing")
            case "folder":
                remove(path)
                path.mkdir()
            case "copy":
                other = draw(st.sampled_from(sorted(root.rglob("*"))))
                if path.is_dir() and not other.parent.is_relative_to(path):
                    shutil.copytree(path, other.parent / "copy", dirs_exist_ok=True)
            case "odd":
                path.rename(path.with_name(draw(st.sampled_from((" ", ".hidden", "\udcff", "a,b", "a\nb", "TRAIN")))))
            case "loop":
                remove(path)
                path.symlink_to(path)

    steps = [draw(st.sampled_from((in_list, in_tree))) for _ in range(draw(st.integers(1, 2)))]
    return draw(st.sampled_from(LAYOUTS)), steps


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_data(layout: Callable, steps: list[Callable], folder: Path) -> bool:
    """Whether the source opens; AssertionError unless it does or is refused with a sentence."""
    root = folder / "root"
    if root.exists():
        shutil.rmtree(root)
    root.mkdir()
    build, listed = layout(root)
    for step in steps:
        with contextlib.suppress(
            FileNotFoundError, NotADirectoryError, IsADirectoryError
        ):  # the mistake before took it
            step(root, listed)
    try:
        build()
    except UsageError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


# Both.


def fuzz(folder: Path, count: int) -> str:
    """Three quarters of `count` mistakes in configs, one quarter in data; AssertionError if one is a traceback."""
    good = {True: 0, False: 0}

    @quickly(count - count // 4)
    @given(mutated_configs())
    def configs(config: dict[str, Any]) -> None:
        good[check_config(config, folder)] += 1

    @quickly(count // 4)
    @given(st.data())
    def files(drawn: st.DataObject) -> None:
        good[check_data(*drawn.draw(mistakes()), folder)] += 1

    configs()
    files()
    return f"{count} mistakes: {good[False]} times a sentence and code 2, {good[True]} times a model or a source"


def quickly(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def test_a_hundred_mistakes_end_in_a_model_or_in_a_sentence():
    """In a process of its own: here, checked annotations would find mistakes before a user's run does."""
    command = [sys.executable, "-m", "tests.distributed.drill", "--only=fuzz", "--count=100"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "100 mistakes" in ended.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_data_without_mistakes_opens(layout, tmp_path):
    assert check_data(layout, [], tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_without_mistakes_are_built(name, tmp_path):
    assert check_config(json.loads(CONFIGS[name]), tmp_path)
