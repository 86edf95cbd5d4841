"""What only a GPU can show, beside the contract, whose settings of a GPU are in tests/contract/settings.py.

``record_property`` keeps the figures behind a verdict, for ``python -m benchmarks.gpu_check``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import clop_kernels
from clop_kernels import backends
from clop_kernels.backends.contract import POSITIVES, LossOptions
from clop_kernels.groups import label_groups

from ..support import ROOT
from ..support.oracle import (
    CUT_OFF,
    DROP_INS,
    GRADIENT_TOLERANCE,
    assert_accurate_on_gpu,
    random_problem,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

Record = Callable[[str, object], None]

alone = pytest.mark.alone
"""It needs the GPU to itself: ``python -m benchmarks.gpu_check`` runs it after all that runs side by side."""


def runnable(name: str) -> str:
    chosen = next(b for b in backends.BACKENDS if b.name == name)
    reason = chosen.obstacle(torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(f"{chosen.name} cannot run on this GPU: {reason}")
    return chosen.name


@pytest.fixture(params=["cuda", "triton", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    return runnable(request.param)


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backends whose kernels are this project's."""
    return runnable(request.param)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    with synchronisation_is_an_error():
        yield


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this is a prototype, when it has already set it
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matrix_units_cut_off_no_more_than_the_harness(dtype: torch.dtype, record_property: Record) -> None:
    """The float32 bounds are proved on a CPU with the units of an A100: units that kept less could break them."""
    pytest.importorskip("triton")
    from ..support.mma import add_product_kernel

    a = torch.ones(16, 16, dtype=dtype, device="cuda")
    for product, n_products, least in CUT_OFF:
        b = torch.zeros_like(a)
        b[:n_products] = product
        for sign in (1, -1):
            c = torch.full((16, 16), sign * 2.0**24, device="cuda")
            add_product_kernel[(1,)](a, sign * b, c, num_warps=1)
            added = sign * (c.double() - sign * 2.0**24)
            record_property(f"{n_products} x {product}, sign {sign}", added.unique().tolist())
            assert (added == added[0, 0]).all()
            assert least <= added[0, 0] <= n_products * product


@alone
@pytest.mark.parametrize("width", [64, 100, 128])
def test_float32_of_many_rows(width: int, kernels: str, record_property: Record) -> None:
    """A sum over thousands of columns on matrix units, which cut off where others round, must not drift."""
    assert_accurate_on_gpu(random_problem(2, 6600, width, positives="label"), kernels, torch.float32, record_property)


def test_matmul_precision(matmul_precision: str, kernels: str, record_property: Record) -> None:
    for width in (32, 128, 200):
        assert_accurate_on_gpu(random_problem(2, 300, width), kernels, torch.float32, record_property)


@pytest.mark.parametrize("width", [64, 128, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_and_triton_agree(width: int, dtype: torch.dtype, record_property: Record) -> None:
    """Closer to each other than the dtype's rounding leaves them to the truth."""
    for problem in (random_problem(2, 2000, width), random_problem(2, 150, width, positives="label", temperature=0.05)):
        results = [problem.solve(runnable(name), dtype, "cuda") for name in ("cuda", "triton")]
        for name, value in results[0].items():
            error = relative_error(results[1][name], value)
            record_property(name, f"{error:.2e}")
            assert error <= (2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("name", DROP_INS)
def test_classes_of_other_libraries(name: str, backend: str) -> None:
    make, arguments = DROP_INS[name]
    expected, actual = make(backend="reference"), make(backend=backend).cuda()
    actual.load_state_dict(expected.state_dict())
    z = torch.nn.functional.normalize(torch.randn(90, 8, dtype=torch.float64), dim=1).requires_grad_()
    on_gpu = z.detach().float().cuda().requires_grad_()
    losses = expected(*arguments(z)), actual(*(x.cuda() if isinstance(x, Tensor) else x for x in arguments(on_gpu)))
    assert relative_error(losses[1].cpu(), losses[0]) < GRADIENT_TOLERANCE
    grads = torch.autograd.grad(losses[0], z)[0], torch.autograd.grad(losses[1], on_gpu)[0]
    assert relative_error(grads[1].cpu(), grads[0]) < GRADIENT_TOLERANCE


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_131072_rows(dtype: torch.dtype, backend: str, record_property: Record) -> None:
    """Some rows of the loss against float64."""
    z = torch.randn(131072, 64, device="cuda").to(dtype).requires_grad_()
    loss = clop_kernels.ntxent_loss(z, reduction="none", backend=backend)
    loss.sum().backward()
    assert_rows_agree(loss, z, [0, 1, 65535, 65536, 131071], record_property)
    assert z.grad is not None
    assert z.grad.isfinite().all()


@alone
def test_offsets_past_2_to_the_31(kernels: str, record_property: Record) -> None:
    n_rows, width = 2**20 + 128, 2048
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    z = torch.randn(n_rows, width, device="cuda", dtype=torch.bfloat16)
    loss = clop_kernels.ntxent_loss(z, reduction="none", backend=kernels)
    assert_rows_agree(loss, z, [0, n_rows // 2, n_rows - 1], record_property)


def assert_rows_agree(loss: Tensor, z: Tensor, rows: list[int], record: Record) -> None:
    """NT-Xent of two views at temperature 0.1, row by row in float64 on the rows as the dtype rounds them."""
    n_rows = z.shape[0]
    unit = torch.nn.functional.normalize(z.detach().float(), dim=1).to(z.dtype)
    for row in rows:
        s = torch.cat([part.double() @ unit[row].double() for part in unit.split(65536)]) / 0.1
        positive = s[(row + n_rows // 2) % n_rows]
        s[row] = -torch.inf
        error = abs(float(loss.detach()[row] - (s.logsumexp(0) - positive)))
        record(f"row {row}", f"{error:.2e}")
        assert error < (1e-4 if z.dtype == torch.float32 else 2e-2)


# ---- how it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("width", [128, 512])
def test_the_same_call_gives_the_same_bits(positives: str, width: int, kernels: str) -> None:
    problem = random_problem(2, 3000, width, positives=positives)
    first, second = (problem.solve(kernels, torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("no_synchronisation")
def test_no_host_synchronisation(backend: str) -> None:
    z = torch.randn(64, 16, device="cuda", requires_grad=True)
    labels = torch.zeros(32, dtype=torch.int64, device="cuda")
    tau = torch.full((), 0.1, device="cuda", requires_grad=True)
    c = torch.ones(3, 16, device="cuda", requires_grad=True)
    for positives in POSITIVES:
        clop_kernels.clop_loss(z, labels, c, temperature=tau, positives=positives, backend=backend).backward()
        clop_kernels.clop_loss(z, labels, c, positives=positives, backend=backend).backward()
    of_rows = labels.repeat(2)
    clop_kernels.clip_loss(z, 2 * z, temperature=tau, normalize=False, backend=backend).backward()
    clop_kernels.clip_loss(z, z[:9], of_rows, of_rows[:9], backend=backend).backward()
    clop_kernels.negative_logsumexp(z, of_rows, backend=backend).sum().backward()


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("width", [64, 512])
def test_pairs_alone_do_not_synchronise(width: int, kernels: str) -> None:
    module: Any = next(b for b in backends.BACKENDS if b.name == kernels).load()
    zhat = torch.nn.functional.normalize(torch.randn(300, width, device="cuda"), dim=1)
    for temperature in (0.1, torch.full((), 0.1, device="cuda")):
        options = LossOptions(temperature, positives="label", compute_dtype=torch.float32)
        for n_left in (None, 100):
            groups = label_groups(torch.zeros(300, dtype=torch.int64, device="cuda"), 1, n_left).table()
            module.pair_softmax(zhat, groups, n_left, options)
            module.pair_gradient(zhat, groups, n_left, torch.ones(4, 300, device="cuda"), options)


@pytest.mark.parametrize("name", [name for name in DROP_INS if name != "metric_learning.NTXentLoss"])  # it enumerates its pairs
def test_classes_of_other_libraries_do_not_synchronise(name: str, backend: str) -> None:
    make, arguments = DROP_INS[name]
    criterion, z = make(backend=backend).cuda(), torch.randn(12, 8, device="cuda", requires_grad=True)
    given = [x.cuda() if isinstance(x, Tensor) else x for x in arguments(z)]
    with synchronisation_is_an_error():
        criterion(*given).backward()


@pytest.mark.parametrize("positives", POSITIVES)
def test_cuda_graph_replays_on_new_input(positives: str, backend: str) -> None:
    z = torch.randn(600, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 5, (300,), device="cuda")
    c = torch.randn(5, 64, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = clop_kernels.clop_loss(z, labels, c, positives=positives, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            z.copy_(torch.randn_like(z))
            labels.copy_(torch.randint_like(labels, 5))
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected)


@alone
def test_runs_on_the_current_stream(backend: str) -> None:
    """The kernels must wait for what their own stream still does, and for nothing else."""
    z = torch.randn(256, 64, device="cuda")
    expected = clop_kernels.ntxent_loss(2 * z + 1, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = 2 * z + 1
        actual = clop_kernels.ntxent_loss(later, backend=backend)
    stream.synchronize()
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_the_embeddings(backend: str) -> None:
    z = torch.randn(256, 64, device="cuda:1", requires_grad=True)
    loss = clop_kernels.ntxent_loss(z, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.cpu(), clop_kernels.ntxent_loss(z.detach().cpu()), rtol=1e-5, atol=1e-5)


@alone
@pytest.mark.parametrize("positives", POSITIVES)
def test_at_most_six_launches(positives: str, kernels: str, record_property: Record) -> None:
    z = torch.randn(2048, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels, c = torch.randint(0, 9, (1024,), device="cuda"), torch.randn(9, 128, device="cuda")

    def step() -> None:
        torch.autograd.grad(clop_kernels.clop_loss(z, labels, c, positives=positives, backend=kernels), z)

    step()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's own
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if "CUDA" in str(event.device_type)]
    record_property("launched", ", ".join(launched))
    assert 0 < len([name for name in launched if "Memset" not in name]) <= 6 + 1  # autograd makes the upstream gradient, 1


@alone
@pytest.mark.parametrize("width", [128, 512])
def test_memory_grows_with_n(width: int, backend: str, record_property: Record) -> None:
    """N x N in bfloat16 would take 8.6 GB."""
    z = torch.randn(65536, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    clop_kernels.ntxent_loss(z, backend=backend).backward()
    z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clop_kernels.ntxent_loss(z, backend=backend).backward()
    extra = torch.cuda.max_memory_allocated() - before
    record_property("extra MB", round(extra / 1e6, 1))
    constant = {"triton": 33.6e6, "cuda": 2 * 4096**2 * 4}.get(backend, 5 * 4096**2 * 4)  # tiles, or panels
    assert extra <= constant + 3 * z.numel() * 4 + 20 * z.shape[0] * 4


def test_autocast_and_compile(backend: str) -> None:
    z = torch.randn(512, 64, device="cuda", requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return clop_kernels.ntxent_loss(2 * z, backend=backend)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        (expected,) = torch.autograd.grad(loss(z), z)
        (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(z), z)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


BAD_INPUT = """
import torch, clop_kernels
z, c, labels = torch.randn(6, 4, device="cuda"), torch.randn(2, 4, device="cuda"), torch.tensor([0, 1, {label}], device="cuda")
numbers = {{"temperature": {temperature}, "prototype_weight": {weight}}}
clop_kernels.clop_loss(z, labels, c, **numbers, backend="{backend}")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(("label", "temperature", "weight", "message"), [
    (2, "0.1", "1.0", "labels holds a value"),
    (-2, "0.1", "1.0", "labels holds a value"),
    (1, "torch.tensor(-1.0, device='cuda')", "1.0", "temperature is not a positive finite number"),
    (1, "0.1", "torch.tensor(-1.0, device='cuda')", "prototype_weight is not a finite number of at least 0"),
    (1, "0.1", "torch.tensor(1.0, device='cuda')", None),
])  # fmt: skip
def test_bad_values_are_asserted_on_the_device(
    label: int, temperature: str, weight: str, message: str | None, kernels: str
) -> None:
    """In a process of its own: after an assertion a device is lost to its process."""
    script = BAD_INPUT.format(label=label, temperature=temperature, weight=weight, backend=kernels)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (message is None), done.stderr
    if message is not None:
        assert message in done.stdout + done.stderr


SANITIZED = """
import sys, torch, clop_kernels
for width, dtype in ((37, torch.bfloat16), (64, torch.float32), (300, torch.float16)):
    z = torch.randn(3 * 43, width, device="cuda").to(dtype).requires_grad_()
    labels, c = torch.randint(-1, 4, (43,), device="cuda"), torch.randn(4, width, device="cuda", requires_grad=True)
    tau = torch.tensor(0.05, device="cuda", requires_grad=True)
    for positives in ("instance", "label"):
        loss = clop_kernels.clop_loss(z, labels, c, n_views=3, temperature=tau, positives=positives, backend=sys.argv[1])
        loss.backward()
    clop_kernels.clip_loss(z[:43], z[43:], labels, labels.repeat(2), temperature=tau, backend=sys.argv[1]).backward()
    clop_kernels.clip_loss(z[:64], z[64:128], normalize=False, backend=sys.argv[1]).backward()
    clop_kernels.negative_logsumexp(z, labels.repeat(3), backend=sys.argv[1]).sum().backward()
torch.cuda.synchronize()
"""


@alone
@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str, kernels: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    command: list[Any] = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, kernels]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
