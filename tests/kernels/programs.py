"""Random programs, for tests of all that runs them."""

import torch
from hypothesis import strategies as st

from anode_fast.kernels.program import BINARY, STATE, TIME, Instruction, Program

PLAIN = ("neg", "abs", "sign", "sin", "cos", "tanh", "sigmoid", "relu", "softplus", "silu", "gelu")
GROWING = ("exp", "expm1")
POSITIVE = ("reciprocal", "sqrt", "log", "log1p")
POWERS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 1.7, -0.3)
KINDS = (
    *PLAIN,
    *GROWING,
    *POSITIVE,
    *("pow", "elu", "add", "sub", "mul", "div", "gt", "ge"),
    *("constant", "parameter", "number", "linear", "linear", "linear", "linear_t", "linear_t"),
    *("slice", "slice", "join", "join", "place", "total", "spread", "select", "relu_by_hand"),
)
# A forward pass does not have them.
NOT_DRAWN = {"cotangent", "d_softplus", "d_silu", "d_gelu", "d_elu"}


class Builder:
    """Instructions one after the other."""

    def __init__(self, dim):
        self.dim, self.code, self.shapes, self.widths = dim, [], [], [1, dim]

    def emit(self, op, inputs=(), width=None, parameters=(), number=0.0):
        if width is None:
            width = max((self.widths[i] for i in inputs), default=1)
        self.code.append(Instruction(op, tuple(inputs), width, tuple(parameters), number))
        self.widths.append(width)
        return len(self.widths) - 1

    def tensor(self, *shape):
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def constant(self, number):
        return self.emit("constant", number=number)

    def linear(self, x, width, bias=True, transposed=False):
        inputs = self.widths[x]
        weight = self.tensor(inputs, width) if transposed else self.tensor(width, inputs)
        tensors = [weight, self.tensor(width)] if bias else [weight]
        return self.emit("linear_t" if transposed else "linear", [x], width, tensors)

    def near_one(self, x):
        return self.emit("add", [self.emit("sigmoid", [x]), self.constant(0.5)])

    def build(self):
        return Program(self.dim, tuple(self.shapes), tuple(self.code))


@st.composite
def programs(draw, kinds=KINDS, most=14):
    """Programs whose values are moderate for inputs and tensors that are."""
    b = Builder(draw(st.integers(1, 5)))
    widths = st.sampled_from([1, 2, 3, 5, 7, 8, 17, 33])

    def value():
        # The latest, or any.
        n = len(b.widths) - 1
        return draw(st.one_of(st.just(n), st.integers(0, n)))

    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
        x = value()
        width = b.widths[x]
        if kind in PLAIN:
            b.emit(kind, [x])
        elif kind in GROWING:
            b.emit(kind, [b.emit("tanh", [x])])
        elif kind in POSITIVE:
            b.emit(kind, [b.near_one(x)])
        elif kind == "pow":
            b.emit(kind, [b.near_one(x)], number=draw(st.sampled_from(POWERS)))
        elif kind == "elu":
            b.emit(kind, [x], number=draw(st.sampled_from([1.0, 0.25, 2.0])))
        elif kind in BINARY:
            fitting = [i for i, w in enumerate(b.widths) if width == 1 or w in (1, width)]
            y = draw(st.sampled_from(fitting))
            if kind == "div":
                y = b.near_one(y)
            b.emit(kind, [x, y] if kind == "div" else draw(st.permutations([x, y])))
        elif kind == "constant":
            b.constant(draw(st.sampled_from([0.0, -0.0, 1.0, -1.5])))
        elif kind == "parameter":
            b.emit(kind, (), width, [b.tensor(width)])
        elif kind == "number":
            b.emit("parameter", (), 1, [b.tensor()])
        elif kind in ("linear", "linear_t"):
            tied = [
                i
                for i, s in enumerate(b.shapes)
                if len(s) == 2 and s[1 if kind == "linear" else 0] == width
            ]
            if tied and draw(st.booleans()):
                weight = draw(st.sampled_from(tied))
                out = b.shapes[weight][0 if kind == "linear" else 1]
                b.emit(kind, [x], out, [weight])
            else:
                b.linear(x, draw(widths), draw(st.booleans()), kind == "linear_t")
        elif kind == "slice":
            start = draw(st.integers(0, width - 1))
            b.emit(kind, [x], draw(st.integers(1, width - start)), (), float(start))
        elif kind == "join":
            inputs = draw(st.sampled_from([[TIME, STATE], [x, value()], [x, STATE, x]]))
            b.emit(kind, inputs, sum(b.widths[i] for i in inputs))
        elif kind == "place":
            before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            b.emit(kind, [x], before + width + after, (), float(before))
        elif kind == "total":
            b.emit(kind, [x], 1)
        elif kind == "spread":
            row = draw(st.sampled_from([i for i, w in enumerate(b.widths) if w == 1]))
            b.emit(kind, [row], draw(widths))
        elif kind == "select":
            same = [i for i, w in enumerate(b.widths) if w in (1, width)]
            one, other = draw(st.sampled_from(same)), draw(st.sampled_from(same))
            condition = b.emit("gt", [x, b.constant(0.1)])
            b.emit(kind, [condition, one, other], width)
        else:
            b.emit("select", [b.emit("gt", [x, b.constant(0.0)]), x, b.constant(0.0)])
    if b.widths[-1] != b.dim:
        b.linear(len(b.widths) - 1, b.dim, draw(st.booleans()))
    return b.build()


def tensors_of(program, dtype=torch.float64):
    """Random tensors, of which maps neither grow nor shrink much."""
    return [
        torch.randn(shape, dtype=dtype) / (max(shape) ** 0.5 if len(shape) == 2 else 1)
        for shape in program.shapes
    ]
