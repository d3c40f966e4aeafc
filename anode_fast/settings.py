"""The arguments of a solve but for field, state and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anode_fast.adjoint import AdjointOptions
from anode_fast.fields import Known
from anode_fast.plan import Plan, choose
from anode_fast.problem import Problem, State, make_problem

Options = Mapping[str, Any]
Field = Callable[..., Any]


@dataclass(frozen=True)
class AdjointArguments:
    """What odeint_adjoint takes beside odeint's arguments."""

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    options: Options | None = None
    params: list[Tensor] | None = None

    @property
    def has_options(self) -> bool:
        """Whether any of them is about the adjoint ODE."""
        return any(x is not None for x in (self.rtol, self.atol, self.method, self.options))


_SIMPLE = (float, int, str, bool, torch.dtype)


@dataclass(slots=True)
class Settings:
    """The arguments of a solve but for field, state and times. `adjoint`: of odeint_adjoint."""

    rtol: Any
    atol: Any
    method: str | None
    options: Options | None
    event_fn: Callable[..., Any] | None
    backend: str
    step_control: str
    gradient: str
    adjoint: AdjointArguments | None = None

    def problem(self, func: Field, y0: State, t: Tensor, warn: bool = False) -> Problem:
        """The call in normal form."""
        return make_problem(
            func,
            y0,
            t,
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            options=self.options,
            event_fn=self.event_fn,
            warn=warn,
        )

    def key(self) -> tuple[Any, ...] | None:
        """What two calls have in common that are carried out alike; None for special arguments."""
        given = self.adjoint
        options = _frozen(self.options)
        if self.event_fn or options is None or not type(self.rtol) is type(self.atol) is float:
            return None
        names = (self.method or "", self.backend, self.step_control, self.gradient)
        if not all(type(name) is str for name in names):
            return None
        of_adjoint: tuple[Any, ...] = ()
        if given is not None:
            own = _frozen(given.options)
            tolerances = (given.rtol, given.atol)
            simple = all(x is None or type(x) is float for x in tolerances)
            simple = simple and (given.method is None or type(given.method) is str)
            if given.params is not None or own is None or not simple:
                return None
            of_adjoint = (*tolerances, given.method, given.options is None, own)
        return (
            *(self.rtol, self.atol, self.method, options),
            *(self.backend, self.step_control, self.gradient, of_adjoint),
        )

    def plan(
        self,
        problem: Problem,
        backward: AdjointOptions,
        field: Known | None,
        unknown: str,
    ) -> Plan:
        """How the call will be carried out.

        Args:
            problem: In normal form.
            backward: How the adjoint ODE would be solved.
            field, unknown: The field as the kernels know it, or why they do not.
        """
        given = self.adjoint or AdjointArguments()
        return choose(
            problem,
            backend=self.backend,
            gradient=self.gradient,
            step_control=self.step_control,
            backward=backward,
            is_adjoint=self.adjoint is not None,
            has_adjoint_options=given.has_options,
            params=given.params,
            field=field,
            unknown=unknown,
        )

    def backward(self, problem: Problem) -> AdjointOptions:
        """How the adjoint ODE is solved: as the forward one where nothing else is said."""
        given = self.adjoint or AdjointArguments()
        inherited = {k: v for k, v in (self.options or {}).items() if k != "norm"}
        return AdjointOptions(
            problem.rtol if given.rtol is None else given.rtol,
            problem.atol if given.atol is None else given.atol,
            given.method or problem.method,
            inherited if given.options is None else dict(given.options),
        )


def _frozen(options: Options | None) -> tuple[Any, ...] | None:
    """Options of simple values as a tuple; None if there are others."""
    if not options:
        return ()
    if not isinstance(options, Mapping) or not all(
        type(value) in _SIMPLE for value in options.values()
    ):
        return None
    return tuple(sorted(options.items()))
