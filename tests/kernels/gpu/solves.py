"""Solves by the GPU kernels and by the reference path, and how they compare."""

import dataclasses
import math
import re

import torch

from anode_fast import AugODEBlock, MLPField, explain, odeint, odeint_adjoint
from anode_fast.kernels.gpu import host
from anode_fast.problem import ADAPTIVE, FAMILIES
from tests.helpers import assert_no_worse

f32, f64 = torch.float32, torch.float64

SCALES = 1, 5, 7, 11
MANY_SCALES = *SCALES, 13, 17, 19, 23
"""For solves of the reference path that differ by rounding only.

Where steps are chosen, the rounding of a few step sizes decides: it takes many to see how far.
"""

LAYOUTS = {
    "contiguous": lambda x: (x, lambda leaf: leaf),
    "sliced": lambda x: (torch.cat([x, x, x], 1), lambda leaf: leaf[:, x.shape[1] : -x.shape[1]]),
    "transposed": lambda x: (x.t().contiguous(), lambda leaf: leaf.t()),
    "every other row": lambda x: (x.repeat_interleave(2, 0), lambda leaf: leaf[::2]),
    "every other column": lambda x: (x.repeat_interleave(2, 1), lambda leaf: leaf[:, ::2]),
    "expanded row": lambda x: (x[:1].clone(), lambda leaf: leaf.expand(x.shape)),
}
"""From x a leaf, and what makes the state of the leaf."""


def times(*values, dtype=f64):
    return torch.tensor(values, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A field, a state and times. Equal in every dtype but for rounding.

    `gain` is the size of the weights; rows of the state differ in size by up to `spread`.
    """

    dim: int = 3
    hidden: int = 16
    layers: int = 1
    activation: str = "tanh"
    time_dependent: bool = True
    rows: int = 5
    columns: int = 0
    layout: str = "contiguous"
    t: tuple[float, ...] = (0.0, 0.4, 1.0)
    gain: float = 1.3
    spread: float = 1.0
    seed: int = 0

    def random(self, *shape):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator, dtype=f64)

    def field(self, dtype, device, scale=1):
        """Of `scale` times the state."""
        field = MLPField(
            *(self.dim, self.hidden),
            num_hidden=self.layers,
            activation=self.activation,
            time_dependent=self.time_dependent,
        )
        weights = [
            (self.gain / math.sqrt(p.shape[1]) if p.dim() == 2 else 0.5) * self.random(*p.shape)
            for p in field.double().parameters()
        ]
        with torch.no_grad():
            for p, value in zip(field.parameters(), self.scaled(weights, scale), strict=True):
                p.copy_(value)
        return field.to(device, dtype)

    def scaled(self, tensors, scale):
        """Weights of the field for scale * y; or from their gradients those of the field for y."""
        first, *inner, weight, bias = tensors
        lead = first[:, : self.time_dependent]
        first = torch.cat([lead, first[:, self.time_dependent :] / scale], 1)
        return [first, *inner, scale * weight, scale * bias]

    def state(self, dtype, device, scale=1):
        """A leaf, and what makes the state, a view of it."""
        sizes = torch.linspace(-1, 1, max(self.rows, 1), dtype=f64)[: self.rows, None]
        x = scale * self.random(self.rows, self.dim - self.columns) * self.spread**sizes
        layout = LAYOUTS[self.layout if self.rows else "contiguous"]
        leaf, state_of = layout(x.to(device, dtype))
        return leaf, lambda: state_of(leaf)


def solved(
    case,
    dtype,
    device,
    backend="triton",
    scale=1,
    wanted=None,
    output=None,
    call=odeint,
    **given,
):
    """Solution and gradients of a random functional of it by name, and the stats.

    It solves for `scale` times the state: the same with other rounding errors.

    Args:
        wanted: Names of the gradients that are wanted, None for all.
        output: The only one that the functional depends on; None: it depends on all.
        call: odeint or odeint_adjoint.
        given: Its other arguments.
    """
    field, (leaf, x) = case.field(dtype, device, scale), case.state(dtype, device, scale)
    leaves = {"d_x": leaf} | {f"d_{name}": p for name, p in field.named_parameters()}
    wanted = list(leaves if wanted is None else wanted)
    for name, tensor in leaves.items():
        tensor.requires_grad_(name in wanted)
    x = x() if "d_x" in wanted else x().detach()
    t = times(*case.t)
    gradient = "autograd" if backend == "reference" else "auto"
    given = dict(rtol=1e-3, atol=1e-3, gradient=gradient) | given | dict(backend=backend)
    given["atol"] = scale * given["atol"]
    if FAMILIES[given.get("method", "dopri5")] == ADAPTIVE:  # a broken controller ends soon
        given["options"] = {"max_num_steps": 100} | given.get("options", {})
    if case.columns:
        block = AugODEBlock(field, case.columns, t=(case.t[0], case.t[-1]), **given)
        y = block(x, eval_times=t)
        stats = block.stats
    else:
        y, stats = call(field, x, t, return_stats=True, **given)
    assert stats.backend == backend and y.requires_grad == bool(wanted)
    found = {"y": y.detach() / scale}
    if wanted:
        cotangent = case.random(*y.shape).to(y) / scale
        if output is not None:
            cotangent[torch.arange(len(t)) != output] = 0
        inputs = [leaves[name] for name in wanted]
        grads = torch.autograd.grad(y, inputs, cotangent, materialize_grads=True)
        grads = dict(zip(wanted, grads, strict=True))
        d_x, *rest = [grads.get(name, torch.zeros_like(leaf)) for name, leaf in leaves.items()]
        values = dict(zip(leaves, [scale * d_x, *case.scaled(rest, scale)], strict=True))
        found |= {name: values[name] for name in wanted}
        if "d_layers.0.weight" in wanted:
            found["d_lead"] = found["d_layers.0.weight"][:, : case.time_dependent]
    return found, stats


def has_kinks(case, dtype):
    """Whether rounding may put a unit on the other side of a kink, where the slope jumps."""
    return case.activation == "relu" and dtype == f32


def compare(case, dtype, device, scales=SCALES, **given):
    """Checks that kernels and reference path agree. Returns the kernels' results and stats."""
    got, stats = solved(case, dtype, device, **given)
    refs = [solved(case, dtype, device, "reference", scale, **given) for scale in scales]
    exact, _ = solved(case, f64, device, "reference", 3, **given)
    for _, count in refs:
        assert (stats.accepted, stats.rejected) == (count.accepted, count.rejected)
        # After many rejections the reference looks whether the field is deterministic.
        assert count.nfe - stats.nfe in ((0, 2) if stats.rejected >= 8 else (0,))
    assert stats.launches == expected_launches(case, dtype, device, stats, **given)
    for name, value in exact.items():
        if name != "y" and has_kinks(case, dtype):
            continue
        if not value.numel():
            assert (got[name].shape, got[name].dtype) == (value.shape, dtype)
            continue
        ref = max((ref[name] for ref, _ in refs), key=lambda ref: (ref - value).abs().max())
        assert_no_worse(got[name], ref, value, name)
    return got, stats


def expected_launches(case, dtype, device, stats, wanted=None, call=odeint, **given):
    """One; for a batch of several tiles one for each attempt, in chunks. Then the gradient's."""
    launches = 1
    adaptive = FAMILIES[given.get("method", "dopri5")] == ADAPTIVE
    by_row = given.get("step_control") == "sample"
    if adaptive and not by_row and programs(case, dtype, device, **given) > 1:
        needed = stats.accepted + stats.rejected + (2 - ("first_step" in given.get("options", {})))
        more = max(needed - host.FIRST_CHUNK, 0)
        launches = host.FIRST_CHUNK + math.ceil(more / host.CHUNK) * host.CHUNK
    if wanted is None or any(wanted):
        launches += 1 if wanted == ["d_x"] else 2
        launches += call is odeint_adjoint and not adaptive  # it solves once more
    return launches


def programs(case, dtype, device, output=None, **given):
    """How many of them solve the case, as `explain` says."""
    state = torch.zeros(case.rows, case.dim, dtype=dtype, device=device)
    field, t = case.field(dtype, device), times(*case.t)
    text = explain(field, state, t, backend="triton", **given)
    return int(re.search(r"(\d+) x \d+ rows", text)[1])
