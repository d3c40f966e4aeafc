"""The paper's field for images on a CPU, beside torchdiffeq.

    pytest benchmarks --benchmark-only -k conv

As in test_cpu.py: same weights, images, tolerance, dtype (float32) and threads, turns of a few runs
in one process, medians. torchdiffeq solves the field as the paper's code writes it, backwards
through its operations or with odeint_adjoint, the same field compiled, and a cheaper form of it
(see conv_rivals.py). The loss is the sum of y(1), the gradient that of the weights; ours is
"discrete". The error is the largest one at t = 1 over the first images, against a float64 solution.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torchdiffeq

from benchmarks.speed.conv_rivals import (
    ConvCase,
    with_cheap_field,
    with_compiled_field,
    with_paper_field,
)
from benchmarks.speed.rivals import backend, with_anode_fast

TO_TORCHDIFFEQ = 1.8  # times as fast, forward and with the gradient

CASES = [
    ConvCase(threads=threads, gradient=gradient)
    for gradient, threads in itertools.product((False, True), (1, 2))
]


def ours(case: ConvCase) -> str:
    """Our name in the tables: it says which backend ran, should it not be the C++ one."""
    name = backend(case)
    return "anode_fast" if name == "cpu" else f"anode_fast ({name})"


@pytest.mark.benchmark(group="CPU: the paper's field for MNIST")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_cpu(case, versus):
    """All solvers."""
    with torch.set_grad_enabled(case.gradient):
        rivals = {
            ours(case): with_anode_fast(case),
            "torchdiffeq": with_paper_field(torchdiffeq.odeint, case),
        }
        if case.gradient:
            rivals["odeint_adjoint"] = with_paper_field(torchdiffeq.odeint_adjoint, case)
        rivals |= {
            "compiled field": with_compiled_field(case),
            "cheap field": with_cheap_field(torchdiffeq.odeint, case),
        }
        versus(case, rivals, targets={"torchdiffeq": TO_TORCHDIFFEQ}, effort=10)
