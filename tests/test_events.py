"""Events: times and states against analytic solutions, their gradients, parity with torchdiffeq."""

import math

import pytest
import torch
import torchdiffeq
from torch import nn

from anode_fast import odeint, odeint_adjoint, odeint_event
from anode_fast.errors import EventNotFound
from anode_fast.problem import DEFAULT_MAX_STEPS_TO_EVENT
from anode_fast.reference import MAX_GRID_STEPS_TO_EVENT

pytestmark = pytest.mark.usefixtures("own_code")

F64 = torch.float64
START = torch.tensor(0.0, dtype=F64)
HEIGHT, SPEED, GRAVITY = 2.0, 1.5, 9.81
LANDING = (SPEED + math.sqrt(SPEED**2 + 2 * GRAVITY * HEIGHT)) / GRAVITY
"""Of h'' = -g from height 2, upwards at 1.5."""


class Ball(nn.Module):
    """A ball in the air, state (height, speed); it lands on a floor."""

    def __init__(self):
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(GRAVITY, dtype=F64))
        self.floor = nn.Parameter(torch.tensor(0.0, dtype=F64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        if isinstance(y, tuple):
            return y[1].expand_as(y[0]), -self.gravity * torch.ones_like(y[1])
        return torch.stack([y[1], -self.gravity.expand(())])

    def hit(self, t, y):
        return y[0] - self.floor


def thrown(**kwargs):
    return torch.tensor([HEIGHT, SPEED], dtype=F64, **kwargs)


INTERFACES = {
    "autograd": (odeint, {}),
    "discrete": (odeint, dict(gradient="discrete")),
    "continuous": (odeint, dict(gradient="continuous")),
    "odeint_adjoint": (odeint_adjoint, {}),
}
EVERY_INTERFACE = pytest.mark.parametrize("interface", INTERFACES)
# The parabola is exact in every method of order 2, and so is its interpolant.
METHODS = {
    "dopri5": {},
    "tsit5": {},
    "rk4": dict(step_size=0.1),
    "midpoint": dict(step_size=0.1),
    "explicit_adams": dict(step_size=0.05),
    "gl4": dict(step_size=0.1),
}


def find(y0, t0=START, interface="autograd", ball=None, event_fn=None, method="dopri5", **kwargs):
    ball = ball or Ball()
    solve, more = INTERFACES[interface]
    return odeint_event(
        ball,
        y0,
        t0,
        event_fn=event_fn or ball.hit,
        odeint_interface=solve,
        method=method,
        options=METHODS[method],
        atol=1e-10,
        **more,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("method", "interface"),
    [(m, i) for m in METHODS for i in INTERFACES if (m, i) != ("explicit_adams", "discrete")],
)
def test_landing(method, interface):
    t, states = find(thrown(), interface=interface, method=method)
    near = dict(rtol=0.0, atol=1e-8)
    torch.testing.assert_close(t.detach(), torch.tensor(LANDING, dtype=F64), **near)
    speed = SPEED - GRAVITY * LANDING
    end = torch.tensor([0.0, speed], dtype=F64)
    torch.testing.assert_close(states.detach(), torch.stack([thrown(), end]), **near)


@pytest.mark.parametrize("method", METHODS)
def test_backwards_in_time(method):
    """From the landing back to where the ball last had the height of the floor: its throw."""
    landing = torch.tensor([0.0, -5.0], dtype=F64)
    with torch.no_grad():
        t, states = find(
            landing, reverse_time=True, method=method, event_fn=lambda t, y: y[0] + t + 0.1
        )
    # h(t) = -5 t - g t^2 / 2, and h + t + 0.1 = 0.
    exact = (-4 - math.sqrt(16 + 0.2 * GRAVITY)) / GRAVITY
    torch.testing.assert_close(t, torch.tensor(exact, dtype=F64), rtol=0.0, atol=1e-8)
    height = torch.tensor(-exact - 0.1, dtype=F64)
    torch.testing.assert_close(states[1, 0], height, rtol=0.0, atol=1e-8)


def test_tuple_state():
    y0 = (torch.tensor([HEIGHT], dtype=F64), torch.tensor(SPEED, dtype=F64))
    t, (height, speed) = find(y0)
    torch.testing.assert_close(t.item(), LANDING, rtol=0.0, atol=1e-8)
    assert height.shape == (2, 1) and speed.shape == (2,)
    assert height[0] == HEIGHT and abs(height[1]) < 1e-8


def test_bouncing():
    """Five bounces that halve the speed, each found from where the last one ended."""
    ball, t, y, bounces = Ball(), START, thrown(requires_grad=True), []
    for _ in range(5):
        t, states = find(y, t, ball=ball)
        bounces.append(t)
        # Off the floor by more than rounding, or the start itself is the next event.
        y = torch.stack([torch.full_like(states[1, 0], 1e-9), -0.5 * states[1, 1]])
    impact = math.sqrt(SPEED**2 + 2 * GRAVITY * HEIGHT)
    exact = LANDING + sum(2 * impact / 2**k / GRAVITY for k in range(1, 5))
    torch.testing.assert_close(bounces[-1].item(), exact, rtol=0.0, atol=1e-7)
    ball.zero_grad()
    bounces[-1].backward()
    # d/dg: LANDING + 2 impact / g * (1/2 + 1/4 + 1/8 + 1/16)
    share = 2 * (1 - 1 / 16)
    by_impact = HEIGHT / impact
    exact = (by_impact - LANDING) / GRAVITY + share * (by_impact / GRAVITY - impact / GRAVITY**2)
    torch.testing.assert_close(ball.gravity.grad.item(), exact, rtol=1e-6, atol=0.0)


def test_an_event_at_the_start_ends_the_solve_there():
    on_the_floor = torch.tensor([0.0, SPEED], dtype=F64)
    t, states = find(on_the_floor)
    assert t == 0 and torch.equal(states, torch.stack([on_the_floor, on_the_floor]))


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_of_several_events_counts(first):
    walls = [0.5, -0.5] if first else [-0.5, 0.5]

    def events(t, y):
        return torch.stack([y[0] - walls[0], walls[1] - y[0]])

    # The ball at height 0, on its way down: -0.5 comes first, 0.5 never.
    t, states = find(torch.tensor([0.0, -1.0], dtype=F64), event_fn=events)
    exact = (-1 + math.sqrt(1 + GRAVITY)) / GRAVITY
    torch.testing.assert_close(t.item(), exact, rtol=0.0, atol=1e-8)
    torch.testing.assert_close(states[1, 0].item(), -0.5, rtol=0.0, atol=1e-8)


def test_events_of_time_alone():
    t, states = find(thrown(), event_fn=lambda t, y: t - 0.25)
    torch.testing.assert_close(t.item(), 0.25, rtol=0.0, atol=1e-9)
    height = HEIGHT + SPEED / 4 - GRAVITY / 32
    torch.testing.assert_close(states[1, 0].item(), height, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("reverse", [False, True])
def test_fixed_steps_honour_jumps_on_the_way(reverse):
    sign = -1.0 if reverse else 1.0
    jump = torch.tensor([sign * 0.33], dtype=F64)

    def field(t, y):
        return sign * torch.where(sign * t < 0.33, -torch.ones_like(y), -2 * torch.ones_like(y))

    t, _ = odeint_event(
        field,
        torch.ones(1, dtype=F64),
        START,
        event_fn=lambda t, y: y,
        reverse_time=reverse,
        method="rk4",
        options=dict(step_size=0.1, jump_t=jump),
    )
    torch.testing.assert_close(t.item(), sign * (0.33 + 0.67 / 2), rtol=0.0, atol=1e-8)


# --- gradients ------------------------------------------------------------------------------------


@EVERY_INTERFACE
@pytest.mark.parametrize("tuple_state", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_time_and_state(method, tuple_state, interface):
    """Against those of the analytic landing time and speed, with respect to all they depend on."""
    ball = Ball()
    height, speed = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (HEIGHT, SPEED))
    start = torch.tensor(0.7, dtype=F64, requires_grad=True)
    inputs = [height, speed, start, ball.gravity, ball.floor]
    # On the continuous path the floor, which only event_fn sees, is found all the same.
    y0 = (height, speed) if tuple_state else torch.stack([height, speed])
    t, states = find(y0, start, interface, ball, method=method)
    impact = states[1][1] if tuple_state else states[1, 1]

    fall = (speed**2 + 2 * ball.gravity * (height - ball.floor)).sqrt()
    exact = [start + (speed + fall) / ball.gravity, -fall]
    for got, want in zip((t, impact), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=1e-8)
        grads = torch.autograd.grad(got, inputs, retain_graph=True, allow_unused=True)
        wants = torch.autograd.grad(want, inputs, retain_graph=True, allow_unused=True)
        for x, y in zip(grads, wants, strict=True):
            zero = torch.zeros((), dtype=F64)
            torch.testing.assert_close(
                zero if x is None else x, zero if y is None else y, rtol=1e-6, atol=1e-7
            )


@EVERY_INTERFACE
def test_the_state_at_the_event_moves_along_the_event(interface):
    """The height at the landing is the floor's, whatever else moves."""
    ball, y0 = Ball(), thrown(requires_grad=True)
    _, states = find(y0, interface=interface, ball=ball)
    grads = torch.autograd.grad(states[1, 0], (y0, ball.gravity, ball.floor))
    for got, want in zip(grads, ([0.0, 0.0], 0.0, 1.0), strict=True):
        torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=0.0, atol=1e-7)


@EVERY_INTERFACE
def test_an_event_that_depends_on_time_too(interface):
    """The ball hits a platform that rises at a speed of its own."""
    ball, y0 = Ball(), thrown(requires_grad=True)
    rise = torch.tensor(0.8, dtype=F64, requires_grad=True)
    t, _ = find(y0, interface=interface, ball=ball, event_fn=lambda t, y: y[0] - rise * t)
    speed = y0[1] - rise
    exact = (speed + (speed**2 + 2 * ball.gravity * y0[0]).sqrt()) / ball.gravity
    torch.testing.assert_close(t, exact, rtol=0.0, atol=1e-8)
    inputs = (y0, rise, ball.gravity)
    wants = torch.autograd.grad(exact, inputs)
    for got, want in zip(torch.autograd.grad(t, inputs), wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)


@EVERY_INTERFACE
def test_odeint_itself_takes_the_events_time_as_given(interface):
    """The state there moves with t[0]; t[1], which only tells the direction, moves nothing."""
    ball, t = Ball(), torch.tensor([0.7, 1.7], dtype=F64, requires_grad=True)
    solve, more = INTERFACES[interface]
    _, states = solve(ball, thrown(), t, event_fn=ball.hit, atol=1e-10, **more)
    (grad,) = torch.autograd.grad(states[1, 0], t)
    impact = math.sqrt(SPEED**2 + 2 * GRAVITY * HEIGHT)
    want = torch.tensor([impact, 0.0], dtype=F64)
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-12)


def test_no_grad_gives_no_graph():
    with torch.no_grad():
        t, states = find(thrown(requires_grad=True))
    assert not t.requires_grad and not states.requires_grad


def test_stats_come_along():
    ball = Ball()
    (t, _), stats = find(thrown(), ball=ball, interface="discrete", return_stats=True)
    assert stats.nfe <= ball.calls <= stats.nfe + 1  # one for the gradient's link to the time
    t.backward()
    assert stats.nfe_backward > 0


# --- no event -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "calls"),
    [
        ("dopri5", {}, 6 * DEFAULT_MAX_STEPS_TO_EVENT + 4),
        ("dopri5", dict(max_num_steps=20), 6 * 20 + 2),
        ("rk4", dict(step_size=0.1), 4 * MAX_GRID_STEPS_TO_EVENT + 1),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_an_event_that_never_comes(method, options, calls, reverse):
    made = [0]

    def oscillator(t, y):  # |y| stays below 2
        made[0] += 1
        return torch.stack([y[1], -y[0]])

    with pytest.raises(EventNotFound, match=r"no event found between t=0 and t=-?\d.*event_fn"):
        odeint_event(
            oscillator,
            torch.tensor([1.0, 0.0]),
            torch.tensor(0.0),
            event_fn=lambda t, y: y[0] - 2,
            reverse_time=reverse,
            method=method,
            options=options,
        )
    assert made[0] <= calls


def test_a_fixed_step_search_needs_a_step():
    with pytest.raises(ValueError, match="event.*rk4.*step_size"):
        odeint_event(Ball(), thrown(), START, event_fn=lambda t, y: y[0], method="rk4")


def test_scipy_searches_for_no_events():
    with pytest.raises(ValueError, match="scipy_solver.*event"):
        odeint_event(Ball(), thrown(), START, event_fn=lambda t, y: y[0], method="scipy_solver")


# --- torchdiffeq ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {}),
        # Without first_step the error of dopri8's first step is all rounding.
        ("dopri8", dict(first_step=0.5)),
        ("bosh3", {}),
        ("rk4", dict(step_size=0.1, interp="cubic")),
    ],
)
def test_same_time_state_and_work_as_torchdiffeq(method, options, reverse, dtype):
    y0 = torch.tensor([1.0, 0.3], dtype=dtype)
    tolerances = dict(rtol=1e-6, atol=1e-10) if dtype == F64 else dict(rtol=1e-4, atol=1e-5)
    kwargs = dict(reverse_time=reverse, method=method, options=options, **tolerances)
    results = []
    for package in (odeint_event, torchdiffeq.odeint_event):
        calls = [0]

        def pendulum(t, y, calls=calls):
            calls[0] += 1
            return torch.stack([y[1], -torch.sin(y[0]) - 0.1 * torch.cos(t)])

        with torch.no_grad():
            t, states = package(
                pendulum, y0, START + 0.2, event_fn=lambda t, y: y[0] + 0.2, **kwargs
            )
        results.append((t.double(), states.double(), calls[0]))
    (t, states, calls), (want_t, want_states, want_calls) = results
    # In float32 rounding moves the steps a little, and with them the solution by the tolerance.
    close = 1e-9 if dtype == F64 else 1e-4
    torch.testing.assert_close(t, want_t, rtol=0.0, atol=close)
    torch.testing.assert_close(states, want_states, rtol=0.0, atol=10 * close)
    assert calls <= want_calls
    if method != "rk4":  # whose cubic torchdiffeq evaluates anew at every bisection
        assert calls == want_calls


def test_gradients_as_torchdiffeqs():
    results = []
    for package, solve in ((odeint_event, odeint), (torchdiffeq.odeint_event, torchdiffeq.odeint)):
        ball, y0 = Ball(), thrown(requires_grad=True)
        t, states = package(
            ball,
            y0,
            START,
            event_fn=lambda t, y: y[0],
            odeint_interface=solve,
            options=dict(first_step=0.05),
            method="dopri5",
        )
        results.append(torch.autograd.grad(t + states[1, 1], (y0, ball.gravity)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=0.0)
