"""Other people's randomness under a seed of ours."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, Python's and NumPy's global generators, which timm's augmentation draws from, start from ``seed``.

    Outside they go on as if nothing had been drawn.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed([seed >> shift & 0xFFFFFFFF for shift in (0, 32, 64)])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
