"""Solves as operators of torch.ops: what a graph of torch.compile or torch.export keeps.

A graph holds a solve as one node, which runs what an eager call runs. It gets the field's weights
as tensors and everything else as a string: numbers and names, known when the graph is traced.

For the gradient, a node hands the eager solve's own graph to the node of the backward pass. Only
tensors can pass between nodes: so one goes along whose memory is the place where that graph is
kept, and it ends with that memory. Where a copy arrives in its place, the solve is made again.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anode_fast import fused
from anode_fast.errors import InvalidArgument
from anode_fast.execute import solve
from anode_fast.fields import SpecField
from anode_fast.settings import AdjointArguments, Settings
from anode_fast.spec import ConvSpec, Spec, from_description
from anode_fast.stats import NUM_COUNTS, SolveStats, counted

_ops = torch.library.Library("anode_fast", "DEF")
for _name, _schema in {
    # The solution and its counts.
    "solve": "(Tensor x, Tensor[] parameters, Tensor t, str call) -> (Tensor, Tensor)",
    # The same, and where the way back is kept.
    "solve_forth": "(Tensor x, Tensor[] parameters, Tensor t, bool[] needs, str call)"
    " -> (Tensor, Tensor, Tensor)",
    "solve_back": "(Tensor grad, Tensor x, Tensor[] parameters, Tensor t, Tensor way, bool[] needs,"
    " str call) -> Tensor[]",
}.items():
    # A solve on a GPU waits for its outcome.
    _ops.define(_name + _schema, tags=torch.Tag.cudagraph_unsafe)


# --- what a node runs -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _recipe(call: str) -> tuple[tuple[Spec, ...], int, Settings]:
    """What a field is, appended columns, and the settings."""
    specs, columns, (rtol, atol, method, options, *names, adjoint) = ast.literal_eval(call)
    settings = Settings(rtol, atol, method, dict(options or ()), None, *names)
    if adjoint is not None:
        of_rtol, of_atol, of_method, own = adjoint
        own = None if own is None else dict(own)
        settings.adjoint = AdjointArguments(of_rtol, of_atol, of_method, own)
    return tuple(map(from_description, specs)), columns, settings


def _solve(
    x: Tensor, parameters: Sequence[Tensor], t: Tensor, call: str
) -> tuple[Tensor, SolveStats]:
    """The eager solve."""
    specs, columns, settings = _recipe(call)
    dims, width = (4, specs[0].channels) if isinstance(specs[0], ConvSpec) else (2, specs[0].dim)
    if x.dim() != dims or x.shape[1] + columns != width:
        raise InvalidArgument(
            f"anode_fast::solve: x has shape {tuple(x.shape)}, want {dims} dims, the second of "
            f"size {width - columns}"
        )
    solution, stats = solve(SpecField(specs, parameters), x, t, settings, columns)
    return solution, stats


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd works as it does outside of operators, where the dispatcher is past it."""
    keys: Any = torch._C.DispatchKey
    dispatch: Any = torch._C
    left_out = dispatch._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
        left_out = left_out.remove(key)
    included = dispatch._dispatch_tls_local_include_set()
    with dispatch._ForceDispatchKeyGuard(included, left_out), torch.enable_grad():
        yield


class _Way(ctypes.c_uint8 * 1):  # type: ignore[misc]
    """Memory of a tensor, which lives as long as that, and the graph of an eager solve.

    Attributes:
        solution: The solution.
        inputs: The state and the field's tensors in it; what requires grad is wanted.
        stats, counts: Its counts, and the same in the tensor that the operator returned.
    """

    solution: Tensor
    inputs: list[Tensor]
    stats: SolveStats
    counts: Tensor


_ways: weakref.WeakValueDictionary[int, _Way] = weakref.WeakValueDictionary()
"""By the address of the memory."""


def _solve_alone(
    x: Tensor, parameters: Sequence[Tensor], t: Tensor, call: str
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        solution, stats = _solve(x, parameters, t, call)
    return solution, counted(stats)


def _solve_forth(
    x: Tensor, parameters: Sequence[Tensor], t: Tensor, needs: Sequence[bool], call: str
) -> tuple[Tensor, Tensor, Tensor]:
    way = _Way()
    with _recording():
        way.inputs = [
            y.detach().requires_grad_(need) for y, need in zip((x, *parameters), needs, strict=True)
        ]
        way.solution, way.stats = _solve(way.inputs[0], way.inputs[1:], t, call)
    way.counts = counted(way.stats)
    kept = torch.frombuffer(way, dtype=torch.uint8)
    _ways[kept.data_ptr()] = way
    # A copy: a graph may write into the memory of a result that it needs no more.
    return way.solution.detach().clone(), way.counts, kept


def _solve_back(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    t: Tensor,
    way: Tensor,
    needs: Sequence[bool],
    call: str,
) -> list[Tensor]:
    kept = _ways.get(way.data_ptr())
    if kept is None:
        *_, way = _solve_forth(x, parameters, t, needs, call)
        kept = _ways[way.data_ptr()]
    wanted = [y for y in kept.inputs if y.requires_grad]
    with _recording():
        grads = torch.autograd.grad(
            kept.solution, wanted, grad, retain_graph=True, materialize_grads=True
        )
    kept.counts.copy_(counted(kept.stats))
    # Results of an operator share no memory.
    return [g.clone(memory_format=torch.contiguous_format) for g in grads]


# --- gradient -------------------------------------------------------------------------------------


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: str, t: Tensor, x: Tensor, *parameters: Tensor) -> Any:
        needs = ctx.needs_input_grad[2:]
        with torch._C._AutoDispatchBelowAutograd():
            solution, counts, way = torch.ops.anode_fast.solve_forth(x, parameters, t, needs, call)
        ctx.call = call
        ctx.save_for_backward(t, way, x, *parameters)
        ctx.mark_non_differentiable(counts)
        return solution, counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        t, way, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or fused.is_batched(grad):
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                # Aliases: an input may be made of another one, or be the same tensor twice.
                x, *parameters = inputs = [y.view_as(y) for y in inputs]
                solution, _ = _solve(x, parameters, t, ctx.call)
                found = fused.gradients_of(solution, inputs, grad, needs, create_graph)
            return None, None, *found
        x, *parameters = inputs
        grads = iter(torch.ops.anode_fast.solve_back(grad, x, parameters, t, way, needs, ctx.call))
        return None, None, *[next(grads) if need else None for need in needs]


def _differentiable(x: Tensor, parameters: Sequence[Tensor], t: Tensor, call: str) -> Any:
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *parameters)):
        return _Node.apply(call, t, x, *parameters)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.anode_fast.solve(x, parameters, t, call)


_ops.impl("solve", _differentiable, "Autograd")
for _key in ("CPU", "CUDA"):
    _ops.impl("solve", _solve_alone, _key)
    _ops.impl("solve_forth", _solve_forth, _key)
    _ops.impl("solve_back", _solve_back, _key)


# --- shapes ---------------------------------------------------------------------------------------


@torch.library.register_fake("anode_fast::solve")  # type: ignore[untyped-decorator]
def _solve_fake(
    x: Tensor, parameters: Sequence[Tensor], t: Tensor, call: str
) -> tuple[Tensor, Tensor]:
    _, columns, _ = _recipe(call)
    solution = x.new_empty((t.shape[0], x.shape[0], x.shape[1] + columns, *x.shape[2:]))
    return solution, torch.empty(NUM_COUNTS, dtype=torch.int64, device="cpu")


@torch.library.register_fake("anode_fast::solve_forth")  # type: ignore[untyped-decorator]
def _solve_forth_fake(
    x: Tensor, parameters: Sequence[Tensor], t: Tensor, needs: Sequence[bool], call: str
) -> tuple[Tensor, Tensor, Tensor]:
    way = torch.empty(1, dtype=torch.uint8, device="cpu")
    return *_solve_fake(x, parameters, t, call), way


@torch.library.register_fake("anode_fast::solve_back")  # type: ignore[untyped-decorator]
def _solve_back_fake(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    t: Tensor,
    way: Tensor,
    needs: Sequence[bool],
    call: str,
) -> list[Tensor]:
    wanted = [y for y, need in zip((x, *parameters), needs, strict=True) if need]
    return [y.new_empty(y.shape) for y in wanted]
