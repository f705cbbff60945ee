"""Read memory traffic, and collectives by mesh axis, from the HLO text of a compiled program.

XLA's own cost analysis counts the body of a loop once. Here the body is multiplied by the loop's trip count,
the constant with which its counter is compared. A loop that may end earlier (sampling, when every row has
stopped) counts with that bound.
"""

import re
from collections import defaultdict
from math import prod
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "token": 0}  # types whose name does not contain their number of bits
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
# `%name = type operation(operands), attributes`. No word stands before a bracket within a type.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, (.*))?$")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes, and control flow, of which the bodies are counted instead.
FREE = set(
    """parameter constant get-tuple-element tuple bitcast while conditional call after-all iota partition-id
    replica-id optimization-barrier add-dependency""".split()
)
PLACEHOLDER = re.compile(  # custom calls that move no bytes
    '"(?:AllocateBuffer|AssumeGatherIndicesInBound|ConcatBitcast|AsyncCollective(?:Start|Done))"'
)


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    arguments: str  # the text between the operation's brackets
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


Computation = dict[str, Instruction]  # instructions by name, in order
Computations = dict[str, Computation]


class Collective(NamedTuple):
    """The collectives of one kind over the same devices. `bytes` is what each device receives in all calls
    of the program: in a ring of n devices (n − 1)/n of the result, for an all-reduce twice as much.
    """

    kind: str
    axis: str  # the mesh axes that it crosses, joined by +
    group: int  # the number of devices in a group
    bytes: float


class Traffic(NamedTuple):
    bytes: float  # read from and written to device memory, per device
    collectives: list[Collective]


def read_traffic(text: str, mesh: dict[str, int], calls: int = 1) -> Traffic:
    """Return the traffic of one device in `calls` calls of a program. `text`: `compiled.as_text()`; `mesh`:
    the sizes of its axes.
    """
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
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                # An asynchronous collective occurs, with one channel, in all fusions and loops that hide it.
                key = channel[0] if channel else i.name
                if key not in collectives or c.bytes < collectives[key].bytes:
                    collectives[key] = c
            if memory and i.op not in FREE and not i.op.endswith("-done"):
                total += times * _memory_bytes(i, computation, computations)
            if i.op == "while":
                body, condition = _callee(i, "body"), _callee(i, "condition")
                visit(body, times * trip_count(computations, condition, body, i.attributes), memory)
            elif i.op in ("conditional", "call"):
                for inner in _branches(i):
                    visit(inner, times, memory)
            elif "calls=" in i.attributes:  # fusions and asynchronous wrappers have bytes of their own
                visit(_callee(i, "calls"), times, False)

    visit(entry, float(calls), True)
    sums: dict[tuple[str, str, int], float] = defaultdict(float)
    for c in collectives.values():
        sums[c[:3]] += c.bytes
    per_kind = [Collective(*key, size) for key, size in sums.items() if size]
    return Traffic(total, sorted(per_kind, key=lambda c: -c.bytes))


def _branches(i: Instruction) -> list[str]:
    """Return the names of the computations that a call or a conditional runs."""
    names = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", i.attributes)
    groups = re.findall(r"branch_computations=\{([^}]*)\}", i.attributes)
    return names + [name.strip(" %") for group in groups for name in group.split(",")]


def parse(text: str) -> tuple[Computations, str]:
    """Return the computations by name, and the name of the entry computation."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        # `}}, …` is no end: the attributes of a Pallas kernel have several lines
        if re.match(r"\}(,|$)", line):
            current = None
        elif current is None:
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif match := INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            current[match[1]] = Instruction(*match.groups(""))
    return computations, entry


def size(kind: str, memory_only: bool = False) -> float:
    """Return the bytes of a type such as `(bf16[2,8]{1,0:T(8,128)}, s32[])`. `memory_only`: without arrays in
    on-chip memory (S(1) …).
    """
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(kind):
        if not (memory_only and re.search(r"S\([1-9]", layout)):
            bits = BITS[dtype] if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
            total += bits / 8 * prod(_numbers(dims))
    return total


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def trip_count(computations: Computations, condition: str, body: str, attributes: str = "") -> int:
    """Return the largest number of iterations of a loop: XLA's annotation, or the counter's bound in the
    condition divided by its step.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes):
        return int(known[1])
    counts, outer = set(), computations[condition]
    for i in outer.values():
        inner = computations[_callee(i, "calls")] if i.op == "fusion" else {}
        for j in [i, *inner.values()]:  # the comparison may be in a fusion, its operands inside or outside
            if j.op == "compare" and "direction=LT" in j.attributes:
                operands = [_origin(o, inner, outer, i) for o in j.operands]
                bounds = [c for o in operands if (c := _constant(o)) is not None]
                counters = [o for o in operands if o.op == "get-tuple-element"]
                counts |= {-(-n // _step(computations[body], counters)) for n in bounds}
    if len(counts) != 1:
        raise ValueError(f"the loop condition {condition} must have one trip count, but has {sorted(counts)}")
    return counts.pop()


def _origin(name: str, inner: Computation, outer: Computation, call: Instruction) -> Instruction:
    """Follow an operand through copies and parameters of a fusion to the instruction that computes it."""
    i = inner[name] if name in inner else outer[name]
    if i.op == "parameter" and name in inner:
        return _origin(call.operands[int(i.arguments)], {}, outer, call)
    return _origin(i.operands[0], inner, outer, call) if i.op in ("copy", "bitcast", "convert") else i


def _step(body: Computation, counters: list[Instruction]) -> int:
    """Return the counter's step per iteration: 2 if XLA has unrolled once; 1 if it cannot be read."""
    root = list(body.values())[-1]
    for counter in counters:
        place = int(re.search(r"index=(\d+)", counter.attributes)[1])  # type: ignore[index]
        added = body.get(root.operands[place]) if root.op == "tuple" and place < len(root.operands) else None
        if added is not None and added.op == "add":
            for o in added.operands:
                if o in body and (c := _constant(body[o])) is not None:
                    return c
    return 1


def _constant(i: Instruction) -> int | None:
    return int(i.arguments) if i.op == "constant" and re.match(r"[su]\d+\[\]", i.type) else None


def _callee(i: Instruction, attribute: str) -> str:
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", i.attributes)
    if match is None:
        raise ValueError(f"{i.name}: {i.op} without {attribute}=")
    return match[1]


def _memory_bytes(i: Instruction, computation: Computation, computations: Computations) -> float:
    """Return the bytes of device memory that an instruction reads and writes. Of a sliced or updated array
    only the slice counts.
    """
    if i.op in ("dynamic-slice", "slice", "gather"):
        return 2 * size(i.type, True)
    if i.op == "dynamic-update-slice":
        return 2 * size(computation[i.operands[1]].type, True)
    if i.op == "fusion":
        return _fusion_bytes(i, computation, computations)
    if i.op in ("copy-start", "slice-start"):  # (source, target, …), each of which may be in on-chip memory
        source, target = (m[0] for m in list(ARRAY.finditer(i.type))[:2])
        return size(target) * ((size(source, True) > 0) + (size(target, True) > 0))
    if "custom_call_target" in i.attributes and PLACEHOLDER.search(i.attributes):
        return 0
    read = sum(size(computation[o].type, True) for o in set(i.operands))
    return read + (read if i.op.endswith("-start") else size(i.type, True))


def _fusion_bytes(i: Instruction, outer: Computation, computations: Computations) -> float:
    inner = computations[_callee(i, "calls")]
    total = 0.0
    for j in inner.values():
        if j.op == "parameter" and (full := size(outer[i.operands[int(j.arguments)]].type, True)):
            total += min(full, _bytes_read(j.name, full, inner, computations))
    # If an array is updated in place, only the update is written.
    updates = [j for j in inner.values() if j.op == "dynamic-update-slice"]
    replaced, new = sum(size(j.type) for j in updates), sum(size(inner[j.operands[1]].type) for j in updates)
    written = size(i.type, True)
    return total + min(written, max(written - replaced, 0) + new)


def _bytes_read(name: str, full: float, inner: Computation, computations: Computations) -> float:
    """Return the bytes that a fusion, and fusions inside it, read of its parameter `name` of `full` bytes."""
    readers = [u for u in inner.values() if name in u.operands]
    total = 0.0 if readers else full  # a parameter without readers is returned whole
    for u in readers:
        # an aliased output is the same memory in other tiles
        if u.op in ("bitcast", "convert") or "output_to_operand_aliasing={{}:" in u.attributes:
            converted = size(u.type)  # a slice of a converted array is read in the dtype that memory holds
            total += _bytes_read(u.name, converted, inner, computations) * full / converted
        elif u.op in ("dynamic-slice", "slice", "gather") and u.operands[0] == name:
            total += size(u.type)
        elif u.op == "fusion":
            deeper = computations[_callee(u, "calls")]
            for j in deeper.values():
                if j.op == "parameter" and u.operands[int(j.arguments)] == name:
                    total += _bytes_read(j.name, full, deeper, computations)
        elif not (u.op == "dynamic-update-slice" and u.operands[0] == name):
            total += full
    return total


def _collective(
    kind: str, i: Instruction, name: str, computation: Computation, mesh: dict[str, int], times: float
) -> Collective:
    operands = i.operands[:1] if kind == "collective-permute" else i.operands
    sent = sum(size(computation[o].type) for o in operands)
    groups = device_groups(i.attributes, prod(mesh.values()))
    n = groups.shape[1]
    if kind == "all-reduce" and "all-reduce-scatter" in name:  # XLA:TPU's form of a reduce-scatter
        kind = "reduce-scatter"
    factors = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
    return Collective(kind, crossed_axes(groups, mesh), n, times * sent * factors.get(kind, (n - 1) / n))


def crossed_axes(groups: np.ndarray, mesh: dict[str, int]) -> str:
    """Return the mesh axes along which the members of a group differ, joined by +."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # axes, groups, members
    crossed = (places != places[:, :, :1]).any((1, 2))
    return "+".join(name for name, yes in zip(mesh, crossed, strict=True) if yes) or "none"


def device_groups(attributes: str, devices: int) -> np.ndarray:
    """Parse device groups [groups, members] in any form that XLA writes; for a permutation, its pairs."""
    pairs = r"(?:source_target_pairs|replica_groups)=\{((?:\{[\d,]*\},?)*)\}"
    iotas = r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)"
    names = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}"
    if listed := re.search(pairs, attributes):
        return np.array([_numbers(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])] or [range(devices)])
    if iota := re.search(iotas, attributes):
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    if named := re.search(names, attributes):
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        members = re.findall(r"'(\w+)'", named[3])
        grid = _iota(named[2] or f"[{prod(sizes.values())}]").reshape(tuple(sizes.values()))
        order = sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] in members)  # members' axes last
        return grid.transpose(order).reshape(-1, prod(sizes[name] for name in members))
    raise ValueError(f"the form of these device groups is not known: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """Return the array that `[4,2]T(1,0)` describes: 0 … 7 in four rows of two, transposed."""
    shape, _, order = text.partition("T")
    grid = np.arange(prod(_numbers(shape))).reshape(_numbers(shape))
    return grid.transpose(_numbers(order)) if order else grid
