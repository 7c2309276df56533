"""A process that makes one training step of a ViT-Ti-like model, and tells when it was done: `w7b_start` times it.

It imports what such a program needs and nothing else.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import monitoring

from xattn.config import cache_compiled_programs
from xattn.layers.vit import Block


class Looped(nn.Module):
    """Blocks one after another, [B, N, C] to [B, N, C]."""

    depth: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = Block(self.num_heads)(x)
        return x


class Scanned(nn.Module):
    """The same as one block that is compiled once, with stacked parameters."""

    depth: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        body = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "intermediates": 0, "perturbations": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            length=self.depth,
        )
        return body(Block(self.num_heads), x, None)[0]


def first_step(model: str, cache: str) -> None:
    """What the process does: a first step; it prints when that ended and how much was not in the cache."""
    options = json.loads(model)
    shape, network = options.pop("shape"), Scanned if options.pop("scan") else Looped
    os.environ["XATTN_CACHE"] = cache
    cache_compiled_programs()
    events: list[str] = []
    monitoring.register_event_listener(lambda event, **_: events.append(event))
    step, state, batch = _training(network(**options), jnp.ones(shape))
    jax.block_until_ready(step(*state, batch))
    recompiled = sum(event.endswith("/cache_misses") for event in events)
    print(json.dumps({"ended": time.time(), "cpu": time.process_time(), "recompiled": recompiled}))


def _training(model: nn.Module, batch: jax.Array) -> tuple[Callable, tuple, jax.Array]:
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def create(batch: Any) -> Any:
        params = model.init(jax.random.key(0), batch)
        return params, optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(lambda params: jnp.square(model.apply(params, batch)).mean())(params)  # pyright: ignore
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, create(batch), batch


if __name__ == "__main__":
    first_step(*sys.argv[1:])
