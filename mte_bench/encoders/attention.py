"""Attention on two streams: the kept tokens among themselves, the auxiliary CLS tokens' queries over what they may see.

No mask is needed for that, so the fused kernels stay in use, and what is kept is computed as if nothing travelled along.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mte_bench.errors import UserError

Sight = Literal["everything", "not-global", "not-each-other", "patches-and-self"]


def plain_block(
    block: nn.Module, arch: str, what: str = "auxiliary CLS tokens and CLS attention (use pooled tokens only)"
) -> Block:
    """``block``, if its structure is timm's plain one, which the split attention knows; else an error about ``what``."""
    if type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None:
        return block
    raise UserError(f"{arch}: has other blocks than timm's plain pre-norm ones, which are needed for {what}")


def _heads(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each ``b heads n d``."""
    b, n, _ = x.shape
    q, k, v = attention.qkv(x).reshape(b, n, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v


def _merge(attention: Attention, x: Tensor) -> Tensor:
    """From heads (``b heads n d``) to the residual branch (``b n c``)."""
    return attention.proj_drop(attention.proj(attention.norm(x.transpose(1, 2).flatten(2))))


def split_block(block: Block, x: Tensor, aux: Tensor, sight: Sight, prefix: int) -> tuple[Tensor, Tensor]:
    """One block on two streams: kept tokens among themselves, auxiliary queries over what they may see."""
    attention = block.attn
    q, k, v = _heads(attention, block.norm1(x))
    aq, ak, av = _heads(attention, block.norm1(aux))
    own = F.scaled_dot_product_attention(q, k, v, dropout_p=attention.attn_drop.p if block.training else 0.0)
    if sight in ("not-global", "patches-and-self"):
        k, v = k[:, :, prefix:], v[:, :, prefix:]
    mask = None
    if sight in ("not-each-other", "patches-and-self"):
        n, a = k.shape[2], aq.shape[2]
        mask = torch.cat([torch.ones(a, n, dtype=torch.bool), torch.eye(a, dtype=torch.bool)], dim=1).to(x.device)
    seen = F.scaled_dot_product_attention(aq, torch.cat([k, ak], dim=2), torch.cat([v, av], dim=2), attn_mask=mask)
    x = x + block.drop_path1(block.ls1(_merge(attention, own)))
    aux = aux + block.drop_path1(block.ls1(_merge(attention, seen)))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    aux = aux + block.drop_path2(block.ls2(block.mlp(block.norm2(aux))))
    return x, aux


def first_token_attention(block: Block, x: Tensor) -> Tensor:
    """``b heads n``: attention probabilities of the first token's query over all tokens."""
    q, k, _ = _heads(block.attn, block.norm1(x))
    return (q[:, :, :1] * block.attn.scale @ k.transpose(-2, -1)).softmax(-1).squeeze(2)
