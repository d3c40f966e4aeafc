"""What a step finds, written as it goes: OUT/<step>.json, and in short OUT/<step>.md."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, TIMED_OUT = "passed", "failed", "skipped", "timed out"
UNFINISHED = "unfinished"

DRY_RUN = "ANODE_FAST_GPU_DRY_RUN"
SECONDS = "ANODE_FAST_GPU_SECONDS"
NOT_A_MEASUREMENT = "interpreted, not a measurement"

Row = dict[str, Any]


def is_dry() -> bool:
    """Whether every step runs at tiny sizes on CPU tensors, in Triton's interpreter."""
    return os.environ.get(DRY_RUN, "0") not in ("", "0")


def seconds() -> float:
    """How long the step may take; infinity if nobody says."""
    return float(os.environ.get(SECONDS, "inf"))


class Report:
    """What a step has found so far.

    Args:
        name: Of the step.
        out: The folder to write into.
        markdown: Makes the short form of the rows.

    Attributes:
        rows: What was added.
    """

    def __init__(self, name: str, out: Path, markdown: Callable[[list[Row]], str]) -> None:
        self.rows: list[Row] = []
        self._path = out / f"{name}.json"
        self._markdown = markdown
        self._lock = threading.Lock()
        self._facts: Row = {"step": name, "verdict": UNFINISHED, "note": "", "dry_run": is_dry()}
        self._write()

    def add(self, row: Row) -> None:
        """Adds a row; from any thread."""
        with self._lock:
            self.rows.append(plain(row))
            self._write()

    def finish(self, verdict: str, note: str, **facts: Any) -> int:
        """Notes how the step ended, and gives the exit status that says the same."""
        with self._lock:
            self._facts.update(facts, verdict=verdict, note=note)
            self._write()
        print(f"{verdict}: {note}", flush=True)
        return int(verdict not in (PASSED, SKIPPED))

    def _write(self) -> None:
        write(self._path, json.dumps({**self._facts, "rows": self.rows}, indent=1) + "\n")
        write(self._path.with_suffix(".md"), self._markdown(self.rows))


def write(path: Path, text: str) -> None:
    """Writes a file that is whole whenever somebody looks."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def plain(value: Any) -> Any:
    """The same for JSON, which has no nan and no infinity: in words."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table in Markdown.

    Args:
        header: Names of the columns.
        rows: Cells; None is "-".
        left: How many columns, the first ones, hold words.
    """
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [list(header), rule, *cells])


def folder() -> Path:
    """The folder that a step's command line names."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {Path(sys.argv[0]).stem} OUT")
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    return out
