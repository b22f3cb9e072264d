"""Evaluation: when to speak, what was said, and whether the task state was tracked.

Three questions, three parts, all plain functions on numpy arrays:

    decisions    do the two heads fire on the right frames?    `decision_metrics`, `best_threshold`, `auroc`, ...
    dialogue     is the right thing said at the right time?    `match_dialogue`, `sum_dialogue`
    task state   is the predicted state the true one?          `task_state_metrics`

Every result is first a set of *counts*. Counts of clips, batches and ranks are added, and only the sum is divided
("micro" averages), so that a number does not depend on how the clips were grouped. An empty set gives 0.0, never NaN.
`by_dataset` then makes the table: one row a dataset, and the mean over datasets.

Sources: the matching of dialogues is that of ProAssist (arXiv 2506.05904); average precision is the step-wise area
under the precision-recall curve; AUROC is the Mann-Whitney U statistic; the assignment is the shortest augmenting path
form of the Hungarian method (Kuhn 1955; Jonker and Volgenant 1987).

Letters: F frames, P predictions, R references, S steps. Frames are rows here: 0 is the clip's first frame.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from prospect.dst import STATES, State, Transition
from prospect.errors import ProspectError

Result = TypeVar("Result")
Update = tuple[int, Transition]  # (row of the frame at which it stands, what it does)
Event = tuple[int, int]  # the rows in which something is due, both ends included
Choices = tuple[np.ndarray, np.ndarray]  # the columns that a row of an assignment may take, and what each costs

CANDIDATES = 50  # thresholds tried at the most
EVENT_TOLERANCE = 1.0  # seconds: an event counts as found when it is predicted in its range or this close to it


# ---- counts --------------------------------------------------------------------------------------


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, and 0.0 where the denominator is 0."""
    return float(numerator / denominator) if denominator else 0.0


@dataclass(frozen=True)
class Counts:
    """How many items were predicted, how many should have been, and how many of both are the same. Counts add up."""

    matched: int = 0
    predicted: int = 0
    reference: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.matched + other.matched, self.predicted + other.predicted, self.reference + other.reference)

    @property
    def precision(self) -> float:
        return ratio(self.matched, self.predicted)

    @property
    def recall(self) -> float:
        return ratio(self.matched, self.reference)

    @property
    def f1(self) -> float:
        return ratio(2 * self.matched, self.predicted + self.reference)


# ---- the assignment behind both other parts ------------------------------------------------------


def cheapest_assignment(choices: Sequence[Choices], alone: float = math.inf) -> list[int]:
    """Give every row one of its columns, no two the same, at the least total cost; -1: none, which costs `alone`.

    choices    of each row: the columns it may take, and what each costs
    alone      inf: every row must take a column; else more than any cost saved by leaving a row out

    Rows enter one at a time. A new row looks for the cheapest chain "it takes a column, that column's row moves to
    another, ... until a free column is found, or a row is left alone": Dijkstra over the columns. Prices per row and
    column keep cost - row_price - column_price >= 0 everywhere and = 0 on assigned pairs, which is what makes Dijkstra
    right, and the assignment optimal, after every row. Of chains of one length, that to the lowest column.

    Only columns that the search reaches are touched: time and memory grow with the choices, not with rows times
    columns. Raises ValueError where no assignment of all rows exists.
    """
    column_of = [-1] * len(choices)
    row_of: dict[int, int] = {}
    row_price, column_price = [0.0] * len(choices), defaultdict(float)
    for new_row in range(len(choices)):
        length: dict[int, float] = {}  # of the cheapest chain known to each column; -inf once it is settled
        came_from: dict[int, int] = {}  # the row that takes this column in that chain
        settled: list[tuple[int, float]] = []  # columns, in order of their length
        queue: list[tuple[float, int]] = []  # of lengths; those that have been undercut or settled stay in it
        row, reached, left_out, at_most = new_row, 0.0, -1, math.inf  # at_most: no longer chain is needed
        ends_alone = math.inf  # the length of the cheapest chain that leaves a row, `left_out`, alone
        while True:
            through = reached + alone - row_price[row]
            if through < ends_alone:
                ends_alone, left_out, at_most = through, row, min(at_most, through)
            for column, cost in zip(*(part.tolist() for part in choices[row])):
                through = reached + cost - row_price[row] - column_price[column]
                if through <= at_most and through < length.get(column, math.inf):
                    length[column], came_from[column] = through, row
                    heapq.heappush(queue, (through, column))
                    if column not in row_of:
                        at_most = through
            while queue and queue[0][0] != length[queue[0][1]]:
                heapq.heappop(queue)
            if not queue and left_out < 0:
                raise ValueError(f"row {new_row} can have no column of its own")
            if not queue or ends_alone < queue[0][0]:
                row, column, reached = left_out, -1, ends_alone
                break
            reached, column = heapq.heappop(queue)
            settled.append((column, reached))
            length[column] = -math.inf
            if column not in row_of:
                row = came_from[column]
                break
            row = row_of[column]

        row_price[new_row] += reached
        for passed, at in settled:
            column_price[passed] -= reached - at
            if passed in row_of:
                row_price[row_of[passed]] += reached - at

        while True:  # walk the chain back: each row takes its new column and gives up its old one
            if column >= 0:
                row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == new_row:
                break
            row = came_from[column]
    return column_of


# ---- decisions: the two heads, frame by frame ----------------------------------------------------


@dataclass(frozen=True)
class DecisionCounts:
    """One head over one or many clips: exact frames, and events. Counts add up."""

    frames: Counts = Counts()  # over labelled frames: matched = true positives
    negatives: int = 0  # labelled frames that are 0
    events: Counts = Counts()  # one reference event a turn, one predicted event a run of firing frames

    def __add__(self, other: "DecisionCounts") -> "DecisionCounts":
        return DecisionCounts(self.frames + other.frames, self.negatives + other.negatives, self.events + other.events)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the recalls of both classes; a class without a frame has none and is left out (no class: 0.0)."""
        false_positives = self.frames.predicted - self.frames.matched
        recalls = []
        if self.frames.reference:
            recalls.append(self.frames.recall)
        if self.negatives:
            recalls.append(1 - false_positives / self.negatives)
        return ratio(sum(recalls), len(recalls))

    def summary(self) -> dict[str, float]:
        """The seven numbers by the names under which they are reported."""
        return {
            "frame_precision": self.frames.precision,
            "frame_recall": self.frames.recall,
            "frame_f1": self.frames.f1,
            "balanced_accuracy": self.balanced_accuracy,
            "event_precision": self.events.precision,
            "event_recall": self.events.recall,
            "event_f1": self.events.f1,
        }


def fires(probability: np.ndarray | float, threshold: float) -> np.ndarray | bool:
    """A head fires where its probability *reaches* the threshold: one number or [F]. The one place where this is said.

    In float64, so that every caller rounds alike.
    """
    return probability >= threshold if isinstance(probability, float) else probability.astype(np.float64) >= threshold


def firing_runs(fired: np.ndarray) -> list[Event]:
    """Every run of consecutive True in `fired` [F], both ends included: 0 1 1 0 1 -> [(1, 2), (4, 4)]."""
    edges = np.diff(np.concatenate([[0], np.asarray(fired, np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), (np.flatnonzero(edges == -1) - 1).tolist()))


def match_events(predicted: Sequence[int], reference: Sequence[Event], tolerance: int) -> list[tuple[int, int]]:
    """Pair predictions with reference events one to one, each inside the event's range or at most `tolerance` frames
    from it: as many pairs as possible, and of all ways to have so many the one with the least total distance.

    predicted: rows; reference: ranges of rows, both ends included. A reference that finds no prediction costs more than
    all distances together. Returns (index into `predicted`, index into `reference`) pairs, in the order of the
    references.
    """
    rows = np.asarray(predicted, np.int64)  # [P]
    in_time = np.argsort(rows, kind="stable")
    choices = []
    for first, last in reference:
        begin, end = np.searchsorted(rows, (first - tolerance, last + tolerance + 1), sorter=in_time)
        near = in_time[begin:end]
        choices.append((near, np.maximum(np.maximum(first - rows[near], rows[near] - last), 0)))
    taken = cheapest_assignment(choices, alone=1 + tolerance * len(reference))
    return [(p, r) for r, p in enumerate(taken) if p >= 0]


def event_counts(predicted: Sequence[int], reference: Sequence[Event], fps: float) -> Counts:
    """Counts of predicted events (rows) against reference events, matched within EVENT_TOLERANCE of their ranges.

    As many pairs as match_events finds. Their distances do not matter here, so each prediction in turn takes, of the
    events it may be matched with, the one that ends first: the most pairs in O(n log n) (Glover 1967).
    """
    tolerance = int(EVENT_TOLERANCE * fps)
    coming = sorted(((first - tolerance, last + tolerance) for first, last in reference), reverse=True)
    ends: list[int] = []  # of the events that have begun and wait for a prediction, the first to end in front
    matched = 0
    for row in sorted(predicted):
        while coming and coming[-1][0] <= row:
            heapq.heappush(ends, coming.pop()[1])
        while ends and ends[0] < row:
            heapq.heappop(ends)
        if ends:
            heapq.heappop(ends)
            matched += 1
    return Counts(matched, len(predicted), len(reference))


@dataclass
class HeadTrace:
    """One head at every frame of one clip, given the reference conversation.

    probabilities [F]; labels [F]: 1, 0 or -100, at sampling rate 1.0. No text of the model's own is inserted, so a head
    goes on firing while it is due: both a run of firing frames and a run of positive labels are one event.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    fps: float

    def events(self, threshold: float) -> Counts:
        """Event counts at a threshold. Fed with its own labels as probabilities, a head scores exactly 1."""
        predicted = [first for first, _ in firing_runs(fires(self.probabilities, threshold))]
        return event_counts(predicted, firing_runs(self.labels == 1), self.fps)

    def decisions(self, threshold: float) -> "DecisionCounts":
        """Frame and event counts; frames labelled -100 take no part in the former (but may fire an event)."""
        fired, labels = fires(self.probabilities, threshold), self.labels
        frames = Counts(
            matched=int((fired & (labels == 1)).sum()),
            predicted=int((fired & (labels != -100)).sum()),
            reference=int((labels == 1).sum()),
        )
        return DecisionCounts(frames, int((labels == 0).sum()), self.events(threshold))


def threshold_curve(traces: Sequence[HeadTrace]) -> list[tuple[float, Counts]]:
    """Event counts over all clips at every threshold that matters: (threshold, counts), thresholds ascending.

    Lowering a threshold finds another event only when it reaches the highest probability of that event's frames, or
    of those within EVENT_TOLERANCE. So both are candidates, however far out they lie; each is moved half-way, in the
    logit, to the next lower probability of a frame that should be silent, where a small shift harms least. Of many,
    CANDIDATES evenly spread ones.
    """
    peaks = {
        float(trace.probabilities[max(first - reach, 0) : last + reach + 1].max())
        for trace in traces
        for first, last in firing_runs(trace.labels == 1)
        for reach in (0, int(EVENT_TOLERANCE * trace.fps))
    }
    silent = np.unique(np.concatenate([trace.probabilities[trace.labels != 1] for trace in traces]).astype(np.float64))
    candidates = sorted({between(peak, silent) for peak in peaks}) or [0.5]
    if len(candidates) > CANDIDATES:
        candidates = [candidates[i] for i in np.linspace(0, len(candidates) - 1, CANDIDATES).astype(int)]
    return [(c, sum((trace.events(c) for trace in traces), Counts())) for c in candidates]


def between(peak: float, silent: np.ndarray) -> float:
    """A threshold half-way, in the logit, between `peak` and the next lower of the ascending numbers in `silent`."""
    below = int(np.searchsorted(silent, peak))
    lower = float(silent[below - 1]) if below else 0.0
    middle = sigmoid((logit(peak) + logit(lower)) / 2)
    return min(max(middle, float(np.nextafter(lower, 1))), peak)


def even_odds(traces: Sequence[HeadTrace]) -> float:
    """The probability that stands for even odds: with it moved to 1/2, the mean probability is the share of positives.

    A head trained on a sample of the negatives, or by another loss, is off by about one factor of the odds; this is
    that factor, found by bisection (calibration in the large). Without both labels it is one half.
    """
    labels = np.concatenate([trace.labels for trace in traces])
    probabilities = np.concatenate([trace.probabilities for trace in traces])[labels != -100].astype(np.float64)
    wanted = int((labels == 1).sum())
    if wanted in (0, len(probabilities)):
        return 0.5
    probabilities = probabilities.clip(1e-9, 1 - 1e-9)
    logits = np.log(probabilities / (1 - probabilities))
    low, high = -21.0, 21.0  # beyond every logit of a probability that is clipped like this
    for _ in range(50):
        middle = (low + high) / 2
        expected = (1 / (1 + np.exp(middle - logits))).sum()
        low, high = (middle, high) if expected > wanted else (low, middle)
    return sigmoid(low)


def logit(probability: float) -> float:
    """log(p / (1 - p)), with p kept 1e-9 away from 0 and 1."""
    p = min(max(float(probability), 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def best_threshold(curve: Sequence[tuple[float, Counts]]) -> float:
    """The threshold of `threshold_curve` with the best event F1; of several, the middle one."""
    best = max(counts.f1 for _, counts in curve)
    at_best = [threshold for threshold, counts in curve if counts.f1 == best]
    return at_best[len(at_best) // 2]


def _hits_by_score(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the labelled frames: how many positives and negatives lie at each distinct probability, highest first."""
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    kept = labels != -100
    scores, group = np.unique(-probabilities[kept], return_inverse=True)
    positives = np.bincount(group, weights=labels[kept] == 1, minlength=len(scores))
    negatives = np.bincount(group, weights=labels[kept] == 0, minlength=len(scores))
    return positives, negatives


def average_precision(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Sum over thresholds of precision times the recall gained there; equal probabilities are one threshold.

    probabilities [F], labels [F] in {1, 0, -100}, both pooled over all clips. No positive frame gives 0.0.
    """
    positives, negatives = _hits_by_score(probabilities, labels)
    if positives.sum() == 0:
        return 0.0
    found = np.cumsum(positives)
    precision = found / np.cumsum(positives + negatives)
    return float((precision * positives).sum() / positives.sum())


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive frame scores higher than a negative one, a tie counting one half.

    probabilities [F], labels [F] in {1, 0, -100}, both pooled over all clips. Without both classes it is 0.0.
    """
    positives, negatives = _hits_by_score(probabilities, labels)
    pairs = positives.sum() * negatives.sum()
    lower_negatives = negatives.sum() - np.cumsum(negatives)
    return ratio((positives * (lower_negatives + negatives / 2)).sum(), pairs)


# ---- dialogue: what is said, and when ------------------------------------------------------------

# Seconds (l, r) by dataset: a prediction at frame i may stand for a reference at frame j where l <= j - i <= r. So r is
# how far a prediction may come *before* its reference, and -l how far after. The first name found in the dataset's own
# name decides.
WINDOWS = {
    "narration": (-2.5, 2.5),
    "ego4d": (-4.0, 8.5),
    "epickitchens": (-1.5, 3.0),
    "holoassist": (-1.5, 2.5),
    "egoexolearn": (-2.0, 3.5),
    "assembly101": (-2.0, 4.0),
    "wtag": (-3.0, 6.0),
}
OTHER_WINDOW = (-2.5, 2.5)

_DIALOGUE_SUMS = (
    "num_matched",
    "num_mismatched",
    "num_missed",
    "num_redundant",
    "time_diff_sum",
    "semantic_sum",
    "semantic_count",
)


def window_of(dataset: str) -> tuple[float, float]:
    """The matching window (l, r) of a dataset in seconds, see WINDOWS."""
    return next((window for name, window in WINDOWS.items() if name in dataset.lower()), OTHER_WINDOW)


def match_dialogue(
    predicted_frames: Sequence[int],
    reference_frames: Sequence[int],
    similarity: np.ndarray,
    *,
    num_frames: int,
    fps: float,
    window_seconds: tuple[float, float],
    distance_factor: float = 0.3,
    distance_power: float = 1.5,
    threshold: float = 0.5,
    compat: str | None = None,
) -> dict[str, Any]:
    """Match what the assistant said to what it should have said, as ProAssist does (arXiv 2506.05904).

    Every prediction takes one frame of its window, no two the same, at the least total cost. From i, frame j costs

        (1 - s if a reference stands at j, else 1) + distance_factor * (|i - j| / max(|l|, r)) ** distance_power

    with s = |similarity| of the two texts. A prediction whose frame holds a reference is matched: *correct* if
    s > threshold, else *mismatched*. One whose frame holds none is *redundant*; a reference that nobody took is
    *missed*.

        frames      0    1    2    3    4    5        A at 1 takes reference x at 2: matched, one frame early
        reference             x         y             B at 5 takes its own frame:    redundant
        predicted        A                   B        y is taken by nobody:          missed

    predicted_frames  P distinct rows 0..num_frames-1, one for every frame on which the assistant spoke
    reference_frames  R distinct rows, the decision frames of the assistant's turns (turns at one frame are one text)
    similarity        [P, R] cosine of the texts
    window_seconds    (l, r), made frames by int(seconds * fps)
    compat            "proassist" reproduces a defect of ProAssist's code: it keeps costs in a sparse matrix, where a
                      cost of exactly 0 (the same text on the same frame) is no entry, so that the pair cannot be
                      chosen. Where that leaves a prediction no frame at all (ProAssist stops there), it counts as
                      redundant. For comparing with published numbers only.

    Returns counts, rates, `time_diff` (seconds, mean over correct pairs), `semantic_score` (mean s over matched pairs
    with s >= threshold), `pairs` [(prediction, reference)] of all matched pairs, `correct_pairs` of the correct ones,
    and the sums that `sum_dialogue` needs. Raises ProspectError for frames that are not distinct or lie outside, a
    similarity of the wrong shape or not finite, a window without the frame itself, an unknown `compat`.
    """
    predicted, reference = np.asarray(predicted_frames, np.int64), np.asarray(reference_frames, np.int64)  # [P], [R]
    P, R = len(predicted), len(reference)
    similarity = np.asarray(similarity, np.float64) if P and R else np.zeros((P, R))
    if similarity.shape != (P, R) or not np.isfinite(similarity).all():
        what = f"similarity must be finite and {(P, R)}, is {similarity.shape}"
        raise ProspectError(what, where="match_dialogue", remedy="one row a prediction, one column a reference")
    for name, frames in (("predicted", predicted), ("reference", reference)):
        if len(np.unique(frames)) != len(frames):
            what = f"two {name} texts at one frame"
            raise ProspectError(what, where="match_dialogue", remedy="join the texts of one frame")
        if len(frames) and not (0 <= frames.min() and frames.max() < num_frames):
            what = f"a {name} frame lies outside 0..{num_frames - 1}"
            raise ProspectError(what, where="match_dialogue", remedy="rows count from the clip's first frame")
    if compat not in (None, "proassist"):
        raise ProspectError(f"unknown compat {compat!r}", where="match_dialogue", remedy='None or "proassist"')
    earliest, latest = (int(seconds * fps) for seconds in window_seconds)
    if not earliest <= 0 <= latest:
        what = f"window {tuple(window_seconds)} does not hold the prediction's own frame"
        raise ProspectError(what, where="match_dialogue", remedy="seconds (l, r) with l <= 0 <= r")

    # Each prediction chooses among the W frames of its window.
    offset = np.arange(earliest, latest + 1)  # [W]
    frames = predicted[:, None] + offset  # [P, W]
    inside = (frames >= 0) & (frames < num_frames)
    reference_at = np.full(num_frames, -1)  # [F] index of the reference there, -1 for none
    reference_at[reference] = np.arange(R)
    reference_of = np.where(inside, reference_at[frames.clip(0, num_frames - 1)], -1)  # [P, W]
    rows, places = np.nonzero(reference_of >= 0)
    text_cost = np.ones(frames.shape)
    text_cost[rows, places] -= np.abs(similarity[rows, reference_of[rows, places]])
    reach = max(abs(earliest), latest) or 1  # a window of one frame has no distance
    cost = text_cost + distance_factor * (np.abs(offset) / reach) ** distance_power
    alone = math.inf
    if compat == "proassist":
        inside &= cost != 0
        alone = 2 * P * (1 + distance_factor)  # dearer than any assignment that has a frame for it
    taken = cheapest_assignment([(frames[p, inside[p]], cost[p, inside[p]]) for p in range(P)], alone)

    pairs = [(p, int(reference_at[frame])) for p, frame in enumerate(taken) if frame >= 0 and reference_at[frame] >= 0]
    scores = [abs(float(similarity[pair])) for pair in pairs]
    correct = [pair for pair, score in zip(pairs, scores) if score > threshold]
    semantic = [score for score in scores if score >= threshold]
    result = _dialogue_rates(
        {
            "num_matched": len(correct),
            "num_mismatched": len(pairs) - len(correct),
            "num_missed": R - len(pairs),
            "num_redundant": P - len(pairs),
            "time_diff_sum": float(sum(abs(predicted[p] - reference[r]) for p, r in correct) / fps),
            "semantic_sum": float(sum(semantic)),
            "semantic_count": len(semantic),
        }
    )
    return {**result, "pairs": pairs, "correct_pairs": correct}


def sum_dialogue(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of `match_dialogue` on several clips as one: the rates of the sums. Sums may be summed again."""
    return _dialogue_rates({key: sum(result[key] for result in results) for key in _DIALOGUE_SUMS})


def _dialogue_rates(sums: dict[str, Any]) -> dict[str, Any]:
    M, missed, redundant = sums["num_matched"], sums["num_missed"], sums["num_redundant"]
    A = M + sums["num_mismatched"]  # all matched pairs
    return {
        **sums,
        "precision": ratio(M, A + redundant),
        "recall": ratio(M, A + missed),
        "f1": ratio(2 * M, 2 * A + redundant + missed),
        "jaccard_index": ratio(M, A + missed + redundant),
        "missing_rate": ratio(missed, A + missed),
        "redundant_rate": ratio(redundant, A + redundant),
        "time_diff": ratio(sums["time_diff_sum"], M),
        "semantic_score": ratio(sums["semantic_sum"], sums["semantic_count"]),
    }


# ---- task state ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # an array has no single answer to ==
class TaskStateCounts:
    """Task state over one or many clips. Counts add up."""

    frames: int = 0  # of clips that have steps
    frames_right: int = 0  # on which every step's state is right
    states: np.ndarray = field(default_factory=lambda: np.zeros((3, 3), np.int64))  # [reference, predicted]
    transitions: Counts = Counts()  # the same step, the same transition, within the window
    time_errors: tuple[float, ...] = ()  # seconds, one per matched transition, >= 0
    timed: int = 0  # updates paired by time alone,
    timed_step: int = 0  # of these with the right step,
    timed_transition: int = 0  # and with the right transition
    generated: int = 0  # update texts written
    valid: int = 0  # of these that parse, name known steps and are legal

    def __add__(self, other: "TaskStateCounts") -> "TaskStateCounts":
        return TaskStateCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def summary(self) -> dict[str, float]:
        """The numbers by the names under which they are reported; times in seconds."""
        return {
            "joint_goal_accuracy": ratio(self.frames_right, self.frames),
            "step_state_accuracy": ratio(np.trace(self.states), self.states.sum()),
            "state_macro_f1": macro_f1(self.states),
            "transition_precision": self.transitions.precision,
            "transition_recall": self.transitions.recall,
            "transition_f1": self.transitions.f1,
            "timed_step_accuracy": ratio(self.timed_step, self.timed),
            "timed_transition_accuracy": ratio(self.timed_transition, self.timed),
            "time_error_mean": ratio(sum(self.time_errors), len(self.time_errors)),
            "time_error_p90": float(np.percentile(self.time_errors, 90)) if self.time_errors else 0.0,
            "valid_update_ratio": ratio(self.valid, self.generated),
        }


def confusion(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How often each state was taken for each, [reference, predicted], from equal arrays of indices into STATES."""
    counts = np.zeros((3, 3), np.int64)
    np.add.at(counts, (reference.ravel(), predicted.ravel()), 1)
    return counts


def macro_f1(states: np.ndarray) -> float:
    """The mean F1 of the three states of a confusion; one that neither occurs nor is predicted is left out."""
    right, reference, predicted = np.diag(states), states.sum(1), states.sum(0)
    occurs = (reference + predicted) > 0
    return ratio((2 * right[occurs] / (reference + predicted)[occurs]).sum(), occurs.sum())


def state_matrix(states: Sequence[State], step_ids: Sequence[str]) -> np.ndarray:
    """[F, S] indices into STATES; a step that a state does not mention has not started."""
    rows = [[STATES.index(state.get(step, "not_started")) for step in step_ids] for state in states]
    return np.array(rows, np.int64).reshape(len(states), len(step_ids))


def task_state_metrics(
    predicted_states: np.ndarray,
    reference_states: np.ndarray,
    also_right: Sequence[np.ndarray],
    predicted_updates: Sequence[Update],
    reference_updates: Sequence[Update],
    *,
    num_generated: int,
    num_valid: int,
    fps: float,
    window_seconds: tuple[float, float],
) -> TaskStateCounts:
    """Task state of one clip.

    predicted_states, reference_states    [F, S] indices into STATES, after the updates of each frame (`state_matrix`)
    also_right                            states [F, S] that are right too: while updates are due, with and without them
    predicted_updates, reference_updates  single transitions, (row, Transition); the predicted are those applied
    num_generated, num_valid              update texts written, and how many of them were applied
    window_seconds                        (l, r) as for dialogue

    A step or transition that is wrong, missing, extra or too far away is an error of its own: updates are paired by
    time and meaning, never by their order.
    """
    F, S = reference_states.shape
    if S == 0:  # a clip without a task has no state to be right about
        F = 0
    right = np.stack([reference_states, *also_right])  # a step only moves forward: what lies between is right, too
    same = (right.min(0) <= predicted_states) & (predicted_states <= right.max(0))  # [F, S]
    states = confusion(predicted_states, np.where(same, predicted_states, reference_states))

    window = tuple(int(seconds * fps) for seconds in window_seconds)
    exact = pair_updates(predicted_updates, reference_updates, window, same_meaning=True)
    timed = pair_updates(predicted_updates, reference_updates, window, same_meaning=False)
    return TaskStateCounts(
        frames=F,
        frames_right=int(same.all(1).sum()) if F else 0,
        states=states,
        transitions=Counts(len(exact), len(predicted_updates), len(reference_updates)),
        time_errors=tuple(abs(p[0] - r[0]) / fps for p, r in exact),
        timed=len(timed),
        timed_step=sum(p[1].id == r[1].id for p, r in timed),
        timed_transition=sum(p[1].transition == r[1].transition for p, r in timed),
        generated=num_generated,
        valid=num_valid,
    )


def pair_updates(
    predicted: Sequence[Update], reference: Sequence[Update], window: tuple[int, int], *, same_meaning: bool
) -> list[tuple[Update, Update]]:
    """Pairs within the window: as many as possible, at the least total distance, agreeing in meaning where they can.

    `same_meaning` admits only pairs of the same step and transition. The three wishes, in their order, are one cost: a
    frame of distance weighs more than all disagreements together, an update left alone more than all distances.
    """
    disagreements = 2 * min(len(predicted), len(reference)) + 1
    choices = []
    for p_row, p_move in predicted:
        columns, costs = [], []
        for r, (r_row, r_move) in enumerate(reference):
            differ = (p_move.id != r_move.id) + (p_move.transition != r_move.transition)
            if window[0] <= r_row - p_row <= window[1] and not (same_meaning and differ):
                columns.append(r)
                costs.append(abs(r_row - p_row) * disagreements + differ)
        choices.append((np.array(columns), np.array(costs)))
    furthest = max(abs(window[0]), window[1]) * min(len(predicted), len(reference))  # all distances together
    taken = cheapest_assignment(choices, alone=(furthest + 1) * disagreements)
    return [(predicted[p], reference[r]) for p, r in enumerate(taken) if r >= 0]


# ---- reporting -----------------------------------------------------------------------------------


def by_dataset(
    clips: Sequence[tuple[str, Result]], summarise: Callable[[list[Result]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """A summary per dataset, by name, and `macro`: the plain mean over datasets of every number but counts and sums.

    clips      (name of the dataset, result of the clip)
    summarise  the results of one dataset's clips -> its numbers, e.g. `sum_dialogue`; a number that a dataset lacks
               (a text metric failed there) has no mean

    A dataset that is itself called macro stands in the table as `macro (dataset)`.
    """
    names = sorted({name for name, _ in clips})
    found = {name: summarise([result for other, result in clips if other == name]) for name in names}
    table = {"macro (dataset)" if name == "macro" else name: numbers for name, numbers in found.items()}
    first, *others = table.values() or [{}]
    rates = [key for key, value in first.items() if isinstance(value, float) and all(key in other for other in others)]
    macro = {
        key: float(np.mean([numbers[key] for numbers in table.values()])) for key in rates if key not in _DIALOGUE_SUMS
    }
    return {**table, "macro": macro}
