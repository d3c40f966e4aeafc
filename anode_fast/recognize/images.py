"""From a field's trace to a `ConvSpec`, for a state [batch, channels, height, width]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from anode_fast.recognize.trace import NotKnown, Weights, args_of, name_of, shape_of
from anode_fast.spec import ACTIVATIONS, ConvSpec


class Images:
    """Makes the spec of a field whose state is [batch, channels, height, width]."""

    def __init__(self, weights: Weights, y: Tensor) -> None:
        self.weights, self.y = weights, y
        self.env: dict[fx.Node, Any] = {}

    def lower(self) -> tuple[ConvSpec, list[fx.Node]]:
        """The spec and the nodes of its tensors."""
        found: Any = None
        inputs = iter((("time",), ("state",)))
        for node in self.weights.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(inputs)
            elif node.op == "output":
                (result,) = args_of(node)
                found = self.env.get(result)
            elif node in self.weights.used and node not in self.weights.nodes:
                self.env[node] = self._of(node)
        return self._match(found)

    def _of(self, node: fx.Node) -> Any:
        """A node as a nested tuple: what it is, and of what."""
        name = name_of(node)
        args = args_of(node)
        if name in ("alias.default", "clone.default", "slice.Tensor", "contiguous.default"):
            inner = self.env.get(args[0])
            if name != "slice.Tensor" or shape_of(node) == shape_of(args[0]):
                return inner
            return ("part",)  # ones_like(x[:, :1])
        if name == "ones_like.default":
            return ("ones",)
        if name in ("expand.default", "view.default", "repeat.default", "unsqueeze.default"):
            inner = self.env.get(args[0])
            return inner if inner == ("time",) else ("other", name)
        if name == "mul.Tensor" and {self._factor(a) for a in args} == {("ones",), ("time",)}:
            return ("time",)
        if name == "cat.default" and len(args) > 1 and args[1] in (1, -3) and len(args[0]) == 2:
            time, inner = (self.env.get(x) for x in args[0])
            if time == ("time",) and shape_of(args[0][0])[1] == 1 and inner is not None:
                return ("timed", inner)
        if name == "convolution.default":
            return self._convolution(node)
        activation = self._activation(node, name)
        return ("act", activation, self.env.get(args[0])) if activation else ("other", name)

    def _factor(self, x: Any) -> Any:
        is_one = isinstance(x, fx.Node) and self.weights.number(x) == 1.0
        return ("ones",) if is_one else self.env.get(x)

    def _convolution(self, node: fx.Node) -> Any:
        x, weight, bias, stride, padding, dilation, transposed, _, groups = args_of(node)
        ones = [1, 1]
        if stride != ones or dilation != ones or transposed or groups != 1 or bias is None:
            return ("other", "a convolution with strides, dilation, groups or no bias")
        kernel = shape_of(weight)[2:]
        if (kernel, padding) not in (((1, 1), [0, 0]), ((3, 3), [1, 1])):
            return ("other", f"a convolution {kernel} with padding {padding}")
        if not self.weights.nodes.issuperset((weight, bias)):
            return ("other", "a convolution with weights that depend on the state")
        return ("conv", weight, bias, self.env.get(x))

    def _activation(self, node: fx.Node, name: str) -> str:
        op, _, overload = name.partition(".")
        if overload != "default" or op not in ACTIVATIONS:
            return ""
        defaults = {"softplus": (1, 20), "elu": (1, 1, 1), "gelu": ("none",)}.get(op, ())
        given = (*args_of(node)[1:], *node.kwargs.values())
        return op if all(a == b for a, b in zip(given, defaults, strict=False)) else ""

    def _match(self, found: Any) -> tuple[ConvSpec, list[fx.Node]]:
        tensors: list[fx.Node] = []
        timed, activations = [], []
        for place in (3, 2, 1):
            if place < 3:
                if not found or found[0] != "act":
                    raise NotKnown(self._why(found))
                activations.append(found[1])
                found = found[2]
            if not found or found[0] != "conv":
                raise NotKnown(self._why(found))
            _, weight, bias, found = found
            if shape_of(weight)[2:] != ((3, 3) if place == 2 else (1, 1)):
                raise NotKnown(self._why(None))
            tensors[:0] = [weight, bias]
            timed.append(bool(found) and found[0] == "timed")
            found = found[1] if timed[-1] else found
        if found != ("state",) or len(set(timed)) > 1 or len(set(activations)) > 1:
            raise NotKnown(self._why(found))
        spec = ConvSpec(self.y.shape[1], shape_of(tensors[0])[0], activations[0], timed[0])
        return spec, tensors

    def _why(self, found: Any) -> str:
        known = "the kernels know convolutions 1x1, 3x3, 1x1 with one activation between them only"
        if isinstance(found, tuple) and found[0] == "other":
            return f"{found[1]} is nothing that they do with images: {known}"
        return known
