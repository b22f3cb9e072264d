"""Evidence chosen by streaming: what is tried, when the search ends, what is kept, and over several ranks."""

from dataclasses import replace

import numpy as np
import pytest
from test_stream import random_clip, random_model, rows_of, stream_config

from prospect import tuning
from prospect.errors import ProspectError
from prospect.score import decision_numbers, score_clip
from prospect.stream import Job, streamed_clips
from prospect.text_metrics import load_similarity
from prospect.tuning import EVIDENCE, Tried, best_tried, some_of, target_value, try_evidence, with_decisions

START = {"speaking": 0.5, "dst": 0.2}


def test_the_configuration_with_decisions():
    config = stream_config(speaking_threshold=None, dst_threshold=0.3)
    found = with_decisions(config, {"speaking": 0.7, "dst": 0.9}, 0.62).infer
    assert (found.speaking_threshold, found.dst_threshold, found.evidence) == (0.7, 0.9, 0.62)
    assert config.infer.speaking_threshold is None and config.infer.dst_threshold == 0.3  # as it was
    assert with_decisions(config, {"speaking": 0.7}, 0.5).infer.dst_threshold == 0.5  # without task state


def test_some_of_the_clips_evenly_spread():
    assert some_of(list(range(8))) == list(range(8)) and some_of([5]) == [5] and some_of([]) == []
    assert some_of(list(range(15))) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_the_target_by_hand():
    numbers = {"speaking_event_f1": 0.9, "dst_event_f1": 0.5, "replies_right_f1": 0.6, "joint_goal_accuracy": 0.2}
    assert target_value(numbers, "events") == 0.7 and target_value(numbers, "replies") == 0.6
    assert target_value(numbers, "state") == 0.2
    assert target_value(numbers, "mean") == pytest.approx((0.7 + 0.6 + 0.2) / 3)
    stateless = {"speaking_event_f1": 0.9, "replies_right_f1": 0.6}
    assert target_value(stateless, "mean") == pytest.approx((0.9 + 0.6) / 2)
    assert target_value(stateless, "state") == target_value(stateless, "events") == 0.9


def test_of_equally_good_settings_the_middle_one():
    tried = [Tried(n / 10, {"replies_right_f1": f1, "speaking_event_f1": 0.0})
             for n, f1 in enumerate([0.1, 0.8, 0.8, 0.8, 0.3])]  # fmt: skip
    assert best_tried(tried, "replies").evidence == 0.2
    assert best_tried(tried[:1], "replies") is tried[0]


@pytest.mark.parametrize("values, tries", [
    ([0.1, 0.3, 0.2, 0.1, 0.9], 4),  # two in a row below the best: the rest is never streamed
    ([0.3, 0.3, 0.3, 0.9, 0.2, 0.2, 0.9], 6),  # as good is not worse: so little may fire that nothing has changed yet
    ([0.1, 0.3, 0.2, 0.4, 0.3, 0.2, 0.9], 6),  # one alone does not end it
    ([0.0] * 10, 10),
    ([n / 10 for n in range(10)], 10),
])  # fmt: skip
def test_the_search_ends_when_less_evidence_has_been_worse_twice(plain, monkeypatch, values, tries):
    seen = []

    def streamed(model, tokenizer, jobs, config):
        seen.append(config.infer.evidence)
        return []

    script = iter(values)
    monkeypatch.setattr(tuning, "streamed_clips", streamed)
    scored = lambda scores: {"replies_right_f1": next(script), "speaking_event_f1": 0}  # noqa: E731
    monkeypatch.setattr(tuning, "decision_numbers", scored)
    tried = list(try_evidence(None, plain, [], stream_config(tuned_for="replies"), START))
    assert len(tried) == tries and list(EVIDENCE) == sorted(EVIDENCE, reverse=True)
    assert [one.evidence for one in tried] == list(EVIDENCE[:tries]) == seen


def streaming_case(plain, seed: int):
    draw, model = np.random.default_rng(seed), random_model(plain, seed)
    jobs = [Job(random_clip(draw, f"clip{n}", 30), rows_of(draw, 30)) for n in range(4)]
    config = stream_config(speaking_threshold=None, dst_threshold=None)
    return model, [replace(job) for job in jobs], config


def test_what_is_tried_is_what_streaming_scores(plain):
    """On a random model: the numbers of each setting, and the brute-force best of them."""
    model, jobs, config = streaming_case(plain, 3)
    tried = list(try_evidence(model, plain, jobs, config, START))
    values = []
    for one in tried:
        infer = replace(config.infer, speaking_threshold=0.5, dst_threshold=0.2, evidence=one.evidence)
        trial = replace(config, infer=infer)
        clips = streamed_clips(model, plain, jobs, trial, streams=1)
        scores = [score_clip(job.clip, records, load_similarity("lexical"), True) for job, records in clips]
        assert decision_numbers(scores) == one.numbers
        values.append(target_value(one.numbers, "mean"))
    assert best_tried(tried, "mean").evidence == tried[int(np.argmax(values))].evidence and len(set(values)) > 1


def test_several_ranks_are_scored_as_one(plain):
    """gather gives every rank the scores of all; an error of any is raised on every one."""
    model, jobs, config = streaming_case(plain, 3)
    whole = list(try_evidence(model, plain, jobs, config, START))
    shares = []  # the other rank's scores at each
    for one in whole:
        clips = streamed_clips(model, plain, jobs[1::2], with_decisions(config, START, one.evidence))
        shares.append([score_clip(job.clip, records, load_similarity("lexical"), True) for job, records in clips])
    theirs = iter(shares)
    halves = list(try_evidence(model, plain, jobs[0::2], config, START, lambda mine: [mine, next(theirs)]))
    assert [one.evidence for one in halves] == [one.evidence for one in whole]
    for one, other in zip(halves, whole):
        assert one.numbers == pytest.approx(other.numbers)

    with pytest.raises(ProspectError, match="elsewhere"):
        list(try_evidence(model, plain, jobs, config, START, lambda mine: [mine, ProspectError("elsewhere")]))
    # A rank without a clip of its own takes part all the same.
    idle = list(try_evidence(model, plain, [], config, START, lambda mine: [mine, shares[0]]))
    assert idle[0].numbers == decision_numbers(shares[0])


def test_settings_that_cannot_stream_are_an_error_after_all_ranks_know(plain):
    model, jobs, config = streaming_case(plain, 3)
    told = []

    def gather(mine):
        told.append(mine)
        return [mine]

    config.infer.reserved = 5
    with pytest.raises(ProspectError, match="infer.reserved"):
        list(try_evidence(model, plain, jobs, config, START, gather))
    assert len(told) == 1 and isinstance(told[0], ProspectError)
