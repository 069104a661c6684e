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
    usual = counted[-1]  # of most detections it depends on no threshold whether they count: what differs is added below
    total = _running(weights, usual)
    with np.errstate(invalid="ignore", divide="ignore"):
        for t in range(len(found)):
            right = np.flatnonzero(found[t])
            if not len(right):
                continue
            seen = _at(total, np.flatnonzero(usual), right)
            more, less = np.flatnonzero(counted[t] & ~usual), np.flatnonzero(usual & ~counted[t])
            for rows, sign in ((more, 1), (less, -1)):
                if len(rows):
                    seen = seen + sign * _at(_running(weights, rows), rows, right)
            hits = _running(weights, right)
            recalls = hits / objects[:, None]
            envelope = np.maximum.accumulate((hits / (seen + _TINY))[:, ::-1], axis=1)[:, ::-1]
            reached = _thresholds_reached(recalls)
            precision[t] = (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
            recall[t] = recalls[:, -1]
    precision[:, objects == 0], recall[:, objects == 0] = np.nan, np.nan
    return precision, recall


def _running(weights: Weights, rows: NDArray[np.generic]) -> Weights:
    """``b m``: of some detections, how many there are up to each."""
    return np.cumsum(weights[:, rows], axis=1, dtype=np.int32)


def _at(running: Weights, rows: NDArray[np.int64], places: NDArray[np.int64]) -> Weights:
    """``b m``: the running sum over the detections at ``rows`` up to and with each of ``places``."""
    last = np.searchsorted(rows, places, side="right") - 1
    found = np.take(running, np.maximum(last, 0), axis=1) if len(rows) else np.zeros((len(running), len(places)), np.int32)
    found[:, last < 0] = 0
    return found


def _thresholds_reached(recalls: Floats) -> NDArray[np.int64]:
    """How many of ``RECALLS`` are no larger: ``searchsorted`` to the last bit, and faster. What is not finite reaches one."""
    nearest = np.rint(np.nan_to_num(recalls, posinf=0.0) * (len(RECALLS) - 1)).astype(np.intp)
    return nearest + (RECALLS[nearest] <= recalls)
