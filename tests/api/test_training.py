"""End to end: training with the fused loss follows training with the plain one, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import clop_kernels


@pytest.mark.parametrize("positives", ["instance", "label"])
def test_32_steps_follow_the_reference(positives: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(5, 20, generator=generator)
    batches = []
    for _ in range(32):
        labels = torch.randint(0, 5, (48,), generator=generator)
        views = [centres[labels] + 0.5 * torch.randn(48, 20, generator=generator) for _ in range(2)]
        batches.append((views, torch.where(torch.rand(48, generator=generator) < 0.5, labels, -1)))
    encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 16))
    criterion = clop_kernels.CLOPLoss(5, 16, positives=positives, learnable_temperature=True)

    def train(name: str) -> tuple[Tensor, list[Tensor]]:
        model = nn.ModuleList([copy.deepcopy(encoder), copy.deepcopy(criterion)])
        model[1].backend = name  # type: ignore[assignment]
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for views, labels in batches:
            optimiser.zero_grad()
            loss = model[1](*(model[0](view) for view in views), labels=labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return torch.stack(losses), [p.detach() for p in model.parameters()]

    expected, actual = train("reference"), train(backend)
    assert expected[0][-1] < 0.7 * expected[0][0]  # it did learn
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for a, e in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
