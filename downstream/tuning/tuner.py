"""Fine-tuning, which can be stopped at any moment and goes on exactly where it stopped.

Read ``Tuner.take_step`` first; the loop around it is ``mte_bench.training.loop``. As in pre-training, a step's randomness
comes from (seed, step) and an image's from (seed, epoch, image), so neither the number of workers nor a stop changes what
is computed. Nor does the number of processes, but for mixup and CutMix, which pair the images of a micro-batch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from downstream.features import Pass
from downstream.ranking import ranked_classes
from downstream.task import TOP
from downstream.tuning.classifier import Classifier, build_optimiser, set_rate
from downstream.tuning.protocol import Augmentation, FinetuneProtocol, learning_rate
from mte_bench import distributed
from mte_bench.console import log
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import autocast
from mte_bench.encoders.checkpoint import CLASSIFIER_NAME, ENCODER_NAME, Checkpoint, save_encoder
from mte_bench.encoders.classifier import save_classifier
from mte_bench.errors import UserError
from mte_bench.files import write_text
from mte_bench.training.batches import Key, StepSampler, load_batches, readable
from mte_bench.training.loop import Loop
from mte_bench.training.mixing import mix


class Batch(NamedTuple):
    """One process's images of one micro-step."""

    images: Tensor
    """``b c h w``, float32, augmented and normalised."""
    labels: Tensor
    """``b``."""
    corrupt: dict[str, str]
    """Images that could not be read, by name, and why; others stand in their place."""


class Augmented(Dataset[Batch | UserError]):
    """Maps a list of (epoch, place) to a ``Batch``; an error that the user can mend is returned, not raised."""

    def __init__(self, images: ImageSet, augmentation: Augmentation, allow_corrupt: int):
        self.images, self.augmentation, self.allow_corrupt = images, augmentation, allow_corrupt

    def __getitem__(self, keys: Sequence[Key]) -> Batch | UserError:
        views: list[Tensor] = []
        labels: list[int] = []
        corrupt: dict[str, str] = {}
        try:
            for epoch, place in keys:
                index, image = readable(self.images, place % len(self.images), self.allow_corrupt, corrupt)
                views.append(self.augmentation(image, epoch, place))
                labels.append(int(self.images.labels[index]))
        except UserError as error:  # a worker would wrap it in its traceback
            return error
        return Batch(torch.stack(views), torch.tensor(labels), corrupt)


class Evaluated(NamedTuple):
    """What an evaluation on val found."""

    epoch: int
    """After how many epochs."""
    ranked: NDArray[np.int64]
    """The most likely classes of each val image, best first (``n 5``, or as many as there are classes); -1 for an image that
    could not be read."""
    top1: float
    """Percent of the readable images."""


class Tuner(Loop[Batch]):
    """One fine-tuning of ``checkpoint`` in the folder ``out``.

    ``identity`` is all that the result depends on: a run with another one is not gone on with. ``metadata`` goes into the
    fine-tuned weights' files. Raises ``UserError`` for settings that do not fit the data or the number of processes.
    """

    def __init__(
        self,
        protocol: FinetuneProtocol,
        checkpoint: Checkpoint,
        train: ImageSet,
        val: ImageSet,
        out: Path,
        *,
        how: Pass,
        transform: EvaluationTransform,
        identity: dict[str, Any],
        metadata: dict[str, Any],
        save_minutes: float = 10.0,
        process: tuple[int, int] = (0, 1),
    ):
        self.protocol, self.images, self.val, self.how = protocol, train, val, how
        self.transform, self.identity, self.metadata = transform, identity, metadata
        super().__init__(out, device=how.device, precision=how.precision, save_minutes=save_minutes, process=process)
        spec = checkpoint.encoder.spec
        if protocol.mixes and self.micro_batch % 2:
            raise UserError(
                f"batch_size {protocol.batch_size} makes micro-batches of {self.micro_batch}: mixup and CutMix pair images; "
                "make it even, or set both to 0"
            )
        self.augmentation = Augmentation(protocol, spec)
        self.model = Classifier(spec, checkpoint.encoder.model.state_dict(), len(train.classes), protocol).to(how.device)
        self.ema = ModelEmaV3(self.model, protocol.ema) if protocol.ema else None
        self.optimiser = build_optimiser(self.model, protocol, how.device)
        self.loss = SoftTargetCrossEntropy()
        self.best: Evaluated | None = None
        self.last: Evaluated | None = None

    @property
    def reported(self) -> Evaluated:
        """The evaluation that the record is about."""
        found = self.best if self.protocol.reports == "best" else self.last
        assert found is not None, "run first"
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What a record should say of the run."""
        assert self.best is not None and self.last is not None, "run first"
        return {
            "reported": "the best epoch on val (optimistic)" if self.protocol.reports == "best" else "the last epoch",
            "epoch": self.reported.epoch,
            "best_top1": round(self.best.top1, 3),
            "last_top1": round(self.last.top1, 3),
            "epochs_done": round(self.epoch),
            "steps": self.step,
            "resumed": self.resumed,
            "processes": self.processes,
        }

    @property
    def parts(self) -> dict[str, nn.Module]:
        """See ``Loop``."""
        return {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema.module}

    def sampler(self) -> StepSampler:
        """See ``Loop``."""
        p = self.protocol
        return StepSampler(
            len(self.images),
            p.batch_size,
            p.epochs,
            seed=p.seed,
            first_step=self.step,
            process=(self.rank, self.processes),
            accumulate=p.accumulate,
            repeats=p.repeats,
        )

    def batches(self) -> Iterator[Batch]:
        """See ``Loop``."""
        return load_batches(
            Augmented(self.images, self.augmentation, self.how.allow_corrupt),
            self.sampler(),
            workers=self.how.workers,
            pin_memory=self.device.type == "cuda",
            allow_corrupt=self.how.allow_corrupt,
        )

    def wrapped(self) -> Any:
        """See ``Loop``."""
        return distributed.spread(self.model, gradient_as_bucket_view=True)

    def describe(self) -> None:
        """The resolved protocol."""
        write_text(self.out / "protocol.yaml", yaml.safe_dump(self.protocol.model_dump(mode="json"), sort_keys=False))

    def state(self) -> dict[str, Any]:
        """See ``Loop``; with the evaluations that are reported."""
        return {**super().state(), "best": _stored(self.best), "last": _stored(self.last)}

    def load(self, values: dict[str, Any]) -> None:
        """See ``Loop``."""
        super().load(values)
        self.best, self.last = _restored(values["best"]), _restored(values["last"])

    def evaluate_ema(self) -> Evaluated | None:
        """The average of the weights at the end, where one is kept that is not what was evaluated all along."""
        if self.ema is None or self.protocol.evaluates == "ema":
            return None
        return self._classified(self.ema.module)

    def take_step(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step; returns its loss and learning rate."""
        protocol = self.protocol
        lr = learning_rate(protocol, self.step, self.steps_per_epoch)
        set_rate(self.optimiser, lr)
        self.model.train()
        draws = self.model.encoder.draw_drop_path(protocol.batch_size, torch.Generator().manual_seed(self._chance()))
        total = torch.zeros((), device=self.how.device)
        for micro in range(protocol.accumulate):
            batch = next(batches)
            self.corrupt.update(batch.corrupt)
            part = self.rank * protocol.accumulate + micro
            images, targets = self._mixed(batch, part)
            place = slice(part * self.micro_batch, (part + 1) * self.micro_batch)
            keep = None if draws is None else draws[:, place].to(self.how.device)
            with self.micro_step(model, micro):
                with autocast(self.how.device, self.how.precision):
                    loss = self.loss(model(images, keep).float(), targets)
                self.scaler.scale(loss / protocol.accumulate).backward()
            total += loss.detach() / protocol.accumulate
        value = self.means({"loss": total})["loss"]
        self.refuse_non_finite(value, "a lower lr")
        self.update_weights()
        if self.ema is not None:
            self.ema.update(self.model)
        return {"loss": value, "lr": lr}

    def _mixed(self, batch: Batch, part: int) -> tuple[Tensor, Tensor]:
        """The images and target probabilities of a micro-batch, the ``part``-th of its step."""
        p, device = self.protocol, self.how.device
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        return mix(
            images,
            labels,
            len(self.images.classes),
            self._chance(part + 1),
            mixup=p.mixup,
            cutmix=p.cutmix,
            cutmix_share=p.cutmix_share,
            smoothing=p.smoothing,
        )

    def _chance(self, part: int = 0) -> int:
        """A seed for what is drawn in this step for the whole batch or, from 1, for a part of it."""
        return (self.protocol.seed << 40) + (part << 32) + self.step

    def measures(self, epoch: int) -> bool:
        """Whether there is an evaluation after so many epochs."""
        return epoch > 0 and (epoch % self.protocol.evaluate_every == 0 or epoch == self.protocol.epochs)

    def measure(self) -> None:
        """Evaluate on val, and keep weights and predictions if they are to be reported so far."""
        ema = self.ema if self.protocol.evaluates == "ema" else None
        model = self.model if ema is None else ema.module
        self.last = self._classified(model)
        better = self.best is None or self.last.top1 > self.best.top1
        self.best = self.last if self.best is None or better else self.best
        if self.curves:
            self.curves.line({"step": self.step, "epoch": self.epoch, "top1": self.last.top1})
            log(f"\nepoch {self.epoch:.0f}: top-1 {self.last.top1:.2f} % (best {self.best.top1:.2f} %)")
            if better if self.protocol.reports == "best" else self.step == self.total_steps:
                self._export(model)

    def _classified(self, model: nn.Module) -> Evaluated:
        """``model`` on val, whose images are spread over the processes."""
        top = min(TOP, len(self.images.classes))
        found = ranked_classes(model, self.val, self.transform, self.how, top, (self.rank, self.processes))
        kept = found[:, 0] >= 0
        return Evaluated(round(self.epoch), found, 100 * float((found[kept, 0] == self.val.labels[kept]).mean()))

    def _export(self, model: Any) -> None:
        """The fine-tuned encoder and classifier, as they are evaluated."""
        metadata = {**self.metadata, "epoch": round(self.epoch), "epochs": self.protocol.epochs}
        save_encoder(self.out / ENCODER_NAME, model.encoder, metadata)
        norm = model.fc_norm if self.protocol.pool == "mean" else None
        save_classifier(self.out / CLASSIFIER_NAME, model.head, self.images.classes, metadata, norm)


def _stored(found: Evaluated | None) -> dict[str, Any] | None:
    return None if found is None else found._asdict() | {"ranked": torch.from_numpy(found.ranked)}


def _restored(values: dict[str, Any] | None) -> Evaluated | None:
    return None if values is None else Evaluated(**{**values, "ranked": values["ranked"].numpy()})
