"""kernels/gpu/host.py: how kernels are launched."""

import pytest
import torch

from anode_fast import fused
from anode_fast.kernels.gpu import host
from anode_fast.tableau import DOPRI5


class Kernel:
    """Stands for one of Triton's: notes its launches, by itself and by what it compiled."""

    arg_names = ("x", "size")

    def __init__(self):
        self.seen, self.again = [], []

    def __getitem__(self, grid):
        def run(**arguments):
            self.seen.append((grid, arguments))
            if arguments["x"] is None:
                raise ValueError("it does not compile")
            return self.Compiled(self.again)

        return run

    class Compiled:
        def __init__(self, again):
            self.again = again

        def __getitem__(self, grid):
            return lambda *values: self.again.append((grid, values))


def test_later_launches_go_to_what_is_compiled():
    kernel, known = Kernel(), {}
    host.launch(known, kernel, (3,), dict(size=1, x="x"))
    host.launch(known, kernel, (5, 9), dict(size=2, x="y"))
    assert kernel.seen == [((3,), dict(size=1, x="x"))]
    assert kernel.again == [((5, 9, 1), ("y", 2))]
    with pytest.raises(ValueError, match="does not compile"):
        host.launch({}, kernel, (1,), dict(size=1, x=None))


def test_what_is_known_is_of_memory_that_is_aligned():
    options = dict(control=0, data_dim=1, rtol=1.0, atol=1.0, safety=0.9, ifactor=10.0)
    options |= dict(dfactor=0.2, max_step=1.0, max_num_steps=9, float_time=0, backwards=0)
    made = host.Solver(fused._method(DOPRI5), torch.float32, **options)
    x = torch.zeros(64)
    assert made._known([x], "one") is made._known([x[4:]], "one")
    assert made._known([x], "one") is not made._known([x], "two")
    for tensors in ([x[1:]], [x, x[2:]]):
        assert made._known(tensors, "one") is not made._known(tensors, "one")
