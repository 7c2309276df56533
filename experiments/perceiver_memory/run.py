"""Peak memory of the ImageNet Perceiver IO on 50,176 pixels: forward pass and gradient, float32, each in a new process.

    python experiments/perceiver_memory/run.py

The peak is the kernel's high-water mark of the process, Python and compiler included (as `/usr/bin/time -v` prints it).
"""

import resource
import subprocess
import sys

import jax
import jax.numpy as jnp

from xattn import models
from xattn.models.perceiver_io import VARIANTS


def main(what: str) -> None:
    spec = VARIANTS["imagenet_fourier"]
    model = models.build(spec | {"encoder": spec["encoder"] | {"remat": what == "gradient"}})
    image = jnp.ones((1, 224, 224, 3))
    params = jax.jit(lambda key: model.init(key, image)["params"])(jax.random.key(0))

    def loss(params):
        return jax.nn.log_softmax(model.apply({"params": params}, image))[0, 0]

    result = jax.jit(loss if what == "forward" else jax.grad(loss))(params)
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: peak {peak:.2f} GiB, {'finite' if finite else 'NOT FINITE'}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        for what in ("forward", "gradient"):
            subprocess.run([sys.executable, __file__, what], check=True)
