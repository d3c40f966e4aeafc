"""Wrong arguments and wrong field values: real exceptions, before any work, with telling words."""

import math
import subprocess
import sys

import pytest
import torch

import anode_fast
from anode_fast import NonFiniteState, odeint, odeint_adjoint, odeint_dense
from anode_fast.errors import InvalidArgument, InvalidType

ONE = torch.tensor([1.0, 2.0, 3.0])
T = torch.tensor([0.0, 1.0])
RK4 = dict(method="rk4")
STEP = dict(step_size=0.1)


class Field(torch.nn.Module):
    """Decay that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return tuple(-x for x in y) if isinstance(y, tuple) else -y


def times(*values):
    return dict(t=torch.tensor(values))


def option(**options):
    return dict(options=options)


# name: (arguments that replace the right ones, error, words of its message)
WRONG = {
    "func": (dict(func=3), InvalidType, "func is a int, want a callable"),
    "y0 list": (dict(y0=[ONE]), InvalidType, r"y0 is a list.*tuple\(y0\)"),
    "y0 dict": (dict(y0={"a": ONE}), InvalidType, r"y0 is a dict.*y0\.values"),
    "y0 float": (dict(y0=1.0), InvalidType, "y0 is a float"),
    "y0 empty tuple": (dict(y0=()), InvalidType, "empty or not all tensors"),
    "y0 tuple with a number": (dict(y0=(ONE, 1.0)), InvalidType, "empty or not all tensors"),
    "y0 int": (dict(y0=torch.tensor([1])), InvalidType, r"y0 has dtype torch.int64.*y0\.float"),
    "y0 part bool": (dict(y0=(ONE, ONE > 0)), InvalidType, r"y0\[1\] has dtype torch.bool"),
    "t list": (dict(t=[0.0, 1.0]), InvalidType, "t is a list, want a 1-D tensor"),
    "t int": (times(0, 1), InvalidType, "t has dtype torch.int64"),
    "t 2-d": (dict(t=T[None]), InvalidArgument, r"t has shape \(1, 2\)"),
    "t 0-d": (dict(t=T[0]), InvalidArgument, r"t has shape \(\)"),
    "t empty": (dict(t=T[:0]), InvalidArgument, "t is empty"),
    "t nan": (times(0.0, math.nan, 2.0), InvalidArgument, r"t\[1\]=nan"),
    "t inf": (times(0.0, math.inf), InvalidArgument, r"t\[1\]=inf"),
    "t repeated": (times(0.0, 1.0, 1.0), InvalidArgument, r"t\[1\]=1.0 and t\[2\]=1.0"),
    "t equal": (times(1.0, 1.0), InvalidArgument, r"t\[0\]=1.0 and t\[1\]=1.0"),
    "t turning": (times(0.0, 1.0, 0.5), InvalidArgument, r"t\[1\]=1.0 and t\[2\]=0.5"),
    "t turning back": (times(1.0, 0.0, 0.5), InvalidArgument, r"t\[1\]=0.0 and t\[2\]=0.5"),
    "rtol negative": (dict(rtol=-1e-3), InvalidArgument, "rtol is -0.001"),
    "atol nan": (dict(atol=math.nan), InvalidArgument, "atol is nan"),
    "rtol inf": (dict(rtol=math.inf), InvalidArgument, "rtol is inf"),
    "rtol string": (dict(rtol="small"), InvalidType, "rtol is 'small', want a number"),
    "rtol None": (dict(rtol=None), InvalidType, "rtol is None, want a number"),
    "atol grad": (dict(atol=ONE.clone().requires_grad_()), InvalidArgument, r"atol\.detach\(\)"),
    "atol shape": (dict(atol=torch.ones(2)), InvalidArgument, r"shape \(2,\) does not broadcast"),
    "atol larger": (dict(atol=torch.ones(2, 3)), InvalidArgument, r"\(2, 3\) does not broadcast"),
    "rtol entry": (dict(rtol=torch.tensor([1.0, -1.0, 1.0])), InvalidArgument, "negative"),
    "rtol parts": (dict(y0=(ONE, ONE), rtol=(1e-3,)), InvalidArgument, "1 entries.*2 parts"),
    "rtol part": (dict(y0=(ONE, ONE), rtol=(1e-3, "a")), InvalidType, "rtol"),
    "method": (dict(method="dopri55"), InvalidArgument, 'method "dopri55".*mean "dopri5".*Methods'),
    "method type": (dict(method=5), InvalidArgument, 'method "5"'),
    "event_fn": (dict(event_fn=1), InvalidType, "event_fn is a int"),
    "event_fn with times": (
        dict(event_fn=lambda t, y: y, **times(0.0, 1.0, 2.0)),
        InvalidArgument,
        "2 entries .start and direction., got 3",
    ),
    "options": (dict(options=[("step_size", 0.1)]), InvalidType, "options is a list, want a dict"),
    "step_size 0": (option(step_size=0.0) | RK4, InvalidArgument, "step_size is 0.0, want.* > 0"),
    "step_size < 0": (option(step_size=-1) | RK4, InvalidArgument, "step_size is -1.0"),
    "step_size inf": (option(step_size=math.inf) | RK4, InvalidArgument, "step_size is inf"),
    "step_size tiny": (option(step_size=1e-30) | RK4, InvalidArgument, "step_size=1e-30 makes"),
    "step_size string": (option(step_size="a") | RK4, InvalidType, "step_size is 'a'"),
    "two grids": (
        option(step_size=0.1, grid_constructor=lambda f, y, t: t) | RK4,
        InvalidArgument,
        "step_size and grid_constructor exclude",
    ),
    "grid_constructor": (option(grid_constructor=1) | RK4, InvalidType, "want a callable"),
    "grid end": (
        option(grid_constructor=lambda f, y, t: t[:1]) | RK4,
        InvalidArgument,
        r"grid_constructor must give times from t\[0\]",
    ),
    "grid turning": (
        option(grid_constructor=lambda f, y, t: torch.tensor([0.0, 0.7, 0.5, 1.0])) | RK4,
        InvalidArgument,
        "strictly monotone",
    ),
    "interp": (option(interp="spline", **STEP) | RK4, InvalidArgument, "interp is 'spline'"),
    "first_step": (option(first_step=math.nan), InvalidArgument, "first_step is nan"),
    "min_step": (option(min_step="x"), InvalidType, "min_step is 'x'"),
    "safety": (option(safety=0), InvalidArgument, "safety is 0.0"),
    "max_num_steps": (option(max_num_steps=0), InvalidArgument, "max_num_steps is 0"),
    "max_iters": (
        option(max_iters=1.5, **STEP) | dict(method="gl4"),
        InvalidArgument,
        "max_iters is 1.5",
    ),
    "dtype": (option(dtype=torch.float16), InvalidArgument, "dtype .of times. is torch.float16"),
    "norm": (option(norm="rms"), InvalidType, "norm is 'rms', want a callable"),
    "step_t type": (option(step_t=0.5), InvalidType, "step_t is a float"),
    "step_t nan": (option(step_t=[math.nan]), InvalidArgument, "step_t must be finite"),
    "jump_t repeated": (option(jump_t=[0.5, 0.5]), InvalidArgument, "jump_t has repeated"),
    "step_t jump_t": (option(step_t=[0.5], jump_t=T / 2), InvalidArgument, "must not share"),
    "backend": (dict(backend="gpu"), InvalidArgument, "backend is 'gpu', want one of auto"),
    "gradient": (dict(gradient="exact"), InvalidArgument, "gradient is 'exact', want one of"),
    "step_control": (dict(step_control="row"), InvalidArgument, "step_control is 'row'"),
    "sample fixed": (
        dict(step_control="sample", **RK4, **option(**STEP)),
        InvalidArgument,
        "needs an adaptive method",
    ),
    "sample tuple": (dict(step_control="sample", y0=(ONE,)), InvalidArgument, "a tuple"),
    "args": (dict(args=(1,)), InvalidType, r"no args=.*functools\.partial"),
    "unknown": (dict(tol=1e-3), InvalidType, "unexpected arguments tol"),
}
WRONG_ADJOINT = {
    "options for another method": (
        dict(adjoint_method="rk4", **option(first_step=0.1)),
        InvalidArgument,
        "Pass adjoint_options",
    ),
    "params": (dict(adjoint_params=("w",)), InvalidType, "adjoint_params holds a str"),
    "params number": (dict(adjoint_params=3), InvalidType, "adjoint_params holds a int"),
    "args": (dict(args=(1,)), InvalidType, "odeint_adjoint: there is no args="),
    "adjoint_options": (dict(adjoint_options=[1]), InvalidType, "adjoint_options is a list"),
}


GRIDS = {"step_size tiny", "grid end", "grid turning"}  # found once the grid is made


def check(solve, changes, error, words, most_calls=0):
    field = Field()
    y0 = changes.get("y0", ONE)
    before = y0.clone() if isinstance(y0, torch.Tensor) else None
    arguments = dict(func=field, y0=y0, t=T) | changes
    with pytest.raises(error, match=words) as caught:
        solve(**arguments)
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert field.calls <= most_calls
    assert before is None or torch.equal(y0, before)


@pytest.mark.parametrize("name", WRONG)
def test_odeint_refuses(name):
    check(odeint, *WRONG[name])


@pytest.mark.parametrize("name", [name for name in WRONG if name != "func"])
def test_odeint_adjoint_refuses(name):
    check(odeint_adjoint, *WRONG[name], most_calls=int(name in GRIDS))


@pytest.mark.parametrize("name", WRONG_ADJOINT)
def test_odeint_adjoint_alone_refuses(name):
    check(odeint_adjoint, *WRONG_ADJOINT[name])


def test_adjoint_of_a_function_wants_params():
    calls = []
    with pytest.raises(InvalidArgument, match="not an nn.Module.*adjoint_params=()"):
        odeint_adjoint(lambda t, y: calls.append(t), ONE, T)
    assert not calls
    assert odeint_adjoint(lambda t, y: -y, ONE, T, adjoint_params=()).shape == (2, 3)


def test_dense_refuses_times_outside():
    dense = odeint_dense(Field(), ONE, T[0], T[1])
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(InvalidArgument, match="outside the solved interval"):
            dense(t)
    with pytest.raises(InvalidArgument, match="one element each"):
        odeint_dense(Field(), ONE, T, T[1])


PAIR = (torch.ones(3), torch.ones(2, 2))
# name: (y0, what the field returns for (t, y), error, words)
WRONG_VALUES = {
    "column": (ONE, lambda y: y[:, None], InvalidArgument, r"shape \(3, 1\).*nothing is broadc"),
    "scalar": (ONE, lambda y: y.sum(), InvalidArgument, r"returned shape \(\) for a state of"),
    "swapped": (PAIR, lambda y: y[::-1], InvalidArgument, r"part 0.*shape \(2, 2\).*\(3,\)"),
    "too few": (PAIR, lambda y: y[:1], InvalidArgument, "2 tensors.*returned 1 parts"),
    "tensor for tuple": (PAIR, lambda y: y[0], InvalidType, "tuple of 2.*returned a Tensor"),
    "part no tensor": (PAIR, lambda y: (y[0], 1.0), InvalidType, "part 1.*is a float"),
    "tuple for tensor": (ONE, lambda y: (y,), InvalidType, "returned a tuple"),
    "number": (ONE, lambda y: 1.0, InvalidType, "returned a float"),
    "None": (ONE, lambda y: None, InvalidType, "returned a NoneType"),
    "float64": (ONE, lambda y: y.double(), InvalidType, r"torch.float64 for a state of torch.fl"),
    "int": (ONE, lambda y: y.int(), InvalidType, r"returned torch.int32"),
    "bfloat16": (ONE, lambda y: y.bfloat16(), InvalidType, r"returned torch.bfloat16"),
    "complex": (ONE, lambda y: y * 1j, InvalidType, r"value is complex .*complex y0"),
    "complex part": (PAIR, lambda y: (y[0], y[1] * 1j), InvalidType, "part 1.* complex"),
}


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("options", [{}, dict(method="euler", options=STEP)], ids=["dopri5", "eu"])
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_field_value_does_not_fit(name, options, solve):
    y0, value, error, words = WRONG_VALUES[name]
    parts = y0 if isinstance(y0, tuple) else (y0,)
    before = [part.clone() for part in parts]
    calls = []

    def field(t, y):
        calls.append(t)
        return value(y)

    params = {} if solve is odeint else dict(adjoint_params=())
    with pytest.raises(error, match=words) as caught:
        solve(field, y0, T, **params, **options)
    assert isinstance(caught.value, AssertionError)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_start(bad):
    field = Field()
    with pytest.raises(NonFiniteState, match=r"state y0: .* among 1 of 3 entries"):
        odeint(field, torch.tensor([1.0, bad, 1.0]), T)
    with pytest.raises(NonFiniteState, match="non-finite values in state"):
        odeint(field, (ONE, ONE * bad), T)
    assert field.calls == 0


WARNINGS = {
    "stepsize": ("rk4", dict(stepsize=0.1, **STEP), r"stepsize \(did you mean step_size\?\)"),
    "max_steps": ("dopri5", dict(max_steps=9), r"max_steps \(did you mean max_num_steps\?\)"),
    "step_size": ("dopri5", STEP, r"step_size \(did you mean first_step\?\)"),
    "typo": ("dopri5", dict(first_stp=0.1), r"first_stp \(did you mean first_step\?\)"),
    "of others": ("dopri5", dict(interp="linear"), r"interp \(known to other methods only\)"),
    "nonsense": ("dopri5", dict(zzz=1), r"ignored: zzz$"),
    "no step_size": ("rk4", {}, "rk4: without the option step_size it takes one single step"),
}


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("name", WARNINGS)
def test_warning_names_the_right_option(name, solve):
    method, options, words = WARNINGS[name]
    with pytest.warns(UserWarning, match=words) as caught:
        result = solve(Field(), ONE, T, method=method, options=options)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller
    torch.testing.assert_close(result[-1], ONE * math.exp(-1), rtol=3e-2, atol=0)


def test_checks_stay_under_python_O():
    code = """
import torch, anode_fast
assert False  # gone under -O
def odd(t, y):
    return y * float("nan")
for arguments in (dict(), dict(method="rk4", options=dict(step_size=0.1))):
    try:
        anode_fast.odeint(odd, torch.ones(2), torch.tensor([0.0, 1.0]), **arguments)
    except anode_fast.NonFiniteState as error:
        print(type(error).__name__, str(error)[:26])
"""
    root = anode_fast.__path__[0].rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=root, timeout=300
    )
    assert done.stdout.splitlines() == ["NonFiniteState non-finite values in state"] * 2, done
