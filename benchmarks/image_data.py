"""Real images to train on: Fashion-MNIST where it is, else scikit-learn's digits, by name.

Fashion-MNIST is read where it stands, from torchvision's layout (ROOT/FashionMNIST/raw) or the flat
one of Debian's package dataset-fashion-mnist, compressed or not. Nothing is copied.
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
"""Where Fashion-MNIST is looked for: here, and where Debian's package puts it."""
LAYOUTS = ("", "raw", "FashionMNIST/raw")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
FASHION, DIGITS = "Fashion-MNIST", "digits (scikit-learn, 8x8)"

_BYTES = b"\x00\x00\x08"  # of the types that an idx file may hold, the one of images


@dataclass(frozen=True)
class Images:
    """Images and labels.

    Attributes:
        name: Of the data set.
        data: Images [count, 1, size, size] in [0, 1], float32, and labels [count], int64.
        note: Why it is not another data set; "" if it is the one that is wanted.
    """

    name: str
    data: TensorDataset
    note: str = ""

    @property
    def size(self) -> int:
        """Height and width."""
        return int(self.data.tensors[0].shape[-1])


def load(folders: Sequence[Path] = FOLDERS, size: int = 28) -> Images:
    """Fashion-MNIST's training images from the first folder that has them, else the digits.

    Args:
        folders: To look into.
        size: Height and width wanted: larger images are averaged down to it.
    """
    for folder in folders:
        if paths := find(folder):
            images, labels = (read_idx(path) for path in paths)
            return Images(FASHION, _data(images / 255.0, labels, size))
    looked = ", ".join(map(str, folders))
    note = (
        f"{FASHION} is not in {looked}: these are the {DIGITS}. --download gets it, so does "
        "Debian's package dataset-fashion-mnist; --data names a folder that has it."
    )
    from sklearn.datasets import load_digits  # slow to import, and seldom needed

    found = load_digits()
    images = torch.from_numpy(found.images / 16.0)
    return Images(DIGITS, _data(images, torch.from_numpy(found.target), size), note)


def download(folder: Path) -> None:
    """Gets Fashion-MNIST into folder/FashionMNIST/raw, if it is not there yet."""
    from torchvision.datasets import FashionMNIST  # slow to import, and seldom needed

    FashionMNIST(folder, download=True)


def find(folder: Path) -> list[Path]:
    """Files of the training images and labels in a folder; nothing if one is missing."""
    for layout in LAYOUTS:
        places = [[folder / layout / (name + end) for end in ("", ".gz")] for name in FILES]
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


def _data(images: Tensor, labels: Tensor, size: int) -> TensorDataset:
    images = images.float().unsqueeze(1)
    if size < images.shape[-1]:
        images = nn.functional.adaptive_avg_pool2d(images, size)
    return TensorDataset(images, labels.long())
