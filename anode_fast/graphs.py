"""Solves inside the graphs of torch.compile and torch.export: one node each.

See operators.py for what such a node does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from anode_fast import fused
from anode_fast.fields import Known
from anode_fast.problem import State
from anode_fast.recognize import for_graph
from anode_fast.settings import AdjointArguments, Field, Options, Settings
from anode_fast.spec import ConvSpec, described
from anode_fast.stats import GraphStats, SolveStats


def is_abstract(x: State) -> bool:
    """Whether there are no numbers behind a state, but a shape alone."""
    return isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta)


def solve(
    func: Field, known: Known | None, x: State, t: Tensor, settings: Settings, columns: int
) -> tuple[Tensor, SolveStats] | None:
    """A solve as one node of the graph that is being traced, if an operator can carry it out.

    Args:
        func: The user's field.
        known: The same as the kernels know it as it is, or None.
        x, t, settings, columns: As in execute.py.
    """
    if not isinstance(x, Tensor) or not _can_compile(func, x, t, settings):
        return None
    if known is None:
        found = _in_graph(func, x, columns)
        return None if found is None else _node(*found, x, t, settings, columns)
    if not _takes(known, x, columns):
        return None
    return _node((described(known.spec()),), known.tensors(), x, t, settings, columns)


def _can_compile(func: Field, x: Tensor, t: Tensor, settings: Settings) -> bool:
    """Whether an operator can carry out a call. All this is known when the graph is traced."""
    given = settings.adjoint or AdjointArguments()
    options = [*(settings.options or {}).values(), *(given.options or {}).values()]
    return (
        settings.key() is not None
        and all(type(v) is not torch.dtype and v != math.inf for v in options)
        and x.is_floating_point()
        and t.is_floating_point()
        and not t.requires_grad
        and not fused.has_callbacks(func)
        and not (isinstance(func, nn.Module) and fused.has_hooks(func))
    )


def _takes(known: Known, x: Tensor, columns: int) -> bool:
    """Whether a field fits a state, and has all its tensors."""
    spec = known.spec()
    dims, width = (4, spec.channels) if isinstance(spec, ConvSpec) else (2, spec.dim)
    fits = x.dim() == dims and x.shape[1] + columns == width
    return fits and all(isinstance(p, Tensor) for p in known.tensors())  # no bias: None


def _in_graph(func: Field, x: Tensor, columns: int) -> tuple[Any, list[Tensor]] | None:
    """A user's module as a graph knows it, if the kernels do: its specs described, and tensors."""
    if not isinstance(func, nn.Module) or x.dim() not in (2, 4):
        return None
    shape = (x.shape[1] + columns, *x.shape[2:])
    specs, tensors, attributes = _for_graph(func, shape, x.dtype, str(x.device))
    if not specs:
        return None
    for path, name in attributes:  # so that the graph is made anew when they change
        getattr(_inside(func, path), name)
    return specs, [getattr(_inside(func, path), name) for path, name in tensors]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _for_graph(
    func: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Any, tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """What `for_graph` finds: specs described, tensors and attributes as module and name."""
    found = for_graph(func, shape, dtype, torch.device(device))
    tensors = tuple((path, name) for path, _, name in (x.rpartition(".") for x in found.tensors))
    return tuple(map(described, found.specs)), tensors, found.attributes


def _inside(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def _node(
    specs: tuple[Any, ...],
    tensors: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    settings: Settings,
    columns: int,
) -> tuple[Tensor, SolveStats]:
    """A solve as one node of a graph. operators.py reads the string."""
    adjoint = None
    if (given := settings.adjoint) is not None:
        adjoint = (given.rtol, given.atol, given.method, _pairs(given.options))
    call = (
        specs,
        columns,
        (
            *(settings.rtol, settings.atol, settings.method, _pairs(settings.options)),
            *(settings.backend, settings.step_control, settings.gradient, adjoint),
        ),
    )
    solution, counts = torch.ops.anode_fast.solve(x, tensors, t, f"{call}")
    method = settings.method or "dopri5"
    return solution, SolveStats(method=method) if is_abstract(solution) else GraphStats(
        method, counts
    )


def _pairs(options: Options | None) -> tuple[Any, ...] | None:
    return None if options is None else tuple(options.items())
