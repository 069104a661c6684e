"""The methods by name. Adding one to this dict (or registering it from a package of your own) is all it takes."""

from pretrain.methods.base import Method
from pretrain.methods.byol import BYOL
from pretrain.methods.dino import DINO
from pretrain.methods.ibot import IBOT
from pretrain.methods.moby import MoBY
from pretrain.methods.mocov3 import MoCoV3

METHODS: dict[str, type[Method]] = {"dino": DINO, "ibot": IBOT, "byol": BYOL, "mocov3": MoCoV3, "moby": MoBY}

__all__ = ["METHODS", "Method"]
