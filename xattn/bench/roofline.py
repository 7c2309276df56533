"""What this machine can do, measured in the run whose results are compared with it."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_PACKAGES = ("xattn", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "torch", "timm", "transformers")


def measure(
    side: int = 2048, megabytes: int = 256, chain: int = 1, copies: bool = False, clock: str = "perf_counter"
) -> dict[str, float]:
    """Rates of matrix products (FLOP/s, bf16 operands with a float32 result), of memory (bytes/s) and of exp (1/s).

    Args:
      side: of the square matrices.
      megabytes: of the float32 array that is read; exp takes an eighth of it.
      chain: how often exp is taken of a number that was read.
      copies: whether the array is written too, and its bytes count twice.
      clock: function of `time`: for one core, "process_time" leaves out what other processes take.
    """

    def seconds(function: Callable[..., Any], *arguments: Any) -> float:
        return _seconds(getattr(time, clock), function, *arguments)

    x = jax.random.normal(jax.random.key(0), (megabytes * 2**18,))
    part = x[: x.size // 8]
    a = x[: side * side].reshape(side, side)
    matmul = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))

    def exps(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = jnp.exp(-x)
        return x

    return {
        "f32_flops": 2 * side**3 / seconds(matmul, a),
        "bf16_flops": 2 * side**3 / seconds(matmul, a.astype(jnp.bfloat16)),
        "bandwidth": (1 + copies) * x.nbytes / seconds(jax.jit(lambda x: x + 1) if copies else jax.jit(jnp.sum), x),
        "exps": chain * part.size / seconds(jax.jit(exps), part),
    }


def _seconds(clock: Callable[[], float], function: Callable[..., Any], *arguments: Any, calls: int = 10) -> float:
    """The shortest of some calls: a ceiling is what is possible."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(calls):
        began = clock()
        jax.block_until_ready(function(*arguments))
        found.append(clock() - began)
    return max(min(found), 1e-9)


def environment() -> dict[str, Any]:
    """Versions, processor, devices and allocator settings of this process."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "versions": versions,
        "cpu": names[0] if names else platform.processor(),
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        "devices": [device.device_kind for device in jax.devices()],
    }


def child(sizes: str, path: str) -> None:
    """What the child process does that runs before all others; `sizes` are keywords of `measure` (JSON)."""
    Path(path).write_text(json.dumps({"env": environment(), "roofline": measure(**json.loads(sizes))}))
