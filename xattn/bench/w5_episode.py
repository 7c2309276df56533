"""W5: a few-shot episode, 5 classes with 1 support image and 15 queries each, 80 images 84 x 84, on ResNet-12.

Blocks: the logits of a prototypical network, and a training step with SGD. The forward pass of QSFormer, whose encoder
is the same ResNet-12 and more, stands beside them; no peer has its published form.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xattn.analysis.flops import count_flops
from xattn.bench import Request, peers
from xattn.bench.measure import Case, Program, Row, Work, jitted, training
from xattn.models import build
from xattn.models.qsformer import VARIANTS
from xattn.tasks.fewshot import FewShot

_OPTIMIZER = {"learning_rate": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}


def cases(
    request: Request,
    ways: int = 5,
    queries: int = 15,
    side: int = 84,
    widths: tuple[int, ...] = (64, 160, 320, 640),
    qsformer: bool | None = None,
) -> list[Case]:
    """The blocks; `queries` are those of a class. QSFormer has a row on CPUs, where it compiles in little time."""
    dtype, count = request.dtype, ways * queries
    whole_model = request.mode != "device" if qsformer is None else qsformer
    images = peers.normal(ways + count, side, side, 3)
    episode = {"support": images[None, :ways, None], "query": images[None, ways:]}
    labels = np.repeat(np.arange(ways), queries)
    keywords = {"dtype": "bfloat16"} if dtype == "bf16" else {}
    encoder = {"name": "resnet12", "widths": tuple(widths)}
    model = build({"name": "protonet", "encoder": encoder}, **keywords)
    inputs = episode["support"], episode["query"]
    variables = peers.variables(model, *inputs)

    def forward(model: Any, variables: Any) -> Program:
        held = jax.tree.map(peers.array_of(dtype), variables)
        return jitted(lambda v, s, q: model.apply(v, s, q)["logits"], held, *map(jnp.asarray, inputs))

    def whole() -> Program:
        published: dict[str, Any] = VARIANTS["miniimagenet"]
        cife = published["encoder"] | {"name": "cife", "backbone": encoder}
        config = published | {"name": "qsformer", "encoder": cife}
        qs = build(config, **keywords)
        return forward(qs, peers.variables(qs, *inputs))

    def step() -> Program:
        config = _OPTIMIZER | {"name": "sgd", "schedule": {"name": "constant"}, "decay": "all"}
        batch = episode | {"query_labels": labels[None].astype(np.int32)}
        return training(model, FewShot(), config, variables, batch)

    def torch_network(channels_last: bool, precision: str) -> tuple[Any, Any]:
        torch, tensor = peers.torch_package(), peers.tensor_of(precision)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        module = peers.load(_torch_resnet12(torch, widths), _torch_state(variables), precision)
        return module.to(memory_format=layout), tensor(np.moveaxis(images, -1, 1)).to(memory_format=layout)

    def torch_logits(module: Any, x: Any) -> Any:
        maps = module(x).flatten(1).float()
        return -model.scale * (maps[ways:, None] - maps[None, :ways]).square().mean(-1)

    def torch_forward(channels_last: bool) -> Any:
        def make() -> Program:
            module, x = torch_network(channels_last, dtype)
            return peers.torch_program(lambda x: torch_logits(module.eval(), x)[None], x)

        return make

    def torch_step(channels_last: bool) -> Any:
        def make() -> Program:
            torch = peers.torch_package()
            module, x = torch_network(channels_last, "f32")
            rate, momentum, decay = _OPTIMIZER.values()
            optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
            targets, loss = torch.from_numpy(labels).to(x.device), torch.nn.functional.cross_entropy
            module = module.train()
            return peers.torch_training(optimizer, lambda: loss(torch_logits(module, x), targets), dtype)

        return make

    flops = sum(count_flops(lambda v, s, q: model.apply(v, s, q)["logits"], variables, *inputs).values())
    size = sum(x.size for x in jax.tree.leaves(variables))
    shape = f"{ways}-way 1-shot, {queries} queries a class, {ways + count} images {side}x{side}"
    peer: dict[str, Any] = dict(kind="peer", package="torch")
    rows = [Row("xattn ResNet-12", "ours", lambda: forward(model, variables), tolerance=1e-4)]
    rows += [Row("xattn QSFormer", "ours", whole, group=None, work=Work())] if whole_model else []
    rows += [
        Row("torch channels_last", make=torch_forward(True), tolerance=1e-4, **peer),
        Row("torch NCHW", make=torch_forward(False), tolerance=1e-4, **peer),
    ]
    # The second loss is that after a step whose gradients are rounded too.
    tolerance = 0.05 if dtype == "bf16" else 1e-3
    steps = [
        Row("xattn ResNet-12", "ours", step, tolerance=tolerance),
        Row("torch channels_last", make=torch_step(True), tolerance=tolerance, **peer),
    ]
    baseline = ("torch channels_last", "xattn ResNet-12")
    moved = 4 * (size + images.size)
    return [
        Case("forward", shape, rows, baseline, Work(flops, 0, moved)),
        Case("training step", shape, steps, baseline, Work(3 * flops, 0, 4 * moved)),
    ]


def _torch_resnet12(torch: Any, widths: tuple[int, ...]) -> Any:
    nn = torch.nn

    class Stage(nn.Module):
        def __init__(self, inputs: int, width: int) -> None:
            super().__init__()
            names = {"shortcut": (inputs, 1), "0": (inputs, 3), "1": (width, 3), "2": (width, 3)}
            self.conv = nn.ModuleDict(
                {
                    name: nn.Conv2d(channels, width, size, padding=size // 2, bias=False)
                    for name, (channels, size) in names.items()
                }
            )
            self.norm = nn.ModuleDict({name: nn.BatchNorm2d(width) for name in names})

        def forward(self, x: Any) -> Any:
            act = nn.functional.leaky_relu
            shortcut = self.norm["shortcut"](self.conv["shortcut"](x))
            for name in "012":
                x = self.norm[name](self.conv[name](act(x, 0.1) if name != "0" else x))
            return nn.functional.max_pool2d(act(x + shortcut, 0.1), 2)

    return nn.Sequential(*(Stage(*sizes) for sizes in zip((3, *widths[:-1]), widths, strict=True)))


def _torch_state(variables: Any) -> dict[str, Any]:
    """The state dict of `_torch_resnet12` for the variables of our encoder."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var", "kernel": "weight"}
    state = {}
    for collection in ("params", "batch_stats"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables[collection]["encoder"]):
            stage, layer, name = (entry.key for entry in path)
            kind, part = layer.split("_")
            array = np.asarray(leaf)
            array = array.transpose(3, 2, 0, 1) if name == "kernel" else array
            state[f"{stage.removeprefix('stage_')}.{kind}.{part}.{names[name]}"] = array
            if name == "var":
                counter = f"{stage.removeprefix('stage_')}.{kind}.{part}.num_batches_tracked"
                state[counter] = np.zeros((), np.int64)
    return state
