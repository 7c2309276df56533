"""Evaluations on two processes: every example is counted once, and every process has the whole result."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.distributed import launch
from xattn import data, evals, models, tasks
from xattn.config import load_config
from xattn.parallel.mesh import make_mesh, use_mesh, without_names

# Numbers of examples that neither the batches nor the replicas divide. With tensor=4 each process has a replica; with
# tensor=8 both work on the only one, on the same rows.
CASES = {
    "classification": ("crossvit/letters:smoke", {"data": 8}, dict(num_examples=13, batch_size=5)),
    "classification, a replica each": (
        "crossvit/letters:smoke",
        {"data": 2, "tensor": 4},
        dict(num_examples=13, batch_size=5),
    ),
    "classification, one replica": ("crossvit/letters:smoke", {"data": 1, "tensor": 8}, dict(num_examples=3)),
    "masked_language": ("perceiver_io/language:smoke", {"data": 8}, dict(num_examples=13, batch_size=5)),
    "optical_flow": ("perceiver_io/optical_flow:smoke", {"data": 8}, dict(num_examples=11)),
    "autoencoding": ("perceiver_io/multimodal:smoke", {"data": 8}, dict(num_examples=3, chunks=2)),
    "fewshot": ("protonet/glyphs:smoke", {"data": 8}, dict(num_episodes=7)),
    "fewshot, pixels": ("protonet/glyphs:smoke", {"data": 8}, dict(num_episodes=7, method="pixel_centroid")),
    "fewshot, untrained": ("protonet/glyphs:smoke", {"data": 8}, dict(num_episodes=7, method="random_features")),
}


@functools.cache
def untrained(name: str) -> tuple[Any, Any, Any]:
    """The config, the model and its first variables."""
    config = load_config(name)
    model, task = models.build(config.model.to_dict()), tasks.build(config.task.to_dict())
    shapes = data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict())
    inputs = task.inputs({field: jnp.zeros(leaf.shape, leaf.dtype) for field, leaf in shapes.items()})
    return config, model, without_names(jax.jit(model.init)(jax.random.key(1), *inputs))


def results() -> dict[str, Any]:
    """The result of every case."""
    found = {}
    for case, (name, sizes, options) in CASES.items():
        config, model, variables = untrained(name)
        spec = next(iter(config.evals.to_dict().values())) | options
        mesh = make_mesh(**sizes)
        with use_mesh(mesh):
            found[case] = evals.run(
                spec,
                model,
                jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec()), variables),
                config,
            )
    return found


def tell(folder: str) -> None:
    (Path(folder) / f"{jax.process_index()}.json").write_text(json.dumps(results()))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path):
    launch.run("tests.distributed.test_evals:tell", tmp_path, folder=tmp_path, timeout=400)
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    assert first == second
    expected = json.loads(json.dumps(results()))
    for case, result in expected.items():
        assert len(result["per_example"]) == next(iter(CASES[case][2].values()))
        for key, value in result.items():
            if isinstance(value, dict | str | bool):
                assert first[case][key] == value, (case, key)
            else:
                np.testing.assert_allclose(first[case][key], value, rtol=1e-4, err_msg=f"{case}: {key}")
    assert np.ptp(expected["optical_flow"]["per_example"]) > 0  # values in another order would be seen
