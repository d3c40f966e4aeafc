"""The continuous gradient stage by stage: the adjoint ODE of fields that read their neighbours.

What it solves, in what pieces, and by which norm is written in continuous.py, whose rules these
are; groups, cursors and rounds are those of combine.py, with one group. A round is an attempt:
`begin`; for each stage combine.stage, which makes y' and the next argument of y, the field's
launches for a df/dy, and `advance`, which makes the next argument of a; then `finish`. The weights'
gradients are integrals along the solution: each stage's are summed up apart, and `commit` adds them
with their shares when the attempt stands.

Memory beside that of combine.py and continuous.py:

    states       [2, 4, pixels, D]   y, its derivative, a, and its derivative; slots take turns
    arguments    [2, pixels, D]      of y; of stage s: s % 2
    a_arguments  [2, pixels, D]      of a
    stages       [S, pixels, D]      derivatives of y
    a_stages     [S, pixels, D]      of a
    of_time      float64 [S, tiles]  a df/dt of each stage
    shares       float64 [S + 1]     of each stage in the integrals; whether the last stage is the
                                     first one of the next attempt

Time is negated: `settings` hold the sign of the solve itself, combine.stage gets its opposite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu import controller
from anode_fast.kernels.gpu.combine import (
    CURSOR,
    LAST,
    SLOT,
    H,
    interpolated,
    of_images,
    rest,
    set_cursor,
    tile_of,
    weighted,
)
from anode_fast.kernels.gpu.continuous import (
    ACCEPTED_BEFORE,
    SUMS,
    TIME_SLOPE,
    TOTALS,
    add_up,
    after_attempt,
    after_start,
    norm,
    share_of,
)
from anode_fast.kernels.gpu.controller import (
    ACCEPTED,
    DT,
    GUESS,
    OUTPUT,
    PHASE,
    RUNNING,
    SIGN,
    START,
    STATUS,
    STEP,
    T,
)
from anode_fast.kernels.gpu.runge_kutta import larger, scaled_square, sum_of, total

BLOCK = tl.constexpr(1024)  # sums of a program of `commit`


@triton.jit
def _attempt(control, progress, settings, times, num_times):
    """What this round is.

    Returns:
        Its phase, where it begins, its size, where it ends, where the piece ends, the output with
        which the piece begins, and the slot of the state.
    """
    phase = tl.load(control + PHASE, cache_modifier=".cg").to(tl.int32)
    dt = tl.load(control + DT, cache_modifier=".cg")
    u = tl.load(control + T, cache_modifier=".cg")
    output = tl.load(control + OUTPUT, cache_modifier=".cg").to(tl.int32)
    before = tl.load(progress + ACCEPTED_BEFORE, cache_modifier=".cg")
    slot = (before + tl.load(control + ACCEPTED, cache_modifier=".cg")).to(tl.int64) % 2
    output = num_times - tl.where(phase == START, output + 1, output)
    end = -tl.load(times + output - 1)
    u = tl.where(phase == START, -tl.load(times + output), u)
    dt = tl.where(phase == START, 0.0 * u, dt)
    u1 = controller.rounded(u + dt, settings)
    arrives = (phase == STEP) & (output > 1) & (u1 >= end)
    u1 = tl.where(arrives, end, u1)
    dt = tl.where(arrives, controller.rounded(u1 - u, settings), dt)
    return phase, u, dt, u1, end, output, slot


@triton.jit(do_not_specialize=["images", "pixels", "tiles", "num_times"])
def begin(
    tableau, settings, times, solution, grad, states, arguments, a_arguments, stages, a_stages,
    shares, control, progress, cursor, images, pixels, tiles, num_times,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Begins a round: at the start of a piece the state; the first arguments; the stages' times."""
    group, p, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    is_first = tl.program_id(0) == 0
    c = tl.arange(0, D)[None, :]
    size = pixels.to(tl.int64) * D
    DTYPE: tl.constexpr = states.dtype.element_ty
    sign = -tl.load(settings + SIGN).to(DTYPE)
    running = tl.load(control + STATUS) == RUNNING
    if running:
        phase, u, dt, u1, _, output, slot = _attempt(control, progress, settings, times, num_times)
        h = tl.where(phase == GUESS, dt, u1 - u).to(DTYPE)
        here = states + 4 * slot * size + place
        first = tl.where(phase == STEP, 1, S - 1)
        a = tl.load(here + 2 * size, mask=inside & (output < num_times - 1), other=0.0)
        if phase == START:
            at = of_images(group, p, images, AREA, CHANNELS, D)
            at += images.to(tl.int64) * (CHANNELS * AREA) * output
            y = tl.load(solution + at, mask=inside & (c < CHANNELS), other=0.0)
            y = tl.where(c == CHANNELS, 1.0, y)
            a += tl.load(grad + at, mask=inside & (c < CHANNELS), other=0.0)
            tl.store(here, y, mask=inside)
            tl.store(here + 2 * size, a, mask=inside)
        else:
            y = tl.load(here, mask=inside, other=0.0)
            a = tl.load(here + 2 * size, mask=inside, other=0.0)
            f = tl.load(here + size, mask=inside, other=0.0)
            g = tl.load(here + 3 * size, mask=inside, other=0.0)
            tl.store(stages + place, f, mask=inside)
            tl.store(a_stages + place, g, mask=inside)
            weight = h * tl.where(phase == STEP, tl.load(tableau + S).to(DTYPE), 1.0)
            y += weight * f
            a += weight * g
        tl.store(arguments + first % 2 * size + place, y, mask=inside)
        tl.store(a_arguments + first % 2 * size + place, a, mask=inside)
        if is_first:
            set_cursor(cursor, tableau, sign, u, u1, h, first, S, 2 * slot, S, DTYPE, True)
            if phase != STEP:
                moment = sign * tl.where(phase == GUESS, u + dt, u).to(DTYPE)
                tl.debug_barrier()
                tl.store(cursor + CURSOR + S - 1, moment.to(tl.float64))
    elif is_first:
        rest(cursor, S)
        for s in range(S + 1):
            tl.store(shares + s, 0.0)


@triton.jit(do_not_specialize=["s", "pixels", "tiles"])
def advance(
    tableau, settings, states, a_arguments, a_stages, product, cursor, s, pixels, tiles,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Makes of a df/dy, in `product`, a stage of a, and the argument of the next one."""
    _, _, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    moment = tl.load(cursor + CURSOR + s)
    if moment == moment:
        size = pixels.to(tl.int64) * D
        DTYPE: tl.constexpr = states.dtype.element_ty
        k = tl.load(settings + SIGN).to(DTYPE) * tl.load(product + place, mask=inside, other=0.0)
        tl.store(a_stages + s * size + place, k, mask=inside)
        if s + 1 < tl.load(cursor + LAST):
            slot = tl.load(cursor + SLOT).to(tl.int64) // 2
            row = tableau + (s + 1) * S
            sum = tl.load(row + s).to(DTYPE) * k
            sum += weighted(row, a_stages, place, inside, size, 0, s)
            a = tl.load(states + (4 * slot + 2) * size + place, mask=inside, other=0.0)
            a += tl.load(cursor + H).to(DTYPE) * sum
            tl.store(a_arguments + (s + 1) % 2 * size + place, a, mask=inside)


@triton.jit(do_not_specialize=["images", "pixels", "tiles", "num_times"])
def finish(
    tableau, settings, times, grad, x_grad, states, stages, a_stages, of_time, shares,
    control, progress, cursor, sums, arrivals, images, pixels, tiles, num_times,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, DATA: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Ends a round: the state after the step, its error, the shares, and what comes next.

    Args:
        x_grad: [images, DATA, height, width], written in the last piece.
        sums: float64 [tiles, SUMS].
        arrivals: int32 [1], 0 before the solve.
    """
    pid = tl.program_id(0)
    group, p, inside, place = tile_of(pid, tiles, pixels, D, B)
    c = tl.arange(0, D)[None, :]
    is_channel = inside & (c < CHANNELS)
    size = pixels.to(tl.int64) * D
    DTYPE: tl.constexpr = states.dtype.element_ty
    running = tl.load(control + STATUS, cache_modifier=".cg") == RUNNING
    if running:
        phase, u, dt, u1, end, output, slot = _attempt(
            control, progress, settings, times, num_times
        )  # fmt: skip
        h = tl.load(cursor + H).to(DTYPE)
        here = states + 4 * slot * size + place
        there = states + 4 * (1 - slot) * size + place
        mine = sums + pid * SUMS
        for part in range(2):
            x = tl.load(here + 2 * part * size, mask=inside, other=0.0)
            own = stages
            if part == 1:
                own = a_stages
            slope = tl.load(own + (S - 1) * size + place, mask=inside, other=0.0)
            if phase == STEP:
                x1 = x + h * weighted(tableau + S * S, own, place, inside, size, 0, S)
                row = tableau + (S + 2) * S
                error = h * weighted(row, own, place, inside, size, 0, S)
                square = total(scaled_square(error, larger(x, x1), settings), is_channel)
                tl.store(there + 2 * part * size, x1, mask=inside)
                tl.store(there + (2 * part + 1) * size, slope, mask=inside)
            elif phase == GUESS:
                change = slope - tl.load(here + (2 * part + 1) * size, mask=inside, other=0.0)
                square = total(scaled_square(change, tl.abs(x), settings), is_channel)
            else:
                square = total(scaled_square(x, tl.abs(x), settings), is_channel)
                of_slope = total(scaled_square(slope, tl.abs(x), settings), is_channel)
                tl.store(mine + 2 + part, of_slope)
                tl.store(mine + 5, total(x * 0, is_channel))  # of a, which comes last
                tl.store(here + (2 * part + 1) * size, slope, mask=inside)
            tl.store(mine + part, square)
        if (phase == STEP) & (output == 1) & (u1 >= end):
            # Before it is known whether the attempt stands: another one writes it again.
            a = tl.load(here + 2 * size, mask=inside, other=0.0)
            fraction = (end - u) / (u1 - u)
            a += h * interpolated(tableau, a_stages, place, inside, size, fraction, S)
            at = of_images(group, p, images, AREA, CHANNELS, D)
            a += tl.load(grad + at, mask=is_channel, other=0.0)
            at = of_images(group, p, images, AREA, DATA, D)
            tl.store(x_grad + at, a, mask=inside & (c < DATA))
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
        if arrived == tiles - 1:
            tl.store(arrivals, 0)
            add_up(sums, tiles, progress + TOTALS)
            tl.debug_barrier()
            for s in range(S):
                tl.store(shares + s, 0.0 * u)
            tl.store(shares + S, 0.0 * u)
            numbers = pixels.to(tl.int64) * CHANNELS
            slope = sum_of(of_time + (S - 1) * tiles, tiles, 1)
            tl.store(progress + TOTALS + 4, slope)
            limit = tl.full([], 2147483647, tl.float64)
            if phase == STEP:
                change = 0.0 * u
                error = 0.0 * u
                for s in range(1, S):
                    of_stage = sum_of(of_time + s * tiles, tiles, 1)
                    change += of_stage * tl.load(tableau + S * S + s)
                    error += of_stage * tl.load(tableau + (S + 2) * S + s)
                tl.store(progress + TOTALS + 2, change)
                tl.store(progress + TOTALS + 3, error)
                before = tl.load(progress + ACCEPTED_BEFORE) + tl.load(control + ACCEPTED)
                tl.debug_barrier()
                after_attempt(
                    control, progress, settings, tableau, u, dt, u1, output, num_times, numbers,
                    end, limit, S,
                )  # fmt: skip
                tl.debug_barrier()
                after = tl.load(progress + ACCEPTED_BEFORE) + tl.load(control + ACCEPTED)
                if after > before:
                    for s in range(S):
                        tl.store(shares + s, share_of(tableau, s, u, u1, end, S))
                    tl.store(shares + S, 1.0)
            elif phase == GUESS:
                tl.debug_barrier()
                change = slope - tl.load(progress + TIME_SLOPE)
                difference = norm(progress, 0, change, 0.0 * u, settings, numbers)
                controller.after_guess(control, settings, u, dt, difference, end, limit)
            else:
                tl.debug_barrier()
                after_start(
                    control, progress, settings, u, output, num_times, numbers, end, limit
                )  # fmt: skip
                tl.store(shares + S, 1.0)


@triton.jit(do_not_specialize=["count"])
def commit(sums, totals, shares, count, S: tl.constexpr):
    """Adds the stages' sums with their shares, and makes room for those of the next attempt.

    Args:
        sums: Of each stage, [S, count].
        totals: [count].
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    found = tl.load(totals + i, mask=mask, other=0.0)
    for s in range(S):
        share = tl.load(shares + s)
        at = sums + s * count.to(tl.int64) + i
        if share != 0:
            found += share.to(found.dtype) * tl.load(at, mask=mask, other=0.0)
    tl.store(totals + i, found, mask=mask)
    last = sums + (S - 1) * count.to(tl.int64) + i
    if tl.load(shares + S) != 0:
        tl.store(sums + i, tl.load(last, mask=mask, other=0.0), mask=mask)
    for s in range(1, S):
        tl.store(sums + s * count.to(tl.int64) + i, tl.zeros([BLOCK], found.dtype), mask=mask)
