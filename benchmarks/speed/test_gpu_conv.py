"""The paper's field for images on a GPU, beside torchdiffeq on the same card.

    pytest benchmarks --benchmark-only -k "gpu and conv"

As test_conv.py, at batch 256, the paper's; and a whole training step: loss, gradient, Adam. Both
sides make their float32 products at the same precision: "high" is tf32, PyTorch's own choice for
convolutions. Without a card everything skips.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torchdiffeq

from benchmarks.speed.conv_rivals import (
    ConvCase,
    training_steps,
    with_cheap_field,
    with_compiled_field,
    with_paper_field,
)
from benchmarks.speed.rivals import AtPrecision, backend, with_anode_fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TARGETS = {"torchdiffeq": 4, "compiled field": 2}  # times as fast, in a training step
MNIST = ConvCase(batch=256, device="cuda")
CIFAR10 = dataclasses.replace(MNIST, data_channels=3, augmented=10, size=32)
PRECISIONS = ("high", "highest")

CASES = [
    dataclasses.replace(case, gradient=gradient, precision=precision)
    for case, gradient, precision in itertools.product((MNIST, CIFAR10), (False, True), PRECISIONS)
]
STEPS = [dataclasses.replace(case, gradient=True, precision="high") for case in (MNIST, CIFAR10)]


def ours(case: ConvCase) -> str:
    """Our name in the tables: it says which backend ran, should it not be the Triton one."""
    name = backend(case)
    return "anode_fast" if name == "triton" else f"anode_fast ({name})"


def at(precision, rivals):
    """The rivals with their products at a precision; words in the place of one stay."""
    return {
        name: rival if isinstance(rival, str) else AtPrecision(rival, precision)
        for name, rival in rivals.items()
    }


@pytest.mark.benchmark(group="GPU: the paper's fields for images")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_conv(case, versus):
    """All solvers."""
    with torch.set_grad_enabled(case.gradient):
        rivals = {
            ours(case): with_anode_fast(case),
            "torchdiffeq": with_paper_field(torchdiffeq.odeint, case),
            "compiled field": with_compiled_field(case),
            "cheap field": with_cheap_field(torchdiffeq.odeint, case),
        }
        if case.gradient:
            rivals["odeint_adjoint"] = with_paper_field(torchdiffeq.odeint_adjoint, case)
        versus(case, at(case.precision, rivals), effort=8)


@pytest.mark.benchmark(group="GPU: a training step on images")
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_gpu_conv_training(case, versus):
    """What a user waits for."""
    mine, *others = training_steps(case).items()
    rivals = {ours(case): mine[1], **dict(others)}
    words = f"training step, {case}"
    versus(words, at(case.precision, rivals), targets=TARGETS, effort=8)
