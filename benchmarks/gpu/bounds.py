"""What a card could do at best: FLOPs of a solve over the peak of its data sheet.

    python -m benchmarks.gpu.bounds

prints the bounds that docs/gpu-results.md shows. They hold for any program that makes these
evaluations with this arithmetic; they are no estimates of ours. FLOPs are those of the field's
matrix products, two to a multiply-add, as in `python -m benchmarks roofline`.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu import pool
from benchmarks.gpu.report import Row, table

DIM, WIDTH, HIDDEN_LAYERS = 7, 32, 2  # the paper's toy field
BATCHES = (64, 65_536)
DESIGN_CARD = "NVIDIA H100 80GB HBM3"

TF32_PRODUCTS = {"high": 1, "highest": 3}  # for a float32 product


@dataclass(frozen=True)
class Peak:
    """Of a card, in FLOP/s and bytes/s.

    Attributes:
        tf32: Of tensor cores, without sparsity.
        float32, float64: Of multiply-adds outside tensor cores.
        memory: Bandwidth.
        source: Where the numbers stand.
    """

    tf32: float
    float32: float
    float64: float
    memory: float
    source: str

    def rate(self, precision: str) -> float:
        """At which products of that precision can be made, the faster way; in FLOP/s."""
        if precision == "float64":
            return self.float64
        return max(self.tf32 / TF32_PRODUCTS[precision], self.float32)


_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_SXM = (989e12 / 2, 67e12, 34e12)  # it gives TF32 with sparsity, which doubles it

DATA_SHEETS = {
    DESIGN_CARD: Peak(*_SXM, 3.35e12, f"{_H100}, SXM"),
    "NVIDIA H200": Peak(*_SXM, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    "NVIDIA H100 PCIe": Peak(756e12 / 2, 51e12, 26e12, 2.0e12, f"{_H100}, PCIe"),
    "NVIDIA A100-SXM4-80GB": Peak(156e12, 19.5e12, 9.7e12, 2.039e12, f"{_A100}, 80GB SXM"),
    "NVIDIA A100-SXM4-40GB": Peak(156e12, 19.5e12, 9.7e12, 1.555e12, f"{_A100}, 40GB SXM"),
    "NVIDIA A100 80GB PCIe": Peak(156e12, 19.5e12, 9.7e12, 1.935e12, f"{_A100}, 80GB PCIe"),
}
"""By the name that CUDA gives the whole card; a part of one (MIG) has another name."""


def evaluation_flops(dim: int, width: int, hidden_layers: int = HIDDEN_LAYERS) -> int:
    """Of one evaluation of a perceptron for one row."""
    widths = [dim, *[width] * hidden_layers, dim]
    return 2 * sum(n * m for n, m in zip(widths[:-1], widths[1:], strict=True))


def padded(width: int) -> int:
    """Width of a tile, as in kernels/gpu/launch.py."""
    return max(16, 1 << (width - 1).bit_length())


def solve_flops(
    batch: int, width: int, nfe: int, *, differentiated: int = 0, nfe_backward: int = 0
) -> int:
    """Of a solve of the toy field and, if evaluations are differentiated, of its gradient.

    Args:
        batch: Rows.
        width: Of both hidden layers.
        nfe: Evaluations forward.
        differentiated: Those that the solution depends on. Each takes as much again for the
            gradient of its input, and for that of its weights.
        nfe_backward: Evaluations made again in the backward pass.
    """
    evaluations = nfe + nfe_backward + 2 * differentiated
    return batch * evaluation_flops(DIM, width) * evaluations


def differentiated(accepted: int) -> int:
    """Evaluations of dopri5 that a solution depends on: its last stage is the next step's first."""
    return 1 + 6 * accepted


def share(flops: float, seconds: float, rate: float) -> float:
    """Of the bound: 1 if the time is what the FLOPs take at that rate."""
    return flops / rate / seconds


def bounds(batch: int, width: int, nfe: int, accepted: int, peak: Peak) -> list[Row]:
    """Seconds that a solve takes at least, and with its gradient."""
    rows = []
    for gradient in (False, True):
        depends = differentiated(accepted) if gradient else 0
        flops = solve_flops(batch, width, nfe, differentiated=depends)
        # The state in, the solution at both ends out; with a gradient, its cotangent in.
        traffic = 4 * batch * DIM * (5 if gradient else 3)
        rows.append(
            {
                "batch": batch,
                "gradient": gradient,
                "nfe": nfe,
                "flops": flops,
                "high": flops / peak.rate("high"),
                "highest": flops / peak.rate("highest"),
                "float32": flops / peak.float32,
                "memory": traffic / peak.memory,
            }
        )
    return rows


def main() -> None:
    """Prints the bounds of the toy field on the data sheet of an H100."""
    counted: list[Row] = []
    cases = [{"batch": batch, "width": WIDTH} for batch in BATCHES]
    pool.run(
        "benchmarks.gpu.race:count",
        [cases],
        lambda case, row: counted.append({**case, **row}),
        workers=1,
        seconds=300,
    )
    peak, one = DATA_SHEETS[DESIGN_CARD], evaluation_flops(DIM, WIDTH)
    fat = evaluation_flops(padded(DIM), padded(WIDTH))
    print(f"{DIM}-{WIDTH}-{WIDTH}-{DIM}: {one} FLOPs an evaluation and row, {fat} as padded.")
    print(f"{peak.source}: tf32 {peak.tf32 / 1e12:g} TFLOP/s, float32 {peak.float32 / 1e12:g}, ")
    print(f"memory {peak.memory / 1e12:g} TB/s. dopri5, tolerance 1e-3, t from 0 to 1.\n")
    header = ("solve", "NFE", "FLOPs", "high", "highest", "float32 multiply-adds", "memory")
    lines = []
    for found in counted:
        for row in bounds(found["batch"], WIDTH, found["nfe"], found["accepted"], peak):
            work = "forward + gradient" if row["gradient"] else "forward"
            keys = ("high", "highest", "float32", "memory")
            times = [f"{1e6 * row[key]:.2g} us" for key in keys]
            lines.append(
                [f"batch {row['batch']}, {work}", row["nfe"], f"{row['flops']:.3g}", *times]
            )
    print(table(header, lines))


if __name__ == "__main__":
    main()
