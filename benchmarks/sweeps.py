"""Which cases to measure: products of sizes and settings, and named presets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .problems import Case, Mode


@dataclass(frozen=True)
class Sweep:
    """Every combination of its values is one case.

    Attributes:
        repeats: Rounds per case. Each round times every provider once.
        seconds: No further round of a case begins that would end later than this.
        providers: Names of providers. None means all that can run.
    """

    N: tuple[int, ...]
    D: tuple[int, ...] = (128,)
    problems: tuple[str, ...] = ("ntxent",)
    dtypes: tuple[str, ...] = ("float32",)
    temperatures: tuple[float, ...] = (0.1,)
    modes: tuple[Mode, ...] = ("forward+backward",)
    repeats: int = 5
    seconds: float = 60.0
    providers: tuple[str, ...] | None = None

    def cases(self) -> Iterator[Case]:
        """N varies fastest."""
        values = (self.problems, self.dtypes, self.temperatures, self.modes, self.D, self.N)
        for problem, dtype, temperature, mode, width, n_rows in itertools.product(*values):
            yield Case(n_rows, width, problem, dtype, mode, temperature)


_BFLOAT16 = ("bfloat16",)
_NOTHING_COMPILED_PER_SHAPE = ("eager", "metric-learning", "lightly", "cuda", "triton", "cpu", "tiled")

_FUSED = ("cuda", "triton")

PRESETS = {
    "smoke": (
        Sweep((64, 128, 256), (32,), repeats=3, providers=_NOTHING_COMPILED_PER_SHAPE),
        Sweep((128,), (16, 64), ("supcon", "clip"), repeats=2, providers=_NOTHING_COMPILED_PER_SHAPE),
        Sweep((128,), (32,), modes=("forward", "backward"), repeats=2, providers=_NOTHING_COMPILED_PER_SHAPE),
    ),
    "quick": (
        Sweep((1024, 2048, 4096, 8192), seconds=30),
        Sweep((4096,), problems=("supcon", "clip"), seconds=20),
    ),
    "readme": (
        Sweep((8192,), repeats=7, seconds=120),
        Sweep((1024, 2048, 4096, 16384, 32768, 65536)),
        Sweep((8192,), modes=("forward", "backward")),
        Sweep((8192,), problems=("supcon", "clip")),
        Sweep((8192,), (32, 64, 256, 512, 1024), seconds=45),
    ),
    "gpu": (
        Sweep((65536, 32768), dtypes=_BFLOAT16, repeats=7, seconds=8),
        Sweep((65536,), (256, 768), dtypes=_BFLOAT16, repeats=7, seconds=8, providers=_FUSED),
        Sweep((65536,), (128, 256), dtypes=_BFLOAT16, modes=("forward",), repeats=7, seconds=5, providers=_FUSED),
        Sweep((2048, 8192), dtypes=_BFLOAT16, repeats=20, seconds=5),
        Sweep((65536,), (768,), ("clip",), _BFLOAT16, repeats=5, seconds=8, providers=_FUSED),
        Sweep((1048576,), dtypes=_BFLOAT16, repeats=1, providers=_FUSED),
        Sweep((8192,), repeats=10, seconds=5),
        Sweep((16384,), (512,), ("clip",), _BFLOAT16, repeats=7, seconds=5),
        Sweep((16384,), problems=("supcon",), dtypes=_BFLOAT16, repeats=7, seconds=5, providers=("eager", *_FUSED)),
        Sweep((8192,), (100,), dtypes=_BFLOAT16, repeats=10, seconds=5, providers=_FUSED),
    ),
    "gpu-peers": (
        Sweep((65536,), (768,), ("clip", "sigmoid"), _BFLOAT16, repeats=5, seconds=8, providers=("siglip-kernel", *_FUSED)),
        Sweep((8192,), dtypes=_BFLOAT16, repeats=7, seconds=5, providers=("lightly", "metric-learning", *_FUSED)),
        Sweep((8192,), (768,), ("sigmoid",), _BFLOAT16, repeats=5, seconds=8, providers=("eager", "siglip-kernel")),
    ),
}
"""smoke: for continuous integration. quick: for a first look. readme: for benchmarks/results/cpu. gpu: for
benchmarks.gpu_check, the cases of the targets first. gpu-peers: the same with other libraries."""
