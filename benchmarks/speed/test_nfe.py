"""Evaluations and training: what a solve costs at fresh weights, and what at trained ones.

    pytest benchmarks --benchmark-only -k nfe

The paper's figure of NFE against training, told by its ends: a NODE's flow gets harder to solve as
it is trained, an ANODE's hardly does. The models are trained by anode_fast, from fixed seeds, and
then both solvers go over the same batches at the same weights, in float32 on one thread, taking
turns. They evaluate the field equally often, batch by batch, which is asserted, so the ratio is
that of the time per evaluation. Forward is without a graph; the loss of the gradient is the sum of
y(1). torchdiffeq solves the digits' field as the paper's code writes it.

NFE are means of a row's solves, its time is that of all of them. Compare two commits by
--benchmark-autosave and --benchmark-compare; `extra_info` has the NFE of every batch of an epoch
("nfe") and the loss of the model over all its data ("loss").
"""

from __future__ import annotations

import functools

import pytest
import torch
import torchdiffeq

import anode_fast
from benchmarks.speed.trained import Model, Solves, ours

MODELS = [Model(dim, augmented) for dim in (1, 2, 0) for augmented in (0, 5)]


def solvers(model: Model, trained: bool, count: int | None = None, **how: bool) -> dict:
    """Both, bound to the model's first `count` batches, or to all of an epoch."""
    net = model.net(trained=trained)
    inputs = [x for x, _ in model.batches()[:count]]
    states = [net.block.augment(x) for x in inputs]
    discrete = functools.partial(anode_fast.odeint, gradient="discrete")
    return {
        ours(net, inputs[0]): Solves(discrete, net.block.field, states, **how),
        "torchdiffeq": Solves(torchdiffeq.odeint, model.twin(net).block.field, states, **how),
    }


@functools.cache
def evaluations(model: Model, trained: bool) -> list[int]:
    """For every batch of an epoch, the same by both."""
    with torch.no_grad():
        mine, theirs = (x.evaluations() for x in solvers(model, trained).values())
    assert mine == theirs
    return mine


@pytest.mark.benchmark(group="NFE and training")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_nfe(model, gradient, trained, versus, benchmark):
    """A few batches of an epoch."""
    benchmark.extra_info["nfe"] = evaluations(model, trained)
    benchmark.extra_info["loss"] = model.loss(model.net(trained=trained))
    work = "gradient" if gradient else "forward"
    weights = f"after {model.iterations} iterations" if trained else "fresh"
    solves = f"{model.timed} solves" if model.timed > 1 else "a solve"
    with torch.set_grad_enabled(gradient):
        rivals = solvers(model, trained, model.timed, gradient=gradient)
        versus(f"{model}, {solves}, {work}, {weights}", rivals)
