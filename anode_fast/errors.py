"""What a solve or a call can fail with.

Two families. Bad arguments are `InvalidArgument` (a ValueError) or `InvalidType` (a TypeError),
raised before any work. A solve that cannot go on raises a `SolverError`. Both families also derive
from AssertionError: programs written for torchdiffeq catch that and look at how the message starts,
so "underflow in dt", "max_num_steps exceeded" and "non-finite values in state" are part of the
interface.
"""


class InvalidArgument(ValueError, AssertionError):
    """An argument of the right type with a value that cannot work."""


class InvalidType(TypeError, AssertionError):
    """An argument of the wrong type or dtype."""


class SolverError(RuntimeError, AssertionError):
    """A solve that cannot go on. The message says at which t, with which dt, and what to try."""


class StepSizeUnderflow(SolverError):
    """The step size became too small to advance t: stiffness, a blow-up, or a jump in the field."""


class MaxStepsExceeded(SolverError):
    """The step budget of the whole solve (`max_num_steps`) is spent."""


class NonFiniteState(SolverError):
    """The state, or the field's value for it, holds nan or inf."""


class EventNotFound(SolverError):
    """No event within the step budget."""


class NonDeterministicField(SolverError):
    """The field gives different values for the same (t, y), so no step meets the tolerance."""


class NonlinearSolveFailed(SolverError):
    """The stage equations of an implicit method did not converge."""
