"""torch.compile: a solve is one node of the graph, with the values and gradients of eager calls."""

import copy
import shutil

import pytest
import torch
from torch import nn

from anode_fast import (
    AugODEBlock,
    ConvField,
    MaxStepsExceeded,
    MLPField,
    NonFiniteState,
    odeint,
)
from anode_fast.kernels.cpu import library

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
    dtype, method, options, by_row=False, columns=0, backwards=False, backend="cpu", tol=1e-4
):
    """Of torch.ops.anode_fast.solve, as `odeint` gives them."""
    field = MLPField(4, 8, activation="tanh").to(dtype)
    x = torch.randn(5, 4 - columns, dtype=dtype, requires_grad=True)
    t = torch.tensor([1.0, 0.4, 0.0] if backwards else [0.0, 0.4, 1.0], dtype=f64)
    settings = (tol, tol, method, tuple(options.items()), by_row, backend)
    call = f"{((4, (8, 8), 'tanh', True), columns, settings)}"
    return x, field.tensors(), t, call


@torch_looks_for_gradients
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        dict(method="rk4", options={"step_size": 0.25}),
        dict(method="dopri5", options={}),
        dict(method="dopri5", options={"max_step": 0.3}, columns=3),
        dict(method="bosh3", options={}, by_row=True),
        dict(method="dopri5", options={}, backwards=True),
        dict(method="rk4", options={"step_size": 0.25}, columns=1, backwards=True),
        dict(method="bosh3", options={}, columns=1, backend="triton", tol=1e-2),  # interpreted
    ],
    ids=["fixed", "adaptive", "augmented", "by row", "backwards", "fixed backwards", "triton"],
)
def test_operators_pass_torchs_checks(given, dtype):
    x, parameters, t, call = operator_arguments(dtype, **given)
    solve, gradient = torch.ops.anode_fast.solve, torch.ops.anode_fast.solve_gradient
    torch.library.opcheck(solve, (x, parameters, t, call))
    tensors = [p.detach() for p in parameters]
    grad = torch.randn(3, 5, 4, dtype=dtype)
    torch.library.opcheck(gradient, (grad, x.detach(), tensors, t, call))


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


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_inductor_as_in_eager():
    net = model()
    compiled = torch.compile(net, fullgraph=True)
    x, parameters = torch.randn(7, 3, dtype=f64), list(net.parameters())
    want = value_and_gradients(net, x, parameters)
    assert_alike(value_and_gradients(compiled, x, parameters), want)


def test_solve_is_one_node():
    graphs = GraphCounter()
    field, t = MLPField(3, 8).double(), torch.linspace(0, 1, 3, dtype=f64)
    block = AugODEBlock.mlp(3, 8, augment_dim=2).double()

    def both(x):
        return block(x)[:, :3] + odeint(field, x, t)[-1]

    torch.compile(both, fullgraph=True, backend=graphs)(torch.randn(4, 3, dtype=f64))
    assert graphs.solves == [2]


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
    "half precision": dict(dtype=torch.float16, batch=0),
    "one row": dict(shape=(3,)),
    "implicit method": dict(method="trapezoid", options={"step_size": 0.25}),
    "many layers": dict(layers=9),
    "hook": dict(change=with_hook),
    "callback": dict(change=with_callback),
    "gradient for t": dict(t_needs_grad=True),
    "perturb": dict(method="rk4", options={"step_size": 0.25, "perturb": True}),
    "jump_t": dict(options={"jump_t": torch.tensor([0.5])}),
    "infinite option": dict(options={"max_step": torch.inf}),
    "dtype option": dict(options={"dtype": torch.float32}),
    "continuous gradient": dict(gradient="continuous"),
    "reference": dict(backend="reference"),
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
    x, parameters, t, call = operator_arguments(f64, "dopri5", {})
    solve = torch.ops.anode_fast.solve
    for wrong in (x.float(), x[:, :3], x[None]):
        with pytest.raises(ValueError, match="anode_fast::solve: "):
            solve(wrong, parameters, t, call)
    with pytest.raises(ValueError, match="anode_fast::solve: want weights"):
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
