"""The compiled CUDA half without a GPU: what the binary holds, and how calls fail that need a driver or a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from clop_kernels.backends import cuda, extension
from clop_kernels.backends.contract import LossOptions
from clop_kernels.groups import label_groups

INFO = extension.build_info()
if INFO is None:
    pytest.skip(f"{extension.obstacle()}", allow_module_level=True)
if INFO["cuda"] is None:
    pytest.skip("the extension was built without its CUDA half", allow_module_level=True)

CUDA_OBSTACLE: str | None = torch.ops.clop_native.cuda_obstacle(0)
without_gpu = pytest.mark.skipif(CUDA_OBSTACLE is None, reason="there is a GPU")


@without_gpu
def test_obstacle_names_what_is_missing() -> None:
    assert CUDA_OBSTACLE is not None
    assert re.search("NVIDIA driver|NVIDIA GPU|has no CUDA", CUDA_OBSTACLE)


DRIVER = """
#include <string.h>

int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* version) { return *version = VERSION, 0; }
static int missing() { return 999; }

int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, void* status) {
  if (strcmp(name, "cuInit") == 0) *function = cuInit;
  else if (strcmp(name, "cuDriverGetVersion") == 0) *function = cuDriverGetVersion;
  else if (strcmp(name, "cuGetProcAddress") == 0) *function = cuGetProcAddress_v2;
  else *function = missing;
  return 0;
}
"""
"""All of a driver that the CUDA runtime asks before it gives up."""


@without_gpu
@pytest.mark.parametrize(
    ("version", "init", "expected"),
    [
        (12020, 0, r"the NVIDIA driver supports CUDA 12\.2 and these kernels need CUDA \d+\.\d+: update the driver"),
        (99000, 100, "there is no NVIDIA GPU that this process can see"),
    ],
    ids=["driver too old", "no GPU"],
)
def test_what_a_driver_refuses_is_explained(version: int, init: int, expected: str, tmp_path: Path) -> None:
    """A stand-in for the driver says so, in a process of its own."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    driver = tmp_path / "libcuda.so.1"
    macros = [f"-DVERSION={version}", f"-DINIT={init}"]
    subprocess.run([compiler, "-w", "-shared", "-fPIC", *macros, str(tmp_path / "driver.c"), "-o", str(driver)], check=True)
    call = "import torch, clop_kernels._native; print(torch.ops.clop_native.cuda_obstacle(0))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    printed = subprocess.run([sys.executable, "-c", call], env=environment, check=True, capture_output=True, text=True).stdout
    assert re.match(expected, printed), printed


def test_a_call_with_cpu_tensors_is_an_exception() -> None:
    z, groups = torch.ones(4, 8), torch.empty((3, 0), dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="'clop_native::cuda_prologue' with arguments from the 'CPU' backend"):
        torch.ops.clop_native.cuda_prologue(z, z, groups, None, None, *cuda.arguments_of(LossOptions(n_views=2)))


@pytest.mark.parametrize(
    ("width", "of_softmax", "of_gradient"), [(16, "pair_softmax", "pair_gradient"), (300, "panel_softmax", "pair_coefficients")]
)
@pytest.mark.parametrize("n_left", [None, 3])
def test_the_backend_calls_what_is_registered(width: int, of_softmax: str, of_gradient: str, n_left: int | None) -> None:
    """Arguments are held to the schema first, and only then to the device."""
    options = LossOptions(0.1, positives="label", compute_dtype=torch.float32)
    zhat, table = torch.ones(8, width), label_groups(torch.zeros(8, dtype=torch.int64), 1, n_left).table()
    message = "'clop_native::cuda_{}' with arguments from the 'CPU' backend"
    with pytest.raises(NotImplementedError, match=message.format(of_softmax)):
        cuda.pair_softmax(zhat, table, n_left, options)
    with pytest.raises(NotImplementedError, match=message.format(of_gradient)):
        cuda.pair_gradient(zhat, table, n_left, torch.ones(4, 8), options)


@pytest.fixture(scope="module")
def resources_cuda() -> ModuleType:
    module: ModuleType = pytest.importorskip("benchmarks.resources_cuda", reason="there is no benchmarks/ beside these tests")
    if (reason := module.obstacle()) is not None:
        pytest.skip(reason)
    return module


def test_every_architecture_is_in_the_binary(resources_cuda: ModuleType) -> None:
    assert INFO is not None
    # By number: the cuobjdump of Triton 3.6 says sm_90 of sm_90a.
    number = re.compile(r"(\d+)[af]?(\+PTX)?")
    archs = [number.fullmatch(arch) for arch in INFO["cuda_archs"].split(";")]
    compiled = set(re.findall(r"\.sm_(\d+)[af]?\.cubin", resources_cuda.dump("--list-elf")))
    assert compiled == {arch[1] for arch in archs if arch}
    portable = set(re.findall(r"\.sm_(\d+)[af]?\.ptx", resources_cuda.dump("--list-ptx")))
    assert portable == {arch[1] for arch in archs if arch and arch[2]}


@pytest.mark.compiles
def test_no_kernel_spills_or_lacks_matrix_instructions(resources_cuda: ModuleType) -> None:
    reports = resources_cuda.reports()
    kernels = {report.kernel for report in reports}
    assert {"prologue_kernel", "softmax_kernel", "gradient_kernel", "panel_pairs_kernel", "given_coefficients_kernel"} <= kernels
    assert {(r.product, r.D, r.rows) for r in reports if r.kernel == "gradient_kernel"} == {
        *((product, width, 128) for product in ("bf16", "f16") for width in (64, 128, 256)),
        *((product, width, 128) for product in ("tf32 x1", "tf32 x2") for width in (64, 128)),
    }
    assert [(r.kernel, r.sm, fault) for r in reports for fault in r.faults()] == []
