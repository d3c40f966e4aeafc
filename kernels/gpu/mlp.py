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
from anode_fast.kernels.gpu.products import product


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
    c = tl.arange(0, F.D)
    units = n + tl.arange(0, N)
    inside = units < F.hidden
    row = weights[0] + units * (F.time + F.dim)
    w = tl.load(  # [D, N]
        row[None, :] + (F.time + c)[:, None], mask=(c < F.dim)[:, None] & inside[None, :], other=0.0
    )
    shift = tl.load(weights[1] + units, mask=inside, other=0.0)[None, :]
    if F.time:
        shift = shift + t * tl.load(row, mask=inside, other=0.0)[None, :]
    return product(y, w, None, F) + shift


@triton.jit
def _weight_block(pointer, rows, columns, F: tl.constexpr):
    """A block of a hidden layer's weight; its shape is that of rows + columns."""
    if F.hidden == F.H:
        return tl.load(pointer + rows * F.hidden + columns)
    else:
        inside = (rows < F.hidden) & (columns < F.hidden)
        return tl.load(pointer + rows * F.hidden + columns, mask=inside, other=0.0)


@triton.jit
def _layer(
    weights, record, t, y, n,
    LAYER: tl.constexpr, F: tl.constexpr, B: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Pre-activations of N units, from n on, of hidden layer LAYER (from 0 on). [B, N]."""
    if LAYER == 0:
        return _first_layer(weights, t, y, n, F, F.N)
    else:
        N: tl.constexpr = F.N
        units = n + tl.arange(0, N)
        bias = tl.load(weights[2 * LAYER + 1] + units, mask=units < F.hidden, other=0.0)
        z = tl.zeros([B, N], y.dtype) + bias[None, :]
        for k in range(0, F.H, F.K):
            inputs = k + tl.arange(0, F.K)
            if LAYER == 1 and not KEEP:
                # Cheaper made again for each block of outputs than kept: its own inputs are few.
                a = activations.activate(_first_layer(weights, t, y, k, F, F.K), F.activation)
            else:
                a = activations.value(_kept(record, inputs, LAYER - 1, F, B), F.activation)
            w = _weight_block(weights[2 * LAYER], units[None, :], inputs[:, None], F)
            z = product(a, w, z, F)
        return z


@triton.jit
def _layer_offset(units, LAYER: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    """Where units of a hidden layer stand in a [LAYERS, B, H] block."""
    return (LAYER * B + tl.arange(0, B))[:, None] * F.H + units[None, :]


@triton.jit
def _kept(record, units, LAYER: tl.constexpr, F: tl.constexpr, B: tl.constexpr):
    return tl.load(record + B * (1 + F.D) + _layer_offset(units, LAYER, F, B))


@triton.jit
def _deltas(record, F: tl.constexpr, B: tl.constexpr):
    """Where a record's deltas begin."""
    return record + B * (1 + 2 * F.D + F.layers * F.H)


@triton.jit
def evaluate(weights, record, t, y, F: tl.constexpr, B: tl.constexpr, KEEP: tl.constexpr):
    """dy/dt of a tile.

    Args:
        weights: Pointers to weight and bias of every layer, as nn.Linear has them.
        record: The evaluation's record. Without KEEP, scratch memory of that size.
        t: Time: a number, or [B, 1].
        y: State, [B, D]; columns beyond the field's are 0.
        F: The field, an `MLP`. Where Triton wants a constant (a shape, the end of an unrolled
            loop), versions up to 3.6 want a name bound to it, no attribute.
        B: Rows of the tile.
        KEEP: Whether to write the record.

    Returns:
        [B, D]; columns beyond the field's are 0.
    """
    LAST: tl.constexpr = F.layers - 1
    D: tl.constexpr = F.D
    c = tl.arange(0, D)
    r = tl.arange(0, B)
    if KEEP:
        tl.store(record + r[:, None], t + tl.zeros([B, 1], y.dtype))
        tl.store(record + B + r[:, None] * F.D + c[None, :], y)
    kept = record + B * (1 + F.D)
    for layer in tl.static_range(0, LAST):
        if KEEP or layer > 0:
            for n in range(0, F.H, F.N):
                z = _layer(weights, record, t, y, n, layer, F, B, KEEP)
                offset = _layer_offset(n + tl.arange(0, F.N), layer, F, B)
                tl.store(kept + offset, activations.keep(z, F.activation))
            tl.debug_barrier()  # the next layer reads what other threads wrote
    bias = tl.load(weights[2 * F.layers + 1] + c, mask=c < F.dim, other=0.0)
    k = tl.zeros([B, D], y.dtype) + bias[None, :]
    for n in range(0, F.H, F.N):
        units = n + tl.arange(0, F.N)
        z = _layer(weights, record, t, y, n, LAST, F, B, KEEP)
        if KEEP:
            tl.store(kept + _layer_offset(units, LAST, F, B), activations.keep(z, F.activation))
        w = tl.load(  # [N, D]
            weights[2 * F.layers] + c[None, :] * F.hidden + units[:, None],
            mask=(c < F.dim)[None, :] & (units < F.hidden)[:, None],
            other=0.0,
        )
        k = product(activations.activate(z, F.activation), w, k, F)
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
    D: tl.constexpr = F.D
    N: tl.constexpr = F.N
    LAST: tl.constexpr = F.layers - 1
    c = tl.arange(0, D)
    r = tl.arange(0, B)
    deltas = _deltas(record, F, B)
    tl.store(deltas - B * F.D + r[:, None] * F.D + c[None, :], cotangent)
    tl.debug_barrier()  # the evaluation's part of the record is whole
    for n in range(0, F.H, F.N):
        units = n + tl.arange(0, F.N)
        w = tl.load(  # [D, N]
            weights[2 * F.layers] + c[:, None] * F.hidden + units[None, :],
            mask=(c < F.dim)[:, None] & (units < F.hidden)[None, :],
            other=0.0,
        )
        g = product(cotangent, w, None, F)
        slope = activations.derivative(_kept(record, units, LAST, F, B), F.activation)
        tl.store(deltas + _layer_offset(units, LAST, F, B), g * slope)
    tl.debug_barrier()
    for layer in tl.static_range(LAST - 1, -1, -1):
        for n in range(0, F.H, F.N):
            units = n + tl.arange(0, F.N)
            g = tl.zeros([B, N], cotangent.dtype)
            for k in range(0, F.H, F.K):
                outputs = k + tl.arange(0, F.K)
                delta = tl.load(deltas + _layer_offset(outputs, layer + 1, F, B))
                w = _weight_block(weights[2 * layer + 2], outputs[:, None], units[None, :], F)
                g = product(delta, w, g, F)
            slope = activations.derivative(_kept(record, units, layer, F, B), F.activation)
            tl.store(deltas + _layer_offset(units, layer, F, B), g * slope)
        tl.debug_barrier()
    g = tl.zeros([B, D], cotangent.dtype)
    for k in range(0, F.H, F.K):
        units = k + tl.arange(0, F.K)
        w = tl.load(  # [K, D]
            weights[0] + units[:, None] * (F.time + F.dim) + (F.time + c)[None, :],
            mask=(units < F.hidden)[:, None] & (c < F.dim)[None, :],
            other=0.0,
        )
        delta = tl.load(deltas + _layer_offset(units, 0, F, B))
        g = product(delta, w, g, F)
    return g


@triton.jit
def time_gradient(weights, record, F: tl.constexpr, B: tl.constexpr):
    """The same with respect to the time, after `vjp`. [B]."""
    total = tl.zeros([B], weights[0].dtype.element_ty)
    if F.time:
        for k in range(0, F.H, F.K):
            units = k + tl.arange(0, F.K)
            w = tl.load(weights[0] + units * (1 + F.dim), mask=units < F.hidden, other=0.0)
            delta = tl.load(_deltas(record, F, B) + _layer_offset(units, 0, F, B))
            total += tl.sum(delta * w[None, :], 1)
    return total


@triton.jit
def accumulate(
    sums, records, weight_ptr, first, last, rows,
    F: tl.constexpr, B: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Adds the weight gradients of some evaluations.

    Args:
        sums: Gradients so far, all weights and biases one after another.
        records: The evaluations' records, one after another, after `vjp`.
        weight_ptr: The evaluations' weights.
        first, last: Which evaluations: first <= i < last.
        rows: Of the tile that are in the batch; not needed, as the cotangents of the others are 0
            and these fields finite.
        F, B: As for `evaluate`.
        SIZE: Numbers in a record.
    """
    WIDTH: tl.constexpr = F.time + F.dim
    BLOCK: tl.constexpr = 32 if F.H >= 32 else 16  # units of a block of weights
    T: tl.constexpr = sums.dtype.element_ty
    D: tl.constexpr = F.D
    LAYERS: tl.constexpr = F.layers
    c = tl.arange(0, D)
    r = tl.arange(0, B)
    tl.debug_barrier()  # records are whole
    # The first layer: inputs are time and state.
    for n in range(0, F.H, BLOCK):
        units = n + tl.arange(0, BLOCK)
        inside = units < F.hidden
        place = sums + units[:, None] * WIDTH + (F.time + c)[None, :]
        mask = inside[:, None] & (c < F.dim)[None, :]
        w = tl.load(place, mask=mask, other=0.0)
        of_time = tl.zeros([BLOCK], T)
        bias = tl.zeros([BLOCK], T)
        for i in range(first, last):
            record = records + i * SIZE
            delta = tl.load(_deltas(record, F, B) + _layer_offset(units, 0, F, B))
            delta *= tl.load(weight_ptr + i)
            y = tl.load(record + B + r[:, None] * F.D + c[None, :])
            w = product(tl.trans(delta), y, w, F)
            bias += tl.sum(delta, 0)
            of_time += tl.sum(delta * tl.load(record + r)[:, None], 0)
        tl.store(place, w, mask=mask)
        _add(sums + F.hidden * WIDTH + units, bias, inside)
        if F.time:
            _add(sums + units * WIDTH, of_time, inside)
    sums += F.hidden * (WIDTH + 1)
    for layer in tl.static_range(1, LAYERS):
        for n in range(0, F.H, BLOCK):
            units = n + tl.arange(0, BLOCK)
            for k in range(0, F.H, BLOCK):
                inputs = k + tl.arange(0, BLOCK)
                place = sums + units[:, None] * F.hidden + inputs[None, :]
                mask = (units < F.hidden)[:, None] & (inputs < F.hidden)[None, :]
                w = tl.load(place, mask=mask, other=0.0)
                bias = tl.zeros([BLOCK], T)
                for i in range(first, last):
                    record = records + i * SIZE
                    delta = tl.load(_deltas(record, F, B) + _layer_offset(units, layer, F, B))
                    delta *= tl.load(weight_ptr + i)
                    a = activations.value(_kept(record, inputs, layer - 1, F, B), F.activation)
                    w = product(tl.trans(delta), a, w, F)
                    bias += tl.sum(delta, 0)
                tl.store(place, w, mask=mask)
                _add(sums + F.hidden * F.hidden + units, bias, (units < F.hidden) & (k == 0))
        sums += F.hidden * (F.hidden + 1)
    for k in range(0, F.H, BLOCK):
        inputs = k + tl.arange(0, BLOCK)
        place = sums + c[:, None] * F.hidden + inputs[None, :]
        mask = (c < F.dim)[:, None] & (inputs < F.hidden)[None, :]
        w = tl.load(place, mask=mask, other=0.0)
        bias = tl.zeros([D], T)
        for i in range(first, last):
            record = records + i * SIZE
            delta = tl.load(_deltas(record, F, B) - B * F.D + r[:, None] * F.D + c[None, :])
            delta *= tl.load(weight_ptr + i)
            a = activations.value(_kept(record, inputs, LAYERS - 1, F, B), F.activation)
            w = product(tl.trans(delta), a, w, F)
            bias += tl.sum(delta, 0)
        tl.store(place, w, mask=mask)
        _add(sums + F.dim * F.hidden + c, bias, (c < F.dim) & (k == 0))
    tl.debug_barrier()  # before records are written again


@triton.jit
def _add(pointer, value, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + value, mask=mask)
