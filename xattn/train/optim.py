"""Optimizers and schedules by config: optax, with weight-decay masks and frozen parameters."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from xattn.config import UsageError, check_options, lookup

Schedule = Callable[[Any], Any]


def constant(num_steps: int, value: float, /, warmup_steps: int = 0) -> Schedule:
    """`value`, after a linear warm-up."""
    del num_steps
    return _warm(optax.constant_schedule(value), value, warmup_steps)


def cosine(num_steps: int, value: float, /, warmup_steps: int = 0, final_fraction: float = 0.0) -> Schedule:
    """Half a cosine from `value` to `final_fraction * value` after `num_steps` steps, which count a linear warm-up."""
    decay = optax.cosine_decay_schedule(value, max(1, num_steps - warmup_steps), alpha=final_fraction)
    return _warm(decay, value, warmup_steps)


def constant_cosine(
    num_steps: int,
    value: float,
    /,
    decay_start: float = 0.5,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> Schedule:
    """`value` for the fraction `decay_start` of `num_steps`, which count a linear warm-up; then `cosine`'s decay."""
    start = round(decay_start * num_steps)
    decay = optax.cosine_decay_schedule(value, max(1, num_steps - start), alpha=final_fraction)
    flat = constant(num_steps, value, warmup_steps)
    return optax.join_schedules([flat, decay], [start])


def linear(num_steps: int, value: float, /, warmup_steps: int = 0, final_fraction: float = 0.0) -> Schedule:
    """A line from `value` to `final_fraction * value` after `num_steps` steps, which count a linear warm-up."""
    decay = optax.linear_schedule(value, final_fraction * value, max(1, num_steps - warmup_steps))
    return _warm(decay, value, warmup_steps)


def step(num_steps: int, value: float, /, every: int = 1000, factor: float = 0.1, warmup_steps: int = 0) -> Schedule:
    """`value * factor ** (steps // every)` (torch's StepLR), in steps after a linear warm-up."""
    del num_steps
    return _warm(optax.exponential_decay(value, every, factor, staircase=True), value, warmup_steps)


def _warm(schedule: Schedule, value: float, warmup_steps: int) -> Schedule:
    if not warmup_steps:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, value, warmup_steps), schedule], [warmup_steps])


SCHEDULES = {
    "constant": constant,
    "constant_cosine": constant_cosine,
    "cosine": cosine,
    "linear": linear,
    "step": step,
}


# An optimizer gives the direction of the update; `make_optimizer` multiplies it by the learning rate.


def sgd(
    mask: Any, /, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """SGD whose weight decay is added to the gradient before the momentum, as in torch."""
    trace = optax.trace(momentum, nesterov) if momentum else optax.identity()
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), trace)


def adam(mask: Any, /, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980), without weight decay."""
    del mask
    return optax.scale_by_adam(b1, b2, eps)


def adamw(
    mask: Any, /, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-2
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, mask))


def lamb(
    mask: Any, /, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 1e-2
) -> optax.GradientTransformation:
    """LAMB (arXiv 1904.00962): AdamW whose direction is scaled to the norm of each parameter array."""
    return optax.chain(adamw(mask, b1, b2, eps, weight_decay), optax.scale_by_trust_ratio())


def _scale_by_learning_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    # optax would count the updates that were made; with some left out, the schedule would lag behind the step.
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params
        rate = schedule(extra["step"])
        return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _shared(
    *, learning_rate: float, schedule: Mapping[str, Any], clip_norm: float = 0.0, decay: str = "kernels"
) -> None:
    """The keywords of every optimizer."""


_SHARED = tuple(inspect.signature(_shared).parameters)

OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "lamb": lamb}


def decay_mask(decay: str) -> Callable[[Any], Any]:
    """Which parameters weight decay shrinks, by the name of the leaf.

    "all"; "weights", all but biases and the scales of norms, so that latents and learned positions decay too (the
    released recipe of Perceiver IO); or "kernels", only leaves named `kernel` or `embedding`. The number of axes would
    not tell: a bias of an attention projection has two.
    """
    rules = {
        "all": lambda name: True,
        "weights": lambda name: name not in ("bias", "scale"),
        "kernels": lambda name: name in ("kernel", "embedding"),
    }
    if decay not in rules:
        raise UsageError(f"config.optimizer.decay is '{decay}': choose {', '.join(map(repr, rules))}.")
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: rules[decay](_keys(path)[-1]), params)


def _frozen(prefixes: Sequence[str], params: Any) -> Any:
    def matches(path: tuple, _: Any) -> bool:
        name = "/".join(_keys(path))
        return any(name == prefix or name.startswith(f"{prefix}/") for prefix in prefixes)

    return jax.tree_util.tree_map_with_path(matches, params)


def _keys(path: tuple) -> list[str]:
    """The names on a parameter's path; a box that holds its logical axes adds an entry, which is no name."""
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def make_optimizer(
    config: Mapping[str, Any], num_steps: int, frozen: Sequence[str] = ()
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The optimizer of `config.optimizer`, and its learning-rate schedule for the log.

    Order: gradients of frozen parameters are dropped, the global norm is clipped, the optimizer runs,
    updates of frozen parameters are dropped (so weight decay leaves them alone too), the learning rate
    `schedule(step)` multiplies. `update(gradients, state, params, step=...)` takes the step from its caller.

    Args:
      config: `name`, `learning_rate`, `schedule` (a mapping with its `name`), `clip_norm` (0: none), `decay`
        ("all", "weights" or "kernels"), and the optimizer's own keywords.
      num_steps: length of the schedule in steps.
      frozen: path prefixes of parameters that training must not change.

    Raises:
      UsageError: an unknown optimizer, schedule or key.
    """
    options = dict(config)
    make = lookup(OPTIMIZERS, options.pop("name", None), "optimizer")
    shared = {key: options.pop(key) for key in _SHARED if key in options}
    check_options(shared, _shared, "config.optimizer")
    check_options(options, make, "config.optimizer", also=_SHARED)
    mask = decay_mask(shared.get("decay", "kernels"))
    schedule_options = dict(shared["schedule"])
    make_schedule = lookup(SCHEDULES, schedule_options.pop("name", None), "schedule")
    check_options(schedule_options, make_schedule, "config.optimizer.schedule")
    schedule = make_schedule(num_steps, shared["learning_rate"], **schedule_options)
    clip_norm = shared.get("clip_norm", 0.0)
    drop_frozen = optax.masked(optax.set_to_zero(), lambda params: _frozen(frozen, params))
    parts = [drop_frozen] if frozen else []
    parts += [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts += [make(mask, **options)]
    parts += [drop_frozen] if frozen else []
    return optax.chain(*parts, _scale_by_learning_rate(schedule)), schedule
