import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from anode_fast import ODENet
from benchmarks.__main__ import main
from benchmarks.baselines import TorchdiffeqBlock, with_torchdiffeq
from benchmarks.data import ConcentricSpheres, batches
from benchmarks.quickstart import SOLVERS, Config, Flow, _in_turns, draw, run, train
from benchmarks.train import Run

# Of seed 0.
FIRST_AND_LAST = [[-0.491085, -0.079336], [0.507324, -1.295375]]
PICTURES = {"quickstart.png", "loss.png", "nfe.png", "flow.png", "features.png"}
# 6 batches of 32 from 192 points: the smallest training with every part of the real one.
TINY = Config(epochs=2, batch_size=32, num_inner=64, num_outer=128)


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
    assert (min(result.nfe_backward) > 0) == (solver == "anode_fast")


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
    run(TINY, out, Console(width=100))
    assert {path.name for path in out.iterdir()} == PICTURES | {"quickstart.json"}
    assert all((out / name).read_bytes()[1:4] == b"PNG" for name in PICTURES)
    content = json.loads((out / "quickstart.json").read_text())
    assert content["config"]["epochs"] == 2 and content["machine"]["cores"] >= 1
    runs = content["runs"]
    assert [(one["model"], one["solver"]) for one in runs] == [
        (model, solver) for model in ("NODE", "ANODE") for solver in SOLVERS
    ]
    for one in runs:
        assert one["failure"] is None
        for key in ("losses", "nfe", "nfe_backward", "ms"):
            assert len(one[key]) == 12 and all(map(math.isfinite, one[key]))
        assert one["final_loss"] == pytest.approx(sum(one["losses"][-6:]) / 6)
        assert one["ms_per_iteration"] > 0
    for ours, theirs, comparison in zip(runs[::2], runs[1::2], content["comparisons"], strict=True):
        assert ours["parameters"] == theirs["parameters"]
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
        assert 0 < comparison["ratio_at_equal_nfe"] < 100
    rows = [line for line in capfd.readouterr().out.splitlines() if "│" in line]
    assert len(rows) == 4
    for row, one in zip(rows, runs, strict=True):
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[:2] == [one["model"], one["solver"]]
        assert float(cells[2]) == pytest.approx(one["final_loss"], abs=1e-5)
        assert all(math.isfinite(float(cell)) for cell in cells[2:])


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

    assert list(_in_turns([training("a", 4), training("b", 2)])) == [[0.5, 0.5]] * 2 + [[0.5]] * 2
    assert "".join(log) in ("abbaaa", "baabaa")


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
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "torchdiffeq is not installed" in done.stderr
    assert "pip install -e '.[dev]'" in done.stderr
    assert "Traceback" not in done.stderr
