"""Our GPU backend beside torchdiffeq, torchode and diffrax on the same card.

    pytest benchmarks --benchmark-only -k gpu

As in test_cpu.py: same weights, inputs, tolerance and dtype (float32), turns of a few runs, the
call from Python until its results are there. Float32 products are "highest" unless a name says
"high" (tf32). torchdiffeq also gets the field through torch.compile; diffrax runs where jax was
installed for CUDA. Without a card everything skips. `bash benchmarks/gpu_session.sh` measures times
of the device alone.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torchdiffeq

from benchmarks.speed.rivals import (
    AtPrecision,
    Case,
    Compiled,
    DiffraxRival,
    backend,
    with_anode_fast,
    with_odeint,
    with_torchode,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TO_TORCHDIFFEQ = 50  # times as fast, at batch 64


def headline() -> list[Case]:
    """The paper's toy field, 7-32-32-7."""
    sizes = itertools.product((64, 256, 3000, 65536), (False, True))
    return [Case(batch, gradient=gradient, device="cuda") for batch, gradient in sizes]


def grid() -> list[Case]:
    """Batches and widths around it."""
    return [
        Case(batch, width, method, gradient, device="cuda")
        for batch, width, method, gradient in itertools.product(
            (1, 64, 3000, 65536), (16, 32, 64, 128), ("dopri5", "rk4"), (False, True)
        )
        if batch in (64, 65536) or width == 32
    ]


def ours(case: Case) -> str:
    """Our name in the tables: it says which backend ran, should it not be the Triton one."""
    name = backend(case)
    return "anode_fast" if name == "triton" else f"anode_fast ({name})"


@pytest.mark.benchmark(group="GPU: the paper's toy field")
@pytest.mark.parametrize("case", headline(), ids=str)
def test_gpu_headline(case, versus, diffrax_worker):
    """All solvers."""
    worker = diffrax_worker(1, "cuda")
    with torch.set_grad_enabled(case.gradient):
        rivals = {
            ours(case): with_anode_fast(case),
            "torchdiffeq": with_odeint(torchdiffeq.odeint, case),
            "torchdiffeq, compiled field": with_odeint(
                torchdiffeq.odeint, case, field=Compiled(case.field)
            ),
        }
        if case.gradient:
            rivals["odeint_adjoint"] = with_odeint(torchdiffeq.odeint_adjoint, case)
        rivals |= {
            "torchode": with_torchode(case),
            "diffrax": worker and DiffraxRival(case, worker),
            "diffrax, dt0=None": worker and DiffraxRival(case, worker, same_first_step=False),
        }
        targets = {"torchdiffeq": TO_TORCHDIFFEQ} if case.batch == 64 else {}
        versus(case, rivals, targets=targets, effort=8)


@pytest.mark.benchmark(group="GPU: against torchdiffeq")
@pytest.mark.parametrize("case", grid(), ids=str)
def test_gpu_grid(case, versus):
    """Adaptive and fixed steps over batches and widths."""
    with torch.set_grad_enabled(case.gradient):
        theirs = with_odeint(torchdiffeq.odeint, case)
        versus(case, {ours(case): with_anode_fast(case), "torchdiffeq": theirs})


@pytest.mark.benchmark(group="GPU: tf32 products")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("width", [32, 128])
def test_gpu_tf32(width, gradient, versus):
    """What tf32 products gain, on both sides."""
    case = dataclasses.replace(Case(65536, width, device="cuda"), gradient=gradient)
    with torch.set_grad_enabled(gradient):
        theirs = with_odeint(torchdiffeq.odeint, case)
        rivals = {
            f"{ours(case)}, high": AtPrecision(with_anode_fast(case), "high"),
            f"{ours(case)}, highest": with_anode_fast(case),
            "torchdiffeq, high": AtPrecision(theirs, "high"),
            "torchdiffeq, highest": theirs,
        }
        versus(case, rivals)
