"""The certificate by exact fractions and by repetition; what is streamed, chosen and refused."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip, read
from test_stream import stream_config
from tiny import VISION_DIM, tiny_clip

from prospect import quiet
from prospect.errors import ProspectError
from prospect.metrics import Counts
from prospect.quiet import alarmed, check_quiet, choose_quiet, minutes_needed, p_value, passes
from prospect.stream import Job
from prospect.tuning import EVIDENCE, Tried

DOC = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


def exact(alarms: int, minutes: int, per_hour: Fraction) -> Fraction:
    p = per_hour / 60
    return sum(comb(minutes, k) * p**k * (1 - p) ** (minutes - k) for k in range(alarms + 1))


@pytest.mark.parametrize("minutes", [1, 22, 60, 300])
@pytest.mark.parametrize("per_hour", [Fraction(1, 2), Fraction(6), Fraction(59)])
def test_the_tail_is_the_binomial_s(minutes, per_hour):
    for alarms in sorted({0, 1, minutes // 40, minutes // 10, minutes}):
        expected = float(exact(alarms, minutes, per_hour))
        assert p_value(alarms, minutes, float(per_hour)) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_the_examples_of_the_document():
    assert f"1770 · 0.01 · 0.9^58 = {p_value(2, 60, 6):.4f}. Certified." in DOC and passes(2, 60, 6)
    assert "22 minutes are enough, for 0.9^22 = 0.0985" in DOC and 0.9**22 == pytest.approx(0.0985, abs=5e-5)
    assert minutes_needed(6) == 22 and passes(0, 22, 6) and not passes(0, 21, 6)


def test_minutes_are_whole_ones():
    record = {"speaking_decision": False, "dst_update_decision": False}
    rows = [dict(record) for _ in range(2 * 60 * 3 + 119)]  # three minutes and a part at 2 frames a second
    rows[119]["speaking_decision"] = True  # the last of the first minute
    rows[240]["dst_update_decision"] = rows[241]["speaking_decision"] = True  # twice in the third
    rows[-1]["speaking_decision"] = True  # in the part that is left out
    assert alarmed(rows, 2) == [True, False, True]
    assert alarmed(rows[:119], 2) == [] and alarmed(rows[:90], 1.5) == [False]


# ---- the guarantee -------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [1, 3, 10])
@pytest.mark.parametrize("rates", [
    [6.001] * 10,  # the worst case: the first is already too much, and the others do not rescue it
    [5.9, 5.95, 6.01, 6.02, 6.5, 7, 8, 9, 10, 20],
    [1, 2, 3, 4, 5, 6.1, 7, 8, 9, 10],
    [9, 1, 1, 1, 1, 1, 1, 1, 1, 1],  # not even in order
])  # fmt: skip
def test_of_many_draws_at_most_one_in_ten_is_wrong(hours, rates):
    """Minutes drawn with these true rates: how often is any evidence certified whose rate is above 6 an hour?"""
    draw, minutes, repetitions, wrong = np.random.default_rng(0), 60 * hours, 4000, 0
    enough = max((k for k in range(minutes) if passes(k, minutes, 6)), default=-1)
    ok = draw.binomial(minutes, np.array(rates) / 60, (repetitions, len(rates))) <= enough
    certified = np.logical_and.accumulate(ok, axis=1)  # until the first that fails
    wrong = (certified & (np.array(rates) > 6)).any(1).mean()
    assert wrong <= 0.1 + 3 * (0.1 * 0.9 / repetitions) ** 0.5
    if rates[0] == 6.001 and hours == 10:
        assert wrong > 0.03  # and the test is not simply far from its limit


# ---- choosing ------------------------------------------------------------------------------------


def quiet_job(minutes: int) -> Job:
    return Job(read(raw_clip([], 0, 120 * minutes - 1)), np.zeros((120 * minutes, 1, VISION_DIM), np.float32))


def faked(monkeypatch, alarms: dict[float, int], best: float) -> list[float]:
    """Streams that bring `alarms` alarmed minutes by evidence; `best` is best on the data. Returns what is asked."""
    asked = []

    def streamed(model, tokenizer, jobs, config):
        asked.append(config.infer.evidence)
        for job in jobs:
            left = alarms[config.infer.evidence]
            yield (
                job,
                [
                    {"speaking_decision": row % 120 == 7 and row // 120 < left, "dst_update_decision": False}
                    for row in range(len(job.embeddings))
                ],
            )

    def tried(model, tokenizer, jobs, config, thresholds, gather, grid):
        return [Tried(one, {"replies_right_f1": -abs(one - best), "speaking_event_f1": 0.0}) for one in grid]

    monkeypatch.setattr(quiet, "streamed_clips", streamed)
    monkeypatch.setattr(quiet, "try_evidence", tried)
    monkeypatch.setattr(quiet, "events_caught", lambda *_: {"speaking": Counts(3, 5, 4), "dst": Counts(1, 1, 2)})
    return asked


def test_the_tests_end_at_the_first_that_fails(monkeypatch, capsys):
    alarms = dict(zip(EVIDENCE, [0, 1, 2, 30, 0, 0, 0, 0, 0, 0]))
    asked = faked(monkeypatch, alarms, best=0.2)
    config = stream_config(tuned_for="replies", evidence=0.44)
    assert choose_quiet(None, None, [quiet_job(60)], [], config, 6.0) == EVIDENCE[2]  # the laxest of three
    assert asked == list(EVIDENCE[:4])
    shown = capsys.readouterr().out
    assert "| 0.62 | 2 of 60 | 0.0530 | yes |\n| 0.56 | 30 of 60 | 1.0000 | no |\n" in shown
    assert "| before: 0.44 | 3 of 4 (0.750) | 1 of 2 (0.500) |\n| certified: 0.62 |" in shown
    assert "at most 6 false alarms an hour, at 90% confidence" in shown


def test_of_the_certified_the_best_on_the_data(monkeypatch):
    faked(monkeypatch, dict.fromkeys(EVIDENCE, 0), best=0.5)
    config = stream_config(tuned_for="replies")
    assert choose_quiet(None, None, [quiet_job(30), quiet_job(30)], [], config, 6.0) == 0.5


def test_nothing_certified_is_an_error(monkeypatch):
    asked = faked(monkeypatch, dict.fromkeys(EVIDENCE, 40), best=0.5)
    with pytest.raises(ProspectError, match="no evidence is certified for at most 6 false alarms an hour"):
        choose_quiet(None, None, [quiet_job(60)], [], stream_config(), 6.0)
    assert asked == [EVIDENCE[0]]


@pytest.mark.parametrize("minutes, per_hour, turns, told", [
    (21, 6, [], "21 whole minutes of quiet cannot certify 6 false alarms an hour .give 22 minutes"),
    (60, 0, [], "more than 0, less than 60"),
    (60, 60, [], "more than 0, less than 60"),
    (60, 6, [("user", "Hello?", 7, 7)], "is not quiet: a user turn at frame 7"),
])  # fmt: skip
def test_what_cannot_be_certified(minutes, per_hour, turns, told):
    job = quiet_job(minutes)
    if turns:
        job = replace(job, clip=read(raw_clip(turns, 0, job.clip.end_frame)))
    with pytest.raises(ProspectError) as error:
        check_quiet([job], per_hour)
    assert re.search(told, str(error.value))


def test_the_command_certifies_and_stores(tmp_path, capsys):
    """A model never trained, whose heads stay below what is asked of them, on 25 minutes of noise: 150 frames."""
    from test_evaluate import call, make_checkpoint, write_clips

    draw = np.random.default_rng(1)
    silent = tiny_clip(draw, "silent", 150, 0, 0) | {"conversation": [], "fps": 0.1}
    calm = write_clips(tmp_path / "quiet", "quiet.json", [silent])
    data = write_clips(tmp_path / "data", "clips.json", [tiny_clip(draw, f"c{n}", 20, 2, 3) for n in range(2)])
    checkpoint = make_checkpoint(tmp_path / "step-3", speaking=0.99, dst=0.99)
    words = ("--data", data, "--quiet", calm)
    assert call(checkpoint, *words) == 0
    shown = capsys.readouterr().out
    assert f"| {EVIDENCE[0]} | 0 of 25 | 0.0718 | yes |" in shown and "stored in" in shown  # 0.9^25
    stored = json.loads((checkpoint / "state.json").read_text())["thresholds"]
    assert f"chosen: infer.evidence={stored['evidence']}\n" in shown
    assert {k: v for k, v in stored.items() if k != "evidence"} == {"speaking": 0.99, "dst": 0.99}
    assert call(checkpoint, *words, "--max-false-alarms", 1) == 2
    assert "give 138 minutes at least" in capsys.readouterr().err
