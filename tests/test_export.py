"""torch.export, and shapes without numbers: a solve is one operator there too."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from anode_fast import AugODEBlock, ConvODENet, MLPField, ODENet, odeint

MODELS = {
    "rows": (lambda: ODENet(3, 16, 2, augment_dim=2, activation="tanh"), (7, 3)),
    "images": (lambda: ConvODENet((2, 6, 5), 4, 3, 1, activation="tanh"), (3, 2, 6, 5)),
    "between": (
        lambda: nn.Sequential(nn.Linear(3, 4), AugODEBlock.mlp(4, 8, step_control="sample")),
        (7, 3),
    ),
    "trajectory": (lambda: Trajectory(), (7, 3)),
}

every_model = pytest.mark.parametrize("model", MODELS)


class Trajectory(nn.Module):
    def __init__(self):
        super().__init__()
        self.field = MLPField(3, 8)

    def forward(self, x):
        return odeint(self.field, x, torch.tensor([0.0, 0.4, 1.0]), method="bosh3", rtol=1e-4)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def made(model):
    make, shape = MODELS[model]
    return make(), torch.randn(shape)


def solves(program):
    return sum(str(node.target) == "anode_fast.solve.default" for node in program.graph.nodes)


@every_model
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_program(model, strict):
    net, x = made(model)
    program = torch.export.export(net, (x,), strict=strict)
    assert solves(program) == 1
    assert torch.equal(program.module()(x), net(x))
    decomposed = program.run_decompositions()
    assert solves(decomposed) == 1
    assert torch.equal(decomposed.module()(x), net(x))


@every_model
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_any_batch_size_through_a_file(model, strict):
    net, x = made(model)
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(net, (x,), strict=strict, dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 7, 30):
        x = torch.randn(batch, *x.shape[1:])
        assert torch.equal(loaded(x), net(x))


@every_model
def test_exported_programs_can_be_trained(model):
    net, x = made(model)
    trained = torch.export.export(net, (x,)).module()
    for module in (net, trained):
        module(x).square().sum().backward()
    want = {name: p.grad for name, p in net.named_parameters()}
    got = {name: p.grad for name, p in trained.named_parameters()}
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert torch.equal(grad, want[name])


def test_export_leaves_no_counts():
    net, x = made("rows")
    for strict in (True, False):
        torch.export.export(net, (x,), strict=strict)
        assert net.stats is None


# --- shapes without numbers -----------------------------------------------------------------------


@every_model
def test_meta_device(model):
    net, x = made(model)
    y = copy.deepcopy(net).to("meta")(x.to("meta"))
    assert (y.is_meta, y.shape) == (True, net(x).shape)


@every_model
def test_to_empty(model):
    net, x = made(model)
    with torch.device("meta"):
        later = MODELS[model][0]()
    assert all(p.is_meta for p in later.parameters())
    later.to_empty(device="cpu").load_state_dict(net.state_dict())
    assert torch.equal(later(x), net(x))


@every_model
def test_fake_tensors(model):
    want = MODELS[model][0]()(torch.zeros(MODELS[model][1])).shape
    with FakeTensorMode():
        net, x = made(model)
        y = net(x)
        y.square().sum().backward()
    assert isinstance(y, FakeTensor)
    assert y.shape == want
    assert all(p.grad.shape == p.shape for p in net.parameters())


def test_fake_operator():
    field = MLPField(3, 8)
    settings = (1e-3, 1e-3, "dopri5", None, "auto", "batch", "auto", None)
    call = f"{((3, (8, 8), 'relu', True), 1, settings)}"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(5, 2))
        y, _ = torch.ops.anode_fast.solve(x, field.tensors(), torch.tensor([0.0, 1.0]), call)
    assert (y.shape, y.dtype) == ((2, 5, 3), torch.float32)
