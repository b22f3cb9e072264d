"""Learned summaries: what they say, the windows that teach them, and that a stream starts again in just their shape."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import raw_clip, read, samples_of
from test_data import learned
from test_stream import Tape, feed_forced, random_clip, random_model, rows_of, stream_config

from prospect import sequence, stream
from prospect.config import Config, DataConfig
from prospect.load import untaught_strategy
from prospect.model import IGNORE, Generated
from prospect.sequence import Window, is_summarized, lay_out, make_sample, plan_windows
from prospect.stream import StreamSession
from prospect.summaries import can_be_summarized, reference_summary
from prospect.tokenizer import Tokenizer

END = 257  # of the byte tokenizer


def update(step: str, transition: str, frame: int) -> tuple:
    return ("DST_UPDATE", [{"id": step, "transition": transition}], frame, frame)


THREE = [
    update("S2", "start", 1), update("S2", "complete", 3), update("S1", "start", 3), update("S3", "start", 4),
    update("S1", "complete", 6),
]  # fmt: skip


# ---- what a summary says -------------------------------------------------------------------------


@pytest.mark.parametrize("frame, expected", [
    (0, "Done: nothing yet."),
    (1, "Done: nothing yet."),  # the update at frame 1 is yet to come
    (2, "Done: nothing yet. Under way: two."),
    (4, "Done: two. Under way: one."),
    (5, "Done: two. Under way: one; three."),
    (7, "Done: one; two. Under way: three."),  # in the order of the list
])  # fmt: skip
def test_a_summary_is_written_from_the_updates_so_far(frame, expected):
    assert reference_summary(read(raw_clip(THREE, 0, 9, steps=3)), frame) == expected


def test_steps_completed_before_the_clip_come_first():
    steps = [
        {"id": id, "name": name, "initial_state": state}
        for id, name, state in (
            ("S1", "one", "not_started"),
            ("S2", "two", "completed"),
            ("S3", "three", "in_progress"),
        )
    ]
    clip = replace(
        read(raw_clip([update("S3", "complete", 2)], 0, 9, steps=0) | {"dst": steps}),
        initial_state={"S1": "not_started", "S2": "completed", "S3": "in_progress"},
    )
    assert reference_summary(clip, 0) == "Done: two. Under way: three."
    assert reference_summary(clip, 5) == "Done: two; three."


def test_the_progress_that_a_file_tells_is_the_summary():
    raw = raw_clip([("assistant", "Hi.", 2, 2), ("assistant", "Now that.", 5, 5), *THREE], 0, 9, steps=3)
    raw["conversation"][0]["progress"] = " Two wheels are off. "
    raw["conversation"][1]["progress"] = "Three wheels are off."
    clip = read(raw)
    assert reference_summary(clip, 2) == "Done: nothing yet. Under way: two."  # before the first
    assert reference_summary(clip, 3) == reference_summary(clip, 5) == "Two wheels are off."
    assert reference_summary(clip, 6) == "Three wheels are off."


# ---- the windows that teach them -----------------------------------------------------------------


def test_windows_hand_a_summary_on(plain, monkeypatch):
    """The text of both windows, and what is learned of it, by hand. A byte is a token, and so is a control token."""
    monkeypatch.setattr(sequence, "SUMMARIZED_FROM", 1.0)  # the first one is as long as may be
    clip = read(raw_clip([("assistant", "Go.", 1, 1), update("S2", "start", 1)], 0, 160, inferred_knowledge="Recipe."))
    system = "System: You are a helpful and proactive assistant.\n"
    told = "[DST_UPDATE] S2->start<eos>Assistant: Go.<eos>"
    summary = "Assistant: Done: nothing yet. Under way: two.<eos>"
    begin = f"{system}S1 one [not_started]\nS2 two [not_started]<eos><image><image>{told}"
    request = "User: Summarize what has been done so far.<eos>"
    length = len((begin + request + summary).replace("<eos>", "$").replace("<image>", "#")) + 59  # 59 frames more
    one, two = samples_of(clip, plain, max_seq_len=length, summaries=1.0, text_at="last", rate=1.0)
    assert one.formatted.text == begin + "<image>" * 59 + request + summary and len(one.input_ids) == length
    state = "S1 one [not_started]\nS2 two [in_progress]\nRecipe.\nSo far: Done: nothing yet. Under way: two.<eos>"
    assert two.formatted.text == system + state + "<image>" * 100
    assert learned(one, "speaking_gen_labels") == ["Assistant: Go.<eos>", summary]
    assert (
        learned(one, "dst_gen_labels") == ["[DST_UPDATE] S2->start<eos>"] and learned(two, "speaking_gen_labels") == []
    )
    # Every frame is decided in one of the windows: nothing is repeated, and the request asks no head for a decision.
    assert one.frames.tolist() == list(range(61)) and two.frames.tolist() == list(range(61, 161))
    for sample in (one, two):
        decided = np.flatnonzero(sample.labels["speaking_labels"] != IGNORE)
        assert decided.tolist() == sample.decision_positions.tolist()

    # Without task state the summary is all the memory there is.
    without = samples_of(clip, plain, max_seq_len=215, summaries=1.0, text_at="last", dst=False)
    assert without[1].formatted.text.startswith(
        f"{system}Recipe.\nSo far: Done: nothing yet. Under way: two.<eos><image>"
    )
    [single] = samples_of(clip, plain, summaries=1.0)
    assert "Summarize" not in single.formatted.text and "So far" not in single.formatted.text  # a clip that fits


def test_the_request_for_a_summary_comes_at_drawn_lengths(plain):
    """From 0.6 of max_seq_len on, evenly, and again the same: the full context of a stream is somewhere among them.

    A frame is a token. No window is so short but the last of a clip, and one whose next text is long.
    """
    config, lengths = DataConfig(max_seq_len=400, summaries=1.0, dst=False), []
    for number in range(30):
        clip = read(raw_clip([], 0, 2000, id=f"clip{number}", inferred_goal="Build"))
        layout = lay_out(clip, config, 0.0, 0, 0)
        windows = plan_windows(clip, layout, plain, config, 1, seed=3)
        assert windows == plan_windows(clip, layout, plain, config, 1, seed=3)
        assert [window.first for window in windows[1:]] == [window.end for window in windows[:-1]]
        lengths += [window.num_tokens for window in windows[:-1]]
    assert 239 <= min(lengths) < 245 and 395 < max(lengths) <= 400
    assert np.mean(lengths) == pytest.approx(320, abs=4 * 46 / len(lengths) ** 0.5)  # 46: deviation of 240..400
    long = read(raw_clip([("assistant", "x" * 200, 300, 300)], 0, 900))  # a text that needs a window of its own
    for seed in range(10):
        windows = plan_windows(long, lay_out(long, config, 0.0, 0, 0), plain, config, 1, seed)
        assert windows[-1].end == 901 and all(window.num_tokens <= 400 for window in windows)


def test_a_share_of_the_clips_is_summarized(plain):
    config = DataConfig(summaries=0.3)
    clips = [read(raw_clip([], 0, 400, id=f"clip{number}")) for number in range(500)]
    drawn = [is_summarized(clip, config, seed=0) for clip in clips]
    assert sum(drawn) == pytest.approx(150, abs=31)  # three standard deviations
    assert drawn == [is_summarized(clip, config, seed=0) for clip in clips]
    assert drawn != [is_summarized(clip, config, seed=1) for clip in clips]
    assert not any(is_summarized(clip, DataConfig(), 0) for clip in clips)
    everyone = DataConfig(summaries=1.0)
    assert all(is_summarized(clip, everyone, 0) for clip in clips)
    assert not is_summarized(clips[0], replace(everyone, long_clips="truncate"), 0)
    nothing = read(raw_clip([("assistant", "Hi.", 2, 2)], 0, 400, steps=0))  # says nothing of what has been done
    assert not can_be_summarized(nothing) and not is_summarized(nothing, everyone, 0)
    assert len(samples_of(nothing, plain, max_seq_len=200, summaries=1.0)) > 1


@pytest.mark.parametrize("silence_lm", [False, True])
def test_windows_of_random_clips_fit_and_cover_every_frame_once(tokenizer_dir, silence_lm):
    tokenizer, summarized = Tokenizer(tokenizer_dir, "chatml"), 0
    for seed in range(25):
        clip = random_clip(np.random.default_rng(seed), f"clip{seed}", 240)
        samples = samples_of(
            clip, tokenizer, rate=1.0, max_seq_len=310, summaries=1.0, silence_lm=silence_lm, text_at="drawn"
        )  # which checks that each is as long as planned
        assert max(len(sample.input_ids) for sample in samples) <= 310
        if is_summarized(clip, DataConfig(summaries=1.0), 0):
            summarized += len(samples) > 1
            assert np.concatenate([sample.frames for sample in samples]).tolist() == list(
                range(clip.start_frame, clip.end_frame + 1)
            )
            for sample, following in zip(samples, samples[1:]):
                told = following.formatted.text.partition("So far: ")[2].partition("<|im_end|>")[0]
                end = "<|im_end|>\n<|im_end|>" if silence_lm else "<|im_end|>\n"
                assert sample.formatted.text.endswith(f"<|im_start|>assistant\n{told}{end}")
    assert summarized > 10


# ---- a stream starts again in their shape --------------------------------------------------------


@pytest.mark.parametrize("template, dst", [
    ("plain", True), ("chatml", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in
                                          (("plain", False), ("chatml", True), ("llama3", True), ("llama3", False))),
])  # fmt: skip
def test_a_refreshed_context_is_a_training_window(tokenizer_dir, monkeypatch, template, dst):
    """Token by token: the context at the request and the answer, and the one that begins with the summary."""
    tokenizer, draw = Tokenizer(tokenizer_dir, template), np.random.default_rng(7)
    model, frames = random_model(tokenizer, 3, dst=dst), 580
    turns = [
        ("assistant", "Now the second.", 90, 92),
        ("user", "What now?", 200, 200),
        ("assistant", "Wait.", 201, 201),
    ]
    turns += [update("S1", "start", 20), update("S1", "complete", 92), update("S2", "start", 210)]
    clip = read(raw_clip(turns, 0, frames - 1, inferred_knowledge="First one, then two."))
    embeddings = rows_of(draw, frames)
    strategy = "summarize_with_dst" if dst else "summarize_and_drop"
    data = dict(max_seq_len=430, summaries=1.0, text_at="last", dst=dst)
    config = stream_config(strategy=strategy, reserved=140, max_summary_tokens=60, data=data)
    layout = lay_out(clip, config.data, 1.0, 0, 0)
    tape, asked = Tape(model), []

    def reference_turn(sessions, role, limit):  # what a model that has learned them would write
        [session] = sessions
        asked.append(tape.ids(session))
        text = tokenizer.template.gap + reference_summary(clip, session.frame_idx)
        assert limit == 60
        return [Generated(ids=list(text.encode()), cut=None)]

    monkeypatch.setattr(stream, "generate", reference_turn)
    session, begun = StreamSession(model, tokenizer, clip, config), 0
    for frame in range(frames):
        event = feed_forced(session, layout, frame, embeddings[frame]).context_event
        if event is None:
            continue
        window = Window(begun, begun, frame, 0, summarized=True)
        ids = make_sample(clip, layout, window, embeddings, tokenizer, config.data).input_ids.tolist()
        answer = (
            session.headers["assistant"] + list((tokenizer.template.gap + event.summary).encode()) + session.end_ids
        )
        assert ids == asked[-1] + answer
        begun = frame
        window = Window(begun, begun, frame + 1, 0, summarized=True)
        sample = make_sample(clip, layout, window, embeddings, tokenizer, config.data)
        held = tape.ids(session)
        assert sample.input_ids[: len(held)].tolist() == held
    assert len(asked) >= 3


@pytest.mark.parametrize("data, taught", [
    (dict(), {"none", "slide"}),
    (dict(dst=False), {"none", "slide", "drop_all"}),
    (dict(summaries=0.5), {"none", "slide", "summarize_with_dst"}),
    (dict(summaries=1.0), {"none", "summarize_with_dst"}),
    (dict(summaries=1.0, dst=False), {"none", "drop_all", "summarize_and_drop", "summarize_with_dst"}),
])  # fmt: skip
def test_a_strategy_that_training_never_showed_is_reported(data, taught):
    config = Config()
    config.data = replace(config.data, **data)
    for strategy in ("none", "slide", "drop_all", "drop_middle", "summarize_and_drop", "summarize_with_dst"):
        config.infer.strategy = strategy
        lines = untaught_strategy(config)
        assert len(lines) == (strategy not in taught) and all(strategy in line for line in lines)
