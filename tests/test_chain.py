"""Whole chains, from what people have to an assistant that speaks. Nothing is called from inside: every command is run
as a user runs it, and where one prints the next, that very line.

    published dialogues with features or frames, clips with step times, videos with step annotations    short ones
    pictures -> embeddings -> training -> a video file -> an assistant that finds the events in it      a real task

The tower that sees pictures is the tiny random SigLIP of tests/fixtures. In the short chains a video has four looks,
and what is said or done as one begins is learned by heart. In the long one stories of the sample world's first task are
drawn: each look is a pattern of coloured blocks, and every picture has noise of its own.
"""

import base64
import io
import json
import os
import shlex
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
pyarrow = pytest.importorskip("pyarrow")

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"  # published dialogues and a real clip: not part of the project
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


# ---- short chains --------------------------------------------------------------------------------


BEGINS = (8, 18, 28)  # the frames at which a look begins, after the first look; a video has 40 frames
SAID = ("First, boil the water.", "Now pour it over the tea.", "Well done, the tea is ready.")
STEPS = [("Boil the water", 4.0, 9.0), ("Pour it over the tea", 9.0, 14.0)]  # seconds; frames 8 to 18 to 28
SMALL = (
    "train.max_steps=60 train.eval_every=60 train.learning_rate=4e-3 train.device=cpu infer.device=cpu "
    "model.vocab_size=300 model.hidden_size=64 model.intermediate_size=128 model.num_hidden_layers=2 run.out="
)


def look(frame: int) -> int:
    return sum(frame >= begin for begin in BEGINS)


def photographs(seed: int) -> list[Image.Image]:
    """40 pictures: a plain colour for each look, and noise."""
    rng, colours = np.random.default_rng(seed), np.array([[40, 40, 40], [220, 60, 60], [60, 220, 60], [60, 60, 220]])
    noise = rng.normal(0, 10, (40, SIDE, SIDE, 3))
    shown = (colours[[look(frame) for frame in range(40)]][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in shown]


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file.getvalue()


def write_arrow(path: Path, columns: dict[str, pyarrow.Array]) -> None:
    """As the `datasets` library writes it: a stream of batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)


def features(frames: list[int], seed: int, width: int = 16) -> dict[str, pyarrow.Array]:
    """ProAssist's feature columns: a vector for each look, and noise. Lists of lists of float16."""
    looks = np.random.default_rng(0).normal(size=(4, width))
    noise = np.random.default_rng([1, seed])
    kind = pyarrow.list_(pyarrow.list_(pyarrow.float16()))
    columns = {}
    for name, vectors in (("cls", 1), ("2x2", 4), ("3x3", 9), ("5x5", 25)):
        rows = looks[frames][:, None] + 0.2 * noise.normal(size=(len(frames), vectors, width))
        columns[name] = pyarrow.array([list(row) for row in rows.astype(np.float16)], kind)
    return columns


def prepared(video: str) -> dict:
    """A dialogue in ProAssist's prepared format over frames 2..39, written by hand."""
    talk, shown = [{"role": "system", "content": "You help."}], 2
    turns = [(8, "user", "I want to make tea.")] + [(begin + 1, "assistant", said) for begin, said in zip(BEGINS, SAID)]
    for end, role, content in [*turns, (40, None, "")]:
        if end > shown:
            talk.append({"role": "frames", "start": shown, "end": end})
            shown = end
        if role:
            talk.append({"role": role, "content": content, "time": end / 2})
    return {
        "dataset": "wtag", "video_uid": video, "clip_idx": 0, "frames_file": f"frames/{video}.arrow", "fps": 2,
        "start_frame_idx": 2, "end_frame_idx": 40, "conversation": talk,
        "metadata": {"user_id": "talk_1", "task_goal": "Make tea", "knowledge": "Tea\n1. Boil the water\n2. Pour"},
    }  # fmt: skip


def follow(printed: str, *more: object, **filled: object) -> str:
    """The command that a command printed, at the shell, with `more` behind it and words in capitals filled in."""
    command = printed.split("next:\n")[1].splitlines()[0]
    for word, value in filled.items():
        command = command.replace(word, str(value))
    command = shlex.join(["env", "OMP_NUM_THREADS=1", sys.executable]) + command.removeprefix("python")
    command += f" {shlex.join(map(str, more))}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def learned_and_streamed(checked: str, folder: Path) -> tuple[list[dict], str]:
    """From the checker's output on: training, a streamed clip, evaluation. The clip's records and the last table."""
    trained = follow(checked, *f"{SMALL}{folder}/runs".split())
    streamed = follow(trained, "--out", folder / "records.jsonl")
    table = follow(streamed)
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()], table


def at(records: list[dict], field: str) -> list[tuple[int, str]]:
    return [(look(record["frame_idx"]), record[field]) for record in records if record[field] is not None]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["features, 1 token", "features, 5 tokens", "frames"])
def test_published_dialogues(tmp_path, given):
    data = tmp_path / "wtag"
    (data / "prepared").mkdir(parents=True)
    for split, videos in (("train", ["a", "b"]), ("val", ["c"])):
        lines = [json.dumps(prepared(video)) for video in videos]
        (data / "prepared" / f"{split}.jsonl").write_text("\n".join(lines))
        for video in videos:
            if given == "frames":
                pictures = [base64.b64encode(jpeg(picture)).decode() for picture in photographs(ord(video))]
                write_arrow(data / "frames" / f"{video}.arrow", {"frame": pyarrow.array(pictures)})
            else:
                columns = features([look(frame) for frame in range(40)], ord(video))
                write_arrow(data / "features" / "google___siglip@-2" / f"{video}.arrow", columns)
    tokens = ["--tokens", 5] if given == "features, 5 tokens" else []
    for split in ("val", "train"):
        converted = run(
            "-m", "prospect.convert", "proassist", data / "prepared" / f"{split}.jsonl", tmp_path / f"{split}.json"
        )
        checked = follow(follow(converted, *tokens, VISION_DIR=TOWER))
    checked = run("-m", "prospect.check", tmp_path / "train.json", tmp_path / "val.json")
    rows = np.load(tmp_path / "embeddings" / "c_frames_2_39.npy")
    assert rows.shape == {"features, 1 token": (38, 16), "features, 5 tokens": (38, 5, 16), "frames": (38, 32)}[given]
    records, table = learned_and_streamed(checked, tmp_path)
    assert at(records, "text") == list(zip((1, 2, 3), SAID))
    assert "| wtag |" in table and "checkpoint: " in table


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="ProAssist's dialogues are not part of the project")
@pytest.mark.parametrize("given", ["features", "frames"])
def test_every_real_dialogue_goes_all_the_way(tmp_path, given):
    """Generated frames or features of each dialogue's video: two steps of training, a streamed clip, the table."""
    data = tmp_path / "assembly101"
    (data / "prepared").mkdir(parents=True)
    real = [json.loads(line) for line in (REAL / "proassist_prepared.jsonl").read_text(encoding="utf-8").splitlines()]
    made_up = prepared("c")  # for validation: the real ones are of one video
    for split, dialogues in (("train", real), ("val", [made_up])):
        lines = [json.dumps(dialogue) for dialogue in dialogues]
        (data / "prepared" / f"{split}.jsonl").write_text("\n".join(lines))
    names = {dialogue["frames_file"] for dialogue in [*real, made_up]}
    for name in names:
        rows = max(dialogue["end_frame_idx"] for dialogue in [*real, made_up] if dialogue["frames_file"] == name)
        if given == "frames":
            pictures = [base64.b64encode(jpeg(photographs(0)[0])).decode()] * rows
            write_arrow(data / name, {"frame": pyarrow.array(pictures)})
        else:
            columns = features([frame % 4 for frame in range(rows)], 0)
            write_arrow(data / "features" / "google___siglip@-2" / Path(name).name, columns)
    for split in ("val", "train"):
        converted = run(
            "-m", "prospect.convert", "proassist", data / "prepared" / f"{split}.jsonl", tmp_path / f"{split}.json"
        )
        follow(converted, VISION_DIR=TOWER)
    checked = run("-m", "prospect.check", tmp_path / "val.json", tmp_path / "train.json")
    assert f"{len(real) + 1} clips" in checked and ": 0 errors, 0 warnings" in checked
    trained = follow(checked, *f"{SMALL}{tmp_path}/runs".split(), "train.max_steps=2", "infer.max_reply_tokens=8")
    table = follow(follow(trained, "infer.max_reply_tokens=8"), "infer.max_reply_tokens=8")
    assert "| assembly101 |" in table


def clip(video: str, **fields: object) -> dict:
    """A clip with step times and a dialogue, and no update."""
    talk = [{"role": "user", "content": "I want to make tea.", "start_frame": 7, "end_frame": 8}]
    for begin, said in zip(BEGINS, SAID):
        talk.append({"role": "assistant", "content": said, "start_frame": begin, "end_frame": begin})
    return {
        "video_uid": video, "clip_idx": 0, "fps": 2, "start_frame_idx": 2, "end_frame_idx": 39, "conversation": talk,
        "inferred_goal": "Make tea", **fields,
    }  # fmt: skip


MOVES = ["S1->start", "S1->complete, S2->start", "S2->complete"]


@pytest.mark.slow
@pytest.mark.parametrize("given", ["step times", "a recipe"])
def test_clips_without_updates(tmp_path, given):
    for split, videos in (("train", ["a", "b"]), ("val", ["c"])):
        steps = [{"id": f"S{n}", "name": name, "start_ts": s, "end_ts": e} for n, (name, s, e) in enumerate(STEPS, 1)]
        recipe = "Tea\n1. Boil the water\n2. Pour it over the tea"
        fields = {"dst": steps} if given == "step times" else {"dst": [], "inferred_knowledge": recipe}
        (tmp_path / f"{split}.json").write_text(json.dumps([clip(video, **fields) for video in videos]))
        for video in videos:
            folder = tmp_path / video
            folder.mkdir()
            for frame, picture in enumerate(photographs(ord(video))):
                picture.save(folder / f"{frame}.png")
        if given == "a recipe":
            timed = run("-m", "prospect.convert", "steps", tmp_path / f"{split}.json", tmp_path / "timed.json")
            made = follow(timed.replace("timed_states.json", f"{split}_states.json"))
        else:
            made = run(
                "-m", "prospect.convert", "states", tmp_path / f"{split}.json", tmp_path / f"{split}_states.json"
            )
        assert f"{len(videos)} clips: {3 * len(videos)} updates made" in made
        if split == "train":
            folders = shlex.join(str(tmp_path / video) for video in videos)
            follow(made, **{"VIDEO ...": folders, "VISION_DIR": TOWER})
    val = ["--clips", tmp_path / "val_states.json", "--out", tmp_path / "embeddings"]
    run("-m", "prospect.encode", tmp_path / "c", "--vision", TOWER, *val)
    checked = run("-m", "prospect.check", tmp_path / "train_states.json", tmp_path / "val_states.json")
    records, table = learned_and_streamed(checked, tmp_path)
    assert at(records, "dst_update") == list(zip((1, 2, 3), MOVES))
    assert at(records, "text") == list(zip((1, 2, 3), SAID))
    assert "joint goal" in table.lower()


@pytest.mark.slow
def test_videos_with_step_annotations(tmp_path):
    """There is no dialogue, so the assistant is silent and tracks the task."""
    rows = [f"{kind}\t{start}\t{end}\t{name}" for name, start, end in STEPS for kind in ("step", "action")]
    rows += ["step\t\t\tDrink it"]  # no one knows when
    for split, videos in (("train", ["a", "b"]), ("val", ["c"])):
        (tmp_path / split).mkdir()
        for video in videos:
            table = "\n".join(["type\tstart_ts\tend_ts\tname", *rows])
            (tmp_path / split / f"{video}.tsv").write_text(table)
            with av.open(str(tmp_path / f"{video}.mp4"), "w") as container:
                stream = container.add_stream("mpeg4", rate=2)
                stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIDE, SIDE, "yuv420p", 4_000_000
                for picture in photographs(ord(video)):
                    container.mux(stream.encode(av.VideoFrame.from_image(picture)))
                container.mux(stream.encode())
        made = run("-m", "prospect.convert", "states", tmp_path / split, tmp_path / f"{split}.json")
        assert f"{len(videos)} clips: {3 * len(videos)} updates made" in made and "no start_ts" in made
        videos = " ".join(str(tmp_path / f"{video}.mp4") for video in videos)
        if split == "train":
            follow(follow(made, **{"VIDEO ...": videos, "VISION_DIR": TOWER}))
    run("-m", "prospect.encode", *videos.split(), "--vision", TOWER, "--out", tmp_path / "embeddings",
        "--clips", tmp_path / "val.json")  # fmt: skip
    checked = run("-m", "prospect.check", tmp_path / "train.json", tmp_path / "val.json")
    records, _ = learned_and_streamed(checked, tmp_path)
    assert [update for _, update in at(records, "dst_update")] == MOVES and not at(records, "text")
