"""The step-size controller, the norms and the initial step are torchdiffeq's."""

import math

import pytest
import torch
from torchdiffeq._impl.misc import (
    _mixed_norm,
    _optimal_step_size,
    _rms_norm,
    _select_initial_step,
)

from anode_fast.controller import Controller, first_guess, initial_step
from anode_fast.problem import make_problem, mixed_norm, rms_norm
from anode_fast.reference.runge_kutta import _initial_step_by_row, choose_initial_step, row_times

f64 = torch.float64
INF, NAN = math.inf, math.nan
EPS = torch.finfo(f64).eps
ABOVE_1 = math.nextafter(1, 2)

RATIOS = [0.0, 5e-324, 1e-30, 1e-5, 0.3, 0.59, 1 - EPS, 1.0, ABOVE_1, 1.7, 2.5, 1e4, 1e300, INF]
SETTINGS = [
    {},
    {"safety": 0.5, "ifactor": 3.0, "dfactor": 0.6},
    {"min_step": 0.02, "max_step": 0.1},
]


# --- next step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "factors", "limits"])
@pytest.mark.parametrize("order", [2, 3, 5, 8])
@pytest.mark.parametrize("dt", [1e-12, 0.05, 7.0])
def test_next_step_is_torchdiffeqs(settings, order, dt):
    controller = Controller(order, **settings)
    safety, ifactor, dfactor, smallest, largest = (
        torch.tensor(getattr(controller, name), dtype=f64)
        for name in ("safety", "ifactor", "dfactor", "min_step", "max_step")
    )
    for ratio in RATIOS:
        step, error = torch.tensor(dt, dtype=f64), torch.tensor(ratio, dtype=f64)
        want = _optimal_step_size(step, error, safety, ifactor, dfactor, order)
        want = want.clamp(smallest, largest).item()
        assert controller.next_step(dt, ratio) == pytest.approx(want, rel=4 * EPS, abs=0), ratio


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (0.0, 10.0),  # growth is bounded
        (0.9**5 / 10**5, 10.0),
        (0.45**5, 2.0),
        (0.95**5, 1.0),  # an accepted step never shrinks the next one
        (1.8**5, 0.5),
        (9.0**5, 0.2),  # shrinking is bounded
        (INF, 0.2),
        (NAN, 0.2),  # where torchdiffeq's next step is nan
    ],
)
def test_factors_of_the_default_controller(ratio, factor):
    assert Controller(5).next_step(0.5, ratio) == pytest.approx(0.5 * factor, rel=1e-14)


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "factors", "limits"])
@pytest.mark.parametrize("order", [2, 3, 5, 8])
def test_rows_equal_scalars(settings, order):
    controller = Controller(order, **settings)
    ratios = [*RATIOS, NAN]
    dts = [10.0 ** (i % 5 - 3) for i in range(len(ratios))]
    got = controller.next_step_rows(torch.tensor(dts, dtype=f64), torch.tensor(ratios, dtype=f64))
    want = [controller.next_step(dt, ratio) for dt, ratio in zip(dts, ratios, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=f64), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize(
    ("dt", "ratio", "accepted"),
    [
        (0.5, 0.0, True),
        (0.5, 1.0, True),
        (0.5, ABOVE_1, False),
        (0.5, INF, False),
        (0.5, NAN, False),
        (0.1, 100.0, True),  # the smallest step is accepted whatever its error
        (0.05, 100.0, True),
        (0.1, INF, False),  # but for one that is not finite
        (0.1, NAN, False),
    ],
)
def test_accepts(dt, ratio, accepted):
    assert Controller(5, min_step=0.1).accepts(dt, ratio) is accepted


@pytest.mark.parametrize(("dt", "clamped"), [(0.01, 0.1), (0.1, 0.1), (0.3, 0.3), (INF, 2.0)])
def test_clamp(dt, clamped):
    assert Controller(5, min_step=0.1, max_step=2.0).clamp(dt) == clamped


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, f64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_rms_norm_is_torchdiffeqs(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    # Sums of up to 120 squares, in two orders.
    rounding = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x), _rms_norm(x), rtol=rounding, atol=0)
    parts = (x, 3 * x.flatten()[:1], 0 * x)
    torch.testing.assert_close(mixed_norm(parts), _mixed_norm(parts), rtol=rounding, atol=0)


def test_norms_of_nothing_are_0():
    assert rms_norm(torch.zeros(0, 3)) == 0
    assert mixed_norm(()) == 0


# --- initial step ---------------------------------------------------------------------------------


def rotation(t, y):
    return torch.stack([y[..., 1], -9 * y[..., 0]], -1) + t


INITIAL = {
    "plain": (rotation, torch.tensor([[1.0, 2.0], [3.0, -4.0]])),
    "vector": (lambda t, y: -y * y, torch.linspace(0.5, 2, 9)),
    "scalar": (lambda t, y: -y + t, torch.tensor(2.0)),
    "large": (lambda t, y: 1e8 * torch.cos(y), torch.tensor([[1e3, -2e3]])),
    "y0 is 0": (lambda t, y: y + 1, torch.zeros(2, 3)),
    "f0 is 0": (lambda t, y: y - 1 + t, torch.ones(2, 3)),
    "f is 0": (lambda t, y: 0 * y, torch.ones(2, 3)),
    "all is 0": (lambda t, y: 0 * y, torch.zeros(2, 3)),
    "complex": (lambda t, y: 1j * y * y, torch.tensor([[1.0 + 2j], [0.5 - 1j]])),
}


def double(y):
    return y.to(torch.complex128 if y.is_complex() else f64)


@pytest.mark.parametrize("norm", [_rms_norm, lambda x: x.abs().max()], ids=["rms", "max"])
@pytest.mark.parametrize("case", INITIAL)
@pytest.mark.parametrize("order", [2, 5, 8])
@pytest.mark.parametrize("tolerances", [(1e-3, 1e-3), (1e-7, 1e-9), (0.0, 1e-6)])
def test_initial_step_is_torchdiffeqs(case, order, tolerances, norm):
    func, y0 = INITIAL[case]
    y0, (rtol, atol) = double(y0), tolerances
    t0 = torch.tensor(0.25, dtype=f64)
    want = _select_initial_step(func, t0, y0, order - 1, rtol, atol, norm)
    field = make_problem(func, y0, torch.stack([t0, t0 + 1])).field
    got = choose_initial_step(field, 0.25, y0, field(0.25, y0), order, tolerances, norm)
    # f1 - f0, the trial step's change, loses digits: at most all but 1e-6 of f0 (see first_guess).
    assert got == pytest.approx(want.item(), rel=4 * EPS / 1e-6, abs=0)
    assert field.nfe == 2


@pytest.mark.parametrize("case", ["plain", "vector", "large", "complex"])
def test_initial_step_in_float32(case):
    func, y0 = INITIAL[case]
    t0 = torch.tensor(0.25, dtype=f64)
    want = _select_initial_step(func, t0, y0, 4, 1e-4, 1e-4, _rms_norm)
    field = make_problem(func, y0, torch.stack([t0, t0 + 1])).field
    f0 = field(0.25, y0)
    got = choose_initial_step(field, 0.25, y0, f0, 5, (1e-4, 1e-4), rms_norm)
    # Here the trial step changes y by 1%: two digits are lost.
    assert got == pytest.approx(want.item(), rel=4 * torch.finfo(torch.float32).eps / 0.01)


@pytest.mark.parametrize("case", [name for name in INITIAL if INITIAL[name][1].dim() > 1])
@pytest.mark.parametrize("order", [2, 5, 8])
def test_initial_steps_by_row_are_each_rows_own(case, order):
    func, y0 = INITIAL[case]
    y0 = double(y0)
    field = make_problem(func, y0, torch.tensor([0.25, 1.0], dtype=f64)).field
    t = row_times(0.25, y0)
    got = _initial_step_by_row(field, t, y0, field(t, y0), order, 1e-5, 1e-6)
    assert got.shape == t.shape
    for row, step in zip(y0.split(1), got.flatten().tolist(), strict=True):
        f0 = field(0.25, row)
        want = choose_initial_step(field, 0.25, row, f0, order, (1e-5, 1e-6), rms_norm)
        assert step == pytest.approx(want, rel=4 * EPS / 1e-6, abs=0)


@pytest.mark.parametrize(
    ("d0", "d1", "guess"), [(2.0, 4.0, 0.005), (0.9e-5, 1.0, 1e-6), (1.0, 0.9e-5, 1e-6)]
)
def test_first_guess(d0, d1, guess):
    assert first_guess(d0, d1) == guess


@pytest.mark.parametrize(
    ("h0", "d1", "d2", "step"),
    [
        (0.5, 1.0, 32.0, (0.01 / 32) ** 0.2),
        (0.5, 32.0, 1.0, (0.01 / 32) ** 0.2),
        (1e-3, 1.0, 1.0, 0.1),  # at most 100 trial steps
        (1e-2, 1e-16, 1e-16, 1e-5),  # nothing moves
        (1e-6, 1e-16, 1e-16, 1e-6),
    ],
)
def test_initial_step(h0, d1, d2, step):
    assert initial_step(h0, d1, d2, 5) == pytest.approx(step, rel=4 * EPS)
