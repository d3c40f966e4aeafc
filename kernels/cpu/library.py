"""Finds, loads and checks the C++ library: the best one built that this CPU can run.

setup.py puts the libraries beside this file. Nothing here needs a compiler, and nothing raises
when there is no library: `load` then gives None and `missing` says why.
"""

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ABI_VERSION = 6  # api.cpp: anode_abi_version. Raise both when an exported function changes.
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")  # best first
FORCE = "ANODE_FAST_ISA"  # environment: the one instruction set to use

_FOLDER = Path(__file__).parent
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_INSTALL = "To get it, have g++ or clang++ and pip install anode_fast again"


def load() -> ctypes.CDLL | None:
    """The library, its functions declared; None if there is none. Calls release the GIL."""
    return _found().library


def missing() -> str:
    """Why there is no library, and how to get it; "" if there is one."""
    return _found().missing


def instruction_set() -> str:
    """What the loaded library is compiled for, one of INSTRUCTION_SETS; "" if there is none."""
    return _found().instruction_set


def path() -> str:
    """The loaded library's file; "" if there is none."""
    return _found().path


@dataclass(frozen=True)
class _Found:
    library: ctypes.CDLL | None = None
    instruction_set: str = ""
    path: str = ""
    missing: str = ""


# Two threads may both find it the first time. They find the same, and no lock outlives a fork.
@functools.cache
def _found() -> _Found:
    runnable = runnable_instruction_sets()
    forced = os.environ.get(FORCE, "")
    if forced and forced not in INSTRUCTION_SETS:
        return _Found(missing=f"{FORCE} is {forced!r}, want one of {', '.join(INSTRUCTION_SETS)}")
    if forced and forced not in runnable:
        can = ", ".join(runnable)
        return _Found(missing=f"{FORCE} is {forced!r}, but this CPU can only run {can}")
    for isa in [forced] if forced else runnable:
        file = _FOLDER / f"libanode_{isa}{_SUFFIX}"
        if file.exists():
            return _open(isa, file)
    return _Found(missing=f"{_build_note(forced)}. {_INSTALL}")


def runnable_instruction_sets() -> list[str]:
    """Those of INSTRUCTION_SETS that CPU and operating system support, best first.

    torch looks at both (cpuinfo, and XCR0 for the registers' state), and uses the same two sets of
    extensions: AVX2 with FMA3, AVX-512 F, BW, DQ and VL. ATEN_CPU_CAPABILITY limits it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    skip = {"AVX512": 0, "AVX2": 1}.get(capability, 2)
    return list(INSTRUCTION_SETS[skip:])


def _open(isa: str, file: Path) -> _Found:
    try:
        library = ctypes.CDLL(str(file))
        version = library.anode_abi_version()
        if version == ABI_VERSION:
            _declare(library)
            _hand_over_threads(library)
            return _Found(library, isa, str(file))
    except (OSError, AttributeError) as error:
        return _Found(missing=f"{file} does not load: {error}. {_INSTALL}")
    return _Found(
        missing=f"{file} was built from other sources: its ABI version is {version}, want "
        f"{ABI_VERSION}. Install anode_fast again with pip"
    )


def _build_note(forced: str) -> str:
    """What setup.py said about the build: the first line, and where there are more."""
    note = _FOLDER / "build_note.txt"
    if not note.exists():
        name = f"{forced} library" if forced else "C++ library"
        return f"the {name} is not built in {_FOLDER}"
    first, *rest = note.read_text().splitlines()
    return f"{first} (more in {note})" if rest else first


def _declare(library: ctypes.CDLL) -> None:
    """Argument and result types of the exported functions."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    functions = {
        "anode_set_thread_pool": (None, [pointer] * 2),
        # blocks of arguments: see api.cpp
        "anode_solve": (pointer, [ctypes.c_char_p]),
        "anode_discrete_gradient": (None, [ctypes.c_char_p]),
        "anode_continuous_gradient": (
            None,
            # plan, rows, parameters, times, grid, solution, grad
            [pointer, size, pointer, pointer, size, pointer, size, pointer, pointer]
            # whether to use the seminorm, gradients of x and parameters, result
            + [ctypes.c_int, pointer, pointer, pointer],
        ),
        "anode_free": (None, [pointer]),
        "anode_conv_pack": (pointer, [pointer, ctypes.c_int, pointer, ctypes.c_int]),
        "anode_conv_free": (None, [pointer]),
        "anode_conv_record_size": (size, [pointer] * 2),
        "anode_conv_evaluate": (ctypes.c_int, [pointer] * 2),
        "anode_conv_vjp": (ctypes.c_int, [pointer] * 2),
        "anode_combine": (None, [ctypes.c_char_p]),
        "anode_spread": (None, [ctypes.c_char_p]),
        "anode_error_ratio": (ctypes.c_double, [ctypes.c_char_p]),
        "anode_node_times": (None, [ctypes.c_char_p]),
        "anode_peak_flops": (ctypes.c_double, [ctypes.c_int, ctypes.c_double]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


# --- threads --------------------------------------------------------------------------------------

_forked = False


def _hand_over_threads(library: ctypes.CDLL) -> None:
    """Lets the library run on torch's thread pool, or on one thread where it may not."""
    addresses = [
        None if _forked else _address_in_torch(name)
        for name in ("torch_parallel_for", "torch_get_num_threads")
    ]
    library.anode_set_thread_pool(*map(ctypes.c_void_p, addresses))


def _address_in_torch(name: str) -> int | None:
    """Address of a C function of torch, None if this torch has none of that name.

    The search goes from torch's own extension module through all that it is linked to, so it
    needs no path and finds the copy that is in use.
    """
    try:
        function = getattr(ctypes.CDLL(torch._C.__file__), name)
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _after_fork() -> None:
    """One thread from here on: the pool's threads did not come along, and waiting for them hangs.

    torch's own operations hang in such a child too (GNU OpenMP: once the parent used the pool).
    """
    global _forked
    _forked = True
    if _found.cache_info().currsize and (library := load()):
        _hand_over_threads(library)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
