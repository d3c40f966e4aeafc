"""The most that one core can multiply and add, which a solve's speed is a share of."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from anode_fast.kernels.cpu import library


def peak_flops(dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of one core, by fused multiply-adds on registers alone.

    The library that solves measures it; where it is missing, a compiler makes one that does.

    Raises:
        OSError: Neither is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = library.load()
        if found is None or not hasattr(found, "anode_peak_flops"):
            found = ctypes.CDLL(str(_compile(Path(folder))))
        function = found.anode_peak_flops
        function.argtypes, function.restype = [ctypes.c_int, ctypes.c_double], ctypes.c_double
        return float(function(dtype == torch.float64, seconds))


_SOURCE = """
#include "peak.hpp"
extern "C" double anode_peak_flops(int float64, double seconds) {
  return float64 ? anode::peak_flops<double>(seconds) : anode::peak_flops<float>(seconds);
}
"""


def _compile(folder: Path) -> Path:
    """A library with anode_peak_flops, for this very machine."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise OSError("the CPU library is not built, and there is no C++ compiler")
    source, product = folder / "peak.cpp", folder / "libpeak.so"
    source.write_text(_SOURCE)
    flags = "-std=c++17 -O3 -march=native -ffp-contract=fast -shared -fPIC".split()
    headers = str(Path(library.__file__).parent)
    command = [*shlex.split(compiler), *flags, "-I", headers, str(source), "-o", str(product)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed:\n{done.stderr}")
    return product
