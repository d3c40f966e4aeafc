"""A guess, from its machine code, at how long a step of a solve takes on a GPU that is not here.

One warp goes through the code of a step with nothing beside it: an instruction is issued as soon as
the control bits that the compiler gave the one before allow, and the results it has to wait for are
there. How long these take is a guess; so is how often a loop runs that the code alone does not
tell. It ranks candidates for the launch table. It is no measurement and no bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CYCLES = {
    **{"LDG": 45, "LDL": 45, "LDS": 26, "LDSM": 30, "STG": 20, "STS": 20, "STL": 20},
    **{"LDC": 30, "LDCU": 30, "ULDC": 12, "S2R": 25, "S2UR": 25, "R2UR": 12, "SHFL": 25},
    **{"MUFU": 22, "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16, "F2F": 20, "I2F": 20},
    **{"HMMA": 24, "DMMA": 40, "HGMMA": 64, "UTCHMMA": 80, "LDTM": 30, "STTM": 30},
    **{"ATOMG": 400, "MEMBAR": 100},
}
"""Until a result is there; those that hit the L1 cache. 20 of the others."""
BARRIER, MATRIX_WAIT = 20, 60
"""Waiting for the other warps; for the matrix instructions of Hopper's warp groups."""

_LINE = re.compile(
    r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"
)


@dataclass
class Instruction:
    """One of the code.

    Attributes:
        address, name, operands: What the disassembly shows.
        stall: Cycles until the next one may be issued.
        sets, frees: Barriers that its result, and its having read its operands, go with; 7: none.
        waits: For which barriers, a bit each.
    """

    address: int
    name: str
    operands: str
    stall: int
    sets: int
    frees: int
    waits: int

    @property
    def opcode(self) -> str:
        """The name's first part."""
        return self.name.partition(".")[0]


def instructions(disassembly: str) -> list[Instruction]:
    """Those of cuobjdump's disassembly, with the control bits that Volta and all since have."""
    found = []
    for address, name, operands, high in _LINE.findall(disassembly):
        bits = int(high, 16) >> 41
        control = (bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
        found.append(Instruction(int(address, 16), name, operands, *control))
    return found


def _loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last instruction of each loop, an outer one before those inside."""
    index = {x.address: i for i, x in enumerate(code)}
    ends: dict[int, int] = {}
    for i, x in enumerate(code):
        targets = re.findall(r"0x([0-9a-f]+)", x.operands) if x.opcode == "BRA" else []
        begin = index.get(int(targets[-1], 16)) if targets else None
        if begin is not None and begin < i:
            ends[begin] = max(ends.get(begin, 0), i)
    return sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))


def _weights(
    code: list[Instruction], outer: int, stages: int, H: int, N: int, K: int
) -> list[float]:
    """How often each instruction runs in a step: loops over blocks, and over stages."""
    loops = _loops(code)
    weights = [1.0] * len(code)
    dynamic: list[tuple[int, int]] = []
    for begin, end in loops:
        inner = [(a, b) for a, b in loops if begin <= a and b <= end and (a, b) != (begin, end)]
        own = [i for i in range(begin, end + 1) if not any(a <= i <= b for a, b in inner)]
        has_products = any("MMA" in x.name for x in code[begin : end + 1])
        trips = 0.0
        for i in reversed(own):  # k < H - K before k += K
            if "ISETP" in code[i].name and not trips:
                for bound in re.findall(r"(?<![\[\w])0x([0-9a-f]+)", code[i].operands):
                    if H - int(bound, 16) in (N, K, min(H, 32)) and int(bound, 16):
                        trips = H / (H - int(bound, 16))
        if not trips:
            depth = sum(a <= begin and end <= b for a, b in dynamic)
            if depth > outer and has_products:  # a loop of two rounds has no bound in the code
                has_inner = any("MMA" in x.name for a, b in inner for x in code[a : b + 1])
                trips = H / N if K == H or (N < H and has_inner) else H / K
            else:
                trips = stages - 1 if depth == outer and has_products else 1
                dynamic.append((begin, end))
        for i in range(begin, end + 1):
            weights[i] *= trips
    return weights


def cycles(disassembly: str, outer: int, stages: int, H: int, N: int, K: int) -> float:
    """Of a step.

    Args:
        disassembly: cuobjdump's, of the kernel.
        outer: Loops around that over the stages: of attempts, of tiles.
        stages: Of the method.
        H, N, K: The field's padded width and blocks, as in `MLP`.
    """
    code = instructions(disassembly)
    weights = _weights(code, outer, stages, H, N, K)
    now = total = 0.0
    done = [0.0] * 8
    for x, weight in zip(code, weights, strict=True):
        begin = now
        now = max([now, *(done[i] for i in range(6) if x.waits >> i & 1)])
        if x.opcode == "BAR":
            now += BARRIER
        if x.name.startswith("WARPGROUP.DEPBAR"):
            now += MATRIX_WAIT
        latency = CYCLES.get(x.opcode, 20)
        done[x.sets] = max(done[x.sets], now + latency)
        done[x.frees] = max(done[x.frees], now + min(latency, 20))
        now += max(x.stall, 1)
        total += weight * (now - begin)
    return total
