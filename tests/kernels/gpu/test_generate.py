"""kernels/gpu/generate.py: a program's functions, and solves with them, against PyTorch's.

Float64 results are held to the rounding error that the reference has in float32, scaled: three
times that and 32 eps. Without a card Triton's interpreter runs the kernels.
"""

import dataclasses
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl

from anode_fast import NonFiniteState, fused, odeint
from anode_fast.kernels import program as programs
from anode_fast.kernels.gpu import functions, generate, host, launch
from anode_fast.kernels.program import STATE, Program
from anode_fast.stats import Status
from tests.helpers import assert_no_worse
from tests.kernels.gpu.programs import PROGRAMS, Writer
from tests.kernels.gpu.solves import f32, f64, times
from tests.kernels.programs import programs as random_programs

ROWS, TILE, EVALUATIONS = 13, 16, 2


@triton.jit
def call_all(
    weights, t, y, cotangent, out, grad, time_grad, sums, records, shares, rows,
    EVALUATE: tl.constexpr, VJP: tl.constexpr, TIME_GRADIENT: tl.constexpr,
    ACCUMULATE: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Two evaluations with and without a record, and all gradients of them."""
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    inside = (r < rows) & (c < DIM)
    place = r * DIM + c
    for i in range(0, 2):
        record = records + i * SIZE
        at = i * rows * DIM + place
        tile = tl.load(y + at, mask=inside, other=0.0)
        time = tl.load(t + i * rows + r, mask=r < rows, other=0.0)
        k = EVALUATE(weights, record, time, tile, F, B, False)
        tl.debug_barrier()
        tl.store(out + (2 * i) * rows * DIM + place, k, mask=inside)
        k = EVALUATE(weights, record, time, tile, F, B, True)
        tl.store(out + (2 * i + 1) * rows * DIM + place, k, mask=inside)
        g = VJP(weights, record, tl.load(cotangent + at, mask=inside, other=0.0), F, B)
        tl.store(grad + at, g, mask=inside)
        h = TIME_GRADIENT(weights, record, F, B)[:, None]
        tl.store(time_grad + i * rows + r, h, mask=r < rows)
    ACCUMULATE(sums, records, shares, 0, 2, rows, F, B, SIZE)


@dataclasses.dataclass
class Numbers:
    """What the functions take: the same in every dtype but for rounding."""

    program: Program
    seed: int = 0
    positive: bool = False

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape):
            x = torch.randn(shape, generator=generator, dtype=f64)
            return x.abs() + 0.1 if self.positive else x

        self.tensors = [random(*s) / (s[-1] if s else 1) ** 0.5 for s in self.program.shapes]
        self.t, self.shares = random(EVALUATIONS, ROWS, 1), random(EVALUATIONS)
        self.y, self.cotangent = (random(EVALUATIONS, ROWS, self.program.dim) for _ in range(2))

    def to(self, dtype, device="cpu"):
        tensors = [x.to(device, dtype) for x in self.tensors]
        others = self.t, self.y, self.cotangent, self.shares
        return tensors, *(x.to(device, dtype) for x in others)


def by_kernels(numbers, dtype, device, N=32, K=16):
    """Values, cotangents of state and time, the tensors' gradients."""
    program = numbers.program
    tensors, t, y, cotangent, shares = numbers.to(dtype, device)
    F = generate.generated(program, launch.precision(dtype), N, K)
    module, size = generate.load(program, N, K), F.record_size(TILE)
    out, grad, time_grad = (
        host.empty(y, shape) for shape in ((2 * EVALUATIONS, *y.shape[1:]), y.shape, t.shape)
    )
    sums = host.zeros(y, (F.weights,), dtype)
    with host.on(device):
        call_all[(1,)](
            *(tuple(tensors), t, y, cotangent, out, grad, time_grad, sums),
            *(host.empty(y, (EVALUATIONS * size,)), shares, ROWS),
            *(module.evaluate, module.vjp, module.time_gradient, module.accumulate),
            *(F, program.dim, TILE, F.D, size),
        )
    parts = sums.split([x.numel() for x in tensors]) if tensors else ()
    grads = [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
    return [out[::2], out[1::2], grad, time_grad, *grads]


def by_torch(numbers, dtype):
    """Likewise."""
    tensors, t, y, cotangent, shares = numbers.to(dtype)
    outs, grads, time_grads = [], [], []
    sums = [torch.zeros_like(x) for x in tensors]
    for i in range(EVALUATIONS):
        outs.append(programs.evaluate(numbers.program, tensors, t[i], y[i]))
        found = programs.vjp(numbers.program, tensors, t[i], y[i], cotangent[i])
        grads.append(found[0])
        time_grads.append(found[1])
        sums = [a + shares[i] * b for a, b in zip(sums, found[2], strict=True)]
    outs = torch.stack(outs)
    return [outs, outs, torch.stack(grads), torch.stack(time_grads), *sums]


def assert_alike(numbers, device, dtype=f64, **blocks):
    found = by_kernels(numbers, dtype, device, **blocks)
    single, double = by_torch(numbers, f32), by_torch(numbers, f64)
    for i, (got, ref, exact) in enumerate(zip(found, single, double, strict=True)):
        if not exact.numel():
            continue
        if dtype == f64:  # an error as large as float64's rounding makes of float32's
            shrink = torch.finfo(f64).eps / torch.finfo(f32).eps
            ref = exact + (ref.double() - exact) * shrink
        assert_no_worse(got.cpu(), ref, exact, f"result {i}")


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_functions_of_programs(name, dtype, device):
    assert_alike(Numbers(PROGRAMS[name], positive=name == "everything"), device, dtype)


@hypothesis.settings(
    max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    program=random_programs(), seed=st.integers(0, 99), blocks=st.sampled_from([16, 32, 64])
)
def test_functions_of_any_program(program, seed, blocks, device):
    assert_alike(Numbers(program, seed), device, N=blocks, K=max(16, blocks // 2))


def test_rows_beyond_the_batch_do_not_count(device):
    # Rows of zeros, whose logarithm is infinite: 0 times that is no number.
    write = programs.Instruction
    program = Program(3, ((3, 3), (3,)), (write("log", (1,), 3), write("linear", (2,), 3, (0, 1))))
    assert_alike(Numbers(program, positive=True), device)


def test_text_is_the_same_in_every_process():
    code = (
        "from anode_fast.kernels.gpu import generate\n"
        "from tests.kernels.gpu.programs import PROGRAMS\n"
        "for name, program in PROGRAMS.items(): print(generate.load(program, 32, 16).__name__)\n"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = [generate.load(program, 32, 16).__name__ for program in PROGRAMS.values()]
    assert names.stdout.split() == own and len(set(own)) == len(own)


# --- elementary functions -------------------------------------------------------------------------


@triton.jit
def apply(x, out, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, FUNCTION(tl.load(x + i)))


RANGES = {
    "exp": ((-87, 88), (-1, 1)),
    "expm1": ((-50, 88), (-1e-3, 1e-3)),
    "log": ((1e-30, 1e30), (0.9, 1.1)),
    "log1p": ((-0.999, 5), (-1e-4, 1e-4)),
    "sin": ((-10, 10), (-1e5, 1e5)),
    "cos": ((-10, 10), (-1e5, 1e5)),
}
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1.0, 1e-30, 3e38)


def applied(name, x):
    out = torch.full_like(x, float("nan"))
    with host.on(x.device):
        apply[(1,)](x, out, getattr(functions, name), x.numel())
    return out


@pytest.mark.parametrize("name", RANGES)
def test_elementary_functions(name, device):
    for low, high in RANGES[name]:
        x = torch.linspace(low, high, 4096, dtype=f64).float()
        want = getattr(torch, name)(x.double())
        got = applied(name, x.to(device)).cpu().double()
        unit = torch.finfo(f32).eps * want.abs().clamp_min(torch.finfo(f32).tiny)
        assert ((got - want).abs() <= 4 * unit).all()
        x = x.double()
        got, want = applied(name, x.to(device)).cpu(), getattr(torch, name)(x)
        torch.testing.assert_close(got, want, rtol=16 * torch.finfo(f64).eps, atol=0)


@pytest.mark.parametrize("name", RANGES)
def test_elementary_functions_of_special_numbers(name, device):
    x = torch.tensor(SPECIAL)
    if name in ("sin", "cos"):
        x[-1] = 2.0  # beyond what they are for
    got = applied(name, x.to(device)).cpu()
    torch.testing.assert_close(got, getattr(torch, name)(x), equal_nan=True)


# --- solves ---------------------------------------------------------------------------------------


class Field:
    """A program as a user's function."""

    def __init__(self, program, tensors):
        self.program, self.tensors, self.nfe = program, tensors, 0

    def __call__(self, t, y):
        return programs.evaluate(self.program, self.tensors, t, y)

    def count(self, evaluations):
        self.nfe += evaluations


def call_of(field, x, t, step_control="batch", expected=None, **given):
    """A call of the kernels."""
    problem = fused.make_problem(field, torch.zeros_like(x), t, **given)
    by_row = step_control == "sample"
    native = fused.prepare("triton", problem, field.program, x.shape[1], by_row=by_row)
    ahead = (-t if problem.backwards else t).tolist()
    return fused.Call(native, field, ahead, (), lambda *_: problem, expected)


def solved(field, x, t, **given):
    """By the kernels; the solution and the stats."""
    call = call_of(field, x, t, **given)
    return fused.run(call, x, field.tensors, t.dtype), call.stats


FORTH, BACK = (0.0, 0.4, 1.0), (1.0, 0.7, -0.2)
STEPS = dict(method="midpoint", options={"step_size": 0.3})
SOLVES = {
    "batch": ("gated", 5, FORTH, {}),
    "batch, backwards": ("time first", 5, BACK, {}),
    "batch of several programs": ("cubic", 70, FORTH, {}),
    "no linear map, several programs": ("predators", 300, BACK, {}),
    "by row": ("oscillator", 18, FORTH, {"step_control": "sample"}),
    "by row, no linear map": ("growth", 40, BACK, {"step_control": "sample"}),
    "fixed": ("time last", 18, BACK, STEPS),
    "fixed, wide": ("wide", 3, FORTH, STEPS),
}


@pytest.mark.parametrize("name", SOLVES)
def test_solves(name, device):
    program, rows, t, given = SOLVES[name]
    field = PROGRAMS[program]
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=f64).to(device)

    tensors = [random(*s) * 0.5 / (s[-1] if s else 1) ** 0.5 for s in field.shapes]
    x, cotangent = 0.4 * random(rows, field.dim), random(len(t), rows, field.dim)
    leaves = [leaf.requires_grad_() for leaf in (x, *tensors)]
    func, given = Field(field, tensors), dict(rtol=1e-3, atol=1e-3) | given
    y, stats = solved(func, x, times(*t), **given)
    grads = torch.autograd.grad(y, leaves, cotangent)
    count, func.nfe = func.nfe, 0
    want, expected = odeint(
        func, x, times(*t), backend="reference", gradient="autograd", return_stats=True, **given
    )
    wanted = torch.autograd.grad(want, leaves, cotangent)
    assert (stats.accepted, stats.rejected) == (expected.accepted, expected.rejected)
    assert stats.nfe == expected.nfe and count == stats.nfe + stats.nfe_backward
    for got, ref in zip((y, *grads), (want, *wanted), strict=True):
        # Step sizes are chosen by float64 error ratios, whose rounding the solution feels.
        torch.testing.assert_close(
            got, ref, rtol=1e-9, atol=1e-10 * float(ref.detach().abs().max())
        )


# --- the first stage ------------------------------------------------------------------------------

CONTROLS = {
    "batch": ("oscillator", 5, FORTH, {}),
    "several programs": ("cubic", 70, BACK, {}),
    "by row": ("growth", 40, BACK, {"step_control": "sample"}),
    "fixed": ("time last", 18, FORTH, STEPS),
    "fixed, backwards": ("predators", 3, BACK, STEPS),
}


def first_stage(name, dtype, device):
    """A field, a state, times, options, and dy/dt of three rows."""
    program, rows, t, given = CONTROLS[name]
    numbers = Numbers(PROGRAMS[program])
    tensors = [0.5 * x.to(device, dtype) for x in numbers.tensors]
    x = 0.4 * torch.randn(rows, numbers.program.dim, generator=torch.Generator().manual_seed(1))
    field, x, t = Field(numbers.program, tensors), x.to(device, dtype), times(*t)
    return field, x, t, dict(rtol=1e-3, atol=1e-3) | given, field(t[0].to(x), x[:3])


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CONTROLS)
def test_first_stage_that_is_as_expected(name, dtype, device):
    field, x, t, given, expected = first_stage(name, dtype, device)
    want, stats = solved(field, x, t, **given)
    got, more = solved(field, x, t, expected=expected, **given)
    assert got.equal(want) and more.launches == stats.launches + 1


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("change", [1e-3, float("nan"), float("inf")])
def test_first_stage_that_is_not(name, change, device):
    field, x, t, given, expected = first_stage(name, f32, device)
    expected[-1, -1] += change
    with pytest.raises(fused.FieldDiffers):
        solved(field, x, t, expected=expected, **given)
    with pytest.raises(fused.FieldDiffers):  # dy/dt in the solver's time
        solved(field, x, t, expected=-first_stage(name, f32, device)[-1], **given)


def test_first_stage_that_is_no_number(device):
    field, x, t, given, _ = first_stage("batch", f32, device)
    x[0, 0] = float("nan")
    expected = field(t[0].to(x), x[:3])
    with pytest.raises(NonFiniteState):
        solved(field, x, t, expected=expected, **given)


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
def test_rounding_of_a_first_stage_is_measured(dtype, device):
    write = Writer(3)
    large = write("constant", number=1e4)
    write("sub", write("add", STATE, large), large)
    field = Field(write.finished(), [])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    y, _ = solved(field, x, times(0.0, 0.1), expected=x.clone(), rtol=1e-3, atol=1e-3)
    assert y.isfinite().all()
    error = 1e5 * torch.finfo(dtype).eps
    with pytest.raises(fused.FieldDiffers):
        solved(field, x, times(0.0, 0.1), expected=x + 10 * error, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONTROLS)
def test_captured_solves_with_another_first_stage(name, device, monkeypatch):
    field, x, t, given, expected = first_stage(name, f32, device)
    if "options" not in given:
        given["options"] = {"max_num_steps": 12}
    monkeypatch.setattr(host, "is_captured", lambda device: True)
    y, _ = solved(field, x, t, expected=expected, **given)
    assert y.isfinite().all()
    y, stats = solved(field, x, t, expected=expected + 1, **given)
    assert y.isnan().all()
    assert name.startswith("fixed") or stats.status == Status.NON_FINITE


# --- launches -------------------------------------------------------------------------------------


def chain(length, width=3):
    write = programs.Instruction
    return Program(width, (), tuple(write("sin", (i + 1,), width) for i in range(length)))


def layers(dim, hidden, count):
    shapes, code, width = [], [], dim
    for out in (*(hidden,) * count, dim):
        shapes.append((out, width))
        code.append(programs.Instruction("linear", (len(code) + 1,), out, (len(shapes) - 1,)))
        width = out
    return Program(dim, tuple(shapes), tuple(code))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (layers(65, 16, 1), "the state has width 65, the GPU kernels take 64 at most"),
        (layers(3, 257, 1), "a value of width 257, the GPU kernels take 256 at most"),
        (chain(257), "257 instructions, the GPU kernels take 256 at most"),
        (layers(3, 256, 40), "numbers of each row and evaluation, the GPU kernels have room for"),
        (
            Program(
                3,
                (),
                (
                    programs.Instruction("place", (1,), 70),
                    programs.Instruction("slice", (2,), 3),
                ),
            ),
            "a value of width 70, the GPU kernels take 64 at most where there are no linear maps",
        ),
    ],
)
def test_why_not(program, reason):
    assert reason in launch.why_not(program, f32)


def test_why_not_says_nothing_of_what_runs():
    assert not any(launch.why_not(program, f32) for program in PROGRAMS.values())


@pytest.mark.parametrize("kernel", launch.KERNELS)
@pytest.mark.parametrize("capability", [0, 80, 90, 100])
def test_launches_fit(kernel, capability):
    for program in PROGRAMS.values():
        for rows in (1, 64, 500, 1 << 16):
            F, config = launch.configuration(kernel, rows, program, "tf32x3", False, capability)
            assert config.rows >= 16 and F.dim == program.dim
            assert F.D == generate.padded(program.dim, program)
            assert generate.has_products(program) <= (F.D >= 16)
