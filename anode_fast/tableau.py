"""Butcher tableaus, exact and checked at import, of every Runge-Kutta method of the package.

Conventions: `c` has one entry per stage, its leading 0 included. `b_err` gives the error estimate
directly: solution minus embedded solution. `b_mid` gives the solution in the middle of the step,
from which the interpolant is built. Coefficients are Fractions; solvers use the float64 views, made
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isqrt

Row = tuple[Fraction, ...]

QUARTIC = (
    (1, 0, -11, 18, -8),
    (0, 0, 16, -32, 16),
    (0, 0, -5, 14, -8),
    (0, 1, -4, 5, -2),
    (0, 0, 1, -3, 2),
)
"""Interpolation through y0, y(1/2), y1 with slopes f0, f1 at the ends of a step: the weights of
y0, y(1/2), y1, dt f0 and dt f1, each a polynomial in x = (t - t0) / dt, powers 0 to 4."""


@dataclass(frozen=True)
class ButcherTableau:
    """Coefficients of a Runge-Kutta method (Hairer, Norsett, Wanner, Solving ODEs I, II.1).

    Attributes:
        name: The method's name in the public API.
        order: Order of the solution. The step-size controller uses it too.
        c: Nodes, one for each of the s stages.
        a: s rows. Row i has i entries in an explicit method and s entries in an implicit one.
        b: s weights of the solution.
        b_err: s weights of the error estimate; () for a method that has none (fixed step only).
        b_mid: s weights of the solution at half the step; () for a method without interpolant.
        rounding: How far the row sums may be from exact. 0 but for methods that were published as
            decimals or as rational approximations.

    Raises:
        ValueError: Rows of the wrong length, or sums that do not hold (a_i = c_i, b = 1, b_err = 0,
            b_mid = 1/2).
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    b_err: Row = ()
    b_mid: Row = ()
    rounding: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        s = len(self.c)
        if len(self.a) != s:
            raise ValueError(f"{self.name}: want {s} rows in a, got {len(self.a)}")
        rows = [
            (f"a[{i}]", row, s if self.implicit else i, self.c[i]) for i, row in enumerate(self.a)
        ]
        rows.append(("b", self.b, s, Fraction(1)))
        if self.b_err:
            rows.append(("b_err", self.b_err, s, Fraction(0)))
        if self.b_mid:
            rows.append(("b_mid", self.b_mid, s, Fraction(1, 2)))
        for name, row, length, total in rows:
            if len(row) != length or abs(sum(row) - total) > self.rounding:
                raise ValueError(
                    f"{self.name}: {name} needs {length} entries summing to {total}, "
                    f"got {len(row)} summing to {sum(row)}"
                )

    @property
    def implicit(self) -> bool:
        """Whether a stage needs itself or a later stage."""
        return len(self.a[0]) > 0

    @property
    def stages(self) -> int:
        """Number of stages s."""
        return len(self.c)

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error, so that it can choose its steps."""
        return bool(self.b_err)

    @cached_property
    def solution_is_last_stage(self) -> bool:
        """Whether the last stage is evaluated at the solution itself (first same as last)."""
        return not self.implicit and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @cached_property
    def interpolant_float(self) -> tuple[tuple[float, ...], ...]:
        """Coefficients of the interpolant, one row (x, x^2, x^3, x^4) for each stage.

        The quartic through y0, y(1/2), y1 with slopes f0 and f1 at its ends, at x = (t - t0) / dt,
        is y0 + dt * sum_j w_j(x) k_j; row j holds the polynomial w_j. f1 is the last stage.
        Source: Shampine, Some practical Runge-Kutta formulas, Math. Comp. 46 (1986).
        """
        if not self.b_mid:
            raise ValueError(f"{self.name}: a tableau without b_mid has no interpolant")
        rows = []
        for j, (b, mid) in enumerate(zip(self.b, self.b_mid, strict=True)):
            f0, f1 = int(j == 0), int(j == self.stages - 1)
            # y0 has weight 1 in total, so its powers 1 to 4 cancel against y(1/2)'s and y1's.
            _, of_mid, of_y1, of_f0, of_f1 = QUARTIC
            powers = zip(of_mid[1:], of_y1[1:], of_f0[1:], of_f1[1:], strict=True)
            rows.append(tuple(float(mid * m + b * y1 + f0 * p + f1 * q) for m, y1, p, q in powers))
        return tuple(rows)

    @cached_property
    def c_float(self) -> tuple[float, ...]:
        """`c` in float64."""
        return tuple(map(float, self.c))

    @cached_property
    def a_float(self) -> tuple[tuple[float, ...], ...]:
        """`a` in float64."""
        return tuple(tuple(map(float, row)) for row in self.a)

    @cached_property
    def b_float(self) -> tuple[float, ...]:
        """`b` in float64."""
        return tuple(map(float, self.b))

    @cached_property
    def b_err_float(self) -> tuple[float, ...]:
        """`b_err` in float64."""
        return tuple(map(float, self.b_err))

    @cached_property
    def b_mid_float(self) -> tuple[float, ...]:
        """`b_mid` in float64."""
        return tuple(map(float, self.b_mid))


def _row(text: str) -> Row:
    """Fractions from "1/2 0 -3/4 0.25": what stands in a paper's table."""
    return tuple(Fraction(word) for word in text.split())


def _rows(text: str) -> tuple[Row, ...]:
    """One row a line; the empty first row of an explicit method is a line of its own."""
    return tuple(_row(line) for line in text.split("\n"))


def _minus(x: Row, y: Row) -> Row:
    return tuple(p - q for p, q in zip(x, y, strict=True))


def _sqrt(n: int) -> Fraction:
    """Square root to 60 digits: row sums that are linear in it stay exact."""
    scale = 10**60
    return Fraction(isqrt(n * scale**2), scale)


# --- explicit, fixed step -------------------------------------------------------------------------

EULER = ButcherTableau("euler", 1, c=_row("0"), a=((),), b=_row("1"))

MIDPOINT = ButcherTableau("midpoint", 2, c=_row("0 1/2"), a=_rows("\n1/2"), b=_row("0 1"))

HEUN2 = ButcherTableau("heun2", 2, c=_row("0 1"), a=_rows("\n1"), b=_row("1/2 1/2"))

HEUN3 = ButcherTableau(
    "heun3", 3, c=_row("0 1/3 2/3"), a=_rows("\n1/3\n0 2/3"), b=_row("1/4 0 3/4")
)

# The 3/8 rule (Kutta 1901): torchdiffeq's rk4 too.
RK4 = ButcherTableau(
    "rk4",
    4,
    c=_row("0 1/3 2/3 1"),
    a=_rows("\n1/3\n-1/3 1\n1 -1 1"),
    b=_row("1/8 3/8 3/8 1/8"),
)

# --- explicit, adaptive ---------------------------------------------------------------------------

ADAPTIVE_HEUN = ButcherTableau(
    "adaptive_heun",
    2,
    c=_row("0 1"),
    a=_rows("\n1"),
    b=_row("1/2 1/2"),
    b_err=_row("1/2 -1/2"),
    b_mid=_row("1/2 0"),
)

# Fehlberg, NASA TR R-315 (1969).
FEHLBERG2 = ButcherTableau(
    "fehlberg2",
    2,
    c=_row("0 1/2 1"),
    a=_rows("\n1/2\n1/256 255/256"),
    b=_row("1/512 255/256 1/512"),
    b_err=_row("-1/512 0 1/512"),
    b_mid=_row("0 1/2 0"),
)

# Bogacki, Shampine, Appl. Math. Lett. 2 (1989).
BOSH3 = ButcherTableau(
    "bosh3",
    3,
    c=_row("0 1/2 3/4 1"),
    a=_rows("\n1/2\n0 3/4\n2/9 1/3 4/9"),
    b=_row("2/9 1/3 4/9 0"),
    b_err=_minus(_row("2/9 1/3 4/9 0"), _row("7/24 1/4 1/3 1/8")),
    b_mid=_row("0 1/2 0 0"),
)

# Tsitouras, Comput. Math. Appl. 62 (2011), table 1; b_mid is its interpolant at 1/2.
_TSIT5_B = _row(
    "0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 "
    "-3.290069515436081 2.324710524099774 0"
)
TSIT5 = ButcherTableau(
    "tsit5",
    5,
    c=_row("0 0.161 0.327 0.9 0.9800255409045097 1 1"),
    a=(
        *_rows(
            "\n"
            "0.161\n"
            "-0.008480655492356989 0.335480655492357\n"
            "2.8971530571054935 -6.359448489975075 4.3622954328695815\n"
            "5.325864828439257 -11.748883564062828 7.4955393428898365 -0.09249506636175525\n"
            "5.86145544294642 -12.92096931784711 8.159367898576159 "
            "-0.071584973281401 -0.028269050394068383"
        ),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    b_err=_row(
        "-0.00178001105222577714 -0.0008164344596567469 0.007880878010261995 "
        "-0.1447110071732629 0.5823571654525552 -0.45808210592918697 1/66"
    ),
    b_mid=_row(
        "0.10741235230096875 0.01135625 0.3956090305604531 -0.3447521435259355 "
        "1.3161853649581647 -1.0170608542936512 0.03125"
    ),
    rounding=Fraction(1, 10**14),
)

# Dormand, Prince, J. Comput. Appl. Math. 6 (1980); b_mid: Shampine, Math. Comp. 46 (1986).
_DOPRI5_B = _row("35/384 0 500/1113 125/192 -2187/6784 11/84 0")
DOPRI5 = ButcherTableau(
    "dopri5",
    5,
    c=_row("0 1/5 3/10 4/5 8/9 1 1"),
    a=(
        *_rows(
            "\n"
            "1/5\n"
            "3/40 9/40\n"
            "44/45 -56/15 32/9\n"
            "19372/6561 -25360/2187 64448/6561 -212/729\n"
            "9017/3168 -355/33 46732/5247 49/176 -5103/18656"
        ),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    b_err=_minus(
        _DOPRI5_B,
        _row("1951/21600 0 22642/50085 451/720 -12231/42400 649/6300 1/60"),
    ),
    b_mid=_row(
        "6025192743/60171106304 0 51252292925/130801643196 -2691868925/90256659456 "
        "187940372067/3189068634112 -1776094331/39487288512 11237099/470086768"
    ),
    rounding=Fraction(1, 10**14),
)

# Prince, Dormand, J. Comput. Appl. Math. 7 (1981), RK8(7)13M: the published fractions are
# approximations. A 14th stage, at the solution, and b_mid come from its interpolant.
_DOPRI8_B = _row(
    "14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732 "
    "-1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 "
    "1/4 0"
)
DOPRI8 = ButcherTableau(
    "dopri8",
    8,
    c=_row(
        "0 1/18 1/12 1/8 5/16 3/8 59/400 93/200 5490023248/9719169821 13/20 "
        "1201146811/1299019798 1 1 1"
    ),
    a=(
        *_rows(
            "\n"
            "1/18\n"
            "1/48 1/16\n"
            "1/32 0 3/32\n"
            "5/16 0 -75/64 75/64\n"
            "3/80 0 0 3/16 3/20\n"
            "29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 "
            "23124283/1800000000\n"
            "16016141/946692911 0 0 61564180/158732637 22789713/633445777 "
            "545815736/2771057229 -180193667/1043307555\n"
            "39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 "
            "100302831/723423059 790204164/839813087 800635310/3783071287\n"
            "246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 "
            "-12992083/490766935 6005943493/2108947869 393006217/1396673457 "
            "123872331/1001029789\n"
            "-1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 "
            "-10304129995/1701304382 -48777925059/3047939560 15336726248/1032824649 "
            "-45442868181/3398467696 3065993473/597172653\n"
            "185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 "
            "-703635378/230739211 5731566787/1027545527 5232866602/850066563 "
            "-4093664535/808688257 3962137247/1805957418 65686358/487910083\n"
            "403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 "
            "652783627/914296604 11173962825/925320556 -13158990841/6184727034 "
            "3936647629/1978049680 -160528059/685178525 248638103/1413531060 0"
        ),
        _DOPRI8_B[:-1],
    ),
    b=_DOPRI8_B,
    b_err=_minus(
        _DOPRI8_B,
        _row(
            "13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 "
            "656045339/265891186 -3867574721/1518517206 465885868/322736535 "
            "53011238/667516719 2/45 0 0"
        ),
    ),
    b_mid=_row(
        "0.041031303607394012375 0 0 0 0 0.0510056280199134456875 0.2388930677412199966125 "
        "0.3096870143996102922671875 -0.217232547175535029009375 0.07833405679331924616875 "
        "-0.001861436971558026034375 0.0070728442026784521390625 0.0069084737320050937390625 "
        "-0.0138384043490474839609375"
    ),
    rounding=Fraction(1, 10**14),
)

# --- implicit, fixed step -------------------------------------------------------------------------

IMPLICIT_EULER = ButcherTableau("implicit_euler", 1, c=_row("1"), a=_rows("1"), b=_row("1"))

IMPLICIT_MIDPOINT = ButcherTableau(
    "implicit_midpoint", 2, c=_row("1/2"), a=_rows("1/2"), b=_row("1")
)

TRAPEZOID = ButcherTableau(
    "trapezoid", 2, c=_row("0 1"), a=_rows("0 0\n1/2 1/2"), b=_row("1/2 1/2")
)

# Hairer, Wanner, Solving ODEs II, IV.5 (Radau IIA) and Solving ODEs I, II.7 (Gauss-Legendre).
RADAU_IIA3 = ButcherTableau(
    "radauIIA3", 3, c=_row("1/3 1"), a=_rows("5/12 -1/12\n3/4 1/4"), b=_row("3/4 1/4")
)

_R3, _R6, _R15, _R2 = map(_sqrt, (3, 6, 15, 2))

GAUSS_LEGENDRE4 = ButcherTableau(
    "gl4",
    4,
    c=(Fraction(1, 2) - _R3 / 6, Fraction(1, 2) + _R3 / 6),
    a=(
        (Fraction(1, 4), Fraction(1, 4) - _R3 / 6),
        (Fraction(1, 4) + _R3 / 6, Fraction(1, 4)),
    ),
    b=_row("1/2 1/2"),
)

_RADAU5_B = ((16 - _R6) / 36, (16 + _R6) / 36, Fraction(1, 9))
RADAU_IIA5 = ButcherTableau(
    "radauIIA5",
    5,
    c=((4 - _R6) / 10, (4 + _R6) / 10, Fraction(1)),
    a=(
        ((88 - 7 * _R6) / 360, (296 - 169 * _R6) / 1800, (-2 + 3 * _R6) / 225),
        ((296 + 169 * _R6) / 1800, (88 + 7 * _R6) / 360, (-2 - 3 * _R6) / 225),
        _RADAU5_B,
    ),
    b=_RADAU5_B,
)

GAUSS_LEGENDRE6 = ButcherTableau(
    "gl6",
    6,
    c=(Fraction(1, 2) - _R15 / 10, Fraction(1, 2), Fraction(1, 2) + _R15 / 10),
    a=(
        (Fraction(5, 36), Fraction(2, 9) - _R15 / 15, Fraction(5, 36) - _R15 / 30),
        (Fraction(5, 36) + _R15 / 24, Fraction(2, 9), Fraction(5, 36) - _R15 / 24),
        (Fraction(5, 36) + _R15 / 30, Fraction(2, 9) + _R15 / 15, Fraction(5, 36)),
    ),
    b=_row("5/18 4/9 5/18"),
)

# Alexander, SIAM J. Numer. Anal. 14 (1977): L-stable, gamma = 1 - sqrt(2)/2.
_GAMMA = 1 - _R2 / 2
SDIRK2 = ButcherTableau(
    "sdirk2",
    2,
    c=(_GAMMA, Fraction(1)),
    a=((_GAMMA, Fraction(0)), (1 - _GAMMA, _GAMMA)),
    b=(1 - _GAMMA, _GAMMA),
)

# Bank et al., IEEE Trans. Electron Devices 32 (1985): trapezoid to 2 - sqrt(2), then BDF2.
TRBDF2 = ButcherTableau(
    "trbdf2",
    2,
    c=(Fraction(0), 2 * _GAMMA, Fraction(1)),
    a=(
        (Fraction(0),) * 3,
        (_GAMMA, _GAMMA, Fraction(0)),
        (_R2 / 4, _R2 / 4, _GAMMA),
    ),
    b=(_R2 / 4, _R2 / 4, _GAMMA),
)

TABLEAUS: dict[str, ButcherTableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN2,
        HEUN3,
        RK4,
        ADAPTIVE_HEUN,
        FEHLBERG2,
        BOSH3,
        TSIT5,
        DOPRI5,
        DOPRI8,
        IMPLICIT_EULER,
        IMPLICIT_MIDPOINT,
        TRAPEZOID,
        RADAU_IIA3,
        GAUSS_LEGENDRE4,
        RADAU_IIA5,
        GAUSS_LEGENDRE6,
        SDIRK2,
        TRBDF2,
    )
}
