"""Other people's randomness under a seed of ours."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, the global generators of Python, NumPy and torch (on the CPU), which timm's augmentation draws from, start
    from ``seed``, a whole number below 2^96.

    Outside they go on as if nothing had been drawn.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed([seed >> shift & 0xFFFFFFFF for shift in (0, 32, 64)])
    torch.default_generator.manual_seed(seed & 0xFFFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
