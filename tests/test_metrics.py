"""Evaluation: every expected number is worked out by hand beside its test, or comes from scipy or pycocoevalcap."""

import itertools
import math
import shutil
import sys
import time
import tracemalloc

import numpy as np
import pytest
from conftest import raw_clip, read

from prospect import text_metrics
from prospect.clips import Clip
from prospect.config import DataConfig
from prospect.dst import Transition
from prospect.errors import ProspectError
from prospect.metrics import (
    CANDIDATES,
    Counts,
    DecisionCounts,
    HeadTrace,
    TaskStateCounts,
    auroc,
    average_precision,
    best_threshold,
    by_dataset,
    cheapest_assignment,
    confusion,
    event_counts,
    fires,
    firing_runs,
    macro_f1,
    match_dialogue,
    match_events,
    state_matrix,
    sum_dialogue,
    task_state_metrics,
    threshold_curve,
    window_of,
)
from prospect.sequence import lay_out
from prospect.text_metrics import bleu, lexical_similarity, load_similarity, weighted_by_jaccard

RATES = ("precision", "recall", "f1", "jaccard_index", "missing_rate", "redundant_rate", "time_diff", "semantic_score")


# ---- decisions -----------------------------------------------------------------------------------


def test_a_run_of_firing_frames_from_first_to_last():
    assert firing_runs(np.array([0, 1, 1, 0, 1, 0, 1, 1], bool)) == [(1, 2), (4, 4), (6, 7)]
    assert firing_runs(np.array([1, 1], bool)) == [(0, 1)]
    assert firing_runs(np.zeros(3, bool)) == firing_runs(np.zeros(0, bool)) == []


def test_events_match_inside_the_range_or_at_most_tolerance_outside():
    assert all(match_events([row], [(10, 14)], 2) == [(0, 0)] for row in range(8, 17))
    assert match_events([7], [(10, 14)], 2) == match_events([17], [(10, 14)], 2) == []
    assert match_events([9, 10, 11], [(10, 10)], 2) == [(1, 0)]  # of three, the nearest
    assert match_events([9, 12, 15], [(10, 14)], 2) == [(1, 0)]  # the one inside
    assert match_events([], [(3, 3)], 2) == match_events([3], [], 2) == []
    # Taking the nearest first (12-11) would leave 10 and 14 alone; both can be matched.
    assert match_events([10, 12], [(11, 11), (14, 14)], 2) == [(0, 0), (1, 1)]
    assert match_events([12, 10], [(14, 14), (11, 11)], 2) == [(0, 0), (1, 1)]
    # Two ranges that touch: 5 lies in the first and may serve the second, one frame away, if 3 takes the first.
    assert match_events([3, 5], [(2, 5), (6, 9)], 2) == [(0, 0), (1, 1)]
    assert match_events([5], [(2, 5), (6, 9)], 2) == [(0, 0)]
    assert match_events([4, 7], [(6, 8), (3, 5)], 2) == [(1, 0), (0, 1)]  # in the order of the references as given


def by_brute_force(predicted: list[int], reference: list[tuple[int, int]], tolerance: int) -> tuple[int, int]:
    """(pairs, minus their total distance) of the best matching, by trying every one."""
    if not predicted:
        return 0, 0
    found = [by_brute_force(predicted[1:], reference, tolerance)]
    for r, (first, last) in enumerate(reference):
        away = max(first - predicted[0], predicted[0] - last, 0)
        if away <= tolerance:
            pairs, distance = by_brute_force(predicted[1:], reference[:r] + reference[r + 1 :], tolerance)
            found.append((pairs + 1, distance - away))
    return max(found)


def random_events(rng, most: int) -> tuple[list[int], list[tuple[int, int]], int]:
    """Predicted rows, reference ranges (some overlap, some touch) and a tolerance, all within 30 rows."""
    firsts, lengths = rng.integers(0, 25, rng.integers(0, most + 1)), rng.integers(0, 6, most)
    reference = [(int(first), int(first + length)) for first, length in zip(firsts, lengths)]
    return rng.integers(0, 30, rng.integers(0, most + 1)).tolist(), reference, int(rng.integers(0, 5))


def matched_at(pairs, predicted, reference) -> tuple[int, int]:
    """(pairs, minus their total distance), after checking that nothing is matched twice."""
    assert len({p for p, _ in pairs}) == len({r for _, r in pairs}) == len(pairs)
    distance = [max(reference[r][0] - predicted[p], predicted[p] - reference[r][1], 0) for p, r in pairs]
    return len(pairs), -sum(distance)


def test_event_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(400):
        predicted, reference, tolerance = random_events(rng, 5)
        pairs = match_events(predicted, reference, tolerance)
        assert matched_at(pairs, predicted, reference) == by_brute_force(predicted, reference, tolerance)
        assert [r for _, r in pairs] == sorted(r for _, r in pairs)
        assert event_counts(predicted, reference, tolerance) == Counts(len(pairs), len(predicted), len(reference))


def test_event_matching_is_scipy_s():
    """Its assignment with a price on every unmatched prediction that no distance outweighs."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(1)
    for _ in range(200):
        predicted, reference, tolerance = random_events(rng, 12)
        if not (predicted and reference):
            continue
        first, last = np.array(reference).T
        rows = np.array(predicted)[:, None]
        distance = np.maximum(np.maximum(first - rows, rows - last), 0)  # [P,R]
        free = np.full((len(predicted), len(predicted)), 1000)
        cost = np.hstack([np.where(distance <= tolerance, distance, 10_000), free])
        taken_rows, columns = optimize.linear_sum_assignment(cost)
        kept = columns < len(reference)
        best = kept.sum(), -cost[taken_rows[kept], columns[kept]].sum()
        assert matched_at(match_events(predicted, reference, tolerance), predicted, reference) == best
        assert event_counts(predicted, reference, tolerance).matched == best[0]


def test_streamed_every_decision_is_one_predicted_event():
    # Twenty replies in a row, 10..29, for one turn due at 12..16: one right, nineteen redundant.
    counts = event_counts(list(range(10, 30)), [(12, 16)], fps=2)
    assert counts == Counts(1, 20, 1)
    assert (counts.precision, counts.recall, counts.f1) == (1 / 20, 1.0, pytest.approx(2 / 21))
    # A second around the range: 10 and 18 at 2 fps, 8 and 20 at 4.
    for fps, early, late in ((2, 10, 18), (4, 8, 20)):
        assert event_counts([early], [(12, 16)], fps) == event_counts([late], [(12, 16)], fps) == Counts(1, 1, 1)
        for row in (early - 1, late + 1):
            assert event_counts([row], [(12, 16)], fps) == Counts(0, 1, 1)
    # Two turns at one range are one reply each: both may find their own.
    assert event_counts([12, 13], [(12, 16), (12, 16)], 2) == Counts(2, 2, 2)


def test_counts_add_and_empty_sets_are_zero():
    total = Counts(1, 2, 4) + Counts(2, 2, 2)
    assert total == Counts(3, 4, 6)
    assert (total.precision, total.recall, total.f1) == (0.75, 0.5, 0.6)
    assert (Counts().precision, Counts().recall, Counts().f1) == (0.0, 0.0, 0.0)
    assert set(DecisionCounts().summary().values()) == {0.0}


def trace(probabilities, labels, fps: float = 2) -> HeadTrace:
    return HeadTrace(np.array(probabilities), np.array(labels), fps)


def test_decisions_by_hand():
    #                        0    1    2    3    4    5    6    7    8    9
    head = trace([0.1, 0.6, 0.7, 0.2, 0.5, 0.1, 0.9, 0.1, 0.1, 0.8], [0, 1, 1, 1, 0, 0, -100, 0, 0, 0])
    # Fired: 1 2, 4, 6, 9. Of the labelled: true positives 1 2, false positives 4 9, missed 3. Negatives 0 4 5 7 8 9.
    # The runs begin at 1, 4, 6 and 9; one reference, 1..3: 1 takes it, and 4, 6 and 9 are redundant.
    counts = head.decisions(0.5)
    assert counts == DecisionCounts(Counts(2, 4, 3), 6, Counts(1, 4, 1))
    assert (counts.frames.precision, counts.frames.recall) == (2 / 4, pytest.approx(2 / 3))
    assert counts.balanced_accuracy == pytest.approx((2 / 3 + 4 / 6) / 2)
    assert counts.events.f1 == pytest.approx(2 / 5) and head.events(0.5) == counts.events
    doubled = counts + counts
    assert doubled.summary() == counts.summary() and doubled.negatives == 12


def test_a_head_fires_when_its_probability_reaches_the_threshold_in_any_precision():
    threshold = float(np.float32(0.3))
    for dtype in (np.float32, np.float64):
        head = HeadTrace(np.array([np.float32(0.3)], dtype), np.array([1]), 2)
        assert head.decisions(np.float64(threshold)).frames.matched == 1
    assert fires(0.3, 0.3) and not fires(0.3, 0.3000001)


def test_a_perfect_head_scores_exactly_one():
    labels = np.array([0, 1, 1, 0, -100, 1, 0])
    counts = trace((labels == 1) * 0.8 + 0.1, labels).decisions(0.5)
    assert set(counts.summary().values()) == {1.0}
    assert average_precision(labels, labels) == auroc(labels, labels) == 1.0
    assert trace([0.9], [1]).decisions(0.5).balanced_accuracy == 1.0


def random_turns(rng) -> Clip:
    """Replies and updates over ranges of any length that overlap, touch, nest or end together; any fps."""
    start, frames = int(rng.integers(0, 300)), int(rng.integers(1, 60))
    turns, at = [], 0
    for number in range(int(rng.integers(0, 12))):
        role = ("user", "assistant", "DST_UPDATE")[int(rng.integers(3))]
        first = at if rng.random() < 0.5 else int(rng.integers(0, frames))  # often right behind the last
        last = min(first + int(rng.integers(0, (1, 3, 15)[number % 3] + 1)), frames - 1)
        if first > last:
            continue
        content = [{"id": "S1", "transition": "start"}] if role == "DST_UPDATE" else f"Word {number}."
        if role == "DST_UPDATE" and any(turn[0] == role for turn in turns):
            continue
        turns.append((role, content, start + first, start + last))
        at = last + 1
    return read(raw_clip(turns, start, start + frames - 1) | {"fps": float(rng.choice([0.5, 1, 2, 4, 29.97]))})


@pytest.mark.parametrize("text_at", ["drawn", "last", "range"])
def test_labels_given_back_as_probabilities_score_exactly_one(text_at):
    """The oracle of the teacher-forced numbers, over ranges of any length, adjacent and touching turns, any fps."""
    rng, events, tuned = np.random.default_rng(6), 0, 0
    for _ in range(300):
        clip = random_turns(rng)
        layout = lay_out(clip, DataConfig(text_at=text_at), 1.0, 0, 0)
        for labels in (layout.speaking, layout.dst):
            head = HeadTrace((labels == 1).astype(np.float32), labels, clip.fps)
            counts = head.decisions(0.5)
            assert counts.frames.matched == counts.frames.predicted == counts.frames.reference
            assert counts.events.matched == counts.events.predicted == counts.events.reference
            if (labels == 1).any():
                events, tuned = events + counts.events.reference, tuned + 1
                threshold = best_threshold(threshold_curve([head]))
                assert set(head.decisions(threshold).events.__dict__.values()) == {counts.events.reference}
                assert head.decisions(threshold).events.f1 == 1.0
    assert events > 300 and tuned > 150


def test_said_once_within_each_range_scores_exactly_one():
    """The oracle of the streamed numbers: one decision anywhere in the range of each text."""
    rng, events = np.random.default_rng(7), 0
    for _ in range(300):
        clip = random_turns(rng)
        for role in ("assistant", "DST_UPDATE"):
            due = [(first - clip.start_frame, last - clip.start_frame) for first, last in clip.events(role)]
            said = [int(rng.integers(first, last + 1)) for first, last in due]
            assert event_counts(said, due, clip.fps) == Counts(len(due), len(due), len(due))
            events += len(due)
    assert events > 300


def test_average_precision_and_auroc_by_hand_with_ties():
    probabilities, labels = np.array([0.9, 0.8, 0.8, 0.3, 0.1, 0.95]), np.array([1, 0, 1, 0, 1, -100])
    # Thresholds: 0.9 finds 1 of 1; 0.8 finds 2 of 3; 0.3 finds 2 of 4; 0.1 finds 3 of 5. Recall grows at 0.9, 0.8, 0.1.
    assert average_precision(probabilities, labels) == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    # Of 3 x 2 pairs: 0.9 beats both, 0.8 ties one and beats one, 0.1 loses both.
    assert auroc(probabilities, labels) == pytest.approx((2 + 1.5 + 0) / 6)
    assert auroc(np.full(4, 0.5), np.array([1, 0, 0, 0])) == 0.5
    assert average_precision(np.full(4, 0.5), np.array([1, 0, 0, 0])) == 0.25
    for none in (np.zeros(0), np.array([-100, -100])):
        assert average_precision(none, none) == auroc(none, none) == 0.0
    assert auroc(np.array([0.1, 0.2]), np.array([1, 1])) == 0.0


def test_auroc_is_the_mann_whitney_statistic():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for _ in range(20):
        labels = rng.integers(0, 2, 60)
        probabilities = np.round(rng.random(60), 1)  # many ties
        u = stats.mannwhitneyu(probabilities[labels == 1], probabilities[labels == 0]).statistic
        assert auroc(probabilities, labels) == pytest.approx(u / (labels.sum() * (60 - labels.sum())))


def test_thresholds_lie_between_the_best_frames_of_events_and_what_is_below():
    # Events at 2 and 8..9; 15 fires below .3. Candidates: below .65 (both found) and below .9 (one).
    probabilities = np.full(20, 0.01)
    probabilities[[2, 8, 9, 15]] = [0.65, 0.4, 0.9, 0.3]
    labels = np.zeros(20, int)
    labels[[2, 8, 9]] = 1
    curve = threshold_curve([trace(probabilities, labels)])
    assert [counts for _, counts in curve] == [Counts(2, 2, 2), Counts(1, 1, 2)]
    # Half-way in the logit to the silent .3 (-.847): of .65 (.619) it is -.114, of .9 (2.197) it is .675.
    assert [threshold for threshold, _ in curve] == pytest.approx([0.4715, 0.6626], abs=1e-4)
    assert best_threshold(curve) == curve[0][0]
    # With a false alarm of .7 the choice is between one of each and neither: 2 2 3 is .8, 1 1 2 is .667.
    probabilities[15] = 0.7
    curve = threshold_curve([trace(probabilities, labels)])
    assert [counts for _, counts in curve] == [Counts(2, 3, 2), Counts(1, 1, 2)]
    assert best_threshold(curve) == curve[0][0]
    # Two clips are summed before the choice.
    quiet = trace([0.01, 0.6, 0.01], [0, 1, 0])
    assert [counts for _, counts in threshold_curve([trace(probabilities, labels), quiet])] == [
        Counts(3, 4, 3), Counts(3, 4, 3), Counts(1, 1, 3)]  # fmt: skip


def test_of_equally_good_thresholds_the_middle_one():
    best = Counts(2, 2, 2)
    curve = [(0.1, Counts(1, 3, 2)), (0.2, best), (0.3, best), (0.4, best), (0.9, Counts())]
    assert best_threshold(curve) == 0.3
    assert best_threshold(threshold_curve([trace(np.zeros(5), np.zeros(5, int))])) == 0.5  # no event anywhere


@pytest.mark.parametrize("low, high", [(1e-7, 1e-5), (1 - 1e-5, 1 - 1e-7), (1e-7, 1 - 1e-7), (0.0, 1.0), (0.49, 0.5)])
def test_a_head_that_separates_perfectly_is_found_however_far_out(low, high):
    labels = np.array([0, 1, 1, 0, -100, 0, 1, 0])
    probabilities = np.where(labels == 1, high, low)
    for dtype in (np.float64, np.float32):
        head = HeadTrace(probabilities.astype(dtype), labels, 2)
        threshold = best_threshold(threshold_curve([head]))
        assert set(head.decisions(threshold).summary().values()) == {1.0}
        assert low < threshold <= high


def test_hardly_any_threshold_is_better_than_the_one_chosen():
    """Against all there are, every probability seen, for heads that fire 0 to 3 frames late."""
    rng, lost = np.random.default_rng(8), []
    for late in [0, 1, 2, 3] * 10:
        heads = []
        for _ in range(3):
            labels = np.roll(np.repeat([0, 1], [18, 2]), 4)[np.arange(120) % 20]
            logits = rng.normal(size=120) * 1.2 - 2 + 4 * np.roll(labels, late)
            heads.append(trace(1 / (1 + np.exp(-logits)), labels))
        curve = threshold_curve(heads)
        assert [threshold for threshold, _ in curve] == sorted({threshold for threshold, _ in curve})
        seen = np.concatenate([head.probabilities for head in heads])
        of_all = [sum((head.events(p) for head in heads), Counts()).f1 for p in seen]
        lost.append(max(of_all) - max(counts.f1 for _, counts in curve))
    assert max(lost) < 0.05 and np.mean(lost) < 0.01


def test_a_head_that_fires_right_before_its_events_is_found():
    """Half a second early, and never on a labelled frame: within reach, at .4 and above .3 alone."""
    probabilities, labels = np.full(20, 0.01), np.zeros(20, int)
    probabilities[[4, 11, 15]], labels[[5, 12]] = [0.4, 0.5, 0.3], 1
    threshold = best_threshold(threshold_curve([trace(probabilities, labels)]))
    assert 0.3 < threshold <= 0.4 and trace(probabilities, labels).events(threshold) == Counts(2, 2, 2)


def test_of_many_candidates_fifty_from_the_lowest_to_the_highest():
    rng = np.random.default_rng(9)
    labels = np.tile([0, 1], 300)
    head = trace(np.sort(rng.random(600)), labels)
    curve = threshold_curve([head])
    assert len(curve) == CANDIDATES == 50
    ends = head.probabilities[[0, 1, -2, -1]]
    assert ends[0] < curve[0][0] <= ends[1] and ends[2] < curve[-1][0] <= ends[3]


def test_each_clip_has_a_second_of_its_own():
    # Fired at 5 for an event at 8: three frames early, within a second at 4 fps and not at 2.
    probabilities, labels = np.zeros(20), np.zeros(20, int)
    probabilities[5], labels[8] = 0.9, 1
    assert trace(probabilities, labels, 2).events(0.5) == Counts(0, 1, 1)
    assert trace(probabilities, labels, 4).events(0.5) == Counts(1, 1, 1)


# ---- the assignment ------------------------------------------------------------------------------


def assignment(cost: np.ndarray, alone: float = math.inf) -> np.ndarray:
    """The column of each row of a table [n, m] of costs; inf is no choice."""
    choices = [(np.flatnonzero(row < np.inf), row[row < np.inf]) for row in np.asarray(cost, float)]
    return np.array(cheapest_assignment(choices, alone), int)


def test_assignment_by_hand():
    # Row 0 wants column 0 (1), row 1 wants it more (1 against 9): 0-1, 1-0 costs 3, the greedy choice 10.
    assert assignment(np.array([[1.0, 2.0], [1.0, 9.0]])).tolist() == [1, 0]
    assert assignment(np.array([[np.inf, 0.0, 5.0], [np.inf, 0.0, 1.0]])).tolist() == [1, 2]
    assert assignment(np.array([[-3.0, -1.0]])).tolist() == [0]
    assert assignment(np.zeros((0, 4))).tolist() == []
    # Either row may go without, for 3: the one that has no cheap column does.
    assert assignment(np.array([[1.0, np.inf], [2.0, 9.0]]), alone=3.0).tolist() == [0, -1]
    assert assignment(np.array([[2.0, 9.0], [1.0, np.inf]]), alone=3.0).tolist() == [-1, 0]
    assert assignment(np.array([[np.inf, np.inf]]), alone=3.0).tolist() == [-1]
    with pytest.raises(ValueError):
        assignment(np.array([[1.0, np.inf], [1.0, np.inf]]))


def test_assignment_costs_as_little_as_any_does():
    rng = np.random.default_rng(5)
    for _ in range(100):
        n, m = int(rng.integers(1, 5)), int(rng.integers(4, 6))
        cost = np.round(rng.normal(size=(n, m)) * 3)
        cheapest = min(sum(cost[i, j] for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(m), n))
        mine = assignment(cost)
        assert len(set(mine.tolist())) == n and cost[np.arange(n), mine].sum() == cheapest


def test_assignment_costs_as_little_as_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(2)
    for _ in range(200):
        n = int(rng.integers(1, 12))
        cost = rng.normal(size=(n, n + int(rng.integers(0, 12))))
        if rng.random() < 0.5:
            cost = np.round(cost)  # ties
        cost[(rng.random(cost.shape) < 0.3) & ~np.eye(*cost.shape, dtype=bool)] = np.inf
        mine = assignment(cost)
        assert len(set(mine.tolist())) == n
        assert cost[np.arange(n), mine].sum() == pytest.approx(cost[optimize.linear_sum_assignment(cost)].sum())


def dense_assignment(cost: np.ndarray) -> np.ndarray:
    """The same method on a whole table [n, m], every step over all columns: what the sparse one is compared with."""
    n, m = cost.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    column_of, row_of = np.full(n, -1), np.full(m, -1)
    for new_row in range(n):
        length, came_from, settled = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, reached = new_row, 0.0
        while True:
            through = reached + cost[row] - row_price[row] - column_price
            shorter = ~settled & (through < length)
            length[shorter], came_from[shorter] = through[shorter], row
            column = int(np.argmin(np.where(settled, np.inf, length)))
            settled[column], reached = True, length[column]
            if row_of[column] < 0:
                break
            row = row_of[column]
        row_price[new_row] += reached
        moved = settled & (row_of >= 0)
        row_price[row_of[moved]] += reached - length[moved]
        column_price[settled] -= reached - length[settled]
        while True:
            row = came_from[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == new_row:
                break
    return column_of


def dense_pairs(predicted, reference, similarity, num_frames, fps, window, compat) -> list[tuple[int, int]]:
    """match_dialogue's pairs from a table with a column for every frame of the clip."""
    earliest, latest = (int(seconds * fps) for seconds in window)
    offset = np.arange(num_frames) - np.array(predicted, int)[:, None]
    text_cost = np.ones(offset.shape)
    for r, frame in enumerate(reference):
        text_cost[:, frame] = 1 - np.abs(similarity[:, r])
    cost = text_cost + 0.3 * (np.abs(offset) / (max(-earliest, latest) or 1)) ** 1.5
    cost[(offset < earliest) | (offset > latest)] = np.inf
    if compat:
        cost[cost == 0] = np.inf
        cost = np.hstack([cost, np.full((len(predicted), len(predicted)), 2 * len(predicted) * 1.3)])
    at = {int(frame): r for r, frame in enumerate(reference)}
    return [(p, at[frame]) for p, frame in enumerate(dense_assignment(cost).tolist()) if frame in at]


@pytest.mark.parametrize("cases", [250, pytest.param(8000, marks=pytest.mark.slow)])
def test_the_sparse_assignment_is_the_dense_one_ties_included(cases):
    """The very pairs, also where many assignments cost the same: texts all alike or all different, frames all taken."""
    rng, tied = np.random.default_rng(8), 0
    for _ in range(cases):
        F = int(rng.integers(1, 40))
        everything = rng.random() < 0.3  # the assistant that always speaks
        predicted, reference = rng.permutation(F)[: F if everything else rng.integers(F + 1)], rng.permutation(F)
        reference = reference[: rng.integers(F + 1)]
        if rng.random() < 0.8:
            predicted, reference = np.sort(predicted), np.sort(reference)
        similarity = rng.uniform(-1, 1, (len(predicted), len(reference)))
        levels = int(rng.integers(0, 4))  # of similarity: any, all 0, or a few
        similarity = similarity if levels == 3 else np.round(similarity * levels) / max(levels, 1)
        window = [(-2.5, 2.5), (-4, 8.5), (0, 2), (-2, 0), (0, 0), (-30, 30)][int(rng.integers(6))]
        fps, compat = float(rng.choice([0.5, 2, 4])), [None, "proassist"][int(rng.integers(2))]
        found = dialogue(predicted, reference, similarity, num_frames=F, fps=fps, window_seconds=window, compat=compat)
        assert found["pairs"] == dense_pairs(predicted, reference, similarity, F, fps, window, compat)
        tied += levels < 3 and len(found["pairs"]) > 1

        said, due, tolerance = random_events(rng, 12)
        away = np.array([[max(first - row, row - last, 0) for row in said] for first, last in due], float)
        away = np.where(away > tolerance, np.inf, away).reshape(len(due), len(said))
        alone = np.full((len(due), len(due)), 1.0 + tolerance * len(due))
        taken = dense_assignment(np.hstack([away, alone])).tolist()
        pairs = [(p, r) for r, p in enumerate(taken) if p < len(said)]
        assert match_events(said, due, tolerance) == pairs
        close = assignment(away, alone=1.0 + tolerance * len(due)).tolist()
        assert [(p, r) for r, p in enumerate(close) if p >= 0] == pairs
    assert tied > cases / 4


def test_two_hours_of_always_speaking_are_matched_in_two_seconds_and_200_mb():
    """14,400 frames, a reply due every 15 s, ego4d's window. A table of all pairs would hold 1.7 GB of costs alone."""
    rng = np.random.default_rng(0)

    def match(frames: int) -> float:
        reference = list(range(5, frames, 30))
        similarity = rng.random((frames, len(reference)))
        began = time.process_time()
        window = (-4.0, 8.5)
        found = dialogue(range(frames), reference, similarity, num_frames=frames, window_seconds=window)
        seconds = time.process_time() - began
        # Each reference is taken, by a text that says it well: 26 could.
        assert (found["num_matched"], found["num_redundant"]) == (len(reference), frames - len(reference))
        return seconds

    assert match(14_400) < 2
    tracemalloc.start()
    match(1440)  # a tenth, in a tenth of the memory: a table of pairs needs a hundredth of its own
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


# ---- dialogue ------------------------------------------------------------------------------------


def dialogue(predicted, reference, similarity, **changes):
    settings = {"num_frames": 60, "fps": 2, "window_seconds": (-2.0, 4.0), **changes}
    return match_dialogue(predicted, reference, np.array(similarity, float), **settings)


def _counts(result):
    return tuple(result[f"num_{name}"] for name in ("matched", "mismatched", "missed", "redundant"))


def test_an_early_and_a_late_prediction_and_the_sign_of_the_window():
    """Window -2..4 s at 2 fps: a prediction may come up to 8 frames before its reference, up to 4 after."""
    for frame, matched in ((12, 1), (11, 0), (20, 1), (24, 1), (25, 0)):
        result = dialogue([frame], [20], [[0.95]])
        assert _counts(result) == (matched, 0, 1 - matched, 1 - matched)
        assert result["time_diff"] == (abs(frame - 20) / 2 if matched else 0.0)


def test_a_redundant_a_mismatched_and_a_missed_text():
    # 10 takes 11 (s 0.9), 30 takes its own reference although it says something else (s 0.2), 40 has none in reach, and
    # nobody says 55.
    result = dialogue([10, 30, 40], [11, 30, 55], [[0.9, 0, 0], [0, 0.2, 0], [0, 0, 0]])
    assert result["pairs"] == [(0, 0), (1, 1)] and result["correct_pairs"] == [(0, 0)]
    assert _counts(result) == (1, 1, 1, 1)  # M 1, A 2, S 1, R 1
    for rate in ("precision", "recall", "f1", "missing_rate", "redundant_rate"):
        assert result[rate] == pytest.approx(1 / 3)
    assert result["jaccard_index"] == 1 / 4
    assert result["time_diff"] == 0.5 and result["semantic_score"] == 0.9


def test_a_reference_goes_to_whom_it_costs_least_in_all():
    # Reference at 20. The later prediction says it better; the earlier one becomes redundant.
    assert dialogue([18, 21], [20], [[0.6], [0.9]])["pairs"] == [(1, 0)]
    # Costs by hand, reach 8: 18-20 0.4 + 0.3 (2/8)^1.5 = 0.4375, and 22 on its own frame 1: 1.4375.
    #                         22-20 0.38 + 0.0375 = 0.4175, and 18 on its own frame 1: 1.4175.
    assert dialogue([18, 22], [20], [[0.6], [0.62]])["pairs"] == [(1, 0)]
    # A better text loses to a nearer one once the distance outweighs it: 0.3 (8/8)^1.5 = 0.3 > 0.2.
    assert dialogue([12, 20], [20], [[0.9], [0.7]])["pairs"] == [(1, 0)]
    assert dialogue([12, 20], [20], [[0.9], [0.55]])["pairs"] == [(0, 0)]
    # 18 takes it: 0.25 + 0.0375, and 20 moves by one frame: 1 + 0.3 (1/8)^1.5 = 1.0133; in all 1.3008 against 0.31 + 1.
    # (Were distance not raised to 1.5: 0.25 + 0.075 + 1.0375 = 1.3625.)
    assert dialogue([18, 20], [20], [[0.75], [0.69]])["pairs"] == [(0, 0)]


def test_a_tie_is_matched_once():
    result = dialogue([18, 22], [20], [[0.8], [0.8]])  # equally near, equally good
    assert (result["num_matched"], result["num_redundant"], result["num_missed"]) == (1, 1, 0)
    assert dialogue([18, 22], [20], [[0.8], [0.8]]) == result


def test_the_threshold_is_exclusive_for_correct_and_inclusive_for_the_semantic_score():
    result = dialogue([20], [20], [[0.5]])
    assert (result["num_matched"], result["num_mismatched"]) == (0, 1) and result["semantic_score"] == 0.5
    assert dialogue([20], [20], [[-0.9]])["num_matched"] == 1  # |cos|


def test_empty_sets_are_zero_and_never_nan():
    nothing = dialogue([], [], np.zeros((0, 0)))
    silent, talkative = dialogue([], [5], np.zeros((0, 1))), dialogue([5], [], np.zeros((1, 0)))
    assert [nothing[rate] for rate in RATES] == [0.0] * 8
    assert silent["missing_rate"] == 1.0 and silent["num_missed"] == 1 and silent["f1"] == 0.0
    assert talkative["redundant_rate"] == 1.0 and talkative["num_redundant"] == 1 and talkative["f1"] == 0.0
    assert [sum_dialogue([])[rate] for rate in RATES] == [0.0] * 8


def test_the_oracle_scores_one_and_proassists_defect_is_there_on_request():
    frames = [3, 10, 11, 30]
    for window in ((-2.5, 2.5), (-4.0, 8.5)):
        oracle = dialogue(frames, frames, np.eye(4), window_seconds=window)
        assert oracle["precision"] == oracle["recall"] == oracle["f1"] == oracle["jaccard_index"] == 1.0
        assert oracle["semantic_score"] == 1.0
        assert oracle["missing_rate"] == oracle["redundant_rate"] == oracle["time_diff"] == 0.0
        assert oracle["pairs"] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    # A cost of 0 is no edge: a perfect text moves to the next frame and is one miss and one redundancy.
    theirs = dialogue([3, 30], [3, 30], np.eye(2), compat="proassist")
    assert _counts(theirs) == (0, 0, 2, 2) and theirs["f1"] == 0.0
    assert _counts(dialogue([3, 30], [3, 31], np.eye(2), compat="proassist")) == (1, 0, 1, 1)
    # A clip of one frame leaves such a prediction nothing to take at all.
    alone = dialogue([0], [0], [[1.0]], num_frames=1, compat="proassist")
    assert (alone["num_missed"], alone["num_redundant"]) == (1, 1)


def _random_dialogue(rng, zero_costs):
    """Frames, similarities, window; `zero_costs`: many predictions are the very text on the very frame."""
    num_frames = int(rng.integers(20, 60))
    reference = np.sort(rng.choice(num_frames, int(rng.integers(1, 12)), replace=False))
    predicted = np.sort(rng.choice(num_frames, int(rng.integers(1, 12)), replace=False))
    if zero_costs:
        predicted = np.union1d(predicted[:4], reference[::2])
    similarity = rng.uniform(-1, 1, (len(predicted), len(reference)))
    if zero_costs:
        similarity[(predicted[:, None] == reference[None, :]) & (rng.random(similarity.shape) < 0.5)] = 1.0
    window = [(-2.5, 2.5), (-2.0, 4.0), (-1.5, 2.5)][int(rng.integers(3))]
    return predicted, reference, similarity, num_frames, window


def _proassists_counts(predicted, reference, similarity, num_frames, window):
    """The counts of a sparse matching over all frames, as ProAssist computes them."""
    sparse = pytest.importorskip("scipy.sparse")
    csgraph = pytest.importorskip("scipy.sparse.csgraph")
    left, right = int(window[0] * 2), int(window[1] * 2)
    at = {frame: r for r, frame in enumerate(reference.tolist())}
    dense = np.full((len(predicted), num_frames), np.inf)
    for p, i in enumerate(predicted.tolist()):
        for j in range(max(0, i + left), min(num_frames, i + right + 1)):
            distance = 0.3 * (abs(i - j) / max(-left, right)) ** 1.5
            dense[p, j] = distance + (1 - abs(similarity[p, at[j]]) if j in at else 1.0)
    graph = sparse.csr_matrix(dense)  # here the zeros get lost
    _, taken = csgraph.min_weight_full_bipartite_matching(graph)
    matched = [(p, at[j]) for p, j in enumerate(taken.tolist()) if j in at]
    correct = sum(abs(similarity[pair]) > 0.5 for pair in matched)
    return correct, len(matched) - correct, len(reference) - len(matched), len(predicted) - len(matched)


def test_counts_are_proassists_where_no_cost_is_zero():
    rng = np.random.default_rng(3)
    for _ in range(150):
        case = _random_dialogue(rng, zero_costs=False)
        predicted, reference, similarity, num_frames, window = case
        for compat in (None, "proassist"):
            settings = {"num_frames": num_frames, "window_seconds": window, "compat": compat}
            assert _counts(dialogue(predicted, reference, similarity, **settings)) == _proassists_counts(*case)


def test_compat_counts_are_proassists_where_costs_are_zero():
    rng = np.random.default_rng(4)
    differ = 0
    for _ in range(150):
        case = _random_dialogue(rng, zero_costs=True)
        predicted, reference, similarity, num_frames, window = case
        settings = {"num_frames": num_frames, "window_seconds": window}
        theirs = _proassists_counts(*case)
        assert _counts(dialogue(predicted, reference, similarity, compat="proassist", **settings)) == theirs
        mended = _counts(dialogue(predicted, reference, similarity, **settings))
        differ += mended != theirs
    assert differ > 50  # the cases do show the defect


def test_clips_are_summed_before_anything_is_divided():
    # 1 of 1 right, 0.5 s early, s 0.9; and 1 of 4 right, on time, s 0.7, three references missed.
    first = dialogue([19], [20], [[0.9]])
    second = dialogue([20], [20, 30, 40, 50], [[0.7, 0, 0, 0]])
    total = sum_dialogue([first, second])
    assert (total["num_matched"], total["num_missed"]) == (2, 3)
    assert total["recall"] == 2 / 5 and total["precision"] == 1.0 and total["f1"] == pytest.approx(4 / 7)
    assert total["time_diff"] == 0.25 and total["semantic_score"] == pytest.approx(0.8)
    again = sum_dialogue([sum_dialogue([first]), sum_dialogue([second])])
    assert again == total


def test_bad_dialogue_input_is_refused():
    for arguments, word in (
        (([5, 5], [7], [[1.0], [1.0]]), "two predicted"),
        (([5], [7, 7], [[1.0, 1.0]]), "two reference"),
        (([60], [7], [[1.0]]), "outside 0..59"),
        (([5], [-1], [[1.0]]), "outside 0..59"),
        (([5], [7], [[1.0, 0.5]]), "similarity"),
        (([5], [7], [[math.nan]]), "finite"),
    ):
        with pytest.raises(ProspectError, match=word):
            dialogue(*arguments)
    with pytest.raises(ProspectError, match="compat"):
        dialogue([5], [7], [[1.0]], compat="videollm")
    with pytest.raises(ProspectError, match="window"):
        dialogue([5], [7], [[1.0]], window_seconds=(1.0, 2.0))


def test_windows_by_dataset_name():
    assert window_of("assembly101") == (-2.0, 4.0) and window_of("WTaG/dialog_val") == (-3.0, 6.0)
    assert window_of("ego4d/narration_train") == (-2.5, 2.5) and window_of("ego4d/dialog") == (-4.0, 8.5)
    assert window_of("sample") == window_of("") == (-2.5, 2.5)
    assert window_of("epickitchens") == (-1.5, 3.0) and window_of("holoassist") == (-1.5, 2.5)
    assert window_of("egoexolearn") == (-2.0, 3.5)


# ---- task state ----------------------------------------------------------------------------------

S1_START, S1_COMPLETE = Transition("S1", "start"), Transition("S1", "complete")
S2_START, S2_COMPLETE = Transition("S2", "start"), Transition("S2", "complete")


def task_state(
    predicted, reference, predicted_states=None, reference_states=None, generated=None, valid=None, also_right=()
):
    nothing = np.zeros((0, 2), np.int64)
    return task_state_metrics(
        nothing if predicted_states is None else np.array(predicted_states),
        nothing if reference_states is None else np.array(reference_states),
        [np.array(states) for states in also_right],
        predicted,
        reference,
        num_generated=len(predicted) if generated is None else generated,
        num_valid=len(predicted) if valid is None else valid,
        fps=2,
        window_seconds=(-2.0, 4.0),
    )


def test_states_frame_by_frame_by_hand():
    dicts = [{}, {"S1": "in_progress"}, {"S1": "completed", "S2": "in_progress"}]
    reference = state_matrix(dicts, ["S1", "S2"])
    assert reference.tolist() == [[0, 0], [1, 0], [2, 1]]
    predicted = [[0, 0], [0, 0], [2, 1]]  # S1's start came a frame late
    counts = task_state([], [], predicted, reference)
    assert counts.states.tolist() == [[3, 0, 0], [1, 1, 0], [0, 0, 1]]  # [reference, predicted]
    numbers = counts.summary()
    assert numbers["joint_goal_accuracy"] == pytest.approx(2 / 3)
    assert numbers["step_state_accuracy"] == pytest.approx(5 / 6)
    # not_started: 3 right, 3 true, 4 predicted: 6/7. in_progress: 1, 2, 1: 2/3. completed: 1, 1, 1: 1.
    assert numbers["state_macro_f1"] == pytest.approx((6 / 7 + 2 / 3 + 1) / 3)
    # A state that occurs nowhere is left out; one that is only predicted is not.
    assert macro_f1(confusion(np.array([0, 1]), np.array([0, 1]))) == 1.0
    assert macro_f1(confusion(np.array([0, 2]), np.array([0, 0]))) == pytest.approx((2 / 3 + 0) / 2)


def test_a_state_that_is_also_right_counts_as_right():
    # S1 is started on frames 1..2; frame 3 is late, and frame 2 has both steps right only together.
    predicted, reference = [[0, 0], [1, 0], [0, 1], [0, 0]], [[0, 0], [0, 0], [1, 0], [1, 0]]
    also = [[[0, 0], [1, 0], [1, 0], [1, 0]], [[0, 0], [0, 0], [0, 0], [1, 0]]]
    numbers = task_state([], [], predicted, reference, also_right=also)
    assert (numbers.frames_right, numbers.frames) == (2, 4)  # 2: S2 is wrong, 3: S1 is
    assert numbers.states.tolist() == [[5, 1, 0], [1, 1, 0], [0, 0, 0]]  # what is also right is its own reference
    # Started and completed within one second: with neither, one and both of the two updates it is right.
    assert task_state([], [], [[0], [1], [2]], [[0]] * 3, also_right=[[[2]] * 3]).frames_right == 3


def test_an_update_of_the_wrong_step_at_the_right_time():
    counts = task_state([(10, S1_START), (20, S2_COMPLETE)], [(10, S1_START), (20, S1_COMPLETE)])
    numbers = counts.summary()
    assert counts.transitions == Counts(1, 2, 2)  # an extra and a miss
    assert (numbers["transition_precision"], numbers["transition_recall"], numbers["transition_f1"]) == (0.5, 0.5, 0.5)
    assert counts.timed == 2 and numbers["timed_step_accuracy"] == 0.5 and numbers["timed_transition_accuracy"] == 1.0


def test_a_missed_update_does_not_spoil_those_after_it():
    """Compared by position, the second of two would be compared with the first of three, and nothing would be right."""
    reference = [(10, S1_START), (20, S1_COMPLETE), (20, S2_START)]
    counts = task_state([(20, S2_START), (20, S1_COMPLETE)], reference)
    assert counts.transitions == Counts(2, 2, 3) and counts.time_errors == (0.0, 0.0)
    assert counts.timed == counts.timed_step == counts.timed_transition == 2  # at one time, those that agree are paired


def test_early_late_and_too_late_updates():
    # 8 frames early and 4 late are the last within -2..4 s; times in seconds 4 and 2; 9 early is not.
    reference = [(20, S1_START), (40, S1_COMPLETE), (60, S2_START)]
    counts = task_state([(12, S1_START), (44, S1_COMPLETE), (51, S2_START)], reference)
    numbers = counts.summary()
    assert counts.transitions == Counts(2, 3, 3) and counts.time_errors == (4.0, 2.0)
    assert numbers["time_error_mean"] == 3.0
    assert numbers["time_error_p90"] == pytest.approx(2.0 + 0.9 * 2.0)  # linear between the two
    # One prediction serves one reference, the nearer.
    twice = task_state([(20, S1_START), (22, S1_START)], [(21, S1_START)])
    assert twice.transitions == Counts(1, 2, 1)
    # As many as possible come before the least distance: 12-20 and 22-26, not 22-20 alone.
    assert task_state([(12, S1_START), (22, S1_START)], [(20, S1_START), (26, S1_START)]).transitions.matched == 2


def test_an_illegal_update_is_invalid_and_changes_nothing():
    # Two texts were written, S1->start and, while S2 had not started, S2->complete; only the first was applied.
    counts = task_state([(10, S1_START)], [(10, S1_START), (12, S2_START)], generated=2, valid=1)
    assert counts.summary()["valid_update_ratio"] == 0.5
    assert counts.transitions == Counts(1, 1, 2)


def test_task_state_oracle_empty_and_sum():
    updates, states = [(1, S1_START), (4, S1_COMPLETE), (4, S2_START)], [[0, 0], [1, 0], [1, 0], [1, 0], [2, 1]]
    oracle = task_state(updates, updates, states, states)
    numbers = oracle.summary()
    assert numbers.pop("time_error_mean") == numbers.pop("time_error_p90") == 0.0
    assert set(numbers.values()) == {1.0}
    assert set(TaskStateCounts().summary().values()) == {0.0}
    no_task = task_state([], [], np.zeros((7, 0), int), np.zeros((7, 0), int))
    assert no_task.frames == 0 and (oracle + no_task).summary() == oracle.summary()
    # 5 frames all right and 1 wrong: 5/6, not the mean 1/2.
    total = oracle + task_state([], [(0, S1_START)], [[0, 0]], [[1, 0]])
    assert total.summary()["joint_goal_accuracy"] == pytest.approx(5 / 6)
    assert total.transitions == Counts(3, 3, 4) and total.time_errors == (0.0, 0.0, 0.0)


def test_the_table_is_one_row_a_dataset_and_their_plain_mean():
    good, bad = dialogue([20], [20], [[1.0]]), dialogue([20], [50], [[0.0]])
    table = by_dataset([("wtag", good), ("ego4d", bad), ("wtag", good), ("wtag", good)], sum_dialogue)
    assert list(table) == ["ego4d", "wtag", "macro"]
    assert table["wtag"]["num_matched"] == 3 and table["wtag"]["f1"] == 1.0 and table["ego4d"]["f1"] == 0.0
    assert table["macro"]["f1"] == 0.5 and "num_matched" not in table["macro"]
    assert by_dataset([], sum_dialogue) == {"macro": {}}


def test_a_dataset_called_macro_keeps_its_column():
    good, bad = dialogue([20], [20], [[1.0]]), dialogue([20], [50], [[0.0]])
    table = by_dataset([("macro", good), ("wtag", bad)], sum_dialogue)
    assert {name: numbers["f1"] for name, numbers in table.items()} == {
        "macro (dataset)": 1.0,
        "wtag": 0.0,
        "macro": 0.5,
    }


# ---- texts ---------------------------------------------------------------------------------------


def test_lexical_similarity_by_hand():
    # screw the wheel: 3 words and 2 pairs; screw the roof: the same but roof and the-roof. 3 / sqrt(5 * 5).
    found = lexical_similarity(["Screw the wheel.", "attach"], ["screw the WHEEL", "screw the roof", ""])
    assert found.shape == (2, 3)
    assert found[0].tolist() == [1.0, pytest.approx(0.6), 0.0] and found[1].tolist() == [0.0, 0.0, 0.0]
    assert lexical_similarity(["?!", ""], ["?!", "", "go"]).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    # "go go": go twice and one pair go-go; "go": 2 / sqrt(5 * 1).
    assert lexical_similarity(["go go"], ["go"])[0, 0] == pytest.approx(2 / math.sqrt(5))
    assert lexical_similarity([], ["a"]).shape == (0, 1) and lexical_similarity(["a"], []).shape == (1, 0)
    long = "Now take the screwdriver, and don't forget the third wheel; it's at the back of the chassis!"
    assert lexical_similarity([long], [long])[0, 0] == 1.0


def test_bleu_by_hand():
    # "the the the": of three, two are in the reference "the cat the": precision 2/3, same length, no pair in common.
    assert bleu(["the the the"], [["the cat the"]], 2) == pytest.approx([2 / 3, 0.0])
    # 3 of 3 words, 2 of 2 pairs; 3 words against the closest reference of 4: brevity exp(1 - 4/3).
    short = bleu(["put it down"], [["put it down now", "well then put it right down over there"]], 2)
    assert short == pytest.approx([math.exp(-1 / 3)] * 2)
    # A tie in closeness (2 and 4 to 3) takes the shorter: no brevity penalty.
    assert bleu(["put it down"], [["put it", "put it down now"]], 1) == pytest.approx([1.0])
    # A word counts as often as in one reference, not as in all of them: of "put put" one.
    assert bleu(["put put"], [["put it", "put on"]], 1) == pytest.approx([0.5])
    assert bleu([], []) == [0.0] * 4
    assert bleu(["Take the second wheel."], [["take the second wheel"]]) == [1.0] * 4


HYPOTHESES = ["now attach the wheel", "take the screwdriver and screw it", "well done", "the roof comes off next"]
REFERENCES = ["now attach the first wheel", "take your screwdriver and screw it in", "well done", "the roof comes off"]


def test_bleu_is_that_of_pycocoevalcap():
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    expected, _ = bleu_module.Bleu(4).compute_score(
        {i: [text] for i, text in enumerate(REFERENCES)}, {i: [text] for i, text in enumerate(HYPOTHESES)}, verbose=0
    )
    assert bleu(HYPOTHESES, [[text] for text in REFERENCES]) == pytest.approx(expected, rel=1e-6)


def test_missing_extras_are_reported_as_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    found = text_metrics.text_metrics(["take it now please"], ["take it now please"])
    assert found.scores == {"BLEU-1": 1.0, "BLEU-2": 1.0, "BLEU-3": 1.0, "BLEU-4": 1.0}
    assert set(found.absent) == {"METEOR", "CIDEr"} and "requirements-eval.txt" in found.absent["CIDEr"]
    assert text_metrics.text_metrics([], []).absent == found.absent
    assert weighted_by_jaccard({"BLEU-1": 0.5}, 0.5) == {"BLEU-1_w": 0.25}


def test_cider_of_the_same_texts_is_its_highest():
    pytest.importorskip("pycocoevalcap.cider.cider")
    same = [
        text_metrics._cider({i: [t] for i, t in enumerate(texts)}, {i: [t] for i, t in enumerate(texts)})
        for texts in (REFERENCES[:2], REFERENCES[:1])
    ]
    assert text_metrics._cider({}, {}) == 0.0
    assert same == pytest.approx([10.0, 0.0])  # of a single pair every word is in every reference: weight log 1 = 0


def test_meteor_of_the_same_texts_is_one():
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    found = text_metrics.text_metrics(REFERENCES, REFERENCES)
    assert found.scores["METEOR"] == 1.0 and found.absent == {}


def test_meteor_is_absent_without_java(monkeypatch):
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = text_metrics.text_metrics(HYPOTHESES, REFERENCES)
    assert "Java" in found.absent["METEOR"] and "CIDEr" in found.scores


def test_a_sentence_model_must_be_a_local_directory(tmp_path):
    assert load_similarity("lexical").name == "lexical"
    with pytest.raises(ProspectError, match="not a sentence-transformers model"):
        load_similarity("sentence-transformers/all-mpnet-base-v2")  # a name on a hub is no directory: never fetched
    with pytest.raises(ProspectError, match="not a sentence-transformers model"):
        load_similarity(str(tmp_path))


def test_sentence_similarity_reads_a_local_model(tmp_path):
    """A tiny word-averaging model with vectors set by hand: cat (1,0), dog (0,1), pet (3,4); cosines 0, 0.6, 0.8."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch = pytest.importorskip("torch")

    tokenizer = modules.tokenizer.WhitespaceTokenizer(["cat", "dog", "pet"], stop_words=[])
    embeddings = modules.WordEmbeddings(tokenizer, torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]]))
    model = sentence_transformers.SentenceTransformer(modules=[embeddings, modules.Pooling(2)], device="cpu")
    model.save(str(tmp_path / "tiny"))

    similarity = load_similarity(str(tmp_path / "tiny"))
    assert similarity.name == "tiny"
    found = similarity.between(["cat", "dog"], ["dog", "pet", "cat"])
    assert found == pytest.approx(np.array([[0.0, 0.6, 1.0], [1.0, 0.8, 0.0]]), abs=1e-6)
    assert similarity.between([], ["cat"]).shape == (0, 1)
