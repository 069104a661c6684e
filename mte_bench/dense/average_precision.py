"""COCO's average precision and recall of many resamples of images at once, from matches that were made once.

Matching detections with objects is a matter of one image; what a resample changes is only how often each match counts.
Source: pycocotools ``COCOeval.accumulate``. The numbers are the same as its own on a data set that holds the images so
often: among the copies of a right detection precision only rises, among those of a wrong one it falls while recall
stays, so that the envelope of the curve is known from the values after the last copy of each right detection. (Detections
of one image, one class and the same score are an exception, which its copies would interleave.)
"""

import numpy as np
from numpy.typing import NDArray

from mte_bench.dense.resampling import Floats, Weights

Bools = NDArray[np.bool_]
RECALLS = np.linspace(0.0, 1.0, 101)
"""At which precision is read, as COCOeval has them."""
_TINY = np.spacing(1)


def average_precision(found: Bools, counted: Bools, weights: Weights, objects: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Average precision and recall (each ``t b``, 0 to 1) of one class at t IoU thresholds in b resamples.

    ``found`` ``t d``: whether each of d detections, best first, matches an object that counts; ``counted`` ``t d``: whether it
    is either that or wrong; ``weights`` ``b d``: how often each detection's image was drawn; ``objects`` ``b``: how many there
    are to be found. NaN where there is none.
    """
    precision, recall = np.zeros((2, len(found), len(weights)))
    union = np.flatnonzero(found.any(axis=0))
    usual = np.flatnonzero(counted[-1])  # of most detections it depends on no threshold whether they count
    drawn, seen_by_most = np.take(weights, union, axis=1), _up_to(weights, usual, union)
    to_find = objects[:, None].astype(np.float64)
    for t in range(len(found)):
        places = np.flatnonzero(found[t, union])
        if not len(places):
            continue
        seen = np.take(seen_by_most, places, axis=1)
        for rows, sign in ((counted[t] & ~counted[-1], 1), (counted[-1] & ~counted[t], -1)):
            if rows.any():
                seen += sign * _up_to(weights, np.flatnonzero(rows), union[places])
        hits = np.cumsum(np.take(drawn, places, axis=1), axis=1, dtype=np.int32).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            recalls = hits / to_find
        hits /= seen + _TINY
        envelope = np.maximum.accumulate(hits[:, ::-1], axis=1)[:, ::-1]
        reached = _thresholds_reached(recalls)
        area = envelope[:, 0] * reached[:, 0] + np.einsum("bm,bm->b", envelope[:, 1:], reached[:, 1:] - reached[:, :-1])
        precision[t], recall[t] = area / len(RECALLS), recalls[:, -1]
    precision[:, objects == 0], recall[:, objects == 0] = np.nan, np.nan
    return precision, recall


def _up_to(weights: Weights, rows: NDArray[np.int64], places: NDArray[np.int64]) -> Weights:
    """``b m``: how many of the detections at ``rows`` there are up to and with each of ``places``."""
    whole = len(rows) == weights.shape[1]
    running = np.cumsum(weights if whole else np.take(weights, rows, axis=1), axis=1, dtype=np.int32)
    last = np.searchsorted(rows, places, side="right") - 1
    first = int(np.searchsorted(last, 0))  # places are in ascending order: what lies before all rows comes first
    return np.concatenate([np.zeros((len(weights), first), np.int32), np.take(running, last[first:], axis=1)], axis=1)


def _thresholds_reached(recalls: Floats) -> Floats:
    """How many of ``RECALLS`` are no larger, to the last bit."""
    nearest = np.rint(recalls * (len(RECALLS) - 1))
    return nearest + (nearest * RECALLS[1] <= recalls)  # RECALLS are multiples of their step in this arithmetic too
