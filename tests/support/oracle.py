"""Problems, and the comparison of a backend with the float64 reference on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import clop_kernels
from clop_kernels import compat, functional, ops
from clop_kernels.backends import BACKENDS
from clop_kernels.backends.contract import DISTANCES, POSITIVES, REDUCTIONS, LossOptions, Needs
from clop_kernels.backends.extension import native_options
from clop_kernels.groups import label_groups

RUNNABLE = tuple(
    b.name
    for b in BACKENDS
    if b.obstacle(torch.device("cpu"), torch.float32) is None and (b.devices is None or "cpu" in b.devices)
)
"""The backends that run on this machine's CPU: each must pass every test of the contract."""

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
"""Relative errors of float32 against the float64 reference (design, section 3)."""

PLAIN_FACTOR = 4.0
"""Where the problem itself is ill-conditioned: no more than this times the error of the plain loss in the same dtype."""

PLAIN_ORDERS = 8
"""Orders of the coordinates that the plain loss's error is taken from."""


OPTIONS: dict[str, Any] = {
    "n_views": 2, "positives": "instance", "prototype_weight": 0.7, "distance": "cosine", "reduction": "mean", "normalize": True,
}  # fmt: skip
INNER_OPTIONS = {"n_left", "negatives_only"}


@dataclass(frozen=True)
class Problem:
    """A loss and its float64 inputs, each of which float32 holds exactly: what differs is the computation alone.

    The options are clop_loss's, or with ``n_left`` or ``negatives_only`` among them those of LossOptions in
    clop_kernels/backends/contract.py, in any combination, whether a public function asks for it or not.
    """

    embeddings: Tensor
    labels: Tensor | None = None
    prototypes: Tensor | None = None
    temperature: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(torch.tensor(self.temperature, dtype=torch.float32)))

    def solve(self, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The loss and its gradients, in float64 on the CPU; a fixed random upstream gradient where the loss is not a scalar."""
        z = self.embeddings.detach().to(device, dtype, copy=True).requires_grad_()
        precise = torch.promote_types(dtype, torch.float32)
        tau = torch.tensor(self.temperature, dtype=precise, device=device, requires_grad=True)
        inputs = {"embeddings": z, "temperature": tau}
        prototypes = self.prototypes
        if prototypes is not None:
            prototypes = inputs["prototypes"] = prototypes.detach().to(device, precise, copy=True).requires_grad_()
        labels = None if self.labels is None else self.labels.to(device)
        loss = self.loss(z, labels, prototypes, tau, backend)
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)) if loss.dim() else torch.ones(())
        grads = torch.autograd.grad(loss, list(inputs.values()), upstream.to(loss))
        return {"loss": loss.detach().cpu().double()} | {k: g.cpu().double() for k, g in zip(inputs, grads, strict=True)}

    def loss(self, z: Tensor, labels: Tensor | None, prototypes: Tensor | None, tau: Tensor, backend: str) -> Tensor:
        if INNER_OPTIONS.isdisjoint(self.options):
            return clop_kernels.clop_loss(z, labels, prototypes, temperature=tau, backend=backend, **self.options)
        options = LossOptions(temperature=tau, compute_dtype=ops.compute_dtype(z), **OPTIONS | self.options)
        return functional._loss(z, labels, prototypes, options, backend, None)

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options=self.options | options)


def random_problem(
    n_views: int = 2,
    n_instances: int = 33,
    width: int = 24,
    *,
    n_classes: int = 4,
    temperature: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Random rows of different norms, a third of them unlabelled, random prototypes."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_views * n_instances, width, dtype=torch.float64, generator=generator)
    z = z * torch.rand(z.shape[0], 1, dtype=torch.float64, generator=generator).add(0.2)
    labels = torch.randint(0, n_classes, (n_instances,), generator=generator)
    labels[torch.rand(n_instances, generator=generator) < 0.33] = -1
    prototypes = torch.randn(n_classes, width, dtype=torch.float64, generator=generator) / width**0.5
    options = {"n_views": n_views, "prototype_weight": 0.7} | options
    return Problem(z.float().double(), labels, prototypes.float().double(), temperature, options)


def op_call(backend: str, reduction: str, dtype: torch.dtype) -> ops.Call:
    """A call with gradients of all that can have some."""
    problem = random_problem(2, 5, 5)
    assert problem.prototypes is not None
    tau = torch.tensor(0.2, dtype=dtype, requires_grad=True)
    options = LossOptions(tau, torch.tensor(0.7, dtype=dtype), 2, "label", "euclidean", reduction, dtype)
    z, prototypes = problem.embeddings.to(dtype).requires_grad_(), problem.prototypes.to(dtype).requires_grad_()
    return ops.Call(z, problem.labels, prototypes, options, backend)


def named_options(options: LossOptions) -> dict[str, Any]:
    """The options as a compiled operator takes them, by name."""
    return dict(zip(options._fields, native_options(options), strict=True))


def negated(x: Tensor) -> Tensor:
    """x, as a tensor whose memory holds -x: what an imaginary part may be."""
    return torch.imag(torch.complex(torch.zeros_like(x), -x).conj())


def assert_negations_are_seen(backend: str) -> None:
    problem = random_problem(2, 4, 5)
    assert problem.prototypes is not None
    z, tau = problem.embeddings.float(), torch.tensor(0.3)
    found = []
    for put_off in (negated, torch.clone):
        rows, prototypes = put_off(z).requires_grad_(), put_off(problem.prototypes.float())
        loss = problem.loss(rows, problem.labels, prototypes, put_off(tau), backend)
        found.append((loss, *torch.autograd.grad(loss, rows, put_off(torch.tensor(0.5)))))
    assert negated(z).is_neg()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def two_sided_problem(
    n_left: int, n_right: int, width: int, *, labelled: bool, temperature: float = 0.1, seed: int = 0, **options: Any
) -> Problem:
    """Left and right rows of different norms; row i of one side belongs to row i of the other, or as labels of 4 classes say."""
    rows = random_problem(1, n_left + n_right, width, temperature=temperature, seed=seed)
    assert labelled or n_left == n_right
    options |= {"n_left": n_left} | ({"positives": "label", "n_views": 1} if labelled else {"n_views": 2})
    return replace(rows, labels=rows.labels if labelled else None, prototypes=None, options=options)


def negatives_problem(n_rows: int, width: int, *, temperature: float = 0.1, seed: int = 0, **options: Any) -> Problem:
    """As of negative_logsumexp: a third of the rows is without a label."""
    rows = random_problem(1, n_rows, width, temperature=temperature, seed=seed)
    defaults = {"negatives_only": True, "positives": "label", "n_views": 1, "reduction": "none"}
    return replace(rows, prototypes=None, options=defaults | options)


def near_duplicates(n_views: int, n_instances: int, width: int, noise: float, temperature: float, seed: int = 0) -> Problem:
    """Views that differ by relative ``noise``: positives dominate the softmax, and small differences are all there is."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n_instances, width, dtype=torch.float64, generator=generator)
    views = [base + noise * torch.randn(base.shape, dtype=torch.float64, generator=generator) for _ in range(n_views)]
    return Problem(torch.cat(views).float().double(), temperature=temperature, options={"n_views": n_views})


def with_nan_between_rows(zhat: Tensor) -> Tensor:
    """``zhat`` itself; where its rows are apart, what lies between them must not matter. Autograd takes no notice."""
    (n_rows, width), (pitch, _) = zhat.shape, zhat.stride()
    if n_rows > 1 and pitch > width:
        zhat.data.as_strided((n_rows - 1, pitch - width), (pitch, 1), zhat.storage_offset() + width).fill_(torch.nan)
    return zhat


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Frobenius norm of the error over that of the expected value, or over ``floor`` if that is larger. NaN stays NaN."""
    return float((actual.double() - expected.double()).norm() / max(float(expected.norm()), floor, 1e-300))


def plain_errors(problem: Problem, expected: dict[str, Tensor], floor: float = 0.0) -> dict[str, float]:
    """Relative errors of the plain loss in float32: root mean squares over orders of the coordinates.

    An order changes nothing but the rounding; in a single one a single number, such as the loss, may be exact by chance.
    """
    squares = dict.fromkeys(expected, 0.0)
    for seed in range(PLAIN_ORDERS):
        order = torch.randperm(problem.embeddings.shape[1], generator=torch.Generator().manual_seed(seed))
        prototypes = problem.prototypes
        shuffled = replace(
            problem,
            embeddings=problem.embeddings[:, order],
            prototypes=None if prototypes is None else prototypes[:, order],
        )
        for name, value in shuffled.solve("reference", torch.float32).items():
            by_column = name in ("embeddings", "prototypes")
            squares[name] += relative_error(value, expected[name][:, order] if by_column else expected[name], floor) ** 2
    return {name: (square / PLAIN_ORDERS) ** 0.5 for name, square in squares.items()}


def turned(problem: Problem, seed: int) -> Problem:
    """The problem in other coordinates, reflected: similarities are the same, and what rounding does to them is not."""
    width = problem.embeddings.shape[1]
    v = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v /= v.norm()

    def reflect(x: Tensor) -> Tensor:
        return (x - 2 * (x @ v)[:, None] * v).float().double()

    prototypes = problem.prototypes
    return replace(
        problem, embeddings=reflect(problem.embeddings), prototypes=None if prototypes is None else reflect(prototypes)
    )


def errors_of_number(problem: Problem, name: str, backends: tuple[str, str], dtype: torch.dtype, device: str) -> list[float]:
    """Relative errors of two backends in one number, the loss or the temperature's gradient: root mean squares over turns.

    Large terms cancel to it, so that in a single turn either backend may meet it by chance.
    """
    squares = [0.0, 0.0]
    for seed in range(PLAIN_ORDERS):
        other = turned(problem, seed)
        expected = other.solve("reference", torch.float64, device)[name]
        for index, backend in enumerate(backends):
            squares[index] += relative_error(other.solve(backend, dtype, device)[name], expected) ** 2
    return [(square / PLAIN_ORDERS) ** 0.5 for square in squares]


CUT_OFF = ((0.75, 3, 0), (1.75, 1, 0), (1.75, 3, 2), (2.0, 1, 2))
"""(product, n, what is added): matrix units add n such products, and zeros, to 2^24, whose neighbours are 2 apart.

Those of an A100 cut each term off at multiples of 1, and the sum at multiples of 2. tests/host/simt.cpp does the same.
"""


def assert_accurate(problem: Problem, backend: str, ill_conditioned: bool = False, floor: float = 0.0) -> None:
    """float32 on ``backend`` against float64 on the reference: within the tolerances above.

    Where the problem is ``ill_conditioned``, and for the temperature's gradient, one number to which large terms of both
    signs cancel in any problem, PLAIN_FACTOR times the plain loss's own error is allowed too. ``floor``: of
    :func:`relative_error`, for gradients that are zero but for rounding.
    """
    assert_close_to_reference(problem, problem.solve(backend, torch.float32), ill_conditioned, floor)


def assert_close_to_reference(
    problem: Problem, actual: dict[str, Tensor], ill_conditioned: bool = False, floor: float = 0.0
) -> None:
    """As :func:`assert_accurate`, of a solution in float32."""
    expected = problem.solve("reference", torch.float64)
    plain: dict[str, float] | None = None
    for name, value in expected.items():
        error = relative_error(actual[name], value, floor)
        allowed = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        if not error <= allowed and (ill_conditioned or name == "temperature"):
            plain = plain or plain_errors(problem, expected, floor)
            allowed = max(allowed, PLAIN_FACTOR * plain[name])
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def assert_exact(problem: Problem, backend: str) -> None:
    """float64 on ``backend`` against float64 on the reference, but for rounding."""
    expected, actual = (problem.solve(name, torch.float64) for name in ("reference", backend))
    for name, value in expected.items():
        assert value.isfinite().all(), name
        # The floor: a gradient of nothing but rounding, 1e-16 times the 1/tau of its terms (and 1/tau^2 for tau itself).
        error = relative_error(actual[name], value, 1e-3 / problem.temperature ** (2 if name == "temperature" else 1))
        assert error <= 1e-10, f"{name}: relative error {error:.2e}"


def assert_as_good_as_plain(problem: Problem, backend: str, dtype: torch.dtype, floor: float = 0.0) -> None:
    """``dtype`` on ``backend``: no more than twice the error of the plain loss in the same dtype."""
    expected = problem.solve("reference", torch.float64)
    plain, actual = problem.solve("reference", dtype), problem.solve(backend, dtype)
    for name, value in expected.items():
        # The temperature's gradient is one number, which plain PyTorch may meet by luck: half a unit of the dtype is allowed.
        slack = torch.finfo(dtype).eps / 2 if name == "temperature" else 1e-4
        error, allowed = relative_error(actual[name], value, floor), 2 * relative_error(plain[name], value, floor) + slack
        if not error <= allowed and value.dim() == 0:  # plain PyTorch may meet one number by luck: both are averaged
            error, of_plain = errors_of_number(problem, name, (backend, "reference"), dtype, "cpu")
            allowed = 2 * of_plain + slack
        assert error <= allowed, f"{name}: {error:.2e}, plain PyTorch allows {allowed:.2e}"


UNIT_OF_TF32 = 2.0**-10


def assert_accurate_on_gpu(
    problem: Problem, backend: str, dtype: torch.dtype, record: Callable[[str, object], None], ill_conditioned: bool = False
) -> None:
    """float32 at "highest" within the tolerances above; anything else within twice the error of plain PyTorch on the same GPU.

    Where the problem is ``ill_conditioned`` it is four times. Half a unit is allowed beside that: of the operands of TF32, and
    in half precision of the temperature's gradient, since M is rounded where plain code may round nothing.
    """
    factor = PLAIN_FACTOR if ill_conditioned else 2.0
    expected = problem.solve("reference", torch.float64, "cuda")
    plain, actual = problem.solve("reference", dtype, "cuda"), problem.solve(backend, dtype, "cuda")
    is_exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    half_unit = UNIT_OF_TF32 / 2 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, value in expected.items():
        error, of_plain = relative_error(actual[name], value), relative_error(plain[name], value)
        of_unit = half_unit if name == "temperature" or dtype == torch.float32 else 1e-4
        if dtype == torch.float32 and name in ("loss", "temperature"):
            of_unit /= 8  # rounded operands cancel in one number; cut off, they do not
        slack = GRADIENT_TOLERANCE if is_exact else of_unit
        if is_exact and not ill_conditioned and name != "temperature":
            allowed = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        else:
            allowed = factor * of_plain + slack
            if not error <= allowed and name in ("loss", "temperature"):
                error, of_plain = errors_of_number(problem, name, (backend, "reference"), dtype, "cuda")
                allowed = factor * of_plain + slack
        record(name, f"{error:.2e} (plain PyTorch {of_plain:.2e})")
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def solve_below_the_operator(
    module: Any, problem: Problem, temperature: float | Tensor, weight: float | Tensor = 0.7, device: str = "cpu"
) -> dict[str, Tensor]:
    """The loss and its gradients by a backend's own two functions, which a tensor of a number reaches as it is.

    A call of the operator hands a tensor of the CPU over as a float.
    """
    numbers: dict[str, Any] = {"temperature": temperature, "prototype_weight": weight, "compute_dtype": torch.float32}
    on_device = {name: x.to(device) for name, x in numbers.items() if isinstance(x, Tensor)}
    options = LossOptions(**OPTIONS | problem.options | numbers | on_device)
    z, labels, prototypes = problem.embeddings.float().to(device), problem.labels, problem.prototypes
    labels = None if labels is None else labels.to(device)
    prototypes = None if prototypes is None else prototypes.float().to(device)
    loss, residuals = module.forward(z, labels, prototypes, options)
    upstream = torch.linspace(-1, 1, loss.numel()) if loss.dim() else torch.ones(())
    grads = module.backward(upstream.to(device), z, residuals, labels, prototypes, options, Needs(True, True, True))
    found = {"loss": loss, **grads._asdict()}
    return {name: value.cpu() for name, value in found.items() if value is not None}


def shaped_problem(shape: tuple[int, int], width: int, temperature: float = 0.1) -> Problem:
    """(V, B) rows. The options vary with the shape: among them all are met."""
    n = shape[0] * shape[1] + width
    options: dict[str, Any] = {"positives": POSITIVES[n % 2], "distance": DISTANCES[n % 3], "reduction": REDUCTIONS[n // 3 % 3]}
    return random_problem(*shape, width, temperature=temperature, **options)


def _every_other_number(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], -1)[..., 0]


def _transposed_and_misaligned(x: Tensor) -> Tensor:
    columns = x.t()
    return torch.cat([x.flatten()[:1], columns.flatten()])[1:].view(columns.shape).t()


def _one_row_repeated(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.dim() else x


LOSSES: dict[str, Callable[..., Tensor]] = {
    "clop": lambda z, labels, prototypes, **options: clop_kernels.clop_loss(
        z, labels, prototypes, distance="euclidean", reduction="none", **options
    ),
    "supcon": lambda z, labels, _, **options: clop_kernels.supcon_loss(z, labels, n_views=2, reduction="none", **options),
    "clip": lambda z, labels, _, **options: clop_kernels.clip_loss(
        z[: len(labels)], z[len(labels) :], labels, labels.flip(0), reduction="none", **options
    ),
    "negatives": lambda z, labels, _, **options: clop_kernels.negative_logsumexp(z[: len(labels)], labels, **options),
}


def assert_layouts_do_not_matter(loss_name: str, backend: str, device: str = "cpu", rounding: float = 0.0) -> None:
    """Tensors of any strides, anywhere in memory, have the loss and the gradients of contiguous copies.

    To the bit, or within ``rounding`` where the compiler of a kernel may order its sums by the strides. The width is odd, for
    the same reason: rows that may be loaded 16 bytes at a time are summed in another order than others.
    """
    problem = random_problem(2, 9, 7)
    assert problem.labels is not None
    assert problem.prototypes is not None
    tau, upstream = torch.tensor(problem.temperature), torch.linspace(-1, 1, 18)
    rows, *others = (x.to(device) for x in (problem.embeddings.float(), problem.labels, problem.prototypes, tau, upstream))

    def solve(rows: Tensor, labels: Tensor, prototypes: Tensor, tau: Tensor, upstream: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (rows, prototypes, tau)]
        loss = LOSSES[loss_name](inputs[0], labels, inputs[1], temperature=inputs[2], backend=backend)
        grads = torch.autograd.grad(loss, inputs, upstream[: len(loss)], allow_unused=True, materialize_grads=True)
        return [loss.detach(), *grads]

    def copies(*inputs: Tensor) -> list[Tensor]:
        rows, labels, prototypes, *rest = (x.clone(memory_format=torch.contiguous_format) for x in inputs)
        return [rows, labels, prototypes.float(), *rest]  # nor does the dtype of prototypes matter, which float32 holds

    views = {
        "every other number": map(_every_other_number, (rows, *others)),
        "transposed and misaligned": map(_transposed_and_misaligned, (rows, *others)),
        # Apart: rows that are all equal have nothing for labels to tell apart.
        "one row repeated": (_one_row_repeated(rows), *others),
        "one label repeated": (rows, *map(_one_row_repeated, others)),
    }
    for layout, given in views.items():
        inputs = list(given)
        for name, actual, expected in zip(
            ("loss", "embeddings", "prototypes", "temperature"), solve(*inputs), solve(*copies(*inputs)), strict=True
        ):
            torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rounding, atol=rounding, msg=f"{name}: {layout}")


def assert_float16_saturates_and_overflow_shows(backend: str) -> None:
    """A row of zeros gets the largest gradient there is; too large an upstream gradient must show, for a gradient scaler."""
    z = torch.randn(8, 4).half()
    z[3] = 0.0
    z.requires_grad_()
    loss = clop_kernels.ntxent_loss(z, backend=backend)
    (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert grad.isfinite().all()
    assert grad[3].abs().max() == torch.finfo(torch.float16).max
    (grad,) = torch.autograd.grad(loss * 1e7, z)
    assert not grad[0].isfinite().all()


def assert_pairs_accurate(
    backend: str,
    dtype: torch.dtype,
    n_rows: int,
    n_left: int | None,
    width: int,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    n_classes: int = 4,
    device: str = "cpu",
    slack: float = 4.0,
    gradient_tolerance: float = 0.0,
) -> None:
    """The two passes over pairs of a backend on operands of ``dtype`` against a dense matrix in float64 of the same operands.

    Allowed are ``slack`` roundings of the largest S in the accumulate dtype; for the gradient ``gradient_tolerance``, if more.
    ``n_classes`` 0: no row of a side has positives on the other one.
    """
    options = LossOptions(temperature, positives="label", compute_dtype=dtype, normalize=normalize)
    generator = torch.Generator().manual_seed(n_rows + width)
    z = torch.randn(n_rows, width, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, max(n_classes, 1), (n_rows,), generator=generator)
    labels[torch.rand(n_rows, generator=generator) < (0.33 if n_classes else 2.0)] = -1
    groups = label_groups(labels, 1, n_left)
    zhat = (z / z.norm(dim=1, keepdim=True) if normalize else z)[groups.order].to(dtype)
    module: Any = next(b for b in BACKENDS if b.name == backend).load()

    n = n_rows if n_left is None else n_left
    s = zhat[:n].double() @ (zhat if n_left is None else zhat[n:]).double().T * math.log2(math.e) / float(temperature)
    column = torch.arange(0 if n_left is None else n, n_rows)
    pairs = column != torch.arange(n)[:, None]
    positives = pairs & (groups.starts[:n, None] <= column) & (column < groups.ends[:n, None])
    negatives = pairs & ~positives
    on_device = zhat.to(device), groups.table().to(device), n_left
    tolerance = slack * torch.finfo(options.accumulate_dtype).eps * (16 + float(s.abs().amax()))
    options = options._replace(temperature=temperature.to(device) if isinstance(temperature, Tensor) else temperature)
    softmax = [x.cpu().double() for x in module.pair_softmax(*on_device, options)]
    assert all(x.shape == (n,) for x in softmax)
    shift, negative, positive, positive_logits = softmax
    for actual, mask in ((negative, negatives), (positive, positives)):
        expected = torch.where(mask, torch.exp2(s - shift[:, None]), 0.0).sum(1)
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-30)
    torch.testing.assert_close(positive_logits, torch.where(positives, s, 0.0).sum(1), rtol=tolerance, atol=tolerance * n_rows)

    one_shift = bool((shift == shift[0]).all())
    of_columns = shift if n_left is None else shift[0].expand(n_rows - n) if one_shift else s.amax(0)
    precise = options.accumulate_dtype
    shifts = torch.cat([shift, of_columns[: n_rows - n]]).to(precise)
    of_row, of_column = torch.exp2(s - shifts[:n, None].double()), torch.exp2(s - shifts[column].double())
    totals = torch.cat([torch.where(pairs, of_row, 0.0).sum(1), of_column.sum(0)])[:n_rows]
    a, b, c = torch.rand(3, n_rows, dtype=torch.float64, generator=generator)
    totals.clamp_(min=2.0**-60)  # a row alone has none, and where one row's shift is the columns' too, theirs may be tiny
    coefficients = torch.stack([a / totals, b / totals, c, shifts]).to(precise)
    grad = module.pair_gradient(*on_device, coefficients.to(device), options)
    a, b, c, _ = coefficients.double()
    m = torch.where(positives, of_row * b[:n, None] + of_column * b[column] - (c[:n, None] + c[column]), 0.0)
    m += torch.where(negatives, of_row * a[:n, None] + of_column * a[column], 0.0)
    assert grad.shape == (n, width)
    assert grad.dtype == precise
    assert relative_error(grad.cpu(), m @ zhat[column].double()) <= max(tolerance, gradient_tolerance)


DROP_INS: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    "lightly": (compat.lightly.NTXentLoss, lambda z: (z, z.flip(0))),
    "supcontrast": (compat.supcontrast.SupConLoss, lambda z: (z.unsqueeze(1), torch.arange(len(z)) % 3)),
    "metric_learning.SupConLoss": (compat.pytorch_metric_learning.SupConLoss, lambda z: (z, torch.arange(len(z)) % 3)),
    "metric_learning.NTXentLoss": (compat.pytorch_metric_learning.NTXentLoss, lambda z: (z, torch.arange(len(z)) % 3)),
    "open_clip": (compat.open_clip.ClipLoss, lambda z: (z, z.flip(0), 5.0)),
    "clop": (lambda **options: compat.clop.CLOPLoss(3, 8, **options), lambda z: (z, z.flip(0), torch.arange(len(z)) % 3)),
}
"""The classes of other libraries: (constructor, unit rows (N, 8) -> arguments of a call)."""
