"""`SharedNorm`: the processes of a group take the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


class SharedNorm:
    """Root mean square over the state's entries on all ranks: options={"norm": SharedNorm()}.

    Every rank then takes the same steps, those of one process with the whole batch, so the number
    of evaluations does not depend on the number of ranks. A solve that cannot go on fails on all of
    them. The adjoint ODE, if one is solved, shares its norm too.

    All ranks have to solve together, with the same arguments but for the state's rows. It costs one
    all_reduce of a few numbers for each attempted step (and three at the start). Where no process
    group is initialised it is the norm of this process.

    Args:
        group: A torch.distributed process group; None: the default one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __call__(self, state: Tensor | Sequence[Tensor]) -> Tensor:
        """The norm; of several tensors the largest."""
        parts = [state] if isinstance(state, Tensor) else state
        sums = [(torch.linalg.vector_norm(x).double().square(), x.numel()) for x in parts]
        shared = torch.stack([torch.stack((s, torch.full_like(s, n))) for s, n in sums])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(shared, group=self.group)
        total, count = shared.unbind(1)
        return (total / count.clamp(min=1)).sqrt().amax()
