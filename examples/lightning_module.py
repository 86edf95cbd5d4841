"""CLOPLoss in a PyTorch Lightning module, on one or several devices, with collapse diagnostics as validation metrics.

Lightning's DDP averages gradients, so on several devices each must compute the loss of the whole batch. ``setup`` therefore gives
the criterion the process group, once it exists. Before the first step, a check compares the shared loss with that of one device.
Prototypes are a buffer, so checkpoints contain them, and a model loaded from a checkpoint has the same metrics::

    python examples/lightning_module.py
    python examples/lightning_module.py --devices 2     # two processes, on CPUs with gloo
    python examples/lightning_module.py --short         # the same, small and quick, for CI

Needs ``pip install '.[recipes]'``. It takes about half a minute on two cores. It has not yet been run on GPUs.
"""

from __future__ import annotations

import script  # noqa: F401

# isort: split
import argparse
import tempfile
from typing import Any

import torch
import torchvision_loads  # noqa: F401

# isort: split
import lightning
from arguments import COUNT, SEED
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed
from torch.utils.data import DataLoader, TensorDataset
from train_digits import BATCH_SIZE, EMBEDDING_DIM, LEARNING_RATE, N_CLASSES, Digits, load_data, make_encoder, noisy_view

from clop_kernels import CLOPLoss, collapse_report


class ContrastiveEncoder(lightning.LightningModule):
    """An encoder of digits, trained with two noisy views of each.

    Args:
        temperature, prototype_weight: Options of the loss.
        learning_rate: Learning rate of AdamW.
        seed: Seed of the prototypes and of the noise.
    """

    def __init__(self, temperature: float, prototype_weight: float, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.seed = seed
        self.encoder = make_encoder()
        prototypes = torch.Generator().manual_seed(seed)  # a criterion built with group= would broadcast them instead
        self.criterion = CLOPLoss(N_CLASSES, EMBEDDING_DIM, temperature, prototype_weight, generator=prototypes)
        self.embedded: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Lightning calls this after it has made the process group, if it makes one."""
        self.criterion.group = distributed.group.WORLD if self.trainer.world_size > 1 else None
        self.noise = torch.Generator().manual_seed(self.seed + self.global_rank)  # each device adds different noise

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        views = (self.encoder(noisy_view(images.cpu(), self.noise).to(self.device)) for _ in range(2))
        loss: Tensor = self.criterion(*views, labels=labels)  # every device gets the loss over all devices' rows
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        self.embedded.append((self.encoder(images), labels))

    def on_validation_epoch_end(self) -> None:
        z, labels = (torch.cat(parts) for parts in zip(*self.embedded, strict=True))
        self.embedded.clear()
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather((z, labels))
            z, labels = (part.flatten(0, 1) for part in gathered)
        report = collapse_report(z, labels, self.criterion.prototypes)
        numbers = {name: float(value) for name, value in report.as_dict().items() if value is not None}
        self.log_dict(numbers, sync_dist=True)  # every device has all rows, so the mean over devices changes nothing


class LossOfAllDevices(lightning.Callback):
    """Before the first step, computes the ``difference`` between the shared loss and the loss of one device with all rows."""

    def __init__(self, data: Digits) -> None:
        self.data = data
        self.difference = 0.0

    @torch.no_grad()
    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, ContrastiveEncoder)
        rows = slice(0, 256)
        generator = torch.Generator().manual_seed(0)  # the same views on every device
        views = [noisy_view(self.data.train_x[rows], generator).to(module.device) for _ in range(2)]
        labels = self.data.labels[rows].to(module.device)

        def loss(part: slice) -> float:
            z = [module.encoder(view[part]) for view in views]
            return float(module.criterion(*z, labels=labels[part]))

        shared = loss(slice(trainer.global_rank, None, trainer.world_size))
        group, module.criterion.group = module.criterion.group, None
        self.difference = abs(shared - loss(slice(None)))
        module.criterion.group = group


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--devices", type=COUNT, default=1, help="number of GPUs, or of processes without a GPU (default: %(default)s)")
    add("--epochs", type=COUNT, help="passes over the training digits (default: 40; 8 with --short)")
    add("--batch-size", type=BATCH_SIZE, default=256, help="digits per step, on all devices together (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="seed of weights, prototypes, labels, order and views (default: %(default)s)")
    add("--short", action="store_true", help="fewer epochs, for CI")
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (8 if options.short else 40)
    if options.batch_size % options.devices:
        parser.error(f"argument --batch-size: {options.batch_size}: expected a multiple of --devices, {options.devices}")
    return options


def report(stages: dict[str, dict[str, float]]) -> Table:
    table = Table(title="CLOPLoss in Lightning: the embeddings of the test digits")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    for name in next(iter(stages.values())):
        table.add_row(name.replace("_", " "), *(f"{numbers[name]:.4g}" for numbers in stages.values()))
    return table


def main(arguments: list[str] | None = None) -> tuple[dict[str, dict[str, float]], float]:
    """Returns the metrics by stage ("untrained", "trained", "from the checkpoint") and LossOfAllDevices.difference."""
    options = parse_arguments(arguments)
    lightning.seed_everything(options.seed, verbose=False)
    has_gpus = torch.cuda.is_available()
    if not has_gpus:
        torch.set_num_threads(1)  # tensors are small, and each process has its own core
    data = load_data(labelled_fraction=0.1, seed=options.seed)
    training = DataLoader(
        TensorDataset(data.train_x, data.labels), options.batch_size // options.devices, shuffle=True, drop_last=True
    )
    validation = DataLoader(TensorDataset(data.test_x, data.test_y), 256)
    check = LossOfAllDevices(data)
    # With gloo beside NCCL, the loss compares sizes and options of ranks without waiting for the GPU.
    ddp = DDPStrategy(process_group_backend="cpu:gloo,cuda:nccl" if has_gpus else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(folder, filename="last")
        trainer = lightning.Trainer(
            accelerator="gpu" if has_gpus else "cpu",
            devices=options.devices,
            strategy=ddp if options.devices > 1 else "auto",
            max_epochs=options.epochs,
            check_val_every_n_epoch=options.epochs,
            callbacks=[keep, check, RichProgressBar()],
            logger=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        model = ContrastiveEncoder(0.5, prototype_weight=5.0, learning_rate=LEARNING_RATE, seed=options.seed)

        def measured(module: ContrastiveEncoder) -> dict[str, float]:
            (numbers,) = trainer.validate(module, validation, verbose=False)
            return dict(numbers)

        stages: dict[str, dict[str, float]] = {"untrained": measured(model)}
        trainer.fit(model, training, validation)
        stages["trained"] = measured(model)
        path: Any = trainer.strategy.broadcast(keep.best_model_path)  # the first process wrote it
        stages["from the checkpoint"] = measured(ContrastiveEncoder.load_from_checkpoint(path))
    if trainer.is_global_zero:
        console = Console()
        console.print(report(stages))
        console.print(
            f"Devices: {trainer.world_size}. The shared loss differs from that of one device by {check.difference:.1e}."
        )
    return stages, check.difference


if __name__ == "__main__":
    main()
