"""Builds and installs the package, without a network, and tells what it runs on.

First as its users do, `pip install -e .`. Where that fails (a system's Python that pip may not
touch, an old setuptools or none), the kernels are linked to where the package expects them,
anode_fast/kernels, and the C++ ones built in place. `unlink` takes the link away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.gpu.report import FAILED, PASSED, Report, Row, folder, is_dry, table

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "triton", "numpy", "torchdiffeq", "torchode", "diffrax", "jax", "jaxlib"),
    *("pytest", "pytest-benchmark", "hypothesis", "rich", "setuptools", "pip"),
)
PIP = "-m pip install --no-deps --no-build-isolation --no-index --disable-pip-version-check".split()
SECONDS = 60  # of pip and of the build in place, each

_IMPORT = """
import os, sys
import anode_fast.kernels.gpu as found
sys.exit(not os.path.realpath(found.__file__).startswith(os.path.realpath(os.getcwd())))
"""
_COMPILE = """
import runpy, sys, types
from pathlib import Path
for name in ("", ".command", ".command.build_ext", ".command.bdist_wheel"):
    module = sys.modules["setuptools" + name] = types.ModuleType("setuptools" + name)
    for member in ("Extension", "find_packages", "setup"):
        setattr(module, member, lambda *args, **kwargs: ())
    module.build_ext = module.bdist_wheel = object
runpy.run_path("setup.py")["BuildKernels"]._compile_all(None, Path("kernels/cpu"))
"""
_DESCRIBE = """
import json, torch, anode_fast
facts = {"cuda": torch.version.cuda, "show_config": anode_fast.show_config().splitlines()}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    facts["device"] = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
    }
print(json.dumps(facts))
"""


def main() -> int:
    """Runs the step."""
    report = Report("build", folder(), _markdown)
    facts = {
        "cards": machine.cards(),
        "processor": machine.cpu_name(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": machine.versions(*PACKAGES),
        "commit": machine.commit(ROOT),
    }
    report.add(facts)
    try:
        how = "as it was (dry run)" if is_dry() else install(ROOT)
        described = _python(ROOT, "-c", _DESCRIBE).stdout.splitlines()
        facts = {**facts, **json.loads(described[-1])}
    except (RuntimeError, ValueError, IndexError) as error:
        return report.finish(FAILED, f"not installed: {error}", machine=facts)
    report.rows.clear()
    report.add(facts)
    print(*facts["show_config"], sep="\n")
    kernels = next((x for x in facts["show_config"] if x.startswith("backend cpu")), "")
    missing = "; no C++ kernels, see the log" if "missing" in kernels else ""
    return report.finish(PASSED, f"installed {how}{missing}", machine=facts)


def install(root: Path) -> str:
    """Makes the package importable, with its kernels.

    Returns:
        How: "by pip", or "in place".

    Raises:
        RuntimeError: It cannot be.
    """
    _python(root, *PIP, "-e", str(root))
    if _works(root):
        return "by pip"
    print("pip did not do it: kernels/ linked into anode_fast/, C++ kernels built in place")
    link = _link(root)
    if not link.is_symlink() and not link.exists():
        link.symlink_to("../kernels", target_is_directory=True)
    _build_in_place(root)
    if not _works(root):
        raise RuntimeError("anode_fast.kernels cannot be imported, see the log")
    return "in place"


def unlink(root: Path = ROOT) -> None:
    """Removes what `install` left in the tree, if it had to."""
    link = _link(root)
    if link.is_symlink():
        link.unlink()


def _link(root: Path) -> Path:
    return root / "anode_fast" / "kernels"


def _build_in_place(root: Path) -> None:
    """Builds the C++ kernels beside their sources; the package works without them."""
    if _python(root, "setup.py", "build_ext", "--inplace").returncode:
        print("without setuptools, which does no more here than call the compiler")
        _python(root, "-c", _COMPILE)


def _works(root: Path) -> bool:
    return _python(root, "-c", _IMPORT).returncode == 0


def _python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the tree. What it says goes into the log."""
    command: Sequence[str] = (sys.executable, *arguments)
    print("$", *("..." if "\n" in x else x for x in command), flush=True)
    environment = os.environ | {"PYTHONPATH": str(root)}
    # A file and no pipe, which a compiler that goes on would keep open.
    with tempfile.TemporaryFile("w+") as said:
        try:
            status = subprocess.run(
                command,
                cwd=root,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"ended after {SECONDS} s", flush=True)
            status = -9
        said.seek(0)
        text = said.read()
    if status:
        print(text, f"exit status {status}", flush=True)
    return subprocess.CompletedProcess(command, status, text)


def _markdown(rows: list[Row]) -> str:
    if not rows:
        return ""
    facts = rows[0]
    card = facts["cards"][0] if facts["cards"] else {}
    lines = [
        ("card", facts.get("device", {}).get("name", "none")),
        ("driver", card.get("driver_version")),
        ("clocks now, at most (SM; memory)", _clocks(card)),
        ("processor", f"{facts['processor']}, {facts['cores']} cores"),
        ("Python, CUDA", f"{facts['python']}, {facts.get('cuda')}"),
        ("packages", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
        ("commit", facts["commit"]),
    ]
    return table(("", ""), lines, left=2)


def _clocks(card: Row) -> str | None:
    if not card:
        return None
    return "; ".join(f"{card[f'clocks.{x}']}, {card[f'clocks.max.{x}']}" for x in ("sm", "mem"))


if __name__ == "__main__":
    sys.exit(main())
