"""Every gradient against finite differences, against each other and against torchdiffeq's."""

import functools
import math

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anode_fast import MLPField, odeint, odeint_adjoint
from anode_fast.problem import ADAPTIVE, FAMILIES, FIXED, IMPLICIT
from anode_fast.tableau import TABLEAUS

pytestmark = pytest.mark.usefixtures("own_code")

F64 = torch.float64
METHODS = {
    kind: [name for name, family in FAMILIES.items() if family == kind]
    for kind in (ADAPTIVE, FIXED, IMPLICIT)
}
ONE_STEP = sum(METHODS.values(), [])


def times(*values, **kwargs):
    return torch.tensor(values, dtype=F64, **kwargs)


UNIT = times(0.0, 1.0)
TOLERANT = dict(rtol=10.0, atol=10.0)  # accepts every step of our field


class Field(nn.Module):
    """A smooth field for real, complex and tuple states. Not holomorphic; may jump at a time."""

    def __init__(self, jump=math.inf):
        super().__init__()
        self.w = nn.Parameter(0.7 * torch.randn(2, 2, dtype=F64))
        self.b = nn.Parameter(torch.randn(2, dtype=F64))
        self.jump = jump
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        if isinstance(y, tuple):
            return self.slope(t, y[0]), y[1] * y[0].real.mean()
        return self.slope(t, y)

    def slope(self, t, y):
        size = (y * y.conj()).real
        value = y @ self.w.to(y.dtype) * torch.cos(t) + self.b - y / (1 + size)
        return torch.where(t < self.jump, value, 2 * value)


def a_state(dtype=F64):
    return torch.randn(3, 2, dtype=dtype)


def options_for(method, step=0.13, **more):
    """Fixed steps of this size, or freely chosen ones."""
    return more if FAMILIES[method] == ADAPTIVE else dict(step_size=step, **more)


def gradients(solve, field, y0, t, **kwargs):
    """Gradients of a fixed functional of the solution, by name."""
    y0 = tree_leaves_like(y0, lambda x: x.detach().clone().requires_grad_())
    t = t.detach().clone().requires_grad_()
    solution = solve(field, y0, t, **kwargs)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for part in tree_leaves(solution):
        cotangent = torch.randn(part.shape, dtype=part.dtype, generator=generator)
        loss = loss + (part * cotangent).sum().real
    named = {f"y0[{i}]": x for i, x in enumerate(tree_leaves(y0))}
    named |= {"t": t, **dict(field.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def tree_leaves_like(y0, change):
    return tuple(map(change, y0)) if isinstance(y0, tuple) else change(y0)


def assert_same(got, want, rtol, atol=None):
    for name in want:
        torch.testing.assert_close(
            got[name],
            want[name],
            rtol=rtol,
            atol=rtol if atol is None else atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )


# --- autograd against finite differences ----------------------------------------------------------

FIXED_VARIANTS = {
    "output times": dict(),
    "step_size, times off the grid": dict(step_size=0.3),
    "linear": dict(step_size=0.3, interp="linear"),
    "perturb": dict(step_size=0.3, perturb=True),
    "jump_t": dict(step_size=0.3, jump_t=times(0.45)),
}
ADAPTIVE_VARIANTS = {"first_step": dict(), "step_t": dict(step_t=times(0.4)), "jump_t": dict()}
ADAPTIVE_VARIANTS["jump_t"]["jump_t"] = times(0.45)
FINITE_DIFFERENCES = [
    *((m, v, o) for m in METHODS[FIXED] for v, o in FIXED_VARIANTS.items()),
    *((m, v, o) for m in METHODS[ADAPTIVE] for v, o in ADAPTIVE_VARIANTS.items()),
    *(("explicit_adams", v, dict(o, **{"step_size": 0.12})) for v, o in FIXED_VARIANTS.items()),
    *((m, "step_size", dict(step_size=0.3)) for m in METHODS[IMPLICIT]),
]


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(m, o) for m, _, o in FINITE_DIFFERENCES],
    ids=[f"{m}, {v}" for m, v, _ in FINITE_DIFFERENCES],
)
def test_autograd_is_the_derivative(method, options, sign):
    tolerances = dict(rtol=1e-12, atol=1e-12)
    options = dict(options)
    if FAMILIES[method] == ADAPTIVE:
        # Step sizes are constants of the gradient: make them constant.
        tolerances = TOLERANT
        options |= dict(first_step=0.25, max_step=0.25)
    jump = 0.45 if "jump_t" in options else math.inf
    options |= {k: sign * options[k] for k in ("jump_t", "step_t") if k in options}
    forwards = Field(jump)

    def solve(y0, t, *params):
        def field(t, y):  # the same solution in either direction of time
            return sign * forwards(sign * t, y)

        return odeint(field, y0, t, method=method, options=options, **tolerances)

    y0, t = a_state()[:1].requires_grad_(), (sign * times(0.0, 0.35, 1.0)).requires_grad_()
    assert gradcheck(solve, (y0, t, *forwards.parameters()))


# --- discrete: the gradient of the computed solution ----------------------------------------------

DISCRETE_CASES = {
    "tensor": (a_state, times(0.0, 0.31, 1.0), {}),
    "tuple": (lambda: (a_state(), torch.randn(4, dtype=F64)), times(0.0, 0.31, 1.0), {}),
    "complex": (lambda: a_state(torch.complex128), times(0.0, 0.31, 1.0), {}),
    "mixed tuple": (
        lambda: (a_state(torch.complex128), torch.randn(4, dtype=F64)),
        times(0.0, 1.0),
        {},
    ),
    "many output times": (a_state, torch.linspace(0.0, 1.0, 40, dtype=F64), {}),
    "descending": (a_state, times(0.5, 0.31, 0.0), {}),
    "jump_t": (a_state, times(0.0, 0.31, 1.0), dict(jump_t=times(0.45))),
    "jump at the start": (a_state, times(0.45, 0.6, 1.0), dict(jump_t=times(0.45))),
}


@pytest.mark.parametrize("case", DISCRETE_CASES)
@pytest.mark.parametrize("method", ONE_STEP)
def test_discrete_is_the_gradient_of_autograd(method, case):
    make_state, t, options = DISCRETE_CASES[case]
    y0, field = make_state(), Field(jump=0.45 if options else math.inf)
    kwargs = dict(method=method, rtol=1e-4, atol=1e-4, options=options_for(method, **options))
    got, want = (
        gradients(functools.partial(odeint, gradient=kind), field, y0, t, **kwargs)
        for kind in ("discrete", "autograd")
    )
    assert_same(got, want, rtol=1e-12)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_a_single_output_time_hands_the_gradient_through(method, interface, gradient):
    y0, field = a_state().requires_grad_(), Field()
    solution = interface(field, y0, times(0.3), method=method, gradient=gradient)
    cotangent = torch.randn(1, 3, 2, dtype=F64)
    got = torch.autograd.grad(solution, (y0, *field.parameters()), cotangent, allow_unused=True)
    assert torch.equal(got[0], cotangent[0])
    assert all(g is None or not g.any() for g in got[1:])


# --- which tensors get a gradient -----------------------------------------------------------------

EVERY_GRADIENT = pytest.mark.parametrize("gradient", ["autograd", "discrete", "continuous"])


def end(field, y0=None, gradient="autograd", **kwargs):
    y0 = times(1.0, -2.0) if y0 is None else y0
    return odeint(field, y0, UNIT, gradient=gradient, **kwargs)[-1].sum()


def closure(w):
    return (lambda t, y: -w.exp() * y), w


def derived_closure(w):
    made = w.exp()
    return (lambda t, y: -made * y), w


def both_closure(w):
    made = w.exp()
    return (lambda t, y: -(made + w) * y), w


def made_twice(w):
    made = w.exp()
    again = made.sin()
    return (lambda t, y: -(made + again + w) * y), w


def hidden_closure(w):
    held = {"w": [w.exp()]}
    return (lambda t, y: -held["w"][0] * y), w


def hidden_and_seen(w):
    held, made = [w], w.exp()
    return (lambda t, y: -(held[0] + made) * y), w


def half_of_an_unbind(w):
    both = torch.stack([w, 2 * w])
    one, *other = both.unbind()
    return (lambda t, y: -(one + other[0]) * y), w


def bound_argument(w):
    return functools.partial(lambda t, y, w: -w.exp() * y, w=w), w


class Holder(nn.Module):
    """A field that holds a tensor made by its own encoder."""

    def __init__(self, w):
        super().__init__()
        self.encoder = nn.Linear(1, 1, bias=False, dtype=F64)
        self.encoder.weight = nn.Parameter(w.detach().reshape(1, 1))
        self.code = self.encoder(times(1.0)).exp()

    def forward(self, t, y):
        return -self.code * y

    def direct(self, t, y):
        return -(self.code + self.encoder.weight[0]) * y


def encoder_attribute(w):
    holder = Holder(w)
    return holder, holder.encoder.weight


def encoder_method(w):
    holder = Holder(w)
    return holder.direct, holder.encoder.weight


HOLDERS = [closure, derived_closure, both_closure, made_twice, hidden_closure, hidden_and_seen]
HOLDERS += [half_of_an_unbind, bound_argument, encoder_attribute, encoder_method]


@EVERY_GRADIENT
@pytest.mark.parametrize("hold", HOLDERS, ids=lambda hold: hold.__name__)
def test_tensors_are_found_wherever_the_field_holds_them(hold, gradient):
    w = times(0.3, requires_grad=True)

    def gradient_of(kind):
        field, source = hold(w)
        (grad,) = torch.autograd.grad(end(field, gradient=kind, rtol=1e-9), source)
        return grad

    tolerance = 1e-6 if gradient == "continuous" else 1e-12
    torch.testing.assert_close(
        gradient_of(gradient), gradient_of("autograd"), rtol=tolerance, atol=0.0
    )


def test_scipy_finds_what_a_closure_hides():
    held = [times(0.3, requires_grad=True)]
    kwargs = dict(method="scipy_solver", gradient="continuous")
    end(lambda t, y: -held[0] * y, **kwargs).backward()
    exact = math.exp(-0.3)  # d/dw (1 - 2) exp(-w)
    torch.testing.assert_close(held[0].grad, times(exact), rtol=1e-5, atol=0.0)


@EVERY_GRADIENT
def test_state_without_grad(gradient):
    field, y0 = Field(), a_state()
    want = torch.autograd.grad(end(field, y0), list(field.parameters()))
    got = torch.autograd.grad(end(field, y0, gradient), list(field.parameters()))
    tolerance = 1e-5 if gradient == "continuous" else 1e-12
    assert_same(dict(enumerate(got)), dict(enumerate(want)), tolerance)
    assert y0.grad is None and not y0.requires_grad


@EVERY_GRADIENT
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_frozen_and_unused_parameters(gradient, interface):
    field = Field()
    field.w.requires_grad_(False)
    field.unused = nn.Parameter(times(1.0))
    interface(field, a_state(), UNIT, gradient=gradient)[-1].sum().backward()
    assert field.w.grad is None
    assert field.b.grad.abs().sum() > 0
    assert field.unused.grad is None or not field.unused.grad.any()


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_nothing_to_differentiate_gives_a_plain_tensor(gradient):
    field = Field().requires_grad_(False)
    assert not end(field, a_state(), gradient).requires_grad

    def hamiltonian(t, y):  # differentiates inside
        return -torch.autograd.grad((y**2).sum(), y, create_graph=True)[0]

    assert not end(hamiltonian, a_state(), gradient).requires_grad


@EVERY_GRADIENT
def test_two_backward_passes_with_retain_graph(gradient):
    field = Field()
    loss = end(field, a_state(), gradient)
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in field.parameters()]
    loss.backward()
    for once, twice in zip(first, (x.grad for x in field.parameters()), strict=True):
        assert torch.equal(twice, 2 * once)


@EVERY_GRADIENT
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_gradients_are_bitwise_reproducible(method, gradient):
    torch.manual_seed(0)
    field, y0 = Field(), a_state()
    solve = functools.partial(odeint, gradient=gradient)
    kwargs = dict(method=method, options=options_for(method))
    runs = [gradients(solve, field, y0, times(0.0, 0.4, 1.0), **kwargs) for _ in "ab"]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


ADJOINT_PARAMS = {
    "one tensor": lambda w, b: w,
    "tuple": lambda w, b: (w, b),
    "list": lambda w, b: [w, b],
    "generator": lambda w, b: (x for x in (w, b)),
    "none": lambda w, b: (),
}


@pytest.mark.parametrize("form", ADJOINT_PARAMS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_adjoint_params(method, form):
    w, b, y0 = (torch.randn(2, dtype=F64, requires_grad=True) for _ in "abc")
    params = ADJOINT_PARAMS[form](w, b)
    asked = {"one tensor": 1, "none": 0}.get(form, 2)
    solution = odeint_adjoint(
        lambda t, y: w * y + b,
        y0,
        UNIT,
        method=method,
        options=options_for(method),
        adjoint_params=params,
    )
    solution[-1].sum().backward()
    assert y0.grad.abs().sum() > 0
    want = torch.autograd.grad(
        odeint(lambda t, y: w * y + b, y0, UNIT, method=method, options=options_for(method))[-1],
        (w, b),
        torch.ones_like(y0),
    )
    for i, x in enumerate((w, b)):
        if i < asked:
            torch.testing.assert_close(x.grad, want[i], rtol=1e-5, atol=0.0)
        else:
            assert x.grad is None


def test_one_adjoint_param_made_of_another_counts_once():
    w = times(0.3, requires_grad=True)
    made = w.exp()
    solution = odeint_adjoint(
        lambda t, y: -(w + made) * y, times(1.0), UNIT, adjoint_params=(w, made)
    )
    solution[-1].backward()
    rate = 0.3 + math.exp(0.3)
    exact = -(1 + math.exp(0.3)) * math.exp(-rate)
    torch.testing.assert_close(w.grad, times(exact), rtol=1e-5, atol=0.0)


def test_a_plain_function_needs_adjoint_params():
    with pytest.raises(ValueError, match="adjoint_params"):
        odeint_adjoint(lambda t, y: -y, times(1.0), UNIT)


# --- memory ---------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the storages made inside that something still holds, and their peak."""

    def __init__(self):
        super().__init__()
        self.refs, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.refs[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self):
        self.refs = {ref: size for ref, size in self.refs.items() if not ref.expired()}
        return sum(self.refs.values())


STATE_BYTES = 64 * 8


def memory(interface, method, steps, **kwargs):
    """Bytes kept after forward, the peak during backward above them, bytes kept after backward."""
    field = Field()
    y0 = torch.randn(32, 2, dtype=F64, requires_grad=True)
    size = dict(first_step=1 / steps, max_step=1 / steps)
    options = size if FAMILIES[method] == ADAPTIVE else dict(step_size=1 / steps)
    with Live() as live:
        solution = interface(field, y0, UNIT, method=method, options=options, **TOLERANT, **kwargs)
        kept = live.bytes()
        live.peak = 0
        solution[-1].sum().backward()
        peak = live.peak
        y0.grad = field.w.grad = field.b.grad = None
        return kept, peak - kept, live.bytes()


@pytest.mark.parametrize(("method", "states"), [("rk4", 1), ("gl4", 1), ("dopri5", 2)])
def test_discrete_keeps_the_states_of_the_steps(method, states):
    """One state per step, and its derivative where the method hands it on."""
    few, many = (memory(odeint, method, n, gradient="discrete") for n in (8, 32))
    assert many[0] - few[0] == 24 * states * STATE_BYTES
    assert many[1] <= few[1] + 2 * STATE_BYTES  # the graph of one step at a time


def test_the_measure_of_memory_sees_autograds_graph():
    few, many = (memory(odeint, "rk4", n) for n in (8, 32))
    assert many[0] - few[0] > 24 * 4 * STATE_BYTES  # a state at each stage, at least


@pytest.mark.parametrize("method", ["rk4", "dopri5", "explicit_adams"])
def test_the_adjoint_keeps_nothing_of_the_steps(method):
    # Both more than the slopes before that an Adams method holds.
    few, many = (memory(odeint_adjoint, method, n) for n in (16, 64))
    assert many[0] == few[0]
    assert many[2] == few[2]
    if method != "rk4":  # which solves once more, and holds those states during backward
        assert many[1] <= few[1] + 8 * STATE_BYTES


def test_saved_tensors_hooks_see_what_the_adjoint_saves():
    def saved(steps):
        packed = []
        field, y0 = Field(), a_state().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
            odeint_adjoint(field, y0, UNIT, method="rk4", options=dict(step_size=1 / steps))
        return sum(x.numel() for x in packed)

    assert 0 < saved(40) == saved(10)


# --- the field is the same in the backward pass ---------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=F64)

    def forward(self, t, y):
        return -self.norm(y)

    def as_method(self, t, y):
        return self(t, y)


FORMS = {
    "module": lambda m: m,
    "closure": lambda m: lambda t, y: m(t, y),
    "method": lambda m: m.as_method,
    "partial": lambda m: functools.partial(lambda t, y, m: m(t, y), m=m),
    "part in training": lambda m: m.train(False).norm.train() and m,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_backward_leaves_batchnorm_statistics(gradient, form):
    module = Normed()
    field = FORMS[form](module)
    y0 = torch.randn(8, 2, dtype=F64, requires_grad=True)
    kwargs = dict(method="rk4", options=dict(step_size=0.25))
    solution = odeint(field, y0, UNIT, gradient=gradient, **kwargs)
    before = {name: x.clone() for name, x in module.named_buffers()}
    assert before["norm.num_batches_tracked"] == 16
    solution.sum().backward(retain_graph=True)
    torch.autograd.grad(solution.sum(), y0, create_graph=True)
    for name, x in module.named_buffers():
        assert torch.equal(x, before[name]), name


def test_backward_spares_graphs_that_hold_the_statistics():
    module, y0 = Normed(), torch.randn(8, 2, dtype=F64, requires_grad=True)
    kwargs = dict(method="rk4", options=dict(step_size=0.5))
    plain = odeint(module, y0, UNIT, **kwargs)
    other = odeint(module, y0, UNIT, gradient="discrete", **kwargs)
    other.sum().backward()
    plain.sum().backward()  # would raise had the buffers' versions moved


# --- continuous: the adjoint ODE ------------------------------------------------------------------


def worst(got, want):
    """Largest error relative to the largest entry of its tensor."""
    return max(float((got[k] - want[k]).abs().max() / want[k].abs().max()) for k in want)


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
def test_gradients_approach_the_true_ones_as_tolerances_tighten(method, gradient):
    field, y0, t = Field(), a_state(), times(0.0, 0.4, 1.0)
    solve = functools.partial(odeint, gradient="autograd", rtol=1e-12, atol=1e-13)
    exact = gradients(solve, field, y0, t)
    if gradient == "discrete":
        del exact["t"]  # the derivative of the interpolant: an order less
    errors = []
    for tol in (1e-3, 1e-6, 1e-9):
        solve = functools.partial(odeint, gradient=gradient, method=method, rtol=tol, atol=tol)
        errors.append(worst(gradients(solve, field, y0, t), exact))
    # dopri8's interpolant, of order 4, gains least.
    assert errors[2] < errors[1] / 3 < errors[0] / 9 and errors[2] < errors[0] / 100, errors


ADJOINT_ARGUMENTS = {
    "defaults": {},
    "tolerances": dict(adjoint_rtol=1e-4, adjoint_atol=1e-5),
    "method": dict(adjoint_method="bosh3", adjoint_rtol=1e-5, adjoint_atol=1e-5),
    "fixed steps": dict(adjoint_method="rk4", adjoint_options=dict(step_size=0.05)),
    "seminorm": dict(adjoint_options=dict(norm="seminorm")),
    "own norm": dict(adjoint_options=dict(norm=lambda parts: parts[2].abs().max())),
    "options": dict(adjoint_options=dict(first_step=0.01, max_step=0.1)),
}


@pytest.mark.parametrize("form", ["tensor", "tuple", "descending"])
@pytest.mark.parametrize("name", ADJOINT_ARGUMENTS)
def test_the_adjoint_arguments_mean_what_torchdiffeq_means(name, form):
    """With two output times the backward solves are the same, evaluation by evaluation."""
    field = Field()
    y0 = (a_state(), torch.randn(4, dtype=F64)) if form == "tuple" else a_state()
    t = times(0.5, 0.0) if form == "descending" else UNIT
    results = []
    for interface in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        field.calls = 0
        # The forward solve's calls too: both are the same.
        grads = gradients(interface, field, y0, t, rtol=1e-6, atol=1e-6, **ADJOINT_ARGUMENTS[name])
        results.append((grads, field.calls))
    assert results[0][1] == results[1][1]
    assert_same(results[0][0], results[1][0], rtol=1e-10)


def test_seminorm_is_cheaper_and_right():
    field, y0 = Field(), a_state()
    kwargs = dict(rtol=1e-8, atol=1e-8)
    want = gradients(functools.partial(odeint, gradient="discrete"), field, y0, UNIT, **kwargs)
    calls = {}
    for norm in (None, "seminorm"):
        field.calls = 0
        solve = functools.partial(odeint_adjoint, adjoint_options=dict(norm=norm) if norm else {})
        assert worst(gradients(solve, field, y0, UNIT, **kwargs), want) < 1e-6
        calls[norm] = field.calls
    assert calls["seminorm"] < calls[None]


class Watched(Field):
    """Notes its callbacks' names and times."""

    def __init__(self):
        super().__init__()
        self.log = []
        for kind in ("step", "accept_step", "reject_step"):
            for suffix in ("", "_adjoint"):
                name = f"callback_{kind}{suffix}"
                setattr(self, name, functools.partial(self.note, name))

    def note(self, name, t, y, dt):
        self.log.append((name, float(t), float(dt), type(y)))


@pytest.mark.parametrize("t", [UNIT, times(0.5, 0.0)], ids=["ascending", "descending"])
def test_adjoint_callbacks_get_the_users_time(t):
    field = Watched()
    gradients(odeint_adjoint, field, a_state(), t, rtol=1e-5, atol=1e-5)
    forward = [x for x in field.log if not x[0].endswith("adjoint")]
    backward = [x for x in field.log if x[0].endswith("adjoint")]
    assert {x[0] for x in backward} >= {"callback_step_adjoint", "callback_accept_step_adjoint"}
    direction = 1 if t[1] > t[0] else -1
    for log, (start, stop), sign in ((forward, t, direction), (backward, t.flip(0), -direction)):
        accepted = [x for x in log if "accept" in x[0]]
        moments = [x[1] for x in accepted]
        assert moments[0] == start and sign * moments[-1] < sign * stop
        # dt is a size; the next step starts where this one ended.
        for (_, at, dt, _), following in zip(accepted, moments[1:], strict=False):
            assert dt > 0 and math.isclose(at + sign * dt, following, abs_tol=1e-14)
    assert all(x[3] is tuple for x in backward) and all(x[3] is torch.Tensor for x in forward)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("jump", [math.inf, 0.45], ids=["smooth", "jump"])
@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
def test_backward_work_grows_with_the_solve_not_with_the_outputs(method, jump, sign):
    tol, forwards, y0 = 1e-5, Field(jump), a_state()
    options = {} if jump == math.inf else dict(jump_t=times(sign * jump))

    def run(n, gradient, tol, method=method):
        y, t = y0.clone().requires_grad_(), torch.linspace(0.0, 1.0, n, dtype=F64)
        solution, stats = odeint(
            lambda t, y: sign * forwards(sign * t, y),
            y,
            sign * t,
            gradient=gradient,
            method=method,
            rtol=tol,
            atol=tol,
            options=options,
            return_stats=True,
        )
        loss = (torch.cos(7 * t) * solution.sum((1, 2))).sum() / n
        names = ("y0", "w", "b")
        grads = torch.autograd.grad(loss, (y, forwards.w, forwards.b))
        return dict(zip(names, grads, strict=True)), stats

    exact = {n: run(n, "autograd", 1e-12, "dopri5")[0] for n in (2, 1001)}
    two, many = (run(n, "continuous", tol) for n in (2, 1001))
    # Two pieces for each forward step, each of which costs one step more at most.
    a_step = TABLEAUS[method].stages
    allowed = two[1].nfe_backward + 2 * a_step * many[1].accepted
    assert many[1].nfe_backward <= allowed < 1000
    # As near as the exact derivative of the solution that was computed.
    autograd = worst(run(1001, "autograd", tol)[0], exact[1001])
    assert worst(many[0], exact[1001]) < 3 * autograd + 10 * tol
    assert worst(two[0], exact[2]) < 100 * tol


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True], ids=["first", "second derivative"])
@pytest.mark.parametrize("times_n", [1, 2, 7])
@pytest.mark.parametrize(
    ("interface", "method", "gradient"),
    [
        (odeint, "rk4", "discrete"),
        (odeint, "dopri5", "discrete"),
        (odeint, "dopri5", "continuous"),
        (odeint, "explicit_adams", "continuous"),
        (odeint_adjoint, "rk4", "auto"),
        (odeint_adjoint, "dopri5", "auto"),
        (odeint_adjoint, "scipy_solver", "auto"),
    ],
)
def test_stats_count_both_passes(interface, method, gradient, times_n, second):
    field, y0 = Field(), a_state().requires_grad_()
    t = torch.linspace(0.0, 1.0, times_n, dtype=F64, requires_grad=True)
    options = {} if method == "scipy_solver" else options_for(method)
    solution, stats = interface(
        field, y0, t, method=method, gradient=gradient, options=options, return_stats=True
    )
    assert stats.nfe == field.calls and stats.nfe_backward == 0
    if second and method == "scipy_solver":
        pytest.skip("no graph goes through SciPy")
    torch.autograd.grad(solution.sum(), y0, create_graph=second)
    assert stats.nfe_backward == field.calls - stats.nfe
    assert (stats.nfe_backward > 0) == (times_n > 1)


# --- second derivatives ---------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["autograd", "discrete", "continuous"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_second_derivatives(method, gradient):
    field = Field()
    options = dict(step_size=0.3) if method == "rk4" else dict(first_step=0.25, max_step=0.25)

    def solve(y0, t, *params):
        return odeint(field, y0, t, method=method, gradient=gradient, options=options, **TOLERANT)

    y0, t = a_state()[:1].requires_grad_(), times(0.0, 0.35, 1.0, requires_grad=True)
    assert gradgradcheck(solve, (y0, t, *field.parameters()))


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_create_graph_where_the_state_is_made_of_a_parameter(gradient):
    field = MLPField(3, 5, activation="tanh").double()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = []
    for kind in ("autograd", gradient):
        y0 = torch.ones(4, 3, dtype=torch.float64) * field.layers[0].weight.mean()
        given = dict(rtol=1e-9, atol=1e-9, gradient=kind, backend="reference")
        loss = odeint(field, y0, t, **given)[-1].square().sum()
        found.append(torch.autograd.grad(loss, list(field.parameters()), create_graph=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)
