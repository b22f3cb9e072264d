"""Metrics of timing: the example of docs/metrics.md, published code's results, and plain loops on random cases."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip, read

from prospect.metrics import Counts, ratio
from prospect.score import OPTIONAL_TEXT_METRICS, TABLE, TIMING_TABLE, score_clip, summarise, table
from prospect.text_metrics import load_similarity
from prospect.timing_metrics import (
    TimingCounts,
    busy_rows,
    chunk_confusion,
    duplicates,
    earliness,
    take_slots,
    timely,
    timing_counts,
)

DOC = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
LEXICAL = load_similarity("lexical")


def record(frame: int, text: str | None, update: bool = False) -> dict:
    return {
        "clip_id": "clip", "frame_idx": frame, "time": frame / 2, "speaking_prob": 0.9 if text else 0.1,
        "dst_update_prob": 0.9 if update else 0.1, "speaking_decision": text is not None,
        "dst_update_decision": update, "text": text, "dst_update": None, "dst_state": {}, "invalid_update": None,
        "step_state": None, "context_event": None, "user": [],
    }  # fmt: skip


def records(frames: range, said: dict[int, str], updates: tuple[int, ...] = ()) -> list[dict]:
    return [record(frame, said.get(frame), frame in updates) for frame in frames]


# ---- the document --------------------------------------------------------------------------------

A, B, C = "First, boil the water.", "Next, grind the beans.", "All done."


def example_numbers() -> dict:
    turns = [("assistant", text, at, at + 2) for text, at in ((A, 10), (B, 40), (C, 70))]
    clip = read(raw_clip(turns, 0, 95, dataset="x"))
    said = {11: A, 13: A, 47: B, 60: "Careful!", 71: "Stop!"}
    return summarise([score_clip(clip, records(range(96), said), LEXICAL, dst=False)])


def test_the_example_of_the_document():
    numbers = example_numbers()
    rows = re.findall(r"^\| .+ \| `(\w+)` \| ([\d.]+) \|$", DOC, re.MULTILINE)
    assert [key for key, _ in rows] == [key for key, _ in TIMING_TABLE if not key.endswith("_ece")]
    assert [f"{numbers[key]:.4f}" for key, _ in rows] == [value for _, value in rows]


def test_the_document_has_every_number_that_is_printed_or_stored():
    turns = [("assistant", A, 2, 4), ("DST_UPDATE", [{"id": "S1", "transition": "start"}], 2, 4)]
    clip = read(raw_clip(turns, 0, 19, dataset="x"))
    rows = [{**one, "step_state": "not_started"} for one in records(range(20), {4: A})]
    stored = summarise([score_clip(clip, rows, LEXICAL, dst=True)])
    names = {name for quoted in re.findall(r"`([^`\n]+)`", DOC) for name in [quoted]}
    names |= {f"BLEU-{n}{end}" for n in range(1, 5) for end in ("", "_w")}  # written as a range
    assert {key for key in stored if key not in names} == set()
    titles = set(re.findall(r"^\| ([^|]+?) \|", DOC, re.MULTILINE))
    printed = {title for _, title in (*TABLE, *TIMING_TABLE)} | set(OPTIONAL_TEXT_METRICS)
    assert printed - titles == set()
    assert {key for key, _ in (*TABLE, *TIMING_TABLE)} - names == set()


def test_two_tables_of_which_the_second_is_about_timing():
    numbers = example_numbers()
    dialogue, timing = table({"x": numbers, "macro": {}}).split("\n\n")
    assert dialogue.startswith("| | x |\n|---|---:|\n| dialogue F1 |")
    assert timing.startswith("| timing | x |\n|---|---:|\n| Timeliness-F1@5 | 0.476 |\n| PAUC | 0.396 |")


def test_the_reference_itself_is_perfect_and_says_nothing_in_quiet():
    turns = [("assistant", text, at, at + 2) for text, at in ((A, 10), (B, 40), (C, 70))]
    clip = read(raw_clip(turns, 0, 95, dataset="x"))
    numbers = summarise([score_clip(clip, records(range(96), {10: A, 40: B, 70: C}), LEXICAL, dst=False)])
    ones = ("timeliness_f1", "pauc", "chunk_macro_f1", "chunk_g_mean", "time_f1", "content_accuracy", "joint_f1")
    assert [numbers[name] for name in ones] == [1.0] * 7
    assert numbers["duplicate_share"] == numbers["false_alarms_per_quiet_hour"] == 0.0


def test_nothing_at_all_is_no_number_but_zero():
    clip = read(raw_clip([], 0, 9, dataset="x"))
    numbers = summarise([score_clip(clip, records(range(10), {}), LEXICAL, dst=True)])
    assert numbers["timeliness_f1"] == numbers["pauc"] == numbers["content_accuracy"] == 0.0
    assert numbers["chunk_macro_f1"] == 0.5  # silence is right, and there is nothing else


def test_an_update_in_quiet_is_a_false_alarm_and_one_at_its_turn_is_none():
    turns = [("DST_UPDATE", [{"id": "S1", "transition": "start"}], 20, 22), ("user", "Hello?", 60, 60)]
    clip = read(raw_clip(turns, 0, 99, dataset="x"))
    found = score_clip(clip, records(range(100), {61: A, 90: A}, updates=(18, 25, 90)), LEXICAL, dst=True).timing
    # 18 and 61 are within 1 s (2 frames) of a turn; 25 and 90 are not. Busy: 18..24 and 58..62.
    assert (found.false_alarms, found.quiet_seconds) == (2, (100 - 7 - 5) / 2)


# ---- published code ------------------------------------------------------------------------------

# What the published evaluation code of SPOT-Bench, ProactiveVideoQA and EgoProactive gives for `case(seed)`.
TIMELINESS_F1 = [0.366789631, 0.584438263, 0.4, 0.271931974, 0.430140044, 0.461538462]
PAUC = [0.61856914, 0.604989368, 0.613354782, 0.39424133, 0.592788369, 0.766231447]
CHUNKS = [(0.375, 0.353553391), (0.494949495, 0.492365964), (0.375, 0.353553391), (0.583333333, 0.577350269),
          (0.4, 0.4), (0.583333333, 0.577350269)]  # fmt: skip


def case(seed: int):
    """Rows said [9] and wanted [6] of 160, whether they say the same [9,6], and how right what was said so far is."""
    draw = np.random.default_rng(seed)
    said = np.sort(draw.choice(160, 9, replace=False))
    wanted = np.sort(draw.choice(160, 6, replace=False))
    return said, wanted, draw.random((9, 6)) < 0.8, draw.random(9)


@pytest.mark.parametrize("seed", range(6))
def test_published_code_gives_the_same(seed):
    said, wanted, same, right = case(seed)
    timeliness, taken, untimely = take_slots(timely((said[:, None] - wanted) / 2), same)
    assert ratio(2 * timeliness, taken + untimely + 6) == pytest.approx(TIMELINESS_F1[seed], abs=1e-9)

    due = (int(wanted[0]), int(wanted[-1]))
    inside = [i for i in range(9) if 0 <= said[i] - due[0] <= due[1] - due[0] + 2]

    def between(texts, _):  # the k-th text within the span is as right as published code was told
        return np.array([[right[inside[len(texts[0].split()) - 1]]]])

    found = earliness({int(row): f"text{i}" for i, row in enumerate(said)}, due, "", between, 2.0)
    assert found == pytest.approx(PAUC[seed], abs=1e-9)

    numbers = TimingCounts(chunks=chunk_confusion(said, wanted, 160, 2.0)).summary()
    assert (numbers["chunk_macro_f1"], numbers["chunk_g_mean"]) == pytest.approx(CHUNKS[seed], abs=1e-9)


# ---- plain loops ---------------------------------------------------------------------------------


def naive_slots(said, wanted, same, fps, most):
    """Reply after reply, slot after slot."""
    best, taken_by, free = [0.0] * len(wanted), [0] * len(wanted), 0
    for p, row in enumerate(said):
        used = False
        for r, reference in enumerate(wanted):
            late = (row - reference) / fps
            sigma = 1.11 if late > 0 else 2.22
            score = 1.0 if abs(late) <= 1.5 else float(np.exp(-((abs(late) - 1.5) ** 2) / (2 * sigma**2)))
            if score >= 0.05 and same[p][r] and taken_by[r] < most:
                taken_by[r], best[r], used = taken_by[r] + 1, max(best[r], score), True
        free += not used
    return sum(best), sum(count > 0 for count in taken_by), free


def naive_earliness(said, due, right, fps):
    """The mean over 40,000 moments of the span of how right is what has been said by then."""
    length = (due[1] - due[0]) / fps + 1
    moments = (np.arange(40_000) + 0.5) / 40_000 * length
    scores = np.full(len(moments), 0.25)
    for row in said:
        at = (row - due[0]) / fps
        if 0 <= at <= length:
            scores[moments >= at / 2] = right[row]
    return scores.mean()


def naive_pairs(said, wanted, reach):
    """The most pairs within reach, of all such the least distance, trying every way: (pairs, distance)."""
    best = (0, 0)
    for count in range(min(len(said), len(wanted)), 0, -1):
        ways = [
            sum(abs(said[p] - r) for p, r in zip(chosen, references))
            for chosen in itertools.permutations(range(len(said)), count)
            for references in itertools.combinations(wanted, count)
            if all(abs(said[p] - r) <= reach for p, r in zip(chosen, references))
        ]
        if ways:
            return count, min(ways)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_random_cases_by_plain_loops(seed):
    draw = np.random.default_rng(seed)
    fps, F = float(draw.choice([1, 2, 2.5])), int(draw.integers(20, 90))
    said = sorted(draw.choice(F, draw.integers(0, 6), replace=False).tolist())
    firsts = sorted(draw.choice(F - 4, draw.integers(0, 5), replace=False).tolist())
    due = [(first, first + 3) for first in firsts]
    words = [f"w{k}" for k in range(3)]
    said_texts = {row: str(draw.choice(words)) for row in said}
    wanted_texts = [str(draw.choice(words)) for _ in due]
    decided, turns = sorted({*said, *draw.choice(F, 3).tolist()}), [*due, (5, 9)]
    alike = LEXICAL.between(list(said_texts.values()), wanted_texts)
    found = timing_counts(
        said_texts, list(zip(due, wanted_texts)), alike, LEXICAL.between, decided, turns, num_frames=F, fps=fps
    )

    wanted = [last for _, last in due]
    same = [[said_texts[row] == text for text in wanted_texts] for row in said]
    timeliness, taken, untimely = naive_slots(said, wanted, same, fps, 5)
    assert (found.slots_taken, found.untimely) == (taken, untimely)
    assert found.timeliness == pytest.approx(timeliness)

    expected = 0.0
    for event, text in zip(due, wanted_texts):
        right, so_far = {}, []
        for row in said:
            if 0 <= (row - event[0]) / fps <= 3 / fps + 1 and said_texts[row] not in so_far:
                so_far.append(said_texts[row])
            right[row] = LEXICAL.between([" ".join(so_far)], [text])[0, 0] if so_far else 0.25
        expected += naive_earliness(said, event, right, fps)
    assert found.earliness == pytest.approx(expected, abs=1e-3)

    chunks = np.zeros((2, 2), int)
    for chunk in range(int(np.ceil(F / fps / 8))):
        inside = [row for row in range(F) if chunk * 8 <= row / fps < (chunk + 1) * 8]
        chunks[int(any(r in inside for r in wanted)), int(any(r in inside for r in said))] += 1
    assert (found.chunks == chunks).all()

    pairs, _ = naive_pairs(said, wanted, int(3 * fps))
    assert found.close == Counts(pairs, len(said), len(due)) and found.close_same <= pairs
    if not any(same_row for row in same for same_row in row):
        assert found.close_same == 0

    again = 0
    for k, row in enumerate(said):
        for before in said[:k]:
            new = any(before < first - int(fps) <= row for first in firsts)
            again += said_texts[before] == said_texts[row] and not new
            if said_texts[before] == said_texts[row] and not new:
                break
    assert found.duplicates == again

    quiet = [row for row in range(F) if all(row < a - int(fps) or row > b + int(fps) for a, b in turns)]
    assert (found.quiet_seconds, found.seconds) == (pytest.approx(len(quiet) / fps), F / fps)
    assert found.false_alarms == sum(row in quiet for row in decided)


def test_counts_of_clips_add_up():
    one = TimingCounts(slots=2, slots_taken=1, timeliness=0.5, untimely=1, earliness=1.0, close=Counts(1, 2, 2))
    two = one + one
    assert (two.slots, two.timeliness, two.close, two.chunks.tolist()) == (4, 1.0, Counts(2, 4, 4), [[0, 0], [0, 0]])
    assert two.summary()["timeliness_f1"] == one.summary()["timeliness_f1"] == pytest.approx(1 / 4)


def test_what_is_said_again_after_something_new_is_due_is_no_duplicate():
    due = [(10, 12), (30, 32)]
    assert duplicates({11: A, 12: A, 13: A}, due, 2) == 2
    assert duplicates({11: A, 27: A, 28: A}, due, 2) == 1  # from 28 on, the second is due
    assert duplicates({11: A, 12: B, 13: A}, due, 2) == 1


def test_a_slot_takes_five_replies_and_no_more():
    """Five replies 5 to 3 s early, and two right on time, too late to be taken in: exp(-1.5^2 / (2 * 2.22^2))."""
    seconds = np.array([[5.0], [5.5], [6.0], [6.5], [7.0], [10.0], [10.5]]) - 10
    assert take_slots(timely(seconds), np.ones((7, 1), bool)) == (pytest.approx(0.79591, abs=1e-5), 1, 2)


def test_busy_rows_stay_within_the_clip():
    assert busy_rows([(0, 1), (8, 9)], 2, 10).tolist() == [True] * 4 + [False] * 2 + [True] * 4
