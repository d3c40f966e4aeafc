"""The vector fields of the paper as modules: `MLPField`, `ConvField`.

Neither builds the input [t, y] that its weights describe. Time is the same at every pixel, so its
share of an affine layer is known without reading the state: it goes into the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.kernels.program import evaluate as evaluate_program
from anode_fast.spec import ConvSpec, MLPSpec, Spec, check_activation, program_of, size

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "identity": lambda x: x,
}


class MLPField(nn.Module):
    """Perceptron f(t, y) (Dupont, Doucet, Teh, Augmented Neural ODEs, 2019, appendix E).

    Args:
        dim: Width of the state, data and augmented.
        hidden_dim: Width of every hidden layer.
        num_hidden: Number of hidden layers, at least 1.
        activation: relu, softplus, tanh, sigmoid, silu, gelu, elu or identity.
        time_dependent: Whether t is an input. It is the first one: the first layer's weight is
            [hidden_dim, 1 + dim], for the input [t, y].

    Attributes:
        nfe: Evaluations so far, but for those that torch.compile has compiled. Set it to 0 to count
            anew.
        layers: The nn.Linear layers. `forward` reads their weights and does not call them:
            parametrizations work, forward hooks on them do not run.

    Raises:
        InvalidArgument, InvalidType: A width or number below 1, an unknown activation.
    """

    nfe: int

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        num_hidden: int = 2,
        activation: str = "relu",
        time_dependent: bool = True,
    ) -> None:
        super().__init__()
        self.dim = size("MLPField", "dim", dim)
        self.hidden_dim = size("MLPField", "hidden_dim", hidden_dim)
        self.num_hidden = size("MLPField", "num_hidden", num_hidden)
        check_activation("MLPField", activation)
        self.activation = activation
        self.time_dependent = bool(time_dependent)
        self.nfe = 0
        widths = [self.dim + self.time_dependent, *[self.hidden_dim] * self.num_hidden, self.dim]
        self.layers = nn.ModuleList(
            nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt.

        Args:
            t: Time, 0-d, or one per row, [batch, 1]; in y's dtype.
            y: State, [batch, dim] or [dim], in the weights' dtype.

        Returns:
            Like y.

        Raises:
            InvalidArgument, InvalidType: Shapes or dtypes that do not fit.
        """
        return self.evaluate(self.tensors(), t, y)

    def evaluate(self, tensors: Sequence[Tensor], t: Tensor, y: Tensor) -> Tensor:
        """dy/dt as `forward` gives it, with these tensors in the place of the field's own.

        Args:
            tensors: Like what `tensors()` returns.
            t, y: As in `forward`.
        """
        self.count(1)
        act = _FUNCTIONS[self.activation]
        weight, bias = tensors[:2]
        if y.shape[-1:] != (self.dim,) or y.dim() > 2:
            _refuse_state("MLPField", y, f"(batch, {self.dim}) or ({self.dim},)")
        _check_dtype("MLPField", y, weight)
        if self.time_dependent:
            _check_time("MLPField", t, y)
            # One split, not two slices: its backward pass is one operation.
            w_time, w_state = weight.t().split_with_sizes((1, self.dim))
            bias = torch.addcmul(bias, t, w_time)
            if y.dim() == 2:
                h = torch.addmm(bias, y, w_state)
            else:
                h = y @ w_state + bias[0]
        else:
            h = F.linear(y, weight, bias)
        for weight, bias in zip(tensors[2::2], tensors[3::2], strict=True):
            h = F.linear(act(h), weight, bias)
        return h

    def count(self, evaluations: int) -> None:
        """Notes evaluations."""
        # Not `self.nfe += 1`: nn.Module's __setattr__ alone would be 5% of a small evaluation.
        if not torch.compiler.is_compiling():  # each count would be another graph
            self.__dict__["nfe"] += evaluations

    def tensors(self) -> list[Tensor]:
        """Weight and bias of every layer, first to last."""
        found: list[Tensor] = []
        for layer in self._modules["layers"]._modules.values():  # type: ignore[union-attr]
            # Past nn.Module.__getattr__, which costs more than all else here. A parametrized
            # layer computes its weight there.
            own = layer._parameters  # type: ignore[union-attr]
            if "weight" in own and "bias" in own:
                found += own["weight"], own["bias"]  # type: ignore[arg-type]
            else:
                found += _made(cast("nn.Linear", layer))
        return found

    def spec(self) -> MLPSpec:
        """The field as plain data."""
        hidden = (self.hidden_dim,) * self.num_hidden
        return MLPSpec(self.dim, hidden, self.activation, self.time_dependent)

    def signature(self) -> tuple[object, ...]:
        """What two fields have in common that the kernels run alike, but for the tensors."""
        return (self.dim, self.hidden_dim, self.num_hidden, self.activation, self.time_dependent)

    def extra_repr(self) -> str:
        """For `repr`."""
        return f"activation={self.activation!r}, time_dependent={self.time_dependent}"


class ConvField(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 as f(t, y) on images (Dupont, Doucet, Teh, 2019, appendix E).

    Args:
        channels: Of the state, data and augmented.
        num_filters: Channels between the convolutions.
        activation: relu, softplus, tanh, sigmoid, silu, gelu, elu or identity.
        time_dependent: Whether t, as an image, is the first input channel of every convolution:
            weights are [out, 1 + in, k, k]. Zero padding applies to it as to any channel.

    Attributes:
        nfe: Evaluations so far, but for those that torch.compile has compiled. Set it to 0 to count
            anew.
        conv1, conv2, conv3: The nn.Conv2d layers. `forward` reads their weights and does not call
            them: parametrizations work, forward hooks on them do not run.

    Raises:
        InvalidArgument, InvalidType: A size below 1, an unknown activation.
    """

    nfe: int

    def __init__(
        self,
        channels: int,
        num_filters: int,
        *,
        activation: str = "relu",
        time_dependent: bool = True,
    ) -> None:
        super().__init__()
        self.channels = size("ConvField", "channels", channels)
        self.num_filters = size("ConvField", "num_filters", num_filters)
        check_activation("ConvField", activation)
        self.activation = activation
        self.time_dependent = bool(time_dependent)
        self.nfe = 0
        extra = int(self.time_dependent)
        self.conv1 = nn.Conv2d(self.channels + extra, self.num_filters, 1)
        self.conv2 = nn.Conv2d(self.num_filters + extra, self.num_filters, 3, padding=1)
        self.conv3 = nn.Conv2d(self.num_filters + extra, self.channels, 1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt.

        Args:
            t: Time, 0-d, or one per image, [batch, 1, 1, 1]; in y's dtype.
            y: State, [batch, channels, height, width], in the weights' dtype.

        Returns:
            Like y.

        Raises:
            InvalidArgument, InvalidType: Shapes or dtypes that do not fit.
        """
        return self.evaluate(self.tensors(), t, y)

    def evaluate(self, tensors: Sequence[Tensor], t: Tensor, y: Tensor) -> Tensor:
        """dy/dt as `forward` gives it, with these tensors in the place of the field's own.

        Args:
            tensors: Like what `tensors()` returns.
            t, y: As in `forward`.
        """
        self.count(1)
        if y.dim() != 4 or y.shape[1] != self.channels:
            _refuse_state("ConvField", y, f"(batch, {self.channels}, height, width)")
        _check_dtype("ConvField", y, tensors[0])
        if self.time_dependent:
            _check_time("ConvField", t, y)
        return evaluate_convolutions(self.spec(), tensors, t, y)

    def count(self, evaluations: int) -> None:
        """Notes evaluations."""
        if not torch.compiler.is_compiling():  # as in MLPField
            self.__dict__["nfe"] += evaluations

    def tensors(self) -> list[Tensor]:
        """Weight and bias of every convolution, first to last."""
        return [x for conv in (self.conv1, self.conv2, self.conv3) for x in _made(conv)]

    def spec(self) -> ConvSpec:
        """The field as plain data."""
        return ConvSpec(self.channels, self.num_filters, self.activation, self.time_dependent)

    def signature(self) -> tuple[object, ...]:
        """What two fields have in common that the kernels run alike, but for the tensors."""
        return (self.channels, self.num_filters, self.activation, self.time_dependent)

    def extra_repr(self) -> str:
        """For `repr`."""
        return f"activation={self.activation!r}, time_dependent={self.time_dependent}"


class SpecField:
    """A field given by its spec and tensors, without a module.

    Args:
        specs: What it is; several forms of it, for the same tensors, the most special one first.
        tensors: As the specs name them.

    Attributes:
        specs: The same.
        nfe: Evaluations so far.
    """

    def __init__(self, specs: Sequence[Spec], tensors: Sequence[Tensor]) -> None:
        self.specs = tuple(specs)
        self.nfe = 0
        self._tensors = list(tensors)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt, as `evaluate` gives it with the field's tensors."""
        return self.evaluate(self.tensors(), t, y)

    def spec(self) -> Spec:
        """The most special form."""
        return self.specs[0]

    def tensors(self) -> list[Tensor]:
        """The tensors that the specs take."""
        return self._tensors

    def signature(self) -> tuple[object, ...]:
        """What two fields have in common that the kernels run alike, but for the tensors."""
        return self.specs

    def evaluate(self, tensors: Sequence[Tensor], t: Tensor, y: Tensor) -> Tensor:
        """dy/dt by PyTorch's operations, with these tensors. Differentiable.

        Args:
            tensors: Like what `tensors()` returns.
            t: Time, 0-d, or [batch, 1, ...].
            y: State, [*batch, dim], or an image.
        """
        self.count(1)
        if tensors:
            names = {MLPSpec: "MLPField", ConvSpec: "ConvField"}
            _check_dtype(names.get(type(self.specs[0]), "the field"), y, tensors[0])
        spec = self.specs[-1]
        if isinstance(spec, ConvSpec):
            return evaluate_convolutions(spec, tensors, t, y)
        program = program_of(spec) if isinstance(spec, MLPSpec) else spec
        value: Tensor = evaluate_program(program, tensors, t, y.reshape(-1, program.dim))
        return value.reshape(y.shape)

    def count(self, evaluations: int) -> None:
        """Notes evaluations."""
        self.nfe += evaluations


def alike(found: Tensor, expected: Tensor, rounding: float) -> Tensor:
    """Whether a field's values are those expected but for rounding; nan is nan.

    Args:
        found: The values.
        expected: What they are to be, not empty.
        rounding: A difference that may be, as a part of the largest finite number expected.

    Returns:
        A bool, 0-d, on the values' device, for which nobody waits.
    """
    most = rounding * expected.abs().where(expected.isfinite(), 0.0).amax()
    near = (found - expected).abs() <= most
    return (near | (found == expected) | (found.isnan() & expected.isnan())).all()


Known: TypeAlias = MLPField | ConvField | SpecField
"""Fields that kernels know."""


def evaluate_convolutions(
    spec: ConvSpec, tensors: Sequence[Tensor], t: Tensor, y: Tensor
) -> Tensor:
    """dy/dt of a field like this, by PyTorch's operations. Differentiable.

    Args:
        spec: The field.
        tensors: Weight and bias of every convolution, first to last.
        t: Time, 0-d, or one per image, [batch, 1, 1, 1].
        y: State, [batch, channels, height, width].

    Returns:
        Like y.
    """
    act = _FUNCTIONS[spec.activation]
    w1, b1, w2, b2, w3, b3 = tensors
    if not spec.time_dependent:
        h = act(F.conv2d(y, w1, b1))
        h = act(F.conv2d(h, w2, b2, padding=1))
        return F.conv2d(h, w3, b3)
    h = act(_conv1x1(w1, b1, t, y))
    h = act(_conv3x3(w2, b2, t, h))
    return _conv1x1(w3, b3, t, h)


def _made(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer, also where something makes them of others."""
    for hook in layer._forward_pre_hooks.values():
        # These make the weight anew before each call of the layer. Nobody calls it.
        if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)):
            hook(layer, ())
    return layer.weight, cast("Tensor", layer.bias)


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight's part for t, [out, 1, k, k], and for the state, [out, in, k, k]."""
    w_time, w_state = weight.split_with_sizes((1, weight.shape[1] - 1), 1)
    return w_time, w_state


def _conv1x1(weight: Tensor, bias: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The 1x1 convolution of [t, y]."""
    w_time, w_state = _split(weight)
    if t.dim() == 0:
        return F.conv2d(y, w_state, torch.addcmul(bias, t, w_time.reshape(-1)))
    return F.conv2d(y, w_state, bias) + t * w_time.reshape(-1, 1, 1)


def _conv3x3(weight: Tensor, bias: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The 3x3 convolution of [t, y] with padding 1."""
    w_time, w_state = _split(weight)
    # The share of t = 1: at the border the sum of the taps inside the image only, [1, out, H, W].
    share = F.conv2d(y.new_ones(1, 1, *y.shape[2:]), w_time, padding=1)
    # In place: nothing else reads the convolution's output, and its backward pass does not need it.
    return F.conv2d(y, w_state, bias, padding=1).add_(t * share)


def _check_time(where: str, t: Tensor, y: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise InvalidType(
            f"{where}: t is a {type(t).__name__}, want a 0-d tensor, for example "
            "torch.tensor(0.5). A field takes (t, y), in this order."
        )
    if t.dim() == 0:
        return
    per_row = (y.shape[0] if y.dim() > 1 else 1, *[1] * (y.dim() - 1))
    if t.shape != per_row:
        raise InvalidArgument(
            f"{where}: t has shape {tuple(t.shape)}, want () or one time per row, {per_row}. "
            "A field takes (t, y), in this order."
        )


def _check_dtype(where: str, y: Tensor, weight: Tensor) -> None:
    # Autocast brings both to one dtype.
    if y.dtype != weight.dtype and not torch.is_autocast_enabled(y.device.type):
        raise InvalidType(
            f"{where}: the state is {y.dtype}, but the weights are {weight.dtype}. Convert one "
            f"of them: y.to({weight.dtype}) or field.to({y.dtype})."
        )


def _refuse_state(where: str, y: Tensor, wanted: str) -> NoReturn:
    raise InvalidArgument(
        f"{where}: the state has shape {tuple(y.shape)}, want {wanted}, data and augmented "
        "together. AugODEBlock augments by itself: its field's size is the data's plus augment_dim."
    )
