"""``python -m clop_kernels info``: versions, devices, and which backends can run here."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any

import torch

from . import __version__
from .backends import BACKENDS, REFERENCE, native, select

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def info() -> dict[str, Any]:
    """Versions, devices, and for each device and backend why it cannot run (None: it can)."""
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
    built = native.build_info()
    if built is None:
        versions["native extension"] = f"none: {native.obstacle()}"
    else:
        cuda = "no CUDA" if built["cuda"] is None else f"CUDA {built['cuda']} for {built['cuda_archs']}"
        versions["native extension"] = f"{cuda}; SIMD {built['simd']}; {built['compiler']}"
    return {"versions": versions, "devices": devices, "backends": backends}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _simd() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _print(report: dict[str, Any]) -> None:
    summaries = {b.name: b.summary for b in BACKENDS} | {REFERENCE: "the definition, N x N memory; only by name"}
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m clop_kernels", description="Fused contrastive losses for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser("info", help="print versions, devices, which backends can run, and why the others cannot")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    report = info()
    if parser.parse_args(arguments).json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


if __name__ == "__main__":
    main()
