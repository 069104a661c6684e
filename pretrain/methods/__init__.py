"""The methods by name. Adding one to this dict (or registering it from a package of your own) is all it takes."""

from pretrain.methods.base import Method
from pretrain.methods.dino import DINO

METHODS: dict[str, type[Method]] = {"dino": DINO}

__all__ = ["METHODS", "Method"]
