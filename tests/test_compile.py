"""torch.compile: a solve is one node of the graph, with the values and gradients of eager calls."""

import copy
import dataclasses
import functools
import shutil

import pytest
import torch
from torch import nn

from anode_fast import (
    AugODEBlock,
    ConvField,
    ConvODENet,
    MaxStepsExceeded,
    MLPField,
    NonFiniteState,
    ODENet,
    odeint,
    odeint_adjoint,
    operators,
)
from anode_fast.execute import solve as odeint_solve
from anode_fast.kernels.cpu import library
from anode_fast.spec import described
from anode_fast.stats import GraphStats

if library.load() is None:
    pytest.skip(library.missing(), allow_module_level=True)

f32, f64 = torch.float32, torch.float64

# torch itself, at tensors that have none: in opcheck, and where a graph ends.
torch_looks_for_gradients = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


class GraphCounter:
    """A backend that runs graphs as they are. `solves` has, of each, the number of solves in it."""

    def __init__(self):
        self.solves = []

    def __call__(self, graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        ops = ("anode_fast.solve", "anode_fast.solve.default")
        self.solves.append(sum(str(node.target) in ops for node in nodes))
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(dtype=f64, **block):
    """A block between two layers."""
    block = AugODEBlock.mlp(3, 16, augment_dim=2, activation="tanh", **block)
    return nn.Sequential(nn.Linear(3, 3), block, nn.Linear(5, 2)).to(dtype)


def value_and_gradients(call, x, parameters):
    """What `call` makes of x, and the gradients of x and the parameters."""
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    # An uneven functional, so that no two entries have the same cotangent.
    loss = (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [leaf, *parameters], materialize_grads=True)]


def assert_alike(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def failure(call, x):
    """What the call raises."""
    with pytest.raises(Exception) as caught:  # noqa: B017
        call(x)
    return caught.value


def message(error, call, *args):
    with pytest.raises(error) as caught:
        call(*args)
    assert type(caught.value) is error
    return str(caught.value)


# --- the operators --------------------------------------------------------------------------------


def operator_arguments(
    dtype,
    method="dopri5",
    options=None,
    control="batch",
    gradient="auto",
    adjoint=None,
    columns=0,
    backwards=False,
    backend="auto",
    tol=1e-4,
    images=False,
):
    """Of torch.ops.anode_fast.solve, as `odeint` gives them."""
    t = torch.tensor([1.0, 0.4, 0.0] if backwards else [0.0, 0.4, 1.0], dtype=f64)
    settings = (tol, tol, method, tuple((options or {}).items()))
    settings += (backend, control, gradient, adjoint)
    if images:
        field = ConvField(3, 4, activation="tanh").to(dtype)
    else:
        field = MLPField(4, 8, activation="tanh").to(dtype)
    shape = (2, 3 - columns, 4, 3) if images else (5, 4 - columns)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    return x, field.tensors(), t, f"{((described(field.spec()),), columns, settings)}"


@torch_looks_for_gradients
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        dict(method="rk4", options={"step_size": 0.25}),
        dict(),
        dict(options={"max_step": 0.3}, columns=3),
        dict(method="bosh3", control="sample"),
        dict(backwards=True),
        dict(method="rk4", options={"step_size": 0.25}, columns=1, backwards=True),
        dict(method="bosh3", columns=1, backend="triton", tol=1e-2),  # interpreted
        dict(gradient="continuous"),
        dict(adjoint=(1e-3, None, "bosh3", (("norm", "seminorm"),))),
        dict(backend="reference"),
        dict(images=True, columns=1),
        dict(images=True, gradient="discrete"),
        dict(images=True, gradient="continuous", tol=1e-2),
    ],
    ids=lambda given: ",".join(f"{name}={value}" for name, value in given.items()),
)
def test_operators_pass_torchs_checks(given, dtype):
    x, parameters, t, call = operator_arguments(dtype, **given)
    ops = torch.ops.anode_fast
    torch.library.opcheck(ops.solve, (x, parameters, t, call))
    y, tensors = x.detach(), [p.detach() for p in parameters]
    torch.library.opcheck(ops.solve, (y, tensors, t, call))
    for needs in ([True] * (1 + len(tensors)), [False, True, *[False] * (len(tensors) - 1)]):
        torch.library.opcheck(ops.solve_forth, (y, tensors, t, needs, call))
        solution, _, way = ops.solve_forth(y, tensors, t, needs, call)
        grad = torch.randn_like(solution)
        torch.library.opcheck(ops.solve_back, (grad, y, tensors, t, way, needs, call))


@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_way_back_is_kept_or_made_again(images, monkeypatch):
    x, parameters, t, call = operator_arguments(f64, images=images, columns=1)
    y, tensors, needs = x.detach(), [p.detach() for p in parameters], [True] * (1 + len(parameters))
    ops, solves = torch.ops.anode_fast, []
    monkeypatch.setattr(operators, "solve", lambda *a: solves.append(a) or odeint_solve(*a))
    solution, counts, way = ops.solve_forth(y, tensors, t, needs, call)
    assert len(solves) == len(operators._ways) == 1
    grad = torch.randn_like(solution)
    want = ops.solve_back(grad, y, tensors, t, way, needs, call)
    assert len(solves) == 1
    copied = ops.solve_back(grad, y, tensors, t, way.clone(), needs, call)
    assert len(solves) == 2
    for got, value in zip(copied, want, strict=True):
        assert torch.equal(got, value)
    alias = way.view(1)
    del way
    assert len(operators._ways) == 1  # the memory lives
    del alias
    assert not operators._ways
    # It is the gradient that autograd gives.
    y = ops.solve(x, parameters, t, call)[0]
    for got, value in zip(torch.autograd.grad(y, [x, *parameters], grad), want, strict=True):
        assert torch.equal(got, value)


def test_results_may_be_written_to():
    """The gradient does not read the memory of a result."""
    x, parameters, t, call = operator_arguments(f64, gradient="continuous")
    y, tensors, needs = x.detach(), [p.detach() for p in parameters], [True] * (1 + len(parameters))
    ops = torch.ops.anode_fast
    solution, _, way = ops.solve_forth(y, tensors, t, needs, call)
    grad = torch.ones_like(solution)
    want = ops.solve_back(grad, y, tensors, t, way, needs, call)
    solution.fill_(torch.nan)
    for got, value in zip(ops.solve_back(grad, y, tensors, t, way, needs, call), want, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_operators_second_derivatives(images):
    x, parameters, t, call = operator_arguments(f64, images=images)
    field = ConvField(3, 4, activation="tanh") if images else MLPField(4, 8, activation="tanh")
    found = []
    for backend in ("operator", "reference"):
        if backend == "operator":
            y = torch.ops.anode_fast.solve(x, parameters, t, call)[0]
        else:
            y = odeint(functools.partial(field.evaluate, parameters), x, t, rtol=1e-4, atol=1e-4)
        first = torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=True)
        loss = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(loss, [x, *parameters])])
    assert_alike(*found)


def test_operators_batched_gradients():
    x, parameters, t, call = operator_arguments(f64)
    y = torch.ops.anode_fast.solve(x, parameters, t, call)[0]
    grads = torch.randn(3, *y.shape, dtype=f64)
    (got,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for g, grad in zip(got, grads, strict=True):
        torch.testing.assert_close(g, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


# --- compiled models ------------------------------------------------------------------------------

BLOCKS = {
    "adaptive": {},
    "by row": {"step_control": "sample"},
    "fixed": {"method": "rk4", "options": {"step_size": 0.1}},
    "backwards": {"t": (1.0, -0.5)},
    "not augmented": {"augmentation": nn.Linear(3, 2)},
    "triton": {"backend": "triton"},
}


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_block_as_in_eager(block, dtype):
    net = model(dtype, **copy.deepcopy(block))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, parameters = torch.randn(7, 3, dtype=dtype), list(net.parameters())
    want = value_and_gradients(net, x, parameters)
    assert_alike(value_and_gradients(compiled, x, parameters), want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want[0])


@pytest.mark.parametrize("times", [(0.0, 0.3, 1.0), (1.0, 0.3), (0.5,)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_odeint_as_in_eager(method, times):
    field, t = MLPField(3, 16, activation="tanh").double(), torch.tensor(times, dtype=f64)
    options = {"step_size": 0.1} if method == "rk4" else {}

    def last(y):
        return odeint(field, y, t, rtol=1e-5, atol=1e-5, method=method, options=options)[-1]

    compiled = torch.compile(last, fullgraph=True, backend="aot_eager")
    y, parameters = torch.randn(7, 3, dtype=f64), list(field.parameters())
    want = value_and_gradients(last, y, parameters)
    assert_alike(value_and_gradients(compiled, y, parameters), want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(y), want[0])


MODELS = {
    "ODENet": (lambda: ODENet(3, 16, 2, augment_dim=2, activation="tanh"), (7, 3)),
    "ConvODENet": (
        lambda: ConvODENet((2, 6, 5), 4, 3, augment_dim=1, activation="tanh"),
        (3, 2, 6, 5),
    ),
    "features": (lambda: WithFeatures(), (7, 3)),
    "trajectory": (
        lambda: Trajectory(AugODEBlock.conv((2, 6, 5), 4, activation="tanh")),
        (3, 2, 6, 5),
    ),
}


class WithFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ODENet(3, 16, 2, activation="tanh")

    def forward(self, x):
        return torch.cat(self.net(x, return_features=True), 1)


class Trajectory(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.trajectory(x, 4)


IMAGES = (2, 6, 5)
MODELS = {
    "ODENet": (lambda: ODENet(3, 16, 2, augment_dim=2, activation="tanh"), (7, 3)),
    "ConvODENet": (lambda: ConvODENet(IMAGES, 4, 3, 1, activation="tanh"), (3, *IMAGES)),
    "features": (WithFeatures, (7, 3)),
    "trajectory": (lambda: Trajectory(AugODEBlock.conv(IMAGES, 4)), (3, *IMAGES)),
}


@pytest.mark.parametrize("model", MODELS)
def test_models_as_in_eager(model):
    make, shape = MODELS[model]
    net, graphs = make().double(), GraphCounter()
    x, parameters = torch.randn(shape, dtype=f64), list(net.parameters())
    want = value_and_gradients(net, x, parameters)
    torch.compile(net, fullgraph=True, backend=graphs)(x)
    assert graphs.solves == [1]
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_alike(value_and_gradients(compiled, x, parameters), want)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("model", MODELS)
def test_inductor_as_in_eager(model):
    make, shape = MODELS[model]
    net = make().double()
    compiled = torch.compile(net, fullgraph=True)
    parameters = list(net.parameters())
    for batch in (3, 5, 8):  # the second one compiles for every size
        x = torch.randn(batch, *shape[1:], dtype=f64)
        want = value_and_gradients(net, x, parameters)
        assert_alike(value_and_gradients(compiled, x, parameters), want)


ADJOINTS = {
    "discrete": {},
    "continuous": dict(adjoint_rtol=1e-4, adjoint_method="bosh3"),
    "seminorm": dict(adjoint_options={"norm": "seminorm"}),
    "fixed": dict(method="rk4", options={"step_size": 0.25}),
}


@pytest.mark.parametrize("given", ADJOINTS.values(), ids=ADJOINTS)
@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_odeint_adjoint_as_in_eager(images, given):
    field = ConvField(2, 4, activation="tanh") if images else MLPField(3, 8, activation="tanh")
    field, t = field.double(), torch.tensor([0.0, 0.3, 1.0], dtype=f64)
    y = torch.randn((3, 2, 4, 5) if images else (7, 3), dtype=f64)

    def last(y):
        return odeint_adjoint(field, y, t, rtol=1e-5, atol=1e-5, **given)[-1]

    compiled = torch.compile(last, fullgraph=True, backend="aot_eager")
    parameters = list(field.parameters())
    want = value_and_gradients(last, y, parameters)
    assert_alike(value_and_gradients(compiled, y, parameters), want)


def test_solve_is_one_node():
    graphs = GraphCounter()
    field, t = MLPField(3, 8).double(), torch.linspace(0, 1, 3, dtype=f64)
    block = AugODEBlock.mlp(3, 8, augment_dim=2).double()

    def both(x):
        return block(x)[:, :3] + odeint(field, x, t)[-1]

    torch.compile(both, fullgraph=True, backend=graphs)(torch.randn(4, 3, dtype=f64))
    assert graphs.solves == [2]


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_counts_as_in_eager(block):
    net = model(**copy.deepcopy(block))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, parameters = torch.randn(7, 3, dtype=f64), list(net.parameters())
    found = []
    for call in (net, compiled):
        value_and_gradients(call, x, parameters)
        found.append({**dataclasses.asdict(net[1].stats), "launches": None})
    assert isinstance(net[1].stats, GraphStats)
    assert found[0] == found[1]
    assert found[0]["nfe"] > 0
    assert copy.deepcopy(net)[1].stats == net[1].stats
    compiled.eval()
    with torch.no_grad():
        compiled(x)
    assert net[1].stats.nfe == found[0]["nfe"]


def test_counters_do_not_compile_again():
    """Eager calls move the field's nfe: no graph depends on it."""
    net, graphs = model(), GraphCounter()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    x = torch.randn(7, 3, dtype=f64)
    for _ in range(3):
        compiled(x)
        before = net[1].field.nfe
        net(x)
        assert net[1].field.nfe > before
    assert graphs.solves == [1]


def test_blocks_of_one_kind_share_a_graph():
    blocks, graphs = [AugODEBlock.mlp(3, 8) for _ in range(12)], GraphCounter()
    x = torch.randn(5, 3)
    for block in blocks:
        block.compile(fullgraph=True, backend=graphs)
    values = [block(x) for block in blocks]
    assert len(graphs.solves) == 1
    for block, value in zip(blocks, values, strict=True):
        torch.testing.assert_close(value, copy.deepcopy(block).forward(x))


def test_frozen_weights():
    net = model()
    net[1].field.layers[0].requires_grad_(False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, parameters = torch.randn(7, 3, dtype=f64), [p for p in net.parameters() if p.requires_grad]
    want = value_and_gradients(net, x, parameters)
    assert_alike(value_and_gradients(compiled, x, parameters), want)


@torch_looks_for_gradients
def test_layer_without_bias():
    field, t = MLPField(3, 8).double(), torch.tensor([0.0, 1.0], dtype=f64)
    field.layers[1].bias = None
    y = torch.randn(7, 3, dtype=f64)

    def last(y):
        return odeint(field, y, t)[-1]

    assert torch.equal(torch.compile(last, backend="aot_eager")(y), last(y))


def test_weights_are_read_anew():
    net, x = model(), torch.randn(7, 3, dtype=f64)
    graphs = GraphCounter()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    before = compiled(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    after = compiled(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, net(x))
    assert len(graphs.solves) == 1


def test_training_step_by_step():
    """Gradients reach an optimizer, and the next call uses what it made of the weights."""
    eager = model()
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, losses = torch.randn(7, 3, dtype=f64), []
    for module, call in ((eager, eager), (net, compiled)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][0] > losses[0][-1]


def test_batch_sizes_do_not_compile_again_and_again():
    net, graphs = model(), GraphCounter()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    for batch in (7, 9, 12, 33, 200):
        x = torch.randn(batch, 3, dtype=f64)
        torch.testing.assert_close(compiled(x), net(x))
    assert graphs.solves == [1, 1]  # for one size, then for every size


def test_dynamic_batch_size_compiles_once():
    net, graphs = model(), GraphCounter()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    for batch in (7, 9, 33):
        x = torch.randn(batch, 3, dtype=f64)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), net(x))
    assert graphs.solves == [1]


# --- calls that are not for the operator ----------------------------------------------------------


def with_hook(field):
    field.register_forward_hook(lambda module, args, f: 2 * f)


def with_callback(field):
    field.callback_step = lambda t, y, dt: None


NOT_COMPILED = {
    "one row": dict(shape=(3,)),
    "hook": dict(change=with_hook),
    "callback": dict(change=with_callback),
    "gradient for t": dict(t_needs_grad=True),
    "jump_t": dict(options={"jump_t": torch.tensor([0.5])}),
    "infinite option": dict(options={"max_step": torch.inf}),
    "dtype option": dict(options={"dtype": torch.float32}),
}


def last_state(
    dtype=f64, batch=7, shape=None, layers=2, change=None, t_needs_grad=False, times=(0, 1), **given
):
    """A function of the state, and a state."""
    field = MLPField(3, 8, num_hidden=layers, activation="tanh").to(dtype)
    if change:
        change(field)
    t = torch.tensor(times, dtype=f64, requires_grad=t_needs_grad)
    y = torch.randn(shape or (batch, 3)).to(dtype)
    return (lambda y: odeint(field, y, t, **given)[-1]), y


@torch_looks_for_gradients
@pytest.mark.parametrize("given", NOT_COMPILED.values(), ids=NOT_COMPILED)
def test_other_calls_run_outside_the_graph(given):
    last, y = last_state(**given)
    graphs = GraphCounter()
    assert torch.equal(torch.compile(last, backend=graphs)(y), last(y))
    assert not any(graphs.solves)


@pytest.mark.parametrize(
    "given",
    [
        dict(shape=(7, 2)),
        dict(shape=(7, 5)),
        dict(shape=(2, 7, 3)),
        dict(change=nn.Module.float),
        dict(method="nope"),
        dict(step_control="nope"),
        dict(gradient="nope"),
        dict(method="rk4", options={"step_size": 0.5}, step_control="sample"),
        dict(rtol=-1.0),
    ],
    ids=lambda given: ",".join(given),
)
def test_arguments_that_cannot_work(given):
    last, y = last_state(**given)
    error = type(failure(last, y))
    assert issubclass(error, (ValueError, TypeError))
    compiled = torch.compile(last, backend="aot_eager")
    assert message(error, compiled, y) == message(error, last, y)


def test_operator_refuses_what_it_would_misread():
    x, parameters, t, call = operator_arguments(f64)
    solve = torch.ops.anode_fast.solve
    for wrong in (x.float(), x[:, :3], x[None]):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            solve(wrong, parameters, t, call)
    with pytest.raises(RuntimeError):
        solve(x, [parameters[0][:, :1], *parameters[1:]], t, call)


# --- errors ---------------------------------------------------------------------------------------


def both_messages(net, error, x):
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    return message(error, compiled, x), message(error, net, x)


@pytest.mark.parametrize("step_control", ["batch", "sample"])
def test_step_budget(step_control):
    net, x = model(max_num_steps=1, rtol=1e-9, step_control=step_control), torch.randn(7, 3)
    got, want = both_messages(net, MaxStepsExceeded, x.double())
    assert got == want
    assert got.startswith("max_num_steps exceeded")


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_weights_that_are_not_finite(block):
    net = model(**copy.deepcopy(block))
    with torch.no_grad():
        net[1].field.layers[1].weight[0, 0] = torch.nan
    got, want = both_messages(net, NonFiniteState, torch.randn(7, 3, dtype=f64))
    assert got == want
    assert got.startswith("non-finite values in state")


def test_bad_input():
    x = torch.randn(7, 3, dtype=f64)
    x[2, 1] = torch.nan
    net = model()[1]
    got, want = both_messages(net, type(failure(net, x)), x)
    assert got == want


@pytest.mark.parametrize("times", [(0.0, 1.0, 0.5), (0.0, 0.0), (0.0, torch.inf)])
def test_bad_times(times):
    field, t = MLPField(3, 8).double(), torch.tensor(times, dtype=f64)

    def last(y):
        return odeint(field, y, t)[-1]

    y = torch.randn(7, 3, dtype=f64)
    got, want = both_messages(last, type(failure(last, y)), y)
    assert got == want


@pytest.mark.parametrize("make", [lambda: MLPField(3, 8), lambda: ConvField(3, 4)])
def test_a_compiled_field_is_compiled_once(make):
    field, graphs = make(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(field, backend=backend, fullgraph=True)
    y = torch.randn(2, 3) if isinstance(field, MLPField) else torch.randn(2, 3, 4, 4)
    t = torch.tensor(0.3)
    for _ in range(3):
        torch.testing.assert_close(compiled(t, y), field(t, y))  # which counts
    assert len(graphs) == 1
    assert field.nfe == 3
