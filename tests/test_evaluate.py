"""Evaluation: the numbers of examples worked out by hand, the same numbers however it is run, and what is written.

Small clips are streamed through a random model. What it says is nonsense, but it speaks and updates now and then, so
that every part of the scoring has something to count.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import raw_clip, read
from safetensors.torch import load_file, save_file
from test_stream import random_model
from tiny import VISION_DIM, tiny_clip, tiny_config

import train
from prospect import evaluate, text_metrics
from prospect.checkpoint import TrainState, read_state, write_state
from prospect.clip_files import ClipFile
from prospect.config import load_config
from prospect.data import Corpus
from prospect.errors import run_entry_point
from prospect.load import load_for_inference
from prospect.metrics import Counts, HeadTrace
from prospect.records import read_records, records_file
from prospect.sample import write_sample
from prospect.score import says_the_same, score_clip, score_step_state, score_task_state, summarise, timely_replies
from prospect.stream import FrameRecord
from prospect.text_metrics import load_similarity
from prospect.thresholds import decision_report, teacher_forced, traces
from prospect.tokenizer import Tokenizer, train_tokenizer
from prospect.tuning import EVIDENCE, teacher_forced_odds
from prospect.weights import save_model

ROOT = Path(__file__).parent.parent
LEXICAL = load_similarity("lexical")
SPEAKING, DST = 0.535, 0.6  # thresholds that the random model's scores reach now and then


pytestmark = pytest.mark.usefixtures("one_thread_in_module")


@pytest.fixture(autouse=True)
def no_other_programs(monkeypatch):
    """METEOR and CIDEr as on a machine that has neither, whatever this one has."""

    def absent(references, hypotheses):
        raise text_metrics._Absent("needs what is not here")

    monkeypatch.setattr(text_metrics, "_meteor", absent)
    monkeypatch.setattr(text_metrics, "_cider", absent)


def write_clips(folder: Path, name: str, clips: list[dict], seed: int = 0) -> Path:
    """FOLDER/NAME with these clips, and their embeddings."""
    draw = np.random.default_rng(seed)
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(clips), encoding="utf-8")
    for clip in clips:
        rows = draw.normal(size=(clip["end_frame_idx"] - clip["start_frame_idx"] + 1, VISION_DIM)).astype(np.float32)
        clip_name = clip.get("embeddings", f"{clip['id']}_embeddings.npy")
        np.save(folder / "embeddings" / clip_name, rows)
    return folder / name


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Seven clips of 12 to 30 frames, of two datasets with windows and frame rates of their own."""
    draw = np.random.default_rng(7)
    made = [tiny_clip(draw, f"clip{n}", 12 + 3 * n, replies=3, words=4) for n in range(7)]
    for clip in made[::2]:
        clip |= {"dataset": "wtag", "fps": 4}
    return write_clips(tmp_path_factory.mktemp("clips"), "clips.json", made)


def make_checkpoint(directory: Path, *overrides: str, speaking: float = 0.5, dst: float = 0.5, seed: int = 1) -> Path:
    """A checkpoint as train.py writes it, of a model never trained."""
    train_tokenizer(["User: take the red block", "Assistant: put it on top", "[DST_UPDATE] S1->start"], 280, directory)
    tokenizer = Tokenizer(directory, "plain")
    infer = ["infer.max_reply_tokens=6", "infer.max_update_tokens=30", "infer.constrain_dst=true", "infer.device=cpu"]
    config = tiny_config(directory, *infer, *overrides)
    save_model(
        random_model(tokenizer, seed, vision_dim=config.model.vision_dim, dst=config.data.dst),
        directory,
        eos_token_id=tokenizer.end_id,
    )
    tokenizer.save(directory)
    thresholds = {"speaking": speaking, "dst": dst} if config.data.dst else {"speaking": speaking}
    write_state(directory, TrainState(step=3, best_step=2, thresholds=thresholds, data={"file": "ab"}), config)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), speaking=SPEAKING, dst=DST)


def call(checkpoint: Path, *words: object) -> int:
    """`python -m prospect.evaluate --checkpoint` in this process; its exit status."""
    return call_without_checkpoint("--checkpoint", checkpoint, *words)


def call_without_checkpoint(*words: object) -> int:
    argv, sys.argv = sys.argv, ["evaluate", *map(str, words)]
    try:
        run_entry_point(evaluate.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv


def results_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())["results"]


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def streamed(monkeypatch) -> list[str]:
    """The ids of the clips that were given to the engine since the test began."""
    given, whole = [], evaluate.streamed_clips

    def watched(model, tokenizer, jobs, config, *, streams):
        given.extend(job.clip.id for job in jobs)
        return whole(model, tokenizer, jobs, config, streams=streams)

    monkeypatch.setattr(evaluate, "streamed_clips", watched)
    return given


# ---- the oracle ----------------------------------------------------------------------------------


def reference_records(raw: dict) -> list[dict]:
    """The records of one who says and notes at each frame exactly what the clip's file has there."""
    state = {step["id"]: "not_started" for step in raw["dst"]}
    records = []
    for frame in range(raw["start_frame_idx"], raw["end_frame_idx"] + 1):
        here = [turn for turn in raw["conversation"] if turn["end_frame"] == frame]
        said = [turn["content"] for turn in here if turn["role"] == "assistant"]
        moves = [move for turn in here if turn["role"] == "DST_UPDATE" for move in turn["content"]]
        for move in moves:
            state = state | {move["id"]: {"start": "in_progress", "complete": "completed"}[move["transition"]]}
        records.append(asdict(FrameRecord(
            clip_id=raw["id"], frame_idx=frame, time=frame / raw["fps"], speaking_prob=float(bool(said)),
            dst_update_prob=float(bool(moves)), speaking_score=float(bool(said)), dst_update_score=float(bool(moves)),
            speaking_decision=bool(said), dst_update_decision=bool(moves),
            text=" ".join(said) or None, dst_state=state,
            dst_update=", ".join(f"{move['id']}->{move['transition']}" for move in moves) or None,
        )))  # fmt: skip
    return records


def test_the_oracle_is_perfect(clips):
    raws = json.loads(clips.read_text())
    file = ClipFile(clips)
    scores = [score_clip(file.clip(i), reference_records(raw), LEXICAL, True) for i, raw in enumerate(raws)]
    numbers = summarise(scores)
    for name in ("f1", "precision", "recall", "jaccard_index", "semantic_score", "speaking_event_f1", "dst_event_f1",
                 "joint_goal_accuracy", "step_state_accuracy", "state_macro_f1", "transition_precision",
                 "transition_recall", "transition_f1", "timed_step_accuracy", "timed_transition_accuracy",
                 "valid_update_ratio", "BLEU-4", "BLEU-4_w"):  # fmt: skip
        assert numbers[name] == 1.0, name
    for name in ("missing_rate", "redundant_rate", "num_missed", "num_redundant", "num_mismatched", "time_diff",
                 "time_error_mean", "time_error_p90"):  # fmt: skip
        assert numbers[name] == 0, name
    assert (numbers["num_matched"], numbers["clips"], numbers["frames"]) == (21, 7, sum(12 + 3 * n for n in range(7)))


def test_the_oracle_s_records_are_taken_over_and_score_one_in_the_table(clips, checkpoint, tmp_path, streamed, capsys):
    assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0
    streamed.clear()
    for raw in json.loads(clips.read_text()):
        lines = [json.dumps(record) for record in reference_records(raw)]
        (tmp_path / "records" / f"{raw['id']}.jsonl").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert streamed == [] and "7 of 7 clips are streamed already" in shown and " s\n" not in shown
    for title in ("dialogue F1", "Jaccard", "update event F1", "joint goal accuracy", "transition F1", "valid updates"):
        assert f"| {title} | 1.000 | 1.000 | 1.000 |" in shown
    assert "| missed | 0.000 | 0.000 | 0.000 |" in shown


# ---- examples by hand ----------------------------------------------------------------------------


def update(id: str, transition: str) -> list[dict]:
    return [{"id": id, "transition": transition}]


def records_from(clip, texts: dict[int, str] | None = None, updates: dict[int, tuple] | None = None) -> list[dict]:
    """Records with a text or an (update, why invalid, state after it) at some frames; the rest silent."""
    texts, updates = texts or {}, updates or {}
    state, records = dict(clip.initial_state), []
    for frame in range(clip.start_frame, clip.end_frame + 1):
        written, invalid, state = updates.get(frame, (None, None, state))
        records.append(asdict(FrameRecord(
            clip.id, frame, frame / clip.fps, 0.5, 0.5, 0.5, 0.5, frame in texts, frame in updates,
            texts.get(frame), written, state, invalid_update=invalid,
        )))  # fmt: skip
    return records


def test_task_state_by_hand():
    """A wrong step at the right time, an illegal update, and a right update 5 frames late."""
    clip = read(raw_clip([("DST_UPDATE", update("S1", "start"), 12, 12),
                          ("DST_UPDATE", update("S1", "complete"), 15, 16)], 10, 19))  # fmt: skip
    wrong = {"S1": "not_started", "S2": "in_progress"}
    late = {"S1": "in_progress", "S2": "in_progress"}
    records = records_from(clip, updates={12: ("S2->start", None, wrong), 15: ("S2->start", "S2 is in_progress", wrong),
                                          17: ("S1->start", None, late)})  # fmt: skip
    # frame      10 11 12 13 14 15 16 17 18 19       n not started, p in progress, c completed
    # S1 is       n  n np  p  p pc pc  c  c  c       either, while the update is due
    #    told     n  n  n  n  n  n  n  p  p  p       right three times
    # S2 is       n  n  n  n  n  n  n  n  n  n
    #    told     n  n  p  p  p  p  p  p  p  p       right twice
    found = score_task_state(clip, records, (-2.5, 2.5)).summary()
    assert found["joint_goal_accuracy"] == 2 / 10 and found["step_state_accuracy"] == 5 / 20
    # Where told wrongly, an update counts from its last frame. n: 13 times so, 9 times told, 5 times both; p: 3 and 11,
    # never both; c: 4 and 0.
    assert found["state_macro_f1"] == pytest.approx((2 * 5 / (13 + 9)) / 3)
    # By meaning: S1->start at 17 for the one at 12, 2.5 s late. S2->start is extra, S1->complete is missed.
    assert (found["transition_precision"], found["transition_recall"]) == (1 / 2, 1 / 2)
    assert found["time_error_mean"] == 2.5
    # By time: 12 with 12 (another step, the same transition), 17 with 16 (the same step, another transition).
    assert (found["timed_step_accuracy"], found["timed_transition_accuracy"]) == (1 / 2, 1 / 2)
    assert found["valid_update_ratio"] == 2 / 3


def test_while_an_update_is_due_the_states_before_and_after_it_are_right():
    """S1 is started at 12..14 and completed at 13..16: predicted at every pair of frames, in order."""
    clip = read(raw_clip([("DST_UPDATE", update("S1", "start"), 12, 14),
                          ("DST_UPDATE", update("S1", "complete"), 13, 16)], 10, 19))  # fmt: skip
    for started in range(10, 20):
        for completed in range(started + 1, 20):
            begun, done = ({"S1": state, "S2": "not_started"} for state in ("in_progress", "completed"))
            updates = {started: ("S1->start", None, begun), completed: ("S1->complete", None, done)}
            records = records_from(clip, updates=updates)
            wrong = len([f for f in range(10, 20) if f < 12 and f >= started or f > 14 and f < started])
            wrong += len([f for f in range(10, 20) if f < 13 and f >= completed or f > 16 and f < completed])
            both = [f for f in range(10, 20) if f < 12 and f >= completed or f > 16 and f < started]  # counted twice
            found = score_task_state(clip, records, (-2.5, 2.5)).summary()
            assert found["joint_goal_accuracy"] == pytest.approx((10 - wrong + len(both)) / 10), (started, completed)


def test_the_state_head_by_hand():
    """Its accuracy and macro F1; while an update is due, with and without it is right, whichever others are due."""
    turns = [("DST_UPDATE", update("S1", "start"), 12, 13), ("DST_UPDATE", update("S1", "complete"), 15, 17)]
    clip = read(raw_clip([*turns, ("DST_UPDATE", update("S2", "start"), 16, 18)], 10, 21))
    # frame      10 11 12 13 14 15 16  17  18 19 20 21
    # right       n  n np np  p pc pc  pc  cp  p  p  p     (16: S1 in progress or completed, or S2 in progress)
    read_there = "n  p  p  c  p  p  c   c   c  c  p  n".split()  # wrong at 11, 13 (p counts from there), 19, 21
    states = {"n": "not_started", "p": "in_progress", "c": "completed"}
    records = [record | {"step_state": states[letter]} for record, letter in zip(records_from(clip), read_there)]
    assert score_step_state(clip, records).tolist() == [[1, 1, 0], [1, 4, 2], [0, 0, 3]]  # [reference, predicted]
    numbers = summarise([score_clip(clip, records, LEXICAL, True)])
    assert numbers["state_head_accuracy"] == 8 / 12
    # n: 2 and 2, both 1; p: 7 and 5, both 4; c: 3 and 5, both 3.
    assert numbers["state_head_macro_f1"] == pytest.approx((2 / 4 + 8 / 12 + 6 / 8) / 3)
    assert "state_head_accuracy" not in summarise([score_clip(clip, records_from(clip), LEXICAL, True)])


def test_replies_right_by_hand():
    """Said in time and naming the right step; or, where no step is named, beginning as it should."""
    turns = [("assistant", "Now do step one.", 12, 14), ("assistant", "Do two, please.", 18, 18),
             ("assistant", "All done. Well built!", 24, 25), ("assistant", "One again.", 30, 31)]  # fmt: skip
    clip = read(raw_clip(turns, 10, 39))  # of the steps "one" and "two", at 2 fps
    said = {10: "ONE it is.", 13: "Take two.", 16: "Take one.", 19: "Now two!", 23: "All done. Bye.", 34: "one"}
    # 13 lies in 12..14, so it is the first turn's, and names the wrong step: 10 and 16 (2 frames away) are redundant.
    # 19 is nearer to 18 than 16 is, and right; 23 is one early, and right; 34 is 3 late for 31.
    assert timely_replies(clip, records_from(clip, said)) == [(1, 0, False), (3, 1, True), (4, 2, True)]
    numbers = summarise([score_clip(clip, records_from(clip, said), LEXICAL, False)])
    assert (numbers["replies_right_precision"], numbers["replies_right_recall"]) == (2 / 6, 2 / 4)
    assert numbers["replies_right_f1"] == pytest.approx(2 * 2 / (6 + 4))
    assert numbers["speaking_event_f1"] == pytest.approx(2 * 3 / (6 + 4))
    assert says_the_same("One or two?", "Take one.", ["one", "two"]) is False  # names both


def test_said_over_and_over_is_right_once():
    clip = read(raw_clip([("assistant", "Now one.", 20, 22)], 10, 60))
    score = score_clip(clip, records_from(clip, dict.fromkeys(range(15, 35), "Now one.")), LEXICAL, False)
    assert score.events["speaking"] == score.replies == Counts(1, 20, 1)


def test_dialogue_by_hand():
    """Two turns at one frame are one text; one reply half a second early, one redundant, one missed."""
    clip = read(raw_clip([("user", "Hi.", 11, 11), ("assistant", "Take the", 13, 14),
                          ("assistant", "red block.", 14, 14), ("assistant", "Stop.", 18, 18)], 10, 25))  # fmt: skip
    score = score_clip(clip, records_from(clip, {10: "Hello there.", 13: "Take the red block."}), LEXICAL, False)
    assert score.dataset == "unnamed" and score.frames == 16
    numbers = summarise([score])
    counts = [numbers[f"num_{name}"] for name in ("matched", "mismatched", "missed", "redundant")]
    assert counts == [1, 0, 1, 1]
    assert (numbers["precision"], numbers["recall"], numbers["f1"]) == (1 / 2, 1 / 2, 1 / 2)
    assert numbers["jaccard_index"] == 1 / 3 and numbers["time_diff"] == 0.5
    assert score.correct_pairs == [("Take the red block.", "Take the red block.")]
    assert numbers["BLEU-4"] == 1.0 and numbers["BLEU-4_w"] == 1 / 3
    assert score.events == {"speaking": Counts(1, 2, 2)}  # 13 is within a second of 14, 10 is not
    assert "joint_goal_accuracy" not in numbers  # no task state


@pytest.mark.parametrize("dataset, matched", [("wtag", 1), ("holoassist", 0), (None, 0)])
def test_each_dataset_has_its_window(dataset, matched):
    """A reply and an update five seconds early: within wtag's six, not within the 2.5 of the others."""
    turns = [("assistant", "Go.", 30, 30), ("DST_UPDATE", update("S1", "start"), 30, 30)]
    clip = read(raw_clip(turns, 10, 40, dataset=dataset))
    begun = {"S1": "in_progress", "S2": "not_started"}
    records = records_from(clip, {20: "Go."}, {20: ("S1->start", None, begun)})
    numbers = summarise([score_clip(clip, records, LEXICAL, True)])
    assert (numbers["num_matched"], numbers["num_redundant"]) == (matched, 1 - matched)
    assert numbers["transition_f1"] == matched and numbers["time_error_mean"] == 5 * matched
    # No event within a second of its turn, no reply in time; 10 of 31 frames tell the step begun too early.
    assert numbers["combined_score"] == pytest.approx((0 + 0 + 21 / 31) / 3)


def test_the_order_of_the_clips_changes_no_digit():
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    clip = read(raw_clip([("assistant", "Go.", 2, 2)], 0, 5))
    score = score_clip(clip, records_from(clip, {2: "Go."}), LEXICAL, False)
    scores = [replace(score, clip_id=id, dialogue=score.dialogue | {"semantic_sum": value, "semantic_count": 1})
              for id, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))]  # fmt: skip
    first, *others = [summarise(list(order)) for order in itertools.permutations(scores)]
    assert all(numbers == first for numbers in others)


# ---- the same however it is run ------------------------------------------------------------------


def test_lookahead_and_streams_change_no_number(clips, checkpoint, tmp_path):
    whole = []
    for lookahead, streams in ((1, 1), (2, 3), (7, 8), (64, 1), (64, 3), (1, 8)):
        out = tmp_path / f"{lookahead}-{streams}"
        words = ["--data", clips, "--out", out, "--streams", streams, f"infer.lookahead={lookahead}"]
        assert call(checkpoint, *words) == 0
        whole.append(results_of(out))
    assert all(results == whole[0] for results in whole)
    # The model did speak and update; and no probability is so near its threshold that rounding, which differs with the
    # size of a forward, could have decided.
    records = [record for path in (tmp_path / "1-1" / "records").iterdir() for record in records_of(path)]
    assert sum(record["text"] is not None for record in records) > 10
    assert sum(record["dst_update"] is not None for record in records) > 10
    assert min(abs(record["speaking_score"] - SPEAKING) for record in records) > 1e-5
    assert min(abs((record["dst_update_score"] or 0) - DST) for record in records) > 1e-5


def test_interrupted_and_started_again(clips, checkpoint, tmp_path, streamed, monkeypatch, capsys):
    assert call(checkpoint, "--data", clips, "--out", tmp_path / "whole") == 0
    streamed.clear()

    def breaks_off(model, tokenizer, jobs, config, *, streams, whole=evaluate.streamed_clips):
        for job, records in whole(model, tokenizer, jobs, config, streams=streams):
            if len(list((tmp_path / "two" / "records").iterdir())) == 3:
                raise KeyboardInterrupt
            yield job, records

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "streamed_clips", breaks_off)
        assert call(checkpoint, "--data", clips, "--out", tmp_path / "two", "--streams", 2) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n") and len(streamed) == 7
    finished = {path.stem: path.read_bytes() for path in (tmp_path / "two" / "records").iterdir()}
    assert len(finished) == 3 and not (tmp_path / "two" / "metrics.json").exists()

    streamed.clear()
    assert call(checkpoint, "--data", clips, "--out", tmp_path / "two") == 0
    assert sorted(streamed) == sorted({f"clip{n}" for n in range(7)} - set(finished))
    assert all((tmp_path / "two" / "records" / f"{name}.jsonl").read_bytes() == was for name, was in finished.items())
    assert results_of(tmp_path / "two") == results_of(tmp_path / "whole")


def test_a_real_ctrl_c(clips, checkpoint, tmp_path):
    draw = np.random.default_rng(0)
    long = [tiny_clip(draw, "short", 12, 2, 4), tiny_clip(draw, "long", 30_000, 2, 4)]
    file, out = write_clips(tmp_path, "long.json", long), tmp_path / "out"
    silent = ["infer.speaking_threshold=1", "infer.dst_threshold=1"]
    command = [sys.executable, "-m", "prospect.evaluate", "--checkpoint", checkpoint, "--data", file, "--out", out,
               "--streams", "2", "infer.lookahead=1", *silent]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while process.poll() is None and not (out / "records" / "short.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=60)
    assert process.returncode == 130 and shown == ""
    assert err.endswith("\ninterrupted\n") and "Traceback" not in err
    assert [path.name for path in (out / "records").iterdir()] == ["short.jsonl"]
    assert len(records_of(out / "records" / "short.jsonl")) == 12


def test_records_are_scored_again_without_model_or_embeddings(clips, checkpoint, tmp_path, capsys, monkeypatch):
    file = shutil.copytree(clips.parent, tmp_path / "in") / clips.name
    out = tmp_path / "out"
    assert call(checkpoint, "--data", file, "--out", out) == 0
    shown, written = capsys.readouterr().out, {path: path.read_bytes() for path in out.rglob("*.*")}
    moved = shutil.move(file, tmp_path / "clips.json")
    shutil.rmtree(file.parent)
    monkeypatch.setattr(evaluate, "load_for_inference", None)
    for words in ([], ["--data", moved]):
        assert call_without_checkpoint("--records", out, *words) == 0
        again = capsys.readouterr().out
        assert again.split("command:")[0] == shown.split("command:")[0].split("\n", 1)[1] and "| PAUC | " in again
        command = " ".join(["python -m prospect.evaluate --records", *map(str, [out, *words])])
        assert f"command: `{command}`" in again and f"; evidence {0.5:.4f};" in again
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == written

    whole = (out / "settings.json").read_text()
    (out / "settings.json").write_text(whole.replace("infer.evidence", "evidence"))
    assert call_without_checkpoint("--records", out) == 2
    assert "settings.json: does not tell infer.evidence, with which" in capsys.readouterr().err
    (out / "records" / "clip2.jsonl").unlink()
    assert call_without_checkpoint("--records", out) == 2
    assert "no complete records of clip clip2 (let the evaluation run to its end" in capsys.readouterr().err
    for words in (["--sweep"], ["--out", tmp_path / "new"], ["--data", moved, "infer.evidence=0.1"]):
        assert call_without_checkpoint("--records", out, *words) == 2
        assert "--records only scores again" in capsys.readouterr().err


def test_records_of_a_clip_whose_last_frame_is_missing(checkpoint, tmp_path, capsys):
    """Embeddings of an end-exclusive file: one row fewer."""
    raw = tiny_clip(np.random.default_rng(0), "short", 20, 2, 3)
    file = write_clips(tmp_path, "clips.json", [raw | {"end_frame_idx": raw["end_frame_idx"] - 1}])
    file.write_text(json.dumps([raw]))
    assert call(checkpoint, "--data", file, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out.split("command:")[0].split("\n", 1)[1]
    assert call_without_checkpoint("--records", tmp_path / "out") == 0
    assert capsys.readouterr().out.split("command:")[0] == shown and "| frames | 19 |" in shown


def test_a_damaged_records_file_is_made_again(clips, checkpoint, tmp_path, streamed):
    assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0
    before, path = results_of(tmp_path), tmp_path / "records" / "clip4.jsonl"
    whole = path.read_text()
    for damaged in (
        whole[:-40],  # broken off inside a line
        "".join(whole.splitlines(keepends=True)[:-1]),  # and between two
        "".join(whole.splitlines(keepends=True)[::-1]),
        whole.replace('"text"', '"txt"'),
        "[1, 2]\n",
        "",
        "\udcff",  # as written below, a byte that is not UTF-8
    ):
        streamed.clear()
        path.write_bytes(damaged.encode(errors="surrogateescape"))
        assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0
        assert streamed == ["clip4"] and results_of(tmp_path) == before
        again, was = records_of(path), [json.loads(line) for line in whole.splitlines()]
        assert [record["text"] for record in again] == [record["text"] for record in was]


def test_a_text_with_a_line_separator_comes_back_from_its_file(clips, tmp_path):
    clip = ClipFile(clips).clip(0)
    records = records_from(clip, {clip.start_frame: "one\u2028two\x85three"})
    path = records_file(tmp_path, clip.id)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    assert read_records(path, clip) == records


# ---- settings ------------------------------------------------------------------------------------


def test_other_settings_in_the_same_folder_are_refused(clips, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(checkpoint, "--data", clips, "--out", out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    other = make_checkpoint(tmp_path / "other", speaking=SPEAKING, dst=DST, seed=2)
    texts = json.loads(clips.read_text())
    texts[3]["conversation"][1]["content"] += " now"
    (clips.parent / "other.json").write_text(json.dumps(texts))
    same_ids = write_clips(tmp_path, "clips.json", json.loads(clips.read_text()), seed=1)  # other embeddings
    for told, words in {
        "infer.strategy was slide, is drop_all": [checkpoint, "--data", clips, "--strategy", "drop_all"],
        f"infer.speaking_threshold was {SPEAKING}, is 0.7": [
            checkpoint,
            "--data",
            clips,
            "infer.speaking_threshold=0.7",
        ],
        "data.max_seq_len was 512, is 500": [checkpoint, "--data", clips, "data.max_seq_len=500"],
        "the clips' digest was": [checkpoint, "--data", clips.parent / "other.json"],
        "the clips' digest was ": [checkpoint, "--data", same_ids],
        "checkpoint was": [other, "--data", clips],
    }.items():
        capsys.readouterr()
        assert call(*words, "--out", out) == 2
        lines = capsys.readouterr().err.splitlines()
        if "drop_all" in told:  # not what training showed, which is said whatever the folder holds
            assert lines.pop(0).startswith("warning: infer.strategy=drop_all: training showed no context")
        [line] = lines
        assert told in line and "holds records made with other settings" in line
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before

    again = shutil.copytree(checkpoint, tmp_path / "again")
    assert call(again, "--data", clips, "--out", tmp_path / "of_again") == 0
    os.utime(again / "model.safetensors", ns=(1, 1))  # trained again, under the same name and step
    capsys.readouterr()
    assert call(again, "--data", clips, "--out", tmp_path / "of_again") == 2
    assert "time of model.safetensors was" in capsys.readouterr().err

    for damage in (lambda path: path.write_text("{"), lambda path: path.write_text("[]"), Path.unlink):
        damage(out / "settings.json")
        capsys.readouterr()
        assert call(checkpoint, "--data", clips, "--out", out) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_one_line_and_what_is_there_is_used_later(clips, checkpoint, tmp_path, capsys, monkeypatch):
    real, calls = os.fsync, []

    def fills_up(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 8:  # a file takes two: itself, and its folder. Room for settings, references and two records
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", fills_up)
    assert call(checkpoint, "--data", clips, "--out", out) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"error: {out}/records/") and "cannot be written: No space left on device (" in line
    assert len(list((out / "records").iterdir())) == 2 and not (out / "metrics.json").exists()
    monkeypatch.setattr(os, "fsync", real)
    assert call(checkpoint, "--data", clips, "--out", out) == 0
    assert "2 of " in capsys.readouterr().out and (out / "metrics.json").exists()


def test_a_strategy_by_its_name(clips, checkpoint, tmp_path, capsys):
    words = ["--data", clips, "infer.reserved=100", "data.max_seq_len=260"]  # as files to argparse; not to us
    assert call(checkpoint, *words, "--strategy", "drop_all", "--out", tmp_path, "--streams", 2) == 0
    shown = capsys.readouterr().out
    assert "strategy: drop_all;" in shown and results_of(tmp_path)["tiny"]["refreshes"] > 0
    events = [record["context_event"] for record in records_of(tmp_path / "records" / "clip6.jsonl")]
    assert {event["strategy"] for event in events if event} == {"drop_all"}
    command = (f"python -m prospect.evaluate --checkpoint {checkpoint} --data {clips} --strategy drop_all --streams 2 "
               "infer.reserved=100 data.max_seq_len=260")  # fmt: skip
    assert f"command: `{command}`" in shown and f"`{command}`" in (tmp_path / "metrics.md").read_text()
    # The command that stands beside the table gives it again.
    again = command.split()[5:]
    assert call(checkpoint, *again, "--out", tmp_path / "again") == 0
    assert results_of(tmp_path / "again") == results_of(tmp_path)


@pytest.mark.parametrize("words, told", [
    (["--data", "CLIPS", "--strategy", "forget"], "infer.strategy must be one of none, drop_all,"),
    (["--data", "CLIPS", "infer.strategy=forget"], "infer.strategy must be one of none, drop_all,"),
    (["--data", "CLIPS", "--streams", "0"], "--streams must be at least 1"),
    (["--data", "CLIPS", "CLIPS"], "occurs twice"),
    (["--data", "CLIPS", "nowhere.json"], "no such clip file"),
    (["--data", "infer.lookahead=1"], "--data names no clip file"),
    (["--data", "CLIPS", "--similarity", "nowhere"], "not a sentence-transformers model directory"),
    (["--data", "CLIPS", "--sweep", "--out", "x"], "--sweep writes no records"),
    (["--data", "CLIPS", "--sweep", "--moments", "reference"], "--sweep chooses the model's own moments"),
    (["--data", "CLIPS", "--quiet", "CLIPS", "--sweep"], "--quiet and --sweep choose the same number"),
    (["--data", "CLIPS", "--quiet", "CLIPS"], "is not quiet: a user turn"),
    (["--data", "CLIPS", "--max-false-alarms", "3"], "--max-false-alarms needs hours of quiet"),
    (["--records", "x"], "--checkpoint, or the --records that one has left?"),
    (["--data", "CLIPS", "--out", "CLIPS"], "cannot be used"),
    (["--data", "CLIPS", "data.dst=false"], "leave data.dst as the checkpoint has it"),
])  # fmt: skip
def test_what_is_refused(clips, checkpoint, capsys, words, told):
    assert call(checkpoint, *[str(clips) if word == "CLIPS" else word for word in words]) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0] and "Traceback" not in err


def test_records_stay_under_out_whatever_a_clip_is_called(checkpoint, tmp_path):
    ids = ["../../away", "..", "a/b", "a_b", "a%2Fb", "/abs", "CON\\x", "é 漢字", "x" * 300, "x" * 299 + "y"]
    draw = np.random.default_rng(3)
    made = [tiny_clip(draw, id, 8, 1, 2) | {"embeddings": f"{n}.npy"} for n, id in enumerate(ids)]
    file, out = write_clips(tmp_path / "in", "clips.json", made), tmp_path / "deep" / "out"
    assert call(checkpoint, "--data", file, "--out", out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    written = list((out / "records").iterdir())
    assert {records_of(path)[0]["clip_id"] for path in written} == set(ids) and len(written) == len(ids)
    assert records_file(Path("r"), "a-1_b.c").name == "a-1_b.c.jsonl"  # a plain id is its own name


def test_a_bad_clip_is_skipped_where_that_is_asked_for(clips, checkpoint, tmp_path, capsys):
    raws = json.loads(clips.read_text())
    raws[2]["conversation"][0]["role"] = "parrot"
    file = write_clips(tmp_path, "clips.json", raws)
    assert call(checkpoint, "--data", file) == 2
    capsys.readouterr()
    assert call(checkpoint, "--data", file, "data.on_bad=skip") == 0
    shown = capsys.readouterr()
    assert "skipped: " in shown.err and "clip2" in shown.err and "| clips | 3 | 3 |  |" in shown.out


# ---- told when -----------------------------------------------------------------------------------


def test_who_is_told_when_writes_at_the_reference_s_frames_and_nowhere_else(checkpoint, tmp_path, capsys):
    turns = [
        ("user", "Hi", 10, 11), ("assistant", "Go.", 10, 14), ("DST_UPDATE", "S1->start", 11, 13),
        ("assistant", "Well", 20, 22), ("assistant", "done.", 21, 22), ("DST_UPDATE", "S1->complete", 20, 22),
        ("user", "What now?", 24, 25), ("assistant", "Rest.", 29, 29),
    ]  # fmt: skip
    file = write_clips(tmp_path, "clips.json", [raw_clip(turns, 10, 29, dataset="tiny")])
    out, again = tmp_path / "out", tmp_path / "again"
    assert call(checkpoint, "--data", file, "--out", out) == 0
    own = json.loads((out / "metrics.json").read_text())
    shutil.copytree(out, again)
    found = []
    for folder, lookahead in ((out, 1), (again, 64)):
        capsys.readouterr()
        words = ("--out", folder, f"infer.lookahead={lookahead}")
        assert call(checkpoint, "--data", file, "--moments", "reference", *words) == 0
        found.append(json.loads((folder / "metrics.json").read_text()))
        records = records_of(folder / "records-reference" / "clip.jsonl")
        assert [r["frame_idx"] for r in records if r["speaking_decision"]] == [14, 22, 29]
        assert [r["frame_idx"] for r in records if r["dst_update_decision"]] == [13, 22]
        assert [r["frame_idx"] for r in records if r["text"] is not None] == [14, 22, 29]
        assert [r["frame_idx"] for r in records if r["dst_update"] is not None] == [13, 22]
        assert [r["frame_idx"] for r in records if r["user"]] == [11, 25]
        assert all(r["told"] for r in records)
        assert not any(r["told"] for r in records_of(folder / "records" / "clip.jsonl"))
    assert found[0]["told_when"] == found[1]["told_when"] and "told_when" not in own
    assert found[0]["results"] == own["results"]
    assert "dst_event_f1" in own["results"]["tiny"] and "dst_event_f1" not in found[0]["told_when"]["tiny"]
    of_own, of_told = capsys.readouterr().out.split("Told when to speak and update, by the reference:")
    assert "update event F1" in of_own and "update event F1" not in of_told
    assert "--moments reference" in of_told and "joint goal accuracy" in of_told


def test_what_is_said_when_told_is_scored_beside_the_model_s_own_timing(clips, checkpoint, tmp_path, streamed):
    """An oracle that is told when says the reference's words; what the model does by itself is not changed by it."""
    (tmp_path / "records-reference").mkdir()
    for raw in json.loads(clips.read_text()):
        lines = [json.dumps(record | {"told": True}) + "\n" for record in reference_records(raw)]
        records_file(tmp_path / "records-reference", raw["id"]).write_text("".join(lines))
    assert call(checkpoint, "--data", clips, "--moments", "reference", "--out", tmp_path) == 0
    assert len(streamed) == 7  # the own timing alone
    found = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("tiny", "wtag", "macro"):
        told, own = found["told_when"][name], found["results"][name]
        assert told["f1"] == told["joint_goal_accuracy"] == told["replies_right_f1"] == 1.0 and own["f1"] < 0.5


# ---- the report ----------------------------------------------------------------------------------


def test_a_column_for_each_dataset_and_their_plain_mean(clips, checkpoint, tmp_path, capsys):
    assert call(checkpoint, "--data", clips, "--out", tmp_path) == 0
    shown, results = capsys.readouterr().out, results_of(tmp_path)
    assert "| | tiny | wtag | macro |\n|---|---:|---:|---:|\n" in shown
    assert (results["tiny"]["clips"], results["wtag"]["clips"]) == (3, 4)
    for name, mean in results["macro"].items():
        assert mean == pytest.approx((results["tiny"][name] + results["wtag"][name]) / 2), name
    assert {"f1", "joint_goal_accuracy", "dst_event_f1"} <= results["macro"].keys()
    assert "| clips | 3 | 4 |  |" in shown
    scores = [results[name]["combined_score"] for name in ("tiny", "wtag", "macro")]
    assert "| combined score | {:.3f} | {:.3f} | {:.3f} |".format(*scores) in shown
    decided = f"thresholds: speaking {SPEAKING:.4f}, updates {DST:.4f}; evidence 0.5000"
    assert f"step 3; {decided}; strategy: slide; decision: heads;" in shown
    assert "; similarity: lexical  \n" in shown
    assert "\nnot computed: METEOR (needs what is not here), CIDEr (needs what is not here)\n" in shown
    assert (tmp_path / "metrics.md").read_text() in shown


def test_other_text_metrics_are_shown_where_they_could_be_computed(clips, checkpoint, monkeypatch, capsys):
    def sometimes(references, hypotheses):
        if monkeypatched.pop():
            raise text_metrics._Absent("the METEOR program failed: at once")
        return 0.25

    monkeypatched = [False, True, False]  # asked for the reasons, of wtag, of tiny; from the last
    monkeypatch.setattr(text_metrics, "_meteor", sometimes)
    monkeypatch.setattr(text_metrics, "_cider", lambda references, hypotheses: 0.5)
    assert call(checkpoint, "--data", clips) == 0
    shown = capsys.readouterr().out
    assert "| CIDEr | 0.500 | 0.500 | 0.500 |" in shown and "| METEOR | 0.250 |  |  |" in shown
    assert "\nnot computed: METEOR (its program failed)\n" in shown


def test_a_model_without_task_state(clips, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path, "data.dst=false", speaking=SPEAKING)
    assert call(checkpoint, "--data", clips, "--out", tmp_path / "out") == 0
    shown, results = capsys.readouterr().out, results_of(tmp_path / "out")
    assert "speaking event F1" in shown and f"thresholds: speaking {SPEAKING:.4f}; evidence 0.5000;" in shown
    for title in ("update event F1", "joint goal", "step-state", "transition", "valid updates"):
        assert title not in shown
    assert not any("dst" in name or "transition" in name or "goal" in name for name in results["tiny"])
    assert call(checkpoint, "--data", clips, "--sweep") == 0
    shown = capsys.readouterr().out
    assert "speaking, teacher-forced: event F1" in shown and "dst" not in shown.replace(str(tmp_path), "")
    assert read_state(checkpoint).thresholds.keys() == {"speaking", "evidence"}


# ---- the sweep -----------------------------------------------------------------------------------


def test_thresholds_of_clips_with_different_frame_rates():
    """At 4 fps an event may be 4 frames early, at 2 fps 2: the same figures, found and not found."""
    values, labels = np.zeros(12), np.zeros(12, int)
    values[[1, 6]], labels[4] = [0.9, 0.4], 1
    heads = [HeadTrace(values, labels, fps) for fps in (2, 4)]
    for order in (heads, heads[::-1]):
        numbers = decision_report({"speaking": order})
        # Above 0.4: one event a clip, 3 frames early, found at 4 fps alone: 2 / 4. Down to 0.4 both are found, at 6 at
        # 2 fps and at 1 or 6 at 4, and one event a clip is redundant: 4 / 6.
        assert numbers["speaking_event_f1"] == 2 * 2 / (4 + 2) and 0 < numbers["speaking_threshold"] <= 0.4


@pytest.mark.parametrize("decision", ["heads", "lm"])
def test_the_teacher_forced_pass_reads_the_heads_of_one_forward(tmp_path, decision):
    draw = np.random.default_rng(5)
    raws = [tiny_clip(draw, f"c{n}", 14 + n, replies=2, words=3) | {"fps": 2 + 2 * (n % 2)} for n in range(4)]
    file = write_clips(tmp_path, "clips.json", raws)
    checkpoint = make_checkpoint(tmp_path / "step-000003", f"infer.decision={decision}")
    config, tokenizer, model = load_for_inference(checkpoint)
    corpus = Corpus([str(file)], config.data, tokenizer, VISION_DIM, rate=1.0, seed=0)
    heads = traces(corpus, teacher_forced(model, corpus, [3, 1, 0, 2], config).sequences)
    for index, raw in enumerate(raws):
        sample = corpus[(0, index)]
        ids = torch.from_numpy(sample.input_ids)
        with torch.no_grad():  # each clip in one forward, the frames found by their token in the sequence
            hidden = model(ids[None], torch.from_numpy(sample.image_embeds))[0, ids == tokenizer.image_id]
            end = model.lm_head(hidden).softmax(-1)[:, tokenizer.end_id]
            speaking = model.speaking_decision_head(hidden)[:, 0].sigmoid() if decision == "heads" else 1 - end
            dst = model.dst_update_head(hidden)[:, 0].sigmoid()
        for head, expected, role in (("speaking", speaking, "assistant"), ("dst", dst, "DST_UPDATE")):
            found = heads[head][index]
            np.testing.assert_allclose(found.probabilities, expected.numpy(), atol=1e-5)
            turns = [turn for turn in raw["conversation"] if turn["role"] == role]
            ranges = [range(turn["start_frame"], turn["end_frame"] + 1) for turn in turns]
            positive = {int(row) + raw["start_frame_idx"] for row in np.flatnonzero(found.labels == 1)}
            assert positive <= set().union(*ranges) and all(positive & set(rows) for rows in ranges)
            assert found.fps == raw["fps"] and set(found.labels.tolist()) == {0, 1}


def test_the_sweep_stores_the_best_evidence(tmp_path, capsys):
    """Against `prospect.evaluate` itself with each evidence that the sweep may choose."""
    draw = np.random.default_rng(5)
    file = write_clips(tmp_path, "clips.json", [tiny_clip(draw, f"c{n}", 20 + n, replies=3, words=3) for n in range(5)])
    checkpoint = make_checkpoint(tmp_path / "step-000003", "infer.evidence=null", speaking=0.111, dst=0.222, seed=4)
    heads = load_file(checkpoint / "prospect.safetensors")  # of a model never trained: make their answers differ more
    decisive = {name: value * 30 if name.endswith("_head.weight") else value for name, value in heads.items()}
    save_file(decisive, checkpoint / "prospect.safetensors")
    before = json.loads((checkpoint / "state.json").read_text())
    config, tokenizer, model = load_for_inference(checkpoint)
    corpus = Corpus([str(file)], config.data, tokenizer, VISION_DIM, rate=1.0, seed=0)
    odds, report = teacher_forced_odds(model, corpus, config, [[0, 1], [2, 3, 4]])
    assert odds == {head: report[f"{head}_even_odds"] for head in ("speaking", "dst")}

    values = []
    for evidence in EVIDENCE:
        out = tmp_path / f"out{evidence}"
        words = [f"infer.{head}_threshold={value!r}" for head, value in odds.items()]
        assert call(checkpoint, "--data", file, "--out", out, *words, f"infer.evidence={evidence}") == 0
        numbers = results_of(out)["tiny"]
        of_events = (numbers["speaking_event_f1"] + numbers["dst_event_f1"]) / 2
        values.append((of_events + numbers["replies_right_f1"] + numbers["joint_goal_accuracy"]) / 3)
    assert len(set(values)) >= 3  # there was something to choose from
    stop = next((n + 1 for n in range(2, 10) if max(values[n - 1 : n + 1]) < max(values[: n - 1])), 10)
    best = [n for n in range(stop) if values[n] == max(values[:stop])]
    chosen = odds | {"evidence": EVIDENCE[best[len(best) // 2]]}

    capsys.readouterr()
    assert call(checkpoint, "--data", file, "--sweep") == 0
    after = json.loads((checkpoint / "state.json").read_text())
    assert after["thresholds"] == pytest.approx(chosen, rel=1e-9)
    assert {key: value for key, value in after.items() if key != "thresholds"} == {
        key: value for key, value in before.items() if key != "thresholds"}  # fmt: skip
    infer = load_for_inference(checkpoint)[0].infer
    found = {"speaking": infer.speaking_threshold, "dst": infer.dst_threshold, "evidence": infer.evidence}
    assert after["thresholds"] == found

    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("| 0.")]
    assert [line.split("|")[1:3] for line in lines] == [
        [f" {evidence} ", f" {value:.3f} "] for evidence, value in zip(EVIDENCE[:stop], values)]  # fmt: skip
    assert f"infer.evidence={chosen['evidence']:.6f}\n" in shown and f"stored in {checkpoint / 'state.json'}" in shown
    assert "5 clips streamed; the choice is for mean" in shown


def trained_without_goals(checkpoint: Path) -> str:
    """What is told of the seven clips, which have one, when the checkpoint says so."""
    state = read_state(checkpoint)
    state.prompts = {"goal": 0.0, "list of steps": 1.0}
    (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
    return "warning: prompts are not as in training: a goal in clip0 and 6 more (no training clip had one)\n"


def test_prompts_unlike_training_are_noted_once(clips, tmp_path, capsys):
    told = trained_without_goals(make_checkpoint(tmp_path / "step"))
    assert call(tmp_path / "step", "--data", clips) == 0
    assert capsys.readouterr().err.count(told) == 1


def test_a_sweep_under_the_other_decision_stores_nothing(clips, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path, speaking=0.111, dst=0.222)
    told = trained_without_goals(checkpoint)
    assert call(checkpoint, "--data", clips, "--sweep", "infer.decision=lm") == 0
    assert read_state(checkpoint).thresholds == {"speaking": 0.111, "dst": 0.222}
    shown, err = capsys.readouterr()
    assert err.count(told) == 1
    assert "not stored" in shown and "use infer.decision=lm" in shown and "chosen: infer.speaking_threshold=0." in shown
    # Nor are the stored ones, found for the heads, used for the LM's probability.
    assert load_for_inference(checkpoint, [])[0].infer.speaking_threshold == 0.111
    assert load_for_inference(checkpoint, ["infer.decision=lm"])[0].infer.speaking_threshold == 0.5
    own = ["infer.decision=lm", "infer.speaking_threshold=0.7"]
    assert load_for_inference(checkpoint, own)[0].infer.speaking_threshold == 0.7


def test_a_sweep_shows_every_frame_whatever_the_model_was_trained_on(clips, tmp_path):
    found = []
    for name, layout in (("stream", []), ("turns", ["data.layout=turns"]), ("few", ["data.frames=turns"])):
        (tmp_path / name).mkdir()
        checkpoint = make_checkpoint(tmp_path / name, *layout, speaking=0.111, dst=0.222)
        assert call(checkpoint, "--data", clips, "--sweep") == 0
        found.append(read_state(checkpoint).thresholds)
    assert found[0] == found[1] == found[2] and found[0]["speaking"] != 0.111


def test_frames_that_the_sequence_leaves_out_are_silent(tmp_path):
    """With data.frames=turns only four of 20 frames are shown, and the time between them must not shrink."""
    raw = raw_clip([("assistant", "Go.", 3, 4), ("assistant", "Stop.", 17, 18)], 0, 19, fps=2)
    file = write_clips(tmp_path, "clips.json", [raw])
    checkpoint = make_checkpoint(tmp_path / "step", "data.frames=turns")
    config, tokenizer, model = load_for_inference(checkpoint)
    corpus = Corpus([str(file)], config.data, tokenizer, VISION_DIM, rate=1.0, seed=0)
    heads = traces(corpus, teacher_forced(model, corpus, [0], config).sequences)
    [speaking], [dst] = heads["speaking"], heads["dst"]
    assert np.flatnonzero(speaking.probabilities).tolist() == [3, 4, 17, 18]
    labels = speaking.labels.tolist()
    assert [row for row, label in enumerate(labels) if label != -100] == [3, 4, 17, 18]
    assert speaking.events(0.0).reference == 2 and dst.events(0.0).reference == 0


# ---- ProAssist, the baseline ---------------------------------------------------------------------


def test_the_lm_decides_when_the_end_token_is_unlikely(clips, tmp_path, capsys):
    """Recorded probabilities and decisions are those of the next token at the frame."""
    checkpoint = make_checkpoint(
        tmp_path, "data.dst=false", "data.silence_lm=true", "infer.decision=lm", "infer.smoothing=1", speaking=0.9
    )
    assert call(checkpoint, "--data", clips, "--out", tmp_path / "out") == 0
    assert "thresholds: speaking 0.9000; evidence 0.5000; strategy: slide; decision: lm;" in capsys.readouterr().out
    records = records_of(tmp_path / "out" / "records" / "clip0.jsonl")
    assert all(record["speaking_decision"] == (record["speaking_prob"] >= 0.9) for record in records)

    # The first frame, by hand: its prompt, and what it makes likely to follow.
    config, tokenizer, model = load_for_inference(checkpoint)
    sample = Corpus([str(clips)], config.data, tokenizer, VISION_DIM, rate=1.0, seed=0)[(0, 0)]
    first = int(np.flatnonzero(sample.input_ids == tokenizer.image_id)[0])
    with torch.no_grad():
        hidden = model(torch.from_numpy(sample.input_ids[None, : first + 1]), torch.from_numpy(sample.image_embeds[:1]))
        follows = model.lm_head(hidden[0, -1]).softmax(-1)
    assert records[0]["speaking_prob"] == pytest.approx(1 - float(follows[tokenizer.end_id]), abs=1e-5)


@pytest.fixture(scope="module")
def proassist(tmp_path_factory) -> list[str]:
    """Overrides with which configs/proassist.yaml trains one step on a few sample clips."""
    folder = tmp_path_factory.mktemp("proassist")
    write_sample(folder / "sample", seed=0, difficulty="easy", clips=3, val_clips=2)
    return [f"run.out={folder}", f"data.train={folder}/sample/train.json", f"data.val={folder}/sample/val.json",
            "train.max_steps=1", "train.device=cpu", "infer.device=cpu", "infer.max_reply_tokens=8"]  # fmt: skip


def run_train(overrides: list[str], dry_run: bool) -> int:
    ranks = train.start_ranks("cpu")
    try:
        return train.train(load_config(ROOT / "configs" / "proassist.yaml", overrides), ranks, dry_run)
    finally:
        train.stop_ranks(ranks)


def test_proassist_s_dry_run(proassist, tmp_path, capsys):
    assert run_train([*proassist, f"run.out={tmp_path}"], dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "decision: lm" in shown and "strategy: summarize_and_drop" in shown and "dst: false" in shown
    assert not list(tmp_path.rglob("step-*"))


def test_proassist_trains_a_step_and_is_evaluated(proassist, capsys):
    assert run_train(proassist, dry_run=False) == 0
    folder = Path(proassist[0].removeprefix("run.out=")) / "proassist"
    first, evaluation = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(first["loss"]) and first["speaking_gen"] > 0 and first["loss"] == first["speaking_gen"]
    assert first["counts"]["speaking_gen"] > 50 and first["dst_gen"] == first["dst_binary"] == 0

    # What validation chose is a threshold for 1 - P(end token), and is what the checkpoint is evaluated with.
    checkpoint, val = folder / "best", proassist[2].removeprefix("data.val=")
    chosen = read_state(checkpoint).thresholds
    config, tokenizer, model = load_for_inference(checkpoint)
    infer = config.infer
    assert infer.decision == "lm" and chosen == {"speaking": infer.speaking_threshold, "evidence": infer.evidence}
    corpus = Corpus([val], config.data, tokenizer, 2048, rate=1.0, seed=0)
    odds, _ = teacher_forced_odds(model, corpus, config, [[0, 1]])
    assert chosen["speaking"] == pytest.approx(odds["speaking"], abs=1e-6) and chosen["evidence"] in EVIDENCE
    assert "streamed_replies_right_f1" in evaluation["evaluation"]
    capsys.readouterr()
    assert call(checkpoint, "--data", val, "infer.max_reply_tokens=8", "infer.speaking_threshold=1") == 0
    assert "strategy: summarize_and_drop; decision: lm" in capsys.readouterr().out
