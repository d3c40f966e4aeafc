"""Code of the kinds that people have, with the import changed only.

The classes of a neural ODE's experiments (field, block, convolutional block, trainer), written in
the form that public code for the paper has, and torchdiffeq's kinds of small demos: a spiral, a
latent ODE, a ball that bounces, a flow with the trace in its state. Each runs once with torchdiffeq
and once with anode_fast, from the same weights and data: losses agree.
"""

import math

import pytest
import torch
import torchdiffeq
from torch import nn

import anode_fast
from anode_fast.kernels.cpu import library

if library.load() is None:
    pytest.skip(library.missing(), allow_module_level=True)

PACKAGES = (torchdiffeq, anode_fast)


@pytest.fixture(autouse=True)
def _doubles():
    """Such code makes its tensors of time in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


MAX_NUM_STEPS = 1000


# --- the paper's experiments ----------------------------------------------------------------------


class ODEFunc(nn.Module):
    def __init__(self, data_dim, hidden_dim, augment_dim=0, time_dependent=False):
        super().__init__()
        self.augment_dim, self.time_dependent = augment_dim, time_dependent
        self.input_dim = data_dim + augment_dim
        self.nfe = 0
        self.fc1 = nn.Linear(self.input_dim + int(time_dependent), hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, self.input_dim)
        self.non_linearity = nn.ReLU(inplace=True)

    def forward(self, t, x):
        self.nfe += 1
        if self.time_dependent:
            t_vec = torch.ones(x.shape[0], 1) * t
            out = self.fc1(torch.cat([t_vec, x], 1))
        else:
            out = self.fc1(x)
        out = self.non_linearity(out)
        out = self.non_linearity(self.fc2(out))
        return self.fc3(out)


class ConvODEFunc(nn.Module):
    def __init__(self, img_size, num_filters, augment_dim=0, time_dependent=False):
        super().__init__()
        self.augment_dim, self.time_dependent = augment_dim, time_dependent
        self.nfe = 0
        channels, time = img_size[0] + augment_dim, int(time_dependent)
        self.conv1 = nn.Conv2d(channels + time, num_filters, 1)
        self.conv2 = nn.Conv2d(num_filters + time, num_filters, 3, padding=1)
        self.conv3 = nn.Conv2d(num_filters + time, channels, 1)
        self.non_linearity = nn.ReLU(inplace=True)

    def timed(self, t, x):
        if not self.time_dependent:
            return x
        t_img = torch.ones_like(x[:, :1, :, :]) * t
        return torch.cat([t_img, x], 1)

    def forward(self, t, x):
        self.nfe += 1
        out = self.non_linearity(self.conv1(self.timed(t, x)))
        out = self.non_linearity(self.conv2(self.timed(t, out)))
        return self.conv3(self.timed(t, out))


class ODEBlock(nn.Module):
    def __init__(self, package, odefunc, is_conv=False, tol=1e-3, adjoint=False):
        super().__init__()
        self.odefunc, self.is_conv, self.tol = odefunc, is_conv, tol
        self.solve = package.odeint_adjoint if adjoint else package.odeint

    def forward(self, x, eval_times=None):
        self.odefunc.nfe = 0
        if eval_times is None:
            integration_time = torch.tensor([0, 1]).float().type_as(x)
        else:
            integration_time = eval_times.type_as(x)
        if self.odefunc.augment_dim > 0:
            shape = (x.shape[0], self.odefunc.augment_dim, *x.shape[2:])
            x = torch.cat([x, torch.zeros(shape).type_as(x)], 1)
        out = self.solve(
            self.odefunc,
            x,
            integration_time,
            rtol=self.tol,
            atol=self.tol,
            method="dopri5",
            options={"max_num_steps": MAX_NUM_STEPS},
        )
        return out[1] if eval_times is None else out


class ODENet(nn.Module):
    def __init__(self, package, data_dim, hidden_dim, augment_dim=0, adjoint=False, **kw):
        super().__init__()
        self.odeblock = ODEBlock(
            package, ODEFunc(data_dim, hidden_dim, augment_dim, **kw), adjoint=adjoint
        )
        self.linear_layer = nn.Linear(data_dim + augment_dim, 1)

    def forward(self, x):
        return self.linear_layer(self.odeblock(x))


class ConvODENet(nn.Module):
    def __init__(self, package, img_size, num_filters, augment_dim=0, adjoint=False, **kw):
        super().__init__()
        odefunc = ConvODEFunc(img_size, num_filters, augment_dim, **kw)
        self.odeblock = ODEBlock(package, odefunc, is_conv=True, adjoint=adjoint)
        size = (img_size[0] + augment_dim) * img_size[1] * img_size[2]
        self.linear_layer = nn.Linear(size, 3)

    def forward(self, x):
        features = self.odeblock(x)
        return self.linear_layer(features.view(x.size(0), -1))


class Trainer:
    """Keeps losses and evaluations, forwards and backwards, of every iteration."""

    def __init__(self, model, optimizer, loss):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.losses, self.nfes, self.backward_nfes = [], [], []

    def train(self, batches):
        odefunc = self.model.odeblock.odefunc
        for x, y in batches:
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            iteration_nfes = odefunc.nfe
            odefunc.nfe = 0
            loss.backward()
            self.optimizer.step()
            self.backward_nfes.append(odefunc.nfe)
            self.nfes.append(iteration_nfes)
            self.losses.append(loss.item())


def trained(package, make, batches, loss):
    torch.manual_seed(3)
    model = make(package).double()
    trainer = Trainer(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss)
    trainer.train(batches)
    return model, trainer


VECTORS = {
    "NODE": dict(augment_dim=0),
    "ANODE": dict(augment_dim=2),
    "ANODE with time": dict(augment_dim=2, time_dependent=True),
    "ANODE with the adjoint": dict(augment_dim=1, adjoint=True),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_the_papers_vector_experiments(kind):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 16, 2, generator=generator, dtype=torch.float64)
    y = (x.norm(dim=-1, keepdim=True) > 1).double() * 2 - 1
    runs = []
    for package in PACKAGES:
        make = lambda package: ODENet(package, 2, 16, **VECTORS[kind])  # noqa: E731
        runs.append(trained(package, make, list(zip(x, y, strict=True)), nn.SmoothL1Loss()))
    (_, theirs), (model, ours) = runs
    assert ours.nfes == theirs.nfes
    # The first loss is the solution's; later ones see gradients, which are not torchdiffeq's: ours
    # are exact, theirs go through the step sizes, or are the adjoint ODE's, to its tolerance.
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-12)
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-3)
    odefunc = model.odeblock.odefunc
    state = torch.zeros(16, odefunc.input_dim, dtype=torch.float64)
    said = anode_fast.explain(odefunc, state, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)
    assert "the C++ kernels run the whole solve in one call" in said


@pytest.mark.parametrize("kind", ["plain", "with time"])
def test_the_papers_image_experiments(kind):
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(3, 4, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (3, 4), generator=generator)
    more = dict(augment_dim=2, time_dependent=kind == "with time")
    runs = []
    for package in PACKAGES:
        make = lambda package: ConvODENet(package, (1, 6, 6), 8, **more)  # noqa: E731
        runs.append(trained(package, make, list(zip(x, y, strict=True)), nn.CrossEntropyLoss()))
    (_, theirs), (model, ours) = runs
    assert ours.nfes == theirs.nfes
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-12)
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-3)
    state = torch.zeros(4, 3, 6, 6, dtype=torch.float64)
    said = anode_fast.explain(model.odeblock.odefunc, state, torch.tensor([0.0, 1.0]))
    assert "the C++ kernels evaluate the field" in said


def test_trajectories_at_given_times():
    torch.manual_seed(0)
    odefunc = ODEFunc(2, 8, 1).double()
    x, times = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0, 1, 7)
    theirs, ours = (ODEBlock(p, odefunc)(x, times) for p in PACKAGES)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# --- demos ----------------------------------------------------------------------------------------


class Lambda(nn.Module):
    def forward(self, t, y):
        true_a = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=y.dtype)
        return torch.mm(y**3, true_a)


class SpiralFunc(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for m in self.net.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, mean=0, std=0.1)
                nn.init.constant_(m.bias, val=0)

    def forward(self, t, y):
        return self.net(y**3)


@pytest.mark.parametrize("adjoint", [False, True], ids=["odeint", "odeint_adjoint"])
def test_a_spiral(adjoint):
    t = torch.linspace(0.0, 5.0, 50, dtype=torch.float64)
    losses = {}
    for package in PACKAGES:
        torch.manual_seed(1)
        true_y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
        with torch.no_grad():
            true_y = package.odeint(Lambda(), true_y0, t, method="dopri5")
        func = SpiralFunc().double()
        optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-3)
        solve = package.odeint_adjoint if adjoint else package.odeint
        losses[package] = []
        for s in (0, 7, 20):
            optimizer.zero_grad()
            batch_y0 = true_y[s : s + 20 : 2]  # [10, 1, 2]
            batch_y = torch.stack([true_y[s + i : s + i + 20 : 2] for i in range(10)])
            pred_y = solve(func, batch_y0, t[:10])
            loss = (pred_y - batch_y).abs().mean()
            loss.backward()
            optimizer.step()
            losses[package].append(loss.item())
    assert losses[anode_fast] == pytest.approx(losses[torchdiffeq], rel=1e-4)
    said = anode_fast.explain(SpiralFunc(), torch.zeros(20, 1, 2), t.float())
    assert "backend: cpu" in said


class LatentODEFunc(nn.Module):
    def __init__(self, latent_dim=4, nhidden=20):
        super().__init__()
        self.elu = nn.ELU(inplace=True)
        self.fc1 = nn.Linear(latent_dim, nhidden)
        self.fc2 = nn.Linear(nhidden, nhidden)
        self.fc3 = nn.Linear(nhidden, latent_dim)
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        out = self.elu(self.fc1(x))
        out = self.elu(self.fc2(out))
        return self.fc3(out)


def test_a_latent_ode():
    found = {}
    for package in PACKAGES:
        torch.manual_seed(2)
        func = LatentODEFunc().double()
        encoder, decoder = nn.Linear(6, 8).double(), nn.Linear(4, 2).double()
        samples = torch.randn(5, 3, 2, dtype=torch.float64)
        mean, log_variance = encoder(samples.flatten(1)).chunk(2, 1)
        z0 = torch.randn_like(mean) * (0.5 * log_variance).exp() + mean
        t = torch.linspace(0, 1, 3, dtype=torch.float64)
        pred_z = package.odeint_adjoint(func, z0, t, rtol=1e-8, atol=1e-8).permute(1, 0, 2)
        loss = (decoder(pred_z) - samples).square().sum()
        loss.backward()
        found[package] = [loss.item(), encoder.weight.grad, func.fc2.weight.grad], func.nfe
    (ours, nfe), (theirs, _) = found[anode_fast], found[torchdiffeq]
    assert nfe > 0
    for a, b in zip(ours, theirs, strict=True):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        # ELU's second derivative jumps, which costs all gradients digits.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(b.abs().max()))
    said = anode_fast.explain(LatentODEFunc(), torch.zeros(5, 4), torch.tensor([0.0, 1.0]))
    assert "backend: cpu" in said


class BouncingBall(nn.Module):
    """Falls, and is told where it is by an event."""

    def __init__(self):
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor([9.8], dtype=torch.float64))
        self.log_radius = nn.Parameter(torch.tensor(math.log(0.1), dtype=torch.float64))

    def forward(self, t, state):
        position, velocity, log_radius = state
        return velocity, -self.gravity.expand_as(velocity), torch.zeros_like(log_radius)

    def event_fn(self, t, state):
        position, _, log_radius = state
        return position - log_radius.exp()


@pytest.mark.parametrize("adjoint", [False, True], ids=["odeint", "odeint_adjoint"])
def test_a_ball_that_bounces(adjoint):
    found = []
    for package in PACKAGES:
        ball = BouncingBall()
        state = (
            torch.tensor([10.0], dtype=torch.float64),
            torch.tensor([0.5], dtype=torch.float64),
            ball.log_radius.expand(1),
        )
        t, times = torch.zeros(1, dtype=torch.float64), []
        for _ in range(3):
            t, states = package.odeint_event(
                *(ball, state, t),
                event_fn=ball.event_fn,
                reverse_time=False,
                atol=1e-10,
                rtol=1e-10,
                odeint_interface=package.odeint_adjoint if adjoint else package.odeint,
            )
            position, velocity, log_radius = (x[-1] for x in states)
            state = (position + 1e-7, -0.8 * velocity, log_radius)
            times.append(t)
        t.sum().backward()
        found.append([*(x.item() for x in times), ball.gravity.grad.item()])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


class CNF(nn.Module):
    """A density that moves: the state is (z, log p(z)), its change needs the field's trace."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t, states):
        z, _ = states
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            dz_dt = self.net(torch.cat((z, t.expand(len(z), 1)), 1))
            trace = sum(
                torch.autograd.grad(dz_dt[:, i].sum(), z, create_graph=True)[0][:, i]
                for i in range(2)
            )
        return dz_dt, -trace.view(len(z), 1)


def test_a_flow_with_the_trace_in_its_state():
    found = []
    for package in PACKAGES:
        torch.manual_seed(4)
        func = CNF().double()
        z = torch.randn(6, 2, dtype=torch.float64)
        z_t, logp_diff = package.odeint_adjoint(
            *(func, (z, torch.zeros(6, 1, dtype=torch.float64))),
            torch.tensor([1.0, 0.0], dtype=torch.float64),
            atol=1e-8,
            rtol=1e-8,
            method="dopri5",
        )
        normal = torch.distributions.MultivariateNormal(z.new_zeros(2), torch.eye(2).double())
        loss = -(normal.log_prob(z_t[-1]) - logp_diff[-1].view(-1)).mean()
        loss.backward()
        found.append([loss.item(), func.net[0].weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=1e-6, atol=1e-8)
