"""kernels/gpu/aot.py: what it compiles, what it makes of the result, and that it does."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from anode_fast.kernels.gpu import aot, by_stage, launch, solve  # noqa: E402
from anode_fast.kernels.gpu.aot import KERNELS, Case, Report  # noqa: E402
from anode_fast.kernels.gpu.launch import ARCHITECTURES, WIDTHS, Launch  # noqa: E402

ROOT = Path(__file__).parents[3]

CUOBJDUMP = """
 Function adaptive:
  REG:167 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:716 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : adaptive
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000e300000000800 */
        /*0010*/               @P0 EXIT ;                             /* 0x000000000000094d */
                                                                      /* 0x001fea0003800000 */
        /*0020*/                   STL.64 [R1], R88 ;                 /* 0x0000005801007387 */
                                                                      /* 0x0003e80000100a00 */
        /*0030*/              @!P1 LDL.64 R122, [R1+0x10] ;           /* 0x00001000017a7983 */
                                                                      /* 0x000ea80000300a00 */
        /*0040*/                   HMMA.1688.F32.TF32 R4, R4, R8, R4 ; /* 0x000000080404723c */
                                                                      /* 0x004fe40000081004 */
        /*0050*/                   HGMMA.64x16x8.F32.TF32 R32, R92, gdesc[UR44], RZ, !UPT ;
                                                                      /* 0x0420002c5c207df0 */
        /*10060*/            @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;         /* 0x0000000104048890 */
"""


def test_a_disassembly_is_understood():
    assert aot.parsed(CUOBJDUMP) == {
        "registers": 167,
        "spill_bytes": 24,
        "spills": 2,
        "matrix": 2,
        "asynchronous": 1,
        "instructions": 7,
        "code_bytes": 112,
    }


@pytest.mark.parametrize("text", ["", CUOBJDUMP.partition("code for")[0]])
def test_no_kernel_in_a_disassembly(text):
    with pytest.raises(RuntimeError, match="shows no kernel"):
        aot.parsed(text)


# --- every kernel and launch ----------------------------------------------------------------------


def test_every_kernel_that_solve_launches_is_there():
    modules = {
        kernel.module.__name__.rpartition(".")[2]: kernel.module for kernel in KERNELS.values()
    }
    named = {
        (modules.get(node.value.id), node.attr)
        for module in (solve, by_stage)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    # Kernels have parameters' names; all else that solve.py takes from these modules is numbers.
    launched = {x for x in named if x[0] and hasattr(getattr(*x), "arg_names")}
    launched.remove((aot.conv, "evaluate"))  # which solvers get
    assert launched == {(kernel.module, kernel.name) for kernel in KERNELS.values()}


def test_every_kind_of_launch_is_there():
    assert {kernel.kind for kernel in KERNELS.values()} == {"", "conv", *launch.KERNELS}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", [Case("", rows=20, precision="tf32"), Case("", 16, "ieee", 9000)])
def test_arguments_are_the_kernels_parameters(name, case):
    rows = min(case.rows, 20) if Case(name).is_conv else case.rows  # images are large
    case = Case(name, case.hidden, case.precision, rows, arch=80)
    noted = aot.noted_launch(case)
    kernel = getattr(KERNELS[name].module, KERNELS[name].name)
    assert noted.kernel is kernel
    options = {"num_warps", "num_stages", "maxnreg", "arch"} & set(noted.arguments)
    assert set(noted.arguments) - options == set(kernel.arg_names)
    if case.is_conv:
        part = "forward" if KERNELS[name].call == "forward" else "gradient"
        F, found = launch.conv_configuration(part, case.field, *aot.IMAGE, case.precision, 80)
        assert noted.arguments.get("F", F) == F
        assert noted.arguments.get("B", found.pixels) == found.pixels
        assert {key: noted.arguments[key] for key in options}.items() <= found.options.items()
    elif KERNELS[name].kind:
        kind, is_double = KERNELS[name].kind, case.precision == "ieee"
        arguments = (kind, case.rows, case.field, case.precision, is_double, 80)
        F, found = launch.configuration(*arguments)
        assert (noted.arguments["F"], noted.arguments["B"]) == (F, found.rows)
        assert {key: noted.arguments[key] for key in options} == found.options


def test_one_program_loops_and_several_do_not():
    loops = [aot.noted_launch(Case("adaptive", rows=rows)).arguments["LOOP"] for rows in (20, 9000)]
    assert loops == [True, False]


def test_a_launch_of_ones_own():
    own = Launch(32, 8, 16, 16)
    for name in ("adaptive", "continuous"):
        arguments = aot.noted_launch(Case(name, launch=own)).arguments
        assert (arguments["B"], arguments["num_warps"], arguments["F"].N) == (32, 8, 16)
    assert aot.noted_launch(Case("adaptive", rows=20)).arguments["F"].N == 32


@pytest.mark.parametrize("is_full", (False, True))
def test_cases_cover_kernels_widths_and_architectures(is_full):
    chosen = aot.cases(is_full)
    assert len(set(chosen)) == len(chosen)
    for arch in ARCHITECTURES:
        of_arch = [case for case in chosen if case.arch == arch]
        assert of_arch == aot.cases(is_full, [arch])
        assert {case.kernel for case in of_arch} == set(KERNELS)
        for precision in launch.PRECISIONS:
            of_precision = [case for case in of_arch if case.precision == precision]
            if is_full or arch == 90:
                assert any(case.is_conv for case in of_precision)
            if is_full or (arch, precision) == (90, "tf32x3"):
                assert {case.hidden for case in of_precision} >= set(WIDTHS)
    assert {case.activation for case in chosen} >= set(range(8) if is_full else (0, 1, 2, 5))
    assert {case.layers for case in chosen} >= {2, 4}
    assert {case.dim for case in chosen} >= {7, 64}
    assert {case.stages for case in chosen} >= {7, 14}


def test_everything_is_every_entry_of_the_table():
    kinds = {name: kernel.kind for name, kernel in KERNELS.items()}
    entries = {}
    for case in aot.cases(True):
        kind = kinds[case.kernel]
        if kind and not case.is_conv and case.hidden in WIDTHS and case.dim == 7:
            is_double = case.precision == "ieee"
            arguments = (kind, case.rows, case.field, case.precision, is_double, case.arch)
            key = (kind, case.hidden, case.precision, case.arch)
            entries.setdefault(key, set()).add(launch.configuration(*arguments)[1])
    for (kind, hidden, precision, arch), found in entries.items():
        general = launch.TABLE[kind, hidden, precision]
        assert found == set(launch.TABLE.get((kind, hidden, precision, arch), general))
    assert len(entries) == len(launch.KERNELS) * len(WIDTHS) * 3 * len(ARCHITECTURES)


# --- budgets --------------------------------------------------------------------------------------

GOOD = Report(Case("adaptive"), rows=64, warps=4, N=32, K=32, registers=255, shared=12288)
BAD = {
    "has 2 matrix instructions of Hopper's or Blackwell's own": dict(asynchronous=2),
    "spills 8 bytes a thread, budget 0": dict(spill_bytes=8, spills=2),
    "takes 256 registers, budget 255": dict(registers=256),
    "takes 232449 bytes of shared memory, budget 232448": dict(shared=232449),
    "takes 15.1 s to compile, budget 15 s": dict(seconds=15.1),
    "does not compile: TypeError: no": dict(failure="TypeError: no"),
}


def changed(report, **values):
    return Report(**{**vars(report), **values})


def test_nothing_is_over_budget():
    assert aot.breaches(GOOD) == []


@pytest.mark.parametrize("what", BAD)
def test_over_budget(what):
    (found,) = aot.breaches(changed(GOOD, **BAD[what]))
    assert found.startswith(what)


def test_smaller_cards_have_less_shared_memory():
    report = changed(GOOD, case=Case("adaptive", arch=89), shared=100 << 10)
    assert "budget 101376" in aot.breaches(report)[0]


@pytest.mark.parametrize(
    "case, most",
    [
        (Case("adaptive"), 0),
        (Case("adaptive", arch=80), aot.MOST_SPILLED),
        (Case("adaptive", precision="ieee"), aot.MOST_SPILLED),
        (Case("adaptive", layers=3), aot.MOST_SPILLED),
        (Case("gradient_fixed"), 0),
        (Case("gradient_fixed", rows=aot.LARGE), aot.MOST_SPILLED_TIMED["gradient"]),
        (Case("gradient_fixed", 64, rows=aot.LARGE), 0),
    ],
    ids=str,
)
def test_what_may_spill(case, most):
    assert aot.breaches(changed(GOOD, case=case, spill_bytes=most)) == []
    assert aot.breaches(changed(GOOD, case=case, spill_bytes=most + 8)) != []


@pytest.mark.parametrize("options, status", [([], 0), (["--check"], 1)])
def test_check_fails_and_says_which_line_and_what_to_do(options, status, monkeypatch, capsys):
    bad = changed(GOOD, spill_bytes=8, spills=2)
    monkeypatch.setattr(aot, "reports", lambda chosen: iter([GOOD, bad]))
    assert aot.main(options) == status
    out, err = capsys.readouterr()
    assert aot.line(GOOD) in out and aot.line(bad) in out
    assert (aot.line(bad) in err) == (aot.line(GOOD) in err) == (status == 1) or status == 1
    if status:
        assert "budget 0: give its entry in launch.py fewer rows" in err
        assert aot.line(GOOD) not in err


def test_a_line_of_the_table_has_all_columns():
    special = changed(GOOD, case=Case("adaptive", dim=64, layers=4), spills=3)
    line = aot.line(special)
    for text in ("adaptive", "dim 64, layers 4", "64x4", "32,32", "255", "0 (3)", "12288"):
        assert text in line
    failed = aot.line(changed(GOOD, failure="CompilationError: at 3:4:\nno such thing"))
    assert failed.endswith("no such thing")


def test_an_unknown_architecture_is_refused(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--arch", "75"])
    assert "[75] not in [80, 90, 100]" in capsys.readouterr().err


# --- the compiler ---------------------------------------------------------------------------------


def test_it_compiles_without_a_card(tmp_path):
    file = tmp_path / "table.json"
    command = [sys.executable, "-m", aot.MODULE, "--check", "--arch", "80", "--json", str(file)]
    command += ["--kernel", "fixed", "reduce"]
    # Even where kernels are the interpreter's: it starts itself again.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(file.read_text())
    found = {row["case"]["kernel"]: row for row in table["rows"]}
    assert set(found) == {"fixed", "reduce"}
    assert found["fixed"]["matrix"] > 0 and found["reduce"]["matrix"] == 0
    for row in table["rows"]:
        assert row["failure"] == "" and row["breaches"] == []
        assert 0 < row["registers"] <= 255 and row["spill_bytes"] == 0
        assert row["instructions"] > 50 and row["seconds"] > 0
    assert f"{len(table['rows'])} compiled, 0 spill" in done.stdout


@pytest.mark.parametrize("arch", [90, 100])
def test_no_kernel_has_matrix_instructions_of_a_warp_group(arch, monkeypatch, tmp_path):
    # A tile of 64 rows and four warps is where Triton prefers those of Hopper and of Blackwell.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case("adaptive", arch=arch, launch=Launch(64, 4, 16, 16), layers=1)
    (report,) = aot.reports([case], processes=1)
    assert report.failure == ""
    assert report.matrix > 0 and report.asynchronous == 0


# --- fields for images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "registers, shared, fits", [(128, 20480, True), (136, 20480, False), (128, 120000, False)]
)
def test_two_programs_of_an_evaluation_fit_on_a_multiprocessor(registers, shared, fits):
    case = Case("conv_stage", 64, "tf32", 256, dim=6)
    report = Report(case, rows=128, warps=8, registers=registers, shared=shared)
    found = aot.breaches(report)
    assert bool(found) != fits
    assert fits or "room for 1 programs on a multiprocessor, budget 2" in found[0]


def test_what_recommended_fields_for_images_may_spill():
    few = aot.MOST_SPILLED_TIMED["conv"]
    for kernel, hidden, budget in (
        ("conv_stage", 64, 0),
        ("conv_outer", 64, few),
        ("conv_outer", 92, aot.MOST_SPILLED),
    ):
        case = Case(kernel, hidden, "tf32", dim=6)
        report = Report(case, registers=64, spill_bytes=budget + 8, warps=4)
        assert f"budget {budget}" in aot.breaches(report)[0]
        assert aot.breaches(changed(report, spill_bytes=budget)) == []
