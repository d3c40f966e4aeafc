"""Imports point down one list, and every import of the package stands at the top of its file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import the modules below it. A new module gets a line here, as low as it can stand.
ORDER = """
    anode_fast
    anode_fast.models
    anode_fast.block
    anode_fast.operators
    anode_fast.odeint
    anode_fast.execute
    anode_fast.graphs
    anode_fast.settings
    anode_fast.plan
    anode_fast.recognize
    anode_fast.recognize.images
    anode_fast.recognize.rows
    anode_fast.recognize.trace
    anode_fast.recognize.surroundings
    anode_fast.convolution
    anode_fast.steps
    anode_fast.any_field
    anode_fast.fields
    anode_fast.fused
    anode_fast.kernels
    anode_fast.kernels.gpu
    anode_fast.kernels.gpu.aot
    anode_fast.kernels.gpu.solve
    anode_fast.kernels.gpu.by_stage
    anode_fast.kernels.gpu.any_field
    anode_fast.kernels.gpu.launch
    anode_fast.kernels.gpu.generate
    anode_fast.kernels.gpu.host
    anode_fast.kernels.gpu.reverse
    anode_fast.kernels.gpu.unwind
    anode_fast.kernels.gpu.combine
    anode_fast.kernels.gpu.first_stage
    anode_fast.kernels.gpu.continuous
    anode_fast.kernels.gpu.adjoint
    anode_fast.kernels.gpu.runge_kutta
    anode_fast.kernels.gpu.controller
    anode_fast.kernels.gpu.conv
    anode_fast.kernels.gpu.mlp
    anode_fast.kernels.gpu.products
    anode_fast.kernels.gpu.functions
    anode_fast.kernels.gpu.activations
    anode_fast.kernels.gpu.products
    anode_fast.kernels.cpu
    anode_fast.kernels.cpu.solve
    anode_fast.kernels.cpu.lowering
    anode_fast.kernels.cpu.conv
    anode_fast.kernels.cpu.combine
    anode_fast.kernels.cpu.library
    anode_fast.kernels.interface
    anode_fast.adjoint
    anode_fast.reference
    anode_fast.reference.events
    anode_fast.reference.dense
    anode_fast.reference.scipy
    anode_fast.reference.implicit
    anode_fast.reference.adams
    anode_fast.reference.runge_kutta
    anode_fast.reference.step
    anode_fast.controller
    anode_fast.failures
    anode_fast.problem
    anode_fast.vector_field
    anode_fast.spec
    anode_fast.kernels.program
    anode_fast.tableau
    anode_fast.stats
    anode_fast.errors
    anode_fast.distributed
""".split()

# Kernels import nothing of the package but kernels, though there are modules below them.
KERNELS = "anode_fast.kernels"

# Beside the standard library. A module may import what stands at it or at a package it is in.
THIRD_PARTY = {
    "anode_fast": {"torch", "numpy"},
    "anode_fast.reference.scipy": {"scipy"},
    "anode_fast.kernels.gpu": {"triton"},
}

ADD_IT = "is not in ORDER of tests/test_layering.py: add it, as low as it can stand"


def within(module, package):
    return f"{module}.".startswith(f"{package}.")


def module_name(path):
    """Dotted name of a source file, relative to the root: kernels/gpu/mlp.py -> anode_fast...."""
    parts = list(path.with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "anode_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(node, module, is_package):
    """Dotted names of what an import statement in `module` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = module.split(".") if is_package else module.split(".")[:-1]
        parents = parents[: len(parents) - node.level + 1]
        base = ".".join([*parents, *filter(None, [base])])
    # `from package import name`: of ours, the name is a module if the table has it.
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [base if within(base, "anode_fast") and name not in ORDER else name for name in names]


def violations(source, module, is_package=False):
    """What is wrong with the imports of `source`, one sentence each."""
    if module not in ORDER:
        return [f"{module} {ADD_IT}"]
    tree = ast.parse(source)
    late = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    allowed = set(sys.stdlib_module_names).union(
        *(names for place, names in THIRD_PARTY.items() if within(module, place))
    )
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in imported_modules(node, module, is_package):
            where = f"{module}, line {node.lineno}: imports {name}"
            if not within(name, "anode_fast"):
                if name.split(".")[0] not in allowed:
                    found.append(f"{where}, which THIRD_PARTY does not allow there")
                if within(module, KERNELS) and within(name, "torch.nn"):
                    found.append(f"{where}, but kernels need no modules")
                continue
            if name not in ORDER:
                found.append(f"{where}, which {ADD_IT}")
            elif ORDER.index(name) <= ORDER.index(module):
                found.append(f"{where}, which does not stand below it")
            elif within(module, KERNELS) and not within(name, KERNELS):
                found.append(f"{where}, but kernels import nothing of anode_fast")
            if node in late:
                found.append(f"{where} inside a function")
    return list(dict.fromkeys(found))


FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("anode_fast", "kernels")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    source = (ROOT / path).read_text()
    found = violations(source, module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("anode_fast.problem", "from anode_fast.odeint import odeint", "does not stand below"),
        ("anode_fast.problem", "from anode_fast import plan, tableau", "imports anode_fast.plan"),
        ("anode_fast.problem", "from anode_fast import odeint_event", "imports anode_fast,"),
        ("anode_fast.problem", "import anode_fast.problem", "does not stand below"),
        ("anode_fast.problem", "from . import odeint", "imports anode_fast.odeint"),
        ("anode_fast.reference.adams", "from ..plan import Plan", "imports anode_fast.plan"),
        ("anode_fast.reference.adams", "import anode_fast.kernels.gpu", "does not stand below"),
        ("anode_fast.plan", "def f():\n    import anode_fast.fused", "inside a function"),
        ("anode_fast.plan", "from anode_fast.novelty import x", "anode_fast.novelty"),
        ("anode_fast.novelty", "", "add it, as low as it can stand"),
        ("anode_fast.plan", "import scipy.linalg", "THIRD_PARTY"),
        ("anode_fast.plan", "import triton", "THIRD_PARTY"),
        ("anode_fast.plan", "from benchmarks import data", "THIRD_PARTY"),
        ("anode_fast.plan", "from tests.helpers import x", "THIRD_PARTY"),
        ("anode_fast.kernels.gpu", "from anode_fast.tableau import RK4", "kernels import nothing"),
        ("anode_fast.kernels.cpu.library", "from anode_fast.stats import Status", "import nothing"),
        ("anode_fast.kernels.cpu.library", "import triton", "THIRD_PARTY"),
        ("anode_fast.adjoint", "import anode_fast.kernels.cpu.library", "does not stand below"),
        ("anode_fast.kernels.gpu", "import torch.nn.functional as F", "kernels need no modules"),
        ("anode_fast.kernels.gpu", "from torch import nn", "kernels need no modules"),
    ],
)
def test_a_violation_is_found(module, source, message):
    assert message in "\n".join(violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("anode_fast.plan", "import math\nimport torch.nn\nfrom anode_fast import tableau, spec"),
        ("anode_fast.plan", "from anode_fast.kernels.cpu import library"),
        ("anode_fast.reference.adams", "from .runge_kutta import step\nfrom ..spec import MLPSpec"),
        ("anode_fast.reference.scipy", "def f():\n    import scipy.integrate"),
        ("anode_fast.kernels.gpu", "import triton.language as tl\nimport torch"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, module) == []
