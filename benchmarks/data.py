"""Data sets and the order in which they are visited, from seeds alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

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


class Separable(TensorDataset):
    """-1 below a wavy surface, +1 above it, nothing in between: no line parts them, a flow can.

    Bending the space flat makes the two regions linearly separable and leaves its topology alone.
    Points are uniform in a cube less a band around the surface x_dim = 0.6 sin(pi x_1), in one
    dimension around 0. The band is 0.5 high, like the gap between the ball and the shell of
    `ConcentricSpheres`; across its steepest part that is a distance of 0.23. The lower points come
    first. They are drawn in float64 on the CPU and then rounded, as those are.

    Args:
        dim: Dimension of the space, at least 1.
        num_inner: Points below the surface.
        num_outer: Points above it.
        seed: Of the generator.

    Attributes:
        points: [num_inner + num_outer, dim], float32.
        targets: [num_inner + num_outer, 1], float32.
        inner: Which points lie below, [num_inner + num_outer], bool.

    Source: section 4.1 of the paper, which shows this data set and does not define it: the surface
    is ours, the counts and the width of the cube are those of its g(x).
    """

    HALF_WIDTH = 1.5  # of the cube
    WAVE = 0.6
    GAP = 0.5  # along the last axis

    def __init__(
        self, dim: int, *, num_inner: int = 1000, num_outer: int = 2000, seed: int = 0
    ) -> None:
        if dim < 1:
            raise ValueError(f"Separable: want dim >= 1, got dim={dim}.")
        generator = torch.Generator().manual_seed(seed)

        def points(count: int, side: int) -> Tensor:
            return _uniform_where(
                lambda x: side * self.height(x) >= self.GAP / 2,
                *(count, dim, self.HALF_WIDTH, generator),
            )

        self.points = torch.cat([points(num_inner, -1), points(num_outer, 1)]).float()
        self.inner = torch.arange(num_inner + num_outer) < num_inner
        self.targets = torch.where(self.inner, -1.0, 1.0).unsqueeze(1)
        super().__init__(self.points, self.targets)

    @classmethod
    def height(cls, points: Tensor) -> Tensor:
        """How far above the surface points are, along the last axis: [n, dim] -> [n]."""
        if points.shape[1] == 1:
            return points[:, 0]
        return points[:, -1] - cls.WAVE * (math.pi * points[:, 0]).sin()


class OneDimensional(TensorDataset):
    """The paper's maps of the line: -1 to -1 and 1 to 1, or flipped, g_1d: -1 to 1 and 1 to -1.

    A point is -1 or 1 with uniform noise, its target the number without noise, negated if flipped.
    One half of the points is negative, those come first. With equal halves the best that a map
    which keeps the points' order can do about flipped targets is to send every point to 0: by the
    mean squared error the best non-decreasing fit to decreasing targets is their mean.

    Args:
        flip: Whether the targets are negated.
        num_points: How many, an even number.
        noise: Largest distance of a point from -1 or 1, below 1.
        seed: Of the generator.

    Attributes:
        points: [num_points, 1], float32.
        targets: [num_points, 1], float32.
        inner: Which points are negative, [num_points], bool.

    Source: section 3 of the paper, which gives the two maps and neither counts nor noise.
    """

    def __init__(
        self, flip: bool, *, num_points: int = 1000, noise: float = 0.1, seed: int = 0
    ) -> None:
        if num_points % 2 or not 0 <= noise < 1:
            raise ValueError(
                "OneDimensional: want an even num_points, so that the targets' mean is 0, and "
                f"0 <= noise < 1, got num_points={num_points}, noise={noise}."
            )
        generator = torch.Generator().manual_seed(seed)
        self.inner = torch.arange(num_points) < num_points // 2
        sign = torch.where(self.inner, -1.0, 1.0).unsqueeze(1)
        share = torch.rand(num_points, 1, generator=generator, dtype=torch.float64)
        self.points = (sign + noise * (2 * share - 1)).float()
        self.targets = -sign if flip else sign
        super().__init__(self.points, self.targets)


def _uniform_where(
    wanted: Callable[[Tensor], Tensor],
    count: int,
    dim: int,
    half_width: float,
    generator: torch.Generator,
) -> Tensor:
    """Points of a cube that are wanted, uniform there: [count, dim], float64.

    Draws until there are enough. `wanted` maps [n, dim] to [n], bool.
    """
    found = torch.empty(0, dim, dtype=torch.float64)
    while len(found) < count:
        share = torch.rand(count, dim, generator=generator, dtype=torch.float64)
        points = half_width * (2 * share - 1)
        found = torch.cat([found, points[wanted(points)]])
    return found[:count]


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
