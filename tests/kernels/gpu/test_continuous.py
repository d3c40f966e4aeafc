"""The continuous gradient on a GPU, or in Triton's interpreter, against the CPU backend's."""

import dataclasses
import itertools
import math

import pytest
import torch

from anode_fast import MLPField, fused
from anode_fast.kernels import interface
from anode_fast.kernels.cpu import library
from anode_fast.kernels.cpu import solve as cpu
from anode_fast.spec import MLPSpec
from anode_fast.tableau import TABLEAUS
from tests.helpers import assert_no_worse

pytest.importorskip("triton")
from anode_fast.kernels.gpu import host  # noqa: E402
from anode_fast.kernels.gpu import solve as gpu  # noqa: E402

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.missing() or "loaded")

f32, f64 = torch.float32, torch.float64
PINNED = {"min_step": 0.4, "max_step": 0.4}
SEVERAL = 40  # rows that are more than a tile


@dataclasses.dataclass(frozen=True)
class Case:
    """A solve whose gradient is wanted; `times` are the solver's."""

    rows: int = 5
    times: tuple[float, ...] = (0.0, 1.0)
    backwards: bool = False
    dim: int = 3
    hidden: int = 16
    layers: int = 1
    activation: str = "tanh"
    time_dependent: bool = True
    gain: float = 2.0
    method: str = "dopri5"
    step_size: float = 0.3
    unwanted: tuple[int, ...] = ()  # parameters, by number
    seminorm: bool = True

    def __str__(self):
        values = dataclasses.asdict(self).items()
        return " ".join(f"{k}={v}" for k, v in values if v != getattr(Case, k)) or "plain"

    @property
    def adaptive(self):
        return TABLEAUS[self.method].adaptive

    def grid(self):
        """Fixed steps in negated time: where intervals meet, twice."""
        points = []
        if not self.adaptive:
            for t1, t0 in itertools.pairwise(reversed(self.times)):
                steps = math.ceil((t1 - t0) / self.step_size)
                points += [i * self.step_size - t1 for i in range(steps)] + [-t0]
        return points

    def solve(self, module, dtype, **options):
        """This solve by the kernels of one of the two backends."""
        tableau = TABLEAUS[self.method]
        make = fused._method if self.adaptive else lambda t: fused._fixed_method(t, "cubic")
        settings = dict(
            control=interface.BATCH if self.adaptive else interface.FIXED,
            **dict(backwards=self.backwards, float_time=False, data_dim=2, max_num_steps=1000),
            **dict(rtol=1e-3, atol=1e-3, safety=0.9, ifactor=10.0, dfactor=0.2, max_step=math.inf),
        )
        widths = (self.hidden,) * self.layers
        spec = MLPSpec(self.dim, widths, self.activation, self.time_dependent)
        return module.Solve(
            *([library.load()] if module is cpu else []),
            fused.field_of("cpu" if module is cpu else "triton", spec),
            make(tableau),
            dtype,
            **settings | options,
        )

    def tensors(self):
        """Parameters, the solution at the times, and its cotangent, in float64."""
        torch.manual_seed(1)
        field = MLPField(
            *(self.dim, self.hidden),
            num_hidden=self.layers,
            activation=self.activation,
            time_dependent=self.time_dependent,
        ).double()
        parameters = [(p.detach() * self.gain).contiguous() for p in field.tensors()]
        x = torch.randn(self.rows, 2, dtype=f64)
        exact = dataclasses.replace(self, method="dopri5").solve(cpu, f64, rtol=1e-9, atol=1e-9)
        solution = x.new_zeros(1, self.rows, self.dim)
        if len(self.times) > 1:
            solution, result, _ = exact.forward(x, parameters, self.times)
            assert result.status == interface.SUCCESS
        return parameters, solution, torch.randn_like(solution)

    def gradients(self, module, device, dtype, tensors=None, for_x=True, **options):
        """Those of x and the parameters, on the CPU, and what the call counted."""
        parameters, solution, grad = tensors or self.tensors()
        to = dict(device=device, dtype=dtype)
        x_grad, grads, result = self.solve(module, dtype, **options).continuous_gradient(
            solution.to(**to),
            [p.to(**to) for p in parameters],
            self.times,
            grad.to(**to),
            torch.empty(self.rows, 2, **to) if for_x else None,
            [i not in self.unwanted for i in range(len(parameters))],
            self.grid(),
            self.seminorm,
        )
        return [g if g is None else g.cpu() for g in (x_grad, *grads)], result


def counts(result):
    return result.nfe, result.accepted, result.rejected


def launches(case, result, device):
    """One; of several tiles with adaptive steps one for each attempt. And those for the weights."""
    *_, config = case.solve(gpu, f64)._configuration("continuous", device, case.rows)
    assert (case.rows > config.rows) == (case.rows == SEVERAL)
    of_weights = (2 if case.adaptive else 1) * (len(case.unwanted) < 2 * case.layers + 2)
    if not case.adaptive or case.rows <= config.rows:
        return 1 + of_weights
    attempts = result.accepted + result.rejected + len(case.times)
    more = math.ceil(max(attempts - host.FIRST_CHUNK, 0) / host.CHUNK)
    return host.FIRST_CHUNK + of_weights + more * (host.CHUNK + of_weights)


def check(case, device, dtype=f64, tensors=None, tolerance=1e-10, **options):
    """Counts as the CPU backend's; values to rounding, in float32 as exact as that one's."""
    tensors = tensors or case.tensors()
    ref, counted = case.gradients(cpu, "cpu", dtype, tensors, **options)
    got, result = case.gradients(gpu, device, dtype, tensors, **options)
    assert (counted.status, result.status) == (interface.SUCCESS, interface.SUCCESS)
    assert counts(result) == counts(counted)
    if not {"first_step", "max_num_steps"} & options.keys():
        assert result.launches == launches(case, result, device)
    exact = ref if dtype == f64 else case.gradients(cpu, "cpu", f64, tensors, **options)[0]
    for i, (g, r, e) in enumerate(zip(got, ref, exact, strict=True)):
        if r is None or r.numel() == 0:
            assert g is r or g.shape == r.shape
        elif dtype == f64:
            torch.testing.assert_close(g, r, rtol=0, atol=tolerance * float(r.abs().max()))
        else:
            assert_no_worse(g, r, e, f"gradient {i}")
    return got, result


# --- adaptive steps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(times=(0.0, 0.3, 1.0), rows=SEVERAL),
        Case(times=(-0.2, 0.1, 0.2, 0.8), backwards=True, activation="silu"),
        Case(times=(0.0, 0.6, 1.0), time_dependent=False, dim=5, hidden=20),
        Case(method="bosh3", times=(0.0, 0.5, 1.0)),
        Case(method="tsit5", rows=0),
    ],
    ids=str,
)
def test_adaptive_steps(case, device):
    check(case, device)


def test_rejected_steps(device):
    case = Case(gain=4.0, rows=10, times=(0.0, 0.4, 1.0), method="bosh3")
    _, result = check(case, device)
    assert result.rejected > 1


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2"])
def test_last_stage_away_from_the_solution(method, device):
    check(Case(method=method, times=(0.0, 0.3, 1.0)), device, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "case",
    [
        Case(layers=2, time_dependent=False, method="bosh3"),
        Case(times=(0.1, 0.5, 1.0), backwards=True, rows=SEVERAL, method="bosh3"),
    ],
    ids=str,
)
def test_values_of_given_steps(case, device):
    tensors = case.tensors()
    check(case, device, f64, tensors, tolerance=1e-13, **PINNED)
    check(case, device, f32, tensors, **PINNED)


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.3, "safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
        {"rtol": 1e-6, "atol": 1e-6, "min_step": 0.25},
        {"max_step": 0.2},
    ],
    ids=str,
)
def test_options(options, device):
    check(Case(method="bosh3", times=(0.0, 0.7, 1.0)), device, **options)


def test_step_of_the_float_dtype(device):
    case = Case(method="bosh3", times=(0.0, 0.3, 1.0))
    tensors = case.tensors()
    _, ref = case.gradients(cpu, "cpu", f32, tensors, float_time=True)
    _, got = case.gradients(gpu, device, f32, tensors, float_time=True)
    assert counts(got) == counts(ref)


@pytest.mark.parametrize("rows", [5, SEVERAL])
def test_checkpoints_that_find_no_place_at_first(rows, device, monkeypatch):
    case = Case(rows=rows, method="bosh3", times=(0.0, 0.3, 1.0))
    tensors = case.tensors()
    options = dict(rtol=3e-3, atol=3e-3)
    want, _ = case.gradients(cpu, "cpu", f64, tensors, **options)
    monkeypatch.setattr(gpu.Solve, "_capacity", lambda *_: 1)
    got, result = case.gradients(gpu, device, f64, tensors, **options)
    assert result.accepted > 4  # there is place for 1, 2 and 4 first
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10 * float(w.abs().max()))


# --- fixed steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(method="rk4", rows=SEVERAL, layers=2),
        Case(method="rk4", times=(-0.2, 0.1, 0.2, 0.8), backwards=True),
        Case(method="euler", times=(0.0, 0.5, 1.0), time_dependent=False),
        Case(method="midpoint", rows=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
def test_fixed_steps(case, dtype, device):
    check(case, device, dtype, tolerance=1e-13)


# --- what is wanted -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_parameters_that_are_not_wanted(method, device):
    case = Case(method=method, unwanted=(0, 3))
    got, _ = check(case, device, **PINNED)
    assert [g is None for g in got] == [False, True, False, False, True]


@pytest.mark.parametrize(("method", "rows"), [("bosh3", 5), ("bosh3", SEVERAL), ("rk4", 5)])
def test_gradient_of_x_alone(method, rows, device):
    # Without parameters all norms are one.
    case = Case(rows, (0.0, 0.3, 1.0), method=method, unwanted=(0, 1, 2, 3), seminorm=False)
    check(case, device)


def test_gradient_of_the_parameters_alone(device):
    case = Case(method="bosh3")
    got, _ = check(case, device, for_x=False, **PINNED)
    assert got[0] is None


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_only_the_first_time(method, device):
    case = Case(times=(0.5,), method=method)
    tensors = case.tensors()
    got, result = case.gradients(gpu, device, f64, tensors)
    assert counts(result) == (0, 0, 0)
    assert torch.equal(got[0], tensors[2][0, :, :2])
    assert not any(g.any() for g in got[1:])


def test_norm_that_includes_the_parameters(device):
    with pytest.raises(ValueError, match="norm includes the parameters"):
        Case(seminorm=False).gradients(gpu, device, f64)


@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_two_runs_are_equal(method, device):
    case = Case(SEVERAL, method=method)
    tensors = case.tensors()
    options = dict(rtol=0.1, atol=0.1)
    one, two = (case.gradients(gpu, device, f32, tensors, **options)[0] for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_goes_to_the_discrete_gradient(device):
    case = Case()
    parameters, _, _ = case.tensors()
    x, grad = torch.randn(5, 2, dtype=f64), torch.randn(2, 5, 3, dtype=f64)
    tight = case.solve(cpu, f64, rtol=1e-11, atol=1e-11)
    solution, _, kept = tight.forward(x, parameters, case.times, keep=True)
    x_grad, grads, _ = tight.discrete_gradient(kept, parameters, grad, x, wanted=True)
    want = torch.cat([g.flatten() for g in (x_grad, *grads)])
    errors = []
    for tolerance in (1e-2, 1e-4):
        got, _ = case.gradients(
            *(gpu, device, f64, (parameters, solution, grad)), rtol=tolerance, atol=tolerance
        )
        error = torch.cat([g.flatten() for g in got]) - want
        errors.append(float(error.abs().max() / want.abs().max()))
    assert errors[0] > 10 * errors[1]
    assert errors[1] < 1e-3


# --- failures -------------------------------------------------------------------------------------


def check_failure(case, device, status, tensors=None, **options):
    """The outcome is the CPU backend's."""
    tensors = tensors or case.tensors()
    _, ref = case.gradients(cpu, "cpu", f64, tensors, **options)
    _, got = case.gradients(gpu, device, f64, tensors, **options)
    assert (ref.status, got.status) == (status, status)
    assert counts(got) == counts(ref)
    assert got.t == pytest.approx(ref.t, abs=1e-12)
    return ref, got


@pytest.mark.parametrize("rows", [5, SEVERAL])
def test_max_num_steps_counts_each_interval(rows, device):
    case = Case(rows, (0.0, 0.5, 1.0), backwards=rows > 5, method="bosh3")
    tensors = case.tensors()
    options = dict(rtol=1e-2, atol=1e-2)
    _, enough = case.gradients(cpu, "cpu", f64, tensors, **options)
    most = enough.accepted + enough.rejected - 1
    check(case, device, f64, tensors, max_num_steps=most, **options)
    options["max_num_steps"] = 1
    ref, got = check_failure(case, device, interface.MAX_STEPS, tensors, **options)
    assert got.accepted + got.rejected == 1
    assert got.dt == pytest.approx(ref.dt, rel=1e-9)


def test_steps_that_underflow(device):
    case = Case(method="adaptive_heun", times=(0.0, 0.5, 1.0))
    ref, got = check_failure(case, device, interface.UNDERFLOW, rtol=0.0, atol=1e-40)
    assert got.dt == pytest.approx(ref.dt, rel=1e-9)


@pytest.mark.parametrize("output", [-1, 1])
@pytest.mark.parametrize(("method", "rows"), [("bosh3", 5), ("bosh3", SEVERAL), ("rk4", 5)])
def test_cotangent_that_is_not_finite(rows, method, output, device):
    case = Case(rows, (0.0, 0.5, 1.0), method=method, step_size=0.5)
    tensors = case.tensors()
    tensors[2][output, -1, 0] = math.nan
    if method == "rk4" and device.type == "cuda":
        got, _ = case.gradients(gpu, device, f64, tensors)
        assert got[0][-1].isnan().all()  # nobody waits to see whether it is finite
        return
    check_failure(case, device, interface.NON_FINITE_INPUT, tensors)


def test_field_that_is_not_finite(device):
    case = Case(activation="identity", times=(0.0, 0.5, 1.0), method="bosh3")
    tensors = case.tensors()
    tensors[0][0][0, 0] = math.inf
    check_failure(case, device, interface.NON_FINITE, tensors)
    case = dataclasses.replace(case, method="rk4")
    if device.type == "cpu":
        ref, got = check_failure(case, device, interface.NON_FINITE, tensors)
        assert got.output == ref.output == 1


def test_attempts_that_stay_not_finite(device):
    # y overflows wherever a step goes, though the field is finite where the steps begin.
    case = Case(activation="elu", method="adaptive_heun", dim=2)
    parameters, solution, grad = case.tensors()
    parameters[2] *= 1e300
    tensors = parameters, solution, grad
    check_failure(case, device, interface.NON_FINITE, tensors, first_step=0.1)
