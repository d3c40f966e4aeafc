"""The paper's figures: what has to be trained for each, and at which size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sklearn.model_selection import ParameterGrid

from benchmarks import image_data
from benchmarks.paper.settings import ANODE, NODE, RESNET, SLICES, TEST, Setting

G, SEPARABLE, IDENTITY, G_1D = "g(x)", "separable", "identity", "g_1d"
MNIST, CIFAR10 = "MNIST", "CIFAR10"
PLANE = "plane"
AUGMENTED = 5  # dimensions, of the paper's ANODE for the toy data and for MNIST
AUGMENTED_CIFAR10 = 10
AUGMENTS = (0, 1, 2, 5, 10)
WEIGHT_DECAY = 1e-3  # the paper gives no figure
FOLDS = 3
CLASSES = 10
SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    NODE: {},
    ANODE: {"augment": (1, 2, 5)},
    RESNET: {"layers": (2, 5, 10)},
}
"""What the search tries of one model alone."""
CHOICES: dict[str, float] = {"batch": 64, "learning_rate": 1e-3, "hidden": 32}
"""What it finds best for every model, says appendix E."""
OWN_CHOICES: dict[str, dict[str, int]] = {NODE: {}, ANODE: {"augment": 5}, RESNET: {"layers": 5}}
"""For one model."""


@dataclass(frozen=True)
class Scale:
    """How large everything is. The defaults are the paper's, where it says.

    It does not say for how long the nets for images are trained: `image_epochs` are ours.

    Attributes:
        name: "full", "reduced" or "smoke".
        repeats, image_repeats: Of each training, of points and of images.
        toy: What the settings of toy data have in common.
        space: What the search tries.
        search: What its settings have in common.
        filters: Of the nets for images, where no figure asks for others.
        images: To train on, 0 for all.
        image_epochs: Of the trainings of images.
        overfitted, overfitting_epochs: Images of figure 17, and how often they are seen.
        sizes: Height and width of "MNIST" and "CIFAR10".
        sources: Which data sets stand for these two.
        turns: Epochs and repeats of the trainings of points that are timed beside torchdiffeq's.
        image_turns: The same of images, and how many images, so that a CPU has time for them.
        seed, device: Of the settings.
    """

    name: str = "full"
    repeats: int = 20
    image_repeats: int = 5
    toy: dict[str, Any] = field(default_factory=dict)
    space: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "batch": (64, 128),
            "learning_rate": (1e-3, 5e-4, 1e-4),
            "hidden": (16, 32),
        }
    )
    search: dict[str, Any] = field(default_factory=dict)
    filters: int = 64
    images: int = 0
    image_epochs: int = 5
    overfitted: int = 1024
    overfitting_epochs: int = 100
    sizes: dict[str, int] = field(default_factory=lambda: {MNIST: 28, CIFAR10: 32})
    sources: dict[str, str] = field(default_factory=lambda: {MNIST: "mnist", CIFAR10: "cifar10"})
    turns: tuple[int, int] = (50, 3)
    image_turns: tuple[int, int, int] = (2, 1, 1024)
    seed: int = 0
    device: str = "cpu"

    def on_points(self, data: str, model: str, **kw: Any) -> Setting:
        """A training on toy data."""
        if model == ANODE:
            kw.setdefault("augment", AUGMENTED)
        common = {"seed": self.seed, "device": self.device, **self.toy}
        return Setting(data, model, **{**common, **kw})

    def size(self, name: str) -> int:
        """Height and width of "MNIST" or "CIFAR10": no image is enlarged."""
        return min(self.sizes[name], image_data.SIZES[self.sources[name]])

    def on_images(self, name: str, augment: int, **kw: Any) -> Setting:
        """A training on images: of "MNIST" or "CIFAR10", or what stands for it."""
        common: dict[str, Any] = {
            "hidden": self.filters,
            "images": self.images,
            "epochs": self.image_epochs,
            "seed": self.seed,
            "device": self.device,
        }
        return Setting(
            self.sources[name],
            ANODE if augment else NODE,
            augment=augment,
            size=self.size(name),
            **{**common, **kw},
        )


SCALES = {
    "full": Scale(),
    "reduced": Scale(
        "reduced",
        repeats=3,
        image_repeats=1,
        space={"batch": (64,), "learning_rate": (1e-3, 1e-4), "hidden": (16, 32)},
        search={"epochs": 15},
        filters=32,
        images=2048,
        image_epochs=20,
        overfitted=256,
        overfitting_epochs=600,
        sizes={MNIST: 14, CIFAR10: 16},
        turns=(20, 1),
        image_turns=(3, 1, 1024),
    ),
    "smoke": Scale(
        "smoke",
        repeats=2,
        image_repeats=1,
        toy={"epochs": 4, "points": (160, 320), "hidden": 16},
        space={"batch": (64,), "learning_rate": (1e-3,), "hidden": (8, 16)},
        search={"epochs": 2},
        filters=8,
        images=128,
        image_epochs=8,
        overfitted=64,
        overfitting_epochs=10,
        sizes={MNIST: 8, CIFAR10: 8},
        turns=(3, 1),
        image_turns=(2, 1, 64),
    ),
}


@dataclass(frozen=True)
class Entry:
    """One line of a figure.

    Attributes:
        panel: Axes it is drawn in.
        label: What it is called there.
        settings: Its trainings: repetitions, or folds.
    """

    panel: str
    label: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures, or a table beside them.

    Attributes:
        number: In the paper; a name for what is no figure there.
        title: In words.
        entries: All its lines, at a scale.
        shows: Pictures of trained nets that it draws beside curves.
        curves: Whether it draws curves: a search has far too many.
        images: Whether it is about images.
    """

    number: str
    title: str
    entries: Callable[[Scale], Iterator[Entry]]
    shows: tuple[str, ...] = ()
    curves: bool = True
    images: bool = False


def is_the_papers(setting: Mapping[str, Any]) -> bool:
    """Whether a setting, as a dict, has the parameters which the paper found best (E.2.1)."""
    wanted = CHOICES | OWN_CHOICES[setting["model"]]
    return all(setting[name] == value for name, value in wanted.items())


def parameters(channels: int, filters: int, size: int) -> int:
    """Of a net for images, as the paper counts them: without the weights of time.

    Args:
        channels: Of the state, augmented ones included.
        filters: Of its field.
        size: Height and width.
    """
    field_ = (channels + 1) * filters + (9 * filters + 1) * filters + (filters + 1) * channels
    return field_ + CLASSES * (channels * size**2 + 1)


def filters_for(count: int, channels: int, size: int) -> int:
    """The number of filters with which a net has about so many parameters."""
    return min(range(1, 513), key=lambda k: abs(parameters(channels, k, size) - count))


def _repeated(scale: Scale, panel: str, label: str, setting: Setting, count: int = 0) -> Entry:
    count = count or (scale.image_repeats if setting.is_image else scale.repeats)
    return Entry(panel, label, tuple(replace(setting, repeat=i) for i in range(count)))


def _toys(
    scale: Scale,
    models: tuple[str, ...],
    data: tuple[str, ...] = (G,),
    dims: tuple[int, ...] = (1, 2),
) -> Iterator[Entry]:
    names = {G: "spheres", SEPARABLE: "separable"}
    for name in data:
        for dim in dims:
            for model in models:
                panel = f"{name}, d = {dim}"
                yield _repeated(scale, panel, model, scale.on_points(names[name], model, dim=dim))


def _flows(scale: Scale) -> Iterator[Entry]:
    for panel, data, model in (
        (IDENTITY, "identity", NODE),
        (G_1D, "flip", NODE),
        (G_1D, "flip", RESNET),
    ):
        yield _repeated(scale, panel, model, scale.on_points(data, model, dim=1))


def _nothing(scale: Scale) -> Iterator[Entry]:
    return iter(())


def _node_and_resnet(scale: Scale) -> Iterator[Entry]:
    return _toys(scale, (NODE, RESNET), (G, SEPARABLE))


def _node_features(scale: Scale) -> Iterator[Entry]:
    return _toys(scale, (NODE,), (G, SEPARABLE), (2,))


def _anode_features(scale: Scale) -> Iterator[Entry]:
    return _toys(scale, (ANODE,), (G, SEPARABLE), (2,))


def _node(scale: Scale) -> Iterator[Entry]:
    return _toys(scale, (NODE,))


def _node_and_anode(scale: Scale) -> Iterator[Entry]:
    return _toys(scale, (NODE, ANODE))


def _generalisation(scale: Scale) -> Iterator[Entry]:
    for panel, holdout in ((PLANE, ""), (SLICES, SLICES)):
        for model in (NODE, ANODE):
            setting = scale.on_points("spheres", model, dim=2, holdout=holdout)
            yield _repeated(scale, panel, model, setting)


def _images(scale: Scale) -> Iterator[Entry]:
    for name in (MNIST, CIFAR10):
        for augment in AUGMENTS:
            yield _repeated(scale, name, f"p = {augment}", scale.on_images(name, augment))


def _equal(scale: Scale, name: str, augment: int, **kw: Any) -> Iterator[Entry]:
    """A NODE with about as many parameters as an ANODE, and that."""
    channels, size = {MNIST: 1, CIFAR10: 3}[name], scale.size(name)
    count = parameters(channels + augment, scale.filters, size)
    filters = filters_for(count, channels, size)
    yield _repeated(scale, name, NODE, scale.on_images(name, 0, hidden=filters, **kw))
    yield _repeated(scale, name, ANODE, scale.on_images(name, augment, **kw))


def _equal_parameters(scale: Scale) -> Iterator[Entry]:
    yield from _equal(scale, MNIST, AUGMENTED)
    yield from _equal(scale, CIFAR10, AUGMENTED_CIFAR10)


def _weight_decay(scale: Scale) -> Iterator[Entry]:
    for model, augment in ((NODE, 0), (ANODE, AUGMENTED)):
        for label, decay in ((model, 0.0), (f"{model}, weight decay", WEIGHT_DECAY)):
            setting = scale.on_images(MNIST, augment, weight_decay=decay)
            yield _repeated(scale, MNIST, label, setting)


def _image_generalisation(scale: Scale) -> Iterator[Entry]:
    for model, augment in ((NODE, 0), (ANODE, AUGMENTED_CIFAR10)):
        setting = scale.on_images(CIFAR10, augment, holdout=TEST)
        yield _repeated(scale, CIFAR10, model, setting)


def _overfitting(scale: Scale) -> Iterator[Entry]:
    return _equal(scale, MNIST, AUGMENTED, images=scale.overfitted, epochs=scale.overfitting_epochs)


def _search(scale: Scale) -> Iterator[Entry]:
    for dim in (1, 2):
        for model, space in SPACES.items():
            for chosen in ParameterGrid([{**scale.space, **space}]):
                setting = scale.on_points("spheres", model, dim=dim, **{**scale.search, **chosen})
                label = ", ".join(f"{name} {value}" for name, value in sorted(chosen.items()))
                folds = (f"{fold}/{FOLDS}" for fold in range(1, FOLDS + 1))
                yield Entry(
                    f"{model}, d = {dim}",
                    label.replace("learning_rate", "lr"),
                    tuple(replace(setting, holdout=fold) for fold in folds),
                )


def _speed(scale: Scale) -> Iterator[Entry]:
    epochs, repeats = scale.turns
    for entry in _toys(replace(scale, repeats=repeats), (NODE, ANODE)):
        settings = (replace(x, epochs=epochs, in_turns=True) for x in entry.settings)
        yield replace(entry, settings=tuple(settings))
    epochs, repeats, images = scale.image_turns
    for model, augment in ((NODE, 0), (ANODE, AUGMENTED)):
        setting = scale.on_images(MNIST, augment, epochs=epochs, images=images, in_turns=True)
        yield _repeated(scale, MNIST, model, setting, repeats)


FIGURES = {
    figure.number: figure
    for figure in (
        Figure("3", "Flows in one dimension", _flows, ("trajectories",)),
        Figure("4", "The toy data", _nothing),
        Figure("5", "NODE against ResNet", _node_and_resnet),
        Figure("6", "Features of a NODE while it trains", _node_features, ("features",)),
        Figure("7", "Function evaluations of a NODE while it trains", _node),
        Figure("8", "NODE against ANODE", _node_and_anode),
        Figure("9", "Learned flows", _node_and_anode, ("flow",)),
        Figure("10", "Features of an ANODE while it trains", _anode_features, ("features",)),
        Figure("11", "Function evaluations of NODE and ANODE", _node_and_anode),
        Figure("12", "Generalisation", _generalisation, ("plane",)),
        Figure("search", "Hyper-parameters, 3-fold cross-validation", _search, curves=False),
        Figure("speed", "Training by turns with torchdiffeq", _speed),
        Figure("13", "Images, by augmented channels", _images, images=True),
        Figure("14", "Images, equal parameters", _equal_parameters, images=True),
        Figure("15", "Weight decay", _weight_decay, images=True),
        Figure("16", "Generalisation to other images", _image_generalisation, images=True),
        Figure("17", "Stability when overfitting", _overfitting, images=True),
    )
}
"""By number, in the order in which they are made."""
GROUPS = {
    "toy": tuple(key for key, figure in FIGURES.items() if not figure.images and key != "speed"),
    "images": tuple(key for key, figure in FIGURES.items() if figure.images),
}
"""Names for several."""
