"""Two processes: DistributedDataParallel, and the norm that they share."""

import math
import os
import traceback

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from anode_fast import (
    AugODEBlock,
    ConvODENet,
    MaxStepsExceeded,
    NonFiniteState,
    ODENet,
    SharedNorm,
    StepSizeUnderflow,
    explain,
    odeint,
    odeint_adjoint,
)

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo"
)

RANKS = 2
f64 = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=f64)


def _serve(rank, file, orders):
    """One process: does what it is told until there is nothing more."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS
    )
    for work, arguments in iter(orders.recv, None):
        try:
            orders.send((work(rank, *arguments), None))
        except Exception:
            orders.send((None, traceback.format_exc()))
    distributed.destroy_process_group()


class Group:
    """Processes with a process group."""

    def __init__(self, file):
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(RANKS)]
        self.orders = [ours for ours, _ in ends]
        self.processes = [
            context.Process(target=_serve, args=(rank, file, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def run(self, work, *arguments, timeout=120):
        """What `work(rank, *arguments)` returns in each process."""
        for order in self.orders:
            order.send((work, arguments))
        answers = [order.recv() if order.poll(timeout) else None for order in self.orders]
        waiting = [rank for rank, answer in enumerate(answers) if answer is None]
        if waiting:
            self.end()
        assert not waiting, f"processes {waiting} wait"
        for _, error in answers:
            assert error is None, error
        return [value for value, _ in answers]

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope="module")
def groups():
    """At most one group. One that got stuck was ended, and the next test starts another."""
    kept = []
    yield kept
    for group in kept:
        group.end()


@pytest.fixture
def group(groups, tmp_path):
    if not groups or not groups[0].processes:
        groups[:] = [Group(tmp_path / "meeting")]
    return groups[0]


class Field(nn.Module):
    """A user's field; it counts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y) * torch.cos(3 * t)


def batch(*shape):
    """Rows; those of rank 1 make a solve take more steps."""
    x = torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(1))
    x[len(x) // 2 :] *= 5.0
    return x


def part(x, rank):
    return x.chunk(RANKS)[rank]


# --- DistributedDataParallel ----------------------------------------------------------------------

MODELS = {
    "rows": (lambda **kw: ODENet(3, 16, 2, augment_dim=2, activation="tanh", **kw), (8, 3)),
    "images": (lambda **kw: ConvODENet((2, 5, 4), 4, 3, 1, activation="tanh", **kw), (4, 2, 5, 4)),
    "own": (lambda **kw: nn.Sequential(AugODEBlock(Field(), **kw), nn.Linear(3, 2)), (8, 3)),
}
BLOCKS = {
    "fixed": dict(method="rk4", options={"step_size": 0.1}),
    "sample": dict(step_control="sample", rtol=1e-4),
    "shared": dict(rtol=1e-4),
    "shared, continuous": dict(rtol=1e-8, atol=1e-8, gradient="continuous"),
    "own steps": dict(rtol=1e-9, atol=1e-9, max_num_steps=10_000),
}


def block_options(name):
    given = dict(BLOCKS[name])
    if name.startswith("shared"):
        given["options"] = {"norm": SharedNorm()}
    return given


def train(model, x, steps=2):
    """Gradients of the first step, and the weights after some."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum(1).mean().backward()
        first = first or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return first, [p.detach().clone() for p in model.parameters()]


def seeded(kind, **given):
    torch.manual_seed(0)
    return MODELS[kind][0](**given).double()


def blocks(model):
    return [module for module in model.modules() if isinstance(module, AugODEBlock)]


def train_in_parallel(rank, kind, block):
    model = seeded(kind, **block_options(block))
    if rank:  # DistributedDataParallel sends rank 0's weights to the others
        for p in model.parameters():
            nn.init.zeros_(p)
    found = train(DistributedDataParallel(model), part(batch(*MODELS[kind][1]), rank))
    return *found, blocks(model)[0].stats


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_training_as_in_one_process(kind, block, group):
    model = seeded(kind, **block_options(block))
    want_grads, want_weights = train(model, batch(*MODELS[kind][1]))
    stats = blocks(model)[0].stats
    # With steps of its own each process is as far from the truth as the tolerance says.
    rough = block in ("own steps", "shared, continuous")
    close = dict(rtol=1e-4, atol=1e-5) if rough else dict(rtol=1e-9, atol=1e-11)
    for grads, weights, rank_stats in group.run(train_in_parallel, kind, block):
        for got, want in zip((*grads, *weights), (*want_grads, *want_weights), strict=True):
            torch.testing.assert_close(got, want, **close)
        if block.startswith("shared"):
            assert rank_stats.launches == 0  # no kernel that takes the steps
            assert (rank_stats.nfe, rank_stats.accepted) == (stats.nfe, stats.accepted)


# --- the shared norm ------------------------------------------------------------------------------


def count(rank, solve, norm, given, uneven):
    field = seeded("own")[0].field
    x = batch(8, 3)
    x = (x[:7], x[7:])[rank] if uneven else part(x, rank)
    y, stats = solve(
        field, x, T, rtol=1e-5, atol=1e-6, options={"norm": norm}, return_stats=True, **given
    )
    y[-1].square().sum().backward()
    return y.detach(), stats, field.nfe


SOLVES = {
    "odeint": (odeint, {}),
    "discrete": (odeint, dict(gradient="discrete")),
    "adjoint": (odeint_adjoint, {}),
    "seminorm": (odeint_adjoint, dict(adjoint_options={"norm": "seminorm"})),
    "bosh3": (odeint_adjoint, dict(adjoint_method="bosh3", adjoint_options={})),
    "own": (odeint_adjoint, dict(adjoint_options={"norm": SharedNorm()})),
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("uneven", [False, True])
def test_every_rank_takes_the_steps_of_one_process(name, uneven, group):
    solve, given = SOLVES[name]
    field = seeded("own")[0].field
    want, stats = solve(
        field, batch(8, 3), T, rtol=1e-5, atol=1e-6, return_stats=True, backend="reference"
    )
    found = group.run(count, solve, SharedNorm(), given, uneven)
    solutions, counts, evaluations = zip(*found, strict=True)
    torch.testing.assert_close(torch.cat(solutions, 1), want.detach(), rtol=1e-10, atol=1e-12)
    for c in counts:
        assert (c.nfe, c.accepted, c.rejected) == (stats.nfe, stats.accepted, stats.rejected)
    assert counts[0] == counts[1]  # of the backward pass too
    assert evaluations[0] == evaluations[1]


def test_without_it_they_differ(group):
    found = group.run(count, odeint, None, {}, False)
    assert found[0][1].nfe != found[1][1].nfe


def solve_tuple(rank):
    field = seeded("own")[0].field
    y = part(batch(8, 3), rank)

    def both(t, state):
        return field(t, state[0]), state[1].cos()

    params, norm = tuple(field.parameters()), SharedNorm()
    state = (y, y.sum(1).requires_grad_())
    found, stats = odeint_adjoint(
        both, state, T, adjoint_params=params, options={"norm": norm}, return_stats=True
    )
    sum(part[-1].sum() for part in found).backward()
    return stats


def test_tuple_state(group):
    a, b = group.run(solve_tuple)
    assert a == b
    assert a.nfe_backward > 0


class Fails(nn.Module):
    """Misbehaves on rank 1 alone."""

    def __init__(self, rank, kind):
        super().__init__()
        self.kind = kind if rank == 1 else ""

    def forward(self, t, y):
        if self.kind == "nan" and t > 0.5:
            return y * math.nan
        if self.kind == "blows up":
            return y**3 * 100
        if self.kind == "budget":
            return 1e4 * torch.cos(1e4 * t) * torch.ones_like(y)
        return -y


FAILURES = {
    "nan": NonFiniteState,
    "state": NonFiniteState,
    "state with a first step": NonFiniteState,
    "blows up": StepSizeUnderflow,
    "budget": MaxStepsExceeded,
    "cotangent": NonFiniteState,
}


def fail(rank, kind):
    x = torch.ones(3, 2, dtype=f64)
    if kind.startswith("state") and rank == 1:
        x[0, 0] = math.nan
    options = {"norm": SharedNorm(), "max_num_steps": 300}
    if "first" in kind:
        options["first_step"] = 0.1
    x.requires_grad_()
    try:
        y = odeint_adjoint(Fails(rank, kind), x, T, rtol=1e-3, atol=1e-3, options=options)
        if kind == "cotangent":
            y[-1].sum().mul(math.nan if rank == 1 else 1.0).backward()
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""


@pytest.mark.parametrize("kind", FAILURES)
def test_all_ranks_fail_together(kind, group):
    found = group.run(fail, kind)
    assert [name for name, _ in found] == [FAILURES[kind].__name__] * RANKS


def explain_alone(rank):
    if rank:
        return ""
    field, x = seeded("rows").block.field, torch.randn(4, 5, dtype=f64)
    return explain(field, x, T, options={"norm": SharedNorm()})


def test_explain_needs_no_other_rank(group):
    text = group.run(explain_alone)[0]
    assert "backend: not cpu: it has the option norm" in text


def with_groups(rank):
    alone = [distributed.new_group([r]) for r in range(RANKS)][rank]
    return count(rank, odeint, SharedNorm(alone), {}, False)[1]


def test_groups(group):
    """A group of one process takes the steps that the process takes without the option."""
    own = group.run(count, odeint, None, {}, False)
    shared = group.run(with_groups)
    assert [c.nfe for c in shared] == [c.nfe for _, c, _ in own]


def test_one_process_without_a_group():
    field, x = seeded("own")[0].field, batch(8, 3)
    want, stats = odeint(field, x, T, backend="reference", return_stats=True)
    y, shared = odeint(field, x, T, options={"norm": SharedNorm()}, return_stats=True)
    assert shared == stats
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    parts = (x, x.sum(1), torch.zeros(0, 3))
    assert SharedNorm()(parts).item() == pytest.approx(
        max(part.square().mean().sqrt().item() for part in parts[:2])
    )
