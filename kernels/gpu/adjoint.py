"""The discrete gradient: exact for the computed solution, step sizes being constants.

A program goes through the checkpoints of its tiles from the last step to the first, makes the
stages of a step again, takes the vector-Jacobian product of each, and adds the step's weight
gradients to sums of its own. These are added in the order of programs: two runs are equal bitwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu.controller import ACCEPTED, CONTROL, SIGN
from anode_fast.kernels.gpu.runge_kutta import interpolant, node, only_if, weighted_sum

BLOCK = tl.constexpr(64)  # weights that a program of `reduce` adds up
WAVE = tl.constexpr(32)  # and programs whose sums it adds at once


@triton.jit(do_not_specialize=["rows", "num_times", "num_steps", "programs"])
def discrete_gradient(
    weights, tableau, settings, times, ends, plan, states, control, grad, x_grad, sums, scratch,
    rows, num_times, num_steps, programs,
    EVALUATE: tl.constexpr, VJP: tl.constexpr, ACCUMULATE: tl.constexpr, F: tl.constexpr,
    SIZE: tl.constexpr, WEIGHTS: tl.constexpr, DIM: tl.constexpr, DATA: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, D: tl.constexpr, SCRATCH: tl.constexpr,
    TILE: tl.constexpr, FIXED: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Gradients for x and the weights of a solve by any kernel of runge_kutta.py.

    Args:
        weights, tableau, settings, times, states, control: The solve's.
        ends: FIXED: as the solve's. Else the accepted steps: its `steps`.
        plan: FIXED: as the solve's. Else it is not used.
        grad: Cotangent of the solution, [num_times, rows, DIM].
        x_grad: [rows, DATA], written.
        sums: Weight gradients of each program, [programs, WEIGHTS], 0 before.
        scratch: Of each program SCRATCH numbers: stages [S, B, D]; cotangents of the stages'
            arguments and of the solution [S + 1, B, D]; S records; S ones.
        num_steps: FIXED: how many. Else the solve's control tells.
        SIZE: Numbers in a record.
        WEIGHTS: Numbers in all weights; 0 if their gradients are not wanted.
        TILE: Rows of the solve's tiles, a multiple of B.
    """
    pid = tl.program_id(0)
    c = tl.arange(0, D)[None, :]
    size = rows.to(tl.int64) * DIM
    tile = tl.arange(0, B)[:, None] * D + c
    stages = scratch + pid.to(tl.int64) * SCRATCH
    arguments = stages + S * B * D  # cotangents
    records = arguments + (S + 1) * B * D
    ones = records + S * SIZE
    DTYPE: tl.constexpr = grad.dtype.element_ty
    sign = tl.load(settings + SIGN).to(DTYPE)
    sums += pid.to(tl.int64) * WEIGHTS
    for s in range(S):
        tl.store(ones + s, 1.0)
    for index in range(pid, tl.cdiv(rows, B), programs):
        r = (index * B + tl.arange(0, B))[:, None]
        in_batch = r < rows
        inside = in_batch & (c < DIM)
        place = r.to(tl.int64) * DIM + c
        taken = num_steps
        if not FIXED:
            of_tile = control + (index * B // TILE * CONTROL if BY_ROW else 0)
            taken = tl.load(of_tile + ACCEPTED).to(tl.int32)
        output = num_times - 1
        adj_y = tl.zeros([B, D], DTYPE)  # cotangents of the state and its derivative handed on
        adj_f = tl.zeros([B, D], DTYPE)
        for back in range(taken):
            step = (taken - 1 - back).to(tl.int64)
            first = tl.where(step > 0, 1, 0)
            last = S
            if FIXED:
                first = tl.load(plan + 4 * step + 2)
                last = tl.load(plan + 4 * step + 3)
            if BY_ROW:
                t0 = tl.load(ends + step * 2 * rows + r, mask=in_batch, other=0.0)
                t1 = tl.load(ends + (step * 2 + 1) * rows + r, mask=in_batch, other=0.0)
            else:
                t0 = tl.load(ends + (step if FIXED else 2 * step)) + tl.zeros([1, 1], tl.float64)
                t1 = tl.load(ends + (step if FIXED else 2 * step) + 1)
                t1 += tl.zeros([1, 1], tl.float64)
            moved = t1 > t0
            h = (t1 - t0).to(DTYPE)
            y = tl.load(states + 2 * step * size + place, mask=inside, other=0.0)
            if first > 0:
                f = tl.load(states + (2 * step + 1) * size + place, mask=inside, other=0.0)
                tl.store(stages + tile, f)
            tl.debug_barrier()
            for s in range(first, last):
                t = node(t0, t1, tl.load(tableau + (S + 3) * S + s), DTYPE, not FIXED)
                argument = y + h * weighted_sum(tableau + s * S, stages, tile, S)
                k = sign * EVALUATE(weights, records + s * SIZE, sign * t, argument, F, B, True)
                tl.store(stages + s * B * D + tile, tl.where(inside, k, 0.0))
                tl.debug_barrier()

            # Output times inside the step: those from `output` down to, but without, `others`.
            adj_y1 = adj_y
            adj_y = tl.zeros([B, D], DTYPE)
            start = tl.min(tl.min(tl.where(moved, t0, float("inf")), 1), 0)
            stop = tl.max(tl.max(tl.where(moved, t1, float("-inf")), 1), 0)
            if BY_ROW:
                output = num_times - 1
            while _time(times, output) > stop:
                output -= 1
            others = output
            while _time(times, others) > start:
                time = _time(times, others)
                g = _output_cotangent(grad + others * size + place, inside, time, t0, t1)
                is_solution = FIXED & (time == stop)  # or it is interpolated
                adj_y1 += tl.where(is_solution, g, 0.0)
                adj_y += tl.where(is_solution, 0.0, g)
                others -= 1
            tl.store(arguments + S * B * D + tile, adj_y1)
            adj_y += adj_y1
            tl.debug_barrier()
            for forth in range(0, last):
                s = last - 1 - forth
                cotangent = tl.zeros([B, D], DTYPE)
                for j in tl.static_range(1, S + 1):  # later stages' arguments, and the solution
                    weight = tl.load(tableau + j * S + s).to(DTYPE)
                    used = (weight != 0) & ((j < last) | (j == S))
                    at = arguments + j * B * D + tile
                    cotangent += weight * tl.load(at, mask=only_if(used, tile), other=0.0)
                i = output
                while i > others:
                    time = _time(times, i)
                    is_solution = FIXED & (time == stop)
                    if is_solution == 0:
                        fraction = (time - t0) / tl.where(moved, t1 - t0, 1.0)
                        share = interpolant(tableau, s, fraction, S).to(DTYPE)
                        at = grad + i * size + place
                        cotangent += share * _output_cotangent(at, inside, time, t0, t1)
                    i -= 1
                cotangent *= h
                if s == S - 1:
                    cotangent += tl.where(moved, adj_f, 0.0)
                    adj_f = tl.where(moved, 0.0, adj_f)
                if s < first:
                    adj_f += cotangent
                else:
                    if s == 0:  # the derivative at the start, also of rows that did not move yet
                        cotangent += adj_f
                    g = VJP(weights, records + s * SIZE, sign * cotangent, F, B)
                    g = tl.where(inside, g, 0.0)
                    adj_y += g
                    tl.store(arguments + s * B * D + tile, g)
                    tl.debug_barrier()
            output = others
            if WEIGHTS > 0:
                ACCUMULATE(sums, records, ones, first, last, rows - index * B, F, B, SIZE)
        adj_y += tl.load(grad + place, mask=inside, other=0.0)
        at = r.to(tl.int64) * DATA + c
        tl.store(x_grad + at, adj_y, mask=in_batch & (c < DATA))


@triton.jit
def _time(times, i):
    """Output time i; of the first one, which is in no step, minus infinity."""
    return tl.load(times + i, mask=i > 0, other=float("-inf"))


@triton.jit
def _output_cotangent(at, inside, time, t0, t1):
    """Cotangent of an output, 0 for rows whose step from t0 to t1 does not have its time inside."""
    return tl.load(at, mask=inside & (t0 < time) & (time <= t1), other=0.0)


@triton.jit(do_not_specialize=["programs"])
def reduce(sums, out, programs, WEIGHTS: tl.constexpr):
    """Adds up the programs' sums, always in the same order: out[i] = sum of sums[program, i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    program = tl.arange(0, WAVE)[:, None]
    wave = tl.zeros([WAVE, BLOCK], sums.dtype.element_ty)
    for begin in range(0, programs, WAVE):
        at = sums + (begin + program).to(tl.int64) * WEIGHTS + i
        wave += tl.load(at, mask=(begin + program < programs) & (i < WEIGHTS), other=0.0)
    total = tl.sum(wave, 0)[None, :]
    tl.store(out + i, total, mask=i < WEIGHTS)
