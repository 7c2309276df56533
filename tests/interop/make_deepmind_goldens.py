"""Writes goldens/deepmind_perceiver.npz: what DeepMind's code gives for the weights and inputs of `deepmind.py`.

Run it from the root of the repository, in an environment with jax, dm-haiku and einops, with the path of a checkout of
github.com/google-deepmind/deepmind-research:

    JAX_PLATFORMS=cpu python -m tests.interop.make_deepmind_goldens ../deepmind-research

Of each model the file holds `<model>/shapes` (names and shapes of Haiku's arrays, as JSON) and its outputs, once as
released and, where there are Fourier features, once with these computed in float64 (`<model>/exact`): the released code
computes them in float32, with errors up to 1e-2.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from tests.interop import deepmind

NAMES = "language imagenet_learned imagenet_fourier imagenet_conv optical_flow multimodal".split()
PATH = Path(__file__).parent / "goldens" / "deepmind_perceiver.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder that holds perceiver/perceiver.py")
    sys.path.insert(0, str(parser.parse_args().checkout))
    held = {}
    for name in NAMES:
        shapes = deepmind.shapes(name)
        held[f"{name}/shapes"] = json.dumps(shapes)
        for kind in ("released", "exact"):
            if kind == "exact" and name in ("language", "imagenet_learned"):
                continue
            out = deepmind.reference(name, deepmind.fill(shapes), deepmind.inputs(name), exact=kind == "exact")
            out = out if isinstance(out, dict) else {"": out}
            held |= {f"{name}/{kind}/{part}": x for part, x in out.items()}
    np.savez_compressed(PATH, **held)
    print(f"{PATH}: {PATH.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
