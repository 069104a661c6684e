"""The encoder: any timm ViT or Swin; images in, one global token and patch tokens out.

Auxiliary CLS tokens may travel along. Their queries see the kept tokens, the kept tokens never see them, and both
streams are computed by calls of their own: what is kept comes out the same, bit for bit, with and without them, and
no attention mask keeps the fused kernels from being used.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from pydantic import Field
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mte_bench.encoders.attention import Sight, first_token_attention, plain_block, split_block
from mte_bench.encoders.positions import Resize, positioned
from mte_bench.encoders.token_learner import TokenLearnerSettings, TokenLearning
from mte_bench.errors import UserError, did_you_mean
from mte_bench.settings import Settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Init = Literal["dino", "fan-in"]


class EncoderSpec(Settings):
    """What determines an encoder apart from its weights."""

    arch: str
    image_size: int | tuple[int, int] = 224
    """Side in pixels, or height and width: what a ViT's table of positions is made for."""
    patch_size: int | None = None
    options: dict[str, Any] = {}
    """Further keyword arguments of ``timm.create_model``."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    norm_eps: float | None = Field(None, gt=0)
    """The eps of every LayerNorm, where it is not the one of timm's model."""
    resize_positions: Resize = "timm"
    """How images of other sizes get their positions (``mte_bench.encoders.positions``)."""
    init: Init = "dino"
    """How fresh weights of Linear layers are drawn: ``dino``, std 0.02 whatever the width; ``fan-in``, std 1 / sqrt(inputs).
    DINO's fixed value suits the widths of ViT-S and ViT-B (384, 768); at a width of 100 almost nothing of an image
    reaches the global token of a fresh network, and DINO's loss then stays at its uniform start."""
    token_learner: TokenLearnerSettings | None = None
    """Learned tokens in place of the patches from some block on. timm's model of this name has none, so only an encoder
    without them loads strictly into timm."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``image_size``."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def side(self) -> int:
        """Side of a square ``image_size``; raises ``UserError`` if it is none, for whoever shows square images only."""
        height, width = self.size
        if height != width:
            raise UserError(
                f"{self.arch} for images of {height} x {width} pixels: here it sees square ones; choose their side, image_size=N"
            )
        return height

    @property
    def timm_arguments(self) -> dict[str, Any]:
        """Keyword arguments with which ``timm.create_model(arch, ...)`` builds the exported encoder."""
        patch = {} if self.patch_size is None else {"patch_size": self.patch_size}
        return {"num_classes": 0, "img_size": self.image_size, **patch, **self.options}


class Tokens(NamedTuple):
    """What an encoder makes of ``b`` images."""

    global_token: Tensor
    """``b c``: what an image is represented by (CLS for ViT, average-pooled token for Swin)."""
    patches: Tensor
    """``b n c``: patch tokens after the final norm; the learned ones where TokenLearner left no others."""
    grid: tuple[int, int]
    """Rows and columns of the patch tokens; ``n = rows * columns``. Learned tokens lie in one row."""
    raw_patches: Tensor
    """``b n c``: patch tokens before the final norm."""
    auxiliary: Tensor | None = None
    """``b a c``: auxiliary CLS tokens after the last block, before any norm."""
    blocks: tuple[tuple[Tensor, Tensor], ...] = ()
    """(global ``b c``, patches ``b n c``) after each block that was asked for, before the final norm."""
    attention: Tensor | None = None
    """``b heads n``: attention of the CLS query over the patches in the last block."""
    prefix: Tensor | None = None
    """``b p c``: of a ViT, what stands before the patches after the final norm: CLS, a distillation token, registers."""


class SharedDropPath(nn.Module):
    """Stochastic depth whose draws are given from outside, so that they do not depend on processes or restarts.

    ``keep`` holds 0 or ``1 / (1 - rate)`` per image and is the same for an image's kept and auxiliary tokens.
    With no draws given it is the identity, so a model in evaluation never needs them.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is None or not self.training:
            return x
        return x * self.keep.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Encoder(nn.Module):
    """A timm ViT or Swin behind one interface; ``model`` is the timm model, its state dict the exported encoder."""

    def __init__(self, spec: EncoderSpec, model: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.spec = spec
        self.model = model
        self.is_vit = isinstance(model, VisionTransformer)
        self.width: int = model.num_features  # type: ignore[assignment]
        self.drop_path = drop_path
        self.drop_paths = [_swap(model, name, m.drop_prob) for name, m in list(model.named_modules()) if isinstance(m, DropPath)]
        self.gradient_checkpointing = False

    @property
    def has_cls(self) -> bool:
        """Whether the global token is a CLS token (otherwise it is pooled from the patch tokens)."""
        return self.is_vit and cast(VisionTransformer, self.model).cls_token is not None

    @property
    def block_list(self) -> list[nn.Module]:
        """Every transformer block in order (Swin: of all stages)."""
        if self.is_vit:
            return list(self.model.blocks)  # type: ignore[arg-type]
        return [block for stage in self.model.layers for block in stage.blocks]  # type: ignore[union-attr]

    @property
    def token_learning(self) -> TokenLearning | None:
        """The learners of tokens inside a ViT, if the spec asks for them; they are part of ``model`` and its state dict."""
        return getattr(self.model, "token_learner", None)

    @property
    def keeps_patches(self) -> bool:
        """Whether the patch tokens that come out lie on the image: learned ones do not."""
        return self.token_learning is None or self.token_learning.has_fusers

    @property
    def reduction(self) -> int:
        """How many embedded patches lie along the side of a patch token: 1 for a ViT, 8 for a Swin of four stages."""
        return 1 if self.is_vit else 2 ** (len(self.model.layers) - 1)  # type: ignore[arg-type]

    @property
    def embedded_width(self) -> int:
        """Width of the patch embedding."""
        return int(self.model.patch_embed.proj.out_channels)  # type: ignore[union-attr, arg-type]

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of the patch tokens of a square image of ``size`` pixels, as ``Tokens.grid`` has them."""
        if not self.keeps_patches:
            return 1, cast(TokenLearning, self.token_learning).tokens
        return self.patch_grid(size)

    def patch_grid(self, size: int) -> tuple[int, int]:
        """The same before any token is learned."""
        patch: tuple[int, int] = self.model.patch_embed.patch_size  # type: ignore[union-attr, assignment]
        rows, columns = (size // side // self.reduction for side in patch)
        return rows, columns

    @property
    def num_heads(self) -> int:
        """Attention heads of the last block."""
        return self.block_list[-1].attn.num_heads  # type: ignore[union-attr, return-value]

    def draw_drop_path(self, images: int, generator: torch.Generator) -> Tensor | None:
        """Draws of stochastic depth for ``images`` images: ``paths images`` of 0 or 1 / (1 - rate); None if there is none."""
        if not self.drop_paths:
            return None
        keep = 1 - torch.tensor([path.rate for path in self.drop_paths]).unsqueeze(1)
        return (torch.rand(len(keep), images, generator=generator) < keep) / keep

    def use_drop_path(self, keep: Tensor | None) -> None:
        """Use these draws (``paths b``) in the forward passes that follow, or none."""
        for index, path in enumerate(self.drop_paths):
            path.keep = None if keep is None else keep[index]

    def forward(
        self,
        images: Tensor,
        *,
        auxiliary: Tensor | None = None,
        sight: Sight = "everything",
        cut_attention: bool = True,
        blocks: Sequence[int] = (),
        attention: bool = False,
        masks: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tokens:
        """Encode ``images`` (``b c h w``, normalised by the spec's mean and std; other sizes than trained on work).

        ``auxiliary`` (``a c``) are auxiliary CLS tokens; ``sight`` is what their queries may see besides the patches.
        ``cut_attention=False`` joins them into the sequence, so that the kept tokens see them too (Table 16).
        ``blocks`` (indices, negative from the end) asks for the tokens after those blocks, ``attention`` for the CLS
        attention of the last block. Where ``masks`` (``b n``, bool) is True, ``mask_token`` (``1 e``) stands in for the patch
        embedding (before positions are added); a Swin's mask covers all embeddings that become a patch token.
        """
        depth = len(self.block_list)
        wanted = [index % depth for index in blocks]
        if not self.has_cls and (auxiliary is not None or attention):
            raise UserError(f"{self.spec.arch} has no CLS token: auxiliary CLS tokens and CLS attention need a ViT that has one")
        if attention and self.token_learning is not None:
            raise UserError(
                f"{self.spec.arch} with TokenLearner: the last block sees learned tokens, so CLS attends to no patches"
            )
        if masks is not None and not self.keeps_patches:
            raise UserError(f"{self.spec.arch} with TokenLearner: no patches remain to be masked; set token_learner.fuser=true")
        if self.is_vit:
            return self._vit(images, auxiliary, sight, cut_attention, wanted, attention, masks, mask_token)
        return self._swin(images, wanted, masks, mask_token)

    def _vit(
        self,
        images: Tensor,
        auxiliary: Tensor | None,
        sight: Sight,
        cut: bool,
        wanted: list[int],
        attention: bool,
        masks: Tensor | None,
        mask_token: Tensor | None,
    ) -> Tokens:
        model = cast(VisionTransformer, self.model)
        x = _masked(model.patch_embed(images), masks, mask_token, 1)
        grid = (x.shape[1], x.shape[2])
        x = model.norm_pre(model.patch_drop(positioned(model, x, self.spec.resize_positions)))
        prefix, length = model.num_prefix_tokens, x.shape[1]
        aux = None if auxiliary is None else auxiliary.to(x.dtype).expand(len(x), -1, -1)
        if aux is not None and not cut:
            x, aux = torch.cat([x, aux], dim=1), None
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        cls_attention: Tensor | None = None
        learning = self.token_learning
        for index, block in enumerate(model.blocks):
            learn = learning is not None and learning.before(index)
            if learning is not None and learn:
                patches = x[:, prefix:length]
                x = learning.learn(index, x, prefix, length, grid)
                length = prefix + learning.tokens
            if attention and index == len(model.blocks) - 1:
                cls_attention = first_token_attention(plain_block(block, self.spec.arch), x)[..., prefix:length]
            if aux is not None:
                x, aux = self._run(split_block, plain_block(block, self.spec.arch), x, aux, sight, prefix)
            else:
                x = self._run(block, x)
            if learning is not None and learn and learning.has_fusers:
                x = learning.fuse(index, x, prefix, patches)
                length = prefix + patches.shape[1]
            if index in wanted:
                kept[index] = (x[:, 0] if prefix else x.mean(1), x[:, prefix:length])
        if auxiliary is not None and not cut:
            x, aux = x[:, :length], x[:, length:]
        normed = model.norm(x)
        return Tokens(
            global_token=model.forward_head(normed, pre_logits=True),
            patches=normed[:, prefix:],
            grid=grid if self.keeps_patches else (1, length - prefix),
            raw_patches=x[:, prefix:],
            auxiliary=aux,
            blocks=tuple(kept[index] for index in wanted),
            attention=cls_attention,
            prefix=normed[:, :prefix],
        )

    def _swin(self, images: Tensor, wanted: list[int], masks: Tensor | None, mask_token: Tensor | None) -> Tokens:
        model = cast(SwinTransformer, self.model)
        x = _masked(model.patch_embed(images), masks, mask_token, self.reduction)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        index = 0
        for stage in model.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self._run(block, x)
                if index in wanted:
                    kept[index] = (x.mean((1, 2)), x.flatten(1, 2))
                index += 1
        normed = model.norm(x)
        return Tokens(
            global_token=model.forward_head(normed, pre_logits=True),
            patches=normed.flatten(1, 2),
            grid=(x.shape[1], x.shape[2]),
            raw_patches=x.flatten(1, 2),
            blocks=tuple(kept[index] for index in wanted),
        )

    def _run(self, function: Any, *arguments: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def build_encoder(spec: EncoderSpec, drop_path: float = 0.0, pretrained: bool = False) -> Encoder:
    """The encoder of ``spec`` with fresh (or timm's pre-trained) weights.

    Raises ``UserError`` for an architecture that timm does not know or that is neither a ViT nor a Swin.
    """
    if not timm.is_model(spec.arch):
        raise UserError(f"unknown architecture '{spec.arch}'{_similar(spec.arch)}; `mte-bench list archs` shows them")
    if min(spec.size) < 1:
        raise UserError(f"image_size {spec.image_size}: must be at least a pixel")
    arguments = spec.timm_arguments | {"drop_path_rate": drop_path}
    for flexible in ({"strict_img_size": False}, {"dynamic_img_size": True}):  # Swin's and ViT's word for other sizes
        try:
            model = timm.create_model(spec.arch, pretrained=pretrained, **arguments, **flexible)
        except TypeError:
            continue
        except (ArithmeticError, AssertionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            if isinstance(error, ArithmeticError):
                reason = "one of its sizes is 0"
            elif "allocate memory" in reason:
                reason = "takes more memory than there is"
            raise UserError(f"architecture {spec.arch}: {reason} (image_size {spec.image_size}, {spec.options})") from error
        if isinstance(model, VisionTransformer | SwinTransformer):
            patch = cast(int, model.patch_embed.patch_size[0])
            if any(side % patch for side in spec.size):
                raise UserError(f"image_size {spec.image_size}: must be a multiple of {patch}, the patch size of {spec.arch}")
            for norm in model.modules():
                if isinstance(norm, nn.LayerNorm):
                    norm.eps = spec.norm_eps or norm.eps
            if spec.token_learner is not None:
                _add_token_learner(spec, model)
            encoder = Encoder(spec, model, drop_path)
            if not encoder.block_list:
                raise UserError(f"architecture {spec.arch}: has no blocks ({spec.options})")
            return encoder
    raise UserError(f"architecture {spec.arch} with {arguments}: not a ViT or Swin of timm's, or an option it does not have")


def _add_token_learner(spec: EncoderSpec, model: nn.Module) -> None:
    """Give ``model`` the learners that ``spec`` asks for; raises ``UserError`` where there is no place for them."""
    settings = spec.token_learner
    assert settings is not None
    if not isinstance(model, VisionTransformer):
        raise UserError(f"token_learner: {spec.arch} is no ViT, and only a ViT can go on with fewer tokens; leave it out")
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    if settings.after >= depth:
        raise UserError(f"token_learner.after {settings.after}: {spec.arch} has {depth} blocks; choose 1 to {depth - 1}")
    if settings.tokens > patches:
        raise UserError(
            f"token_learner.tokens {settings.tokens}: {spec.image_size} pixels make only {patches} patches; choose fewer tokens"
        )
    for block in model.blocks:
        plain_block(block, spec.arch, "token_learner")
    model.token_learner = TokenLearning(model.embed_dim, depth, settings)


def _masked(x: Tensor, masks: Tensor | None, mask_token: Tensor | None, reduction: int) -> Tensor:
    """Embedded patches ``b h w e``, with ``mask_token`` where ``masks`` (``b n``, one for ``reduction ** 2`` patches) is True."""
    if masks is None or mask_token is None:
        return x
    grid = masks.view(len(x), x.shape[1] // reduction, x.shape[2] // reduction)
    hidden = grid.repeat_interleave(reduction, 1).repeat_interleave(reduction, 2).unsqueeze(-1)
    return torch.where(hidden, mask_token.to(x.dtype), x)


def _similar(arch: str) -> str:
    return did_you_mean(arch, [name for name in timm.list_models() if name.startswith(("vit", "swin", "deit"))])


def _swap(model: nn.Module, name: str, rate: float) -> SharedDropPath:
    """Replace the module called ``name`` by a ``SharedDropPath`` and return that."""
    parent, _, child = name.rpartition(".")
    path = SharedDropPath(rate)
    setattr(model.get_submodule(parent), child, path)
    return path
