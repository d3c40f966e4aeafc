"""`bash benchmarks/gpu_session.sh`: as far as it goes without a card."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from anode_fast.spec import MLPSpec
from benchmarks import machine, roofline
from benchmarks.gpu import (
    bounds,
    build,
    compare,
    parity,
    pool,
    pytest_log,
    report,
    sanitizer,
    session,
    suite,
    timings,
)
from tests.helpers import assert_no_worse

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"
TORCH = importlib.metadata.version("torch")
NAMES = ["build", "tests", "parity", "sanitizer", "timings", "images", "profile"]


def read(path):
    """JSON, without the nan and Infinity that Python's reader lets pass."""

    def refuse(name):
        raise ValueError(f"{name} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- all of it


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run: the process, and its folder."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("dry")
    # With a path that has Python, bash and git, and no tool of NVIDIA's.
    env = os.environ | {report.DRY_RUN: "1", "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(out)], env=env, capture_output=True, text=True, timeout=580
    )
    return done, out


@pytest.mark.slow
def test_a_dry_run_runs_every_step(dry):
    done, out = dry
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read(out / "summary.json")
    assert summary["dry_run"] and summary["machine"]["versions"]["torch"] == TORCH
    assert [step["step"] for step in summary["steps"]] == NAMES == [x.name for x in session.STEPS]
    verdicts = {step["step"]: step["verdict"] for step in summary["steps"]}
    assert verdicts == dict.fromkeys(NAMES, "passed") | {"sanitizer": "skipped"}
    for name in NAMES:
        found = read(out / f"{name}.json")
        assert found["verdict"] == verdicts[name] and found["dry_run"]
        assert name == "sanitizer" or found["rows"]
        assert (out / f"{name}.log").exists() and name in done.stdout
    assert not (ROOT / "anode_fast" / "kernels").exists()


@pytest.mark.slow
def test_a_dry_run_compares_and_measures_nothing(dry):
    _, out = dry
    rows = read(out / "parity.json")["rows"]
    assert {row["verdict"] for row in rows} == {"passed"}
    assert all(0 <= row["value"]["share"] < 1 for row in rows)
    assert {row["precision"] for row in rows} == {"highest", "high", "float64"}
    solvers = next(x for x in read(out / "timings.json")["rows"] if x["kind"] == "race")["solvers"]
    assert solvers["anode_fast, highest"]["nfe"] == solvers["torchdiffeq"]["nfe"] == 14
    assert solvers["anode_fast, highest"]["graph_ms"] is None
    text = (out / "summary.md").read_text()
    assert "no card" in text and text.count("interpreted, not a measurement") == 5
    assert "skipped: compute-sanitizer is not installed" in text
    assert "_Solve" in (out / "profile-3.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "torch finds no CUDA device"), (["", "build", "tset"], "steps: build, tests, parity")],
)
def test_what_it_refuses(arguments, message, tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")}
    env |= {"PYTHON": sys.executable, report.DRY_RUN: ""}
    command = ["bash", str(SCRIPT), *arguments]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


# ---- steps


GOOD = """
import sys
from benchmarks.gpu.report import Report, folder
report = Report("{name}", folder(), lambda rows: f"{{len(rows)}} rows")
report.add({{"x": float("nan")}})
sys.exit(report.finish("{verdict}", "so it is"))
"""
UNFINISHED = GOOD.replace("sys.exit", "import time; time.sleep(60)  #")
CHILD = "import subprocess; subprocess.Popen(['sleep', '60'])\n"


def step(name, code, seconds=30.0):
    return session.Step(name, (sys.executable, "-c", textwrap.dedent(code)), seconds)


STEPS = [
    step("good", CHILD + GOOD.format(name="good", verdict="passed")),
    step("bad", GOOD.format(name="bad", verdict="failed")),
    step("absent", GOOD.format(name="absent", verdict="skipped")),
    step("liar", GOOD.format(name="liar", verdict="passed").replace("sys.exit(", "sys.exit(3 + ")),
    step("dies", "import os; os.abort()"),
    step("last", GOOD.format(name="last", verdict="passed")),
]


def test_a_step_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "STEPS", STEPS)
    monkeypatch.setenv(report.DRY_RUN, "1")
    assert session.main([str(tmp_path)]) == 1
    steps = read(tmp_path / "summary.json")["steps"]
    assert [(x["step"], x["verdict"], x["note"]) for x in steps] == [
        ("good", "passed", "so it is"),
        ("bad", "failed", "so it is"),
        ("absent", "skipped", "so it is"),
        ("liar", "failed", "exit status 3, see liar.log"),
        ("dies", "failed", "exit status -6, see dies.log"),
        ("last", "passed", "so it is"),
    ]
    assert read(tmp_path / "good.json")["rows"] == [{"x": "nan"}]
    assert read(tmp_path / "liar.json")["verdict"] == "failed"
    assert "| bad | failed | so it is |" in (tmp_path / "summary.md").read_text()
    assert capsys.readouterr().out.count("last       passed") == 2
    assert session.main([str(tmp_path), "good", "absent"]) == 0
    assert [x["step"] for x in read(tmp_path / "summary.json")["steps"]] == ["good", "absent"]


def test_a_step_that_takes_too_long_is_ended_with_what_it_found(tmp_path):
    # What the first one leaves of its 20 seconds, less 17.
    steps = [step("good", GOOD.format(name="good", verdict="passed"), 20)]
    steps += [step("slow", UNFINISHED.format(name="slow", verdict="passed"), -17)]
    steps += [step("last", GOOD.format(name="last", verdict="passed"), 30)]
    results = session.run(steps, tmp_path)
    assert [x["verdict"] for x in results] == ["passed", "timed out", "passed"]
    found = read(tmp_path / "slow.json")
    assert found["verdict"] == "timed out" and found["rows"] == [{"x": "nan"}]
    assert 0 < results[1]["seconds"] < 6 and "not done within" in found["note"]


FAKE = """
import os, time

def work(case):
    if case["do"] == "raise":
        raise ValueError("no")
    if case["do"] == "die":
        os.kill(os.getpid(), 9)
    if case["do"] == "hang":
        time.sleep(60)
    print("to the log")
    return {"verdict": "passed"}
"""


def answers(groups, tmp_path, monkeypatch, **settings):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    rows = []
    groups = [[{"do": do} for do in group] for group in groups]
    pool.run("fake:work", groups, lambda case, row: rows.append((case["do"], row)), **settings)
    return [(do, row["verdict"], row.get("note", "")) for do, row in rows]


def test_a_case_that_ends_its_process_ends_no_other(tmp_path, monkeypatch):
    found = answers([["a", "raise", "die", "b"]], tmp_path, monkeypatch, workers=1, seconds=120)
    assert found[:2] == [("a", "passed", ""), ("raise", "failed", "ValueError: no")]
    assert found[2][:2] == ("die", "failed") and "ended with status -9" in found[2][2]
    assert found[3:] == [("b", "passed", "")]


def test_a_case_that_never_ends_is_ended(tmp_path, monkeypatch):
    found = answers([["hang"]], tmp_path, monkeypatch, workers=1, seconds=2)
    assert [x[:2] for x in found] == [("hang", "failed")] and "had to be ended" in found[0][2]


# ---- build


def test_without_pip_it_works_in_place(tmp_path, monkeypatch, capfd):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("anode_fast", "kernels"):
        leave = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    monkeypatch.setattr(build, "PIP", ["-c", "raise SystemExit('no pip here')"])
    monkeypatch.setenv("ANODE_FAST_NO_CPU_KERNELS", "1")
    assert build.install(tmp_path) == "in place"
    assert "no pip here" in capfd.readouterr().out
    note = tmp_path / "kernels" / "cpu" / "build_note.txt"
    assert "ANODE_FAST_NO_CPU_KERNELS" in note.read_text()
    note.unlink()
    assert build._python(tmp_path, "-c", build._COMPILE).returncode == 0  # without setuptools
    assert note.exists()
    build.unlink(tmp_path)
    assert not (tmp_path / "anode_fast" / "kernels").exists() and note.exists()


SMI = """#!/bin/sh
echo "NVIDIA H100 80GB HBM3, 570.1, 81559 MiB, 700.00 W, 30, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz"
"""


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_what_a_machine_is(tmp_path, monkeypatch):
    program(tmp_path / "nvidia-smi", SMI)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (card,) = machine.cards()
    assert (card["name"], card["clocks.max.mem"]) == ("NVIDIA H100 80GB HBM3", "2619 MHz")
    assert machine.versions("torch", "no such package") == {"torch": TORCH}
    assert machine.commit(tmp_path) == "unknown"
    program(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert machine.cards() == []


# ---- tests


TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="why")
def test_skipped(): pass
"""


def run_pytest(tmp_path, text, code="", **env):
    file, events = tmp_path / "test_it.py", tmp_path / "events.jsonl"
    file.write_text(text)
    start = f"{code}\nimport sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-p", "benchmarks.gpu.pytest_log", "-q", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", start, str(file), *options],
        env=os.environ | {pytest_log.PLACE: str(events), "PYTHONPATH": str(ROOT)} | env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = events.read_text().splitlines()
    return suite.summed("it", done.returncode, [json.loads(x) for x in lines]), done


def test_tests_are_counted(tmp_path):
    row, _ = run_pytest(tmp_path, TESTS)
    assert [row[x] for x in ("verdict", "passed", "failed", "skipped")] == ["failed", 1, 1, 1]
    assert [x["test"] for x in row["failures"]] == ["test_it.py::test_bad"]
    assert "1 == 2" in row["failures"][0]["note"]
    assert "- test_it.py::test_bad: " in suite._markdown([row])


def test_a_test_that_ends_pytest_is_named(tmp_path):
    row, _ = run_pytest(tmp_path, "import os\ndef test_dies(): os.abort()")
    (failure,) = row["failures"]
    assert failure["test"].endswith("test_dies") and "status -6" in failure["note"]


def test_what_is_not_installed_fails_nothing(tmp_path):
    row, _ = run_pytest(tmp_path, "import no_such_package")
    assert (row["verdict"], row["lacking"], row["failures"]) == (
        "skipped",
        ["no_such_package"],
        [],
    )
    row, _ = run_pytest(tmp_path, "import anode_fast.no_such_module")
    assert row["verdict"] == "failed"


WITHOUT_HYPOTHESIS = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "hypothesis" else find(name, *a)
import benchmarks.gpu.pytest_log
importlib.util.find_spec = find
"""
DRAWING = """
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

settings.register_profile("x", deadline=None)

@st.composite
def cases(draw): return draw(st.integers(1, 2).filter(bool))

@pytest.mark.parametrize("n", [1, 2])
@settings(max_examples=3)
@given(case=cases(), data=st.data())
def test_draws(n, case, data): pass
def test_other(): pass
"""


def test_without_hypothesis_other_tests_run(tmp_path):
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis has one
    row, done = run_pytest(tmp_path, DRAWING, WITHOUT_HYPOTHESIS, **plain)
    assert [row[x] for x in ("verdict", "passed", "failed", "skipped")] == ["passed", 1, 0, 2], (
        done.stdout
    )


def test_tests_that_there_is_no_time_for_are_named(tmp_path):
    names = ["tests/kernels/gpu/test_jit.py::test_a", "tests/kernels/gpu/test_jit.py::test_b"]
    row = suite.run("tests/test_it.py, 1 of 2", names, tmp_path, end=0.0)
    assert [row[x] for x in ("verdict", "passed", "failed", "not run")] == ["failed", 0, 0, 2]
    assert row["failures"][0]["note"] == f"no time for 2 tests, from {names[0]} on"
    ended = [{"test": names[0], "outcome": "passed"}]
    assert suite.summed("it", None, ended, names)["not run"] == 1
    assert suite.summed("it", None, ended, names[:1])["verdict"] == "passed"


def test_tests_are_dealt_out():
    files = [ROOT / "tests/kernels/gpu" / f"test_{name}.py" for name in ("products", "controller")]
    shares = dict(suite.shares(files))
    assert all(0 < len(names) <= suite.TESTS for names in shares.values())
    found = [name for names in shares.values() for name in names]
    assert len(set(found)) == len(found) > 5 and all("cuda" in name for name in found)


def test_gpu_tests_are_found():
    files = suite.test_files(ROOT / "tests")
    assert ROOT / "tests/kernels/gpu/test_activations.py" == files[0]
    assert ROOT / "tests/test_fields.py" in files and Path(__file__) not in files


# ---- sanitizer


SANITIZER = """#!/bin/sh
while [ "$1" != --log-file ]; do [ "$1" = --tool ] && tool=$2; shift; done
cat > /dev/null
echo '{"verdict": "passed"}'
[ $tool = racecheck ] || { echo "========= ERROR SUMMARY: 0 errors" > "$2"; exit 0; }
cat > "$2" <<END
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at fixed+0x10
=========     and Read access at fixed+0x20
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
END
exit 99
"""


def test_what_the_sanitizer_finds(tmp_path, monkeypatch):
    monkeypatch.setenv(report.DRY_RUN, "1")
    tool = program(tmp_path / "compute-sanitizer", SANITIZER)
    clean, raced = (sanitizer.check(tool, x, tmp_path) for x in ("memcheck", "racecheck"))
    assert (clean["verdict"], clean["cases"]) == ("passed", "1 of 1")
    assert clean["summary"] == "ERROR SUMMARY: 0 errors" and not clean["note"]
    assert (raced["verdict"], raced["status"]) == ("failed", 99)
    assert raced["note"].startswith("Error: Race reported") and "1 error" in raced["summary"]
    assert "| racecheck | failed | RACECHECK" in sanitizer._markdown([clean, raced])


# ---- arithmetic


def test_flops_are_those_of_the_roofline():
    spec = MLPSpec(7, (32, 32))
    assert bounds.evaluation_flops(7, 32) == roofline.field_flops(spec) == 2944
    ours = bounds.solve_flops(10, 32, 14, differentiated=13, nfe_backward=12)
    theirs = roofline.solve_flops(spec, 10, 14, differentiated=13, nfe_backward=12)
    assert ours == theirs.executed == 10 * 2944 * (14 + 12 + 2 * 13)
    assert bounds.differentiated(2) == 13


def test_padding_is_that_of_the_kernels():
    pytest.importorskip("triton")
    from anode_fast.kernels.gpu import launch

    assert all(bounds.padded(n) == launch.padded(n) for n in range(1, 129))


def test_share_of_the_bound():
    peak = bounds.Peak(300e12, 60e12, 30e12, 3e12, "made up")
    assert [peak.rate(x) for x in ("high", "highest", "float64")] == [300e12, 100e12, 30e12]
    assert bounds.Peak(90e12, 60e12, 0, 0, "").rate("highest") == 60e12
    assert bounds.share(3e12, 0.1, 300e12) == pytest.approx(0.1)
    forward, both = bounds.bounds(1000, 32, 14, 2, peak)
    assert forward["high"] == pytest.approx(1000 * 2944 * 14 / 300e12)
    assert both["highest"] == pytest.approx(1000 * 2944 * (14 + 26) / 100e12)
    assert forward["memory"] == pytest.approx(1000 * 21 * 4 / 3e12)


def test_data_sheets_are_without_sparsity():
    for peak in bounds.DATA_SHEETS.values():
        # A tensor core of theirs makes 8 times (sm_80) or 7.4 times the products of the others.
        assert 7 <= peak.tf32 / peak.float32 <= 8 and "data sheet" in peak.source
        assert peak.float64 == pytest.approx(peak.float32 / 2, rel=0.03)


def race_row(batch, gradient, graph_ms, wall_ms=0.2, **more):
    ours = {"wall_ms": wall_ms, "event_ms": 0.1, "graph_ms": graph_ms, "nfe": 14, "error": 1e-3}
    ours |= {"nfe_backward": 12 * gradient, "accepted": 2, "rejected": 0, "launches": 1}
    theirs = {"wall_ms": 12.0, "event_ms": 11.0, "nfe": 14, "nfe_backward": 0, "error": 1e-3}
    solvers = {"anode_fast, highest": ours, "anode_fast, high": ours, "torchdiffeq": theirs}
    solvers["torchode"] = {"note": "not installed"}
    row = {"kind": "race", "batch": batch, "width": 32, "gradient": gradient, "verdict": "passed"}
    return {**row, "solvers": solvers, **more}


def test_goals_and_tables():
    tf32 = 494.5e12
    seconds = 65536 * 2944 * 14 / tf32 / 0.5  # half of the bound
    rows = [
        race_row(64, False, 0.05),
        race_row(64, True, 0.2, wall_ms=0.3),
        race_row(65536, False, 1e3 * seconds),
        {"kind": "peak", "verdict": "passed", "peak": {}},
        {"kind": "warm", "precision": "high", "batch": 64, "verdict": "failed", "note": "why"},
    ]
    sheet = bounds.DATA_SHEETS[bounds.DESIGN_CARD]
    rows[3]["peak"] = {x: getattr(sheet, x) for x in bounds.Peak.__dataclass_fields__}
    assert [(name, value, met) for name, _, value, met in timings.goals(rows)] == [
        ("batch 64, forward, device", "50.0 us", True),
        ("batch 64, forward, wall, torchdiffeq's time to ours", "60.0", True),
        ("batch 64, forward + gradient, device", "200.0 us", False),
        ("batch 64, forward + gradient, wall, torchdiffeq's time to ours", "40.0", False),
        ("batch 65536, forward, share of the tf32 bound", "50.0%", True),
    ]
    text = timings.markdown(rows)
    assert "| batch 64, forward | torchode | not installed | - |" in text
    assert "| batch 65536, forward | high | 494.5 | 50.0% |" in text
    assert "- warm, high, 64: why" in text and "H100 Tensor Core GPU data sheet" in text
    assert timings.goals([race_row(64, False, None)])[0][0].endswith("torchdiffeq's time to ours")


def test_parity_has_the_rule_of_the_tests():
    torch.manual_seed(1)
    exact = {"y": torch.randn(50, dtype=torch.float64)}
    eps = torch.finfo(torch.float32).eps
    verdicts = set()
    for _ in range(40):
        ref = {"y": (exact["y"] * (1 + 20 * eps * torch.randn(()))).float()}
        got = {"y": (exact["y"] * (1 + 100 * eps * torch.randn(()))).float()}
        doubled = [{"y": x["y"].double()} for x in (got, ref)]
        row = compare.compared(doubled[0], doubled[1:], exact, "y", compare.EPS * eps)
        try:
            assert_no_worse(got["y"], ref["y"], exact["y"], "y")
            passed = True
        except AssertionError:
            passed = False
        verdicts.add(passed)
        assert (compare._badness(row) <= 1) == passed
    assert verdicts == {True, False}
    nothing = {"y": torch.full_like(exact["y"], torch.nan)}
    assert compare._badness(compare.compared(nothing, [exact], exact, "y", 1.0)) == float("inf")


def test_parity_covers_every_kernel_width_and_precision():
    cases = [case for group in parity.groups() for case in group]
    assert len(cases) == len(parity.KERNELS) * 3 * 7
    assert all(compare.problem(kernel).rows for kernel in parity.KERNELS)
    failed = {**cases[0], "verdict": "failed", "note": "why"}
    assert "- fixed, highest, width 32: failed: why" in parity._markdown([failed])
