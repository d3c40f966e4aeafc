"""Programs for tests, written by hand and drawn at random."""

from anode_fast.kernels.program import STATE, TIME, UNARY, Instruction, Program


class Writer:
    """Writes a program, instruction by instruction."""

    def __init__(self, dim):
        self.dim = dim
        self.shapes, self.code, self.widths = [], [], [1, dim]

    def __call__(self, op, *inputs, width=None, tensors=(), number=0.0):
        """The number of the value that an instruction makes."""
        width = width or max((self.widths[i] for i in inputs), default=1)
        first = len(self.shapes)
        self.shapes += tensors
        parameters = tuple(range(first, len(self.shapes)))
        self.code.append(Instruction(op, inputs, width, parameters, float(number)))
        self.widths.append(width)
        return len(self.widths) - 1

    def linear(self, value, width, bias=True):
        tensors = [(width, self.widths[value]), (width,)][: 1 + bias]
        return self("linear", value, width=width, tensors=tensors)

    def join(self, *values):
        return self("join", *values, width=sum(self.widths[i] for i in values))

    def slice(self, value, start, width=1):
        return self("slice", value, width=width, number=start)

    def finished(self):
        return Program(self.dim, tuple(self.shapes), tuple(self.code))


def perceptron(dim, hidden, time="last", activation="tanh", layers=2):
    """Linear layers; the time is first, last, or not among the inputs."""
    write, value = Writer(dim), STATE
    if time:
        value = write.join(*((TIME, STATE) if time == "first" else (STATE, TIME)))
    for _ in range(layers):
        value = write(activation, write.linear(value, hidden))
    write.linear(value, dim)
    return write.finished()


def cubic():
    """The spiral: y**3 @ A."""
    write = Writer(2)
    write("linear_t", write("pow", STATE, number=3), width=2, tensors=[(2, 2)])
    return write.finished()


def predators():
    """Lotka and Volterra's equations: no linear map."""
    write = Writer(2)
    x, y = write.slice(STATE, 0), write.slice(STATE, 1)
    both = write("mul", x, y)
    rates = [write("parameter", tensors=[shape]) for shape in ((), (1,), (), (1,))]
    grow, eaten, starve, feed = rates
    up = write("sub", write("mul", grow, x), write("mul", eaten, both))
    down = write("sub", write("mul", feed, both), write("mul", starve, y))
    write.join(up, down)
    return write.finished()


def gated(dim=5, hidden=20):
    """A residual layer with a gate that depends on the time, and decay."""
    write = Writer(dim)
    first = write("tanh", write.linear(write.join(STATE, TIME), hidden))
    gate = write("sigmoid", write("mul", write("parameter", tensors=[(1,)]), TIME))
    second = write("mul", write("silu", write.linear(first, hidden)), gate)
    out = write.linear(write("add", first, second), dim, bias=False)
    write("sub", out, STATE)
    return write.finished()


def oscillator(hidden=16):
    """Of second order: position and velocity, and a net for the force."""
    write = Writer(6)
    velocity = write.slice(STATE, 3, 3)
    force = write.linear(write("softplus", write.linear(STATE, hidden)), 3)
    write.join(velocity, write("sub", force, velocity))
    return write.finished()


def growth():
    """One feature, one number: dy/dt = a y (1 - y) + sin(t)."""
    write = Writer(1)
    one = write("constant", number=1)
    rate = write("mul", write("parameter", tensors=[()]), STATE)
    logistic = write("mul", rate, write("sub", one, STATE))
    write("add", logistic, write("sin", TIME))
    return write.finished()


def everything():
    """Every function, and all that moves features."""
    write = Writer(3)
    total = write("parameter", width=3, tensors=[(3,)])
    for op in UNARY:
        if not op.startswith("d_"):
            number = {"elu": 0.7, "pow": 1.5}.get(op, 0)
            total = write("add", total, write(op, STATE, number=number))
    for power in (0, 3, -2, 0.5, 5):
        total = write("add", total, write("pow", STATE, number=power))
    greater = write("gt", total, STATE)
    least = write("add", write("ge", TIME, STATE), write("constant", number=2))
    chosen = write("select", greater, total, STATE)
    divided = write("div", chosen, least)
    part = write.slice(divided, 1, 2)
    one = write("total", write("place", part, width=5, number=2), width=1)
    write("add", write("spread", one, width=3), write.join(one, part))
    return write.finished()


PROGRAMS = {
    "time first": perceptron(7, 32, "first"),
    "time last": perceptron(3, 20, "last", "softplus"),
    "no time": perceptron(2, 40, None, "silu", 3),
    "one layer": perceptron(1, 16, "last", "gelu", 1),
    "wide": perceptron(4, 150, "last", "elu", 2),
    "cubic": cubic(),
    "predators": predators(),
    "gated": gated(),
    "oscillator": oscillator(),
    "growth": growth(),
    "everything": everything(),
}
