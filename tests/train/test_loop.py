"""The training program as a whole, on the smoke config of the main job."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xattn
from xattn import data, evals, tasks
from xattn.checkpoints import Checkpoints
from xattn.config import Config, UsageError, load_config
from xattn.tasks import fewshot
from xattn.train import NotFinite, Preempted, train

VALIDATION = dict(name="fewshot", split="val", queries=2, num_episodes=3, metric="accuracy")


def smoke(name: str = "protonet", **changes: object) -> Config:
    """A smoke config without evaluations, so that a run is its steps alone; `a__b` changes the key a.b."""
    config = load_config(f"{name}/glyphs:smoke")
    config.unlock()
    config.evals = {}
    config.validation = changes.pop("validation", {})
    config.optimizer.schedule = {"name": "constant"}
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in rows(workdir) if row["kind"] == "train"]


def params(workdir: Path) -> dict:
    return xattn.load(workdir, "latest")[1]["params"]


def assert_equal_trees(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_finished_run_continues_with_more_steps_as_if_never_finished(tmp_path):
    train(smoke(num_steps=6, ema_decay=0.9), tmp_path / "whole")
    train(smoke(num_steps=3, ema_decay=0.9), tmp_path / "parts")
    train(smoke(num_steps=6, ema_decay=0.9), tmp_path / "parts")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert len(rows(tmp_path / "whole")) == 6
    assert_equal_trees(params(tmp_path / "whole"), params(tmp_path / "parts"))


def test_sigterm_saves_and_the_same_command_continues(tmp_path, monkeypatch):
    config = smoke(num_steps=6, checkpoint__every=100)
    train(config, tmp_path / "whole")
    stream = data.batches

    def interrupted(*args, **kwargs):
        for index, batch in enumerate(stream(*args, **kwargs)):
            if "start_step" in kwargs and kwargs["start_step"] == 0 and index == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data, "batches", interrupted)
    with pytest.raises(Preempted, match="stopped at step 3"):
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")


def test_sigterm_while_the_last_save_is_written_lets_it_finish(tmp_path, monkeypatch):
    close = Checkpoints.close

    def interrupted(self):
        signal.raise_signal(signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Checkpoints, "close", interrupted)
    with pytest.raises(Preempted, match="stopped at step 2"):
        train(smoke(num_steps=2), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_sigterm_while_evaluating_is_no_failure(tmp_path, monkeypatch):
    evaluate = evals.evaluate_workdir
    monkeypatch.setattr(evals, "evaluate_workdir", lambda workdir: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted, match="while evaluating"):
        train(smoke(num_steps=1), tmp_path)
    monkeypatch.setattr(evals, "evaluate_workdir", evaluate)
    assert train(smoke(num_steps=1), tmp_path) == {}


# Orbax leaves the futures of reads that failed unretrieved, which Python reports when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_latest_checkpoint_falls_back_with_a_warning(tmp_path, caplog):
    train(smoke(num_steps=4), tmp_path)
    before = losses(tmp_path)
    files = [path for path in (tmp_path / "checkpoints" / "4").rglob("*") if path.is_file() and "/d/" in str(path)]
    for path in files:
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)
    train(smoke(num_steps=6), tmp_path)
    assert "checkpoint 4 is damaged" in caplog.text
    assert (tmp_path / "damaged" / "4").is_dir()
    assert losses(tmp_path)[:4] == before
    assert len(losses(tmp_path)) == 6


def test_a_run_whose_model_is_split_is_evaluated_split(tmp_path, monkeypatch):
    seen, run = {}, evals.report.run

    def spy(spec, model, variables, config):
        seen[config.mesh.fsdp] = variables
        return run(spec, model, variables, config)

    monkeypatch.setattr(evals.report, "run", spy)
    spec = dict(name="fewshot", split="test", ways=5, shots=1, queries=2, num_episodes=3, seed=0)
    sizes = dict(mesh__fsdp=2, mesh__tensor=2, pipeline__batch_size=2)
    split = smoke(num_steps=1, evals={"few": spec}, ema_decay=0.9, **sizes)
    found = train(split, tmp_path)["few"]
    shards = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(seen[2])}
    assert shards[3, 3, 8, 8] == (3, 3, 8, 4)
    # The same run on one device, which has no such mesh.
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    shutil.rmtree(tmp_path / "evals")
    alone = evals.evaluate_workdir(tmp_path)["few"]
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(seen[2]))
    np.testing.assert_allclose(found["per_example"], alone["per_example"])


def test_a_result_that_was_cut_is_computed_again(tmp_path, caplog):
    spec = dict(name="fewshot", split="test", ways=5, shots=1, queries=2, num_episodes=3, seed=0)
    found = train(smoke(num_steps=1, evals={"few": spec}), tmp_path)
    (path,) = (tmp_path / "evals").rglob("few.json")
    path.write_text(path.read_text()[:40])
    assert evals.evaluate_workdir(tmp_path) == found
    assert "few.json is damaged" in caplog.text
    assert json.loads(path.read_text()) == found["few"]


def test_a_workdir_of_another_experiment_is_refused_untouched(tmp_path):
    train(smoke(num_steps=1), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UsageError, match=r"differs in model\.scale"):
        train(smoke(num_steps=1, model__scale=3.0), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path):
    """Same losses over 10 steps at 8 episodes a batch; dropout is on, so its random numbers agree too."""
    encoder = {"name": "conv4", "widths": (8, 8, 8, 8), "norm": "group", "pool_last": False}
    common = dict(num_steps=10, pipeline__batch_size=8, model__support_dropout=0.1, checkpoint__every=10)
    common |= dict(model__encoder=encoder, validation=dict(VALIDATION, every=10))
    train(smoke("qsformer", **common), tmp_path / "one")
    assert len(losses(tmp_path / "one")) == 10
    train(smoke("qsformer", **common, mesh__data=8), tmp_path / "eight")
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)


def test_a_run_may_go_on_under_pmap(tmp_path):
    common = dict(num_steps=6, pipeline__batch_size=8, ema_decay=0.9)
    train(smoke(**common), tmp_path / "jit")
    assert len(losses(tmp_path / "jit")) == 6
    train(smoke(**common | dict(num_steps=3)), tmp_path / "pmap")
    train(smoke(**common, mode="pmap", mesh__data=8), tmp_path / "pmap")
    np.testing.assert_allclose(losses(tmp_path / "pmap"), losses(tmp_path / "jit"), rtol=1e-5)
    for one, other in zip(*(jax.tree.leaves(params(tmp_path / mode)) for mode in ("pmap", "jit")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_an_axis_name_is_for_pmap_alone(tmp_path):
    encoder = {"name": "conv4", "widths": (8, 8, 8, 8), "norm": "batch", "axis_name": "data"}
    with pytest.raises(UsageError, match=r"config\.model\.encoder\.axis_name is for the mode 'pmap'"):
        train(smoke(model__encoder=encoder), tmp_path)


def test_a_step_that_takes_too_long_tells_where_it_is(tmp_path, monkeypatch, capfd):
    stream, told = data.batches, []

    def stuck(*args, **kwargs):
        for index, batch in enumerate(stream(*args, **kwargs)):
            while "num_steps" in kwargs and index == 1 and "in stuck" not in "".join(told):
                time.sleep(0.01)
                told.append(capfd.readouterr().err)
            yield batch

    monkeypatch.setattr(data, "batches", stuck)
    train(smoke(num_steps=3, watchdog_seconds=0.5), tmp_path)
    assert re.search(r"no step for 0.5 s; .*\n(.*\n)*Thread MainThread \(most recent call last\)", "".join(told))
    assert len(losses(tmp_path)) == 3  # it ended nothing


@pytest.mark.parametrize("sizes", [dict(mesh__data=1), dict(mesh__fsdp=2, mesh__tensor=2, pipeline__batch_size=2)])
def test_debug_nans_names_the_line_that_made_one(tmp_path, monkeypatch, sizes):
    class Breaks(fewshot.FewShot):
        def __call__(self, *args, **kwargs):
            loss, metrics, state = super().__call__(*args, **kwargs)
            return loss, metrics | {"loss": jnp.log(-loss)}, state  # the line

    monkeypatch.setitem(tasks.TASKS, "fewshot", Breaks)
    with pytest.raises(NotFinite) as error:
        train(smoke(num_steps=1, **sizes), tmp_path, debug_nans=True)
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# the line"))
    assert str(error.value) == f"step 1: invalid value (nan) encountered in log, at {__file__}:{line}, in __call__"


@pytest.mark.parametrize("log_every", [1, 2])
def test_no_update_that_is_not_finite_is_allowed(tmp_path, log_every):
    with pytest.raises(NotFinite, match="from step 2 on, more than config.max_skipped 0 updates in a row"):
        train(smoke(num_steps=4, max_skipped=0, log_every=log_every, optimizer__learning_rate=1e38), tmp_path)


def test_bfloat16_computes_while_parameters_stay_float32(tmp_path):
    train(smoke(num_steps=2), tmp_path / "float32")
    train(smoke(num_steps=2, dtype="bfloat16"), tmp_path / "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params(tmp_path / "bfloat16"))} == {np.dtype("float32")}
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")
    np.testing.assert_allclose(losses(tmp_path / "bfloat16"), losses(tmp_path / "float32"), rtol=0.05)


@pytest.mark.slow
def test_frozen_parameters_stay_and_all_others_train(tmp_path):
    train(smoke("qsformer", num_steps=2, checkpoint__every=1, model__freeze_patchformer=True), tmp_path)
    one, two = (dict(xattn.load(tmp_path, step)[1]["params"]) for step in (1, 2))
    assert_equal_trees(one.pop("patchformer"), two.pop("patchformer"))
    unchanged = jax.tree.map(np.array_equal, one, two)
    paths = [jax.tree_util.keystr(path) for path, same in jax.tree_util.tree_flatten_with_path(unchanged)[0] if same]
    # A softmax does not see a constant in the keys: their biases have no gradient but rounding.
    assert all("['key']['bias']" in path for path in paths), paths
