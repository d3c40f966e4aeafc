"""`explain` and `show_config`: which path a call takes, why, and what cannot be had."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anode_fast import MLPField, explain, odeint, odeint_adjoint, show_config
from anode_fast.kernels import gpu
from anode_fast.kernels.cpu import library
from anode_fast.plan import _NO_GPU, BACKENDS, GRADIENTS, STEP_CONTROLS
from anode_fast.problem import FAMILIES

T = torch.tensor([0.0, 0.5, 1.0])
Y0 = torch.ones(3, 2)
ROOT = Path(__file__).parent.parent


REASON = "it cannot be traced (RuntimeError: explain solves nothing)"


def untouched(t, y):
    raise RuntimeError("explain solves nothing")


@pytest.mark.parametrize("method", FAMILIES)
def test_explain_tells_method_backend_gradient_and_state(method):
    text = explain(untouched, Y0, T, method=method)
    lines = text.splitlines()
    assert lines[0] == f"method: {method} ({FAMILIES[method]} steps)"
    assert "backend: reference" in lines
    assert "gradient: autograd" in lines
    assert "step control: one step size for the batch" in lines
    assert "state: (3, 2) torch.float32 on cpu" in lines
    because = lines[lines.index("because:") + 1 :]
    # Why no faster path, for each of them; and why this gradient.
    known = FAMILIES[method] in ("fixed", "adaptive")
    reason = REASON if known else f"{method} is no explicit Runge-Kutta method"
    assert any("backend: not cpu: " in line and reason in line for line in because)
    assert f"  backend: not triton: {_NO_GPU}" in because
    assert any("solver's own operations" in line for line in because)


EXPLAINED = {
    "default method": (dict(), "method: dopri5"),
    "tuple": (dict(y0=(Y0, Y0[0])), r"state: a tuple state, (8,) torch.float32"),
    "complex": (dict(y0=Y0 + 1j), "state: (3, 2) torch.complex64"),
    "discrete": (dict(gradient="discrete"), "gradient: discrete"),
    "continuous": (dict(gradient="continuous"), "gradient: continuous"),
    "asked for": (dict(gradient="autograd"), "gradient: asked for"),
    "sample": (dict(step_control="sample"), "step control: one step size per row"),
    "reference": (dict(backend="reference"), "backend: asked for"),
    "other arguments": (dict(rtol=1e-3, atol=1e-3, return_stats=True), "backend: reference"),
    "event": (dict(t=T[::2], event_fn=lambda t, y: y.sum() - 1), "method: dopri5"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explain(case):
    changes, words = EXPLAINED[case]
    assert words in explain(**dict(func=untouched, y0=Y0, t=T) | changes)


@pytest.mark.parametrize("solve", [odeint, explain, odeint_adjoint])
def test_a_named_backend_that_cannot_run_raises_with_the_reason(solve):
    more = dict(adjoint_params=()) if solve is odeint_adjoint else {}
    with pytest.raises(ValueError, match=f'backend="cpu" cannot run.*{re.escape(REASON)}'):
        solve(untouched, Y0, T, backend="cpu", **more)


@pytest.mark.parametrize("solve", [odeint, explain])
def test_triton_makes_no_graph_of_a_field_that_pytorch_evaluates(solve):
    with pytest.raises(ValueError, match='backend="triton" cannot run.*gradient="autograd"'):
        solve(untouched, Y0, T, backend="triton")


UNKNOWN = {"backend": BACKENDS, "gradient": GRADIENTS, "step_control": STEP_CONTROLS}


@pytest.mark.parametrize("argument", UNKNOWN)
@pytest.mark.parametrize("value", ["nonsense", "", None, 3])
def test_unknown_names_list_the_known_ones(argument, value):
    names = ", ".join(UNKNOWN[argument])
    with pytest.raises(ValueError, match=f"{argument} is {value!r}, want one of {names}"):
        explain(untouched, Y0, T, **{argument: value})


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="explain: unexpected arguments metod"):
        explain(untouched, Y0, T, metod="rk4")


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "scipy_solver"])
def test_discrete_needs_a_one_step_method(method):
    with pytest.raises(ValueError, match=f'gradient="discrete".*{method}.*"continuous"'):
        explain(untouched, Y0, T, method=method, gradient="discrete")


BY_ROW = {
    "fixed steps": dict(method="rk4"),
    "0-d": dict(y0=Y0[0, 0]),
    "tuple": dict(y0=(Y0, Y0)),
    "event": dict(t=T[::2], event_fn=lambda t, y: y.sum()),
    "continuous": dict(gradient="continuous"),
}


@pytest.mark.parametrize("case", BY_ROW)
def test_what_steps_by_row_cannot_do(case):
    arguments = dict(func=untouched, y0=Y0, t=T, step_control="sample") | BY_ROW[case]
    with pytest.raises(ValueError, match='step_control="'):
        explain(**arguments)


# What odeint_adjoint's "auto" means shows in the class of the solution's node in the graph.
AUTOMATIC = {
    "adaptive": ({}, "Continuous"),
    "fixed steps": (dict(method="rk4"), "Discrete"),
    "implicit": (dict(method="implicit_midpoint"), "Discrete"),
    "adams": (dict(method="explicit_adams"), "Continuous"),
    "scipy": (dict(method="scipy_solver"), "Continuous"),
    "fixed steps, adjoint_rtol": (dict(method="rk4", adjoint_rtol=1e-3), "Continuous"),
    "fixed steps, adjoint_method": (dict(method="rk4", adjoint_method="dopri5"), "Continuous"),
    "fixed steps, adjoint_options": (dict(method="rk4", adjoint_options={}), "Continuous"),
    "by row": (dict(step_control="sample"), "Discrete"),
    "asked for discrete": (dict(gradient="discrete"), "Discrete"),
    "asked for continuous": (dict(method="rk4", gradient="continuous"), "Continuous"),
}


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize("case", AUTOMATIC)
def test_the_automatic_gradient_of_odeint_adjoint(case):
    changes, kind = AUTOMATIC[case]
    y0 = Y0.clone().requires_grad_()
    solution = odeint_adjoint(lambda t, y: -y, y0, T, adjoint_params=(), **changes)
    assert kind in type(solution.grad_fn).__name__
    solution.sum().backward()
    assert y0.grad is not None


def test_show_config():
    text = show_config()
    for words in (
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"numpy {np.__version__}",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        torch.backends.cpu.get_cpu_capability(),
        "gpu: ",
    ):
        assert words in text
    lines = text.splitlines()
    for name in BACKENDS[1:]:
        (line,) = (line for line in lines if line.startswith(f"backend {name}:"))
        missing = {"cpu": library.missing(), "triton": gpu.missing()}.get(name)
        assert line == f"backend {name}: missing: {missing}" if missing else "works" in line


def test_show_config_without_the_library(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "no compiler")
    assert "backend cpu: missing: no compiler" in show_config().splitlines()


@pytest.mark.skipif(bool(library.missing()), reason="without the C++ library")
def test_explain_tells_of_the_cpu_backend():
    field, y0 = MLPField(2, 4), torch.randn(3, 2)
    text = explain(field, y0, T)
    assert "backend: cpu" in text and "gradient: discrete" in text
    assert "backend: reference" in explain(field, y0, T, gradient="autograd")


def test_show_config_without_triton():
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import anode_fast; print(anode_fast.show_config())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "triton not installed" in run.stdout, run.stderr
    assert "backend triton: missing: Triton is not installed" in run.stdout.splitlines()
