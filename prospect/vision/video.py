"""From a video file to a talking assistant: decode, encode and stream, with no files in between.

    python infer.py --video kitchen.mp4 --vision DIR --checkpoint DIR --task steps.yaml [--pace live]

    kitchen.mp4 -> frames.py: picture k, shown at k / fps        (a thread, ahead of the rest)
                -> tower.py: pictures -> I vectors of D numbers, as `python -m prospect.encode` writes them
                -> stream.py: what the assistant says at them, frame by frame

Two paces. *Fast* takes pictures as they are decoded, as many at once as the engine looks ahead. *Live* plays the
video: picture k is not looked at before k / fps seconds have passed, and all pictures whose time has come are taken at
once. So a machine that keeps up works picture by picture, and one that has fallen behind catches up with larger
batches. By default no picture is left out, since the model was trained on all of them; only the answer comes late. With
--max-lag, pictures that have waited longer than that are left out, unseen and counted: the answer is then never about
something long past, and what the user said meanwhile is heard at the next picture that is taken. The *lag* of a frame
is the time from its moment in the video to the record about it:

    live, 2 fps    shown at     0.0        0.5        1.0        1.5        2.0 s
                   frame        0          1          2          3          4
                   record at    0.1        0.6             1.3      1.6     2.1     a reply was written at frame 2
                   lag          0.1        0.1             0.3      0.1     0.1     worst: 0.3 s, at 1.0 s

The task is described in a YAML file, since a video holds only pictures. Times are seconds from the video's start.

    goal: Making a Pot of Coffee
    steps:
      - {id: S1, name: boil the water}
      - {id: S2, name: grind the beans, state: completed}    # when the video starts; default not_started
    say:                                                     # optional, as are system (the prompt's first lines) and
      - {time: 12.5, text: "What should I do next?"}         # knowledge (the recipe, for models trained with it)

Videos need PyAV, pictures Pillow (requirements-vision.txt).
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from prospect.clip_files import parse_clip
from prospect.clips import Clip, unpaired_surrogate
from prospect.dst import STATES
from prospect.errors import ProspectError
from prospect.features import Features, comparable, scale_of
from prospect.stream import Frame, FrameRecord, StreamSession, advance
from prospect.vision.encode import ahead, encode_batch, settings_of_tower
from prospect.vision.frames import count_frames, frames_at
from prospect.vision.tower import VisionEncoder, load_vision_encoder

TASK_KEYS = {"goal", "steps", "knowledge", "system", "say"}
STEP_KEYS = {"id", "name", "state"}
SAY_KEYS = {"time", "text"}

FIRST_LOOK = 8  # pictures by which vectors of unknown make are judged

UserTexts = dict[int, list[str]]  # by frame: what the user says right before it


# ---- the task ------------------------------------------------------------------------------------


def read_task(path: Path | None, video: Path, fps: Fraction) -> tuple[Clip, UserTexts]:
    """The video as a clip without turns of its own, and what the user says in it.

    Frame 0 is the video's start. What is said at a time is heard at the first frame at or after it. Without a path
    there is no goal and no step. Raises ProspectError for what is wrong with the file or with the video's header.
    """
    task = {} if path is None else _read_yaml(path)
    where = str(path)
    system = _text(task, "system", where)
    raw = {
        "id": video.resolve().stem,
        "fps": float(fps),
        "start_frame_idx": 0,
        "end_frame_idx": max(count_frames(video, fps) - 1, 0),
        "conversation": [{"role": "system", "content": system}] if system else [],
        "dst": [{"id": step.get("id"), "name": step.get("name")} for step in _items(task, "steps", STEP_KEYS, where)],
        "inferred_goal": _text(task, "goal", where),
        "inferred_knowledge": _text(task, "knowledge", where),
    }
    clip, problems = parse_clip(raw, str(path or video), 0)
    for problem in problems:
        if problem.fatal:  # its fields are named as in a clip file
            raise replace(problem, field=problem.field.replace("dst", "steps")).error()
    assert clip is not None

    state = dict(clip.initial_state)
    for number, step in enumerate(task.get("steps") or []):
        state[step["id"]] = step.get("state", "not_started")
        if state[step["id"]] not in STATES:
            what = f"unknown state {state[step['id']]!r:.40}"
            raise ProspectError(what, where=f"{where}, steps[{number}], state", remedy="one of " + ", ".join(STATES))
    spoken: list[tuple[Fraction, str]] = []
    for number, item in enumerate(_items(task, "say", SAY_KEYS, where)):
        seconds = item.get("time")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 1e9:
            what = f"must be seconds from the video's start, not {seconds!r:.40}"
            raise ProspectError(what, where=f"{where}, say[{number}], time", remedy="write a number, like 12.5")
        text = _text(item, "text", f"{where}, say[{number}]", required=True)
        spoken.append((Fraction(str(seconds)), text))  # through text, so that 0.1 is exactly a tenth
    said: UserTexts = {}
    for exact, text in sorted(spoken, key=lambda pair: pair[0]):
        said.setdefault(math.ceil(exact * fps), []).append(text)
    return replace(clip, initial_state=state), said


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="name a YAML file") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ProspectError(f"is not YAML: {error}", where=str(path), remedy="mind indentation and colons") from None
    if not isinstance(task, dict) or not {"goal", "steps"} <= set(task):
        raise ProspectError("must have goal and steps", where=str(path), remedy="goal: TEXT, steps: [{id, name}, ...]")
    _refuse_unknown(task, TASK_KEYS, str(path))
    return task


def _refuse_unknown(values: dict, known: set[str], where: str) -> None:
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        what = f"unknown key {', '.join(unknown):.80}"
        raise ProspectError(what, where=where, remedy=f"the keys are {', '.join(sorted(known))}")


def _items(task: dict[str, Any], key: str, known: set[str], where: str) -> list[dict[str, Any]]:
    """The list of mappings under a key; empty where there is none."""
    items = task.get(key) or []
    form = "{" + ", ".join(sorted(known)) + "}"
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ProspectError(f"must be a list of {form}", where=f"{where}, {key}", remedy=f"- {form} on each line")
    for number, item in enumerate(items):
        _refuse_unknown(item, known, f"{where}, {key}[{number}]")
    return items


def _text(values: dict[str, Any], key: str, where: str, required: bool = False) -> str:
    text = values.get(key)
    if text is None and not required:
        return ""
    if not isinstance(text, str) or not text.strip():
        what = f"must be text, not {text!r:.40}"
        raise ProspectError(what, where=f"{where}, {key}", remedy="write it, in quotes if YAML takes it for a number")
    if what := unpaired_surrogate(text):
        raise ProspectError(what, where=f"{where}, {key}", remedy="write real Unicode")
    return text.strip()


# ---- streaming -----------------------------------------------------------------------------------


def load_encoder(directory: Path, pool: str | None, tokens: int | None, session: StreamSession) -> VisionEncoder:
    """The vision tower, on the model's device. Raises ProspectError when its vectors are not as wide as the model's."""
    encoder = load_vision_encoder(directory, pool, tokens)
    width, wanted = encoder.width, session.model.config.vision_dim
    if width != wanted:
        what = f"gives vectors of {width} numbers, the model was trained on {wanted}"
        raise ProspectError(what, where=str(directory), remedy="give the --vision that made the training embeddings")
    return encoder.to(session.cache.keys.device)


def tower_features(encoder: VisionEncoder, directory: Path, video: Path, fps: Fraction, trained: Features) -> Features:
    """What the tower gives, to be compared with the features that the model was trained on.

    Where it is not known what made those, the first pictures are encoded to find how large this tower's vectors are.
    """
    if trained.made:
        return Features(comparable(settings_of_tower(encoder, directory)), {})
    if not trained.scale:  # an older checkpoint
        return trained
    device = next(encoder.parameters()).device
    pictures = [picture for _, picture in itertools.islice(frames_at(video, fps), FIRST_LOOK)]
    rows = encode_batch(encoder, pictures, "fp16" if device.type == "cuda" else "fp32")
    return Features({}, scale_of([rows]))


@dataclass
class Pace:
    """How well the stream kept up with the video; seconds count from the first picture."""

    fps: Fraction
    frames: int = 0
    left_out: int = 0  # frames that had waited longer than max_lag
    seconds: float = 0.0  # until the last record
    lags: list[float] = field(default_factory=list)  # seconds from a frame's moment in the video to its record
    worst_frame: int = 0

    def note(self, frame: int, count: int, seconds: float) -> None:
        """The records of `count` frames from `frame` on are complete after `seconds`; the first of them lags most."""
        self.frames, self.seconds = self.frames + count, seconds
        if seconds - float(frame / self.fps) > max(self.lags, default=0.0):
            self.worst_frame = frame
        self.lags += [max(0.0, seconds - float((frame + i) / self.fps)) for i in range(count)]

    def __str__(self) -> str:
        video = float((self.frames + self.left_out) / self.fps)
        line = f"{self.frames} frames, {video:.1f} s of video, in {self.seconds:.1f} s"
        if self.seconds > 0:
            line += f" ({video / self.seconds:.2f} times real time)"
        if self.lags:
            p50, p95, p99, worst = np.percentile(self.lags, (50, 95, 99, 100))
            line += f"; lag p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s"
            line += f", worst {worst:.2f} s at {float(self.worst_frame / self.fps):.1f} s of the video"
        return line + (f"; {self.left_out} frames left out" if self.left_out else "")


def watch(
    session: StreamSession,
    encoder: VisionEncoder,
    video: Path,
    said: UserTexts,
    fps: Fraction,
    live: bool,
    pace: Pace,
    max_lag: float = math.inf,
) -> Iterator[FrameRecord]:
    """Stream a video, a directory of pictures or an Arrow file, one record per frame; `pace` is kept up to date.

    max_lag: live, pictures that have waited for more seconds than this are left out. Raises ProspectError where the
    source cannot be decoded further, or a frame cannot be streamed.
    """
    most = session.config.infer.lookahead  # pictures taken at once
    device = session.cache.keys.device
    precision = "fp16" if device.type == "cuda" else "fp32"  # as in prospect.encode: rows are those of training
    with contextlib.closing(ahead(frames_at(video, fps), size=most)) as decoded:
        upcoming = next(decoded, None)  # (k, picture), not yet taken
        unheard_yet: list[str] = []  # said at pictures that were left out
        begin = time.perf_counter()  # picture k is shown k / fps seconds after this
        while upcoming is not None:
            k, picture = upcoming
            if live:
                time.sleep(max(0.0, begin + float(k / fps) - time.perf_counter()))
                if time.perf_counter() - begin - float(k / fps) > max_lag:
                    unheard_yet += said.get(k, [])
                    pace.left_out += 1
                    upcoming = next(decoded, None)
                    continue
            pictures, upcoming = [picture], next(decoded, None)
            while upcoming is not None and len(pictures) < most:
                if live and upcoming[0] / fps > time.perf_counter() - begin:
                    break
                pictures.append(upcoming[1])
                upcoming = next(decoded, None)

            rows = encode_batch(encoder, pictures, precision)  # [B, I, D] float16
            if not np.isfinite(rows).all():
                bad = k + int(np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))[0])
                what = f"frame {bad} gives a vector that is not finite in float16"
                raise ProspectError(what, where=str(video), remedy="download the vision checkpoint again")
            frames = [Frame(torch.from_numpy(row), said.get(k + i, [])) for i, row in enumerate(rows)]
            frames[0].user, unheard_yet = unheard_yet + frames[0].user, []
            session.frame_idx = k
            while frames:  # the engine stops after each frame at which something is said
                first = session.frame_idx
                [records] = advance([session], [frames])
                frames = frames[len(records) :]
                pace.note(first, len(records), time.perf_counter() - begin)
                yield from records


def unheard(said: UserTexts, num_frames: int) -> list[str]:
    """What the user would have said after the last frame."""
    return [text for frame in sorted(said) if frame >= num_frames for text in said[frame]]
