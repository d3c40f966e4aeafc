"""What a run trains: everything that its figures depend on, as plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

NODE, ANODE, RESNET = "NODE", "ANODE", "ResNet"
OURS, THEIRS = "anode_fast", "torchdiffeq"
TORCH = "torch"  # what computes a ResNet, which needs no solver

FLOWS = ("identity", "flip")
TOYS = ("spheres", "separable")
SLICES, TEST = "slices", "test"


@dataclass(frozen=True)
class Setting:
    """One training. The defaults are the paper's for its toy data, from appendix E.

    Attributes:
        data: Name of the data set, one of `FLOWS`, `TOYS`, or of images (`datasets.py`).
        model: "NODE", "ANODE" or "ResNet".
        dim: Dimension of the points; images have their own.
        augment: Augmented dimensions or channels.
        hidden: Width of the field's layers (of a ResNet's blocks), or its filters.
        layers: Of a ResNet.
        batch: Points of an iteration.
        learning_rate, weight_decay: Of Adam.
        epochs: How often every point is seen.
        points: Toy data: points of either class.
        images: Images to train on, the first of the set; 0 for all.
        size: Height and width of the images, which larger ones are averaged down to.
        holdout: What is kept for validation: nothing (""), "slices" of the plane, the "test" images
            of the set, or fold k of n of the training points, as "k/n".
        tolerance: Absolute and relative, of dopri5.
        max_num_steps: Of one solve.
        in_turns: Whether the solvers' trainings take turns in one process, to compare their times.
        seed: Of data; with `repeat`, of weights and batches.
        repeat: Which repetition.
        device: Where.
    """

    data: str
    model: str
    dim: int = 2
    augment: int = 0
    hidden: int = 32
    layers: int = 5
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 50
    points: tuple[int, int] = (1000, 2000)
    images: int = 0
    size: int = 28
    holdout: str = ""
    tolerance: float = 1e-3
    max_num_steps: int = 1000
    in_turns: bool = False
    seed: int = 0
    repeat: int = 0
    device: str = "cpu"

    @property
    def is_image(self) -> bool:
        """Whether the points are images."""
        return self.data not in (*FLOWS, *TOYS)

    @property
    def weights_seed(self) -> int:
        """Of weights and batches: another one for each repetition."""
        return 1000 * self.seed + self.repeat

    @property
    def key(self) -> str:
        """Name of the run's file, the same for the same setting only."""
        raw = json.dumps(asdict(self), sort_keys=True).encode()
        shape = "images" if self.is_image else f"{self.dim}d"
        return (
            f"{self.data}-{shape}-{self.model}-{self.repeat}-{hashlib.sha1(raw).hexdigest()[:12]}"
        )

    def solvers(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the wanted solvers that this setting is trained with."""
        if self.model == RESNET:
            return (TORCH,)
        return (OURS, THEIRS) if self.in_turns else wanted
