"""Writes goldens/PerceiverFor*.npz: what Hugging Face's models give for the weights and inputs of `perceiver.py`.

Run it in the environment of `make parity-env`, from the root of the repository:

    HF_HUB_OFFLINE=1 .venv-parity/bin/python -m tests.interop.make_perceiver_goldens

Each file holds `config` and `shapes` (names and shapes of the state dict) as JSON, and the outputs of both variants:
`hf`, and `deepmind`, where the reference is corrected to what DeepMind trained.
"""

import json
from pathlib import Path

import numpy as np

from tests.interop import perceiver

FOLDER = Path(__file__).parent / "goldens"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for architecture in perceiver.ARCHITECTURES:
        config = perceiver.config(architecture)
        shapes = perceiver.shapes(config)
        given = perceiver.inputs(config)
        if architecture == "PerceiverForMaskedLM":
            given["query_mask"] = given["input_mask"]
        outputs = {}
        for variant in ("hf", "deepmind"):
            out = perceiver.reference(config, perceiver.fill(shapes), given, variant)
            outputs |= {f"{variant}_{name}": x for name, x in (out if isinstance(out, dict) else {"": out}).items()}
        path = FOLDER / f"{architecture}.npz"
        np.savez_compressed(path, config=json.dumps(config), shapes=json.dumps(shapes), **outputs)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
