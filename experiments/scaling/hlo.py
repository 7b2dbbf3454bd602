"""What a compiled program does in one run, from its text: collectives and bytes, loops counted in full."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
MOVES_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "optimization-barrier", "async-done", "async-update"),
    *("copy-done", "slice-done", *(f"{kind}-done" for kind in KINDS)),
}
READS_A_PART = {"dynamic-slice", "slice", "gather", "slice-start", "get-tuple-element", "bitcast"}

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\s}\])])([a-z][a-z0-9\-]*)\(")
ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line: what it makes, from what, and what stands after (a constant's value, an index)."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Program(NamedTuple):
    """Computations by name, each its instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Traffic(NamedTuple):
    """Per chip and step: bytes that a collective sends by kind, how often each runs, bytes of HBM touched."""

    sent: Counter
    calls: Counter
    hbm: float


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := LINE.match(line):
            root, name, rest = found.groups()
            if opcode := OPCODE.search(rest):
                inside, attributes = split_operands(rest[opcode.end() :])
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                if opcode[1] in ("constant", "parameter"):
                    attributes = inside
                shape = rest[: opcode.start(1)]
                current[name] = Instruction(name, shape, opcode[1], operands, attributes, bool(root))
    return Program(computations, entry)


def split_operands(text: str) -> tuple[str, str]:
    """The text up to the bracket that closes the operands, and after it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def arrays(shape: str) -> list[tuple[float, bool]]:
    """(bytes, whether it lies in HBM) of each array of a shape; S(n) in a layout is another memory."""
    found = []
    for kind, dims, layout in ARRAY.findall(shape):
        width = WIDTHS.get(kind) or int(re.sub(r"\D*(\d+).*", r"\1", kind) if kind != "token" else 0) / 8
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        found.append((width * size, not re.search(r"S\([1-9]", layout)))
    return found


def in_hbm(shape: str) -> float:
    return sum(size for size, hbm in arrays(shape) if hbm)


def group_size(attributes: str, chips: int) -> int:
    """Over how many chips a collective runs, in any of the notations for its groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    return chips


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a loop's body runs: as the compiler says, or the bound that its condition compares with."""
    if known := re.search(r'known_trip_count":?\{"?n"?:"(\d+)"', loop.attributes):
        return int(known[1])
    condition = program.computations[called(loop, "condition")[0]]
    bounds = [constant_value(line) for line in reachable(program, condition)]
    found = [bound for bound in bounds if bound is not None]
    if len(found) != 1:
        raise ValueError(f"the condition of loop {loop.name} has {len(found)} constant bounds, expected one")
    return found[0]


def constant_value(line: Instruction) -> int | None:
    if line.opcode != "constant" or not re.match(r"[su]32\[\]", line.shape):
        return None
    return int(line.attributes)


def reachable(program: Program, computation: dict[str, Instruction]) -> list[Instruction]:
    lines = list(computation.values())
    for line in computation.values():
        for name in called(line, "calls"):
            lines += reachable(program, program.computations[name])
    return lines


def called(line: Instruction, *names: str) -> list[str]:
    """The computations that an instruction names in these attributes."""
    found = []
    for name in names:
        for one, many in re.findall(rf"\b{name}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", line.attributes):
            found += [one] if one else re.findall(r"[\w.\-]+", many)
    return found


def bytes_sent(kind: str, result: float, group: int) -> float:
    """What one chip sends in a ring of `group`; `result` is the size of what it ends up with."""
    share = (group - 1) / group
    return {
        "all-gather": result * share,
        "reduce-scatter": result * (group - 1),
        "all-reduce": 2 * result * share,
        "all-to-all": result * share,
        "collective-permute": result,
    }[kind]


def collective(program: Program, home: str, line: Instruction, chips: int) -> tuple[str, str, float] | None:
    """(identity, kind, bytes sent) of a collective, or None; one in several asynchronous pieces is one."""
    kind = line.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    group = group_size(line.attributes, chips)
    sizes = [size for size, _ in arrays(line.shape)]
    if line.opcode.endswith("-start"):
        # (operands, results, flags): an all-reduce's start has its results alone.
        sizes = sizes if kind == "all-reduce" else [max(sizes)]
    result = sum(sizes)
    if kind == "all-reduce" and "all-reduce-scatter" in home:
        kind, result = "reduce-scatter", result / group
    chain = re.search(r'chain_id="(\w+)"', line.attributes)
    identity = f"chain {chain[1]}" if chain else f"{home} {line.name}"
    return identity, kind, bytes_sent(kind, result, group) if group > 1 else 0.0


def read_bytes(program: Program, home: dict[str, Instruction], line: Instruction) -> float:
    """Bytes that an instruction reads from HBM; of what it only slices, the slice."""
    shapes = [home[name].shape if name in home else "" for name in line.operands]
    if line.opcode in READS_A_PART:
        return in_hbm(line.shape) if any(map(in_hbm, shapes)) else 0.0
    if line.opcode == "dynamic-update-slice":
        return in_hbm(shapes[1])
    if line.opcode != "fusion":
        return sum(map(in_hbm, shapes))
    inner = program.computations[called(line, "calls")[0]]
    parameters = {int(p.attributes or 0): p for p in inner.values() if p.opcode == "parameter"}
    total = 0.0
    for i, shape in enumerate(shapes):
        whole = in_hbm(shape)
        total += min(whole, part_used(inner, parameters[i].name)) if whole and i in parameters else whole
    return total


def part_used(inner: dict[str, Instruction], name: str) -> float:
    """Bytes of a fusion's operand that its users read: all of it, unless every one only takes a slice."""
    total = 0.0
    for user in inner.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += sum(size for size, _ in arrays(user.shape))
        elif user.opcode == "tuple" or (
            user.opcode == "dynamic-update-slice"
            and user.operands[0] == name
            and name not in user.operands[1:]
        ):
            continue  # handed through, or updated in place
        elif user.opcode == "bitcast":
            total += part_used(inner, user.name)
        else:
            return math.inf
    return total


def written_bytes(program: Program, home: dict[str, Instruction], line: Instruction) -> float:
    """Bytes that an instruction writes to HBM; of what it updates in place, the update."""
    if line.opcode == "dynamic-update-slice":
        return in_hbm(home[line.operands[1]].shape)
    if line.opcode == "slice-start" or line.opcode == "copy-start":
        return min(in_hbm(line.shape), in_hbm(line.shape.split(")")[0]))
    if line.opcode != "fusion":
        return in_hbm(line.shape)
    inner = program.computations[called(line, "calls")[0]]
    root = next(one for one in inner.values() if one.root)
    outs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    places = arrays(line.shape)
    total = 0.0
    for out, (size, hbm) in zip(outs, places, strict=False):
        while out.opcode == "bitcast":
            out = inner[out.operands[0]]
        if out.opcode == "parameter":
            continue
        if hbm and out.opcode == "dynamic-update-slice":
            size = sum(part for part, _ in arrays(inner[out.operands[1]].shape))
        total += size * hbm
    return total


def traffic(program: Program, chips: int, name: str | None = None) -> Traffic:
    """What one run of a computation (the entry) sends and touches; of a conditional, its dearest branch."""
    home_name = name or program.entry
    home = program.computations[home_name]
    sent, calls, hbm, seen = Counter(), Counter(), 0.0, set()
    add = lambda kind, size, count: (sent.update({kind: size}), calls.update({kind: count}))

    def add_collectives(home_name: str):
        for line in program.computations[home_name].values():
            if (found := collective(program, home_name, line, chips)) and found[0] not in seen:
                seen.add(found[0])
                add(found[1], found[2], 1)
            for inner in called(line, "calls") if line.opcode != "while" else []:
                add_collectives(inner)

    add_collectives(home_name)
    for line in home.values():
        if line.opcode == "while":
            body, times = traffic(program, chips, called(line, "body")[0]), trip_count(program, line)
        elif line.opcode in ("conditional", "call"):
            branches = called(
                line, "branch_computations", "true_computation", "false_computation", "to_apply"
            )
            body = max((traffic(program, chips, branch) for branch in branches), key=lambda t: t.hbm)
            times = 1
        else:
            if line.opcode not in MOVES_NOTHING:
                hbm += read_bytes(program, home, line) + written_bytes(program, home, line)
            continue
        for kind in body.calls:
            add(kind, times * body.sent[kind], times * body.calls[kind])
        hbm += times * body.hbm
    return Traffic(sent, calls, hbm)
