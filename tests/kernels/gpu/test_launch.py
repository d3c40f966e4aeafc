"""The launch table, its limits, and what `benchmarks.tune` makes of measurements."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from anode_fast.kernels.gpu import launch  # noqa: E402
from anode_fast.kernels.gpu.launch import (  # noqa: E402
    ARCHITECTURES,
    KERNELS,
    MANY_ROWS,
    ONE_STEP_SIZE,
    PRECISIONS,
    TABLE,
    WIDTHS,
    ConvLaunch,
    Launch,
    architecture,
    configuration,
    padded,
    why_not,
)
from anode_fast.kernels.interface import Field  # noqa: E402
from benchmarks import tune  # noqa: E402
from benchmarks.tune import Cost  # noqa: E402

ROOT = Path(__file__).parents[3]
f32, f64 = torch.float32, torch.float64
BATCHES = (0, 1, 16, 17, 33, 64, 65, 4096, MANY_ROWS, 1 << 20)
CAPABILITIES = (0, 80, 86, 89, 90, 100, 103, 120)


def field(dim=7, hidden=32, layers=2):
    return Field(dim, (hidden,) * layers, 1, True)


def launched(kernel, rows, of=None, precision="tf32x3", capability=90):
    of = of or field()
    return configuration(kernel, rows, of, precision, precision == "ieee", capability)


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


# --- the table ------------------------------------------------------------------------------------


def test_there_is_an_entry_for_every_kernel_width_precision_and_architecture():
    general = set(itertools.product(KERNELS, WIDTHS, PRECISIONS))
    assert general <= set(TABLE)
    assert {key[:3] for key in TABLE} == general
    assert {key[3] for key in TABLE if len(key) == 4} <= set(ARCHITECTURES)


@pytest.mark.parametrize("key", TABLE, ids=str)
def test_launches_are_sound(key):
    entry, H = TABLE[key], key[1]
    rows = [x.rows for x in entry]
    assert len(set(entry)) == len(entry)
    assert 16 in rows  # holds for a state of any width, and divides all other tiles
    for x in entry:
        assert is_power_of_two(x.rows) and is_power_of_two(x.warps) and x.warps <= 16
        assert 16 <= x.K <= H and 16 <= x.N <= H  # tensor cores take no less
        assert H % x.N == 0 and H % x.K == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_configurations(kernel, capability):
    for H, precision, dim, rows in itertools.product(
        (1, 16, 20, 50, 100, 128), PRECISIONS, (1, 17, 33, 64), BATCHES
    ):
        F, found = launched(kernel, rows, field(dim, H), precision, capability)
        assert (F.dim, F.hidden, F.layers, F.activation, F.time) == (dim, H, 2, 1, 1)
        assert (F.D, F.H, F.N, F.K) == (padded(dim), padded(H), found.N, found.K)
        assert F.precision == precision
        assert found.rows >= 16 and found.rows * F.D <= 1024
        # A tile of a solve is a whole number of its gradient's tiles: solve.py takes the smaller.
        gradient = launched("gradient", rows, field(dim, H), precision, capability)[1]
        assert found.rows % min(gradient.rows, found.rows) == 0


def test_the_same_arguments_give_the_same():
    arguments = ("adaptive", 40, field(), "tf32", False, 90)
    first = configuration(*arguments)
    configuration.cache_clear()
    assert configuration(*arguments) == first


@pytest.mark.parametrize("kernel", ONE_STEP_SIZE)
@pytest.mark.parametrize("hidden", (16, 32))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_one_program_holds_a_small_batch_with_one_step_size(kernel, hidden, capability):
    most = {"adaptive": 64, "continuous": 32}[kernel]
    for rows in range(1, most + 1):
        found = launched(kernel, rows, field(hidden=hidden), capability=capability)[1]
        assert rows <= found.rows < max(2 * rows, 17)


@pytest.mark.parametrize("kernel", [x for x in KERNELS if x not in ONE_STEP_SIZE])
def test_other_small_batches_take_small_tiles_on_many_multiprocessors(kernel):
    for rows in (1, 64, 1000, MANY_ROWS - 1):
        assert launched(kernel, rows)[1].rows == 16


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_large_batch_takes_the_last_launch(kernel):
    assert launched(kernel, MANY_ROWS)[1] == TABLE[kernel, 32, "tf32x3"][-1]


def test_the_interpreter_gets_few_programs():
    for kernel in KERNELS:
        entry = TABLE.get((kernel, 32, "tf32x3", 80)) or TABLE[kernel, 32, "tf32x3"]
        most = max(x.rows for x in entry)
        assert launched(kernel, most, capability=0)[1].rows == most


def test_an_architectures_own_entry_goes_first(monkeypatch):
    own = (Launch(16, 2, 32, 32),)
    monkeypatch.setitem(TABLE, ("fixed", 32, "tf32x3", 100), own)
    configuration.cache_clear()
    assert launched("fixed", 5, capability=100)[1] == own[0]
    assert launched("fixed", 5, capability=120)[1] != own[0]
    configuration.cache_clear()


def test_architectures():
    found = [architecture(x) for x in CAPABILITIES]
    assert found == [80, 80, 80, 80, 90, 100, 100, 80]


@pytest.mark.parametrize("warps", (1, 2, 4, 8, 16))
def test_a_program_has_the_registers_it_may_take(warps):
    options = Launch(16, warps, 16, 16).options
    assert options["num_warps"] == warps
    assert options["maxnreg"] <= 255 and options["maxnreg"] * 32 * warps <= 65536


@pytest.mark.parametrize(
    "options", [Launch(64, 4, 16, 16).options, ConvLaunch(64, 4, 9, 1).options]
)
def test_matrix_instructions_are_those_that_all_gpus_have(options):
    assert options["arch"] == "sm80"


# --- limits ---------------------------------------------------------------------------------------

REFUSED = {
    "the state is torch.float16, the GPU kernels take float32 and float64": (
        field(),
        torch.float16,
    ),
    "the field has 5 hidden layers, the GPU kernels take 1 to 4": (field(layers=5), f32),
    "the field has 0 hidden layers, the GPU kernels take 1 to 4": (field(layers=0), f32),
    "the field has hidden layers of widths 20, 30, the GPU kernels take equal ones": (
        Field(7, (20, 30), 1, True),
        f32,
    ),
    "the field has hidden layers of width 200, the GPU kernels take 128 at most": (
        field(hidden=200),
        f32,
    ),
    "the state has width 65, the GPU kernels take 64 at most": (field(65), f64),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_not(reason):
    assert why_not(*REFUSED[reason]) == reason


def test_why_not_on_an_old_card():
    reason = "the GPU has compute capability 7.5, the kernels need 8.0"
    assert why_not(field(), f32, 75) == reason


@pytest.mark.parametrize("dtype", (f32, f64))
@pytest.mark.parametrize("layers", (1, 4))
@pytest.mark.parametrize("hidden", (1, 128))
@pytest.mark.parametrize("dim", (1, 64))
def test_nothing_against_what_the_table_covers(dim, hidden, layers, dtype):
    assert why_not(field(dim, hidden, layers), dtype) == ""


@pytest.mark.parametrize(
    "dtype, allowed, expected",
    [(f64, "high", "ieee"), (f32, "highest", "tf32x3"), (f32, "high", "tf32")],
)
def test_precision(dtype, allowed, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(allowed)
        assert launch.precision(dtype) == expected
    finally:
        torch.set_float32_matmul_precision(before)


# --- tuning ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to tune on")
def test_tuning_needs_a_card():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and not done.stdout


SMALL, WIDE, MIDDLE, BIG = (
    Launch(16, 4, 32, 16),
    Launch(16, 8, 32, 16),
    Launch(32, 4, 32, 32),
    Launch(64, 4, 32, 32),
)


def test_the_fastest_for_each_tile_and_last_the_fastest_for_many_rows():
    costs = {
        SMALL: Cost(one=10, many=5),
        WIDE: Cost(one=9, many=9),
        BIG: Cost(one=30, many=4),
        MIDDLE: Cost(one=20, many=3),
    }
    assert tune.entry("adaptive", costs) == (WIDE, BIG, MIDDLE)
    assert tune.entry("by_row", costs) == (WIDE, MIDDLE)


def test_one_launch_for_a_number_of_rows():
    costs = {SMALL: Cost(one=20, many=3), WIDE: Cost(one=10, many=4)}
    assert tune.entry("by_row", costs) == (WIDE,)
    costs[SMALL] = Cost(one=10.5, many=3)
    assert tune.entry("by_row", costs) == (SMALL,)


@pytest.mark.parametrize("is_quick", (True, False))
def test_candidates_fit(is_quick):
    for kind, H, _ in tune.keys(is_quick):
        found = list(tune.candidates(kind, H, is_quick))
        assert len(found) == len(set(found))
        assert any(x.rows == 16 for x in found)
        assert all(H % x.N == 0 and x.K <= x.N and x.N >= 16 for x in found)


def test_a_printed_table_is_the_tables_source():
    table = {("adaptive", 32, "tf32"): (SMALL, BIG), ("fixed", 16, "ieee"): (SMALL,)}
    source = tune.printed(table, 90, "timed on a card, torch 2, Triton 3")
    assert source.startswith("    # timed on a card, torch 2, Triton 3\n")
    found = eval("{" + source + "}", {"_entry": launch._entry})
    assert found == {(*key, 90): entry for key, entry in table.items()}
