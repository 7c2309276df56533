"""A run's folder: whose it is, what may be loaded from it, and what is said when it may not."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xattn
from xattn.checkpoints import Checkpoints, DamagedCheckpoint, open_workdir, read_config
from xattn.checkpoints.manager import _checksum
from xattn.checkpoints.workdir import load_variables
from xattn.config import Config, UsageError, config_hash, to_json, with_defaults, write_atomically
from xattn.models import Conv4


def config(**changes: object) -> Config:
    """A run of Conv-4, the smallest model that `xattn.load` can build."""
    whole = dict(
        model=dict(name="conv4", widths=(2, 2), num_groups=2),
        dtype="float32",
        optimizer=dict(name="sgd", schedule=dict(name="step")),
        num_steps=3,
        log_every=1,
        checkpoint=dict(every=1, keep=2),
        validation=dict(every=2, metric="accuracy"),
        evals=dict(),
        mesh=dict(data=1),
    )
    return with_defaults(Config(whole | changes))


def opened(workdir: Path, config: Config) -> None:
    """What a run that does nothing leaves."""
    with open_workdir(workdir, config):
        pass


def model_item(value: float, ema: float | None = None) -> dict:
    """What a run saves of its model, each parameter `value` and each average `ema`."""
    model = Conv4(widths=(2, 2), num_groups=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    shapes = jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda box: hasattr(box, "names"))
    fill = lambda number: jax.tree.map(lambda leaf: jnp.full(leaf.shape, number, leaf.dtype), shapes)  # noqa: E731
    return {"params": fill(value), "model_state": {}, "ema": {} if ema is None else fill(ema)}


def save(workdir: Path, scores: dict[int, float | None], ema: bool = False) -> None:
    checkpoints = Checkpoints(workdir, keep=9, metric="accuracy")
    for step, score in scores.items():
        item = model_item(step, 10 * step if ema else None)
        checkpoints.save(step, item, {"step": jnp.int32(step)}, {}, None if score is None else {"accuracy": score})
    checkpoints.close()


def value(variables: dict) -> float:
    (number,) = {float(x) for leaf in jax.tree.leaves(variables["params"]) for x in np.unique(leaf)}
    return number


# Whose folder it is.


def test_a_new_workdir_holds_the_config_and_the_environment(tmp_path):
    workdir = tmp_path / "deep" / "run"
    opened(workdir, config())
    assert read_config(workdir).to_dict() == config().to_dict()
    assert (workdir / "config.json").read_text() == to_json(config())
    environment = json.loads((workdir / "env.json").read_text())
    assert environment["config_hash"] == config_hash(config())
    assert environment["jax"] == jax.__version__
    assert len(environment["devices"]) == jax.device_count()
    assert {path.name for path in workdir.iterdir()} == {"config.json", "env.json", ".lock"}


def test_an_empty_folder_will_do(tmp_path):
    opened(tmp_path, config())
    assert read_config(tmp_path).num_steps == 3


def test_the_same_experiment_continues_with_what_may_change(tmp_path):
    opened(tmp_path, config())
    longer = config(num_steps=9, log_every=5, mesh=dict(data=8), evals=dict(a=dict(name="fewshot")), validation=None)
    opened(tmp_path, longer)
    assert read_config(tmp_path).to_dict() == longer.to_dict()


def test_another_config_is_refused_with_the_differing_keys(tmp_path):
    opened(tmp_path, config())
    before = (tmp_path / "config.json").read_text()
    other = config(
        num_steps=9, dtype="bfloat16", optimizer=dict(name="sgd", schedule=dict(name="cosine"), weight_decay=0.1)
    )
    with pytest.raises(UsageError) as error:
        opened(tmp_path, other)
    assert "dtype, optimizer.schedule.name, optimizer.weight_decay" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "num_steps" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_a_foreign_folder_or_a_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UsageError, match=f"^{place} is no empty folder and holds no run: choose another"):
            opened(place, config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_a_run_left_that_was_killed_before_it_wrote_its_config_is_no_foreign_file(tmp_path):
    (tmp_path / ".config.json.4711").write_text('{"model": {')
    (tmp_path / ".lock").write_text("process 1 on earth")
    opened(tmp_path, config())
    assert read_config(tmp_path).to_dict() == config().to_dict()


def test_fewer_steps_than_were_done_are_refused_untouched(tmp_path):
    opened(tmp_path, config())
    save(tmp_path, {2: None, 3: None})
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=f"{tmp_path} is at step 3, beyond config.num_steps 2: give 3 or more"):
        opened(tmp_path, config(num_steps=2, log_every=7))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    opened(tmp_path, config(num_steps=3, log_every=7))


def test_a_workdir_in_use_is_refused_until_it_is_free(tmp_path):
    with open_workdir(tmp_path, config()):
        before = (tmp_path / "config.json").read_text()
        with pytest.raises(UsageError, match=rf"{tmp_path} is in use by another run \(process {os.getpid()} on .+\)"):
            opened(tmp_path, config(num_steps=9))
        assert (tmp_path / "config.json").read_text() == before
    opened(tmp_path, config(num_steps=9))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("failed [os_error_code='28']")])
def test_a_full_disk_is_one_sentence_at_the_start_and_later(tmp_path, monkeypatch, error):
    words = rf"{tmp_path} can't be written to \(No space left on device\); .*: make room, then give"
    with pytest.raises(UsageError, match=words), open_workdir(tmp_path, config()):
        raise error
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(UsageError, match=words):
        opened(tmp_path, config())


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written to .Not a directory.; .*: choose another --workdir"):
        opened(tmp_path / "file" / "run", config())
    with pytest.raises(UsageError, match="too long"):
        opened(tmp_path / ("x" * 300), config())


def test_errors_of_other_files_pass(tmp_path):
    error = PermissionError(errno.EACCES, "no", "/data/train/1.png")
    with pytest.raises(PermissionError), open_workdir(tmp_path, config()):
        raise error


# Atomic writes.


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "old")
    write_atomically(path, "older")
    assert path.read_text() == "older"
    original = Path.write_bytes

    def half(self, contents):
        original(self, contents[: len(contents) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new contents")
    assert path.read_text() == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


# Loading.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was best at step 4 of 2, 4, 6, with averages."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    opened(workdir, config())
    save(workdir, {2: 0.3, 4: 0.8, 6: 0.5}, ema=True)
    return workdir


@pytest.mark.parametrize(("step", "found"), [("best", 4), ("latest", 6), (2, 2), ("2", 2)])
def test_load_takes_the_step_that_is_asked_for(run, step, found):
    assert value(load_variables(run, step, ema=False)[1]) == found
    assert load_variables(run, step)[0] == found
    assert value(load_variables(run, step)[1]) == 10 * found


def alter(checkpoint: Path) -> None:
    """Makes it one whose arrays are not what was saved."""
    path = checkpoint / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["checksum"]
    array = next(iter(meta["checksums"]["model"]))
    meta["checksums"]["model"][array] ^= 1
    path.write_text(json.dumps(meta | {"checksum": _checksum(meta)}))


def test_where_the_best_or_the_latest_is_damaged_the_next_one_is_taken(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    for step, left in ((4, {"best": 6, "latest": 6}), (6, {"best": 2, "latest": 2}), (2, {})):
        alter(tmp_path / "run" / "checkpoints" / str(step))
        for name, found in left.items():
            assert load_variables(tmp_path / "run", name)[0] == found
        with pytest.raises(DamagedCheckpoint, match=f"^checkpoint {step} in .* is damaged .*: choose another step"):
            load_variables(tmp_path / "run", step)
    assert re.search("checkpoint 4 in .* is damaged .*; 6 is taken", caplog.text)
    assert not (tmp_path / "run" / "damaged").exists()  # who only reads moves nothing
    with pytest.raises(DamagedCheckpoint, match="^checkpoint 2 in "):
        load_variables(tmp_path / "run", "latest")


def test_a_step_whose_metrics_are_damaged_is_not_the_best_and_that_is_told(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
    assert load_variables(tmp_path / "run", "best")[0] == 6
    assert re.search("checkpoint 4 in .* is damaged .*: it can't be the best", caplog.text)


@pytest.mark.parametrize("contents", ["", '{"seed": 0', "[]"])
def test_a_config_that_was_cut_is_told_in_a_sentence(run, tmp_path, contents):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(contents)
    for opening in (lambda: xattn.load(tmp_path / "run"), lambda: opened(tmp_path / "run", config())):
        with pytest.raises(UsageError, match="config.json is damaged .*: copy it back from a backup"):
            opening()


def test_load_gives_a_model_that_works_at_once(run):
    model, variables, loaded = xattn.load(str(run))
    assert loaded.to_dict() == config().to_dict()
    assert value(variables) == 40
    images = jnp.ones((1, 4, 4, 1))
    expected = Conv4(widths=(2, 2), num_groups=2, dtype="float32").apply(variables, images)
    jax.tree.map(np.testing.assert_array_equal, model.apply(variables, images), expected)


def test_best_is_the_latest_where_no_validation_ran(tmp_path):
    for name, validation in (("none", None), ("empty", {}), ("unused", dict(every=2, metric="accuracy"))):
        opened(tmp_path / name, config(validation=validation))
        save(tmp_path / name, {1: None, 3: None})
        assert load_variables(tmp_path / name, "best")[0] == 3
        assert value(load_variables(tmp_path / name, "best")[1]) == 3  # no average: the parameters themselves


def test_step_zero_may_be_the_best(tmp_path):
    opened(tmp_path, config())
    save(tmp_path, {0: 0.9, 1: 0.1})
    assert load_variables(tmp_path, "best")[0] == 0


@pytest.mark.parametrize("step", [3, "3", "first", "-1", 10**12])
def test_a_step_that_is_not_there_is_told_with_those_that_are(run, step):
    with pytest.raises(UsageError, match=f"{run} has no checkpoint '{step}': it has 2, 4, 6, latest, best"):
        xattn.load(run, step)


def test_a_folder_without_a_run_or_without_checkpoints(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=f"^{place} holds no run .*config.json.*: give the --workdir"):
            xattn.load(place)
    opened(tmp_path, config())
    with pytest.raises(UsageError, match=f"^{tmp_path} has no checkpoint yet: train it first"):
        xattn.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match=f"^{tmp_path} has no checkpoint 'best': it has none"):
        xattn.load(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
