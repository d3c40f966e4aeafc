"""What a setting trains on, and what it is validated on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import image_data
from benchmarks.data import ConcentricSpheres, OneDimensional, Separable
from benchmarks.paper.settings import FLOWS, SLICES, TEST, TOYS, Setting

TEST_IMAGES = 2000
"""How many of a set's test images are used, the first of them: as many as a CPU has time for."""
NUM_SLICES, SLICE = 3, math.pi / 5
"""How many slices are removed from the plane, and the angle of one, which the paper gives."""

_SLICES_SEED = 1_000_000  # added to the setting's: else slices and points come from equal numbers


@dataclass(frozen=True)
class Split:
    """Data of a setting. It may be shared: do not write into it.

    Attributes:
        train: Inputs and targets: points [n, dim] and numbers [n, 1], float32, or images [n,
            channels, size, size], float32, and labels [n], int64.
        validation: The same of what was kept, or None.
        words: What it is, for titles and tables.
        note: Why it is not the paper's data; "" if it is.
        synthetic: Whether the images are made up.
        inner: Which of the training points are of the first class, [n], bool; None for images.
        channels: Of the images; 0 for points.
        classes: Of the images; 0 for points.
    """

    train: TensorDataset
    validation: TensorDataset | None
    words: str
    note: str = ""
    synthetic: bool = False
    inner: Tensor | None = None
    channels: int = 0
    classes: int = 0

    @property
    def size(self) -> int:
        """Height and width of the images, less than the setting's if they are small; else 0."""
        return int(self.train.tensors[0].shape[-1]) if self.channels else 0


def load(setting: Setting, folders: Sequence[Path] = image_data.FOLDERS) -> Split:
    """The data of a setting. They depend on its `seed`, not on its `repeat`, and are made once.

    Args:
        setting: Of which data, dim, points, images, size, holdout and seed count.
        folders: To look into for images.

    Raises:
        ValueError: `data` or `holdout` is unknown, or the two do not go together.
        FileNotFoundError: The images are in no folder.
    """
    name, holdout, seed = setting.data, setting.holdout, setting.seed
    if setting.is_image:
        return _images(name, setting.size, setting.images, holdout, seed, tuple(folders))
    return _toys(name, setting.dim, setting.points, holdout, seed)


def slice_starts(seed: int) -> Tensor:
    """Angles at which the removed slices start, rising, up to 4 pi: [NUM_SLICES], float64.

    Uniform among all ways in which slices do not overlap.
    """
    generator = torch.Generator().manual_seed(_SLICES_SEED + seed)
    share = torch.rand(NUM_SLICES, generator=generator, dtype=torch.float64)
    # Without the slices a shorter circle is left, cut at points that are uniform on it. The first
    # slice goes anywhere; each of the others has those before it to its left.
    left = 2 * math.pi - NUM_SLICES * SLICE
    cuts = torch.cat([share.new_zeros(1), left * share[1:].sort().values])
    return 2 * math.pi * share[0] + cuts + SLICE * torch.arange(NUM_SLICES)


def in_slices(points: Tensor, seed: int) -> Tensor:
    """Which points of the plane lie in the removed slices: [n, 2] -> [n], bool."""
    angle = torch.atan2(points[:, 1], points[:, 0]).double()
    return ((angle[:, None] - slice_starts(seed)) % (2 * math.pi) < SLICE).any(1)


@lru_cache(maxsize=8)
def _toys(name: str, dim: int, points: tuple[int, int], holdout: str, seed: int) -> Split:
    below, above = points
    counts = {"num_inner": below, "num_outer": above, "seed": seed}
    data: ConcentricSpheres | Separable | OneDimensional
    if name in FLOWS:
        if dim != 1:
            raise _refusal("dim", dim, f"1 for {name!r}, which maps the line to itself")
        data = OneDimensional(name == "flip", num_points=below + above, seed=seed)
        words = f"{'g_1d' if name == 'flip' else 'identity'}, {below + above} points"
    else:
        kind, title = {
            "spheres": (ConcentricSpheres, "concentric spheres"),
            "separable": (Separable, "separable regions"),
        }[name]
        data = kind(dim, **counts)
        words = f"{title}, d = {dim}, {below} + {above} points"
    split = Split(data, None, words, inner=data.inner)
    if holdout == SLICES:
        if dim != 2:
            raise _refusal("holdout", holdout, f"another one where dim is {dim}: slices need 2")
        kept = in_slices(data.points, seed)
        return _without(split, kept, f"{NUM_SLICES} slices kept for validation")
    if holdout == TEST:
        raise _refusal("holdout", holdout, f"another one for {name!r}, which has no test part")
    return _fold(split, holdout, seed)


@lru_cache(maxsize=4)
def _images(
    name: str, size: int, count: int, holdout: str, seed: int, folders: tuple[Path, ...]
) -> Split:
    if name not in image_data.NAMES:
        wanted = ", ".join((*FLOWS, *TOYS, *image_data.NAMES))
        raise _refusal("data", name, f"one of {wanted}")
    if holdout == SLICES:
        raise _refusal("holdout", holdout, f"another one for {name!r}: slices are of the plane")
    found = image_data.read(name, folders, size=size, first=count)
    some = f"{'first' if len(found.data) == count else 'all'} {len(found.data)}"
    split = Split(
        found.data,
        None,
        f"{found.name}, {found.size}x{found.size}, {some} images",
        found.note,
        found.synthetic,
        channels=found.channels,
        classes=found.classes,
    )
    if holdout == TEST:
        test = image_data.read(name, folders, size=size, train=False, first=TEST_IMAGES).data
        words = f"{split.words}, validated on {len(test)} test images"
        return replace(split, validation=test, words=words)
    return _fold(split, holdout, seed)


def _fold(split: Split, holdout: str, seed: int) -> Split:
    """Keeps fold k of n of the training data where the holdout is "k/n"; nothing where it is ""."""
    if not holdout:
        return split
    fold, slash, folds = holdout.partition("/")
    count = len(split.train)
    if not (slash and fold.isdecimal() and folds.isdecimal()) or not (
        1 <= int(fold) <= int(folds) and 2 <= int(folds) <= count
    ):
        wanted = f'"", "{SLICES}", "{TEST}", or "k/n" with 1 <= k <= n and 2 <= n <= {count}'
        raise _refusal("holdout", holdout, wanted)
    from sklearn.model_selection import KFold  # slow to import, and seldom needed

    folds_of = KFold(int(folds), shuffle=True, random_state=seed).split(range(count))
    kept = torch.zeros(count, dtype=torch.bool)
    kept[list(folds_of)[int(fold) - 1][1]] = True
    return _without(split, kept, f"one of {folds} folds kept for validation")


def _without(split: Split, kept: Tensor, words: str) -> Split:
    """The split with what was kept as its validation set; kept: [n], bool."""
    return replace(
        split,
        train=TensorDataset(*(x[~kept] for x in split.train.tensors)),
        validation=TensorDataset(*(x[kept] for x in split.train.tensors)),
        inner=None if split.inner is None else split.inner[~kept],
        words=f"{split.words}, {words}",
    )


def _refusal(field: str, got: object, wanted: str) -> ValueError:
    return ValueError(f"datasets.load: the setting's {field} is {got!r}, want {wanted}.")
