"""The NT-Xent loss of lightly: ``from clop_kernels.compat.lightly import NTXentLoss``. Written for lightly 1.6."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import ntxent_loss
from ._conventions import all_processes, failures_announced, unsupported


class NTXentLoss(nn.Module):
    """NT-Xent of two views: each row against all other rows of both views, and the mean over rows.

    Args:
        temperature: tau > 0.
        memory_bank_size: only 0 is supported. The rows of a bank would be negatives only, and change from step to step.
        gather_distributed: True compares with the rows of all processes of the default process group. As in the original, the
            loss is the mean over this process's own rows, and gradients are those of the sum of all processes' losses. Averaged
            over processes with equal numbers of rows, the gradients of parameters are those of one process with all rows. Unlike
            in the original, processes may have different numbers of rows.
        backend: "cuda", "triton", "cpu", "tiled" or "reference". None takes the fastest one that can run here.
        strategy: how a process obtains the others' rows with ``gather_distributed``: "gather", "ring" or "auto", as for
            :func:`clop_kernels.clop_loss`.
        check_ranks: True: processes first compare their sizes and options, so that a mismatch is an error and not a hang.

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
                "Take a larger batch, for which this loss needs only O(N D) memory, or use lightly's own NTXentLoss",
            )
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.backend = backend
        self.strategy = strategy
        self.check_ranks = check_ranks

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views.

        Args:
            out0: (B, D), the projections of the first view, float64, float32, float16 or bfloat16. They are normalised here.
            out1: (B, D), the projections of the second view; row i of both is one instance.

        Returns:
            A tensor of shape (); float32, or float64 for float64 projections.

        Raises:
            TypeError, ValueError: the message names the argument, its value and what was expected.
        """
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
