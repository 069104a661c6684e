"""A ViT's table of positions at another size than it was trained on, resized as the project does that made it.

All interpolate bicubically, but not alike, and at small sizes a feature tells the difference:

| how | used by | |
|---|---|---|
| ``timm`` | timm; DINOv2 with registers | antialiased |
| ``deit`` | DeiT, MAE, MoCo v3 (which trains through DeiT at other sizes) | not antialiased |
| ``dino`` | DINO, iBOT, DINOv2 | not antialiased, and scaled by (new + 0.1) / old instead of new / old |
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

Resize = Literal["timm", "deit", "dino"]
Grid = tuple[int, int]

_OFFSET = 0.1  # DINO vision_transformer.py, interpolate_pos_encoding


def resized_positions(table: Tensor, old: Grid, new: Grid, prefix: int, how: Resize) -> Tensor:
    """``table`` (``1 prefix+n c``) of a grid of ``old`` rows and columns for one of ``new``; the first ``prefix`` rows stay.

    Returns the table itself where the grids are the same.
    """
    if old == new:
        return table
    if how == "timm":
        return resample_abs_pos_embed(table, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    image = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    if how == "dino":
        scale = [(side + _OFFSET) / before for side, before in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, size=new, mode="bicubic")
    return torch.cat([table[:, :prefix], image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def positioned(model: Any, x: Tensor, how: Resize) -> Tensor:
    """Embedded patches ``b h w c`` as the sequence ``b t c`` of prefix tokens and patches, positions added.

    The same as timm's ``_pos_embed`` but for the way that the table is resized.
    """
    old, new = tuple(model.patch_embed.grid_size), (x.shape[1], x.shape[2])
    if how == "timm" or model.pos_embed is None or old == new:
        sequence: Tensor = model._pos_embed(x)
        return sequence
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [token.expand(len(x), -1, -1) for name in names if (token := getattr(model, name, None)) is not None]
    table = resized_positions(model.pos_embed, old, new, 0 if model.no_embed_class else model.num_prefix_tokens, how)
    x = x.flatten(1, 2)
    x = torch.cat([*tokens, x + table], dim=1) if model.no_embed_class else torch.cat([*tokens, x], dim=1) + table
    dropped: Tensor = model.pos_drop(x)
    return dropped
