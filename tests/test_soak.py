"""Fourteen hours of one stream: neither memory nor the time of a frame grows, and its context stays right."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import raw_clip, read
from test_stream import firing, probabilities, random_model, rows_of, stream_config

from prospect.sequence import clip_prompt, prompt_pieces
from prospect.stream import Job, StreamSession
from prospect.tokenizer import Tokenizer

FRAMES, BLOCK, SETTLED = 100_000, 1_000, 5_000  # frames; of a figure; after which memory is compared


def fill_word_cache(tokenizer: Tokenizer) -> None:
    """The tokenizers library keeps the first 10,000 words that each of its threads meets, some megabytes in all.

    The user below invents words all day. What this test is to see is growth that never ends.
    """
    words = ["".join(chr(ord("a") + int(digit, 26)) for digit in np.base_repr(number, 26)) for number in range(12_000)]
    tokenizer.text_backend.encode_batch(words)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def equals_one_forward(session: StreamSession, speaking: float, dst: float) -> bool:
    """Whether the newest frame's probabilities are those of one forward over the prompt and what the context holds."""
    state, units = session.units[0].state_before, session.units
    prompt = prompt_pieces(clip_prompt(session.clip, state, session.config.data), session.tokenizer)
    ids = session.tokenizer.encode(prompt) + [id for unit in units for id in unit.ids(session.tokenizer.image_id)]
    ids = torch.tensor([ids[: len(ids) - len(units[-1].after_ids)]])
    with torch.inference_mode():
        hidden = session.model(ids, torch.cat([unit.rows for unit in units]))[0, -1]
    return probabilities(session.model, hidden) == pytest.approx((speaking, dst), abs=1e-4)


@pytest.mark.slow
def test_a_hundred_thousand_frames_are_flat_in_memory_and_time(plain, one_thread_and_usual_signals, monkeypatch):
    """A user who talks at random, replies and updates, hundreds of refreshes.

    Times are of the thread, not of the clock. A machine that is busy for a while slows some blocks down and no other
    down to the fastest, so a third of the run is judged by the lower quartile of its blocks' medians.
    """
    draw, clip = np.random.default_rng(0), read(raw_clip([], 0, FRAMES - 1))
    model = random_model(plain, 0, hidden_size=64, intermediate_size=172, head_dim=16)
    pool = rows_of(draw, 997)[:, 0]
    config = stream_config(reserved=130, data=dict(max_seq_len=768))
    config = firing(model, plain, [Job(read(raw_clip([], 0, 996)), pool[:, None])], config, 0.01)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # one thread, one cache of words
    fill_word_cache(plain)
    session = StreamSession(model, plain, clip, config)
    memory, seconds = [], np.zeros(FRAMES)
    refreshes = said = spoken = 0
    for frame in range(FRAMES):
        if draw.random() < 0.01:
            session.say("".join(draw.choice(list("what now 積木\U0001f600"), size=int(draw.integers(1, 40)))) + "?")
            said += 1
        started = time.thread_time()
        record = session.feed(pool[draw.integers(997)])
        seconds[frame] = time.thread_time() - started
        refreshes += record.context_event is not None
        spoken += record.speaking_decision
        if frame >= SETTLED and frame % 500 == 0:
            memory.append(resident())
        if frame % 9_973 == 0:
            assert equals_one_forward(session, record.speaking_prob, record.dst_update_prob), frame
    blocks = np.median(seconds.reshape(-1, BLOCK), axis=1)  # [100]
    thirds = [float(np.quantile(part, 0.25)) * 1e3 for part in np.array_split(blocks[SETTLED // BLOCK :], 3)]
    first, half, last, most = (size / 2**20 for size in (memory[0], memory[len(memory) // 2], memory[-1], max(memory)))
    print(f"{refreshes} refreshes, {said} texts of the user, {spoken} replies")
    print(f"resident memory {first:.1f} -> {half:.1f} -> {last:.1f} MiB, at most {most:.1f}")
    print("ms a frame, by third:", ", ".join(f"{ms:.2f}" for ms in thirds))
    assert refreshes > 200 and said > 500 and spoken > 500
    assert max(memory) <= 1.02 * memory[0]
    assert last <= 1.005 * half  # 28 bytes a frame, were it a leak
    assert max(thirds) <= 1.25 * min(thirds)
