"""Several processes agree on which checkpoint is good."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.distributed import launch
from xattn.checkpoints import Checkpoints
from xattn.parallel.distributed import fetch
from xattn.parallel.mesh import make_mesh


def item(step: int) -> dict:
    return {"x": jnp.arange(32, dtype=jnp.float32).reshape(8, 4) + step}


def read(workdir: str) -> None:
    """One process, which reads over a mesh of all; in process 1, reading step 2 fails."""
    rows, whole = (NamedSharding(make_mesh(), spec) for spec in (P("data"), P()))
    model = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)}
    training = {"y": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)}
    checkpoints = Checkpoints(Path(workdir))
    handler = checkpoints._arrays["model"]
    restore = handler.restore

    def fails(directory, *arguments, **keywords):
        if jax.process_index() == 1 and directory.parent.name == "2":
            raise ValueError("only here")
        return restore(directory, *arguments, **keywords)

    handler.restore = fails
    restored = checkpoints.restore_latest(model, training)
    assert restored is not None
    step, model, _ = restored
    found = {"step": step, "x": fetch(model["x"]).tolist(), "left": checkpoints.steps()}
    Path(workdir).with_name(f"{jax.process_index()}.json").write_text(json.dumps(found))
    checkpoints.close()


def test_damage_that_one_process_finds_sets_the_step_aside_for_all(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2):
        checkpoints.save(step, item(step), {"y": jnp.int32(step)}, {})
    checkpoints.close()
    launch.run("tests.distributed.test_checkpoints:read", tmp_path / "run", folder=tmp_path / "output", num_devices=2)
    for index in range(2):
        found = json.loads((tmp_path / f"{index}.json").read_text())
        assert (found["step"], found["left"]) == (1, [1])
        np.testing.assert_array_equal(found["x"], item(1)["x"])
    assert (tmp_path / "run" / "damaged" / "2").is_dir()
