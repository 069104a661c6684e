"""A recipe: the complete settings of one pre-training, as its YAML file states them."""

import math
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mte_bench.encoders.encoder import Init
from mte_bench.encoders.heads import FusionKind
from mte_bench.encoders.token_learner import TokenLearnerSettings
from mte_bench.encoders.tokens import AuxiliarySettings
from mte_bench.errors import UserError, did_you_mean
from mte_bench.files import hash_of
from mte_bench.settings import Settings, load_yaml, merge, override
from pretrain.methods import METHODS

RECIPES = Path(__file__).parent / "recipes"
SMOKE_BATCH = 8
RAND_AUGMENT = r"rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3aw?))*"
Probability = float


class View(Settings):
    """How one kind of view is made; the order is crop, flip, RandAugment, jitter, grayscale, blur, solarize, erasing."""

    size: int = Field(224, gt=0)
    scale: tuple[float, float] = (0.14, 1.0)
    """Range of the crop's share of the image area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: Probability = Field(0.5, ge=0, le=1)
    jitter: Probability = Field(0.8, ge=0, le=1)
    """Probability of colour jitter; ``jitter_strength`` holds brightness, contrast, saturation, hue."""
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: Probability = Field(0.2, ge=0, le=1)
    blur: Probability = Field(0.0, ge=0, le=1)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation in pixels of the view (PIL's ``radius``)."""
    solarize: Probability = Field(0.0, ge=0, le=1)
    solarize_threshold: int = Field(128, ge=0, le=256)
    auto_augment: str | None = None
    """RandAugment in timm's notation, e.g. ``rand-m9-mstd0.5-inc1``; supervised recipes have it in place of the jitter."""
    erase: Probability = Field(0.0, ge=0, le=1)
    """Probability of random erasing: a rectangle becomes noise, each value drawn by itself (timm's ``pixel`` mode)."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, most in (("scale", 1.0), ("ratio", math.inf), ("blur_radius", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} must be two numbers above 0, the smaller first" + (", at most 1" if most == 1 else ""))
        if min(self.jitter_strength) < 0 or self.jitter_strength[3] > 0.5:
            raise ValueError("jitter_strength must be four numbers from 0, the last (hue) at most 0.5")
        if self.auto_augment and not re.fullmatch(RAND_AUGMENT, self.auto_augment):
            raise ValueError(f"auto_augment '{self.auto_augment}' is not in timm's notation, e.g. rand-m9-mstd0.5-inc1")
        return self


class Views(Settings):
    """Two global views and ``local_count`` local views of each image. Source: DINO's augmentation."""

    global1: View = View(blur=1.0)
    global2: View | None = View(blur=0.1, solarize=0.2)
    """Null where one view is enough: for methods that learn from labels."""
    local: View = View(size=96, scale=(0.05, 0.4), blur=0.5)
    local_count: int = Field(0, ge=0)

    @property
    def global_views(self) -> list[View]:
        """One or two."""
        return [self.global1] if self.global2 is None else [self.global1, self.global2]

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(number of views, their size in pixels) of each resolution."""
        local = [(self.local_count, self.local.size)] if self.local_count else []
        return [(len(self.global_views), self.global1.size), *local]


class Optimiser(Settings):
    """AdamW, its schedules and what is done to the gradients. Source: DINO ``main_dino.py``."""

    lr: float = Field(5e-4, ge=0)
    """Learning rate per ``lr_per`` images of the global batch (linear scaling)."""
    lr_per: int = Field(256, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(10, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    """Weight decay follows a cosine from ``weight_decay`` to this over the run; 1-D parameters and biases have none."""
    clip: float | None = 3.0
    """Largest L2 norm of the gradient; null does not clip."""
    clip_norm: Literal["tensor", "whole"] = "tensor"
    """Whether ``clip`` bounds each parameter tensor's own gradient, as in DINO, or the norm of all of them together."""
    decay: Literal["weights", "layers", "all"] = "weights"
    """What weight decay applies to. ``weights``: all but biases, 1-D parameters and Swin's relative position tables;
    ``layers``: neither to tokens and position tables (DeiT, MAE); or everything."""
    warmup_from: float = Field(0.0, ge=0)
    """Where the warm-up starts, scaled like ``lr``."""
    min_lr_scaled: bool = False
    """Whether ``min_lr`` is scaled like ``lr``."""
    warmup_cuts: bool = False
    """Whether the warm-up hides the beginning of a cosine over the whole run (timm's schedule, MoBY's), or comes before it."""


class MTE(AuxiliarySettings):
    """Multi-Token Enhancing: the auxiliary tokens (inherited) and how they enter the loss."""

    heads: Literal["independent", "shared"] = "independent"
    """One projection head per auxiliary token, or one for all (Table 2: independent is better)."""
    fusion: FusionKind = "mean"
    """How projections become one vector. The mean equals the sum once the method normalises it;
    ``normalised-mean`` first gives each projection unit length, ``concat`` is followed by a linear layer."""
    fuse_global: bool = False
    """Whether the global token's projection is one of those that are fused; equation (3) lists auxiliary tokens only."""
    tails: Literal["shared", "fused", "each"] = "shared"
    """Which prototypes (DINO, iBOT) or predictor (BYOL, MoCo v3, MoBY) the auxiliary tokens have. ``shared``: the fused vector
    passes the global token's, as section 4.1 says and as loss (5), which compares the two, suggests. ``fused``: the fused
    vector has its own. ``each``: every auxiliary token has its own, and what comes out is averaged."""
    statistics: Literal["target", "both"] = "target"
    """What the method's centre is the mean of: the teacher's vectors that are targets, as in HSSL, or its global ones, too."""
    weights: tuple[float, float] | None = None
    """Weights of the fused (4) and the global (5) loss in equation (6); null is 1/2 and 1/2. They add up to the base
    method's scale, so that clipping keeps its meaning; HSSL, by the same first author, does the same. With labels
    (equation 9) null is 1 and 1: the global token has no other loss there."""
    local_views: Literal["both", "global"] = "both"
    """Which of the student's vectors local views have: HSSL gives them both."""
    target: Literal["fused", "global", "each"] = "fused"
    """What of the teacher both losses are computed against. ``each`` compares the global token with the teacher's global
    token (or with the labels), so that nothing is distilled into it (Fig. 13); ``global`` is for checks against the
    plain method."""
    frozen: bool = False
    """Leave the auxiliary part as it was initialised and train the global token alone, by the plain loss (Fig. 12)."""
    label_weight: float = Field(0.0, ge=0)
    """Weight of the labels' own loss on the global token, beside what equation (9) distils into it. The paper has none."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.frozen and self.target != "global":
            raise ValueError("frozen auxiliary tokens cannot be a target; set mte.target=global with mte.frozen=true")
        return self


class Recipe(Settings):
    """Everything that determines a pre-training run, apart from the data, the seed and the hardware."""

    description: str = ""
    paper_row: str = ""
    """The row of the paper that this is, e.g. ``tab5.4``: table 5, its fifth row in ``reports/paper.yaml``."""
    method: str
    method_settings: dict[str, Any] = {}
    """Settings of the method's own class, validated by it."""
    arch: str = "vit_small_patch16_224"
    image_size: int = Field(224, gt=0)
    patch_size: int | None = None
    arch_options: dict[str, Any] = {}
    """Further keyword arguments of the timm model (``embed_dim``, ``depth``, ...)."""
    init: Init = "dino"
    """How the encoder's Linear weights are drawn; see ``EncoderSpec``."""
    token_learner: TokenLearnerSettings | None = None
    """Learned tokens in place of the patches from some block on, in every branch and in what is exported."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    epochs: int = Field(100, gt=0)
    batch_size: int = Field(1024, gt=1)
    """Images of one optimiser step, over all processes and accumulated micro-batches."""
    accumulate: int = Field(1, ge=1)
    repeats: int = Field(1, ge=1)
    """Repeated augmentation: each image of an epoch comes so many times in a row, with different views. An epoch keeps
    its length, so that it sees the first 1 / ``repeats`` of the images in its order. Source: DeiT."""
    views: Views = Views()
    optimiser: Optimiser = Optimiser()
    momentum: tuple[float, float] = (0.996, 1.0)
    """EMA momentum of the teacher: cosine from the first to the second over the run."""
    mte: MTE | None = None
    knn_every: int | None = Field(None, ge=0)
    """Measure k-NN every so many epochs on the data's val split (null or 0: never)."""
    snapshot_every: int = Field(0, ge=0)
    """Keep, every so many epochs and of the untrained state, what the final export keeps (0: never). It changes nothing of
    what is trained, so it belongs neither to the recipe's hash nor to what must be the same for a run to go on."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be divisible by accumulate {self.accumulate}")
        if self.views.global2 and self.views.global1.size != self.views.global2.size:
            raise ValueError("views.global1.size and views.global2.size must be equal")
        return self

    @model_validator(mode="before")
    @classmethod
    def _pooled_tokens_only(cls, values: Any) -> Any:
        """A Swin, which has no CLS token, gets no auxiliary ones unless they are asked for."""
        if isinstance(values, dict) and isinstance(values.get("mte"), dict) and str(values.get("arch")).startswith("swin"):
            return {**values, "mte": {"auxiliary_cls": 0, **values["mte"]}}
        return values

    def for_smoke(self, processes: int) -> "Recipe":
        """The same recipe cut to one epoch of small batches: to see that everything runs, not to learn anything.

        A small batch divides the recipe's, and is even if it can: what a method asks of a batch then holds for it too.
        """
        sizes = [size for size in range(2, SMOKE_BATCH + 1) if self.batch_size % (size * processes) == 0]
        batch = processes * max(sizes, key=lambda size: (size % 2 == 0, size), default=SMOKE_BATCH)
        return self.model_copy(update={"epochs": 1, "batch_size": batch, "accumulate": 1, "knn_every": 1})

    @property
    def hash(self) -> str:
        """Twelve hex digits that change when, and only when, a setting changes that is not of snapshots alone."""
        return hash_of(self.model_dump(mode="json", exclude={"snapshot_every"}))

    @property
    def title(self) -> str:
        """The method's name as tables print it, e.g. ``DINO+MTE``."""
        return METHODS[self.method].title + ("+MTE" if self.mte else "")


def load_recipe(name: str, assignments: list[str] | None = None) -> Recipe:
    """The recipe called ``name`` (or a YAML path) with ``key=value`` overrides; ``mte=true`` and
    ``token_learner=true`` stand for their defaults.
    """
    values = override(_read(name), assignments or [])
    for part in ("mte", "token_learner"):
        if values.get(part) in (True, False):
            values[part] = {} if values[part] else None
    recipe = Recipe.check(values, f"recipe {name}")
    _method_settings(recipe, name)
    return recipe


def _read(name: str, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's values; one that says ``extends: OTHER`` holds only what differs from that recipe."""
    if name in extending:
        raise UserError(f"recipe {name}: extends itself ({' extends '.join((*extending, name))})")
    values = load_yaml(name, RECIPES, "recipe")
    base = values.pop("extends", None)
    return values if base is None else merge(_read(str(base), (*extending, name)), values)


def _method_settings(recipe: Recipe, name: str) -> None:
    """Raise a ``UserError`` now, not after the data is loaded, if the method or its settings are unknown."""
    if recipe.method not in METHODS:
        raise UserError(f"recipe {name}: unknown method '{recipe.method}'{did_you_mean(recipe.method, METHODS)}")
    METHODS[recipe.method].Settings.check(recipe.method_settings, f"recipe {name}: method_settings")
