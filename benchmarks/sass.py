"""What the far loop of a compiled kernel executes, counted in its SASS, and what one tile of it should take by that.

SASS is the GPU's own assembly language, as cuobjdump prints it. The far loop is, of the innermost loops with matrix
instructions, the one of the fewest instructions: the near loop has masks on top, and the online softmax a running maximum.
Of the kernels of wide rows it is the loop over the width, whose "tile" is one step of BLOCK_K. Where the compiler has taken that
loop apart, what lies between the first and the last matrix instruction stands for it.

All figures are of one tile. An iteration of a loop that was unrolled handles several, and then its counts are divided by how
many: as many as both its matrix instructions and its copies from global memory are enough for. Matrix instructions alone do not
tell, for where a tile has fewer rows than its warps take, several warps execute the same products.

The clocks are a prediction, of a processor that is full of programs and waits for nothing: those of the unit that has the most
to do. What is measured is longer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one processor can do in a clock.

    Attributes:
        matrix_flops: of dense products of bfloat16 with float32 sums. TF32 has half of them.
        float_operations: additions, products, and fused pairs of both, in float32.
        share_of_mma: the part of ``matrix_flops`` that mma.sync reaches where there are newer instructions.
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

Matrix units: the peak rates of NVIDIA's architecture white papers (A100, GA102, Ada, H100, Blackwell, RTX PRO Blackwell), over
processors and boost clock. GeForce cards of 86, 89 and 120 have half of it with float32 sums. ``share_of_mma`` of sm_90 is what
Luo et al. measured (arXiv 2402.13499); that of sm_100 is not known, so that there the clocks of mma.sync are too few.
``float_operations``: CUDA C++ programming guide, table of arithmetic throughput.
"""

SCHEDULERS = 4
"""Of a processor; each issues one instruction of a warp in a clock (all capabilities above)."""

SPECIAL_FUNCTIONS = 16
"""Results of MUFU in a clock and processor: CUDA C++ programming guide, table of arithmetic throughput (the same)."""

SHARED_BYTES = 128
"""Of shared memory in a clock and processor: 32 banks of 4 bytes (CUDA C++ programming guide)."""

WARP, WARPS_OF_A_GROUP = 32, 4
"""Threads of a warp; warps that execute one HGMMA together."""


# ---- reading it ------------------------------------------------------------------------------------------------------

_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+"
    r"(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<name>[A-Z][A-Z0-9_]*(?:\.\w+)*)\.?"
    r"(?:\s+(?P<operands>[^;&?]*?))?"
    r"\s*(?:[;&?]|/\*|$)"
)
"""Of an older cuobjdump a line ends with ;, of a newer one what the scheduler is told comes before it, after & or ?."""

_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it is, the predicate that guards it or "", its name with modifiers, its operands."""

    address: int
    guard: str
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where it may jump to, if it is a jump."""
        found = _TARGET.search(self.operands) if self.base in ("BRA", "JMP") else None
        return None if found is None else int(found[1], 16)

    @property
    def may_go_on(self) -> bool:
        """Whether the next instruction may be executed after it."""
        if self.base in ("EXIT", "RET", "BRX", "JMX"):
            return self.guard != ""
        # BRA.U UP0, 0x40 has its predicate among the operands.
        return self.target is None or self.guard != "" or "," in self.operands


def instructions(text: str) -> list[Instruction]:
    """All instructions of the only function in what ``cuobjdump -sass`` prints."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m["address"], 16), m["guard"] or "", m["name"], (m["operands"] or "").strip()) for m in found if m]


# ---- loops -----------------------------------------------------------------------------------------------------------


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The natural loops: whatever comes back to an instruction that every way into the loop passes.

    So code that waits for a barrier out of line, and jumps back into the middle, makes no loop of what it jumps over.
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
    """Of the innermost loops with matrix instructions that with the fewest instructions; empty if there is none."""
    with_matrix = [loop for loop in loops(code) if any(is_matrix(one) for one in loop)]
    members = [{one.address for one in loop} for loop in with_matrix]
    innermost = [loop for loop, own in zip(with_matrix, members, strict=True) if not any(other < own for other in members)]
    return min(innermost, key=len, default=[])


def _between_matrix_instructions(code: Sequence[Instruction]) -> list[Instruction]:
    places = [number for number, one in enumerate(code) if is_matrix(one)]
    return list(code[places[0] : places[-1] + 1]) if places else []


def _blocks(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Runs of instructions that are entered at the first and left at the last."""
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
    """Of each block the set of those that every way from the first block passes, as bits. Unreachable ones have all."""
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
    # What cannot be reached is dominated by all, and must close no loop.
    return [bits if bits != everything or number == 0 else 1 << number for number, bits in enumerate(found)]


def _reaching(number: int, head: int, predecessors: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which ``number`` can be reached without passing ``head``."""
    found, pending = set(), [number]
    while pending:
        block = pending.pop()
        if block != head and block not in found:
            found.add(block)
            pending.extend(predecessors[block])
    return found


# ---- what they are ---------------------------------------------------------------------------------------------------


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
"""Kinds of instructions, each of the first that takes it; the columns of :class:`Loop` have their meanings."""


def kind_of(one: Instruction) -> str:
    return next(kind for kind, takes in _KINDS.items() if takes(one))


# ---- the work of a tile ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one tile asks for, as the source says.

    Attributes:
        products: (m, n, k) of its matrix products.
        copied_bytes: of operands, that it brings from global memory.
        itemsize: bytes of an operand; 4 is TF32.
        passes: products that are executed for one: three in tf32x3.
        n_warps: of a program.
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
        """An instruction takes up to 128 rows, 256 columns and 32 bytes of the sum; their shapes are not in the SASS."""
        depth = 32 // self.itemsize
        return self.passes * sum(-(-m // 128) * -(-n // 256) * -(-k // depth) for m, n, k in self.products)


def executed_flops(one: Instruction, work: Work) -> float:
    """Of a matrix instruction, by all warps of a program."""
    if one.base == "HMMA":  # HMMA.16816: 16 x 8 by 16, a warp
        shape = re.search(r"\.(16)(8)(16|8|4)\b", one.name)
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * work.n_warps if shape else 0
    if one.base == "HGMMA":  # HGMMA.64x128x16, four warps
        m, n, k = _hgmma_shape(one)
        return 2 * m * n * k * work.n_warps / WARPS_OF_A_GROUP
    return work.flops / work.tcgen05_instructions


def tiles_of(code: Sequence[Instruction], work: Work, is_loop: bool) -> int:
    """How many tiles an iteration handles; at least one. Of a loop that was taken apart the first copies come before it."""
    ratio = sum(executed_flops(one, work) for one in code if is_matrix(one)) / work.flops
    copied = sum(_bytes_of_threads(one, work) for one in code if one.base in ("LDG", "LDGSTS"))
    if is_loop and copied:
        ratio = min(ratio, copied / work.copied_bytes)
    return max(1, math.floor(ratio + 0.01))


def _bytes_of_threads(one: Instruction, work: Work) -> int:
    """What all threads load or store by an instruction that has their width as a modifier."""
    width = re.search(r"\.(128|64)\b", one.name)
    return WARP * work.n_warps * (int(width[1]) // 8 if width else 4)


def _hgmma_shape(one: Instruction) -> tuple[int, int, int]:
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", one.name)
    return (int(shape[1]), int(shape[2]), int(shape[3])) if shape else (0, 0, 0)


def shared_bytes(one: Instruction, work: Work) -> float:
    """What an instruction moves into or out of shared memory, by all warps, without conflicts of banks.

    A number that many lanes read alike counts for each. Operands of matrix instructions count unless they are in registers or
    tensor memory.
    """
    if one.base == "HGMMA":  # an operand of 32 bytes a row: the columns', and the rows' where they are not in registers
        m, n, _ = _hgmma_shape(one)
        rows_are_shared = one.operands.partition(",")[2].lstrip().startswith("gdesc")
        return 32 * (n + (m if rows_are_shared else 0)) * work.n_warps / WARPS_OF_A_GROUP
    if one.base == "UTCHMMA":  # the mean of all, for which product it belongs to is not in the SASS
        of_columns = sum(-(-m // 128) * n * k for m, n, k in work.products)
        of_rows = sum(-(-n // 256) * m * k for m, n, k in work.products) if one.operands.startswith("gdesc") else 0
        return work.itemsize * work.passes * (of_columns + of_rows) / work.tcgen05_instructions
    if one.base in ("LDSM", "STSM"):  # 8 x 8 numbers of 2 bytes a matrix
        count = re.search(r"88\.(\d)", one.name)
        return 128 * (int(count[1]) if count else 1) * work.n_warps
    return _bytes_of_threads(one, work) if one.base in ("LDS", "STS", "LDGSTS") else 0


# ---- what it comes to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """The far loop: instructions of a thread and clocks of a processor, for one tile of one program.

    Attributes:
        tiles: that one iteration handles; the other figures are of one of them.
        matrix: HMMA, HGMMA, UTCHMMA.
        mufu: exponentials and reciprocals, on the special function units.
        reciprocals: those of them that are MUFU.RCP.
        arithmetic: FFMA, FMUL, FADD, and FFMA2, FMUL2, FADD2, which do two at once.
        conversions: between number formats, and arithmetic in half precision.
        shared: LDS, STS, LDSM, STSM, and LDTM and STTM of tensor memory.
        off_chip: LDG, STG, and asynchronous copies.
        waits: barriers, fences, and waits for copies and matrix units.
        branches: jumps; both ways of one are counted.
        other: addresses, predicates, comparisons, moves.
        total: all of them.
        issue_clocks: total * warps / schedulers.
        matrix_clocks, mufu_clocks, float_clocks, shared_clocks: of the units, by :data:`RATES`.
        predicted_clocks: the most of these five.
        limit: whose they are.
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
    """What the far loop in a listing does; None of a kernel without matrix instructions."""
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
