"""A vector field as a straight-line program: the form in which any field reaches the kernels.

A value is a block of `width` numbers for every row of the batch, and no value mixes rows. Value 0
is the time, value 1 the state; every instruction makes one value more, the last one is dy/dt. In a
binary instruction a value of width 1 serves every feature of the other.

`differentiate` turns a program into the one of its vector-Jacobian product, so that a backend need
only know how to execute instructions, forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIME, STATE = 0, 1
"""Numbers of the values that are there from the start."""

UNARY = (
    *("neg", "abs", "sign", "reciprocal", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos"),
    *("tanh", "sigmoid", "relu", "softplus", "silu", "gelu", "elu", "pow"),
    *("d_softplus", "d_silu", "d_gelu", "d_elu"),
)
"""Functions of one value, feature by feature. `elu` has alpha and `pow` the exponent in `number`,
the others are torch.nn.functional's with default arguments. d_* are derivatives."""

BINARY = ("add", "sub", "mul", "div", "gt", "ge")
"""Functions of two values. Comparisons give 1 or 0."""

OTHERS = (
    "constant",  # `number` in every row, width 1
    "parameter",  # a tensor with one number, or with one for each feature, in every row
    "linear",  # x @ weight^T (+ bias), weight [out, in]
    "linear_t",  # x @ weight (+ bias), weight [in, out]
    "slice",  # features from `number` on
    "join",  # features of one value after those of another
    "place",  # features from `number` on, zeros around them
    "total",  # sum over the features, width 1
    "spread",  # a value of width 1 for each of `width` features
    "select",  # the second value where the first is not 0, else the third
    "cotangent",  # of dy/dt; the first instruction of a vector-Jacobian product
)
OPS = (*UNARY, *BINARY, *OTHERS)
"""All instructions. A backend may number them by their place here."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: One of `OPS`.
        inputs: Numbers of the values it takes.
        width: Features of the value it makes.
        parameters: Numbers of the tensors it takes: of linear maps the weight, and the bias if
            there is one.
        number: See `UNARY` and `OTHERS`.
    """

    op: str
    inputs: tuple[int, ...] = ()
    width: int = 1
    parameters: tuple[int, ...] = ()
    number: float = 0.0


@dataclass(frozen=True)
class Program:
    """A field.

    Attributes:
        dim: Width of the state.
        shapes: Of the tensors that its instructions take: [out, in] or [in, out] of weights, (n,)
            of vectors, (1,) or () of numbers.
        code: Instructions, at least one. The first makes value 2, the last dy/dt.

    Raises:
        ValueError: An instruction that takes what is not there or does not fit.
    """

    dim: int
    shapes: tuple[tuple[int, ...], ...]
    code: tuple[Instruction, ...]

    def __post_init__(self) -> None:
        if not self.code or self.dim < 1:
            raise ValueError("a program needs an instruction and a state of at least one feature")
        _check(self.code, [1, self.dim], self.shapes)
        if self.code[-1].width != self.dim:
            raise ValueError(f"dy/dt has {self.code[-1].width} features, the state {self.dim}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of every value, time and state included."""
        return (1, self.dim, *(x.width for x in self.code))

    @property
    def result(self) -> int:
        """Number of the value that is dy/dt."""
        return len(self.code) + 1


@dataclass(frozen=True)
class Sum:
    """A part of a tensor's gradient: the sum over rows of left, or of left times right.

    Attributes:
        parameter: Number of the tensor.
        left: Value that is summed; of a matrix's gradient the rows.
        right: Of a matrix's gradient the columns; None for a vector or a number.
    """

    parameter: int
    left: int
    right: int | None = None


@dataclass(frozen=True)
class Product:
    """The vector-Jacobian product of a program.

    Attributes:
        code: Instructions; their values are numbered on from the program's. The first is the
            cotangent of dy/dt.
        state, time: Values that are the cotangents of state and time; None where they are zero.
        sums: Parts of the tensors' gradients. A tensor may have several, or none.
        kept: Values of the program that code and sums take, in order.
    """

    code: tuple[Instruction, ...]
    state: int | None
    time: int | None
    sums: tuple[Sum, ...]
    kept: tuple[int, ...]


def _check(
    code: Sequence[Instruction], widths: list[int], shapes: Sequence[tuple[int, ...]]
) -> None:
    for x in code:
        if x.op not in OPS or any(not 0 <= i < len(widths) for i in x.inputs):
            raise ValueError(f"{x} takes a value that is not there yet, or is none of {OPS}")
        if any(not 0 <= p < len(shapes) for p in x.parameters):
            raise ValueError(f"{x} takes a tensor that is not there")
        if not _fits(x, [widths[i] for i in x.inputs], [shapes[p] for p in x.parameters]):
            raise ValueError(f"{x} does not fit widths {widths} and shapes {tuple(shapes)}")
        widths.append(x.width)


def _fits(x: Instruction, given: list[int], shapes: list[tuple[int, ...]]) -> bool:
    width = x.width
    if x.op in UNARY:
        return given == [width]
    if x.op in BINARY:
        return len(given) == 2 and set(given) <= {1, width} and max(given) == width
    if x.op in ("linear", "linear_t"):
        sizes = (width, *given) if x.op == "linear" else (*given, width)
        return len(given) == 1 and shapes in ([sizes], [sizes, (width,)])
    if x.op == "parameter":
        return given == [] and shapes in ([(width,)], *([[()]] if width == 1 else []))
    start = int(x.number) if x.op in ("slice", "place") else 0
    return {
        "constant": given == [] and width == 1,
        "slice": len(given) == 1 and 0 <= start <= start + width <= sum(given),
        "join": len(given) >= 1 and sum(given) == width,
        "place": len(given) == 1 and 0 <= start <= start + sum(given) <= width,
        "total": len(given) == 1 and width == 1,
        "spread": given == [1],
        "select": len(given) == 3 and set(given) <= {1, width} and max(given) == width,
        "cotangent": given == [],
    }[x.op]


# --- the vector-Jacobian product ------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def differentiate(program: Program) -> Product:
    """The program's vector-Jacobian product, by reverse accumulation.

    (Griewank, Walther, Evaluating Derivatives, 2nd ed., SIAM 2008, section 3.2.)
    """
    return _Reverse(program).product()


class _Reverse:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.widths = list(program.widths)
        self.code: list[Instruction] = []
        self.sums: list[Sum] = []
        self.cotangents: dict[int, int] = {}

    def product(self) -> Product:
        program = self.program
        self._add(program.result, self._emit("cotangent", (), program.dim))
        for value in range(program.result, STATE, -1):
            if value in self.cotangents:
                self._step(program.code[value - 2], value, self.cotangents[value])
        state, time = self.cotangents.get(STATE), self.cotangents.get(TIME)
        code, state, time, sums = self._without_unused(state, time)
        taken = {i for x in code for i in x.inputs} | {
            i for s in sums for i in (s.left, s.right) if i is not None
        }
        kept = tuple(sorted(i for i in taken if i <= program.result))
        return Product(code, state, time, sums, kept)

    def _emit(
        self,
        op: str,
        inputs: tuple[int, ...],
        width: int = 0,
        parameters: tuple[int, ...] = (),
        number: float = 0.0,
    ) -> int:
        width = width or max(self.widths[i] for i in inputs)
        self.code.append(Instruction(op, inputs, width, parameters, number))
        self.widths.append(width)
        return len(self.widths) - 1

    def _number(self, number: float) -> int:
        return self._emit("constant", (), 1, (), number)

    def _add(self, value: int, part: int) -> None:
        """Adds to the cotangent of a value a part as wide as what it was used for."""
        if self.widths[value] == 1 < self.widths[part]:
            part = self._emit("total", (part,), 1)
        elif self.widths[part] == 1 < self.widths[value]:
            part = self._emit("spread", (part,), self.widths[value])
        before = self.cotangents.get(value)
        self.cotangents[value] = part if before is None else self._emit("add", (before, part))

    def _step(self, x: Instruction, value: int, g: int) -> None:
        """Hands the cotangent g of a value on to what the value was made of."""
        emit = self._emit
        if x.op in UNARY:
            self._add(x.inputs[0], self._through(x, value, g))
        elif x.op in ("add", "sub"):
            a, b = x.inputs
            self._add(a, g)
            self._add(b, emit("neg", (g,)) if x.op == "sub" else g)
        elif x.op == "mul":
            a, b = x.inputs
            self._add(a, emit("mul", (g, b)))
            self._add(b, emit("mul", (g, a)))
        elif x.op == "div":
            a, b = x.inputs
            share = emit("div", (g, b))
            self._add(a, share)
            self._add(b, emit("neg", (emit("mul", (share, value)),)))
        elif x.op in ("linear", "linear_t"):
            (a,), weight = x.inputs, x.parameters[0]
            back = "linear_t" if x.op == "linear" else "linear"
            self._add(a, emit(back, (g,), self.widths[a], (weight,)))
            self.sums.append(Sum(weight, g, a) if x.op == "linear" else Sum(weight, a, g))
            self.sums += [Sum(bias, g) for bias in x.parameters[1:]]
        elif x.op == "parameter":
            self.sums.append(Sum(x.parameters[0], g))
        elif x.op == "slice":
            (a,) = x.inputs
            self._add(a, emit("place", (g,), self.widths[a], (), x.number))
        elif x.op == "join":
            start = 0
            for a in x.inputs:
                self._add(a, emit("slice", (g,), self.widths[a], (), float(start)))
                start += self.widths[a]
        elif x.op == "place":
            (a,) = x.inputs
            self._add(a, emit("slice", (g,), self.widths[a], (), x.number))
        elif x.op == "total":
            self._add(x.inputs[0], g)
        elif x.op == "spread":
            self._add(x.inputs[0], g)
        elif x.op == "select":
            c, a, b = x.inputs
            zero = self._number(0.0)
            self._add(a, emit("select", (c, g, zero), x.width))
            self._add(b, emit("select", (c, zero, g), x.width))
        elif x.op not in ("constant", "gt", "ge"):
            raise NotImplementedError(x.op)

    def _through(self, x: Instruction, value: int, g: int) -> int:
        """The cotangent of a function's argument."""
        emit, (a,) = self._emit, x.inputs
        if x.op == "neg":
            return emit("neg", (g,))
        if x.op == "sqrt":
            return emit("div", (emit("mul", (g, self._number(0.5))), value))
        if x.op == "log":
            return emit("div", (g, a))
        if x.op == "log1p":
            return emit("div", (g, emit("add", (a, self._number(1.0)))))
        if x.op == "relu":
            # Not a product: where relu is 0, a cotangent that is not finite does not count.
            zero = self._number(0.0)
            return emit("select", (emit("gt", (value, zero)), g, zero))
        if x.op == "sign":
            return emit("mul", (g, self._number(0.0)))
        return emit("mul", (g, self._slope(x, value, a)))

    def _slope(self, x: Instruction, value: int, a: int) -> int:
        """The derivative of a function, from its argument a and its value."""
        emit = self._emit
        if x.op == "abs":
            return emit("sign", (a,))
        if x.op == "exp":
            return value
        if x.op == "expm1":
            return emit("add", (value, self._number(1.0)))
        if x.op == "sin":
            return emit("cos", (a,))
        if x.op == "cos":
            return emit("neg", (emit("sin", (a,)),))
        if x.op == "reciprocal":
            return emit("neg", (emit("mul", (value, value)),))
        if x.op == "tanh":
            return emit("sub", (self._number(1.0), emit("mul", (value, value))))
        if x.op == "sigmoid":
            return emit("mul", (value, emit("sub", (self._number(1.0), value))))
        if x.op == "pow":
            below = emit("pow", (a,), number=x.number - 1)
            return emit("mul", (below, self._number(x.number)))
        if x.op in ("softplus", "silu", "gelu", "elu"):
            return emit("d_" + x.op, (a,), number=x.number)
        raise NotImplementedError(f"the derivative of {x.op}")

    def _without_unused(
        self, state: int | None, time: int | None
    ) -> tuple[tuple[Instruction, ...], int | None, int | None, tuple[Sum, ...]]:
        """The code without what nobody takes, numbered anew."""
        first = self.program.result + 1
        used = {x for x in (state, time, first) if x is not None}
        used |= {i for s in self.sums for i in (s.left, s.right) if i is not None}
        for value in range(first + len(self.code) - 1, first - 1, -1):
            if value in used:
                used.update(self.code[value - first].inputs)
        new = {i: i for i in range(first)}
        code: list[Instruction] = []
        for value, x in enumerate(self.code, first):
            if value in used:
                new[value] = first + len(code)
                inputs = tuple(new[i] for i in x.inputs)
                code.append(Instruction(x.op, inputs, x.width, x.parameters, x.number))
        sums = tuple(
            Sum(s.parameter, new[s.left], None if s.right is None else new[s.right])
            for s in self.sums
        )
        renamed = [None if i is None else new[i] for i in (state, time)]
        return tuple(code), renamed[0], renamed[1], sums


# --- in PyTorch -----------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softplus": torch.ops.aten.softplus,
    "silu": torch.ops.aten.silu,
    "gelu": torch.ops.aten.gelu,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "gt": torch.gt,
    "ge": torch.ge,
}


def evaluate(program: Program, tensors: Sequence[Tensor], t: Tensor, y: Tensor) -> Tensor:
    """dy/dt by PyTorch's operations: what the kernels are compared with. Differentiable.

    Args:
        program: The field.
        tensors: Of the shapes that it names.
        t: Time, 0-d or [batch, 1].
        y: State, [batch, dim].

    Returns:
        Like y.
    """
    values = [t.reshape(-1, 1).expand(len(y), 1), y]
    _execute(program.code, values, tensors, None)
    return values[-1]


def vjp(
    program: Program, tensors: Sequence[Tensor], t: Tensor, y: Tensor, cotangent: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The vector-Jacobian product by `differentiate`: cotangents of y and t, tensors' gradients.

    Args:
        program, tensors, t, y: As in `evaluate`.
        cotangent: Of dy/dt, [batch, dim].

    Returns:
        Like y; [batch, 1]; like the tensors, zeros where there is no dependence.
    """
    product = differentiate(program)
    values = [t.reshape(-1, 1).expand(len(y), 1), y]
    _execute((*program.code, *product.code), values, tensors, cotangent)
    grads = [torch.zeros_like(x) for x in tensors]
    for s in product.sums:
        left = values[s.left]
        part = left.sum(0) if s.right is None else left.t() @ values[s.right]
        grads[s.parameter] += part.reshape(grads[s.parameter].shape)
    of_state = torch.zeros_like(y) if product.state is None else values[product.state]
    of_time = torch.zeros_like(y[:, :1]) if product.time is None else values[product.time]
    return of_state, of_time, grads


def _execute(
    code: Sequence[Instruction],
    values: list[Tensor],
    tensors: Sequence[Tensor],
    cotangent: Tensor | None,
) -> None:
    """Appends the value of every instruction, [batch, width]."""
    y = values[STATE]
    for x in code:
        inputs = [values[i] for i in x.inputs]
        given = [tensors[p] for p in x.parameters]
        values.append(_value(x, inputs, given, y, cotangent).expand(len(y), x.width))


def _value(
    x: Instruction,
    inputs: list[Tensor],
    given: list[Tensor],
    y: Tensor,
    cotangent: Tensor | None,
) -> Tensor:
    start = int(x.number) if x.op in ("slice", "place") else 0
    if x.op in _UNARY:
        return _UNARY[x.op](inputs[0])
    if x.op == "elu":
        elu: Tensor = torch.ops.aten.elu(inputs[0], x.number)
        return elu
    if x.op == "pow":
        return torch.pow(inputs[0], x.number)
    if x.op.startswith("d_"):
        return _derivative(x, inputs[0])
    if x.op in BINARY:
        return _BINARY[x.op](*inputs).to(y.dtype)
    if x.op == "constant":
        return y.new_full((1, 1), x.number)
    if x.op == "parameter":
        return given[0].reshape(1, x.width)
    if x.op in ("linear", "linear_t"):
        weight = given[0] if x.op == "linear" else given[0].t()
        product = inputs[0] @ weight.t()
        return product + given[1] if len(given) > 1 else product
    if x.op == "slice":
        return inputs[0][:, start : start + x.width]
    if x.op == "join":
        return torch.cat(inputs, 1)
    if x.op == "place":
        width = inputs[0].shape[1]
        return torch.constant_pad_nd(inputs[0], (start, x.width - start - width))
    if x.op == "total":
        return inputs[0].sum(1, keepdim=True)
    if x.op == "select":
        condition, one, other = inputs
        return torch.where(condition != 0, one, other)
    if x.op == "cotangent" and cotangent is not None:
        return cotangent
    return inputs[0]  # spread: the caller expands it


def _derivative(x: Instruction, a: Tensor) -> Tensor:
    """Of an activation, by PyTorch's own backward pass."""
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        value = torch.ops.aten.elu(leaf, x.number) if x.op == "d_elu" else _UNARY[x.op[2:]](leaf)
        slope: Tensor = torch.autograd.grad(value, leaf, torch.ones_like(value))[0]
    return slope
