"""What is promised of training: torchdiffeq's evaluations at trained weights, and its loss curves.

Trained flows are harder to solve than fresh ones: they take more steps, and some are rejected. The
models are those of benchmarks/speed/trained.py; torchdiffeq solves the digits' field as the paper's
code writes it.
"""

from itertools import islice

import pytest
import torch
import torchdiffeq
from torchdiffeq._impl import rk_common

import anode_fast
from anode_fast import ODENet
from benchmarks.data import batches
from benchmarks.speed.trained import Model
from benchmarks.train import Run

f32, f64 = torch.float32, torch.float64

SPHERES = [Model(dim, augmented) for dim in (1, 2) for augmented in (0, 5)]
DIGITS = [Model(0, 0), Model(0, 2)]
MODELS = SPHERES + DIGITS
NODES = [model for model in MODELS if not model.augmented]

TOLERANCE = 1e-3  # of the models
ROUNDING = 1e-10  # what rounding in float64 may grow to, in a solve or over a training
COMPARED = 50  # iterations over which loss curves are compared, of the digits fewer: they take long
COMPARED_DIGITS = 15


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    return request.param


def set_tolerance(net, tolerance):
    net.block.rtol = net.block.atol = tolerance


def inputs(model, dtype):
    """The batches of an epoch."""
    return [x for x, _ in batches(model.in_dtype(dtype), 64, 1, seed=9)]


class Counted:
    """A net's block by way of torchdiffeq, with counts of a solve."""

    def __init__(self, model, net):
        self.block = model.twin(net).block
        self.fates = []
        for fate in ("accept", "reject"):  # torchdiffeq calls these
            setattr(self.block.field, f"callback_{fate}_step", self.note(fate))

    def note(self, fate):
        return lambda t, y, dt: self.fates.append(fate)

    def __call__(self, x):
        """The state at the end; evaluations, accepted and rejected steps."""
        self.fates.clear()
        y = self.block(x)
        return y, (self.block.stats.nfe, *map(self.fates.count, ("accept", "reject")))

    def is_on_edge(self, x):
        """Whether a thousandth of the tolerance decides how many steps it takes."""
        found = set()
        for factor in (1 - 1e-3, 1 + 1e-3):
            self.block.tolerances = dict.fromkeys(("rtol", "atol"), factor * TOLERANCE)
            found.add(self(x)[1])
        self.block.tolerances = dict.fromkeys(("rtol", "atol"), TOLERANCE)
        return len(found) > 1


def counts_of(stats):
    return stats.nfe, stats.accepted, stats.rejected


def assert_close(got, want, bound):
    """Within `bound` of the largest entry."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= bound * want.abs().max()


# --- evaluations ----------------------------------------------------------------------------------


@torch.no_grad()
def test_same_steps_in_float64(model):
    net = model.net(trained=True).double()
    counted = Counted(model, net)
    for x in inputs(model, f64):
        (theirs, counts), ours = counted(x), net.block(x)
        assert counts_of(net.block.stats) == counts
        # Two to begin with, then dopri5's six of each step.
        assert counts[0] == 2 + 6 * (counts[1] + counts[2])
        assert_close(ours, theirs, ROUNDING)


@torch.no_grad()
def test_same_steps_in_float32(model):
    """But where an error lies within rounding of what is accepted."""
    net = model.net(trained=True)
    counted = Counted(model, net)
    given, others = inputs(model, f32), []
    for x in given:
        (theirs, counts), ours = counted(x), net.block(x)
        if counts_of(net.block.stats) != counts:
            others.append(x)
        # The first step is chosen by a difference of two values of the field: its rounding moves
        # the steps, and with them the result, within the tolerance.
        assert torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(others) <= -(-len(given) // 50)
    assert all(map(counted.is_on_edge, others))


@torch.no_grad()
@pytest.mark.parametrize("model", SPHERES, ids=str)
def test_same_steps_at_a_tighter_tolerance(model):
    net = model.net(trained=True).double()
    set_tolerance(net, 1e-6)
    counted = Counted(model, net)
    for x in inputs(model, f64)[:12]:
        (theirs, counts), ours = counted(x), net.block(x)
        assert counts_of(net.block.stats) == counts and counts[0] > 60
        assert_close(ours, theirs, ROUNDING)


@torch.no_grad()
def test_where_rounding_decides_about_steps():
    """At the kinks of relu, thousands of them, if the tolerance is 1e-9."""
    model = Model(2)
    net = model.net(trained=True).double()
    set_tolerance(net, 1e-9)
    counted = Counted(model, net)
    x = inputs(model, f64)[0]
    (theirs, counts), (_, others) = counted(x), counted(x.flip(0))
    assert counts != others  # torchdiffeq's, with the rows of the batch in another order
    assert_close(net.block(x), theirs, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model", NODES, ids=str)
def test_training_made_the_flow_harder(model):
    """Otherwise the tests above would say no more than those of fresh weights."""
    nfe, rejected = [], 0
    for trained in (False, True):
        net = model.net(trained=trained)
        nfe.append(0)
        for x in inputs(model, f32):
            net.block(x)
            nfe[-1] += net.stats.nfe
            rejected += net.stats.rejected
    assert nfe[1] > 1.2 * nfe[0]
    assert rejected > 0 or model.dim == 0


@torch.no_grad()
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_same_evaluations_of_whole_trajectories(model, backwards):
    net = model.net(trained=True).double()
    field, theirs = net.block.field, model.twin(net).block.field
    t = torch.linspace(0, 1, 5, dtype=f64)
    given = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": "dopri5"}
    for x in inputs(model, f64)[:6]:
        y0 = net.block.augment(x)
        if backwards:  # from where the flow leads
            y0, t = net.block(x), t.sort(descending=True).values
        ours, stats = anode_fast.odeint(field, y0, t, return_stats=True, **given)
        theirs.nfe = 0
        assert_close(ours, torchdiffeq.odeint(theirs, y0, t, **given), ROUNDING)
        assert stats.nfe == theirs.nfe == 2 + 6 * (stats.accepted + stats.rejected)


# --- loss curves ----------------------------------------------------------------------------------


def train(model, net, iterations=COMPARED):
    """Both runs, ours and torchdiffeq's, from the same weights on the same batches."""
    iterations = min(iterations, COMPARED if model.dim else COMPARED_DIGITS)
    twin = model.twin(net)
    if net.block.options:
        twin.block.options = net.block.options
    data, runs = model.in_dtype(net.linear.weight.dtype), (Run(), Run())
    for run, one in zip(runs, (net, twin), strict=True):
        order = islice(batches(data, model.batch, iterations, seed=0), iterations)
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-3)
        list(run.train(one, order, optimizer, model.loss_function))
        assert run.failure is None and len(run.losses) == iterations
    return runs


def difference(runs):
    """The largest one of the losses, relative."""
    ours, theirs = (torch.tensor(run.losses, dtype=f64) for run in runs)
    return ((ours - theirs).abs() / theirs.abs()).max().item()


def test_same_curve_with_fixed_steps(model):
    net = model.net(trained=False).double()
    net.block.method, net.block.options = "rk4", {"step_size": 0.1}
    ours, theirs = runs = train(model, net)
    assert ours.nfe == theirs.nfe and set(ours.nfe) == {40}
    assert difference(runs) < ROUNDING
    assert min(ours.losses) < ours.losses[0]


def test_same_curve_within_the_tolerance(model):
    """In float32, as users train.

    torchdiffeq's gradient flows through the choice of the steps too, which moves it within the
    tolerance, and with it the weights.
    """
    runs = train(model, model.net(trained=False))
    assert difference(runs) < TOLERANCE
    ours, theirs = (run.nfe for run in runs)
    # The weights differ a little by then: a step more or less, seldom.
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 6
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= len(ours) / 5


def test_step_sizes_explain_all_of_the_difference(model, monkeypatch):
    """Without the gradient through them torchdiffeq's curve is ours, to rounding."""
    assert difference(train(model, model.net(trained=False).double(), 10)) > 1e3 * ROUNDING
    for name in ("_select_initial_step", "_optimal_step_size"):
        choose = getattr(rk_common, name)
        monkeypatch.setattr(
            rk_common, name, lambda *args, choose=choose, **kw: choose(*args, **kw).detach()
        )
    ours, theirs = runs = train(model, model.net(trained=False).double())
    assert ours.nfe == theirs.nfe
    assert difference(runs) < ROUNDING


@pytest.mark.parametrize("model", SPHERES, ids=str)
def test_difference_goes_away_with_the_tolerance(model):
    """Of a smooth field. (relu's kinks let the step sizes depend ever more steeply on weights.)"""
    differences = []
    for tolerance in (1e-3, 1e-9):
        torch.manual_seed(0)
        net = ODENet(model.dim, 32, augment_dim=model.augmented, activation="tanh").double()
        set_tolerance(net, tolerance)
        differences.append(difference(train(model, net, COMPARED // 2)))
        assert differences[-1] < tolerance
    assert differences[0] > 1e-9  # what went away
