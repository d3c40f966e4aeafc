"""The continuous gradient: the adjoint ODE, from the last output time to the first.

Its state is y once more, the gradient a with respect to y, and the gradient with respect to t. It
runs in the solver's time negated, u = -t, which increases: y' = -f and a' = a df/dy. Pieces of it
go from one output time to the one before; at the start of each, y is set to the solution there, and
a takes in the output's cotangent. A piece but the last ends exactly on its output time; the last
one steps past the first output time and interpolates back. The rules are those of
kernels/cpu/continuous.hpp, and the norm is the seminorm: the largest of those of the gradient of t,
y, and a. See runge_kutta.py for how a kernel takes field and tableau, and for the memory both have.

The weights' gradients are integrals along that solution, and nothing depends on them. Fixed steps
add them up as they go; of adaptive ones `quadrature` makes the stages again, all accepted steps at
the same time, when it is known which ones these are.

Memory beside that of runge_kutta.py, of numbers in the state's dtype unless said otherwise:

    solution  [num_times, rows, DIM]     of the solve
    grad      [num_times, rows, DIM]     its cotangent
    x_grad    [rows, DATA]               gradient for x
    states    [slots, 4, rows, DIM]      y, a and their derivatives before each step
    steps     float64 [capacity, 3]      of each step: where it begins and ends, and its piece
    slopes    [2, S, B, D]               of a tile, in scratch: the stages of y, and those of a
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu import controller
from anode_fast.kernels.gpu.controller import (
    ACCEPTED,
    ATOL,
    CONTROL,
    DT,
    GUESS,
    NFE,
    NON_FINITE,
    NON_FINITE_AT,
    NON_FINITE_COUNT,
    NON_FINITE_INPUT,
    OUTPUT,
    PHASE,
    REJECTED,
    RTOL,
    RUNNING,
    SIGN,
    START,
    STATUS,
    STEP,
    SUCCESS,
    T,
)
from anode_fast.kernels.gpu.runge_kutta import (
    WAVE,
    interpolant,
    interpolated,
    larger,
    node,
    only_if,
    scaled_square,
    total,
    weighted_sum,
)

# Places in `progress`, float64: what `control` does not hold. All 0 before the solve. Of `control`,
# ACCEPTED and REJECTED count the piece's attempts, OUTPUT the output times that were arrived at.
TIME = tl.constexpr(0)  # gradient of t so far
TIME_SLOPE = tl.constexpr(1)  # its derivative at the first stage of the next attempt
ACCEPTED_BEFORE = tl.constexpr(2)  # steps, in the pieces before
REJECTED_BEFORE = tl.constexpr(3)
TOTALS = tl.constexpr(8)  # and from here on, an attempt's sums over the programs
PROGRESS = tl.constexpr(16)

# What an attempt adds up: the squares of what is measured of y, and of a; the same of their
# derivatives, or the change of t's gradient and its error, over h; its slope at the last stage;
# what is not 0 if a is not finite.
SUMS = tl.constexpr(8)


@triton.jit
def _stage(
    weights, record, tableau, slopes, state, apart, place, inside, s, at, u, h, sign,
    EVALUATE: tl.constexpr, VJP: tl.constexpr, F: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Makes a stage: the derivatives of y and a, and the evaluation's record.

    Args:
        slopes: The tile's; gets this stage as stage `at`.
        state, apart: Where the tile of the step's y is, and how far from there that of its a.
        place, inside: Of each number in these, from their start on, and whether there is one.
        s: Row of the tableau.
        u: Negated time, in the state's dtype.
        h: Size of the step, likewise.
    """
    tile = tl.arange(0, B)[:, None] * D + tl.arange(0, D)[None, :]
    row = tableau + s * S
    y = tl.load(state + place, mask=inside, other=0.0) + h * weighted_sum(row, slopes, tile, S)
    f = -sign * EVALUATE(weights, record, -sign * u, y, F, B, True)
    a = tl.load(state + apart + place, mask=inside, other=0.0)
    a += h * weighted_sum(row, slopes + S * B * D, tile, S)
    g = VJP(weights, record, sign * a, F, B)
    tl.store(slopes + at * B * D + tile, tl.where(inside, f, 0.0))
    tl.store(slopes + (S + at) * B * D + tile, tl.where(inside, g, 0.0))
    tl.debug_barrier()


# --- fixed steps ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "num_times", "inner", "programs"])
def fixed(
    weights, tableau, settings, ends, plan, solution, grad, x_grad, control, sums, scratch,
    rows, num_times, inner, programs,
    EVALUATE: tl.constexpr, VJP: tl.constexpr, ACCUMULATE: tl.constexpr, F: tl.constexpr,
    SIZE: tl.constexpr, WEIGHTS: tl.constexpr, DIM: tl.constexpr, DATA: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """The whole gradient by fixed steps; one launch, every program takes its tiles all the way.

    Args:
        ends: Where steps begin and end, in negated time, float64 [steps + 1].
        plan: Number of the step with which each piece begins, and of steps, int32 [num_times].
        control: Of each tile [CONTROL]: STATUS, and OUTPUT, the last output time, as a number, at
            which y or a was not finite.
        sums: Weight gradients of each program, [programs, WEIGHTS], 0 before.
        scratch: Of each program SCRATCH numbers: slopes; y and a [2, B, D]; S records; S weights.
        inner: Stages that are evaluated, from the first on.
        SIZE: Numbers in a record.
        WEIGHTS: Numbers in all weights; 0 if their gradients are not wanted.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, D)[None, :]
    size = rows.to(tl.int64) * DIM
    tile = tl.arange(0, B)[:, None] * D + c
    slopes = scratch + pid.to(tl.int64) * SCRATCH
    state = slopes + 2 * S * B * D
    records = state + 2 * B * D
    shares = records + S * SIZE
    DTYPE: tl.constexpr = grad.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    sums += pid.to(tl.int64) * WEIGHTS
    for index in range(pid, tl.cdiv(rows, B), programs):
        first_row = tl.full([], B, tl.int64) * index
        r = tl.arange(0, B)[:, None]
        in_batch = first_row + r < rows
        inside = in_batch & (c < DIM)
        place = r * DIM + c
        of_grad = grad + first_row * DIM
        status = tl.full([], SUCCESS, tl.int32)
        bad = tl.full([], -1, tl.int32)
        tl.store(state + B * D + tile, tl.zeros([B, D], DTYPE))
        for piece in range(num_times - 1):
            output = num_times - 1 - piece
            tl.debug_barrier()
            a = tl.load(state + B * D + tile)
            a += tl.load(of_grad + output * size + place, mask=inside, other=0.0)
            tl.store(state + B * D + tile, a)
            of_output = solution + output * size + first_row * DIM
            tl.store(state + tile, tl.load(of_output + place, mask=inside, other=0.0))
            is_bad = total(a * 0, inside) != 0
            status = tl.where(is_bad & (bad < 0), NON_FINITE_INPUT, status)
            for i in range(tl.load(plan + piece), tl.load(plan + piece + 1)):
                u0 = tl.load(ends + i)
                u1 = tl.load(ends + i + 1)
                tl.debug_barrier()
                for s in range(inner):
                    u = node(u0, u1, tl.load(tableau + (S + 3) * S + s), DTYPE, False)
                    _stage(
                        weights, records + s * SIZE, tableau, slopes, state, B * D, tile, inside,
                        s, s, u, (u1 - u0).to(DTYPE), sign, EVALUATE, VJP, F, S, B, D,
                    )  # fmt: skip
                    share = (u1 - u0) * tl.load(tableau + S * S + s)
                    tl.store(shares + s, share.to(DTYPE))
                for part in range(2):
                    at = state + part * B * D + tile
                    change = weighted_sum(tableau + S * S, slopes + part * S * B * D, tile, S)
                    tl.store(at, tl.load(at) + (u1 - u0).to(DTYPE) * change)
                if WEIGHTS > 0:
                    ACCUMULATE(sums, records, shares, 0, inner, rows - first_row, F, B, SIZE)
            tl.debug_barrier()
            y = tl.load(state + tile)
            a = tl.load(state + B * D + tile)
            is_bad = total(y * 0 + a * 0, inside) != 0
            bad = tl.where(is_bad & (bad < output - 1), output - 1, bad)
        tl.debug_barrier()
        a = tl.load(state + B * D + tile) + tl.load(of_grad + place, mask=inside, other=0.0)
        at = x_grad + first_row * DATA + r * DATA + c
        tl.store(at, a, mask=in_batch & (c < DATA))
        status = tl.where((status == SUCCESS) & (bad >= 0), NON_FINITE, status)
        tl.store(control + index * CONTROL + STATUS, status.to(tl.float64))
        tl.store(control + index * CONTROL + OUTPUT, bad.to(tl.float64))
        tl.debug_barrier()


# --- adaptive steps -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "num_times", "capacity", "programs"])
def adaptive(
    weights, tableau, settings, times, solution, grad, x_grad, states, steps, control, progress,
    sums, arrivals, scratch,
    rows, num_times, capacity, programs,
    EVALUATE: tl.constexpr, VJP: tl.constexpr, TIME_GRADIENT: tl.constexpr, F: tl.constexpr,
    DIM: tl.constexpr, DATA: tl.constexpr, S: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
    SCRATCH: tl.constexpr, KEEP: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Adaptive steps; a launch is an attempt, or with LOOP a solve, as in runge_kutta.adaptive.

    A piece begins with an evaluation, an attempt of its own; the first piece with two. The step
    size goes from piece to piece.

    Args:
        states: With KEEP `capacity` + 1 slots, else two that take turns. The end of a piece and the
            start of the next one have the same.
        steps: Written with KEEP only.
        progress: See above.
        sums: float64 [programs, SUMS].
        arrivals: int32 [1], 0 before the solve: programs that have done this attempt.
        scratch: Of each program SCRATCH numbers: slopes, and a record.
    """
    pid = tl.program_id(0)
    first_row = pid.to(tl.int64) * B
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    in_batch = first_row + r < rows
    inside = in_batch & (c < DIM)
    place = r * DIM + c
    size = rows.to(tl.int64) * DIM
    tile = tl.arange(0, B)[:, None] * D + c
    slopes = scratch + pid.to(tl.int64) * SCRATCH
    record = slopes + 2 * S * B * D
    DTYPE: tl.constexpr = grad.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    grad += first_row * DIM
    solution += first_row * DIM
    states += first_row * DIM
    limit = tl.where(KEEP, capacity, 2147483647).to(tl.float64)
    running = tl.load(control + STATUS) == RUNNING
    while running:
        phase = tl.load(control + PHASE).to(tl.int32)
        dt = tl.load(control + DT, cache_modifier=".cg")
        u = tl.load(control + T, cache_modifier=".cg")
        output = tl.load(control + OUTPUT, cache_modifier=".cg").to(tl.int32)
        before = tl.load(progress + ACCEPTED_BEFORE, cache_modifier=".cg")
        slot = (before + tl.load(control + ACCEPTED, cache_modifier=".cg")).to(tl.int64)
        if phase == START:
            output += 1
        output = num_times - output  # the one with which the piece begins
        end = -tl.load(times + output - 1)
        if phase == START:
            u = -tl.load(times + output)
            dt = 0.0 * u
        u1 = controller.rounded(u + dt, settings)
        if (phase == STEP) & (output > 1) & (u1 >= end):
            u1 = end
            dt = controller.rounded(u1 - u, settings)
        h = tl.where(phase == GUESS, dt, u1 - u).to(DTYPE)
        # Where the state is, and where the next one goes.
        here = states + tl.where(KEEP, slot, slot % 2) * 4 * size
        there = states + tl.where(KEEP, slot + 1, (slot + 1) % 2) * 4 * size
        first = tl.where(phase == STEP, 1, tl.where(phase == GUESS, S + 1, 0))
        last = tl.where(phase == STEP, S, first + 1)
        latest = tl.where(phase == START, 0, S - 1)  # the stage to be made last
        mine = sums + pid * SUMS
        if phase == START:
            arrived = inside & only_if(output < num_times - 1, tile)
            a = tl.load(here + size + place, mask=arrived, other=0.0)
            a += tl.load(grad + output * size + place, mask=inside, other=0.0)
            y = tl.load(solution + output * size + place, mask=inside, other=0.0)
            tl.store(here + place, y, mask=inside)
            tl.store(here + size + place, a, mask=inside)
            tl.store(mine + 5, total(a * 0, inside))
        else:
            f = tl.load(here + 2 * size + place, mask=inside, other=0.0)
            g = tl.load(here + 3 * size + place, mask=inside, other=0.0)
            tl.store(slopes + tile, f)
            tl.store(slopes + S * B * D + tile, g)
        tl.debug_barrier()
        time_slope = 0.0 * u
        time_change = 0.0 * u
        time_error = 0.0 * u
        for s in range(first, last):
            c_s = tl.load(tableau + (S + 3) * S + s, mask=s < S, other=0.0)
            moment = tl.where(phase == GUESS, (u + dt).to(DTYPE), node(u, u1, c_s, DTYPE, True))
            _stage(
                weights, record, tableau, slopes, here, size, place, inside,
                s, tl.minimum(s, S - 1), moment, h, sign, EVALUATE, VJP, F, S, B, D,
            )  # fmt: skip
            of_rows = TIME_GRADIENT(weights, record, F, B)[:, None]
            time_slope = tl.sum(tl.sum(tl.where(in_batch, of_rows, 0.0).to(tl.float64), 1), 0)
            is_inner = s < S
            time_change += time_slope * tl.load(tableau + S * S + s, mask=is_inner, other=0.0)
            time_error += time_slope * tl.load(tableau + (S + 2) * S + s, mask=is_inner, other=0.0)
        tl.store(mine + 4, time_slope)
        for part in range(2):
            x = tl.load(here + part * size + place, mask=inside, other=0.0)
            own = slopes + part * S * B * D
            slope = tl.load(own + latest * B * D + tile)
            if phase == STEP:
                x1 = x + h * weighted_sum(tableau + S * S, own, tile, S)
                error = h * weighted_sum(tableau + (S + 2) * S, own, tile, S)
                square = total(scaled_square(error, larger(x, x1), settings), inside)
                tl.store(there + part * size + place, x1, mask=inside)
                tl.store(there + (2 + part) * size + place, slope, mask=inside)
            elif phase == GUESS:
                change = slope - tl.load(own + tile)
                square = total(scaled_square(change, tl.abs(x), settings), inside)
            else:
                square = total(scaled_square(x, tl.abs(x), settings), inside)
                of_slope = total(scaled_square(slope, tl.abs(x), settings), inside)
                tl.store(mine + 2 + part, of_slope)
                tl.store(here + (2 + part) * size + place, slope, mask=inside)
            tl.store(mine + part, square)
        if phase == STEP:
            tl.store(mine + 2, time_change)
            tl.store(mine + 3, time_error)
            if (output == 1) & (u1 >= end):
                # Before it is known whether the attempt stands: another one writes it again.
                fraction = tl.zeros([1, 1], tl.float64) + (end - u) / (u1 - u)
                a = tl.load(here + size + place, mask=inside, other=0.0)
                a += h * interpolated(tableau, slopes + S * B * D, tile, fraction, S)
                a += tl.load(grad + place, mask=inside, other=0.0)
                at = x_grad + first_row * DATA + r * DATA + c
                tl.store(at, a, mask=in_batch & (c < DATA))
        tl.debug_barrier()
        count = 0
        if not LOOP:
            count = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
        if count == programs - 1:
            add_up(sums, programs, progress + TOTALS)
            tl.debug_barrier()
            if phase == STEP:
                if KEEP:
                    tl.store(steps + 3 * slot, u)
                    tl.store(steps + 3 * slot + 1, u1)
                    tl.store(steps + 3 * slot + 2, output.to(tl.float64))
                after_attempt(
                    control, progress, settings, tableau, u, dt, u1, output, num_times, size, end,
                    limit - before, S,
                )  # fmt: skip
            elif phase == GUESS:
                slope = tl.load(progress + TOTALS + 4)
                change = slope - tl.load(progress + TIME_SLOPE)
                difference = norm(progress, 0, change, 0.0 * u, settings, size)
                controller.after_guess(control, settings, u, dt, difference, end, limit)
            else:
                after_start(
                    control, progress, settings, u, output, num_times, size, end, limit - before
                )
            if not LOOP:
                tl.store(arrivals, 0)
        tl.debug_barrier()
        running = False
        if LOOP:
            running = tl.load(control + STATUS, cache_modifier=".cg") == RUNNING


@triton.jit
def add_up(sums, programs, to):
    """Adds the programs' sums, always in the same order. [SUMS]."""
    i = tl.arange(0, WAVE)[:, None]
    k = tl.arange(0, SUMS)
    wave = tl.zeros([WAVE, SUMS], tl.float64)
    for begin in range(0, programs, WAVE):
        at = sums + (begin + i) * SUMS + k[None, :]
        wave += tl.load(at, mask=begin + i < programs, other=0.0, cache_modifier=".cg")
    tl.store(to + k, tl.sum(wave, 0))


@triton.jit
def norm(progress, part, time, size_of_time, settings, size):
    """The largest of the norms of the gradient of t, y, and a; nan if one is nan.

    Args:
        part: 0, or 2: which sums of squares.
        time: What is measured of the gradient of t, and how large that is.
    """
    squares = progress + TOTALS + part
    count = tl.maximum(size, 1).to(tl.float64)
    of_y = tl.sqrt(tl.load(squares) / count)
    of_a = tl.sqrt(tl.load(squares + 1) / count)
    tolerance = tl.load(settings + ATOL) + tl.load(settings + RTOL) * size_of_time
    return larger(larger(tl.abs(time) / tolerance, of_y), of_a)


@triton.jit
def after_start(control, progress, settings, u, output, num_times, size, end, capacity):
    """After the first evaluation of a piece: the step to try, or what there is to choose it by."""
    slope = tl.load(progress + TOTALS + 4)
    is_finite = tl.load(progress + TOTALS + 5) == 0
    tl.store(progress + TIME_SLOPE, slope)
    if output == num_times - 1:
        d0 = norm(progress, 0, 0.0 * u, 0.0 * u, settings, size)
        d1 = norm(progress, 2, slope, 0.0 * u, settings, size)
        controller.after_start(control, settings, u, d0, d1, is_finite, end, capacity)
    else:
        tl.store(control + NFE, tl.load(control + NFE) + 1)
        tl.store(control + OUTPUT, (num_times - output).to(tl.float64))
        tl.store(control + NON_FINITE_AT, u)
        tl.store(control + NON_FINITE_COUNT, 0.0)
        tl.store(control + PHASE, 2.0)
        dt = controller.clamp(tl.load(control + DT), settings)
        dt = controller.rounded(dt, settings)
        controller.go_on(control, settings, u, dt, 0.0 * u, end, capacity)
        if is_finite == 0:
            tl.store(control + STATUS, NON_FINITE_INPUT)


@triton.jit
def after_attempt(
    control, progress, settings, tableau, u, dt, u1, output, num_times, size, end, capacity,
    S: tl.constexpr,
):  # fmt: skip
    """After an attempt from u to u1: as controller.after_attempt; and after a piece, the next."""
    time = tl.load(progress + TIME)
    slope = tl.load(progress + TIME_SLOPE)
    change = slope * tl.load(tableau + S * S) + tl.load(progress + TOTALS + 2)
    error = slope * tl.load(tableau + (S + 2) * S) + tl.load(progress + TOTALS + 3)
    time1 = time + (u1 - u) * change
    ratio = norm(progress, 0, (u1 - u) * error, larger(time, time1), settings, size)
    accepted = tl.load(control + ACCEPTED)
    tl.debug_barrier()  # which writes it
    controller.after_attempt(
        control,
        settings,
        u,
        dt,
        u1,
        ratio,
        num_times - output,
        S - 1,
        end,
        capacity,
        controller.MOST_NON_FINITE,
    )
    tl.debug_barrier()
    accepted_now = tl.load(control + ACCEPTED)
    if accepted_now > accepted:
        tl.store(progress + TIME, time1)
        tl.store(progress + TIME_SLOPE, tl.load(progress + TOTALS + 4))
    if (tl.load(control + STATUS) == SUCCESS) & (output > 1):
        rejected = tl.load(control + REJECTED)
        tl.debug_barrier()
        of_accepted = progress + ACCEPTED_BEFORE
        of_rejected = progress + REJECTED_BEFORE
        tl.store(of_accepted, tl.load(of_accepted) + accepted_now)
        tl.store(of_rejected, tl.load(of_rejected) + rejected)
        tl.store(control + ACCEPTED, 0.0)
        tl.store(control + REJECTED, 0.0)
        tl.store(control + PHASE, 0.0)
        tl.store(control + STATUS, RUNNING)


# --- weight gradients of adaptive steps -----------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "programs"])
def quadrature(
    weights, tableau, settings, times, states, steps, control, progress, sums, scratch,
    rows, programs,
    EVALUATE: tl.constexpr, VJP: tl.constexpr, ACCUMULATE: tl.constexpr, F: tl.constexpr,
    SIZE: tl.constexpr, WEIGHTS: tl.constexpr, DIM: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """The weights' gradients along the steps that `adaptive` took; nothing unless it succeeded.

    A program makes the stages of its pairs of a step and a tile again and adds them to sums of its
    own. The stage that a step hands on to the next has its weight in both.

    Args:
        states, steps, control, progress: What `adaptive` left with KEEP.
        sums: Weight gradients of each program, [programs, WEIGHTS], 0 before.
        scratch: Of each program SCRATCH numbers: slopes; S records; S weights.
        SIZE: Numbers in a record.
        WEIGHTS: Numbers in all weights.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, D)[None, :]
    size = rows.to(tl.int64) * DIM
    tile = tl.arange(0, B)[:, None] * D + c
    slopes = scratch + pid.to(tl.int64) * SCRATCH
    records = slopes + 2 * S * B * D
    shares = records + S * SIZE
    DTYPE: tl.constexpr = states.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    sums += pid.to(tl.int64) * WEIGHTS
    end = -tl.load(times)
    taken = (tl.load(progress + ACCEPTED_BEFORE) + tl.load(control + ACCEPTED)).to(tl.int32)
    taken = tl.where(tl.load(control + STATUS) == SUCCESS, taken, 0)
    tiles = tl.cdiv(rows, B)
    for index in range(pid, tiles * taken, programs):
        step = (index // tiles).to(tl.int64)
        first_row = (index % tiles).to(tl.int64) * B
        r = tl.arange(0, B)[:, None]
        inside = (first_row + r < rows) & (c < DIM)
        place = r * DIM + c
        here = states + step * 4 * size + first_row * DIM
        at = steps + 3 * step
        u0 = tl.load(at)
        u1 = tl.load(at + 1)
        piece = tl.load(at + 2)
        # The stage that is handed on has made its own contribution in the step before.
        first = 1
        if piece != tl.load(at - 1, mask=step > 0, other=0.0):
            first = 0
        follows = step + 1 < taken
        follows = follows & (piece == tl.load(at + 5, mask=follows, other=0.0))
        f = tl.load(here + 2 * size + place, mask=inside, other=0.0)
        g = tl.load(here + 3 * size + place, mask=inside, other=0.0)
        tl.store(slopes + tile, f)
        tl.store(slopes + S * B * D + tile, g)
        tl.debug_barrier()
        for s in range(first, S):
            u = node(u0, u1, tl.load(tableau + (S + 3) * S + s), DTYPE, True)
            _stage(
                weights, records + s * SIZE, tableau, slopes, here, size, place, inside,
                s, s, u, (u1 - u0).to(DTYPE), sign, EVALUATE, VJP, F, S, B, D,
            )  # fmt: skip
            share = share_of(tableau, s, u0, u1, end, S)
            if follows & (s == S - 1):
                share += share_of(tableau, 0, u1, tl.load(at + 4), end, S)
            tl.store(shares + s, share.to(DTYPE))
        ACCUMULATE(sums, records, shares, first, S, rows - first_row, F, B, SIZE)


@triton.jit
def share_of(tableau, s, u0, u1, end, S: tl.constexpr):
    """Weight of stage s of a step in an integral from u0 to u1, or to the end if that is before."""
    inside = interpolant(tableau, s, (end - u0) / (u1 - u0), S)
    return (u1 - u0) * tl.where(u1 >= end, inside, tl.load(tableau + S * S + s))
