"""What the trace of a field consists of, and its part that depends on the field's tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx


class NotKnown(Exception):
    """The kernels cannot run the field. The message says what it does that they do not know."""


def name_of(node: fx.Node) -> str:
    """Of an operation: "mm.default", say."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name.removeprefix('aten::')}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def schema_of(node: fx.Node) -> Any:
    """Of an operation: names and defaults of its arguments."""
    target: Any = node.target
    return target._schema


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Of an operation, whatever they are."""
    return node.args


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of the tensor that an operation makes."""
    return tuple(node.meta["val"].shape)


class Weights:
    """The part of a trace that knows neither time nor state. It runs once a solve."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.module, self.graph = graph, graph.graph
        self.used: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node in self.used:
                self.used.update((node, *node.all_input_nodes))
        self.nodes: set[fx.Node] = set()
        self._constants: dict[fx.Node, Tensor] = {}
        for node in self.graph.nodes:
            _refuse_what_is_not_repeatable(node)
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (
                node.op == "call_function" and self.nodes.issuperset(inputs)
            ):
                self.nodes.add(node)
                if node.op != "get_attr" and set(inputs) <= self._constants.keys():
                    self._constants[node] = node.target(
                        *fx.map_arg(node.args, self._constants.__getitem__),
                        **fx.map_arg(node.kwargs, self._constants.__getitem__),
                    )

    def number(self, node: fx.Node) -> float | None:
        """The number that a tensor made of nothing is filled with, None if it is no such tensor."""
        made = self._constants.get(node)
        if not isinstance(made, Tensor) or not made.numel():
            return None
        first = made.flatten()[0]
        return float(first) if bool((made == first).all()) else None

    def tensor(self, node: fx.Node) -> Tensor:
        """What a get_attr node holds."""
        found: Tensor = getattr(self.module, str(node.target))
        return found

    def finish(self, nodes: Sequence[fx.Node]) -> tuple[tuple[Tensor, ...], fx.GraphModule | None]:
        """Leaves, and what makes the tensors of these nodes from them."""
        if all(node.op == "get_attr" for node in nodes):
            return tuple(map(self.tensor, nodes)), None
        made = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        leaves: list[Tensor] = []
        needed = set(nodes)
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        for node in self.graph.nodes:
            if node in needed and node.op == "get_attr":
                known = [n for n in new if n.op == "get_attr" and n.target == node.target]
                new[node] = new[known[0]] if known else made.placeholder(f"leaf{len(leaves)}")
                if not known:
                    leaves.append(self.tensor(node))
        for node in self.graph.nodes:
            if node in needed and node.op != "get_attr":
                new[node] = made.node_copy(node, lambda n: new[n])
        made.output(tuple(new[node] for node in nodes))
        return tuple(leaves), fx.GraphModule(torch.nn.Module(), made)


def _refuse_what_is_not_repeatable(node: fx.Node) -> None:
    if not isinstance(node.target, torch._ops.OpOverload) or name_of(node) == "squeeze_.dim":
        return  # squeeze_ changes the shape of a temporary tensor only
    if node.target._schema.is_mutable:
        raise NotKnown(f"it writes into a tensor in place ({node.target})")
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        raise NotKnown(f"it draws random numbers ({node.target})")
