"""What each device of a mesh holds and sends: shards only, whatever the batch; and `xattn inspect --mesh`."""

import functools
import json
import math
import re
import subprocess
import sys

import jax
import pytest

from xattn.analysis.collectives import count_collectives
from xattn.analysis.step_cost import parse_mesh, simulate_devices, step_cost
from xattn.cli import main
from xattn.config import UsageError, load_config
from xattn.parallel.mesh import make_mesh
from xattn.train import step
from xattn.train.plan import make_plan

FSDP = dict(data=1, fsdp=8)
SMOKE = ("qsformer/glyphs:smoke", "perceiver_io/imagenet_fourier:smoke", "crossvit/imagenet:smoke")


def smoke(name, batch_size=8):
    config = load_config(name)
    config.pipeline.batch_size = batch_size
    return config


def values_on_a_device(tree):
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def largest_two(planned):
    """Bytes of two parameters: one that is used, and the next one."""
    return 4 * sum(sorted(leaf.size for leaf in jax.tree.leaves(planned.state.params))[-2:])


@pytest.fixture(scope="module", params=SMOKE)
def fully_sharded(request):
    """A config's step on a mesh of eight devices that share all parameters."""
    config = smoke(request.param)
    return request.param, step_cost(config, FSDP), make_plan(config, make_mesh(**FSDP))


# The step.


@pytest.mark.slow
def test_a_device_takes_and_returns_shards_and_updates_them_in_place(fully_sharded):
    _, report, planned = fully_sharded
    state, memory = planned.state, report["memory"]
    whole = {
        path: leaf.size for path, leaf in jax.tree.leaves_with_path(state.params) if leaf.sharding.is_fully_replicated
    }
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(whole.values()) < total / 4, planned.notes
    assert memory["parameters"] == 4 * (sum(whole.values()) + (total - sum(whole.values())) // 8)
    parts = ("parameters", "optimizer_state", "moving_average", "model_state")
    counters = 3 * 4
    held = sum(memory[part] for part in parts) + counters
    assert memory["arguments"] - held - memory["batch"] in (0, 8)  # the key, where something is drawn from it
    # The whole state is updated in place, so it comes back as it was split; what else comes back are scalars.
    assert memory["outputs_in_place"] == held
    assert memory["outputs"] - held < 4096


@pytest.mark.slow
def test_a_device_holds_whole_parameters_of_the_layer_at_work_only(fully_sharded, monkeypatch):
    name, report, planned = fully_sharded
    assert 0 < report["memory"]["gathered_at_once"] <= largest_two(planned)
    if name == SMOKE[-1]:  # what the backward pass does not gather anew is held all the while
        monkeypatch.setattr(step, "value_and_grad", functools.partial(jax.value_and_grad, has_aux=True))
        assert step_cost(smoke(name), FSDP)["memory"]["gathered_at_once"] > largest_two(planned)


@pytest.mark.slow
def test_microbatches_gather_what_the_layer_at_work_needs_only():
    config = smoke(SMOKE[-1], 16)
    config.accumulate_steps = 2
    planned = make_plan(config, make_mesh(**FSDP))
    assert 0 < step_cost(config, FSDP)["memory"]["gathered_at_once"] <= largest_two(planned)


@pytest.mark.slow
def test_a_device_sends_parameters_and_gradients_and_no_activations(fully_sharded):
    name, report, planned = fully_sharded
    lowered, state = planned.lowered, planned.state
    # The names of activations reach the compiler.
    assert lowered.as_text().count("sharding_constraint") > 15
    assert '[{"data", "fsdp"}, {}, {"tensor"}, {}]' in lowered.as_text()  # heads
    sent = report["collectives"]
    of_parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) * 7 / 8
    assert sent["all-gather"]["bytes"] < 2 * of_parameters  # for the forward pass and for the backward pass
    assert sent["all-reduce"]["bytes"] < 2.1 * of_parameters  # each sum goes round twice; losses and norms
    assert sum(sent.get(kind, {"bytes": 0})["bytes"] for kind in ("all-to-all", "collective-permute")) < 1024
    twice = step_cost(smoke(name, 16), FSDP)["collectives"]
    total = lambda sent: sum(traffic["bytes"] for traffic in sent.values())  # noqa: E731
    assert total(twice) < 1.01 * total(sent)


# The start.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"), [(SMOKE[0], FSDP), (SMOKE[1], dict(data=2, fsdp=2, tensor=2)), (SMOKE[2], FSDP)]
)
def test_initialisation_makes_shards_only(name, sizes):
    planned = make_plan(smoke(name), make_mesh(**sizes))
    program = planned.create.lower(jax.random.key(0)).compile().as_text()
    assert count_collectives(program) == {}
    shards = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(planned.state)]
    arrays = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)
    assert max(math.prod(map(int, shape.split(","))) for shape in arrays) == max(shards)
    assert max(shards) < max(leaf.size for leaf in jax.tree.leaves(planned.state))


# The command.


def test_parse_mesh():
    assert parse_mesh("data=64,fsdp=4") == {"data": 64, "fsdp": 4}
    assert parse_mesh("tensor=2") == {"data": 1, "tensor": 2}
    for text in ("data", "data=-1", "data=0", "data=2,", "data=x"):
        with pytest.raises(UsageError, match=f"--mesh={text}: write AXIS=SIZE"):
            parse_mesh(text)
    with pytest.raises(UsageError, match="--mesh has no key 'fdsp': did you mean 'fsdp'?"):
        parse_mesh("fdsp=2")


def test_devices_cannot_be_added_to_a_process_that_has_some():
    simulate_devices(8)
    with pytest.raises(UsageError, match="jax has 8 devices already: ask for 9 in a fresh process"):
        simulate_devices(9)


def test_inspect_tells_the_cost_of_a_mesh_that_is_not_there():
    """Twelve devices, three to share parameters: in a fresh process."""
    arguments = ["--config=protonet/glyphs:smoke", "--config.pipeline.batch_size=12", "--mesh=data=4,fsdp=3", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "xattn", "inspect", *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    report = json.loads(run.stdout)
    assert (report["model"], report["batch_size"]) == ("protonet", 12)
    assert report["mesh"] == {"data": 4, "fsdp": 3, "tensor": 1, "sequence": 1}
    assert report["collectives"]["all-reduce"]["bytes"] > 0
    assert any("'conv_out'" in note and "'fsdp' has size 3" in note for note in report["not_sharded"])


def test_inspect_refuses_a_batch_that_the_mesh_does_not_divide(capsys):
    assert main(["inspect", "--config=protonet/glyphs:smoke", "--config.pipeline.batch_size=6", "--mesh=data=8"]) == 2
    assert "batch_size is 6, which does not split" in capsys.readouterr().err
