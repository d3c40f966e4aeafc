"""Convolutional fields on images: 1x1, activation, 3x3, activation, 1x1, in tiles of pixels.

A field is a tuple of constants, `Conv` made for one kernel, and these functions; a solver gets them
as constants and knows nothing else of it. A tile is B pixels in a row of a *group*: the images that
take their steps together. The state stands in memory [pixels, D], channels last:

    channels | 1 | 0 ... 0

The 1 has the bias of the first convolution as its weight. Outside an image it is 0 as the channels
are, and so is what relu makes of it: zero padding costs nothing. Hidden activations are never in
memory, but made again for each of the nine taps, from few channels; only where the activation costs
more than that, `first_layer` puts those of the first convolution there.

In float32 the products of the 3x3 convolution are made of 16-bit parts, one (as exact as tf32) or
two (as exact as float32), of operands scaled by powers of two: whatever their size, they fit.

Memory, of numbers in the state's dtype unless said otherwise:

    x, cotangent, ...  [groups * pixels, D]  states, of whatever kind
    hidden             [groups * pixels, N]  first hidden layer; not used unless F.through_memory
    deltas             [groups * pixels, N]  cotangents of the second layer's pre-activations
    largest            [groups * tiles, 2]   of each tile: bounds of |first layer| and of |deltas|
    moments            float64               time of each group; nan: it is to be left out
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from anode_fast.kernels.gpu import activations
from anode_fast.kernels.gpu.products import product


class Conv(NamedTuple):
    """A convolutional field as kernels are compiled for it.

    Attributes:
        channels, filters: Of the state, of the hidden layers.
        activation: Number of the activation, as in activations.py.
        time: 1 if the first input channel of every convolution is the time, else 0.
        height, width: Of the images.
        precision: Of products that are not made of parts: "ieee", "tf32x3" or "tf32".
        parts: 16-bit parts of a number in products of the 3x3 convolution; 0: its products are in
            the state's dtype.
        through_memory: Whether the first hidden layer is in memory.
        D, N: Widths of state and hidden layer in a tile, powers of two. D has room for the channels
            and two more.
    """

    channels: int
    filters: int
    activation: int
    time: int
    height: int
    width: int
    precision: str
    parts: int
    through_memory: bool
    D: int
    N: int


# The packed weights, in their order. Of w2 and w2t there are as many as there are parts.
W1 = tl.constexpr(0)  # [D, N]: of the channels, then the bias
W1_TIME = tl.constexpr(1)  # [N]
W2 = tl.constexpr(2)  # [parts, 9, N, N]: of inputs for outputs; scaled
W2_TRANSPOSED = tl.constexpr(3)  # [parts, 9, N, N]: of outputs for inputs
W2_SCALE = tl.constexpr(4)  # [1]: by what
B2 = tl.constexpr(5)  # [N]
W2_TIME = tl.constexpr(6)  # [16, N]: of each tap, then 0
W3 = tl.constexpr(7)  # [N, D]
B3 = tl.constexpr(8)  # [D]
W3_TIME = tl.constexpr(9)  # [D]

TAPS = tl.constexpr(16)  # rows of W2_TIME: enough for a product
BLOCK = tl.constexpr(1024)  # weights that are looked at at a time


# --- weights --------------------------------------------------------------------------------------


@triton.jit
def pack(parameters, weights, F: tl.constexpr):
    """Lays out the weights; one launch of 10 programs.

    Args:
        parameters: Weight and bias of every convolution, as nn.Conv2d has them.
        weights: Packed ones, written.
        F: The field.
    """
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    K: tl.constexpr = F.filters
    T: tl.constexpr = F.time
    C: tl.constexpr = F.channels
    tap = tl.program_id(0)
    n = tl.arange(0, N)[None, :]
    if tap < 9:
        scale = 1.0
        if F.parts > 0:
            # Each program looks for itself: they are few, and another launch would cost more.
            largest = tl.zeros([BLOCK], tl.float32)
            for begin in range(0, K * (T + K) * 9, BLOCK):
                i = begin + tl.arange(0, BLOCK)
                w = tl.load(parameters[2] + i, mask=i < K * (T + K) * 9, other=0.0)
                largest = tl.maximum(largest, tl.abs(w))
            scale = fitting(tl.max(largest, 0))
            tl.store(weights[W2_SCALE], scale)
        for begin in range(0, N, 16):
            m = begin + tl.arange(0, 16)[:, None]
            inside = (m < K) & (n < K)
            for transposed in tl.static_range(2):
                inputs, outputs = m, n
                if transposed:
                    inputs, outputs = n, m
                at = parameters[2] + (outputs * (T + K) + T + inputs) * 9 + tap
                w = tl.load(at, mask=inside, other=0.0) * scale
                to = weights[W2_TRANSPOSED if transposed else W2] + tap * N * N + m * N + n
                high = w.to(to.dtype.element_ty)
                tl.store(to, high)
                if F.parts > 1:
                    tl.store(to + 9 * N * N, (w - high.to(w.dtype)).to(to.dtype.element_ty))
    else:
        d = tl.arange(0, D)[:, None]
        w = tl.load(parameters[0] + n * (T + C) + T + d, mask=(n < K) & (d < C), other=0.0)
        bias = tl.load(parameters[1] + n, mask=n < K, other=0.0)
        tl.store(weights[W1] + d * N + n, tl.where(d == C, bias, w))
        of_time = (n < K) & (T > 0)
        tl.store(weights[W1_TIME] + n, tl.load(parameters[0] + n * (T + C), of_time, other=0.0))
        tl.store(weights[B2] + n, tl.load(parameters[3] + n, mask=n < K, other=0.0))
        j = tl.arange(0, TAPS)[:, None]
        at = parameters[2] + n * (T + K) * 9 + j
        tl.store(weights[W2_TIME] + j * N + n, tl.load(at, mask=of_time & (j < 9), other=0.0))
        m = tl.arange(0, N)[:, None]
        c = tl.arange(0, D)[None, :]
        w = tl.load(parameters[4] + c * (T + K) + T + m, mask=(m < K) & (c < C), other=0.0)
        tl.store(weights[W3] + m * D + c, w)
        tl.store(weights[B3] + c, tl.load(parameters[5] + c, mask=c < C, other=0.0))
        of_time = (c < C) & (T > 0)
        tl.store(weights[W3_TIME] + c, tl.load(parameters[4] + c * (T + K), of_time, other=0.0))


@triton.jit
def fitting(bound):
    """The power of two by which numbers of at most that size fit into float16, float32."""
    bits = bound.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum(14 - ((bits >> 23) - 127), -60), 60)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _first_weights(weights, t, F: tl.constexpr):
    """Of the first convolution at time t. [D, N]."""
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    c = tl.arange(0, D)[:, None]
    n = tl.arange(0, N)[None, :]
    w = tl.load(weights[W1] + c * N + n)
    if F.time:
        w = tl.where(c == F.channels, w + t * tl.load(weights[W1_TIME] + n), w)
    return w


# --- products -------------------------------------------------------------------------------------


@triton.jit
def _weighted(a, scale, weight, total, F: tl.constexpr):
    """Total + (scale * a) @ weight for the block of packed weights that begins there.

    Where there are parts, that of the two small ones is left out: it does not matter.
    """
    N: tl.constexpr = F.N
    at = weight + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    w = tl.load(at)
    if F.parts == 0:
        total = product(a, w, total, F)
    else:
        a = a * scale
        high = a.to(tl.float16)
        if F.parts == 2:
            low = (a - high.to(a.dtype)).to(tl.float16)
            total = tl.dot(low, w, total)
            total = tl.dot(high, tl.load(at + 9 * N * N), total)
        total = tl.dot(high, w, total)
    return total


@triton.jit
def _scaled_product(a, a_scale, b, b_scale, total, F: tl.constexpr):
    """Total + (a_scale * a) @ (b_scale * b), likewise."""
    if F.parts == 0:
        total = product(a, b, total, F)
    else:
        a = a * a_scale
        b = b * b_scale
        a_high = a.to(tl.float16)
        b_high = b.to(tl.float16)
        if F.parts == 2:
            total = tl.dot((a - a_high.to(a.dtype)).to(tl.float16), b_high, total)
            total = tl.dot(a_high, (b - b_high.to(b.dtype)).to(tl.float16), total)
        total = tl.dot(a_high, b_high, total)
    return total


# --- evaluation -----------------------------------------------------------------------------------


@triton.jit
def has_tap(p, inside, tap, F: tl.constexpr):
    """Which pixels have the neighbour of a tap, 0 to 8, in their image. Shaped as p."""
    row = p // F.width % F.height + tap // 3 - 1
    column = p % F.width + tap % 3 - 1
    return inside & (row >= 0) & (row < F.height) & (column >= 0) & (column < F.width)


@triton.jit
def _shift(tap, F: tl.constexpr):
    """How far the neighbour of a tap is, in pixels."""
    return (tap // 3 - 1) * F.width + tap % 3 - 1


@triton.jit
def _bound(w1, x, p, pixels, F: tl.constexpr, B: tl.constexpr):
    """What the first hidden layer of a tile's neighbourhood does not exceed.

    Args:
        w1: The first convolution's weights.
        x: Where the tile's state is.
        p: Its pixels in the group, [B].
        pixels: Of the group.
    """
    D: tl.constexpr = F.D
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    largest = tl.zeros([B, D], x.dtype.element_ty)
    for i in tl.static_range(6):  # one pixel to the left and to the right, in three rows
        shift = (i // 2 - 1) * F.width + 2 * (i % 2) - 1
        q = p[:, None] + shift
        near = tl.load(x + (r + shift) * D + c, mask=(q >= 0) & (q < pixels), other=0.0)
        largest = tl.maximum(largest, tl.abs(near))
    bound = tl.max(tl.max(largest, 1), 0) * tl.max(tl.sum(tl.abs(w1), 0), 0)
    if not _is_homogeneous(F.activation):
        bound += 1  # softplus(0) is 0.7; all others stay within |x| + 1 as well
    return bound


@triton.constexpr_function
def _is_homogeneous(ACT):
    """Whether act(s x) = s act(x) for s > 0. Then act(0) = 0, and it costs next to nothing."""
    return ACT == activations.RELU or ACT == activations.IDENTITY


@triton.jit
def _second_layer(
    weights, hidden, x, p, pixels, inside, t, F: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Pre-activations of the second layer of a tile, [B, N], and the first layer's bound.

    Args:
        weights: Packed.
        hidden, x: Where the tile's first layer is (if in memory), and its state.
        p, inside: Its pixels in the group, and which of them there are, [B].
        pixels: Of the group.
        t: The time, a number in the state's dtype.
        F: The field.
        B: Pixels of a tile.
    """
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    n = tl.arange(0, N)[None, :]
    w1 = _first_weights(weights, t, F)
    bound = 0.0 * t
    scale = 1.0
    back = 1.0
    if F.parts > 0:
        bound = _bound(w1, x, p, pixels, F, B)
        scale = fitting(bound)
        back = 1.0 / (scale * tl.load(weights[W2_SCALE]))
    if _is_homogeneous(F.activation):
        w1 = w1 * scale  # sooner than the activations: they are more
    z = tl.zeros([B, N], x.dtype.element_ty)
    for tap in range(9):
        near = has_tap(p, inside, tap, F)[:, None]
        shift = _shift(tap, F)
        if F.through_memory:
            h = tl.load(hidden + (r + shift) * N + n, mask=near, other=0.0)
        else:
            v = tl.load(x + (r + shift) * D + c, mask=near, other=0.0)
            h = activations.activate(product(v, w1, None, F), F.activation)
        of_tap = weights[W2] + tap * N * N
        z = _weighted(h, 1.0 if _is_homogeneous(F.activation) else scale, of_tap, z, F)
    z = z * back + tl.load(weights[B2] + n)
    if F.time:
        # Zero padding applies to the time too: its share is that of the taps inside the image.
        j = tl.arange(0, TAPS)[None, :]
        times = tl.where(has_tap(p[:, None], inside[:, None], j, F), t, 0.0)
        w = tl.load(weights[W2_TIME] + tl.arange(0, TAPS)[:, None] * N + n)
        EXACT: tl.constexpr = "ieee" if F.precision == "ieee" else "tf32x3"
        z = tl.dot(times.to(z.dtype), w, z, input_precision=EXACT, out_dtype=z.dtype)
    return z, bound


@triton.jit
def evaluate(
    weights, hidden, x, first, p, pixels, inside, t, F: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """dy/dt of a tile.

    Args:
        weights: Packed.
        hidden, x: The first hidden layer (if in memory), and the state.
        first: Place of the tile's first pixel in them, int64.
        p, inside: The tile's pixels in the group, and which of them there are, [B].
        pixels: Of the group.
        t: Time, a number in the state's dtype.
        F: The field, a `Conv`. Where Triton wants a constant (a shape, the end of an unrolled
            loop), versions up to 3.6 want a name bound to it, no attribute.
        B: Pixels of a tile.

    Returns:
        [B, D]; columns beyond the channels are 0.
    """
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    z, _ = _second_layer(
        weights, hidden + first * N, x + first * D, p, pixels, inside, t, F, B
    )  # fmt: skip
    c = tl.arange(0, D)[None, :]
    k = tl.zeros([B, D], z.dtype) + tl.load(weights[B3] + c)
    if F.time:
        k += t * tl.load(weights[W3_TIME] + c)
    w = tl.load(weights[W3] + tl.arange(0, N)[:, None] * D + c)
    return product(activations.activate(z, F.activation), w, k, F)


@triton.jit
def _tile(index, tiles, pixels, B: tl.constexpr):
    """Of a tile: its group, the place of its first pixel, its pixels in the group, which exist."""
    group = index // tiles
    p = index % tiles * B + tl.arange(0, B)
    first = group.to(tl.int64) * pixels + index % tiles * B
    return group, first, p, p < pixels


@triton.jit(do_not_specialize=["moments_stride", "at", "pixels", "tiles"])
def first_layer(
    weights, x, hidden, moments, moments_stride, at, pixels, tiles,
    F: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Puts the first hidden layer into memory; a program for each tile.

    Args:
        weights: Packed.
        x: The state.
        hidden: Written.
        moments, moments_stride, at: Of each group; how far apart; where the first one is.
        pixels, tiles: Of a group.
    """
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    group, first, p, inside = _tile(tl.program_id(0), tiles, pixels, B)
    t = tl.load(moments + group * moments_stride + at)
    if t == t:
        r = tl.arange(0, B)[:, None]
        v = tl.load(
            x + first * D + r * D + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0
        )
        w = _first_weights(weights, t.to(v.dtype), F)
        h = activations.activate(product(v, w, None, F), F.activation)
        place = hidden + first * N + r * N + tl.arange(0, N)[None, :]
        tl.store(place, h, mask=inside[:, None])


# --- vector-Jacobian product ----------------------------------------------------------------------
#
# Three launches: back to the second layer's pre-activations; from there to the state; and the
# weights of the 3x3 convolution. Each program adds weight gradients to sums of its own.


@triton.jit(do_not_specialize=["moments_stride", "at", "pixels", "tiles", "count", "programs"])
def vjp_outer(
    weights, hidden, x, cotangent, deltas, largest, of_time, moments, sums, bias_sums,
    moments_stride, at, pixels, tiles, count, programs,
    F: tl.constexpr, B: tl.constexpr, WEIGHTS: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """Deltas from the cotangent of dy/dt, and the gradients of the last convolution.

    Args:
        weights: Packed.
        hidden, x: The first hidden layer (if in memory), and the state.
        cotangent: Of dy/dt; 0 beyond the channels.
        deltas, largest: Written.
        of_time: With TIME, of each tile float64 [groups * tiles]: written, the gradient of the time
            through the last two convolutions.
        moments, moments_stride, at, pixels, tiles: As for `first_layer`.
        sums, bias_sums: With WEIGHTS, of each program, [programs, N, D] and [programs, 2, D]: of
            the weight, of the bias, of the time's weight. They go on.
        count: Of tiles, in all groups.
        programs: How many share them.
    """
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    pid = tl.program_id(0)
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    n = tl.arange(0, N)[None, :]
    T: tl.constexpr = x.dtype.element_ty
    w3 = tl.load(weights[W3] + n * D + tl.arange(0, D)[:, None])  # [D, N]
    sum_at = sums + pid * N * D + tl.arange(0, N)[:, None] * D + c
    bias_at = bias_sums + pid * 2 * D + tl.arange(0, D)
    total = tl.zeros([N, D], T)
    bias = tl.zeros([D], T)
    time = tl.zeros([D], T)
    if WEIGHTS:
        total = tl.load(sum_at)
        bias = tl.load(bias_at)
        time = tl.load(bias_at + D)
    for index in range(pid, count, programs):
        group, first, p, inside = _tile(index, tiles, pixels, B)
        moment = tl.load(moments + group * moments_stride + at)
        if moment == moment:
            t = moment.to(T)
            z, bound = _second_layer(
                weights, hidden + first * N, x + first * D, p, pixels, inside, t, F, B
            )  # fmt: skip
            g = tl.load(cotangent + first * D + r * D + c, mask=inside[:, None], other=0.0)
            kept = activations.keep(z, F.activation)
            delta = product(g, w3, None, F)
            delta *= activations.derivative(kept, F.activation)
            tl.store(deltas + first * N + r * N + n, delta, mask=inside[:, None])
            tl.store(largest + 2 * index, bound)
            tl.store(largest + 2 * index + 1, tl.max(tl.max(tl.abs(delta), 1), 0))
            if WEIGHTS:
                h = activations.value(kept, F.activation)
                # Pixels that are not there have g = 0.
                total = product(tl.trans(h), g, total, F)
                of_tile = tl.sum(g, 0)
                bias += of_tile
                time += t * of_tile
            if TIME:
                found = tl.sum(tl.sum(g, 0) * tl.load(weights[W3_TIME] + tl.arange(0, D)), 0)
                found = found.to(tl.float64)
                for tap in range(9):
                    near = has_tap(p, inside, tap, F)[:, None]
                    w = tl.load(weights[W2_TIME] + tap * N + tl.arange(0, N))
                    found += tl.sum(tl.sum(tl.where(near, delta, 0.0), 0) * w, 0)
                tl.store(of_time + index, found)
        else:
            tl.store(largest + 2 * index, 0.0)
            tl.store(largest + 2 * index + 1, 0.0)
    if WEIGHTS:
        tl.store(sum_at, total)
        tl.store(bias_at, bias)
        tl.store(bias_at + D, time)


@triton.jit(do_not_specialize=["moments_stride", "at", "pixels", "tiles", "count", "programs"])
def vjp_inner(
    weights, x, deltas, largest, found, total, of_time, moments, sums,
    moments_stride, at, pixels, tiles, count, programs,
    F: tl.constexpr, B: tl.constexpr, NEAR: tl.constexpr,
    ADD: tl.constexpr, WEIGHTS: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """The product with respect to the state, and the gradients of the first convolution.

    Args:
        weights, x, moments, moments_stride, at, pixels, tiles, count, programs: As for
            `vjp_outer`.
        deltas, largest: From there.
        found: The product, written: a state; 0 beyond the channels.
        total: With ADD, gets it added.
        of_time: With TIME, gets the gradient of the time through the first convolution added.
        sums: With WEIGHTS, of each program [programs, N, D]: of the weights, the bias, the time's
            weight, in this order. They go on.
        NEAR: Tiles that hold a tile's neighbourhood, a power of two.
    """
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    pid = tl.program_id(0)
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    n = tl.arange(0, N)[None, :]
    T: tl.constexpr = x.dtype.element_ty
    sum_at = sums + pid * N * D + tl.arange(0, N)[:, None] * D + c
    weight_sum = tl.zeros([N, D], T)
    if WEIGHTS:
        weight_sum = tl.load(sum_at)
    for index in range(pid, count, programs):
        group, first, p, inside = _tile(index, tiles, pixels, B)
        moment = tl.load(moments + group * moments_stride + at)
        if moment == moment:
            t = moment.to(T)
            scale = 1.0
            back = 1.0
            if F.parts > 0:
                tile = index % tiles
                others = tl.maximum(tile * B - F.width - 1, 0) // B + tl.arange(0, NEAR)
                mask = (others < tiles) & (others * B <= tile * B + B + F.width)
                place = largest + 2 * (index - tile + others) + 1
                scale = fitting(tl.max(tl.load(place, mask=mask, other=0.0), 0))
                back = 1.0 / (scale * tl.load(weights[W2_SCALE]))
            g = tl.zeros([B, N], T)
            for tap in range(9):
                # The pixel of which this one is the neighbour of that tap.
                near = has_tap(p, inside, 8 - tap, F)[:, None]
                delta = tl.load(
                    deltas + first * N + (r - _shift(tap, F)) * N + n, mask=near, other=0.0
                )
                g = _weighted(delta, scale, weights[W2_TRANSPOSED] + tap * N * N, g, F)
            v = tl.load(x + first * D + r * D + c, mask=inside[:, None], other=0.0)
            z = product(v, _first_weights(weights, t, F), None, F)
            kept = activations.keep(z, F.activation)
            g = g * back * activations.derivative(kept, F.activation)
            w = tl.load(weights[W1] + c * N + tl.arange(0, N)[:, None])  # [N, D]
            w = tl.where(c < F.channels, w, 0.0)
            of_state = product(g, w, None, F)
            place = first * D + r * D + c
            tl.store(found + place, of_state, mask=inside[:, None])
            if ADD:
                before = tl.load(total + place, mask=inside[:, None], other=0.0)
                tl.store(total + place, before + of_state, mask=inside[:, None])
            if WEIGHTS:
                v = tl.where((c == F.channels + 1) & inside[:, None], t, v)
                weight_sum = product(tl.trans(g), v, weight_sum, F)
            if TIME:
                g = tl.where(inside[:, None], g, 0.0)
                of_tile = tl.sum(tl.sum(g, 0) * tl.load(weights[W1_TIME] + tl.arange(0, N)), 0)
                tl.store(of_time + index, tl.load(of_time + index) + of_tile)
    if WEIGHTS:
        tl.store(sum_at, weight_sum)


@triton.jit(do_not_specialize=["moments_stride", "at", "pixels", "tiles", "count", "programs"])
def vjp_weights(
    weights, hidden, x, deltas, largest, moments, sums, time_sums,
    moments_stride, at, pixels, tiles, count, programs,
    F: tl.constexpr, B: tl.constexpr, TAKE: tl.constexpr,
):  # fmt: skip
    """Gradients of the 3x3 convolution; programs x 9 / TAKE.

    Args:
        weights, hidden, x, moments, moments_stride, at, pixels, tiles, count, programs: As for
            `vjp_outer`.
        deltas, largest: From there.
        TAKE: Taps of a program, 1 or 3.
        sums: Of each program, [programs, 9, N, N]: of inputs for outputs. They go on.
        time_sums: The same of the time's weights, and in row 9 of the bias, [programs, TAPS, N].
    """
    N: tl.constexpr = F.N
    pid = tl.program_id(0)
    tap = tl.program_id(1) * TAKE
    n = tl.arange(0, N)[None, :]
    m = tl.arange(0, N)[:, None]
    T: tl.constexpr = x.dtype.element_ty
    h_scale = 1.0
    d_scale = 1.0
    back = 1.0
    if F.parts > 0:
        most = tl.zeros([BLOCK], T)
        most_delta = tl.zeros([BLOCK], T)
        for begin in range(0, count, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.load(largest + 2 * i, mask=i < count, other=0.0))
            of_delta = tl.load(largest + 2 * i + 1, mask=i < count, other=0.0)
            most_delta = tl.maximum(most_delta, of_delta)
        h_scale = fitting(tl.max(most, 0))
        d_scale = fitting(tl.max(most_delta, 0))
        back = 1.0 / (h_scale * d_scale)
    total = tl.zeros([N, N], T)
    second = tl.zeros([N, N], T)
    third = tl.zeros([N, N], T)
    bias = tl.zeros([TAPS, N], T)
    j = tl.arange(0, TAPS)[:, None]
    is_mine = (j >= tap) & (j < tap + TAKE) & (j < 9)
    for index in range(pid, count, programs):
        group, first, p, inside = _tile(index, tiles, pixels, B)
        moment = tl.load(moments + group * moments_stride + at)
        if moment == moment:
            t = moment.to(T)
            w1 = tl.trans(_first_weights(weights, t, F))
            place = deltas + first * N + tl.arange(0, B)[:, None] * N + n
            delta = tl.load(place, mask=inside[:, None], other=0.0)
            h = _first_layer_transposed(hidden, x, first, p, inside, w1, tap, F, B)
            total = _scaled_product(h, h_scale, delta, d_scale, total, F)
            if TAKE == 3:
                h = _first_layer_transposed(hidden, x, first, p, inside, w1, tap + 1, F, B)
                second = _scaled_product(h, h_scale, delta, d_scale, second, F)
                h = _first_layer_transposed(hidden, x, first, p, inside, w1, tap + 2, F, B)
                third = _scaled_product(h, h_scale, delta, d_scale, third, F)
            has = has_tap(p[None, :], inside[None, :], j, F) & is_mine
            times = tl.where(has, t, tl.where((j == 9) & inside[None, :], 1.0, 0.0))
            bias = product(times.to(T), delta, bias, F)
    place = sums + (pid * 9 + tap) * N * N + m * N + n
    tl.store(place, tl.load(place) + total * back)
    if TAKE == 3:
        tl.store(place + N * N, tl.load(place + N * N) + second * back)
        tl.store(place + 2 * N * N, tl.load(place + 2 * N * N) + third * back)
    place = time_sums + pid * TAPS * N + j * N + n
    mask = is_mine | (j == 9) & (tap == 0)
    before = tl.load(place, mask=mask, other=0.0)
    tl.store(place, before + bias, mask=mask)


@triton.jit
def _first_layer_transposed(
    hidden, x, first, p, inside, w1, tap, F: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """The first hidden layer at a tile's neighbours of a tap, [N, B]. w1: [N, D]."""
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    r = tl.arange(0, B)[None, :] + _shift(tap, F)
    near = has_tap(p, inside, tap, F)[None, :]
    if F.through_memory:
        return tl.load(hidden + first * N + r * N + tl.arange(0, N)[:, None], mask=near, other=0.0)
    else:
        v = tl.load(x + first * D + r * D + tl.arange(0, D)[:, None], mask=near, other=0.0)
        return activations.activate(product(w1, v, None, F), F.activation)
