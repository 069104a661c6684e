"""What one Gram matrix of all tokens saves: ridge probes of every token and every pair, against a probe of each by itself.

Both solve the same problems on the same random features and must choose the same classes. The floor is the
decompositions alone, two for each probe. Times are of the processor, so that other work beside it does not count.

    python benchmarks/token_pairs.py            # 11 tokens of width 192, 20,000 train images
    python benchmarks/token_pairs.py --quick    # 6 tokens of width 96, 5,000 train images
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from downstream.analysis.lookup import TokenRidge, pairs_of
from downstream.analysis.pairs import PAIRS
from downstream.analysis.study import Bank, Gallery, Seen
from downstream.evaluate import load_protocol
from downstream.linear.ridge import RidgeProbe
from mte_bench.records import environment

CLASSES, VAL = 10, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 tokens of width 96, 5,000 train images")
    tokens, width, train = (6, 96, 5000) if parser.parse_args().quick else (11, 192, 20_000)
    _, protocol = load_protocol(PAIRS, "pairs")
    (bank, labels), (asked, truth) = (made_up(tokens, width, count, seed) for seed, count in enumerate((train, VAL)))
    seen = Seen(asked, truth, tuple(map(str, range(CLASSES))), Gallery(truth[:0], [], np.empty(0)), Bank(bank, labels))
    sets = [*((place,) for place in range(tokens)), *pairs_of(tokens)]

    def together() -> list[Any]:
        ridge = TokenRidge(protocol, seen)
        return [ridge.predictions(members) for members in sets]

    def apart() -> list[Any]:
        found = []
        for members in sets:
            own, others = (np.concatenate([array[place] for place in members], axis=1) for array in (bank, asked))
            probe = RidgeProbe(protocol.penalties, held_out=protocol.held_out, seed=protocol.seed).fit(own, labels)
            found.append(probe.predict(others)[:, 0])
        return found

    def decompositions() -> None:
        for members in sets:
            x = torch.randn(len(members) * width, len(members) * width, dtype=torch.float64)
            for _ in range(2):
                torch.linalg.eigh(x + x.T)

    (of_together, ours), (of_apart, theirs), (floor, _) = (timed(work) for work in (together, apart, decompositions))
    same = float(np.mean(np.stack(ours) == np.stack(theirs)))
    print(f"{len(sets)} probes of {tokens} tokens of width {width}, {train:,} images")
    print(f"together {of_together:.1f} s, each by itself {of_apart:.1f} s, decompositions alone {floor:.1f} s")
    print(
        json.dumps(
            {
                "benchmark": "token_pairs",
                "ratios": {"together": of_together / of_apart},
                "floor": floor / of_apart,
                "same_predictions": same,
                "tokens": tokens,
                "width": width,
                "images": train,
                "machine": environment()["device"],
            }
        )
    )


def made_up(tokens: int, width: int, count: int, seed: int) -> tuple[list[Any], Any]:
    """Tokens (``count width`` each, of unit length) that know something of the labels (``count``)."""
    generator, means = np.random.default_rng(seed), np.random.default_rng(9).standard_normal((tokens, CLASSES, width))
    labels = np.arange(count) % CLASSES
    noisy = [0.3 * means[place][labels] + generator.standard_normal((count, width)) for place in range(tokens)]
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in noisy], labels


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor that ``work`` took, and what it returned."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


if __name__ == "__main__":
    main()
