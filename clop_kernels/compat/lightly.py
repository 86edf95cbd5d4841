"""lightly's NT-Xent: ``from clop_kernels.compat.lightly import NTXentLoss``. Written against lightly 1.6."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import ntxent_loss
from ._conventions import all_processes, failures_announced, unsupported


class NTXentLoss(nn.Module):
    """Two views of a batch, each row against all others of both views; the mean over rows.

    Args:
        temperature: tau > 0.
        memory_bank_size: 0 only. A bank's rows take part as negatives alone, and change from step to step.
        gather_distributed: against the rows of all processes of the default process group. The loss is the mean over this
            process's own rows, and gradients are of the sum of all processes' losses, as in the original: averaged, those of
            parameters are that of one process with all rows, if processes have as many rows each. Other than in the original
            they need not.
        backend, strategy, check_ranks: as for :func:`clop_kernels.clop_loss`.

    Raises:
        NotImplementedError: for a memory bank.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        backend: str | None = None,
        strategy: str = "auto",
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        size = memory_bank_size if isinstance(memory_bank_size, int) else memory_bank_size[0]
        if size != 0:
            raise unsupported(
                "memory_bank_size",
                memory_bank_size,
                "there is no memory bank here",
                "Take a larger batch, whose memory this loss keeps at O(N D), or lightly's own NTXentLoss",
            )
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.backend = backend
        self.strategy = strategy
        self.check_ranks = check_ranks

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """(B, D) and (B, D) projections, not necessarily normalised -> the loss, ()."""
        group = all_processes() if self.gather_distributed else None
        with failures_announced(group, self.check_ranks):
            if out0.shape != out1.shape:
                raise ValueError(f"out1 has shape {tuple(out1.shape)}: expected that of out0, {tuple(out0.shape)}")
        loss = ntxent_loss(
            torch.cat([out0, out1]),
            n_views=2,
            temperature=self.temperature,
            reduction="mean" if group is None else "none",
            backend=self.backend,
            group=group,
            strategy=self.strategy,
            check_ranks=self.check_ranks,
        )
        return loss if group is None else loss.mean()
