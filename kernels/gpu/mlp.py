"""Perceptron fields: evaluation, vector-Jacobian product and weight gradients of a tile of rows.

A field is a tuple of constants, `MLP` made for one kernel, and these three functions; a solver gets
them as constants and knows nothing else of it. Hidden units go in blocks, by loops at run time, and
weights are read where they are used: registers hold the state and one block at a time, whatever the
width. What outlives a block is in the program's scratch memory, which stays in the cache.

A record is what a gradient needs of one evaluation, and later holds the cotangents too:

    time [B] | argument [B, D] | kept [LAYERS, B, H] | cotangent [B, D] | deltas [LAYERS, B, H]

`kept` is what activations.py keeps of a hidden layer; deltas are the cotangents of the hidden
layers' pre-activations.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from anode_fast.kernels.gpu import activations


class MLP(NamedTuple):
    """A perceptron as kernels are compiled for it.

    Attributes:
        dim, hidden, layers: Width of the state, of the hidden layers, and how many these are.
        activation: Number of the activation, as in activations.py.
        time: 1 if the first layer's first input is the time, else 0.
        precision: Of matrix products: "ieee", "tf32x3" or "tf32".
        D, H: Widths of state and hidden layer in a tile: powers of two, at least 16.
        N, K: Units of a hidden layer that are computed, and that are summed over, at a time.
    """

    dim: int
    hidden: int
    layers: int
    activation: int
    time: int
    precision: str
    D: int
    H: int
    N: int
    K: int

    def record_size(self, rows: int) -> int:
        """Numbers in a record of that many rows."""
        return rows * (1 + 2 * self.D + 2 * self.layers * self.H)

    @property
    def weights(self) -> int:
        """Numbers in all weights and biases."""
        inner = (self.layers - 1) * self.hidden * (self.hidden + 1)
        return self.hidden * (self.time + self.dim + 1) + inner + self.dim * (self.hidden + 1)


@triton.jit
def _first_layer(weights, t, y, n, F: tl.constexpr, N: tl.constexpr):
    """Pre-activations of N units, from n on, of the first hidden layer. [B, N]."""
    DIM: tl.constexpr = F[0]
    HIDDEN: tl.constexpr = F[1]
    TIME: tl.constexpr = F[4]
    D: tl.constexpr = F[6]
    c = tl.arange(0, D)
    units = n + tl.arange(0, N)
    inside = units < HIDDEN
    row = weights[0] + units * (TIME + DIM)
    w = tl.load(  # [D, N]
        row[None, :] + (TIME + c)[:, None], mask=(c < DIM)[:, None] & inside[None, :], other=0.0
    )
    shift = tl.load(weights[1] + units, mask=inside, other=0.0)[None, :]
    if TIME:
        shift = shift + t * tl.load(row, mask=inside, other=0.0)[None, :]
    return tl.dot(y, w, input_precision=F[5], out_dtype=y.dtype) + shift


@triton.jit
def _weight_block(pointer, rows, columns, F: tl.constexpr):
    """A block of a hidden layer's weight; its shape is that of rows + columns."""
    HIDDEN: tl.constexpr = F[1]
    if HIDDEN == F[7]:
        return tl.load(pointer + rows * HIDDEN + columns)
    else:
        inside = (rows < HIDDEN) & (columns < HIDDEN)
        return tl.load(pointer + rows * HIDDEN + columns, mask=inside, other=0.0)


@triton.jit
def _layer(
    weights, record, t, y, n,
    LAYER: tl.constexpr, F: tl.constexpr, B: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Pre-activations of N units, from n on, of hidden layer LAYER (from 0 on). [B, N]."""
    HIDDEN: tl.constexpr = F[1]
    H: tl.constexpr = F[7]
    N: tl.constexpr = F[8]
    K: tl.constexpr = F[9]
    if LAYER == 0:
        return _first_layer(weights, t, y, n, F, N)
    else:
        units = n + tl.arange(0, N)
        bias = tl.load(weights[2 * LAYER + 1] + units, mask=units < HIDDEN, other=0.0)
        z = tl.zeros([B, N], y.dtype) + bias[None, :]
        for k in range(0, H, K):
            inputs = k + tl.arange(0, K)
            if LAYER == 1 and not KEEP:
                # Cheaper made again for each block of outputs than kept: its own inputs are few.
                a = activations.activate(_first_layer(weights, t, y, k, F, K), F[3])
            else:
                a = activations.value(_kept(record, inputs, LAYER - 1, F, B), F[3])
            w = _weight_block(weights[2 * LAYER], units[None, :], inputs[:, None], F)
            z = tl.dot(a, w, z, input_precision=F[5], out_dtype=y.dtype)
        return z


@triton.jit
def _layer_offset(units, LAYER: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    """Where units of a hidden layer stand in a [LAYERS, B, H] block."""
    H: tl.constexpr = F[7]
    return (LAYER * B + tl.arange(0, B))[:, None] * H + units[None, :]


@triton.jit
def _kept(record, units, LAYER: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    D: tl.constexpr = F[6]
    return tl.load(record + B * (1 + D) + _layer_offset(units, LAYER, F, B))


@triton.jit
def _deltas(record, F: tl.constexpr, B: tl.constexpr):
    """Where a record's deltas begin."""
    D: tl.constexpr = F[6]
    return record + B * (1 + 2 * D + F[2] * F[7])


@triton.jit
def evaluate(weights, record, t, y, F: tl.constexpr, B: tl.constexpr, KEEP: tl.constexpr):
    """dy/dt of a tile.

    Args:
        weights: Pointers to weight and bias of every layer, as nn.Linear has them.
        record: The evaluation's record. Without KEEP, scratch memory of that size.
        t: Time: a number, or [B, 1].
        y: State, [B, D]; columns beyond the field's are 0.
        F: The field, an `MLP`.
        B: Rows of the tile.
        KEEP: Whether to write the record.

    Returns:
        [B, D]; columns beyond the field's are 0.
    """
    DIM: tl.constexpr = F[0]
    HIDDEN: tl.constexpr = F[1]
    LAYERS: tl.constexpr = F[2]
    D: tl.constexpr = F[6]
    H: tl.constexpr = F[7]
    N: tl.constexpr = F[8]
    LAST: tl.constexpr = LAYERS - 1
    c = tl.arange(0, D)
    r = tl.arange(0, B)
    if KEEP:
        tl.store(record + r[:, None], t + tl.zeros([B, 1], y.dtype))
        tl.store(record + B + r[:, None] * D + c[None, :], y)
    kept = record + B * (1 + D)
    for layer in tl.static_range(0, LAST):
        if KEEP or layer > 0:
            for n in range(0, H, N):
                z = _layer(weights, record, t, y, n, layer, F, B, KEEP)
                offset = _layer_offset(n + tl.arange(0, N), layer, F, B)
                tl.store(kept + offset, activations.keep(z, F[3]))
            tl.debug_barrier()  # the next layer reads what other threads wrote
    bias = tl.load(weights[2 * LAYERS + 1] + c, mask=c < DIM, other=0.0)
    k = tl.zeros([B, D], y.dtype) + bias[None, :]
    for n in range(0, H, N):
        units = n + tl.arange(0, N)
        z = _layer(weights, record, t, y, n, LAST, F, B, KEEP)
        if KEEP:
            tl.store(kept + _layer_offset(units, LAST, F, B), activations.keep(z, F[3]))
        w = tl.load(  # [N, D]
            weights[2 * LAYERS] + c[None, :] * HIDDEN + units[:, None],
            mask=(c < DIM)[None, :] & (units < HIDDEN)[:, None],
            other=0.0,
        )
        k = tl.dot(activations.activate(z, F[3]), w, k, input_precision=F[5], out_dtype=y.dtype)
    return k


@triton.jit
def vjp(weights, record, cotangent, F: tl.constexpr, B: tl.constexpr):
    """The vector-Jacobian product of a recorded evaluation, with respect to its argument.

    Args:
        weights, F, B: As for `evaluate`.
        record: Of the evaluation. Gets the cotangent and the deltas.
        cotangent: Of its value, [B, D]; 0 in columns beyond the field's.

    Returns:
        [B, D]; columns beyond the field's are 0.
    """
    DIM: tl.constexpr = F[0]
    HIDDEN: tl.constexpr = F[1]
    LAYERS: tl.constexpr = F[2]
    TIME: tl.constexpr = F[4]
    D: tl.constexpr = F[6]
    H: tl.constexpr = F[7]
    N: tl.constexpr = F[8]
    K: tl.constexpr = F[9]
    c = tl.arange(0, D)
    r = tl.arange(0, B)
    deltas = _deltas(record, F, B)
    tl.store(deltas - B * D + r[:, None] * D + c[None, :], cotangent)
    tl.debug_barrier()  # the evaluation's part of the record is whole
    for n in range(0, H, N):
        units = n + tl.arange(0, N)
        w = tl.load(  # [D, N]
            weights[2 * LAYERS] + c[:, None] * HIDDEN + units[None, :],
            mask=(c < DIM)[:, None] & (units < HIDDEN)[None, :],
            other=0.0,
        )
        g = tl.dot(cotangent, w, input_precision=F[5], out_dtype=cotangent.dtype)
        slope = activations.derivative(_kept(record, units, LAYERS - 1, F, B), F[3])
        tl.store(deltas + _layer_offset(units, LAYERS - 1, F, B), g * slope)
    tl.debug_barrier()
    for back in tl.static_range(1, LAYERS):
        LAYER: tl.constexpr = LAYERS - 1 - back
        for n in range(0, H, N):
            units = n + tl.arange(0, N)
            g = tl.zeros([B, N], cotangent.dtype)
            for k in range(0, H, K):
                outputs = k + tl.arange(0, K)
                delta = tl.load(deltas + _layer_offset(outputs, LAYER + 1, F, B))
                w = _weight_block(weights[2 * LAYER + 2], outputs[:, None], units[None, :], F)
                g = tl.dot(delta, w, g, input_precision=F[5], out_dtype=cotangent.dtype)
            slope = activations.derivative(_kept(record, units, LAYER, F, B), F[3])
            tl.store(deltas + _layer_offset(units, LAYER, F, B), g * slope)
        tl.debug_barrier()
    g = tl.zeros([B, D], cotangent.dtype)
    for k in range(0, H, K):
        units = k + tl.arange(0, K)
        w = tl.load(  # [K, D]
            weights[0] + units[:, None] * (TIME + DIM) + (TIME + c)[None, :],
            mask=(units < HIDDEN)[:, None] & (c < DIM)[None, :],
            other=0.0,
        )
        delta = tl.load(deltas + _layer_offset(units, 0, F, B))
        g = tl.dot(delta, w, g, input_precision=F[5], out_dtype=cotangent.dtype)
    return g


@triton.jit
def time_gradient(weights, record, F: tl.constexpr, B: tl.constexpr):
    """The same with respect to the time, after `vjp`. [B]."""
    DIM: tl.constexpr = F[0]
    HIDDEN: tl.constexpr = F[1]
    TIME: tl.constexpr = F[4]
    H: tl.constexpr = F[7]
    K: tl.constexpr = F[9]
    total = tl.zeros([B], weights[0].dtype.element_ty)
    if TIME:
        for k in range(0, H, K):
            units = k + tl.arange(0, K)
            w = tl.load(weights[0] + units * (1 + DIM), mask=units < HIDDEN, other=0.0)
            delta = tl.load(_deltas(record, F, B) + _layer_offset(units, 0, F, B))
            total += tl.sum(delta * w[None, :], 1)
    return total


@triton.jit
def accumulate(
    sums, records, weight_ptr, first, last, F: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr
):
    """Adds the weight gradients of some evaluations.

    Args:
        sums: Gradients so far, all weights and biases one after another.
        records: The evaluations' records, one after another, after `vjp`.
        weight_ptr: The evaluations' weights.
        first, last: Which evaluations: first <= i < last.
        F, B: As for `evaluate`.
        SIZE: Numbers in a record.
    """
    DIM: tl.constexpr = F[0]
    HIDDEN: tl.constexpr = F[1]
    LAYERS: tl.constexpr = F[2]
    TIME: tl.constexpr = F[4]
    D: tl.constexpr = F[6]
    H: tl.constexpr = F[7]
    WIDTH: tl.constexpr = TIME + DIM
    BLOCK: tl.constexpr = 32 if H >= 32 else 16  # units of a block of weights
    T: tl.constexpr = sums.dtype.element_ty
    c = tl.arange(0, D)
    r = tl.arange(0, B)
    tl.debug_barrier()  # records are whole
    # The first layer: inputs are time and state.
    for n in range(0, H, BLOCK):
        units = n + tl.arange(0, BLOCK)
        inside = units < HIDDEN
        place = sums + units[:, None] * WIDTH + (TIME + c)[None, :]
        mask = inside[:, None] & (c < DIM)[None, :]
        w = tl.load(place, mask=mask, other=0.0)
        of_time = tl.zeros([BLOCK], T)
        bias = tl.zeros([BLOCK], T)
        for i in range(first, last):
            record = records + i * SIZE
            delta = tl.load(_deltas(record, F, B) + _layer_offset(units, 0, F, B))
            delta *= tl.load(weight_ptr + i)
            y = tl.load(record + B + r[:, None] * D + c[None, :])
            w = tl.dot(tl.trans(delta), y, w, input_precision=F[5], out_dtype=T)
            bias += tl.sum(delta, 0)
            of_time += tl.sum(delta * tl.load(record + r)[:, None], 0)
        tl.store(place, w, mask=mask)
        _add(sums + HIDDEN * WIDTH + units, bias, inside)
        if TIME:
            _add(sums + units * WIDTH, of_time, inside)
    sums += HIDDEN * (WIDTH + 1)
    for layer in tl.static_range(1, LAYERS):
        for n in range(0, H, BLOCK):
            units = n + tl.arange(0, BLOCK)
            for k in range(0, H, BLOCK):
                inputs = k + tl.arange(0, BLOCK)
                place = sums + units[:, None] * HIDDEN + inputs[None, :]
                mask = (units < HIDDEN)[:, None] & (inputs < HIDDEN)[None, :]
                w = tl.load(place, mask=mask, other=0.0)
                bias = tl.zeros([BLOCK], T)
                for i in range(first, last):
                    record = records + i * SIZE
                    delta = tl.load(_deltas(record, F, B) + _layer_offset(units, layer, F, B))
                    delta *= tl.load(weight_ptr + i)
                    a = activations.value(_kept(record, inputs, layer - 1, F, B), F[3])
                    w = tl.dot(tl.trans(delta), a, w, input_precision=F[5], out_dtype=T)
                    bias += tl.sum(delta, 0)
                tl.store(place, w, mask=mask)
                _add(sums + HIDDEN * HIDDEN + units, bias, (units < HIDDEN) & (k == 0))
        sums += HIDDEN * (HIDDEN + 1)
    for k in range(0, H, BLOCK):
        inputs = k + tl.arange(0, BLOCK)
        place = sums + c[:, None] * HIDDEN + inputs[None, :]
        mask = (c < DIM)[:, None] & (inputs < HIDDEN)[None, :]
        w = tl.load(place, mask=mask, other=0.0)
        bias = tl.zeros([D], T)
        for i in range(first, last):
            record = records + i * SIZE
            delta = tl.load(_deltas(record, F, B) - B * D + r[:, None] * D + c[None, :])
            delta *= tl.load(weight_ptr + i)
            a = activations.value(_kept(record, inputs, LAYERS - 1, F, B), F[3])
            w = tl.dot(tl.trans(delta), a, w, input_precision=F[5], out_dtype=T)
            bias += tl.sum(delta, 0)
        tl.store(place, w, mask=mask)
        _add(sums + DIM * HIDDEN + c, bias, (c < DIM) & (k == 0))
    tl.debug_barrier()  # before records are written again


@triton.jit
def _add(pointer, value, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)
