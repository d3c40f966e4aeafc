"""Every launch as a GPU gets it, but for the launch: Triton binds, specialises and compiles it.

The interpreter takes much that the compiler refuses, and compiles nothing. So this runs in another
process without it, with a driver that knows no more of a GPU than its name.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

CODE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction




def name_of(kernel):
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


calls = []  # of the launcher: its grid, and its arguments without the fixed ones before them


class Launcher:
    def __init__(self, source, metadata):
        self.name = name_of(source.fn)

    def __call__(self, *args):
        calls.append((self.name, args[:3], args[9:]))


class Named:
    launcher_cls = Launcher

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return None, None, 0, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 1 << 18}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Named())
run, launched = JITFunction.run, []


def remembering(self, *args, grid, warmup, **kwargs):
    compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
    launched.append((name_of(self), compiled.hash, "cubin" in compiled.asm))
    return compiled


JITFunction.run = remembering

from anode_fast import fused
from anode_fast.kernels.gpu import any_field, by_stage, host, solve
from anode_fast.kernels.interface import BATCH, FIXED, SAMPLE, ConvField, Field
from anode_fast.kernels.program import Instruction, Program
from anode_fast.tableau import DOPRI5, RK4
from tests.kernels.gpu.programs import PROGRAMS

host.capability = lambda device: 90
host.is_captured = lambda device: True  # it would wait for an outcome
OPTIONS = dict(
    backwards=False, float_time=False, data_dim=2, rtol=1e-3, atol=1e-3, max_num_steps=30,
    safety=0.9, ifactor=10.0, dfactor=0.2, max_step=1e300,
)
METHODS = {
    BATCH: fused._method(DOPRI5),
    SAMPLE: fused._method(DOPRI5),
    FIXED: fused._fixed_method(RK4, "cubic"),
}
field = Field(7, (20, 20, 20), 1, True)
shapes = [(20, 8), (20,), (20, 20), (20,), (20, 20), (20,), (7, 20), (7,)]
weights = [torch.randn(shape) for shape in shapes]


def call(control, rows):
    made = solve.Solve(field, METHODS[control], torch.float32, control=control, **OPTIONS)
    x, grid = torch.randn(rows, 2), (0.0, 0.5, 1.0) if control == FIXED else ()
    y, _, kept = made.forward(x, weights, (0.0, 1.0), grid, keep=True)
    grad = torch.randn(2, rows, 7)
    made.discrete_gradient(kept, weights, grad, x, wanted=True)
    if control != SAMPLE:
        back = [-time for time in reversed(grid)]
        wanted = [True] * len(weights)
        made.continuous_gradient(y, weights, (0.0, 1.0), grad, x, wanted, back, seminorm=True)


for control in (BATCH, SAMPLE, FIXED):
    call(control, 20)
call(BATCH, 500)
names = [name for name, _, _ in launched]
for kernel in ("runge_kutta.adaptive", "continuous.adaptive"):
    of_many = [(grid, args) for name, grid, args in calls if name == kernel and grid[0] > 2]
    assert len(of_many) == 32, calls
    # The first launch, and those made without another look at the arguments.
    for grid, args in of_many:
        assert grid == of_many[0][0] and len(args) == len(of_many[0][1])
        assert all(a is b or a == b for a, b in zip(args, of_many[0][1]))
assert all(has_code for _, _, has_code in launched)
assert set(names) == {
    "runge_kutta.fixed", "runge_kutta.adaptive", "runge_kutta.adaptive_by_row",
    "adjoint.discrete_gradient", "adjoint.reduce",
    "continuous.fixed", "continuous.adaptive", "continuous.quadrature",
}, names
assert names.count("runge_kutta.adaptive") == 1 + 1, names

# Batches of other sizes, and other numbers of steps and times, compile nothing.
before = {compiled for _, compiled, _ in launched}
for rows in (21, 32, 17):
    call(BATCH, rows)
assert {compiled for _, compiled, _ in launched} == before


# Fields from programs, generated in each process anew: all functions that there are, no linear map,
# no tensors, one feature. The first stage is compared.
launched.clear()
calls.clear()
no_tensors = Program(2, (), (Instruction("sin", (1,), 2),))
for program in (PROGRAMS["everything"], PROGRAMS["growth"], PROGRAMS["cubic"], no_tensors):
    tensors = [torch.randn(shape) for shape in program.shapes]
    few = OPTIONS | dict(data_dim=min(2, program.dim))
    for control in (BATCH, FIXED) if program is no_tensors else (BATCH,):
        made = solve.Solve(program, METHODS[control], torch.float32, control=control, **few)
        x, grid = torch.randn(20, few["data_dim"]), (0.0, 0.5, 1.0) if control == FIXED else ()
        expected = torch.randn(3, program.dim)
        y, _, kept = made.forward(x, tensors, (0.0, 1.0), grid, True, expected)
        grad = torch.randn(2, 20, program.dim)
        made.discrete_gradient(kept, tensors, grad, x, wanted=True)
        if control == BATCH:
            wanted = [True] * len(tensors)
            made.continuous_gradient(y, tensors, (0.0, 1.0), grad, x, wanted, seminorm=True)
assert all(has_code for _, _, has_code in launched)
assert {name for name, _, _ in launched} == {
    "first_stage.compare", "runge_kutta.fixed", "runge_kutta.adaptive",
    "adjoint.discrete_gradient", "adjoint.reduce",
    "continuous.adaptive", "continuous.quadrature",
}, launched

# Convolutional fields: solves stage by stage.
launched.clear()
calls.clear()
FEW = OPTIONS | dict(max_num_steps=2)
shapes = [(16, 4, 1, 1), (16,), (16, 17, 3, 3), (16,), (3, 17, 1, 1), (3,)]
images = [torch.randn(shape) for shape in shapes]


def call_images(activation, control, number):
    made = by_stage.Solve(
        ConvField(3, 16, activation, True), METHODS[control], torch.float32, control=control, **FEW
    )
    x, grid = torch.randn(number, 2, 9, 8), (0.0, 0.5, 1.0) if control == FIXED else ()
    y, _, kept = made.forward(x, images, (0.0, 1.0), grid, keep=True)
    grad = torch.randn(2, number, 3, 9, 8)
    made.discrete_gradient(kept, images, grad, x, wanted=True)
    if control == BATCH:
        made.continuous_gradient(y, images, (0.0, 1.0), grad, x, [True] * 6, seminorm=True)


for control in (BATCH, SAMPLE, FIXED):
    call_images(1, control, 5)
names = {name for name, _, _ in launched}
assert names == {
    "conv.pack", "conv.first_layer", "conv.vjp_outer", "conv.vjp_inner", "conv.vjp_weights",
    "combine.begin", "combine.stage", "combine.finish",
    "unwind.rewind", "unwind.cotangent", "unwind.gather",
    "reverse.begin", "reverse.advance", "reverse.finish", "reverse.commit",
}, names
assert all(has_code for _, _, has_code in launched)
# Launches made without another look at the arguments get as many of them.
for kernel in names:
    assert len({len(args) for name, _, args in calls if name == kernel}) == 1, kernel
# Stages differ in numbers only; so do batches.
before = {compiled for _, compiled, _ in launched}
call_images(1, BATCH, 7)
assert {compiled for _, compiled, _ in launched} == before


# Fields that PyTorch evaluates.
launched.clear()
calls.clear()
ANY = {name: value for name, value in OPTIONS.items() if name != "data_dim"}
solves = {
    control: any_field.Solve(METHODS[control], torch.float32, control=control, **ANY)
    for control in (BATCH, FIXED)
}


class Enough(Exception):
    pass


def call_any(control, entries):
    evaluations = []

    def evaluate(t, y):
        evaluations.append(t)
        if len(evaluations) > 20:  # nothing runs, so the solve would never end
            raise Enough
        return -y

    grid = tuple(i / 4 for i in range(5)) if control == FIXED else ()
    try:
        solves[control].forward(evaluate, torch.randn(entries), (0.0, 1.0), grid, keep=True)
    except Enough:
        pass


for control in (BATCH, FIXED):
    call_any(control, 3000)
assert {name for name, _, _ in launched} == {
    "combine.begin", "combine.stage", "combine.finish", "combine.tell_times",
}
assert all(has_code for _, _, has_code in launched)
for kernel in {name for name, _, _ in launched}:
    of_kernel = [(grid, args) for name, grid, args in calls if name == kernel]
    assert len({len(args) for _, args in of_kernel}) == 1, kernel
    assert len({grid for grid, _ in of_kernel}) == 1, kernel
# In the next solve Triton looks at no arguments; other sizes compile nothing.
before = len(launched)
for control in (BATCH, FIXED):
    call_any(control, 3000)
    call_any(control, 70)
assert len(launched) == before, launched[before:]
print("ok")
"""


@pytest.mark.slow
def test_every_launch_compiles():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )
    assert done.stdout.strip() == "ok", done.stderr[-3000:]
