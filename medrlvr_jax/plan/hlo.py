"""Data movement of a compiled program, read from its HLO text: memory traffic, and collectives by mesh axis.

XLA's own cost analysis counts the body of a loop once; here every loop multiplies what is inside it by its
trip count, the constant that its counter is compared with. A loop that may end earlier (sampling, when every
row has stopped) counts at that bound.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes, and control flow, whose bodies are counted instead.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
}
FREE |= {"partition-id", "replica-id", "optimization-barrier", "add-dependency"}
PLACEHOLDERS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
)


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    inside: str  # between the operation's brackets
    rest: str  # attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)


class Collective(NamedTuple):
    """Bytes that each device receives over a whole run of the program (rings: (n − 1)/n of the whole; an
    all-reduce twice that)."""

    kind: str
    axis: str  # mesh axes it crosses, joined by +
    group: int  # devices that take part together
    bytes: float


class Moved(NamedTuple):
    bytes: float  # read from and written to device memory, per device
    collectives: list[Collective]


def read(text: str, mesh: dict[str, int]) -> Moved:
    """The traffic of one device's program: `text` is `compiled.as_text()`, `mesh` the axes' sizes, in
    order."""
    computations, entry = parse(text)
    collectives: dict[str, Collective] = {}
    total = 0.0

    def visit(name: str, times: float, memory: bool) -> None:
        nonlocal total
        computation = computations[name]
        for i in computation.values():
            kind = next((k for k in KINDS if i.op in (k, f"{k}-start")), None)
            if kind:
                c = _collective(kind, i, name, computation, mesh, times)
                channel = re.search(r"channel_id=(\d+)", i.rest)
                # An asynchronous collective occurs, under one channel, in each fusion or loop that hides it.
                key = channel[0] if channel else i.name
                if key not in collectives or c.bytes < collectives[key].bytes:
                    collectives[key] = c
            if memory and i.op not in FREE and not i.op.endswith("-done"):
                total += times * _traffic(i, computation, computations)
            if i.op == "while":
                body, condition = _called(i, "body"), _called(i, "condition")
                visit(body, times * trips(computations, condition, body, i.rest), memory)
            elif i.op in ("conditional", "call"):
                for inner in _branches(i):
                    visit(inner, times, memory)
            elif "calls=" in i.rest:  # fusions and asynchronous wrappers: the instruction's own bytes count
                visit(_called(i, "calls"), times, False)

    visit(entry, 1.0, True)
    sums: dict[tuple[str, str, int], float] = defaultdict(float)
    for c in collectives.values():
        sums[c[:3]] += c.bytes
    per_kind = [Collective(*key, size) for key, size in sums.items() if size]
    return Moved(total, sorted(per_kind, key=lambda c: -c.bytes))


def _branches(i: Instruction) -> list[str]:
    """The computations that a call or a conditional runs."""
    names = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", i.rest)
    groups = re.findall(r"branch_computations=\{([^}]*)\}", i.rest)
    return names + [name.strip(" %") for group in groups for name in group.split(",")]


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name and in order; and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if re.match(
            r"\}(,|$)", line
        ):  # and not `}}, …`: the attributes of a Pallas kernel take several lines
            current = None
        elif current is None:
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            instruction = _instruction(match[1], re.sub(r"/\*.*?\*/", "", match[2]))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].strip()
    op, _, _ = text.partition("(")
    close = len(op) + _closing(text[len(op) :])
    return Instruction(name, kind, op, text[len(op) + 1 : close - 1], text[close:])


def _closing(text: str) -> int:
    """The index after the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced brackets in HLO: {text[:200]}")


def size(kind: str, memory_only: bool = False) -> float:
    """Bytes of a type such as `(bf16[2,8]{1,0:T(8,128)}, s32[])`; `memory_only` leaves out what lives on the
    chip's core (S(1) and up)."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(kind):
        if not (memory_only and re.search(r"S\([1-9]", layout)):
            total += BYTES[dtype] * prod(int(d) for d in dims.split(",") if d)
    return total


def trips(computations: dict, condition: str, body: str, attributes: str = "") -> int:
    """How often a loop runs at most: what XLA noted, or the bound of the counter's `<` in the condition over
    the counter's step."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes):
        return int(known[1])
    found = set()
    outer = computations[condition]
    for i in outer.values():
        inner = computations[_called(i, "calls")] if i.op == "fusion" else {}
        for j in [i, *inner.values()]:  # the comparison may sit in a fusion, its operands beside it or inside
            if j.op == "compare" and "direction=LT" in j.rest:
                operands = [_origin(o, inner, outer, i) for o in j.operands]
                bounds = [c for o in operands if (c := _constant(o)) is not None]
                counters = [o for o in operands if o.op == "get-tuple-element"]
                found |= {-(-n // _step(computations[body], counters)) for n in bounds}
    if len(found) != 1:
        raise ValueError(f"no single trip count in the loop condition {condition}: {sorted(found)}")
    return found.pop()


def _origin(
    name: str, inner: dict[str, Instruction], outer: dict[str, Instruction], call: Instruction
) -> Instruction:
    """What an operand is, looking through copies and the parameters of a fusion."""
    i = inner[name] if name in inner else outer[name]
    if i.op == "parameter" and name in inner:
        return _origin(call.operands[int(i.inside)], {}, outer, call)
    return _origin(i.operands[0], inner, outer, call) if i.op in ("copy", "bitcast", "convert") else i


def _step(body: dict[str, Instruction], counters: list[Instruction]) -> int:
    """By how much a round moves the counter: 2 where XLA has unrolled once; 1 where it cannot be seen."""
    root = list(body.values())[-1]
    for counter in counters:
        place = int(re.search(r"index=(\d+)", counter.rest)[1])  # type: ignore[index]
        added = body.get(root.operands[place]) if root.op == "tuple" and place < len(root.operands) else None
        if added is not None and added.op == "add":
            for o in added.operands:
                if o in body and (c := _constant(body[o])) is not None:
                    return c
    return 1


def _constant(i: Instruction) -> int | None:
    return int(i.inside) if i.op == "constant" and re.match(r"[su]\d+\[\]", i.type) else None


def _called(i: Instruction, what: str) -> str:
    match = re.search(rf"\b{what}=%?([\w.\-]+)", i.rest)
    if match is None:
        raise ValueError(f"{i.name}: {i.op} without {what}=")
    return match[1]


def _traffic(i: Instruction, computation: dict[str, Instruction], computations: dict) -> float:
    """Device memory read and written by one instruction; slices of a large array count as what they take or
    replace."""
    if i.op in ("dynamic-slice", "slice", "gather"):
        return 2 * size(i.type, True)
    if i.op == "dynamic-update-slice":
        return 2 * size(computation[i.operands[1]].type, True)
    if i.op == "fusion":
        return _fusion_traffic(i, computation, computations)
    if i.op in ("copy-start", "slice-start"):  # (source, destination, …), either of which may be on the core
        source, taken = (m[0] for m in list(ARRAY.finditer(i.type))[:2])
        return size(taken) * ((size(source, True) > 0) + (size(taken, True) > 0))
    if "custom_call_target" in i.rest and any(f'"{name}"' in i.rest for name in PLACEHOLDERS):
        return 0
    read = sum(size(computation[o].type, True) for o in set(i.operands))
    return read + (read if i.op.endswith("-start") else size(i.type, True))


def _fusion_traffic(i: Instruction, outer: dict[str, Instruction], computations: dict) -> float:
    inner = computations[_called(i, "calls")]
    total = 0.0
    for j in inner.values():
        if j.op == "parameter" and (whole := size(outer[i.operands[int(j.inside)]].type, True)):
            total += min(whole, _taken(j.name, whole, inner, computations))
    # What is updated in place is written in part; the array around it is neither read nor written.
    updates = [j for j in inner.values() if j.op == "dynamic-update-slice"]
    replaced, new = sum(size(j.type) for j in updates), sum(size(inner[j.operands[1]].type) for j in updates)
    written = size(i.type, True)
    return total + min(written, max(written - replaced, 0) + new)


def _taken(name: str, whole: float, inner: dict[str, Instruction], computations: dict) -> float:
    """Bytes of a fusion's parameter that it reads: slices of it alone, also those taken in a fusion within
    the fusion."""
    readers = [u for u in inner.values() if name in u.operands]
    total = 0.0 if readers else whole  # passed on as it is
    for u in readers:
        if (
            u.op in ("bitcast", "convert") or "output_to_operand_aliasing={{}:" in u.rest
        ):  # the last: other tiles of what lies there
            wide = size(u.type)  # a slice of what is converted is read as narrow as it lies
            total += _taken(u.name, wide, inner, computations) * whole / wide
        elif u.op in ("dynamic-slice", "slice", "gather") and u.operands[0] == name:
            total += size(u.type)
        elif u.op == "fusion":
            deeper = computations[_called(u, "calls")]
            for j in deeper.values():
                if j.op == "parameter" and u.operands[int(j.inside)] == name:
                    total += _taken(j.name, whole, deeper, computations)
        elif not (u.op == "dynamic-update-slice" and u.operands[0] == name):
            total += whole
    return total


def _collective(
    kind: str, i: Instruction, where: str, computation: dict, mesh: dict[str, int], times: float
) -> Collective:
    operands = i.operands[:1] if kind == "collective-permute" else i.operands
    whole = sum(size(computation[o].type) for o in operands)
    groups = list(groups_of(i.rest, prod(mesh.values())))
    n = max(map(len, groups))
    if kind == "all-reduce" and "all-reduce-scatter" in where:  # how XLA:TPU writes a reduce-scatter
        kind = "reduce-scatter"
    share = {
        "all-gather": n - 1,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
    }
    return Collective(kind, axes_of(groups, mesh), n, times * whole * share.get(kind, 1))


def axes_of(groups: list[list[int]], mesh: dict[str, int]) -> str:
    """The mesh axes along which the members of a group differ."""
    places = [np.array(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
    crossed = np.any([(p != p[:, :1]).any(1) for p in places], axis=0)
    return "+".join(name for name, yes in zip(mesh, crossed, strict=True) if yes) or "none"


def groups_of(attributes: str, devices: int) -> Iterator[list[int]]:
    """Device groups in each of the forms XLA writes; for a permutation, its pairs."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        yield from (list(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)\}", pairs[1]))
    elif listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        yield from [list(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])] or [
            list(range(devices))
        ]
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        yield from _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")]).tolist()
    elif named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    ):
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[3])
        grid = (_iota(named[2]) if named[2] else np.arange(prod(sizes.values()))).reshape(
            tuple(sizes.values())
        )
        kept = [a for a, name in enumerate(sizes) if name not in over]
        moved = [a for a, name in enumerate(sizes) if name in over]
        yield from grid.transpose(kept + moved).reshape(-1, prod(sizes[name] for name in over)).tolist()
    else:
        raise ValueError(f"device groups in a form that is not known: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 … 7 in four rows of two, transposed."""
    shape, _, order = text.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    grid = np.arange(prod(sizes)).reshape(sizes)
    return grid.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else grid
