"""The package map, and the build of the C++ kernels. All else stands in pyproject.toml.

`kernels/` on disk is `anode_fast.kernels` when installed: `kernels` alone would claim an import
name that belongs to another project.

kernels/cpu/api.cpp is compiled once per instruction set, into libraries beside library.py, which
loads the best one that the machine can run. They are plain C libraries: no Python and no torch in
them. Without a compiler the package installs all the same; build_note.txt then says what is wrong.

Environment: CXX and CXXFLAGS as usual, ANODE_FAST_NO_CPU_KERNELS=1 to build none.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPU = "anode_fast.kernels.cpu"
SOURCE = Path("kernels/cpu/api.cpp")
HEADERS = sorted(str(path) for path in SOURCE.parent.glob("*.hpp"))
NOTE = "build_note.txt"
SKIP = "ANODE_FAST_NO_CPU_KERNELS"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
COMPILERS = ("c++", "g++", "clang++")

# Contraction to fma is as exact as without; nan stays nan, so no -ffast-math.
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -pthread -fvisibility=hidden -ffp-contract=fast "
    "-fno-math-errno -fno-trapping-math -Wall -Wextra"
).split()
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": [f"-mavx512{part}" for part in ("f", "dq", "bw", "vl")]
        + ["-mfma", "-mprefer-vector-width=512"],
    }


class BuildKernels(build_ext):
    """Compiles the kernels. A failure is told in a note and ends no install."""

    def run(self) -> None:
        out = Path(self.build_lib, *CPU.split("."))
        out.mkdir(parents=True, exist_ok=True)
        self._remove_products(out)
        self._compile_all(out)
        if self.inplace:
            self._remove_products(SOURCE.parent)
            for product in self._products(out):
                shutil.copy2(product, SOURCE.parent)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._products(Path(self.build_lib, *CPU.split(".")))]

    def get_output_mapping(self) -> dict[str, str]:
        """Built file -> its copy among the sources, if there is one."""
        if not self.inplace:
            return {}
        return {path: str(SOURCE.parent / Path(path).name) for path in self.get_outputs()}

    def _compile_all(self, out: Path) -> None:
        """The libraries in `out`, or a note there that says why one is missing."""
        if os.environ.get(SKIP) == "1":
            problems = [f"{SKIP}=1 was set when anode_fast was installed"]
        elif sys.platform == "win32":
            problems = ["the C++ kernels are not built on Windows"]
        elif not (compiler := find_compiler()):
            wanted = os.environ.get("CXX") or ", ".join(COMPILERS)
            problems = [f"no C++ compiler: {wanted} not found"]
        else:
            compiler += [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
            jobs = [
                [*compiler, *flags, str(SOURCE), "-o", str(out / f"libanode_{isa}{SUFFIX}")]
                for isa, flags in INSTRUCTION_SETS.items()
            ]
            with ThreadPoolExecutor() as threads:
                problems = [problem for problem in threads.map(compile_one, jobs) if problem]
        if problems:
            (out / NOTE).write_text("\n".join(problems) + "\n")
            reason = problems[0].splitlines()[0]
            print(f"anode_fast: {reason}. It installs without what could not be built.")

    @staticmethod
    def _products(folder: Path) -> list[Path]:
        return sorted([*folder.glob(f"libanode_*{SUFFIX}"), *folder.glob(NOTE)])

    def _remove_products(self, folder: Path) -> None:
        """Removes the files first: what is in use by another process stays whole that way."""
        for product in self._products(folder):
            product.unlink()


class Wheel(bdist_wheel):
    """Any Python 3 can load the libraries, but only this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def find_compiler() -> list[str]:
    """The command that compiles C++, empty if there is none."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS:
        words = shlex.split(command)
        if shutil.which(words[0]):
            return words
    return []


def compile_one(command: list[str]) -> str:
    """Runs the compiler, shows what it said, and returns what went wrong: "" if nothing did."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    log = f"{shlex.join(command)}\n{done.stderr}"
    print(log, end="", flush=True)
    return f"{Path(command[-1]).name} does not compile\n{log}" if done.returncode else ""


setup(
    packages=[
        *find_packages(include=["anode_fast", "anode_fast.*"]),
        "anode_fast.kernels",
        *(f"anode_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"anode_fast": "anode_fast", "anode_fast.kernels": "kernels"},
    # For the sdist to find the sources, and for the wheel to name its platform.
    ext_modules=[Extension(f"{CPU}.libanode", [str(SOURCE)], depends=HEADERS)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
