"""Benchmarks of convolutional fields, as far as they can be told right in a few seconds."""

import dataclasses
import gzip
import json
import struct
from itertools import islice

import pytest
import torch
import torchdiffeq
from rich.console import Console

from anode_fast import AugODEBlock, ConvField, ConvODENet
from benchmarks import image_data, images, roofline_conv
from benchmarks.__main__ import main
from benchmarks.baselines import ConcatenatingConvField, with_torchdiffeq
from benchmarks.gpu import images as gpu_images
from benchmarks.gpu.bounds import Peak
from benchmarks.image_data import Images
from benchmarks.roofline_conv import MODELS, chain, fused, needed_flops
from benchmarks.speed import tables
from benchmarks.speed.conv_rivals import (
    ConvCase,
    TrainingStep,
    training_steps,
    with_cheap_field,
    with_compiled_field,
    with_paper_field,
)
from benchmarks.speed.rivals import AtPrecision, with_anode_fast
from benchmarks.train import Run
from tests.helpers import assert_no_worse

TINY = ConvCase(batch=3, width=4, augmented=2, size=6)
EAGER = {"backend": "eager"}  # of torch.compile, which then compiles nothing


# ---- the paper's field


@pytest.mark.parametrize("channels", [1, 3])
def test_the_papers_form_of_the_field_is_the_same_function(channels):
    field = ConvField(channels, 5)
    t, y = torch.tensor(0.7), torch.randn(2, channels, 5, 4)
    exact = ConvField(channels, 5).double()
    exact.load_state_dict(field.state_dict())
    theirs = ConcatenatingConvField(field)
    assert list(theirs.state_dict()) == list(field.state_dict())
    assert_no_worse(theirs(t, y), field(t, y), exact(t.double(), y.double()), "f")
    assert theirs.nfe == field.nfe == 1


@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"time_dependent": False}])
def test_the_papers_form_is_of_relu_and_time(options):
    with pytest.raises(ValueError, match="want relu and time"):
        ConcatenatingConvField(ConvField(2, 3, **options))


def test_a_twin_for_torchdiffeq_has_the_same_weights_and_outputs():
    net = ConvODENet((1, 6, 5), 4, augment_dim=2, rtol=1e-3, atol=1e-3).double()
    twin = with_torchdiffeq(net, rewrite=ConcatenatingConvField)
    assert list(twin.state_dict()) == list(net.state_dict())
    x = torch.randn(2, 1, 6, 5, dtype=torch.float64)
    assert torch.allclose(twin(x), net(x), rtol=1e-9)
    assert twin.block.stats.nfe == net.block.stats.nfe > 2
    assert isinstance(net.block, AugODEBlock)


# ---- rivals


@pytest.mark.filterwarnings("default")  # torch.compile takes an error for a failure of its own
@pytest.mark.parametrize("gradient", [False, True])
def test_rivals_do_the_same_work(gradient):
    case = dataclasses.replace(TINY, gradient=gradient)
    with torch.set_grad_enabled(gradient):
        ours = with_anode_fast(case).observe()
        rivals = [
            with_paper_field(torchdiffeq.odeint, case),
            with_cheap_field(torchdiffeq.odeint, case),
            with_compiled_field(case, **EAGER),
            AtPrecision(with_paper_field(torchdiffeq.odeint, case), "highest"),
        ]
        for rival in rivals:
            found = rival.observe()
            assert found.agrees_with(ours) and found.nfe == ours.nfe == 20
            assert len(found.gradients) == (6 if gradient else 0)
            assert 0 < case.error(found.y1) < 1e-2
        if gradient:
            adjoint = with_paper_field(torchdiffeq.odeint_adjoint, case).observe()
            assert adjoint.agrees_with(ours) and adjoint.nfe_backward > 20
    assert str(case).startswith("batch 3, 1+2 x 6 x 6, 4 filters, forward")


def test_a_field_that_does_not_compile_is_told_in_the_table():
    why = with_compiled_field(TINY, backend="no such backend")
    assert why.startswith("does not compile: ")
    figure = {"ms": 2.0, "nfe": 20, "nfe_backward": 0}
    info = {
        "case": "one",
        "ours": "us",
        "theirs": "them",
        "targets": {"them": 2, "compiled": 2},
        "rivals": {"us": figure, "them": {**figure, "ms": 3.0}, "compiled": why},
    }
    row = tables.comparison("title", [info]).rows[0]
    assert why in row and "1.50 (2: not reached)" in row and row[-2] == tables.NOTHING
    assert len(tables.details("title", [info]).rows) == 2


@pytest.mark.filterwarnings("default")
def test_training_steps_do_the_same_work_over_and_over():
    steps = training_steps(TINY, compiling=EAGER)
    assert list(steps) == ["anode_fast", "torchdiffeq", "compiled field"]
    first = steps["anode_fast"].observe()
    assert len(first.gradients) == 8 and all(x.abs().max() > 0 for x in first.gradients)
    for step in steps.values():
        assert isinstance(step, TrainingStep)
        step()
        again = step.observe()
        assert again.agrees_with(first) and again.nfe == first.nfe


# ---- roofline


def test_flops_of_the_convolutions():
    case = ConvCase(batch=2, width=5, data_channels=1, augmented=2, size=4)
    multiply_adds = 4 * 5 + 9 * 6 * 5 + 6 * 3  # time's channel is one more of the inputs
    assert needed_flops(case) == 2 * 2 * 16 * multiply_adds


def test_what_the_gpu_kernels_execute():
    case = ConvCase(batch=2, width=20, data_channels=3, augmented=0, size=4)
    D, N = 8, 32
    first, second = 9 * D * N, 9 * N * N + 16 * N
    forward, both = (fused(case, vjp=x) for x in (False, True))
    assert forward.flops == 2 * 32 * (first + second + N * D)
    outer = first + second + 2 * N * D
    inner, weights = 9 * N * N + 3 * N * D, first + 9 * N * N + 3 * 16 * N
    assert both.flops == forward.flops + 2 * 32 * (outer + inner + weights)
    assert (forward.wide, both.wide) == (2 * 32 * 9 * N * N, 4 * 2 * 32 * 9 * N * N)
    assert forward.bytes == 4 * 32 * 2 * D
    peak = Peak(1.0, 0.0, 0.0, 1e9, "made up")
    assert forward.seconds("high", peak) == forward.wide / 2 + forward.narrow
    assert forward.seconds("highest", peak) == 3 * forward.seconds("high", peak)
    slow = dataclasses.replace(peak, tf32=1e15, memory=1.0)
    assert forward.seconds("high", slow) == forward.bytes


def test_padding_is_that_of_the_gpu_kernels():
    pytest.importorskip("triton")
    from anode_fast.kernels.gpu import launch
    from anode_fast.kernels.interface import ConvField as Plain

    for case in (*MODELS.values(), TINY):
        field = Plain(case.channels, case.width, 0, True)
        F, _ = launch.conv_configuration("forward", field, case.size, case.size, "tf32", 0)
        one = fused(dataclasses.replace(case, batch=1), vjp=False)
        assert one.wide == 2 * case.size**2 * 9 * F.N * F.N
        assert one.bytes == 4 * case.size**2 * 2 * F.D


def test_operations_of_an_evaluation_by_hand():
    case = ConvCase(batch=2, width=3, data_channels=1, augmented=1, size=2)
    pixels, C, K = 8, 2, 3
    found = chain(case, vjp=False)
    per_pixel = 3 * (1 + 2)  # the images of time: ones, times t
    per_pixel += 2 * (C + 1) + 2 * (K + 1) * 2  # concatenated: read and written
    per_pixel += (C + 1 + K) + (K + 1 + K) + (K + 1 + C)  # convolutions
    per_pixel += 2 * K + 2 * K + 2 * C  # biases
    per_pixel += 2 * K + 2 * K  # relu
    weights = (C + 1) * K + 9 * (K + 1) * K + (K + 1) * C + K + K + C
    times = 3  # t itself
    assert found.bytes == 4 * (pixels * per_pixel + weights + times)
    assert found.operations == 17
    assert found.names == {
        **dict.fromkeys(("ones_like", "mul", "cat", "convolution", "add_bias"), 3),
        "relu": 2,
    }
    backward = chain(case, vjp=True)
    assert backward.operations == 17 + 3 * 3 + 2  # of input, weight and bias; and of relu


@pytest.mark.parametrize(
    ("model", "needed", "executed", "both", "megabytes"),
    [
        ("MNIST NODE", 31.0, 64.1, None, 1201),
        ("MNIST ANODE", 15.4, 17.3, 68, 866),
        ("CIFAR10 NODE", 74.8, 83.8, None, 2135),
        ("CIFAR10 ANODE", 20.5, 25.2, 98, 1175),
    ],
)
def test_counts_of_the_papers_models(model, needed, executed, both, megabytes):
    case = dataclasses.replace(MODELS[model], batch=256)
    assert needed_flops(case) / 1e9 == pytest.approx(needed, abs=0.05)
    assert fused(case, vjp=False).flops / 1e9 == pytest.approx(executed, abs=0.05)
    assert both is None or fused(case, vjp=True).flops / 1e9 == pytest.approx(both, abs=0.5)
    unfused = chain(case, vjp=False)
    assert (unfused.operations, round(unfused.bytes / 1e6)) == (17, megabytes)
    # Counted by hand with the 4 operations of a sum's gradient: 32 and 1746.
    if model == "MNIST ANODE":
        unfused = chain(case, vjp=True)
        assert (unfused.operations, round(unfused.bytes / 1e6)) == (28, 1717)


def test_roofline_prints_bounds_and_what_is_measured_here(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(roofline_conv, "peak_flops", lambda dtype, seconds: 1e12)
    results = roofline_conv.run(0.0, Console(width=140), {"a model": TINY})
    text = capsys.readouterr().out
    assert "Bounds, not measurements" in text and "nothing was measured on one" in text
    assert "peak is 1000 GFLOP/s" in text
    assert [(x.gradient, x.solver.split(" (")[0]) for x in results] == [
        (gradient, solver)
        for gradient in (False, True)
        for solver in (
            "torchdiffeq, the paper's field",
            "torchdiffeq, a cheap field",
            "anode_fast",
        )
    ]
    case = dataclasses.replace(TINY, batch=roofline_conv.CPU_BATCH)
    for one in results:
        flops = needed_flops(case) * (3 if one.gradient else 1)
        assert one.share == pytest.approx(flops / one.seconds / 1e12)


def test_roofline_has_an_option_for_it(monkeypatch):
    called = []
    monkeypatch.setattr(roofline_conv, "run", lambda seconds, console: called.append(seconds))
    main(["roofline", "--conv", "--seconds", "0.25"])
    assert called == [0.25]


# ---- images


def idx(array):
    """An array of bytes as an idx file."""
    shape = struct.pack(f">{array.dim()}I", *array.shape)
    return bytes([0, 0, 8, array.dim()]) + shape + bytes(array.flatten().tolist())


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (12, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("layout", image_data.LAYOUTS)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_images_are_read_where_they_stand(layout, ending, pixels, tmp_path):
    labels = torch.arange(12, dtype=torch.uint8) % 10
    folder = tmp_path / layout
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(image_data.FILES, (pixels, labels), strict=True):
        raw = idx(array)
        (folder / (name + ending)).write_bytes(gzip.compress(raw) if ending else raw)
    found = image_data.load([tmp_path / "nothing", tmp_path], 8)
    x, y = found.data.tensors
    assert (found.name, found.note, found.size) == (image_data.FASHION, "", 8)
    assert torch.equal(x.squeeze(1), pixels.float() / 255) and x.dtype == torch.float32
    assert torch.equal(y, labels.long())
    small = image_data.load([tmp_path], 4).data.tensors[0]
    assert torch.allclose(small[0, 0, 0, 1], pixels[0, :2, 2:4].float().mean() / 255)


def test_torchvision_reads_the_same(pixels, tmp_path):
    mnist = pytest.importorskip("torchvision.datasets.mnist")
    path = tmp_path / "images"
    path.write_bytes(idx(pixels))
    assert torch.equal(mnist.read_image_file(str(path)), image_data.read_idx(path))


@pytest.mark.parametrize(
    "raw", [b"", b"PK\x03\x04", idx(torch.zeros(2, 3, dtype=torch.uint8))[:-1]]
)
def test_what_is_no_idx_file(raw, tmp_path):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match="x is no idx file"):
        image_data.read_idx(tmp_path / "x")


@pytest.fixture
def digits():
    """A few of them, at 4x4."""
    found = image_data.load([], 4)
    assert found.name == image_data.DIGITS and "these are the digits" in found.note
    x, y = found.data.tensors
    assert x.shape == (1797, 1, 4, 4) and 0 <= x.min() < x.max() <= 1
    return Images("some digits", torch.utils.data.TensorDataset(x[:60], y[:60]))


SMALL = images.Config(augment=1, filters=4, size=4, batch=16, iterations=20, threads=1)


@pytest.mark.parametrize("augment", [0, 2])
def test_both_train_the_same(augment, digits, tmp_path, capsys):
    config = dataclasses.replace(SMALL, augment=augment, dtype="float64")
    runs = images.run(config, digits, tmp_path, Console(width=120))
    ours, theirs = (runs[name] for name in images.SOLVERS)
    assert len(ours.losses) == len(theirs.losses) == 20
    assert images.loss_difference(runs, 1) < 1e-14  # of float64
    # torchdiffeq's gradient flows through the step sizes too: noise, within the solver's tolerance.
    assert images.loss_difference(runs) < config.tolerance / 10 < ours.losses[0] - ours.losses[-1]
    assert ours.nfe == theirs.nfe and theirs.backend == "torchdiffeq"
    text = capsys.readouterr().out
    assert "Over the first 20 iterations the two loss curves differ by at most" in text
    assert "some digits, 4x4" in text and "times as long by the medians" in text
    header, *rows = map(json.loads, (tmp_path / "images.jsonl").read_text().splitlines())
    assert header["data"] == "some digits" and header["augment"] == augment
    assert [(x["solver"], x["iteration"]) for x in rows] == [
        (name, i + 1) for i in range(20) for name in images.SOLVERS
    ]
    assert [x["loss"] for x in rows[::2]] == ours.losses


def test_an_interrupted_run_goes_on(digits, tmp_path, monkeypatch):
    whole = images.run(SMALL, digits, tmp_path / "whole", Console(quiet=True))
    record, places = Run._record, tmp_path / "parts"

    def interrupted(self, *args):
        record(self, *args)
        if len(self.losses) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images.run(SMALL, digits, places, Console(quiet=True))
    monkeypatch.setattr(Run, "_record", record)
    # As if more lines were written than weights kept.
    with (places / "images.jsonl").open("a") as file:
        file.write('{"solver": "anode_fast", "iteration": 11}\n')
    kept = images.Race(SMALL, digits, places)
    assert kept.done == 10 and len((places / "images.jsonl").read_text().splitlines()) == 21
    parts = images.run(SMALL, digits, places, Console(quiet=True))
    for name in images.SOLVERS:
        assert parts[name].losses == whole[name].losses
    lines = [(x / "images.jsonl").read_text().splitlines() for x in (places, tmp_path / "whole")]
    strip = [[{**json.loads(x), "seconds": 0} for x in found] for found in lines]
    assert strip[0] == strip[1]
    done = images.run(SMALL, digits, places, Console(quiet=True))  # nothing is left to do
    assert done["anode_fast"].seconds == parts["anode_fast"].seconds
    other = dataclasses.replace(SMALL, filters=5)
    with pytest.raises(SystemExit, match="of another run"):
        images.Race(other, digits, places)
    assert images.Race(other, digits, places, anew=True).done == 0


def test_a_solve_that_fails_ends_one_side_only(digits, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(SMALL, iterations=3)
    train = Run.train

    def breaks(self, net, order, *args):
        theirs = type(net.block).__name__ == "TorchdiffeqBlock"
        if theirs and not isinstance(order, list):
            yield from islice(train(self, net, order, *args), 1)
            self.failure = "AssertionError: underflow in dt 0.0"
            return
        yield from train(self, net, order, *args)

    monkeypatch.setattr(Run, "train", breaks)
    runs = images.run(config, digits, tmp_path, Console(width=120))
    assert [len(runs[name].losses) for name in images.SOLVERS] == [3, 1]
    text = capsys.readouterr().out
    assert "torchdiffeq ended early: AssertionError: underflow" in text
    again = images.Race(config, digits, tmp_path)
    assert again.runs["torchdiffeq"].failure and len(again.runs["anode_fast"].losses) == 3


def test_the_command_takes_the_digits_and_draws(tmp_path, capsys):
    options = "--iterations 1 --filters 2 --size 4 --batch 8 --threads 1 --augment 0".split()
    plot, out = tmp_path / "loss.png", tmp_path / "out"
    places = ["--data", str(tmp_path), "--out", str(out), "--plot", str(plot)]
    main(["images", *options, *places])
    text = capsys.readouterr().out
    assert "Fashion-MNIST is not in" in text and "digits (scikit-learn, 8x8), 4x4" in text
    assert plot.stat().st_size > 1000 and (out / "images.jsonl").exists()


# ---- on a card


def conv_row(kind, precision="high", **ms):
    names = {"ours": "anode_fast", "eager": "torchdiffeq", "compiled": "compiled field"}
    solvers = {
        names[key]: {"wall_ms": value, "nfe": 20, "nfe_backward": 19, "error": 1e-3}
        for key, value in ms.items()
    }
    solvers["cheap field"] = {"note": "does not compile: Why"}
    row = {"kind": kind, "model": "MNIST ANODE", "gradient": True, "precision": precision}
    return {**row, "verdict": "passed", "note": "", "solvers": solvers}


def test_goals_and_tables_of_a_card():
    share = {"solver": "torchdiffeq, the paper's field", "seconds": 1e-3, "share": 0.25}
    rows = [
        conv_row(gpu_images.STEP, ours=10.0, eager=45.0, compiled=15.0),
        conv_row(gpu_images.STEP, "highest", ours=10.0, eager=45.0),
        conv_row(gpu_images.SOLVE, ours=8.0, eager=24.0),
        {**conv_row(gpu_images.SHARE), "solvers": {}, "peak": 4e14, "shares": [share]},
        {**conv_row(gpu_images.STEP), "solvers": {}, "verdict": "failed", "note": "why"},
    ]
    assert [line[1:] for line in gpu_images.goals(rows)] == [
        (">= 4", "4.50", True),
        (">= 2", "1.50", False),
    ]
    text = gpu_images.markdown(rows)
    assert "| MNIST ANODE, training step, compiled field's time to ours | >= 2 | 1.50 | not" in text
    assert "| MNIST ANODE, solve + gradient, high | anode_fast | 20 + 19 | 8.000 | - | 3.00" in text
    assert "cheap field | does not compile: Why |" in text
    assert "| torchdiffeq, the paper's field | 1.000 | 25.0% | 400 |" in text
    assert "- MNIST ANODE, training step, high: failed: why" in text


def test_the_goals_come_first_on_a_card():
    (warm, _), (cases, workers) = gpu_images.plan()
    assert workers == 1 and cases[0][0]["kind"] == gpu_images.STEP
    assert [{**x, "warm": True} for x in cases[0] if x["kind"] != gpu_images.SHARE] == [
        asked for group in warm for asked in group
    ]
    assert {x["model"] for x in cases[0]} <= set(MODELS)
