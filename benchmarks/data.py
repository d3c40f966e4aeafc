"""Data sets and the order in which they are visited, from seeds alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class ConcentricSpheres(TensorDataset):
    """The paper's g(x): -1 in a ball, +1 in a shell around it, nothing in between.

    Points are uniform in the ball and in the shell, the inner ones first. They are drawn in float64
    on the CPU and then rounded, so a seed means the same points on every machine and device.

    Args:
        dim: Dimension of the space, at least 1.
        inner_radius: r1, radius of the ball.
        outer_radii: (r2, r3), inner and outer radius of the shell.
        num_inner: Points in the ball.
        num_outer: Points in the shell.
        seed: Of the generator.

    Attributes:
        points: [num_inner + num_outer, dim], float32.
        targets: g at the points, [num_inner + num_outer, 1], float32.
        inner: Which points lie in the ball, [num_inner + num_outer], bool.

    Source: Dupont, Doucet, Teh, Augmented Neural ODEs, 2019, section 4 and appendix E.2.1.
    """

    def __init__(
        self,
        dim: int = 2,
        *,
        inner_radius: float = 0.5,
        outer_radii: tuple[float, float] = (1.0, 1.5),
        num_inner: int = 1000,
        num_outer: int = 2000,
        seed: int = 0,
    ) -> None:
        if dim < 1 or not 0 < inner_radius < outer_radii[0] < outer_radii[1]:
            raise ValueError(
                "ConcentricSpheres: want dim >= 1 and radii 0 < r1 < r2 < r3, "
                f"got dim={dim}, r1={inner_radius}, (r2, r3)={outer_radii}."
            )
        generator = torch.Generator().manual_seed(seed)
        inner = _uniform_in_shell(num_inner, dim, 0.0, inner_radius, generator)
        outer = _uniform_in_shell(num_outer, dim, *outer_radii, generator)
        self.points = torch.cat([inner, outer]).float()
        self.inner = torch.arange(num_inner + num_outer) < num_inner
        self.targets = torch.where(self.inner, -1.0, 1.0).unsqueeze(1)
        super().__init__(self.points, self.targets)


def _uniform_in_shell(
    count: int, dim: int, low: float, high: float, generator: torch.Generator
) -> Tensor:
    """Points with low <= |x| <= high, uniform by volume: [count, dim], float64."""
    direction = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    direction /= direction.norm(dim=1, keepdim=True)
    # The volume within radius r grows as r^dim, so r^dim is what is uniform.
    share = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return direction * (low**dim + share * (high**dim - low**dim)) ** (1 / dim)


def batches(
    data: TensorDataset, batch_size: int, epochs: int, *, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Every point once per epoch, in an order that depends on the seed alone.

    The last batch of an epoch may be smaller. Batches are slices of the whole tensors, which
    costs a hundredth of what a DataLoader's collation of single points does.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for indices in torch.randperm(len(data), generator=generator).split(batch_size):
            yield data[indices]
