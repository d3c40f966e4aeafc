import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchdiffeq
from rich.console import Console
from torch import nn

import anode_fast
from anode_fast import MLPField, ODENet
from anode_fast.spec import MLPSpec
from benchmarks import machine, peak, roofline
from benchmarks.__main__ import main
from benchmarks.baselines import TorchdiffeqBlock, with_torchdiffeq
from benchmarks.data import ConcentricSpheres, batches
from benchmarks.quickstart import (
    ADAMS,
    ADJOINT,
    SOLVERS,
    Config,
    Flow,
    Trained,
    draw,
    run,
    train,
)
from benchmarks.speed import rivals, tables
from benchmarks.speed.rivals import Case, DiffraxRival, Worker, with_anode_fast, with_odeint
from benchmarks.speed.turns import IN_A_ROW, MAX_ROUNDS, READY, Turns
from benchmarks.train import (
    GRADIENT,
    LOSS,
    PARTS,
    REST,
    SOLVE,
    STEP,
    ZERO_GRAD,
    Run,
    in_turns,
)

ROOT = Path(__file__).parents[1]

# Of seed 0.
FIRST_AND_LAST = [[-0.491085, -0.079336], [0.507324, -1.295375]]
PICTURES = {"quickstart.png", "loss.png", "nfe.png", "flow.png", "features.png"}
# 6 batches of 32 from 192 points: the smallest training with every part of the real one.
TINY = Config(epochs=2, varied=2, batch_size=32, num_inner=64, num_outer=128)


def loss_of(net, x, y):
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    return loss.item()


# ---- data


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_spheres_have_the_papers_radii_counts_and_targets(dim):
    data = ConcentricSpheres(dim)
    radii = data.points.norm(dim=1)
    assert data.points.shape == (3000, dim) and data.points.dtype == torch.float32
    assert (radii[:1000] <= 0.5 + 1e-6).all()
    assert (radii[1000:] >= 1.0 - 1e-6).all() and (radii[1000:] <= 1.5 + 1e-6).all()
    assert (data.targets[:1000] == -1).all() and (data.targets[1000:] == 1).all()
    assert data.targets.shape == (3000, 1)
    assert torch.equal(data.inner, radii < 0.75)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_spheres_are_uniform(dim):
    data = ConcentricSpheres(dim)
    radii = data.points.double().norm(dim=1)
    # Of uniform points the shares of the volume further in are uniform on [0, 1].
    ball = (radii[:1000] / 0.5) ** dim
    shell = (radii[1000:] ** dim - 1) / (1.5**dim - 1)
    for share in (ball, shell):
        share = share.sort().values
        steps = torch.arange(1, len(share) + 1) / len(share)
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
        assert (share - steps).abs().max() < 1.95 / len(share) ** 0.5
    assert data.points.mean(0).abs().max() < 4 / 3000**0.5


def test_spheres_depend_on_the_seed_alone():
    first = ConcentricSpheres(seed=3)
    torch.manual_seed(99)
    assert torch.equal(first.points, ConcentricSpheres(seed=3).points)
    assert not torch.equal(first.points, ConcentricSpheres(seed=4).points)


def test_spheres_do_not_change_between_versions():
    points = ConcentricSpheres(seed=0).points[[0, 2999]]
    assert torch.allclose(points, torch.tensor(FIRST_AND_LAST), rtol=0, atol=1e-6)


def test_spheres_refuse_radii_in_the_wrong_order():
    with pytest.raises(ValueError, match="r1 < r2 < r3"):
        ConcentricSpheres(inner_radius=1.2)


def test_batches_visit_every_point_once_per_epoch_in_a_seeded_order():
    data = ConcentricSpheres(num_inner=30, num_outer=70)
    visits = list(batches(data, 32, 2, seed=5))
    assert [len(x) for x, _ in visits] == [32, 32, 32, 4] * 2
    epochs = [torch.cat([x for x, _ in visits[i : i + 4]]) for i in (0, 4)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, data.points.sort(0).values)
    assert not torch.equal(*epochs)
    for x, y in visits:  # points keep their targets
        assert torch.equal(x.norm(dim=1, keepdim=True) > 0.75, y > 0)
    again = torch.cat([x for x, _ in batches(data, 32, 2, seed=5)])
    assert torch.equal(again, torch.cat(epochs))
    other = torch.cat([x for x, _ in batches(data, 32, 2, seed=6)])
    assert not torch.equal(again, other)


# ---- baseline


@pytest.mark.parametrize("augment_dim", [0, 5])
@pytest.mark.parametrize("gradient", ["discrete", "autograd"])
def test_baseline_computes_what_the_net_computes(augment_dim, gradient):
    net = ODENet(2, 32, augment_dim=augment_dim, gradient=gradient)
    twin = with_torchdiffeq(net)
    x, y = next(batches(ConcentricSpheres(), 64, 1, seed=0))
    ours, theirs = loss_of(net, x, y), loss_of(twin, x, y)
    # A few dozen evaluations, each with a few roundings.
    assert ours == pytest.approx(theirs, rel=100 * torch.finfo(torch.float32).eps)
    assert net.block.stats.nfe == twin.block.stats.nfe > 2
    for (name, a), (other, b) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other
        # Not to rounding: torchdiffeq differentiates its choice of the step size too.
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm()


def test_baseline_has_the_same_state_dict_and_weights_of_its_own():
    net = ODENet(2, 8, augment_dim=1)
    before = copy.deepcopy(net.state_dict())
    twin = with_torchdiffeq(net)
    twin.load_state_dict(before, strict=True)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("adjoint", [False, True])
def test_baseline_counts_evaluations(adjoint):
    twin = with_torchdiffeq(ODENet(2, 8), adjoint=adjoint)
    calls = []
    field_forward = twin.block.field.forward
    twin.block.field.forward = lambda t, y: calls.append(t) or field_forward(t, y)
    loss = twin(torch.randn(16, 2)).mean()
    forward = len(calls)
    assert twin.block.stats.nfe == forward > 0
    assert twin.block.stats.nfe_backward == 0
    loss.backward()
    assert twin.block.stats.nfe == forward
    assert twin.block.stats.nfe_backward == len(calls) - forward
    assert (twin.block.stats.nfe_backward > 0) == adjoint
    calls.clear()
    twin(torch.randn(16, 2))
    assert twin.block.stats.nfe == len(calls)  # of the last solve alone


def test_baseline_augments_and_gives_trajectories():
    block = ODENet(2, 8, augment_dim=3).block
    x, times = torch.randn(16, 2), torch.linspace(0, 1, 4)
    ours, theirs = block(x, times), TorchdiffeqBlock(block)(x, times)
    assert theirs.shape == (4, 16, 5)
    assert torch.equal(theirs[0], torch.cat([x, torch.zeros(16, 3)], 1))
    assert torch.allclose(ours, theirs, atol=1e-5)


# ---- training


@pytest.mark.parametrize("solver", SOLVERS)
def test_training_records_every_iteration_and_learns(solver):
    data = ConcentricSpheres(num_inner=64, num_outer=128)
    net = ODENet(2, 16, augment_dim=2)
    net = net if solver == "anode_fast" else with_torchdiffeq(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    result = Run()
    losses = list(result.train(net, batches(data, 32, 8, seed=0), optimizer))
    assert losses == result.losses and len(losses) == 48 and result.failure is None
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert len(result.nfe) == len(result.nfe_backward) == len(result.seconds) == 48
    assert min(result.nfe) > 2 and min(result.seconds) > 0
    assert solver == "anode_fast" or max(result.nfe_backward) == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_parts_of_an_iteration_add_up_and_say_what_took_the_time(solver):
    net = ODENet(2, 16, augment_dim=2)
    net = net if solver == "anode_fast" else with_torchdiffeq(net)
    data = ConcentricSpheres(num_inner=64, num_outer=128)
    naps = dict(zip(PARTS, (0.004, 0.008, 0.006, 0.012, 0.010, 0.005), strict=True))
    optimizer = torch.optim.Adam(net.parameters())

    def after(function, part):
        def slow(*args):
            time.sleep(naps[part])
            return function(*args)

        return slow

    class Slow(torch.autograd.Function):
        """The identity: its forward and backward take as long as the solve and its gradient."""

        forward = staticmethod(after(lambda ctx, x: x.clone(), SOLVE))
        backward = staticmethod(after(lambda ctx, grad: grad, GRADIENT))

    solve = net.block.forward
    net.block.forward = lambda x: Slow.apply(solve(x))
    optimizer.step = after(optimizer.step, STEP)
    optimizer.zero_grad = after(optimizer.zero_grad, ZERO_GRAD)
    order = (after(lambda batch: batch, REST)(batch) for batch in batches(data, 32, 1, seed=0))
    result = Run()
    list(result.train(net, order, optimizer, after(nn.functional.mse_loss, LOSS)))
    assert len(result.seconds) == 6
    for i, seconds in enumerate(result.seconds):
        assert sum(values[i] for values in result.parts.values()) == pytest.approx(seconds)
        assert all(values[i] >= naps[part] for part, values in result.parts.items())
    assert result.milliseconds_of(*PARTS) == pytest.approx(result.milliseconds, rel=0.5)
    assert not net.block._forward_hooks and not net.block._forward_pre_hooks


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_failing_solve_ends_the_training_with_its_reason(solver):
    net = ODENet(2, 8)
    net = net if solver == "anode_fast" else with_torchdiffeq(net)
    x, y = torch.randn(16, 2), torch.ones(16, 1)
    bad = x.clone()
    bad[3, 1] = math.nan
    result = Run()
    order = [(x, y), (x, y), (bad, y), (x, y)]
    losses = list(result.train(net, order, torch.optim.Adam(net.parameters())))
    assert len(losses) == len(result.losses) == len(result.nfe) == 2
    assert all(map(math.isfinite, losses))
    # torchdiffeq 0.2.5 finds no step size, anode_fast names the cause.
    assert ("non-finite" if solver == "anode_fast" else "underflow in dt") in result.failure


def test_a_loss_that_is_not_finite_ends_the_training():
    net = ODENet(2, 8)
    order = [(torch.randn(16, 2), torch.full((16, 1), math.inf))]
    result = Run()
    assert list(result.train(net, order, torch.optim.Adam(net.parameters()))) == []
    assert "loss is inf" in result.failure


def test_a_wrong_argument_is_not_taken_for_a_failed_solve():
    net = ODENet(2, 8, method="dopri6")
    order = [(torch.randn(16, 2), torch.ones(16, 1))]
    with pytest.raises(ValueError, match="dopri6"):
        list(Run().train(net, order, torch.optim.Adam(net.parameters())))


# ---- quickstart


def test_quickstart_writes_everything(tmp_path, capfd):
    out = tmp_path / "new" / "folder"
    results = run(TINY, out, Console(width=100))
    assert {path.name for path in out.iterdir()} == PICTURES | {"quickstart.json"}
    assert all((out / name).read_bytes()[1:4] == b"PNG" for name in PICTURES)
    content = json.loads((out / "quickstart.json").read_text())
    assert content["config"]["epochs"] == 2 and content["machine"]["cores"] >= 1
    assert content["machine"]["cpu"] == machine.cpu_name()
    runs = content["runs"]
    assert [(one["model"], one["solver"]) for one in runs] == [
        (model, solver) for model in ("NODE", "ANODE") for solver in SOLVERS
    ]
    for one in runs:
        assert one["failure"] is None
        for key in ("losses", "nfe", "nfe_backward", "ms"):
            assert len(one[key]) == 12 and all(map(math.isfinite, one[key]))
        assert one["final_loss"] == pytest.approx(sum(one["losses"][-6:]) / 6)
        assert 0 < max(one["ms_of_parts"].values()) < one["ms_per_iteration"]
    for ours, theirs, comparison in zip(runs[::2], runs[1::2], content["comparisons"], strict=True):
        assert ours["parameters"] == theirs["parameters"]
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
        assert comparison["ratio"] == theirs["ms_per_iteration"] / ours["ms_per_iteration"]
        ratio = sum(theirs["ms"]) / sum(ours["ms"])  # of rounded figures
        assert comparison["ratio_of_totals"] == pytest.approx(ratio, rel=1e-3)
        assert comparison["ratio_with_infinitely_fast_solver"] > 0
    for variant in content["variants"]:
        assert 0 < variant["ms_of_optimizer_step"] < variant["ms_per_iteration"]
        if variant["solver"] != "anode_fast":
            assert (variant["mean_nfe_backward"] > 0) == (variant["solver"] == ADJOINT)
    text = capfd.readouterr().out
    for model in results:
        assert "".join(model.summary().split()) in "".join(text.split())  # wrapped
    lines = [line for line in text.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    for row, one in zip(rows[:4], runs, strict=True):
        assert row[0] == one["model"] and row[1].startswith(one["solver"])
        assert float(row[2]) == pytest.approx(one["final_loss"], abs=1e-5)
        assert row[3] == " + ".join(f"{sum(one[x]) / 12:.1f}" for x in ("nfe", "nfe_backward"))
        assert float(row[4]) == pytest.approx(sum(one["ms"]) / 1e3, abs=6e-3)
        assert all(math.isfinite(float(cell)) for cell in row[5:])
    assert [row[0] for row in rows[4:]] == [*PARTS, "whole iteration", *ADAMS, "odeint_adjoint"]
    for row in rows[4:]:
        assert all(math.isfinite(float(cell.rstrip("%") or 0)) for cell in row[1:])


@pytest.mark.parametrize("missing", ["", "the C++ library is lost"])
def test_quickstart_says_why_it_runs_on_the_reference_path(missing, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("benchmarks.quickstart.library.missing", lambda: missing)
    gradient = "autograd" if missing else "discrete"  # "autograd" goes through the reference path
    config = dataclasses.replace(TINY, epochs=1, gradient=gradient, augment_dims={"NODE": 0})
    (model,) = run(config, tmp_path, Console(width=100))
    text = capfd.readouterr().out
    assert ("reference path, in PyTorch: the C++ library is lost." in text) == bool(missing)
    backend = model.runs["anode_fast"].backend
    assert backend == "reference" if missing else backend in ("cpu", "reference")
    assert ("anode_fast (reference)" in text) == (backend == "reference")


def known(total, **parts):
    """A run with the milliseconds of its parts, in two iterations and a third, interrupted one."""
    ms = dict.fromkeys(PARTS, 0.0) | {globals()[name]: value for name, value in parts.items()}
    seconds = {part: [value / 1e3] * 2 + [1.0] for part, value in ms.items()}
    return Run(losses=[0.5, 0.25, 0.2], seconds=[total / 1e3] * 2 + [1.0], parts=seconds)


def test_what_bounds_the_ratio_follows_from_the_figures():
    ours = known(1.0, SOLVE=0.25, GRADIENT=0.35, LOSS=0.1, STEP=0.2, ZERO_GRAD=0.04, REST=0.06)
    theirs = known(8.0, SOLVE=5.0, GRADIENT=2.6, LOSS=0.1, STEP=0.2, ZERO_GRAD=0.04, REST=0.06)
    theirs.losses[1] += 0.125
    model = Trained("NODE", {}, {"anode_fast": ours, "torchdiffeq": theirs}, {})
    assert model.ratio == pytest.approx(8) and model.bound == pytest.approx(20)
    assert model.ratio_of_totals == pytest.approx(1016 / 1002)
    assert model.summary() == (
        "NODE: 8.0 times torchdiffeq's speed by the medians, 1.0 by the totals. The solve and its "
        "gradient take 0.60 of anode_fast's 1.00 ms, the optimizer 0.20: even an infinitely fast "
        "solver would give at most 20.0 times torchdiffeq's speed. Over the first 50 iterations "
        "the two loss curves differ by at most 1.2e-01."
    )


def test_quickstart_repeats_itself():
    data = ConcentricSpheres(num_inner=64, num_outer=128)
    first, second = (train("ANODE", data, TINY) for _ in range(2))
    for solver in SOLVERS:
        assert first.runs[solver].losses == second.runs[solver].losses


def test_quickstart_trains_both_from_the_seeded_weights_by_the_papers_recipe():
    data = ConcentricSpheres(num_inner=64, num_outer=128)
    torch.manual_seed(TINY.seed)
    net = ODENet(2, 32, augment_dim=5, rtol=1e-3, atol=1e-3)
    order = batches(data, 32, 2, seed=TINY.seed)
    expected = Run()
    list(expected.train(net, order, torch.optim.Adam(net.parameters(), lr=1e-3)))
    runs = train("ANODE", data, TINY).runs
    assert runs["anode_fast"].losses == expected.losses
    assert runs["torchdiffeq"].losses[0] == pytest.approx(expected.losses[0], rel=1e-5)


def test_trainings_take_turns_until_the_last_has_ended():
    log = []

    def training(name, count):
        for _ in range(count):
            log.append(name)
            yield 0.5

    turns = list(in_turns([training("a", 7), training("b", 3)], 3))
    assert turns == [[[0.5] * 3] * 2, [[0.5] * 3], [[0.5]]]
    assert "".join(log) in ("aaabbbaaaa", "bbbaaaaaaa")


def test_quickstart_survives_a_run_that_fails(tmp_path, capfd, monkeypatch):
    def breaks(self, x, eval_times=None):
        raise AssertionError("underflow in dt 0.0")

    monkeypatch.setattr(TorchdiffeqBlock, "forward", breaks)
    run(TINY, tmp_path, Console(width=100))
    runs = json.loads((tmp_path / "quickstart.json").read_text())["runs"]
    assert [one["failure"] for one in runs] == [None, "AssertionError: underflow in dt 0.0"] * 2
    assert [len(one["losses"]) for one in runs] == [12, 0] * 2
    assert runs[1]["final_loss"] is None
    assert "ended early: AssertionError: underflow in dt 0.0" in capfd.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == PICTURES | {"quickstart.json"}


def test_quickstart_shows_a_flow_that_cannot_be_solved(tmp_path):
    data = ConcentricSpheres(num_inner=64, num_outer=128)
    trained = train("ANODE", data, TINY)
    with torch.no_grad():
        trained.nets["anode_fast"].block.field.layers[-1].bias.fill_(math.nan)
    assert "non-finite" in Flow.of(trained, data).failure
    draw([trained], data, TINY, tmp_path)
    assert (tmp_path / "quickstart.png").exists()


def test_quickstart_refuses_an_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="cannot write to --out .*file"):
        main(["quickstart", "--epochs", "1", "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


# ---- solvers by turns


class Fake:
    """A rival that takes no time but says it does, and logs its runs and torch's threads."""

    def __init__(self, name, log, threads=1, seconds=None):
        self.name, self.log, self.threads, self.seconds = name, log, threads, seconds

    def __call__(self):
        self.log.append((self.name, torch.get_num_threads()))
        return self.seconds


def rounds(turns, first):
    for _ in range(turns.rounds):
        turns.before_round()
        first()


def test_rivals_take_turns_of_a_few_runs_each_with_its_own_threads():
    log = []
    a, b, c = Fake("a", log, 1), Fake("b", log, 2), Fake("c", log, 1)
    turns = Turns({"a": a, "b": b, "c": c}, seconds=1e-4, min_rounds=2 * IN_A_ROW)
    log.clear()
    turns.rounds = 2 * IN_A_ROW
    try:
        rounds(turns, a)
    finally:
        torch.set_num_threads(1)
    of_others = [*[("b", 2)] * (READY + IN_A_ROW), *[("c", 1)] * (READY + IN_A_ROW)]
    assert log == [*of_others, *[("a", 1)] * (READY + IN_A_ROW)] * 2
    assert {name: len(seconds) for name, seconds in turns.seconds.items()} == {"b": 10, "c": 10}


def test_a_rival_that_times_itself_is_believed():
    turns = Turns({"a": Fake("a", []), "b": Fake("b", [], seconds=7.0)}, seconds=0, min_rounds=3)
    rounds(turns, lambda: None)
    assert turns.rounds == 3 and turns.medians() == {"b": 7.0}


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, 5), (20.0, 10), (1e9, MAX_ROUNDS)])
def test_rounds_fit_the_time(seconds, expected):
    pair = {name: Fake(name, [], seconds=1.0) for name in "ab"}
    assert Turns(pair, seconds=seconds, min_rounds=5).rounds == expected


CASES = [Case(batch=8), Case(batch=8, gradient=True), Case(batch=8, method="rk4", gradient=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_our_side_and_torchdiffeq_do_the_same_work(case):
    ours, theirs = with_anode_fast(case).observe(), with_odeint(torchdiffeq.odeint, case).observe()
    assert ours.agrees_with(theirs)
    assert ours.nfe == theirs.nfe > 2 and theirs.nfe_backward == 0
    assert case.gradient or ours.nfe_backward == 0
    assert len(ours.gradients) == (6 if case.gradient else 0)
    assert 0 < case.error(theirs.y1) < 1e-2
    assert not dataclasses.replace(ours, y1=2 * ours.y1).agrees_with(theirs)


@pytest.mark.parametrize("gradient", [False, True])
def test_torchode_does_the_same_work(gradient):
    pytest.importorskip("torchode")
    case = Case(batch=8, gradient=gradient)
    outcome = rivals.with_torchode(case).observe()
    assert outcome.agrees_with(with_anode_fast(case).observe()) and outcome.nfe > 2


def test_diffrax_does_the_same_work_in_its_own_process():
    pytest.importorskip("diffrax")
    with Worker(1) as worker:
        for case in CASES[:2]:
            same, own = (DiffraxRival(case, worker, same_first_step=x) for x in (True, False))
            outcome = same.observe()
            assert outcome.agrees_with(with_anode_fast(case).observe())
            assert outcome.nfe < own.observe().nfe
            assert (outcome.nfe_backward > 0) == case.gradient
            assert 0 < same() < 10 and 0 < own() < 10
        with pytest.raises(RuntimeError, match="no attribute 'sleep'"):
            worker.ask("sleep")


def figures(ms, nfe_backward=0):
    return {"ms": ms, "nfe": 14, "nfe_backward": nfe_backward, "error": 0.5}


def test_tables_have_ratios_targets_and_what_is_missing():
    fast, slow, backward = figures(2.0), figures(50.0), figures(4.0, nfe_backward=13)
    cases = [
        {
            "case": "one",
            "ours": "us",
            "theirs": "them",
            "targets": {"them": 20, "peer": 3},
            "rivals": {"us": fast, "them": slow, "peer": None},
        },
        {
            "case": "two",
            "ours": "us",
            "theirs": "them",
            "targets": {"them": 20},
            "rivals": {"us": backward, "them": slow, "adjoint": slow},
        },
    ]
    sheet = tables.comparison("title", cases)
    assert sheet.header == [
        *("case", "NFE", "them ms", "peer ms", "adjoint ms", "us ms"),
        *("ratio to them", "ratio to peer", "error"),
    ]
    first = ["one", "14", "50.000", "not installed", "-", "2.000"]
    second = ["two", "14 + 13", "50.000", "-", "50.000", "4.000"]
    assert sheet.rows == [
        [*first, "25.00 (20: reached)", "-", "5.0e-01"],
        [*second, "12.50 (20: not reached)", "-", "5.0e-01"],
    ]
    lines = sheet.markdown().splitlines()
    assert lines[0] == "**title**" and len(lines) == 6
    assert {line.count("|") for line in lines[2:]} == {10}
    assert [row[1] for row in tables.details("title", cases).rows] == ["us", "them"] + [
        *("us", "them", "adjoint")
    ]


WITHOUT_PEERS = """
import sys
sys.modules.update(torchode=None, diffrax=None)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_speed_comparison_runs_without_the_peers(tmp_path):
    case = f"{ROOT}/benchmarks/speed/test_cpu.py::test_cpu_headline[{Case()}]"
    options = ["--benchmark-only", "--benchmark-max-time=0.001", "-q", "-p", "no:cacheprovider"]
    # A worker of xdist's says so to its children, and pytest-benchmark then measures nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEERS, case, *options],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "results/speed/cpu.md").read_text()
    assert f"| {Case()} | 14 |" in table and table.count("not installed") == 3
    assert "not installed" in done.stdout and "reached" in done.stdout


# ---- roofline


@pytest.mark.parametrize(
    ("spec", "flops"),
    [
        (MLPSpec(7, (32, 32)), 2944),  # 2 (7 32 + 32 32 + 32 7)
        (MLPSpec(7, (32, 32), time_dependent=False), 2944),
        (MLPSpec(3, (4,)), 48),
        (MLPSpec(2, (3, 5, 7)), 140),  # 2 (6 + 15 + 35 + 14)
    ],
    ids=str,
)
def test_flops_of_a_field(spec, flops):
    assert roofline.field_flops(spec) == flops


def test_flops_of_a_solve():
    spec = MLPSpec(3, (4,))
    forward = roofline.solve_flops(spec, 10, 14)
    assert forward.needed == forward.executed == 10 * 48 * 14
    both = roofline.solve_flops(spec, 10, 14, differentiated=13, nfe_backward=5)
    assert both.needed == 10 * 48 * (14 + 13 + 13)  # gradients of input and weights
    assert both.executed == 10 * 48 * (14 + 13 + 13 + 5)


@pytest.mark.parametrize("gradient", [False, True])
def test_roofline_takes_flops_from_the_evaluations_that_were_made(gradient):
    one = roofline.measure(4, 8, torch.float64, gradient=gradient, seconds=0)
    assert (one.batch, one.width, one.gradient) == (4, 8, gradient)
    torch.manual_seed(0)
    field, y0 = MLPField(7, 8).double(), torch.randn(4, 7, dtype=torch.float64)
    solution, stats = anode_fast.odeint(
        field,
        y0,
        torch.tensor([0.0, 1.0]),
        rtol=1e-3,
        atol=1e-3,
        backend="reference",
        gradient="discrete",
        return_stats=True,
    )
    if gradient:
        solution[-1].sum().backward()
    # The reference makes every evaluation again that the solution depends on.
    flops = 4 * roofline.field_flops(field.spec())
    assert one.nfe == stats.nfe
    assert one.flops.needed == flops * (stats.nfe + 2 * stats.nfe_backward)
    assert one.flops.executed == one.flops.needed + flops * one.nfe_backward
    assert 0 < one.seconds < 10


def test_roofline_prints_shares_of_the_peak(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "peak_flops", lambda dtype, seconds: 1e15)
    main("roofline --batch 2 1024 --width 8 64 --dtype float32 --seconds 0".split())
    text = capsys.readouterr().out
    assert "float32: a core's peak is 1000000 GFLOP/s" in text and "float64" not in text
    rows = [x.split() for x in text.splitlines() if x.split()[:1] in (["forward"], ["gradient"])]
    rows = [row for row in rows if row[1:2] in (["8"], ["64"])]  # not the words below the table
    assert [row[1:3] for row in rows] == [
        ["8", "2"],
        ["8", "1024"],
        ["64", "2"],
        ["64", "1024"],
    ] * 2
    assert [row[-2:] for row in rows if row[1:3] == ["64", "1024"]] == [
        ["60%", "missed"],
        ["45%", "missed"],
    ]
    assert all(row[-1] == "-" for row in rows if row[1:3] != ["64", "1024"])


def test_peak_is_what_a_core_can_do():
    try:
        single, double = (roofline.peak_flops(x, 0.01) for x in (torch.float32, torch.float64))
    except OSError as error:
        pytest.skip(str(error))
    assert 1e8 < double < single < 1e13  # from an emulator to well beyond any core


def test_roofline_without_library_and_compiler_says_so(monkeypatch):
    monkeypatch.setattr(peak.library, "load", lambda: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="roofline: no peak .* no C\\+\\+ compiler"):
        main(["roofline", "--batch", "2", "--width", "4"])


# ---- command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required"),
        (["quickstat"], "invalid choice"),
        (["quickstart", "--epochs", "0"], "at least 1"),
        (["quickstart", "--device", "toaster"], "cannot use 'toaster'"),
        (["quickstart", "--device", "meta"], "want cpu or cuda"),
    ],
)
def test_a_wrong_command_line_gets_the_help(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert "usage: python -m benchmarks" in text and "quickstart" in text and message in text


def test_missing_torchdiffeq_is_named_with_the_remedy():
    code = (
        "import sys; sys.modules['torchdiffeq'] = None; import benchmarks.__main__ as m; m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "torchdiffeq is not installed" in done.stderr
    assert "pip install -e '.[dev]'" in done.stderr
    assert "Traceback" not in done.stderr
