"""prospect/audit.py: the engine passes, and engines with a leak put into them on purpose do not."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import raw_clip, read
from test_evaluate import call, checkpoint, clips  # noqa: F401 (fixtures)
from test_stream import firing, random_model, rows_of, stream_config

from prospect import audit as audit_module
from prospect import stream
from prospect.audit import Audit, audit, difference, perturbed
from prospect.stream import Job

pytestmark = pytest.mark.usefixtures("one_thread_in_module")


def a_clip(name: str, first: int):
    """30 frames: three user texts, two replies, two updates."""
    turns = [
        ("user", "Hello!", first + 2, first + 2),
        ("assistant", "Do one.", first + 2, first + 4),
        ("DST_UPDATE", [{"id": "S1", "transition": "start"}], first + 5, first + 6),
        ("user", "What now?", first + 14, first + 15),
        ("DST_UPDATE", [{"id": "S1", "transition": "complete"}], first + 16, first + 18),
        ("assistant", "Do two.", first + 16, first + 18),
        ("user", "Bye.", first + 25, first + 25),
    ]
    return read(raw_clip(turns, first, first + 29, inferred_goal="Build it", id=name))


@pytest.fixture(scope="module")
def streams(plain):
    """A random model, four clips, and decisions that fire at a tenth of the frames, in a context that overflows."""
    draw = np.random.default_rng(5)
    model = random_model(plain, 1, dst_state_head=True)
    model.lm_head.weight.data[plain.end_id] *= 1.6
    jobs = [Job(a_clip(f"clip{n}", 10 * n), rows_of(draw, 30)) for n in range(4)]
    config = stream_config(lookahead=8, data=dict(max_seq_len=350))
    config = firing(model, plain, jobs, config, 0.1)
    config.infer.lookahead = 8
    return model, plain, jobs, config


def run_audit(streams, perturbations: int) -> Audit:
    *_, last = audit(*streams, perturbations=perturbations)
    return last


def test_what_is_changed_and_what_stays():
    clip = a_clip("clip", 10)
    rows = rows_of(np.random.default_rng(0), 30)
    kinds = ("future frames", "future turns", "references")
    job, changed = perturbed(Job(clip, rows), 24, kinds, np.random.default_rng(1))
    # Frames 25..39 lie behind 24, as do the user's texts at 25 and 35; four references, and the times of two steps.
    assert changed == {"future frames": 15, "future turns": 2, "references": 6}
    assert (job.embeddings[:15] == rows[:15]).all() and (job.embeddings[15:] != rows[15:]).all()
    for before, after in zip(clip.turns, job.clip.turns):
        seen = before.role == "user" and before.end_frame <= 24
        assert (after == before) == seen
        assert after.role == before.role
        if not seen:
            assert (after.text, after.transitions) != (before.text, before.transitions)
    assert [(s.id, s.name) for s in job.clip.steps] == [(s.id, s.name) for s in clip.steps]
    assert job.clip.initial_state == clip.initial_state


def test_the_engine_sees_neither_the_future_nor_the_reference(streams):
    done = run_audit(streams, 400)
    assert done.leak is None and done.changed.total() >= 400 and done.compared > 50
    assert all(done.changed[kind] > 2 for kind in audit_module.KINDS)


def test_the_streams_compared_do_write(streams):
    """Else nothing but silent frames would be compared."""
    model, tokenizer, jobs, config = streams
    records = [record for _, new in stream.stream_jobs(model, tokenizer, jobs, config, streams=2) for record in new]
    said = [sum(getattr(record, field) is not None for record in records) for field in ("text", "dst_update")]
    assert min(said) >= 3 and any(record.context_event for record in records)


@pytest.mark.slow
def test_ten_thousand_values_changed_and_no_record(streams):
    done = run_audit(streams, 10_000)
    print(done)
    assert done.leak is None


# ---- leaks put in on purpose ---------------------------------------------------------------------


def reference_in_the_prompt(monkeypatch):
    right = stream.clip_prompt
    monkeypatch.setattr(
        stream, "clip_prompt", lambda clip, *rest, **named: right(clip, *rest, **named) + str(clip.replies())
    )


def reference_as_the_state(monkeypatch):
    right = stream.StreamSession.see

    def see(self, *rest):
        self.state = self.clip.state_before(self.frame_idx)
        return right(self, *rest)

    monkeypatch.setattr(stream.StreamSession, "see", see)


def a_lookahead_that_peeks(monkeypatch):
    right = stream.read_heads
    ahead = lambda hidden: torch.cat((hidden[:, 1:], hidden[:, -1:]), 1)  # noqa: E731
    monkeypatch.setattr(stream, "read_heads", lambda model, hidden, *rest: right(model, ahead(hidden), *rest))


def a_row_that_spills(monkeypatch):
    right = stream.read_heads
    spilled = lambda hidden: hidden + 1e-3 * hidden.roll(1, 0)  # noqa: E731
    monkeypatch.setattr(stream, "read_heads", lambda model, hidden, *rest: right(model, spilled(hidden), *rest))


def user_text_heard_early(monkeypatch):
    right = Job.frames

    def frames(self, begin, count):
        found = right(self, begin, count)
        for k, frame in enumerate(found):
            frame.user = self.said.get(begin + k + 1, [])
        return found

    monkeypatch.setattr(Job, "frames", frames)


@pytest.mark.parametrize("leak, kind", [
    (reference_in_the_prompt, "references"),
    (reference_as_the_state, "references"),
    (a_lookahead_that_peeks, "future frames"),
    (a_row_that_spills, "other clips"),
    pytest.param(user_text_heard_early, "future turns", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_leak_is_found_and_named(streams, monkeypatch, leak, kind):
    leak(monkeypatch)
    done = run_audit(streams, 20_000)
    assert done.leak is not None and kind in done.leak.kinds
    assert str(done).splitlines()[1].split(": ", 1)[1].startswith(f"LEAK: clip {done.leak.clip_id}, frame")


def test_a_difference_is_more_than_rounding(streams):
    model, tokenizer, jobs, config = streams
    [(_, [record, *_])] = [next(stream.stream_jobs(model, tokenizer, jobs[:1], config))]
    near, far = (
        stream.FrameRecord(**vars(record) | {"speaking_prob": record.speaking_prob + by}) for by in (5e-7, 5e-6)
    )
    assert difference([record], [near]) is None
    assert difference([record], [far])[:2] == (record.frame_idx, "speaking_prob")
    assert difference([record], [])[:2] == (record.frame_idx, "record")


def test_on_the_command_line(checkpoint, clips, monkeypatch, capsys):  # noqa: F811
    words = ["audit", "--checkpoint", str(checkpoint), "--data", str(clips), "--perturbations", "20"]
    monkeypatch.setattr(sys, "argv", words)
    assert audit_module.main() == 0
    assert re.search(
        r"^\d+ re-runs, \d+ values changed: .*\n\d+ records compared: 0 changed$", capsys.readouterr().out, re.M
    )
    reference_in_the_prompt(monkeypatch)
    assert audit_module.main() == 1
    assert "LEAK: clip" in capsys.readouterr().out
