"""prospect/vision/video.py: the task file, both paces, what the user says, real-time pace; and infer.py --video."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_stream import random_model
from tiny import tiny_config

import infer
from prospect.checkpoint import TrainState, write_state
from prospect.errors import ProspectError
from prospect.features import Features, difference, made_by, scale_of
from prospect.files import write_json
from prospect.stream import StreamSession
from prospect.tokenizer import Tokenizer, train_tokenizer
from prospect.vision import encode, video
from prospect.vision.tower import load_vision_encoder
from prospect.vision.video import Pace, load_encoder, read_task, tower_features, unheard, watch
from prospect.weights import save_model

Image = pytest.importorskip("PIL.Image")

FIXTURES = Path(__file__).parent / "fixtures" / "vision"
SIGLIP, SMOLVLM = FIXTURES / "siglip", FIXTURES / "smolvlm"
ROOT = Path(__file__).parent.parent
FRAMES = 12
TASK = {
    "goal": "Make tea",
    "system": "You watch.",
    "knowledge": "Boil, then pour.",
    "steps": [{"id": "S1", "name": "boil", "state": "completed"}, {"id": "S2", "name": "pour"}],
    "say": [{"time": 0.1, "text": "Hello."}, {"time": 2, "text": "What now?"}, {"time": 1.6, "text": "Sugar?"}],
}


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory) -> Path:
    """Twelve pictures of nothing but noise, as a directory: six seconds at 2 fps."""
    folder = tmp_path_factory.mktemp("video") / "kitchen.1"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(FRAMES):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint as train.py writes it, of a model never trained, for the fixture's width of 32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    directory = folder / "step-000001"
    train_tokenizer(["User: what now", "Assistant: put it on top", "[DST_UPDATE] S1->start"], 280, directory)
    tokenizer = Tokenizer(directory, "plain")
    model = random_model(tokenizer, 1, vision_dim=32)
    save_model(model, directory, eos_token_id=tokenizer.end_id)
    tokenizer.save(directory)
    shape = ["model.vision_dim=32", "infer.max_reply_tokens=8", "infer.max_update_tokens=8", "infer.device=cpu"]
    prompts = {"goal": 1.0, "list of steps": 1.0, "recipe": 0.0}  # of the clips it was trained on
    state = TrainState(step=1, thresholds={"speaking": 0.5, "dst": 0.59}, prompts=prompts)
    write_state(directory, state, tiny_config(folder, *shape))
    return directory


def task_file(folder: Path, **changes: object) -> Path:
    path = folder / "steps.yaml"
    path.write_text(yaml.safe_dump(TASK | changes), encoding="utf-8")
    return path


def session_of(checkpoint: Path, clip, *overrides: str) -> StreamSession:
    config, tokenizer, model = infer.load_for_inference(checkpoint, list(overrides))
    return StreamSession(model, tokenizer, clip, config)


# ---- the task file -------------------------------------------------------------------------------


def test_a_task_becomes_a_clip_and_what_is_said_in_it(kitchen, tmp_path):
    clip, said = read_task(task_file(tmp_path), kitchen, Fraction(2))
    assert (clip.id, clip.goal, clip.knowledge, clip.fps) == ("kitchen", "Make tea", "Boil, then pour.", 2.0)
    assert (clip.start_frame, clip.end_frame) == (0, FRAMES - 1)
    assert [(step.id, step.name) for step in clip.steps] == [("S1", "boil"), ("S2", "pour")]
    assert clip.initial_state == {"S1": "completed", "S2": "not_started"}
    assert [(turn.role, turn.text) for turn in clip.turns] == [("system", "You watch.")]
    # 0.1 s lies between frames 0 and 1 (0.5 s), 1.6 s between 3 and 4; at 2 s frame 4 itself is shown. 0.0 is frame 0.
    assert said == {1: ["Hello."], 4: ["Sugar?", "What now?"]}
    assert read_task(task_file(tmp_path, say=[{"time": 0, "text": "Hi"}]), kitchen, Fraction(2))[1] == {0: ["Hi"]}
    # At 10 fps, 0.1 s is frame 1 exactly, though the float 0.1 is a little more than a tenth.
    assert list(read_task(task_file(tmp_path), kitchen, Fraction(10))[1]) == [1, 16, 20]
    assert unheard(said, 4) == ["Sugar?", "What now?"] and unheard(said, 5) == []


def test_without_a_task_there_is_neither_goal_nor_step(kitchen):
    clip, said = read_task(None, kitchen, Fraction(2))
    assert (clip.goal, clip.steps, clip.turns, clip.initial_state, said) == ("", (), (), {}, {})


@pytest.mark.parametrize("changes, message", [
    ({"goals": "x"}, r"steps.yaml: unknown key goals \(the keys are goal, knowledge, say, steps, system\)"),
    ({"goal": 3}, "steps.yaml, goal: must be text, not 3"),
    ({"goal": " "}, "steps.yaml, goal: must be text"),
    ({"goal": "\ud800"}, "goal: holds half a surrogate pair"),
    ({"steps": "S1"}, "steps.yaml, steps: must be a list of {id, name, state}"),
    ({"steps": [["S1", "boil"]]}, "steps: must be a list of"),
    ({"steps": [{"id": "S1", "nam": "boil"}]}, r"steps\[0\]: unknown key nam"),
    ({"steps": [{"id": 1, "name": "boil"}]}, r"steps\[0\], id: must be text, not int"),
    ({"steps": [{"id": "S1"}]}, r"steps\[0\], name: must be text"),
    ({"steps": [{"id": "S1", "name": "a"}, {"id": "S1", "name": "b"}]}, r"steps\[1\], id: 'S1' occurs twice"),
    ({"steps": [{"id": "S1->S2", "name": "a"}]}, "cannot be written in an update"),
    ({"steps": [{"id": "S1", "name": "a", "state": "done"}]}, r"steps\[0\], state: unknown state 'done'"),
    ({"steps": [{"id": "S1", "name": "a", "state": ["x"]}]}, r"steps\[0\], state: unknown state"),
    ({"say": [{"time": "soon", "text": "a"}]}, r"say\[0\], time: must be seconds from the video's .*, not 'soon'"),
    ({"say": [{"time": -1, "text": "a"}]}, r"say\[0\], time: must be seconds"),
    ({"say": [{"time": float("nan"), "text": "a"}]}, r"say\[0\], time: must be seconds"),
    ({"say": [{"text": "a"}]}, r"say\[0\], time: must be seconds"),
    ({"say": [{"time": 1}]}, r"say\[0\], text: must be text"),
    ({"say": {"time": 1}}, "say: must be a list of {text, time}"),
])  # fmt: skip
def test_what_is_wrong_with_a_task_is_named(kitchen, tmp_path, changes, message):
    with pytest.raises(ProspectError) as caught:
        read_task(task_file(tmp_path, **changes), kitchen, Fraction(2))
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("content, message", [
    (b"goal: [", "is not YAML"), (b"goal: Tea", "must have goal and steps"), (b"- goal", "must have goal and steps"),
    (b"", "must have goal and steps"), (b"goal: \xff", "cannot be read"), (None, "cannot be read"),
])  # fmt: skip
def test_what_is_no_task_file(kitchen, tmp_path, content, message):
    path = tmp_path / "steps.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProspectError, match=message):
        read_task(path, kitchen, Fraction(2))


# ---- streaming -----------------------------------------------------------------------------------


def test_the_records_are_those_of_pictures_encoded_and_fed_one_by_one(kitchen, checkpoint, tmp_path):
    clip, said = read_task(task_file(tmp_path), kitchen, Fraction(2))
    one_by_one = session_of(checkpoint, clip)
    encoder = load_vision_encoder(SIGLIP)
    wanted = []
    with torch.inference_mode():
        for number in range(FRAMES):
            array = np.array(Image.open(kitchen / f"{number:03d}.png"))
            for text in {1: ["Hello."], 4: ["Sugar?", "What now?"]}.get(number, []):
                one_by_one.say(text)
            wanted.append(one_by_one.feed(encoder([torch.from_numpy(array).permute(2, 0, 1)])[0].half()))

    session, report = session_of(checkpoint, clip, "infer.lookahead=5"), Pace(Fraction(2))
    found = list(watch(session, load_encoder(SIGLIP, None, None, session), kitchen, said, Fraction(2), False, report))
    for name in ("frame_idx", "time", "user", "text", "dst_update", "speaking_decision", "dst_state"):
        assert [getattr(record, name) for record in found] == [getattr(record, name) for record in wanted], name
    probabilities = [[record.speaking_prob for record in records] for records in (found, wanted)]
    np.testing.assert_allclose(*probabilities, atol=1e-2)  # batches round otherwise, and rows are float16
    assert 0 < sum(record.speaking_decision for record in found) < FRAMES  # some frames end a stretch, some do not
    assert report.frames == FRAMES


class FakeClock:
    """Time that passes only when someone sleeps or `spend` is called."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.mark.parametrize("live, lookahead, sizes, worst, seconds", [
    # Live, 2 fps. A batch costs 0.1 s, the one with frame 2 1.2 s more: shown at 1.0 it is done at 2.3. By then frames
    # 3 (1.5) and 4 (2.0) wait and go together, done at 2.4; frame 5 (2.5) is on time again. The last is shown at 5.5.
    (True, 32, [1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1], (1.3, 2), 5.6),
    (True, 1, [1] * 12, (1.3, 2), 5.6),  # one by one: 3 is done at 2.4, 4 at 2.5, 5 at 2.6
    (False, 5, [5, 5, 2], (1.3, 0), 1.5),  # fast: no one waits; frame 0 is answered with the first batch, at 1.3 s
])  # fmt: skip
def test_both_paces_on_a_clock_of_our_own(kitchen, checkpoint, monkeypatch, live, lookahead, sizes, worst, seconds):
    clock, found, encode_batch = FakeClock(), [], video.encode_batch

    def encode_slowly(encoder, pictures, precision):
        first = sum(found)
        found.append(len(pictures))
        clock.now += 0.1 + 1.2 * (first <= 2 < first + len(pictures))
        return encode_batch(encoder, pictures, precision)

    monkeypatch.setattr(video, "time", clock)
    monkeypatch.setattr(video, "encode_batch", encode_slowly)
    overrides = [f"infer.lookahead={lookahead}", "infer.speaking_threshold=1", "infer.dst_threshold=1"]
    session, report = session_of(checkpoint, read_task(None, kitchen, Fraction(2))[0], *overrides), Pace(Fraction(2))
    encoder = load_encoder(SIGLIP, None, None, session)
    records = list(watch(session, encoder, kitchen, {}, Fraction(2), live, report))
    assert [record.frame_idx for record in records] == list(range(FRAMES))
    assert found == sizes
    assert (max(report.lags), report.worst_frame) == (pytest.approx(worst[0]), worst[1])
    assert report.seconds == pytest.approx(seconds) and report.frames == FRAMES


def test_live_takes_the_time_of_the_video(kitchen, checkpoint):
    fps = Fraction(20)
    session, report = session_of(checkpoint, read_task(None, kitchen, fps)[0]), Pace(fps)
    encoder = load_encoder(SIGLIP, None, None, session)
    begin = time.perf_counter()
    assert len(list(watch(session, encoder, kitchen, {}, fps, True, report))) == FRAMES
    assert time.perf_counter() - begin >= report.seconds >= 11 / 20  # frame 11 is shown 0.55 s after frame 0


def test_the_report_of_the_drawing_at_the_top():
    report = Pace(Fraction(2))
    for frame, seconds in enumerate([0.1, 0.6, 1.3, 1.6, 2.1]):
        report.note(frame, 1, seconds)
    line = "5 frames, 2.5 s of video, in 2.1 s (1.19 times real time)"
    line += (
        "; lag p50 0.10 s, p95 0.26 s, p99 0.29 s, worst 0.30 s at 1.0 s of the video"  # 0.1 + 0.8 * 0.2, 0.96 * 0.2
    )
    assert str(report) == line
    early = Pace(Fraction(2))
    early.note(2, 8, 0.5)  # a frame that is answered before its moment has no lag
    assert (early.frames, early.lags) == (8, [0.0] * 8)


def test_frames_that_waited_too_long_are_left_out_and_counted(kitchen, checkpoint, monkeypatch):
    """Frame 2, shown at 1.0 s, is done at 2.75. By then 3 (1.5 s) and 4 (2.0) have waited more than 0.5 s; not 5."""
    clock, encode_batch, taken = FakeClock(), video.encode_batch, []

    def encode_slowly(encoder, pictures, precision):
        taken.append(len(pictures))
        clock.now += 1.75 if len(taken) == 3 else 0.125
        return encode_batch(encoder, pictures, precision)

    monkeypatch.setattr(video, "time", clock)
    monkeypatch.setattr(video, "encode_batch", encode_slowly)
    session, report = session_of(checkpoint, read_task(None, kitchen, Fraction(2))[0]), Pace(Fraction(2))
    encoder, said = load_encoder(SIGLIP, None, None, session), {3: ["Wait."], 4: ["Now?"], 5: ["Hello?"]}
    records = list(watch(session, encoder, kitchen, said, Fraction(2), True, report, 0.5))
    assert [record.frame_idx for record in records] == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert [record.user for record in records if record.user] == [["Wait.", "Now?", "Hello?"]]
    assert (report.frames, report.left_out, max(report.lags)) == (10, 2, 1.75)
    assert str(report).startswith("10 frames, 6.0 s of video, in 5.6 s") and str(report).endswith("; 2 frames left out")


def test_another_width_and_vectors_that_are_not_finite(kitchen, checkpoint, monkeypatch):
    session = session_of(checkpoint, read_task(None, kitchen, Fraction(2))[0])
    with pytest.raises(ProspectError, match="gives vectors of 20 numbers, the model was trained on 32"):
        load_encoder(SMOLVLM, None, None, session)
    encoder = load_encoder(SIGLIP, None, 5, session)
    assert encoder.vectors_per_frame == 5
    rows = np.zeros((FRAMES, 5, 32), np.float16)
    rows[7, 3, 1] = np.inf
    monkeypatch.setattr(video, "encode_batch", lambda *_: rows)
    with pytest.raises(ProspectError, match="frame 7 gives a vector that is not finite"):
        list(watch(session, encoder, kitchen, {}, Fraction(2), False, Pace(Fraction(2))))


def test_leaving_early_stops_the_decoding(kitchen, checkpoint):
    session = session_of(checkpoint, read_task(None, kitchen, Fraction(2))[0], "infer.lookahead=2")
    encoder, report = load_encoder(SIGLIP, None, None, session), Pace(Fraction(2))
    before = threading.active_count()
    records = watch(session, encoder, kitchen, {}, Fraction(2), False, report)
    assert [record.frame_idx for record in itertools.islice(records, 3)] == [0, 1, 2]
    records.close()
    assert threading.active_count() == before


# ---- the command ---------------------------------------------------------------------------------


def call(capsys, checkpoint: Path, *arguments: object) -> tuple[str, str]:
    """infer.main in this process; returns what it printed on both streams."""
    argv, sys.argv = sys.argv, ["infer.py", "--checkpoint", *map(str, [checkpoint, *arguments])]
    try:
        assert infer.main() == 0
    finally:
        sys.argv = argv
    return capsys.readouterr()


def test_infer_shows_the_dialogue_and_reports(kitchen, checkpoint, tmp_path, capsys):
    task = task_file(tmp_path, say=[*TASK["say"], {"time": 5.51, "text": "Too late."}])
    out = tmp_path / "records.jsonl"
    shown, told = call(capsys, checkpoint, "--video", kitchen, "--vision", SIGLIP, "--task", task, "--out", out)
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["frame_idx"] for record in records] == list(range(FRAMES))
    lines = shown.splitlines()
    assert lines[:3] == [
        "kitchen: Make tea  (frames 0..11, 2 per second)", "    S1 boil [completed]", "    S2 pour [not_started]",
    ]  # fmt: skip
    assert "  0:02.0  user       What now?" in lines and "  0:00.5  user       Hello." in lines
    assert shown.count("  assistant  ") == sum(record["text"] is not None for record in records) > 0
    assert lines[-1].startswith(f"{kitchen}: 12 frames, 6.0 s of video, in ")
    assert told == "warning: the user said 'Too late.' after the last frame\n"


def test_infer_draws_a_video_with_its_pictures(kitchen, checkpoint, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["--video", kitchen, "--vision", SIGLIP, "--task", task_file(tmp_path), "--html", page]
    shown, _ = call(capsys, checkpoint, *words)
    assert f"\npage: {page}  (" in shown
    text = page.read_text()
    [clip] = json.loads(text[text.index('id="data">') + len('id="data">') : text.index("</script>")])["clips"]
    assert (clip["goal"], clip["has_reference"], len(clip["tokens"])) == ("Make tea", False, FRAMES)
    assert [row for row, _ in clip["pictures"]] == list(range(FRAMES))
    assert {event["text"] for event in clip["events"] if event["lane"] == "user"} == {"Hello.", "What now?", "Sugar?"}


def test_infer_without_a_task_at_another_rate(kitchen, checkpoint, tmp_path, capsys):
    options = ["--vision", SIGLIP, "--tokens", 5, "--fps", "24", "--pace", "live"]
    shown, told = call(capsys, checkpoint, "--video", kitchen, *options)
    assert shown.startswith("kitchen:   (frames 0..11, 24 per second)\n")
    assert "12 frames, 0.5 s of video" in shown
    had = "(every training clip had one)"
    assert (
        told
        == f"warning: prompts are not as in training: no goal in kitchen {had}; no list of steps in kitchen {had}\n"
    )


def test_a_tower_unlike_the_one_of_training_is_one_line(kitchen, checkpoint, tmp_path, capsys):
    """By what encode writes beside the embeddings that training reads; else by how large its first vectors are."""
    assert encode.main([str(kitchen), "--vision", str(SIGLIP), "--out", str(tmp_path / "rows")]) == 0
    path = tmp_path / "rows" / f"{kitchen.name}_embeddings.npy"
    made, scale = made_by(path), scale_of([np.load(path)])
    assert made.keys() >= {"model", "weights_sha256", "pool"}
    large = {name: 3 * value for name, value in scale.items()}
    other = made | {"weights_sha256": "of another"}
    for trained, tokens, told in [
        (Features(made, scale), 1, ""),
        (Features(made, large), 1, ""),  # this very tower: how much light a video has does not matter
        (Features(made, scale), 5, "vectors_per_frame 5, not 1"),
        (Features(other, scale), 1, f"weights_sha256 {made['weights_sha256'][:40]}, not of another"),
        (Features({}, scale), 1, ""),
        (Features({}, large), 1, "norm "),
        (Features({}, {}), 1, ""),
    ]:
        encoder = load_vision_encoder(SIGLIP, None, tokens)
        found = difference(tower_features(encoder, SIGLIP, kitchen, Fraction(2), trained), trained)
        assert found.startswith(told) and bool(found) == bool(told), trained

    copy = Path(shutil.copytree(checkpoint, tmp_path / "step-000001"))
    state = TrainState(step=1, thresholds={"speaking": 0.5, "dst": 0.59}, features=other, scale=scale)
    write_json(copy / "state.json", asdict(state))
    silent = ["infer.speaking_threshold=1", "infer.dst_threshold=1", "infer.coupling=0"]
    capsys.readouterr()
    _, errors = call(capsys, copy, "--video", kitchen, "--vision", SIGLIP, *silent)
    assert errors.count("\n") == 1 and "warning: the embeddings are not like those" in errors


@pytest.mark.parametrize("arguments, message", [
    (["--video", "{kitchen}"], "--video needs --vision"),
    (["--video", "{kitchen}", "--vision", "{tower}", "--stdin"], "--stdin"),
    (["--video", "{kitchen}/000.txt", "--vision", "{tower}"], "cannot be opened as a video"),
    (["--video", "{kitchen}", "--vision", "{kitchen}"], "config.json: cannot be read"),
    (["--video", "{kitchen}", "--vision", "{tower}", "--out", "{task}", "--task", "{task}"], "itself"),
    (["--clip", "{task}", "--vision", "{tower}"], "--vision"),
])  # fmt: skip
def test_infer_refuses_before_anything_is_written(kitchen, checkpoint, tmp_path, capsys, arguments, message):
    task = task_file(tmp_path)
    before = task.read_bytes()
    with pytest.raises(ProspectError) as caught:
        call(capsys, checkpoint, *[argument.format(kitchen=kitchen, tower=SIGLIP, task=task) for argument in arguments])
    assert message in str(caught.value) and task.read_bytes() == before


@pytest.mark.parametrize("arguments", [[], ["--clip", "a", "--video", "b"], ["--video", "a", "--fps", "0"]])
def test_options_that_do_not_go_together(arguments):
    command = [sys.executable, "infer.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "infer.py: error: " in done.stderr
