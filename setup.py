"""The package map: `kernels/` on disk is `anode_fast.kernels` when installed.

`kernels` alone would claim an import name that belongs to another project. Everything else about
the package stands in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["anode_fast", "anode_fast.*"]),
        "anode_fast.kernels",
        *(f"anode_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"anode_fast": "anode_fast", "anode_fast.kernels": "kernels"},
)
