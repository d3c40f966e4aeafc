"""A program made ready for the C++ library: what is computed in one loop, and what lies where.

The library runs schedules of four kinds: an evaluation; one that leaves a record for the
vector-Jacobian product; that product; and the part of it that only the time's cotangent needs. A
schedule is a list of groups. A group goes through the features of one width in blocks that stay in
the cache: an affine map, or none, and operations that act feature by feature. program.hpp is the
other side of this, and has the structs' meaning.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_double, c_int32
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from anode_fast.kernels import program
from anode_fast.kernels.program import STATE, TIME, Instruction, Product, Program, differentiate

OPS = (*program.OPS, "copy", "tanh_slope", "sigmoid_slope", "gate")
"""Steps by their numbers. tanh_slope(g, v) is g (1 - v^2), sigmoid_slope(g, v) is g v (1 - v), and
gate(v, g) is g where v is positive, else 0."""

RECORD, OUT, DELTAS, SCRATCH, LOCAL, LANES = range(6)
"""Where values lie. The input tile is the record's beginning. LOCAL holds single blocks, LANES
numbers that are the same in all rows."""

BLOCK = 16
"""Features of a block in LOCAL: at least the outputs that an affine map makes at once."""

PADDING = 4
"""Factors of weight gradients are followed by zeros up to a multiple of so many rows."""

_MAPS = ("linear", "linear_t")
_SAVING = ("softplus", "silu", "gelu")  # value and slope share their work
_MAPPED = {*program.UNARY, *program.BINARY, "select", "copy", "tanh_slope", "sigmoid_slope", "gate"}


class Place(NamedTuple):
    """Rows of a space; of LANES vectors. `moves`: 1 if each feature has its own, 0 if all share."""

    space: int
    offset: int
    moves: int


class Operation(NamedTuple):
    """An operation on all features of its group."""

    op: str
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    number: float = 0.0


class Panel(NamedTuple):
    """Weights of an affine map: entry (j, i) at offset + j * output_stride + i * input_stride."""

    weight: int
    bias: int  # -1: none
    outputs: int
    inputs: int
    offset: int
    output_stride: int
    input_stride: int
    bias_offset: int


class Group(NamedTuple):
    """A loop over `width` features; `panel` is -1 without an affine map."""

    width: int
    operations: tuple[Operation, ...]
    panel: int = -1
    source: Place | None = None
    target: Place | None = None
    relu: bool = False
    gate: Place | None = None


class Constant(NamedTuple):
    """Numbers in LANES: a parameter's, or one number."""

    parameter: int  # -1: none
    number: float
    size: int


@dataclass
class Lowered:
    """What the library runs.

    Attributes:
        evaluation, recording, product, of_time: The schedules.
        forward_panels: Number of `panels` that the first two take; the others take the rest.
        sums: Parameter, left factor and right factor (or None) of gradients' parts.
        record_zeros, delta_zeros: First row and number of the zeros behind factors.
    """

    evaluation: list[Group] = field(default_factory=list)
    recording: list[Group] = field(default_factory=list)
    product: list[Group] = field(default_factory=list)
    of_time: list[Group] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    forward_panels: int = 0
    constants: list[Constant] = field(default_factory=list)
    sums: list[tuple[int, Place, Place | None]] = field(default_factory=list)
    record_zeros: list[tuple[int, int]] = field(default_factory=list)
    delta_zeros: list[tuple[int, int]] = field(default_factory=list)
    record_rows: int = 0
    delta_rows: int = 0
    scratch_rows: int = 0
    local_rows: int = 0


@functools.lru_cache(maxsize=64)
def lower(of: Program) -> Lowered:
    """The program's schedules."""
    return _Lowering(of, differentiate(of)).run()


class _Lowering:
    """Works on one list of instructions: the program's, then its product's.

    A real value has rows of its own, which an operation writes. The others are found in place:
    constants and parameters in LANES, slices in what they are cut from.
    """

    def __init__(self, of: Program, product: Product) -> None:
        self.program, self.vjp = of, product
        self.first = of.result + 1  # of the product's values
        nothing = Instruction("input")
        self.nodes = [nothing, nothing, *of.code, *product.code]
        self.widths = [*of.widths, *(x.width for x in product.code)]
        self.out = Lowered()
        self.copied: set[int] = set()
        self.places: dict[int, Place] = {}

    def run(self) -> Lowered:
        self.sums = list(self.vjp.sums)
        self._choose_operations()
        self._narrow_slices()
        self._divide()
        self._choose_copies()
        self._lay_out()
        out = self.out
        forward = [i for i in self.recorded if i < self.first and i in self.evaluated]
        result, dim = self.program.result, self.program.dim
        out.evaluation = self._schedule(forward, result, dim, {})
        out.recording = self._schedule(self.recorded, result, dim, self.kept)
        out.forward_panels = len(out.panels)
        out.product = self._schedule(self.backward, self.vjp.state, dim, self.delta)
        out.of_time = self._schedule(self.late, self.vjp.time, 1, {})
        out.sums = [
            (s.parameter, self._place(s.left), None if s.right is None else self._place(s.right))
            for s in self.sums
        ]
        return out

    # --- choosing instructions

    def _is(self, value: int, op: str, number: float | None = None) -> bool:
        x = self.nodes[value]
        return x.op == op and number in (None, x.number)

    def _choose_operations(self) -> None:
        for i, x in enumerate(self.nodes):
            if x.op == "mul":
                g, slope = x.inputs
                s = self.nodes[slope]
                if s.op == "sub" and self._is(s.inputs[0], "constant", 1.0):
                    square = self.nodes[s.inputs[1]]
                    if square.op == "mul" and square.inputs[0] == square.inputs[1]:
                        self._replace(i, "tanh_slope", (g, square.inputs[0]))
                elif s.op == "mul":
                    v, rest = s.inputs
                    r = self.nodes[rest]
                    if r.op == "sub" and self._is(r.inputs[0], "constant", 1.0):
                        if r.inputs[1] == v:
                            self._replace(i, "sigmoid_slope", (g, v))
            elif x.op == "select":
                c, a, b = x.inputs
                condition = self.nodes[c]
                if self._is(b, "constant", 0.0) and condition.op == "gt":
                    v, zero = condition.inputs
                    if self._is(zero, "constant", 0.0):
                        self._replace(i, "gate", (v, a))

    def _replace(self, i: int, op: str, inputs: tuple[int, ...]) -> None:
        self.nodes[i] = replace(self.nodes[i], op=op, inputs=inputs)

    def _roots(self) -> list[int]:
        """Values that are taken by other than instructions."""
        of_sums = [i for s in self.sums for i in (s.left, s.right)]
        roots = [self.program.result, self.vjp.state, self.vjp.time, *of_sums]
        return [i for i in roots if i is not None]

    def _reachable(self, roots: Iterable[int | None], stop: Iterable[int] = ()) -> set[int]:
        """Instructions that make the roots, but none before those in `stop`."""
        found: set[int] = set()
        todo = [i for i in roots if i is not None]
        stop = set(stop)
        while todo:
            i = todo.pop()
            if i <= STATE or i in found or i in stop:
                continue
            found.add(i)
            todo += self.nodes[i].inputs
        return found

    def _narrow_slices(self) -> None:
        """Maps that are only taken in slices become one map for each."""
        roots = self._roots()
        users: dict[int, list[int]] = {}
        for i in self._reachable(roots):
            for j in self.nodes[i].inputs:
                users.setdefault(j, []).append(i)
        for i, x in enumerate(self.nodes):
            of = users.get(i, [])
            if x.op not in _MAPS or i in roots or any(self.nodes[u].op != "slice" for u in of):
                continue
            if sum(self.nodes[u].width for u in of) <= x.width:
                for u in of:
                    part = self.nodes[u]
                    # `number` of a map is its first output here.
                    first = x.number + part.number
                    self.nodes[u] = replace(x, width=part.width, number=first)

    # --- dividing them among the schedules

    def _divide(self) -> None:
        """What an evaluation, its record, the product and the time's part of it compute."""
        vjp, first = self.vjp, self.first
        self.evaluated = self._reachable([self.program.result])
        of_sums = [i for s in self.sums for i in (s.left, s.right)]
        needed = self._reachable([vjp.state, *of_sums])
        everything = self._reachable([vjp.state, vjp.time, *of_sums])
        # Slopes that an evaluation gets with the value, or soon after.
        slopes = {
            i
            for i in everything
            if i >= first
            and self.nodes[i].op.startswith("d_")
            and all(j < first for j in self.nodes[i].inputs)
        }
        recorded = self._reachable([self.program.result, *slopes])
        recorded |= {i for i in everything if i < first}
        self.recorded = sorted(recorded)
        self.backward = sorted(needed - recorded)
        self.late = sorted(everything - needed - recorded)

    def _virtual(self, i: int) -> bool:
        """Whether a value lies in LANES, or is one row for all features."""
        x = self.nodes[i]
        return x.op in ("constant", "parameter", "spread") or (
            x.op == "slice" and i not in self.copied and self._virtual(x.inputs[0])
        )

    def _in_tile(self, i: int) -> bool:
        """Whether a value is a part of the input tile."""
        x = self.nodes[i]
        if i <= STATE or (x.op == "join" and x.inputs == (TIME, STATE)):
            return True
        return x.op == "slice" and i not in self.copied and self._in_tile(x.inputs[0])

    def _is_real(self, i: int) -> bool:
        if i in self.copied:
            return True
        x = self.nodes[i]
        if x.op in ("input", "constant", "parameter", "spread", "slice", "cotangent"):
            return False
        return not self._in_tile(i)

    def _rows_of(self, i: int) -> int | None:
        """The real value, or cotangent, in whose rows a value lies; None if there is none."""
        if self._is_real(i) or self.nodes[i].op == "cotangent":
            return i
        if i <= STATE or self._in_tile(i) or self.nodes[i].op in ("constant", "parameter"):
            return None
        return self._rows_of(self.nodes[i].inputs[0])

    def _choose_copies(self) -> None:
        """Gives rows of their own to values that could be found in place, but not as is needed."""
        region = {i: 0 for i in self.recorded}
        region |= {i: 1 for i in self.backward} | {i: 2 for i in self.late}
        for i in region:
            for j in self.nodes[i].inputs:
                if self.nodes[i].op in _MAPS and self._virtual(j):
                    self.copied.add(j)
                elif j > STATE and region[j] < region[i]:
                    self._keep_slice(j)
        for n, s in enumerate(self.sums):
            for side in ("left", "right"):
                i = getattr(s, side)
                if i is None:
                    continue
                if s.right is None:  # summed row by row
                    if self._virtual(i):
                        self.copied.add(i)
                    else:
                        self._keep_slice(i)
                elif i == TIME:
                    # What follows it is not zero.
                    self.nodes.append(Instruction("slice", (TIME,), 1))
                    self.widths.append(1)
                    self.recorded.append(len(self.nodes) - 1)
                    self.copied.add(len(self.nodes) - 1)
                    self.sums[n] = s = replace(s, **{side: len(self.nodes) - 1})
                elif self.nodes[i].op in ("constant", "parameter", "spread", "slice"):
                    self.copied.add(i)

    def _keep_slice(self, i: int) -> None:
        """A slice is kept by itself, unless what it is cut from is there anyway."""
        if self.nodes[i].op == "slice" and not self._in_tile(i) and not self._virtual(i):
            self.copied.add(i)

    # --- laying them out

    def _lay_out(self) -> None:
        out, dim = self.out, self.program.dim
        factors = {i for s in self.sums if s.right is not None for i in (s.left, s.right)}
        taken = [i for s in self.sums for i in (s.left, s.right) if i is not None]
        for i in self.backward:
            taken += self.nodes[i].inputs
        by_late = [j for i in self.late for j in self.nodes[i].inputs] + [self.vjp.time]
        by_backward = self._all_rows([*taken, *by_late, self.vjp.state])

        # The state, a factor, may be followed by more zeros than the tile.
        out.record_zeros = [(1 + dim, PADDING)]
        out.record_rows = 1 + dim + PADDING
        self.kept: dict[int, Place] = {}
        for i in sorted(by_backward & set(self.recorded)):
            self.kept[i] = Place(RECORD, out.record_rows, self._moves(i))
            out.record_rows += self._padded(i, factors, out.record_rows, out.record_zeros)

        cotangent = self.first
        self.places[cotangent] = Place(DELTAS, 0, self._moves(cotangent))
        out.delta_rows = self._padded(cotangent, {cotangent}, 0, out.delta_zeros)
        of_sums = [i for s in self.sums for i in (s.left, s.right)]
        self.delta: dict[int, Place] = {}
        for i in sorted(self._all_rows([*of_sums, *by_late]) & set(self.backward) - {cotangent}):
            self.delta[i] = Place(DELTAS, out.delta_rows, self._moves(i))
            out.delta_rows += self._padded(i, factors, out.delta_rows, out.delta_zeros)

    def _all_rows(self, values: Iterable[int | None]) -> set[int]:
        """The real values in whose rows any of the values lies."""
        found = (self._rows_of(i) for i in values if i is not None)
        return {i for i in found if i is not None}

    def _moves(self, i: int) -> int:
        return int(self.widths[i] > 1)

    def _padded(self, i: int, factors: set[int], offset: int, zeros: list[tuple[int, int]]) -> int:
        """Rows of a value, those behind it included that must be zero."""
        width = self.widths[i]
        padding = -width % PADDING if i in factors else 0
        if padding:
            zeros.append((offset + width, padding))
        rows: int = width + padding
        return rows

    def _lane(self, parameter: int, number: float, count: int) -> int:
        """First vector of a constant."""
        wanted, offset = Constant(parameter, number, count), 0
        for constant in self.out.constants:
            # Numbers by their bits: 0 is not -0.
            if repr(constant) == repr(wanted):
                return offset
            offset += constant.size
        self.out.constants.append(wanted)
        return offset

    def _place(self, i: int) -> Place:
        if i in self.places:
            return self.places[i]
        if i == TIME:
            return Place(RECORD, 0, 0)
        if i == STATE:
            return Place(RECORD, 1, self._moves(i))
        return self._found(i)

    def _found(self, i: int) -> Place:
        """Where a value that is not real lies."""
        x = self.nodes[i]
        if x.op == "constant":
            return Place(LANES, self._lane(-1, x.number, 1), 0)
        if x.op == "parameter":
            return Place(LANES, self._lane(x.parameters[0], 0.0, x.width), self._moves(i))
        if x.op == "join":
            return Place(RECORD, 0, 1)
        source = self._place(x.inputs[0])
        if x.op == "spread":
            return source._replace(moves=0)
        if source.moves == 0:  # a slice of what is the same in all features, or all of one
            return source
        return source._replace(offset=source.offset + int(x.number), moves=self._moves(i))

    # --- schedules

    def _schedule(
        self, code: Sequence[int], root: int | None, width: int, kept: dict[int, Place]
    ) -> list[Group]:
        """Groups that compute real values of `code`, and leave the root in OUT.

        Args:
            code: Instructions in an order in which they can run.
            root: The value for OUT; None for zeros.
            width: Its features.
            kept: Places of values that are needed later.
        """
        real = [i for i in code if self._is_real(i)]
        groups = self._divide_into_groups(real)
        self.places.update(kept)
        to_out = root in real and root not in kept
        if root is not None and to_out:
            self.places[root] = Place(OUT, 0, self._moves(root))
        taken_by: dict[int, list[tuple[int, bool]]] = {i: [] for i in real}
        for i in real:
            for j in self.nodes[i].inputs:
                rows = self._rows_of(j)
                if rows in taken_by:
                    taken_by[rows].append((i, rows == j))
        if root is not None and (rows := self._rows_of(root)) in taken_by and not to_out:
            taken_by[rows].append((-1, False))
        number = {i: n for n, group in enumerate(groups) for i in group}
        number[-1] = len(groups)

        allocator = _Allocator()
        made: list[Group] = []
        dying: dict[int, list[int]] = {}
        scratch: list[int] = []
        for n, group in enumerate(groups):
            local = set()
            for i in group:
                if i in kept or (to_out and i == root):
                    continue
                if all(number[u] == n and same for u, same in taken_by[i]) and taken_by[i]:
                    local.add(i)
                    continue
                self.places[i] = Place(SCRATCH, allocator.take(i, self.widths[i]), self._moves(i))
                scratch.append(i)
                last = max([n, *(number[u] for u, _ in taken_by[i])])
                dying.setdefault(last, []).append(i)
            made += self._emit(group, local, {i: [u for u, _ in taken_by[i]] for i in group})
            for i in dying.pop(n, []):
                allocator.free(i)
        if not to_out:
            zero = Place(LANES, self._lane(-1, 0.0, 1), 0)
            source = zero if root is None else self._place(root)
            made.append(self._copy(source, Place(OUT, 0, 1), width))
        self.out.scratch_rows = max(self.out.scratch_rows, allocator.rows)
        for i in scratch:
            del self.places[i]
        if to_out and root is not None:
            del self.places[root]
        return made

    def _loop_width(self, i: int) -> int:
        x = self.nodes[i]
        width: int = self.widths[x.inputs[0]] if x.op == "total" else x.width
        return width

    def _divide_into_groups(self, real: Sequence[int]) -> list[list[int]]:
        groups, done, remaining = [], set(), list(real)
        pending = set(real)
        while remaining:
            head, *rest = remaining
            group, remaining = [head], []
            width, inside = self._loop_width(head), {head} - self._outside(head)
            alone = self.nodes[head].op in ("join", "place") and head not in self.copied
            for i in rest:
                joins = not alone and self._can_follow(i) and self._loop_width(i) == width
                if joins and all(
                    j in inside or self._rows_of(j) in done or self._rows_of(j) not in pending
                    for j in self.nodes[i].inputs
                ):
                    group.append(i)
                    inside |= {i} - self._outside(i)
                else:
                    remaining.append(i)
            done.update(group)
            groups.append(group)
        return groups

    def _outside(self, i: int) -> set[int]:
        """The value, if it is not there before its group's last block."""
        return {i} if self.nodes[i].op in ("total", "join", "place") else set()

    def _can_follow(self, i: int) -> bool:
        return i in self.copied or self.nodes[i].op in (*_MAPPED, "total")

    def _copy(self, source: Place, target: Place, width: int) -> Group:
        return Group(width, (Operation("copy", (source,), (target,)),))

    def _emit(self, group: list[int], local: set[int], users: dict[int, list[int]]) -> list[Group]:
        head = group[0]
        x = self.nodes[head]
        if head not in self.copied and x.op in ("join", "place"):
            return self._emit_parts(head)
        slots = _Slots(self, group, local, users)
        skipped: set[int] = set()
        panel, source, target, relu, gate = -1, None, None, False, None
        if x.op in _MAPS and head not in self.copied:
            panel, source = self._panel(x), self._place(x.inputs[0])
            end = head
            if head in local and len(users[head]) == 1:
                user = users[head][0]
                u = self.nodes[user]
                if u.op == "relu":
                    relu, end = True, user
                elif u.op == "gate" and u.inputs[1] == head and u.inputs[0] not in slots.group:
                    opened = self._place(u.inputs[0])
                    if opened.space != LANES and self.widths[u.inputs[0]] == x.width:
                        gate, end = opened, user
            skipped |= {head, end}
            if end != head:
                local.discard(head)
            target = slots.place(end)
        operations: list[Operation] = []
        for i in group:
            if i in skipped:
                continue
            x = self.nodes[i]
            if i in self.copied:
                operations.append(Operation("copy", (self._found(i),), (slots.place(i),)))
                continue
            op = x.op.removeprefix("d_")
            made = [i, *self._partner(i, op, group, skipped)]
            if len(made) == 1:
                op = x.op
            made.sort(key=lambda j: self.nodes[j].op != op)  # the value, then its slope
            inputs = tuple(self._place(j) for j in x.inputs)
            skipped.update(made)
            slots.release(x.inputs, made)
            operations.append(Operation(op, inputs, tuple(slots.place(j) for j in made), x.number))
        self.out.local_rows = max(self.out.local_rows, BLOCK * slots.most)
        slots.end()
        width = self._loop_width(head)
        return [Group(width, tuple(operations), panel, source, target, relu, gate)]

    def _partner(self, i: int, op: str, group: list[int], skipped: set[int]) -> list[int]:
        """The slope that goes with a value, or the value with a slope, if the group has it."""
        x = self.nodes[i]
        if op not in _SAVING:
            return []
        wanted = op if x.op != op else "d_" + op
        return [
            j
            for j in group
            if self.nodes[j].op == wanted and self.nodes[j].inputs == x.inputs and j not in skipped
        ][:1]

    def _emit_parts(self, i: int) -> list[Group]:
        x, (space, offset, _) = self.nodes[i], self._place(i)

        def part(source: Place, start: int, width: int) -> Group:
            return self._copy(source, Place(space, offset + start, 1), width)

        if x.op == "join":
            groups, start = [], 0
            for j in x.inputs:
                groups.append(part(self._place(j), start, self.widths[j]))
                start += self.widths[j]
            return groups
        zero = Place(LANES, self._lane(-1, 0.0, 1), 0)
        (j,), start = x.inputs, int(x.number)
        end = start + self.widths[j]
        groups = [part(self._place(j), start, self.widths[j])]
        if start:
            groups.append(part(zero, 0, start))
        if end < x.width:
            groups.append(part(zero, end, x.width - end))
        return groups

    def _panel(self, x: Instruction) -> int:
        weight, *bias = x.parameters
        rows, columns = self.program.shapes[weight]
        first, (inputs,) = int(x.number), [self.widths[i] for i in x.inputs]
        if x.op == "linear":
            strides = (first * columns, columns, 1)
        else:
            strides = (first, 1, columns)
        panel = Panel(weight, bias[0] if bias else -1, x.width, inputs, *strides, first)
        # Those of the product come after the others, so that either can be left out.
        start = self.out.forward_panels
        if panel in self.out.panels[start:]:
            return self.out.panels.index(panel, start)
        self.out.panels.append(panel)
        return len(self.out.panels) - 1


class _Allocator:
    """Rows that values share, one after the other."""

    def __init__(self) -> None:
        self.rows = 0
        self.used: dict[int, tuple[int, int]] = {}

    def take(self, value: int, width: int) -> int:
        start = 0
        for begin, end in sorted(self.used.values()):
            if begin - start >= width:
                break
            start = max(start, end)
        self.used[value] = start, start + width
        self.rows = max(self.rows, start + width)
        return start

    def free(self, value: int) -> None:
        del self.used[value]


class _Slots:
    """Places of the values that live within a group: blocks in LOCAL, used again."""

    def __init__(
        self, lowering: _Lowering, group: list[int], local: set[int], users: dict[int, list[int]]
    ) -> None:
        self.lowering, self.group, self.local = lowering, set(group), local
        self.remaining = {i: set(users[i]) for i in local}
        self.free: list[int] = []
        self.most = 0

    def place(self, i: int) -> Place:
        places = self.lowering.places
        if i in self.local and i not in places:
            if not self.free:
                self.free.append(self.most)
                self.most += 1
            slot = self.free.pop()
            places[i] = Place(LOCAL, slot * BLOCK, self.lowering._moves(i))
        return places[i]

    def release(self, inputs: Iterable[int], by: Iterable[int]) -> None:
        """Notes that those that come from the inputs are made now: what nobody waits for is free.

        A feature's inputs are read before its outputs are written, so these may take their place.
        """
        for i in set(inputs) & self.local:
            self.remaining[i] -= set(by)
            if not self.remaining[i]:
                self.free.append(self.lowering.places[i].offset // BLOCK)

    def end(self) -> None:
        for i in self.local:
            self.lowering.places.pop(i, None)


# --- as the library takes it ----------------------------------------------------------------------


class _Place(ctypes.Structure):
    _fields_ = [("space", c_int32), ("offset", c_int32), ("moves", c_int32)]


class _Operation(ctypes.Structure):
    _fields_ = [
        ("op", c_int32),
        ("num_inputs", c_int32),
        ("num_outputs", c_int32),
        ("inputs", _Place * 3),
        ("outputs", _Place * 2),
        ("number", c_double),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        ("width", c_int32),
        ("panel", c_int32),
        ("relu", c_int32),
        ("gated", c_int32),
        ("source", _Place),
        ("target", _Place),
        ("gate", _Place),
        ("first_operation", c_int32),
        ("end_operation", c_int32),
    ]


class _Panel(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in Panel._fields]


class _Constant(ctypes.Structure):
    _fields_ = [("parameter", c_int32), ("count", c_int32), ("number", c_double)]


class _Sum(ctypes.Structure):
    _fields_ = [
        ("parameter", c_int32),
        ("is_matrix", c_int32),
        ("left", _Place),
        ("right", _Place),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [("rows", c_int32), ("columns", c_int32)]


class _Zeros(ctypes.Structure):
    _fields_ = [("first", c_int32), ("rows", c_int32)]


SCHEDULES = ("evaluation", "recording", "product", "of_time")
_COUNTS = ("constants", "panels", "sums", "tensors", "record_zeros", "delta_zeros")
_SIZES = ("record_rows", "delta_rows", "scratch_rows", "local_rows")


class Shape(ctypes.Structure):
    """The C struct ProgramShape. It keeps the arrays that it points to."""

    _fields_ = [
        ("dim", c_int32),
        ("forward_panels", c_int32),
        *((name, c_int32) for name in _SIZES),
        ("end_group", c_int32 * len(SCHEDULES)),
        *((f"num_{name}", c_int32) for name in _COUNTS),
        ("groups", POINTER(_Group)),
        ("operations", POINTER(_Operation)),
        ("constants", POINTER(_Constant)),
        ("panels", POINTER(_Panel)),
        ("sums", POINTER(_Sum)),
        ("tensors", POINTER(_Tensor)),
        ("record_zeros", POINTER(_Zeros)),
        ("delta_zeros", POINTER(_Zeros)),
    ]


@functools.lru_cache(maxsize=256)
def shape(of: Program) -> Shape:
    """A program for the library."""
    lowered = lower(of)
    groups: list[_Group] = []
    operations: list[_Operation] = []
    ends = []
    for name in SCHEDULES:
        for group in getattr(lowered, name):
            begin = len(operations)
            operations += [_c_operation(operation) for operation in group.operations]
            groups.append(
                _Group(
                    group.width,
                    group.panel,
                    group.relu,
                    group.gate is not None,
                    *(_c_place(x) for x in (group.source, group.target, group.gate)),
                    begin,
                    len(operations),
                )
            )
        ends.append(len(groups))
    tensors = [(s[0], s[1]) if len(s) == 2 else (s[0] if s else 1, 0) for s in of.shapes]
    made = Shape(
        dim=of.dim,
        forward_panels=lowered.forward_panels,
        end_group=(c_int32 * len(SCHEDULES))(*ends),
        **{name: getattr(lowered, name) for name in _SIZES},
    )

    def put(name: str, kind: type[ctypes.Structure], values: Sequence[ctypes.Structure]) -> None:
        setattr(made, name, (kind * len(values))(*values))  # the struct keeps the array
        if name in _COUNTS:
            setattr(made, f"num_{name}", len(values))

    put("groups", _Group, groups)
    put("operations", _Operation, operations)
    put(
        "constants",
        _Constant,
        [_Constant(x.parameter, x.size, x.number) for x in lowered.constants],
    )
    put("panels", _Panel, [_Panel(*x) for x in lowered.panels])
    put(
        "sums",
        _Sum,
        [_Sum(p, x is not None, _c_place(left), _c_place(x)) for p, left, x in lowered.sums],
    )
    put("tensors", _Tensor, [_Tensor(*x) for x in tensors])
    put("record_zeros", _Zeros, [_Zeros(*x) for x in lowered.record_zeros])
    put("delta_zeros", _Zeros, [_Zeros(*x) for x in lowered.delta_zeros])
    return made


def _c_place(place: Place | None) -> _Place:
    return _Place() if place is None else _Place(*place)


def _c_operation(operation: Operation) -> _Operation:
    made = _Operation(
        OPS.index(operation.op),
        len(operation.inputs),
        len(operation.outputs),
        number=operation.number,
    )
    for i, place in enumerate(operation.inputs):
        made.inputs[i] = _c_place(place)
    for i, place in enumerate(operation.outputs):
        made.outputs[i] = _c_place(place)
    return made
