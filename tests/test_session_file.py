"""prospect/session_file.py: a stream saved, and taken up again by another session, goes the same way."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from test_stream import STRATEGIES, firing, plain_records, random_clip, random_model, rows_of, stream_config

from prospect.errors import ProspectError
from prospect.session_file import load_session, save_session
from prospect.stream import Job, StreamSession

pytestmark = pytest.mark.usefixtures("one_thread_in_module")


def case(tokenizer, strategy: str, frames: int = 70, per_frame: int = 1):
    """A random model and clip in a context that overflows, with something written at a tenth of the frames."""
    draw = np.random.default_rng(3)
    model = random_model(tokenizer, 2, dst_state_head=True)
    model.lm_head.weight.data[tokenizer.end_id] *= 1.6
    job = Job(random_clip(draw, "clip", frames), rows_of(draw, frames, per_frame))
    config = stream_config(strategy=strategy, smoothing=0.4, data=dict(max_seq_len=350))
    return model, tokenizer, job, firing(model, tokenizer, [job], config, 0.1)


def fed(session: StreamSession, job: Job, until: int) -> list:
    """The records of the rows up to `until`, the user's texts said at their frames and one more before each tenth."""
    records = []
    while session.next_row < until:
        row = session.next_row
        for text in [*job.said.get(row, []), *(["And now?"] if row % 10 == 9 else [])]:
            if text not in session.pending:
                session.say(text)
        records.append(session.feed(job.embeddings[row]))
    return records


def same(expected: list, found: list) -> None:
    (plain, numbers), (theirs, others) = plain_records({"": expected}), plain_records({"": found})
    assert plain == theirs
    np.testing.assert_allclose(numbers, others, atol=1e-5)


def check_saved_at(rows, model, tokenizer, job, config, path) -> list:
    expected = fed(StreamSession(model, tokenizer, job.clip, config), job, len(job.embeddings))
    before, records = StreamSession(model, tokenizer, job.clip, config), []
    for row in rows:
        records += fed(before, job, row)
        if row % 10 == 9:
            before.say("And now?")  # what is said and not yet heard is saved too
        save_session(before, path)
        after = load_session(path, model, tokenizer, job.clip, config)
        assert after.num_tokens == before.num_tokens and after.next_row == row
        same(expected, records + fed(after, job, len(job.embeddings)))
    return expected


def test_a_restored_session_gives_the_same_records(plain, tmp_path):
    found = check_saved_at((0, 9, 60), *case(plain, "slide"), tmp_path / "session.safetensors")
    assert sum(record.text is not None for record in found) >= 2 and any(record.context_event for record in found)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_many_frames_and_under_every_strategy(plain, tmp_path, strategy):
    found = check_saved_at(range(0, 71, 3), *case(plain, strategy), tmp_path / "session.safetensors")
    assert any(record.context_event for record in found)
    check_saved_at(range(5, 71, 13), *case(plain, strategy, per_frame=3), tmp_path / "session.safetensors")


def stream_and_save(model, tokenizer, job, config, path) -> None:
    session = StreamSession(model, tokenizer, job.clip, config)
    for row in range(len(job.embeddings)):
        fed(session, job, row + 1)
        save_session(session, path)


def test_a_stream_killed_at_any_moment_resumes_from_its_last_save(plain, tmp_path):
    model, tokenizer, job, config = case(plain, "slide", frames=300)
    path = tmp_path / "session.safetensors"
    process = multiprocessing.get_context("fork").Process(
        target=stream_and_save, args=(model, tokenizer, job, config, path)
    )
    process.start()
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    session = load_session(path, model, tokenizer, job.clip, config)
    row = session.next_row
    assert 1 <= row <= 300
    expected = fed(StreamSession(model, tokenizer, job.clip, config), job, min(row + 20, 300))
    same(expected[row:], fed(session, job, min(row + 20, 300)))


def test_what_does_not_belong_together_is_refused(plain, tmp_path):
    model, tokenizer, job, config = case(plain, "slide")
    path = tmp_path / "session.safetensors"
    save_session(StreamSession(model, tokenizer, job.clip, config), path)
    other = replace(config, infer=replace(config.infer, evidence=0.75, lookahead=7))
    with pytest.raises(ProspectError, match=r"infer.evidence was 0\.\d+, is 0.75 \("):
        load_session(path, model, tokenizer, job.clip, other)
    with pytest.raises(ProspectError, match="the clip was clip, is another"):
        load_session(path, model, tokenizer, replace(job.clip, id="another"), config)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ProspectError, match="is not a saved session"):
        load_session(path, model, tokenizer, job.clip, config)
    with pytest.raises(ProspectError, match="is not a saved session"):
        load_session(tmp_path / "absent", model, tokenizer, job.clip, config)
