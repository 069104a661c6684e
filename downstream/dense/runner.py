"""Training of a dense model: the loop, which can be stopped at any moment and goes on exactly where it stopped.

Read ``Runner.run`` first. A step's randomness comes from (seed, step) and an image's from (seed, epoch, image), so neither
the number of workers nor a stop changes what is computed. mmengine's own loop is not used: after a stop it reads and
drops all batches that it had seen, and what it saves is neither written beside and renamed nor loaded as data only.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from downstream.dense.adapter import parameter_groups
from downstream.dense.batches import Augmented, Batch, ShapedSteps, Transform, Truth
from downstream.dense.protocol import DenseProtocol
from downstream.features import Pass
from mte_bench.console import log
from mte_bench.device import autocast, peak_memory
from mte_bench.errors import UserError
from mte_bench.files import write_text
from mte_bench.training import state
from mte_bench.training.batches import StepSampler, load_batches
from mte_bench.training.live import Curves, LiveLine
from mte_bench.training.seeded import seeded

FORMAT = 1
LINE_EVERY = 50
"""Steps between the lines of ``curves.jsonl``, as in the references' logs."""


class Runner:
    """One training of ``model`` (an mmdet or mmseg model with a ``Backbone``) in the folder ``out``.

    ``identity`` is all that the result depends on: a run with another one is not gone on with. Raises ``UserError`` for
    settings that do not fit the data or the number of processes.
    """

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
        self.protocol, self.truth, self.transform, self.out = protocol, truth, transform, out
        self.how, self.identity, self.save_minutes, (self.rank, self.processes) = how, identity, save_minutes, process
        self.steps_per_epoch = len(truth.images) // protocol.batch_size
        self.step = 0
        self.sampler()  # refuses a batch size that does not fit
        self.total_steps = protocol.total_steps(self.steps_per_epoch)
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
        self.scaler = torch.amp.GradScaler(how.device.type, enabled=how.precision == torch.float16)
        self.resumed = 0
        self.seconds = 0.0
        self.corrupt: set[str] = set()

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.step / self.steps_per_epoch

    @property
    def started(self) -> bool:
        """Whether an earlier run left its state in the folder."""
        return (self.out / state.NAME).exists()

    @property
    def summary(self) -> dict[str, Any]:
        """How it went, for the record."""
        return {
            "steps": self.step,
            "epochs": round(self.epoch, 3),
            "seconds": round(self.seconds, 1),
            "resumed": self.resumed,
        }

    def run(self) -> bool:
        """Train to the end, going on where an earlier run in this folder stopped; returns whether anything was left to do."""
        if self.restore():
            if self.rank == 0 and self.step < self.total_steps:
                log(f"{self.out}: going on from step {self.step} of {self.total_steps} (epoch {self.epoch:.2f})")
        elif self.rank == 0:
            write_text(self.out / "protocol.yaml", yaml.safe_dump(self.protocol.model_dump(mode="json"), sort_keys=False))
        if self.step == self.total_steps:
            return False
        model = self.model
        if self.processes > 1:
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        curves = Curves(self.out, self.step) if self.rank == 0 else None
        started = saved = time.monotonic()
        earlier = self.seconds
        try:
            with LiveLine(self.total_steps, silent=self.rank != 0) as live:
                batches = live.timed(self.batches())
                while self.step < self.total_steps:
                    values = self._step(model, batches)
                    self.step += 1
                    now = time.monotonic()
                    self.seconds = earlier + now - started
                    live.step(self.step, self.epoch, self.protocol.batch_size, values["loss"], peak_memory(self.how.device))
                    if curves:
                        curves.add(values)
                        if self.step % LINE_EVERY == 0 or self.step == self.total_steps:
                            curves.write(self.step, self.epoch)
                    if self.step == self.total_steps or now - saved > 60 * self.save_minutes:
                        self._save()
                        saved = time.monotonic()
        finally:
            if curves:
                curves.close()
        return True

    def sampler(self) -> StepSampler:
        """Which images in which of the steps that are left."""
        p, upright = self.protocol, self.truth.upright
        steps = max(1, self.steps_per_epoch)
        epochs = math.ceil(p.total_steps(steps) / steps)
        process = (self.rank, self.processes)
        options: dict[str, Any] = {"seed": p.seed, "first_step": self.step, "process": process, "accumulate": p.accumulate}
        if upright is None:
            return StepSampler(len(self.truth.images), p.batch_size, epochs, **options)
        group = max(1, p.batch_size // (self.processes * p.accumulate))
        return ShapedSteps(upright, group, p.batch_size, epochs, **options)

    def batches(self) -> Iterator[Batch]:
        """The augmented images of the steps that are left."""
        return load_batches(
            Augmented(self.truth, self.transform, self.protocol.seed, self.how.allow_corrupt),
            self.sampler(),
            workers=self.how.workers,
            pin_memory=False,
            allow_corrupt=self.how.allow_corrupt,
        )

    def _step(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step; returns its losses and learning rate."""
        protocol = self.protocol
        lr = protocol.optimiser.lr * protocol.rate(self.step, self.steps_per_epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        self.model.train()
        sums: dict[str, float] = {}
        for micro in range(protocol.accumulate):
            batch = next(batches)
            self.corrupt.update(batch.corrupt)
            whole = micro == protocol.accumulate - 1 or self.processes == 1
            seed = (protocol.seed << 64) + ((self.rank * protocol.accumulate + micro + 1) << 40) + self.step
            with nullcontext() if whole else model.no_sync(), seeded(seed):
                if self.how.device.type == "cuda":
                    torch.cuda.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
                losses = self.losses(model, batch)
                loss, values = self.model.parse_losses(losses)
                self.scaler.scale(loss / protocol.accumulate).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / protocol.accumulate
        if not math.isfinite(sums["loss"]):
            raise UserError(
                f"the loss is {sums['loss']} at step {self.step + 1} (epoch {int(self.epoch) + 1}); "
                "try a lower optimiser.lr or --precision float32"
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return {**sums, "lr": lr}

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
            self._step(self.model, batches)
        return time.monotonic() - began

    def restore(self) -> bool:
        """Take over the state that an earlier run left in the folder; returns whether there was one."""
        found = state.read_own(self.out, FORMAT, self.identity)
        if found is None:
            return False
        self.model.load_state_dict(found["model"])
        self.optimiser.load_state_dict(found["optimiser"])
        self.scaler.load_state_dict(found["scaler"])
        self.step, self.seconds, self.corrupt = found["step"], found["seconds"], set(found["corrupt"])
        self.resumed = found["resumed"] + (self.step < self.total_steps)
        return True

    def _save(self) -> None:
        if self.rank == 0:
            values = {
                "identity": self.identity,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "seconds": self.seconds,
                "corrupt": sorted(self.corrupt),
                "resumed": self.resumed,
            }
            state.write(self.out, FORMAT, values)
