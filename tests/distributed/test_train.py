"""Runs of two processes with four devices each, beside the same runs on one device."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.distributed import launch
from xattn import cli, data
from xattn.config import Config, UsageError, load_config
from xattn.parallel.distributed import fetch
from xattn.train import plan, train
from xattn.train.state import abstract_state

HERE = "tests.distributed.test_train"
MESH = dict(data=2, fsdp=2, tensor=2)
SMOKE = ("qsformer/glyphs", "perceiver_io/language", "crossvit/letters")


def smoke(name: str, mode: str = "jit", **mesh: int) -> Config:
    """Ten steps of a smoke config with 8 rows a batch and nothing random in the model; CrossViT is evaluated too."""
    config = load_config(f"{name}:smoke").unlock()
    config.evals = config.evals if name.startswith("crossvit") else {}
    config.update(num_steps=10, log_every=1, mode=mode, mesh=dict(data=1, fsdp=1, tensor=1, sequence=1) | mesh)
    config.checkpoint.every = 10
    config.pipeline.batch_size = 8
    config.validation = config.validation if name.startswith("crossvit") else {}
    if config.validation:
        config.model.drop_path_rate = 0.0
        config.validation.every = 10
    return config


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in rows(workdir) if row["kind"] == "train"]


def train_and_tell(config: Config, folder: Path) -> None:
    """Trains in `folder`/run; process 0 or, where there is one, process 1 writes the parameters that it starts from.

    Process 0 has the first devices: what one device holds would be enough for it.
    """

    def telling(*args: Any) -> Any:
        create, abstract, notes = abstract_state(*args)

        def create_and_tell(key: jax.Array) -> Any:
            state = create(key)
            params = {jax.tree_util.keystr(path): fetch(leaf) for path, leaf in jax.tree.leaves_with_path(state.params)}
            if jax.process_index() == jax.process_count() - 1:
                np.savez(folder / "initial.npz", **params)
            return state

        return create_and_tell, abstract, notes

    plan.abstract_state = telling
    try:
        train(config, folder / "run")
    finally:
        plan.abstract_state = abstract_state


def on_both(name: str, folder: str) -> None:
    train_and_tell(smoke(name, **MESH), Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_two_processes_start_and_train_as_one_device(tmp_path, name):
    (alone := tmp_path / "alone").mkdir()
    train_and_tell(smoke(name), alone)
    launch.run(f"{HERE}:on_both", name, tmp_path, folder=tmp_path, timeout=240)
    found, expected = np.load(tmp_path / "initial.npz"), np.load(alone / "initial.npz")
    assert set(found.files) == set(expected.files)
    for path in expected.files:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    assert len(losses(alone / "run")) == 10
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone / "run"), rtol=1e-5)
    # Each row once: two that write would have left two.
    validated, expected = (
        [row for row in rows(folder / "run") if row.pop("kind") == "validation"] for folder in (tmp_path, alone)
    )
    assert len(rows(tmp_path / "run")) == 10 + len(expected)
    assert validated == [pytest.approx(row, rel=1e-5) for row in expected]
    assert len(list((tmp_path / "run" / "tb").iterdir())) == 1
    # The evaluation at the end, by a model that is split over the processes.
    for path in (alone / "run").glob("evals/*/*.json"):
        expected, found = (json.loads((place / path.relative_to(alone)).read_text()) for place in (alone, tmp_path))
        assert found["per_example"] == expected["per_example"]
    assert name != "crossvit/letters" or len(found["per_example"]) == 8


def pmap_then_jit(folder: str) -> None:
    config = smoke("protonet/glyphs", mode="pmap", data=4)
    config.num_steps = 5
    train(config, Path(folder) / "run")
    train(smoke("protonet/glyphs", fsdp=2, tensor=2), Path(folder) / "run")


@pytest.mark.slow
def test_a_run_of_two_processes_under_pmap_continues_on_another_mesh(tmp_path):
    launch.run(f"{HERE}:pmap_then_jit", tmp_path, folder=tmp_path, num_devices=2, timeout=240)
    config = smoke("protonet/glyphs")
    config.num_steps = 5  # the same schedule
    train(config, tmp_path / "alone")
    train(smoke("protonet/glyphs"), tmp_path / "alone")
    assert len(losses(tmp_path / "alone")) == 10
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=1e-5)


def disagree(folder: str) -> None:
    """Three ways in which process 1 may differ; process i writes the sentences that it ends with."""
    index, workdir, said = jax.process_index(), Path(folder) / "run", []
    config = smoke("protonet/glyphs", data=2)
    config.seed = index
    with pytest.raises(UsageError) as error:
        train(config, workdir)
    said.append(str(error.value))
    config.seed, make = 0, plan.make_train_step
    plan.make_train_step = lambda *args, **keywords: make(*args, **keywords | {"max_skipped": index})
    with pytest.raises(UsageError) as error:
        train(config, workdir)
    said.append(str(error.value))
    if index == 0:
        assert not workdir.exists()
        workdir.mkdir()
        (workdir / "thesis.tex").touch()
    plan.make_train_step = make
    with pytest.raises(UsageError) as error:
        train(config, workdir)
    said.append(str(error.value))
    (Path(folder) / f"{index}.json").write_text(json.dumps(said))
    sys.exit(cli.main(["train", "--config=protonet/glyphs:smoke", f"--config.seed={index}"]))


def test_processes_that_differ_stop_with_one_sentence_each(tmp_path):
    processes = launch.start(f"{HERE}:disagree", tmp_path, folder=tmp_path, num_devices=1)
    assert launch.finish(processes) == [2, 2], processes[0].printed() + processes[1].printed()
    for index in range(2):
        seed, step, workdir = json.loads((tmp_path / f"{index}.json").read_text())
        assert seed.startswith("process 1 differs from process 0 in config.seed: start every process with the same")
        assert step.startswith("process 1 differs from process 0 in the program of a step: start every process")
        assert workdir.endswith("run is no empty folder and holds no run: choose another --workdir.")
        assert "xattn train: process 1 differs from process 0 in config.seed" in processes[index].printed()


TWO = ("--config.mesh.data=2", "--config.pipeline.batch_size=2")


def fail_alone(folder: str) -> None:
    """Process 1 has no data where the others have it."""
    if jax.process_index() == 1:
        data.build = lambda *args, **kwargs: (_ for _ in ()).throw(UsageError("no data here."))
    sys.exit(cli.main(["train", "--config=protonet/glyphs:smoke", f"--workdir={folder}/run", *TWO]))


def die(folder: str) -> None:
    """Process 1 is killed after some steps."""
    stream = data.batches

    def deadly(*args, **kwargs):
        for index, batch in enumerate(stream(*args, **kwargs)):
            if "num_steps" in kwargs and jax.process_index() == 1 and index == 3:
                signal.raise_signal(signal.SIGKILL)
            yield batch

    data.batches = deadly
    train(smoke("protonet/glyphs", data=2), Path(folder) / "run")


@pytest.mark.slow
@pytest.mark.parametrize("program, code", [("fail_alone", 2), ("die", -signal.SIGKILL)])
def test_one_process_that_ends_ends_the_others(tmp_path, program, code):
    processes = launch.start(f"{HERE}:{program}", tmp_path, folder=tmp_path, num_devices=1)
    codes = launch.finish(processes, timeout=180)
    assert codes[1] == code
    assert codes[0] not in (0, 2), processes[0].printed()
    if program == "fail_alone":
        assert "xattn train: no data here." in processes[1].printed()
