"""Fresh weights: how those are drawn that a pre-training starts from, and that an untrained encoder has."""

import torch
from torch import nn

from mte_bench.encoders.encoder import Encoder, EncoderSpec, build_encoder


def dino_init(encoder: Encoder) -> None:
    """Draw the weights as DINO does: CLS token, position table and every Linear weight truncated normal, std 0.02
    (Linear weights 1 / sqrt(inputs) if the spec says ``fan-in``).

    timm's own initialisation is the same but for the CLS token, which it draws with std 1e-6, and for architectures
    that bring a rule of their own. Biases become 0; convolutions, norms, relative position tables and token learners
    stay as built.
    """
    model = encoder.model
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        parameter = getattr(model, name, None)
        if isinstance(parameter, nn.Parameter):
            nn.init.trunc_normal_(parameter, std=0.02)
    learners = set() if encoder.token_learning is None else set(encoder.token_learning.modules())
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in learners:
            nn.init.trunc_normal_(module.weight, std=0.02 if encoder.spec.init == "dino" else module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fresh_encoder(spec: EncoderSpec, seed: int = 0, drop_path: float = 0.0) -> Encoder:
    """The encoder that a pre-training with ``seed`` starts from; the random state outside is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = build_encoder(spec, drop_path)
        dino_init(encoder)
    return encoder
