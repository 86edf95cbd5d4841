"""benchmarks.sass: the far loop is found in listings as cuobjdump prints them, and its instructions are told apart."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import resources, sass

from ..support import ROOT


def listing(*lines: str) -> str:
    """What cuobjdump prints of these instructions, 16 bytes each from 0 on."""
    printed = (f"        /*{16 * number:04x}*/     {line} ;      /* 0x000fe20000000800 */" for number, line in enumerate(lines))
    return "\tcode for sm_90a\n\t\tFunction : kernel\n" + "\n".join(printed)


def names(code: list[sass.Instruction]) -> list[str]:
    return [one.name for one in code]


OLDER = """
\t\tFunction : kernel
        /*0010*/               @!P2 BRA 0x40 ;                      /* 0x0000000000047947 */
                                                                    /* 0x000fe20000000800 */
        /*0020*/                   MUFU.EX2 R4, R4 ;                /* 0x0000000400047308 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR24].tnspB, R88, gsb0 ;    /* 0x41e00018 */
        /*0040*/                   EXIT ;                           /* 0x000000000000794d */
"""
NEWER = """
\t\tFunction : kernel
        /*0010*/              @!P2 BRA 0x40                                        ?trans5;           /* 0x0000000000047947 */
                                                                                                      /* 0x000fe20000000800 */
        /*0020*/                   MUFU.EX2 R4, R4                &req={1} &wr=0x2 ?trans1;           /* 0x0000000400047308 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR24].tnspB, R88, gsb0 &wr=0x1 ?WAIT1; /* 0x */
        /*0040*/                   EXIT                                            ?trans5;           /* 0x000000000000794d */
"""


@pytest.mark.parametrize("text", [OLDER, NEWER], ids=["older", "newer"])
def test_both_listings_are_read(text: str) -> None:
    code = sass.instructions(text)
    assert names(code) == ["BRA", "MUFU.EX2", "HGMMA.64x128x16.F32.BF16", "EXIT"]
    assert [one.address for one in code] == [0x10, 0x20, 0x30, 0x40]
    assert (code[0].guard, code[0].target, code[0].may_go_on) == ("!P2", 0x40, True)
    assert code[2].operands == "R88, R152, gdesc[UR24].tnspB, R88, gsb0"
    assert not code[3].may_go_on


@pytest.mark.parametrize(
    ("back", "goes_on"), [("@P0 BRA 0x10", True), ("BRA.U UP0, 0x10", True), ("BRA 0x10", False), ("BRA.U 0x10", False)]
)
def test_a_loop_is_what_comes_back(back: str, goes_on: bool) -> None:
    code = sass.instructions(listing("MOV R1, R2", "HMMA.16816.F32 R1, R2, R3, R4", "FADD R1, R1, R1", back, "EXIT"))
    assert code[3].may_go_on == goes_on
    (loop,) = sass.loops(code)
    assert [one.address for one in loop] == [0x10, 0x20, 0x30]


def test_the_far_loop_is_the_shortest_that_multiplies() -> None:
    near = ("ISETP.GE.AND P1, PT, R1, R2, PT", "HMMA.16816.F32 R1, R2, R3, R4", "@P0 BRA 0x10")
    far = ("HMMA.16816.F32 R1, R2, R3, R4", "@P0 BRA 0x40")
    rest = ("FADD R1, R1, R1", "@P0 BRA 0x60", "@P3 BRA 0x00", "EXIT")  # a loop without products, one around all
    code = sass.instructions(listing("MOV R1, R2", *near, *far, *rest))
    assert len(sass.loops(code)) == 4
    assert [one.address for one in sass.far_loop(code)] == [0x40, 0x50]


def test_a_wait_out_of_line_makes_no_loop() -> None:
    """Code behind the end that waits, and jumps back, as for tcgen05: what it jumps over is no loop."""
    code = sass.instructions(
        listing(
            "MOV R1, R2",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1], R2",  # 0x10: the loop begins
            "@!P2 BRA 0x70",
            "UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR9], tmem[UR4], idesc[UR5], !UPT",
            "@P0 BRA 0x10",
            "UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR9], tmem[UR4], idesc[UR5], !UPT",
            "EXIT",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1], R2",  # 0x70: waits
            "@!P2 BRA 0x70",
            "BRA 0x30",
        )
    )
    assert {one.address for one in sass.far_loop(code)} == {0x10, 0x20, 0x30, 0x40, 0x70, 0x80, 0x90}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HMMA.16816.F32.BF16", "matrix"), ("HGMMA.64x128x16.F32.BF16", "matrix"), ("UTCHMMA", "matrix"), ("MUFU.RCP", "mufu"),
        ("FFMA", "arithmetic"), ("FADD2", "arithmetic"), ("F2FP.BF16.F32.PACK_AB", "conversions"), ("HFMA2", "conversions"),
        ("LDSM.16.M88.4", "shared"), ("LDTM.16", "shared"), ("LDGSTS.E.BYPASS.128", "off_chip"), ("UTMALDG.2D", "off_chip"),
        ("LDGDEPBAR", "waits"), ("BAR.SYNC.DEFER_BLOCKING", "waits"), ("WARPGROUP.ARRIVE", "waits"), ("BRA.U", "branches"),
        ("FSETP.GEU.AND", "other"), ("FSEL", "other"), ("IMAD", "other"), ("LDC", "other"),
    ],
)  # fmt: skip
def test_instructions_are_told_apart(name: str, kind: str) -> None:
    assert sass.kind_of(sass.Instruction(0, "", name, "")) == kind


def test_every_gpu_has_its_rates() -> None:
    assert sass.RATES.keys() == resources.SHARED_MEMORY_KB.keys()


GRADIENT = sass.Work(((64, 128, 128), (64, 128, 128)), 128 * 128 * 2, itemsize=2, passes=1, n_warps=4)
BODY = (
    *("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], R24",) * 8,
    *("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR24].tnspB, R88",) * 8,
    *("LDGSTS.E.BYPASS.128 [R1], [R2.64]",) * 16,
    *("MUFU.EX2 R4, R4",) * 64,
    *("MUFU.RCP R4, R4",) * 32,
    *("FFMA R1, R2, R3, R4",) * 100,
    "FADD2 R1, R2, R3",
)
"""As gradient_kernel's at D = 128 on sm_90, with fewer addresses."""


def test_a_tile_takes_what_its_slowest_unit_takes() -> None:
    loop = sass.loop_of(listing(*BODY, "@P0 BRA 0x00", "EXIT"), 90, GRADIENT)
    assert loop is not None
    assert (loop.tiles, loop.matrix, loop.mufu, loop.reciprocals, loop.arithmetic) == (1, 16, 96, 32, 101)
    assert (loop.off_chip, loop.branches, loop.total) == (16, 1, 230)
    assert loop.matrix_clocks == 4 * 64 * 128 * 128 / 4096
    assert loop.mufu_clocks == 96 * 128 / 16
    assert loop.float_clocks == 102
    assert loop.issue_clocks == 230
    # Columns of both products, rows of the first, and a tile that arrives.
    assert loop.shared_clocks == (16 * 128 * 32 + 8 * 64 * 32 + 128 * 128 * 2) / 128
    assert (loop.predicted_clocks, loop.limit) == (1024, "matrix")


def test_an_unrolled_loop_counts_for_its_tiles() -> None:
    once, twice = (sass.loop_of(listing(*BODY * n, "@P0 BRA 0x00", "EXIT"), 90, GRADIENT) for n in (1, 2))
    assert once is not None
    assert twice is not None
    assert (once.tiles, twice.tiles) == (1, 2)
    assert twice.total == pytest.approx(once.total, abs=1)
    assert twice.predicted_clocks == once.predicted_clocks


def test_products_that_warps_share_are_no_second_tile() -> None:
    """The copies tell: they bring one tile."""
    work = sass.Work(((64, 32, 256), (64, 256, 32)), 32 * 256 * 2, itemsize=2, passes=1, n_warps=8)
    body = [*("HMMA.16816.F32.BF16 R1, R2, R3, R4",) * 128, *("LDGSTS.E.BYPASS.128 [R1], [R2.64]",) * 4]
    loop = sass.loop_of(listing(*body, "@P0 BRA 0x00", "EXIT"), 80, work)
    assert loop is not None
    assert (loop.tiles, loop.matrix) == (1, 128)
    assert loop.matrix_clocks == 2 * 4 * 64 * 32 * 256 / 2048


def test_a_loop_taken_apart_is_counted_between_its_products() -> None:
    work = sass.Work(((128, 64, 64),), (128 + 64) * 64 * 2, itemsize=2, passes=1, n_warps=8)
    steps = [*("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR28], R24",) * 4, "UIADD3 UR4, UR4, 0x1, URZ"] * 8
    loop = sass.loop_of(listing("MOV R1, R2", *steps[:-1], "EXIT"), 90, work)
    assert loop is not None
    assert (loop.tiles, loop.matrix, loop.total) == (8, 4, 5)
    assert sass.loop_of(listing("MOV R1, R2", "EXIT"), 90, work) is None


def test_three_products_of_tf32_are_three() -> None:
    tf32x3 = sass.Work(((128, 64, 32),), (128 + 64) * 32 * 4, itemsize=4, passes=3, n_warps=8)
    text = listing(*("UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR9], tmem[UR4], idesc[UR5], UPT",) * 12, "@P0 BRA 0x00", "EXIT")
    loop = sass.loop_of(text, 100, tf32x3)
    assert loop is not None
    assert (loop.tiles, loop.matrix) == (1, 12)
    assert loop.matrix_clocks == 3 * 2 * 128 * 64 * 32 / 4096


# ---- of a kernel as it is compiled -----------------------------------------------------------------------------------

LIMITS = {
    "softmax_kernel": {"total": 200, "reciprocals": 0},
    "gradient_kernel": {"total": 460, "reciprocals": 0},
}
"""At most so many instructions a thread and tile in the far loops, for sm_90, bfloat16, D = 128, one side."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[resources.Report]:
    """Compiled now, in a process without Triton's interpreter."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("sass") / "table.csv"
    selection = ("--targets", "90", "--dtypes", "bfloat16", "--dims", "128")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.resources", "--all", *selection, "--csv", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert path.exists(), done.stdout + done.stderr
    return resources.read_table(path)


@pytest.mark.compiles
@pytest.mark.parametrize("kernel", LIMITS)
def test_far_loops_stay_short(kernel: str, compiled: list[resources.Report]) -> None:
    loops = [report.loop for report in compiled if report.kernel == kernel]
    assert loops
    for loop in loops:
        assert loop is not None
        for column, most in LIMITS[kernel].items():
            assert getattr(loop, column) <= most, column


def test_the_committed_table_has_what_was_compiled(compiled: list[resources.Report]) -> None:
    committed = {row.source: row for row in resources.read_table(resources.TABLES / f"triton-{resources.triton_version()}.csv")}
    for row in compiled:
        known = committed.get(row.source, row)  # named after the first case that launches it; some serve all widths
        assert replace(known, D=row.D, dtype=row.dtype) == row


def test_the_counts_of_a_compiled_kernel_agree(compiled: list[resources.Report]) -> None:
    """An exponential a pair, by all threads; matrix instructions of one tile; kinds that add up to all."""
    for report in compiled:
        if report.kernel not in LIMITS:
            continue
        loop = report.loop
        assert loop is not None
        rows, columns, _, n_warps, _ = map(int, re.findall(r"\d+", report.tile))
        assert loop.mufu - loop.reciprocals == rows * columns / (32 * n_warps)
        assert loop.tiles == 1
        kinds = ("matrix", "mufu", "arithmetic", "conversions", "shared", "off_chip", "waits", "branches", "other")
        assert sum(getattr(loop, kind) for kind in kinds) == loop.total
        flops = (2 if report.kernel == "softmax_kernel" else 4) * rows * columns * 128
        assert loop.matrix_clocks == flops / 4096
        assert report.instructions == "wgmma"


def test_tables_keep_the_loops(compiled: list[resources.Report], tmp_path: Path) -> None:
    resources.write_table(compiled, tmp_path / "table.csv")
    assert resources.read_table(tmp_path / "table.csv") == compiled
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["limit"] = ""  # as a table of before has it
    assert not any(resources.Report.of(row).is_counted for row in rows if row["kernel"] in resources.MATRIX_KERNELS)
