"""Wall clock of training: whole iterations at trained weights, by anode_fast and torchdiffeq.

    pytest benchmarks --benchmark-only -k wall_clock

An iteration is the forward pass, the loss, its gradient and Adam's step, on one batch of 64 in
float32 on one thread. Both sides start from the same weights, trained by anode_fast from fixed
seeds, and keep them (see `TrainingStep`); they evaluate the field equally often, which is asserted.
torchdiffeq goes back through its operations, and solves the digits' field as the paper's code
writes it. `extra_info` has the NFE ("nfe") and the loss of the batch ("loss").
"""

from __future__ import annotations

import pytest

from benchmarks.speed.conv_rivals import TrainingStep
from benchmarks.speed.trained import BATCH, Model, ours

MODELS = [Model(dim, augmented) for dim in (1, 2, 0) for augmented in (0, 5)]


@pytest.mark.benchmark(group="wall clock of a training iteration")
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_wall_clock(model, versus, benchmark):
    """One iteration, over and over."""
    net = model.net(trained=True)
    x, y = model.batches()[0]
    steps = {
        name: TrainingStep(solved, x, y, model.loss_function)
        for name, solved in {"anode_fast": net, "torchdiffeq": model.twin(net)}.items()
    }
    mine, theirs = (step.observe() for step in steps.values())
    assert mine.nfe == theirs.nfe
    benchmark.extra_info["nfe"] = mine.nfe
    benchmark.extra_info["loss"] = model.loss_function(mine.y1, y).item()
    versus(
        f"{model}, batch {BATCH}, after {model.iterations} iterations",
        {ours(net, x): steps["anode_fast"], "torchdiffeq": steps["torchdiffeq"]},
    )
