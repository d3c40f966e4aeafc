"""Command line of the benchmarks: `python -m benchmarks quickstart`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line with the whole help, not just the usage line."""

    def error(self, message: str) -> NoReturn:
        self.print_help(sys.stderr)
        self.exit(2, f"\n{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and runs the subcommand it names."""
    try:
        from benchmarks import images, quickstart, report, roofline
        from benchmarks.paper import command as paper
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("anode_fast", "benchmarks")):
            raise
        sys.exit(f"benchmarks: {error.name} is not installed. Try: pip install -e '.[dev]'")

    parser = _Parser(prog="python -m benchmarks", description="Benchmarks of anode_fast.")
    commands = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    # Each benchmark adds its own subcommand and sets `run`, which takes the parsed arguments.
    for benchmark in (quickstart, images, paper, report, roofline):
        benchmark.add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was complete has been written")


if __name__ == "__main__":
    main()
