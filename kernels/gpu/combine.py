"""Explicit Runge-Kutta solves stage by stage, for fields that read their neighbours.

Such a field can be evaluated only when the state at its argument is there as a whole: each stage is
a launch of its own. A round of launches is one attempt: `begin` makes the first argument, `stage`
evaluates one and makes the next argument, `finish` measures the error and runs the controller, in
the last of its programs to arrive. When a solve has ended its launches return at once, so the host
can queue rounds without waiting.

The pixels of images that take their steps together are a *group*: the whole batch, or one image. A
group is a solve of its own, with its own `control`, its own `cursor`, and its own checkpoints; all
groups go through the rounds together. A program has a tile of B pixels of one group.

A field that PyTorch evaluates needs its arguments as a whole too. Its state is taken as pixels of
one channel; the host evaluates it between the launches, and `value_of_field` reads what it got.

A solver takes the field as constants: EVALUATE, F (see conv.py) and the packed `weights`. See
runge_kutta.py for tableau, settings and times, and controller.py for the control.

Memory, of numbers in the state's dtype unless said otherwise:

    x          [images, DATA, height, width]        the others start at 0
    out        [num_times, images, CHANNELS, height, width]
    states     [slots, 2, groups * pixels, D]       y and its derivative before each step; with a 1
                                                    after the channels of y (and of each argument)
    arguments  [RING, groups * pixels, D]           of stage s: s % RING
    stages     [S, groups * pixels, D]
    cursor     float64 [groups, CURSOR + S]         what this round does; then the time of each
                                                    stage, nan if it is not evaluated
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu import controller
from anode_fast.kernels.gpu.controller import (
    ACCEPTED,
    CONTROL,
    DT,
    GUESS,
    OUTPUT,
    PHASE,
    RUNNING,
    SIGN,
    START,
    STATUS,
    STEP,
    SUCCESS,
    T,
)
from anode_fast.kernels.gpu.runge_kutta import (
    SUMS,
    interpolant,
    larger,
    node,
    only_if,
    output_time,
    scaled_square,
    sum_of,
    total,
)

# Places in a group's cursor, before its moments.
T0 = tl.constexpr(0)  # where the step begins, and where it ends
T1 = tl.constexpr(1)
H = tl.constexpr(2)  # its size in the state's dtype
LAST = tl.constexpr(3)  # first stage that is not needed
SLOT = tl.constexpr(4)  # of the state from which it goes
BACK = tl.constexpr(5)  # of a gradient: rounds so far
CURSOR = tl.constexpr(6)


@triton.jit
def tile_of(index, tiles, pixels, D: tl.constexpr, B: tl.constexpr):
    """Of a tile: its group, its pixels in it, which of them there are, and their places. [B, D]."""
    group = index // tiles
    p = index % tiles * B + tl.arange(0, B)
    place = (group.to(tl.int64) * pixels + p)[:, None] * D + tl.arange(0, D)[None, :]
    return group, p, (p < pixels)[:, None], place


@triton.jit
def of_images(
    group, p, images_of_group, AREA: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Places of a tile's numbers in a tensor [images, CHANNELS, height, width]. [B, D]."""
    image = group.to(tl.int64) * images_of_group + p // AREA
    at = image * (CHANNELS * AREA) + p % AREA
    return at[:, None] + tl.arange(0, D)[None, :] * AREA


@triton.jit
def weighted(row, stages, place, inside, size, begin, end):
    """Sum of the stages from `begin` on, without `end`, with the weights of a row of the tableau.

    Stages of weight 0 do not matter, and may be undefined.
    """
    sum = tl.zeros(place.shape, stages.dtype.element_ty)
    for j in range(begin, end):
        weight = tl.load(row + j).to(sum.dtype)
        mask = inside & only_if(weight != 0, place)
        sum += weight * tl.load(stages + j * size + place, mask=mask, other=0.0)
    return sum


@triton.jit
def interpolated(tableau, stages, place, inside, size, x, S: tl.constexpr):
    """Sum of the stages with their weights at the fraction x of a step."""
    sum = tl.zeros(place.shape, stages.dtype.element_ty)
    for j in range(S):
        weight = interpolant(tableau, j, x, S).to(sum.dtype)
        mask = inside & only_if(weight != 0, place)
        sum += weight * tl.load(stages + j * size + place, mask=mask, other=0.0)
    return sum


@triton.jit
def set_cursor(
    cursor, tableau, sign, t0, t1, h, first, last, slot,
    S: tl.constexpr, DTYPE: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """Notes a step from t0 to t1, and the times of its stages from `first` on, without `last`."""
    tl.store(cursor + T0, t0)
    tl.store(cursor + T1, t1)
    tl.store(cursor + H, h.to(tl.float64))
    tl.store(cursor + LAST, 1.0 * last)
    tl.store(cursor + SLOT, slot.to(tl.float64))
    for s in range(S):
        t = sign * node(t0, t1, tl.load(tableau + (S + 3) * S + s), DTYPE, ADAPTIVE)
        evaluated = (s >= first) & (s < last)
        tl.store(cursor + CURSOR + s, tl.where(evaluated, t.to(tl.float64), float("nan")))


@triton.jit
def rest(cursor, S: tl.constexpr):
    """Notes that there is nothing to be done."""
    tl.store(cursor + LAST, 0.0)
    for s in range(S):
        tl.store(cursor + CURSOR + s, float("nan"))


@triton.jit(do_not_specialize=["images", "pixels", "tiles", "capacity", "num_times"])
def begin(
    x, tableau, settings, times, ends, plan, out, states, arguments, stages, steps, control, cursor,
    images, pixels, tiles, capacity, num_times,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, DATA: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, RING: tl.constexpr, KEEP: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Begins a round: where the step goes from, when its stages are, the first argument.

    Args:
        ends, plan: Of fixed steps: as for runge_kutta.fixed.
        steps: Of adaptive ones, with KEEP: the ends of each, float64 [groups, capacity, 2].
        images, pixels, tiles: Of a group.
        capacity: Steps for which there are checkpoints.
    """
    group, p, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    control += group * CONTROL
    cursor += group * (CURSOR + S)
    is_first = tl.program_id(0) % tiles == 0
    c = tl.arange(0, D)[None, :]
    size = pixels.to(tl.int64) * (tl.num_programs(0) // tiles) * D
    DTYPE: tl.constexpr = states.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    running = tl.load(control + STATUS) == RUNNING
    if running:
        taken = tl.load(control + ACCEPTED).to(tl.int64)
        slot = taken if KEEP else taken % 2
        here = states + 2 * slot * size + place
        if FIXED:
            phase = tl.where(taken == 0, START, STEP)
            t = tl.load(ends + taken)
            t1 = tl.load(ends + taken + 1)
            first = tl.load(plan + 4 * taken + 2)
            last = tl.load(plan + 4 * taken + 3)
            h = (t1 - t).to(DTYPE)
        else:
            phase = tl.load(control + PHASE).to(tl.int32)
            dt = tl.load(control + DT)
            t = tl.where(phase == START, tl.load(times), tl.load(control + T))
            t1 = controller.rounded(t + dt, settings)
            first = tl.where(phase == STEP, 1, S - 1)
            last = S
            h = tl.where(phase == GUESS, dt, tl.where(phase == STEP, t1 - t, 0.0)).to(DTYPE)
        if phase == START:
            at = of_images(group, p, images, AREA, DATA, D)
            y = tl.load(x + at, mask=inside & (c < DATA), other=0.0)
            at = of_images(group, p, images, AREA, CHANNELS, D)
            tl.store(out + at, y, mask=inside & (c < CHANNELS))
            y = tl.where(c == CHANNELS, 1.0, y)
            tl.store(here, y, mask=inside)
        else:
            y = tl.load(here, mask=inside, other=0.0)
        argument = y
        if (first > 0) & ((phase == STEP) | (phase == GUESS)):
            if FIXED:  # the stage at the end of the step before is this one's first
                f = tl.load(stages + (S - 1) * size + place, mask=inside, other=0.0)
                if KEEP:
                    tl.store(here + size, f, mask=inside)
            else:
                f = tl.load(here + size, mask=inside, other=0.0)
            tl.store(stages + place, f, mask=inside)
            weight = tl.load(tableau + S).to(DTYPE)
            argument += h * tl.where(phase == STEP, weight, 1.0) * f
        tl.store(arguments + first % RING * size + place, argument, mask=inside)
        if is_first:
            set_cursor(
                cursor, tableau, sign, t, t1, h, first, last, slot, S, DTYPE, not FIXED
            )  # fmt: skip
            if not FIXED:
                if phase != STEP:
                    moment = sign * tl.where(phase == GUESS, t + dt, t).to(DTYPE)
                    tl.debug_barrier()
                    tl.store(cursor + CURSOR + S - 1, moment.to(tl.float64))
                elif KEEP:
                    at = steps + 2 * (group * capacity + taken)
                    tl.store(at, t)
                    tl.store(at + 1, t1)
    elif is_first:
        rest(cursor, S)


@triton.jit(do_not_specialize=["s", "pixels", "tiles"])
def stage(
    weights, hidden, tableau, settings, states, arguments, stages, cursor, s, pixels, tiles,
    EVALUATE: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, RING: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Evaluates stage s, and makes the argument of the next one.

    Args:
        weights, hidden: The field's.
        s: Which stage.
        AGAIN: Whether only the arguments matter.
    """
    group, p, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    cursor += group * (CURSOR + S)
    moment = tl.load(cursor + CURSOR + s)
    is_followed = s + 1 < tl.load(cursor + LAST)
    needed = moment == moment
    if AGAIN:
        needed &= is_followed
    if needed:
        size = pixels.to(tl.int64) * (tl.num_programs(0) // tiles) * D
        DTYPE: tl.constexpr = states.dtype.element_ty
        sign = tl.load(settings + SIGN).to(DTYPE)
        first = group.to(tl.int64) * pixels + tl.program_id(0) % tiles * B
        x = arguments + s % RING * size
        k = sign * EVALUATE(
            weights, hidden, x, first, p, pixels, p < pixels, moment.to(DTYPE), F, B
        )  # fmt: skip
        k = tl.where(inside, k, 0.0)
        tl.store(stages + s * size + place, k, mask=inside)
        if is_followed:
            h = tl.load(cursor + H).to(DTYPE)
            slot = tl.load(cursor + SLOT).to(tl.int64)
            row = tableau + (s + 1) * S
            sum = tl.load(row + s).to(DTYPE) * k + weighted(row, stages, place, inside, size, 0, s)
            y = tl.load(states + 2 * slot * size + place, mask=inside, other=0.0)
            tl.store(arguments + (s + 1) % RING * size + place, y + h * sum, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("images", "pixels", "tiles", "capacity", "num_times", "num_steps", "patience")
    ]
)
def finish(
    tableau, settings, times, plan, out, states, stages, control, cursor, sums, arrivals,
    images, pixels, tiles, capacity, num_times, num_steps, patience,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, KEEP: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Ends a round: the state after the step, outputs inside it, its error, and what comes next.

    Args:
        plan, num_steps: Of fixed steps.
        sums: float64 [groups * tiles, SUMS].
        arrivals: int32 [groups], 0 before the solve: programs that have done this round.
        images, pixels, tiles: Of a group.
        capacity: Steps for which there are checkpoints.
        patience: As in controller.after_attempt.
    """
    pid = tl.program_id(0)
    group, p, inside, place = tile_of(pid, tiles, pixels, D, B)
    control += group * CONTROL
    cursor += group * (CURSOR + S)
    c = tl.arange(0, D)[None, :]
    is_channel = inside & (c < CHANNELS)
    size = pixels.to(tl.int64) * (tl.num_programs(0) // tiles) * D
    DTYPE: tl.constexpr = states.dtype.element_ty
    running = tl.load(control + STATUS, cache_modifier=".cg") == RUNNING
    if running:
        taken = tl.load(control + ACCEPTED, cache_modifier=".cg").to(tl.int64)
        slot = taken if KEEP else taken % 2
        next_slot = taken + 1 if KEEP else (taken + 1) % 2
        here = states + 2 * slot * size + place
        there = states + 2 * next_slot * size + place
        to = out + of_images(group, p, images, AREA, CHANNELS, D)
        of_time = images.to(tl.int64) * (tl.num_programs(0) // tiles) * (CHANNELS * AREA)
        y = tl.load(here, mask=inside, other=0.0)
        t = tl.load(cursor + T0)
        t1 = tl.load(cursor + T1)
        h = tl.load(cursor + H).to(DTYPE)
        sum0 = 0.0 * tl.load(times)
        sum1 = sum0
        sum2 = sum0
        if FIXED:
            output = tl.load(plan + 4 * taken)
            outputs = tl.load(plan + 4 * taken + 1)
            y1 = y + h * weighted(tableau + S * S, stages, place, inside, size, 0, S)
            while output < outputs:
                time = tl.load(times + output)
                value = y1
                if time != t1:
                    fraction = (time - t) / (t1 - t)
                    value = y + h * interpolated(tableau, stages, place, inside, size, fraction, S)
                tl.store(to + output * of_time, value, mask=is_channel)
                output += 1
            tl.store(there, y1, mask=inside)
        else:
            phase = tl.load(control + PHASE, cache_modifier=".cg").to(tl.int32)
            dt = tl.load(control + DT, cache_modifier=".cg")
            output = tl.load(control + OUTPUT, cache_modifier=".cg").to(tl.int32)
            k = tl.load(stages + (S - 1) * size + place, mask=inside, other=0.0)
            if phase == STEP:
                y1 = y + h * weighted(tableau + S * S, stages, place, inside, size, 0, S)
                row = tableau + (S + 2) * S
                error = h * weighted(row, stages, place, inside, size, 0, S)
                sum0 = total(scaled_square(error, larger(y, y1), settings), is_channel)
                tl.store(there, y1, mask=inside)
                tl.store(there + size, k, mask=inside)
                # Before it is known whether the attempt stands: another one writes them again.
                time = output_time(times, output, num_times)
                while time <= t1:
                    fraction = (time - t) / (t1 - t)
                    value = y + h * interpolated(tableau, stages, place, inside, size, fraction, S)
                    tl.store(to + output * of_time, value, mask=is_channel)
                    output += 1
                    time = output_time(times, output, num_times)
            elif phase == GUESS:
                f = tl.load(here + size, mask=inside, other=0.0)
                sum0 = total(scaled_square(k - f, tl.abs(y), settings), is_channel)
            else:
                sum0 = total(scaled_square(y, tl.abs(y), settings), is_channel)
                sum1 = total(scaled_square(k, tl.abs(y), settings), is_channel)
                sum2 = total(y * 0, is_channel)
                tl.store(here + size, k, mask=inside)
            tl.store(sums + pid * SUMS, sum0)
            tl.store(sums + pid * SUMS + 1, sum1)
            tl.store(sums + pid * SUMS + 2, sum2)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + group, 1, sem="acq_rel", scope="gpu")
        if arrived == tiles - 1:
            tl.store(arrivals + group, 0)
            if FIXED:
                tl.store(control + ACCEPTED, (taken + 1).to(tl.float64))
                done = tl.where(taken + 1 == num_steps, SUCCESS, RUNNING)
                tl.store(control + STATUS, done.to(tl.float64))
            else:
                end = tl.load(times + num_times - 1)
                limit = tl.where(KEEP, capacity, 2147483647).to(tl.float64)
                count = tl.maximum(pixels, 1).to(tl.float64) * CHANNELS
                mine = sums + group * tiles * SUMS
                norm0 = tl.sqrt(sum_of(mine, tiles, SUMS) / count)
                norm1 = tl.sqrt(sum_of(mine + 1, tiles, SUMS) / count)
                if phase == STEP:
                    controller.after_attempt(
                        control, settings, t, dt, t1, norm0, output, S - 1, end, limit, patience
                    )
                elif phase == GUESS:
                    controller.after_guess(control, settings, t, dt, norm0, end, limit)
                else:
                    is_finite = sum_of(mine + 2, tiles, SUMS) == 0
                    controller.after_start(
                        control, settings, t, norm0, norm1, is_finite, end, limit
                    )


# --- fields that PyTorch evaluates ----------------------------------------------------------------


@triton.jit
def value_of_field(
    weights, hidden, x, first, p, pixels, inside, moment, F: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """What a field that PyTorch evaluates returned: an EVALUATE. [B, 1].

    Args:
        weights: The value, one entry for each pixel.
    """
    return tl.load(weights[0] + p, mask=inside, other=0.0)[:, None]


@triton.jit
def tell_times(cursor, moments, S: tl.constexpr):
    """Puts the times of a round's stages where the field reads them. Others stay as they are."""
    for s in range(S):
        t = tl.load(cursor + CURSOR + s)
        tl.store(moments + s, t.to(moments.dtype.element_ty), mask=t == t)
