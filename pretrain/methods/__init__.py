"""The methods by name. Adding one to this dict (or registering it from a package of your own) is all it takes."""

from pretrain.methods.base import Method
from pretrain.methods.dino import DINO
from pretrain.methods.hssl import HSSL
from pretrain.methods.ibot import IBOT
from pretrain.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "dino": DINO,
    "hssl": HSSL,
    "ibot": IBOT,
    "supervised": Supervised,
}

__all__ = ["METHODS", "Method"]
