"""When a head fires: every score and decision is worked out by hand beside its test."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from conftest import raw_clip, read

from prospect import decisions
from prospect.config import InferConfig
from prospect.decisions import Decision, Evidence, Moments, decide, nearly, reference_moments

NEVER = 1.0  # a threshold that no score here reaches


def settings(
    evidence: float = 0.6, speaking: float = 0.5, dst: float = 0.5, smoothing: float = 0.5, coupling: float = 0.0
) -> InferConfig:
    infer = InferConfig(smoothing=smoothing, coupling=coupling)
    return replace(infer, speaking_threshold=speaking, dst_threshold=dst, evidence=evidence)


def decided(infer: InferConfig, speaking: list[float], dst: list | None = None, asked: tuple = ()) -> list[Decision]:
    """One stream's decisions; asked: the frames right behind a user's text."""
    evidence, dst = Evidence(), [None] * len(speaking) if dst is None else dst
    return [decide(infer, evidence, s, d, i in asked) for i, (s, d) in enumerate(zip(speaking, dst))]


def scores(found: list[Decision]) -> list[float]:
    return [decision.speaking_score for decision in found]


def spoken(found: list[Decision]) -> list[int]:
    return [i for i, decision in enumerate(found) if decision.speak]


def updated(found: list[Decision]) -> list[int]:
    return [i for i, decision in enumerate(found) if decision.update]


def test_the_drawing_in_the_description():
    """.05; .35 + .025; .1 + .1875; .4 + .14375; .45 + .271875 fires; from nothing: .05."""
    found = decided(settings(), [0.1, 0.7, 0.2, 0.8, 0.9, 0.1])
    assert scores(found) == pytest.approx([0.05, 0.375, 0.2875, 0.54375, 0.721875, 0.05])
    assert spoken(found) == [4]
    raw, drawn, mark = [line for line in inspect.getdoc(decisions).splitlines() if line.startswith("    ")]
    places = [raw.index(number, 20) for number in (".1", ".7", ".2", ".8", ".9")]
    assert [drawn[place:].split()[0] for place in places] == [".05", ".38", ".29", ".54", ".72"]
    assert drawn.split()[6] == ".05" and mark.index("^") == places[4]


def test_after_firing_the_evidence_starts_again():
    """Of a steady .8: .4, .6 fires; then the same again. Not .4, .6, .7, .75."""
    found = decided(settings(), [0.8] * 6)
    assert scores(found) == pytest.approx([0.4, 0.6] * 3) and spoken(found) == [1, 3, 5]
    # One head's firing resets the other too: its evidence was of the time before the text.
    found = decided(settings(), [0.8] * 4, [0.7] * 4)
    assert [decision.dst_score for decision in found] == pytest.approx([0.35, 0.525, 0.35, 0.525])
    assert spoken(found) == [1, 3] and updated(found) == []


def test_a_frame_behind_the_user_s_text_is_decided_by_itself():
    found = decided(settings(), [0.1, 0.1, 0.7, 0.1], asked=(2,))
    assert scores(found) == pytest.approx([0.05, 0.075, 0.7, 0.05]) and spoken(found) == [2]
    # In silence it is the start of new evidence: .5, then (.5 + .1) / 2.
    found = decided(settings(), [0.9, 0.5, 0.1], [0.0, 0.2, 0.4], asked=(1,))
    assert scores(found) == pytest.approx([0.45, 0.5, 0.3]) and spoken(found) == []
    assert [decision.dst_score for decision in found] == pytest.approx([0.0, 0.2, 0.3])


def test_the_threshold_itself_is_reached():
    assert spoken(decided(settings(smoothing=1.0), [0.59, 0.6, 0.61])) == [1, 2]
    assert updated(decided(settings(speaking=NEVER, smoothing=1.0), [0.0] * 3, [0.59, 0.6, 0.61])) == [1, 2]


def test_coupling_takes_along_the_head_that_is_nearly_there_both_ways():
    """logit(.6) = .405, logit(.5) = 0, logit(.3) = -.847: one logit below .6 is -.595, so .5 is near and .3 is not."""
    near, far = settings(smoothing=1.0, coupling=1.0), [0.5, 0.3]
    found = decided(near, [0.6, 0.6], far)
    assert spoken(found) == [0, 1] and updated(found) == [0]
    found = decided(near, far, [0.6, 0.6])
    assert updated(found) == [0, 1] and spoken(found) == [0]
    assert spoken(decided(near, [0.5], [0.5])) == updated(decided(near, [0.5], [0.5])) == []  # neither fires by itself


def test_a_head_s_own_threshold_counts_as_even_odds():
    """Odds are divided by the threshold's: .25 has 1/3, so .25 becomes 1/2, .5 becomes 3/4, .1 (1/9) becomes 1/4."""
    found = decided(settings(dst=0.25, smoothing=1.0), [0.0] * 3, [0.25, 0.5, 0.1])
    assert [decision.dst_score for decision in found] == pytest.approx([0.5, 0.75, 0.25]) and updated(found) == [1]
    assert spoken(decided(settings(0.5, speaking=1e-5, smoothing=1.0), [0.9e-5, 1e-5, 1.1e-5])) == [1, 2]
    assert spoken(decided(settings(speaking=0.0, smoothing=1.0), [1e-9])) == [0]  # 0: always; 1: never
    assert spoken(decided(settings(speaking=NEVER, smoothing=1.0), [0.999999])) == []


def test_coupling_looks_at_the_scores():
    # The update's scores are .5 * .5 = .25 and .25 / 2 + .25 = .375 (logit -.511); .6 has logit .405: .916 below.
    for coupling, together in ((0.9, []), (0.95, [1])):
        found = decided(settings(dst=0.25, coupling=coupling), [0.8, 0.8], [0.25, 0.25])
        assert spoken(found) == [1] and updated(found) == together
        assert found[1].dst_score == pytest.approx(0.375)


def test_no_coupling():
    found = decided(settings(smoothing=1.0, coupling=0.0), [0.6, 0.59999], [0.59999, 0.6])
    assert spoken(found) == [0] and updated(found) == [1]
    assert not nearly(0.9, settings(coupling=0.0)) and nearly(0.6, settings(coupling=1e-6))


def test_without_smoothing_and_coupling_it_is_a_plain_threshold():
    draw = np.random.default_rng(0)
    speaking, dst = draw.random(200).tolist(), draw.random(200).tolist()
    found = decided(settings(0.5, 0.7, 0.8, smoothing=1.0), speaking, dst, asked=(3, 50))
    assert spoken(found) == [i for i, p in enumerate(speaking) if p >= 0.7]
    assert updated(found) == [i for i, p in enumerate(dst) if p >= 0.8]


def test_nothing_legal_to_update_and_no_task_state():
    """dst None: no score, no update however strong the coupling, and the speaking head as ever."""
    infer = settings(coupling=100.0)
    found = decided(infer, [0.8, 0.8, 0.8], [None, None, None])
    assert spoken(found) == [1] and updated(found) == [] and {d.dst_score for d in found} == {None}
    # Where nothing is legal for a while, the update's evidence waits as it was: .4, then .4 / 2 + .9 / 2.
    found = decided(settings(speaking=NEVER), [0.0] * 3, [0.8, None, 0.9])
    assert [decision.dst_score for decision in found] == [0.4, None, pytest.approx(0.65)] and updated(found) == [2]


def test_who_is_told_when_decides_nothing():
    """At the second frame the head would have spoken. Scores start again behind the frames at which is written."""
    infer, evidence = settings(smoothing=0.5, evidence=0.6, coupling=2.0), Evidence()
    told = [(False, False), (False, False), (True, True), (False, False), (False, True), (True, False)]
    found = [decide(infer, evidence, 0.8, 0.4, False, when) for when in told]
    assert [(one.speak, one.update) for one in found] == told
    assert scores(found) == pytest.approx([0.4, 0.6, 0.7, 0.4, 0.6, 0.4])
    assert [one.dst_score for one in found] == pytest.approx([0.2, 0.3, 0.35, 0.2, 0.3, 0.2])
    nothing_legal = decide(infer, Evidence(), 0.8, None, False, (True, True))
    assert (nothing_legal.speak, nothing_legal.update) == (True, False)


def test_the_reference_s_moments():
    turns = [
        ("user", "Hi", 12, 13), ("assistant", "Go", 12, 14), ("assistant", "on", 14, 14), ("assistant", "x", 19, 25),
        ("DST_UPDATE", "S1->start", 13, 13), ("DST_UPDATE", "S1->complete", 19, 25), ("system", "S", 0, 1),
    ]  # fmt: skip
    moments = reference_moments(read(raw_clip(turns, 10, 30)))
    assert moments == Moments(frozenset({14, 25}), frozenset({13, 25}))
    assert [moments.at(frame) for frame in (12, 13, 14, 25)] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]


def test_a_changed_future_changes_nothing():
    draw = np.random.default_rng(1)
    for _ in range(50):
        infer = settings(
            *draw.uniform(0.3, 0.6, 3), smoothing=draw.choice([1.0, 0.5, 0.3]), coupling=draw.choice([0.0, 2.0])
        )
        speaking, dst, asked = draw.random(30).tolist(), draw.random(30).tolist(), tuple(draw.integers(0, 30, 3))
        cut = int(draw.integers(1, 30))
        whole = decided(infer, speaking, dst, asked)
        other = decided(infer, speaking[:cut] + draw.random(10).tolist(), dst[:cut] + draw.random(10).tolist(), asked)
        assert other[:cut] == whole[:cut] and 0 < len(spoken(whole)) < 30
