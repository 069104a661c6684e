"""Images of noise whose decoding is counted, and a small encoder for them: for the tests of features."""

import os
import time

import numpy as np
import torch
from PIL import Image

from downstream.features import Pass
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.errors import CorruptImage

SPEC = EncoderSpec(
    arch="vit_tiny_patch16_224", image_size=16, patch_size=8, options={"embed_dim": 32, "depth": 2, "num_heads": 2}
)
TRANSFORM = EvaluationTransform.for_size(16, SPEC.mean, SPEC.std)


class Drawn(ImageSet):
    """``n`` images of noise, some of them corrupt, each taking ``delay`` seconds; every decoding is noted in ``log``."""

    def __init__(self, n=40, corrupt=(), delay=0.0, log=None, fingerprint="drawn"):
        self.source, self.split, self.classes = "drawn", "train", ("a", "b")
        self.labels, self.fingerprint = np.arange(n) % 2, f"{fingerprint}{n}"
        self.corrupt, self.delay, self.log = corrupt, delay, log

    def name(self, index):
        return f"{index}.png"

    def image(self, index):
        time.sleep(self.delay)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{index}\n")
        if index in self.corrupt:
            raise CorruptImage(f"/data/{index}.png", "image file is truncated")
        return Image.fromarray(np.random.default_rng(index).integers(256, size=(20, 24, 3), dtype=np.uint8))


def encoder(seed=0):
    torch.manual_seed(seed)
    return build_encoder(SPEC).eval()


def how(cache, **options):
    return Pass(cache=cache, **({"batch_size": 8, "commit_seconds": 0.0} | options))


def decoded(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
