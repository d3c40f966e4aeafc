"""program.py: its vector-Jacobian products are autograd's, and it refuses what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anode_fast.kernels import program
from anode_fast.kernels.program import OPS, STATE, TIME, UNARY, Instruction, Program
from tests.kernels.programs import KINDS, NOT_DRAWN, POWERS, Builder, programs, tensors_of


def by_autograd(of, tensors, t, y, cotangent):
    leaves = [x.clone().requires_grad_() for x in (y, t, *tensors)]
    value = program.evaluate(of, leaves[2:], leaves[1], leaves[0])
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    grads = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def check(of, rows=3):
    tensors = tensors_of(of)
    y = torch.randn(rows, of.dim, dtype=torch.float64)
    t = torch.rand(rows, 1, dtype=torch.float64)
    cotangent = torch.randn_like(y)
    of_y, of_t, grads = program.vjp(of, tensors, t, y, cotangent)
    wanted = by_autograd(of, tensors, t, y, cotangent)
    for got, want in zip([of_y, of_t, *grads], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=200)
@given(programs())
def test_products_are_autograds(of):
    check(of)


def test_every_instruction_is_drawn():
    drawn = set()

    @settings(max_examples=300, database=None)
    @given(programs(most=30))
    def note(of):
        drawn.update(x.op for x in of.code)

    note()
    assert drawn == {*OPS} - NOT_DRAWN


@pytest.mark.parametrize("op", [op for op in UNARY if op not in (*NOT_DRAWN, "pow", "elu")])
def test_functions(op):
    b = Builder(4)
    x = b.near_one(STATE) if op in ("log", "log1p", "sqrt", "reciprocal") else STATE
    b.emit(op, [x])
    check(b.build())


@pytest.mark.parametrize("power", POWERS)
def test_powers(power):
    b = Builder(4)
    b.emit("pow", [b.near_one(STATE)], number=power)
    check(b.build())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_elu(alpha):
    b = Builder(4)
    b.emit("elu", [STATE], number=alpha)
    check(b.build())


# --- ties, and what is not finite -----------------------------------------------------------------


@pytest.mark.parametrize("op", ["relu", "abs", "sign", "elu", "gelu", "softplus"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_at_zero(op, zero):
    b = Builder(3)
    b.emit(op, [STATE], number=1.0)
    y = torch.full((2, 3), zero, dtype=torch.float64)
    t, cotangent = torch.zeros(2, 1, dtype=torch.float64), torch.ones_like(y)
    got = program.vjp(b.build(), [], t, y, cotangent)
    assert torch.equal(got[0], by_autograd(b.build(), [], t, y, cotangent)[0])


def test_relu_keeps_a_bad_cotangent_to_itself():
    b = Builder(2)
    b.emit("relu", [STATE])
    y = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    bad = torch.full_like(y, torch.inf)
    assert program.vjp(b.build(), [], y[:, :1], y, bad)[0].tolist() == [[0.0, torch.inf]]


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=6, max_size=6))
def test_comparisons_at_ties(values):
    b = Builder(3)
    joined = b.linear(STATE, 3, bias=False)
    gt, ge = b.emit("gt", [STATE, joined]), b.emit("ge", [STATE, joined])
    b.emit("select", [gt, STATE, b.emit("mul", [ge, joined])])
    y = torch.tensor(values, dtype=torch.float64).reshape(2, 3)
    weight = torch.eye(3, dtype=torch.float64).flip(0)
    other = y.flip(1)
    got = program.evaluate(b.build(), [weight], torch.zeros((), dtype=torch.float64), y)
    assert torch.equal(got, torch.where(y > other, y, torch.where(y >= other, other, 0.0)))


# --- programs that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "code", "message"),
    [
        ((), (), "needs an instruction"),
        ((), (Instruction("sinh", (STATE,), 3),), "none of"),
        ((), (Instruction("tanh", (2,), 3),), "not there yet"),
        ((), (Instruction("tanh", (-1,), 3),), "not there yet"),
        ((), (Instruction("tanh", (STATE,), 2),), "does not fit"),
        ((), (Instruction("tanh", (STATE, STATE), 3),), "does not fit"),
        ((), (Instruction("add", (STATE,), 3),), "does not fit"),
        ((), (Instruction("add", (TIME, TIME), 3),), "does not fit"),
        ((), (Instruction("parameter", (), 3, (0,)),), "tensor that is not there"),
        (((2,),), (Instruction("parameter", (), 3, (0,)),), "does not fit"),
        (((3, 2),), (Instruction("linear", (STATE,), 3, (0,)),), "does not fit"),
        (((3, 3), (2,)), (Instruction("linear", (STATE,), 3, (0, 1)),), "does not fit"),
        (((2, 3),), (Instruction("linear_t", (STATE,), 3, (0,)),), "does not fit"),
        ((), (Instruction("slice", (STATE,), 3, (), 1.0),), "does not fit"),
        ((), (Instruction("place", (STATE,), 3, (), 1.0),), "does not fit"),
        ((), (Instruction("join", (STATE, TIME), 3),), "does not fit"),
        ((), (Instruction("spread", (STATE,), 3),), "does not fit"),
        ((), (Instruction("select", (STATE, STATE), 3),), "does not fit"),
        ((), (Instruction("total", (STATE,), 3),), "does not fit"),
        ((), (Instruction("total", (STATE,), 1),), "dy/dt has 1 features, the state 3"),
    ],
)
def test_what_does_not_fit(shapes, code, message):
    with pytest.raises(ValueError, match=message):
        Program(3, shapes, code)


def test_kinds_are_instructions():
    assert {*KINDS} - {"number", "relu_by_hand"} <= {*OPS}
