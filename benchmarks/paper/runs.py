"""Runs: one training each, kept as a JSON file, and gone on with after an interruption."""

from __future__ import annotations

import copy
import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anode_fast
from benchmarks import machine
from benchmarks.data import batches
from benchmarks.paper import datasets, models, pictures
from benchmarks.paper.settings import OURS, RESNET, Setting
from benchmarks.results import write_json
from benchmarks.train import Run, in_turns

ROOT = Path(__file__).parents[2]
POINTS = 40  # of an image run's curves; toy data have one for each epoch
SAVE_EVERY = 30.0  # seconds
WARMUP = 2  # iterations on a copy, not counted: first calls load and allocate
PARITY_BATCHES = {False: 50, True: 4}  # of a trained net, by whether they are images
EVALUATED = 256  # images at a time
KEPT = ("losses", "nfe", "nfe_backward", "seconds", "backend", "failure")  # of a Run

Progress = Callable[[int], None]
"""Told how many iterations were made since the last time."""


def path_of(folder: Path, setting: Setting, solver: str) -> Path:
    """Where the run of a setting is, or will be."""
    return folder / "runs" / f"{setting.key}-{solver}.json"


def iterations(setting: Setting, data: Sequence[Path]) -> int:
    """How many a training of the setting has."""
    return setting.epochs * _per_epoch(setting, datasets.load(setting, data))


def _per_epoch(setting: Setting, split: datasets.Split) -> int:
    return math.ceil(len(split.train) / setting.batch)


def train(
    setting: Setting,
    solvers: Sequence[str],
    folder: Path,
    data: Sequence[Path],
    threads: int,
    progress: Progress = lambda iterations: None,
) -> None:
    """Trains a setting with each solver, by turns, and writes their runs.

    Args:
        setting: What to train.
        solvers: With what.
        folder: Of the results.
        data: Folders to look into for images.
        threads: Of torch.
        progress: Is told of every turn. A run that fails has made all its iterations.
    """
    torch.set_num_threads(threads)
    trainings = [Training(setting, solver, folder, data) for solver in solvers]
    progress(sum(training.done for training in trainings))
    for training in trainings:
        training.warm_up()
    saved = time.monotonic()
    for turns in in_turns([training.iterations() for training in trainings]):
        progress(sum(map(len, turns)))
        if time.monotonic() - saved > SAVE_EVERY:
            for training in trainings:
                training.save()
            saved = time.monotonic()
    for training in trainings:
        training.finish()
        progress(training.total - training.done)


class Training:
    """A net on its way: as far as an earlier process has come, and further.

    Args:
        setting: What to train.
        solver: With what.
        folder: Of the results.
        data: Folders to look into for images.

    Attributes:
        total: Iterations there will be.
        every: Iterations of a point of the curves.
        run: Figures of the iterations so far.
    """

    def __init__(
        self, setting: Setting, solver: str, folder: Path, data: Sequence[Path] = ()
    ) -> None:
        self.setting, self.solver = setting, solver
        self.path = path_of(folder, setting, solver)
        self._partial = self.path.with_suffix(".pt")
        self._split = datasets.load(setting, data)
        self.net = models.build(setting, solver, self._split.channels, self._split.classes)
        self._optimizer = self._adam(self.net)
        self.total = iterations(setting, data)
        per_epoch = _per_epoch(setting, self._split)
        self.every = math.ceil(self.total / POINTS) if setting.is_image else per_epoch
        self.run = Run()
        self._validation: dict[str, list[float]] = {"loss": [], "accuracy": []}
        self._features: dict[str, Any] = {}  # by how many points of the curves were behind
        self._loss = nn.functional.cross_entropy if setting.is_image else nn.functional.mse_loss
        if self._partial.exists():
            self._go_on()

    @property
    def done(self) -> int:
        """Iterations made."""
        return len(self.run.losses)

    def warm_up(self) -> None:
        """A few iterations that do not count."""
        net = copy.deepcopy(self.net)
        list(Run().train(net, islice(self._batches(), WARMUP), self._adam(net), self._loss))

    def iterations(self) -> Iterator[float]:
        """Trains to the end, or until a solve fails; an iteration for each loss asked for."""
        order = islice(self._batches(), self.done, None)
        while not self.run.failure:
            if self.done % self.every == 0 or self.done == self.total:
                self._look(math.ceil(self.done / self.every))
            if self.done == self.total or self.run.failure:
                return
            left = min(self.every - self.done % self.every, self.total - self.done)
            yield from self.run.train(self.net, islice(order, left), self._optimizer, self._loss)

    def save(self) -> None:
        """Keeps what going on takes; whoever reads sees the old state or the new one, whole."""
        kept = {
            "net": self.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "run": {name: getattr(self.run, name) for name in KEPT},
            "validation": self._validation,
            "features": self._features,
        }
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._partial.with_suffix(".pt.part")
        torch.save(kept, scratch)
        scratch.replace(self._partial)

    def finish(self) -> None:
        """Writes the run."""
        write_json(self.path, self._content())
        self._partial.unlink(missing_ok=True)

    def _go_on(self) -> None:
        kept = torch.load(self._partial, map_location=self.setting.device, weights_only=True)
        self.net.load_state_dict(kept["net"])
        self._optimizer.load_state_dict(kept["optimizer"])
        for name, value in kept["run"].items():
            setattr(self.run, name, value)
        self._validation, self._features = kept["validation"], kept["features"]

    def _adam(self, net: nn.Module) -> torch.optim.Optimizer:
        setting = self.setting
        return torch.optim.Adam(
            net.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay
        )

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        setting = self.setting
        return batches(self._split.train, setting.batch, setting.epochs, seed=setting.weights_seed)

    def _look(self, point: int) -> None:
        """Evaluates the net where a point of the curves ends. No part of the time of training.

        Does nothing the second time at the same point, as after an interruption.
        """
        try:
            if self._split.validation and point == len(self._validation["loss"]) + 1:
                loss, accuracy = self._evaluate(self._split.validation.tensors)
                self._validation["loss"].append(loss)
                if accuracy is not None:
                    self._validation["accuracy"].append(accuracy)
            points = math.ceil(self.total / self.every)
            if self._pictured and point in pictures.snapshots(points):
                self._features[str(point)] = pictures.features(self.net, *self._points)
        except AssertionError as error:  # torchdiffeq raises these, and SolverError is one
            self.run.failure = f"{type(error).__name__}, outside of training: {error}"

    @property
    def _pictured(self) -> bool:
        return pictures.wanted(self.setting) and self._split.inner is not None

    @property
    def _points(self) -> tuple[Tensor, Tensor]:
        """Inputs on the net's device, and which are of the inner class."""
        return self._split.train.tensors[0].to(self.setting.device), self._split.inner

    def _evaluate(self, examples: Sequence[Tensor]) -> tuple[float, float | None]:
        """Mean loss and, of images, the share that is classified right."""
        inputs, targets = (tensor.to(self.setting.device) for tensor in examples)
        chunk = EVALUATED if self.setting.is_image else len(inputs)
        with torch.no_grad():
            outputs = torch.cat([self.net(x) for x in inputs.split(chunk)])
        loss = self._loss(outputs, targets).item()
        if not self.setting.is_image:
            return loss, None
        return loss, (outputs.argmax(1) == targets).float().mean().item()

    def _content(self) -> dict[str, Any]:
        run, split = self.run, self._split
        return {
            "setting": asdict(self.setting),
            "solver": self.solver,
            "backend": run.backend,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "data": split.words,
            "note": split.note,
            "synthetic": split.synthetic,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": describe_machine(self.setting.device),
            "threads": torch.get_num_threads(),
            "versions": machine.versions("anode_fast", "torch", "triton", "torchdiffeq")
            | {"anode_fast": anode_fast.__version__, "python": platform.python_version()},
            "commit": machine.commit(ROOT),
            "iterations": self.done,
            "every": self.every,
            "failure": run.failure,
            "losses": [float(f"{loss:.6g}") for loss in run.losses],
            "nfe": run.nfe,
            "nfe_backward": run.nfe_backward,
            "ms": [round(1e3 * seconds, 3) for seconds in run.seconds],
            "validation": self._validation,
            "parity": self._parity(),
            "pictures": self._pictures(),
        }

    def _parity(self) -> dict[str, int] | None:
        """NFE of this net, as it is now, beside torchdiffeq's, batch by batch.

        None where there is nothing to compare, or a solve fails.
        """
        if self.solver != OURS or self.setting.model == RESNET:
            return None
        other = models.twin(self.net)
        inputs = self._split.train.tensors[0]
        some = inputs.split(self.setting.batch)[: PARITY_BATCHES[self.setting.is_image]]
        differences = []
        try:
            with torch.no_grad():
                for x in some:
                    x = x.to(self.setting.device)
                    self.net(x), other(x)
                    differences.append(abs(self.net.block.stats.nfe - other.block.stats.nfe))
        except AssertionError:
            return None
        equal = differences.count(0)
        return {
            "batches": len(differences),
            "equal": equal,
            "largest_difference": max(differences),
        }

    def _pictures(self) -> dict[str, Any]:
        if not self._pictured or self.run.failure:
            return {}
        taken: dict[str, Any] = {"features": self._features}
        try:
            return taken | pictures.at_the_end(self.setting, self.net, *self._points)
        except AssertionError:  # a net that trained, and whose whole flow cannot be solved
            return taken


def describe_machine(device: str) -> str:
    """The card, if there is one, or the processor and its cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{machine.cpu_name()}, {os.cpu_count()} cores"
