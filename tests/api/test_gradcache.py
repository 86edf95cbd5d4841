"""Gradient caching: the gradients of the whole batch, from an encoder that never sees more than a sub-batch."""

from __future__ import annotations

import collections
import copy
import importlib.util
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

import clop_kernels
from clop_kernels.gradcache import encode

N, WIDTH, HIDDEN, D = 23, 12, 33, 8
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def make_encoder(*extra: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), *extra, nn.GELU(), nn.Linear(HIDDEN, D)).to(dtype)


def in_sub_batches(encoder: nn.Module, *inputs: Tensor, sub_batch: int) -> Any:
    """What ``encode`` does, on one graph that holds every activation: the same rows, masks and statistics, plainly."""
    z = tuple(torch.cat([encoder(rows) for rows in x.split(sub_batch)]) for x in inputs)
    return z if len(z) > 1 else z[0]


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    """The loss and the gradients that its backward pass leaves; every parameter must have one."""
    parameters = [p for module in modules for p in module.parameters()]
    for p in parameters:
        p.grad = None
    loss.backward()
    assert all(p.grad is not None for p in parameters)
    return [loss.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert e.norm() > 0
        assert (a - e).norm() <= tolerance * e.norm()


class Recorder(nn.Module):
    """An identity that notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.with_graph: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        self.with_graph.append(torch.is_grad_enabled())
        return x


# ---- equal to the whole batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sub_batch", [1, 7, N, 100])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_views_of_one_encoder(dtype: torch.dtype, sub_batch: int) -> None:
    encoder = make_encoder(dtype=dtype)
    views = torch.randn(3, N, WIDTH, dtype=dtype)
    labels = torch.randint(-1, 4, (N,))
    criterion = clop_kernels.CLOPLoss(4, D, learnable_temperature=True, dtype=dtype)
    expected = gradients(criterion(*map(encoder, views), labels=labels), encoder, criterion)
    actual = gradients(criterion(*encode(encoder, *views, sub_batch=sub_batch), labels=labels), encoder, criterion)
    assert_equal(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_two_encoders_and_sides_of_different_lengths(dtype: torch.dtype) -> None:
    images, texts = make_encoder(dtype=dtype), make_encoder(nn.LayerNorm(HIDDEN), dtype=dtype)
    x, y = torch.randn(N, WIDTH, dtype=dtype), torch.randn(N + 6, WIDTH, dtype=dtype)
    labels = torch.arange(N) % 5, torch.arange(N + 6) % 5
    tau = nn.Parameter(torch.tensor(0.1, dtype=dtype))
    temperature = nn.ParameterList([tau])
    expected = gradients(clop_kernels.clip_loss(images(x), texts(y), *labels, temperature=tau), images, texts, temperature)
    left, right = encode(images, x, sub_batch=4), encode(texts, y, sub_batch=9)
    actual = gradients(clop_kernels.clip_loss(left, right, *labels, temperature=tau), images, texts, temperature)
    assert_equal(actual, expected, TOLERANCES[dtype])


def test_training_follows_that_on_whole_batches() -> None:
    encoder = make_encoder()
    batches = torch.randn(10, 2, N, WIDTH, dtype=torch.float64)
    criterion = clop_kernels.NTXentLoss(0.5)

    def train(embed: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        model = copy.deepcopy(encoder)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for views in batches:
            optimizer.zero_grad()
            criterion(*embed(model, *views)).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = train(lambda model, *views: tuple(map(model, views)))
    actual = train(lambda model, *views: encode(model, *views, sub_batch=5))
    assert_equal(actual, expected, 1e-9)
    assert (expected[0] - next(encoder.parameters())).abs().max() > 1e-2  # it did move


def test_gradients_add_to_those_that_are_there() -> None:
    encoder = make_encoder()
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    encode(encoder, x, sub_batch=5).sum().backward()
    once = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encode(encoder, x, sub_batch=7).sum().backward()
    assert_equal([p.grad for p in encoder.parameters() if p.grad is not None], [2 * g for g in once])


# ---- memory -----------------------------------------------------------------------------------------------------------


def test_activations_live_for_one_sub_batch() -> None:
    alive: list[weakref.ref[Tensor]] = []
    with_graph = []

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) <= 7
            assert not any(ref() is not None for ref in alive)  # of the sub-batches before, nothing is left
            x = x.sin()  # saved for backward by the next product
            alive.append(weakref.ref(x))
            with_graph.append(torch.is_grad_enabled())
            return x * x

    encoder = make_encoder(Hidden())
    saved: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    views = torch.randn(2, N, WIDTH, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        z_1, z_2 = encode(encoder, *views, sub_batch=7)
    assert with_graph == 8 * [False]
    assert [x.data_ptr() for x in saved] == [view.data_ptr() for view in views]  # nothing but the inputs
    clop_kernels.ntxent_loss(torch.cat([z_1, z_2])).backward()
    assert with_graph == 8 * [False] + 8 * [True]


# ---- randomness, state, precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_both_passes_draw_the_same_dropout_masks(device: str) -> None:
    recorder = Recorder()
    encoder = make_encoder(nn.Dropout(0.5), recorder).to(device)
    views = torch.randn(2, N, WIDTH, dtype=torch.float64, device=device)
    state = torch.random.fork_rng()

    def run(embed: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        z_1, z_2 = embed(encoder, *views, sub_batch=7)
        torch.rand(3, device=device)  # whoever draws in between
        result = gradients(clop_kernels.ntxent_loss(torch.cat([z_1, z_2])), encoder)
        return result, [torch.rand(4), torch.rand(4, device=device)]

    with state:
        (expected, drawn), (actual, drawn_after) = run(in_sub_batches), run(encode)
    assert_equal(actual, expected)
    assert_equal(drawn_after, drawn, tolerance=0)
    reference, first, second = recorder.seen[:8], recorder.seen[8:16], recorder.seen[16:]
    assert recorder.with_graph[8:] == 8 * [False] + 8 * [True]
    assert all(0.2 < float((x == 0).double().mean()) < 0.8 for x in reference)
    assert_equal(first, reference, tolerance=0)
    assert_equal(second, reference, tolerance=0)
    assert not torch.equal(reference[0] == 0, reference[4] == 0)  # each view its own


@pytest.mark.parametrize("stateful", ["batch norm", "spectral norm"])
def test_buffers_move_once_a_step(stateful: str) -> None:
    if stateful == "batch norm":
        encoder = make_encoder(nn.BatchNorm1d(HIDDEN))
    else:  # its power iteration changes a buffer, and thereby the weights, in every forward pass
        encoder = make_encoder(nn.utils.parametrizations.spectral_norm(nn.Linear(HIDDEN, HIDDEN)))
    twin, before = copy.deepcopy(encoder), copy.deepcopy(encoder)
    views = torch.randn(2, N, WIDTH, dtype=torch.float64)

    def step(model: nn.Module, embed: Callable[..., Any]) -> list[Tensor]:
        z = torch.cat(embed(model, *views, sub_batch=8))
        model(views[0])  # whoever else moves them in between
        return gradients(clop_kernels.ntxent_loss(z), model)

    for _ in range(2):
        assert_equal(step(encoder, encode), step(twin, in_sub_batches))
        assert_equal([x.double() for x in encoder.buffers()], [x.double() for x in twin.buffers()])
    assert not any(torch.equal(x, y) for x, y in zip(encoder.buffers(), before.buffers(), strict=True))


def test_a_buffer_that_the_encoder_replaces() -> None:
    class Counter(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return x * self.calls

    encoder, twin = make_encoder(Counter()), make_encoder(Counter())
    twin.load_state_dict(encoder.state_dict())
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    actual = gradients(encode(encoder, x, sub_batch=8).square().sum(), encoder)
    assert_equal(actual, gradients(in_sub_batches(twin, x, sub_batch=8).square().sum(), twin))
    assert list(encoder.buffers()) == list(twin.buffers()) == [3]


def test_a_buffer_that_cannot_be_written() -> None:
    encoder = make_encoder()
    encoder.register_buffer("mask", torch.ones(1, 1).expand(3, 4))
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    expected = gradients(encoder(x).square().sum(), encoder)
    assert_equal(gradients(encode(encoder, x, sub_batch=8).square().sum(), encoder), expected)


def test_buffers_that_another_graph_has_saved() -> None:
    encoder = make_encoder(nn.BatchNorm1d(HIDDEN)).eval()  # its backward needs the running statistics
    x, y = torch.randn(2, N, WIDTH, dtype=torch.float64)
    loss = encoder(y).square().mean() + encode(encoder, x, sub_batch=8).square().mean()
    assert_equal(gradients(loss, encoder), gradients(encoder(y).square().mean() + encoder(x).square().mean(), encoder))


def test_autocast_holds_for_both_passes() -> None:
    recorder = Recorder()
    encoder = make_encoder(recorder, dtype=torch.float32)
    views, other = torch.randn(2, N, WIDTH), torch.randn(N, WIDTH)

    def run(embed: Callable[..., Any]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z_1, z_2 = embed(encoder, *views, sub_batch=8)
            assert z_1.dtype == torch.bfloat16
            # The encoder once more, in the same region: weights cast in the pass without a graph must not serve here.
            loss = clop_kernels.ntxent_loss(torch.cat([z_1, z_2])) + encoder(other).float().square().mean()
        return gradients(loss, encoder)  # outside, as is usual

    expected = run(in_sub_batches)
    assert_equal(run(encode), expected, 1e-2)  # bfloat16: sums over sub-batches round differently
    assert all(x.dtype == torch.bfloat16 for x in recorder.seen)
    in_float32 = gradients(clop_kernels.ntxent_loss(torch.cat([encoder(view) for view in views])), encoder)
    assert recorder.seen[-1].dtype == torch.float32
    assert len(in_float32) == len(expected)


def test_gradient_scaler() -> None:
    encoder = make_encoder(dtype=torch.float32)
    x = torch.randn(N, WIDTH)
    plain = gradients(encode(encoder, x, sub_batch=8).square().mean(), encoder)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaled = gradients(scaler.scale(encode(encoder, x, sub_batch=8).square().mean()), encoder)
    assert_equal(scaled, [1024 * g for g in plain], tolerance=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's, wherever its input has a graph
def test_compiled_encoders_and_compiled_steps() -> None:
    encoder = make_encoder()
    views = torch.randn(2, N, WIDTH, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        return clop_kernels.ntxent_loss(torch.cat(encode(model, *(2 * views), sub_batch=8)))

    expected = gradients(loss(encoder), encoder)
    compiled: Any = torch.compile(encoder, backend="eager")
    assert_equal(gradients(loss(compiled), encoder), expected)
    assert_equal(gradients(torch.compile(loss, backend="eager")(encoder), encoder), expected)


# ---- inputs and encoders ----------------------------------------------------------------------------------------------


class TwoArguments(nn.Module):
    """Takes what text encoders take: a tensor, a mask, and things that are not to be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_encoder()

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor, mode: str = "sum") -> Tensor:
        assert mode == "mean"
        assert scale.dim() == 0
        return self.layers(x.masked_fill(mask[:, None], 0.0) * scale)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.layers(x)


ARGUMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "tuple": lambda x, mask, scale: (x, mask, scale, "mean"),
    "list": lambda x, mask, scale: [x, mask, scale, "mean"],
    "dict": lambda x, mask, scale: {"mode": "mean", "x": x, "mask": mask, "scale": scale},
    "UserDict": lambda x, mask, scale: collections.UserDict(x=x, mode="mean", scale=scale, mask=mask),
}


@pytest.mark.parametrize("form", ARGUMENTS)
@pytest.mark.parametrize("frozen", [False, True])
def test_forms_of_inputs_and_their_own_gradients(form: str, frozen: bool) -> None:
    encoder = TwoArguments().requires_grad_(not frozen)
    leaves = [torch.randn(N, WIDTH, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in leaves]
    other = torch.randn(4, WIDTH, dtype=torch.float64)
    mask, other_mask = torch.rand(N) < 0.3, torch.rand(4) < 0.3
    weights = torch.randn(N + 4, D, dtype=torch.float64)

    def run(cached: bool) -> list[Tensor]:
        x = leaves[0].exp()  # a graph before the encoder
        if cached:
            form_of = ARGUMENTS[form]
            z = encode(encoder, form_of(x, mask, leaves[1]), form_of(other, other_mask, leaves[1]), sub_batch=3)
        else:
            z = (encoder(x, mask, leaves[1], "mean"), encoder(other, other_mask, leaves[1], "mean"))
        parameters = [p for p in (*leaves, *encoder.parameters()) if p.requires_grad]
        for p in parameters:
            p.grad = None
        (torch.cat(z) * weights).sum().backward()
        return [p.grad for p in parameters if p.grad is not None]

    expected = run(False)
    assert len(expected) == (2 if frozen else 6)
    assert_equal(run(True), expected)


@pytest.mark.parametrize("kind", ["method", "function", "function and method"])
def test_encoders_that_are_not_modules(kind: str) -> None:
    model = TwoArguments()
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    expected = gradients(model.layers(x).square().sum(), model)
    if kind == "method":
        z = encode(model.encode_text, x, sub_batch=8)
    elif kind == "function":
        z = encode(lambda x: model.encode_text(x), x, sub_batch=8, module=model)
    else:
        z = encode(model.layers.forward, x, sub_batch=8, module=model)
    assert_equal(gradients(z.square().sum(), model), expected)


@pytest.mark.parametrize("why", ["frozen", "no_grad", "inference_mode"])
def test_one_pass_where_nothing_needs_a_gradient(why: str) -> None:
    recorder = Recorder()
    encoder = make_encoder(recorder).requires_grad_(why != "frozen")
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    contexts = {"frozen": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts[why]():
        z = encode(encoder, x, sub_batch=8)
    assert not z.requires_grad
    assert [len(rows) for rows in recorder.seen] == [8, 8, 7]
    torch.testing.assert_close(z.clone(), encoder(x).detach(), rtol=1e-12, atol=1e-12)


def test_a_frozen_encoder_beside_one_that_learns() -> None:
    recorder = Recorder()
    frozen, encoder = make_encoder(recorder).requires_grad_(False), make_encoder()
    x, y = torch.randn(2, N, WIDTH, dtype=torch.float64)
    expected = gradients(clop_kernels.clip_loss(frozen(x), encoder(y)), encoder)
    recorder.seen.clear()
    loss = clop_kernels.clip_loss(encode(frozen, x, sub_batch=8), encode(encoder, y, sub_batch=8))
    assert_equal(gradients(loss, encoder), expected)
    assert len(recorder.seen) == 3


def test_an_input_that_the_loss_leaves_out() -> None:
    recorder = Recorder()
    encoder = make_encoder(recorder)
    views = torch.randn(3, N, WIDTH, dtype=torch.float64)
    _, z, _ = encode(encoder, *views, sub_batch=8)
    actual = gradients(z.square().sum(), encoder)
    assert recorder.with_graph == 9 * [False] + 3 * [True]
    assert_equal(actual, gradients(encoder(views[1]).square().sum(), encoder))


# ---- progress and errors ----------------------------------------------------------------------------------------------


def test_progress_of_both_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, x = make_encoder(), torch.randn(N, WIDTH, dtype=torch.float64)
    encode(encoder, x, sub_batch=8).sum().backward()
    assert capsys.readouterr().err == ""
    z = encode(encoder, x, sub_batch=8, progress=True)
    shown = capsys.readouterr().err
    assert "encode" in shown
    assert "0/3" in shown
    z.sum().backward()
    assert "backward" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tqdm"):
        encode(encoder, x, sub_batch=8, progress=True)


X = torch.zeros(4, WIDTH, dtype=torch.float64)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[nn.Module], object]]] = {
    "sub_batch 0": (ValueError, "sub_batch=0", lambda f: encode(f, X, sub_batch=0)),
    "sub_batch float": (ValueError, r"sub_batch=2\.0", lambda f: encode(f, X, sub_batch=2.0)),  # type: ignore[call-overload]
    "sub_batch bool": (ValueError, "sub_batch=True", lambda f: encode(f, X, sub_batch=True)),
    "no inputs": (TypeError, "no inputs", lambda f: encode(f, sub_batch=2)),  # type: ignore[call-overload]
    "number": (TypeError, r"inputs\[1\] is a int", lambda f: encode(f, X, 3, sub_batch=2)),  # type: ignore[call-overload]
    "text": (ValueError, r"inputs\[0\] has no rows, \['str', 'str'\]", lambda f: encode(f, ["a", "b"], sub_batch=2)),
    "0-dim": (ValueError, r"has no rows, \['tensor \(\)'\]", lambda f: encode(f, X[0, 0], sub_batch=2)),
    "empty": (ValueError, r"has no rows, \['tensor \(0, 12\)'\]", lambda f: encode(f, X[:0], sub_batch=2)),
    "empty dict": (ValueError, r"inputs\[0\] has no rows, \[\]", lambda f: encode(f, {}, sub_batch=2)),
    "lengths": (ValueError, r"inputs\[0\] .* \{'x': 4, 'y': 3\}", lambda f: encode(f, {"x": X, "y": X[1:]}, sub_batch=2)),
    "lengths in a tuple": (ValueError, r"inputs\[0\] .* \{0: 4, 2: 0\}", lambda f: encode(f, (X, 1, X[:0]), sub_batch=2)),
    "not callable": (TypeError, "encoder is a int", lambda f: encode(3, X, sub_batch=2)),  # type: ignore[call-overload]
    "function": (TypeError, "module=None", lambda f: encode(lambda x: f(x), X, sub_batch=2)),
    "module": (TypeError, "module is a str", lambda f: encode(f, X, sub_batch=2, module="f")),  # type: ignore[call-overload]
    "returns tuple": (TypeError, "returned a tuple", lambda f: encode(lambda x: (f(x),), X, sub_batch=2, module=f)),  # type: ignore[arg-type, return-value]
    "returns 3-D": (ValueError, r"\(2, 1, 8\)", lambda f: encode(lambda x: f(x)[:, None], X, sub_batch=2, module=f)),
    "returns integers": (ValueError, "torch.int64", lambda f: encode(lambda x: f(x).long(), X, sub_batch=2, module=f)),
    "returns other rows": (ValueError, r"\(1, 8\).* 2 rows", lambda f: encode(lambda x: f(x[:1]), X, sub_batch=2, module=f)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call(make_encoder())


def test_embeddings_that_depend_on_nothing_that_learns() -> None:
    encoder = make_encoder()
    z = encode(lambda x: encoder(x).detach(), X, sub_batch=2, module=encoder)
    with pytest.raises(RuntimeError, match=r"embeddings of inputs\[0\] depend on no parameter"):
        z.sum().backward()


def test_inputs_overwritten_between_the_passes() -> None:
    x = X.clone()
    z = encode(make_encoder(), x, sub_batch=2)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_second_derivatives_are_refused() -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(encode(make_encoder(), x, sub_batch=2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_state_after_an_error_in_the_second_pass() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(x) < 8:
                raise OSError("out of luck")
            return x

    encoder = make_encoder(Breaks(), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5))
    z = encode(encoder, torch.randn(N, WIDTH, dtype=torch.float64), sub_batch=8)
    state, buffers = torch.get_rng_state(), [x.clone() for x in encoder.buffers()]
    with pytest.raises(OSError, match="out of luck"):
        z.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(encoder.buffers(), buffers, strict=True))


# ---- several processes ------------------------------------------------------------------------------------------------


class Reductions(TorchDispatchMode):
    """Counts the all-reduces and reduce-scatters that run under it."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.namespace.startswith(("c10d", "_c10d")) and "reduce" in func.name()
        return func(*args, **(kwargs or {}))


def process(rank: int, rendezvous: str, results: str) -> None:
    """One of two ranks: gradients with and without caching, and how many reductions each took."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=30))

    def sharded(model: nn.Module) -> nn.Module:
        fully_shard(model.get_submodule("0"))
        fully_shard(model)
        return model

    def whole(p: Tensor) -> Tensor:
        return p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()

    torch.manual_seed(0)
    plain = make_encoder(nn.BatchNorm1d(HIDDEN).eval().requires_grad_(True))
    found: dict[str, Any] = {}
    wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "ddp": DistributedDataParallel,
        "ddp, unused parameters": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        "ddp, buckets": lambda model: DistributedDataParallel(model, bucket_cap_mb=1e-3, gradient_as_bucket_view=True),
        "ddp, one loss of all ranks": DistributedDataParallel,
        "fully_shard": sharded,
    }
    for name, wrap in wrappers.items():
        # DDP lets ranks differ in their number of rows, and so of sub-batches; fully_shard gathers weights in each.
        n_rows = N - 9 * rank if name.startswith("ddp") else N
        group = dist.group.WORLD if name.endswith("all ranks") else None
        views = torch.randn(2, n_rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        for cached in (False, True):
            model = wrap(copy.deepcopy(plain))
            for step in range(2):
                model.zero_grad()
                with Reductions() as reductions:  # type: ignore[no-untyped-call]
                    z = torch.cat(encode(model, *views, sub_batch=5)) if cached else model(views.flatten(0, 1))
                    clop_kernels.ntxent_loss(z, group=group).backward()
                grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
                found[f"{name}, {cached}, {step}"] = (reductions.n, grads)
    # BatchNorm takes one sub-batch at a time, which DDP alone cannot do in one backward pass: the mean of both ranks, by hand.
    twin = make_encoder(nn.BatchNorm1d(HIDDEN))
    model = DistributedDataParallel(copy.deepcopy(twin))
    views = torch.randn(2, N, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    for step in range(2):
        mine = gradients(clop_kernels.ntxent_loss(torch.cat(encode(model, *views, sub_batch=5))), model)[1:]
        by_hand = gradients(clop_kernels.ntxent_loss(torch.cat(in_sub_batches(twin, *views, sub_batch=5))), twin)[1:]
        for gradient in by_hand:
            dist.all_reduce(gradient)
        found[f"batch norm, {step}"] = (mine, [gradient / 2 for gradient in by_hand])
    found["buffers"] = ([x.double() for x in model.buffers()], [x.double() for x in twin.buffers()])
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ddp_with_a_static_graph_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        encoder = nn.parallel.DistributedDataParallel(make_encoder(), static_graph=True)
        with pytest.raises(ValueError, match=r"static_graph=True.*expected static_graph=False"):
            encode(encoder, X, sub_batch=2)
        with torch.no_grad():
            assert encode(encoder, X, sub_batch=2).shape == (4, D)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("gradcache")
    spawn(process, (str(folder / "rendezvous"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(
    "wrapper", ["ddp", "ddp, unused parameters", "ddp, buckets", "ddp, one loss of all ranks", "fully_shard"]
)
def test_gradients_are_reduced_once_a_step(wrapper: str, distributed: list[dict[str, Any]]) -> None:
    for step in range(2):
        for rank in range(2):
            n_expected, expected = distributed[rank][f"{wrapper}, False, {step}"]
            n_reductions, actual = distributed[rank][f"{wrapper}, True, {step}"]
            assert_equal(actual, expected)
            assert n_reductions == n_expected > 0
        assert_equal(distributed[0][f"{wrapper}, True, {step}"][1], distributed[1][f"{wrapper}, True, {step}"][1])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_batch_norm_on_two_ranks(distributed: list[dict[str, Any]]) -> None:
    for found in distributed:
        assert_equal(*found["batch norm, 0"])
        assert_equal(*found["batch norm, 1"])
    assert_equal(*distributed[0]["buffers"])  # those of rank 0 are what DDP hands to all
