"""The data of the paper's experiments: counts, gaps, seeds, and what replaces absent images."""

import gzip
import hashlib
import math
import pickle
import struct

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from benchmarks import image_data
from benchmarks.data import OneDimensional, Separable
from benchmarks.paper import datasets
from benchmarks.paper.datasets import SLICE, TEST_IMAGES, in_slices, load, slice_starts
from benchmarks.paper.settings import ANODE, NODE, Setting

# With seed 0, so that results stay comparable: the first and the last point by dimension, digests.
SEPARABLE = {
    1: ([-0.9641815], [1.3011094]),
    2: ([-0.9641815, -0.4466771], [0.2982060, 1.1270910]),
    3: ([-0.6352924, -0.1413935, -0.9696014], [0.2613358, 1.3117979, 1.0036631]),
}
ONE_DIMENSIONAL = ([-0.9059894], [1.0570128])
SYNTHETIC = {True: "dd12bb1ed07252fe", False: "785e7ef010af7b47"}


# ---- separable regions


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_separable_has_the_counts_and_the_gap(dim):
    data = Separable(dim, num_inner=1000, num_outer=2000)
    x, y = data.tensors
    assert x.shape == (3000, dim) and x.dtype == y.dtype == torch.float32
    assert x.abs().max() <= 1.5 and x.abs().amax(0).min() > 1.49  # fills the cube
    assert data.inner.tolist() == [True] * 1000 + [False] * 2000
    assert (y[:1000] == -1).all() and (y[1000:] == 1).all() and y.shape == (3000, 1)
    surface = 0 if dim == 1 else 0.6 * torch.sin(math.pi * x[:, 0])
    height = x[:, -1] - surface
    assert (height[:1000] <= -0.25 + 1e-6).all() and (height[1000:] >= 0.25 - 1e-6).all()
    assert height[:1000].max() > -0.26 and height[1000:].min() < 0.26  # and goes as far
    nearest = min(torch.cdist(part, x[1000:]).min() for part in x[:1000].split(250))
    assert nearest > 0.23  # as its docstring says


@pytest.mark.parametrize("dim", [2, 3])
def test_separable_is_uniform_in_its_regions(dim):
    x = Separable(dim, num_inner=4000, num_outer=0).points.double()
    # A column has as many points as it is high, from the cube's floor up to the band.
    high = 1.5 - 0.25 + 0.6 * torch.sin(math.pi * x[:, 0])
    share = ((x[:, -1] + 1.5) / high).sort().values
    steps = torch.arange(1, 4001) / 4000
    assert (share - steps).abs().max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, once in a thousand
    bins = x[:, 0].histc(6, -1.5, 1.5) / 4000
    edges = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    area = 1.25 * edges.diff() - (0.6 / math.pi) * torch.cos(math.pi * edges).diff()
    assert (bins - area / area.sum()).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_separable_is_linearly_separable_only_once_bent(dim):
    data = Separable(dim)
    x, inner = data.points.double(), data.inner.numpy()

    def accuracy(points):
        return LogisticRegression(C=1e4, max_iter=10_000).fit(points, inner).score(points, inner)

    assert (accuracy(x) == 1) == (dim == 1)
    assert accuracy(data.height(x).unsqueeze(1)) == 1
    assert dim == 1 or accuracy(x) < 0.99  # not for a stray point


# ---- maps of the line


@pytest.mark.parametrize("flip", [False, True])
def test_one_dimensional_is_the_papers_map(flip):
    data = OneDimensional(flip, num_points=400, noise=0.1)
    x, y = data.tensors
    assert x.shape == y.shape == (400, 1) and x.dtype == y.dtype == torch.float32
    assert torch.equal(y, (-x if flip else x).sign())
    assert torch.equal(data.inner, x[:, 0] < 0) and data.inner.sum() == 200
    away = (x.abs() - 1).abs()
    assert away.max() <= 0.1 + 1e-6 and away.max() > 0.095
    assert (x.abs() - 1).mean().abs() < 4 * 0.1 / 3**0.5 / 400**0.5


@pytest.mark.parametrize("flip", [False, True])
def test_the_best_that_a_flow_can_do(flip):
    # A flow of the line keeps the order of points.
    x, y = (z[:, 0].double().numpy() for z in OneDimensional(flip, num_points=300).tensors)
    best = IsotonicRegression().fit_transform(x, y)
    assert np.abs(best - (0 if flip else y)).max() < 1e-12


@pytest.mark.parametrize("options", [{"num_points": 301}, {"noise": 1.0}, {"noise": -0.1}])
def test_one_dimensional_refuses(options):
    with pytest.raises(ValueError, match="an even num_points.*0 <= noise < 1, got"):
        OneDimensional(True, **options)


def test_separable_refuses_no_dimension():
    with pytest.raises(ValueError, match="dim >= 1, got dim=0"):
        Separable(0)


# ---- seeds


@pytest.mark.parametrize(
    "make", [lambda seed: Separable(2, seed=seed), lambda seed: OneDimensional(True, seed=seed)]
)
def test_points_depend_on_the_seed_alone(make):
    first = make(3)
    torch.manual_seed(99)
    assert torch.equal(first.points, make(3).points)
    assert not torch.equal(first.points, make(4).points)


def test_points_do_not_change_between_versions():
    for dim, expected in SEPARABLE.items():
        points = Separable(dim).points[[0, -1]]
        assert torch.allclose(points, torch.tensor(expected), rtol=0, atol=1e-6)
    points = OneDimensional(False).points
    assert torch.allclose(points[[0, -1]], torch.tensor(ONE_DIMENSIONAL), rtol=0, atol=1e-6)
    assert torch.equal(points, OneDimensional(True).points)


# ---- images in folders


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def write_idx(folder, names, count, ending=""):
    """Random images and labels as idx files; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = pixels(count, 28, 28), torch.arange(count, dtype=torch.uint8) % 10
    for name, array in zip(names, arrays, strict=True):
        raw = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
        raw += array.numpy().tobytes()
        (folder / (name + ending)).write_bytes(gzip.compress(raw) if ending else raw)
    return arrays


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with CIFAR-10's files, of ten images each, and all the training images."""
    torchvision = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar" / image_data.CIFAR10_LAYOUT
    folder.mkdir(parents=True)
    sums, parts = {}, []

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw).hexdigest()

    for name in (*image_data.CIFAR10_FILES, *image_data.CIFAR10_TEST_FILES):
        parts.append(pixels(10, 3, 32, 32))
        write(name, {"data": parts[-1].flatten(1).numpy(), "labels": list(range(10))})
    write("batches.meta", {"label_names": list("abcdefghij")})
    # Checksums are torchvision's of the true files; these are of the files that stand for them.
    for listed, names in (
        ("train_list", image_data.CIFAR10_FILES),
        ("test_list", image_data.CIFAR10_TEST_FILES),
    ):
        monkeypatch.setattr(torchvision.CIFAR10, listed, [[name, sums[name]] for name in names])
    meta = torchvision.CIFAR10.meta | {"md5": sums["batches.meta"]}
    monkeypatch.setattr(torchvision.CIFAR10, "meta", meta)
    return folder.parent, torch.cat(parts[:-1])


@pytest.mark.parametrize("layout", ["MNIST/raw", "mnist", "MNIST", "mnist/raw"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_is_found_in_its_layouts(layout, ending, tmp_path):
    x, y = write_idx(tmp_path / layout, image_data.FILES, 30, ending)
    tests, _ = write_idx(tmp_path / layout, image_data.TEST_FILES, 7, ending)
    root = tmp_path if layout == "MNIST/raw" else tmp_path / layout.removesuffix("/raw")
    folders = [tmp_path / "nothing", root]
    assert image_data.resolve("mnist", folders) == "mnist"
    found = image_data.read("mnist", folders, size=28)
    assert (found.name, found.note, found.synthetic) == ("MNIST", "", False)
    assert (found.size, found.channels, found.classes) == (28, 1, 10)
    images, labels = found.data.tensors
    assert torch.equal(images[:, 0], x / 255) and torch.equal(labels, y.long())
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    images, _ = image_data.read("mnist", folders, size=28, train=False).data.tensors
    assert torch.equal(images[:, 0], tests / 255)


@pytest.mark.parametrize(
    ("layout", "folder"),
    [
        ("FashionMNIST/raw", ""),
        ("fashion", "fashion"),
        ("mnist/fashion-mnist", "mnist/fashion-mnist"),
    ],
)
def test_fashion_mnist_is_not_taken_for_mnist(layout, folder, tmp_path):
    write_idx(tmp_path / layout, image_data.FILES, 12)
    folders = [tmp_path / folder]
    assert image_data.resolve("mnist", folders) == "fashion-mnist"
    found = image_data.read("fashion-mnist", folders, size=14)
    assert found.name == image_data.FASHION and found.size == 14
    assert f"MNIST is not in {folders[0]}" in found.note and "of Fashion-MNIST" in found.note
    with pytest.raises(FileNotFoundError, match="training images of MNIST are not in .*download"):
        image_data.read("mnist", folders, size=14)


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    write_idx(tmp_path / "mnist", image_data.FILES, 12)
    assert not image_data.find(tmp_path / "mnist")
    assert image_data.load([tmp_path / "mnist"], 8).name == image_data.DIGITS


def test_both_may_be_there(tmp_path):
    first, _ = write_idx(tmp_path / "MNIST/raw", image_data.FILES, 3)
    other, _ = write_idx(tmp_path / "FashionMNIST/raw", image_data.FILES, 3)
    assert image_data.resolve("mnist", [tmp_path]) == "mnist"
    for name, expected in (("mnist", first), ("fashion-mnist", other)):
        found = image_data.read(name, [tmp_path], size=28)
        assert torch.equal(found.data.tensors[0][:, 0], expected / 255)
        assert found.note == ""  # asked for, as MNIST is there


def test_cifar10_is_read_from_torchvisions_files(cifar10):
    folder, pixels = cifar10
    assert image_data.resolve("cifar10", [folder.parent, folder]) == "cifar10"
    found = image_data.read("cifar10", [folder.parent, folder], size=32)
    assert (found.name, found.note, found.synthetic) == ("CIFAR-10", "", False)
    assert (found.size, found.channels, found.classes) == (32, 3, 10)
    images, labels = found.data.tensors
    assert torch.equal(images, pixels / 255) and images.is_contiguous()
    assert labels.tolist() == list(range(10)) * 5 and labels.dtype == torch.int64
    assert len(image_data.read("cifar10", [folder], size=32, train=False).data) == 10


def test_a_cifar10_that_is_not_whole_is_refused(cifar10):
    folder, _ = cifar10
    path = folder / image_data.CIFAR10_LAYOUT / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="batches-py is not CIFAR-10, or not whole"):
        image_data.read("cifar10", [folder], size=32)
    path.unlink()  # and one with a file missing is not there
    assert image_data.resolve("cifar10", [folder]) == "synthetic"


def test_a_test_part_that_is_missing_is_no_reason_for_another_set(tmp_path):
    write_idx(tmp_path / "MNIST/raw", image_data.FILES, 3)
    with pytest.raises(FileNotFoundError, match="test images of MNIST are not in"):
        image_data.read("mnist", [tmp_path], size=28, train=False)


@pytest.mark.parametrize(("size", "got"), [(4, 4), (3, 3), (8, 8), (14, 8)])
def test_images_are_averaged_down_and_never_up(size, got):
    found = image_data.read("digits", [], size=size, first=5)
    assert found.size == got and found.data.tensors[0].shape == (5, 1, got, got)
    whole = image_data.read("digits", [], size=8, first=5).data.tensors[0]
    if got == 4:
        pooled = whole.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        assert torch.allclose(found.data.tensors[0], pooled)


def test_digits_are_split_in_two():
    train, test = (image_data.read("digits", [], size=8, train=x) for x in (True, False))
    assert (len(train.data), len(test.data)) == (1500, 297)
    assert "MNIST is not in any folder" in train.note and "the digits" in train.note
    both = [torch.cat(parts) for parts in zip(train.data.tensors, test.data.tensors, strict=True)]
    whole = image_data.load([], 8).data.tensors
    assert torch.equal(both[0], whole[0]) and torch.equal(both[1], whole[1])


def test_what_takes_the_place_of_what():
    assert image_data.resolve("mnist", []) == "digits"
    assert image_data.resolve("cifar10", []) == "synthetic"
    with pytest.raises(ValueError, match="got 'digits', want 'mnist' or 'cifar10'"):
        image_data.resolve("digits", [])
    with pytest.raises(ValueError, match="got 'CIFAR10', want one of mnist, fashion-mnist"):
        image_data.read("CIFAR10", [], size=8)
    assert list(image_data.NAMES) == list(image_data.SIZES)


def test_download_gets_what_is_named(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision.datasets")
    got = []
    for name in image_data.DOWNLOADS.values():
        monkeypatch.setattr(
            torchvision, name, lambda folder, download, n=name: got.append((n, folder, download))
        )
    image_data.download(tmp_path)
    image_data.download(tmp_path, ["mnist", "cifar10"])
    assert got == [(name, tmp_path, True) for name in ("FashionMNIST", "MNIST", "CIFAR10")]
    with pytest.raises(ValueError, match="got 'digits', want of mnist, fashion-mnist, cifar10"):
        image_data.download(tmp_path, ["mnist", "digits"])
    assert len(got) == 3


# ---- synthetic images


@pytest.mark.parametrize("train", [True, False])
def test_synthetic_images_are_the_same_bytes_everywhere(train):
    x, y = image_data.draw_synthetic(1500, train=train)
    assert x.shape == (1500, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    raw = x.numpy().tobytes() + y.numpy().tobytes()
    assert hashlib.sha256(raw).hexdigest()[:16] == SYNTHETIC[train]
    torch.manual_seed(99)
    fewer, labels = image_data.draw_synthetic(700, train=train)
    assert torch.equal(fewer, x[:700]) and torch.equal(labels, y[:700])
    others, _ = image_data.draw_synthetic(700, train=train, seed=1)
    assert not torch.equal(fewer, others)


def test_synthetic_images_differ_from_each_other():
    x, y = image_data.draw_synthetic(1500)
    test, _ = image_data.draw_synthetic(1500, train=False)
    assert len({image.numpy().tobytes() for image in torch.cat([x, test])}) == 3000
    assert y.bincount(minlength=10).min() > 100
    for end in (0, 255):
        assert (x == end).float().mean() < 0.01  # bytes have room for them


def test_synthetic_images_say_so():
    found = image_data.read("synthetic", [], size=16, first=100)
    assert found.synthetic and "SYNTHETIC" in found.name and "SYNTHETIC" in found.note
    assert "CIFAR-10 is not in any folder" in found.note and "No result on them" in found.note
    assert (found.size, found.channels, found.classes) == (16, 3, 10)
    assert len(image_data.read("synthetic", [], size=4, train=False).data) == 2000


def test_synthetic_images_can_be_learnt_but_not_by_a_linear_classifier():
    train, test = (
        image_data.read("synthetic", [], size=16, train=x, first=2000) for x in (True, False)
    )
    (x, y), (x_test, y_test) = (
        (a.flatten(1), b) for a, b in (z.data.tensors for z in (train, test))
    )
    linear = RidgeClassifier(alpha=100).fit(x, y)
    assert 0.4 < linear.score(x_test, y_test) < linear.score(x, y) < 0.8
    # Pooling makes a net care less about shifts, which is what it takes.
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(4)),
        *(torch.nn.Flatten(), torch.nn.Linear(256, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    images, labels = train.data.tensors
    for batch in torch.randperm(2000).repeat(5).split(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch] - 0.5), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (net(test.data.tensors[0] - 0.5).argmax(1) == y_test).double().mean()
    assert linear.score(x_test, y_test) + 0.05 < right < 0.99


# ---- splits of a setting


@pytest.mark.parametrize("data", ["identity", "flip"])
def test_maps_of_the_line(data):
    split = load(Setting(data, NODE, dim=1, points=(30, 50)))
    assert len(split.train) == 80 and split.validation is None and split.inner.sum() == 40
    assert split.words == f"{'g_1d' if data == 'flip' else 'identity'}, 80 points"
    x, y = split.train.tensors
    assert torch.equal(x.sign(), -y if data == "flip" else y)
    with pytest.raises(ValueError, match="dim is 2, want 1 for"):
        load(Setting(data, NODE))


@pytest.mark.parametrize(
    ("data", "words"), [("spheres", "concentric spheres"), ("separable", "separable regions")]
)
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_toy_data(data, words, dim):
    split = load(Setting(data, NODE, dim=dim, points=(30, 50)))
    assert split.words == f"{words}, d = {dim}, 30 + 50 points"
    x, y = split.train.tensors
    assert x.shape == (80, dim) and y.shape == (80, 1)
    assert torch.equal(split.inner, y[:, 0] < 0) and split.inner.sum() == 30
    assert (split.note, split.synthetic, split.channels, split.classes) == ("", False, 0, 0)
    assert split.validation is None and split.size == 0


def test_data_depend_on_the_seed_and_not_on_the_repeat():
    setting = Setting("spheres", NODE)
    first = load(setting)
    assert load(Setting("spheres", ANODE, augment=5, repeat=7)) is first  # not even made anew
    other = load(Setting("spheres", NODE, seed=1))
    assert not torch.equal(first.train.tensors[0], other.train.tensors[0])


@pytest.mark.parametrize("seed", range(5))
def test_slices_are_three_and_do_not_overlap(seed):
    starts = slice_starts(seed)
    gaps = torch.cat([starts, starts[:1] + 2 * math.pi]).diff()
    assert len(starts) == 3 and SLICE == pytest.approx(math.pi / 5) and (gaps >= SLICE).all()
    assert torch.equal(starts, slice_starts(seed)) and not torch.equal(
        starts, slice_starts(seed + 1)
    )
    # Three tenths of the circle, whatever the radius.
    angles = torch.arange(10_000) * (2 * math.pi / 10_000)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    inside = in_slices(circle, seed)
    assert inside.sum().item() == pytest.approx(3000, abs=3)
    assert torch.equal(inside, in_slices(1.4 * circle, seed))


@pytest.mark.parametrize("data", ["spheres", "separable"])
def test_what_the_slices_hold_is_kept_for_validation(data):
    whole = load(Setting(data, NODE, seed=2))
    split = load(Setting(data, NODE, seed=2, holdout="slices"))
    x, y = split.validation.tensors
    angles = torch.atan2(x[:, 1], x[:, 0]) % (2 * math.pi)
    assert all(
        ((angle - slice_starts(2)) % (2 * math.pi) <= SLICE + 1e-6).any() for angle in angles
    )
    assert not in_slices(split.train.tensors[0], 2).any()
    assert 500 < len(x) == 3000 - len(split.train) and {-1.0, 1.0} == set(y[:, 0].tolist())
    assert torch.equal(split.inner, split.train.tensors[1][:, 0] < 0)
    together = torch.cat([split.train.tensors[0], x])
    assert set(map(tuple, together.tolist())) == set(map(tuple, whole.train.tensors[0].tolist()))
    assert split.words == f"{whole.words}, 3 slices kept for validation"


@pytest.mark.parametrize("data", ["separable", "digits"])
def test_folds_part_the_training_data(data):
    setting = {"points": (40, 61), "images": 101, "size": 4}
    whole = load(Setting(data, NODE, **setting), ()).train.tensors
    held = []
    for fold in (1, 2, 3):
        split = load(Setting(data, NODE, holdout=f"{fold}/3", **setting), ())
        assert split.words.endswith("one of 3 folds kept for validation")
        x, y = split.validation.tensors
        assert len(x) in (33, 34) and len(split.train) == 101 - len(x)
        assert data == "digits" or set(y[:, 0].tolist()) == {-1.0, 1.0}
        held += x.flatten(1).tolist()
        rest = {*map(tuple, split.train.tensors[0].flatten(1).tolist())}
        assert not rest & {*map(tuple, x.flatten(1).tolist())}
        if split.inner is not None:
            assert torch.equal(split.inner, split.train.tensors[1][:, 0] < 0)
    assert sorted(held) == sorted(whole[0].flatten(1).tolist())  # each once
    assert held != whole[0].flatten(1).tolist()  # shuffled
    other = load(Setting(data, NODE, holdout="1/3", seed=1, **setting), ())
    first = load(Setting(data, NODE, holdout="1/3", **setting), ())
    assert not torch.equal(other.validation.tensors[0][:30], first.validation.tensors[0][:30])


def test_images_of_a_setting(tmp_path):
    x, y = write_idx(tmp_path / "MNIST/raw", image_data.FILES, 30)
    write_idx(tmp_path / "MNIST/raw", image_data.TEST_FILES, TEST_IMAGES + 5)
    folders = [tmp_path]
    split = load(Setting("mnist", NODE, images=20, holdout="test"), folders)
    assert torch.equal(split.train.tensors[0][:, 0], x[:20] / 255)
    assert torch.equal(split.train.tensors[1], y[:20].long())
    assert len(split.validation) == TEST_IMAGES
    assert split.words == "MNIST, 28x28, first 20 images, validated on 2000 test images"
    assert (split.note, split.synthetic, split.inner) == ("", False, None)
    assert (split.channels, split.classes, split.size) == (1, 10, 28)
    assert load(Setting("mnist", ANODE, images=20, holdout="test", repeat=3), folders) is split
    whole = load(Setting("mnist", NODE, size=14), folders)
    assert whole.words == "MNIST, 14x14, all 30 images" and whole.validation is None


def test_synthetic_images_of_a_setting_say_so():
    split = load(Setting("synthetic", NODE, images=50, size=16, holdout="test"), ())
    assert split.synthetic and "SYNTHETIC CIFAR-shaped images, 16x16, first 50" in split.words
    assert "CIFAR-10 is not in" in split.note
    assert (split.channels, split.classes, split.size) == (3, 10, 16)
    assert (len(split.train), len(split.validation)) == (50, 2000)


def test_small_images_stay_small():
    split = load(Setting("digits", NODE, images=5000, size=14), ())
    assert split.size == 8 and split.words.endswith("8x8), 8x8, all 1500 images")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"data": "cube"}, "data is 'cube', want one of identity, flip, spheres, separable, mnist"),
        ({"data": "spheres", "holdout": "test"}, "'test', want another .* no test part"),
        ({"data": "spheres", "dim": 3, "holdout": "slices"}, "'slices', want another .* dim is 3"),
        ({"data": "digits", "holdout": "slices"}, "'slices', want another .* of the plane"),
        *(
            ({"data": "spheres", "holdout": holdout}, "want .* 1 <= k <= n and 2 <= n <= 3000")
            for holdout in ("slice", "0/3", "4/3", "1/1", "1/3001", "1/", "a/b", "-1/3", "1/3/3")
        ),
    ],
)
def test_settings_that_have_no_data(setting, words):
    with pytest.raises(ValueError, match=f"datasets.load: the setting's .*{words}"):
        load(Setting(model=NODE, **setting), ())


def test_made_once(monkeypatch):
    calls = []
    read = image_data.read
    monkeypatch.setattr(
        datasets.image_data, "read", lambda *args, **kw: calls.append(args) or read(*args, **kw)
    )
    datasets._images.cache_clear()
    for repeat in range(20):
        load(Setting("digits", NODE, images=10, size=4, repeat=repeat, epochs=repeat), ())
    assert len(calls) == 1
