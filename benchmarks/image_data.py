"""Images to train on, by name: real ones where they are, and others that say what they are.

Sets are read where they stand; nothing is copied. MNIST and Fashion-MNIST are found in
torchvision's layout (ROOT/MNIST/raw, ROOT/FashionMNIST/raw) or flat, like those of Debian's package
dataset-fashion-mnist, compressed or not. Both give their files the same names: flat ones are MNIST
if their folder is called so, else Fashion-MNIST. CIFAR-10 is found in torchvision's layout
(ROOT/cifar-10-batches-py). The digits come with scikit-learn, and the synthetic images from here.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FOLDERS = (Path("data"), Path("/usr/share/datasets/fashion-mnist"))
"""Where images are looked for: here, and where Debian's package puts Fashion-MNIST."""
LAYOUTS = ("", "raw", "FashionMNIST/raw")
MNIST_LAYOUTS = ("", "raw", "MNIST/raw")
CIFAR10_LAYOUT = "cifar-10-batches-py"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST_FILES = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR10_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10_TEST_FILES = ("test_batch",)

MNIST, FASHION, DIGITS = "MNIST", "Fashion-MNIST", "digits (scikit-learn, 8x8)"
CIFAR10, SYNTHETIC = "CIFAR-10", "SYNTHETIC CIFAR-shaped images"
NAMES = {
    "mnist": MNIST,
    "fashion-mnist": FASHION,
    "digits": DIGITS,
    "cifar10": CIFAR10,
    "synthetic": SYNTHETIC,
}
"""What sets are called in full, by the short names that settings and files have."""
SIZES = {"mnist": 28, "fashion-mnist": 28, "digits": 8, "cifar10": 32, "synthetic": 32}
"""Height and width of the images as they are."""
INSTEAD = {"mnist": ("mnist", "fashion-mnist", "digits"), "cifar10": ("cifar10", "synthetic")}
"""By the set that is wanted: which are taken, the first that is there."""
DOWNLOADS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
"""The sets that are looked for in folders, and torchvision's classes that get them."""

CLASSES = 10  # of every set
DIGITS_TRAIN = 1500  # the digits have no test part: it is what comes after so many
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 10_000, 2000  # how many there are unless told otherwise

_BYTES = b"\x00\x00\x08"  # of the types that an idx file may hold, the one of images

# Of the synthetic images:
_SIZE = SIZES["synthetic"]
_CELLS = 4  # a smooth pattern is linear between so many random values each way
_PATTERNS = 3  # of a class
_SHIFTS = 12  # each way
_CHUNK = 1000  # that have a seed together


@dataclass(frozen=True)
class Images:
    """Images and labels.

    Attributes:
        name: Of the data set, in full.
        data: Images [count, channels, size, size] in [0, 1], float32, and labels [count], int64.
        note: Why it is not another data set; "" if it is the one that is wanted.
        synthetic: Whether the images are made up.
    """

    name: str
    data: TensorDataset
    note: str = ""
    synthetic: bool = False

    @property
    def size(self) -> int:
        """Height and width."""
        return int(self.data.tensors[0].shape[-1])

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colours."""
        return int(self.data.tensors[0].shape[1])

    @property
    def classes(self) -> int:
        """How many there are in the set, whichever of them these images show."""
        return CLASSES


def resolve(wanted: str, folders: Sequence[Path] = FOLDERS) -> str:
    """Short name of the set to use: the wanted one where it is, else one instead of it.

    For "mnist" that is Fashion-MNIST where it is, else the digits; for "cifar10" the synthetic set.

    Args:
        wanted: "mnist" or "cifar10".
        folders: To look into. A set counts as there if its training images are.

    Raises:
        ValueError: Something else is wanted.
    """
    if wanted not in INSTEAD:
        raise ValueError(
            f"image_data.resolve: got {wanted!r}, want {' or '.join(map(repr, INSTEAD))}; "
            "the others have no replacement: read them by their names."
        )
    return next(name for name in INSTEAD[wanted] if name not in DOWNLOADS or _paths(name, folders))


def read(
    name: str,
    folders: Sequence[Path] = FOLDERS,
    *,
    size: int,
    train: bool = True,
    first: int = 0,
) -> Images:
    """One part of a set.

    Args:
        name: Short name of the set, a key of `NAMES`.
        folders: To look into; the first that has the set counts.
        size: Height and width wanted: larger images are averaged down to it, smaller ones stay.
        train: Whether it is the training part, else the test part.
        first: How many images, the first of them; 0 for all. Of the synthetic ones there are as
            many as one asks for, of the others there may be fewer.

    Returns:
        Images with a note if they stand for MNIST or CIFAR-10, and that is in no folder.

    Raises:
        ValueError: No set has this name, or its files are not what they should be.
        FileNotFoundError: No folder has this part of it.
    """
    if name not in NAMES:
        raise ValueError(f"image_data.read: got {name!r}, want one of {', '.join(NAMES)}.")
    if name == "synthetic":
        images, labels = draw_synthetic(
            first or (SYNTHETIC_TRAIN if train else SYNTHETIC_TEST), train=train
        )
    elif name == "digits":
        images, labels = _digits()
        part = slice(DIGITS_TRAIN) if train else slice(DIGITS_TRAIN, None)
        images, labels = images[part], labels[part]
    else:
        paths = _paths(name, folders, train=train)
        if not paths:
            raise FileNotFoundError(
                f"image_data.read: the {'training' if train else 'test'} images of {NAMES[name]} "
                f"are not in {_listed(folders)}. {_remedy(name)}"
            )
        images, labels = _cifar10(paths[0], train) if name == "cifar10" else _idx(paths)
    count = first or len(labels)
    return Images(
        NAMES[name],
        _data(images[:count], labels[:count], size),
        _note(name, folders),
        synthetic=name == "synthetic",
    )


def load(folders: Sequence[Path] = FOLDERS, size: int = 28) -> Images:
    """Fashion-MNIST's training images from the first folder that has them, else all the digits.

    Args:
        folders: To look into.
        size: Height and width wanted: larger images are averaged down to it.
    """
    if paths := _paths("fashion-mnist", folders):
        return Images(FASHION, _data(*_idx(paths), size))
    return Images(DIGITS, _data(*_digits(), size), _excuse("fashion-mnist", "digits", folders))


def download(folder: Path, names: Sequence[str] = ("fashion-mnist",)) -> None:
    """Gets sets into a folder as torchvision lays them out, if they are not there yet.

    Args:
        folder: Where to.
        names: Short names, of "mnist", "fashion-mnist" and "cifar10".

    Raises:
        ValueError: One of the names is another.
    """
    if unknown := [name for name in names if name not in DOWNLOADS]:
        raise ValueError(
            f"image_data.download: got {', '.join(map(repr, unknown))}, "
            f"want of {', '.join(DOWNLOADS)}: nothing else is downloaded."
        )
    from torchvision import datasets  # slow to import, and seldom needed

    for name in names:
        getattr(datasets, DOWNLOADS[name])(folder, download=True)


def find(folder: Path, name: str = "fashion-mnist", *, train: bool = True) -> list[Path]:
    """Files of a set's training or test part in a folder; nothing if one is missing."""
    endings = ["", ".gz"]
    if name == "cifar10":
        layouts, names = [CIFAR10_LAYOUT], CIFAR10_FILES if train else CIFAR10_TEST_FILES
        endings = [""]
    else:
        names = FILES if train else TEST_FILES
        # Fashion-MNIST's files are called like MNIST's: only their folder tells which they are.
        layouts = [
            layout
            for layout in (MNIST_LAYOUTS if name == "mnist" else LAYOUTS)
            if _is_mnists(folder / layout) == (name == "mnist")
        ]
    for layout in layouts:
        places = [[folder / layout / (name + end) for end in endings] for name in names]
        paths = [next((path for path in place if path.is_file()), None) for place in places]
        if all(paths):
            return [path for path in paths if path]
    return []


def read_idx(path: Path) -> Tensor:
    """An array of bytes in the idx format, uint8; a name that ends in .gz is compressed.

    Raises:
        ValueError: It is something else, or not whole.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dims = raw[3] if len(raw) > 3 else 0
    shape = np.frombuffer(raw[4 : 4 + 4 * dims], ">u4").tolist()
    if raw[:3] != _BYTES or len(raw) != 4 + 4 * dims + math.prod(shape):
        raise ValueError(f"{path} is no idx file of bytes, or not whole: get it again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * dims).view(shape)


def draw_synthetic(count: int, *, train: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up images of CIFAR-10's shape, for where it is not: they depict nothing.

    Each class has three smooth random patterns. An image is one of them, shifted by up to eleven
    pixels either way, under a fainter pattern of another class, a smooth background, another
    brightness and contrast for each colour, and noise. Shifts are what a linear classifier cannot
    follow: it is right about 60% of the time, a small convolutional net nearly always on the images
    it was trained on and less often on others.

    All numbers drawn are whole and all weights fractions of a power of two: float64 rounds none of
    it before the end, so a seed means the same bytes on every machine. The first images stay the
    same however many are asked for.

    Args:
        count: How many.
        train: Whether they are training images. Test images show the same patterns.
        seed: Of the generator.

    Returns:
        Images [count, 3, 32, 32], uint8, and labels [count], int64. 10,000 of them take a second.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = _smooth((CLASSES, _PATTERNS, 3), generator)
    chunks = []
    for start in range(0, count, _CHUNK):
        # Another seed for each chunk of either part; the patterns have the first.
        generator.manual_seed((seed << 32) + 1 + 2 * (start // _CHUNK) + train)
        chunks.append(_synthetic_chunk(patterns, generator))
    images, labels = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
    return images, labels


def _synthetic_chunk(patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [_CHUNK, 3, 32, 32], uint8, of patterns [10, 3, 3, 32, 32], and labels [_CHUNK]."""

    def whole(low: int, high: int, *shape: int) -> Tensor:
        """Numbers from low to high, both included."""
        return torch.randint(low, high + 1, (_CHUNK, *shape), generator=generator)

    def shifted(labels: Tensor) -> Tensor:
        of_labels = patterns[labels, whole(0, _PATTERNS - 1)]
        rows, columns = ((torch.arange(_SIZE) + whole(0, _SHIFTS - 1, 1)) % _SIZE for _ in "yx")
        images = torch.arange(_CHUNK)[:, None, None]
        shifted = of_labels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]]
        return shifted.permute(0, 3, 1, 2)

    labels = whole(0, CLASSES - 1)
    others = (labels + whole(1, CLASSES - 1)) % CLASSES
    values = shifted(labels) / 2 + shifted(others) / 4 + _smooth((_CHUNK, 3), generator) / 4
    values = values * (whole(12, 20, 3, 1, 1) / 16) + whole(96, 160, 3, 1, 1)
    values += whole(-32, 32, 3, _SIZE, _SIZE)
    return values.round().clamp(0, 255).to(torch.uint8), labels


def _smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random patterns without edges, periodic in both directions: [*shape, 32, 32], float64."""
    values = torch.randint(-128, 128, (*shape, _CELLS, _CELLS), generator=generator).double()
    # A pixel's share in a value falls linearly to 0 at the next value.
    reach = _SIZE // _CELLS
    away = (torch.arange(_SIZE)[:, None] - reach * torch.arange(_CELLS)) % _SIZE
    share = (reach - torch.minimum(away, _SIZE - away)).clamp_min(0).double() / reach  # [32, 4]
    return share @ values @ share.T


def _is_mnists(place: Path) -> bool:
    """Whether idx files in this folder are MNIST's, by its name, or that of the one above raw/."""
    place = place.absolute()
    return (place.parent if place.name == "raw" else place).name.lower() == "mnist"


def _paths(name: str, folders: Sequence[Path], *, train: bool = True) -> list[Path]:
    """Files of a part of a set in the first folder that has them all."""
    return next((paths for x in folders if (paths := find(x, name, train=train))), [])


def _idx(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 28, 28] and labels [count], uint8."""
    images, labels = map(read_idx, paths)
    return images.unsqueeze(1), labels


def _cifar10(path: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 32, 32], uint8, and labels [count] of the part that has this file."""
    from torchvision import datasets  # slow to import, and seldom needed

    try:  # It compares the files with their checksums before it trusts a pickle.
        found = datasets.CIFAR10(path.parent.parent, train=train)
    except RuntimeError as error:
        raise ValueError(f"{path.parent} is not {CIFAR10}, or not whole: get it again") from error
    return torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets)


def _digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1], and labels [1797]."""
    from sklearn.datasets import load_digits  # slow to import, and seldom needed

    found = load_digits()
    return torch.from_numpy(found.images / 16.0).unsqueeze(1), torch.from_numpy(found.target)


def _note(name: str, folders: Sequence[Path]) -> str:
    """Why a set is not the one that it stands for, if that is nowhere."""
    for wanted, names in INSTEAD.items():
        if name in names[1:] and not _paths(wanted, folders):
            return _excuse(wanted, name, folders)
    return ""


def _excuse(wanted: str, name: str, folders: Sequence[Path]) -> str:
    images = f"images of {FASHION}" if name == "fashion-mnist" else NAMES[name]
    warning = f" No result on them is one on {NAMES[wanted]}." if name == "synthetic" else ""
    return (
        f"{NAMES[wanted]} is not in {_listed(folders)}: these are the {images}.{warning} "
        f"{_remedy(wanted)}"
    )


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders)) or "any folder"


def _remedy(name: str) -> str:
    debian = ", so does Debian's package dataset-fashion-mnist" if name == "fashion-mnist" else ""
    return f"--download gets it{debian}; --data names a folder that has it."


def _data(images: Tensor, labels: Tensor, size: int) -> TensorDataset:
    """Images [count, channels, h, h], bytes or in [0, 1], and labels as `Images` has them."""
    images = images / 255.0 if images.dtype == torch.uint8 else images
    images = images.float().contiguous()
    if size < images.shape[-1]:
        images = nn.functional.adaptive_avg_pool2d(images, size)
    return TensorDataset(images, labels.long())
