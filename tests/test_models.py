"""The paper's models: shapes, numbers of parameters, and that they learn."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.models import ConvODENet, ODENet


@pytest.mark.parametrize(
    ("img_size", "num_filters", "augment_dim", "count"),
    [
        ((1, 28, 28), 92, 0, 84_395),
        ((1, 28, 28), 64, 5, 84_816),
        ((3, 32, 32), 125, 0, 172_358),
        ((3, 32, 32), 64, 10, 171_799),
    ],
)
def test_numbers_of_parameters_of_the_paper(img_size, num_filters, augment_dim, count):
    model = ConvODENet(img_size, num_filters, 10, augment_dim, time_dependent=False)
    assert sum(param.numel() for param in model.parameters()) == count


CASES = [
    (lambda p: ODENet(2, 8, 3, p, activation="tanh"), (5, 2)),
    (lambda p: ConvODENet((2, 4, 3), 8, 3, p, activation="tanh"), (5, 2, 4, 3)),
]


@pytest.mark.parametrize("p", [0, 2])
@pytest.mark.parametrize(("make", "shape"), CASES, ids=["mlp", "conv"])
@pytest.mark.parametrize("batch", [5, 0])
def test_outputs_and_features(make, shape, p, batch):
    model, x = make(p), torch.randn(shape)[:batch]
    assert model.stats is None
    features, output = model(x, return_features=True)
    assert features.shape == (batch, 2 + p, *shape[2:])
    assert output.shape == (batch, 3)
    torch.testing.assert_close(features, model.block(x), rtol=0, atol=0)
    torch.testing.assert_close(output, model.linear(features.flatten(1)), rtol=0, atol=0)
    torch.testing.assert_close(model(x), output, rtol=0, atol=0)
    assert model.stats is model.block.stats and model.stats.nfe > 0


@pytest.mark.parametrize(("make", "shape"), CASES, ids=["mlp", "conv"])
def test_every_parameter_gets_a_gradient(make, shape):
    model = make(2)
    model(torch.randn(shape)).square().sum().backward()
    for name, param in model.named_parameters():
        assert param.grad.abs().sum() > 0, name


def test_arguments_pass_through():
    model = ODENet(2, 8, augment_dim=1, num_hidden=3, method="bosh3", rtol=1e-5)
    assert model.linear.out_features == 1
    assert (model.block.field.num_hidden, model.block.method, model.block.rtol) == (
        3,
        "bosh3",
        1e-5,
    )
    model = ConvODENet((1, 4, 4), 8, activation="elu", gradient="continuous")
    assert model.linear.out_features == 10
    assert (model.block.field.activation, model.block.gradient) == ("elu", "continuous")


@pytest.mark.parametrize(("make", "shape"), CASES, ids=["mlp", "conv"])
def test_copies(make, shape):
    model, x = make(1), torch.randn(shape)
    output = model(x)
    other = make(1)
    other.load_state_dict(model.state_dict())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(clone(x), output)


def test_an_augmented_model_learns_what_a_plain_one_cannot():
    """g(x): -1 inside, 1 in a ring around it; no flow of the plane itself tells them apart."""
    angle = 2 * torch.pi * torch.rand(200)
    radius = torch.cat([0.5 * torch.rand(100), 1 + 0.5 * torch.rand(100)])
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    y = torch.cat([-torch.ones(100, 1), torch.ones(100, 1)])
    model = ODENet(2, 16, augment_dim=2, method="rk4", options={"step_size": 0.25})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = F.smooth_l1_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ODENet(2, 8, 0), InvalidArgument, "ODENet: output_dim is 0"),
        (lambda: ODENet(0, 8), InvalidArgument, "data_dim is 0"),
        (lambda: ConvODENet((1, 4), 8), InvalidArgument, "ConvODENet: img_size is"),
        (lambda: ConvODENet(28, 8), InvalidArgument, "channels, height, width"),
        (lambda: ConvODENet((1, 4, 4.0), 8), InvalidType, r"img_size\[2\] \(width\) is 4.0"),
        (lambda: ConvODENet((1, 4, 4), 8, "10"), InvalidType, "output_dim is '10'"),
        (
            lambda: ConvODENet((1, 4, 4), 8)(torch.zeros(2, 1, 5, 4)),
            InvalidArgument,
            r"x has shape \(2, 1, 5, 4\), want \(batch, 1, 4, 4\)",
        ),
        (lambda: ConvODENet((1, 4, 4), 8)([1.0]), InvalidType, "x is list"),
        (lambda: ODENet(2, 8)(torch.zeros(2, 3)), InvalidArgument, "field.dim=2"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
