"""What the methods should compute, written out: whole steps of iBOT, HSSL and learning from labels, learned tokens.

Each function compares one part, in float64, and returns the largest differences; ``equality.py`` prints them.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mte_bench.encoders.token_learner import TokenFuser, TokenLearner, Version
from pretrain import mte
from pretrain.methods import Method
from pretrain.methods.hssl import HSSL
from pretrain.methods.ibot import IBOT
from pretrain.methods.supervised import Supervised
from pretrain.recipe import Recipe

CLASSES = 10
SMALL = {"prototypes": 64, "hidden": 32, "bottleneck": 16}
TINY: dict[str, Any] = {
    "arch": "vit_tiny_patch16_224",
    "image_size": 32,
    "patch_size": 8,
    "arch_options": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "drop_path": 0.0,
    "batch_size": 4,
}
MaybeMasks = Tensor | None


class Difference(NamedTuple):
    """The largest absolute differences; ``gradient`` is None where there is nothing to differentiate."""

    value: float
    gradient: float | None


def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest absolute difference within ``pairs`` of tensors with the same number of elements."""
    return max((ours.reshape(theirs.shape) - theirs).abs().max().item() for ours, theirs in pairs)


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest of several."""
    values, gradients = zip(*differences, strict=True)
    return Difference(max(values), max(gradients))


def perturbed(recipe: Recipe, method: Method) -> tuple[mte.Branch, mte.Branch]:
    """A student and a teacher whose weights are neither small nor alike, as they are at the start; float64."""
    student, teacher = mte.Branch(recipe, method, student=True), mte.Branch(recipe, method, student=False)
    teacher.load_state_dict(student.state_dict(), strict=False)
    with torch.no_grad():
        for seed, branch in enumerate((student, teacher)):
            for name, parameter in branch.named_parameters():
                generator = torch.Generator().manual_seed(2 * zlib.crc32(name.encode()) + seed)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student.double(), teacher.double()


def of_step(student: mte.Branch, loss: Callable[[], Tensor], formula: Callable[[], Tensor], without: str = "") -> Difference:
    """Of the engine's loss and the formula's, and of the gradients of all of the student's parameters but ``without``."""
    values, gradients = [], []
    for compute in (loss, formula):
        student.zero_grad()
        values.append(compute())
        values[-1].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert gradients[0].keys() == gradients[1].keys() == trained
    return Difference(largest([(values[0], values[1])]), largest((gradients[0][n], gradients[1][n]) for n in trained - {without}))


def projected(head: Any, x: Tensor, copy: int = 0) -> Tensor:
    """DINO's head, layer by layer."""
    for index, layer in enumerate(head.layers):
        x = x @ layer.weight[copy].T + layer.bias[copy]
        x = F.gelu(x) if index < 2 else x
    return x


def scores(tail: Any, x: Tensor) -> Tensor:
    """DINO's prototypes."""
    weight = tail.weight_v / tail.weight_v.norm(dim=1, keepdim=True) * tail.weight_g
    return (x / x.norm(dim=-1, keepdim=True)) @ weight.T


def cross_entropy(target: Tensor, logits: Tensor, temperature: float = 0.1) -> Tensor:
    """Of distributions ``target`` and unnormalised ``logits``, both ``... k``; not averaged."""
    return -(target * torch.log_softmax(logits / temperature, -1)).sum(-1)


def of_masked(target: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    """iBOT's patch loss: the mean over each image's masked patches, then over the images."""
    return ((cross_entropy(target, logits) * masks).sum(-1) / masks.sum(-1).clamp(min=1)).mean()


def seen_by_masked_methods(local: int) -> tuple[list[Tensor], Tensor]:
    """Two global and ``local`` local views of four images, and masks of the global ones."""
    groups = [torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)]
    groups += [torch.randn(local, 4, 3, 16, 16, dtype=torch.float64)] if local else []
    masks = torch.rand(2, 4, 16) < 0.3
    masks[0, 1] = False
    return groups, masks


def masked_step(recipe: Recipe, method: IBOT, local: int, outputs: Callable[..., dict[str, Tensor]]) -> Difference:
    """A step of a method with masks; ``outputs`` of a branch, a view and its mask are scores, by the token they are of.

    ``patches`` are those of patches, ``lead`` of the vector that makes the target, all others chase it: with MTE
    ``fused`` has half of the weight, the mean of what remains the other half.
    """
    student, teacher = perturbed(recipe, method)
    method.double()
    method.centre.normal_()
    method.patch_centre.normal_()
    groups, masks = seen_by_masked_methods(local)
    views = [view for group in groups for view in group]
    epoch, temperature = 2, float(np.linspace(0.04, 0.07, 30)[2])
    with torch.no_grad():
        of_teacher = [outputs(teacher, view, None) for view in groups[0]]

    def formula() -> Tensor:
        own = [outputs(student, view, masks[index] if index < 2 else None) for index, view in enumerate(views)]
        target = [torch.softmax((one["lead"] - method.centre) / temperature, -1) for one in of_teacher]
        of_patches = [torch.softmax((one["patches"] - method.patch_centre) / temperature, -1) for one in of_teacher]

        def over_pairs(key: str) -> Tensor:
            pairs = [(q, v) for q in range(2) for v in range(len(views)) if v != q]
            assert len(pairs) == 2 * (1 + local)
            return torch.stack([cross_entropy(target[q], own[v][key]).mean() for q, v in pairs]).mean()

        alone = [key for key in own[0] if key not in ("lead", "patches", "fused")]
        base = torch.stack([over_pairs(key) for key in alone]).mean()
        loss = (over_pairs("fused") + base) / 2 if recipe.mte else base
        return loss + torch.stack([of_masked(of_patches[q], own[q]["patches"], masks[q]) for q in range(2)]).mean()

    vectors = mte.teacher_vectors(teacher, groups, recipe, patches=True)

    def loss() -> Tensor:
        targets = mte.targets(method, vectors, epoch, recipe)
        return mte.loss(method, student(groups, None, masks), targets, recipe, masks, epoch)["loss"]

    # for smaller views timm interpolates the table of positions in float32
    value, gradient = of_step(student, loss, formula, without="encoder.model.pos_embed" if local else "")
    centre = 0.9 * method.centre + 0.1 * torch.cat([one["lead"] for one in of_teacher]).mean(0, keepdim=True)
    method.update([torch.cat(mte.lead(vectors))], [torch.stack(vectors.of_patches or [])])
    return Difference(max(value, largest([(method.centre, centre)])), gradient)


def ibot_step(local: int) -> Difference:
    """iBOT: the encoder's tokens are computed step by step too, with masked embeddings put in by hand."""
    recipe = Recipe(**TINY, method="ibot", method_settings={**SMALL, "patch_weight": 1.0})

    def tokens(branch: mte.Branch, images: Tensor, masks: MaybeMasks) -> tuple[Tensor, Tensor]:
        model: Any = branch.encoder.model
        patch = model.patch_embed.proj
        x = F.conv2d(images, patch.weight, patch.bias, stride=patch.stride).flatten(2).transpose(1, 2)
        if masks is not None:
            assert branch.mask_token is not None
            x = x * ~masks.unsqueeze(-1) + branch.mask_token * masks.unsqueeze(-1)
        if x.shape[1] + 1 != model.pos_embed.shape[1]:
            return branch.encoder(images).global_token, x  # a local view: nothing is masked
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
        x = model.norm(model.blocks(x))
        return x[:, 0], x[:, 1:]

    def outputs(branch: mte.Branch, images: Tensor, masks: MaybeMasks) -> dict[str, Tensor]:
        cls, patches = (scores(branch.tail, projected(branch.head, x)) for x in tokens(branch, images, masks))
        return {"lead": cls, "global": cls, "patches": patches}

    return masked_step(recipe, IBOT(IBOT.Settings(**recipe.method_settings)), local, outputs)


def hssl_step(local: int, enhanced: bool) -> Difference:
    """HSSL: the companion's vector leads; with MTE its projection is one more member of what is fused."""
    added = {"auxiliary_cls": 2, "pooled": 1, "kernel": 3} if enhanced else None
    recipe = Recipe(**TINY, method="hssl", method_settings=SMALL, mte=added)

    def outputs(branch: mte.Branch, images: Tensor, masks: MaybeMasks) -> dict[str, Tensor]:
        how = {} if masks is None else {"masks": masks, "mask_token": branch.mask_token}
        if branch.auxiliary is not None:
            tokens, auxiliary = branch.auxiliary.encode(branch.encoder, images, **how)
        else:
            tokens = branch.encoder(images, **how)
        assert branch.companion is not None
        vectors = {
            "global": projected(branch.head, tokens.global_token),
            "companion": projected(branch.companion_head, branch.companion(tokens)),
            "patches": projected(branch.head, tokens.patches),
        }
        if branch.auxiliary is not None:
            members = [projected(branch.heads, auxiliary[:, token], token) for token in range(3)]
            vectors["fused"] = (sum(members) + vectors["companion"]) / 4
        vectors["lead"] = vectors["fused" if enhanced else "companion"]
        return {key: scores(branch.tail, vector) for key, vector in vectors.items()}

    return masked_step(recipe, HSSL(HSSL.Settings(**SMALL)), local, outputs)


WITH_LABELS: tuple[dict[str, Any] | None, ...] = (
    None,
    {},
    {"label_weight": 0.5},
    {"heads": "shared"},
    {"target": "each"},
    {"weights": (1.0, 0.25)},
)


def supervised_step(settings: dict[str, Any] | None) -> Difference:
    """Equations (7) to (9): the fused classifiers learn from the labels and teach the global token's."""
    recipe = Recipe(
        **TINY,
        method="supervised",
        views={"global2": None},
        mte=settings if settings is None else {"auxiliary_cls": 2, "pooled": 3, "kernel": 3, **settings},
    )
    method = Supervised(Supervised.Settings(), CLASSES)
    student, _ = perturbed(recipe, method)
    images = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    labels = torch.softmax(torch.randn(4, CLASSES, dtype=torch.float64), -1)

    def of_scores(target: Tensor, logits: Tensor) -> Tensor:
        return cross_entropy(target, logits, 1.0).mean()

    def formula() -> Tensor:
        head: Any = student.head
        if student.auxiliary is None or settings is None:
            return of_scores(labels, student.encoder(images[0]).global_token @ head.weight[0].T + head.bias[0])
        tokens, auxiliary = student.auxiliary.encode(student.encoder, images[0])
        logits = tokens.global_token @ head.weight[0].T + head.bias[0]
        heads: Any = [(student.heads, i) for i in range(5)] if student.heads else [(head, 0)] * 5
        fused = sum(auxiliary[:, i] @ stack.weight[copy].T + stack.bias[copy] for i, (stack, copy) in enumerate(heads)) / 5
        taught = labels if settings.get("target") == "each" else torch.softmax(fused, -1).detach()
        weights = settings.get("weights", (1.0, 1.0))
        loss = weights[0] * of_scores(labels, fused) + weights[1] * of_scores(taught, logits)
        return loss + settings.get("label_weight", 0.0) * of_scores(labels, logits)

    targets = mte.Targets([labels], [labels], [])
    return of_step(student, lambda: mte.loss(method, student([images]), targets, recipe)["loss"], formula)


# ---- learned tokens


def of_functions(module: nn.Module, ours: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> Difference:
    """Of two functions of ``inputs`` and of ``module``'s weights, and of the gradients of both; weights are shaken before."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    direction = None
    results: list[list[Tensor]] = []
    for function in (ours, formula):
        module.zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        direction = torch.randn_like(out) if direction is None else direction
        (out * direction).sum().backward()
        gradients = [x.grad for x in (*leaves, *module.parameters()) if x.grad is not None]
        assert len(gradients) == len(leaves) + len(list(module.parameters()))
        results.append([out, *(gradient.clone() for gradient in gradients)])
    (own, *own_gradients), (other, *other_gradients) = results
    return Difference(largest([(own, other)]), largest(zip(own_gradients, other_gradients, strict=True)))


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _mlp(x: Tensor, layers: Any) -> Tensor:
    bias = 0 if layers[2].bias is None else layers[2].bias
    return _gelu(x @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + bias


def _convolved(maps: dict[tuple[int, int], Tensor], weight: Tensor) -> dict[tuple[int, int], Tensor]:
    """A 3x3 convolution position by position: ``b in`` at each (row, column) to ``b out``; nothing beyond the border."""
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return {
        (y, x): torch.stack([
            maps[y + dy, x + dx] @ weight[:, :, dy + 1, dx + 1].T for dy, dx in around if (y + dy, x + dx) in maps
        ]).sum(0)
        for y, x in maps
    }  # fmt: skip


def learned(learner: TokenLearner, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned tokens ``b s c`` of ``patches`` (``b n c``) on ``grid``."""
    normed = _norm(patches, learner.norm)
    if learner.version == "v1.1":
        exponentials = _mlp(normed, learner.mlp).exp()
        gates = exponentials / exponentials.sum(1, keepdim=True)
    else:
        places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
        maps = {place: normed[:, index] for index, place in enumerate(places)}
        for index, convolution in enumerate(learner.convolutions):
            maps = {place: _gelu(v) if index else v for place, v in maps.items()}
            maps = _convolved(maps, convolution.weight)  # type: ignore[arg-type]
        gates = 1 / (1 + torch.exp(-torch.stack([maps[place] for place in places], 1)))
    return torch.stack([(gates[:, :, token, None] * patches).sum(1) for token in range(gates.shape[2])], 1)


def token_learner(version: Version) -> Difference:
    """Three learned tokens of a map of 3 x 5 positions."""
    learner, grid = TokenLearner(6, 3, version).double(), (3, 5)
    patches = 3 * torch.randn(2, 15, 6, dtype=torch.float64)
    return of_functions(learner, lambda x: learner(x, grid), lambda x: learned(learner, x, grid), patches)


def token_fuser() -> Difference:
    """What 3 learned tokens give back to 8 patches."""
    fuser = TokenFuser(6, 3).double()

    def formula(tokens: Tensor, patches: Tensor) -> Tensor:
        normed = _norm(tokens, fuser.norm_tokens)
        rows = [sum(w * normed[:, j] for j, w in enumerate(row)) for row in fuser.mix.weight]
        mixed = _norm(torch.stack(rows, 1), fuser.norm_mixed)
        gates = 1 / (1 + torch.exp(-_mlp(_norm(patches, fuser.norm_patches), fuser.gates)))
        return sum(gates[:, :, token, None] * mixed[:, None, token] for token in range(3))  # type: ignore[return-value]

    tokens, patches = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 8, 6, dtype=torch.float64)
    return of_functions(fuser, fuser, formula, tokens, patches)
