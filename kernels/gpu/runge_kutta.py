"""Explicit Runge-Kutta solves: fixed steps, adaptive steps, adaptive steps by row.

A solver takes the field as constants: EVALUATE, F (see mlp.py) and the field's `weights`, a tuple
of pointers. The tableau is data: one compiled kernel serves all methods with so many stages. A
program owns a tile of B rows. Its stages are in scratch memory, which stays in the cache, and the
field has one call site, in a loop over stages: code and registers do not grow with their number.

Times, step sizes and the controller are float64, whatever the state's dtype. The rules for steps
and errors are those of anode_fast/controller.py and anode_fast/reference/runge_kutta.py.

Memory, of numbers in the state's dtype unless said otherwise:

    x         [rows, DATA]               data columns of the initial state; the others start at 0
    times     float64 [num_times]        output times, increasing
    out       [num_times, rows, DIM]     the solution
    states    [slots, 2, rows, DIM]      y and its derivative before each step: the checkpoints
    scratch   [programs, S * B * D + R]  of each program: stages, and the field's scratch memory
    tableau   float64 [S + 8, S]         rows of a; b; Euler's method; b_err; c; the interpolant's
                                         coefficients of x, x^2, x^3 and x^4
    settings, control                    see controller.py

Columns D of a tile beyond DIM, and rows beyond the batch, are 0 throughout.
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
    FULL,
    GUESS,
    MAX_NUM_STEPS,
    MAX_STEPS,
    MOST_NON_FINITE,
    NON_FINITE,
    NON_FINITE_INPUT,
    OUTPUT,
    PHASE,
    ROW,
    ROWS,
    RTOL,
    RUNNING,
    SIGN,
    START,
    STATUS,
    STEP,
    SUCCESS,
    UNDERFLOW,
    T,
)

SUMS = tl.constexpr(3)  # that an attempt adds up over the programs
WAVE = tl.constexpr(128)  # programs whose sums are added at once

# --- arithmetic of a step -------------------------------------------------------------------------


@triton.jit
def before(x):
    """The largest number below x."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        smallest = -2147483647
    else:
        bits = x.to(tl.int64, bitcast=True)
        smallest = -9223372036854775807
    bits = tl.where(x > 0, bits - 1, tl.where(x < 0, bits + 1, smallest))
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def node(t0, t1, c, DTYPE: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The time of the node c of a step, in the state's dtype.

    An adaptive method evaluates the end of a step just before it, as torchdiffeq does.
    """
    end = t1.to(DTYPE)
    if ADAPTIVE:
        end = before(end)
    return tl.where(c == 1, end, (t0 + c * (t1 - t0)).to(DTYPE))


@triton.jit
def only_if(condition, tile):
    """A mask for the whole tile: the condition, a number or a column."""
    return tl.where(condition, tile, -1) >= 0


@triton.jit
def weighted_sum(row, stages, tile, S: tl.constexpr):
    """Sum of a tile's stages with the weights of a row of the tableau.

    Stages of weight 0 do not matter, and may be undefined.
    """
    total = tl.zeros(tile.shape, stages.dtype.element_ty)
    for j in tl.static_range(S):
        weight = tl.load(row + j).to(total.dtype)
        at = stages + j * (tile.shape[0] * tile.shape[1])
        total += weight * tl.load(at + tile, mask=only_if(weight != 0, tile), other=0.0)
    return total


@triton.jit
def interpolant(tableau, j, x, S: tl.constexpr):
    """Weight of stage j in the solution at the fraction x of a step, float64."""
    row = tableau + (S + 4) * S + j
    p0 = tl.load(row)
    p1 = tl.load(row + S)
    p2 = tl.load(row + 2 * S)
    return x * (p0 + x * (p1 + x * (p2 + x * tl.load(row + 3 * S))))


@triton.jit
def interpolated(tableau, stages, tile, x, S: tl.constexpr):
    """Sum of a tile's stages with their weights at the fraction x of a step: [1, 1] or [B, 1]."""
    total = tl.zeros(tile.shape, stages.dtype.element_ty)
    for j in tl.static_range(S):
        weight = interpolant(tableau, j, x, S).to(total.dtype)
        at = stages + j * (tile.shape[0] * tile.shape[1])
        total += weight * tl.load(at + tile, mask=only_if(weight != 0, tile), other=0.0)
    return total


@triton.jit
def scaled_square(value, size, settings):
    """(value / (atol + rtol * size)) ** 2."""
    rtol = tl.load(settings + RTOL).to(value.dtype)
    atol = tl.load(settings + ATOL).to(value.dtype)
    ratio = value / (size * rtol + atol)
    return ratio * ratio


@triton.jit
def larger(x, y):
    """The larger of |x| and |y|; nan if one is nan."""
    return tl.maximum(tl.abs(x), tl.abs(y), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_sums(x, inside):
    """Sums over the columns of a tile that are inside, as a float64 column. [B, 1]."""
    sums = tl.sum(tl.where(inside, x, 0.0), 1)
    return sums.to(tl.float64)[:, None]


@triton.jit
def total(x, inside):
    """Sum over the entries of a tile that are inside, float64: of the rows' sums."""
    return tl.sum(tl.sum(tl.where(inside, x, 0.0), 1).to(tl.float64), 0)


@triton.jit
def output_time(times, i, num_times):
    """Output time i; beyond the last one, infinity."""
    return tl.load(times + i, mask=i < num_times, other=float("inf"))


# --- fixed steps ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_stride", "rows", "num_times", "num_steps"])
def fixed(
    x, weights, tableau, settings, times, ends, plan, out, states, control, scratch,
    x_stride, rows, num_times, num_steps,
    EVALUATE: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, DATA: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SCRATCH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A whole solve by fixed steps; one launch, every program takes its tile all the way.

    Args:
        ends: Where steps begin and end, float64 [num_steps + 1].
        plan: Of each step, int32 [num_steps, 4]: first output time inside it, first after it,
            first stage that is not there from the step before, first that is not needed.
        states: With KEEP one slot a step.
        control: Of each tile [CONTROL]: STATUS, and OUTPUT, the first output that is not finite.
    """
    pid = tl.program_id(0)
    r = pid * B + tl.arange(0, B)
    c = tl.arange(0, D)
    inside = (r < rows)[:, None] & (c < DIM)[None, :]
    place = r[:, None].to(tl.int64) * DIM + c[None, :]
    size = rows.to(tl.int64) * DIM
    tile = tl.arange(0, B)[:, None] * D + c[None, :]
    stages = scratch + pid.to(tl.int64) * SCRATCH
    record = stages + S * B * D
    DTYPE: tl.constexpr = x.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    from_x = (r < rows)[:, None] & (c < DATA)[None, :]
    y = tl.load(x + r[:, None].to(tl.int64) * x_stride + c[None, :], mask=from_x, other=0.0)
    tl.store(out + place, y, mask=inside)
    bad = tl.where(total(y * 0, inside) == 0, num_times, -1)
    for i in range(num_steps):
        t0 = tl.load(ends + i)
        t1 = tl.load(ends + i + 1)
        h = (t1 - t0).to(DTYPE)
        output = tl.load(plan + 4 * i)
        outputs = tl.load(plan + 4 * i + 1)
        first = tl.load(plan + 4 * i + 2)
        last = tl.load(plan + 4 * i + 3)
        if KEEP:
            tl.store(states + 2 * i * size + place, y, mask=inside)
        if first > 0:  # the stage at the end of the step before is this one's first
            f = tl.load(stages + (S - 1) * B * D + tile)
            tl.debug_barrier()
            tl.store(stages + tile, f)
            if KEEP:
                tl.store(states + (2 * i + 1) * size + place, f, mask=inside)
            tl.debug_barrier()
        for s in range(first, last):
            row = tableau + s * S
            t = node(t0, t1, tl.load(tableau + (S + 3) * S + s), DTYPE, False)
            argument = y + h * weighted_sum(row, stages, tile, S)
            k = sign * EVALUATE(weights, record, sign * t, argument, F, B, False)
            tl.store(stages + s * B * D + tile, tl.where(inside, k, 0.0))
            tl.debug_barrier()
        y1 = y + h * weighted_sum(tableau + S * S, stages, tile, S)
        while output < outputs:
            time = tl.load(times + output)
            value = y1
            if time != t1:
                fraction = tl.zeros([1, 1], tl.float64) + (time - t0) / (t1 - t0)
                value = y + h * interpolated(tableau, stages, tile, fraction, S)
            tl.store(out + output * size + place, value, mask=inside)
            is_bad = (total(value * 0, inside) != 0) & (output < bad)
            bad = tl.where(is_bad, output, bad)
            output += 1
        y = y1
        tl.debug_barrier()
    status = tl.where(bad < 0, NON_FINITE_INPUT, tl.where(bad < num_times, NON_FINITE, SUCCESS))
    tl.store(control + pid * CONTROL + STATUS, status.to(tl.float64))
    tl.store(control + pid * CONTROL + OUTPUT, bad.to(tl.float64))


# --- adaptive steps -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_stride", "rows", "num_times", "capacity", "programs"])
def adaptive(
    x, weights, tableau, settings, times, out, states, steps, control, sums, arrivals, scratch,
    x_stride, rows, num_times, capacity, programs,
    EVALUATE: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, DATA: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SCRATCH: tl.constexpr, KEEP: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """Adaptive steps, one size for the batch.

    One launch makes one attempt, or the first or second evaluation before them: each program does
    its tile's part and adds up its tile; the last program to arrive adds the programs' sums, in
    their order, and runs the controller. When the solve has ended a launch returns at once. With
    LOOP one program has the whole batch, and one launch makes the whole solve. Where it stands is
    in `control` either way, so a solve that stops FULL goes on after that with a larger capacity.

    Args:
        states: With KEEP `capacity` + 1 slots, else two that take turns.
        steps: With KEEP the ends of each accepted step, float64 [capacity, 2].
        sums: float64 [programs, SUMS].
        arrivals: int32 [1], 0 before the solve: programs that have done this attempt.
    """
    pid = tl.program_id(0)
    r = pid * B + tl.arange(0, B)
    c = tl.arange(0, D)
    inside = (r < rows)[:, None] & (c < DIM)[None, :]
    place = r[:, None].to(tl.int64) * DIM + c[None, :]
    size = rows.to(tl.int64) * DIM
    tile = tl.arange(0, B)[:, None] * D + c[None, :]
    stages = scratch + pid.to(tl.int64) * SCRATCH
    record = stages + S * B * D
    DTYPE: tl.constexpr = x.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    end = tl.load(times + num_times - 1)
    count = tl.maximum(size, 1).to(tl.float64)
    limit = tl.where(KEEP, capacity, 2147483647).to(tl.float64)
    running = tl.load(control + STATUS) == RUNNING
    while running:
        phase = tl.load(control + PHASE).to(tl.int32)
        dt = tl.load(control + DT, cache_modifier=".cg")
        t = tl.load(control + T, cache_modifier=".cg")
        accepted = tl.load(control + ACCEPTED, cache_modifier=".cg").to(tl.int64)
        output = tl.load(control + OUTPUT, cache_modifier=".cg").to(tl.int32)
        if phase == START:
            t = tl.load(times)
            dt = 0.0 * t
        t1 = controller.rounded(t + dt, settings)
        h = tl.where(phase == GUESS, dt, t1 - t).to(DTYPE)
        # Where y and its derivative are, and where the next ones go.
        here = states + tl.where(KEEP, accepted, accepted % 2) * 2 * size + place
        there = states + tl.where(KEEP, accepted + 1, (accepted + 1) % 2) * 2 * size + place
        first = tl.where(phase == STEP, 1, tl.where(phase == GUESS, S + 1, 0))
        last = tl.where(phase == STEP, S, first + 1)
        if phase == START:
            from_x = (r < rows)[:, None] & (c < DATA)[None, :]
            at = x + r[:, None].to(tl.int64) * x_stride + c[None, :]
            y = tl.load(at, mask=from_x, other=0.0)
            f = tl.zeros([B, D], DTYPE)
            tl.store(here, y, mask=inside)
            tl.store(out + place, y, mask=inside)
        else:
            y = tl.load(here, mask=inside, other=0.0)
            f = tl.load(here + size, mask=inside, other=0.0)
            tl.store(stages + tile, f)
        tl.debug_barrier()
        k = f
        for s in range(first, last):
            argument = y + h * weighted_sum(tableau + s * S, stages, tile, S)
            c_s = tl.load(tableau + (S + 3) * S + s, mask=s < S, other=0.0)
            at_node = node(t, t1, c_s, DTYPE, True)
            moment = tl.where(phase == GUESS, (t + dt).to(DTYPE), at_node)
            k = sign * EVALUATE(weights, record, sign * moment, argument, F, B, False)
            k = tl.where(inside, k, 0.0)
            tl.store(stages + tl.minimum(s, S - 1) * B * D + tile, k)
            tl.debug_barrier()
        sum1 = 0.0 * t
        sum2 = 0.0 * t
        if phase == STEP:
            y1 = y + h * weighted_sum(tableau + S * S, stages, tile, S)
            error = h * weighted_sum(tableau + (S + 2) * S, stages, tile, S)
            sum0 = total(scaled_square(error, larger(y, y1), settings), inside)
            tl.store(there, y1, mask=inside)
            tl.store(there + size, k, mask=inside)
            # Before it is known whether the attempt stands: another one writes them again.
            time = output_time(times, output, num_times)
            while time <= t1:
                fraction = tl.zeros([1, 1], tl.float64) + (time - t) / (t1 - t)
                value = y + h * interpolated(tableau, stages, tile, fraction, S)
                tl.store(out + output * size + place, value, mask=inside)
                output += 1
                time = output_time(times, output, num_times)
        elif phase == GUESS:
            sum0 = total(scaled_square(k - f, tl.abs(y), settings), inside)
        else:
            sum0 = total(scaled_square(y, tl.abs(y), settings), inside)
            sum1 = total(scaled_square(k, tl.abs(y), settings), inside)
            sum2 = total(y * 0, inside)
            tl.store(here + size, k, mask=inside)
        tl.store(sums + pid * SUMS, sum0)
        tl.store(sums + pid * SUMS + 1, sum1)
        tl.store(sums + pid * SUMS + 2, sum2)
        tl.debug_barrier()
        arrived = 0
        if not LOOP:
            arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
        if arrived == programs - 1:
            norm0 = tl.sqrt(sum_of(sums, programs, SUMS) / count)
            norm1 = tl.sqrt(sum_of(sums + 1, programs, SUMS) / count)
            if phase == STEP:
                if KEEP:
                    tl.store(steps + 2 * accepted, t)
                    tl.store(steps + 2 * accepted + 1, t1)
                controller.after_attempt(
                    control, settings, t, dt, t1, norm0, output, S - 1, end, limit, MOST_NON_FINITE
                )
            elif phase == GUESS:
                controller.after_guess(control, settings, t, dt, norm0, end, limit)
            else:
                is_finite = sum_of(sums + 2, programs, SUMS) == 0
                controller.after_start(control, settings, t, norm0, norm1, is_finite, end, limit)
            if not LOOP:
                tl.store(arrivals, 0)
        tl.debug_barrier()
        running = False
        if LOOP:
            running = tl.load(control + STATUS, cache_modifier=".cg") == RUNNING


@triton.jit
def sum_of(sums, programs, APART: tl.constexpr):
    """Sum over the programs, always in the same order; their numbers are APART from each other."""
    i = tl.arange(0, WAVE)
    wave = tl.zeros([WAVE], tl.float64)
    for begin in range(0, programs, WAVE):
        at = sums + (begin + i) * APART
        wave += tl.load(at, mask=begin + i < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(wave, 0)


# --- adaptive steps by row ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_stride", "rows", "num_times", "capacity"])
def adaptive_by_row(
    x, weights, tableau, settings, times, out, states, steps, control, row_control, scratch,
    x_stride, rows, num_times, capacity,
    EVALUATE: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, DATA: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SCRATCH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A whole solve by adaptive steps, its own ones for every row; one launch.

    A program makes the attempts of its tile; rows that are done stay where they are. A program that
    stops FULL goes on after that with a larger capacity.

    Args:
        states: With KEEP `capacity` + 1 slots, else one.
        steps: With KEEP the ends of each tile's steps, float64 [capacity, 2, rows]; where a row
            did not move, they are equal.
        control: Of each tile [CONTROL], all 0 at first: STATUS; PHASE; ACCEPTED, steps in which
            some row moved; NFE, attempts; OUTPUT. For failures ROW, ROWS, T and DT.
        row_control: float64 [5, programs * B], all 0 at first: of each row t, dt, the error ratio
            (the norm of its derivative, while the first step is chosen), and how many steps were
            accepted and rejected. Kept there, not in registers: the field needs these.
    """
    pid = tl.program_id(0)
    first_row = pid.to(tl.int64) * B
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    in_batch = first_row + r < rows
    inside = in_batch & (c < DIM)
    place = r * DIM + c
    size = rows.to(tl.int64) * DIM
    tile = r * D + c
    stages = scratch + pid.to(tl.int64) * SCRATCH
    record = stages + S * B * D
    DTYPE: tl.constexpr = x.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    min_step = tl.load(settings + controller.MIN_STEP)
    end = tl.load(times + num_times - 1)
    out += first_row * DIM
    states += first_row * DIM
    steps += first_row
    control += pid * CONTROL
    rows_at = row_control + first_row + r
    of_rows = tl.num_programs(0) * B
    status = tl.load(control + STATUS).to(tl.int32)
    phase = tl.load(control + PHASE).to(tl.int32)
    slot = tl.load(control + ACCEPTED).to(tl.int64)
    attempts = tl.load(control + controller.NFE)
    output = tl.load(control + OUTPUT).to(tl.int32)
    status = tl.where(status == FULL, RUNNING, status)
    while status == RUNNING:
        t = tl.load(rows_at)
        dt = tl.load(rows_at + of_rows)
        if phase == START:
            t = tl.load(times) + 0.0 * t
            dt = 0.0 * t
        active = in_batch & (t < end)
        t1 = tl.where((phase == STEP) & active, t + dt, t)
        h = tl.where(phase == GUESS, dt, t1 - t).to(DTYPE)
        here = states + tl.where(KEEP, slot, 0) * 2 * size
        there = here + tl.where(KEEP, 2 * size, 0)
        first = tl.where(phase == STEP, 1, tl.where(phase == GUESS, S + 1, 0))
        last = tl.where(phase == STEP, S, first + 1)
        if phase == START:
            at = x + (first_row + r) * x_stride + c
            y = tl.load(at, mask=in_batch & (c < DATA), other=0.0)
            tl.store(here + place, y, mask=inside)
            tl.store(out + place, y, mask=inside)
        else:
            f = tl.load(here + size + place, mask=inside, other=0.0)
            tl.store(stages + tile, f)
        tl.debug_barrier()
        for s in range(first, last):
            y = tl.load(here + place, mask=inside, other=0.0)
            argument = y + h * weighted_sum(tableau + s * S, stages, tile, S)
            c_s = tl.load(tableau + (S + 3) * S + s, mask=s < S, other=0.0)
            at_node = node(t, t1, c_s, DTYPE, True)
            moment = tl.where(phase == GUESS, (t + dt).to(DTYPE), at_node)
            k = sign * EVALUATE(weights, record, sign * moment, argument, F, B, False)
            k = tl.where(inside, k, 0.0)
            tl.store(stages + tl.minimum(s, S - 1) * B * D + tile, k)
            tl.debug_barrier()
        k = tl.load(stages + tl.minimum(last - 1, S - 1) * B * D + tile)
        y = tl.load(here + place, mask=inside, other=0.0)
        if phase == STEP:
            y1 = y + h * weighted_sum(tableau + S * S, stages, tile, S)
            error = h * weighted_sum(tableau + (S + 2) * S, stages, tile, S)
            norm = _row_norm(scaled_square(error, larger(y, y1), settings), inside, DIM)
            ratio = tl.where(active, norm, tl.load(rows_at + 2 * of_rows))
            tl.store(rows_at + 2 * of_rows, ratio)
            accept = active & controller.accepts(dt, ratio, settings)
            tl.store(there + place, tl.where(accept, y1, y), mask=inside)
            f = tl.load(stages + tile)
            tl.store(there + size + place, tl.where(accept, k, f), mask=inside)
            moved_to = tl.where(accept, t1, t)
            if KEEP:
                at = steps + slot * 2 * rows + r
                tl.store(at, t, mask=in_batch)
                tl.store(at + rows, moved_to, mask=in_batch)
            # Output times inside some row's step. No active row is behind the first of them.
            high = tl.max(tl.max(tl.where(accept, t1, float("-inf")), 1), 0)
            i = output
            time = output_time(times, i, num_times)
            while time <= high:
                in_step = accept & (t < time) & (time <= t1)
                fraction = tl.where(in_step, (time - t) / tl.where(in_step, t1 - t, 1.0), 0.0)
                value = y + h * interpolated(tableau, stages, tile, fraction, S)
                tl.store(out + i * size + place, value, mask=inside & in_step)
                i += 1
                time = output_time(times, i, num_times)
            at = rows_at + tl.where(accept, 3, 4) * of_rows
            tl.store(at, tl.load(at) + 1.0, mask=active)
            dt = tl.where(active, controller.next_step(dt, ratio, settings), dt)
            t = moved_to
            slot += tl.max(tl.max(accept.to(tl.int32), 1), 0)
            attempts += 1
            low = tl.min(tl.min(tl.where(in_batch, t, float("inf")), 1), 0)
            while output_time(times, output, num_times) <= low:
                output += 1
        elif phase == GUESS:
            change = k - tl.load(stages + tile)
            difference = _row_norm(scaled_square(change, tl.abs(y), settings), inside, DIM)
            slope_norm = tl.load(rows_at + 2 * of_rows)
            tl.debug_barrier()  # no thread writes it before all have read it
            tl.store(rows_at + 2 * of_rows, 0.0 * t)
            dt = controller.initial_step(dt, slope_norm, difference / dt, settings)
            dt = controller.clamp(dt, settings)
            phase = STEP
        else:
            tl.store(here + size + place, k, mask=inside)
            norm = _row_norm(scaled_square(y, tl.abs(y), settings), inside, DIM)
            slope_norm = _row_norm(scaled_square(k, tl.abs(y), settings), inside, DIM)
            given = tl.load(settings + controller.FIRST_STEP)
            if given != 0:
                dt = controller.clamp(given + 0.0 * t, settings)
                phase = STEP
            else:
                dt = controller.first_guess(norm, slope_norm)
                tl.store(rows_at + 2 * of_rows, slope_norm)
                phase = GUESS
            output = 1
            if total(y * 0, inside) != 0:
                status = NON_FINITE_INPUT
        tl.store(rows_at, t)
        tl.store(rows_at + of_rows, dt)
        tl.debug_barrier()
        if (phase == STEP) & (status == RUNNING):
            ratio = tl.load(rows_at + 2 * of_rows)
            active = in_batch & (t < end)
            failing = (controller.finite(ratio) == 0) & (dt <= min_step)
            stuck = active & (((t + dt > t) == 0) | failing)
            too_many = attempts >= tl.load(settings + MAX_NUM_STEPS)
            stopped = tl.where(too_many, active, stuck)
            row = tl.min(tl.min(tl.where(stopped, r, 2147483647), 1), 0)
            if tl.max(tl.max(active.to(tl.int32), 1), 0) == 0:
                status = SUCCESS
            elif row < 2147483647:
                at = states + (tl.where(KEEP, slot, 0) * 2 + 1) * size + place
                f = tl.load(at, mask=inside, other=0.0)
                is_bad = (row_sums(f * 0, inside) != 0) | (controller.finite(dt + ratio) == 0)
                is_bad = tl.max(tl.max((is_bad & (r == row)).to(tl.int32), 1), 0)
                status = tl.where(too_many, MAX_STEPS, tl.where(is_bad != 0, NON_FINITE, UNDERFLOW))
                at_row = tl.sum(tl.sum(tl.where(r == row, t, 0.0), 1), 0)
                slowest = tl.min(tl.min(tl.where(active, t, float("inf")), 1), 0)
                tl.store(control + ROW, (first_row + row).to(tl.float64))
                tl.store(control + ROWS, tl.sum(tl.sum(stopped.to(tl.float64), 1), 0))
                tl.store(control + T, tl.where(too_many, slowest, at_row))
                tl.store(control + DT, tl.sum(tl.sum(tl.where(r == row, dt, 0.0), 1), 0))
            elif KEEP:
                if slot >= capacity:
                    status = FULL
    tl.store(control + STATUS, status.to(tl.float64))
    tl.store(control + PHASE, phase.to(tl.float64))
    tl.store(control + ACCEPTED, slot.to(tl.float64))
    tl.store(control + controller.NFE, attempts)
    tl.store(control + OUTPUT, output.to(tl.float64))


@triton.jit
def _row_norm(squares, inside, DIM: tl.constexpr):
    """Root mean square of each row, [B, 1], from its squares."""
    return tl.sqrt(row_sums(squares, inside) / DIM)
