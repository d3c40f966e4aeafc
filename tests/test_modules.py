"""Models as torch's tools treat them: copied, pickled, saved, shared, averaged, frozen."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from anode_fast import (
    AugODEBlock,
    ConvODENet,
    ODENet,
    SolveStats,
    Status,
    odeint,
    odeint_adjoint,
)
from anode_fast.stats import DeviceStats

MODELS = {
    "rows": (lambda **kw: ODENet(3, 16, 2, augment_dim=2, activation="tanh", **kw), (7, 3)),
    "images": (lambda **kw: ConvODENet((2, 5, 4), 4, 3, 1, activation="tanh", **kw), (3, 2, 5, 4)),
}

every_model = pytest.mark.parametrize("model", MODELS)


def made(model, **given):
    make, shape = MODELS[model]
    return make(**given), torch.randn(shape)


def saved_and_loaded(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved_and_loaded,
}


@every_model
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_copies(model, copied, used):
    """Also of a model that is in the middle of a training step."""
    net, x = made(model)
    loss = net(x).square().mean() if used else None
    other = copied(net)
    if used:
        assert other.stats == net.stats
    y = other(x)
    assert torch.equal(y, net(x))
    y.square().mean().backward()
    assert all(p.grad is not None for p in other.parameters())
    if copied is not copy.copy:
        assert all(p.grad is None for p in net.parameters())
    if used:
        net.zero_grad()
        loss.backward()  # the copies took nothing from it
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


@every_model
def test_copy_of_a_compiled_model(model):
    torch.compiler.reset()
    net, x = made(model)
    torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    other = pickle.loads(pickle.dumps(net))
    assert other.stats == net.stats
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_counts_on_the_device(copied):
    counts = dict(nfe=7, nfe_backward=3, accepted=2, rejected=1, status=Status.SUCCESS)
    stats = DeviceStats("triton", "dopri5", launches=4, later=lambda: dict(counts))
    other = copied(stats)
    counts["nfe"] = 8
    assert other == SolveStats("triton", "dopri5", 7, 3, 2, 1, 4)
    assert stats.nfe == 8


@every_model
def test_state_dict_through_a_file(model):
    (net, x), (other, _) = made(model), made(model)
    assert not torch.equal(net(x), other(x))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(net(x), other(x))
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    assigned = made(model)[0]
    assigned.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(assigned(x), net(x))


@every_model
def test_average_of_models(model):
    net, x = made(model)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = copy.deepcopy(net)
    averaged.update_parameters(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    averaged.update_parameters(net)
    with torch.no_grad():
        for p, q in zip(first.parameters(), net.parameters(), strict=True):
            p.copy_((p + q) / 2)
    torch.testing.assert_close(averaged(x), first(x))


@every_model
@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_frozen_parts(model, gradient):
    net, x = made(model, gradient=gradient)
    net(x).square().sum().backward()
    want = [p.grad for p in net.parameters()]
    frozen = list(net.block.field.parameters())[:3]
    for p in frozen:
        p.requires_grad_(False)
    net.zero_grad(set_to_none=True)
    net(x).square().sum().backward()
    for p, grad in zip(net.parameters(), want, strict=True):
        if any(p is other for other in frozen):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    net.requires_grad_(False)
    assert not net(x).requires_grad
    assert net(x.requires_grad_()).requires_grad


def layer_of(net):
    field = net.block.field
    return field.layers[1] if hasattr(field, "layers") else field.conv2


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer).eval(),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer).eval(),
    "old weight_norm": nn.utils.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@every_model
@pytest.mark.parametrize("change", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_parametrized_weights(model, change):
    net, x = made(model)
    net = net.double()
    x = x.double()
    net(x)
    change(layer_of(net))
    y = net(x)
    assert net.stats.backend == "cpu"
    grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
    net.block.backend = "reference"
    for got, expected in zip(
        [y, *grads],
        [want := net(x), *torch.autograd.grad(want.square().sum(), list(net.parameters()))],
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():  # as an optimizer does: the next call sees it
        for p in net.parameters():
            p.mul_(0.9)
    want = net(x)
    net.block.backend = "auto"
    torch.testing.assert_close(net(x), want)
    assert not torch.allclose(want, y)


@every_model
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(model, use_reentrant):
    net, x = made(model)
    net(x.requires_grad_()).square().sum().backward()
    want = [x.grad, *[p.grad for p in net.parameters()]]
    x.grad = None
    net.zero_grad(set_to_none=True)
    checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
    for got, expected in zip([x.grad, *[p.grad for p in net.parameters()]], want, strict=True):
        assert torch.equal(got, expected)


@every_model
def test_saved_tensors_elsewhere(model):
    net, x = made(model)
    want = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    with torch.autograd.graph.save_on_cpu():
        y = net(x)
    got = torch.autograd.grad(y.square().sum(), list(net.parameters()))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@every_model
def test_hooks_of_parameters_and_accumulation(model):
    """What DistributedDataParallel and fused optimizers hang on to."""
    net, x = made(model)
    seen, done = [], []
    for name, p in net.named_parameters():
        p.register_hook(lambda grad, name=name: seen.append(name))
        p.register_post_accumulate_grad_hook(lambda p: done.append(p))
    net(x).square().sum().backward()
    names = [name for name, _ in net.named_parameters()]
    assert sorted(seen) == sorted(names)
    assert len(done) == len(names)
    first = [p.grad.clone() for p in net.parameters()]
    net(x).square().sum().backward()
    for p, grad in zip(net.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


# --- other processes ------------------------------------------------------------------------------


class Solved(Dataset):
    """Items are solutions of a model."""

    def __init__(self, net, x):
        self.net, self.x = net, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.net(self.x[i : i + 1])[0]


@every_model
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_solve(model, start):
    net, x = made(model)
    with torch.no_grad():
        want = torch.cat([net(row[None]) for row in x])  # the library is in use before they start
    loader = DataLoader(
        Solved(net, x), batch_size=2, num_workers=2, multiprocessing_context=start, timeout=200
    )
    assert torch.equal(torch.cat(list(loader)), want)


def _train(net, x, done):
    torch.set_num_threads(1)
    net(x).square().sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(0.1 * p.grad)
    done.put(net.stats.nfe)


def test_shared_memory():
    """Hogwild: another process changes the weights that this one reads."""
    net, x = made("rows")
    net.share_memory()
    before = net(x)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    process = context.Process(target=_train, args=(net, x, done), daemon=True)
    process.start()
    assert done.get(timeout=90) == net.stats.nfe
    process.join(20)
    after = net(x)
    assert not torch.equal(before, after)
    own = copy.deepcopy(net)
    assert torch.equal(own(x), after)


# --- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_default_dtype_and_device_leave_solves_alone(solve):
    net, x = made("rows")
    block, t = AugODEBlock(net.block.field), torch.tensor([0.0, 1.0])
    y = torch.randn(4, 5)
    want, from_block = solve(net.block.field, y, t), block(y)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(solve(net.block.field, y, t), want)
        assert torch.equal(block(y), from_block)
        with torch.device("meta"):
            assert torch.equal(solve(net.block.field, y, t), want)
            assert torch.equal(block(y), from_block)
            assert torch.equal(block.trajectory(y, 3)[-1], from_block)
    finally:
        torch.set_default_dtype(torch.float32)


def test_linear_probe_shares_the_block():
    """One block in two models: one set of weights, one gradient."""
    block = AugODEBlock.mlp(3, 8)
    a, b = nn.Sequential(block, nn.Linear(3, 1)), nn.Sequential(block, nn.Linear(3, 2))
    x = torch.randn(4, 3)
    (a(x).sum() + b(x).sum()).backward()
    got = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    a(x).sum().backward()
    b(x).sum().backward()
    for g, p in zip(got, block.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)
