"""What every test gets: fixed seeds, one thread, and a `device` where it asks for one."""

import os
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings

# Without a card Triton's interpreter runs the kernels. They ask for it when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread: steadier timings and bitwise equal sums, whatever the machine.
torch.set_num_threads(1)

settings.register_profile("anode_fast", deadline=None, derandomize=True)
settings.load_profile("anode_fast")


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def own_code(monkeypatch):
    """Users' fields are left to their own code: what is tested is the path of any field."""
    reason = "the field is left to its own code"
    monkeypatch.setattr(sys.modules["anode_fast.execute"], "recognize", lambda *_: reason)
    return reason


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
