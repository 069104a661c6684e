"""Linear probes as the references train them: on a new random crop of every image in every epoch.

The encoder, which takes almost all the time, sees each view once, for all features, learning rates and heads together; no
gradient is computed in it. Two sets of heads learn from the same pass:

- one on all train images. This is the reference's own training. The reference reports the best of these heads, over rates
  and epochs, on val: ``top1_best_on_val``, for comparison with published numbers.
- where there is something to choose, another one on the train images that are not held out. Its accuracy on the held-out ones,
  after the last epoch, chooses the rate and the feature. ``top1`` is of the head of the first set with that rate on that
  feature, after the last epoch: nothing about it was chosen on val.

Among several processes the views of a step are shared out. Their features are gathered, and each process trains a share of
the heads on all of them: what travels is a batch of features and not the gradients of all heads.

Sources: DINO ``eval_linear.py``, iBOT ``eval_linear_multi.py``, MoCo v3 ``main_lincls.py``, MoBY ``moby_linear.py``,
DINOv2 ``linear.py``, MAE ``main_linprobe.py``; the protocol files say which has which settings. Different on purpose: all heads
start from the same weights, the images of a step do not depend on the number of processes, and none is taken twice to fill up
a batch.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downstream.features import encode_batch
from downstream.linear.heads import Heads, HeadTrainer, accuracy, best_of, fresh_heads, hold_out, rank, warn_of_edge
from downstream.linear.views import Keys, share, view_batches
from downstream.task import Material, Outcome, Predictions, Split, top_metrics
from mte_bench import distributed
from mte_bench.console import ProgressLine, log
from mte_bench.data.transforms import normalise
from mte_bench.encoders.encoder import Encoder, build_encoder
from mte_bench.errors import UserError
from mte_bench.files import atomic, hash_of

if TYPE_CHECKING:
    from downstream.linear.augmented import AugmentedProtocol


class Sweep(NamedTuple):
    """The heads of one feature that this process trains: those at ``own`` of the protocol's rates."""

    kind: str
    own: list[int]
    all: HeadTrainer
    """On all train images."""
    kept: HeadTrainer | None
    """On those that are not held out; None where there is nothing to choose."""

    @property
    def trainers(self) -> dict[str, HeadTrainer]:
        """Those that there are, by name."""
        return {"all": self.all} if self.kept is None else {"all": self.all, "kept": self.kept}


class Best(NamedTuple):
    """The best head on val so far."""

    top1: float = -1.0
    epoch: int = 0
    head: int = 0
    ranked: Tensor = torch.empty(0, 5, dtype=torch.int64)
    """``n 5``: its classes of the val images."""


class Training:
    """One probe on its way; between epochs all of it is on disk."""

    def __init__(self, protocol: "AugmentedProtocol", material: Material):
        self.protocol, self.material = protocol, material
        self.device = material.how.device
        self.place = distributed.place()
        self.kinds = list(material.splits)
        self.train, self.val = next(iter(material.splits.values()))
        self.classes = len(self.train.classes)
        self.heads = [(kind, rate) for kind in self.kinds for rate in protocol.rates]
        held = hold_out(self.train.labels, protocol.held_out, protocol.seed) if len(self.heads) > 1 else self.train.labels < 0
        self.held = torch.from_numpy(held)
        self.encoder = _with_drop_path(material.encoder, protocol.drop_path)
        self.sweeps = [self._sweep(kind) for kind in self.kinds]
        self.steps = protocol.steps(len(material.images))
        self.epoch, self.best = 0, Best()
        self.train_loss: list[list[float]] = []
        self.val_top1: list[list[float]] = []

    def run(self) -> Outcome:
        """Train from where an earlier run stopped and measure."""
        if self._restore() and self.place[0] == 0:
            log(f"linear: going on behind epoch {self.epoch}")
        line = ProgressLine()
        views, steps = self._views(), self.steps.from_epoch(self.epoch)
        while self.epoch < self.protocol.epochs:
            self._train_epoch(views, steps, line)
            self.epoch += 1
            if self.protocol.val_every_epoch or self.epoch == self.protocol.epochs:
                self._measure()
            self._save()
        return self._outcome()

    def _sweep(self, kind: str) -> Sweep:
        """Fresh heads; head h of all is trained by process h modulo their number."""
        first = self.kinds.index(kind) * len(self.protocol.rates)
        own = [rate for rate in range(len(self.protocol.rates)) if (first + rate) % self.place[1] == self.place[0]]
        width = self.material.splits[kind][0].features.shape[1]

        def fresh() -> HeadTrainer:
            generator = torch.Generator().manual_seed(self.protocol.seed)
            heads = fresh_heads(len(own), self.classes, width, self.protocol.init_std, generator)
            return self.protocol.trainer(Heads(*(part.to(self.device) for part in heads)))

        return Sweep(kind, own, fresh(), fresh() if len(self.heads) > 1 else None)

    def _views(self) -> Iterator[Tensor]:
        """This process's views of the steps that are left."""
        material = self.material
        size = material.transform.crop
        return view_batches(material.images, self.protocol.view, size, self.steps, self.epoch, self.place, material.how)

    def _train_epoch(self, views: Iterator[Tensor], steps: Iterator[Keys], line: ProgressLine) -> None:
        per_epoch = self.steps.per_epoch
        losses = torch.zeros(len(self.heads), device=self.device)
        for number in range(per_epoch):
            step = self.epoch * per_epoch + number
            images = next(steps)[:, 1]
            features = self._features(views, len(images), step)
            kept, y = ~self.held[images], torch.from_numpy(self.train.labels[images]).to(self.device)
            kept = kept.to(self.device)
            rates = self.protocol.rates_at(step, per_epoch).float()
            for sweep in self.sweeps:
                if sweep.own:
                    x, own_rates = features[sweep.kind], rates[sweep.own].to(self.device)
                    losses[self._places(sweep)] += sweep.all.step(x, y, own_rates)
                    if sweep.kept is not None and kept.any():
                        sweep.kept.step(x[kept], y[kept], own_rates)
            if self.place[0] == 0:
                line.show(self._progress(number + 1, line), last=step + 1 == self.protocol.epochs * per_epoch)
        self.train_loss.append((distributed.summed(losses, self.device) / per_epoch).tolist())

    def _progress(self, done: int, line: ProgressLine) -> str:
        best = f"  best on val {self.best.top1:.2f} %" if self.best.top1 >= 0 else ""
        count = f"{len(self.heads)} head{'s' if len(self.heads) > 1 else ''}"
        where = f"epoch {self.epoch + 1}/{self.protocol.epochs}, step {done}/{self.steps.per_epoch}"
        return f"linear, {count}: {where}  {line.seconds:.0f} s{best}"

    def _features(self, views: Iterator[Tensor], images: int, step: int) -> dict[str, Tensor]:
        """The features (``b c``) of all views of a step with ``images`` images; this process's views are next in ``views``."""
        first, last = share(images, self.place)
        depth = self.encoder.draw_drop_path(images, _generator(self.protocol.seed, step))
        widths = [split.features.shape[1] for split, _ in self.material.splits.values()]
        joined = torch.zeros(images, sum(widths), device=self.device)
        spec, how = self.encoder.spec, self.material.how
        self.encoder.train(depth is not None)
        for start in range(first, last, how.batch_size):
            rows = slice(start, min(start + how.batch_size, last))
            batch = next(views).to(self.device, non_blocking=True)
            self.encoder.use_drop_path(None if depth is None else depth[:, rows].to(self.device))
            found = encode_batch(self.encoder, normalise(batch, spec.mean, spec.std), self.kinds, how)
            joined[rows] = torch.from_numpy(np.concatenate([found[kind] for kind in self.kinds], axis=1)).to(joined)
        return dict(zip(self.kinds, distributed.summed(joined, self.device).split(widths, dim=1), strict=True))

    def _places(self, sweep: Sweep) -> list[int]:
        """Which of all heads those of ``sweep`` are."""
        first = self.kinds.index(sweep.kind) * len(self.protocol.rates)
        return [first + rate for rate in sweep.own]

    def _accuracies(self, trained: str, split: int, rows: NDArray[np.bool_] | slice) -> tuple[list[float], list[float]]:
        """Top-1 and loss of all heads, ``trained`` on all or on kept images, on ``rows`` of a split."""
        values = torch.zeros(2, len(self.heads), dtype=torch.float64)
        for sweep in self.sweeps:
            if sweep.own:
                x, y = _tensors(self.material.splits[sweep.kind][split], rows)
                values[:, self._places(sweep)] = torch.tensor(accuracy(sweep.trainers[trained].ready, x, y), dtype=torch.float64)
        top1, loss = distributed.summed(values, self.device).cpu()
        return top1.tolist(), loss.tolist()

    def _ranked(self, head: int) -> Tensor:
        """The five best classes (``n 5``) of the val images by one of the heads on all images, whoever has it."""
        kind, _ = self.heads[head]
        found = torch.zeros(len(self.val.labels), min(5, self.classes), dtype=torch.int64)
        for sweep in self.sweeps:
            if sweep.kind == kind and head in self._places(sweep):
                x, _ = _tensors(self.material.splits[kind][1], slice(None))
                found = torch.from_numpy(rank(sweep.all.ready.take([self._places(sweep).index(head)]), x))
        return distributed.summed(found, self.device).cpu()

    def _measure(self) -> None:
        top1, loss = self._accuracies("all", 1, slice(None))
        self.val_top1.append(top1)
        head = best_of(top1, loss)
        if top1[head] > self.best.top1:
            self.best = Best(top1[head], self.epoch, head, self._ranked(head))

    def _outcome(self) -> Outcome:
        protocol, chosen, details = self.protocol, 0, {}
        if len(self.heads) > 1:
            held = self._accuracies("kept", 0, self.held.numpy())
            chosen = best_of(*held)
            details = {"held_out_top1": self._table(held[0]), "held_out_images": int(self.held.sum())}
            if self.place[0] == 0:
                warn_of_edge("learning rate", self.heads[chosen][1], protocol.rates)
        best = self.best
        metrics = top_metrics(self._ranked(chosen).numpy(), self.val.labels, self.classes)
        metrics["top1_best_on_val"] = Predictions(best.ranked[:, 0].numpy(), self.val.labels)
        how = "the only head" if len(self.heads) == 1 else "feature and rate chosen on held-out train images"
        over = "over epochs" if protocol.val_every_epoch else "after the last epoch"
        return Outcome(
            metrics,
            {
                "feature": self.heads[chosen][0],
                "rate": self.heads[chosen][1],
                "reported": f"top1: {how}, trained on all train images, after the last epoch; "
                f"top1_best_on_val: as the reference reports it, the best head on val {over}",
                "best_on_val": {"feature": self.heads[best.head][0], "rate": self.heads[best.head][1], "epoch": best.epoch},
                "features": self.kinds,
                "rates": list(protocol.rates),
                "val_top1": self._table(self.val_top1[-1]),
                "best_val_top1_per_epoch": [round(max(top1), 3) for top1 in self.val_top1],
                "train_loss_per_epoch": [_rounded(losses[chosen]) for losses in self.train_loss],
                "steps": self.protocol.epochs * self.steps.per_epoch,
                "processes": self.place[1],
                **details,
            },
            recorded=lambda: self._path.unlink(missing_ok=True),
        )

    def _table(self, values: Sequence[float]) -> dict[str, list[float]]:
        """``values`` of all heads by feature, then by rate."""
        r = len(self.protocol.rates)
        return {kind: [round(v, 3) for v in values[i * r : (i + 1) * r]] for i, kind in enumerate(self.kinds)}

    # Going on after a stop -------------------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        """Where the state is: another file for other settings, weights or data."""
        about = [self.protocol.model_dump(mode="json"), self.material.identity]
        return self.material.folder / f"unfinished-{hash_of(about)}.pt"

    def _save(self) -> None:
        """Write the heads of all processes, and what was measured, atomically."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "best": dict(self.best._asdict()),
            "train_loss": self.train_loss,
            "val_top1": self.val_top1,
        }
        for sweep in self.sweeps:
            for name, trainer in sweep.trainers.items():
                for part, tensor in _parts(trainer).items():
                    whole = torch.zeros(len(self.protocol.rates), *tensor.shape[1:], device=self.device)
                    whole[sweep.own] = tensor
                    state[f"{sweep.kind}.{name}.{part}"] = distributed.summed(whole, self.device).cpu()
        if self.place[0] == 0:
            with atomic(self._path) as path:
                torch.save(state, path)

    def _restore(self) -> bool:
        """Take up the state of a run that stopped, if there is one. Raises ``UserError`` if it cannot be read."""
        if not self._path.exists():
            return False
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds for a broken file
            reason = str(error).splitlines()[0]
            raise UserError(f"{self._path}: not a state to go on from ({reason}); remove the file to start anew") from error
        for sweep in self.sweeps:
            for name, trainer in sweep.trainers.items():
                for part, tensor in _parts(trainer).items():
                    tensor.copy_(state[f"{sweep.kind}.{name}.{part}"][sweep.own])
        self.epoch, self.best = state["epoch"], Best(**state["best"])
        self.train_loss, self.val_top1 = state["train_loss"], state["val_top1"]
        return True


def _parts(trainer: HeadTrainer) -> dict[str, Tensor]:
    """All that a step changes."""
    running = {} if trainer.norm_batch is None else trainer.running._asdict()
    return {
        **running,
        "weight": trainer.heads.weight,
        "bias": trainer.heads.bias,
        "weight_velocity": trainer.velocity.weight,
        "bias_velocity": trainer.velocity.bias,
    }


def _tensors(split: Split, rows: NDArray[np.bool_] | slice) -> tuple[Tensor, Tensor]:
    """Features (``n c``) and labels (``n``) of some rows of a split."""
    return torch.from_numpy(np.array(split.features[rows])), torch.from_numpy(split.labels[rows])


def _with_drop_path(encoder: Encoder, rate: float) -> Encoder:
    """The same encoder, with stochastic depth where ``rate`` asks for it."""
    encoder.eval()
    if not rate:
        return encoder
    stochastic = build_encoder(encoder.spec, rate)
    stochastic.load_state_dict(encoder.state_dict())
    return stochastic


def _generator(seed: int, step: int) -> torch.Generator:
    """For the draws of stochastic depth of one step."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1))


def _rounded(loss: float) -> float | None:
    """A loss as JSON can hold it; None where the head diverged."""
    return round(loss, 5) if math.isfinite(loss) else None
