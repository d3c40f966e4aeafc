"""Explicit Runge-Kutta methods: the evaluations they make, the steps they take, how they end."""

import math
from fractions import Fraction
from itertools import chain, pairwise, repeat

import numpy as np
import pytest
import torch

from anode_fast import MaxStepsExceeded, NonFiniteState, StepSizeUnderflow, odeint
from anode_fast.controller import Controller
from anode_fast.errors import NonDeterministicField
from anode_fast.problem import make_problem
from anode_fast.reference.runge_kutta import (
    MOST_NON_FINITE_ATTEMPTS,
    REJECTIONS_BEFORE_DOUBT,
    Marks,
    adaptive_steps,
)
from anode_fast.stats import SolveStats
from anode_fast.tableau import DOPRI5, TABLEAUS

pytestmark = pytest.mark.usefixtures("own_code")

f64 = torch.float64
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUS.items() if not (tableau.adaptive or tableau.implicit)]
EPS = torch.finfo(f64).eps


def times(*values):
    return torch.tensor(values, dtype=f64)


def state(*values):
    return torch.tensor(values, dtype=f64)


class Recorded:
    """A field that writes down when, where and in which steps it was evaluated.

    It keeps the states it got and copies of them: a solver that reuses their memory is found out.
    """

    def __init__(self, func=lambda t, y: torch.cos(t) * y + 1):
        self.func = func
        self.calls = []
        self.steps = []
        self._seen = []

    def __call__(self, t, y):
        self.calls.append((t.item(), y.tolist()))
        self._seen.append((y, y.clone()))
        return self.func(t, y)

    @property
    def times(self):
        return [t for t, _ in self.calls]

    def assert_states_untouched(self):
        assert all(torch.equal(y, copy) for y, copy in self._seen)

    def callback_step(self, t, y, dt):
        self.steps.append(("step", t.item(), y.tolist(), dt.item()))

    def callback_accept_step(self, t, y, dt):
        self.steps.append(("accept", t.item(), y.tolist(), dt.item()))

    def callback_reject_step(self, t, y, dt):
        self.steps.append(("reject", t.item(), y.tolist(), dt.item()))


class Script:
    """A norm of the scaled error that is read off a list; its last entry counts for ever."""

    def __init__(self, *ratios):
        self.ratios = list(ratios)

    def __call__(self, error):
        return self.ratios.pop(0) if len(self.ratios) > 1 else self.ratios[0]


def before(t):
    return math.nextafter(t, -math.inf)


def after(t):
    return math.nextafter(t, math.inf)


# --- evaluations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("first", [{}, {"first_step": 0.3}], ids=["chosen", "given"])
def test_evaluations_of_adaptive_methods(name, first):
    """One at the start, one to choose the first step, and every stage but the first per attempt."""
    field = Recorded(lambda t, y: torch.cos(5 * t) * y)
    given = {"method": name, "rtol": 1e-4, "atol": 1e-4, "options": first}
    _, stats = odeint(field, state(1.0, 2.0), times(0, 2), return_stats=True, **given)
    attempts = stats.accepted + stats.rejected
    assert attempts > 4
    assert len(field.calls) == stats.nfe
    assert stats.nfe == (1 if first else 2) + attempts * (TABLEAUS[name].stages - 1)
    field.assert_states_untouched()


@pytest.mark.parametrize("name", FIXED)
def test_evaluations_of_fixed_step_methods(name):
    field = Recorded()
    given = {"method": name, "options": {"step_size": 0.125}}
    _, stats = odeint(field, state(1.0, 2.0), times(0, 2), return_stats=True, **given)
    assert (stats.accepted, stats.rejected) == (16, 0)
    assert len(field.calls) == stats.nfe == 16 * TABLEAUS[name].stages
    field.assert_states_untouched()


@pytest.mark.parametrize("name", FIXED)
def test_an_output_time_inside_a_fixed_step_costs_no_evaluation(name):
    """The cubic's slope at the step's end is the next step's first stage."""
    given = {"method": name, "options": {"step_size": 0.25}}
    t = times(0, 0.1, 0.2, 0.6, 1.0)
    _, stats = odeint(Recorded(), state(1.0), t, return_stats=True, **given)
    assert stats.nfe == 4 * TABLEAUS[name].stages
    # Except in the last step, which has no next one.
    _, stats = odeint(Recorded(), state(1.0), t - 0.1, return_stats=True, **given)
    assert stats.nfe == 4 * TABLEAUS[name].stages
    _, stats = odeint(Recorded(), state(1.0), times(0, 0.9, 1.0), return_stats=True, **given)
    assert stats.nfe == 4 * TABLEAUS[name].stages + 1


def stages_by_hand(tableau, field, t, y, h, f0):
    """Times, states and derivatives of all stages but the first, and the solution, in numbers."""
    ks, calls = [f0], []
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        stage = y + h * sum(float(a) * k for a, k in zip(row, ks, strict=True))
        at = t + float(c) * h
        calls.append((at, stage))
        ks.append(field(at, stage))
    return calls, y + h * sum(float(b) * k for b, k in zip(tableau.b, ks, strict=True)), ks[-1]


def number_field(t, y):
    return math.cos(3 * t) * y + t


def tensor_field(t, y):
    return torch.cos(3 * t) * y + t


@pytest.mark.parametrize("name", ADAPTIVE + FIXED)
def test_stages_are_the_tableaus(name):
    """Two steps: the time and the state of every evaluation, and the solution."""
    tableau, field, h = TABLEAUS[name], Recorded(tensor_field), 0.25
    given_steps = {"first_step": h, "min_step": h, "max_step": h}
    options = given_steps if tableau.adaptive else {"step_size": h}
    solution = odeint(field, state(0.7), times(0.5, 1.0), method=name, options=options)
    t, y = 0.5, 0.7
    f = number_field(t, y)
    wanted = [(t, y)]
    for step in range(2):
        if step and not tableau.adaptive:  # adaptive methods take over the last stage's
            f = number_field(t, y)
            wanted.append((t, y))
        calls, y, last = stages_by_hand(tableau, number_field, t, y, h, f)
        t, f = t + h, last
        # At the very end of a step adaptive methods look from the left.
        wanted += [(before(at) if at == t and tableau.adaptive else at, s) for at, s in calls]
    assert len(field.calls) == len(wanted)
    for (t_got, (y_got,)), (t_want, y_want) in zip(field.calls, wanted, strict=True):
        assert t_got == t_want
        assert y_got == pytest.approx(y_want, rel=32 * EPS)
    assert solution[-1].item() == pytest.approx(y, rel=32 * EPS)
    field.assert_states_untouched()


# --- steps ----------------------------------------------------------------------------------------


def test_steps_follow_the_controller():
    """Scripted error ratios: accepted up to 1, and each decides the next step."""
    ratios = [0.5, 3.0, 1.0, after(1.0), 1e-9, 40.0, 40.0, 0.3, 1e9, 0.0, 0.0, 0.0]
    field = Recorded()
    options = {"first_step": 0.01, "norm": Script(*ratios)}
    _, stats = odeint(field, state(1.0), times(0, 1), options=options, return_stats=True)
    controller, t, dt = Controller(5), 0.0, 0.01
    attempts = [step for step in field.steps if step[0] == "step"]
    outcomes = [step for step in field.steps if step[0] != "step"]
    for ratio, attempt, outcome in zip(
        chain(ratios, repeat(0.0)), attempts, outcomes, strict=False
    ):
        assert (attempt[1], attempt[3]) == (t, dt)
        assert outcome == ("accept" if ratio <= 1 else "reject", *attempt[1:])
        t += dt if ratio <= 1 else 0
        dt = controller.next_step(dt, ratio)
    assert stats.accepted == sum(step[0] == "accept" for step in outcomes)
    assert stats.rejected == sum(step[0] == "reject" for step in outcomes) == 5
    assert t > 1


def test_a_rejected_step_restarts_from_the_same_time_state_and_derivative():
    field = Recorded()
    options = {"first_step": 0.4, "norm": Script(2.0, 5.0, 0.9, 3.0, 0.0)}
    odeint(field, state(1.0), times(0, 1), options=options)
    by_attempt = [field.steps[i : i + 2] for i in range(0, len(field.steps), 2)]
    assert [outcome[0] for _, outcome in by_attempt[:4]] == ["reject", "reject", "accept", "reject"]
    for (_, outcome), (attempt, _) in pairwise(by_attempt):
        if outcome[0] == "reject":
            assert attempt[1:3] == outcome[1:3]
            assert attempt[3] < outcome[3]
        else:
            assert attempt[1] == outcome[1] + outcome[3]
    assert field.times.count(0.0) == 1  # f(t0, y0) is kept
    assert len(field.calls) == 1 + 6 * len(by_attempt)


def test_the_last_step_goes_past_the_end():
    """As in torchdiffeq: the output is interpolated back."""
    field = Recorded()
    odeint(field, state(1.0), times(0, 1), options={"first_step": 0.7})
    t, dt = field.steps[-1][1], field.steps[-1][3]
    assert t < 1 < t + dt


@pytest.mark.parametrize("count", [2, 11, 101])
def test_output_times_change_no_step(count):
    fields = [Recorded(), Recorded()]
    t = torch.linspace(0, 1, count, dtype=f64)
    ends = odeint(fields[0], state(1.0, 2.0), t[[0, -1]])
    many = odeint(fields[1], state(1.0, 2.0), t)
    assert fields[0].calls == fields[1].calls
    torch.testing.assert_close(many[-1], ends[-1], rtol=4 * EPS, atol=0)


def test_many_times_in_a_step_equal_single_ones():
    """They are one matrix product instead of sums of stages."""
    problem = make_problem(tensor_field, torch.randn(3, 2, dtype=f64), times(0, 1))
    step = next(adaptive_steps(problem, DOPRI5, 1.0, SolveStats()))
    at = torch.linspace(step.interval.t0, step.interval.t1, 9, dtype=f64).tolist()
    many = step.interpolate(at, [None] * 9)
    single = torch.cat([step.interpolate([t], [None]) for t in at])
    torch.testing.assert_close(many, single, rtol=8 * EPS, atol=0)
    torch.testing.assert_close(many[0], step.y0, rtol=0, atol=0)
    torch.testing.assert_close(many[-1], step.y1, rtol=8 * EPS, atol=0)


def test_min_step_is_accepted_whatever_its_error():
    field = Recorded()
    options = {"first_step": 0.5, "min_step": 0.25, "norm": Script(1e9)}
    _, stats = odeint(field, state(1.0), times(0, 1), options=options, return_stats=True)
    assert (stats.accepted, stats.rejected) == (4, 1)
    assert [step[3] for step in field.steps if step[0] == "accept"] == [0.25] * 4


# --- times on which steps end ---------------------------------------------------------------------


def test_marks():
    marks = Marks([0.25, 0.5, 1.0])
    assert marks.before(0.0, 0.2) is None
    assert marks.before(0.0, 0.25) == 0.25
    assert marks.before(0.25, 0.6) == 0.5  # one that was reached does not count
    assert marks.before(0.6, 0.9) is None
    assert marks.before(0.7, 3.0) == 1.0
    assert marks.before(1.0, 9.0) is None


def test_step_t():
    """Steps end on it, exactly, and nothing else changes."""
    field = Recorded()
    options = {"first_step": 0.3, "step_t": times(0.5, 0.1, -1.0, 9.0), "norm": Script(0.1)}
    odeint(field, state(1.0), times(0, 1), options=options)
    starts = [step[1] for step in field.steps if step[0] == "accept"]
    assert 0.1 in starts and 0.5 in starts
    assert after(0.1) not in field.times and after(0.5) not in field.times


@pytest.mark.parametrize("jump", [0.5, 0.3])
def test_jump_t(jump):
    """The step to it looks from its left, the step from it from its right."""
    field = Recorded(lambda t, y: torch.where(t < jump, 1.0, 3.0) * torch.ones_like(y))
    options = {"first_step": 0.2, "jump_t": times(jump)}
    solution, stats = odeint(
        field, state(0.0), times(0, 1), options=options, rtol=1e-12, atol=1e-12, return_stats=True
    )
    assert solution[-1].item() == pytest.approx(jump + 3 * (1 - jump), rel=8 * EPS)
    assert stats.rejected == 0
    assert jump not in field.times
    assert field.times.count(after(jump)) == 1
    assert stats.nfe == 1 + 6 * stats.accepted + 1


def test_a_jump_at_the_start_is_seen_from_its_right():
    field = Recorded(lambda t, y: torch.where(t <= 0.5, 1.0, 3.0) * torch.ones_like(y))
    options = {"first_step": 0.2, "jump_t": times(0.5)}
    solution = odeint(field, state(0.0), times(0.5, 1.0), options=options)
    assert field.times[0] == after(0.5)
    assert solution[-1].item() == pytest.approx(1.5, rel=8 * EPS)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("options", [{"perturb": True}, {"jump_t": times(0.5)}])
def test_sides_of_fixed_steps(name, options):
    """The first stage looks from the right of the step's start, one at its end from the left."""
    field = Recorded(lambda t, y: torch.where(t < 0.5, 1.0, 3.0) * torch.ones_like(y))
    options = {"step_size": 0.5, **options}
    solution = odeint(field, state(0.0), times(0, 1), method=name, options=options)
    assert solution[-1].item() == pytest.approx(2.0, rel=8 * EPS)
    nodes = TABLEAUS[name].c
    ends = [before(0.5), before(1.0)] if Fraction(1) in nodes else []
    inner = [start + float(c) / 2 for start in (0, 0.5) for c in nodes if 0 < c < 1]
    assert sorted(field.times) == pytest.approx(sorted([after(0.0), after(0.5), *ends, *inner]))
    assert not {0.0, 0.5, 1.0} & set(field.times)


@pytest.mark.parametrize("name", FIXED)
def test_jump_t_adds_a_grid_point(name):
    field = Recorded(lambda t, y: torch.where(t < 0.3, 1.0, 3.0) * torch.ones_like(y))
    options = {"step_size": 0.5, "jump_t": times(0.3)}
    solution = odeint(field, state(0.0), times(0, 1), method=name, options=options)
    assert solution[-1].item() == pytest.approx(0.3 + 3 * 0.7, rel=8 * EPS)
    assert [step[1] for step in field.steps] == [0.0, 0.3, 0.5]


# --- dtype of times -------------------------------------------------------------------------------


def test_times_in_float32():
    """options["dtype"]: t and dt are float32 numbers; by default they are float64 ones."""

    def is_float32(x):
        return float(np.float32(x)) == x

    t = torch.tensor([0.1, 1.0])
    for options, rounded in (({"dtype": torch.float32}, True), ({}, False)):
        field, options = Recorded(), {"max_step": 0.03, **options}
        odeint(field, torch.tensor([1.0]), t, rtol=1e-4, atol=1e-4, options=options)
        numbers = [x for step in field.steps for x in (step[1], step[3])]
        assert all(map(is_float32, numbers)) is rounded


# --- callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
def test_callbacks_of_adaptive_methods(backwards):
    """What is attempted, then what became of it; in the user's time and form of state."""
    sign = -1 if backwards else 1
    log = []

    class Field:
        def __call__(self, t, parts):
            return tuple(sign * part for part in parts)

    field = Field()
    for name in ("step", "accept_step", "reject_step"):

        def note(t, y, dt, name=name):
            assert t.shape == dt.shape == () and t.dtype == dt.dtype == f64
            assert isinstance(y, tuple) and [part.shape for part in y] == [(2,), (1, 3)]
            log.append((name, t.item(), dt.item()))

        setattr(field, f"callback_{name}", note)
    y0 = (torch.ones(2, dtype=f64), torch.ones(1, 3, dtype=f64))
    options = {"first_step": 0.5, "norm": Script(3.0, 0.9, 0.5, 0.0)}
    odeint(field, y0, sign * times(0, 1), options=options)
    assert [name for name, _, _ in log[:6]] == [
        *("step", "reject_step", "step", "accept_step", "step", "accept_step")
    ]
    dt = Controller(5).next_step(0.5, 3.0)
    assert log[0] == ("step", 0.0, 0.5)
    assert log[2] == ("step", 0.0, dt)
    assert log[4][1] == sign * dt


def test_callback_of_fixed_step_methods():
    field = Recorded()
    odeint(field, state(1.0), times(1, 0), method="rk4", options={"step_size": 0.25})
    assert [step[0] for step in field.steps] == ["step"] * 4
    assert [step[1] for step in field.steps] == [1.0, 0.75, 0.5, 0.25]
    assert [step[3] for step in field.steps] == [0.25] * 4


# --- how a solve ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 11, 101])
def test_the_step_budget_counts_the_whole_solve(count):
    """Attempts, accepted or not, whatever the number of output times."""
    t = torch.linspace(0, 1, count, dtype=f64)

    def solve(**options):
        field = Recorded(lambda t, y: torch.cos(20 * t) * y)
        options["first_step"] = 1.0
        return odeint(field, state(1.0), t, options=options, return_stats=True)[1], field

    stats, _ = solve()
    attempts = stats.accepted + stats.rejected
    assert stats.rejected > 0 and attempts > 20
    assert solve(max_num_steps=attempts)[0] == stats
    with pytest.raises(MaxStepsExceeded) as caught:
        solve(max_num_steps=attempts - 1)
    message = str(caught.value)
    assert message.startswith(f"max_num_steps exceeded ({attempts - 1}>={attempts - 1}) at t=0.")
    assert f": {stats.accepted - 1} steps accepted, {stats.rejected} rejected" in message
    assert "options['max_num_steps']" in message


def test_the_default_budget_is_finite():
    options = {"first_step": 1e-9, "max_step": 1e-9, "norm": Script(0.0)}
    with pytest.raises(MaxStepsExceeded, match=r"\(100000>=100000\) at t=0.0001"):
        odeint(lambda t, y: y, state(1.0), times(0, 1), options=options, method="adaptive_heun")


def test_underflow_of_scripted_errors():
    field = Recorded()
    with pytest.raises(StepSizeUnderflow, match="underflow in dt .* at t=0.5 after 0 accepted"):
        options = {"first_step": 0.2, "norm": Script(1e9)}
        odeint(field, state(1.0), times(0.5, 1.0), options=options)
    attempts = sum(step[0] == "reject" for step in field.steps)
    # Each shrinks dt by 0.2, until 0.5 + dt rounds to 0.5.
    assert attempts == math.ceil(math.log(0.2 / (EPS / 4)) / math.log(5))
    # Two more evaluations look whether the field is deterministic.
    assert len(field.calls) == 1 + 6 * attempts + 2


@pytest.mark.parametrize("sign", [1, -1])
def test_underflow_at_a_blow_up(sign):
    """y' = y^2 reaches infinity at t = 1; the row that does is named."""
    y0 = torch.tensor([[0.1], [1.0], [0.2]], dtype=f64)
    at = rf"^underflow in dt \S+ at t={sign}\.?0*\d? after .* .largest \|y\| in row 1: "
    with pytest.raises(StepSizeUnderflow, match=at):
        odeint(lambda t, y: sign * y * y, y0, sign * times(0, 2))


def test_non_finite_from_the_start():
    field = Recorded(lambda t, y: y * math.nan)
    with pytest.raises(NonFiniteState, match="non-finite values in state: the field returned nan"):
        odeint(field, state(1.0), times(0, 1))
    assert len(field.calls) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_later_on(value):
    """The field has no value from t = 0.5 on."""
    field = Recorded(lambda t, y: torch.where(t > 0.5, value, -y))
    with pytest.raises(NonFiniteState) as caught:
        odeint(field, torch.ones(3, 2, dtype=f64), times(0, 1))
    message = str(caught.value)
    assert message.startswith("non-finite values in state: a trial step became nan or inf at t=0.")
    last = field.steps[-1][1]
    assert 0.4 < last <= 0.5 and f"at t={last:.9g}" in message
    rejected = sum(step[0] == "reject" for step in field.steps)
    assert MOST_NON_FINITE_ATTEMPTS <= rejected < 2 * MOST_NON_FINITE_ATTEMPTS


def test_rows_that_are_not_finite_are_counted():
    def field(t, y):
        return torch.where(torch.arange(5)[:, None] % 2 == 1, math.inf, -y)

    with pytest.raises(NonFiniteState, match="returned nan or inf in 2 of 5 rows at t=0,"):
        odeint(field, torch.ones(5, 2, dtype=f64), times(0, 1))


def test_a_trial_step_out_of_the_domain_is_made_smaller():
    """y' = -sqrt(y): the first attempt leads to y < 0, where the field is nan."""
    field = Recorded(lambda t, y: -torch.sqrt(y))
    solution, stats = odeint(
        field, state(1.0), times(0, 1), options={"first_step": 50.0}, return_stats=True
    )
    assert stats.rejected > 0
    assert any(math.isnan(y) or y < 0 for _, (y,) in field.calls)
    assert solution[-1].item() == pytest.approx(0.25, rel=1e-7)


def test_fixed_steps_to_nan_are_an_error():
    def field(t, y):
        return torch.where(t > 0.55, math.nan, y)

    with pytest.raises(NonFiniteState, match="first seen at t=0.75 .finite at t=0.5. .* rk4"):
        odeint(field, state(1.0), times(0, 0.25, 0.5, 0.75, 1), method="rk4")


@pytest.mark.parametrize("y0", [torch.tensor(1.0), torch.ones(0, 3)], ids=["0-d", "no rows"])
@pytest.mark.parametrize("name", ["dopri5", "rk4"])
def test_states_without_dimensions_or_entries(name, y0):
    options = {"step_size": 0.1} if name == "rk4" else {}
    solution = odeint(lambda t, y: -y, y0, times(0, 1), method=name, options=options)
    assert solution.shape == (2, *y0.shape)
    torch.testing.assert_close(solution[1], y0 * math.exp(-1), rtol=1e-5, atol=0)


def test_a_field_that_is_not_deterministic_is_named():
    field = Recorded(lambda t, y: -y + 0.1 * torch.randn_like(y))
    with pytest.raises(NonDeterministicField, match="not deterministic: two evaluations at"):
        odeint(field, torch.ones(4, dtype=f64), times(0, 1))
    rejected = sum(step[0] == "reject" for step in field.steps)
    assert rejected >= REJECTIONS_BEFORE_DOUBT
    assert field.times[-1] == field.times[-2]


def test_a_stiff_field_is_not_taken_for_a_random_one():
    field = Recorded(lambda t, y: -1e6 * (y - torch.cos(t)))
    _, stats = odeint(
        field, state(0.0), times(0, 1e-4), options={"first_step": 1.0}, return_stats=True
    )
    assert stats.rejected >= REJECTIONS_BEFORE_DOUBT


# --- tolerances -----------------------------------------------------------------------------------


def test_tolerances_by_entry_are_kept_by_entry():
    """The step ends where the strictest entry wants it."""
    y0 = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=f64)
    rates = torch.tensor([[1.0, 30.0], [1.0, 1.0]], dtype=f64)
    atol = torch.tensor([[1e-9, 1.0], [1e-9, 1e-9]], dtype=f64)

    def steps(atol):
        return odeint(
            lambda t, y: -rates * y, y0, times(0, 0.05), rtol=0, atol=atol, return_stats=True
        )[1].accepted

    assert steps(atol) < steps(1e-9) / 2
    assert steps(torch.full_like(atol, 1e-9)) == steps(1e-9)
