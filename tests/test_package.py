"""What the package promises as a package: names, versions, imports, exceptions, documents."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anode_fast
from anode_fast import errors

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "anode_fast").rglob("*.py"))

PUBLIC = {
    "AugODEBlock",
    "ConvField",
    "ConvODENet",
    "MLPField",
    "MaxStepsExceeded",
    "NonFiniteState",
    "ODENet",
    "SharedNorm",
    "SolveStats",
    "SolverError",
    "Status",
    "StepSizeUnderflow",
    "explain",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "show_config",
}


def found_in(file, pattern):
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert match, f"{file} has no match for {pattern}"
    return match[1]


def test_public_names_are_pinned():
    assert set(anode_fast.__all__) == PUBLIC
    assert len(anode_fast.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(anode_fast, name).__doc__, f"{name} has no docstring"


def test_version_is_the_changelogs_newest():
    assert anode_fast.__version__ == found_in("CHANGELOG.md", r"^## \[?(\d[\w.]*)")


def test_readme_names_the_python_that_is_required():
    required = found_in("pyproject.toml", r'^requires-python = ">=([\d.]+)"')
    assert found_in("README.md", r"Python (?:>= )?([\d.]+\d)") == required


def test_readme_names_the_torch_that_is_required():
    required = found_in("pyproject.toml", r'"torch>=([\d.]+)"')
    assert found_in("README.md", r"torch (?:>= )?([\d.]+\d)") == required


def test_readme_examples_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / file).read_text())
    dead = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not dead, f"{file} links to files that do not exist: {dead}"


IMPORT_ALONE = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
import anode_fast
import anode_fast.kernels.cpu.library, anode_fast.kernels.gpu

assert "triton" not in sys.modules
unwanted = {"scipy", "torchvision", "matplotlib", "torchdiffeq"} & set(sys.modules)
assert not unwanted, f"import anode_fast also imports {unwanted}"
"""


def test_import_needs_no_triton_gpu_compiler_or_scipy(tmp_path):
    bare = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE],
        cwd=tmp_path,  # not the checkout: the installed package is what counts
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | bare,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


NOT_BUILT = {
    "no compiler": ({"CXX": "/nonexistent"}, "no C++ compiler: /nonexistent not found"),
    "an unfit compiler": ({"CXX": "false"}, "libanode_baseline.so does not compile"),
    "not wanted": ({"ANODE_FAST_NO_CPU_KERNELS": "1"}, "ANODE_FAST_NO_CPU_KERNELS=1 was set"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="names of files as on Linux")
@pytest.mark.parametrize("case", NOT_BUILT)
def test_it_builds_without_the_cpu_kernels_and_says_so(case, tmp_path):
    changes, reason = NOT_BUILT[case]
    # Nothing is written into the checkout.
    build = f"setup.py egg_info --egg-base {tmp_path} build --build-base {tmp_path}"
    build += f" --build-lib {tmp_path / 'lib'}"
    done = subprocess.run(
        [sys.executable, *build.split()],
        cwd=ROOT,
        env=os.environ | changes,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"anode_fast: {reason}" in done.stdout
    built = tmp_path / "lib" / "anode_fast" / "kernels" / "cpu"
    assert (built / "library.py").exists()
    assert not list(built.glob("*.so"))
    look = "from anode_fast.kernels.cpu import library as a; print(a.load(), a.path(), a.missing())"
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith(f"None  {reason}"), done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_statements(path):
    """An assert is gone under `python -O`; what a user can cause is an exception of errors.py."""
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
    assert not lines, f"{path.name} has assert statements in lines {lines}"


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        ("InvalidArgument", {ValueError, AssertionError}),
        ("InvalidType", {TypeError, AssertionError}),
        ("SolverError", {RuntimeError, AssertionError}),
        ("StepSizeUnderflow", {errors.SolverError}),
        ("MaxStepsExceeded", {errors.SolverError}),
        ("NonFiniteState", {errors.SolverError}),
        ("EventNotFound", {errors.SolverError}),
        ("NonDeterministicField", {errors.SolverError}),
        ("NonlinearSolveFailed", {errors.SolverError}),
    ],
)
def test_bases_of_the_exceptions(error, bases):
    assert set(getattr(errors, error).__bases__) == bases


def test_every_exception_is_pinned_above():
    marks = test_bases_of_the_exceptions.pytestmark
    pinned = {error for mark in marks for error, _ in mark.args[1]}
    assert pinned == {name for name, value in vars(errors).items() if isinstance(value, type)}
