"""The one public attention function: checks its arguments and picks an implementation."""

import functools
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xattn.ops.attention import chunked, cudnn, distributed, reference, splash, xla
from xattn.ops.attention.masks import Mask

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "xla": xla.attend,
    "chunked": chunked.attend,
    "gather": distributed.gather,
    "ring": distributed.ring,
    "kv_ring": distributed.kv_ring,
    "cudnn": cudnn.attend,
    "splash": splash.attend,
}

KERNELS = {"cudnn": cudnn.unfit, "splash": splash.unfit}
"""The fused kernels of GPUs and TPUs, and what tells why one cannot serve."""


def dot_product_attention(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    scale: float | Float[Array, "..."] | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
) -> Float[Array, "*B N H Dv"] | tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]:
    """Attention of N queries over M keys: softmax(mask(cap(scale q k^T) + bias)) v  (arXiv 1706.03762, 3.2.1).

    The order is scale, soft cap, bias, mask, softmax in float32, dropout. A query that may attend to no key
    gives a zero output, a zero gradient and a log-sum-exp of -inf.

    Args:
      query: [*B, N, H, D].
      key: [*B, M, G, D]; G divides H, and query head h reads key head h // (H / G).
      value: [*B, M, G, Dv].
      bias: added to the scores; broadcastable to [*B, H, N, M].
      mask: bool array broadcastable to [*B, H, N, M], True = may attend, or a `Mask`, which is only made
        into an array where it is needed.
      scale: factor on q k^T, a number or an array [] or [H]; D**-0.5 by default. Differentiable.
      logits_soft_cap: c in c tanh(s / c), which bounds the scores before bias and mask.
      dropout_rate: probability of a weight to become 0; the others are divided by 1 - rate.
      dropout_rng: key for dropout. What drops depends on this key and on the (batch, head, query, key)
        index alone, so it is the same in every implementation.
      return_lse: also return the log-sum-exp of the scores over the keys, before dropout; `merge` takes it.
      implementation: a name in `IMPLEMENTATIONS`, or "fused". None takes "chunked" if a chunk size is given, or if the
        float32 scores take 16 MiB or more (128 MiB on a GPU) and M is at least 256; otherwise "xla", which is faster
        there. On NVIDIA GPUs, from jax 0.11.1 on, it takes "cudnn" before both where that can serve, without a bias
        and with no mask but a causal one between equal lengths, for 32 queries and keys and 1 MiB of scores or more,
        on one device or a mesh that splits batch and heads. "fused" takes the kernel of the device, "cudnn" on NVIDIA
        GPUs and "splash" on TPUs, wherever that can serve. Why a kernel is not taken on its device, or for "fused",
        is logged once. "gather", "ring" and "kv_ring" compute where queries and keys are split over the mesh axis
        `sequence` (`xattn.ops.attention.distributed`). "reference" and "xla" are differentiable in every mode, the
        others once in reverse: name "xla" for `jax.jvp` and second derivatives, and for a CPU beside a GPU. Under
        `jax.vmap` "splash" fails, and "cudnn" with a bias or a mask array.
      query_chunk_size: queries in a block of "chunked", or of one device.
      key_chunk_size: keys in a block of "chunked", or of one device.

    Returns:
      Output [*B, N, H, Dv] in the dtype of `value`; with `return_lse` also float32 [*B, H, N].

    Raises:
      ValueError: if shapes do not fit, a name is unknown, or the named implementation cannot serve.
    """
    mask = checked_mask(query, key, value, bias, mask, scale, dropout_rate, dropout_rng)
    sizes = {"query_chunk_size": query_chunk_size, "key_chunk_size": key_chunk_size}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    options: dict[str, Any] = {
        "bias": bias,
        "mask": mask,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "logits_soft_cap": logits_soft_cap,
        "dropout_rate": dropout_rate,
    }

    if implementation in (None, "fused"):
        fused = implementation == "fused"
        implementation = "chunked" if sizes else pick(query, key, value, fused=fused, return_lse=return_lse, **options)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"No attention implementation '{implementation}': use {', '.join(IMPLEMENTATIONS)} or fused.")
    if implementation in KERNELS and (reason := _misfit(implementation, query, key, value, return_lse, options)):
        raise ValueError(f"Implementation '{implementation}' can't serve: {reason}; use 'fused' or leave it out.")
    if sizes and implementation in ("reference", "xla", "cudnn", "splash"):
        raise ValueError(
            f"Implementation '{implementation}' takes no {' or '.join(sizes)}: use implementation='chunked' or leave "
            "it out."
        )
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1.")

    out, lse = IMPLEMENTATIONS[implementation](
        query,
        key,
        value,
        **options,
        dropout_rng=dropout_rng,
        **sizes,
    )
    return (out, lse) if return_lse else out


def pick(
    query: Any,
    key: Any,
    value: Any,
    *,
    fused: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> str:
    """The name in `IMPLEMENTATIONS` that `dot_product_attention` takes for None or, if `fused`, for "fused".

    Only shapes and dtypes matter of query [*B, N, H, D], key [*B, M, G, D] and value [*B, M, G, Dv]. The options are
    those of the implementations, without `dropout_rng`; what is left out is as without it.
    """
    defaults = {"bias": None, "mask": Mask(), "scale": 1.0, "logits_soft_cap": None, "dropout_rate": 0.0}
    options = defaults | options
    kernel = "splash" if jax.default_backend() == "tpu" else "cudnn"
    reason = _misfit(kernel, query, key, value, return_lse, options)
    if not (reason or fused):
        reason = "it needs implementation='fused'"
        if kernel == "cudnn":
            reason = cudnn.unasked(query, key, options["bias"], options["mask"])
    if not reason:
        return kernel
    if fused or jax.default_backend() != "cpu":
        _log_once(f"attention without {kernel}: {reason}.")
    return "chunked" if chunked.large_scores(query, key) else "xla"


def _misfit(kernel: str, query: Any, key: Any, value: Any, return_lse: bool, options: dict[str, Any]) -> str | None:
    if return_lse:
        return "its log-sum-exp is not given out"
    return KERNELS[kernel](query, key, value, **options)


@functools.cache
def _log_once(text: str) -> None:
    logging.info(text)


def attention_weights(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    scale: float | Float[Array, "..."] | None = None,
    logits_soft_cap: float | None = None,
) -> Float[Array, "*B H N M"]:
    """The float32 weights [*B, H, N, M] of `dot_product_attention`, before dropout.

    Every row sums to 1, or to 0 where no key may be attended to. Arguments and errors are those of
    `dot_product_attention`.
    """
    mask = checked_mask(query, key, key, bias, mask, scale)
    scores = xla.dot_scores(
        query,
        key,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        bias=bias,
        mask=mask.block(0, query.shape[-3], 0, key.shape[-3]),
        logits_soft_cap=logits_soft_cap,
    )
    return xla.softmax(scores)[0]


def checked_mask(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    scale: Any,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
) -> Mask:
    """Raises ValueError unless the arguments of an attention function fit; returns the mask as a `Mask`."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) >= 3:
        raise ValueError(f"query {q}, key {k} and value {v} must all be [*B, length, heads, width].")
    if not q[:-3] == k[:-3] == v[:-3]:
        raise ValueError(f"query {q}, key {k} and value {v} must have the same leading axes.")
    if k[-3:-1] != v[-3:-1]:
        raise ValueError(f"key {k} and value {v} must have the same length and heads.")
    if q[-1] != k[-1]:
        raise ValueError(f"query {q} and key {k} must have heads of one width, not {q[-1]} and {k[-1]}.")
    if q[-2] % k[-2]:
        raise ValueError(f"{q[-2]} query heads cannot share {k[-2]} key heads: make it a divisor.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate is {dropout_rate}: give a number from 0 up to, but not including, 1.")
    if dropout_rate and dropout_rng is None:
        raise ValueError(f"dropout_rate is {dropout_rate} but dropout_rng is None: pass a key or rate 0.")
    if np.shape(scale) not in ((), (q[-2],)):
        raise ValueError(f"scale {np.shape(scale)} must be one number, or one for each of {q[-2]} heads.")

    if not isinstance(mask, Mask):
        mask = Mask(dense=mask)
    scores = (*q[:-3], q[-2], q[-3], k[-3])
    queries, keys = (*q[:-3], q[-3]), (*q[:-3], k[-3])
    fits = [
        ("bias", bias, scores),
        ("mask", mask.dense, scores),
        ("q_mask", mask.q_mask, queries),
        ("kv_mask", mask.kv_mask, keys),
    ]
    for q_segments, kv_segments in mask.segments:
        fits += [("q_segments", q_segments, queries), ("kv_segments", kv_segments, keys)]
    for name, array, shape in fits:
        if array is not None and not _broadcasts(array.shape, shape):
            hint = "; padding of the keys is Mask(kv_mask=...)" if name == "mask" else ""
            raise ValueError(f"{name} {array.shape} does not broadcast to {shape}{hint}.")
    return mask


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
