"""Where the global token looks: the attention of the CLS query over the patches in a ViT's last block, head by head."""

import numpy as np

Array = np.ndarray


def attention_entropy(attention: Array) -> Array:
    """Entropy in nats of each head's attention over the patches: ``b heads n`` to ``b heads``, in [0, log n].

    The share of attention that goes to the CLS token itself is left out and the rest scaled to sum to 1.
    """
    share = attention.astype(np.float64)
    share = share / share.sum(axis=-1, keepdims=True)
    return -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(axis=-1)
