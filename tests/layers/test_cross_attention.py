"""CrossAttention: equal to Linen's attention, exact in what it reuses, and open to be looked at."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.analysis.flops import count_flops
from xattn.config import UsageError
from xattn.layers.cross_attention import CrossAttention
from xattn.ops.attention import Mask

B, N, M = 2, 5, 7


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, N, 12))


@pytest.fixture(scope="module")
def context() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (B, M, 10))


KV_MASK = jnp.array([[True] * 4 + [False] * 3, [True, False] * 3 + [True]])


def initialised(module: nn.Module, *args) -> dict[str, Any]:
    """Random parameters, biases and scales too, so that nothing is hidden by a zero or a one."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.25 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnames=("module", "mutable", "method"))
def apply(module: nn.Module, variables: dict[str, Any], *args, mutable=False, method=None, **kwargs) -> Any:
    return module.apply(variables, *args, mutable=mutable, method=method, **kwargs)


def weights_of(module: nn.Module, variables: dict[str, Any], *args) -> jax.Array:
    (weights,) = apply(module, variables, *args, mutable="intermediates")[1]["intermediates"]["attention_weights"]
    return weights


@pytest.mark.parametrize(
    ("fields", "cross", "mask"),
    [
        ({}, False, None),
        ({"qk_features": 8, "out_features": 6}, True, None),
        ({"qk_features": 16, "normalize_qk": True}, True, "padding"),
        ({"use_bias": False}, True, "full"),
        ({"qk_features": 8, "dtype": jnp.bfloat16}, True, "padding"),
    ],
    ids=["self", "cross", "normalised", "no bias", "bfloat16"],
)
def test_equals_linen_with_the_same_parameters(x, context, fields, cross, mask):
    mask = {"padding": KV_MASK[:, None, None], "full": jnp.tril(jnp.ones((N, M), bool)), None: None}[mask]
    inputs = (x, context) if cross else (x,)
    ours = CrossAttention(num_heads=4, **fields)
    variables = initialised(ours, *inputs)
    renamed = {"qkv_features" if name == "qk_features" else name: value for name, value in fields.items()}
    theirs = nn.MultiHeadDotProductAttention(num_heads=4, force_fp32_for_softmax=True, **renamed)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes(variables) == shapes(initialised(theirs, *inputs))
    out, wanted = (apply(module, variables, *inputs, mask=mask) for module in (ours, theirs))
    assert out.dtype == wanted.dtype
    out, wanted = np.asarray(out, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(out, wanted, atol=(5e-2 if "dtype" in fields else 5e-6))


def test_initial_parameters_are_linens(x, context):
    ours, theirs = CrossAttention(4), nn.MultiHeadDotProductAttention(4)
    init = jax.jit(lambda: [nn.unbox(module.init(jax.random.key(0), x, context)) for module in (ours, theirs)])
    jax.tree.map(np.testing.assert_array_equal, *init())


def test_worked_example_of_stable_diffusion():
    # 64 x 64 latent pixels of 320 channels ask 77 CLIP tokens of width 768, with 8 heads.
    x = jax.random.normal(jax.random.key(0), (1, 4096, 320))
    tokens = jax.random.normal(jax.random.key(1), (1, 77, 768))
    module = CrossAttention(num_heads=8)

    variables = jax.tree.map(lambda leaf: 0.1 * leaf, initialised(module, x, tokens))
    out, state = apply(module, variables, x, tokens, mutable="intermediates")
    (weights,) = state["intermediates"]["attention_weights"]
    kernels = {name: leaf["kernel"].shape for name, leaf in variables["params"].items()}
    assert kernels == {"query": (320, 8, 40), "key": (768, 8, 40), "value": (768, 8, 40), "out": (8, 40, 320)}
    assert out.shape == x.shape
    assert weights.shape == (1, 8, 4096, 77)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert round(4096 * 4096 / weights[0, 0].size) == 53


def test_projected_context_can_be_reused(x, context):
    module = CrossAttention(num_heads=4, num_kv_heads=2, v_features=24, normalize_qk=True)
    variables = initialised(module, x, context)
    key, value = apply(module, variables, context, method="project_kv")
    assert key.shape == (B, M, 2, 3)
    assert value.shape == (B, M, 2, 6)
    for queries in (x, x[:, :1] + 1):
        out = apply(module, variables, queries, context, kv_mask=KV_MASK)
        again = apply(module, variables, queries, kv=(key, value), kv_mask=KV_MASK)
        np.testing.assert_array_equal(again, out)


def test_projecting_first_creates_the_same_parameters(x, context):
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x, context):
            attention = CrossAttention(num_heads=4, qk_features=12)
            kv = attention.project_kv(context)
            return attention(attention(x, kv=kv), kv=kv)

    variables = initialised(Decoder(), x, context)["params"]
    assert list(variables) == ["CrossAttention_0"]
    assert {name: set(leaf) for name, leaf in variables["CrossAttention_0"].items()} == {
        name: {"kernel", "bias"} for name in ("query", "key", "value", "out")
    }


def test_symmetries_and_masks(x, context):
    module = CrossAttention(num_heads=4)
    variables = initialised(module, x, context)
    attend = functools.partial(apply, module, variables)
    out = attend(x, context, kv_mask=KV_MASK)
    keys, queries = jnp.array([3, 0, 6, 1, 5, 2, 4]), jnp.array([4, 2, 0, 1, 3])
    np.testing.assert_allclose(attend(x, context[:, keys], kv_mask=KV_MASK[:, keys]), out, atol=2e-6)
    np.testing.assert_allclose(attend(x[:, queries], context, kv_mask=KV_MASK), out[:, queries], atol=2e-6)
    # Self-attention is equivariant under one permutation of both.
    np.testing.assert_allclose(attend_self(x[:, queries]), attend_self(x)[:, queries], atol=2e-6)

    other = jnp.where(KV_MASK[..., None], context, 100.0)
    np.testing.assert_array_equal(attend(x, other, kv_mask=KV_MASK), out)
    shorter = attend(x[:1], context[:1, :4])
    np.testing.assert_allclose(out[:1], shorter, atol=2e-6)
    # One meaning, four ways to say it.
    for options in (
        {"mask": KV_MASK[:, None, None]},
        {"mask": Mask(kv_mask=KV_MASK)},
        {"mask": Mask(kv_mask=KV_MASK), "kv_mask": KV_MASK},
    ):
        np.testing.assert_array_equal(attend(x, context, **options), out)
    # A query that is padding attends to nothing, so that only the output bias is left.
    padded = attend(x, context, kv_mask=KV_MASK, q_mask=jnp.arange(N)[None].repeat(B, 0) != 2)
    np.testing.assert_array_equal(padded[:, 2], jnp.broadcast_to(variables["params"]["out"]["bias"], (B, 12)))
    np.testing.assert_array_equal(padded[:, 3:], out[:, 3:])


def attend_self(x):
    module = CrossAttention(num_heads=4)
    return apply(module, initialised(module, x), x)


def test_leading_axes_are_a_batch(x, context):
    module = CrossAttention(num_heads=4)
    variables = initialised(module, x, context)
    out = apply(module, variables, x, context, kv_mask=KV_MASK)
    alone = apply(module, variables, x[0], context[0], kv_mask=KV_MASK[0])
    np.testing.assert_allclose(alone, out[0], atol=2e-6)
    folded = apply(module, variables, x[:, None], context[:, None], kv_mask=KV_MASK[:, None])
    np.testing.assert_allclose(folded[:, 0], out, atol=2e-6)


def test_temperature_and_soft_cap(x, context):
    module = CrossAttention(num_heads=4)
    variables = initialised(module, x, context)
    weights = weights_of(module, variables, x, context)
    cold = weights_of(CrossAttention(num_heads=4, temperature=0.25), variables, x, context)
    np.testing.assert_allclose(cold, jax.nn.softmax(jnp.log(weights) / 0.25), atol=1e-5)
    # Scores within +-0.5 keep any two weights within a factor of e.
    capped = weights_of(CrossAttention(num_heads=4, temperature=1e-3, logits_soft_cap=0.5), variables, x, context)
    ratio = capped.max(-1) / capped.min(-1)
    assert 2.5 < ratio.max() <= np.e * 1.0001


def test_additive_score_by_hand():
    # One head of width 2; queries and keys are passed through unchanged, values are the keys.
    module = CrossAttention(num_heads=1, score="additive", use_bias=False)
    x, context = jnp.array([[[0.5, -1.0]]]), jnp.array([[[1.0, 2.0], [-3.0, 0.0]]])
    kernel = {"kernel": jnp.eye(2)[:, None]}
    out = {"kernel": jnp.eye(2)[None]}
    params = {"query": kernel, "key": kernel, "value": kernel, "out": out, "energy": jnp.array([[2.0, -1.0]])}
    scores = [2 * np.tanh(1.5) - np.tanh(1.0), 2 * np.tanh(-2.5) - np.tanh(-1.0)]
    weights = np.exp(scores) / np.exp(scores).sum()
    for mutable in (False, "intermediates"):
        got = apply(module, {"params": params}, x, context, mutable=mutable)
        got = got[0] if mutable else got
        np.testing.assert_allclose(got[0, 0], weights @ np.asarray(context[0]), rtol=1e-5)
    assert initialised(module, x)["params"]["energy"].shape == (1, 2)


@pytest.mark.parametrize("fields", [{}, {"attention": "chunked"}, {"score": "additive"}, {"dtype": jnp.bfloat16}])
def test_looking_does_not_change_the_output(x, context, fields):
    module = CrossAttention(num_heads=4, num_kv_heads=2, dropout_rate=0.4, **fields)
    variables = initialised(module, x, context)

    @functools.partial(jax.jit, static_argnames="mutable")
    def run(x, mutable):
        return module.apply(
            variables,
            x,
            context,
            kv_mask=KV_MASK,
            deterministic=False,
            rngs={"dropout": jax.random.key(3)},
            mutable=mutable,
        )

    out, (observed, state) = run(x, False), run(x, "intermediates")
    tolerance = 3e-2 if "dtype" in fields else 2e-6
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(observed, np.float32), atol=tolerance)
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.dtype == jnp.float32
    # What is seen is before dropout, so rows still sum to 1.
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not weights[jnp.broadcast_to(~KV_MASK[:, None, None], weights.shape)].any()


def intermediate_shapes(jaxpr) -> set[tuple[int, ...]]:
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {var.aval.shape for var in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            shapes |= intermediate_shapes(inner)
    return shapes


def test_no_weights_exist_when_nobody_looks():
    module = CrossAttention(num_heads=4, attention="chunked")
    x, context = jnp.ones((1, 33, 12)), jnp.ones((1, 2049, 10))
    variables = initialised(module, x, context)

    def largest(mutable):
        jaxpr = jax.make_jaxpr(lambda x: module.apply(variables, x, context, mutable=mutable))(x).jaxpr
        return {shape for shape in intermediate_shapes(jaxpr) if shape[-2:] == (33, 2049)}

    assert not largest(False)
    assert not largest(["batch_stats"])
    assert largest(["intermediates"])
    assert largest(["perturbations"])


# The four rules of looking inside.


def test_initialising_sows_nothing(x, context):
    variables = CrossAttention(num_heads=4).init({"params": jax.random.key(0)}, x, context, mutable=True)
    assert set(variables) == {"params"}


def perturbations(module, variables, *args):
    """Zeros in the place of every perturbation, without running the model."""
    shapes = jax.eval_shape(lambda: module.apply(variables, *args, mutable=["perturbations"])[1])
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_perturbation_gradient_is_that_of_the_weights(x, context, score):
    module = CrossAttention(num_heads=4, score=score)
    variables = initialised(module, x, context)
    cotangent = jax.random.normal(jax.random.key(5), x.shape)
    zeros = perturbations(module, variables, x, context)

    def loss(perturbations):
        return (module.apply(variables | perturbations, x, context, kv_mask=KV_MASK) * cotangent).sum()

    gradient = jax.jit(jax.grad(loss))(zeros)["perturbations"]["attention_weights"]
    # out = sum_m A_nm (v_m W_out), so d loss / d A_nm = (W_out cotangent_n) . v_m.
    _, value = apply(module, variables, context, method="project_kv")
    pulled = jnp.einsum("hdc,bnc->bnhd", variables["params"]["out"]["kernel"], cotangent)
    np.testing.assert_allclose(gradient, jnp.einsum("bnhd,bmhd->bhnm", pulled, value), atol=1e-5)


class Block(nn.Module):
    """A residual block for nn.scan: the carry is x, the context is the same for all."""

    @nn.compact
    def __call__(self, x, context):
        return x + CrossAttention(num_heads=4, name="attention")(x, context), None


class Stack(nn.Module):
    """Blocks scanned over depth, each with its own parameters or all with the same."""

    length: int = 3
    shared: bool = False
    listed: tuple[str, ...] = ("intermediates", "perturbations")

    @nn.compact
    def __call__(self, x, context):
        axes = {name: 0 for name in self.listed}
        blocks = nn.scan(
            Block,
            variable_axes=axes if self.shared else axes | {"params": 0},
            variable_broadcast="params" if self.shared else False,
            split_rngs={"params": not self.shared},
            in_axes=nn.broadcast,
            length=self.length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return blocks(name="blocks")(x, context)[0]


def looked_into(module, variables, x, context):
    """The weights of every pass, and the gradient of a loss by them."""
    _, state = apply(module, variables, x, context, mutable="intermediates")
    zeros = perturbations(module, variables, x, context)

    def loss(zeros):
        return jnp.sin(module.apply(variables | zeros, x, context)).sum()

    return state.get("intermediates"), jax.jit(jax.grad(loss))(zeros).get("perturbations")


@pytest.mark.parametrize("shared", [False, True], ids=["own parameters", "shared parameters"])
def test_scanned_blocks_have_a_slot_for_each_pass(x, context, shared):
    module = Stack(shared=shared)
    variables = initialised(module, x, context)
    weights, gradient = looked_into(module, variables, x, context)
    (weights,) = weights["blocks"]["attention"]["attention_weights"]
    gradient = gradient["blocks"]["attention"]["attention_weights"]
    assert weights.shape == gradient.shape == (3, B, 4, N, M)

    # The same blocks one after the other, perturbed one by one.
    params = variables["params"]["blocks"]
    passes = [{"params": params if shared else jax.tree.map(lambda leaf, i=i: leaf[i], params)} for i in range(3)]

    def unrolled(perturbed):
        y, seen = x, []
        for block, added in zip(passes, perturbed, strict=True):
            extra = {"perturbations": {"attention": {"attention_weights": added}}}
            (y, _), state = Block().apply(block | extra, y, context, mutable="intermediates")
            seen.append(state["intermediates"]["attention"]["attention_weights"][0])
        return jnp.sin(y).sum(), jnp.stack(seen)

    wanted_gradient, wanted = jax.jit(jax.grad(unrolled, has_aux=True))(jnp.zeros_like(gradient))
    np.testing.assert_allclose(weights, wanted, atol=2e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-5)


def test_a_scan_must_list_the_collections(x, context):
    # What happens otherwise: nothing is sown and no gradient arrives, without any error.
    module = Stack(listed=())
    variables = initialised(module, x, context)
    assert not jax.tree.leaves(looked_into(module, variables, x, context))


def test_only_named_modules_are_perturbed(x, context):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, context):
            x = CrossAttention(num_heads=4, name="first")(x, context)
            return CrossAttention(num_heads=4, name="second")(x, context)

    module = Two()
    variables = initialised(module, x, context)
    zeros = perturbations(module, variables, x, context)["perturbations"]
    one = {"perturbations": {"second": zeros["second"]}}
    np.testing.assert_allclose(
        apply(module, variables | one, x, context), apply(module, variables, x, context), atol=1e-5
    )


def test_can_be_initialised_and_run_under_a_mesh(x, context):
    # Linen's DenseGeneral names the axes of a flattened kernel, and fails here.
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("batch", "data"), ("heads", "tensor"), ("act_heads", "tensor"))
    module = CrossAttention(num_heads=4, normalize_qk=True, score="additive")

    @jax.jit
    def step(x, context):
        return module.apply(module.init(jax.random.key(0), x, context), x, context)

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        assert "sharding_constraint" in step.lower(x, context).as_text()
        sharded = step(x, context)
        specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), x, context))["params"]
    assert specs["key"]["kernel"] == jax.P("embed", "heads", "kv")
    assert specs["out"]["kernel"] == jax.P("heads", "kv", "embed")
    assert specs["query_ln"]["scale"] == specs["out"]["bias"] == jax.P("norm")
    np.testing.assert_allclose(sharded, step(x, context), atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "qk_features 12 is not divisible by num_heads 5"),
        ({"num_heads": 4, "v_features": 10}, "v_features 10 is not divisible by num_heads 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_heads": 4, "score": "general"}, "score is 'general': use 'dot' or 'additive'"),
        ({"num_heads": 4, "score": "additive", "attention": "xla"}, "attention 'xla' has no additive score"),
    ],
)
def test_usage_errors(x, fields, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(CrossAttention(**fields).init, jax.random.key(0), x)


def test_usage_errors_of_calls(x, context):
    module = CrossAttention(num_heads=4)
    with pytest.raises(UsageError, match="set qk_features"):
        module.init(jax.random.key(0), context, method="project_kv")
    variables = initialised(module, x, context)
    kv = apply(module, variables, context, method="project_kv")
    with pytest.raises(UsageError, match="both inputs_kv and kv"):
        module.apply(variables, x, context, kv=kv)


class Normed(nn.Module):
    """As the Perceiver's layers use it: a LayerNorm of the caller's before the keys and values."""

    attention: str | None = None
    rate: float = 0.0
    scale: bool = True
    bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs_q, inputs_kv, **options):
        norm = nn.LayerNorm(name="norm", epsilon=0.01, use_scale=self.scale, use_bias=self.bias, dtype=self.dtype)
        options |= {"kv_norm": norm}
        layer = CrossAttention(
            2, qk_features=32, dropout_rate=self.rate, attention=self.attention, dtype=self.dtype, name="attention"
        )
        return layer(inputs_q, inputs_kv, **options)


def test_few_queries_do_not_project_their_many_inputs_and_nothing_else_changes():
    rng = np.random.default_rng(0)
    inputs_q, inputs_kv = (jnp.asarray(rng.normal(size=(2, n, 12)), jnp.float32) for n in (3, 80))
    kv_mask = jnp.broadcast_to(jnp.arange(80) < 50, (2, 80))
    variables = Normed().init(jax.random.key(0), inputs_q, inputs_kv)
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(variables)))
    noise = jax.tree.unflatten(jax.tree.structure(variables), noise)
    variables = jax.tree.map(lambda x, key: x + jax.random.normal(key, x.shape), variables, noise)
    options = dict(kv_mask=kv_mask, deterministic=False, rngs={"dropout": jax.random.key(2)})

    def loss(attention, variables, inputs_q, inputs_kv):
        out = Normed(attention, rate=0.3).apply(variables, inputs_q, inputs_kv, **options)
        return jnp.square(out).sum(), out

    found, wanted = (
        jax.grad(functools.partial(loss, name), (0, 1, 2), has_aux=True)(variables, inputs_q, inputs_kv)
        for name in (None, "xla")
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, wanted)
    flops = [count_flops(functools.partial(loss, n), variables, inputs_q, inputs_kv).total() for n in (None, "xla")]
    assert flops[0] < 0.75 * flops[1]

    out, state = Normed(rate=0.3).apply(variables, inputs_q, inputs_kv, mutable=["intermediates"], **options)
    np.testing.assert_allclose(out, found[1], atol=2e-6 * float(jnp.abs(out).max()))
    (weights,) = state["intermediates"]["attention"]["attention_weights"]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(("scale", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_norm_may_lack_scale_or_bias(scale, bias, dtype):
    rng = np.random.default_rng(0)
    inputs_q, inputs_kv = (jnp.asarray(rng.normal(size=(2, n, 12)), jnp.float32) for n in (3, 80))
    found, wanted = (Normed(name, scale=scale, bias=bias, dtype=dtype) for name in (None, "xla"))
    variables = found.init(jax.random.key(0), inputs_q, inputs_kv)
    tolerance = 1e-5 if dtype is None else 0.02
    outs = [model.apply(variables, inputs_q, inputs_kv) for model in (found, wanted)]
    np.testing.assert_allclose(*(out.astype(jnp.float32) for out in outs), atol=tolerance)
    flops = [count_flops(model.apply, variables, inputs_q, inputs_kv).total() for model in (found, wanted)]
    assert flops[0] < flops[1]


def test_cached_keys_and_a_norm_for_them_are_an_error(x, context):
    layer = CrossAttention(4, qk_features=8)
    variables = layer.init(jax.random.key(0), x, context)
    kv = layer.apply(variables, context, method="project_kv")
    with pytest.raises(UsageError, match="both kv_norm and kv"):
        layer.apply(variables, x, kv=kv, kv_norm=nn.LayerNorm())
