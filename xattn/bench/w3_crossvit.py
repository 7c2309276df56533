"""W3: CrossViT-9-dagger (arXiv 2103.14899) on 8 images of 240 x 240: logits, and a training step with AdamW.

On an accelerator there are 64 images, and a training step of ViT-S/16 with as many as keep it busy.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xattn import interop
from xattn.analysis.flops import count_flops
from xattn.bench import Request, peers
from xattn.bench.measure import Case, Program, Row, Work, jitted, rounded, training
from xattn.models import build
from xattn.tasks.classification import Classification

_OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.05}


def cases(
    request: Request,
    name: str = "crossvit_9_dagger_240",
    batch: int | None = None,
    side: int = 240,
    vit: tuple[str, int, int] = ("vit_small_patch16_224", 256, 224),
) -> list[Case]:
    """The blocks, for timm's model `name`; `vit` are name, images and side of the one on an accelerator."""
    device = request.mode == "device"
    blocks = _cases(request, name, batch or (64 if device else 8), side, "training step")
    if device:
        blocks.append(_cases(request, *vit, f"training step of {vit[0]}")[1])
    return blocks


def _cases(request: Request, name: str, batch: int, side: int, title: str) -> list[Case]:
    """Inference and a training step, which has this title."""
    dtype, kind = request.dtype, "timm_crossvit" if name.startswith("crossvit") else "timm_vit"
    images, labels = peers.normal(batch, side, side, 3), np.arange(batch) * 7 % 1000
    model = build({"name": name, "dtype": "bfloat16" if dtype == "bf16" else None})
    variables = peers.variables(model, images)

    def ours(apply: Any) -> Any:
        return lambda: jitted(apply, jax.tree.map(peers.array_of(dtype), variables), jnp.asarray(images))

    def timm_model(precision: str) -> tuple[Any, Any]:
        tensor = peers.tensor_of(precision)
        module = timm().create_model(name, pretrained=False)
        module = peers.load(module, interop.to_torch(kind, name, variables), precision)
        return module, tensor(np.moveaxis(images, -1, 1))

    def timm_forward(precision: str) -> Any:
        def make() -> Program:
            module, tensor = timm_model(precision)
            return peers.torch_program(module.eval(), tensor)

        return make

    def ours_step() -> Program:
        config = _OPTIMIZER | {"name": "adamw", "schedule": {"name": "constant"}, "decay": "all"}
        return training(model, Classification(), config, variables, {"image": images, "label": labels})

    def timm_step() -> Program:
        torch = peers.torch_package()
        module, tensor = timm_model("f32")
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=_OPTIMIZER["learning_rate"], weight_decay=_OPTIMIZER["weight_decay"]
        )
        targets, module = torch.from_numpy(labels).to(tensor.device), module.train()
        return peers.torch_training(
            optimizer, lambda: torch.nn.functional.cross_entropy(module(tensor), targets), dtype
        )

    flops = sum(count_flops(model.apply, variables, images).values())
    size = sum(x.size for x in jax.tree.leaves(variables))
    shape = f"{name}, {batch} images {side}x{side}, {size / 1e6:.2f} M parameters"
    moved = 4 * (size + images.size)
    peer: dict[str, Any] = dict(kind="peer", package="timm")
    inference = [
        Row("xattn", "ours", ours(model.apply)),
        Row("xattn bf16", "ours", ours(rounded(model.apply)), tolerance=0.05, dtype="bf16"),
        Row("timm", make=timm_forward(dtype), **peer),
        Row("timm bf16", make=timm_forward("bf16"), tolerance=0.05, dtype="bf16", **peer),
    ]
    # The second loss is that after Adam's first step, which takes the sign of gradients that are nearly zero.
    step = [
        Row("xattn", "ours", ours_step, tolerance=1e-2),
        Row("timm", make=timm_step, tolerance=1e-2, **peer),
    ]
    baseline = ("timm", "xattn")
    return [
        Case("inference", shape, inference, baseline, Work(flops, 0, moved)),
        Case(title, shape, step, baseline, Work(3 * flops, 0, 4 * moved)),
    ]


def timm() -> Any:
    """The package timm; in a checkout, also without torchvision."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        return importlib.import_module("tests.parity.torchvision_stub").timm()
