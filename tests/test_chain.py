"""The whole chain: pictures -> embeddings -> training -> a video file -> an assistant that finds the events in it.

Stories of the sample world's first task are drawn as pictures: each look is a pattern of coloured blocks, and every
picture has noise of its own. The tower that sees them is the tiny random SigLIP of tests/fixtures. Nothing is called
from inside: `python -m prospect.encode`, `train.py` and `infer.py --video` are run as a user runs them.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from prospect.clip_files import parse_clip
from prospect.metrics import Counts, event_counts
from prospect.sample import DIFFICULTIES, FPS, Story, act_out, seen_looks, write_clip

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parent.parent
TOWER = Path(__file__).parent / "fixtures" / "vision" / "siglip"
WIDTH = 32  # of the tower's pooled output
BLOCKS, SIDE = 5, 80  # blocks along one side of a picture, and its pixels: 16 a block, so that codecs cut along them
LONGEST = 150  # frames of a story
TRAIN, VAL, HELD_OUT = 90, 4, 6
VIDEO_FPS = 4  # pictures a second of the videos: every other one is a frame


def stories(count: int) -> list[Story]:
    """Short stories of the first task, each from the video's first frame on."""
    rng, found = np.random.default_rng(0), []
    while len(found) < count:
        story = act_out(rng, DIFFICULTIES["easy"])
        if story.task == 0 and story.num_rows <= LONGEST:
            found.append(replace(story, start_frame=0))
    return found


def pictures(looks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Looks [n] as pictures, uint8 [n, SIDE, SIDE, 3]: the blocks of each look, and noise on every pixel."""
    blocks = np.random.default_rng(1).integers(0, 2, (19, BLOCKS, BLOCKS, 3)) * 200 + 28  # of all looks of a task
    place = np.arange(SIDE) * BLOCKS // SIDE  # the block that a pixel lies in
    clean = blocks[looks][:, place][:, :, place]  # [n, SIDE, SIDE, 3]
    return (clean + rng.normal(0, 10, clean.shape)).clip(0, 255).astype(np.uint8)


def write_directory(folder: Path, shown: np.ndarray) -> None:
    folder.mkdir()
    for number, picture in enumerate(shown):
        Image.fromarray(picture).save(folder / f"{number:04d}.jpg", quality=95)


def write_video(path: Path, shown: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=VIDEO_FPS)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 4_000_000
        for picture in shown:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_task(path: Path, clip: dict) -> None:
    """What is known before the video is watched, and what the user says in it."""
    parsed, _ = parse_clip(clip, "clips", 0)
    said = [turn for turn in parsed.turns if turn.role == "user"]
    task = {
        "goal": clip["inferred_goal"],
        "system": next(turn.text for turn in parsed.turns if turn.role == "system"),
        "steps": [{"id": s.id, "name": s.name, "state": parsed.initial_state[s.id]} for s in parsed.steps],
        "say": [{"time": turn.end_frame / FPS, "text": turn.text} for turn in said],
    }
    path.write_text(yaml.safe_dump(task), encoding="utf-8")


def configuration(folder: Path) -> dict:
    """Two layers of width 64, 400 steps: half a minute on one core."""
    return {
        "run": {"name": "chain", "out": str(folder)},
        "model": {
            "vision_dim": WIDTH, "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        },
        "data": {
            "train": [str(folder / "train.json")], "val": [str(folder / "val.json")], "sample": None,
            "max_seq_len": 1024, "batch_tokens": 1024, "neg_frame_sampling_rate": 1.0,
        },
        "train": {
            "max_steps": 400, "learning_rate": 4e-3, "warmup_steps": 10, "eval_every": 100, "save_every": 400,
            "device": "cpu",
        },
    }  # fmt: skip


def run(*command: object) -> str:
    """`python COMMAND` at the repository's root, on one core; what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_world(folder: Path) -> list[Story]:
    """Pictures, videos, task files, clip files and the configuration; returns the stories."""
    found = stories(TRAIN + VAL + HELD_OUT)
    clips = []
    for number, story in enumerate(found):
        rng = np.random.default_rng([2, number])
        clips.append(write_clip(story, f"story{number}", rng) | {"id": f"story{number}"})
        looks = seen_looks(story)  # [F]
        if number < TRAIN + VAL:
            write_directory(folder / f"story{number}", pictures(looks, rng))
        else:
            write_video(folder / f"story{number}.mp4", pictures(looks.repeat(VIDEO_FPS // FPS), rng))
            write_task(folder / f"story{number}.yaml", clips[-1])
    (folder / "train.json").write_text(json.dumps(clips[:TRAIN]), encoding="utf-8")
    (folder / "val.json").write_text(json.dumps(clips[TRAIN : TRAIN + VAL]), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder)), encoding="utf-8")
    return found


def watch_one(folder: Path, number: int, story: Story) -> tuple[Counts, Counts]:
    """`infer.py --video` on a story never trained on: what it says and which updates it makes, against the story."""
    name = folder / f"story{number}"
    options = ["--vision", TOWER, "--task", f"{name}.yaml", "--checkpoint", folder / "chain" / "best"]
    shown = run("infer.py", "--video", f"{name}.mp4", *options, "--out", f"{name}.jsonl", "infer.device=cpu")
    records = [json.loads(line) for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["frame_idx"] for record in records] == list(range(story.num_rows))

    # What was recorded was also shown, and what the user said was heard.
    assert shown.count("  assistant  ") == sum(record["text"] is not None for record in records)
    asked = [event for event in story.events if event.kind in ("open", "question")]
    assert sum(len(record["user"]) for record in records) == shown.count("  user       ") == len(asked)
    assert f"{story.num_rows} frames, {story.num_rows / FPS:.1f} s of video, in " in shown

    # Everything said and every update is an event of its own.
    clip, _ = parse_clip(write_clip(story, "story", np.random.default_rng(0)), "clips", 0)
    said, updated = (
        [record["frame_idx"] for record in records if record[decision]]
        for decision in ("speaking_decision", "dst_update_decision")
    )
    return event_counts(said, clip.events("assistant"), FPS), event_counts(updated, clip.events("DST_UPDATE"), FPS)


@pytest.mark.slow
def test_from_pictures_to_an_assistant(tmp_path):
    found = write_world(tmp_path)
    folders = [tmp_path / f"story{number}" for number in range(TRAIN + VAL)]
    run("-m", "prospect.encode", *folders, "--vision", TOWER, "--out", tmp_path / "embeddings")
    run("train.py", tmp_path / "config.yaml")

    speaking, updates = Counts(), Counts()
    for number in range(TRAIN + VAL, len(found)):
        of_speaking, of_updates = watch_one(tmp_path, number, found[number])
        speaking, updates = speaking + of_speaking, updates + of_updates
    assert min(speaking.reference, updates.reference) >= 10  # enough to tell 0.9 from luck
    assert speaking.f1 >= 0.9 and updates.f1 >= 0.9, f"speaking {speaking}, updates {updates}"
