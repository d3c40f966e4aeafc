"""Our CPU backend beside torchdiffeq, torchode and diffrax.

    pytest benchmarks --benchmark-only -k cpu

Same weights, inputs, tolerance, dtype (float32), controller and threads; each warmed up; turns of a
few runs in one process, diffrax's in another one that it shares the time with (`DiffraxRival`). The
loss is the sum of y(1), the gradient that of the weights; ours is "discrete", that of torchdiffeq
and torchode goes back through their operations, and "odeint_adjoint" solves an ODE backwards. The
error is the largest one at t = 1 over the first rows, against a float64 solution. Peers that are
not installed are left out; `pip install -e '.[dev,peers]'` gets them. A longer measurement:
--benchmark-max-time=5 (seconds per case; the first table takes several times that).
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torchdiffeq

from benchmarks.speed.rivals import (
    Case,
    DiffraxRival,
    UsersField,
    backend,
    with_anode_fast,
    with_odeint,
    with_torchode,
)

# The paper's toy field, 7-32-32-7, and how many times faster than torchdiffeq and diffrax to be.
HEADLINE = {
    Case(batch=64, threads=1): (30, 3),
    Case(batch=64, threads=1, gradient=True): (25, 4),
    Case(batch=3000, threads=2): (10, 5),
    Case(batch=3000, threads=2, gradient=True): (10, 5),
}
USERS = tuple(HEADLINE)
USERS_SHARE = {3000: 0.9}  # of the speed of an MLPField, for a field that a user wrote
SCALING = 1.8  # times faster on two threads, at batch 16384


def grid() -> list[Case]:
    """Batches and widths around the headline cases, thinned out to a few minutes."""
    return [
        Case(batch, width, method, gradient, threads)
        for batch, width, method, gradient, threads in itertools.product(
            (1, 64, 3000, 65536), (16, 32, 64, 256), ("dopri5", "rk4"), (False, True), (1, 2)
        )
        # One row, or 65536: the middle width is enough. A small batch cannot be shared out.
        if (batch in (64, 3000) or width == 32) and (batch >= 3000 or threads == 1)
    ]


def ours(case: Case) -> str:
    """Our name in the tables: it says which backend ran, should it not be the C++ one."""
    name = backend(case)
    return "anode_fast" if name == "cpu" else f"anode_fast ({name})"


@pytest.mark.benchmark(group="CPU: the paper's toy field")
@pytest.mark.parametrize("case", HEADLINE, ids=str)
def test_cpu_headline(case, versus, diffrax_worker):
    """All solvers on the cases that have targets."""
    to_torchdiffeq, to_diffrax = HEADLINE[case]
    worker = diffrax_worker(case.threads)
    with torch.set_grad_enabled(case.gradient):
        rivals = {
            ours(case): with_anode_fast(case),
            "torchdiffeq": with_odeint(torchdiffeq.odeint, case),
        }
        if case.gradient:
            rivals["odeint_adjoint"] = with_odeint(torchdiffeq.odeint_adjoint, case)
        rivals |= {
            "torchode": with_torchode(case),
            "diffrax": worker and DiffraxRival(case, worker),
            "diffrax, dt0=None": worker and DiffraxRival(case, worker, same_first_step=False),
        }
        targets = {"torchdiffeq": to_torchdiffeq, "diffrax": to_diffrax}
        versus(case, rivals, targets=targets, effort=8)


@pytest.mark.benchmark(group="CPU: a field that a user wrote")
@pytest.mark.parametrize("case", USERS, ids=str)
def test_cpu_users_field(case, versus):
    """The same field as a module of the user's, by our kernels and by torchdiffeq, and MLPField."""
    with torch.set_grad_enabled(case.gradient):
        rivals = {
            "anode_fast": with_anode_fast(case, "cpu", UsersField(case.field)),
            "anode_fast, MLPField": with_anode_fast(case, "cpu"),
            "torchdiffeq": with_odeint(torchdiffeq.odeint, case, field=UsersField(case.field)),
        }
        share = USERS_SHARE.get(case.batch)
        targets = {"anode_fast, MLPField": share} if share else {}
        versus(case, rivals, targets=targets, effort=4)


@pytest.mark.benchmark(group="CPU: against torchdiffeq")
@pytest.mark.parametrize("case", grid(), ids=str)
def test_cpu_grid(case, versus):
    """Adaptive and fixed steps over batches and widths."""
    with torch.set_grad_enabled(case.gradient):
        theirs = with_odeint(torchdiffeq.odeint, case)
        versus(case, {ours(case): with_anode_fast(case), "torchdiffeq": theirs})


@pytest.mark.benchmark(group="CPU: one thread and two")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_cpu_threads(gradient, versus):
    """What a second thread gains."""
    two = Case(batch=16384, gradient=gradient, threads=2)
    one = dataclasses.replace(two, threads=1)
    with torch.set_grad_enabled(gradient):
        rivals = {f"{ours(two)}, 2 threads": with_anode_fast(two)}
        rivals["1 thread"] = with_anode_fast(one)
        versus(two, rivals, targets={"1 thread": SCALING})
