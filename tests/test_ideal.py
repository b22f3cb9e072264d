"""The ideal observer: its beliefs by hand where it sees nothing, and perfect scores where every picture is clear."""

import math

import numpy as np
import pytest

from benchmarks.ideal import NUMBER, SITUATIONS, Observer, Situation, act, last_done, measured, watch
from prospect.clip_files import parse_clip
from prospect.sample import DIFFICULTIES, _draw_gap, act_out, write_clip


def clip_of(kinds: list[tuple], rows: int, difficulty: str = "long"):
    """A clip of the sample corpus in which only the user is heard, at the given (row, text)."""
    story = act_out(np.random.default_rng(3), DIFFICULTIES[difficulty])
    raw = write_clip(story, "clip", np.random.default_rng(0))
    raw["end_frame_idx"] = raw["start_frame_idx"] + rows - 1
    start = raw["start_frame_idx"]
    raw["conversation"] = [
        {"role": "user", "content": text, "start_frame": start + row - 1, "end_frame": start + row + 1}
        for row, text in kinds
    ]
    clip, problems = parse_clip(raw, "clips.json", 0)
    assert clip is not None, problems
    return clip


def test_a_blind_observer_believes_what_the_rules_say():
    """After the wish at row 5 something happens at row 5 + gap: 0.12 of the time a question, which would be heard."""
    clip = clip_of([(5, "I want to.")], 80)
    beliefs = list(Observer("long", noise=math.inf).beliefs(clip, np.zeros((80, 1, 2048), np.float32)))
    assert all(belief.sum() == pytest.approx(1) for belief in beliefs)
    draw = np.random.default_rng(0)
    gaps = np.array([_draw_gap(draw) for _ in range(100_000)])  # the corpus's own draws
    idle = NUMBER[Situation(0, None, "idle")]
    for row in (5, 19):
        assert beliefs[row][idle] == 1  # the shortest gap is 15
    for row in (22, 30, 40, 50):
        # At `row` itself a question may just have been asked; one asked before it would have been heard.
        still, now = (gaps > row - 5).mean(), (gaps == row - 5).mean()
        started = 0.88 * (gaps <= row - 5).mean()
        before = [s for s in SITUATIONS if s.completed == 0 and s.phase != "idle"]
        second = sum(beliefs[row][NUMBER[s]] for s in SITUATIONS if s.completed)  # a second event, from row 35 on
        expected = started / (started + still + 0.12 * now)
        assert sum(beliefs[row][NUMBER[s]] for s in before) + second == pytest.approx(expected, abs=0.01)
    # The named step is begun in half of the cases, each other one in a tenth.
    first = np.array([beliefs[30][NUMBER[Situation(0, step, "under_way")]] for step in range(6)])
    assert first / first.sum() == pytest.approx([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], abs=1e-9)


def test_a_question_that_is_heard_says_that_nothing_else_happened():
    clip = clip_of([(5, "I want to."), (30, "What now?")], 60)
    beliefs = list(Observer("long", noise=math.inf).beliefs(clip, np.zeros((60, 1, 2048), np.float32)))
    idle = NUMBER[Situation(0, None, "idle")]
    assert beliefs[30][idle] < 0.9
    # Heard before frame 31: the event at row 30 was a question, so nothing had begun by then unless the first gap was
    # 15..., which leaves fewer than 15 frames to the second; the next event comes 15 frames later at the earliest.
    draw = np.random.default_rng(0)
    gaps = np.array([_draw_gap(draw) for _ in range(200_000)])
    first, second = gaps[:100_000], gaps[100_000:]
    question = 0.12 * (first == 25).mean()
    start_then_question = 0.88 * 0.12 * ((first + second) == 25).mean()
    assert start_then_question == 0  # two gaps take 30 frames at least
    assert question > 0 and beliefs[31][idle] == pytest.approx(1) and beliefs[44][idle] == pytest.approx(1)
    assert beliefs[50][idle] < 1


def test_the_order_of_steps_done_before():
    """Easy: the lowest open step with 0.75, else the second. {1, 2} comes from 1 then 2, or from 2 then 1."""
    first_two, second_first = 0.75 * 0.75, 0.25 * 0.75
    found = last_done(0b11, DIFFICULTIES["easy"])
    assert found == pytest.approx(
        {1: first_two / (first_two + second_first), 0: second_first / (first_two + second_first)}
    )


def test_it_acts_when_it_is_certain_enough_and_once():
    clip = clip_of([(5, "I want to.")], 60)
    belief = np.zeros(len(SITUATIONS))
    belief[NUMBER[Situation(0, None, "idle")]] = 1
    beliefs = [belief.copy() for _ in range(60)]
    for row in range(20, 60):  # S3 under way, less and more surely; then it goes wrong; then it is done
        sure = {20: 0.6, 21: 0.8}.get(row, 1.0)
        phase = "under_way" if row < 40 else "wrong" if row < 50 else "done"
        beliefs[row] = belief * (1 - sure)
        beliefs[row][NUMBER[Situation(0b100 if phase == "done" else 0, 2, phase)]] = sure
    records = act(clip, beliefs, certainty=0.7)
    assert {row: r["dst_update"] for row, r in enumerate(records) if r["dst_update"]} == {
        21: "S3->start",
        50: "S3->complete",
    }
    said = {row: r["text"].split(":")[0].split(".")[0] for row, r in enumerate(records) if r["text"]}
    assert said == {6: "Great! First, trim the dead leaves", 40: "Careful, that is not right", 50: "Well done"}
    assert records[-1]["dst_state"]["S3"] == "completed"


@pytest.mark.slow
def test_it_is_perfect_where_every_picture_is_clear():
    numbers = measured(watch("long", 7, 3, Observer("long")), certainty=0.5)
    wanted = ("speaking_event_f1", "dst_event_f1", "joint_goal_accuracy", "replies_right_f1", "next_step")
    assert [numbers[name] for name in wanted] == [1.0] * 5
