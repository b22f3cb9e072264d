"""Sequences and labels against tables written by hand, and windows against the clip that was not cut.

A table lists what the model sees, row by row. `user` (and the prompt) is never learned; `speech` and `update` are
learned token by token, end token included; a `frame` has its two decision labels. Ids are UTF-8 bytes (see conftest),
so a table says exactly which token carries which label.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BEGIN,
    END_HEADER,
    EOS,
    EOT,
    IM_END,
    IM_START,
    IMAGE,
    PAD,
    START_HEADER,
    SYSTEM,
    frame_rows,
    raw_clip,
    read,
    sample_of,
    samples_of,
)

from prospect import sequence
from prospect.build import load_corpus
from prospect.clip_files import ClipFile
from prospect.config import Config, DataConfig, HybridConfig, ModelSection
from prospect.data import Corpus, collate, contents, epoch_batches, ordered_batches, padding_share
from prospect.errors import ProspectError
from prospect.sequence import (
    LABEL_KEYS,
    LATE,
    Window,
    format_conversation_with_ranges,
    kept_frames,
    lay_out,
    overlap_start,
    plan_windows,
)
from prospect.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
REAL_CLIP = ROOT.parent / "shared" / "data" / "assembly101_clip.json"
NO = -100


def update(*pairs: str) -> list[dict]:
    return [dict(zip(("id", "transition"), pair.split(), strict=True)) for pair in pairs]


def check(sample, rows: list[tuple]) -> None:
    """Compare a sample of the plain template with its table, token by token and label by label."""
    ids, speaking_gen, speaking, dst_gen, dst = [], [], [], [], []
    for kind, *what in rows:
        decisions = (NO, NO)
        if kind == "frame":
            tokens, decisions = [IMAGE], tuple(what)
        else:  # a turn with its end token
            tokens = [*what[0].encode(), EOS]
        ids += tokens
        speaking_gen += tokens if kind == "speech" else [NO] * len(tokens)
        dst_gen += tokens if kind == "update" else [NO] * len(tokens)
        speaking += [decisions[0]] * len(tokens)
        dst += [decisions[1]] * len(tokens)
    assert sample.input_ids.tolist() == ids
    assert sample.labels["speaking_gen_labels"].tolist() == speaking_gen
    assert sample.labels["speaking_labels"].tolist() == speaking
    assert sample.labels["dst_gen_labels"].tolist() == dst_gen
    assert sample.labels["dst_update_labels"].tolist() == dst


def decisions(sample, key: str, per_frame: int = 1) -> dict[int, int]:
    """The labels of a head by frame, read at the last of each frame's <image> tokens; nothing may stand elsewhere."""
    at = np.flatnonzero(sample.input_ids == IMAGE)[per_frame - 1 :: per_frame]
    labels = sample.labels[key]
    assert (np.delete(labels, at) == NO).all()
    frames = sample.image_embeds[per_frame - 1 :: per_frame, 0].astype(int)
    assert len(set(frames.tolist())) == len(frames)
    return dict(zip(frames.tolist(), labels[at].tolist(), strict=True))


def learned(sample, key: str) -> list[str]:
    """What a generation loss learns, as text: one entry for each unbroken run of labels."""
    labels = sample.labels[key]
    runs = np.split(labels, np.flatnonzero(np.diff((labels != NO).astype(int))) + 1)
    names = {EOS: "<eos>", IM_END: "<|im_end|>", IM_START: "<|im_start|>", EOT: "<|eot_id|>",
             START_HEADER: "<|start_header_id|>", END_HEADER: "<|end_header_id|>"}  # fmt: skip
    return [
        b"".join(names[t].encode() if t in names else bytes([t]) for t in run).decode() for run in runs if run[0] != NO
    ]


def places_of(clip, epoch: int, seed: int = 0, window: Window | None = None, **config) -> dict[str, int]:
    """The frame behind which each reply and update stands in an epoch, by its text; window: by default all frames."""
    window = window or Window(0, 0, clip.num_frames, 0)
    layout = lay_out(clip, DataConfig(**config), 0.0, seed, epoch, window)
    return {said.text: int(layout.frames[said.at]) for said in layout.said if said.role != "user"}


def epoch_with(clip, wanted: dict[str, int]) -> int:
    """The first epoch in which these texts stand behind these frames."""
    return next(epoch for epoch in range(1000) if wanted.items() <= places_of(clip, epoch).items())


PROMPT = f"System: {SYSTEM}\nS1 one [not_started]\nS2 two [not_started]"

# ---- the ruler -----------------------------------------------------------------------------------

RULER = [
    ("DST_UPDATE", update("S1 start"), 193, 195),
    ("user", "I want to…", 193, 195),
    ("assistant", "Great! …", 193, 195),
]


def test_the_ruler(plain):
    clip = read(raw_clip(RULER, 193, 197, inferred_goal="Assembling a Toy Roller"))
    prompt = f"System: {SYSTEM}\nTask: Assembling a Toy Roller\nS1 one [not_started]\nS2 two [not_started]"
    table = [
        ("user", prompt),
        ("frame", 0, 0),
        ("frame", 0, 0),
        ("user", "User: I want to…"),
        ("frame", 1, 1),
        ("update", "[DST_UPDATE] S1->start"),
        ("speech", "Assistant: Great! …"),
    ]
    sample = sample_of(clip, plain, rate=1.0)
    check(sample, [*table, ("frame", 0, 0), ("frame", 0, 0)])
    assert sample.frames.tolist() == [193, 194, 195, 196, 197]
    assert sample.image_embeds[:, 0].tolist() == [193, 194, 195, 196, 197]
    assert sample.clip_id == "clip"
    check(sample_of(clip, plain, rate=0.0), [*table, ("frame", NO, NO), ("frame", NO, NO)])


def test_the_ruler_unasked(plain):
    """Without the user's text the turn may be said from its middle on; what is said early leaves silence behind it."""
    clip = read(raw_clip([RULER[0], RULER[2]], 193, 196))
    said = [("update", "[DST_UPDATE] S1->start"), ("speech", "Assistant: Great! …")]
    silent, now = ("frame", 0, 0), ("frame", 1, 1)
    early = [("user", PROMPT), silent, now, *said, silent, silent]
    late = [("user", PROMPT), silent, now, now, *said, silent]
    check(sample_of(clip, plain, rate=1.0, epoch=epoch_with(clip, {"Great! …": 194})), early)
    check(sample_of(clip, plain, rate=1.0, epoch=epoch_with(clip, {"Great! …": 195})), late)
    check(sample_of(clip, plain, rate=1.0, text_at="last"), [*late[:2], silent, *late[3:]])
    check(sample_of(clip, plain, rate=1.0, text_at="range"), [late[0], now, *late[2:]])


def test_the_ruler_from_times_alone(plain):
    raw = raw_clip(RULER, 193, 197)
    for turn in raw["conversation"]:
        del turn["start_frame"], turn["end_frame"]
        turn["time"] = 97.2
    with_frames = sample_of(read(raw_clip(RULER, 193, 197)), plain, rate=1.0)
    with_times = sample_of(read(raw), plain, rate=1.0)
    assert with_times.input_ids.tolist() == with_frames.input_ids.tolist()
    assert decisions(with_times, "speaking_labels") == {193: 0, 194: 0, 195: 1, 196: 0, 197: 0}


def test_the_ruler_in_chatml(chatml):
    """The line break behind a turn is not learned, and the state update and the reply are two turns."""
    clip = read(raw_clip(RULER, 193, 196))
    speech = [IM_START, *"assistant\nGreat! …".encode(), IM_END]
    text = [IM_START, *b"DST_UPDATE\nS1->start", IM_END]
    sample = sample_of(clip, chatml, rate=1.0)
    before = [IM_START, *f"system\n{PROMPT.removeprefix('System: ')}".encode(), IM_END, 10, IMAGE, IMAGE]
    before += [IM_START, *"user\nI want to…".encode(), IM_END, 10, IMAGE]
    assert sample.input_ids.tolist() == [*before, *text, 10, *speech, 10, IMAGE]
    head = [NO] * len(before)
    assert sample.labels["dst_gen_labels"].tolist() == [*head, *text, NO, *[NO] * len(speech), NO, NO]
    assert sample.labels["speaking_gen_labels"].tolist() == [*head, *[NO] * len(text), NO, *speech, NO, NO]
    assert decisions(sample, "speaking_labels") == {193: 0, 194: 0, 195: 1, 196: 0}
    assert decisions(sample, "dst_update_labels") == {193: 0, 194: 0, 195: 1, 196: 0}


def test_the_ruler_in_llama3(llama3):
    clip = read(raw_clip(RULER[2:], 193, 196))
    sample = sample_of(clip, llama3)
    speech = [START_HEADER, *b"assistant", END_HEADER, *"\n\nGreat! …".encode(), EOT]
    system = f"\n\n{PROMPT.removeprefix('System: ')}"
    before = [BEGIN, START_HEADER, *b"system", END_HEADER, *system.encode(), EOT, IMAGE, IMAGE, IMAGE]
    assert sample.input_ids.tolist() == [*before, *speech, IMAGE]
    assert sample.labels["speaking_gen_labels"].tolist() == [*[NO] * len(before), *speech, NO]


def test_characters_of_the_ranges(plain):
    """The drawing in format_conversation_with_ranges, with its prompt of 120 characters in front."""
    clip = read(raw_clip([("assistant", "Hi.", 5, 5)], 5, 7, steps=0))
    layout = lay_out(clip, DataConfig(), 0.0, 0, 0)
    [window] = plan_windows(clip, layout, plain, DataConfig(), 1)
    formatted = format_conversation_with_ranges("x" * 107, layout, window, plain)
    assert formatted.text == f"System: {'x' * 107}<eos><image>Assistant: Hi.<eos><image><image>"
    assert (formatted.frame_ends - 120).tolist() == [7, 33, 40]
    assert (formatted.speaking_ranges - 120).tolist() == [[7, 26]]
    assert formatted.dst_ranges.tolist() == []
    assert "".join(piece.text * piece.repeat for piece in formatted.pieces) == formatted.text


# ---- which frames are decided how ----------------------------------------------------------------


def labels_of(turns: list[tuple], end: int = 20, **config) -> tuple[list[int], list[int]]:
    """Decision labels of the frames 10..end with every silent frame sampled and each text behind its last frame."""
    layout = lay_out(read(raw_clip(turns, 10, end)), DataConfig(**config), 1.0, 0, 0)
    return layout.speaking.tolist(), layout.dst.tolist()


def test_shared_frames():
    """The update may not stand before the reply, which is due earlier, so it waits for frame 14."""
    #                        10 11 12 13 14 15 16
    turns = [("assistant", "Hi", 11, 13), ("DST_UPDATE", "S1->start", 11, 15)]
    assert labels_of(turns, 16) == ([0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0])
    assert labels_of(turns, 16, text_at="last") == ([0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0])
    assert labels_of(turns, 16, text_at="range") == ([0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0])


def test_touching_ranges():
    #                        10 11 12 13 14 15 16 17
    turns = [("assistant", "A", 10, 12), ("assistant", "B", 12, 14), ("assistant", "C", 15, 17)]
    assert labels_of(turns, 17)[0] == [0, 1, 1, 1, 1, 0, 1, 1]
    assert labels_of(turns, 17, text_at="last")[0] == [0, 0, 1, 0, 1, 0, 0, 1]
    assert labels_of(turns, 17, text_at="range")[0] == [1] * 8


def test_nested_ranges():
    #                        10 11 12 13 14 15 16
    turns = [("assistant", "Long", 10, 16), ("DST_UPDATE", "S1->start", 13, 14)]  # its middle is 14
    assert labels_of(turns, 16) == ([0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0])


def test_turns_that_end_together_begin_together():
    """They are said together, so neither head may fire before both may: from 14, the middle of the shorter, on."""
    #                        10 11 12 13 14 15
    turns = [("assistant", "Hi", 10, 15), ("DST_UPDATE", "S1->start", 13, 15)]
    assert labels_of(turns, 15) == ([0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1])
    turns.append(("user", "Done!", 15, 15))
    assert labels_of(turns, 15) == ([0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1])


def test_end_frame_is_inclusive_and_so_is_the_clip():
    assert labels_of([("assistant", "Hi", 13, 13)], 14) == ([0, 0, 0, 1, 0], [0, 0, 0, 0, 0])
    assert labels_of([("assistant", "Hi", 10, 10)], 11) == ([1, 0], [0, 0])
    assert labels_of([("assistant", "Hi", 10, 11)], 11) == ([0, 1], [0, 0])  # of two middle frames the later
    assert labels_of([("assistant", "Hi", 10, 13)], 13) == ([0, 0, 1, 1], [0, 0, 0, 0])


@pytest.mark.parametrize(
    "user, speaking, from_the_start",  # the assistant's turn is 12..15, its middle 14
    [
        ((12, 15), [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0]),
        ((11, 14), [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0]),
        ((11, 13), [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0]),
        ((10, 12), [0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0]),
        ((10, 11), [0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0]),  # heard before the range begins
        ((12, 16), [0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0]),  # heard behind the reply, which cannot answer it
    ],
)
def test_a_user_turn_inside_the_range(user, speaking, from_the_start):
    turns = [("user", "Now?", *user), ("assistant", "Hi", 12, 15)]
    assert labels_of(turns, 16) == (speaking, [0, 0, 0, 0, 0, 0, 0])
    assert labels_of(turns, 16, text_at="range") == (from_the_start, [0, 0, 0, 0, 0, 0, 0])


def test_two_user_turns_inside_the_range():
    turns = [("user", "Well?", 13, 15), ("user", "Now?", 12, 13), ("assistant", "Hi", 12, 16)]
    assert labels_of(turns, 16)[0] == [0, 0, 0, 0, 0, 1, 1]


def test_a_user_turn_alone_is_silence_for_both_heads():
    assert labels_of([("user", "Hm.", 11, 12)], 13) == ([0, 0, 0, 0], [0, 0, 0, 0])


def test_without_task_state():
    turns = [("DST_UPDATE", "S1->start", 11, 12), ("assistant", "Hi", 14, 14)]
    assert labels_of(turns, 15, dst=False) == ([0, 0, 0, 0, 1, 0], [NO] * 6)


def test_without_task_state_no_word_of_it_is_seen(plain):
    clip = read(raw_clip([("DST_UPDATE", "S1->start", 11, 12), ("assistant", "Hi", 12, 12)], 11, 13))
    table = [
        ("user", f"System: {SYSTEM}"),
        ("frame", 0, NO),
        ("frame", 1, NO),
        ("speech", "Assistant: Hi"),
        ("frame", 0, NO),
    ]
    check(sample_of(clip, plain, rate=1.0, dst=False), table)


# ---- where a text stands -------------------------------------------------------------------------


def all_places(clip, text: str, epochs: int = 300, **options) -> Counter:
    """How often a text stands behind which frame."""
    return Counter(places_of(clip, epoch, **options)[text] for epoch in range(epochs))


def test_a_text_stands_anywhere_from_the_middle_on_and_mostly_at_the_end():
    clip = read(raw_clip([("assistant", "Hi", 10, 16)], 5, 20))
    counts = all_places(clip, "Hi", 2000)
    assert set(counts) == {13, 14, 15, 16}
    assert LATE == 0.75 and abs(counts[16] / 2000 - 0.75) < 0.03
    assert all(abs(counts[frame] / 2000 - 0.25 / 3) < 0.02 for frame in (13, 14, 15))  # the others evenly
    for text_at in ("last", "range"):
        assert set(all_places(clip, "Hi", text_at=text_at)) == {16}


@pytest.mark.parametrize(
    "turns, expected",
    [
        ([("assistant", "Hi", 10, 10)], {10}),
        ([("assistant", "Hi", 10, 11)], {11}),
        ([("assistant", "Hi", 10, 12)], {11, 12}),
        ([("assistant", "Hi", 10, 13)], {12, 13}),
        ([("user", "Well?", 12, 14), ("assistant", "Hi", 10, 15)], {14, 15}),  # behind the question
        ([("user", "Well?", 13, 15), ("assistant", "Hi", 10, 15)], {15}),
        ([("user", "Well?", 8, 9), ("assistant", "Hi", 10, 13)], {12, 13}),
        ([("assistant", "A", 10, 13), ("assistant", "Hi", 11, 16)], {14, 15, 16}),
        ([("assistant", "A", 10, 14), ("assistant", "Hi", 11, 16)], {15, 16}),  # behind all of the turn before
        ([("DST_UPDATE", "S1->start", 10, 15), ("assistant", "Hi", 11, 16)], {16}),
        ([("assistant", "Hi", 10, 16), ("assistant", "Z", 11, 17)], {13, 14, 15, 16}),  # what comes later is no matter
        ([("assistant", "Hi", 10, 16), ("DST_UPDATE", "S1->start", 15, 16)], {16}),
    ],
)
def test_behind_which_frames_a_text_may_stand(turns, expected):
    assert set(all_places(read(raw_clip(turns, 5, 20)), "Hi", 200)) == expected


def test_what_ends_together_stands_together():
    turns = [("DST_UPDATE", "S1->start", 10, 16), ("assistant", "Hi", 10, 16), ("assistant", "Next.", 12, 16)]
    clip = read(raw_clip([*turns, ("DST_UPDATE", "S2->start", 14, 18), ("assistant", "Ok", 14, 18)], 5, 20))
    draws = [places_of(clip, epoch) for epoch in range(200)]
    assert all(set(places) == {"S1->start", "Hi Next.", "S2->start", "Ok"} for places in draws)
    assert {(places["S1->start"], places["Hi Next."]) for places in draws} == {(14, 14), (15, 15), (16, 16)}
    assert {(places["S2->start"], places["Ok"]) for places in draws} == {(17, 17), (18, 18)}


def test_a_text_after_which_the_range_is_silent():
    #                                        10 11 12 13 14 15 16 17
    turns = [("assistant", "Hi", 10, 16), ("DST_UPDATE", "S1->start", 16, 17)]  # the update may stand behind 17 alone
    clip = read(raw_clip(turns, 10, 17))
    for at, speaking in {
        13: [0, 0, 0, 1, 0, 0, 0, 0],
        15: [0, 0, 0, 1, 1, 1, 0, 0],
        16: [0, 0, 0, 1, 1, 1, 1, 0],
    }.items():
        layout = lay_out(clip, DataConfig(), 0.0, 0, epoch_with(clip, {"Hi": at}), Window(0, 0, 8, 0))
        assert layout.speaking.tolist() == speaking
        assert layout.dst.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


def test_places_depend_on_seed_epoch_clip_and_turn_and_on_nothing_else():
    turns = [("assistant", "A", 10, 16), ("assistant", "B", 20, 26)]
    clip, other = (read(raw_clip(turns, 5, 30, id=name)) for name in ("one", "other"))
    draws = [places_of(clip, epoch) for epoch in range(200)]
    np.random.seed(1)
    assert draws == [places_of(clip, epoch) for epoch in range(200)]
    assert draws != [places_of(clip, epoch, seed=1) for epoch in range(200)]
    assert draws != [places_of(other, epoch) for epoch in range(200)]
    late = {(places["A"] == 16, places["B"] == 26) for places in draws}
    assert late == {(True, True), (True, False), (False, True), (False, False)}  # each turn has a draw of its own
    shorter = read(raw_clip([("assistant", "A", 16, 16), turns[1]], 5, 30, id="one"))  # B's is as it was
    assert [places["B"] for places in draws] == [places_of(shorter, epoch)["B"] for epoch in range(200)]


def test_planning_draws_nothing():
    clip = read(raw_clip([("assistant", "Hi", 10, 16)], 5, 20))
    for epoch in range(50):
        assert [said.at for said in lay_out(clip, DataConfig(), 0.5, 0, epoch).said] == [16 - 5]


def test_a_text_stands_behind_a_frame_that_is_shown(plain):
    """Of the range 10..18 the sampling keeps 18, where the text is planned, and two others."""
    clip = read(raw_clip([("assistant", "Hi", 10, 18)], 5, 30))
    options = {"frames": "hybrid", "hybrid": HybridConfig(regular_interval=1000, random_share=0, max_frames_per_clip=4)}
    choices = Counter()
    for seed in range(12):
        shown = kept_frames(clip, DataConfig(**options), seed).tolist()
        expected = {frame for frame in shown if 14 <= frame <= 18}
        samples = [sample_of(clip, plain, seed=seed, epoch=epoch, **options) for epoch in range(60)]
        assert all(learned(sample, "speaking_gen_labels") == ["Assistant: Hi<eos>"] for sample in samples)
        assert all(sample.frames.tolist() == shown for sample in samples)
        assert set(all_places(clip, "Hi", 60, seed=seed, window=Window(0, 0, len(shown), 0), **options)) == expected
        choices[len(expected)] += 1
    assert set(choices) >= {1, 2, 3}


# ---- the order of texts --------------------------------------------------------------------------


def test_turns_at_one_frame(plain):
    """User, update, assistant, whatever the file's order; updates are one text and so are replies."""
    turns = [
        ("assistant", "Good.", 10, 11),
        ("DST_UPDATE", "S1->start", 10, 11),
        ("user", "Done!", 11, 11),
        ("DST_UPDATE", update("S1 complete", "S2 start"), 11, 11),
        ("user", "And?", 10, 11),
        ("assistant", "Next.", 11, 11),
    ]
    table = [
        ("user", PROMPT),
        ("frame", 0, 0),
        ("user", "User: Done!"),
        ("user", "User: And?"),
        ("frame", 1, 1),
        ("update", "[DST_UPDATE] S1->start, S1->complete, S2->start"),
        ("speech", "Assistant: Good. Next."),
        ("frame", NO, NO),
    ]
    check(sample_of(read(raw_clip(turns, 10, 12)), plain), table)


def test_a_reply_at_one_frame_and_a_user_at_the_next(plain):
    turns = [("user", "A?", 11, 11), ("assistant", "B.", 10, 10)]
    table = [("user", PROMPT), ("frame", 1, 0), ("speech", "Assistant: B."), ("user", "User: A?"), ("frame", NO, NO)]
    check(sample_of(read(raw_clip(turns, 10, 11)), plain), table)


def test_json_updates(plain):
    turns = [("DST_UPDATE", "S1->start", 10, 10), ("DST_UPDATE", "S2->start", 10, 10)]
    table = [
        ("user", PROMPT),
        ("frame", 0, 1),
        ("update", '[DST_UPDATE] [{"id": "S1", "transition": "start"}, {"id": "S2", "transition": "start"}]'),
    ]
    check(sample_of(read(raw_clip(turns, 10, 10)), plain, dst_format="json"), table)


def test_the_prompt_in_full(plain):
    raw = raw_clip(
        [("system", "Be kind.", 0, 1), ("system", "Be brief.", 0, 1), ("DST_UPDATE", "S2->complete", 9, 9)],
        9,
        9,
        inferred_goal="A goal",
        inferred_knowledge="1. Do one.",
    )
    raw["conversation"][2]["dst_state"] = {"S1": "completed", "S2": "in_progress"}
    state = "S1 one [completed]\nS2 two [in_progress]"
    end = [("frame", 0, 1), ("update", "[DST_UPDATE] S2->complete")]
    check(sample_of(read(raw), plain), [("user", f"System: Be kind.\nBe brief.\nTask: A goal\n{state}"), *end])
    with_recipe = [("user", f"System: Be kind.\nBe brief.\nTask: A goal\n{state}\n1. Do one."), *end]
    check(sample_of(read(raw), plain, recipe=True), with_recipe)


# ---- characters and tokens -----------------------------------------------------------------------

STRANGE = ["é", "漢字", "🙂", "e\u0301", "👩🏽‍🔧", "ﷺ", "\u200b", "ÅÅ"]


@pytest.mark.parametrize("edge", STRANGE)
def test_multi_byte_text_at_every_boundary(plain, edge):
    text = f"{edge} a {edge}"
    turns = [
        ("system", text, 0, 1),
        ("user", text, 10, 11),
        ("DST_UPDATE", [{"id": edge, "transition": "start"}], 10, 11),
        ("assistant", text, 10, 11),
        ("assistant", edge, 12, 12),
        ("user", edge, 13, 13),
    ]
    raw = raw_clip(turns, 10, 13, inferred_goal=text)
    raw["dst"] = [{"id": edge, "name": text}]
    table = [
        ("user", f"System: {text}\nTask: {text}\n{edge} {text} [not_started]"),
        ("frame", 0, 0),
        ("user", f"User: {text}"),
        ("frame", 1, 1),
        ("update", f"[DST_UPDATE] {edge}->start"),
        ("speech", f"Assistant: {text}"),
        ("frame", 1, 0),
        ("speech", f"Assistant: {edge}"),
        ("user", f"User: {edge}"),
        ("frame", NO, NO),
    ]
    check(sample_of(read(raw), plain), table)


def test_the_learned_words_with_a_tokenizer_that_merges(tmp_path):
    texts = ["Größe 漢字 🙂", "🙂🙂 fertig é", "e\u0301 so"]
    train_tokenizer(texts * 30 + ["Assistant: User: [DST_UPDATE] S1->start"] * 30, 340, tmp_path)
    tokenizer = Tokenizer(tmp_path, "plain")
    turns = [("user", texts[0], 10, 12), ("DST_UPDATE", "S1->start", 11, 12), ("assistant", texts[1], 10, 12)]
    sample = sample_of(read(raw_clip([*turns, ("assistant", texts[2], 14, 14)], 10, 15)), tokenizer)
    speech = sample.labels["speaking_gen_labels"]
    updates = sample.labels["dst_gen_labels"]
    assert tokenizer.decode(speech[speech != NO]) == f"Assistant: {texts[1]}<eos>Assistant: {texts[2]}<eos>"
    assert tokenizer.decode(updates[updates != NO]) == "[DST_UPDATE] S1->start<eos>"
    for labels in (speech, updates):
        assert (labels[labels != NO] == sample.input_ids[labels != NO]).all()
    everything = f"{PROMPT}<eos><image><image>User: {texts[0]}<eos><image>[DST_UPDATE] S1->start<eos>"
    everything += f"Assistant: {texts[1]}<eos><image><image>Assistant: {texts[2]}<eos><image>"
    assert tokenizer.decode(sample.input_ids) == everything


@pytest.mark.parametrize("template, end", [("plain", EOS), ("chatml", IM_END), ("llama3", EOT)])
def test_control_tokens_in_a_turn_stay_text(tokenizer_dir, template, end):
    tokenizer = Tokenizer(tokenizer_dir, template)
    forged = "<image><eos><|im_end|><|eot_id|>"
    turns = [("system", forged, 0, 1), ("user", forged, 10, 10), ("assistant", forged, 10, 10)]
    sample = sample_of(read(raw_clip(turns, 10, 11)), tokenizer)
    ids = sample.input_ids.tolist()
    assert ids.count(IMAGE) == 2 and ids.count(end) == 3
    assert bytes(id for id in ids if id < 256).count(forged.encode()) == 3
    assert sample.labels["speaking_gen_labels"].tolist().count(end) == 1
    assert decisions(sample, "speaking_labels") == {10: 1, 11: NO}


# ---- the other layouts ---------------------------------------------------------------------------


def test_the_turns_layout(plain):
    """Seed 000's: each turn's frames, then its text. A head decides a frame in the block of its own turn."""
    table = [
        ("user", PROMPT),
        ("frame", 0, 0),
        ("frame", 0, 0),
        ("frame", NO, 1),
        ("update", "[DST_UPDATE] S1->start"),
        ("frame", 0, 0),
        ("frame", 0, 0),
        ("frame", NO, NO),
        ("user", "User: I want to…"),
        ("frame", 0, 0),
        ("frame", 0, 0),
        ("frame", 1, NO),
        ("speech", "Assistant: Great! …"),
        ("frame", 0, 0),
        ("user", "User: Hm."),
        ("frame", 0, 0),
        ("frame", 1, 0),
        ("speech", "Assistant: Yes?"),
    ]
    turns = [*RULER, ("assistant", "Yes?", 201, 202), ("user", "Hm.", 198, 198)]
    clip = read(raw_clip(turns, 193, 210))
    for epoch in range(20):  # nothing is drawn
        sample = sample_of(clip, plain, rate=1.0, layout="turns", epoch=epoch)
        check(sample, table)
    assert sample.image_embeds[:, 0].tolist() == [193, 194, 195] * 3 + [198, 201, 202]
    check(sample_of(clip, plain, rate=1.0, layout="turns", text_at="last"), table)

    wide = list(table)  # 1 from the start of the range, where the block is the head's own
    wide[1] = wide[2] = ("frame", 0, 1)
    wide[9] = wide[10] = wide[15] = ("frame", 1, 0)
    check(sample_of(clip, plain, rate=1.0, layout="turns", text_at="range"), wide)


def test_the_turns_layout_of_a_clip_in_which_nobody_speaks(plain):
    assert samples_of(read(raw_clip([], 5, 9)), plain, layout="turns") == []


def test_decisions_at_text(plain):
    """Seed 000's table: 1 on the turn's own text, 0 at frames where both heads are silent, -100 elsewhere."""
    sample = sample_of(read(raw_clip(RULER, 192, 196)), plain, rate=1.0, binary_at="text")
    pieces = [
        [*PROMPT.encode(), EOS],
        [IMAGE, IMAGE, IMAGE],  # frame 192, a negative, and two at which the turn may not be said yet
        [*"User: I want to…".encode(), EOS],
        [IMAGE],
        [*b"[DST_UPDATE] S1->start", EOS],
        [*"Assistant: Great! …".encode(), EOS],
        [IMAGE],  # frame 196, a negative
    ]
    assert sample.input_ids.tolist() == sum(pieces, [])
    expected = {"speaking_labels": [NO, 0, NO, NO, NO, 1, 0], "dst_update_labels": [NO, 0, NO, NO, 1, NO, 0]}
    for key, values in expected.items():
        table = [value for piece, value in zip(pieces, values, strict=True) for _ in piece]
        assert sample.labels[key].tolist() == table


def test_decisions_at_a_text_that_stands_early(plain):
    clip = read(raw_clip([("assistant", "Hi", 11, 13)], 10, 14))
    sample = sample_of(clip, plain, rate=0.0, binary_at="text", epoch=epoch_with(clip, {"Hi": 12}))
    prompt, said = [*PROMPT.encode(), EOS], [*b"Assistant: Hi", EOS]
    assert sample.input_ids.tolist() == [*prompt, IMAGE, IMAGE, IMAGE, *said, IMAGE, IMAGE]
    #                                                       10  11  12                13  14
    speaking = [*[NO] * len(prompt), NO, 0, NO, *[1] * len(said), 0, NO]
    assert sample.labels["speaking_labels"].tolist() == speaking
    assert sample.labels["dst_update_labels"].tolist() == [0 if label == 0 else NO for label in speaking]


def test_only_frames_of_turns_are_shown(plain):
    turns = [("user", "Hi", 12, 13), ("assistant", "Yes", 15, 16), ("DST_UPDATE", "S1->start", 18, 18)]
    sample = sample_of(read(raw_clip(turns, 10, 20)), plain, rate=1.0, frames="turns")
    assert decisions(sample, "speaking_labels") == {12: 0, 13: 0, 15: 0, 16: 1, 18: 0}
    assert decisions(sample, "dst_update_labels") == {12: 0, 13: 0, 15: 0, 16: 0, 18: 1}


def test_hybrid_frames():
    """Window of 1 s at 2 fps: two frames on either side of speech; every 20th frame; no random share."""
    turns = [("user", "Hi", 140, 144), ("assistant", "Yes", 110, 111), ("DST_UPDATE", "S1->start", 170, 172)]
    clip = read(raw_clip(turns, 100, 190))
    config = DataConfig(frames="hybrid", hybrid=HybridConfig(regular_interval=20, random_share=0.0))
    expected = [100, 108, 109, 110, 111, 112, 113, 120, 140, 144, 160, 170, 171, 172, 180]
    assert kept_frames(clip, config, 0).tolist() == expected

    config.hybrid.max_frames_per_clip = 10  # the texts, the update, the speech window; then two of 100, 120, 140, ...
    kept = kept_frames(clip, config, 0).tolist()
    core = [108, 109, 110, 111, 112, 113, 144, 170, 171, 172]
    assert kept == core
    config.hybrid.max_frames_per_clip = 1  # a text's frame is never dropped
    assert kept_frames(clip, config, 0).tolist() == [111, 144, 172]

    config.hybrid = HybridConfig(regular_interval=20, random_share=0.5)
    kept = kept_frames(clip, config, 0)
    assert len(kept) == 15 + 38  # half of the other 76 frames
    assert set(expected) < set(kept.tolist()) and (np.diff(kept) > 0).all()
    assert kept.tolist() == kept_frames(clip, config, 0).tolist()
    assert kept.tolist() != kept_frames(clip, config, 1).tolist()


def test_the_key_frames_of_hybrid_sampling():
    """At 2 fps: a step of frames 110..145, one that began before the clip, at 90, and ends at 104, one beyond the clip,
    and two with one time alone."""
    times = [(55.0, 72.5), (45.0, 52.4), (100.0, 200.0), (60.0, None), (None, 60.0)]
    clip = read(raw_clip([], 100, 190, steps=5))
    clip = replace(clip, steps=tuple(replace(step, start_ts=a, end_ts=b) for step, (a, b) in zip(clip.steps, times)))
    hybrid = HybridConfig(key_frame_interval=12, regular_interval=1000, random_share=0.0)
    config = DataConfig(frames="hybrid", hybrid=hybrid)
    # 100 is the clip's own first; 102 is 90 + 12; 104 an end; 110, 145 the ends of the first step, 122, 134 inside it.
    assert kept_frames(clip, config, 0).tolist() == [100, 102, 104, 110, 122, 134, 145]
    hybrid.max_frames_per_clip = 5  # ends before what lies inside, that before the regular ones
    assert {104, 110, 145} < set(kept_frames(clip, config, 0).tolist()) < {102, 104, 110, 122, 134, 145}
    hybrid.max_frames_per_clip, hybrid.key_frame_interval = 200, 1000
    assert kept_frames(clip, config, 0).tolist() == [100, 104, 110, 145]


def test_hybrid_frames_at_the_edges_of_the_clip(plain):
    turns = [("assistant", "A", 10, 10), ("assistant", "B", 30, 30)]
    config = dict(frames="hybrid", hybrid=HybridConfig(regular_interval=1000, random_share=0.0))
    sample = sample_of(read(raw_clip(turns, 10, 30)), plain, **config)
    assert sample.image_embeds[:, 0].tolist() == [10, 11, 12, 28, 29, 30]
    assert learned(sample, "speaking_gen_labels") == ["Assistant: A<eos>", "Assistant: B<eos>"]


def test_several_vectors_a_frame(plain):
    """I = 5: five <image> tokens a frame, decided at the last, each vector at its own."""
    clip = read(raw_clip([("user", "Hm", 11, 11), ("assistant", "Hi", 11, 11)], 10, 12))
    sample = sample_of(clip, plain, rate=1.0, per_frame=5)
    mute = [("frame", NO, NO)] * 4
    table = [
        ("user", PROMPT),
        *mute,
        ("frame", 0, 0),
        ("user", "User: Hm"),
        *mute,
        ("frame", 1, 0),
        ("speech", "Assistant: Hi"),
        *mute,
        ("frame", 0, 0),
    ]
    check(sample, table)
    rows = [[frame, i] for frame in (10, 11, 12) for i in range(5)]
    assert sample.image_embeds.tolist() == rows
    assert sample.frames.tolist() == [10, 11, 12]


# ---- negatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, count", [(0.0, 0), (0.1, 2), (0.25, 4), (0.5, 8), (0.9, 14), (1.0, 16)])
def test_how_many_negatives(rate, count):
    """20 frames, 4 of them covered: 16 silent ones."""
    clip = read(raw_clip([("assistant", "Hi", 3, 5), ("DST_UPDATE", "S1->start", 5, 6)], 0, 19))
    for epoch in range(3):
        layout = lay_out(clip, DataConfig(), rate, 0, epoch)
        silent = [f for f in range(20) if f not in (3, 4, 5, 6)]
        assert sum(layout.speaking[f] == 0 for f in silent) == count
        assert all(layout.speaking[f] == layout.dst[f] and layout.dst[f] in (0, NO) for f in silent)
        assert layout.speaking[3:7].tolist() == [0, 1, 1, 0]
        assert layout.dst[3:7].tolist() == [0, 0, 0, 1]


def negatives(seed: int, epoch: int, name: str) -> list[int]:
    layout = lay_out(read(raw_clip([], 1000, 1199, id=name)), DataConfig(), 0.5, seed, epoch)
    assert (layout.speaking == layout.dst).all()
    return np.flatnonzero(layout.speaking == 0).tolist()


def test_negatives_depend_on_seed_epoch_and_clip_and_on_nothing_else():
    first = negatives(0, 0, "a")
    np.random.seed(1)
    torch.manual_seed(1)
    assert negatives(0, 0, "a") == first
    others = [negatives(1, 0, "a"), negatives(0, 1, "a"), negatives(0, 0, "b"), negatives(-1, 0, "a")]
    for other in others:
        assert len(other) == 100 and other != first
        assert 30 < len(set(first) & set(other)) < 70  # about half of them by chance


def test_negatives_are_the_same_in_another_process():
    code = "import sys; sys.path.insert(0, 'tests'); from test_data import negatives; print(negatives(3, 4, 'clip é'))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(other.stdout) == negatives(3, 4, "clip é")


def test_silence_as_a_token(plain):
    """The label behind a sampled negative is the end token, whatever token stands there; one closes the sequence."""
    turns = [("user", "Hm", 11, 11), ("assistant", "Hi", 13, 13)]
    sample = sample_of(read(raw_clip(turns, 10, 14)), plain, rate=1.0, silence_lm=True)
    before = [*PROMPT.encode(), EOS]
    speech = [*b"Assistant: Hi", EOS]
    user = [*b"User: Hm", EOS]
    #                                       10      user       11     12     13     speech    14    closes
    assert sample.input_ids.tolist() == [*before, IMAGE, *user, IMAGE, IMAGE, IMAGE, *speech, IMAGE, EOS]
    table = [*[NO] * len(before), NO, EOS, *[NO] * (len(user) - 1), NO, EOS, EOS, *speech, NO, EOS]
    #        prompt               10  behind 10                     11  behind 11, behind 12   14  behind 14
    assert sample.labels["speaking_gen_labels"].tolist() == table
    assert decisions(sample, "speaking_labels") == {10: 0, 11: 0, 12: 0, 13: 1, 14: 0}

    none = sample_of(read(raw_clip(turns, 10, 14)), plain, rate=0.0, silence_lm=True)
    assert none.input_ids.tolist() == sample.input_ids.tolist()
    assert learned(none, "speaking_gen_labels") == ["Assistant: Hi<eos>"]


def test_silence_as_a_token_in_a_range(plain):
    """Before the text may stand, and after it stands, its range is as silent as any other frame."""
    clip = read(raw_clip([("assistant", "Hi", 11, 15)], 10, 16))
    said = [*b"Assistant: Hi", EOS]
    sample = sample_of(clip, plain, rate=1.0, silence_lm=True, epoch=epoch_with(clip, {"Hi": 14}))
    assert decisions(sample, "speaking_labels") == {10: 0, 11: 0, 12: 0, 13: 1, 14: 1, 15: 0, 16: 0}
    #                                                10  11   12   13   14  text   15  16   closes
    labels = sample.labels["speaking_gen_labels"][len(PROMPT) + 1 :].tolist()
    assert labels == [NO, EOS, EOS, EOS, NO, *said, NO, EOS, EOS]


def test_silence_as_a_token_with_updates_and_vectors(plain):
    """A frame with an update is not silent. With I = 2 the end token stands behind the frame's last vector."""
    clip = read(raw_clip([("DST_UPDATE", "S1->start", 11, 11)], 10, 12))
    sample = sample_of(clip, plain, rate=1.0, silence_lm=True, per_frame=2)
    text = [*b"[DST_UPDATE] S1->start", EOS]
    before = [*PROMPT.encode(), EOS]
    assert sample.input_ids.tolist() == [*before, *[IMAGE] * 4, *text, IMAGE, IMAGE, EOS]
    table = [*[NO] * len(before), NO, NO, EOS, NO, *[NO] * len(text), NO, NO, EOS]
    assert sample.labels["speaking_gen_labels"].tolist() == table


# ---- the state head ------------------------------------------------------------------------------


def states_of(clip, **config) -> list[int]:
    return lay_out(clip, DataConfig(**config), 0.0, 0, 0).state.tolist()


def test_state_labels():
    turns = [
        ("DST_UPDATE", "S2->complete", 12, 13),
        ("DST_UPDATE", "S3->start", 14, 15),
        ("DST_UPDATE", "S1->complete", 16, 16),  # not the most recently started one
        ("DST_UPDATE", "S3->complete, S4->start", 18, 18),
    ]
    clip = read(raw_clip(turns, 10, 19, steps=4))
    assert clip.initial_state == {"S1": "in_progress", "S2": "in_progress", "S3": "not_started", "S4": "not_started"}
    #                                                10 11 12 13 14 15 16 17 18 19
    assert states_of(clip) == [1, 1, 1, 2, 2, 1, 1, 1, 1, 1]


def test_state_labels_before_anything_has_begun():
    clip = read(raw_clip([("DST_UPDATE", "S1->start", 11, 12), ("DST_UPDATE", "S1->complete", 14, 14)], 10, 15))
    assert states_of(clip) == [0, 0, 1, 1, 2, 2]
    assert states_of(read(raw_clip([], 10, 12, steps=0))) == [0, 0, 0]
    assert states_of(clip, dst=False) == [NO] * 6


def test_the_state_counts_from_the_text(plain):
    turns = [("DST_UPDATE", "S1->start", 11, 14), ("DST_UPDATE", "S1->complete", 15, 16)]
    clip = read(raw_clip(turns, 10, 17))
    early = sample_of(clip, plain, epoch=epoch_with(clip, {"S1->start": 13}))
    assert list(decisions(early, "dst_state_labels").values()) == [0, 0, 0, 1, 1, 1, 2, 2]
    late = sample_of(clip, plain, epoch=epoch_with(clip, {"S1->start": 14}))
    assert list(decisions(late, "dst_state_labels").values()) == [0, 0, 0, 0, 1, 1, 2, 2]


def test_state_labels_after_a_completed_step(plain):
    raw = raw_clip([("user", "Hi", 10, 10)], 10, 11)
    raw["conversation"][0]["dst_state"] = {"S1": "completed"}
    sample = sample_of(read(raw), plain)
    assert decisions(sample, "dst_state_labels") == {10: 2, 11: 2}


# ---- the windows ---------------------------------------------------------------------------------


def test_windows_by_hand(plain):
    """Ten frames of one token each, in windows with room for five."""
    clip = read(raw_clip([], 100, 109, steps=0))
    prompt = len(f"System: {SYSTEM}") + 1
    parts = samples_of(clip, plain, rate=1.0, max_seq_len=prompt + 5, overlap=0.4)
    shown = [part.image_embeds[:, 0].astype(int).tolist() for part in parts]
    assert shown == [[100, 101, 102, 103, 104], [103, 104, 105, 106, 107], [106, 107, 108, 109]]
    labels = [list(decisions(part, "speaking_labels").values()) for part in parts]
    assert labels == [[0] * 5, [NO, NO, 0, 0, 0], [NO, NO, 0, 0]]
    apart = samples_of(clip, plain, max_seq_len=prompt + 5, overlap=0.0)
    assert [part.frames.tolist() for part in apart] == [list(range(100, 105)), list(range(105, 110))]


def test_how_much_is_repeated():
    """The longest tail of whole units that has at most the share of the window's tokens. Units of 1, 39, 1, 1, 27."""
    until = np.array([0, 1, 40, 41, 42, 69])
    starts = [overlap_start(until, 0, 4, share) for share in (0.0, 0.02, 0.03, 0.05, 0.7, 0.95, 0.98)]
    assert starts == [4, 4, 3, 2, 2, 2, 1]  # of 42 tokens: 0, 0.84, 1.26, 2.1, 29.4, 39.9, 41.16
    assert overlap_start(until, 2, 5, 0.5) == 5  # of 29 tokens the last unit alone has 27
    assert overlap_start(until, 2, 5, 0.94) == 4


def test_the_prompt_of_each_window_has_the_state_at_its_first_frame(plain):
    turns = [
        ("DST_UPDATE", "S1->start", 101, 101),
        ("assistant", "Go.", 101, 101),
        ("DST_UPDATE", "S1->complete", 104, 104),
        ("user", "Ok", 105, 105),
        ("DST_UPDATE", "S2->start", 106, 106),
    ]
    clip = read(raw_clip(turns, 100, 107))
    before = "System: " + SYSTEM
    longest = len(before) + len("\nS1 one [not_started]\nS2 two [not_started]") + 1
    # Tokens of a frame and its text: 100: 1, 101: 1+23+15 = 39, 102: 1, 103: 1, 104: 27, 105: 10, 106: 24, 107: 1
    parts = samples_of(clip, plain, max_seq_len=longest + 42, overlap=0.7)
    tables = [
        [
            ("user", before + "\nS1 one [not_started]\nS2 two [not_started]"),
            ("frame", NO, NO),
            ("frame", 1, 1),
            ("update", "[DST_UPDATE] S1->start"),
            ("speech", "Assistant: Go."),
            ("frame", NO, NO),
            ("frame", NO, NO),
        ],
        [  # overlap: 0.7 of 42 tokens is 29.4: frames 102 and 103, as 101 alone would take 39
            ("user", before + "\nS1 one [in_progress]\nS2 two [not_started]"),
            ("frame", NO, NO),
            ("frame", NO, NO),
            ("frame", 0, 1),
            ("update", "[DST_UPDATE] S1->complete"),
            ("user", "User: Ok"),
            ("frame", NO, NO),
        ],
        [  # the room is 43; 0.7 of 39 tokens is 27.3: frame 105 and not 104, whose text it would have to repeat
            ("user", before + "\nS1 one [completed]\nS2 two [not_started]"),
            ("user", "User: Ok"),
            ("frame", NO, NO),
            ("frame", 0, 1),
            ("update", "[DST_UPDATE] S2->start"),
            ("frame", NO, NO),
        ],
    ]
    assert len(parts) == 3
    for part, table in zip(parts, tables, strict=True):
        check(part, table)


def test_a_repeated_text_is_shown_and_not_learned(plain):
    turns = [("assistant", "A", 101, 101), ("assistant", "B", 103, 103)]
    clip = read(raw_clip(turns, 100, 103, steps=0))
    prompt = f"System: {SYSTEM}"
    first, second = samples_of(clip, plain, max_seq_len=len(prompt) + 1 + 16, overlap=0.9)
    check(first, [("user", prompt), ("frame", NO, NO), ("frame", 1, 0), ("speech", "Assistant: A"), ("frame", NO, NO)])
    check(second, [("user", prompt), ("frame", NO, NO), ("frame", 1, 0), ("speech", "Assistant: B")])
    _, second = samples_of(clip, plain, max_seq_len=len(prompt) + 1 + 29, overlap=0.95)
    check(
        second,
        [
            ("user", prompt),
            ("frame", NO, NO),
            ("user", "Assistant: A"),  # shown again, not learned
            ("frame", NO, NO),
            ("frame", 1, 0),
            ("speech", "Assistant: B"),
        ],
    )


def drawn_windows(clip, plain, epochs: int = 300, **config) -> list[list]:
    """The samples of each window over many epochs; its frames, its prompt and its length are always the same."""
    found = zip(*(samples_of(clip, plain, epoch=epoch, rate=1.0, **config) for epoch in range(epochs)), strict=True)
    windows = [list(samples) for samples in found]
    for samples in windows:
        assert len({tuple(sample.frames) for sample in samples}) == len({len(s.input_ids) for s in samples}) == 1
        assert len({tuple(sample.input_ids[: sample.input_ids.tolist().index(EOS)]) for sample in samples}) == 1
    return windows


def texts_behind(sample) -> list[int]:
    """The frames behind which something stands."""
    is_image = sample.input_ids == IMAGE
    return [int(sample.frames[is_image[:at].sum() - 1]) for at in np.flatnonzero(is_image[:-1] & ~is_image[1:]) + 1]


def test_a_drawn_text_stays_in_the_learned_part(plain):
    """Windows 100..139 and 132..149, learned from 140 on: the text of 130..146 may not stand behind 138 or 139."""
    clip = read(raw_clip([("assistant", "Hi", 130, 146)], 100, 149, steps=0))
    room = len(f"System: {SYSTEM}") + 1 + 40
    first, second = drawn_windows(clip, plain, max_seq_len=room, overlap=0.2)
    assert first[0].frames.tolist() == [*range(100, 140)] and second[0].frames.tolist() == [*range(132, 150)]
    assert {frame for sample in second for frame in texts_behind(sample)} == set(range(140, 147))
    assert all(texts_behind(sample) == [] for sample in first)
    assert all(set(decisions(sample, "speaking_labels").values()) == {0} for sample in first)
    for sample in second:
        [at] = texts_behind(sample)
        expected = {f: NO if f < 140 else int(f <= at) for f in range(132, 150)}
        assert decisions(sample, "speaking_labels") == expected


def test_a_drawn_text_stays_in_the_overlap(plain):
    """Windows 100..140 and 132..149: the text of 120..134, learned in the first, is repeated in the second."""
    clip = read(raw_clip([("assistant", "A", 120, 134)], 100, 149, steps=0))
    room = len(f"System: {SYSTEM}") + 1 + 41 + 13  # the overlap has 9 + 13 of 54 tokens
    first, second = drawn_windows(clip, plain, max_seq_len=room, overlap=0.41)
    assert first[0].frames.tolist() == [*range(100, 141)] and second[0].frames.tolist() == [*range(132, 150)]
    assert {frame for sample in first for frame in texts_behind(sample)} == set(range(127, 135))
    assert {frame for sample in second for frame in texts_behind(sample)} == {132, 133, 134}
    assert all(learned(sample, "speaking_gen_labels") == ["Assistant: A<eos>"] for sample in first)
    assert all(learned(sample, "speaking_gen_labels") == [] for sample in second)


@pytest.mark.parametrize("room, places", [(30, {104}), (31, {104}), (33, {103, 104}), (34, {102, 103, 104})])
def test_a_drawn_text_stays_where_truncation_kept_it(plain, monkeypatch, room, places):
    """A frame that truncation dropped carries no text: the reply of 100..104 stays in the stretch that has 104."""
    monkeypatch.setattr(sequence, "RECENT_TURNS", 1)
    clip = read(raw_clip([("assistant", "A", 100, 104), ("assistant", "B", 107, 107)], 95, 109, steps=0))
    # Tokens: 107..109: 3 + 13 = 16, then the other text: 104: 14, then the newest of the rest: 106, 105, 103, 102
    room += len(f"System: {SYSTEM}") + 1
    [window] = drawn_windows(clip, plain, max_seq_len=room, long_clips="truncate")
    assert all(learned(s, "speaking_gen_labels") == ["Assistant: A<eos>", "Assistant: B<eos>"] for s in window)
    assert {frame for sample in window for frame in texts_behind(sample)} == places | {107}


def test_a_text_that_fits_no_window_names_frame_and_size(plain):
    clip = read(raw_clip([("assistant", "x" * 60, 105, 105)], 100, 110, steps=0))
    prompt = len(f"System: {SYSTEM}") + 1
    needed = prompt + 1 + len("Assistant: ") + 60 + 1
    with pytest.raises(ProspectError, match=f"what is said at frame 105 need {needed} tokens"):
        samples_of(clip, plain, max_seq_len=needed - 1)
    assert len(samples_of(clip, plain, max_seq_len=needed)) > 1
    with pytest.raises(ProspectError, match="the prompt and what is said at frame 100"):
        samples_of(clip, plain, max_seq_len=16)


def random_clip(draw: np.random.Generator):
    """A clip with turns anywhere, in any order, overlapping, in any script; each text occurs once."""
    F = int(draw.integers(30, 120))
    start = int(draw.integers(0, 500))
    steps, turns = 4, []
    moves = [f"S{s}->{move}" for s in range(1, steps + 1) for move in ("start", "complete")]
    for number in range(int(draw.integers(1, 25))):
        first = start + int(draw.integers(0, F))
        last = min(first + int(draw.integers(0, 5)), start + F - 1)
        words = " ".join(draw.choice(["é", "漢字", "🙂", "wheel", "e\u0301", "<image>"], int(draw.integers(0, 5))))
        turns.append([str(draw.choice(["user", "assistant", "DST_UPDATE"])), f"#{number} {words}", first, last])
    for turn in sorted(turns, key=lambda turn: turn[3]):  # legal in the order in which they end
        if turn[0] == "DST_UPDATE":
            turn[1] = moves.pop(0) if moves else None
    turns = [tuple(turn) for turn in turns if turn[1] is not None]
    return turns, read(raw_clip(turns, start, start + F - 1, steps=steps))


def everything_learned(sample, per_frame: int) -> Counter:
    """(head, frame, label) for each decision, ("silence", frame), and every learned text, each with how often."""
    images = np.flatnonzero(sample.input_ids == IMAGE)
    frame_at = dict(zip(images.tolist(), sample.image_embeds[:, 0].astype(int).tolist(), strict=True))
    found = Counter()
    for key in ("speaking_labels", "dst_update_labels", "dst_state_labels"):
        for at in np.flatnonzero(sample.labels[key] != NO).tolist():
            assert at + 1 not in frame_at or per_frame == 1 or frame_at[at + 1] != frame_at[at]  # the last vector
            found[key, frame_at[at], int(sample.labels[key][at])] += 1
    ends = (EOS, IM_END, EOT)
    for at in np.flatnonzero(sample.labels["speaking_gen_labels"] != NO).tolist():
        if at - 1 in frame_at and sample.labels["speaking_gen_labels"][at] in ends:
            found["silence", frame_at[at - 1]] += 1
            sample.labels["speaking_gen_labels"][at] = NO
    for key in ("speaking_gen_labels", "dst_gen_labels"):
        assert all(sample.labels[key][sample.labels[key] != NO] == sample.input_ids[sample.labels[key] != NO])
        found.update((key, text) for text in learned(sample, key))
    return found


@pytest.mark.parametrize("case", range(45))
def test_no_label_is_lost_and_none_appears_twice(case, tokenizer_dir):
    draw = np.random.default_rng(case)
    turns, clip = random_clip(draw)
    tokenizer = Tokenizer(tokenizer_dir, ["plain", "chatml", "llama3"][case % 3])
    per_frame = int(draw.choice([1, 5]))
    options = {
        "rate": float(draw.choice([0.0, 0.5, 1.0])),
        "per_frame": per_frame,
        "silence_lm": bool(draw.integers(2)),
        "binary_at": "frames",
        "layout": str(draw.choice(["stream", "stream", "turns"])),
        "text_at": str(draw.choice(["drawn", "last", "range"])),
        "frames": "all",
        "epoch": case,
    }
    if options["layout"] == "stream":
        options["frames"] = str(draw.choice(["all", "turns", "hybrid"]))
    if options["layout"] == "turns" and not turns:
        return
    [whole] = samples_of(clip, tokenizer, **options)
    overlap = float(draw.choice([0.0, 0.25, 0.6]))
    for limit in range(200, 4000, 50):  # the tightest in which every text fits: as many windows as can be
        try:
            parts = samples_of(clip, tokenizer, max_seq_len=limit, overlap=overlap, **options)
            break
        except ProspectError:
            continue

    total = Counter()
    for part in parts:
        assert len(part.input_ids) <= limit
        text = bytes(id for id in part.input_ids if id < 256).decode()
        state = dict(re.findall(r"\n(S[1-4]) \w+ \[(\w+)\]", text))  # of the prompt
        assert state == state_by_hand(turns, before=int(part.image_embeds[0, 0]))
        for step, move in re.findall(r"(S[1-4])->(start|complete)", text):  # each update is legal where it is read
            assert state[step] == {"start": "not_started", "complete": "in_progress"}[move]
            state[step] = {"start": "in_progress", "complete": "completed"}[move]
        total += everything_learned(part, per_frame)
    expected = everything_learned(whole, per_frame)
    if options["text_at"] == "drawn":  # where a text stands, and so a label's value, is the window's own
        total, expected = (places_apart(found) for found in (total, expected))
    assert total == expected
    assert state == state_by_hand(turns, before=10_000)


def places_apart(found: Counter) -> Counter:
    """What was learned, without what depends on the frames behind which the texts stand."""
    return Counter(key[:2] for key in found.elements() if key[0] != "silence")


def state_by_hand(turns: list[tuple], before: int) -> dict[str, str]:
    state = dict.fromkeys(["S1", "S2", "S3", "S4"], "not_started")
    for role, content, _, last in sorted(turns, key=lambda turn: turn[3]):
        if role == "DST_UPDATE" and last < before:
            step, move = content.split("->")
            state[step] = {"start": "in_progress", "complete": "completed"}[move]
    return state


@pytest.mark.parametrize("case", range(10))
def test_a_window_begins_with_the_end_of_the_previous_one(case, plain):
    _, clip = random_clip(np.random.default_rng(100 + case))
    parts = samples_of(clip, plain, max_seq_len=600, overlap=0.3, per_frame=5, text_at="last")
    for before, after in zip(parts, parts[1:], strict=False):
        repeated = before.frames[-1] - after.frames[0] + 1
        assert before.frames[len(before.frames) - repeated :].tolist() == after.frames[:repeated].tolist()
        images = np.flatnonzero(before.input_ids == IMAGE)
        tail = before.input_ids[images[len(images) - 5 * repeated] :] if repeated else before.input_ids[:0]
        start = np.flatnonzero(after.input_ids == IMAGE)[0]
        assert after.input_ids[start : start + len(tail)].tolist() == tail.tolist()
        assert len(tail) <= 0.3 * len(before.input_ids)
        assert all((labels[: start + len(tail)] == NO).all() for labels in after.labels.values())


def test_truncation_keeps_the_newest(plain):
    """Fewer than 200 turns: the newest stretch that fits, under the state at its first frame."""
    turns = [("DST_UPDATE", "S1->start", 101, 101), ("assistant", "A", 103, 103), ("user", "B", 105, 105)]
    clip = read(raw_clip(turns, 100, 107))
    prompt = f"System: {SYSTEM}\nS1 one [in_progress]\nS2 two [not_started]"
    # Tokens: 107: 1, 106: 1, 105: 1+8, 104: 1, 103: 1+13, 102: 1
    sample = sample_of(clip, plain, max_seq_len=len(prompt) + 1 + 26, long_clips="truncate")
    table = [
        ("user", prompt),
        ("frame", 1, 0),
        ("speech", "Assistant: A"),
        ("frame", NO, NO),
        ("user", "User: B"),
        ("frame", NO, NO),
        ("frame", NO, NO),
        ("frame", NO, NO),
    ]
    check(sample, table)


def test_truncation_with_gaps(plain, monkeypatch):
    """Seed 002's priorities: the two newest turns and all since, then updates, then instructions, then the rest."""
    monkeypatch.setattr(sequence, "RECENT_TURNS", 2)
    turns = [
        ("assistant", "A", 101, 101),
        ("user", "Q", 102, 102),
        ("DST_UPDATE", "S1->start", 103, 103),
        ("assistant", "B", 105, 105),
        ("user", "R", 107, 107),
        ("assistant", "C", 108, 108),
    ]
    clip = read(raw_clip(turns, 100, 109))
    prompt = f"System: {SYSTEM}\nS1 one [not_started]\nS2 two [not_started]"
    recent = [
        ("user", "User: R"),
        ("frame", NO, NO),
        ("frame", 1, 0),
        ("speech", "Assistant: C"),
        ("frame", NO, NO),
    ]  # 9 + 14 + 1 = 24 tokens
    started = [("frame", 0, 1), ("update", "[DST_UPDATE] S1->start")]  # 24
    spoken = [("frame", 1, 0), ("speech", "Assistant: B")]  # 14
    older = [("frame", 1, 0), ("speech", "Assistant: A")]  # 14

    def truncated(tokens: int):
        return sample_of(clip, plain, max_seq_len=len(prompt) + 1 + tokens, long_clips="truncate")

    check(truncated(48), [("user", prompt), *started, *recent])
    check(truncated(62), [("user", prompt), *started, *spoken, *recent])
    check(truncated(76), [("user", prompt), *older, *started, *spoken, *recent])
    sample = truncated(78)  # then the newest of the rest: frames 106 and 104, and 102 with its user turn does not fit
    check(sample, [("user", prompt), *older, *started, ("frame", NO, NO), *spoken, ("frame", NO, NO), *recent])
    assert sample.image_embeds[:, 0].tolist() == [101, 103, 104, 105, 106, 107, 108, 109]


def test_truncation_of_a_clip_that_cannot_fit(plain):
    with pytest.raises(ProspectError, match="do not fit"):
        samples_of(read(raw_clip([], 0, 50)), plain, max_seq_len=20, long_clips="truncate")


# ---- batches -------------------------------------------------------------------------------------


def test_collate(plain):
    long = sample_of(read(raw_clip([("assistant", "Hi", 10, 11)], 10, 13, id="long")), plain, rate=1.0)
    short = sample_of(read(raw_clip([], 700, 701, id="short", steps=0)), plain)
    batch = collate([short, long], PAD)
    B, T = 2, len(long.input_ids)
    n = len(short.input_ids)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (B, T)
    assert batch["input_ids"][0].tolist() == short.input_ids.tolist() + [PAD] * (T - n)
    assert batch["attention_mask"].sum(1).tolist() == [n, T] and batch["attention_mask"][0, :n].all()
    assert batch["input_ids"][1].tolist() == long.input_ids.tolist()
    for key in LABEL_KEYS:
        assert batch[key].dtype == torch.long
        assert batch[key][0].tolist() == short.labels[key].tolist() + [NO] * (T - n)
        assert batch[key][1].tolist() == long.labels[key].tolist()
    # The n-th <image> of the batch, read row by row, is the n-th row of image_embeds.
    assert batch["image_embeds"][:, 0].tolist() == [700, 701, 10, 11, 12, 13]
    assert int((batch["input_ids"] == IMAGE).sum()) == 6
    assert batch["clip_ids"] == ["short", "long"]
    flipped = collate([long, short], PAD)
    assert flipped["image_embeds"][:, 0].tolist() == [10, 11, 12, 13, 700, 701]


def test_a_batch_knows_the_frame_and_the_time_of_every_image_token(plain):
    """Two vectors a frame, 2 frames per second: frame 11 is shown at 5.5 s."""
    long = sample_of(read(raw_clip([], 10, 12, id="long", video_uid="kitchen")), plain, per_frame=2)
    short = sample_of(read(raw_clip([], 700, 701, id="short", fps=4)), plain)
    batch = collate([short, long], PAD)
    assert batch["video_ids"] == ["short", "kitchen"]  # a clip that names no video is one of its own
    assert [frames.tolist() for frames in batch["frame_indices"]] == [[700, 701], [10, 10, 11, 11, 12, 12]]
    assert [times.tolist() for times in batch["timestamps"]] == [[175.0, 175.25], [5.0, 5.0, 5.5, 5.5, 6.0, 6.0]]
    assert batch["image_embeds"][:, 0].tolist() == np.concatenate(batch["frame_indices"]).tolist()
    assert contents(batch) == [
        "short: frames 700..701 of video short, 175.0 to 175.2 s", "long: frames 10..12 of video kitchen, 5.0 to 6.0 s",
    ]  # fmt: skip


def test_padding_with_the_end_token_keeps_the_end_learned(plain):
    """Where pad is eos, the last learned token of a reply is still its end token: padding is known by its position."""
    reply = sample_of(read(raw_clip([("assistant", "Hi", 10, 10)], 10, 10)), plain)
    longer = sample_of(read(raw_clip([("assistant", "Hi there", 10, 10)], 10, 12)), plain)
    batch = collate([reply, longer], EOS)
    n = len(reply.input_ids)
    assert batch["speaking_gen_labels"][0, n - 1] == EOS
    assert (batch["speaking_gen_labels"][0, n:] == NO).all() and not batch["attention_mask"][0, n:].any()


LENGTHS = np.array([30, 10, 20, 40, 10, 50, 25, 35, 15, 45] * 20)


def test_batches_of_an_epoch():
    batches = epoch_batches(LENGTHS, 100, seed=0, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(max(LENGTHS[batch]) * len(batch) <= 100 for batch in batches)
    assert epoch_batches(LENGTHS, 100, seed=0, epoch=0) == batches
    for other in (epoch_batches(LENGTHS, 100, seed=0, epoch=1), epoch_batches(LENGTHS, 100, seed=1, epoch=0)):
        assert other != batches
        assert {tuple(sorted(batch)) for batch in other} != {tuple(sorted(batch)) for batch in batches}
    assert padding_share(LENGTHS, batches) < 0.15
    in_order = [[i, i + 1] for i in range(0, 200, 2)]
    assert padding_share(LENGTHS, batches) < padding_share(LENGTHS, in_order) / 2


def test_batches_for_validation_and_their_padding():
    lengths = np.array([4, 2, 3, 2, 6])
    batches = list(ordered_batches(lengths, 9))
    assert batches == [[1, 3, 2], [0], [4]]
    assert padding_share(lengths, batches) == pytest.approx(1 - 17 / 19)
    assert epoch_batches(np.array([5]), 5, 0, 0) == [[0]]


# ---- the corpus ----------------------------------------------------------------------------------


def write_corpus(folder: Path, clips: list[dict], name: str = "clips.json", rows: dict[str, int] | None = None) -> str:
    (folder / "embeddings").mkdir(exist_ok=True)
    for raw in clips:
        clip = read(raw)
        kept = frame_rows(clip)[: (rows or {}).get(clip.id, clip.num_frames), 0]
        np.save(folder / "embeddings" / f"{clip.id}_embeddings.npy", kept)
    path = folder / name
    text = "\n".join(map(json.dumps, clips)) if name.endswith(".jsonl") else json.dumps(clips)
    path.write_text(text, encoding="utf-8")
    return str(path)


def corpus_of(paths, tokenizer, *, rate: float = 0.5, seed: int = 0, repeats=None, **config) -> Corpus:
    config = DataConfig(**{"max_seq_len": 400, **config})
    return Corpus(paths, config, tokenizer, 2, rate=rate, seed=seed, repeats=repeats)


CLIPS = [
    raw_clip([("assistant", "Hello", 20, 22)], 20, 420, id="long"),
    raw_clip([("assistant", "Hi", 5, 6)], 5, 9, id="short"),
]


def test_a_corpus_knows_the_parts_of_its_prompts(plain, tmp_path):
    """Of three clips, the first in two windows: two have a goal, one a recipe, one a system turn, two have steps."""
    clips = [CLIPS[0] | {"inferred_goal": "Tea", "inferred_knowledge": "Boil."}, CLIPS[1] | {"inferred_goal": "Tea"}]
    clips.append(raw_clip([("system", "Be brief.", 0, 1), ("assistant", "Hi", 5, 6)], 5, 9, id="third", steps=0))
    paths = [write_corpus(tmp_path, clips)]
    shares = {"system text": 1 / 3, "goal": 2 / 3, "list of steps": 2 / 3}
    assert corpus_of(paths, plain, recipe=True).prompts == shares | {"recipe": 1 / 3}
    assert corpus_of(paths, plain).prompts == shares | {"recipe": 0}
    assert corpus_of(paths, plain, dst=False).prompts["list of steps"] == 0


def test_a_corpus_is_its_clips_in_windows(plain, tmp_path):
    corpus = corpus_of([write_corpus(tmp_path, CLIPS)], plain)
    assert [entry.clip for entry in corpus.entries] == [0, 0, 1]
    samples = [corpus[0, i] for i in range(len(corpus))]
    assert [sample.clip_id for sample in samples] == ["long", "long", "short"]
    assert corpus.lengths().tolist() == [len(sample.input_ids) for sample in samples]
    again, later = corpus[0, 0], corpus[1, 0]
    assert (again.labels["speaking_labels"] == samples[0].labels["speaking_labels"]).all()
    assert (later.labels["speaking_labels"] != samples[0].labels["speaking_labels"]).any()
    assert sorted(later.input_ids) == sorted(samples[0].input_ids)  # but for the place of its text


def test_a_corpus_draws_its_texts_anew_in_each_epoch(plain, tmp_path):
    """In the windows it has planned once."""
    turns = [("DST_UPDATE", "S1->start", 30, 40), ("assistant", "Hello", 30, 40), ("assistant", "Bye", 200, 210)]
    corpus = corpus_of([write_corpus(tmp_path, [raw_clip(turns, 20, 420)])], plain, max_seq_len=250)
    epochs = [[corpus[epoch, i] for i in range(len(corpus))] for epoch in range(30)]
    assert len(corpus) > 2 and [len(sample.input_ids) for sample in epochs[0]] == corpus.lengths().tolist()
    for samples in epochs:
        for sample, before in zip(samples, epochs[0], strict=True):
            assert sample.frames.tolist() == before.frames.tolist()
            assert len(sample.input_ids) == len(before.input_ids)
            prompt = before.input_ids.tolist().index(EOS)
            assert sample.input_ids[:prompt].tolist() == before.input_ids[:prompt].tolist()
            for key in ("speaking_gen_labels", "dst_gen_labels"):
                assert learned(sample, key) == learned(before, key)
    assert len({tuple(samples[0].input_ids.tolist()) for samples in epochs}) > 3
    assert corpus[7, 0].input_ids.tolist() == epochs[7][0].input_ids.tolist()


def test_a_repeated_file_is_learned_from_as_in_so_many_epochs(plain, tmp_path):
    once = raw_clip([("assistant", "Hello", 20, 30)], 20, 90, id="once")
    files = [write_corpus(tmp_path, [once], "once.json"), write_corpus(tmp_path, CLIPS)]
    mixed = corpus_of(files, plain, repeats=[1, 3])
    alone = [corpus_of([file], plain) for file in files]
    tokens = [alone[0].lengths().sum(), 3 * alone[1].lengths().sum()]
    assert mixed.shares().tolist() == pytest.approx([n / sum(tokens) for n in tokens])
    ids = [mixed[0, i].clip_id for i in range(len(mixed))]
    assert Counter(ids) == {"once": 1, "long": 6, "short": 3}  # the long one has two windows
    for epoch in (0, 1, 5):
        of_long = [at for at, name in enumerate(ids) if name == "long"]
        found = [mixed[epoch, at] for at in of_long]
        expected = [alone[1][3 * epoch + n, window] for n in range(3) for window in range(2)]
        for sample, other in zip(found, expected, strict=True):
            assert sample.input_ids.tolist() == other.input_ids.tolist()
            assert all((sample.labels[key] == other.labels[key]).all() for key in LABEL_KEYS)
        first_windows = [tuple(sample.labels["speaking_labels"].tolist()) for sample in found[::2]]
        assert len(set(first_windows)) == 3  # negatives of their own
        sample, other = mixed[epoch, ids.index("once")], alone[0][epoch, 0]
        assert all((sample.labels[key] == other.labels[key]).all() for key in LABEL_KEYS)
    batches = epoch_batches(mixed.lengths(), 1000, 0, 0)
    assert sorted(index for batch in batches for index in batch) == list(range(10))


def test_validation_sees_every_frame_whatever_is_trained_on(plain, tmp_path):
    """So the thresholds found there, in the probabilities of its frames, are those of a stream."""
    clip = raw_clip([("assistant", "Hello", 20, 22), ("DST_UPDATE", "S1->start", 200, 201)], 20, 420, id="long")
    file, frames, whole = write_corpus(tmp_path, [clip]), [], None
    hybrid = HybridConfig(random_share=0.1)
    for changed in ({}, {"layout": "turns"}, {"frames": "turns"}, {"frames": "hybrid"}, {"long_clips": "truncate"}):
        data = DataConfig(train=[file], val=[file], max_seq_len=330, hybrid=hybrid, **changed)
        config = Config(model=ModelSection(vision_dim=2), data=data)
        of_train, of_val = (load_corpus(config, plain, split) for split in ("train", "val"))
        frames.append(len({int(frame) for i in range(len(of_train)) for frame in of_train[0, i].frames}))
        samples = [of_val[0, i] for i in range(len(of_val))]
        assert {int(frame) for sample in samples for frame in sample.frames} == set(range(20, 421))
        whole = whole or [sample.input_ids.tolist() for sample in samples]
        assert [sample.input_ids.tolist() for sample in samples] == whole
    assert frames[:3] == [401, 5, 5] and 5 < frames[3] < 200 and 5 < frames[4] < 330


def test_lines_and_list_make_the_same_samples(plain, tmp_path):
    a, b = (corpus_of([write_corpus(tmp_path, CLIPS, name)], plain) for name in ("clips.json", "clips.jsonl"))
    for i in range(3):
        for epoch in (0, 1):
            one, other = a[epoch, i], b[epoch, i]
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert all((one.labels[key] == other.labels[key]).all() for key in LABEL_KEYS)


def test_a_missing_last_row_is_said_once(plain, tmp_path):
    corpus = corpus_of([write_corpus(tmp_path, CLIPS, rows={"short": 4})], plain, rate=1.0)
    assert len(corpus.warnings) == 1 and "clip short: one row fewer than frames; frame 9" in corpus.warnings[0]
    assert decisions(corpus[0, 2], "speaking_labels") == {5: 0, 6: 1, 7: 0, 8: 0}
    corpus[1, 2]
    assert len(corpus.warnings) == 1


def test_bad_clips_stop_or_are_skipped(plain, tmp_path):
    bad = raw_clip([("boss", "Hi", 5, 6)], 5, 9, id="bad")
    path = write_corpus(tmp_path, CLIPS)
    Path(path).write_text(json.dumps([CLIPS[0], bad, CLIPS[1], CLIPS[1]]))
    with pytest.raises(ProspectError, match="clip bad, turn 0, role: unknown role 'boss'"):
        corpus_of([path], plain)
    corpus = corpus_of([path], plain, on_bad="skip")
    assert [entry.clip for entry in corpus.entries] == [0, 0, 2]
    assert len(corpus.skipped) == 2
    assert "unknown role 'boss'" in corpus.skipped[0] and "the id 'short' occurs twice" in corpus.skipped[1]
    Path(path).write_text(json.dumps([bad]))
    with pytest.raises(ProspectError, match="no usable clip"):
        corpus_of([path], plain, on_bad="skip")


def test_wrong_rows_and_wrong_width_stop_before_training(plain, tmp_path):
    path = write_corpus(tmp_path, CLIPS, rows={"short": 3})
    with pytest.raises(ProspectError, match=r"has 3 rows, frames 5\.\.9 are 5"):
        corpus_of([path], plain)
    with pytest.raises(ProspectError, match="2 wide, model.vision_dim is 2048"):
        Corpus([path], DataConfig(max_seq_len=400), plain, 2048, rate=0.5, seed=0)


# ---- the real clip -------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_CLIP.exists(), reason="the real clip is not part of the project")
def test_the_real_clip(plain):
    """Counted by hand from the file: 7 updates and 8 replies due for 3 frames each, so each may stand behind 2.

    The updates' ranges begin at 193, 212, 303, 369, 394, 423 and 449, the replies' at the first six, 224 and 260.
    At 195 the user is heard, so what is due at 193..195 may stand behind 195 alone.
    """
    clip = ClipFile(REAL_CLIP).clip(0)
    config = DataConfig(max_seq_len=100_000)
    layout = lay_out(clip, config, 1.0, 0, 0)
    [window] = plan_windows(clip, layout, plain, config, 1)
    embeddings = np.repeat(
        np.arange(193, 452, dtype=np.float16)[:, None, None], 2048, axis=2
    )  # stand-ins, [259, 1, 2048]
    sample = sequence.make_sample(clip, layout, window, embeddings, plain, config)
    assert sample.image_embeds.shape == (259, 2048) and sample.image_embeds.dtype == np.float16
    speaking, dst = decisions(sample, "speaking_labels"), decisions(sample, "dst_update_labels")
    assert [frame for frame, label in speaking.items() if label == 1] == [
        195, 213, 214, 225, 226, 261, 262, 304, 305, 370, 371, 395, 396, 424, 425,
    ]  # fmt: skip
    assert [frame for frame, label in dst.items() if label == 1] == [
        195, 213, 214, 304, 305, 370, 371, 395, 396, 424, 425, 450, 451,
    ]  # fmt: skip
    assert Counter(speaking.values()) == {1: 15, 0: 259 - 15}
    assert Counter(dst.values()) == {1: 13, 0: 259 - 13}
    assert learned(sample, "dst_gen_labels") == [
        "[DST_UPDATE] S1->start<eos>",
        "[DST_UPDATE] S1->complete, S2->start<eos>",
        "[DST_UPDATE] S2->complete, S3->start<eos>",
        "[DST_UPDATE] S3->complete, S4->start<eos>",
        "[DST_UPDATE] S4->complete, S5->start<eos>",
        "[DST_UPDATE] S5->complete, S6->start<eos>",
        "[DST_UPDATE] S6->complete<eos>",
    ]
    replies = learned(sample, "speaking_gen_labels")
    assert len(replies) == 8
    assert replies[0].startswith("Assistant: Great! Let's get started. First, we need to attach the chassis")
    assert replies[-1].endswith("Give it a try and see how it rolls!<eos>")
