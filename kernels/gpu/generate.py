"""Fields from programs: the source of the functions that the solvers take, written and loaded.

What mlp.py does by hand for perceptrons is done here for any program: `functions` gives a module
with `evaluate`, `vjp`, `time_gradient` and `accumulate`, to be called as those of mlp.py.

Values up to as wide as a tile of the state are whole tiles, and single numbers columns, all in
registers. Wider values go in blocks: by a loop, which computes a block of a value from the inputs'
blocks, back to what is in memory or in registers. A linear map of wide values is a loop over blocks
of its inputs, in which these are computed likewise; so an activation needs no memory between two
layers if what it takes to make it again is little. What is in memory is in the evaluation's record:
[B, padded width] of each value that a gradient needs or that is needed as a whole.

Padding is 0 in memory, in factors of products and in what is added up; in registers it may be
anything.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

from anode_fast.kernels import program as programs
from anode_fast.kernels.gpu import activations
from anode_fast.kernels.program import BINARY, STATE, TIME, UNARY, Instruction, Program

LEAST = 16
"""Rows and columns that matrix products take."""


class Generated(NamedTuple):
    """A program as kernels are compiled for it.

    Attributes:
        dim: Width of the state.
        precision: Of matrix products: "ieee", "tf32x3" or "tf32".
        D: Width of the state in a tile.
        N, K: Features of a wide value that are computed, and that are summed over, at a time.
        numbers: In a record, for each row.
        weights: Numbers in all tensors.
    """

    dim: int
    precision: str
    D: int
    N: int
    K: int
    numbers: int
    weights: int

    def record_size(self, rows: int) -> int:
        """Numbers in a record of that many rows."""
        return rows * self.numbers


def has_products(program: Program) -> bool:
    """Whether there are matrices, and tiles as wide as their products take."""
    return any(x.op in ("linear", "linear_t") for x in program.code)


def padded(width: int, program: Program) -> int:
    """Width of a value in tiles and in memory."""
    least = LEAST if has_products(program) else 2
    return max(least, 1 << (width - 1).bit_length())


def generated(program: Program, precision: str, N: int, K: int) -> Generated:
    """The program as kernels are compiled for it."""
    _, numbers = source(program, N, K)
    weights = sum(map(_size, program.shapes))
    D = padded(program.dim, program)
    return Generated(program.dim, precision, D, N, K, numbers, weights)


@functools.lru_cache(maxsize=256)
def load(program: Program, N: int, K: int) -> ModuleType:
    """The module with the program's functions.

    Triton reads a function's source, and names kernels by their constants' modules: equal programs
    have equal modules in every process, and others have others.
    """
    text, _ = source(program, N, K)
    name = f"{__name__}.field_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(name, "Functions of a program.")
    exec(compile(text, file, "exec"), module.__dict__)
    return module


@functools.lru_cache(maxsize=256)
def source(program: Program, N: int, K: int) -> tuple[str, int]:
    """The text of a program's functions, and the numbers in a record for each row.

    Args:
        program: The field.
        N, K: Features of a wide value that are computed, and that are summed over, at a time.
    """
    graph = _Graph(program)
    layout = _Layout(graph)
    texts = [
        _HEADER,
        _evaluation(graph, layout, N, K, keep=False),
        _evaluation(graph, layout, N, K, keep=True),
        _EVALUATE,
        _product(graph, layout, N, K),
        _time_gradient(graph, layout, N, K),
        _accumulation(graph, layout),
    ]
    return "\n\n".join(texts), layout.numbers


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


# --- what is to be computed -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    """An instruction; of a linear map only the outputs from `start` on."""

    op: str
    inputs: tuple[int, ...] = ()
    width: int = 1
    parameters: tuple[int, ...] = ()
    number: float = 0.0
    start: int = 0


_LINEAR = ("linear", "linear_t")
_MOVES = ("slice", "join", "place")
_SLOPES = {"d_softplus": "softplus", "d_elu": "elu"}
"""Derivatives that are simpler to make of the function's value."""


class _Graph:
    """A program and its vector-Jacobian product, simplified, and what each part needs.

    Attributes:
        nodes: Of all values.
        result, state, time: Values: dy/dt, and the cotangents of state and time.
        sums: Of the tensors' gradients: tensor, rows, columns.
        kept: Values of the program that its product takes from the record.
        handed: Values of the product that the gradients of time and tensors take from there.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        product = programs.differentiate(program)
        first = [_Node("time"), _Node("state", width=program.dim)]
        self.nodes = [*first, *map(_node, (*program.code, *product.code))]
        self.result, self.state, self.time = program.result, product.state, product.time
        self.sums = [(s.parameter, s.left, s.right) for s in product.sums]
        self._simplify()
        of_state = self.reached([] if self.state is None else [self.state])
        of_sums = self.reached(self.summed())
        of_time = self.reached([] if self.time is None else [self.time])
        before = of_state | of_sums | {self.result + 1}
        boundary = {i for v in of_time - before for i in self.inputs(v) if i in before}
        if self.time in before and self.time is not None:
            boundary.add(self.time)
        needed = {*self.summed()}
        needed |= {i for v in before | of_time if v > self.result for i in self.inputs(v)}
        self.kept = {v for i in needed if i <= self.result for v in self._sources(i)}
        self.kept |= {v for v in self.summed() if v <= self.result}
        self.handed = {v for v in (*self.summed(), *boundary) if v > self.result}

    def _simplify(self) -> None:
        nodes = self.nodes
        values = {(x.op, x.inputs, x.number): v for v, x in enumerate(nodes)}
        users: dict[int, list[int]] = {}
        for v, x in enumerate(nodes):
            for i in x.inputs:
                users.setdefault(i, []).append(v)
        whole = {self.result, self.state, self.time}
        whole |= {i for _, *pair in self.sums for i in pair}
        for v, x in enumerate(nodes):
            if x.op in _SLOPES and not (x.op == "d_elu" and x.number <= 0):
                if value := values.get((_SLOPES[x.op], x.inputs, x.number)):
                    nodes[v] = replace(x, op="slope_" + _SLOPES[x.op], inputs=(value,))
            if x.op == "slice" and nodes[x.inputs[0]].op in _LINEAR:
                mapped = x.inputs[0]
                others = [u for u in users[mapped] if nodes[u].op not in ("slice", *_LINEAR)]
                if mapped not in whole and not others:
                    start = nodes[mapped].start + int(x.number)
                    nodes[v] = replace(nodes[mapped], width=x.width, start=start)

    def reached(self, values: Iterable[int], known: Iterable[int] = ()) -> set[int]:
        """The values, and what they are made of, down to what is known."""
        found: set[int] = set()
        todo = list(values)
        while todo:
            v = todo.pop()
            if v not in found:
                found.add(v)
                if v not in known:
                    todo += self.inputs(v)
        return found

    def inputs(self, v: int) -> tuple[int, ...]:
        """What a value is made of; of joined values that a linear map takes, the parts."""
        x = self.nodes[v]
        return tuple(i for _, i in self.parts(x.inputs[0])) if x.op in _LINEAR else x.inputs

    def summed(self) -> list[int]:
        """What sums are made of; joined values apart."""
        whole = [i for _, *pair in self.sums for i in pair if i is not None]
        return [v for i in whole for _, v in self.parts(i)]

    def parts(self, v: int) -> Iterator[tuple[int, int]]:
        """Of joined values the place of each, and itself."""
        x = self.nodes[v]
        if x.op != "join":
            yield 0, v
            return
        start = 0
        for i in x.inputs:
            yield from ((start + place, part) for place, part in self.parts(i))
            start += self.nodes[i].width

    def _sources(self, v: int) -> Iterator[int]:
        """What a value is cheaply made of."""
        x = self.nodes[v]
        if x.op == "spread":
            yield from self._sources(x.inputs[0])
        elif x.op not in ("constant", "parameter"):
            yield v

    def padded(self, v: int) -> int:
        width = self.nodes[v].width
        return 1 if width == 1 else padded(width, self.program)


def _node(x: Instruction) -> _Node:
    return _Node(x.op, x.inputs, x.width, x.parameters, x.number)


class _Layout:
    """Where values are in a record, in numbers for each row."""

    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        self._places: dict[int, int] = {}
        self.numbers = 0

    def __getitem__(self, v: int) -> int:
        if v not in self._places:
            self._places[v] = self.numbers
            self.numbers += self._graph.padded(v)
        return self._places[v]


# --- text of one function -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """A name for numbers in registers: [B, block], or what stands for that by broadcasting.

    Attributes:
        is_whole: Whether it is no such substitute.
        is_clean: Whether padding is 0.
    """

    name: str
    is_whole: bool = True
    is_clean: bool = False


@dataclass(frozen=True)
class _Index:
    """Features of a block: the vector of their numbers, and how many.

    `is_all`: each feature comes once while the function runs.
    """

    name: str
    size: int
    is_all: bool


_FUNCTIONS = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sign": "functions.sign({0})",
    "reciprocal": "1.0 / {0}",
    "sqrt": "tl.sqrt({0})",
    "exp": "functions.exp({0})",
    "expm1": "functions.expm1({0})",
    "log": "functions.log({0})",
    "log1p": "functions.log1p({0})",
    "sin": "functions.sin({0})",
    "cos": "functions.cos({0})",
    "elu": "functions.elu({0}, {number})",
    "d_elu": "functions.elu_slope({0}, {number})",
    "slope_elu": "tl.where({0} > 0.0, 1.0, {0} + {number})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "gt": "({0} > {1}).to(T)",
    "ge": "({0} >= {1}).to(T)",
    "select": "tl.where({0} != 0.0, {1}, {2})",
}
for _name in ("relu", "softplus", "tanh", "sigmoid", "silu", "gelu"):
    _number = getattr(activations, _name.upper()).value
    _FUNCTIONS[_name] = f"activations.activate({{0}}, {_number})"
    _FUNCTIONS[f"slope_{_name}"] = f"activations.derivative({{0}}, {_number})"
    _FUNCTIONS[f"d_{_name}"] = (
        f"activations.derivative(activations.keep({{0}}, {_number}), {_number})"
    )

_CHEAP = ("neg", "abs", "sign", "relu", "slope_elu", *BINARY, "select", *_MOVES, "spread")
_KEEP_0 = ("neg", "abs", "sign", "sqrt", "expm1", "log1p", "sin", "tanh", "relu", "silu", "gelu")
"""Functions that cost little, and functions that are 0 at 0."""

_COSTLY, _LOOP = 4, 100


class _Body:
    """Writes the statements of a function.

    Args:
        graph, layout: Of the program.
        N, K: As for `source`.
        given: Tiles of values that are arguments.
        memory: Values that are in the record already.
        goals: Values that are to be there in the end, in registers.
        keep: Values that are to be in the record in the end.
    """

    def __init__(
        self,
        graph: _Graph,
        layout: _Layout,
        N: int,
        K: int,
        given: dict[int, _Tile],
        memory: Iterable[int],
        goals: Iterable[int],
        keep: Iterable[int],
    ) -> None:
        self.graph, self.nodes, self.layout = graph, graph.nodes, layout
        self.N, self.K = N, K
        self.lines: list[str] = []
        self._indent, self._names = 1, 0
        self._tiles: list[dict[tuple[int, str], _Tile]] = [{}]
        self._hand = dict(given)
        self._memory = set(memory)
        self._dirty = set(memory)  # what other threads may not have written yet
        self._written: set[int] = set()  # by the present loop
        self._ranges: set[int] = set()
        D = padded(graph.program.dim, graph.program)
        widest = max(map(graph.padded, range(len(self.nodes))))
        self.most = max(D, LEAST) if has_products(graph.program) else widest
        self.keep = set(keep)
        needed = graph.reached([*goals, *keep], known=self._memory | set(given))
        self._save = self._saved(sorted(needed))
        for v in sorted(needed - self._memory):
            if self._is_narrow(v):
                self.top(v)
        for v in sorted(self._save - self._memory):
            self._cover(v)

    # --- names and lines

    def line(self, text: str) -> None:
        self.lines.append("    " * self._indent + text)

    def _new(self, text: str, start: str = "v") -> str:
        self._names += 1
        name = f"{start}{self._names}"
        self.line(f"{name} = {text}")
        return name

    @contextmanager
    def _loop(self, extent: int, block: int, is_all: bool) -> Iterator[_Index]:
        self._names += 1
        start, name = f"n{self._names}", f"j{self._names}"
        self.line(f"for {start} in range(0, {extent}, {block}):")
        self._indent += 1
        self._tiles.append({})
        self.line(f"{name} = {start} + tl.arange(0, {block})")
        yield _Index(name, block, is_all)
        self._tiles.pop()
        self._indent -= 1
        if self._indent == 1:
            self._memory |= self._written
            self._dirty |= self._written
            self._written.clear()

    def _all_of(self, v: int) -> _Index:
        """The index of a whole tile."""
        size = self.graph.padded(v)
        self._ranges.add(size)
        return _Index(f"c{size}", size, True)

    def _is_narrow(self, v: int) -> bool:
        return self.graph.padded(v) <= self.most

    # --- what is saved

    def _saved(self, needed: Sequence[int]) -> set[int]:
        """Values that are to be in the record: those kept, and those needed as a whole.

        Of what is left, a wide value that several loops need, or one loop again and again, is saved
        unless it costs little to make it again.
        """
        nodes = self.nodes
        save = set(self.keep)
        for v in needed:
            if v not in self._memory:
                save.update(self._needs_whole(v))
        cost: dict[int, int] = {}
        for v in needed:
            x = nodes[v]
            if self._is_narrow(v) or v in self._memory or v in save:
                cost[v] = 1
                continue
            inputs = self.graph.inputs(v)
            cost[v] = sum(cost.get(i, 1) for i in inputs) + 1
            if x.op in UNARY and x.op not in _CHEAP:
                cost[v] += _COSTLY
            if x.op in _LINEAR:
                cost[v] += 2 * _COSTLY if all(map(self._is_narrow, inputs)) else _LOOP
        loops: dict[int, set[tuple[int, bool]]] = {v: set() for v in needed}
        for v in reversed(needed):
            x = nodes[v]
            if v in self._memory:
                continue
            if not self._is_narrow(v) and v not in save:
                repeated = any(again for _, again in loops[v])
                if (len(loops[v]) > 1 and cost[v] > _COSTLY) or (repeated and cost[v] >= _LOOP):
                    save.add(v)
            of_inputs = {(v, False)}
            if not self._is_narrow(v):
                if x.op in _LINEAR:
                    of_inputs = {(v, self.graph.padded(v) > self.N)}
                elif v not in save:
                    of_inputs = loops[v]
            for i in self.graph.inputs(v):
                loops.setdefault(i, set()).update(of_inputs)
        return save - self._memory

    def _needs_whole(self, v: int) -> Iterator[int]:
        """What a value needs to be in memory, for it moves features."""
        x = self.nodes[v]
        if x.op == "slice":
            (i,) = x.inputs
            if not self._slices_in_registers(v) and self.nodes[i].width > 1:
                yield i
        elif x.op in ("join", "place"):
            for start, i in self._moved(v):
                if not self._moves_in_registers(v, start, i):
                    yield i

    def _moved(self, v: int) -> Iterator[tuple[int, int]]:
        """Of a join or place the parts, with their places."""
        x = self.nodes[v]
        start = int(x.number) if x.op == "place" else 0
        for i in x.inputs:
            yield start, i
            start += self.nodes[i].width

    def _slices_in_registers(self, v: int) -> bool:
        x, (i,) = self.nodes[v], self.nodes[v].inputs
        same = int(x.number) == 0 and self.graph.padded(v) == self.graph.padded(i)
        return self._is_narrow(i) and (x.width == 1 or same)

    def _moves_in_registers(self, v: int, start: int, i: int) -> bool:
        if self.nodes[i].width == 1:
            return True
        same = start == 0 and self.graph.padded(v) == self.graph.padded(i)
        return same and self._is_narrow(v)

    # --- memory

    def _at(self, v: int, index: str, shift: int = 0) -> str:
        """Pointers to features of a value in the record."""
        place, P = self.layout[v], self.graph.padded(v)
        if P == 1:
            return f"record + {place} * B + r"
        moved = f" + {shift}" if shift > 0 else f" - {-shift}" if shift < 0 else ""
        return f"record + {place} * B + r * {P} + {index}[None, :]{moved}"

    def _store(self, v: int, tile: _Tile, index: _Index) -> None:
        tile = self._clean(v, tile, index)
        self.line(f"tl.store({self._at(v, index.name)}, {tile.name})")
        self._memory.add(v)
        self._dirty.add(v)

    def _wait(self, read: set[int]) -> None:
        """Other threads' writing of what is read."""
        if read & self._dirty:
            self.line("tl.debug_barrier()")
            self._dirty.clear()

    def _prepare_inputs(self, v: int, read: set[int]) -> None:
        """Before a narrow value."""
        whole = set(self._needs_whole(v))
        for i in self.graph.inputs(v):
            if i in whole:
                self._save_whole(i)
                read.add(i)
            else:
                self._prepare(i, True, read)

    def _prepare(self, v: int, is_all: bool, read: set[int]) -> None:
        """Before a loop: whatever a wide value is made of and the loop itself does not make."""
        x = self.nodes[v]
        if v in self._hand:
            return
        if v in self._memory and not self._is_narrow(v):
            read.add(v)
        elif self._is_narrow(v):
            self.top(v)
        elif v in self._save and not is_all:
            self._cover(v)
            read.add(v)
        elif x.op in _MOVES:
            whole = set(self._needs_whole(v))
            for i in x.inputs:
                if i in whole:
                    self._save_whole(i)
                    read.add(i)
                else:
                    self._prepare(i, is_all, read)
        elif x.op in _LINEAR:
            for i in self.graph.inputs(v):
                self._prepare(i, False, read)
        else:
            for i in x.inputs:
                self._prepare(i, is_all, read)

    def _save_whole(self, v: int) -> None:
        if v not in self._memory:
            if self._is_narrow(v):
                self.top(v)
                if v not in self._memory:
                    self._store(v, self._hand[v], self._all_of(v))
            else:
                self._cover(v)

    def _cover(self, v: int) -> None:
        """A loop that saves a wide value."""
        if v in self._memory:
            return
        read: set[int] = set()
        self._prepare(v, True, read)
        if v in self._memory:
            return
        self._wait(read)
        P = self.graph.padded(v)
        with self._loop(P, min(self.N, P), True) as index:
            self._tile(v, index)

    # --- values

    def top(self, v: int) -> _Tile:
        """A narrow value, whole, in registers."""
        if v not in self._hand:
            index = self._all_of(v)
            if v in self._memory:
                self._wait({v})
                tile = _Tile(self._new(f"tl.load({self._at(v, index.name)})"), True, True)
            else:
                read: set[int] = set()
                self._prepare_inputs(v, read)
                self._wait(read)
                tile = self._computed(v, index)
            self._hand[v] = tile
        if v in self._save and v not in self._memory:
            self._store(v, self._hand[v], self._all_of(v))
        return self._hand[v]

    def _tile(self, v: int, index: _Index) -> _Tile:
        """A block of a wide value, or a column."""
        if self.nodes[v].width == 1 or (self._is_narrow(v) and index == self._all_of(v)):
            return self.top(v)
        key = (v, index.name)
        for tiles in self._tiles:
            if key in tiles:
                return tiles[key]
        if v in self._memory:
            tile = _Tile(self._new(f"tl.load({self._at(v, index.name)})"), True, True)
        else:
            tile = self._computed(v, index)
            if v in self._save and index.is_all:
                tile = self._clean(v, tile, index)
                self._tiles[-1][key] = tile
                self.line(f"tl.store({self._at(v, index.name)}, {tile.name})")
                self._written.add(v)
        self._tiles[-1][key] = tile
        return tile

    def _computed(self, v: int, index: _Index) -> _Tile:
        x = self.nodes[v]
        if x.op == "constant":
            text = f'float("{x.number}")' if abs(x.number) == float("inf") else repr(x.number)
            text = 'float("nan")' if x.number != x.number else text
            return _Tile(self._new(f"tl.full([1, 1], {text}, T)"), False, x.number == 0)
        if x.op == "parameter":
            at = f"weights[{x.parameters[0]}] + "
            if x.width == 1:
                return _Tile(self._new(f"tl.load({at}tl.zeros([1, 1], tl.int32))"), False)
            mask = self._mask(v, index)
            text = f"tl.load({at}{index.name}{_masked(mask)})[None, :]"
            return _Tile(self._new(text), False, True)
        if x.op == "spread":
            return replace(self._tile(x.inputs[0], index), is_whole=False, is_clean=False)
        if x.op in _LINEAR:
            return self._linear(v, index)
        if x.op == "total":
            return self._total(v)
        if x.op in _MOVES:
            return self._sliced(v, index) if x.op == "slice" else self._joined(v, index)
        return self._elementwise(v, index)

    def _elementwise(self, v: int, index: _Index) -> _Tile:
        x = self.nodes[v]
        tiles = [self._tile(i, index) for i in x.inputs]
        alike = [self.nodes[i].width == x.width for i in x.inputs]
        if x.op == "select":
            tiles = [self._whole(tile, index) for tile in tiles]
        names = [tile.name for tile in tiles]
        if x.op == "pow":
            text = _power(names[0], x.number)
        else:
            text = _FUNCTIONS[x.op].format(*names, number=x.number)
        zeros = [tile.is_clean and same for tile, same in zip(tiles, alike, strict=True)]
        is_clean = (
            (x.op in _KEEP_0 and zeros[0])
            or (x.op == "pow" and x.number > 0 and zeros[0])
            or (x.op in ("add", "sub") and all(zeros))
            or (x.op == "select" and all(zeros[1:]))
        )
        is_whole = any(t.is_whole and same for t, same in zip(tiles, alike, strict=True))
        return _Tile(self._new(text), is_whole or x.op == "select", is_clean)

    def _mask(self, v: int, index: _Index) -> str:
        """Which features of a block there are; "" if all."""
        width = self.nodes[v].width
        return "" if width == self.graph.padded(v) else f"({index.name} < {width})"

    def _clean(self, v: int, tile: _Tile, index: _Index) -> _Tile:
        mask = self._mask(v, index)
        if tile.is_clean or not mask:
            return tile
        name = self._new(f"tl.where({mask}[None, :], {tile.name}, 0.0)")
        return replace(tile, name=name, is_clean=True)

    def _whole(self, tile: _Tile, index: _Index) -> _Tile:
        if tile.is_whole:
            return tile
        return _Tile(
            self._new(f"tl.broadcast_to({tile.name}, [B, {index.size}])"), True, tile.is_clean
        )

    def factor(self, v: int, index: _Index) -> str:
        """A block of a value with padding that is 0."""
        return self._whole(self._clean(v, self._tile(v, index), index), index).name

    # --- sums over features

    def _block_loop(self, v: int) -> tuple[int, int, bool]:
        """Of a loop over a wide value: how far, how many at a time, whether each comes once."""
        P, is_top = self.graph.padded(v), self._indent == 1
        return P, min(P, self.N if is_top and self._has_loop(v) else self.K), is_top

    def _has_loop(self, v: int) -> bool:
        x = self.nodes[v]
        if v in self._memory or self._is_narrow(v):
            return False
        inputs = self.graph.inputs(v)
        if x.op in _LINEAR:
            return not all(map(self._is_narrow, inputs))
        return any(map(self._has_loop, inputs))

    def _total(self, v: int) -> _Tile:
        (i,) = self.nodes[v].inputs
        if self.nodes[i].width == 1:
            return self.top(i)
        if self._is_narrow(i):
            return _Tile(self._new(f"tl.sum({self.factor(i, self._all_of(i))}, 1)[:, None]"))
        total = self._new("tl.zeros([B, 1], T)", "a")
        with self._loop(*self._block_loop(i)) as index:
            self.line(f"{total} += tl.sum({self.factor(i, index)}, 1)[:, None]")
        return _Tile(total)

    def _linear(self, v: int, index: _Index) -> _Tile:
        x = self.nodes[v]
        is_column = x.width == 1
        outputs = f"({index.name} + {x.start})" if x.start else index.name
        mask = self._mask(v, index)
        text = f"tl.zeros([B, {index.size}], T)"
        if len(x.parameters) > 1:
            at = f"weights[{x.parameters[1]}] + "
            if is_column:
                text += f" + tl.load({at}{x.start})"
            else:
                text += f" + tl.load({at}{outputs}{_masked(mask)})[None, :]"
        total = self._new(text, "a")
        if is_column:
            outputs, mask = str(x.start), ""
        parts = sorted(self.graph.parts(x.inputs[0]), key=lambda part: self._rank(part[1]))
        for start, i in parts:
            if self.nodes[i].width == 1:
                weight = self._weight(x, outputs, mask, str(start), "")
                weight += "" if is_column else "[None, :]"
                self.line(f"{total} += {self._tile(i, index).name} * {weight}")
            elif self._is_narrow(i):
                self._add_product(total, v, i, self._all_of(i), start, outputs, mask)
            else:
                with self._loop(*self._block_loop(i)) as inner:
                    self._add_product(total, v, i, inner, start, outputs, mask)
        return _Tile(total, True, True)

    def _rank(self, v: int) -> int:
        """Single numbers first, what takes loops last."""
        return 0 if self.nodes[v].width == 1 else 1 if self._is_narrow(v) else 2

    def _add_product(
        self, total: str, v: int, i: int, index: _Index, start: int, outputs: str, mask: str
    ) -> None:
        """Adds the product of a block of value i, whose inputs begin at `start`, with weights."""
        factor = self.factor(i, index)
        inputs = f"({index.name} + {start})" if start else index.name
        weight = self._weight(self.nodes[v], outputs, mask, inputs, self._mask(i, index))
        if self.nodes[v].width == 1:
            self.line(f"{total} += tl.sum({factor} * {weight}[None, :], 1)[:, None]")
        else:
            weight = self._new(weight, "w")
            call = f"products.product_in({factor}, {weight}, {total}, PRECISION)"
            self.line(f"{total} = {call}")

    def _weight(self, x: _Node, outputs: str, out_mask: str, inputs: str, in_mask: str) -> str:
        """Loads weights, [inputs, outputs]; where one of these is a number, a vector."""
        apart = self.graph.program.shapes[x.parameters[0]][1]
        is_block = not (outputs.isdigit() or inputs.isdigit())
        if is_block:
            outputs, inputs = f"{outputs}[None, :]", f"{inputs}[:, None]"
            out_mask = out_mask and f"{out_mask}[None, :]"
            in_mask = in_mask and f"{in_mask}[:, None]"
        rows, columns = (outputs, inputs) if x.op == "linear" else (inputs, outputs)
        at = f"weights[{x.parameters[0]}] + {rows} * {apart} + {columns}"
        mask = " & ".join(filter(None, (out_mask, in_mask)))
        return f"tl.load({at}{_masked(mask)})"

    # --- values whose features come from other places

    def _sliced(self, v: int, index: _Index) -> _Tile:
        x, (i,) = self.nodes[v], self.nodes[v].inputs
        start = int(x.number)
        if self.nodes[i].width == 1:
            return self.top(i)
        if self._slices_in_registers(v):
            whole = self._all_of(i)
            if x.width > 1:
                mask = self._mask(v, index) or f"({index.name} < {x.width})"
                source = self.top(i)
                text = f"tl.where({mask}[None, :], {source.name}, 0.0)"
                return _Tile(self._new(text), source.is_whole, True)
            source = self._whole(self.top(i), whole)
            picked = f"tl.where(({whole.name} == {start})[None, :], {source.name}, 0.0)"
            return _Tile(self._new(f"tl.sum({picked}, 1)[:, None]"))
        if x.width == 1:
            at = f"record + {self.layout[i]} * B + r * {self.graph.padded(i)} + {start}"
            return _Tile(self._new(f"tl.load({at})"))
        mask = self._mask(v, index)
        at = self._at(i, index.name, start)
        return _Tile(self._new(f"tl.load({at}{_masked(mask and f'{mask}[None, :]')})"), True, True)

    def _joined(self, v: int, index: _Index) -> _Tile:
        if self.nodes[v].width == 1:
            return self.top(self.nodes[v].inputs[0])
        name, is_whole = "0.0", False
        for start, i in self._moved(v):
            width = self.nodes[i].width
            if width == 1:
                tile, inside = self._tile(i, index), f"({index.name} == {start})[None, :]"
            elif self._moves_in_registers(v, start, i):
                tile, inside = self._tile(i, index), f"({index.name} < {width})[None, :]"
            else:
                inside = f"(({index.name} >= {start}) & ({index.name} < {start + width}))[None, :]"
                at = self._at(i, index.name, -start)
                tile = _Tile(self._new(f"tl.load({at}{_masked(inside)})"))
            name = self._new(f"tl.where({inside}, {tile.name}, {name})")
            is_whole |= tile.is_whole
        return _Tile(name, is_whole, True)

    # --- the function

    def finished(self) -> list[str]:
        """Its statements."""
        ranges = [f"    c{size} = tl.arange(0, {size})" for size in sorted(self._ranges)]
        return [*ranges, *self.lines]

    def returned(self, v: int) -> None:
        """Returns a value of the state's width as a tile of the state."""
        D = padded(self.graph.program.dim, self.graph.program)
        index = _Index(f"c{D}", D, True)
        self._ranges.add(D)
        if self.nodes[v].width == 1:
            column = self._whole(self.top(v), replace(index, size=1)).name
            self.line(f"return tl.where(({index.name} == 0)[None, :], {column}, 0.0)")
        else:
            self.line(f"return {self.factor(v, index)}")


def _masked(mask: str) -> str:
    return f", mask={mask}, other=0.0" if mask else ""


def _power(name: str, number: float) -> str:
    if number == 0.5:
        return f"tl.sqrt({name})"
    if number == 0:
        return f"tl.full({name}.shape, 1.0, T)"
    if number == int(number) and abs(number) <= 64:
        n = abs(int(number))
        text = f"functions.integer_power({name}, {n}, {n.bit_length()})"
        return text if number > 0 else f"1.0 / {text}"
    return f"functions.power({name}, tl.full([1, 1], {number!r}, tl.float64))"


# --- the four functions ---------------------------------------------------------------------------

_HEADER = '''"""Functions of a program; see generate.py and mlp.py."""

import triton
import triton.language as tl

from anode_fast.kernels.gpu import activations, functions, products


@triton.jit
def _add(pointer, value, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)'''

_EVALUATE = """@triton.jit
def evaluate(weights, record, t, y, F: tl.constexpr, B: tl.constexpr, KEEP: tl.constexpr):
    if KEEP:
        return _evaluate_and_keep(weights, record, t, y, F, B)
    else:
        return _evaluate(weights, record, t, y, F, B)"""


_PRECISION = "    PRECISION: tl.constexpr = F.precision"  # Triton 3.6 takes no attribute for it


def _state(graph: _Graph, v: int, name: str) -> tuple[list[str], _Tile]:
    """Statements that make of an argument, a tile of the state, the value; and the value."""
    if graph.nodes[v].width > 1:
        return [], _Tile(name, True, True)
    D = padded(1, graph.program)
    column = f"tl.sum(tl.where((tl.arange(0, {D}) == 0)[None, :], {name}, 0.0), 1)[:, None]"
    return [f"    column = {column}"], _Tile("column")


def _evaluation(graph: _Graph, layout: _Layout, N: int, K: int, keep: bool) -> str:
    lines, state = _state(graph, STATE, "y")
    given = {TIME: _Tile("time"), STATE: state}
    kept = graph.kept if keep else ()
    body = _Body(graph, layout, N, K, given, (), [graph.result], kept)
    body.returned(graph.result)
    name = "_evaluate_and_keep" if keep else "_evaluate"
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}(weights, record, t, y, F: tl.constexpr, B: tl.constexpr):",
            "    T: tl.constexpr = y.dtype",
            _PRECISION,
            "    r = tl.arange(0, B)[:, None]",
            "    time = t + tl.zeros([B, 1], T)",
            *lines,
            *body.finished(),
        ]
    )


def _product(graph: _Graph, layout: _Layout, N: int, K: int) -> str:
    first = graph.result + 1
    lines, cotangent = _state(graph, first, "cotangent")
    goals = [] if graph.state is None else [graph.state]
    body = _Body(graph, layout, N, K, {first: cotangent}, graph.kept, goals, graph.handed)
    if graph.state is None:
        body.line(f"return tl.zeros([B, {padded(graph.program.dim, graph.program)}], T)")
    else:
        body.returned(graph.state)
    return "\n".join(
        [
            "@triton.jit",
            "def vjp(weights, record, cotangent, F: tl.constexpr, B: tl.constexpr):",
            "    T: tl.constexpr = cotangent.dtype",
            _PRECISION,
            "    r = tl.arange(0, B)[:, None]",
            *lines,
            *body.finished(),
        ]
    )


def _time_gradient(graph: _Graph, layout: _Layout, N: int, K: int) -> str:
    lines = [
        "@triton.jit",
        "def time_gradient(weights, record, F: tl.constexpr, B: tl.constexpr):",
        "    T: tl.constexpr = record.dtype.element_ty",
        _PRECISION,
        "    r = tl.arange(0, B)[:, None]",
    ]
    if graph.time is None:
        return "\n".join([*lines, "    return tl.zeros([B], T)"])
    body = _Body(graph, layout, N, K, {}, graph.kept | graph.handed, [graph.time], ())
    name = body.top(graph.time).name
    body.line(f"return tl.sum({name} + tl.zeros([B, 1], T), 1)")
    return "\n".join([*lines, *body.finished()])


def _accumulation(graph: _Graph, layout: _Layout) -> str:
    lines = [
        "@triton.jit",
        "def accumulate(",
        "    sums, records, weight_ptr, first, last, rows,",
        "    F: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr,",
        "):",
        "    T: tl.constexpr = sums.dtype.element_ty",
        _PRECISION,
        "    r = tl.arange(0, B)[:, None]",
        "    inside = r < rows",
    ]
    offsets = [0]
    for shape in graph.program.shapes:
        offsets.append(offsets[-1] + _size(shape))
    met: set[int] = set()
    for p, left, right in sorted(graph.sums, key=lambda s: s[0]):
        if p in met or not met:
            lines.append("    tl.debug_barrier()")  # records are whole; or its other sums are
        met.add(p)
        for start, i in graph.parts(left):
            if right is None:
                lines += _vector_sum(graph, layout, i, None, f"sums + {offsets[p] + start}")
                continue
            columns = graph.program.shapes[p][1]
            for beside, j in graph.parts(right):
                at = f"sums + {offsets[p] + start * columns + beside}"
                if graph.nodes[j].width == 1:
                    lines += _vector_sum(graph, layout, i, j, at, columns)
                elif graph.nodes[i].width == 1:
                    lines += _vector_sum(graph, layout, j, i, at)
                else:
                    lines += _matrix_sum(graph, layout, i, j, at, columns)
    return "\n".join([*lines, "    tl.debug_barrier()"])  # before records are written again


def _block(graph: _Graph, layout: _Layout, v: int, index: str) -> str:
    """Loads a block of a value from the record; rows beyond the batch are 0."""
    P = graph.padded(v)
    at = f"record + {layout[v]} * B + r" + ("" if P == 1 else f" * {P} + {index}[None, :]")
    return f"tl.load({at}, mask=inside, other=0.0)"


def _vector_sum(
    graph: _Graph, layout: _Layout, v: int, column: int | None, at: str, apart: int = 1
) -> list[str]:
    """Adds sums over rows of value v, times the column if there is one."""
    P, width = graph.padded(v), graph.nodes[v].width
    block = min(P, 32)
    factors = [_block(graph, layout, v, "a"), "tl.load(weight_ptr + i)"]
    if column is not None:
        factors.append(_block(graph, layout, column, ""))
    return [
        f"    for n in range(0, {P}, {block}):",
        f"        a = n + tl.arange(0, {block})",
        f"        total = tl.zeros([{block}], T)",
        "        for i in range(first, last):",
        "            record = records + i * SIZE",
        f"            total += tl.sum({' * '.join(factors)}, 0)",
        f"        _add({at} + a * {apart}, total, a < {width})",
    ]


def _matrix_sum(
    graph: _Graph, layout: _Layout, left: int, right: int, at: str, apart: int
) -> list[str]:
    """Adds outer products of the rows of two values."""
    P, Q = graph.padded(left), graph.padded(right)
    return [
        f"    for n in range(0, {P}, {min(P, 32)}):",
        f"        a = n + tl.arange(0, {min(P, 32)})",
        f"        for k in range(0, {Q}, {min(Q, 32)}):",
        f"            b = k + tl.arange(0, {min(Q, 32)})",
        f"            place = {at} + a[:, None] * {apart} + b[None, :]",
        f"            mask = (a < {graph.nodes[left].width})[:, None]",
        f"            mask = mask & (b < {graph.nodes[right].width})[None, :]",
        "            total = tl.load(place, mask=mask, other=0.0)",
        "            for i in range(first, last):",
        "                record = records + i * SIZE",
        f"                x = {_block(graph, layout, left, 'a')} * tl.load(weight_ptr + i)",
        f"                y = {_block(graph, layout, right, 'b')}",
        "                total = products.product_in(tl.trans(x), y, total, PRECISION)",
        "            tl.store(place, total, mask=mask)",
    ]
