"""Meshes over eight simulated devices, and what the logical names become on them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from xattn.config import UsageError
from xattn.layers.cross_attention import CrossAttention
from xattn.models import MODELS, build
from xattn.parallel import mesh as mesh_module
from xattn.parallel.mesh import (
    AXES,
    RULES,
    arrange,
    batch_shapes,
    check_batch,
    evaluation_mesh,
    in_order,
    make_mesh,
    part_of,
    shard_batch,
    state_shardings,
    use_mesh,
    value_and_grad,
    without_names,
)
from xattn.train.optim import OPTIMIZERS, make_optimizer
from xattn.train.state import abstract_state


class Small(nn.Module):
    """Self-attention and a hidden layer whose bias does not divide by two."""

    hidden: int = 6

    @nn.compact
    def __call__(self, x):
        x = CrossAttention(num_heads=2, name="attention")(x)
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        bias = nn.with_logical_partitioning(nn.initializers.normal(), ("mlp",))
        x = nn.Dense(self.hidden, kernel_init=kernel, bias_init=bias, name="hidden")(x)
        self.variable("batch_stats", "mean", jnp.zeros, (3,))
        return nn.with_logical_constraint(x, ("batch", "length", "act_mlp"))


class Mean:
    """The smallest task: what `abstract_state` asks of one."""

    def inputs(self, batch):
        return (batch["x"],)


def boxed(*names, shape=(4, 6)):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def specs(shardings: Any) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


# Sizes.


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        (dict(), (8, 1, 1, 1)),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
        (dict(data=1), (1, 1, 1, 1)),
        (dict(data=3), (3, 1, 1, 1)),
        (dict(data=2, fsdp=-1), (2, 4, 1, 1)),
        (dict(data=2, tensor=2, sequence=-1), (2, 1, 2, 2)),
        (dict(fsdp=8), (1, 8, 1, 1)),
    ],
)
def test_make_mesh_sizes(asked, sizes):
    mesh = make_mesh(**asked)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor", "sequence")
    assert mesh.devices.shape == sizes
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}  # logical constraints do nothing on Explicit axes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(data=16), ["'data': 16", "8 cpu device(s)", "not exceed"]),
        (dict(data=4, tensor=4), ["'data': 4", "'tensor': 4", "8 cpu device(s)"]),
        (dict(data=-1, tensor=3), ["'tensor': 3", "8 cpu device(s)", "divide"]),
        (dict(data=-1, fsdp=-1), ["at most one axis"]),
        (dict(data=0), ["'data': 0", "positive"]),
        (dict(data=2, tensor=-2), ["'tensor': -2", "positive"]),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_both_numbers(asked, words):
    with pytest.raises(UsageError) as error:
        make_mesh(**asked)
    for word in words:
        assert word in str(error.value)


# Shardings of a state.


def test_state_shardings_apply_the_rules_and_leave_no_boxes():
    tree = {
        "params": {"kernel": boxed("embed", "heads", "kv", shape=(4, 2, 3)), "plain": jnp.zeros((8, 8))},
        "half": boxed("embed", None),
        "empty": {},
    }
    shardings, notes = state_shardings(tree, make_mesh(2, 2, 2))
    assert specs(shardings) == {
        "params": {"kernel": P("fsdp", "tensor", None), "plain": P()},
        "half": P("fsdp", None),
        "empty": {},
    }
    assert notes == []
    assert jax.tree.structure(shardings) == jax.tree.structure(without_names(tree))


def test_an_indivisible_axis_is_replicated_and_listed_and_the_others_are_split():
    tree = {"params": {"mlp": {"kernel": boxed("embed", "mlp", shape=(4, 7))}, "bias": boxed("mlp", shape=(6,))}}
    shardings, notes = state_shardings(tree, make_mesh(2, 2, 2))
    assert specs(shardings)["params"]["mlp"]["kernel"] == P("fsdp", None)
    assert specs(shardings)["params"]["bias"] == P("tensor")
    assert notes == ["params/mlp/kernel: 'mlp' of size 7 stays whole, mesh axis 'tensor' has size 2"]
    assert state_shardings(tree, make_mesh(8))[1] == []  # a mesh axis of one device splits nothing


def test_a_large_parameter_that_no_rule_splits_is_listed():
    tree = {"params": {"large": boxed("embed", "classes", shape=(64, 1024)), "plain": jnp.zeros((256, 256))}}
    tree["params"] |= {"small": boxed("embed", "classes", shape=(64, 1023)), "split": boxed("mlp", shape=(2**16,))}
    assert state_shardings(tree, make_mesh(1, 1, 8))[1] == [
        "params/large: this mesh splits none of its axes ('embed', 'classes'), 65,536 values stay whole",
        "params/plain: this mesh splits none of its axes (), 65,536 values stay whole",
    ]
    assert state_shardings(tree, make_mesh(8))[1] == []  # replicas only: all is whole, as asked


def test_a_name_without_a_rule_is_an_error_that_names_it_and_its_parameter():
    with pytest.raises(UsageError, match="params/a/kernel uses the logical axis 'embde', which has no rule"):
        state_shardings({"params": {"a": {"kernel": boxed("embde", "mlp")}}}, make_mesh())


def test_initialisation_on_a_mesh_equals_that_on_one_device_bit_by_bit():
    shapes = {"x": jax.ShapeDtypeStruct((8, 5, 4), jnp.float32)}
    states = {}
    for name, mesh in {"one": make_mesh(1), "eight": make_mesh(2, 2, 2)}.items():
        with use_mesh(mesh):
            create, abstract, notes = abstract_state(
                Small(hidden=7), Mean(), optax.adam(0.1), batch_shapes(shapes, mesh), True, mesh
            )
            states[name] = create(jax.random.key(0))
        described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), states[name])
        assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)
    # The optimizer and the average repeat the parameters' shapes; each axis is listed once.
    assert [note.split(":")[0] for note in notes] == ["params/hidden/bias", "params/hidden/kernel"]
    jax.tree.map(np.testing.assert_array_equal, states["one"], states["eight"])

    params, (adam, _) = states["eight"].params, states["eight"].opt_state
    assert params["attention"]["query"]["kernel"].sharding.spec == P("fsdp", "tensor", None)
    assert params["attention"]["out"]["kernel"].sharding.spec == P("tensor", None, "fsdp")
    assert params["hidden"]["kernel"].sharding.spec == P("fsdp", None)
    assert specs(jax.tree.map(lambda x: x.sharding, adam.mu)) == specs(jax.tree.map(lambda x: x.sharding, params))
    assert params["attention"]["query"]["kernel"].addressable_shards[0].data.shape == (2, 1, 2)
    assert states["eight"].model_state["batch_stats"]["mean"].sharding.is_fully_replicated


def test_logical_constraints_lower_to_sharding_constraints_under_use_mesh_only():
    model, x = Small(), jnp.ones((8, 5, 4))
    mesh = make_mesh(2, 2, 2)
    apply = lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])[0]  # noqa: E731
    variables = jax.eval_shape(lambda: without_names(model.init(jax.random.key(0), x)))
    outside = jax.jit(apply).lower(variables, x).as_text()
    with use_mesh(mesh):
        inside = jax.jit(apply).lower(variables, x).as_text()
    assert "sharding_constraint" not in outside
    assert inside.count("sharding_constraint") >= 5  # q, k, v, the attention's output and the model's own
    assert '[{"data", "fsdp"}, {}, {"tensor"}]' in inside


# Names.


PERCEIVER = dict(
    input_preprocessor=dict(
        name="image_preprocessor",
        prep_type="conv",
        spatial_downsample=4,
        num_channels=8,
        positions=dict(name="trainable_positions", features=8, project_features=4),
    ),
    encoder=dict(
        name="perceiver_encoder", num_latents=4, latent_features=8, num_blocks=2, num_self_attends_per_block=1
    ),
)

TINY = {
    "conv4": [dict(name="conv4", widths=(8, 8, 8, 8), norm=norm) for norm in ("group", "batch")],
    "resnet12": [dict(name="resnet12", widths=(8, 8, 8, 8), norm=norm) for norm in ("group", "batch")],
    "cife": [dict(name="cife", backbone=dict(name="conv4", widths=(8, 8, 8, 8)), num_heads=2, mlp_dim=8)],
    "protonet": [dict(name="protonet", encoder=dict(name="conv4", widths=(8, 8, 8, 8)))],
    "qsformer": [
        dict(
            name="qsformer",
            encoder=dict(name="cife", backbone=dict(name="conv4", widths=(8, 8, 8, 8)), num_heads=2, mlp_dim=8),
            num_blocks=1,
            patch_num_heads=2,
            mlp_dim=8,
            projection_norm=projection_norm,
        )
        for projection_norm in ("layer", "l2")
    ],
    "crossvit": [
        dict(
            name="crossvit",
            image_sizes=(24, 32),
            patch_sizes=(12, 16),
            features=(8, 8),
            num_heads=(2, 2),
            num_stages=1,
            fusion=fusion,
            stem=stem,
        )
        for fusion, stem in (("cross_attention", "linear"), ("all_attention", "conv"))
    ],
    "vit": [dict(name="vit", image_size=16, features=8, depth=1, num_heads=2)],
    "perceiver": [PERCEIVER | dict(name="perceiver", num_classes=3)],
    "perceiver_io": [
        PERCEIVER
        | dict(
            name="perceiver_io",
            decoder=dict(
                name="perceiver_decoder",
                queries=dict(name="queries", positions=dict(name="trainable_positions", features=8)),
                output_features=3,
            ),
        )
    ],
}


def _initial_shapes(config: dict) -> Any:
    images = jnp.zeros((2, 1, 16, 16, 3))
    inputs = (images, images[:, 0]) if config["name"] in ("protonet", "qsformer") else (images[:, 0],)
    return jax.eval_shape(lambda: build(config).init(jax.random.key(0), *inputs))


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_every_name_that_a_model_uses_has_a_rule(monkeypatch):
    published = {name for name, model in MODELS.items() if isinstance(model, functools.partial)}
    assert set(TINY) == set(MODELS) - published, "give each model a tiny config in this file"
    known, used = {name for name, _ in RULES}, set()
    constrain = nn.with_logical_constraint

    def recording(x, names, *args, **kwargs):
        assert len(names) == x.ndim
        used.update(names)
        return constrain(x, names, *args, **kwargs)

    monkeypatch.setattr(nn, "with_logical_constraint", recording)
    for config in sum(TINY.values(), []):
        shapes = _initial_shapes(config)
        for path, leaf in jax.tree.leaves_with_path(shapes["params"], is_leaf=lambda x: hasattr(x, "names")):
            where = f"{config['name']}: {jax.tree_util.keystr(path)}"
            assert hasattr(leaf, "names"), f"{where} carries no logical names"
            assert len(leaf.names) == len(leaf.value.shape), where
            used.update(leaf.names)
    assert used - {None} <= known
    assert {"embed", "heads", "conv_out", "act_heads"} <= used  # the recording works


@pytest.mark.parametrize("config", sum(TINY.values(), []), ids=lambda config: config["name"])
def test_large_parameters_are_split_or_listed_and_optimizers_follow_them(config, monkeypatch):
    monkeypatch.setattr(mesh_module, "LISTED", 16)
    boxes = _initial_shapes(config)["params"]
    trees = {"params": boxes, "ema": boxes}
    for name in OPTIMIZERS:
        options = dict(name=name, learning_rate=0.1, schedule=dict(name="constant"), clip_norm=1.0)
        optimizer, _ = make_optimizer(options, 10, frozen=("encoder",))
        trees[name] = jax.eval_shape(optimizer.init, boxes)
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, tensor=8)):
        shardings, notes = state_shardings(trees, make_mesh(**sizes))
        leaves = zip(_by_path(without_names(trees)).items(), _by_path(shardings).values(), strict=True)
        params = {}
        for (path, leaf), sharding in leaves:
            if path.startswith("params/"):
                params[path.removeprefix("params/")] = (leaf.shape, sharding)
                if leaf.size >= 16 and sharding.is_fully_replicated:
                    assert any(note.startswith(f"{path}: ") for note in notes), f"{path} {leaf.shape} on {sizes}"
        for tree in trees.keys() - {"params"}:
            of_tree = {path: entry for path, entry in _by_path(shardings[tree]).items()}
            shapes = _by_path(without_names(trees[tree]))
            followed = 0
            for path, sharding in of_tree.items():
                owners = [name for name in params if path == name or path.endswith(f"/{name}")]
                if not owners:
                    assert shapes[path].size <= 1, f"{tree}/{path} is no parameter's and holds {shapes[path].shape}"
                    continue
                assert (shapes[path].shape, sharding) == params[max(owners, key=len)], f"{tree}/{path} on {sizes}"
                followed += 1
            assert followed == len(params) * {"adam": 2, "adamw": 2, "lamb": 2}.get(tree, 1)


def test_rules_name_mesh_axes_and_each_name_once():
    names = [name for name, _ in RULES]
    assert len(names) == len(set(names))
    for _, axes in RULES:
        assert set([axes] if isinstance(axes, str) else axes or []) <= set(AXES)


# Batches.


def test_check_batch_accepts_multiples_and_names_the_numbers_otherwise():
    mesh = make_mesh(2, 2, 2)
    check_batch(12, 3, mesh)
    with pytest.raises(UsageError) as error:
        check_batch(10, 3, mesh)
    for word in ("batch_size is 10", "3 microbatch(es)", "4 replicas", "multiple of 12"):
        assert word in str(error.value)
    for batch_size, accumulate_steps in ((0, 1), (4, 0), (-4, 1)):
        with pytest.raises(
            UsageError, match=f"batch_size is {batch_size} .* {accumulate_steps}: both must be positive"
        ):
            check_batch(batch_size, accumulate_steps, mesh)


def test_shard_batch_splits_rows_over_data_and_fsdp_and_repeats_them_over_tensor():
    mesh = make_mesh(2, 2, 2)
    rows = {"images": np.arange(48, dtype=np.uint8).reshape(8, 2, 3), "labels": np.arange(8, dtype=np.int32)}
    batch = shard_batch(rows, mesh)
    for name, whole in rows.items():
        np.testing.assert_array_equal(batch[name], whole)
        assert batch[name].dtype == whole.dtype
        for shard in batch[name].addressable_shards:
            data, fsdp, _, _ = np.argwhere(mesh.devices == shard.device)[0]
            first = 2 * (2 * data + fsdp)
            np.testing.assert_array_equal(shard.data, whole[first : first + 2])
    planned = batch_shapes({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in rows.items()}, mesh)
    for name, leaf in planned.items():
        assert (leaf.shape, leaf.dtype) == (rows[name].shape, rows[name].dtype)
        assert batch[name].sharding == leaf.sharding


# The order of devices.


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is asked of a device that is not there."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "tpu"


TORN = [Chip(index, process) for index, process in enumerate((0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3))]
SLICES = [Chip(index, index // 4, (index // 4) % 2) for index in range(16)]
NODES = [Chip(index, index // 4, index // 4, "gpu") for index in range(16)]


@pytest.mark.parametrize("chips", [TORN, SLICES, NODES], ids=["torn apart by topology", "slices", "nodes"])
@pytest.mark.parametrize("shape", [(16, 1, 1, 1), (4, 4, 1, 1), (1, 16, 1, 1), (4, 1, 4, 1), (2, 1, 8, 1)])
def test_on_any_machine_each_process_has_rows_behind_each_other(chips, shape):
    arranged = arrange(in_order(chips), shape)
    owners = np.vectorize(lambda chip: chip.process_index)(arranged).reshape(shape[0] * shape[1], -1)
    shares = [part_of(process, owners, 4) for process in range(4)]
    assert None not in shares
    assert {count for _, count in shares} == {min(4, len(owners))}
    slices = [chip.slice_index for chip in arranged.flat]
    assert slices == sorted(slices)  # the slowest axes go from slice to slice


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (dict(data=4), (4, 1, 1, 1)),
        (dict(data=-1), (8, 1, 1, 1)),
        (dict(data=64), (8, 1, 1, 1)),
        (dict(data=2, fsdp=2), (2, 2, 1, 1)),
        (dict(data=-1, fsdp=2, tensor=2), (2, 2, 2, 1)),
        (dict(data=1, fsdp=16), (8, 1, 1, 1)),  # of another machine
        (dict(data=-1, fsdp=3), (8, 1, 1, 1)),
        (dict(data=1, sequence=4), (4, 1, 1, 1)),  # it splits no parameters
    ],
)
def test_a_run_is_evaluated_on_its_mesh_if_that_splits_parameters(sizes, expected):
    assert tuple(evaluation_mesh(**sizes).shape.values()) == expected


@pytest.mark.parametrize("sizes", [dict(data=4, tensor=2), dict(data=2, fsdp=4)])
def test_value_and_grad_are_those_of_jax(sizes):
    w, x = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(0, 1, 8).reshape(2, 4)

    def loss(params, x):
        y = jnp.tanh(jax.checkpoint(jnp.matmul)(x, params["w"]))
        return jnp.sum(y**2), {"mean": y.mean(), "kept": params["n"]}

    params = {"w": w, "n": jnp.float32(3)}
    with use_mesh(make_mesh(**sizes)):
        found = jax.jit(lambda *arrays: value_and_grad(loss)(*arrays))(params, x)
    expected = jax.value_and_grad(loss, has_aux=True)(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def test_layers_that_are_recomputed_stay_so_under_fsdp():
    """What the backward pass gets of four layers: their inputs."""

    def loss(w, x):
        for _ in range(4):
            x = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w))))(x)
        return x.sum(), ()

    w, x = jnp.ones((8, 8)), jnp.ones((16, 8))
    with use_mesh(make_mesh(data=4, fsdp=2)):
        step = jax.make_jaxpr(lambda *arrays: value_and_grad(loss)(*arrays))(w, x)
    handed = [eqn for eqn in step.eqns if eqn.primitive.name == "optimization_barrier"][-1]
    assert sum(var.aval.shape == x.shape for var in handed.invars) <= 5
