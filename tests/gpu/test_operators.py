"""The extension's operators on a GPU: the prologue against its definition, streams and graphs, calls that are wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clop_kernels.backends import cuda, extension
from clop_kernels.backends.contract import DISTANCES, EPS, LossOptions, unit_rows
from clop_kernels.groups import instance_groups, label_groups

from ..support.oracle import named_options

INFO = extension.build_info()
if INFO is None:
    pytest.skip(f"{extension.obstacle()}", allow_module_level=True)
if INFO["cuda"] is None:
    pytest.skip("the extension was built without its CUDA half", allow_module_level=True)

CUDA_OBSTACLE: str | None = torch.ops.clop_native.cuda_obstacle(0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA_OBSTACLE is not None, reason=f"the CUDA kernels cannot run here: {CUDA_OBSTACLE}"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SHAPES = (
    # (V, B, D): a row in the registers of 8, of 32 and of 256 threads, and beyond; aligned and not
    *((2, 33, width) for width in (1, 7, 8, 16, 31, 64, 65, 128, 129, 264, 520, 1000, 1024, 2048, 4096, 4100, 9000)),
    *((v, b, 40) for v, b in ((1, 1), (1, 257), (3, 5), (2, 1000))),
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "rows apart": lambda z: torch.cat([z, torch.zeros_like(z)], 1)[:, : z.shape[1]],
    "rows apart by one": lambda z: torch.cat([z, torch.zeros_like(z[:, :1])], 1)[:, :-1],
    "transposed": lambda z: z.T.contiguous().T,
    "every other column": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "misaligned": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape),
    "one row repeated": lambda z: z[:1].expand_as(z),
}

Prologue = tuple[Tensor, Tensor, Tensor]


def prologue(
    z: Tensor,
    order: Tensor | None,
    labels: Tensor | None,
    prototypes: Tensor | None,
    n_views: int,
    distance: int,
    compute_dtype: torch.dtype,
    normalize: bool = True,
    has_sides: bool = False,
) -> Prologue:
    options = LossOptions(
        n_views=n_views,
        positives="instance" if order is None else "label",
        distance=DISTANCES[distance],
        compute_dtype=compute_dtype,
        normalize=normalize,
        n_left=z.shape[0] // 2 if has_sides else None,
    )
    zhat = unit_rows(z, compute_dtype)
    arguments = table_of(z, order), labels, prototypes, *cuda.arguments_of(options)
    return zhat, *torch.ops.clop_native.cuda_prologue(z, zhat, *arguments)


def table_of(z: Tensor, order: Tensor | None) -> Tensor:
    """Groups of which the prologue reads the order alone."""
    return z.new_empty((3, 0), dtype=torch.int32) if order is None else order.repeat(3).view(3, -1)


def assert_right(
    actual: Prologue,
    z: Tensor,
    order: Tensor,
    labels: Tensor | None,
    prototypes: Tensor | None,
    distance: str,
    compute_dtype: torch.dtype,
) -> None:
    """The definition in float64. ``order`` is (N,) int64; distances are held to those of the rows as they were rounded."""
    zhat, norms, distances = (result.cpu() for result in actual)
    assert zhat.dtype == compute_dtype
    assert norms.dtype == distances.dtype == torch.float32
    rows = z.cpu().double()[order.cpu()]
    expected_norms = rows.norm(dim=1)
    torch.testing.assert_close(norms.double(), expected_norms, rtol=1e-6, atol=1e-30)  # squares below that underflow
    unit = rows / expected_norms.clamp(min=EPS).unsqueeze(1)
    limits = torch.finfo(compute_dtype)
    ulp = 4 * limits.eps if compute_dtype == torch.float32 else 0.51 * limits.eps
    allowed = ulp * unit.abs() + limits.smallest_normal * limits.eps
    assert ((zhat.double() - unit).abs() <= allowed).all()

    expected = torch.zeros_like(expected_norms)
    if labels is not None and prototypes is not None:
        label = labels.cpu()[order.cpu() % labels.shape[0]]
        rounded, target = zhat.double(), prototypes.cpu().double()[label.clamp(min=0)]
        if distance == "cosine":
            expected = 1 - (rounded * target).sum(1)
        else:
            expected = torch.linalg.vector_norm(rounded - target, ord=2 if distance == "euclidean" else 1, dim=1)
        expected = torch.where(label >= 0, expected, 0.0)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=2e-6)


def check(
    z: Tensor, n_views: int, *, ordered: bool = False, distance: str = "cosine", compute_dtype: torch.dtype | None = None
) -> None:
    """Random labels, a third of them absent, and prototypes; the rows in the order of instances or of labels."""
    n_instances = z.shape[0] // n_views
    generator = torch.Generator().manual_seed(z.shape[1])
    labels = torch.randint(-2, 4, (n_instances,), generator=generator).clamp(min=-1).to(z.device)
    prototypes = (torch.randn(4, z.shape[1], generator=generator) / z.shape[1] ** 0.5).to(z.device)
    groups = label_groups(labels, n_views) if ordered else instance_groups(n_instances, n_views, z.device)
    order = groups.order.int() if ordered else None
    compute_dtype = compute_dtype or z.dtype
    actual = prologue(z, order, labels, prototypes, n_views, DISTANCES.index(distance), compute_dtype)
    assert_right(actual, z, groups.order, labels, prototypes, distance, compute_dtype)


def random_rows(n_rows: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Tensor:
    return torch.randn(n_rows, width).mul(torch.rand(n_rows, 1) + 0.2).to(device, dtype)


# ---- numbers: on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, ordered: bool) -> None:
    n_views, n_instances, width = shape
    check(random_rows(n_views * n_instances, width, dtype), n_views, ordered=ordered, distance=DISTANCES[sum(shape) % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_dtypes(dtype: torch.dtype, compute_dtype: torch.dtype, distance: str) -> None:
    for width in (100, 128):
        check(random_rows(66, width, dtype), 2, distance=distance, compute_dtype=compute_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [64, 520])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, width: int, dtype: torch.dtype) -> None:
    check(LAYOUTS[layout](random_rows(66, width, dtype)), 2)


def test_without_labels_or_prototypes() -> None:
    z = random_rows(66, 24)
    order = instance_groups(33, 2, z.device).order
    labels = torch.zeros(33, dtype=torch.int64, device="cuda")
    for given in (None, labels):
        assert_right(prologue(z, None, given, None, 2, 0, z.dtype), z, order, given, None, "cosine", z.dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-39, 1e-30, 1e-13, 1e-11, 1e18, 1e30, 1e37])
def test_norms_near_the_ends_of_the_range(scale: float) -> None:
    z = random_rows(66, 40)
    z[::3] *= scale
    check(z, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [40, 41])
def test_what_is_not_finite_stays_visible(value: float, width: int) -> None:
    z = random_rows(8, width)
    z[5, 3] = value
    labels = torch.full((8,), -1, device="cuda")
    for prototypes in (None, torch.ones(2, width, device="cuda")):
        zhat, norms, distances = prologue(z, None, labels, prototypes, 1, 0, z.dtype)
        assert zhat.isnan().any(1).nonzero().flatten().tolist() == [5]
        assert distances.isnan().nonzero().flatten().tolist() == [5]
        assert (~norms.isfinite()).nonzero().flatten().tolist() == [5]


def test_empty() -> None:
    zhat, norms, distances = prologue(torch.empty(0, 5, device="cuda"), None, None, None, 2, 0, torch.float16)
    assert zhat.shape == (0, 5)
    assert norms.shape == distances.shape == (0,)


def test_offsets_beyond_31_bits() -> None:
    n_rows, width = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("10 GB of GPU memory are not free")
    z = torch.empty(n_rows, width, dtype=torch.float16, device="cuda").normal_()
    zhat, norms, _ = prologue(z, None, None, None, 1, 0, z.dtype)
    last = slice(n_rows - 8, n_rows)
    assert_right((zhat[last], norms[last], norms.new_zeros(8)), z[last], torch.arange(8), None, None, "cosine", z.dtype)


def test_same_bits_from_run_to_run() -> None:
    z = random_rows(1000, 300)
    labels = torch.zeros(500, dtype=torch.int64, device="cuda")
    runs = [prologue(z, None, labels, z[:1].contiguous(), 2, 1, torch.bfloat16) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_current_stream() -> None:
    """On a stream of its own behind much work, it must read what that work leaves, and must not wait for the host."""
    z = random_rows(4096, 256)
    work = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        written = z + 0 * work[:, :256]
        actual = prologue(written, None, None, None, 1, 0, z.dtype)
        torch.cuda.current_stream().synchronize()
    assert_right(actual, z, torch.arange(4096), None, None, "cosine", z.dtype)


def test_cuda_graph() -> None:
    z = random_rows(66, 40)
    prologue(z, None, None, None, 2, 0, z.dtype)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = prologue(z, None, None, None, 2, 0, z.dtype)
    z.copy_(random_rows(66, 40))
    graph.replay()
    assert_right(actual, z, instance_groups(33, 2, z.device).order, None, None, "cosine", z.dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_second_device() -> None:
    check(random_rows(66, 40, device="cuda:1"), 2)
    assert torch.cuda.current_device() == 0
    z, labels = random_rows(66, 40, device="cuda:1"), torch.zeros(33, dtype=torch.int64, device="cuda:0")
    with pytest.raises(RuntimeError, match=r"labels: expected .* on the GPU of the embeddings"):
        prologue(z, None, labels, None, 2, 0, z.dtype)


def test_bad_input() -> None:
    z = random_rows(6, 4)
    labels, prototypes = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.ones(2, 4, device="cuda")
    order = torch.arange(6, dtype=torch.int32, device="cuda")
    zhat = torch.empty_like(z)
    none, table = table_of(z, None), table_of(z, order)
    by_label: dict[str, object] = {"positives": 1}
    wrong: list[tuple[str, tuple[object, ...], dict[str, object]]] = [
        ("embeddings", (z[0], zhat, none, None, None), {}),
        ("embeddings", (z.double(), zhat, none, None, None), {}),
        ("zhat", (z, zhat.double(), none, None, None), {}),
        ("zhat", (z, zhat.cpu(), none, None, None), {}),
        ("zhat", (z, zhat[1:], none, None, None), {}),
        ("zhat", (z, LAYOUTS["rows apart by one"](zhat), none, None, None), {}),
        ("zhat", (z, LAYOUTS["transposed"](zhat), none, None, None), {}),
        ("zhat", (z, LAYOUTS["misaligned"](zhat), none, None, None), {}),
        ("n_views", (z, zhat, none, None, None), {"n_views": 0}),
        ("n_views", (z, zhat, none, None, None), {"n_views": 4}),
        ("distance", (z, zhat, none, None, None), {"distance": 3}),
        ("compute_dtype", (z, zhat, none, None, None), {"compute_dtype": torch.float64}),
        ("groups", (z, zhat, none, None, None), by_label),
        ("groups", (z, zhat, table, None, None), {}),
        ("groups", (z, zhat, table.long(), None, None), by_label),
        ("groups", (z, zhat, table.cpu(), None, None), by_label),
        ("labels", (z, zhat, none, labels[:2], prototypes), {}),
        ("labels", (z, zhat, none, None, prototypes), {}),
        ("prototypes", (z, zhat, none, labels, prototypes.T.contiguous().T), {}),
        ("prototypes", (z, zhat, none, labels, prototypes[:0]), {}),
        ("temperature", (z, zhat, none, None, None), {"temperature_tensor": torch.ones(1, device="cuda")}),
        ("prototype_weight", (z, zhat, none, None, None), {"prototype_weight_tensor": torch.ones(())}),
    ]
    right: dict[str, object] = named_options(LossOptions(n_views=2))
    right |= {"temperature_tensor": None, "prototype_weight_tensor": None, "is_tf32": False}
    for name, tensors, options in wrong:
        with pytest.raises(RuntimeError, match=f"clop_native: {name}: expected"):
            torch.ops.clop_native.cuda_prologue(*tensors, *(right | options).values())


@pytest.mark.parametrize("width", [7, 64, 300, 4100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_as_they_are_and_of_two_sides(width: int, dtype: torch.dtype) -> None:
    z = random_rows(66, width, dtype) * 30
    zhat, norms, _ = prologue(z, None, None, None, 2, 0, dtype, normalize=False, has_sides=True)
    assert torch.equal(zhat, z)
    torch.testing.assert_close(norms.double(), z.double().norm(dim=1), rtol=1e-6, atol=0.0)
    unit, _, _ = prologue(z, None, None, None, 2, 0, dtype, has_sides=True)
    torch.testing.assert_close(unit.double().norm(dim=1), torch.ones(66, device="cuda").double(), rtol=4e-3, atol=0.0)
    assert (torch.nn.functional.cosine_similarity(unit.double(), z.double()) > 0.999).all()


def test_bad_sides() -> None:
    z, labels = random_rows(6, 4), torch.zeros(6, dtype=torch.int64, device="cuda")
    table = label_groups(labels, 1, 2).table()
    none = table[:, :0].contiguous()
    for groups, n_views, n_left in ((none, 2, 2), (none, 1, 3), (none, 2, 7), (table, 2, 2), (table, 1, -2), (table, 1, 7)):
        positives = "instance" if groups is none else "label"
        options = cuda.arguments_of(LossOptions(n_views=n_views, positives=positives, n_left=n_left))
        with pytest.raises(RuntimeError, match="clop_native: n_left: expected"):
            torch.ops.clop_native.cuda_forward(z, unit_rows(z, z.dtype), groups, None, None, *options)
    for n_views, n_left in ((1, 7), (1, -2), (2, 3)):
        options = cuda.arguments_of(LossOptions(n_views=n_views, n_left=n_left))
        with pytest.raises(RuntimeError, match="clop_native: n_left: expected"):
            torch.ops.clop_native.cuda_groups(labels, *options)


def test_bad_pairs() -> None:
    z, labels = random_rows(6, 8), torch.zeros(6, dtype=torch.int64, device="cuda")
    table, given = label_groups(labels, 1, 2).table(), torch.ones(4, 6, device="cuda")
    wrong: list[tuple[str, Tensor, Tensor, Tensor, int]] = [
        ("groups", z, given, table[:, :0].contiguous(), 2),
        ("groups", z, given, table.long(), 2),
        ("n_left", z, given, table, 0),
        ("n_left", z, given, table, 6),
        ("n_left", z, given, table, 7),
        ("n_left", z, given, table, -2),
        ("zhat", LAYOUTS["misaligned"](z), given, table, 2),
        ("given", z, given[:3], table, 2),
        ("given", z, given.double(), table, 2),
    ]
    for name, zhat, coefficients, groups, n_left in wrong:
        options = cuda.arguments_of(LossOptions().of_pairs(n_left))
        for operator in (torch.ops.clop_native.cuda_pair_gradient, torch.ops.clop_native.cuda_pair_coefficients):
            with pytest.raises(RuntimeError, match=f"clop_native: {name}: expected"):
                operator(zhat, groups, coefficients, *options)
        if name != "given":
            with pytest.raises(RuntimeError, match=f"clop_native: {name}: expected"):
                torch.ops.clop_native.cuda_pair_softmax(zhat, groups, *options)


def test_obstacle_of_a_device_that_is_not_there() -> None:
    assert "no GPU 99" in torch.ops.clop_native.cuda_obstacle(99)
