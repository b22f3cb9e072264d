"""What became of every text: examples worked out by hand, counts that add up, and what is written and printed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip, read
from test_evaluate import call, call_without_checkpoint, checkpoint, clips, no_other_programs, records_from, update  # noqa: F401

from prospect.clip_files import ClipFile
from prospect.metrics import Counts
from prospect.mistakes import MARKS, Outcome, clip_line, outcomes, review, review_clip, strip, worst_first
from prospect.text_metrics import load_similarity

DOC = Path(__file__).parent.parent / "docs" / "metrics.md"
SECTION = DOC.read_text(encoding="utf-8").split("## What went wrong")[1].split("\n## ")[0]
LEXICAL = load_similarity("lexical")
REPLIES = [("assistant", "Now do step one.", 12, 14), ("assistant", "Do two, please.", 18, 18),
           ("assistant", "All done. Well built!", 24, 25), ("assistant", "One again.", 30, 31),
           ("assistant", "Take two now.", 60, 62), ("assistant", "Take a rest.", 70, 70)]  # fmt: skip
UPDATES = [("DST_UPDATE", update("S1", "start"), 12, 12), ("DST_UPDATE", update("S1", "complete"), 16, 17),
           ("DST_UPDATE", update("S2", "start"), 30, 30), ("DST_UPDATE", update("S2", "complete"), 36, 36)]  # fmt: skip


def example():
    """A clip of the steps "one" and "two", 2 frames a second, and what a model made of it."""
    clip = read(raw_clip(REPLIES + UPDATES, 10, 89, id="example"))
    said = {10: "ONE it is.", 13: "Take two.", 16: "Take one.", 19: "Now two!", 23: "All done. Bye.", 34: "one",
            71: "Hurry up, will you?"}  # fmt: skip
    state = {"S1": "not_started", "S2": "not_started"}  # plays no part here
    texts = {12: "S2->complete", 16: "S1->start", 25: "S2->start", 35: "S1->complete", 60: "S2->complete"}
    updates = {frame: (text, "S2 is not_started" if frame == 12 else None, state) for frame, text in texts.items()}
    return clip, records_from(clip, said, updates)


def test_every_outcome_by_hand():
    """Rows are frames less 10.

    13 lies in 12..14 and names the other step; 19 and 23 are within a second of their turns, and right. 71 is in time
    and has other words. Of what is left, 34 says the same as 30..31 and is 1.5 s late; so do 10 and 16, from farther
    away, and nothing else is left for them. Nothing was said for 60..62.

    The update at 12 was not applied, so that S1->start is missed: the one written at 16 is in time for S1->complete,
    the same step with another transition. S2->start comes 2.5 s early. At 35 the other step is completed. 60 is 12 s
    behind an update that has its answer.
    """
    clip, records = example()
    found = outcomes(clip, records, LEXICAL, True)
    assert [(one.verdict, one.written, one.due) for one in found["replies"]] == [
        ("redundant", 0, None), ("wrong_step", 3, (2, 4)), ("redundant", 6, None), ("right", 9, (8, 8)),
        ("right", 13, (14, 15)), ("late", 24, (20, 21)), ("missed", None, (50, 52)), ("wrong_words", 61, (60, 60)),
    ]  # fmt: skip
    assert [(one.verdict, one.written, one.due) for one in found["updates"]] == [
        ("missed", None, (2, 2)), ("illegal", 2, None), ("wrong_words", 6, (6, 7)), ("early", 15, (20, 20)),
        ("wrong_step", 25, (26, 26)), ("redundant", 50, None),
    ]  # fmt: skip
    assert [one.seconds(2) for one in found["replies"]] == [None, -0.5, None, 0.5, -1.0, 1.5, None, 0.5]
    assert list(outcomes(clip, records, LEXICAL, False)) == ["replies"]


def test_the_table_in_the_documentation_is_that_of_the_example():
    counts = review_clip(*example(), LEXICAL, True).counts()
    rows = [line.split("|")[1:-1] for line in SECTION.splitlines() if line.startswith("| ")]
    titles = [title.strip().replace(" ", "_") for title in rows[0][1:]]
    for kind, *cells in rows[1:]:
        assert {f"{kind.strip()}_{title}": int(cell) for title, cell in zip(titles, cells, strict=True)} == {
            name: value for name, value in counts.items() if name.startswith(kind.strip())
        }
    assert len(rows) == 3


def test_a_reply_for_which_no_step_is_due_is_judged_by_its_words():
    """Half as alike is not right, a little more is. What names a step where none is due has wrong words."""

    class Alike:
        name = "by hand"

        def __init__(self, value: float):
            self.value = value

        def between(self, mine, theirs):
            return np.full((len(mine), len(theirs)), -self.value)  # the absolute value counts

    clip = read(raw_clip([("assistant", "Take a rest.", 20, 20)], 10, 29))
    for text, value, verdict in (("Sit down.", 0.51, "right"), ("Sit down.", 0.5, "wrong_words"),
                                 ("Now one.", 0.1, "wrong_words"), ("Take a rest.", 0.0, "right")):  # fmt: skip
        [one] = outcomes(clip, records_from(clip, {20: text}), Alike(value), False)["replies"]
        assert one.verdict == verdict


def test_the_nearest_right_text_is_the_one_that_is_late():
    """At 2 frames a second, ten seconds are twenty rows. Each text answers one turn at most."""
    due = [(10, 12), (100, 100), (140, 140)]
    found = review([32, 33, 79, 80, 121], due, lambda p, r: "right", 2.0)
    assert [(one.verdict, one.row, one.due) for one in found] == [
        ("late", 32, (10, 12)), ("redundant", 33, None), ("redundant", 79, None), ("early", 80, (100, 100)),
        ("early", 121, (140, 140)),
    ]  # fmt: skip
    found = review([33], due[:1], lambda p, r: "right", 2.0)  # 21 rows behind the range
    assert [(one.verdict, one.row) for one in found] == [("missed", 12), ("redundant", 33)]
    found = review([13], due[:1], lambda p, r: "wrong_step", 2.0)
    assert found == [Outcome("wrong_step", 13, (10, 12))]
    assert review([16], due[:1], lambda p, r: "wrong_step", 2.0)[0].verdict == "missed"  # a wrong text is never late


def test_counts_add_up_and_agree_with_the_other_metrics():
    """Random conversations and streams: each text has one outcome, and the right ones are those of `replies right`."""
    draw = np.random.default_rng(0)
    words = ["Do one.", "Now two.", "All done."]
    for _ in range(60):
        ends = np.unique(draw.integers(12, 200, 12))
        turns = [("assistant", words[draw.integers(2)], int(end - draw.integers(4)), int(end)) for end in ends]
        clip = read(raw_clip(turns, 5, 210))
        said = {int(row): words[draw.integers(3)] for row in draw.integers(5, 210, 20)}
        one = review_clip(clip, records_from(clip, said), LEXICAL, False)
        counts = {name.removeprefix("replies_"): value for name, value in one.counts().items()}
        both = sum(counts[name] for name in ("right", "wrong_step", "wrong_words", "early", "late"))
        assert counts["due"] == both + counts["missed"] == len(ends)
        assert counts["written"] == both + counts["redundant"] + counts["illegal"] == len(said)
        assert one.score.replies == Counts(counts["right"], counts["written"], counts["due"])
        assert one.score.events["speaking"].matched == both - counts["early"] - counts["late"]
        assert one.share_right() == one.score.replies.f1


def test_the_worst_clips_come_first_and_those_of_which_nothing_can_be_said_last():
    quiet = read(raw_clip([], 10, 89, id="quiet"))
    perfect = read(raw_clip(REPLIES[:1], 10, 89, id="perfect"))
    reviews = [
        review_clip(quiet, records_from(quiet), LEXICAL, True),
        review_clip(perfect, records_from(perfect, {14: "Now do step one."}), LEXICAL, True),
        review_clip(*example(), LEXICAL, True),
    ]
    assert [one.score.clip_id for one in worst_first(reviews)] == ["example", "perfect", "quiet"]
    assert [one.share_right() for one in worst_first(reviews)] == [2 * 2 / (6 + 7 + 4 + 5), 1.0, None]
    line = clip_line(reviews[0])
    nothing = ("share_right", "f1", "speaking_event_f1", "dst_event_f1", "replies_right_f1", "transition_f1")
    assert {line[name] for name in nothing} == {None} and line["joint_goal_accuracy"] == 1.0


def test_a_time_line_of_characters():
    """Sixty for 120 frames; where two texts fall together the wrong one is shown."""
    found = [Outcome("right", 0, (0, 0)), Outcome("missed", None, (3, 5)), Outcome("late", 119, (100, 101)),
             Outcome("illegal", 118, None), Outcome("right", 118, (118, 118))]  # fmt: skip
    assert strip(found[:3], 120) == "+." + MARKS["missed"] + "." * 56 + MARKS["late"]
    assert strip(found[3:], 120) == "." * 59 + MARKS["illegal"]


def test_what_an_evaluation_writes_and_prints(clips, checkpoint, tmp_path, capsys):  # noqa: F811
    assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
    assert sorted(line["clip"] for line in lines) == [f"clip{n}" for n in range(7)]
    shares = [line["share_right"] for line in lines]
    assert shares == sorted(shares) and shares[0] < 0.5
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    for dataset in ("tiny", "wtag"):
        mine = [line for line in lines if line["dataset"] == dataset]
        for name in ("replies_due", "replies_missed", "updates_illegal", "updates_written"):
            assert results[dataset][name] == sum(line[name] for line in mine)
            assert name not in results["macro"]
    for line in lines:
        file = ClipFile(clips)
        clip = file.clip(file.find(line["clip"]))
        due = [text for text in line["texts"] if text["verdict"] not in ("redundant", "illegal")]
        assert len(due) == len(clip.events("assistant")) + len(clip.events("DST_UPDATE"))
        assert all(clip.start_frame <= text["frame"] <= clip.end_frame for text in line["texts"])
    counts = [results["wtag"][f"updates_{name}"] for name in ("due", "right", "wrong_step")]
    assert "| wtag: updates | {} | {} | {} |".format(*counts) in shown
    strips = re.findall(
        r"^(\d\.\d{3}|     )  (replies|updates)  ([.+sw<>x!-]{60})(?:  (clip\d))?$", shown, re.MULTILINE
    )
    assert [name for *_, name in strips if name] == [line["clip"] for line in lines]
    assert (len(strips), [share for share, kind, *_ in strips if kind == "replies"]) == (
        14,
        [f"{share:.3f}" for share in shares],
    )
    written = (tmp_path / "clips.jsonl").read_bytes()
    assert call_without_checkpoint("--records", tmp_path) == 0
    again = capsys.readouterr().out
    assert again.split("command:")[0] == shown.split("command:")[0].split("\n", 1)[1]
    (tmp_path / "clips.jsonl").unlink()
    assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0  # taken over, nothing streamed
    assert (tmp_path / "clips.jsonl").read_bytes() == written


@pytest.mark.parametrize("verdict", MARKS)
def test_every_verdict_is_defined_in_the_documentation(verdict):
    assert f"**{verdict.replace('_', ' ').capitalize()}**" in SECTION
