"""Counts the instructions in a compiled kernel's far loop from its SASS, and predicts how many clocks one tile takes.

SASS is the GPU's own assembly language, as cuobjdump prints it. The far loop visits tiles that contain no positives and no
diagonal. It is found as the shortest of the innermost loops with matrix instructions: the near loop has masks in addition, and
the online softmax a running maximum. In the kernels of wide rows, it is the loop over the width, and a "tile" is one step of
BLOCK_K. If the compiler has dissolved that loop, the code between the first and the last matrix instruction is counted instead.

All figures are for one tile. An iteration of an unrolled loop handles several tiles, and its counts are divided by their number.
That number is the largest for which the iteration has enough matrix instructions and enough copies from global memory. Matrix
instructions alone would not tell: if a tile has fewer rows than its warps can take, several warps execute the same products.

The clocks are a prediction for a processor that is full of programs and never waits: those of its busiest unit. Measured times
are longer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """How much one processor can do per clock.

    Attributes:
        matrix_flops: Flops of dense bfloat16 products with float32 sums. TF32 reaches half of it.
        float_operations: float32 additions, multiplications, and fused multiply-adds.
        share_of_mma: The share of ``matrix_flops`` that mma.sync reaches on a GPU with newer matrix instructions.
    """

    matrix_flops: int
    float_operations: int
    share_of_mma: float = 1.0


RATES = {
    80: Rates(2048, 64),
    86: Rates(1024, 128),
    89: Rates(1024, 128),
    90: Rates(4096, 128, share_of_mma=0.62),
    100: Rates(8192, 128),
    120: Rates(1024, 128),
}
"""By compute capability.

Matrix units: the peak rates in NVIDIA's architecture white papers (A100, GA102, Ada, H100, Blackwell, RTX PRO Blackwell), divided
by the number of processors and the boost clock. GeForce cards of 86, 89 and 120 reach half of it with float32 sums. The
``share_of_mma`` of sm_90 was measured by Luo et al. (arXiv 2402.13499). That of sm_100 is unknown, so the clocks of mma.sync are
underestimated there.
``float_operations``: CUDA C++ programming guide, table of arithmetic throughput.
"""

SCHEDULERS = 4
"""Schedulers of a processor. Each issues one warp instruction per clock (on all capabilities above)."""

SPECIAL_FUNCTIONS = 16
"""MUFU results per clock and processor (CUDA C++ programming guide, table of arithmetic throughput; all capabilities above)."""

SHARED_BYTES = 128
"""Bytes of shared memory per clock and processor: 32 banks of 4 bytes (CUDA C++ programming guide)."""

WARP, WARPS_OF_A_GROUP = 32, 4
"""Threads per warp, and warps that execute one HGMMA together."""


# ---- reading it ------------------------------------------------------------------------------------------------------

_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<name>[A-Z][A-Z0-9_]*(?:\.\w+)*)\.?"
    r"(?:\s+(?P<operands>[^;&?]*?))?"
    r"\s*(?:[;&?]|/\*|$)"
)
"""An older cuobjdump ends a line with ";". A newer one first prints hints for the scheduler, which begin with "&" or "?"."""

_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, the predicate that guards it (or ""), its name with modifiers, and its operands."""

    address: int
    guard: str
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address to which it may jump, if it is a jump."""
        found = _TARGET.search(self.operands) if self.base in ("BRA", "JMP") else None
        return None if found is None else int(found[1], 16)

    @property
    def may_go_on(self) -> bool:
        """Whether execution may continue with the next instruction."""
        if self.base in ("EXIT", "RET", "BRX", "JMX"):
            return self.guard != ""
        # A jump like BRA.U UP0, 0x40 has its predicate among the operands.
        return self.target is None or self.guard != "" or "," in self.operands


def instructions(text: str) -> list[Instruction]:
    """All instructions in the output of ``cuobjdump -sass``, which must have a single function."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m["address"], 16), m["guard"] or "", m["name"], (m["operands"] or "").strip()) for m in found if m]


# ---- loops -----------------------------------------------------------------------------------------------------------


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The natural loops: code that returns to an instruction which every path into the loop passes.

    Out-of-line code that waits for a barrier and jumps back into the middle is therefore not mistaken for a loop.
    """
    blocks = _blocks(code)
    number_of = {block[0].address: number for number, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for number, block in enumerate(blocks):
        last = block[-1]
        after = [number_of[last.target]] if last.target in number_of else []
        successors.append(after + ([number + 1] if last.may_go_on and number + 1 < len(blocks) else []))
    predecessors: list[list[int]] = [[] for _ in blocks]
    for number, after in enumerate(successors):
        for other in after:
            predecessors[other].append(number)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for number, after in enumerate(successors):
        for head in after:
            if dominators[number] >> head & 1:
                bodies.setdefault(head, {head}).update(_reaching(number, head, predecessors))
    return [[one for number in sorted(body) for one in blocks[number]] for body in bodies.values()]


def far_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The shortest of the innermost loops with matrix instructions. Empty if there is none."""
    with_matrix = [loop for loop in loops(code) if any(is_matrix(one) for one in loop)]
    members = [{one.address for one in loop} for loop in with_matrix]
    innermost = [loop for loop, own in zip(with_matrix, members, strict=True) if not any(other < own for other in members)]
    return min(innermost, key=len, default=[])


def _between_matrix_instructions(code: Sequence[Instruction]) -> list[Instruction]:
    places = [number for number, one in enumerate(code) if is_matrix(one)]
    return list(code[places[0] : places[-1] + 1]) if places else []


def _blocks(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The basic blocks: instructions that are entered only at the first and left only at the last."""
    starts = {one.target for one in code if one.target is not None}
    blocks: list[list[Instruction]] = []
    begins = True
    for one in code:
        if begins or one.address in starts:
            blocks.append([])
        blocks[-1].append(one)
        begins = one.target is not None or not one.may_go_on
    return blocks


def _dominators(predecessors: Sequence[Sequence[int]]) -> list[int]:
    """For each block, as bits, the blocks that every path from the first block passes."""
    everything = (1 << len(predecessors)) - 1
    found = [1, *(everything for _ in predecessors[1:])]
    changes = True
    while changes:
        changes = False
        for number in range(1, len(predecessors)):
            common = everything
            for other in predecessors[number]:
                common &= found[other]
            common |= 1 << number
            changes |= common != found[number]
            found[number] = common
    # An unreachable block is still dominated by all blocks. Reset it, since it must not close a loop.
    return [bits if bits != everything or number == 0 else 1 << number for number, bits in enumerate(found)]


def _reaching(number: int, head: int, predecessors: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which block ``number`` can be reached without passing ``head``."""
    found, pending = set(), [number]
    while pending:
        block = pending.pop()
        if block != head and block not in found:
            found.add(block)
            pending.extend(predecessors[block])
    return found


# ---- kinds of instructions -------------------------------------------------------------------------------------------


def is_matrix(one: Instruction) -> bool:
    return one.base.endswith("MMA")


_PACKED = ("FFMA2", "FADD2", "FMUL2")
_KINDS: dict[str, Callable[[Instruction], bool]] = {
    "matrix": is_matrix,
    "mufu": lambda one: one.base == "MUFU",
    "arithmetic": lambda one: one.base in ("FFMA", "FMUL", "FADD", *_PACKED),
    "conversions": lambda one: re.fullmatch(r"(F2|I2F).*|HFMA2|HADD2|HMUL2", one.base) is not None,
    "shared": lambda one: one.base in ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDTM", "STTM"),
    "off_chip": lambda one: re.fullmatch(r"LDG|STG|LDL|STL|RED|ATOM|ATOMG|LDGSTS|UTMA\w+|UBLKCP|UBLKPF", one.base) is not None,
    "waits": lambda one: (
        re.fullmatch(
            r"BAR|\w*DEPBAR|SYNCS|UTCBAR|WARPSYNC|WARPGROUP|FENCE|MEMBAR|ERRBAR|B?SSY|BSYNC|NANOSLEEP|NOP|ARRIVES|CCTL", one.base
        )
        is not None
    ),
    "branches": lambda one: one.base in ("BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT", "BREAK", "YIELD"),
    "other": lambda one: True,
}
"""Kinds of instructions. An instruction belongs to the first kind that matches. :class:`Loop` explains them."""


def kind_of(one: Instruction) -> str:
    return next(kind for kind, takes in _KINDS.items() if takes(one))


# ---- the work of a tile ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The work of one tile, according to the source code.

    Attributes:
        products: (m, n, k) of each matrix product.
        copied_bytes: Bytes of operands that it copies from global memory.
        itemsize: Bytes per operand. 4 means TF32.
        passes: Products that are executed for each one in the source. tf32x3 executes three.
        n_warps: Warps of a program.
    """

    products: tuple[tuple[int, int, int], ...]
    copied_bytes: int
    itemsize: int
    passes: int
    n_warps: int

    @property
    def flops(self) -> int:
        return self.passes * sum(2 * m * n * k for m, n, k in self.products)

    @property
    def tcgen05_instructions(self) -> int:
        """An instruction covers up to 128 rows, 256 columns and 32 bytes along k. The SASS does not say the shapes."""
        depth = 32 // self.itemsize
        return self.passes * sum(-(-m // 128) * -(-n // 256) * -(-k // depth) for m, n, k in self.products)


def executed_flops(one: Instruction, work: Work) -> float:
    """Flops of a matrix instruction, executed by all warps of a program."""
    if one.base == "HMMA":  # HMMA.16816: 16 x 8 x 16, by one warp
        shape = re.search(r"\.(16)(8)(16|8|4)\b", one.name)
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * work.n_warps if shape else 0
    if one.base == "HGMMA":  # HGMMA.64x128x16, by four warps together
        m, n, k = _hgmma_shape(one)
        return 2 * m * n * k * work.n_warps / WARPS_OF_A_GROUP
    return work.flops / work.tcgen05_instructions


def tiles_of(code: Sequence[Instruction], work: Work, is_loop: bool) -> int:
    """How many tiles an iteration handles, at least one.

    For a dissolved loop only matrix instructions count, because its first copies come before them.
    """
    ratio = sum(executed_flops(one, work) for one in code if is_matrix(one)) / work.flops
    copied = sum(_bytes_of_threads(one, work) for one in code if one.base in ("LDG", "LDGSTS"))
    if is_loop and copied:
        ratio = min(ratio, copied / work.copied_bytes)
    return max(1, math.floor(ratio + 0.01))


def _bytes_of_threads(one: Instruction, work: Work) -> int:
    """Bytes that all threads load or store with an instruction, whose modifier is the width per thread in bits."""
    width = re.search(r"\.(128|64)\b", one.name)
    return WARP * work.n_warps * (int(width[1]) // 8 if width else 4)


def _hgmma_shape(one: Instruction) -> tuple[int, int, int]:
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", one.name)
    return (int(shape[1]), int(shape[2]), int(shape[3])) if shape else (0, 0, 0)


def shared_bytes(one: Instruction, work: Work) -> float:
    """Bytes that an instruction moves into or out of shared memory, by all warps, assuming no bank conflicts.

    A value that several lanes read counts once per lane. Operands of matrix instructions count unless they are in registers or
    tensor memory.
    """
    if one.base == "HGMMA":  # 32 bytes per row of an operand; the left operand may be in registers
        m, n, _ = _hgmma_shape(one)
        rows_are_shared = one.operands.partition(",")[2].lstrip().startswith("gdesc")
        return 32 * (n + (m if rows_are_shared else 0)) * work.n_warps / WARPS_OF_A_GROUP
    if one.base == "UTCHMMA":  # the mean over all products, since the SASS does not say which one it is
        of_columns = sum(-(-m // 128) * n * k for m, n, k in work.products)
        of_rows = sum(-(-n // 256) * m * k for m, n, k in work.products) if one.operands.startswith("gdesc") else 0
        return work.itemsize * work.passes * (of_columns + of_rows) / work.tcgen05_instructions
    if one.base in ("LDSM", "STSM"):  # a matrix has 8 x 8 numbers of 2 bytes
        count = re.search(r"88\.(\d)", one.name)
        return 128 * (int(count[1]) if count else 1) * work.n_warps
    return _bytes_of_threads(one, work) if one.base in ("LDS", "STS", "LDGSTS") else 0


# ---- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """The far loop: instructions per thread and clocks of a processor, for one tile of one program.

    Attributes:
        tiles: Tiles per iteration. The other figures are for one tile.
        matrix: HMMA, HGMMA, UTCHMMA.
        mufu: Exponentials and reciprocals, on the special function units.
        reciprocals: How many of those are MUFU.RCP.
        arithmetic: FFMA, FMUL, FADD, and FFMA2, FMUL2, FADD2, which do two operations at once.
        conversions: Conversions between number formats, and arithmetic in half precision.
        shared: LDS, STS, LDSM, STSM, and LDTM and STTM of tensor memory.
        off_chip: LDG, STG, and asynchronous copies.
        waits: Barriers, fences, and waits for copies and matrix units.
        branches: Jumps. The code of both outcomes is counted.
        other: Addresses, predicates, comparisons, moves.
        total: All of them.
        issue_clocks: total * warps / schedulers.
        matrix_clocks, mufu_clocks, float_clocks, shared_clocks: Clocks of the units, by :data:`RATES`.
        predicted_clocks: The largest of these five.
        limit: The unit with the largest.
    """

    tiles: int
    matrix: int
    mufu: int
    reciprocals: int
    arithmetic: int
    conversions: int
    shared: int
    off_chip: int
    waits: int
    branches: int
    other: int
    total: int
    issue_clocks: int
    matrix_clocks: int
    mufu_clocks: int
    float_clocks: int
    shared_clocks: int
    predicted_clocks: int
    limit: str


def loop_of(text: str, capability: int, work: Work) -> Loop | None:
    """The far loop of a listing. None for a kernel without matrix instructions."""
    code = instructions(text)
    far = far_loop(code)
    loop = far or _between_matrix_instructions(code)
    if not loop:
        return None
    tiles, rates = tiles_of(loop, work, bool(far)), RATES[capability]
    count = Counter(kind_of(one) for one in loop)
    n_reciprocals = sum(one.name.startswith("MUFU.RCP") for one in loop)
    n_operations = count["arithmetic"] + sum(one.base in _PACKED for one in loop)
    is_mma = any(one.base == "HMMA" for one in loop)
    matrix_rate = rates.matrix_flops * (rates.share_of_mma if is_mma else 1.0) * (0.5 if work.itemsize == 4 else 1.0)
    threads = WARP * work.n_warps
    clocks = {
        "issue": len(loop) * work.n_warps / SCHEDULERS / tiles,
        "matrix": sum(executed_flops(one, work) for one in loop if is_matrix(one)) / matrix_rate / tiles,
        "mufu": count["mufu"] * threads / SPECIAL_FUNCTIONS / tiles,
        "float": n_operations * threads / rates.float_operations / tiles,
        "shared": sum(shared_bytes(one, work) for one in loop) / SHARED_BYTES / tiles,
    }
    limit = max(clocks, key=lambda name: clocks[name])
    return Loop(
        tiles=tiles,
        **{kind: round(count[kind] / tiles) for kind in _KINDS},
        reciprocals=round(n_reciprocals / tiles),
        total=round(len(loop) / tiles),
        **{f"{name}_clocks": round(value) for name, value in clocks.items()},
        predicted_clocks=round(clocks[limit]),
        limit=limit,
    )
