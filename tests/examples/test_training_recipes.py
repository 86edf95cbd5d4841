"""examples/mixed_precision.py, cuda_graph.py and lightning_module.py: training with an encoder as people do."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from rich.progress import Progress

from clop_kernels import CLOPLoss

from ..support import ROOT

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

import cuda_graph
import mixed_precision
from train_digits import Run, load_data, make_encoder


@pytest.fixture(scope="module")
def data() -> Any:
    return load_data(0.1, 0)


@pytest.mark.gpu  # where there is one, it trains there
def test_float16_compiled_and_scaled_learns_what_float32_does() -> None:
    (plain, mixed), (none, scaling) = mixed_precision.main(["--short"])
    assert 1 <= len(scaling.skipped) <= 16
    n_late = sum(step == number for number, step in enumerate(scaling.skipped))  # the first steps, and on a GPU once one later
    assert len(scaling.skipped) - 1 <= n_late
    assert none.skipped == []
    assert scaling.scales[-1] < mixed_precision.OVERFLOWING_SCALE
    assert mixed_precision.weights_are_finite(mixed.encoder)
    losses = torch.tensor(mixed.losses)
    assert losses.isfinite().all()
    assert losses[0] == pytest.approx(plain.losses[0], rel=2e-3)  # the same weights and views
    # So many steps it is behind, on views of its own: the noise is 4% by the third step.
    torch.testing.assert_close(losses[n_late : n_late + 3], torch.tensor(plain.losses[:3]), rtol=0.06, atol=0)
    assert losses[-5:].mean() < 0.8 * losses[0]


def test_skipped_steps_leave_the_weights(data: Any) -> None:
    options = mixed_precision.parse_arguments(["--epochs", "1"])  # five steps, all of them too many for so high a scale
    torch.manual_seed(0)
    encoder = make_encoder()
    run = Run("", copy.deepcopy(encoder), CLOPLoss(10, 64, 0.5))
    with Progress() as progress:
        scaling = mixed_precision.train(run, data, options, torch.device("cpu"), torch.float16, progress)
    assert scaling.skipped == [0, 1, 2, 3, 4]
    for actual, expected in zip(run.encoder.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_cuda_graph_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda_graph.main([])
    assert "CUDA graphs need an NVIDIA GPU" in capsys.readouterr().out


def test_the_eager_steps_of_cuda_graph_learn_and_go_back(data: Any) -> None:
    """What is captured, step by step on a CPU; and that warm-up can be undone in place."""
    torch.manual_seed(0)
    encoder = make_encoder()
    trainer = cuda_graph.Trainer(copy.deepcopy(encoder), 128, torch.device("cpu"), 0)
    addresses = [parameter.data_ptr() for parameter in trainer.encoder.parameters()]

    def train() -> list[float]:
        found = []
        for images, labels in cuda_graph.batches(data, 128, 12, seed=0):
            trainer.load(images, labels)
            found.append(float(trainer.step()))
        return found

    first = train()
    assert sum(first[-3:]) < 0.95 * sum(first[:3])
    trainer._go_back_to(encoder.state_dict())
    assert [parameter.data_ptr() for parameter in trainer.encoder.parameters()] == addresses
    assert train() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graph_trains_as_eager_steps_do(capsys: pytest.CaptureFixture[str]) -> None:
    cuda_graph.main(["--short"])  # raises if its losses differ
    assert "differ by at most" in capsys.readouterr().out


# ---- lightning_module.py --------------------------------------------------------------------------------------------


def lightning_module(*arguments: str) -> str:
    """What it prints, in a process of its own: Lightning warns of much, and changes the state of the process that it is in."""
    script = ROOT / "examples/lightning_module.py"
    environment = os.environ | {"COLUMNS": "100", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), "--short", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_shares_one_loss() -> None:
    """On two processes of a CPU, or on as many GPUs as there are, up to two."""
    devices = min(torch.cuda.device_count(), 2) or 2
    printed = lightning_module("--devices", str(devices))
    cells = re.findall(r"^│ (\w[\w ]+?) +│ +(\S+) │ +(\S+) │ +(\S+) │$", printed, re.MULTILINE)
    stages = {name: [float(number) for number in numbers] for name, *numbers in cells}
    untrained, trained, reloaded = stages["effective rank"]
    assert trained > untrained + 2
    assert reloaded == trained
    untrained, trained, reloaded = stages["nearest prototype accuracy"]
    assert trained > 0.4 > untrained
    assert reloaded == trained  # the prototypes are those of the checkpoint
    found = re.search(r"Devices: (\d)\. The shared loss differs from that of one device by (\S+)\.$", printed, re.MULTILINE)
    assert found is not None
    assert int(found[1]) == devices
    assert float(found[2]) < 1e-5
