"""The paper's figures: settings, runs, summaries and pictures, at sizes that take seconds."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from anode_fast import ConvODENet
from benchmarks.__main__ import main
from benchmarks.paper import command, models, pictures, pool, registry, runs, summary
from benchmarks.paper.registry import CIFAR10, FIGURES, GROUPS, MNIST, SCALES
from benchmarks.paper.runs import Training, path_of
from benchmarks.paper.settings import ANODE, NODE, OURS, RESNET, THEIRS, TORCH, Setting

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
# 6 iterations of 16 points, twice.
TINY = Setting(
    *("spheres", ANODE),
    augment=2,
    hidden=8,
    batch=16,
    learning_rate=1e-2,
    epochs=2,
    points=(32, 64),
)
TINY_IMAGES = Setting(
    "digits", ANODE, augment=1, hidden=4, batch=16, epochs=2, images=64, size=8, holdout="test"
)
# Everything there is, with a few iterations each.
SCALE = replace(
    SCALES["smoke"],
    repeats=2,
    toy={"epochs": 2, "points": (32, 64), "hidden": 4, "batch": 32},
    space={"batch": (32,), "learning_rate": (1e-3,), "hidden": (4,)},
    filters=4,
    images=32,
    image_epochs=2,
    overfitted=32,
    overfitting_epochs=2,
    sizes={MNIST: 8, CIFAR10: 8},
    sources={MNIST: "digits", CIFAR10: "synthetic"},
    turns=(1, 1),
    image_turns=(1, 1, 32),
)


def trained(setting, folder, solvers=(OURS,), threads=1):
    runs.train(setting, solvers, folder, (), threads)
    found = [json.loads(path_of(folder, setting, solver).read_text()) for solver in solvers]
    return found if len(found) > 1 else found[0]


def place(folder, processes=1):
    return pool.Place(folder, (), processes)


# ---- settings and registry


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Setting)])
def test_whatever_changes_in_a_setting_gives_it_another_key(name):
    value = getattr(TINY, name)
    other = (1, 2) if name == "points" else value + "x" if isinstance(value, str) else value + 1
    assert replace(TINY, **{name: other}).key != TINY.key == replace(TINY).key
    assert TINY.key.startswith("spheres-2d-ANODE-0-")


def test_every_figure_of_the_paper_is_there():
    assert {str(number) for number in range(3, 18)} | {"search", "speed"} == set(FIGURES)
    assert set(GROUPS["toy"]) == {*map(str, range(3, 13)), "search"}
    assert set(GROUPS["images"]) == {*map(str, range(13, 18))}


def settings_of(number, scale=SCALES["full"]):
    return [x for entry in FIGURES[number].entries(scale) for x in entry.settings]


def test_the_full_scale_is_the_papers():
    for setting in settings_of("8"):
        assert (setting.points, setting.batch, setting.epochs) == ((1000, 2000), 64, 50)
        assert (setting.hidden, setting.learning_rate, setting.tolerance) == (32, 1e-3, 1e-3)
        assert setting.augment == {NODE: 0, ANODE: 5}[setting.model]
    assert len(settings_of("8")) == 2 * 2 * 20
    assert {x.dim for x in settings_of("8")} == {1, 2}
    # The grid of appendix E.2.1, over three folds and in both dimensions.
    counts = {NODE: 2 * 3 * 2, ANODE: 2 * 3 * 2 * 3, RESNET: 2 * 3 * 2 * 3}
    searched = settings_of("search")
    for model, count in counts.items():
        assert len({x for x in searched if x.model == model}) == count * 3 * 2
    assert {x.augment for x in settings_of("13")} == {0, 1, 2, 5, 10}
    assert {x.hidden for x in settings_of("13")} == {64}
    assert len(settings_of("13")) == 2 * 5 * 5


@pytest.mark.parametrize(
    ("channels", "filters", "size", "count"),
    [(1, 92, 28, 84_395), (6, 64, 28, 84_816), (3, 125, 32, 172_358), (13, 64, 32, 171_799)],
)
def test_parameters_are_counted_as_in_the_paper(channels, filters, size, count):
    assert registry.parameters(channels, filters, size) == count
    net = ConvODENet((channels, size, size), filters, time_dependent=False)
    assert sum(x.numel() for x in net.parameters()) == count


def test_the_nets_of_figure_14_are_the_papers():
    filters = {
        (entry.panel, entry.label): entry.settings[0].hidden
        for entry in FIGURES["14"].entries(SCALES["full"])
    }
    assert filters == {
        (MNIST, NODE): 92,
        (MNIST, ANODE): 64,
        (CIFAR10, NODE): 125,
        (CIFAR10, ANODE): 64,
    }


def test_figures_share_their_trainings():
    eight, seven, eleven = (set(settings_of(number)) for number in ("8", "7", "11"))
    assert seven < eight and eight == eleven


# ---- models


@pytest.mark.parametrize("setting", [TINY, replace(TINY, data="flip", dim=1), TINY_IMAGES])
def test_both_solvers_start_from_the_same_weights(setting):
    ours, theirs = (models.build(setting, solver) for solver in (OURS, THEIRS))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    other = models.build(replace(setting, repeat=1), OURS)
    assert not torch.equal(next(ours.parameters()), next(other.parameters()))


def test_a_resnet_adds_a_perceptron_in_every_layer():
    net = models.build(replace(TINY, model=RESNET, layers=3), TORCH)
    x = torch.randn(5, 2)
    h = x
    for residual in net.block.residuals:
        h = h + residual(h)
    assert len(net.block.residuals) == 3 == net.block.stats.nfe
    torch.testing.assert_close(net(x), net.linear(h))
    assert net.block.trajectory(x).shape == (4, 5, 2)


# ---- runs


def test_a_run_keeps_every_iteration(tmp_path):
    run = trained(TINY, tmp_path)
    assert run["setting"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert run["iterations"] == 12 and run["every"] == 6 and run["failure"] is None
    for name in ("losses", "nfe", "nfe_backward", "ms"):
        assert len(run[name]) == 12
    assert sum(run["losses"][6:]) < sum(run["losses"][:6])
    assert min(run["nfe"]) >= 8 and min(run["nfe_backward"]) >= 0 and min(run["ms"]) > 0
    assert run["parameters"] == sum(x.numel() for x in models.build(TINY, OURS).parameters())
    assert run["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert run["machine"] and run["commit"] and run["data"].startswith("concentric spheres")
    assert not list(tmp_path.glob("runs/*.pt*"))


def test_the_trained_net_has_torchdiffeqs_evaluations(tmp_path):
    run = trained(replace(TINY, epochs=20), tmp_path)
    assert run["parity"] == {"batches": 6, "equal": 6, "largest_difference": 0}


def test_a_different_count_of_evaluations_would_show(tmp_path, monkeypatch):
    twin = models.twin

    def stricter(net):
        other = twin(net)
        other.block.tolerances = {"rtol": 1e-7, "atol": 1e-7}
        return other

    monkeypatch.setattr(models, "twin", stricter)
    parity = trained(TINY, tmp_path)["parity"]
    assert parity["equal"] == 0 and parity["largest_difference"] >= 6


def test_both_solvers_train_by_turns_on_the_same_batches(tmp_path):
    ours, theirs = trained(TINY, tmp_path, (OURS, THEIRS))
    assert ours["backend"] != "torchdiffeq" == theirs["backend"]
    assert ours["nfe"] == theirs["nfe"]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-2)


@pytest.mark.parametrize("setting", [TINY, TINY_IMAGES], ids=["points", "images"])
@pytest.mark.parametrize("done", [0, 3, 4, 6, 8])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(setting, done, tmp_path):
    whole = trained(setting, tmp_path / "whole")
    first = Training(setting, OURS, tmp_path)
    list(islice(first.iterations(), done))
    first.save()
    second = Training(setting, OURS, tmp_path)
    assert second.done == done
    second.warm_up()
    list(second.iterations())
    second.finish()
    again = json.loads(path_of(tmp_path, setting, OURS).read_text())
    for name in ("losses", "nfe", "nfe_backward", "validation", "parity", "pictures"):
        assert again[name] == whole[name], name


def test_a_failed_solve_ends_the_run_with_its_reason(tmp_path):
    run = trained(replace(TINY, max_num_steps=1, repeat=1), tmp_path)
    assert run["failure"].startswith("MaxStepsExceeded: max_num_steps exceeded")
    assert run["iterations"] == 0 and run["losses"] == []
    assert run["parity"] is None and run["pictures"] == {}


def test_a_failure_is_not_tried_again(tmp_path):
    setting = replace(TINY, max_num_steps=1)
    trained(setting, tmp_path)
    assert pool.missing([setting], (OURS,), tmp_path) == []


def test_a_solve_that_fails_beside_the_training_ends_it_too(tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("underflow in dt 0.0")

    monkeypatch.setattr(Training, "_evaluate", fail)
    run = trained(TINY_IMAGES, tmp_path)
    assert run["failure"] == "AssertionError, outside of training: underflow in dt 0.0"
    assert run["iterations"] == run["every"]


def test_held_out_slices_are_validated_at_every_point(tmp_path):
    run = trained(replace(TINY, holdout="slices", epochs=3), tmp_path)
    losses = run["validation"]["loss"]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert run["validation"]["accuracy"] == []


def test_images_are_validated_with_their_accuracy(tmp_path):
    run = trained(TINY_IMAGES, tmp_path)
    assert run["iterations"] == 8 and run["every"] == 1
    assert len(run["validation"]["loss"]) == len(run["validation"]["accuracy"]) == 8
    assert all(0 <= share <= 1 for share in run["validation"]["accuracy"])
    assert run["parity"]["equal"] == run["parity"]["batches"] == 4


def test_the_first_repetition_has_pictures(tmp_path):
    taken = trained(TINY, tmp_path)["pictures"]
    first = taken["features"]["0"]
    assert np.array(first["states"]).shape == (96, 3) and sum(first["inner"]) == 32
    assert np.abs(np.array(first["states"])[:, :2]).max() < 4
    assert np.array(taken["flow"]["states"]).shape == (pictures.TIMES, 20 + 40, 3)
    start = np.array(taken["flow"]["states"])[0]
    assert (start[:, 2] == 0).all()  # augmented
    assert np.array(taken["plane"]["values"]).shape == (pictures.GRID, pictures.GRID)
    assert trained(replace(TINY, repeat=1), tmp_path)["pictures"] == {}


def test_trajectories_in_one_dimension_end_with_those_of_the_data(tmp_path):
    for model, solver in ((NODE, OURS), (RESNET, TORCH)):
        setting = replace(TINY, data="flip", dim=1, augment=0, model=model)
        taken = trained(setting, tmp_path, (solver,))["pictures"]["trajectories"]
        states = np.array(taken["states"])
        assert states.shape == (pictures.TIMES if model == NODE else 6, pictures.STARTS + 2)
        assert states[0, -2:].tolist() == [-1.0, 1.0]
        assert (taken["field"] is None) == (model == RESNET)


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": [1.0, math.nan], "b": {"c": math.inf, "d": (2, "e")}})
    assert json.loads(path.read_text()) == {"a": [1.0, None], "b": {"c": None, "d": [2, "e"]}}


# ---- pool


def test_only_what_is_missing_is_trained(tmp_path):
    other = replace(TINY, repeat=1)
    trained(TINY, tmp_path)
    jobs = pool.missing([TINY, other, other], (OURS, THEIRS), tmp_path)
    assert jobs == [pool.Job(TINY, (THEIRS,)), pool.Job(other, (OURS, THEIRS))]


def test_whose_times_are_compared_are_trained_together(tmp_path):
    setting = replace(TINY, in_turns=True)
    assert pool.missing([setting], (OURS,), tmp_path) == [pool.Job(setting, (OURS, THEIRS))]
    trained(setting, tmp_path)
    assert pool.missing([setting], (OURS,), tmp_path) == [pool.Job(setting, (OURS, THEIRS))]
    trained(setting, tmp_path, (OURS, THEIRS))
    assert pool.missing([setting], (OURS,), tmp_path) == []


def test_a_resnet_needs_no_solver(tmp_path):
    setting = replace(TINY, model=RESNET)
    assert pool.missing([setting], (THEIRS,), tmp_path) == [pool.Job(setting, (TORCH,))]


def test_processes_train_what_one_would(tmp_path):
    settings = [replace(TINY, repeat=i) for i in range(3)]
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        counts = []
        jobs = pool.missing(settings, (OURS,), folder)
        done = list(pool.work(jobs, place(folder, processes), counts.append))
        assert {job.setting for job in done} == set(settings)
        assert processes == 2 or sum(counts) == 3 * 12
        found = [json.loads(path_of(folder, x, OURS).read_text()) for x in settings]
        made[processes] = [run["losses"] for run in found]
    assert made[1] == made[2]


def test_a_mistake_in_a_process_is_raised(tmp_path):
    jobs = [pool.Job(replace(TINY, data="nothing of this name"), (OURS,))]
    with pytest.raises(ValueError, match="nothing of this name"):
        list(pool.work(jobs, place(tmp_path, 2), lambda iterations: None))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    code = (
        "from pathlib import Path; from dataclasses import replace;"
        "from tests.test_paper import TINY, place; from benchmarks.paper import pool;"
        f"folder = Path({str(tmp_path)!r});"
        "jobs = [pool.Job(replace(TINY, epochs=500, repeat=i), ('anode_fast',)) for i in (0, 1)];"
        "list(pool.work(jobs, place(folder, 2), lambda n: print('at work', flush=True)))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline() == "at work\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()  # not read to its end: a process left behind would hold it open
    end = time.monotonic() + 20
    while any(map(running, children)):
        assert time.monotonic() < end, "processes outlive their parent"
        time.sleep(0.1)


def running(pid):
    """A zombie, which nobody waits for, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- summaries


def test_a_summary_has_the_statistics_of_its_runs(tmp_path):
    figure, scale = FIGURES["12"], SCALE
    for entry in figure.entries(scale):
        for setting in entry.settings:
            trained(setting, tmp_path)
    made = summary.summarise(figure, scale, tmp_path, (OURS,), "the command")
    assert [(x["panel"], x["label"]) for x in made["groups"]] == [
        ("plane", NODE),
        ("plane", ANODE),
        ("slices", NODE),
        ("slices", ANODE),
    ]
    entry, group = list(figure.entries(scale))[-1], made["groups"][-1]
    found = [json.loads(path_of(tmp_path, x, OURS).read_text()) for x in entry.settings]
    every = group["every"]
    firsts = [np.mean(run["losses"][:every]) for run in found]
    lasts = [np.mean(run["losses"][every:]) for run in found]
    np.testing.assert_allclose(group["curves"]["loss"]["mean"][0], np.mean(firsts), rtol=1e-3)
    np.testing.assert_allclose(group["curves"]["loss"]["std"][0], np.std(firsts), rtol=1e-3)
    np.testing.assert_allclose(group["loss_at_start"], firsts, rtol=1e-3)
    np.testing.assert_allclose(group["loss"], lasts, rtol=1e-3)
    seconds = [sum(run["ms"]) / 1e3 for run in found]
    np.testing.assert_allclose(group["seconds"], seconds, rtol=1e-3)
    np.testing.assert_allclose(group["curves"]["seconds"]["mean"][-1], np.mean(seconds), rtol=1e-3)
    assert group["validation"] == [float(f"{run['validation']['loss'][-1]:.4g}") for run in found]
    assert group["runs"] == 2 and group["failures"] == []
    assert made["groups"][0]["pictures"].keys() == {"plane"} and group["parity"]["batches"] > 0
    assert made["scale"] == "smoke" and made["command"] == "the command"


def test_curves_are_of_the_runs_that_got_so_far(tmp_path):
    curve = summary._curve([np.array([1.0, 2.0, 6.0]), np.array([3.0])])
    assert curve == {"mean": [2.0, 2.0, 6.0], "std": [1.0, 0.0, 0.0]}


def test_a_failed_run_is_counted_and_leaves_a_gap(tmp_path):
    scale = replace(SCALE, toy={**SCALE.toy, "max_num_steps": 1})
    for setting in [x for entry in FIGURES["7"].entries(scale) for x in entry.settings]:
        trained(setting, tmp_path)
    group = summary.summarise(FIGURES["7"], scale, tmp_path, (OURS,), "")["groups"][0]
    assert group["loss"] == [None, None] and group["ms"] == [None, None]
    assert [x["repeat"] for x in group["failures"]] == [0, 1]
    assert group["failures"][0]["reason"].startswith("MaxStepsExceeded")
    assert group["curves"]["loss"] == {"mean": [], "std": []} and group["parity"] is None


# ---- the whole


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    figures = list(FIGURES.values())
    command.make(figures, SCALE, place(folder), (OURS,), QUIET, "the command")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", FIGURES)
def test_every_figure_is_made(number, everything):
    made = json.loads((everything / f"figure-{number}.json").read_text())
    wanted = list(FIGURES[number].entries(SCALE))
    assert len(made["groups"]) == len(wanted) * (2 if number == "speed" else 1)
    assert all(group["runs"] == len(wanted[0].settings) for group in made["groups"][:1])
    assert made["synthetic"] == (number in ("13", "14", "16"))
    picture = (everything / f"figure-{number}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000


@pytest.mark.slow
def test_a_second_call_trains_nothing(everything, monkeypatch):
    def never(*args):
        raise AssertionError("trained again")

    before = {path: path.read_text() for path in everything.glob("*.json")}
    monkeypatch.setattr(pool, "_do", never)
    command.make(list(FIGURES.values()), SCALE, place(everything), (OURS,), QUIET, "the command")
    assert {path: path.read_text() for path in everything.glob("*.json")} == before
    lines = [json.loads(x) for x in (everything / "commands.jsonl").read_text().splitlines()]
    assert lines[0]["trainings"] > 50 and lines[-1]["trainings"] == 0


def test_what_is_there_is_drawn_when_interrupted(tmp_path, monkeypatch):
    do, count = pool._do, []

    def stop_at_third(*args):
        count.append(args)
        if len(count) == 3:
            raise KeyboardInterrupt
        do(*args)

    monkeypatch.setattr(pool, "_do", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        command.make([FIGURES["7"]], SCALE, place(tmp_path), (OURS,), QUIET)
    made = json.loads((tmp_path / "figure-7.json").read_text())
    assert sum(group["runs"] for group in made["groups"]) == 2
    assert (tmp_path / "figure-7.png").exists()


@pytest.mark.parametrize("count", [1, 0], ids=["in the first training", "before any"])
def test_every_figure_can_be_drawn_however_early_the_end_comes(count, tmp_path, monkeypatch):
    do = pool._do

    def stop(*args):
        nonlocal count
        if not count:
            raise KeyboardInterrupt
        count -= 1
        do(*args)

    monkeypatch.setattr(pool, "_do", stop)
    with pytest.raises(KeyboardInterrupt):
        command.make(list(FIGURES.values()), SCALE, place(tmp_path), (OURS,), QUIET)
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"figure-{x}" for x in FIGURES}
    assert len((tmp_path / "commands.jsonl").read_text().splitlines()) == 1


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SCALES, "smoke", SCALE)
    arguments = ["paper", "7", "--smoke", "--repeats", "1", "--seed", "3", "--processes", "1"]
    main([*arguments, "--out", str(tmp_path), "--solver", "anode_fast,torchdiffeq"])
    made = json.loads((tmp_path / "figure-7.json").read_text())
    assert made["command"] == (
        "python -m benchmarks paper 7 --smoke --solver anode_fast,torchdiffeq --repeats 1 --seed 3"
    )
    assert [group["solver"] for group in made["groups"]] == [OURS, THEIRS] * 2
    assert all(group["setting"]["seed"] == 3 and group["runs"] == 1 for group in made["groups"])
    assert "4 trainings" not in capsys.readouterr().out  # a training with both is one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2"], "no figure '2'"),
        (["--solver", "euler"], "want anode_fast, torchdiffeq, or both"),
        (["--smoke", "--full"], "not allowed with"),
        (["--repeats", "0"], "want at least 1"),
        (["--device", "abacus"], "cannot use 'abacus'"),
    ],
)
def test_a_wrong_command_line_is_answered(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["paper", *arguments])
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot write to --out"):
        command.make([FIGURES["7"]], SCALE, place(tmp_path / "file"), (OURS,), QUIET)


def test_the_same_data_and_weights_in_another_process(tmp_path):
    code = (
        "from tests.test_paper import TINY; from benchmarks.paper import models;"
        "print(TINY.key, next(models.build(TINY, 'anode_fast').parameters()).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    weights = next(models.build(TINY, OURS).parameters()).sum().item()
    assert done.stdout.split() == [TINY.key, str(weights)]
