"""What MTE adds to a pre-training step: DINO, ViT-S/16 at 224 pixels, two views, forward + backward + update.

Three students and teachers take the same steps in turn: plain DINO, DINO+MTE as it is built here, and DINO+MTE
written the obvious way (auxiliary tokens in the sequence behind a boolean attention mask, pooling weights from
convolutions, a loop over the projection heads). The floor is the ratio of multiply-accumulates of a step.

    python benchmarks/step_cost.py            # batch 16 on a CPU, 128 on an accelerator
    python benchmarks/step_cost.py --quick    # batch 4, two rounds
"""

import json
import statistics
import time

import torch
from torch import Tensor, nn

from mte_bench.device import autocast, wait
from mte_bench.encoders.cost import count_macs
from mte_bench.records import environment
from options import turns
from pretrain import mte
from pretrain.methods.dino import DINO
from pretrain.optimiser import EMA, build_optimiser, clip_per_tensor
from pretrain.recipe import Recipe, load_recipe


class NaiveBranch(mte.Branch):
    """MTE without this project's ideas: a mask, materialised pooling weights, a Python loop over heads."""

    def __init__(self, recipe: Recipe, method: DINO, student: bool):
        super().__init__(recipe, method, student)
        assert recipe.mte is not None
        self.heads = None
        sizes = [self.encoder.width, method.settings.hidden, method.settings.hidden, method.settings.bottleneck]
        self.loop = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes[0], sizes[1]), nn.GELU(), nn.Linear(sizes[1], sizes[2]), nn.GELU(), nn.Linear(sizes[2], sizes[3])
            )
            for _ in range(recipe.mte.count)
        ).requires_grad_(student)

    def forward(self, groups: list[Tensor], *, of_global: bool = True, of_fused: bool = True, **_: bool) -> mte.Vectors:  # type: ignore[override]
        sizes = [groups[0].shape[1]] * len(groups[0])
        model, auxiliary = self.encoder.model, self.auxiliary
        assert auxiliary is not None and auxiliary.cls is not None
        x = model._pos_embed(model.patch_embed(groups[0].flatten(0, 1)))
        kept, extra = x.shape[1], len(auxiliary.cls)
        x = torch.cat([x, auxiliary.cls.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        mask = torch.ones(kept + extra, kept + extra, dtype=torch.bool, device=x.device)
        mask[:kept, kept:] = False
        for block in model.blocks:
            x = block(x, attn_mask=mask)
        x, aux = x[:, :kept], x[:, kept:]
        normed = model.norm(x)
        for layer in auxiliary.ten:
            aux = layer(aux, x[:, 1:])
        feature_map = normed[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        pooled = (auxiliary.pool.weights(feature_map) * feature_map.unsqueeze(1)).mean((3, 4))
        tokens = torch.cat([auxiliary.cls_norm(aux), auxiliary.pooled_norm(pooled)], dim=1)
        fused = globals_ = None
        if of_fused:
            fused = list(self.tail(sum(head(tokens[:, i]) for i, head in enumerate(self.loop)) / len(self.loop)).split(sizes))
        if of_global:
            globals_ = list(self.tail(self.head(normed[:, :1].transpose(0, 1)).squeeze(0)).split(sizes))
        return mte.Vectors(globals_, fused)


class Step:
    """Student, teacher and optimiser of one variant, and its training step."""

    def __init__(self, kind: type[mte.Branch], recipe: Recipe, device: torch.device, precision: torch.dtype):
        torch.manual_seed(0)
        self.recipe, self.device, self.precision = recipe, device, precision
        self.method = DINO(DINO.Settings.check(recipe.method_settings, "method_settings")).to(device)
        self.student, self.teacher = kind(recipe, self.method, True).to(device), kind(recipe, self.method, False).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        if device.type != "meta":
            self.optimiser = build_optimiser(self.student, recipe.optimiser, device)
        self.ema = EMA(self.teacher, self.student)

    def forward(self, groups: list[Tensor]) -> Tensor:
        """The loss of a step."""
        with autocast(self.device, self.precision):
            vectors = mte.teacher_vectors(self.teacher, groups, self.recipe)
            targets = mte.targets(self.method, vectors, 1, self.recipe)
            self.vectors = mte.lead(vectors)
            return mte.loss(self.method, self.student(groups), targets, self.recipe)["loss"]

    def __call__(self, groups: list[Tensor]) -> float:
        """One step; returns its seconds."""
        wait(self.device)
        started = time.perf_counter()
        self.forward(groups).backward()
        clip_per_tensor(self.student, 3.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(0.996)
        with torch.no_grad():
            self.method.update([torch.cat(self.vectors)], [])
        wait(self.device)
        return time.perf_counter() - started


def step_macs(recipe: Recipe) -> int:
    """Multiply-accumulates of a step on one image, backward included, counted on the meta device."""
    with torch.device("meta"):
        step = Step(mte.Branch, recipe, torch.device("meta"), torch.float32)
        return count_macs(lambda views: step.forward([views]).backward(), (2, 1, 3, 224, 224)).total


def main() -> None:
    batch, rounds, device, precision = turns(__doc__, cuda_batch=128, rounds=5)

    plain = load_recipe("dino_vits16_100ep", ["drop_path=0"])
    enhanced = load_recipe("dino_vits16_100ep", ["drop_path=0", "mte=true"])
    variants = {
        "plain": Step(mte.Branch, plain, device, precision),
        "mte": Step(mte.Branch, enhanced, device, precision),
        "mte, naive": Step(NaiveBranch, enhanced, device, precision),
    }
    views = [torch.randn(2, batch, 3, 224, 224, device=device)]
    for step in variants.values():
        step(views)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):  # in turn, so that a slower machine is slower for all
        for name, step in variants.items():
            seconds[name].append(step(views))
    floor = step_macs(enhanced) / step_macs(plain)
    ratios = {
        name: statistics.median(t / p for t, p in zip(times, seconds["plain"], strict=True)) for name, times in seconds.items()
    }
    print(f"{'variant':<12} {'s/step':>8} {'ratio':>7} {'over floor':>11}   (batch {batch}, median of {rounds})")
    for name, times in seconds.items():
        over = "" if name == "plain" else f"{100 * (ratios[name] / floor - 1):+.1f} %"
        print(f"{name:<12} {statistics.median(times):8.3f} {ratios[name]:7.3f} {over:>11}")
    print(f"floor: {floor:.3f} times the multiply-accumulates")
    print(
        json.dumps(
            {
                "benchmark": "step_cost",
                "ratios": {"mte": ratios["mte"], "naive": ratios["mte, naive"]},
                "floor": floor,
                "batch": batch,
                "rounds": rounds,
                "precision": str(precision).removeprefix("torch."),
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
