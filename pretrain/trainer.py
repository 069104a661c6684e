"""The engine: pre-trains an encoder by a method, with or without MTE, and can be stopped at any moment.

Read ``Trainer.take_step`` first; the loop around it is ``mte_bench.training.loop``. A step's randomness comes from (seed,
step), a view's from (seed, epoch, image, view), so neither the number of processes or workers nor a stop changes what is
computed.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mte_bench import distributed, records
from mte_bench.console import log
from mte_bench.data.sources import ImageSet, require_classes
from mte_bench.data.transforms import normalise
from mte_bench.device import autocast, peak_memory
from mte_bench.encoders.checkpoint import (
    AUXILIARY_NAME,
    CLASSIFIER_NAME,
    ENCODER_NAME,
    open_checkpoint,
    save_auxiliary,
    save_encoder,
)
from mte_bench.encoders.classifier import save_classifier
from mte_bench.encoders.snapshots import snapshot_folder
from mte_bench.errors import UserError
from mte_bench.files import write_text
from mte_bench.training import state
from mte_bench.training.batches import StepSampler, epoch_order
from mte_bench.training.live import CURVES
from mte_bench.training.loop import Loop
from mte_bench.training.schedules import cosine
from pretrain import mte
from pretrain.loader import Batch, Grid, step_sampler, view_loader
from pretrain.methods import METHODS
from pretrain.methods.base import mean_over_rows
from pretrain.monitor import classifier_top1, knn_top1
from pretrain.optimiser import EMA, build_optimiser, clip_per_tensor, clip_whole, drop_gradients, learning_rate, set_rates
from pretrain.recipe import Recipe
from pretrain.views import draw_views


class Trainer(Loop[Batch]):
    """One pre-training run in the folder ``out``.

    ``images`` is the training split; ``held_out`` the split on which k-NN is measured while training, if the recipe
    asks for it. Raises ``UserError`` for settings that contradict each other, data that does not fit them, or a folder that
    holds another run.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ImageSet,
        out: Path,
        *,
        seed: int = 0,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        workers: int = 2,
        held_out: ImageSet | None = None,
        allow_corrupt: int = 0,
        save_minutes: float = 10.0,
        recipe_name: str = "",
        process: tuple[int, int] = (0, 1),
    ):
        self.recipe, self.images, self.held_out, self.seed = recipe, images, held_out, seed
        self.workers, self.allow_corrupt, self.recipe_name = workers, allow_corrupt, recipe_name
        kind = METHODS[recipe.method]
        mte.check(recipe, kind, process[1])
        super().__init__(out, device=device, precision=precision, save_minutes=save_minutes, process=process)
        if kind.labelled:
            require_classes(images)
            if (images.labels < 0).any():
                raise UserError(f"{images.source}: method {recipe.method} learns from labels, and not all of its images have one")
        torch.manual_seed(seed)
        self.method = kind(kind.Settings.check(recipe.method_settings, "method_settings"), len(images.classes)).to(device)
        self.student = mte.Branch(recipe, self.method, student=True).to(device)
        self.teacher = mte.Branch(recipe, self.method, student=False).to(device)
        self.teacher.load_state_dict(self.student.state_dict(), strict=False)
        self.ema = EMA(self.teacher, self.student)
        self.optimiser = build_optimiser(self.student, recipe.optimiser, device)

    @cached_property
    def identity(self) -> dict[str, Any]:  # type: ignore[override]
        """See ``Loop``; the fingerprint of the data may take long."""
        return {
            "recipe": self.recipe.model_dump(mode="json", exclude={"description", "paper_row", "knn_every", "snapshot_every"}),
            "seed": self.seed,
            "data": self.images.fingerprint,
            "precision": str(self.precision).removeprefix("torch."),
        }

    def run(self) -> records.Record:
        """Train to the end, going on where an earlier run in this folder stopped; returns the run's record."""
        if not self.train() and (self.out / records.RECORD_NAME).exists():
            return records.read_record(self.out / records.RECORD_NAME)
        return self._record()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """See ``Loop``."""
        return {"student": self.student, "teacher": self.teacher, "method": self.method}

    def sampler(self) -> StepSampler:
        """See ``Loop``."""
        return step_sampler(self.images, self.recipe, self.seed, self.step, (self.rank, self.processes))

    def batches(self) -> Iterator[Batch]:
        """See ``Loop``."""
        masking = self.method.masking
        return view_loader(
            self.images,
            self.recipe,
            seed=self.seed,
            first_step=self.step,
            process=(self.rank, self.processes),
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            allow_corrupt=self.allow_corrupt,
            masks=Grid(masking, *self.student.encoder.grid(self.recipe.views.global1.size)) if masking else None,
        )

    def wrapped(self) -> Any:
        """See ``Loop``."""
        return distributed.spread(self.student, gradient_as_bucket_view=True)

    def take_step(self, model: Any, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step on the next global batch; returns the loss and what the schedules gave."""
        recipe, settings, spec = self.recipe, self.recipe.optimiser, self.student.encoder.spec
        lr = learning_rate(self.step, self.total_steps, self.steps_per_epoch, settings, recipe.batch_size)
        weight_decay = cosine(self.step, self.total_steps, settings.weight_decay, settings.weight_decay_end)
        momentum = cosine(self.step, self.total_steps, *recipe.momentum)
        set_rates(self.optimiser, lr, weight_decay)

        epoch = self.step // self.steps_per_epoch
        if self.method.teacher_moves == "before":
            self.ema.update(momentum)
        leading: list[Tensor] = []
        patch_means: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for micro in range(recipe.accumulate):
            batch = next(batches)
            self.corrupt.update(batch.corrupt)
            groups = [normalise(group.to(self.device, non_blocking=True), spec.mean, spec.std) for group in batch.groups]
            labels = masks = None
            if self.method.labelled:
                groups[0], labels = self.method.labels(
                    groups[0], batch.labels.to(self.device), self._chance(self.rank * recipe.accumulate + micro + 1)
                )
            if batch.masks is not None:
                masks = batch.masks.to(self.device, non_blocking=True)
            with self.micro_step(model, micro):
                parts, vectors = self.forward(model, groups, self._drop_path(groups, micro), epoch, masks, labels)
                self.scaler.scale(parts["loss"] / recipe.accumulate).backward()
            if labels is None:
                leading.append(torch.cat(mte.seen(vectors, recipe)))
            patch_means += [mean_over_rows(view) for view in vectors.of_patches or []]
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + value.detach() / recipe.accumulate
        values = self.means(sums)
        self.refuse_non_finite(values["loss"], "a lower optimiser.lr, a smaller optimiser.clip", self._list_batch)
        drop_gradients(self.method.without_gradient(self.student, epoch))
        values |= self.update(momentum)
        with torch.no_grad():
            self.method.update(leading, patch_means)
        return values | {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}

    def forward(
        self,
        student: nn.Module,
        groups: list[Tensor],
        drop_path: list[Tensor | None],
        epoch: int,
        masks: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], mte.Vectors]:
        """The loss and its parts for one micro-batch, and the teacher's vectors (none where ``labels`` are the target)."""
        vectors = mte.Vectors(None, None)
        with autocast(self.device, self.precision):
            if labels is None:
                vectors = mte.teacher_vectors(self.teacher, groups, self.recipe, patches=masks is not None)
            own = student(groups, drop_path, masks, of_fused=mte.student_wants(self.recipe))
        # outside: similarities of 8 bits would be too coarse for the exponentials of a contrastive loss
        if labels is None:
            targets = mte.targets(self.method, vectors, epoch, self.recipe)
        else:
            targets = mte.Targets([labels], [labels], [])
        return mte.loss(self.method, own, targets, self.recipe, masks, epoch), vectors

    def update(self, momentum: float) -> dict[str, float]:
        """Clip, step the student and move the teacher; returns the largest gradient norm where gradients are clipped."""
        self.scaler.unscale_(self.optimiser)
        values = {}
        if self.recipe.optimiser.clip is not None:
            clip = clip_per_tensor if self.recipe.optimiser.clip_norm == "tensor" else clip_whole
            values["grad_norm"] = clip(self.student, self.recipe.optimiser.clip).item()
        self.update_weights()
        if self.method.teacher_moves == "after":
            self.ema.update(momentum)
        return values

    def _drop_path(self, groups: list[Tensor], micro: int) -> list[Tensor | None]:
        """Draws of stochastic depth for this process's images, cut out of the global batch's."""
        generator = torch.Generator().manual_seed(self._chance())
        start = (self.rank * self.recipe.accumulate + micro) * self.micro_batch
        draws: list[Tensor | None] = []
        for group in groups:
            views, size = group.shape[:2]
            drawn = self.student.encoder.draw_drop_path(views * self.recipe.batch_size, generator)
            if drawn is not None:
                drawn = drawn.view(-1, views, self.recipe.batch_size)[:, :, start : start + size].flatten(1).to(self.device)
            draws.append(drawn)
        return draws

    def _chance(self, part: int = 0) -> int:
        """A seed for what is drawn in this step for the whole global batch or, from 1, for a part of it."""
        return (self.seed << 40) + (part << 32) + self.step

    def _list_batch(self) -> str:
        """Write down which images this step is on; says where, for the error that ends it."""
        start = self.step % self.steps_per_epoch * self.batch_size
        order = epoch_order(self.seed, int(self.epoch), len(self.images), self.recipe.repeats)
        names = [self.images.name(place % len(self.images)) for place in order[start : start + self.batch_size]]
        listing, good = self.out / "non_finite_batch.txt", self.out / state.NAME
        if self.rank == 0:
            write_text(listing, "\n".join(names) + "\n")
        last = good if good.exists() else "none"
        return f"its batch is listed in {listing} ({names[0]}, ...); the last good checkpoint is {last}; "

    def describe(self) -> None:
        """The resolved recipe, a picture of the views and, if snapshots are kept, the untrained state."""
        import yaml

        values = self.recipe.model_dump(mode="json")
        write_text(self.out / "recipe.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        draw_views(self.out / "views.png", self.images, self.recipe.views, self.seed)
        if self.recipe.snapshot_every:
            self._export(snapshot_folder(self.out, 0))

    def measures(self, epoch: int) -> bool:
        """Whether k-NN is due."""
        every = self.recipe.knn_every
        return bool(every and self.held_out and epoch and (epoch % every == 0 or epoch == self.recipe.epochs))

    def measure(self) -> None:
        """k-NN and, where there is one, the classifier on ``held_out``, by the first process."""
        if not self.curves or not self.held_out:
            return
        branch, how = self.evaluated, (self.held_out, self.device, self.workers)
        found = {"knn_top1": knn_top1(branch.encoder, self.images, *how)}
        if self.method.labelled:
            found["classifier_top1"] = classifier_top1(branch.encoder, branch.head, *how)
        self.curves.line({"step": self.step, "epoch": self.epoch, "seconds": self.trained_seconds, **found})
        words = ", ".join(f"{key.removesuffix('_top1')} {value:.2f} %" for key, value in found.items())
        log(f"\nepoch {self.epoch:.0f}: top-1 by {words}")

    @property
    def evaluated(self) -> mte.Branch:
        """The branch whose encoder is kept."""
        return self.teacher if self.method.evaluates == "teacher" else self.student

    def export(self) -> None:
        """The encoder that is kept, its classifier and the auxiliary part; and the same as a snapshot, if one is due."""
        self._export(self.out)
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        every = self.recipe.snapshot_every
        if every and rest == 0 and epoch % every == 0 and epoch < self.recipe.epochs:  # the last one is the run's own export
            self._export(snapshot_folder(self.out, epoch))

    def _export(self, folder: Path) -> None:
        """Write what is kept into ``folder``; the encoder last, so that where it is the rest is too."""
        recipe, branch = self.recipe, self.evaluated
        metadata = {
            "method": recipe.method,
            "title": recipe.title,
            "mte": recipe.mte is not None,
            "recipe": self.recipe_name,
            "recipe_hash": recipe.hash,
            "epoch": self.epoch,
            "epochs": recipe.epochs,
            "seed": self.seed,
            "data": self.images.source,
            "data_fingerprint": self.images.fingerprint,
        }
        if self.method.labelled:
            save_classifier(folder / CLASSIFIER_NAME, branch.head, self.images.classes, metadata)
        if branch.auxiliary is not None:
            self._lend_statistics(branch)
            heads = {"global": branch.head, "tail": branch.tail, "fusion": branch.fusion}
            if branch.heads is not None:
                heads["auxiliary"] = branch.heads
            if branch.fused_tails:
                heads["fused_tails"] = branch.fused_tails
            assert recipe.mte is not None
            # where every token has a tail of its own, what comes out of these is averaged
            fusion = "mean" if len(branch.fused_tails) > 1 else recipe.mte.fusion
            stated = {**metadata, "fusion": fusion, "fuse_global": recipe.mte.fuse_global}
            save_auxiliary(folder / AUXILIARY_NAME, branch.auxiliary, heads, stated)
        save_encoder(folder / ENCODER_NAME, branch.encoder, metadata)

    def _lend_statistics(self, branch: mte.Branch) -> None:
        """Give batch normalisations that ``branch`` never passes (a teacher's for the global token) the student's statistics."""
        own = dict(self.student.named_modules())
        for name, module in branch.named_modules():
            if isinstance(module, nn.BatchNorm1d) and not module.num_batches_tracked:
                lender = own[name]
                assert isinstance(lender, nn.BatchNorm1d)
                for key in ("running_mean", "running_var"):
                    getattr(module, key).copy_(getattr(lender, key))

    def _record(self) -> records.Record:
        """The run's own record: cost and the last loss."""
        lines = [json.loads(line) for line in (self.out / CURVES).read_text().splitlines()]
        epoch = [line["loss"] for line in lines if "loss" in line and line["epoch"] > self.recipe.epochs - 1]
        images = self.total_steps * self.recipe.batch_size
        record = records.make_record(
            task="pretrain",
            protocol=records.Protocol(name=self.recipe_name, settings=self.recipe.model_dump(mode="json")),
            subject=open_checkpoint(str(self.out)).subject,
            data=records.Data(
                source=self.images.source,
                split=self.images.split,
                images={self.images.split: len(self.images)},
                classes=len(self.images.classes) or None,
                fingerprint=self.images.fingerprint,
                subset=self.images.subset,
                corrupt=sorted(self.corrupt),
            ),
            metrics={"loss": records.Metric(value=sum(epoch) / len(epoch), n=len(epoch))},
            cost=records.Cost(
                seconds=self.seconds, images_per_second=images / self.seconds, peak_memory_bytes=peak_memory(self.device)
            ),
            files={"curves": CURVES, "views": "views.png"},
            details={
                "precision": self.identity["precision"],
                "processes": self.processes,
                "steps": self.total_steps,
                "resumed": self.resumed,
            },
        )
        if self.rank == 0:
            records.write_record(self.out, record)
        return record
