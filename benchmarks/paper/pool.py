"""Trains many settings, several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.runs import path_of, train
from benchmarks.paper.settings import Setting

PATIENCE = 0.2  # seconds between looks at how far the processes are


@dataclass(frozen=True)
class Job:
    """A setting and the solvers it still has to be trained with."""

    setting: Setting
    solvers: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where results go and images come from, and how many cores there are for it.

    Attributes:
        folder: Of the results.
        data: Folders to look into for images.
        processes: At a time.
    """

    folder: Path
    data: tuple[Path, ...]
    processes: int = 1

    def threads(self, setting: Setting) -> int:
        """Of torch, for a training: a batch of points is too small for more than one."""
        return max(1, (os.cpu_count() or 1) // self.processes) if setting.is_image else 1


def missing(settings: Sequence[Setting], solvers: tuple[str, ...], folder: Path) -> list[Job]:
    """What has to be trained: each setting once, with those solvers that it has no run of."""
    jobs = []
    for setting in dict.fromkeys(settings):
        wanted = setting.solvers(solvers)
        left = [solver for solver in wanted if not path_of(folder, setting, solver).exists()]
        if setting.in_turns and left:
            left = list(wanted)  # whose times are compared are trained together
        if left:
            jobs.append(Job(setting, tuple(left)))
    return jobs


def work(jobs: Sequence[Job], place: Place, progress: Callable[[int], None]) -> Iterator[Job]:
    """Trains them all, and gives each one back when it is done.

    Args:
        jobs: What to do.
        place: Where.
        progress: Told of iterations as they are made.
    """
    if place.processes == 1:
        for job in jobs:
            _do(job, place, progress)
            yield job
        return
    # A forked process would inherit torch's threads in whatever state they are.
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.SimpleQueue()
    with ProcessPoolExecutor(
        place.processes, mp_context=spawn, initializer=_start, initargs=(queue,)
    ) as pool:
        futures = {pool.submit(_do_elsewhere, job, place): job for job in jobs}
        try:
            while futures:
                done, _ = wait(futures, timeout=PATIENCE, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    progress(queue.get())
                for future in done:
                    job = futures.pop(future)
                    future.result()
                    yield job
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_queue: Any = None  # of a process that trains


def _start(queue: Any) -> None:
    global _queue
    _queue = queue
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent tells its processes nothing: they would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _do_elsewhere(job: Job, place: Place) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # what is there is kept, and the parent says so
        _do(job, place, _queue.put)


def _do(job: Job, place: Place, progress: Callable[[int], None]) -> None:
    threads = place.threads(job.setting)
    train(job.setting, job.solvers, place.folder, place.data, threads, progress)
