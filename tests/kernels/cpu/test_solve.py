"""solve.py and conv.py: structs and constants are C++'s; what solve.py refuses, keeps and frees."""

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from anode_fast import MLPField, odeint
from anode_fast.kernels import interface
from anode_fast.kernels.cpu import conv, library, lowering, solve
from anode_fast.spec import MLPSpec, program_of
from anode_fast.stats import Status

HEADERS = Path(__file__).parents[3] / "kernels" / "cpu"
needs_library = pytest.mark.skipif(library.load() is None, reason=library.missing() or "loaded")

SPACES = ("record", "out", "deltas", "scratch", "local", "lanes")
STRUCTS = {
    "Plan": solve._Plan,
    "Tableau": solve._Tableau,
    "Options": solve._Options,
    "Result": solve.Result,
    "ProgramShape": lowering.Shape,
    "Place": lowering._Place,
    "Operation": lowering._Operation,
    "Group": lowering._Group,
    "PanelShape": lowering._Panel,
    "ConstantShape": lowering._Constant,
    "SumShape": lowering._Sum,
    "TensorShape": lowering._Tensor,
    "Zeros": lowering._Zeros,
    "ConvShape": conv._Shape,
    "ConvArguments": conv._Arguments,
}
CONSTANTS = {
    "Tableau::kMostStages": solve.MOST_STAGES,
    "int(Control::fixed)": interface.FIXED,
    "int(Control::batch)": interface.BATCH,
    "int(Control::sample)": interface.SAMPLE,
    "kSuccess": interface.SUCCESS,
    "kMaxSteps": interface.MAX_STEPS,
    "kUnderflow": interface.UNDERFLOW,
    "kNonFinite": interface.NON_FINITE,
    "kNonFiniteInput": interface.NON_FINITE_INPUT,
    "kOutOfMemory": interface.OUT_OF_MEMORY,
    "kFieldDiffers": interface.FIELD_DIFFERS,
    "kAbiVersion": library.ABI_VERSION,
    "ProgramShape::kBlock": lowering.BLOCK,
    "ProgramShape::kPadding": lowering.PADDING,
    **{f"Space::{name}": getattr(lowering, name.upper()) for name in SPACES},
    **{f"Op::{name}": i for i, name in enumerate(lowering.OPS)},
    # Words before the addresses and numbers in a block of arguments.
    "sizeof(SolveArguments) / 8": 11,
    "sizeof(DiscreteGradientArguments) / 8": 6,
}


def find_compiler():
    if command := shlex.split(os.environ.get("CXX", "")):
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cpp_layout(name, struct):
    """C++ expressions for the size of a struct, and for offset and size of each member."""
    members = [member for member, _ in struct._fields_]
    of_members = [(f"offsetof({name}, {m})", f"sizeof({name}::{m})") for m in members]
    return [f"sizeof({name})", *itertools.chain(*of_members)]


def python_layout(struct):
    members = [getattr(struct, name) for name, _ in struct._fields_]
    return [ctypes.sizeof(struct), *itertools.chain(*((m.offset, m.size) for m in members))]


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    """The values in C++ of CONSTANTS, and by name those of the structs' layouts."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("layout")
    lists = {name: cpp_layout(name, struct) for name, struct in STRUCTS.items()}
    lists["constants"] = list(CONSTANTS)
    # Behind api.cpp, for the structs in its anonymous namespace.
    source = [(HEADERS / "api.cpp").read_text(), "#include <cstddef>"]
    for name, values in lists.items():
        numbers = ", ".join(f"std::int64_t({value})" for value in values)
        source.append(f"ANODE_EXPORT std::int64_t test_{name}[] = {{{numbers}}};")
    (folder / "shim.cpp").write_text("\n".join(source))
    command = [*compiler, *"-std=c++17 -O0 -fPIC -shared -pthread".split(), f"-I{HEADERS}"]
    files = [str(folder / "shim.cpp"), "-o", str(folder / "shim.so")]
    subprocess.run([*command, *files], check=True)
    shim = ctypes.CDLL(str(folder / "shim.so"))
    return {
        name: list((ctypes.c_int64 * len(values)).in_dll(shim, f"test_{name}"))
        for name, values in lists.items()
    }


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_have_the_layout_of_cpps(name, cpp):
    assert python_layout(STRUCTS[name]) == cpp[name]


def test_constants_are_cpps(cpp):
    assert dict(zip(CONSTANTS, cpp["constants"], strict=True)) == CONSTANTS


def test_statuses_are_the_packages():
    assert interface.SUCCESS == Status.SUCCESS
    assert interface.MAX_STEPS == Status.MAX_STEPS
    assert interface.UNDERFLOW == Status.UNDERFLOW
    assert interface.NON_FINITE == Status.NON_FINITE
    assert max(Status) < interface.NON_FINITE_INPUT  # the binding's own begin here


# --- Solve ----------------------------------------------------------------------------------------


def make(stages=1, hidden=(4,), **options):
    """Fixed Euler steps, with stages that do nothing."""
    none = (0.0,) * stages
    rows = [(0.0,) * i for i in range(stages)]
    weights = (1.0, *none[1:])
    method = interface.Method(
        1, none, rows, weights, none, [(w, 0.0, 0.0, 0.0) for w in weights], False
    )
    field = program_of(MLPSpec(3, hidden, "tanh", time_dependent=False))
    return solve.Solve(library.load(), field, method, torch.float64, data_dim=3, **options)


def weights(hidden=(4,)):
    widths = [3, *hidden, 3]
    shapes = [((m, n), (m,)) for n, m in itertools.pairwise(widths)]
    return [torch.randn(shape, dtype=torch.float64) for shape in itertools.chain(*shapes)]


@needs_library
@pytest.mark.parametrize("stages", [1, solve.MOST_STAGES])
@pytest.mark.parametrize("hidden", [(4,), (4,) * 20])
def test_as_many_stages_as_there_is_room_for_and_any_number_of_layers(stages, hidden):
    x, parameters = torch.randn(5, 3, dtype=torch.float64), weights(hidden)
    solution, result, _ = make(stages, hidden).forward(x, parameters, [0.0, 0.5], [0.0, 0.5])
    h = x
    for i, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        h = torch.nn.functional.linear(h.tanh() if i else h, weight, bias)
    assert (result.status, result.nfe) == (interface.SUCCESS, stages)
    torch.testing.assert_close(solution, torch.stack([x, x + 0.5 * h]))


@needs_library
def test_no_room():
    with pytest.raises(ValueError, match="no room for 17 stages, want 16 at most"):
        make(solve.MOST_STAGES + 1)


@needs_library
def test_checkpoints_are_freed_once():
    freed, made = [], make()
    free = made._free

    def counting(address):
        freed.append(address)
        free(address)

    made._free = counting
    x, parameters, t = torch.randn(5, 3, dtype=torch.float64), weights(), [0.0, 0.5]
    assert made.forward(x, parameters, t, t)[2] is None
    x_not_finite = torch.full_like(x, torch.nan)
    _, result, kept = made.forward(x_not_finite, parameters, t, t, keep=True)
    assert (result.status, kept) == (interface.NON_FINITE_INPUT, None)
    assert not freed

    solution, _, kept = made.forward(x, parameters, t, t, keep=True)
    for _ in range(2):  # the gradient uses nothing up
        made.discrete_gradient(kept, parameters, solution, x, True)
    assert not freed
    address = kept.address
    del kept
    assert freed == [address]


@needs_library
@pytest.mark.parametrize("backward", [True, False])
def test_checkpoints_end_with_the_graph(backward, monkeypatch):
    alive = set()

    class Counted(solve.Checkpoints):
        def __init__(self, address, free):
            super().__init__(address, free)
            alive.add(address)

        def __del__(self):
            alive.remove(self.address)
            super().__del__()

    monkeypatch.setattr(solve, "Checkpoints", Counted)
    field = MLPField(3, 8)
    y = odeint(field, torch.randn(5, 3), torch.tensor([0.0, 1.0]), backend="cpu")
    assert len(alive) == 1
    if backward:
        y.sum().backward()
    del y
    assert not alive
    with torch.no_grad():
        odeint(field, torch.randn(5, 3), torch.tensor([0.0, 1.0]), backend="cpu")
    assert not alive
