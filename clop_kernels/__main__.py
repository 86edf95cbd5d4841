"""``python -m clop_kernels``: ``info`` says which backends can run here; ``warm-up`` compiles Triton's kernels ahead of time."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib import metadata
from typing import Any

import torch

from . import __version__
from .backends import BACKENDS, REFERENCE, extension, select

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def info() -> dict[str, Any]:
    """The versions, the devices, and for each device the reason why each backend cannot run there (None: it can)."""
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, SIMD {_simd()}"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    backends = {
        device: {b.name: b.obstacle(torch.device(device), torch.float32) for b in BACKENDS} | {REFERENCE: None}
        for device in devices
    }
    versions = {"clop_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda (of torch)": torch.version.cuda or "none", "triton": _version("triton")}
    built = extension.build_info()
    if built is None:
        versions["native extension"] = f"none: {extension.obstacle()}"
    else:
        cuda = (
            "no CUDA kernels"
            if built["cuda"] is None
            else f"CUDA {built['cuda']} kernels for architectures {built['cuda_archs']}"
        )
        versions["native extension"] = f"{cuda}; CPU kernels for {built['simd']}; compiled with {built['compiler']}"
    return {"versions": versions, "devices": devices, "backends": backends}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _simd() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _print(report: dict[str, Any]) -> None:
    summaries = {b.name: b.summary for b in BACKENDS} | {REFERENCE: "the definition, in N x N memory; runs only if named"}
    for name, version in report["versions"].items():
        print(f"{name:16} {version}")
    for device, description in report["devices"].items():
        print(f"\n{device:16} {description}")
        chosen = {str(dtype).removeprefix("torch."): select(None, torch.device(device), dtype).name for dtype in _DTYPES}
        for name, obstacle in report["backends"][device].items():
            state = "no " if obstacle else "yes"
            of_name = [dtype for dtype, backend in chosen.items() if backend == name]
            which = "" if len(of_name) == len(chosen) else f" in {', '.join(of_name)}"
            note = f": {obstacle}" if obstacle else f"  <- backend=None takes this{which}" if of_name else ""
            print(f"  {name:13} {state}  {summaries[name]}{note}")


_CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
"""The compute capabilities of the NVIDIA GPUs that Triton compiles matrix products for."""

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}

WARM_UP = """Compiles the Triton kernels of a training run ahead of time, several at once, into Triton's cache. The first
step then does not wait for them. The kernels depend only on the width and dtype of the embeddings, the dtype of the matrix
products, and the GPU: seven or eight kernels serve every loss, number of rows and set of labels, and temperatures or weights
that change. The embeddings are assumed to be contiguous.

example, for training under autocast:
  python -m clop_kernels warm-up --dims 128 768 --dtype float32 --compute-dtype bfloat16"""


def _warm_up(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        from triton import knobs
    except ModuleNotFoundError:
        parser.error("Triton is not installed: `pip install triton`, or install the Triton build that belongs to your torch")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set in the environment, and the interpreter compiles nothing: unset it")
    from .backends.triton.warm_up import Gpu, Training, warm_up

    if given.sm is not None:
        gpu = Gpu("cuda", given.sm, 32)
    else:
        try:
            gpu = Gpu.here()
        except RuntimeError as error:
            parser.error(f"there is no GPU here ({error}): name one, as in --sm 90 for compute capability 9.0")
    dtype = _NAMES[given.dtype]
    compute_dtype = dtype if given.compute_dtype is None else _NAMES[given.compute_dtype]
    trainings = [Training(width, dtype, compute_dtype, given.tf32) for width in given.dims]
    begin = time.perf_counter()
    n_done = 0
    try:
        for training, kernel, seconds in warm_up(trainings, gpu, given.jobs):
            n_done += 1
            print(f"{n_done:3}  {kernel:20} D = {training.width:<5} {seconds:5.1f} s", flush=True)
    except Exception as error:  # a compiler raises errors of many types, and has printed its own messages already
        parser.exit(1, f"Triton cannot compile for this GPU and dtype: {type(error).__name__}: {error}\n")
    print(f"{n_done} kernels are in Triton's cache, after {time.perf_counter() - begin:.0f} s")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m clop_kernels", description="Fused contrastive losses for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser("info", help="print versions, devices, the backends that can run here, and why others cannot")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command = commands.add_parser(
        "warm-up", help="compile Triton's kernels before the first training step", description=WARM_UP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = command.add_argument
    add("--dims", type=_positive, nargs="+", required=True, metavar="D", help="one or more widths of embeddings")
    add("--dtype", choices=_NAMES, default="float32", help="dtype of the embeddings (default: %(default)s)")
    add("--compute-dtype", choices=_NAMES, help="dtype of the matrix products, as under autocast (default: as --dtype)")
    add("--tf32", action="store_true", help='allow TF32, as torch.backends.cuda.matmul.fp32_precision = "tf32" does')
    add("--sm", type=int, choices=_CAPABILITIES, help="compute capability of the NVIDIA GPU, 90 for 9.0 (default: this GPU)")
    add("--jobs", type=_positive, default=os.cpu_count(), metavar="N", help="compilations at a time (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.command == "warm-up":
        _warm_up(given, command)
    elif given.json:
        print(json.dumps(info(), indent=2))
    else:
        _print(info())


if __name__ == "__main__":
    main()
