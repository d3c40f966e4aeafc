"""Solves by the CPU kernels: values, gradients and counts against the reference path.

Steps that the solver chooses follow from error estimates, and rounding moves them. So values are
compared to rounding where the steps are given, and where they are chosen, steps are counted and
errors compared.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from anode_fast import AugODEBlock, MLPField, odeint
from anode_fast.kernels.cpu import library
from anode_fast.problem import ADAPTIVE, FAMILIES, FIXED
from anode_fast.spec import ACTIVATIONS
from anode_fast.tableau import TABLEAUS
from tests.helpers import assert_no_worse

if library.load() is None:
    pytest.skip(library.missing(), allow_module_level=True)

f32, f64 = torch.float32, torch.float64
ROOT = Path(__file__).parents[1]
ADAPTIVE_METHODS = [name for name, family in FAMILIES.items() if family == ADAPTIVE]
FIXED_METHODS = [name for name, family in FAMILIES.items() if family == FIXED]
BATCHES = [0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130, 200]
CONTROLS = ["batch", "sample"]

both_dtypes = pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
both_controls = pytest.mark.parametrize("control", CONTROLS)
one_step = pytest.mark.filterwarnings("ignore:.*it takes one single step")


def times(*values, dtype=f64):
    return torch.tensor(values, dtype=dtype)


# --- random calls ---------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: (x, lambda leaf: leaf),
    "sliced": lambda x: (torch.cat([x, x, x], 1), lambda leaf: leaf[:, x.shape[1] : -x.shape[1]]),
    "transposed": lambda x: (x.t().contiguous(), lambda leaf: leaf.t()),
    "every other row": lambda x: (x.repeat_interleave(2, 0), lambda leaf: leaf[::2]),
    "every other column": lambda x: (x.repeat_interleave(2, 1), lambda leaf: leaf[:, ::2]),
    "expanded row": lambda x: (x[:1].clone(), lambda leaf: leaf.expand(x.shape)),
    "expanded column": lambda x: (x[:, :1].clone(), lambda leaf: leaf.expand(x.shape)),
}
"""From x a leaf, and what makes the state of the leaf."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A field, a state and times. Equal in every dtype but for rounding."""

    dim: int
    hidden: int
    layers: int
    activation: str
    time_dependent: bool
    batch: int
    columns: int
    layout: str
    t: tuple[float, ...]
    t_dtype: torch.dtype
    seed: int

    def weights(self):
        """Random ones, for a field whose values and slopes are of order 1."""
        generator = torch.Generator().manual_seed(self.seed)
        field = MLPField(
            self.dim, self.hidden, num_hidden=self.layers, time_dependent=self.time_dependent
        )
        return [
            torch.randn(p.shape, generator=generator, dtype=f64)
            * (1.3 / math.sqrt(p.shape[1]) if p.dim() == 2 else 0.5)
            for p in field.parameters()
        ]

    def field(self, weights, dtype):
        field = MLPField(
            self.dim,
            self.hidden,
            num_hidden=self.layers,
            activation=self.activation,
            time_dependent=self.time_dependent,
        ).to(dtype)
        with torch.no_grad():
            for p, value in zip(field.parameters(), weights, strict=True):
                p.copy_(value)
        return field

    def random(self, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=f64)


@st.composite
def cases(draw):
    dim = draw(st.integers(1, 20))
    # Multiples of 2^-10: exact in float32. Spread, or several in one step.
    ticks = draw(
        st.lists(
            st.integers(0, draw(st.sampled_from([1000, 12]))), min_size=2, max_size=8, unique=True
        )
    )
    start = draw(st.sampled_from([0, -300, 512]))
    t = tuple((start + tick) / 1024 for tick in sorted(ticks, reverse=draw(st.booleans())))
    return Case(
        dim=dim,
        hidden=draw(st.integers(1, 70)),
        layers=draw(st.integers(1, 4)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        time_dependent=draw(st.booleans()),
        batch=draw(st.sampled_from(BATCHES)),
        columns=draw(st.integers(0, min(5, dim - 1))),
        layout=draw(st.sampled_from(list(LAYOUTS))),
        t=t,
        t_dtype=draw(st.sampled_from([f32, f64])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def scaled(case, tensors, scale):
    """Weights of the field for scale * y; or from their gradients those of the field for y."""
    first, *inner, weight, bias = tensors
    lead = first[:, : case.time_dependent]
    return [
        torch.cat([lead, first[:, case.time_dependent :] / scale], 1),
        *inner,
        scale * weight,
        scale * bias,
    ]


def solved(case, dtype, backend, scale=1, **given):
    """Solution and gradients of a random functional of it by name, and the stats.

    It solves for `scale` times the state: the same with other rounding errors.
    """
    field = case.field(scaled(case, case.weights(), scale), dtype)
    x = scale * case.random(case.batch, case.dim - case.columns).to(dtype)
    leaf, state_of = LAYOUTS[case.layout](x) if case.batch else LAYOUTS["contiguous"](x)
    x = state_of(leaf.requires_grad_())
    t = times(*case.t, dtype=case.t_dtype)
    gradient = "discrete" if backend == "cpu" else "autograd"
    given |= dict(backend=backend, gradient=gradient, atol=scale * given.get("atol", 1e-3))
    with contextlib.ExitStack() as stack:
        if backend == "cpu":
            stack.enter_context(poisoned())
        if case.columns:
            block = AugODEBlock(field, case.columns, t=(case.t[0], case.t[-1]), **given)
            y = block(x, eval_times=t)
            stats = block.stats
        else:
            y, stats = odeint(field, x, t, return_stats=True, **given)
        assert stats.backend == backend
        cotangent = case.random(*y.shape).to(dtype) / scale
        wanted = [leaf, *field.parameters()]
        grads = torch.autograd.grad(y, wanted, cotangent, materialize_grads=True)
    names = ["y", "d_x", *(f"d_{name}" for name, _ in field.named_parameters())]
    found = y.detach() / scale, scale * grads[0], *scaled(case, grads[1:], scale)
    return dict(zip(names, found, strict=True)), stats


@contextlib.contextmanager
def poisoned():
    """The tensors that the kernels are to fill hold nan first. Gives how many there were."""
    count = [0]

    def filled(make):
        @functools.wraps(make)
        def poisoning(*args, **kwargs):
            count[0] += 1
            return make(*args, **kwargs).fill_(math.nan)

        return poisoning

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, filled(getattr(owner, name)))
        yield count


def has_kinks(case, dtype):
    """Whether rounding may put a unit on the other side of a kink, where the slope jumps."""
    return case.activation == "relu" and dtype == f32


def compare(case, dtype, got, refs, exact):
    """No result is worse than that of the worst of `refs`."""
    for name, value in exact.items():
        if name != "y" and has_kinks(case, dtype):
            continue
        if not value.numel():
            assert (got[name].shape, got[name].dtype) == (value.shape, dtype)
            continue
        ref = max((ref[name] for ref in refs), key=lambda ref: (ref - value).abs().max())
        assert_no_worse(got[name], ref, value, name)


def every_case(examples):
    def decorate(test):
        settings = hypothesis.settings(
            max_examples=examples, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
        )
        return settings(hypothesis.given(case=cases(), data=st.data())(test))

    return decorate


# --- values and gradients -------------------------------------------------------------------------


def compare_given_steps(case, dtype, **given):
    got, stats = solved(case, dtype, "cpu", **given)
    refs = [solved(case, dtype, "reference", scale, **given) for scale in (1, 5)]
    exact, _ = solved(case, f64, "reference", scale=3, **given)
    for _, ref_stats in refs:
        assert stats == dataclasses.replace(
            ref_stats, backend="cpu", launches=2, nfe_backward=stats.nfe_backward
        )
    compare(case, dtype, got, [ref for ref, _ in refs], exact)


@one_step
@both_dtypes
@pytest.mark.parametrize("method", FIXED_METHODS)
@every_case(8)
def test_fixed_steps(method, dtype, case, data):
    options = {"interp": data.draw(st.sampled_from(["linear", "cubic"]))}
    if data.draw(st.booleans()):
        options["step_size"] = data.draw(st.sampled_from([0.03, 0.1, 0.3]))
    compare_given_steps(case, dtype, method=method, options=options)


@both_dtypes
@both_controls
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@every_case(8)
def test_adaptive_methods_with_given_steps(method, control, dtype, case, data):
    h = data.draw(st.sampled_from([0.03, 0.1, 0.4]))
    options = {"first_step": h, "min_step": h, "max_step": h}
    compare_given_steps(case, dtype, method=method, options=options, step_control=control)


def assert_same_counts(stats, refs, control):
    """Equal, if the references agree: rounding decides about a step whose error is about 1."""
    counts = [(ref.accepted, ref.rejected) for ref in refs]
    if len(set(counts)) > 1:
        hypothesis.event("the references take different steps")
        return False
    assert (stats.accepted, stats.rejected) == counts[0]
    # After many rejections the reference looks whether the field is deterministic.
    looked = control == "batch" and stats.rejected >= 8
    assert refs[0].nfe - stats.nfe in ((0, 2) if looked else (0,))
    return True


@both_dtypes
@both_controls
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@every_case(4)
def test_chosen_steps(method, control, dtype, case, data):
    order = TABLEAUS[method].order
    if case.activation == "relu":  # errors at its kinks are a matter of luck
        case = dataclasses.replace(case, activation="tanh")
    finest = min({f32: 4, f64: 10}[dtype], 2 * order)  # or it takes too many steps
    tolerances = dict(
        rtol=10 ** -data.draw(st.floats(2, finest)), atol=10 ** -data.draw(st.floats(2, finest))
    )
    # A small error is a matter of rounding. How small it can be and matter, ifactor says.
    smallest = min(tolerances.values()) * (0.9 / 10) ** order
    options = {} if smallest > 1000 * torch.finfo(dtype).eps else {"ifactor": 2.0}
    if data.draw(st.booleans()):
        options["first_step"] = data.draw(st.sampled_from([0.01, 0.3]))
    given = dict(method=method, options=options, step_control=control, **tolerances)
    got, stats = solved(case, dtype, "cpu", **given)
    refs = [solved(case, dtype, "reference", scale, **given) for scale in (1, 3, 5)]
    counted = [stats for _, stats in refs]
    if dtype == f32:
        counted.append(solved(case, f64, "reference", **given)[1])
    if assert_same_counts(stats, counted, control):
        exact, _ = solved(case, f64, "reference", method="dopri8", rtol=1e-12, atol=1e-12)
        compare(case, dtype, got, [ref for ref, _ in refs], exact)
