"""What became of every text that was due or written: right, or what went wrong with it, and in which clips most.

Replies and updates are reviewed alike. A text that is written in time, within its turn's range or 1 s of it, is judged
by what it says. Of what is left, a right text not more than NEAR seconds away is early or late; a due text that still
has none is missed, a written one redundant. An update that was not applied is illegal and answers nothing.

    due       right   wrong_step   wrong_words   early   late   missed
    written   right   wrong_step   wrong_words   early   late   redundant   illegal

Each row adds up to its texts. docs/metrics.md has the definitions with an example by hand.
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prospect.clips import Clip
from prospect.dst import Transition
from prospect.metrics import EVENT_TOLERANCE, Event, cheapest_assignment, match_events, ratio, sum_dialogue
from prospect.score import (
    ClipScore,
    decision_numbers,
    named_step,
    of_nothing,
    read_update,
    rows_of,
    says_the_same,
    score_clip,
)
from prospect.text_metrics import Similarity

NEAR = 10.0  # seconds from a turn's range: a right text beyond this has nothing to do with it
VERDICTS = ("right", "wrong_step", "wrong_words", "early", "late", "missed", "redundant", "illegal")
MARKS = dict(zip(VERDICTS, "+sw<>-x!"))  # of the terminal's time lines
COLUMNS = 60  # of a time line on the terminal
WORST = 10  # clips shown there


@dataclass(frozen=True)
class Outcome:
    """What became of one text: one of VERDICTS, the row behind which it was written and the rows in which it was due.

    A missed text has no `written`; one that is redundant or illegal has no `due`.
    """

    verdict: str
    written: int | None
    due: Event | None

    @property
    def row(self) -> int:
        return self.due[1] if self.written is None else self.written

    def seconds(self, fps: float) -> float | None:
        """How long after its reference, which stands behind the last frame of its range; below 0: before it."""
        return None if self.written is None or self.due is None else (self.written - self.due[1]) / fps


# ---- one clip ------------------------------------------------------------------------------------


def outcomes(clip: Clip, records: list[dict], similarity: Similarity, dst: bool) -> dict[str, list[Outcome]]:
    """What became of the `replies` of a streamed clip and, of a model with task state, of its `updates`, in time."""
    found = {"replies": reply_outcomes(clip, records, similarity)}
    return found | ({"updates": update_outcomes(clip, records)} if dst else {})


def reply_outcomes(clip: Clip, records: list[dict], similarity: Similarity) -> list[Outcome]:
    said = [(row, record["text"]) for row, record in enumerate(records) if record["text"] is not None]
    wanted, names = list(clip.replies().values()), [step.name for step in clip.steps]
    alike = np.abs(similarity.between([text for _, text in said], wanted))  # [P, R]

    def judge(p: int, r: int) -> str:
        step, named = named_step(wanted[r], names), named_step(said[p][1], names)
        if says_the_same(said[p][1], wanted[r], names) or (step is None and alike[p, r] > 0.5):
            return "right"
        return "wrong_words" if step is None or named is None else "wrong_step"

    return review([row for row, _ in said], rows_of(clip, "assistant"), judge, clip.fps)


def update_outcomes(clip: Clip, records: list[dict]) -> list[Outcome]:
    written = [(row, record) for row, record in enumerate(records) if record["dst_update"] is not None]
    illegal = [Outcome("illegal", row, None) for row, record in written if record["invalid_update"] is not None]
    applied = [(row, read_update(record["dst_update"])) for row, record in written if record["invalid_update"] is None]
    wanted: dict[int, list[Transition]] = {}  # by the last frame of its turn
    for turn in clip.updates():
        wanted.setdefault(turn.end_frame, []).extend(turn.transitions)
    due = list(wanted.values())

    def judge(p: int, r: int) -> str:
        mine, theirs = set(applied[p][1]), set(due[r])
        if mine == theirs:
            return "right"
        return "wrong_words" if {t.id for t in mine} == {t.id for t in theirs} else "wrong_step"

    found = review([row for row, _ in applied], rows_of(clip, "DST_UPDATE"), judge, clip.fps)
    return sorted(found + illegal, key=lambda one: one.row)


def review(written: Sequence[int], due: Sequence[Event], judge: Callable[[int, int], str], fps: float) -> list[Outcome]:
    """The outcomes of texts written at these rows, in order, and due in these ranges of rows, in time.

    judge(p, r): how the text written p answers the one due r: right, wrong_step or wrong_words.
    """
    pairs = match_events(written, due, int(EVENT_TOLERANCE * fps))
    found = [Outcome(judge(p, r), written[p], due[r]) for p, r in pairs]
    spare = set(range(len(written))) - {p for p, _ in pairs}
    missed = sorted(set(range(len(due))) - {r for _, r in pairs})
    reach, choices = int(NEAR * fps), []
    for r in missed:
        first, last = due[r]
        near = range(bisect_left(written, first - reach), bisect_right(written, last + reach))
        near = [(p, max(first - written[p], written[p] - last)) for p in near if p in spare and judge(p, r) == "right"]
        choices.append(tuple(np.array(near, int).reshape(-1, 2).T))  # columns, costs
    for r, p in zip(missed, cheapest_assignment(choices, alone=1 + reach * len(missed))):
        if p < 0:
            found.append(Outcome("missed", None, due[r]))
        else:
            spare.remove(p)
            found.append(Outcome("late" if written[p] > due[r][1] else "early", written[p], due[r]))
    found += [Outcome("redundant", written[p], None) for p in sorted(spare)]
    return sorted(found, key=lambda one: one.row)


# ---- many clips ----------------------------------------------------------------------------------


@dataclass
class Review:
    """A streamed clip: its score, and the outcomes of its `replies` and `updates`."""

    score: ClipScore
    first: int  # absolute number of row 0
    fps: float
    outcomes: dict[str, list[Outcome]]

    def counts(self) -> dict[str, int]:
        """replies_due, replies_right, ..., updates_written: of either kind its texts and their outcomes."""
        found = {}
        for kind, ones in self.outcomes.items():
            verdicts = Counter(one.verdict for one in ones)
            found[f"{kind}_due"] = sum(one.due is not None for one in ones)
            found |= {f"{kind}_{verdict}": verdicts[verdict] for verdict in VERDICTS}
            found[f"{kind}_written"] = sum(one.written is not None for one in ones)
        return found

    def share_right(self) -> float | None:
        """The F1 of right texts, 2 right / (due + written) of both kinds; None where nothing was due or written."""
        counts = self.counts()
        right, texts = (
            sum(counts[f"{kind}_{name}"] for kind in self.outcomes for name in names)
            for names in (("right",), ("due", "written"))
        )
        return ratio(2 * right, texts) if texts else None


def review_clip(clip: Clip, records: list[dict], similarity: Similarity, dst: bool) -> Review:
    """The records of a streamed clip against its conversation. Of many clips, no lists of pairs are kept."""
    score = score_clip(clip, records, similarity, dst)
    score.dialogue = sum_dialogue([score.dialogue])
    return Review(score, clip.start_frame, clip.fps, outcomes(clip, records, similarity, dst))


def worst_first(reviews: Sequence[Review]) -> list[Review]:
    """By the share of their texts that is right; those with more texts first, clips without any last."""

    def order(one: Review) -> tuple:
        share, outcomes = one.share_right(), sum(map(len, one.outcomes.values()))
        return share is None, share, -outcomes, one.score.clip_id

    return sorted(reviews, key=order)


def sum_counts(reviews: Sequence[Review]) -> dict[str, int]:
    every = [one.counts() for one in reviews]
    return {name: sum(counts[name] for counts in every) for name in every[0]}


def clip_lines(reviews: Sequence[Review]) -> str:
    """clips.jsonl: one JSON object a clip, the worst first: its numbers, null where of nothing, and every outcome."""
    return "".join(json.dumps(clip_line(one), ensure_ascii=False) + "\n" for one in worst_first(reviews))


def clip_line(one: Review) -> dict[str, Any]:
    nothing, numbers = of_nothing([one.score]), {"f1": one.score.dialogue["f1"]}
    numbers |= {
        name: value for name, value in decision_numbers([one.score]).items() if name.endswith(("_f1", "_accuracy"))
    }
    texts = [
        {"kind": kind, "verdict": text.verdict, "frame": one.first + text.row, "seconds_late": text.seconds(one.fps)}
        for kind, outcomes in one.outcomes.items()
        for text in outcomes
    ]
    head = {"clip": one.score.clip_id, "dataset": one.score.dataset, "frames": one.score.frames}
    head |= {"share_right": one.share_right()} | one.counts()
    return head | {name: None if name in nothing else value for name, value in numbers.items()} | {"texts": texts}


# ---- on the terminal -----------------------------------------------------------------------------


def mistakes_table(reviews: Sequence[Review]) -> str:
    """Markdown: what became of the texts, a row for the replies and one for the updates of each dataset."""
    titles = ["due", *(verdict.replace("_", " ") for verdict in VERDICTS), "written"]
    lines = ["| what became of | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    datasets = sorted({one.score.dataset for one in reviews})
    for dataset in datasets:
        counts = sum_counts([one for one in reviews if one.score.dataset == dataset])
        for kind in reviews[0].outcomes:
            name = kind if len(datasets) == 1 else f"{dataset}: {kind}"
            cells = [str(counts[f"{kind}_{title.replace(' ', '_')}"]) for title in titles]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worst_clips(reviews: Sequence[Review]) -> str:
    """The worst clips in which anything is wrong, each with its share of right texts and its time line; "" where none.

    0.667  replies  ...+.......<...........x....   clip-7
    """
    shown = [one for one in worst_first(reviews) if one.share_right() not in (None, 1.0)]
    if not shown:
        return ""
    marks = ", ".join(f"{mark} {verdict.replace('_', ' ')}" for verdict, mark in MARKS.items())
    title = f"Worst clips, {min(WORST, len(shown))} of {len(shown)} with a mistake; {marks}:"
    lines = [
        f"{f'{one.share_right():.3f}' if kind == 'replies' else '':5}  {kind:7}  {strip(outcomes, one.score.frames)}"
        + (f"  {one.score.clip_id}" if kind == "replies" else "")
        for one in shown[:WORST]
        for kind, outcomes in one.outcomes.items()
    ]
    return "\n".join([title, "", "```", *lines, "```"])


def strip(outcomes: Sequence[Outcome], frames: int) -> str:
    """A time line of COLUMNS characters; of several texts in one, the last that is not right."""
    shown = ["."] * COLUMNS
    for one in sorted(outcomes, key=lambda one: one.verdict != "right"):
        shown[one.row * COLUMNS // frames] = MARKS[one.verdict]
    return "".join(shown)
