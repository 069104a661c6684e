"""The methods by name. Adding one to this dict (or registering it from a package of your own) is all it takes."""

from pretrain.methods.base import Method
from pretrain.methods.byol import BYOL
from pretrain.methods.dino import DINO
from pretrain.methods.hssl import HSSL
from pretrain.methods.ibot import IBOT
from pretrain.methods.moby import MoBY
from pretrain.methods.mocov3 import MoCoV3
from pretrain.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "byol": BYOL,
    "dino": DINO,
    "hssl": HSSL,
    "ibot": IBOT,
    "moby": MoBY,
    "mocov3": MoCoV3,
    "supervised": Supervised,
}

__all__ = ["METHODS", "Method"]
