"""Which C++ library is loaded, what is said where there is none, and whose threads it runs on.

Libraries without a solver stand in for the real ones, so every choice can be tested on any machine.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anode_fast.kernels.cpu import library

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")

STAND_IN = """
#include <cstdint>
using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);
static int (*parallel_for)(std::int64_t, std::int64_t, std::int64_t, Body, void*);
static int (*num_threads)(std::uint32_t*);

extern "C" int anode_abi_version() { return VERSION; }

extern "C" void anode_set_thread_pool(void* parallel_for_, void* num_threads_) {
  parallel_for = decltype(parallel_for)(parallel_for_);
  num_threads = decltype(num_threads)(num_threads_);
}

extern "C" int threads() {  // 0 without a pool
  std::uint32_t n = 0;
  if (num_threads) num_threads(&n);
  return int(n);
}

extern "C" void count_up(std::int64_t* x, std::int64_t n) {  // x[i] += i
  const Body body = [](std::int64_t begin, std::int64_t end, void* x) {
    for (; begin < end; ++begin) static_cast<std::int64_t*>(x)[begin] += begin;
  };
  parallel_for ? (void)parallel_for(0, n, 1, body, x) : body(0, n, x);
}
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """ABI version -> a library that has it."""
    folder = tmp_path_factory.mktemp("stand_ins")
    (folder / "api.cpp").write_text(STAND_IN)
    files = {}
    for version in (library.ABI_VERSION, library.ABI_VERSION + 1):
        files[version] = folder / f"{version}.so"
        flags = f"-std=c++17 -shared -fPIC -DVERSION={version} api.cpp -o {files[version]}"
        subprocess.run([COMPILER, *flags.split()], cwd=folder, check=True)
    return files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the loader looks: nothing there yet, on a CPU that runs all, and nothing forced."""
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_declare", lambda library: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv(library.FORCE, raising=False)
    library._found.cache_clear()
    yield tmp_path
    library._found.cache_clear()


@pytest.fixture
def put(folder, stand_ins):
    """Puts a library into the folder."""

    def put(isa, version=library.ABI_VERSION):
        return shutil.copy(stand_ins[version], folder / f"libanode_{isa}{library._SUFFIX}")

    return put


def assert_missing(*words):
    assert library.load() is None
    assert (library.instruction_set(), library.path()) == ("", "")
    for word in words:
        assert word in library.missing()


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler, when installed as well")
def test_the_installed_library_loads():
    library._found.cache_clear()
    assert library.load() is not None, library.missing()
    assert library.missing() == ""
    assert library.instruction_set() == os.environ.get(
        library.FORCE, library.runnable_instruction_sets()[0]
    )


CPUS = {
    "AVX512": ["avx512", "avx2", "baseline"],
    "AVX2": ["avx2", "baseline"],
    "DEFAULT": ["baseline"],
    "SVE256": ["baseline"],
    "a later one": ["baseline"],
}
BUILT = [set(names) for n in (1, 2, 3) for names in itertools.combinations(CPUS["AVX512"], n)]


@pytest.mark.parametrize("capability", CPUS)
def test_what_a_cpu_can_run(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert library.runnable_instruction_sets() == CPUS[capability]


def test_what_this_cpu_can_run_has_the_flags():
    """torch's word against the kernel's, where there is a /proc/cpuinfo."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    needs = {
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"},
        "avx2": {"avx2", "fma"},
        "baseline": set(),
    }
    for isa in library.runnable_instruction_sets():
        assert needs[isa] <= flags


@needs_compiler
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("built", BUILT, ids=lambda built: "+".join(sorted(built)))
def test_the_best_that_is_built_and_runs(put, monkeypatch, capability, built):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    files = {isa: put(isa) for isa in built}
    usable = [isa for isa in CPUS[capability] if isa in built]
    if not usable:
        return assert_missing("not built")
    assert library.load().anode_abi_version() == library.ABI_VERSION
    assert library.load() is library.load()
    assert library.instruction_set() == usable[0]
    assert library.path() == str(files[usable[0]])
    assert library.missing() == ""


@needs_compiler
@pytest.mark.parametrize("isa", library.INSTRUCTION_SETS)
def test_a_forced_instruction_set(put, monkeypatch, isa):
    for name in library.INSTRUCTION_SETS:
        put(name)
    monkeypatch.setenv(library.FORCE, isa)
    assert library.load() is not None
    assert library.instruction_set() == isa


@needs_compiler
def test_a_forced_instruction_set_that_cannot_be_had(put, monkeypatch):
    put("baseline")
    for value, capability, words in (
        ("sse9", "AVX512", ["ANODE_FAST_ISA", "'sse9'", "avx512, avx2, baseline"]),
        ("AVX2", "AVX512", ["'AVX2'", "want one of"]),
        ("avx512", "AVX2", ["'avx512'", "this CPU can only run avx2, baseline"]),
        ("avx2", "AVX2", ["avx2 library is not built", "pip install"]),
    ):
        library._found.cache_clear()
        monkeypatch.setenv(library.FORCE, value)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert_missing(*words)


def test_nothing_built(folder):
    assert_missing("not built", str(folder), "g++", "pip install")


def test_nothing_built_and_the_build_said_why(folder):
    (folder / "build_note.txt").write_text("no C++ compiler: c++ not found\n")
    assert_missing("no C++ compiler: c++ not found. ", "pip install")
    assert "more in" not in library.missing()


def test_a_long_note_is_pointed_at(folder):
    (folder / "build_note.txt").write_text("it does not compile\nerror: 1\nerror: 2\n")
    assert_missing(f"it does not compile (more in {folder / 'build_note.txt'})")
    assert "error" not in library.missing()


@needs_compiler
@pytest.mark.parametrize("isa", ["avx512", "baseline"])
def test_built_from_other_sources(put, isa):
    """No falling back on a lesser library: that would hide a broken install."""
    put("baseline")
    file = put(isa, version=library.ABI_VERSION + 1)
    assert_missing(
        f"{file} was built from other sources",
        f"is {library.ABI_VERSION + 1}, want {library.ABI_VERSION}",
        "again with pip",
    )


def test_not_a_library(folder):
    (folder / f"libanode_avx2{library._SUFFIX}").write_text("text")
    assert_missing("does not load", "libanode_avx2", "pip install")


@needs_compiler
def test_a_function_is_missing(put, monkeypatch):
    put("baseline")
    monkeypatch.setattr(library, "_declare", lambda library: library.anode_not_there)
    assert_missing("does not load", "anode_not_there")


@needs_compiler
def test_threads_are_torchs(put):
    put("baseline")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert library.load().threads() == threads
    finally:
        torch.set_num_threads(before)
    x = torch.zeros(1000, dtype=torch.int64)
    library.load().count_up(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(1000))
    assert torch.equal(x, torch.arange(1000))


@needs_compiler
def test_one_thread_where_torch_has_no_such_functions(put, monkeypatch):
    assert library._address_in_torch("torch_has_no_such_function") is None
    monkeypatch.setattr(library, "_address_in_torch", lambda name: None)
    put("baseline")
    assert library.load().threads() == 0


# The parent uses two threads, of the library or of torch, and forks. The child loads the library if
# the parent has not, and the parent goes on with two.
FORK = """
import ctypes, os, sys, torch
from pathlib import Path
from anode_fast.kernels.cpu import library

library._FOLDER, library._declare = Path(sys.argv[1]), lambda library: None
torch.set_num_threads(2)

def use():
    x = torch.zeros(8, dtype=torch.int64)
    library.load().count_up(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(8))
    print(library.load().threads(), x.tolist() == list(range(8)), flush=True)

use() if sys.argv[2] == "before" else torch.ones(4_000_000).add(1)
child = os.fork()
if not child:
    use()
    os._exit(0)
os.waitpid(child, 0)
use()
"""


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_forked_child_runs_on_one_thread(put, folder, loaded):
    put("baseline")
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(folder), loaded],
        env={name: value for name, value in os.environ.items() if name != library.FORCE},
        capture_output=True,
        text=True,
        timeout=60,  # a hang is what it would be
    )
    lines = ["2 True"] * (loaded == "before") + ["0 True", "2 True"]
    assert done.stdout.splitlines() == lines, done.stderr
