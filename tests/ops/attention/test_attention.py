"""Every exact implementation against one float64 definition with its gradients in closed form."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.variables import normal
from xattn.ops.attention import IMPLEMENTATIONS, Mask, attention_weights, chunked, dot_product_attention
from xattn.ops.attention.chunked import block_size
from xattn.parallel.mesh import make_mesh

# For 6 queries and 8 keys. A ragged last chunk is a second copy of the loop's body, and two are four.
VARIANTS = {
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla"},
    "ragged key chunks": {"implementation": "chunked", "key_chunk_size": 3},
    "key and query chunks": {"implementation": "chunked", "key_chunk_size": 4, "query_chunk_size": 3},
    "gather": {"implementation": "gather", "key_chunk_size": 3},
    "ring": {"implementation": "ring", "key_chunk_size": 3},
    "kv_ring": {"implementation": "kv_ring", "key_chunk_size": 3},
}
RAGGED = {"implementation": "chunked", "key_chunk_size": 3, "query_chunk_size": 4}
OPTIONS = VARIANTS | {"ragged key and query chunks": RAGGED}
every_variant = pytest.mark.parametrize("variant", OPTIONS)
most_variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """What "gather" and the rings split queries and keys over; the others take no notice."""
    with jax.set_mesh(make_mesh(data=1, sequence=2)):
        yield


@dataclasses.dataclass
class Case:
    """One call of attention."""

    batch: tuple[int, ...] = (2,)
    queries: int = 6
    keys: int = 8
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    v_width: int = 6
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | Mask | None = None
    scale: str | None = None  # "heads" for one a head
    cap: float | None = None
    dtype: Any = jnp.float32
    tolerance: float = 2e-5

    def inputs(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), self.dtype)

        scores = (*self.batch, self.heads, self.queries, self.keys)
        arrays = {
            "query": normal(*self.batch, self.queries, self.heads, self.width),
            "key": normal(*self.batch, self.keys, self.kv_heads, self.width),
            "value": normal(*self.batch, self.keys, self.kv_heads, self.v_width),
            "bias": None if self.bias is None else normal(*self.bias),
            "scale": jnp.linspace(0.2, 0.5, self.heads) if self.scale == "heads" else None,
            "d_out": normal(*self.batch, self.queries, self.heads, self.v_width),
            "d_lse": jnp.asarray(rng.normal(size=scores[:-1]), jnp.float32),
            "mask": self.mask,
        }
        if isinstance(self.mask, tuple):
            arrays["mask"] = jnp.asarray(rng.random(self.mask) < 0.5)
        return arrays


def by_definition(inputs: dict[str, Any], cap: float | None) -> dict[str, np.ndarray]:
    """Outputs and gradients of sum(d_out * out) + sum(d_lse * lse) over rows with a key, in float64."""
    x = {name: np.asarray(a, np.float64) for name, a in inputs.items() if a is not None and name != "mask"}
    q, k, v = x["query"], x["key"], x["value"]
    *batch, num_queries, num_heads, width = q.shape
    num_keys, kv_heads = k.shape[-3:-1]
    repeats = num_heads // kv_heads
    k, v = np.repeat(k, repeats, -2), np.repeat(v, repeats, -2)
    scale = np.broadcast_to(x.get("scale", width**-0.5), (num_heads,))[:, None, None]
    products = np.einsum("...nhd,...mhd->...hnm", q, k)
    capped = scale * products
    slope = 1.0
    if cap is not None:
        slope = 1 - np.tanh(capped / cap) ** 2
        capped = cap * np.tanh(capped / cap)
    scores = capped + x.get("bias", 0.0)
    mask = inputs["mask"]
    if isinstance(mask, Mask):
        mask = mask.as_array(num_queries, num_keys)
    allowed = np.broadcast_to(True if mask is None else np.asarray(mask), scores.shape)

    top = np.where(allowed, scores, -np.inf).max(-1, keepdims=True)
    mass = np.where(allowed, np.exp(np.where(allowed, scores - top, 0)), 0)
    total = mass.sum(-1, keepdims=True)
    weights = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
    lse = np.where(total > 0, top + np.log(np.where(total > 0, total, 1)), -np.inf)[..., 0]
    out = np.einsum("...hnm,...mhd->...nhd", weights, v)

    d_weights = np.einsum("...nhd,...mhd->...hnm", x["d_out"], v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True) + x["d_lse"][..., None])
    d_products = d_scores * slope * scale
    d_key = np.einsum("...hnm,...nhd->...mhd", d_products, q)
    d_value = np.einsum("...hnm,...nhd->...mhd", weights, x["d_out"])
    result = {
        "weights": weights,
        "out": out,
        "lse": lse,
        "query": np.einsum("...hnm,...mhd->...nhd", d_products, k),
        "key": d_key.reshape(*batch, num_keys, kv_heads, repeats, -1).sum(-2),
        "value": d_value.reshape(*batch, num_keys, kv_heads, repeats, -1).sum(-2),
    }
    if "bias" in x:
        result["bias"] = unbroadcast(d_scores, x["bias"].shape)
    if "scale" in x:
        d_scale = unbroadcast(d_scores * slope * products, (num_heads, 1, 1))
        result["scale"] = unbroadcast(d_scale[:, 0, 0], x["scale"].shape)
    return result


def unbroadcast(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


@functools.partial(jax.jit, static_argnames=("cap", "variant"))
def by_implementation(inputs: dict[str, Any], cap: float | None, variant: str) -> dict[str, jax.Array]:
    differentiable = {n: inputs[n] for n in ("query", "key", "value", "bias", "scale") if inputs[n] is not None}

    def attend(arrays):
        return dot_product_attention(
            **arrays, mask=inputs["mask"], logits_soft_cap=cap, return_lse=True, **OPTIONS[variant]
        )

    (out, lse), pull = jax.vjp(attend, differentiable)
    return {"out": out, "lse": lse, **pull((inputs["d_out"], inputs["d_lse"]))[0]}


def check(inputs: dict[str, Any], variant: str, cap: float | None = None, tolerance: float = 2e-5) -> None:
    wanted = by_definition(inputs, cap)
    got = by_implementation(inputs, cap, variant)
    assert got["out"].dtype == inputs["value"].dtype
    assert got["lse"].dtype == jnp.float32
    for name, array in got.items():
        np.testing.assert_allclose(
            np.asarray(array, np.float64),
            wanted[name],
            rtol=tolerance,
            atol=tolerance * max(1.0, np.abs(wanted[name][np.isfinite(wanted[name])]).max(initial=0)),
            err_msg=name,
        )
    empty = np.isneginf(wanted["lse"])
    np.testing.assert_array_equal(np.isneginf(got["lse"]), empty)
    for name in ("out", "query"):
        assert not np.swapaxes(got[name], -2, -3)[empty].any(), f"{name} of a row without keys is not zero"


SEGMENTS = (
    jnp.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1]]),
    jnp.array([[0, 0, 1, 1, 1, 1, 3, 2], [5, 1, 1, 0, 0, 0, 0, 1]]),
)
CASES = {
    "one key head, no leading axes": Case(batch=(), kv_heads=1),
    "as many key heads as heads, two leading axes": Case(batch=(2, 3), heads=2),
    "one query": Case(queries=1, mask=(2, 1, 1, 8)),
    "one key": Case(keys=1, mask=(2, 4, 6, 1)),
    "soft cap": Case(cap=1.5, bias=(4, 1, 8), mask=(2, 1, 6, 8), scale="heads"),
    "bfloat16": Case(dtype=jnp.bfloat16, mask=(2, 1, 6, 8), tolerance=3e-2),
    "structured mask": Case(
        mask=Mask.causal(jnp.array([3, -2]))
        & Mask.window(3, None)
        & Mask.packed(*SEGMENTS)
        & Mask(q_mask=jnp.arange(6) != 3, kv_mask=jnp.arange(8) < jnp.array([[6], [5]])),
        bias=(4, 6, 8),
    ),
}
DENSE = Case(bias=(2, 4, 6, 8), mask=(2, 4, 6, 8), scale="heads")
BROADCAST = [
    Case(bias=bias, mask=mask)
    for bias, mask in [
        ((8,), ()),
        ((1,), (8,)),
        ((6, 8), (6, 1)),
        ((6, 1), (6, 8)),
        ((4, 1, 1), (2, 1, 1, 8)),
        ((2, 4, 1, 1), (4, 1, 8)),
        ((2, 1, 6, 1), (4, 6, 1)),
    ]
]


class TestExact:
    @most_variants
    @pytest.mark.parametrize("name", CASES)
    def test_definition(self, variant, name):
        case = CASES[name]
        if case.queries % 2 + case.keys % 2 and variant in ("gather", "ring", "kv_ring"):
            with pytest.raises(ValueError, match="do not both divide by the 2 devices"):
                check(case.inputs(), variant)
            return
        check(case.inputs(), variant, case.cap, case.tolerance)

    # The next five share one compiled program a variant.
    @every_variant
    def test_full_shapes(self, variant):
        check(DENSE.inputs(), variant)

    @every_variant
    @pytest.mark.parametrize("shift", [200.0, -200.0])
    def test_shifted_scores(self, variant, shift):
        inputs = DENSE.inputs()
        check(inputs | {"bias": inputs["bias"] + shift}, variant, tolerance=2e-4)
        check(inputs | {"bias": inputs["bias"].at[..., 3].add(shift)}, variant, tolerance=2e-4)

    @every_variant
    def test_scores_scaled_by_100(self, variant):
        inputs = DENSE.inputs()
        check(inputs | {"scale": 100 * inputs["scale"]}, variant, tolerance=2e-3)

    @every_variant
    def test_bias_of_minus_infinity_is_a_mask(self, variant):
        inputs = DENSE.inputs()
        masked = inputs | {"mask": inputs["mask"].at[:, 1].set(False)}
        biased = inputs | {"bias": inputs["bias"].at[:, 1].set(-jnp.inf)}
        jax.tree.map(
            np.testing.assert_array_equal,
            by_implementation(masked, None, variant),
            by_implementation(biased, None, variant),
        )

    @every_variant
    def test_content_of_masked_keys_does_not_matter(self, variant):
        inputs = DENSE.inputs()
        inputs["mask"] = inputs["mask"].at[..., 4:].set(False)
        other = {name: inputs[name].at[:, 4:].add(9.0) for name in ("key", "value")}
        clean, dirty = (by_implementation(x, None, variant) for x in (inputs, inputs | other))
        for name in ("out", "lse", "query"):
            np.testing.assert_array_equal(clean[name], dirty[name])

    @every_variant
    def test_no_keys_at_all(self, variant):
        query, nothing = jnp.ones((2, 4, 2, 4)), jnp.ones((2, 0, 2, 4))
        out, lse = dot_product_attention(query, nothing, nothing, return_lse=True, **OPTIONS[variant])
        assert not out.any()
        assert jnp.isneginf(lse).all()

    @most_variants
    def test_dropout(self, variant):
        # With the identity as values the output is the matrix of dropped weights itself.
        inputs = Case().inputs()
        query, key = inputs["query"], inputs["key"]
        value = jnp.broadcast_to(jnp.eye(8)[:, None], (2, 8, 2, 8))

        @functools.partial(jax.jit, static_argnames="variant")
        def attend(arrays, variant):
            function = functools.partial(
                dot_product_attention, dropout_rate=0.3, dropout_rng=jax.random.key(1), **OPTIONS[variant]
            )
            out, pull = jax.vjp(function, *arrays)
            return out, pull(jnp.sin(out))

        out, gradients = attend((query, key, value), variant)
        wanted, wanted_gradients = attend((query, key, value), "reference")
        np.testing.assert_array_equal(out == 0, wanted == 0)
        weights = jnp.swapaxes(attention_weights(query, key), 1, 2)
        np.testing.assert_allclose(out, jnp.where(wanted == 0, 0, weights / 0.7), rtol=1e-5)
        for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
            np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-5)


@pytest.mark.parametrize("variant", ["xla", "key and query chunks"])
@pytest.mark.parametrize("case", BROADCAST, ids=lambda case: f"bias {case.bias} mask {case.mask}")
def test_broadcast(variant, case):
    check(case.inputs(), variant)


def test_dropout_rate_and_independence():
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def kept(seed, num_queries=64, num_keys=64):
        query, key = jnp.zeros((2, num_queries, 2, 1)), jnp.zeros((2, num_keys, 2, 1))
        value = jnp.broadcast_to(jnp.eye(num_keys)[:, None], (2, num_keys, 2, num_keys))
        rng = jax.random.key(seed)
        return dot_product_attention(query, key, value, dropout_rate=0.25, dropout_rng=rng) > 0

    one = np.asarray(kept(0))
    # 16384 weights: five standard deviations of the kept share are 0.017, of an agreement of 0.625, 0.02.
    assert abs(one.mean() - 0.75) < 0.017
    others = {
        "batch": one[::-1],
        "head": one[:, :, ::-1],
        "query": np.roll(one, 1, axis=1),
        "key": np.roll(one, 1, axis=3),
        "query and key": np.roll(one, (1, 1), axis=(1, 3)),
        "transposed": one.swapaxes(1, 3),
        "seed": np.asarray(kept(1)),
    }
    for name, other in others.items():
        assert abs((one == other).mean() - 0.625) < 0.03, name
    # The pattern of a query does not depend on how many others there are.
    np.testing.assert_array_equal(kept(0, 9, 31), one[:, :9, :, :31])


def test_attention_weights_are_those_of_the_definition():
    case = CASES["soft cap"]
    inputs = case.inputs()
    weights = attention_weights(
        inputs["query"],
        inputs["key"],
        bias=inputs["bias"],
        mask=inputs["mask"],
        scale=inputs["scale"],
        logits_soft_cap=case.cap,
    )
    wanted = by_definition(inputs, case.cap)["weights"]
    np.testing.assert_allclose(weights, wanted, atol=1e-6)
    sums = weights.sum(-1)
    np.testing.assert_allclose(sums, wanted.sum(-1), atol=1e-6)
    assert np.array_equal(sums > 0.5, wanted.any(-1))


def temp_bytes(implementation: str, num_keys: int, gradient: bool) -> int:
    """Temporary memory of the ImageNet Perceiver's first cross-attention (512 latents, 224 x 224 pixels)."""

    def loss(*arrays):
        return dot_product_attention(*arrays, implementation=implementation).sum()

    function = (
        jax.grad(loss, (0, 1, 2))
        if gradient
        else functools.partial(dot_product_attention, implementation=implementation)
    )
    query, key = (jax.ShapeDtypeStruct((1, length, 1, 261), jnp.float32) for length in (512, num_keys))
    return jax.jit(function).lower(query, key, key).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_chunks_take_less_than_a_tenth_of_the_memory(gradient):
    dense = temp_bytes("xla", 50176, gradient)
    for num_keys in (50176, 50177):
        assert temp_bytes("chunked", num_keys, gradient) < dense / 10


def chosen(monkeypatch, query, key, value, **options):
    """The implementations that a call traces."""
    names = []
    for name, attend in IMPLEMENTATIONS.items():

        def spy(*args, name=name, attend=attend, **kwargs):
            names.append(name)
            return attend(*args, **kwargs)

        monkeypatch.setitem(IMPLEMENTATIONS, name, spy)
    jax.eval_shape(functools.partial(dot_product_attention, **options), query, key, value)
    return names


@pytest.mark.parametrize(
    ("backend", "query", "keys", "asked", "wanted"),
    [
        ("cpu", (1, 512, 8, 64), 1024, (None, None), (512, 128, 128)),
        ("cpu", (1, 1024, 8, 64), 1024, (None, None), (1024, 128, 128)),  # 4 MiB of scores
        ("cpu", (1, 1025, 8, 64), 1024, (None, None), (1025, 256, 256)),
        ("cpu", (1, 512, 8, 64), 256, (None, None), (512, 256, 256)),  # one block
        ("cpu", (1, 512, 8, 64), 77, (None, None), (512, 77, 77)),
        ("cpu", (4, 50176, 8, 64), 1024, (None, None), (2048, 256, 256)),  # 64 MiB
        ("cpu", (1, 2048, 8, 64), 1024, (128, None), (128, 256, 128)),  # 512 KiB
        ("cpu", (1, 2048, 8, 64), 1024, (127, None), (127, 256, 256)),
        ("cpu", (1, 512, 1, 64), 50176, (None, None), (512, 512, 256)),  # 1 MiB of scores, 256 KiB of keys and values
        ("cpu", (1, 128, 1, 64), 50176, (None, None), (128, 2048, 256)),
        ("cpu", (1, 128, 1, 64), 2047, (None, None), (128, 1024, 256)),
        ("cpu", (1, 128, 1, 64), 50176, (None, 100), (128, 100, 100)),
        ("cpu", (4, 32, 8, 64), 16384, (None, None), (32, 128, 128)),
        ("cpu", (1, 5, 2, 8), 2**20, (None, None), (5, 8192, 256)),
        ("cpu", (1, 0, 2, 8), 1024, (None, None), (1, 1024, 256)),
        ("gpu", (1, 512, 1, 261), 50176, (None, None), (512, 32768, 32768)),
        ("gpu", (1, 512, 8, 64), 50176, (None, None), (512, 4096, 4096)),
        ("gpu", (4, 8192, 16, 64), 8192, (None, None), (1024, 256, 256)),
        ("gpu", (1, 1, 1, 64), 2**20, (None, None), (1, 32768, 32768)),
        ("gpu", (1, 512, 8, 64), 50176, (None, 100), (512, 100, 100)),
    ],
)
def test_blocks_are_as_large_as_the_device_wants_them(monkeypatch, backend, query, keys, asked, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    batch, _, heads, width = query
    query, key = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query, (batch, keys, heads, width)))
    assert block_size(query, key, key, *asked) == wanted


def test_a_forward_pass_counts_heads_and_widths_of_keys_and_of_values():
    def forward(groups, width):
        query, key, value = (
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((2, 16, 4, 8), (2, 9000, groups, 8), (2, 9000, groups, width))
        )
        return block_size(query, key, value, None, None)[1]

    # Bytes of a key: 512 for its scores, and 8 G (8 + Dv); 2 MiB hold so many of them, in powers of two.
    assert [forward(1, 8), forward(4, 8), forward(1, 64), forward(4, 64)] == [2048, 2048, 1024, 512]


def test_the_passes_may_have_blocks_of_different_sizes(monkeypatch):
    query, key, value, towards = (normal(2, length, 2, 8, seed=seed) for seed, length in enumerate((5, 23, 23, 5)))
    monkeypatch.setattr(chunked, "KEY_CHUNK", 4)
    monkeypatch.setattr(chunked, "FORWARD_BYTES", 8 * 4 * 2 * 2 * (5 + 8 + 8))  # eight keys, values and scores
    assert block_size(query, key, value, None, None) == (5, 8, 4)
    seen = []

    def prepare(key, value):
        seen.append(key.shape[1])
        return key, value

    options = {"bias": None, "mask": Mask(), "scale": 8**-0.5, "logits_soft_cap": None}
    options |= {"dropout_rate": 0.0, "dropout_rng": None}
    out, pull = jax.vjp(lambda *xs: chunked.attend_prepared(xs[0], xs[1:], prepare, **options)[0], query, key, value)
    assert set(seen) == {23, 8, 7}  # all, for their shapes
    seen.clear()
    gradients = pull(towards)
    assert set(seen) == {4, 3}
    expected, expected_pull = jax.vjp(
        functools.partial(dot_product_attention, implementation="reference"), query, key, value
    )
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for ours, wanted in zip(gradients, expected_pull(towards), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "wanted"),
    [
        (4096, 77, {}, "xla"),
        (512, 50176, {}, "chunked"),
        # Many queries of few keys: the scores are large, but a row of them is shorter than one chunk.
        (50176, 255, {}, "xla"),
        (50176, 256, {}, "chunked"),
        (512, 8191, {}, "xla"),
        (512, 8192, {}, "chunked"),
        (16, 16, {"key_chunk_size": 4}, "chunked"),
        (512, 50176, {"implementation": "xla"}, "xla"),
        (16, 16, {"implementation": "reference"}, "reference"),
    ],
)
def test_choice_of_implementation(monkeypatch, queries, keys, options, wanted):
    query, key = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for length in (queries, keys))
    assert chosen(monkeypatch, query, key, key, **options) == [wanted]


def zeros(*shape):
    return jnp.zeros(shape)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((zeros(5, 4, 8), zeros(7, 4, 6), zeros(7, 4, 6)), {}, "not 8 and 6"),
        ((zeros(5, 4, 8), zeros(7, 3, 8), zeros(7, 3, 8)), {}, "4 query heads cannot share 3"),
        ((zeros(5, 4, 8), zeros(7, 4, 8), zeros(6, 4, 8)), {}, r"key \(7, 4, 8\) and value \(6, 4, 8\)"),
        ((zeros(2, 5, 4, 8), zeros(3, 7, 4, 8), zeros(3, 7, 4, 8)), {}, "same leading axes"),
        ((zeros(5, 4, 8), zeros(1, 7, 4, 8), zeros(1, 7, 4, 8)), {}, "must all be"),
        (None, {"implementation": "flash"}, "'flash': use reference, xla, chunked"),
        (None, {"implementation": "xla", "key_chunk_size": 4}, "'xla' takes no key_chunk_size"),
        (None, {"key_chunk_size": 0}, "key_chunk_size is 0"),
        (None, {"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        (None, {"dropout_rate": 0.1}, "dropout_rng is None"),
        (None, {"mask": jnp.ones((2, 7), bool)}, r"mask \(2, 7\) does not broadcast to \(2, 4, 5, 7\).*kv_mask"),
        (None, {"mask": Mask(kv_mask=jnp.ones((2, 5), bool))}, r"kv_mask \(2, 5\) does not broadcast to \(2, 7\)"),
        (None, {"bias": zeros(3, 5, 7)}, r"bias \(3, 5, 7\)"),
        (None, {"scale": zeros(2)}, r"scale \(2,\) must be one number, or one for each of 4 heads"),
    ],
)
def test_errors_name_both_sizes(arrays, options, message):
    # The annotations, which also catch the first five, are checked while tests run only.
    attend = getattr(dot_product_attention, "__wrapped__", dot_product_attention)
    with pytest.raises(ValueError, match=message):
        attend(*(arrays or (zeros(2, 5, 4, 8), zeros(2, 7, 4, 8), zeros(2, 7, 4, 8))), **options)
