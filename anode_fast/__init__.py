"""anode_fast: neural ODEs and augmented neural ODEs, torchdiffeq's interface, faster."""

from anode_fast import operators as _operators  # noqa: F401  # registers them
from anode_fast.block import AugODEBlock as AugODEBlock
from anode_fast.distributed import SharedNorm as SharedNorm
from anode_fast.errors import MaxStepsExceeded as MaxStepsExceeded
from anode_fast.errors import NonFiniteState as NonFiniteState
from anode_fast.errors import SolverError as SolverError
from anode_fast.errors import StepSizeUnderflow as StepSizeUnderflow
from anode_fast.fields import ConvField as ConvField
from anode_fast.fields import MLPField as MLPField
from anode_fast.models import ConvODENet as ConvODENet
from anode_fast.models import ODENet as ODENet
from anode_fast.odeint import explain as explain
from anode_fast.odeint import odeint as odeint
from anode_fast.odeint import odeint_adjoint as odeint_adjoint
from anode_fast.odeint import odeint_dense as odeint_dense
from anode_fast.odeint import odeint_event as odeint_event
from anode_fast.plan import show_config as show_config
from anode_fast.stats import SolveStats as SolveStats
from anode_fast.stats import Status as Status

__version__ = "0.1.0"

__all__ = [
    "AugODEBlock",
    "ConvField",
    "ConvODENet",
    "MLPField",
    "MaxStepsExceeded",
    "NonFiniteState",
    "ODENet",
    "SharedNorm",
    "SolveStats",
    "SolverError",
    "Status",
    "StepSizeUnderflow",
    "explain",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "show_config",
]
