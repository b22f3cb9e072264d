"""ProAssist's prepared dialogues become clips and come back; the order of frames and texts is never touched.

The two dialogues below are written by hand in the prepared format. The second one has the shapes that are rare: a
user's text opens it, a question follows an answer at once, two texts share a place, and a user's text ends it. The real
ones at the end are dialogues that ProAssist has published; they are not part of the project.
"""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from prospect.clip_files import parse_clip
from prospect.config import DataConfig, load_config
from prospect.convert.__main__ import write_objects
from prospect.convert.proassist import clips_of, prepared_of, to_clip, to_prepared
from prospect.errors import ProspectError
from prospect.sequence import lay_out

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "proassist_prepared.jsonl"


def frames(start, end):
    return {"role": "frames", "start": start, "end": end}


def says(role, content, **fields):
    return {"role": role, "content": content, **fields}


PLAIN = {
    "dataset": "assembly101",
    "video_uid": "truck",
    "clip_idx": 0,
    "frames_file": "frames/truck.arrow",
    "seq_len": 855,
    "num_tokens_per_img": 1,
    "start_frame_idx": 11,
    "end_frame_idx": 24,
    "conversation": [
        says("system", "You help."),
        frames(11, 15),
        says("user", "I want to take it apart.", time=7.8, labels=""),
        frames(15, 16),
        says("assistant", "Great, é wheels.", time=7.9, labels="a|b", progress="Elapsed: 7.9 s."),
        frames(16, 21),
        says("assistant", "Now the second wheel.", time=10.5, labels="c", progress="Elapsed: 10.5 s."),
        frames(21, 24),
    ],
    "fps": 2,
    "metadata": {
        "user_type": "talk_some",
        "user_id": "talk_some_1",
        "task_goal": "Take a truck apart",
        "knowledge": "1. Wheels",
        "progress": None,
        "quality": 8.5,
    },
}
RARE = {
    **PLAIN,
    "start_frame_idx": 0,
    "end_frame_idx": 6,
    "conversation": [
        says("user", "Hello?"),
        frames(0, 1),
        says("assistant", "Hi."),
        says("user", "What now?"),
        says("user", "And how?"),
        frames(1, 4),
        says("assistant", "Lift it."),
        says("assistant", "Slowly."),
        frames(4, 6),
        says("user", "Bye.", time=3.0),
    ],
    "metadata": None,
}


def order(prepared):
    """What a model meets in a prepared dialogue: frame numbers and texts."""
    met = []
    for entry in prepared["conversation"]:
        if entry["role"] == "frames":
            met += range(entry["start"], entry["end"])
        else:
            met.append((entry["role"], entry["content"]))
    return met


def clip_order(clip):
    """What a model meets in a clip: a user's text right before the last frame of its turn, an assistant's after it."""
    met = [("system", turn["content"]) for turn in clip["conversation"] if turn["role"] == "system"]
    for frame in range(clip["start_frame_idx"], clip["end_frame_idx"] + 1):
        here = [turn for turn in clip["conversation"] if turn.get("end_frame") == frame]
        met += [("user", turn["content"]) for turn in here if turn["role"] == "user"]
        met.append(frame)
        met += [("assistant", turn["content"]) for turn in here if turn["role"] == "assistant"]
    return met + [("user", turn["content"]) for turn in clip.get("unanswered", [])]


def test_a_dialogue_becomes_a_clip_by_hand():
    clip = to_clip(PLAIN, "here")
    assert (clip["start_frame_idx"], clip["end_frame_idx"]) == (11, 23)  # ours includes the last frame
    placed = [(turn["role"], turn.get("start_frame"), turn.get("end_frame")) for turn in clip["conversation"]]
    # The user speaks before frame 15; the answer follows it; the next text follows 20, the last of 16..20.
    assert placed == [("system", None, None), ("user", 15, 15), ("assistant", 15, 15), ("assistant", 20, 20)]
    assert clip["conversation"][3] == says(
        "assistant",
        "Now the second wheel.",
        time=10.5,
        labels="c",
        progress="Elapsed: 10.5 s.",
        start_frame=20,
        end_frame=20,
    )
    assert clip["id"] == "truck_0_talk_some_1" and clip["embeddings"] == "truck_frames_11_23.npy"
    assert (clip["inferred_goal"], clip["inferred_knowledge"]) == ("Take a truck apart", "1. Wheels")
    assert clip["dst"] == [] and clip["metadata"] == PLAIN["metadata"] and clip["seq_len"] == 855


def test_rare_places_by_hand():
    clip = to_clip(RARE, "here")
    assert [(turn["content"], turn["end_frame"]) for turn in clip["conversation"]] == [
        ("Hello?", 0),
        ("Hi.", 0),
        ("What now?", 1),
        ("And how?", 1),
        ("Lift it.", 3),
        ("Slowly.", 3),
    ]
    assert clip["unanswered"] == [says("user", "Bye.", time=3.0)]
    assert clip["id"] == "truck_0" and "inferred_goal" not in clip


@pytest.mark.parametrize("sample", [PLAIN, RARE], ids=["plain", "rare"])
def test_order_and_round_trip_are_exact(sample):
    before = copy.deepcopy(sample)
    clip = to_clip(sample, "here")
    assert sample == before  # the input is left alone
    assert clip_order(clip) == order(sample)
    back = to_prepared(json.loads(json.dumps(clip)), "here")
    assert json.dumps(back) == json.dumps(sample)  # every field, in its place


@pytest.mark.parametrize("sample", [PLAIN, RARE], ids=["plain", "rare"])
def test_the_stream_layout_shows_the_same_order(sample):
    """The layout that training uses, not this file's reading of it; there several replies at one frame are joined."""
    raw = to_clip(sample, "here")
    clip, problems = parse_clip(raw, "file", 0)
    assert problems == []
    layout = lay_out(clip, DataConfig(), 1.0, 0, 0)
    met, said = [], list(layout.said)
    for at, frame in enumerate(layout.frames.tolist()):
        met += [(text.role, text.text) for text in said if text.at == at and text.before]
        met.append(frame)
        met += [(text.role, text.text) for text in said if text.at == at and not text.before]
    expected = []
    for item in order(sample):
        role, text = item if isinstance(item, tuple) else ("frame", "")
        if role == "assistant" and isinstance(expected[-1], tuple) and expected[-1][0] == role:
            expected[-1] = (role, f"{expected[-1][1]} {text}")
        elif role != "system":
            expected.append(item)
    if "unanswered" in raw:
        expected.pop()
    assert met == expected
    # The assistant's frames are the positive ones, and only they: one decision a text.
    decided = {turn["end_frame"] for turn in raw["conversation"] if turn["role"] == "assistant"}
    assert {frame for frame, label in zip(layout.frames.tolist(), layout.speaking.tolist()) if label == 1} == decided


def broken(**changes):
    return {**copy.deepcopy(PLAIN), **changes}


@pytest.mark.parametrize(
    "sample, word",
    [
        (broken(conversation=[frames(11, 15), frames(15, 24)]), "unbroken run"),
        (broken(conversation=[frames(11, 15), says("assistant", "a"), frames(16, 24)]), "unbroken run"),
        (broken(conversation=[frames(12, 24)]), "unbroken run"),
        (broken(conversation=[frames(11, 23)]), "unbroken run"),
        (broken(conversation=[{**frames(11, 24), "note": "x"}]), "unbroken run"),
        (
            broken(conversation=[frames(11, 15), says("user", "q"), says("assistant", "a"), frames(15, 24)]),
            "without a fr",
        ),
        (broken(conversation=[frames(11, 24), says("user", "q"), says("assistant", "a")]), "without a frame"),
        (broken(conversation=[says("assistant", "a"), frames(11, 24)]), "before the first frame"),
        (broken(conversation=[frames(11, 24), says("system", "s")]), "inside the dialogue"),
        (broken(conversation=[frames(11, 24), says("DST_UPDATE", "S1->start")]), "unknown role"),
        (broken(conversation=["frames"]), "list of objects"),
        (broken(conversation=[{"role": "frames", "start": 11}]), "frame number"),
        (broken(start_frame_idx="11"), "frame number"),
        (broken(video_uid=None), "video_uid"),
        (to_clip(PLAIN, "here"), "converted already"),
    ],
)
def test_what_a_clip_cannot_hold_exactly_is_refused(sample, word):
    with pytest.raises(ProspectError, match=word) as caught:
        to_clip(sample, "file, dialogue 3")
    assert "file, dialogue 3" in str(caught.value)


def test_a_clip_with_task_state_cannot_go_back():
    clip = to_clip(PLAIN, "here")
    update = says("DST_UPDATE", [{"id": "S1", "transition": "start"}], start_frame=20, end_frame=20)
    clip["conversation"].append(update)
    with pytest.raises(ProspectError, match="DST_UPDATE"):
        to_prepared(clip, "here")


def run(*arguments):
    command = [sys.executable, "-m", "prospect.convert", "proassist", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_files_there_and_back(tmp_path):
    source = tmp_path / "prepared.jsonl"
    samples = [PLAIN, RARE, RARE, broken(metadata={"user_id": "no_talk_0"})]
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    source.write_text(lines, encoding="utf-8")
    for name in ("clips.json", "clips.jsonl"):
        clips, back = tmp_path / name, tmp_path / f"{name}.back.jsonl"
        done = run(source, clips)
        assert done.returncode == 0 and done.stdout.startswith(f"4 clips -> {clips}\nnext:\npython -m "), done.stderr
        text = clips.read_text(encoding="utf-8")
        listed = json.loads(text) if name == "clips.json" else [json.loads(line) for line in text.splitlines()]
        # The same dialogue twice gets two ids; two users' dialogues over the same frames share their embeddings.
        assert [clip["id"] for clip in listed] == ["truck_0_talk_some_1", "truck_0", "truck_0_2", "truck_0_no_talk_0"]
        assert listed[0]["embeddings"] == listed[3]["embeddings"] != listed[1]["embeddings"]
        assert run(clips, back, "--reverse").returncode == 0
        assert back.read_text(encoding="utf-8") == lines


def test_a_refused_file_is_one_line_and_leaves_nothing(tmp_path):
    source, out = tmp_path / "prepared.jsonl", tmp_path / "clips.json"
    bad = broken(conversation=[frames(11, 23)])
    source.write_text(json.dumps(PLAIN) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
    out.write_text("before", encoding="utf-8")
    done = run(source, out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "prepared.jsonl, dialogue 1" in done.stderr
    assert out.read_text(encoding="utf-8") == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.json", "prepared.jsonl"]
    assert run(tmp_path / "nothing.jsonl", out).returncode == 2
    assert run(source, tmp_path / "no" / "such" / "clips.json").returncode == 2


# ---- and can be learned --------------------------------------------------------------------------


def learn(folder: Path, clip: dict) -> list[dict]:
    """One epoch of train.py on this one clip, by configs/proassist.yaml with a tiny model and random embeddings of its
    frames: the lines of metrics.jsonl."""
    (folder / "embeddings").mkdir(parents=True)
    rows = clip["end_frame_idx"] - clip["start_frame_idx"] + 1
    np.save(folder / "embeddings" / clip["embeddings"], np.random.default_rng(0).normal(size=(rows, 16)).astype("f4"))
    (folder / "clips.json").write_text(json.dumps([clip]), encoding="utf-8")
    overrides = [
        f"run.out={folder}", f"data.train={folder}/clips.json", f"data.val={folder}/clips.json", "data.sample=null",
        "data.neg_frame_sampling_rate=1", "train.max_steps=null", "train.num_epochs=1", "train.device=cpu",
        "model.vision_dim=16", "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=48",
        "model.num_hidden_layers=1", "data.allow_leaks=true",
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "proassist.yaml", overrides)
    assert config.data.silence_lm and not config.data.dst and config.infer.decision == "lm"
    ranks = train.start_ranks("cpu")
    try:
        assert train.train(config, ranks, dry_run=False) == 0
    finally:
        train.stop_ranks(ranks)
    return [json.loads(line) for line in (folder / "proassist" / "metrics.jsonl").read_text().splitlines()]


def check_learned(lines: list[dict], sample: dict) -> None:
    """Finite losses; a label at every frame, 1 where the frames stop for a reply; at least a label for every word."""
    steps, evaluation = lines[:-1], lines[-1]["evaluation"]
    assert all(math.isfinite(step[name]) for step in steps for name in ("loss", "speaking_gen", "grad_norm"))
    assert all(math.isfinite(value) for value in evaluation.values())
    met = order(sample)
    decided = {max(item for item in met[:i] if isinstance(item, int))
               for i, item in enumerate(met) if isinstance(item, tuple) and item[0] == "assistant"}  # fmt: skip
    replies = [item[1] for item in met if isinstance(item, tuple) and item[0] == "assistant"]
    counts = {name: sum(step["counts"][name] for step in steps) for name in steps[0]["counts"]}
    frames_shown = sample["end_frame_idx"] - sample["start_frame_idx"]
    assert (counts["speaking_pos"], counts["speaking_neg"]) == (len(decided), frames_shown - len(decided))
    silent_or_word = counts["speaking_neg"] + len(" ".join(replies).split())
    assert counts["speaking_gen"] > silent_or_word and counts["dst_gen"] == counts["dst_pos"] == 0


@pytest.mark.parametrize("sample, decided", [(PLAIN, 2), (RARE, 2)], ids=["plain", "rare"])
def test_a_converted_dialogue_is_learned(tmp_path, one_thread_and_usual_signals, sample, decided):
    lines = learn(tmp_path, to_clip(sample, "here"))
    check_learned(lines, sample)
    assert sum(line["counts"]["speaking_pos"] for line in lines[:-1]) == decided  # 15 and 20; 0 and 3


@pytest.mark.skipif(not REAL.exists(), reason="ProAssist's dialogues are not part of the project")
@pytest.mark.slow
def test_every_published_dialogue_converts_returns_and_is_learned(tmp_path, one_thread_and_usual_signals):
    samples = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    converted = tmp_path / "clips.json"
    assert write_objects(clips_of(REAL), converted) == len(samples) > 0
    assert list(prepared_of(converted)) == samples
    clips = json.loads(converted.read_text(encoding="utf-8"))
    assert len({clip["id"] for clip in clips}) == len(clips)
    for number, (sample, clip) in enumerate(zip(samples, clips)):
        assert clip_order(clip) == order(sample)
        check_learned(learn(tmp_path / str(number), clip), sample)
