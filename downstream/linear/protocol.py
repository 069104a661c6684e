"""What every linear probe states, whatever trains it."""

import torch
from pydantic import Field

from downstream.task import FeatureProtocol, Material, Outcome, Split, TaskEstimate


class LinearProtocol(FeatureProtocol):
    """Settings of every linear probe; each way to train one is a class that adds its own and answers these questions."""

    held_out: float = Field(gt=0, lt=1)
    """Share of each class's train images on which is chosen what has several values: the rate, the penalty, the feature."""
    seed: int = Field(ge=0)

    def evaluate(self, train: Split, val: Split, device: torch.device) -> Outcome:
        """Train on the features of ``train`` and predict ``val``."""
        raise NotImplementedError

    def evaluate_on_views(self, material: Material) -> Outcome:
        """Train on augmented views; only where ``views`` is true."""
        raise NotImplementedError

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """What training takes beyond the encoder's passes."""
        raise NotImplementedError
