"""Exact counts of multiply-adds from a function's jaxpr, split by the module that does them.

XLA's own count takes the body of a loop once; this one multiplies it by the trip count. A FLOP is half a
multiply-add of a matrix product or convolution; elementwise work is not counted, as is usual in papers.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """FLOPs of `function(*args)` by JAX's name stack ("" for work outside a module).

    A stack is the class of the outermost module and the names of its submodules, such as
    "QSFormer/encoder/conv_3", with names of methods other than `__call__` and equations of einsum between.

    Args:
      function: anything that jax can trace; it is not run.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: a loop whose trip count is not known before it runs holds a matrix product.
    """
    counts: Counter[str] = Counter()
    _count(jax.make_jaxpr(function)(*args).jaxpr, 1, "", counts)
    return counts


def _count(jaxpr: core.Jaxpr, times: int, outer: str, counts: Counter[str]) -> None:
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        where = f"{outer}/{stack}" if outer and stack else outer or stack
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)  # pyright: ignore
            counts[where] += times * 2 * inner * math.prod(eqn.outvars[0].aval.shape)  # pyright: ignore
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            inner = math.prod(kernel) // out_features
            counts[where] += times * 2 * inner * math.prod(eqn.outvars[0].aval.shape)  # pyright: ignore
        elif name == "while":
            body: Counter[str] = Counter()
            for part in ("cond_jaxpr", "body_jaxpr"):
                _count(eqn.params[part].jaxpr, 1, where, body)
            if body.total():
                raise ValueError(f"{where} has a loop of unknown length around {body.total()} FLOPs.")
        elif name == "cond":
            branches = []
            for branch in eqn.params["branches"]:
                branches.append(Counter())
                _count(branch.jaxpr, times, where, branches[-1])
            counts.update(max(branches, key=Counter.total))
        else:
            inner_times = times * eqn.params["length"] if name == "scan" else times
            for value in eqn.params.values():
                for nested in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(nested, core.ClosedJaxpr):
                        _count(nested.jaxpr, inner_times, where, counts)
                    elif isinstance(nested, core.Jaxpr):
                        _count(nested, inner_times, where, counts)
