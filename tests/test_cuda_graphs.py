"""A whole training step with an adaptive solve as one CUDA graph."""

import copy

import pytest
import torch
from torch import nn

from anode_fast import AugODEBlock, ConvODENet, ODENet, Status
from anode_fast.stats import DeviceStats

pytestmark = pytest.mark.gpu

CAPTURED = dict(backend="triton", max_num_steps=64, rtol=1e-3, atol=1e-3)
MODELS = {
    "one program": (lambda **kw: ODENet(3, 32, 2, 2, activation="tanh", **kw), (32, 3)),
    "many programs": (lambda **kw: ODENet(3, 32, 2, 2, activation="tanh", **kw), (3000, 3)),
    "by row": (lambda **kw: ODENet(3, 32, 2, 2, step_control="sample", **kw), (500, 3)),
    "fixed": (
        lambda **kw: ODENet(3, 32, 2, method="rk4", options={"step_size": 0.1}, **kw),
        (500, 3),
    ),
    "images": (lambda **kw: ConvODENet((1, 8, 8), 8, 2, 2, activation="tanh", **kw), (8, 1, 8, 8)),
    "between": (
        lambda **kw: nn.Sequential(
            nn.Linear(3, 4), AugODEBlock.mlp(4, 16, 2, **kw), nn.Tanh(), nn.Linear(6, 2)
        ),
        (64, 3),
    ),
}

every_model = pytest.mark.parametrize("model", MODELS)


def made(model):
    make, shape = MODELS[model]
    net = make(**CAPTURED).cuda()
    data = [(torch.randn(shape).cuda(), torch.randn(shape[0], 2).cuda()) for _ in range(4)]
    return net, data


def stats_of(net):
    (block,) = (module for module in net.modules() if isinstance(module, AugODEBlock))
    return block.stats


def step(net, optimizer, x, y):
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=1e-2, capturable=True)


@every_model
def test_training_step(model):
    net, data = made(model)
    optimizer = adam(net)
    x, y = (part.clone() for part in data[0])
    # The stream that captures is the one that warmed up: gradients are accumulated on it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(net, optimizer, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step(net, optimizer, x, y)
    eager = copy.deepcopy(net)
    eager_optimizer = adam(eager)
    eager_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = []
    for new_x, new_y in data * 3:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        want = step(eager, eager_optimizer, new_x, new_y)
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-6)
        losses.append(loss.item())
        counts, eager_counts = stats_of(net), stats_of(eager)
        if model != "fixed":
            assert isinstance(counts, DeviceStats)
            assert (counts.nfe, counts.accepted) == (eager_counts.nfe, eager_counts.accepted)
            assert counts.status == Status.SUCCESS
    assert losses[-1] < losses[0]
    for p, q in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@every_model
def test_graphed_callables(model):
    net, data = made(model)
    eager = copy.deepcopy(net)
    graphed = torch.cuda.make_graphed_callables(net, (data[0][0].clone(),))
    for x, y in data:
        for module in (eager, graphed):
            module.zero_grad(set_to_none=True)
            nn.functional.mse_loss(module(x), y).backward()
        for p, q in zip(graphed.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
