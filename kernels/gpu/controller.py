"""Step-size control on the device: the rules of anode_fast/controller.py, in float64.

Functions of single numbers work on [B, 1] columns too, for steps by row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Places in `settings`, float64: what does not change during a solve.
RTOL = tl.constexpr(0)
ATOL = tl.constexpr(1)
FIRST_STEP = tl.constexpr(2)  # 0: chosen here
SAFETY = tl.constexpr(3)
IFACTOR = tl.constexpr(4)
DFACTOR = tl.constexpr(5)
MIN_STEP = tl.constexpr(6)
MAX_STEP = tl.constexpr(7)
MAX_NUM_STEPS = tl.constexpr(8)
EXPONENT = tl.constexpr(9)  # 1 / order
FLOAT_TIME = tl.constexpr(10)  # 1: times and steps are rounded to float32
SIGN = tl.constexpr(11)  # of the user's time in the solver's: 1 or -1
SETTINGS = tl.constexpr(12)

# Places in `control`, float64: where a solve stands, and how it ended. All 0 before it begins.
STATUS = tl.constexpr(0)
PHASE = tl.constexpr(1)
T = tl.constexpr(2)
DT = tl.constexpr(3)
ACCEPTED = tl.constexpr(4)
REJECTED = tl.constexpr(5)
NFE = tl.constexpr(6)
OUTPUT = tl.constexpr(7)  # the next one to be written; in a failure by fixed steps, the first bad
RATIO = tl.constexpr(8)  # error ratio of the last attempt
NON_FINITE_COUNT = tl.constexpr(9)  # attempts in a row that gave nan or inf
NON_FINITE_AT = tl.constexpr(10)  # where they ended
SLOPE_NORM = tl.constexpr(11)  # norm of the first derivative, for the first step
ROW = tl.constexpr(12)  # steps by row: first row that failed
ROWS = tl.constexpr(13)  # and how many did
DIFFERS = tl.constexpr(14)  # 1: the field is not what it was expected to be; of the first tile
CONTROL = tl.constexpr(16)

# Status. Those of `Status` in anode_fast/stats.py are one less.
RUNNING = tl.constexpr(0)
SUCCESS = tl.constexpr(1)
MAX_STEPS = tl.constexpr(2)
UNDERFLOW = tl.constexpr(3)
NON_FINITE = tl.constexpr(4)
NON_FINITE_INPUT = tl.constexpr(5)
FULL = tl.constexpr(6)  # no place for the next checkpoint; the solve can go on when there is

# Phases: the first derivative; the second evaluation that chooses the first step; steps.
START = tl.constexpr(0)
GUESS = tl.constexpr(1)
STEP = tl.constexpr(2)

# As in the reference: attempts that gave nan or inf, none of them passed, after which it gives up.
MOST_NON_FINITE = tl.constexpr(16)


@triton.jit
def double(x: tl.constexpr):
    """A constant in float64. In comparisons and tl.where, literals have float32 precision."""
    return tl.full([], x, tl.float64)


@triton.jit
def finite(x):
    """Whether x is neither nan nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def rounded(x, settings):
    """x, in float32 precision where times are to have that."""
    return tl.where(tl.load(settings + FLOAT_TIME) != 0, x.to(tl.float32).to(tl.float64), x)


@triton.jit
def power(x, exponent):
    """The power of x > 0."""
    return tl.exp(tl.log(x) * exponent)


@triton.jit
def clamp(dt, settings):
    """dt, kept within min_step and max_step. nan stays nan."""
    dt = tl.where(dt < tl.load(settings + MIN_STEP), tl.load(settings + MIN_STEP), dt)
    return tl.where(dt > tl.load(settings + MAX_STEP), tl.load(settings + MAX_STEP), dt)


@triton.jit
def accepts(dt, ratio, settings):
    """Whether an attempt of size dt with this error ratio stands."""
    return (ratio <= 1) | ((dt <= tl.load(settings + MIN_STEP)) & finite(ratio))


@triton.jit
def next_step(dt, ratio, settings):
    """Size of the next attempt."""
    dfactor = tl.load(settings + DFACTOR)
    ifactor = tl.load(settings + IFACTOR)
    usable = (ratio > 0) & finite(ratio)
    factor = tl.load(settings + SAFETY) / power(
        tl.where(usable, ratio, 1.0), tl.load(settings + EXPONENT)
    )
    factor = tl.minimum(tl.maximum(factor, tl.where(ratio < 1, 1.0, dfactor)), ifactor)
    factor = tl.where(ratio == 0, ifactor, tl.where(usable, factor, dfactor))
    return clamp(dt * factor, settings)


@triton.jit
def first_guess(d0, d1):
    """A step so short that an explicit Euler step of it is safe."""
    small = (d0 < double(1e-5)) | (d1 < double(1e-5))
    return tl.where(small, double(1e-6), 0.01 * d0 / tl.where(small, 1.0, d1))


@triton.jit
def initial_step(h0, d1, d2, settings):
    """The first step, from the Euler step h0 and the norms of f (d1) and f' (d2). nan stays nan."""
    flat = (d1 <= double(1e-15)) & (d2 <= double(1e-15))
    largest = tl.where(d1 > d2, d1, d2)
    h1 = power(0.01 / tl.where(flat, 1.0, largest), tl.load(settings + EXPONENT))
    h1 = tl.where(flat, tl.maximum(double(1e-6), h0 * 1e-3), h1)
    h1 = tl.where(h1 < 100 * h0, h1, 100 * h0)
    return tl.where(d2 == d2, h1, d2)


@triton.jit
def go_on(control, settings, t, dt, ratio, end, capacity):
    """Notes t and dt, and whether there is to be an attempt from there: RUNNING, or why not."""
    attempts = tl.load(control + ACCEPTED) + tl.load(control + REJECTED)
    status = tl.where(tl.load(control + ACCEPTED) >= capacity, FULL, RUNNING)
    stuck = tl.where(finite(ratio) & finite(dt), UNDERFLOW, NON_FINITE)
    status = tl.where(rounded(t + dt, settings) > t, status, stuck)
    status = tl.where(attempts >= tl.load(settings + MAX_NUM_STEPS), MAX_STEPS, status)
    status = tl.where(t >= end, SUCCESS, status)
    tl.store(control + T, t)
    tl.store(control + DT, dt)
    tl.store(control + STATUS, status.to(tl.float64))


@triton.jit
def after_start(control, settings, t, d0, d1, is_finite, end, capacity):
    """After the first derivative: the step for the next evaluation, or the first step if given.

    Args:
        control, settings: The solve's.
        t: Its start.
        d0, d1: Norms of the state and its derivative.
        is_finite: Whether the state is.
        end: Last output time.
        capacity: Steps for which there are checkpoints.
    """
    tl.store(control + NFE, 1.0)
    tl.store(control + OUTPUT, 1.0)
    tl.store(control + NON_FINITE_AT, t)
    given = tl.load(settings + FIRST_STEP)
    if given != 0:
        tl.store(control + PHASE, 2.0)
        go_on(control, settings, t, rounded(clamp(given, settings), settings), 0.0, end, capacity)
    else:
        guess = first_guess(d0, d1)
        tl.store(control + PHASE, 1.0)
        tl.store(control + SLOPE_NORM, d1)
        tl.store(control + T, t)
        # 0 where the derivative is infinite: no step.
        tl.store(control + DT, tl.where(guess > 0, guess, float("nan")))
        tl.store(control + STATUS, tl.where(guess > 0, RUNNING, NON_FINITE).to(tl.float64))
    if is_finite == 0:
        tl.store(control + STATUS, NON_FINITE_INPUT)


@triton.jit
def after_guess(control, settings, t, guess, difference, end, capacity):
    """After the second evaluation: the first step. `difference`: norm of that of the two."""
    dt = initial_step(guess, tl.load(control + SLOPE_NORM), difference / guess, settings)
    dt = rounded(clamp(dt, settings), settings)
    tl.store(control + NFE, 2.0)
    tl.store(control + PHASE, 2.0)
    go_on(control, settings, t, dt, 0.0 * guess, end, capacity)


@triton.jit
def after_attempt(
    control, settings, t, dt, t1, ratio, output, nfe, end, capacity, patience
):  # fmt: skip
    """After an attempt from t to t1: whether it stands, and the next one's size.

    Args:
        control, settings: The solve's.
        t, dt, t1: Of the attempt.
        ratio: Its error ratio.
        output: First output time after it.
        nfe: Evaluations it took.
        end: Last output time.
        capacity: Steps for which there are checkpoints.
        patience: Attempts that gave nan or inf, none of them passed, after which it gives up.
    """
    tl.store(control + NFE, tl.load(control + NFE) + nfe)
    tl.store(control + RATIO, ratio)
    after = t
    given_up = t1 < t  # no
    if accepts(dt, ratio, settings):
        after = t1
        tl.store(control + ACCEPTED, tl.load(control + ACCEPTED) + 1)
        tl.store(control + OUTPUT, output.to(tl.float64))
        if t1 >= tl.load(control + NON_FINITE_AT):
            tl.store(control + NON_FINITE_COUNT, 0.0)
    else:
        tl.store(control + REJECTED, tl.load(control + REJECTED) + 1)
        if finite(ratio) == 0:
            count = tl.load(control + NON_FINITE_COUNT) + 1
            tl.store(control + NON_FINITE_COUNT, count)
            tl.store(control + NON_FINITE_AT, t1)
            given_up = (dt <= tl.load(settings + MIN_STEP)) | (count >= patience)
    tl.debug_barrier()  # go_on reads the counts
    if given_up:
        tl.store(control + STATUS, NON_FINITE)
        tl.store(control + DT, dt)
    else:
        following = rounded(next_step(dt, ratio, settings), settings)
        go_on(control, settings, after, following, ratio, end, capacity)
