"""A process that runs a function on cases: a JSON list from stdin, a line of JSON for each.

Started by `pool`. What libraries print goes to stderr, which is the step's log.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.gpu.pool import BROKEN
from benchmarks.gpu.report import FAILED, Row, plain


def serve(function: Callable[[Row], Row], cases: list[Row], answer: Callable[[Row], None]) -> int:
    """Answers every case, a failure too. Gives the exit status: whether CUDA still works."""
    for case in cases:
        start = time.perf_counter()
        try:
            row = function(case)
        except Exception as error:
            traceback.print_exc()
            row = {"verdict": FAILED, "note": f"{type(error).__name__}: {str(error)[:300]}"}
        is_broken = _is_broken()
        answer({**row, "seconds": round(time.perf_counter() - start, 2)})
        if is_broken:
            return BROKEN
    return 0


def _is_broken() -> bool:
    """Whether an error has left this process without a usable device."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    """Serves the cases on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = sys.argv[1].split(":")

    def answer(row: Row) -> None:
        answers.write(json.dumps(plain(row)) + "\n")
        answers.flush()

    function = getattr(importlib.import_module(module), name)
    status = serve(function, json.load(sys.stdin), answer)
    if status:  # not by way of the interpreter's end, where a broken CUDA context may hang
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
