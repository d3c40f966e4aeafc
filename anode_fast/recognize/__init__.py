"""A user's own callable as a field that the kernels can run.

The callable is traced once: its ATen operations on tensors that hold no numbers, so that code that
looks at numbers fails the trace instead of being burned into it. What it does is then put into the
kernels' terms (rows.py, images.py) and compared with the callable itself, value and gradient. The
result is kept as long as nothing around the callable changes (surroundings.py), and every solve
compares its first evaluation with the callable's own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from anode_fast.fields import SpecField, alike
from anode_fast.problem import pad
from anode_fast.recognize.images import Images
from anode_fast.recognize.rows import Rows, as_mlp
from anode_fast.recognize.surroundings import Surroundings
from anode_fast.recognize.trace import NotKnown, Weights, name_of
from anode_fast.spec import Spec

CHECKED_ROWS = 8
"""Rows of a batch of known size at which a solve calls the user's code."""

MOST_CHANGES = 4
"""Calls in a row that find a callable changed. Then it is not traced any more."""

MOST_KEPT = 64
"""Callables, and of each the shapes of states, whose traces are kept."""

_ROUNDING_UNITS = 128  # between two ways to compute a field by PyTorch


@dataclass(frozen=True)
class Lowered:
    """A field as kernels take it.

    Attributes:
        specs: Forms of it, the most special one first.
        leaves: Tensors that the field holds, as they were when it was traced.
        prepare: Maps the leaves to the tensors that the specs take; None: they are those.
    """

    specs: tuple[Spec, ...]
    leaves: tuple[Tensor, ...]
    prepare: fx.GraphModule | None


def lower(graph: fx.GraphModule, y: Tensor) -> Lowered:
    """What a trace of f(t, y) is in the kernels' terms.

    Args:
        graph: Its trace.
        y: A state of the shape and dtype that it was traced for.

    Raises:
        NotKnown: It does something else.
    """
    weights = Weights(graph)
    if y.dim() == 4 and any(name_of(x) == "convolution.default" for x in graph.graph.nodes):
        spec, nodes = Images(weights, y).lower()
        return Lowered((spec,), *weights.finish(nodes))
    program, nodes = Rows(weights, y).lower()
    mlp = as_mlp(program)
    leaves, prepare = weights.finish(nodes)
    return Lowered((program,) if mlp is None else (mlp, program), leaves, prepare)


_numbers = itertools.count()


class Recognized(SpecField):
    """A user's callable as a field that the kernels know."""

    def __init__(self, lowered: Lowered, around: Surroundings) -> None:
        super().__init__(lowered.specs, ())
        self._signature = (next(_numbers),)
        self._around = around
        self._prepare = lowered.prepare
        self._getters = [around.getter(leaf) for leaf in lowered.leaves]
        self._checked: set[int] = set()
        self._whole_batch = False

    def signature(self) -> tuple[object, ...]:
        """What two fields have in common that the kernels run alike, but for the tensors."""
        return self._signature

    def tensors(self) -> list[Tensor]:
        """The tensors that the specs take, as they are now."""
        leaves = self.leaves()
        if self._prepare is None:
            return leaves
        made: Sequence[Tensor] = self._prepare(*leaves)
        return list(made)

    def leaves(self) -> list[Tensor]:
        """The tensors that the callable holds, of which the others are made."""
        return [get() for get in self._getters]

    def count(self, evaluations: int) -> None:
        """Notes evaluations, in the counters that the callable's own code keeps too."""
        self.nfe += evaluations
        self._around.count(evaluations)

    def expected(
        self, func: Callable[..., Any], t: Tensor, x: Tensor, columns: int
    ) -> Tensor | None:
        """What the callable's own code gives for the first rows of a batch, at least.

        A batch of a size that was not seen before goes through it whole: code may look at the size.

        Args:
            func: The callable.
            t: The user's times; it is called at the first.
            x: State, [batch, ...].
            columns: Zeros to append to it along dim 1.

        Returns:
            Like the state, or its first rows; None if the code raises, or returns something else.
        """
        few = len(x) > CHECKED_ROWS and len(x) in self._checked and not self._whole_batch
        # Without gradients no view is written to: a field that would is not recognised.
        rows = x.detach() if x.requires_grad else x
        rows = pad(rows[:CHECKED_ROWS] if few else rows.clone(), columns)
        self._around.accept()
        try:
            with torch.no_grad():
                value = func(_first(t, x), rows)
        except Exception:
            value = None
        self._around.restore()
        if not isinstance(value, Tensor) or value.shape != rows.shape or value.dtype != x.dtype:
            if few:  # code for one size of batch
                self._whole_batch = True
                return self.expected(func, t, x, columns)
            return None
        self._checked.add(len(x))
        return value

    def differs(self, expected: Tensor, t: Tensor, x: Tensor, columns: int) -> Tensor:
        """Whether the field's own value differs from what `expected` gave by more than rounding.

        By PyTorch's operations, as the callable has them; waits for no device.

        Args:
            expected: What it gave.
            t, x, columns: As there.

        Returns:
            A bool, 0-d, on the state's device.
        """
        with torch.no_grad():
            found = self.evaluate(self.tensors(), _first(t, x), pad(x[: len(expected)], columns))
            self.count(-1)  # the solve counts it
            eps = torch.finfo(x.dtype).eps
            if x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
                eps = 2**-11
            return ~alike(found, expected, _ROUNDING_UNITS * eps)

    def compare(self, func: Callable[..., Any], t: float, y: Tensor) -> None:
        """Compares value and gradients with those of the callable's own code at a state.

        Args:
            func: The callable.
            t: A time, the user's.
            y: A state, of few rows.

        Raises:
            NotKnown: They differ.
        """
        wanted = [x for x in self.leaves() if x.requires_grad]
        found = []
        self._around.accept()
        try:
            found = [_derivatives(call, t, y, wanted) for call in (func, self)]
        finally:
            self._around.restore()
        for i, (theirs, ours) in enumerate(zip(*found, strict=True)):
            if theirs.shape != ours.shape or not _close(theirs, ours):
                what = "gradient" if i else "value"
                raise NotKnown(f"its {what} is not that of the operations in its trace")


class _Known:
    """What is known of a callable: its fields by the shape of the state, or why there are none."""

    def __init__(self) -> None:
        self.func: Any = None  # a function whose code others may share
        self.around: Surroundings | None = None
        self.fields: dict[tuple[Any, ...], Recognized | str] = {}
        self.changes = 0


_known: weakref.WeakKeyDictionary[Any, dict[Any, _Known]] = weakref.WeakKeyDictionary()


def recognize(func: Callable[..., Any], t: Tensor, x: Tensor, columns: int = 0) -> Recognized | str:
    """A callable as a field that the kernels can run, or why it is none.

    Args:
        func: Maps (t, y) to dy/dt.
        t: Times, the user's; it may be called at the first.
        x: A state at which it may be called, float32 or float64, [batch, ...] or [dim].
        columns: Zeros to append to it along dim 1.
    """
    known = _of(func)
    if known is None:
        return "the field is an object that cannot be remembered (it has no hash)"
    if known.changes >= MOST_CHANGES:
        return "the field, or what it uses, changes from call to call"
    key = (x.shape[1:] if x.dim() > 1 else x.shape, x.dim(), columns, x.dtype, x.device)
    around = known.around
    if around is not None:
        if around.has_hooks():
            return "the field has hooks, which would not run"
        if not _is_same(func, known.func, around) or around.have_changed():
            known.changes += 1
            known.around = None
            known.fields.clear()
        else:
            known.changes = 0
    if key not in known.fields:
        if len(known.fields) >= MOST_KEPT:
            known.fields.clear()
        with _apart():
            known.fields[key] = _look_at(func, float(t[0]), pad(x, columns), known)
    return known.fields[key]


@dataclass(frozen=True)
class ForGraph:
    """A module as a graph of torch.compile or torch.export knows it, in names and numbers.

    Attributes:
        specs: What it is; empty if the kernels do not know it.
        tensors: Names of the tensors that the specs take, "net.0.weight", say.
        attributes: Names of modules and their attributes that its code may look at.
    """

    specs: tuple[Spec, ...] = ()
    tensors: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()


def for_graph(module: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: Any) -> ForGraph:
    """A user's module by its names, for a graph that is being traced.

    Args:
        module: The module. Its tensors may hold no numbers.
        shape: Of its state, without the batch.
        dtype, device: Of its state.
    """
    with _apart():
        y = torch.rand(4, *shape, dtype=dtype, device=device)
        held = dict(module.named_parameters()) | dict(module.named_buffers())
        if any(type(x) not in (Tensor, nn.Parameter) for x in held.values()):
            held = {
                name: torch.rand(x.shape, dtype=x.dtype, device=x.device).requires_grad_(
                    x.requires_grad
                )
                for name, x in held.items()
            }

        def func(t: Tensor, y: Tensor) -> Any:
            return torch.func.functional_call(module, held, (t, y))

        found = _look_at(func, 0.0, y, _Known())
        if isinstance(found, str):
            return ForGraph()
        names = {id(x): name for name, x in held.items()}
        leaves = found.leaves()
        if found.tensors() != leaves or not all(id(x) in names for x in leaves):
            return ForGraph()
        attributes = tuple(
            (name, key)
            for name, inner in module.named_modules()
            for key, value in vars(inner).items()
            if isinstance(value, (bool, float, str)) and not key.startswith("_")
        )
        return ForGraph(found.specs, tuple(names[id(x)] for x in leaves), attributes)


def refuse(func: Callable[..., Any], why: str) -> None:
    """Leaves a callable to its own code until something around it changes. With a warning.

    Args:
        func: The callable.
        why: What is wrong, a sentence without its end.
    """
    warnings.warn(
        f"odeint: {why}, so its own code is used from now on. What a field depends on besides t, y "
        'and what it holds is not seen in its trace. backend="reference" avoids this warning.',
        stacklevel=4,
    )
    known = _of(func)
    if known is not None:
        known.fields = dict.fromkeys(known.fields, why)


def _first(t: Tensor, x: Tensor) -> Tensor:
    """The first time, where and as the state is."""
    time = t[0]
    is_alike = time.dtype is x.dtype and time.device == x.device
    return time if is_alike else time.to(x)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Away from modes of the user and from a graph that is being traced: they see none of this."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch._guards.tracing(None):
        yield


def _of(func: Callable[..., Any]) -> _Known | None:
    """Where a callable's traces are kept: with a module or object, or with a function's code."""
    owner, part = _owner(func)
    try:
        parts = _known.get(owner)
        if parts is None:
            if len(_known) >= MOST_KEPT:
                _known.clear()
            parts = _known[owner] = {}
        known = parts.get(part)
        if known is None:
            known = parts[part] = _Known()
        return known
    except TypeError:
        return None


def _owner(func: Any) -> tuple[Any, Any]:
    if isinstance(func, nn.Module):
        return func, None
    if isinstance(func, functools.partial):
        return _owner(func.func)
    if isinstance(func, types.MethodType):
        return func.__self__, func.__func__
    if isinstance(func, types.FunctionType):
        return func.__code__, None
    return func, None


def _is_same(func: Any, known: Any, around: Surroundings) -> bool:
    """Whether a callable is the one that was traced, or one made by the same code anew."""
    if known is None or func is known:  # None: it belongs to its owner
        return True
    if isinstance(func, functools.partial) and isinstance(known, functools.partial):
        given = (*func.args, *func.keywords, *func.keywords.values())
        before = (*known.args, *known.keywords, *known.keywords.values())
        return _is_same(func.func, known.func, around) and _are(given, before)
    if isinstance(func, types.FunctionType) and isinstance(known, types.FunctionType):
        cells, before_cells = func.__closure__ or (), known.__closure__ or ()
        return (
            func.__code__ is known.__code__
            and func.__globals__ is known.__globals__
            and _are(func.__defaults__ or (), known.__defaults__ or ())
            and not around.counters  # which would be the other one's
            and _are([x.cell_contents for x in cells], [x.cell_contents for x in before_cells])
        )
    return isinstance(func, types.MethodType) and func == known


def _are(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether all are the same objects, or equal numbers."""
    return len(a) == len(b) and all(
        x is y or (type(x) is type(y) and isinstance(x, (int, float, str)) and x == y)
        for x, y in zip(a, b, strict=True)
    )


def _look_at(func: Callable[..., Any], t: float, y: Tensor, known: _Known) -> Recognized | str:
    """Traces a callable."""
    if known.around is None:
        known.around = Surroundings(func)
        is_own = isinstance(func, (types.FunctionType, functools.partial))
        known.func = func if is_own else None
    around = known.around
    if around.has_hooks():
        return "the field has hooks, which would not run"
    try:
        field = Recognized(lower(_trace(func, y, around), y), around)
        try:
            field.compare(func, t, y[:CHECKED_ROWS] if y.dim() > 1 else y)
        except NotKnown:
            raise
        except Exception:  # code for one size of batch, perhaps
            field.compare(func, t, y)
        return field
    except NotKnown as why:
        return f"the field is not known to the kernels: {why}"


class _NoWrites(TorchDispatchMode):
    """Refuses operations that would write into a tensor that holds numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and type(value) in (Tensor, nn.Parameter):
                    raise NotKnown(f"it writes into a tensor in place ({func})")
        return func(*args, **(kwargs or {}))


_DECOMPOSED = (
    *("addcmul", "addcdiv", "lerp", "mish", "hardsigmoid", "hardswish"),
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "threshold", "glu"),
)
"""Operations that a trace holds as simpler ones."""


@functools.cache
def _decompositions() -> Any:
    return torch._decomp.get_decompositions([getattr(torch.ops.aten, x) for x in _DECOMPOSED])


def _trace(func: Callable[..., Any], y: Tensor, around: Surroundings) -> torch.fx.GraphModule:
    """The graph of a callable's operations. Finds its counters."""
    # Not at the top: it takes a second.
    from torch.fx.experimental.proxy_tensor import make_fx

    around.accept()
    traced = make_fx(
        torch.func.functionalize(lambda t, y: func(t, y)),
        decomposition_table=_decompositions(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    changed = ""
    try:
        with torch.no_grad(), _NoWrites():  # type: ignore[no-untyped-call]
            graph = traced(torch.zeros((), dtype=y.dtype, device=y.device), y.detach())
    except NotKnown:
        raise
    except Exception as error:
        if "DataDependent" in type(error).__name__:
            raise NotKnown(
                "it cannot be traced: its code looks at numbers (a branch on t or y, float(), "
                "item())"
            ) from None
        text = str(error).strip().splitlines()
        said = f": {text[0][:200]}" if text else ""
        raise NotKnown(f"it cannot be traced ({type(error).__name__}{said})") from None
    finally:
        changed = around.find_counters()
    if changed:
        raise NotKnown(f"its code stores values ({changed})")
    return graph


def _derivatives(
    call: Callable[..., Any], t: float, y: Tensor, wanted: Sequence[Tensor]
) -> list[Tensor]:
    """A callable's value, and gradients with respect to t, y and tensors."""
    with torch.enable_grad():
        time = torch.tensor(t, dtype=y.dtype, device=y.device, requires_grad=True)
        inputs = (time, y.detach().clone().requires_grad_(), *wanted)
        value = call(time, inputs[1])
        if not value.requires_grad:
            return [value, *(torch.zeros_like(x) for x in inputs)]
        size = value.numel()
        cotangent = torch.linspace(0.5, 1.5, size, dtype=value.dtype, device=value.device)
        grads = torch.autograd.grad(
            [value],
            inputs,
            [cotangent.reshape(value.shape)],
            retain_graph=True,  # of what the tensors were made of
            allow_unused=True,
            materialize_grads=True,
        )
    return [value.detach(), *grads]


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to a few thousand units of rounding, nan equal to nan."""
    finite = a[torch.isfinite(a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    eps = torch.finfo(a.dtype).eps
    close = torch.isclose(b, a, rtol=math.sqrt(eps) / 4, atol=4096 * eps * scale, equal_nan=True)
    return bool(close.all())
