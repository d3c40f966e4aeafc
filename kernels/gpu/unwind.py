"""The discrete gradient of solves stage by stage: exact, step sizes being constants.

A round of launches is a step, from the last one to the first. `rewind` finds it among the
checkpoints, and combine.stage makes the arguments of its stages again. From the last stage to the
first then `cotangent` collects what depends on it, and the field's launches take the product; each
group goes back through its own steps. See combine.py for groups, cursors and memory. Beside it:

    grad       [num_times, images, CHANNELS, height, width]  cotangent of the solution
    adjoints   [S + 1, groups * pixels, D]  cotangents of the stages' arguments; of the state after
    adj_y      [groups * pixels, D]         cotangent of the state handed on to the step before
    adj_f      [groups * pixels, D]         and of its derivative
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu.combine import (
    BACK,
    CURSOR,
    LAST,
    T0,
    T1,
    H,
    of_images,
    rest,
    set_cursor,
    tile_of,
)
from anode_fast.kernels.gpu.controller import ACCEPTED, CONTROL, SIGN
from anode_fast.kernels.gpu.runge_kutta import interpolant, only_if


@triton.jit(do_not_specialize=["images", "pixels", "tiles", "capacity", "num_times", "num_steps"])
def rewind(
    tableau, settings, times, ends, plan, states, control, grad, arguments, stages, adjoints, adj_y,
    cursor, images, pixels, tiles, capacity, num_times, num_steps,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Begins a round: which step it is, its first argument, and the outputs inside it.

    Args:
        ends: FIXED: as the solve's. Else the accepted steps: its `steps`.
        plan: FIXED: as the solve's. Else it is not used.
        states, control: The solve's, with KEEP.
        images, pixels, tiles: Of a group.
        capacity: Steps of a group for which `ends` has room.
        num_steps: FIXED: how many. Else the solve's control tells.
    """
    group, p, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    cursor += group * (CURSOR + S)
    is_first = tl.program_id(0) % tiles == 0
    size = pixels.to(tl.int64) * (tl.num_programs(0) // tiles) * D
    DTYPE: tl.constexpr = states.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    taken = num_steps.to(tl.int64)
    if not FIXED:
        taken = tl.load(control + group * CONTROL + ACCEPTED).to(tl.int64)
    step = taken - 1 - tl.load(cursor + BACK).to(tl.int64)
    if step >= 0:
        if FIXED:
            at = ends + step
            first = tl.load(plan + 4 * step + 2)
            last = tl.load(plan + 4 * step + 3)
        else:
            at = ends + 2 * (group * capacity + step)
            first = tl.where(step > 0, 1, 0)
            last = S
        t0 = tl.load(at)
        t1 = tl.load(at + 1)
        h = (t1 - t0).to(DTYPE)
        here = states + 2 * step * size + place
        y = tl.load(here, mask=inside, other=0.0)
        if first > 0:
            f = tl.load(here + size, mask=inside, other=0.0)
            tl.store(stages + place, f, mask=inside)
            argument = y + h * tl.load(tableau + S).to(DTYPE) * f
            tl.store(arguments + size + place, argument, mask=inside)
        else:
            tl.store(arguments + place, y, mask=inside)
        adj_y1 = tl.load(adj_y + place, mask=inside, other=0.0)
        adj_inside = tl.zeros([B, D], DTYPE)
        for i in range(1, num_times):
            time = tl.load(times + i)
            if (t0 < time) & (time <= t1):
                g = _output_cotangent(
                    grad, i, group, p, inside, images, tiles, AREA, CHANNELS, D
                )  # fmt: skip
                is_solution = FIXED & (time == t1)  # or it is interpolated
                adj_y1 += tl.where(is_solution, g, 0.0)
                adj_inside += tl.where(is_solution, 0.0, g)
        tl.store(adjoints + S * size + place, adj_y1, mask=inside)
        tl.store(adj_y + place, adj_y1 + adj_inside, mask=inside)
        if is_first:
            set_cursor(
                cursor, tableau, sign, t0, t1, h, first, last, step, S, DTYPE, not FIXED
            )  # fmt: skip
    elif is_first:
        rest(cursor, S)


@triton.jit
def _output_cotangent(
    grad, i, group, p, inside, images, tiles, AREA: tl.constexpr, CHANNELS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Cotangent of output i at a tile. [B, D]."""
    at = grad + images.to(tl.int64) * (tl.num_programs(0) // tiles) * (CHANNELS * AREA) * i
    at += of_images(group, p, images, AREA, CHANNELS, D)
    return tl.load(at, mask=inside & (tl.arange(0, D)[None, :] < CHANNELS), other=0.0)


@triton.jit(do_not_specialize=["s", "images", "pixels", "tiles", "num_times"])
def cotangent(
    tableau, settings, times, grad, adjoints, adj_f, found, cursor,
    s, images, pixels, tiles, num_times,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Cotangent of the field's value in stage s; of a stage from the step before, for that step.

    Args:
        found: Written, a state.
        s: Which stage.
        images, pixels, tiles: Of a group.
    """
    group, p, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    cursor += group * (CURSOR + S)
    last = tl.load(cursor + LAST).to(tl.int32)
    if s < last:
        size = pixels.to(tl.int64) * (tl.num_programs(0) // tiles) * D
        DTYPE: tl.constexpr = adjoints.dtype.element_ty
        sign = tl.load(settings + SIGN).to(DTYPE)
        moment = tl.load(cursor + CURSOR + s)
        t0 = tl.load(cursor + T0)
        t1 = tl.load(cursor + T1)
        sum = tl.zeros([B, D], DTYPE)
        for j in range(s + 1, S + 1):  # later stages' arguments, and the state after the step
            weight = tl.load(tableau + j * S + s).to(DTYPE)
            used = (weight != 0) & ((j < last) | (j == S))
            mask = inside & only_if(used, place)
            sum += weight * tl.load(adjoints + j * size + place, mask=mask, other=0.0)
        for i in range(1, num_times):
            time = tl.load(times + i)
            is_inside = (time < t1) if FIXED else (time <= t1)
            if (t0 < time) & is_inside:
                share = interpolant(tableau, s, (time - t0) / (t1 - t0), S).to(DTYPE)
                sum += share * _output_cotangent(
                    grad, i, group, p, inside, images, tiles, AREA, CHANNELS, D
                )  # fmt: skip
        sum *= tl.load(cursor + H).to(DTYPE)
        if s == S - 1:
            sum += tl.load(adj_f + place, mask=inside, other=0.0)
            tl.store(adj_f + place, tl.zeros([B, D], DTYPE), mask=inside)
        if moment == moment:
            tl.store(found + place, sign * sum, mask=inside)
        else:
            sum += tl.load(adj_f + place, mask=inside, other=0.0)
            tl.store(adj_f + place, sum, mask=inside)
    if (s == 0) & (tl.program_id(0) % tiles == 0):
        tl.store(cursor + BACK, tl.load(cursor + BACK) + 1)


@triton.jit(do_not_specialize=["images", "pixels", "tiles"])
def gather(
    adj_y, grad, x_grad, images, pixels, tiles,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, DATA: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient for x, [images, DATA, height, width], when all steps are done."""
    group, p, inside, place = tile_of(tl.program_id(0), tiles, pixels, D, B)
    adj = tl.load(adj_y + place, mask=inside, other=0.0)
    adj += _output_cotangent(grad, 0, group, p, inside, images, tiles, AREA, CHANNELS, D)
    at = x_grad + of_images(group, p, images, AREA, DATA, D)
    tl.store(at, adj, mask=inside & (tl.arange(0, D)[None, :] < DATA))
