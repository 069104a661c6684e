"""Multi-Token Enhancing, written once for every method (arXiv 2411.15787, equations 2 to 9).

A branch turns views into vectors: one of the global token and, with MTE, one fused of all auxiliary tokens. A
method's loss is then computed on ``global against global`` (plain) or on ``fused against fused`` and ``global
against fused`` (MTE). Where the target is a label, the fused vector learns from it and teaches the global one.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mte_bench.encoders.encoder import EncoderSpec, SharedDropPath, build_encoder
from mte_bench.encoders.heads import Fusion
from mte_bench.encoders.tokens import AuxiliaryTokens
from mte_bench.errors import UserError

if TYPE_CHECKING:
    from pretrain.methods import Method
    from pretrain.recipe import Recipe


class Vectors(NamedTuple):
    """A branch's output: for each view ``b k`` of the global token, of the fused auxiliary tokens, of the companion."""

    of_global: list[Tensor] | None
    of_fused: list[Tensor] | None
    of_companion: list[Tensor] | None = None
    of_patches: list[Tensor] | None = None
    """For each global view: ``b n k`` of all patches or, given masks, ``m k`` of the masked ones."""


class Targets(NamedTuple):
    """What the student's vectors are compared with, for each global view."""

    lead: list[Tensor]
    """Of the teacher's leading vector: fused with MTE, else the companion's, else the global token's; or labels."""
    of_global: list[Tensor]
    """For the student's global token: the lead, unless MTE's distillation is switched off."""
    patches: list[Tensor]


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
            token_learner=recipe.token_learner,
        )
        drop_path = recipe.drop_path if student else 0.0
        self.encoder = build_encoder(spec, drop_path)
        if method.masking and not self.encoder.keeps_patches:
            raise UserError(
                f"token_learner: {method.title} needs patches at the end; set token_learner.fuser=true or leave it out"
            )
        method.init_encoder(self.encoder)
        self.head = method.head(self.encoder.width, 1)
        self.tail = method.tail(student)
        self.statistics_per_view = method.statistics_per_view
        self.mask_token = nn.Parameter(torch.zeros(1, self.encoder.embedded_width)) if student and method.masking else None
        self.companion = method.companion(self.encoder, drop_path)
        self.companion_head = method.head(self.encoder.width, 1) if self.companion else None
        if self.companion:  # its stochastic depth is drawn and given along with the encoder's
            self.encoder.drop_paths += [module for module in self.companion.modules() if isinstance(module, SharedDropPath)]
        self.mte = recipe.mte
        self.auxiliary: AuxiliaryTokens | None = None
        self.heads: nn.Module | None = None
        self.fused_tails = nn.ModuleList()
        if recipe.mte:
            self._add_auxiliary(recipe, method, student)
        if not student:
            self.requires_grad_(False)

    def _add_auxiliary(self, recipe: "Recipe", method: "Method", student: bool) -> None:
        assert recipe.mte is not None
        if not recipe.mte.count:
            raise UserError("mte: auxiliary_cls and pooled are both 0; give it tokens or leave mte out")
        if recipe.mte.auxiliary_cls and not self.encoder.has_cls:
            raise UserError(f"mte.auxiliary_cls: {recipe.arch} has no CLS token; set mte.auxiliary_cls=0")
        self.auxiliary = AuxiliaryTokens(self.encoder, recipe.mte)
        if recipe.mte.heads == "independent":
            self.heads = method.head(self.encoder.width, recipe.mte.count)
        if recipe.mte.statistics == "both" and not hasattr(method, "centre"):
            raise UserError(f"mte.statistics=both: {method.title} has no centre; leave it at 'target'")
        count = recipe.mte.count + (self.companion is not None) + recipe.mte.fuse_global
        self.fusion = Fusion(recipe.mte.fusion, count, method.output_width)
        own = {"shared": 0, "fused": 1, "each": count}[recipe.mte.tails]
        self.fused_tails = nn.ModuleList(method.tail(student) for _ in range(own))
        if recipe.mte.frozen:
            for part in (self.auxiliary, self.heads, self.fusion, self.fused_tails):
                if part is not None:
                    part.requires_grad_(False)

    def forward(
        self,
        groups: Sequence[Tensor],
        drop_path: Sequence[Tensor | None] | None = None,
        masks: Tensor | None = None,
        *,
        of_global: bool = True,
        of_fused: bool = True,
        of_companion: bool = True,
        of_patches: bool = False,
    ) -> Vectors:
        """Vectors of all views; a group is ``v b c h w``, views of one size, and passes the encoder at once.

        ``drop_path`` holds each group's draws (``paths v*b``), ``masks`` (``v b n``) hides patches of the global views.
        The flags say what is wanted.
        """
        of_fused = of_fused and self.auxiliary is not None
        of_companion = of_companion and self.companion is not None
        sizes: list[int] = []
        globals_: list[Tensor] = []
        auxiliaries: list[Tensor] = []
        companions: list[Tensor] = []
        patches: Tensor | None = None
        for index, group in enumerate(groups):
            self.encoder.use_drop_path(drop_path[index] if drop_path else None)
            images = group.flatten(0, 1)
            hidden = {"masks": masks.flatten(0, 1), "mask_token": self.mask_token} if masks is not None and index == 0 else {}
            only_global = index > 0 and self.mte is not None and self.mte.local_views == "global"
            if of_fused and not only_global:
                assert self.auxiliary is not None
                tokens, auxiliary = self.auxiliary.encode(self.encoder, images, **hidden)
                auxiliaries.append(auxiliary)
            else:
                tokens = self.encoder(images, **hidden)
            globals_.append(tokens.global_token)
            if self.companion is not None and (of_companion or of_fused):
                companions.append(self.companion(tokens))
            if index == 0 and (of_patches or masks is not None):
                patches = tokens.patches
            sizes += [group.shape[1]] * len(group)
        projections: dict[str, Tensor] = {}
        members: list[Tensor] = []
        fuse_global = self.mte is not None and self.mte.fuse_global
        if of_global or (of_fused and fuse_global):
            projections["global"] = self._each_view(self._head(self.head), torch.cat(globals_), sizes)
            members += [projections["global"]] if fuse_global else []
        if companions:
            projections["companion"] = self._each_view(self._head(self.companion_head), torch.cat(companions), sizes)
            members.append(projections["companion"])
        if of_fused:
            projections["fused"] = self._fused(torch.cat(auxiliaries), members, sizes)
        for key, wanted in (("global", of_global), ("companion", of_companion)):
            if not wanted:
                projections.pop(key, None)
        vectors = self._tailed(projections, sizes)
        return Vectors(
            vectors.get("global"),
            vectors.get("fused"),
            vectors.get("companion"),
            None if patches is None else self._patches(patches, len(groups[0]), masks),
        )

    def _head(self, head: nn.Module | None) -> Callable[[Tensor], Tensor]:
        assert head is not None
        return lambda tokens: head(tokens.unsqueeze(0)).squeeze(0)

    def _each_view(self, function: Callable[[Tensor], Tensor], rows: Tensor, sizes: list[int]) -> Tensor:
        """``function`` of all ``rows`` (``b ...``) at once or, for statistics per view, view by view."""
        if not self.statistics_per_view:
            return function(rows)
        return torch.cat([function(view) for view in rows.split(_leading(sizes, len(rows)))])

    def _fused(self, auxiliary: Tensor, members: list[Tensor], sizes: list[int]) -> Tensor:
        """Auxiliary tokens ``b t c`` and further projections (``b d``) to fused projections ``b d`` (equation 3).

        Projections that have a tail each are fused after it: they stay ``b t d``.
        """

        def project(tokens: Tensor) -> Tensor:
            b, t, _ = tokens.shape
            stacked = tokens.transpose(0, 1)
            projected = self.heads(stacked) if self.heads is not None else self.head(stacked.reshape(1, t * b, -1)).view(t, b, -1)
            return projected.transpose(0, 1)

        projections = self._each_view(project, auxiliary, sizes).transpose(0, 1)
        projections = torch.cat([projections, *(member[: projections.shape[1]].unsqueeze(0) for member in members)])
        return projections.transpose(0, 1) if len(self.fused_tails) > 1 else self.fusion(projections)

    def _tailed(self, projections: dict[str, Tensor], sizes: list[int]) -> dict[str, list[Tensor]]:
        """All projections after the tail, split into views."""
        if self.statistics_per_view or self.fused_tails:
            return {
                key: [self._tail(key)(view) for view in rows.split(_leading(sizes, len(rows)))]
                for key, rows in projections.items()
            }
        together = self.tail(torch.cat(list(projections.values()))).split([len(rows) for rows in projections.values()])
        return {key: list(rows.split(_leading(sizes, len(rows)))) for key, rows in zip(projections, together, strict=True)}

    def _tail(self, key: str) -> Callable[[Tensor], Tensor]:
        """The tail of one kind of projection; where every token has its own, the mean of what they make of ``b t d``."""
        if key != "fused" or not self.fused_tails:
            return self.tail
        if len(self.fused_tails) == 1:
            return self.fused_tails[0]
        return lambda rows: torch.stack([tail(own) for tail, own in zip(self.fused_tails, rows.unbind(1), strict=True)]).mean(0)

    @property
    def tails(self) -> list[nn.Module]:
        """Every tail: of the global token and, where they have others, of the auxiliary ones."""
        return [self.tail, *self.fused_tails]

    def _patches(self, patches: Tensor, views: int, masks: Tensor | None) -> list[Tensor]:
        """Patches (``v*b n c``) of the global views through the global token's head and tail."""
        split = patches.unflatten(0, (views, -1))
        if masks is None:
            return [self.tail(self._head(self.head)(view.flatten(0, 1))).unflatten(0, view.shape[:2]) for view in split]
        return [self.tail(self._head(self.head)(view[mask])) for view, mask in zip(split, masks, strict=True)]


def check(recipe: "Recipe", kind: type["Method"], processes: int = 1) -> None:
    """Raise a ``UserError`` if the recipe's settings contradict each other; costs no memory and no data."""
    method = kind(kind.Settings.check(recipe.method_settings, "method_settings"), classes=2)
    method.fits(recipe.batch_size, recipe.batch_size // (processes * recipe.accumulate))
    if method.labelled and (recipe.views.global2 or recipe.views.local_count):
        raise UserError(f"method {recipe.method}: learns from one view; set views.global2=null and views.local_count=0")
    if not method.labelled and not recipe.views.global2:
        raise UserError(f"method {recipe.method}: compares two views; views.global2 must not be null")
    with torch.device("meta"):
        branch = Branch(recipe, method, student=True)
    patch: int = branch.encoder.model.patch_embed.patch_size[0]  # type: ignore[union-attr, index, assignment]
    cell = patch * (branch.encoder.reduction if method.masking else 1)
    sizes = {"global1": recipe.views.global1.size, "local": recipe.views.local.size if recipe.views.local_count else 0}
    for view, multiple in (("global1", cell), ("local", patch)):
        if sizes[view] % multiple:
            raise UserError(f"views.{view}.size {sizes[view]}: must be a multiple of {multiple} pixels for {recipe.arch}")
    rows, columns = branch.encoder.patch_grid(recipe.views.global1.size)
    if recipe.token_learner and recipe.token_learner.tokens > rows * columns:
        raise UserError(f"token_learner.tokens {recipe.token_learner.tokens}: a global view has only {rows * columns} patches")


def _leading(sizes: list[int], rows: int) -> list[int]:
    """The first of ``sizes`` that add up to ``rows`` (local views may have no fused vector)."""
    kept: list[int] = []
    for size in sizes:
        if sum(kept) == rows:
            break
        kept.append(size)
    return kept


def student_wants(recipe: "Recipe") -> bool:
    """Whether the student's fused vectors are needed: not where the auxiliary part is frozen."""
    return recipe.mte is not None and not recipe.mte.frozen


@torch.no_grad()
def teacher_vectors(
    teacher: Callable[..., Vectors], groups: Sequence[Tensor], recipe: "Recipe", patches: bool = False
) -> Vectors:
    """The teacher's vectors of the global views that are targets, and no others."""
    fused = recipe.mte is not None and recipe.mte.target != "global"
    own = not fused or (recipe.mte is not None and (recipe.mte.target == "each" or recipe.mte.statistics == "both"))
    return teacher(groups[:1], of_global=own, of_fused=fused, of_companion=own, of_patches=patches)


def lead(vectors: Vectors) -> list[Tensor]:
    """The vectors that targets are made of."""
    return vectors.of_fused or vectors.of_companion or vectors.of_global or []


def seen(vectors: Vectors, recipe: "Recipe") -> list[Tensor]:
    """The teacher's vectors that the method's running state (centre, queues) is updated with."""
    both = recipe.mte is not None and recipe.mte.statistics == "both"
    return [*lead(vectors), *((vectors.of_global or []) if both and vectors.of_fused else [])]


def targets(method: "Method", vectors: Vectors, epoch: int, recipe: "Recipe") -> Targets:
    """What the method makes of the teacher's ``vectors``."""
    leading = [method.target(view, epoch) for view in lead(vectors)]
    own = vectors.of_companion or vectors.of_global
    apart = recipe.mte is not None and recipe.mte.target == "each" and own is not None
    of_global = [method.target(view, epoch) for view in own] if apart and own else leading
    return Targets(leading, of_global, vectors.of_patches or [])


def loss(
    method: "Method", student: Vectors, targets: Targets, recipe: "Recipe", masks: Tensor | None = None, epoch: int = 0
) -> dict[str, Tensor]:
    """The loss and its parts, unweighted: ``loss_fused`` (4) and ``loss_global`` (5) with MTE, ``loss_patches``.

    With a companion, the loss of the global token is the mean of its own and the companion's (HSSL).
    """
    assert student.of_global is not None
    of_global = targets.of_global
    label_weight = 0.0
    if method.labelled and recipe.mte and recipe.mte.target == "fused" and student.of_fused is not None:
        of_global = [method.target(view.detach(), epoch) for view in student.of_fused]  # equation (9): fused teaches global
        label_weight = recipe.mte.label_weight
    base = over_pairs(method, student.of_global, of_global)
    if student.of_companion is not None:
        base = (base + over_pairs(method, student.of_companion, of_global)) / 2
    parts = {"loss": base}
    if recipe.mte is not None and student.of_fused is not None:
        of_fused = over_pairs(method, student.of_fused, targets.lead)
        weights = recipe.mte.weights or ((1.0, 1.0) if method.labelled else (0.5, 0.5))
        parts = {"loss": weights[0] * of_fused + weights[1] * base, "loss_fused": of_fused, "loss_global": base}
    if label_weight:
        parts["loss_labels"] = over_pairs(method, student.of_global, targets.lead)
        parts["loss"] = parts["loss"] + label_weight * parts["loss_labels"]
    if masks is not None:
        assert student.of_patches is not None
        views = zip(student.of_patches, targets.patches, masks, strict=True)
        patches = torch.stack([method.patch_loss(own, other, mask, epoch) for own, other, mask in views]).mean()
        parts["loss"] = parts["loss"] + patches
        parts["loss_patches"] = patches
    return parts


def over_pairs(method: "Method", vectors: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean of the method's loss over all pairs of a teacher's view and a different view of the student's.

    Labels are no view: each of the student's views is compared with its own.
    """
    predictions = [method.prediction(view) for view in vectors]
    terms = [
        method.pair(prediction, target, view)
        for view, target in enumerate(targets)
        for other, prediction in enumerate(predictions)
        if (other == view) == method.labelled
    ]
    return torch.stack(terms).mean()
