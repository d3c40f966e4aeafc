"""kernels/gpu/controller.py: the rules of anode_fast/controller.py, number for number."""

import itertools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from anode_fast.controller import Controller, first_guess, initial_step
from anode_fast.kernels.gpu import controller

INF, NAN = math.inf, math.nan
ORDER = 5
LIMITS = {
    "none": dict(),
    "of steps": dict(min_step=1e-3, max_step=0.3),
    "that cross": dict(min_step=0.3, max_step=1e-3),
    "of factors": dict(safety=0.5, ifactor=1.5, dfactor=0.7),
    "single precision": dict(),
}
RATIOS = [0.0, 1e-300, 1e-12, 0.3, math.nextafter(1, 0), 1.0, math.nextafter(1, 2), 3.0, 1e9]
RATIOS += [1e300, INF, NAN]
SIZES = [0.0, 1e-300, 1e-3, math.nextafter(1e-3, 0), 0.1, 0.3, 7.0, INF, NAN]
NORMS = [0.0, 1e-16, 1e-15, math.nextafter(1e-15, 1), 1e-5, math.nextafter(1e-5, 0), 1.0, 1e20]
NORMS += [INF, NAN]


@triton.jit
def _steps(dt_ptr, ratio_ptr, accepted_ptr, next_ptr, clamped_ptr, settings):
    i = tl.program_id(0)
    dt, ratio = tl.load(dt_ptr + i), tl.load(ratio_ptr + i)
    tl.store(accepted_ptr + i, controller.accepts(dt, ratio, settings).to(tl.float64))
    tl.store(next_ptr + i, controller.rounded(controller.next_step(dt, ratio, settings), settings))
    tl.store(clamped_ptr + i, controller.clamp(dt, settings))


@triton.jit
def _first_steps(x_ptr, y_ptr, z_ptr, guess_ptr, step_ptr, settings):
    i = tl.program_id(0)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(guess_ptr + i, controller.first_guess(x, y))
    tl.store(step_ptr + i, controller.initial_step(x, y, z, settings))


def run(kernel, device, results, columns, single=False, **options):
    given = dict(safety=0.9, ifactor=10.0, dfactor=0.2, min_step=0.0, max_step=INF) | options
    names = ("safety", "ifactor", "dfactor", "min_step", "max_step")
    settings = [0.0, 0.0, 0.0, *(given[name] for name in names), 100.0, 1 / ORDER, float(single), 1]
    assert len(settings) == controller.SETTINGS.value
    on = [torch.tensor(values, dtype=torch.float64, device=device) for values in columns]
    found = [torch.full_like(on[0], NAN) for _ in range(results)]
    settings = torch.tensor(settings, dtype=torch.float64, device=device)
    with np.errstate(all="ignore"):
        kernel[(len(columns[0]),)](*on, *found, settings)
    return [values.tolist() for values in found]


def assert_near(got, want):
    """Equal but for the rounding of exp(log(x)), whose argument may be 700."""
    np.testing.assert_allclose(got, want, rtol=1024 * np.finfo(np.float64).eps, atol=0)


@pytest.mark.parametrize("limits", LIMITS)
def test_next_step(limits, device):
    single, rules = limits == "single precision", Controller(ORDER, **LIMITS[limits])
    pairs = list(itertools.product(SIZES, RATIOS))
    columns = zip(*pairs, strict=True)
    accepted, following, clamped = run(_steps, device, 3, list(columns), single, **LIMITS[limits])
    assert accepted == [float(rules.accepts(dt, ratio)) for dt, ratio in pairs]
    usual = [i for i, (dt, _) in enumerate(pairs) if not math.isnan(dt)]
    np.testing.assert_array_equal(
        [clamped[i] for i in usual], [rules.clamp(pairs[i][0]) for i in usual]
    )
    want = np.array([rules.next_step(*pairs[i]) for i in usual])
    if single:
        want = want.astype(np.float32).astype(np.float64)
        np.testing.assert_array_equal([following[i] for i in usual], want)
    else:
        assert_near([following[i] for i in usual], want)


def test_first_step(device):
    triples = list(itertools.product(NORMS, NORMS, NORMS))
    guesses, steps = run(_first_steps, device, 2, list(zip(*triples, strict=True)))
    for (x, y, z), guess, step in zip(triples, guesses, steps, strict=True):
        assert_near(guess, first_guess(x, y))
        if math.isnan(z):
            assert math.isnan(step)
        elif 0 < x < INF and not math.isnan(y):  # else the solve has ended
            assert_near(step, initial_step(x, y, z, ORDER))
