"""Multi-Token Enhancing, written once for every method (arXiv 2411.15787, equations 2 to 6).

A branch turns views into vectors: one of the global token and, with MTE, one fused of all auxiliary tokens. A
method's loss is then computed on ``global against global`` (plain) or on ``fused against fused`` and ``global
against fused`` (MTE).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.heads import Fusion
from mte_bench.encoders.tokens import AuxiliaryTokens
from mte_bench.errors import UserError

if TYPE_CHECKING:
    from pretrain.methods import Method
    from pretrain.recipe import Recipe


class Vectors(NamedTuple):
    """A branch's output: for each view ``b k`` of the global token and of the fused auxiliary tokens (or None)."""

    of_global: list[Tensor] | None
    of_fused: list[Tensor] | None


class Branch(nn.Module):
    """Student or teacher: encoder, head, tail and, with MTE, auxiliary tokens with heads of their own."""

    def __init__(self, recipe: "Recipe", method: "Method", student: bool):
        super().__init__()
        spec = EncoderSpec(
            arch=recipe.arch,
            image_size=recipe.image_size,
            patch_size=recipe.patch_size,
            options=recipe.arch_options,
            init=recipe.init,
        )
        self.encoder = build_encoder(spec, recipe.drop_path if student else 0.0)
        method.init_encoder(self.encoder)
        self.head = method.head(self.encoder.width, 1)
        self.tail = method.tail(student)
        self.mte = recipe.mte
        self.auxiliary: AuxiliaryTokens | None = None
        self.heads: nn.Module | None = None
        if recipe.mte:
            if not recipe.mte.count:
                raise UserError("mte: auxiliary_cls and pooled are both 0; give it tokens or leave mte out")
            if recipe.mte.auxiliary_cls and not self.encoder.has_cls:
                raise UserError(f"mte.auxiliary_cls: {recipe.arch} has no CLS token; set mte.auxiliary_cls=0")
            self.auxiliary = AuxiliaryTokens(self.encoder, recipe.mte)
            if recipe.mte.heads == "independent":
                self.heads = method.head(self.encoder.width, recipe.mte.count)
            self.fusion = Fusion(recipe.mte.fusion, recipe.mte.count, method.output_width)
        if not student:
            self.requires_grad_(False)

    def forward(
        self,
        groups: Sequence[Tensor],
        drop_path: Sequence[Tensor | None] | None = None,
        of_global: bool = True,
        of_fused: bool = True,
    ) -> Vectors:
        """Vectors of all views; a group is ``v b c h w``, views of one size, and passes the encoder at once.

        ``drop_path`` holds each group's draws (``paths v*b``). ``of_global`` and ``of_fused`` say what is wanted.
        """
        fused_wanted = of_fused and self.auxiliary is not None
        views, globals_, auxiliaries = [], [], []
        for index, group in enumerate(groups):
            self.encoder.use_drop_path(drop_path[index] if drop_path else None)
            images = group.flatten(0, 1)
            local_only_global = index > 0 and self.mte is not None and self.mte.local_views == "global"
            if fused_wanted and not local_only_global:
                assert self.auxiliary is not None
                tokens, auxiliary = self.auxiliary.encode(self.encoder, images)
                auxiliaries.append(auxiliary)
            else:
                tokens = self.encoder(images)
            if of_global:
                globals_.append(tokens.global_token)
            views.append((len(group), group.shape[1]))
        projections = []
        if of_global:
            projections.append(self.head(torch.cat(globals_).unsqueeze(0)).squeeze(0))
        if fused_wanted:
            projections.append(self._fused(torch.cat(auxiliaries)))
        vectors = list(self.tail(torch.cat(projections)).split([len(projection) for projection in projections]))
        sizes = [size for count, size in views for _ in range(count)]
        global_vectors = list(vectors[0].split(sizes)) if of_global else None
        fused_vectors = list(vectors[-1].split(_leading(sizes, len(vectors[-1])))) if fused_wanted else None
        return Vectors(global_vectors, fused_vectors)

    def _fused(self, auxiliary: Tensor) -> Tensor:
        """Auxiliary tokens ``b t c`` to fused projections ``b d`` (equation 3)."""
        b, t, _ = auxiliary.shape
        if self.heads is not None:
            return self.fusion(self.heads(auxiliary.transpose(0, 1)))
        return self.fusion(self.head(auxiliary.transpose(0, 1).reshape(1, t * b, -1)).view(t, b, -1))


def _leading(sizes: list[int], rows: int) -> list[int]:
    """The first of ``sizes`` that add up to ``rows`` (local views may have no fused vector)."""
    kept: list[int] = []
    for size in sizes:
        if sum(kept) == rows:
            break
        kept.append(size)
    return kept


def teacher_vectors(teacher: Callable[..., Vectors], groups: Sequence[Tensor], recipe: "Recipe") -> list[Tensor]:
    """The teacher's vectors of the global views: fused with MTE, of the global token without. No gradient."""
    fused = recipe.mte is not None and recipe.mte.target == "fused"
    with torch.no_grad():
        vectors = teacher(groups[:1], of_global=not fused, of_fused=fused)
    return (vectors.of_fused if fused else vectors.of_global) or []


def loss(method: "Method", student: Vectors, targets: Sequence[Tensor], recipe: "Recipe") -> dict[str, Tensor]:
    """The loss and its parts: ``loss`` and, with MTE, ``loss_fused`` (4) and ``loss_global`` (5) unweighted."""
    assert student.of_global is not None
    of_global = over_pairs(method, student.of_global, targets)
    if recipe.mte is None or student.of_fused is None:
        return {"loss": of_global}
    of_fused = over_pairs(method, student.of_fused, targets)
    total = recipe.mte.weights[0] * of_fused + recipe.mte.weights[1] * of_global
    return {"loss": total, "loss_fused": of_fused, "loss_global": of_global}


def over_pairs(method: "Method", vectors: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean of the method's loss over all pairs of a teacher's view and a different view of the student's."""
    predictions = [method.prediction(view) for view in vectors]
    terms = [
        method.pair(prediction, target, view)
        for view, target in enumerate(targets)
        for other, prediction in enumerate(predictions)
        if other != view
    ]
    return torch.stack(terms).mean()
