"""Does a head's 0.7 mean that seven frames in ten are due? Reliability curves, and their error (Guo et al. 2017).

The label of a streamed frame follows the rule of training (prospect/sequence.py): 1 from the first frame behind which
a due text may stand to the one behind which it did stand, 0 on every other. What has been said is due no longer.
"""

from dataclasses import dataclass

import numpy as np

from prospect.clips import Clip
from prospect.config import DataConfig
from prospect.metrics import ratio

BINS = 10  # of equal width


@dataclass(frozen=True)
class Calibration:
    """One head over one or many clips, by bins of its probability. Counts add up."""

    frames: tuple[int, ...] = (0,) * BINS
    expected: tuple[float, ...] = (0.0,) * BINS  # sum of the probabilities
    positive: tuple[int, ...] = (0,) * BINS

    def __add__(self, other: "Calibration") -> "Calibration":
        mine, theirs = vars(self).values(), vars(other).values()
        return Calibration(*(tuple(a + b for a, b in zip(*pair)) for pair in zip(mine, theirs)))

    @property
    def error(self) -> float:
        """The expected calibration error: |probability - share of positives|, mean over frames, bin by bin."""
        gaps = sum(abs(expected - positive) for expected, positive in zip(self.expected, self.positive))
        return ratio(gaps, sum(self.frames))

    def curve(self) -> list[tuple[float, float, int]]:
        """(mean probability, share of positive frames, frames) of every bin that holds any."""
        bins = zip(self.expected, self.positive, self.frames)
        return [(expected / frames, positive / frames, frames) for expected, positive, frames in bins if frames]


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """Of probabilities [F] and labels [F]: 1, 0, or -100 for frames that take no part."""
    kept = labels != -100
    p, positive = np.asarray(probabilities, np.float64)[kept], labels[kept] == 1
    bins = np.minimum((p * BINS).astype(np.int64), BINS - 1)
    sums = (np.bincount(bins, weights, BINS) for weights in (None, p, positive))
    frames, expected, positives = (tuple(each.tolist()) for each in sums)
    return Calibration(frames, expected, tuple(map(int, positives)))


def streamed_labels(clip: Clip, role: str, written: list[int], data: DataConfig) -> np.ndarray:
    """Labels [F] of a streamed clip's frames for the head of `role`, which wrote at the rows `written`."""
    from prospect.sequence import text_places  # here, so that a page without a reference starts without torch

    labels, first = np.zeros(clip.num_frames, np.int64), clip.start_frame
    frames = np.arange(first, clip.end_frame + 1)
    places = text_places(clip, data, frames, None, frames[:0])
    for begin, end in clip.events(role):
        at = min((row for row in written if begin <= first + row <= end), default=end - first)
        labels[places[end].first - first : at + 1] = 1
    return labels
