"""Tableaus: refused when wrong, order conditions in exact arithmetic, measured orders."""

import math
from dataclasses import fields, replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS

from anode_fast import odeint
from anode_fast.tableau import DOPRI5, GAUSS_LEGENDRE4, RK4, TABLEAUS, ButcherTableau

EXPLICIT = [name for name, tableau in TABLEAUS.items() if not tableau.implicit]
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
SHARED = [name for name in ADAPTIVE if name in SOLVERS]  # torchdiffeq has tableaus of these alone
EPS = torch.finfo(torch.float64).eps


# --- construction ---------------------------------------------------------------------------------


def changed(tableau, **changes):
    """A tableau with other coefficients; "a": (i, row) replaces one row."""
    if "a" in changes:
        i, row = changes["a"]
        changes["a"] = (*tableau.a[:i], row, *tableau.a[i + 1 :])
    return replace(tableau, **changes)


THIRD, ONE = Fraction(1, 3), Fraction(1)


@pytest.mark.parametrize(
    ("tableau", "changes", "message"),
    [
        (RK4, {"a": (1, (THIRD, THIRD))}, r"rk4: a\[1\] needs 1 entries summing to 1/3, got 2"),
        (RK4, {"a": (2, (THIRD, THIRD * 2))}, r"rk4: a\[2\] needs 2 entries summing to 2/3, got 2"),
        (RK4, {"b": RK4.b[:-1]}, "rk4: b needs 4 entries summing to 1, got 3"),
        (RK4, {"b": (ONE, *RK4.b[1:])}, "rk4: b needs 4 entries summing to 1, got 4 .* 15/8"),
        (RK4, {"c": RK4.c[:-1]}, "rk4: want 3 rows in a, got 4"),
        (RK4, {"c": (0, THIRD, THIRD, ONE)}, r"rk4: a\[2\] needs 2 entries summing to 1/3"),
        (DOPRI5, {"b_err": DOPRI5.b_err[1:]}, "dopri5: b_err needs 7 entries summing to 0, got 6"),
        (DOPRI5, {"b_err": DOPRI5.b}, "dopri5: b_err needs 7 entries summing to 0, got 7"),
        (DOPRI5, {"b_mid": DOPRI5.b_mid[1:]}, "dopri5: b_mid needs 7 entries summing to 1/2"),
        (DOPRI5, {"b_mid": DOPRI5.b}, "dopri5: b_mid needs 7 entries summing to 1/2, got 7"),
        (GAUSS_LEGENDRE4, {"a": (0, (THIRD,))}, r"gl4: a\[0\] needs 2 entries summing to"),
    ],
)
def test_wrong_coefficients_are_refused(tableau, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(tableau, **changes)


def test_rounding_is_the_largest_error_allowed():
    b = (RK4.b[0] + Fraction(1, 10**9), *RK4.b[1:])
    changed(RK4, b=b, rounding=Fraction(1, 10**9))
    with pytest.raises(ValueError, match="rk4: b needs"):
        changed(RK4, b=b, rounding=Fraction(1, 10**10))


@pytest.mark.parametrize("name", TABLEAUS)
def test_coefficients_are_fractions(name):
    def flat(value):
        return [x for row in value for x in flat(row)] if isinstance(value, tuple) else [value]

    for field in fields(ButcherTableau):
        value = getattr(TABLEAUS[name], field.name)
        if isinstance(value, tuple):
            assert all(type(x) is Fraction for x in flat(value)), field.name


def test_solution_is_last_stage():
    names = {name for name in TABLEAUS if TABLEAUS[name].solution_is_last_stage}
    assert names == {"bosh3", "tsit5", "dopri5", "dopri8"}


# --- order conditions -----------------------------------------------------------------------------
# A rooted tree is the tuple of the subtrees at its root (Hairer, Norsett, Wanner, Solving ODEs I,
# II.2): () is sum b = 1, ((),) is sum b c = 1/2, (((),),) is sum b a c = 1/6, and so on.


def order_of(tree):
    return 1 + sum(map(order_of, tree))


def density(tree):
    return order_of(tree) * math.prod(map(density, tree))


@cache
def trees(order):
    """All rooted trees with `order` nodes."""

    def forests(nodes):
        if not nodes:
            yield ()
        for first in range(1, nodes + 1):
            for tree in trees(first):
                yield from ((tree, *rest) for rest in forests(nodes - first))

    return sorted({tuple(sorted(forest)) for forest in forests(order - 1)})


def weights_of_stages(tree, a):
    product = [Fraction(1)] * len(a)
    for subtree in tree:
        inner = weights_of_stages(subtree, a)
        sums = [sum((x * y for x, y in zip(row, inner, strict=False)), Fraction(0)) for row in a]
        product = [x * y for x, y in zip(product, sums, strict=True)]
    return product


def defect(b, a, order, theta=ONE):
    """How far the solution at `theta` with weights b is from meeting the conditions of an order."""
    return max(
        abs(
            sum(x * y for x, y in zip(b, weights_of_stages(tree, a), strict=True))
            - theta**order / density(tree)
        )
        for tree in trees(order)
    )


def order_met(b, a, tolerance, theta=ONE):
    order = 0
    while defect(b, a, order + 1, theta) <= tolerance:
        order += 1
    return order


def rounding_of(name):
    """0, but for tableaus published as decimals or approximations, or with roots (60 digits)."""
    if name in ("tsit5", "dopri8"):
        return 2 * TABLEAUS[name].rounding
    return Fraction(1, 10**58) if TABLEAUS[name].implicit else Fraction(0)


def test_there_are_as_many_trees_as_the_theory_has():
    assert [len(trees(order)) for order in range(1, 8)] == [1, 1, 2, 4, 9, 20, 48]


@pytest.mark.parametrize("name", [name for name in TABLEAUS if name != "dopri8"])
def test_order_conditions(name):
    tableau = TABLEAUS[name]
    assert order_met(tableau.b, tableau.a, rounding_of(name)) == tableau.order


def test_order_conditions_of_dopri8():
    tableau = TABLEAUS["dopri8"]  # the 286 trees of order 9 are left out: they take seconds
    rounding = rounding_of("dopri8")
    assert all(defect(tableau.b, tableau.a, order) <= rounding for order in range(1, 9))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_embedded_solution_is_one_order_lower(name):
    tableau = TABLEAUS[name]
    embedded = [b - err for b, err in zip(tableau.b, tableau.b_err, strict=True)]
    assert order_met(embedded, tableau.a, rounding_of(name)) == tableau.order - 1


@pytest.mark.parametrize(
    ("name", "order"),
    # torchdiffeq's: the middle of the three low-order methods is of order 1 only.
    [
        ("adaptive_heun", 1),
        ("fehlberg2", 1),
        ("bosh3", 1),
        ("tsit5", 4),
        ("dopri5", 4),
        ("dopri8", 5),
    ],
)
def test_order_of_the_middle(name, order):
    tableau = TABLEAUS[name]
    half = Fraction(1, 2)
    assert order_met(tableau.b_mid, tableau.a, rounding_of(name), half) == order


@pytest.mark.parametrize("name", ADAPTIVE)
def test_interpolant(name):
    """At the start, the middle and the end it is y0, the middle's and the solution's; slopes too.

    Its coefficients are up to 32 times a weight, each rounded once.
    """
    tableau = TABLEAUS[name]
    rows = np.array(tableau.interpolant_float)
    first, last = np.eye(tableau.stages)[[0, -1]]

    def value(x):
        return rows @ [x, x**2, x**3, x**4]

    def slope(x):
        return rows @ [1, 2 * x, 3 * x**2, 4 * x**3]

    rounding = 4 * EPS * np.abs(rows).max()
    for got, want in [
        (value(0.0), 0 * first),
        (value(0.5), tableau.b_mid_float),
        (value(1.0), tableau.b_float),
        (slope(0.0), first),
        (slope(1.0), last),
    ]:
        np.testing.assert_allclose(got, want, rtol=0, atol=rounding)


@pytest.mark.parametrize("name", sorted(set(TABLEAUS) - set(ADAPTIVE)))
def test_methods_without_middle_have_no_interpolant(name):
    with pytest.raises(ValueError, match=f"{name}: a tableau without b_mid"):
        _ = TABLEAUS[name].interpolant_float


# --- torchdiffeq's coefficients -------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_coefficients_are_torchdiffeqs(name):
    """Within 1 ulp where it divides; b_err is a difference there, b_mid may be a polynomial."""
    tableau, solver = TABLEAUS[name], SOLVERS[name]
    theirs = solver.tableau
    assert tableau.order == solver.order

    def close(ours, wanted, rtol, atol):
        np.testing.assert_allclose(ours, wanted.numpy(), rtol=rtol, atol=atol)

    close(tableau.c_float[1:], theirs.alpha, EPS, 0)
    assert len(tableau.a_float[1:]) == len(theirs.beta)
    for ours, row in zip(tableau.a_float[1:], theirs.beta, strict=True):
        close(ours, row, EPS, 0)
    close(tableau.b_float, theirs.c_sol, EPS, 0)
    largest = max(map(abs, tableau.b_float))
    close(tableau.b_err_float, theirs.c_error, EPS, EPS * largest)
    # Terms of up to 8 cancel to 0.3 in dopri8's; the others' are quotients.
    close(tableau.b_mid_float, solver.mid, EPS, 32 * EPS if name == "dopri8" else 0)


def test_all_of_torchdiffeqs_tableaus_were_compared():
    assert set(SHARED) == {name for name in SOLVERS if hasattr(SOLVERS[name], "tableau")}


# --- measured order -------------------------------------------------------------------------------

MATRIX = torch.tensor([[-0.3, 2.0, 0.0], [-2.0, -0.1, 0.5], [0.3, 0.0, -0.6]], dtype=torch.float64)
START = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)


def linear(t, y):
    return MATRIX @ y


def linear_solution(t):
    return torch.linalg.matrix_exp(MATRIX * t) @ START


def forced(t, y):
    """Depends on t beyond y: a wrong node c shows here. linear(y) for y minus `forced_part`."""
    return linear(t, y - forced_part(t)) + 3 * torch.cos(3 * t) * START


def forced_part(t):
    return torch.sin(3 * t) * START


def forced_solution(t):
    return linear_solution(t) + forced_part(t)


def fixed_step_options(name, h):
    if TABLEAUS[name].adaptive:  # accepted whatever their error, see Controller
        return {"first_step": h, "min_step": h, "max_step": h}
    return {"step_size": h}


def measured_order(name, field, solution):
    t_end = torch.tensor(2.0, dtype=torch.float64)
    # dopri8's error reaches rounding soon.
    steps = [4, 8, 16] if name == "dopri8" else [32, 64, 128]
    errors = []
    for n in steps:
        options = fixed_step_options(name, t_end.item() / n)
        y = odeint(field, START, torch.stack([0 * t_end, t_end]), method=name, options=options)
        errors.append((y[-1] - solution(t_end)).abs().max().item())
    slope, _ = np.polyfit(np.log2(steps), np.log2(errors), 1)
    return -slope


@pytest.mark.parametrize("name", EXPLICIT)
def test_measured_order(name):
    assert measured_order(name, forced, forced_solution) == pytest.approx(
        TABLEAUS[name].order, abs=0.25
    )


@pytest.mark.parametrize("name", EXPLICIT)
def test_measured_order_of_linear_problems(name):
    # For these dopri8 is of order 9 almost: see the test below.
    order = {"dopri8": 9}.get(name, TABLEAUS[name].order)
    assert measured_order(name, linear, linear_solution) == pytest.approx(order, abs=0.25)


def test_dopri8_is_almost_of_order_9_for_linear_problems():
    tall = ()
    for _ in range(8):
        tall = (tall,)
    tableau = TABLEAUS["dopri8"]
    stages = weights_of_stages(tall, tableau.a)
    weight = sum(x * y for x, y in zip(tableau.b, stages, strict=True))
    assert float(weight * math.factorial(9)) == pytest.approx(1, abs=0.2)
