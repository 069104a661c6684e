"""Training of a dense model, which can be stopped at any moment and goes on exactly where it stopped.

Read ``Runner.take_step`` first; the loop around it is ``mte_bench.training.loop``. A step's randomness comes from (seed,
step) and an image's from (seed, epoch, image), so neither the number of workers nor a stop changes what is computed.
mmengine's own loop is not used: after a stop it reads and drops all batches that it had seen, and what it saves is neither
written beside and renamed nor loaded as data only.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from downstream.dense.adapter import parameter_groups
from downstream.dense.batches import Augmented, Batch, ShapedSteps, Transform, Truth
from downstream.dense.protocol import DenseProtocol
from downstream.features import Pass
from mte_bench import distributed
from mte_bench.device import autocast
from mte_bench.errors import UserError
from mte_bench.files import write_text
from mte_bench.training.batches import StepSampler, load_batches
from mte_bench.training.loop import Loop
from mte_bench.training.seeded import seeded

LINE_EVERY = 50
"""Steps between the lines of ``curves.jsonl``, as in the references' logs."""


class Runner(Loop[Batch]):
    """One training of ``model`` (an mmdet or mmseg model with a ``Backbone``) in the folder ``out``.

    ``identity`` is all that the result depends on: a run with another one is not gone on with. Raises ``UserError`` for
    settings that do not fit the data or the number of processes.
    """

    by_epoch = False  # one of few images takes no longer than a state takes to write

    def __init__(
        self,
        protocol: DenseProtocol,
        model: Any,
        truth: Truth,
        transform: Transform,
        out: Path,
        *,
        how: Pass,
        identity: dict[str, Any],
        save_minutes: float = 10.0,
        process: tuple[int, int] = (0, 1),
    ):
        self.protocol, self.truth, self.transform, self.how, self.identity = protocol, truth, transform, how, identity
        super().__init__(out, device=how.device, precision=how.precision, save_minutes=save_minutes, process=process)
        self.total_steps, self.line_every = protocol.total_steps(self.steps_per_epoch), LINE_EVERY
        if self.processes > 1 and how.device.type == "cuda":  # torch has none for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(how.device)
        o = protocol.optimiser
        encoder = model.backbone.encoder
        if o.layer_decay != 1 and not encoder.is_vit:
            raise UserError(f"layer_decay {o.layer_decay} is for a ViT; with {encoder.spec.arch} set optimiser.layer_decay=1")
        groups = parameter_groups(model, len(encoder.block_list), o.lr, o.weight_decay, o.layer_decay, o.spared)
        self.names = [group.pop("names") for group in groups]
        self.optimiser = torch.optim.AdamW(groups, betas=o.betas, fused=how.device.type == "cuda")

    @property
    def parts(self) -> dict[str, nn.Module]:
        """See ``Loop``."""
        return {"model": self.model}

    @property
    def summary(self) -> dict[str, Any]:
        """How it went, for the record."""
        return {
            "steps": self.step,
            "epochs": round(self.epoch, 3),
            "seconds": round(self.seconds, 1),
            "resumed": self.resumed,
        }

    def describe(self) -> None:
        """The resolved protocol."""
        write_text(self.out / "protocol.yaml", yaml.safe_dump(self.protocol.model_dump(mode="json"), sort_keys=False))

    def wrapped(self) -> Any:
        """See ``Loop``."""
        return distributed.spread(self.model, find_unused_parameters=True)

    def sampler(self) -> StepSampler:
        """See ``Loop``."""
        p, upright = self.protocol, self.truth.upright
        steps = max(1, len(self.truth.images) // p.batch_size)
        epochs = math.ceil(p.total_steps(steps) / steps)
        process = (self.rank, self.processes)
        options: dict[str, Any] = {"seed": p.seed, "first_step": self.step, "process": process, "accumulate": p.accumulate}
        if upright is None:
            return StepSampler(len(self.truth.images), p.batch_size, epochs, **options)
        group = max(1, p.batch_size // (self.processes * p.accumulate))
        return ShapedSteps(upright, group, p.batch_size, epochs, **options)

    def batches(self) -> Iterator[Batch]:
        """See ``Loop``."""
        return load_batches(
            Augmented(self.truth, self.transform, self.protocol.seed, self.how.allow_corrupt),
            self.sampler(),
            workers=self.how.workers,
            pin_memory=False,
            allow_corrupt=self.how.allow_corrupt,
        )

    def take_step(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step; returns its losses and learning rate."""
        protocol = self.protocol
        lr = protocol.optimiser.lr * protocol.rate(self.step, self.steps_per_epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        self.model.train()
        sums: dict[str, torch.Tensor] = {}
        for micro in range(protocol.accumulate):
            batch = next(batches)
            self.corrupt.update(batch.corrupt)
            seed = (protocol.seed << 64) + ((self.rank * protocol.accumulate + micro + 1) << 40) + self.step
            with self.micro_step(model, micro), seeded(seed):
                if self.how.device.type == "cuda":
                    torch.cuda.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
                losses = self.losses(model, batch)
                loss, values = self.model.parse_losses(losses)
                self.scaler.scale(loss / protocol.accumulate).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / protocol.accumulate
        means = self.means(sums)
        self.refuse_non_finite(means["loss"], "a lower optimiser.lr")
        self.update_weights()
        return {**means, "lr": lr}

    def losses(self, model: Any, batch: Batch) -> dict[str, Any]:
        """The named losses of ``model`` (``self.model`` or a wrapper of it) on ``batch``."""
        data = {key: [one[key] for one in batch.packed] for key in ("inputs", "data_samples")}
        data = self.model.data_preprocessor(data, True)
        with autocast(self.how.device, self.how.precision):
            losses: dict[str, Any] = model(**data, mode="loss")
        return losses

    def seconds_per_step(self) -> float:
        """Of one step on this machine, measured on the second of two; the model is then no longer what it was."""
        batches = self.batches()
        for _ in range(2):
            began = time.monotonic()
            self.take_step(self.model, batches)
        return time.monotonic() - began
