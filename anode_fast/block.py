"""`AugODEBlock`: augment the input, solve the ODE, return the final state or the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.execute import solve
from anode_fast.fields import ConvField, MLPField
from anode_fast.problem import ADAPTIVE, FAMILIES, pad
from anode_fast.settings import Settings
from anode_fast.spec import size
from anode_fast.stats import SolveStats


class AugODEBlock(nn.Module):
    """An augmented neural ODE as a layer (Dupont, Doucet, Teh, Augmented Neural ODEs, 2019).

    The input gets `augment_dim` more columns (or, for images, channels), last; the ODE
    dy/dt = field(t, y) then carries it from t[0] to t[1]. With augment_dim=0 this is a plain neural
    ODE.

    Args:
        field: nn.Module with forward(t, y), of the augmented size. `AugODEBlock.mlp` and
            `AugODEBlock.conv` make an `MLPField` or `ConvField` to measure.
        augment_dim: Number of augmented columns or channels.
        t: Start and end, two different numbers; may run backwards.
        method: Of the solver, any of `odeint`'s.
        rtol, atol: Tolerances per step.
        options: Options of the method, as for `odeint`. A "max_num_steps" among them goes before
            the argument of that name.
        max_num_steps: Attempted steps of one solve before MaxStepsExceeded. Only methods that
            choose their steps have such a budget; others ignore it.
        gradient: "discrete" (exact, memory of the accepted steps' states), "continuous" (adjoint
            ODE), "autograd" or "auto".
        step_control: "batch" (one step size) or "sample" (one per row).
        backend: "auto", "reference", "cpu" or "triton".
        augmentation: "zeros", or a module that maps x [batch, d, ...] to the augmented part
            [batch, augment_dim, ...].

    Attributes:
        stats: `SolveStats` of the last solve that came to its end, None before. Its `nfe_backward`
            is filled in by the backward pass.

    Raises:
        InvalidArgument, InvalidType: Arguments that cannot work. Names of method, gradient,
            step_control and backend and the options are checked by `odeint`, at the first call.
    """

    stats: SolveStats | None

    def __init__(
        self,
        field: nn.Module,
        augment_dim: int = 0,
        *,
        t: Sequence[float] = (0.0, 1.0),
        method: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-3,
        options: Mapping[str, Any] | None = None,
        max_num_steps: int = 1000,
        gradient: str = "discrete",
        step_control: str = "batch",
        backend: str = "auto",
        augmentation: str | Callable[[Tensor], Tensor] = "zeros",
    ) -> None:
        super().__init__()
        if not isinstance(field, nn.Module):
            raise InvalidType(
                f"AugODEBlock: field is a {type(field).__name__}, want an nn.Module with "
                "forward(t, y). A plain function goes to odeint."
            )
        self.field = field
        self.augment_dim = size("AugODEBlock", "augment_dim", augment_dim, least=0)
        self.t = t
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.options = dict(options or {})
        self.max_num_steps = size("AugODEBlock", "max_num_steps", max_num_steps)
        self.gradient = gradient
        self.step_control = step_control
        self.backend = backend
        self._check_augmentation(augmentation)
        self.augmentation = augmentation
        self.stats = None

    @classmethod
    def mlp(
        cls,
        data_dim: int,
        hidden_dim: int,
        augment_dim: int = 0,
        *,
        num_hidden: int = 2,
        activation: str = "relu",
        time_dependent: bool = True,
        **kw: Any,
    ) -> AugODEBlock:
        """A block on [batch, data_dim] with an `MLPField` of width data_dim + augment_dim.

        Args:
            data_dim: Width of the input.
            hidden_dim: Width of the field's hidden layers.
            augment_dim: Number of augmented columns.
            num_hidden: Number of the field's hidden layers.
            activation: As in `MLPField`.
            time_dependent: Whether t is an input of the field.
            **kw: The block's own arguments.

        Raises:
            InvalidArgument, InvalidType: As `MLPField` and the block.
        """
        data_dim = size("AugODEBlock.mlp", "data_dim", data_dim)
        augment_dim = size("AugODEBlock.mlp", "augment_dim", augment_dim, least=0)
        field = MLPField(
            data_dim + augment_dim,
            hidden_dim,
            num_hidden=num_hidden,
            activation=activation,
            time_dependent=time_dependent,
        )
        return cls(field, augment_dim, **kw)

    @classmethod
    def conv(
        cls,
        img_size: Sequence[int],
        num_filters: int,
        augment_dim: int = 0,
        *,
        activation: str = "relu",
        time_dependent: bool = True,
        **kw: Any,
    ) -> AugODEBlock:
        """A block on images with a `ConvField` of C + augment_dim channels.

        Args:
            img_size: Channels, height and width of the input. The weights depend on the channels
                alone, so the block takes images of other heights and widths too.
            num_filters: Channels between the field's convolutions.
            augment_dim: Number of augmented channels.
            activation: As in `ConvField`.
            time_dependent: Whether t is an input of the field.
            **kw: The block's own arguments.

        Raises:
            InvalidArgument, InvalidType: As `ConvField` and the block.
        """
        channels, _, _ = check_img_size("AugODEBlock.conv", img_size)
        augment_dim = size("AugODEBlock.conv", "augment_dim", augment_dim, least=0)
        field = ConvField(
            channels + augment_dim,
            num_filters,
            activation=activation,
            time_dependent=time_dependent,
        )
        return cls(field, augment_dim, **kw)

    @property
    def t(self) -> tuple[float, float]:
        """Start and end. May be set anew."""
        return self._t

    @t.setter
    def t(self, t: Sequence[float]) -> None:
        self._t = _check_interval(t)
        # Made once, and on the CPU in float64 wherever the state lives: the solver reads it there.
        self._times = torch.tensor(self._t, dtype=torch.float64, device="cpu")

    def forward(self, x: Tensor, eval_times: Tensor | Sequence[float] | None = None) -> Tensor:
        """The state at t[1], or at `eval_times`.

        Args:
            x: Input, [batch, d] or [batch, channels, height, width], floating point.
            eval_times: 1-D, strictly increasing or decreasing. The input is the state at self.t[0]
                whatever they are, so they lie on one side of it; self.t[1] plays no part. The first
                one may be self.t[0] itself: the first state returned is then the augmented input.

        Returns:
            The augmented state [batch, d + augment_dim, ...], or with eval_times one such state per
            time, [len(eval_times), batch, d + augment_dim, ...].

        Raises:
            InvalidArgument, InvalidType: An input that does not fit, before any work.
            SolverError: The solve cannot go on.
        """
        if eval_times is None:
            return self._solve(x, self._times)[-1]
        self._check_input(x)
        times, given = self._output_times(eval_times)
        return self._solve(x, times)[-given:]

    def trajectory(self, x: Tensor, timesteps: int) -> Tensor:
        """The states at `timesteps` equally spaced times from t[0] to t[1], both included.

        Args:
            x: Input, as in `forward`.
            timesteps: At least 2.

        Returns:
            [timesteps, batch, d + augment_dim, ...], the augmented input first.

        Raises:
            InvalidArgument, InvalidType, SolverError: As `forward`.
        """
        timesteps = size("AugODEBlock.trajectory", "timesteps", timesteps, least=2)
        times = torch.linspace(*self.t, timesteps, dtype=torch.float64, device="cpu")
        return self._solve(x, times)

    def augment(self, x: Tensor) -> Tensor:
        """The initial state: x and after it, along dim 1, the augmented part.

        Raises:
            InvalidArgument, InvalidType: x does not fit, or what the augmentation made of it.
        """
        self._check_input(x)
        if self.augment_dim == 0:
            return x
        if isinstance(self.augmentation, str):
            return pad(x, self.augment_dim)
        extra = self.augmentation(x)
        wanted = (x.shape[0], self.augment_dim, *x.shape[2:])
        if not isinstance(extra, Tensor) or extra.shape != wanted:
            got = tuple(extra.shape) if isinstance(extra, Tensor) else type(extra).__name__
            raise InvalidArgument(
                f"AugODEBlock: augmentation made {got} of an input of shape {tuple(x.shape)}, want "
                f"{wanted}: the augmented part alone, with augment_dim={self.augment_dim}."
            )
        return torch.cat([x, extra], 1)

    def extra_repr(self) -> str:
        """For `repr`."""
        return (
            f"augment_dim={self.augment_dim}, t={self.t}, method={self.method!r}, "
            f"rtol={self.rtol}, atol={self.atol}, gradient={self.gradient!r}"
        )

    def _solve(self, x: Tensor, times: Tensor) -> Tensor:
        columns = self.augment_dim if isinstance(self.augmentation, str) else 0
        if columns:
            self._check_input(x)
        else:
            x = self.augment(x)
        options = self.options
        if FAMILIES.get(self.method) == ADAPTIVE:  # others would warn about the option
            options = {"max_num_steps": self.max_num_steps, **options}
        settings = Settings(
            self.rtol,
            self.atol,
            self.method,
            options,
            None,
            self.backend,
            self.step_control,
            self.gradient,
        )
        solution: Tensor
        solution, stats = solve(self.field, x, times, settings, columns)
        # An exported program has no place for them. (torch.compiler.is_exporting is always true in
        # a graph of torch 2.11.)
        if not getattr(torch.compiler, "_is_exporting_flag", False):
            self.stats = stats
        return solution

    def _output_times(self, eval_times: Tensor | Sequence[float]) -> tuple[Tensor, int]:
        """Times for the solver, t[0] first, and how many of them, the last ones, were asked for."""
        try:
            # Python floats are float64, not torch's default dtype.
            dtype = None if isinstance(eval_times, Tensor) else torch.float64
            times = torch.as_tensor(eval_times, dtype=dtype)
        except (TypeError, ValueError, RuntimeError):
            times = None
        if times is None or times.dtype == torch.bool or times.is_complex():
            raise InvalidType(
                f"AugODEBlock: eval_times is {eval_times!r}, want a 1-D tensor or a sequence of "
                "numbers"
            )
        if times.dim() != 1 or not len(times):
            raise InvalidArgument(
                f"AugODEBlock: eval_times has shape {tuple(times.shape)}, want one dim and at "
                "least one time. For the state at self.t[1] leave eval_times out."
            )
        given = len(times)
        # Compared in the dtype of eval_times: a float32 0.1 means the start 0.1.
        starts = bool(times[0] == self.t[0])
        times = times.to("cpu", torch.float64)
        if not starts:
            times = torch.cat([self._times[:1], times])
        steps = times.diff()
        if not ((steps > 0).all() or (steps < 0).all()):
            raise InvalidArgument(
                f"AugODEBlock: eval_times is {eval_times!r}, want strictly increasing or "
                f"decreasing times on one side of the start self.t[0]={self.t[0]}, which may be "
                "the first of them"
            )
        return times, given

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise InvalidType(
                f"AugODEBlock: x is {got}, want a floating point tensor, for example x.float()"
            )
        if x.dim() not in (2, 4):
            raise InvalidArgument(
                f"AugODEBlock: x has shape {tuple(x.shape)}, want (batch, d) or (batch, channels, "
                "height, width). A single sample x goes in as x[None]; for other states, odeint."
            )
        # Of a field of another kind nothing is known before it is called.
        if isinstance(self.field, MLPField):
            dims, want, name, total = 2, "(batch, d)", "dim", self.field.dim
        elif isinstance(self.field, ConvField):
            dims, want = 4, "(batch, d, height, width)"
            name, total = "channels", self.field.channels
        else:
            return
        if x.dim() != dims or x.shape[1] + self.augment_dim != total:
            raise InvalidArgument(
                f"AugODEBlock: x has shape {tuple(x.shape)}, want {want} with d + augment_dim = "
                f"field.{name}: here augment_dim={self.augment_dim} and field.{name}={total}. "
                "Change x, or make the block for this d."
            )

    def _check_augmentation(self, augmentation: object) -> None:
        if augmentation == "zeros":
            return
        if isinstance(augmentation, str) or not callable(augmentation):
            raise InvalidArgument(
                f"AugODEBlock: augmentation is {augmentation!r}, want 'zeros' or a module that "
                "maps x to the augmented part"
            )
        if self.augment_dim == 0:
            raise InvalidArgument(
                "AugODEBlock: there is an augmentation module, but augment_dim is 0. "
                "Set augment_dim to the number of columns or channels that the module returns."
            )


def check_img_size(where: str, img_size: Sequence[int]) -> tuple[int, int, int]:
    """`img_size` as (channels, height, width).

    Raises:
        InvalidArgument, InvalidType: Not three positive ints.
    """
    try:
        channels, height, width = img_size
    except (TypeError, ValueError):
        raise InvalidArgument(
            f"{where}: img_size is {img_size!r}, want (channels, height, width)"
        ) from None
    return (
        size(where, "img_size[0] (channels)", channels),
        size(where, "img_size[1] (height)", height),
        size(where, "img_size[2] (width)", width),
    )


def _check_interval(t: Sequence[float]) -> tuple[float, float]:
    try:
        start, end = (float(time) for time in t)
    except (TypeError, ValueError):
        raise InvalidArgument(f"AugODEBlock: t is {t!r}, want two numbers, start and end") from None
    if not (math.isfinite(start) and math.isfinite(end)) or start == end:
        raise InvalidArgument(f"AugODEBlock: t is {t!r}, want two different finite numbers")
    return start, end
