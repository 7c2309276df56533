"""What the devices of a compiled program send to each other, counted in its HLO.

XLA's own cost analysis does not tell communication apart, and takes the body of a loop once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

# Bytes that one of `p` devices sends, by the bytes of the result that each of them holds afterwards. What is gathered,
# reduced or scattered goes round a ring, which sends the least.
SENT: dict[str, Callable[[int, int], int]] = {
    "all-gather": lambda size, p: size * (p - 1) // p,
    "all-reduce": lambda size, p: 2 * size * (p - 1) // p,
    "reduce-scatter": lambda size, p: size * (p - 1),
    "collective-permute": lambda size, p: size,
    "all-to-all": lambda size, p: size * (p - 1) // p,
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many one device takes part in, and the bytes that it sends in all of them."""

    count: int
    bytes: int


def count_collectives(hlo: str) -> dict[str, Traffic]:
    """What one device sends while it runs a compiled program once, by kind; kinds that do not occur are left out.

    Of the P devices of a group, each sends (P-1)/P of an all-gather's or all-to-all's output, 2(P-1)/P of an
    all-reduce's, P-1 times a reduce-scatter's, and in a collective-permute its operand. A loop's collectives count
    once a trip; of a conditional, the branch that sends most counts.

    Args:
      hlo: the program of one device, `jax.jit(f).lower(...).compile().as_text()`.

    Raises:
      ValueError: a loop whose trip count the compiler does not know holds a collective.
    """
    entry, computations = _computations(hlo)
    partitions = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo.split("\n", 1)[0]))

    @functools.cache
    def within(computation: str) -> dict[str, Traffic]:
        total: dict[str, Traffic] = {}
        for instruction in computations[computation]:
            op, attributes = instruction["op"], instruction["attributes"]
            kind = op.removesuffix("-start")
            if kind in SENT:
                sent = SENT[kind](_result_bytes(instruction), _group_size(attributes, partitions))
                _add(total, {kind: Traffic(1, sent)})
            elif op == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
                body, condition = (within(name) for name in _called(attributes, "body", "condition"))
                if trips is None and (body or condition):
                    kinds = ", ".join(body | condition)
                    raise ValueError(f"{instruction['name']} is a loop of unknown length around {kinds}.")
                times = int(trips[1]) if trips else 0
                _add(total, body, times)
                _add(total, condition, times + 1)
            elif op == "conditional":
                branches = map(
                    within, _called(attributes, "branch_computations", "true_computation", "false_computation")
                )
                _add(total, max(branches, key=lambda branch: sum(traffic.bytes for traffic in branch.values())))
            elif not op.endswith(("-update", "-done")):  # these name what their "-start" has called
                for name in _called(attributes, "calls", "to_apply"):
                    _add(total, within(name))
        return total

    return within(entry)


# What hands on an array whole, perhaps laid out in another way.
_HANDED_ON = ("bitcast", "convert", "copy", "get-tuple-element", "opt-barrier", "reshape", "transpose", "tuple")


def gathered_at_once(hlo: str) -> int:
    """The most bytes of all-gathers' outputs that one device holds at any moment of a compiled program.

    An output is held from its all-gather to the last use of it or of a copy of it, in the order in which the program
    is scheduled. What a loop gathers in its body counts while it runs.
    """
    entry, computations = _computations(hlo)

    @functools.cache
    def within(computation: str) -> int:
        sizes: dict[str, int] = {}  # of what is gathered here
        sources: dict[str, set[str]] = {}  # of each array that is gathered, or a copy of such: whose
        held: dict[str, tuple[int, int]] = {}
        inner = []
        for moment, instruction in enumerate(computations[computation]):
            name, op, attributes = instruction["name"], instruction["op"], instruction["attributes"]
            operands = re.findall(r"%([\w.\-]+)", instruction["operands"])
            used = set().union(*(sources.get(operand, ()) for operand in operands))
            held |= {source: (held[source][0], moment) for source in used}
            if op.removesuffix("-start") == "all-gather":
                sizes[name], sources[name], held[name] = _result_bytes(instruction), {name}, (moment, moment)
            elif op in _HANDED_ON or op.endswith(("-start", "-done")) or (op == "fusion" and len(operands) == 1):
                sources[name] = used
            called = _called(attributes, "body", "condition", "branch_computations", "calls", "to_apply")
            inner.append(max(map(within, called), default=0))
        moments = range(len(inner))
        alive = [sum(sizes[name] for name, (begin, end) in held.items() if begin <= t <= end) for t in moments]
        return max((here + there for here, there in zip(alive, inner, strict=True)), default=0)

    return within(entry)


def _add(total: dict[str, Traffic], part: dict[str, Traffic], times: int = 1) -> None:
    for kind, traffic in part.items():
        before = total.get(kind, Traffic(0, 0))
        total[kind] = Traffic(before.count + times * traffic.count, before.bytes + times * traffic.bytes)


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r" +(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<op>[a-z][\w\-]*)\((?P<operands>[^)]*)\)(?P<attributes>.*)"
)


def _computations(hlo: str) -> tuple[str, dict[str, list[re.Match[str]]]]:
    """The name of the entry computation, and the instructions of each."""
    entry = ""
    computations: dict[str, list[re.Match[str]]] = {}
    instructions: list[re.Match[str]] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            instructions = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction)
    return entry, computations


def _called(attributes: str, *keys: str) -> list[str]:
    """Names of the computations that an instruction calls under `keys`, in the order of `keys`."""
    found = [re.search(rf"\b{key}=(\{{[^}}]*\}}|[^\s,]+)", attributes) for key in keys]
    return [name for match in found if match for name in re.findall(r"[\w.\-]+", match[1])]


def _result_bytes(instruction: re.Match[str]) -> int:
    arrays = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", instruction["type"])
    if instruction["op"].endswith("-start") and instruction["op"] != "all-reduce-start":
        # Until it is done, an asynchronous collective holds its operands, its results, and perhaps more.
        operands = instruction["operands"].count("%")
        arrays = arrays[operands : 2 * operands]
    bits = (int(width or 8) * math.prod(map(int, filter(None, shape.split(",")))) for _, width, shape in arrays)
    return sum(bits) // 8  # `pred` has no width in its name and takes a byte


def _group_size(attributes: str, partitions: int) -> int:
    """Devices that one collective joins, from any of the ways in which HLO writes its groups."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        # A part of an axis is written 'axis':(devices before it)its size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return partitions
