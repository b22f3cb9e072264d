"""DST_UPDATE turns from step times: a step starts at its start_ts and is complete at its end_ts (seconds of the video).

    dst      S1  97.2 .. 106.8     S2  106.8 .. 152.1     S3  (no times: reported, never updated)
    turns    97.2 S1->start        106.8 S1->complete, S2->start        152.1 S2->complete

Steps may overlap: at one moment completions come first, and a step that ends as it starts does both there. A turn holds
the frames within half a second of its moment. Where the assistant speaks within them it ends at that frame, so that
update and reply are decided together. What happens before the clip is part of its first state, what happens after it
is left out.

Annotations are often nested. One level is tracked, by each step's `type`: step (also that of a step without one),
substep or action. The others leave `dst`: the model would read of them, and never see them change. Steps without an id
are called S1, S2, ... in their order.

They may also come from TSV files, whose first line names the columns: start_ts, end_ts and name, and if need be type
and id. A clip takes the steps of the file named by its video_uid. Without clips, each file becomes a clip without a
dialogue: the video from its beginning to the end of the last step.
"""

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prospect.clip_files import ClipFile, clip_id, frames_around, parsed_clip
from prospect.clips import Clip
from prospect.dst import Step, Transition
from prospect.errors import ProspectError

LEVELS = ("step", "substep", "action")
TIMES = ("start_ts", "end_ts")


@dataclass
class Report:
    """What was done, and what could not be."""

    clips: int = 0
    updates: int = 0  # DST_UPDATE turns that were made
    kept: int = 0  # clips that had updates already
    notes: list[str] = field(default_factory=list)  # one line each

    def __str__(self) -> str:
        kept = (
            f"; {self.kept} clips have updates already and keep them (--replace makes them anew)" if self.kept else ""
        )
        return "\n".join([*self.notes, f"{self.clips} clips: {self.updates} updates made{kept}"])


# ---- clips ---------------------------------------------------------------------------------------


def clips_with_updates(clips: Path, tables: Path | None, level: str, replace: bool, report: Report) -> Iterator[dict]:
    """The clips of a file with updates made from their steps, or with `tables` from the steps of those TSV files.

    A clip that has updates is left as it is, unless `replace`. Raises ProspectError at the first clip or table that
    cannot be used.
    """
    of_video = {} if tables is None else {path.stem: read_steps(path) for path in table_files(tables)}
    for index, raw in enumerate(ClipFile(clips)):
        if tables is not None and isinstance(raw, dict):
            raw = raw | {"dst": of_video.get(str(raw.get("video_uid")), [])}
        conversation = raw.get("conversation") if isinstance(raw, dict) else None
        has_updates = isinstance(conversation, list) and any(map(is_update, conversation))
        if has_updates and not replace:
            report.clips, report.kept = report.clips + 1, report.kept + 1
            yield raw
        else:
            yield with_updates(raw, str(clips), index, level, report)


def clips_of_tables(tables: Path, fps: float, level: str, report: Report) -> Iterator[dict]:
    """A clip without a dialogue for each TSV file: the video of its name, up to the end of its last step."""
    for index, path in enumerate(table_files(tables)):
        steps = read_steps(path)
        last = max(
            (time for step in steps for time in (step["start_ts"], step["end_ts"]) if time is not None), default=0
        )
        if last <= 0:
            raise ProspectError("no step has a time", where=str(path), remedy="fill start_ts and end_ts, in seconds")
        raw = {
            "video_uid": path.stem,
            "clip_idx": 0,
            "fps": int(fps) if fps == int(fps) else fps,
            "start_frame_idx": 0,
            "end_frame_idx": math.ceil(last * fps) - 1,  # the last frame before that moment
            "dst": steps,
            "conversation": [],
        }
        yield with_updates(raw, str(path), index, level, report)


def with_updates(raw: Any, file: str, index: int, level: str, report: Report) -> dict:
    """The raw clip with DST_UPDATE turns made from the times of its steps; those it has are left out."""
    if isinstance(raw, dict) and isinstance(raw.get("conversation"), list):
        steps = at_level(raw.get("dst") or [], level, f"{file}, clip {clip_id(raw, index)}")
        raw = raw | {"dst": steps, "conversation": [turn for turn in raw["conversation"] if not is_update(turn)]}
    clip = parsed_clip(raw, file, index)
    updates = update_turns(clip)
    conversation = list(raw["conversation"])
    behind = len(conversation)
    for update in reversed(updates):  # before the first turn that ends when it does, or later
        following = (
            turn.index for turn in clip.turns if turn.role != "system" and turn.end_frame >= update["end_frame"]
        )
        conversation.insert(next(following, behind), update)
    raw = raw | {"conversation": conversation}
    parsed_clip(raw, file, index)

    report.clips, report.updates = report.clips + 1, report.updates + len(updates)
    if without := [step.id for step in clip.steps if step.start_ts is None]:
        report.notes.append(f"{clip.where}: no start_ts, so no update moves them: {', '.join(without)}")
    if not updates:
        what = "no step starts or ends inside it" if clip.steps else "it has no steps"
        report.notes.append(f"{clip.where}: {what}")
    return raw


def is_update(turn: Any) -> bool:
    return isinstance(turn, dict) and "DST_UPDATE" in (turn.get("role"), turn.get("from"))


# ---- steps to updates ----------------------------------------------------------------------------


def at_level(steps: Any, level: str, where: str) -> Any:
    """The raw steps of one level, each with an id. What is no list of objects comes back for the reader to refuse."""
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return steps
    types = [str(step.get("type") or "step").lower() for step in steps]
    chosen = [dict(step) for step, type in zip(steps, types) if type == level]
    if steps and not chosen:
        remedy = " or ".join(f"--level {type}" for type in LEVELS if type in types) or f"types are {', '.join(LEVELS)}"
        raise ProspectError(f"no step is of type {level}", where=where, remedy=remedy)
    taken = {step.get("id") for step in chosen}
    free = (name for name in map("S{}".format, itertools.count(1)) if name not in taken)
    for step in chosen:
        if step.get("id") in (None, ""):
            step["id"] = next(free)
    return chosen


def update_turns(clip: Clip) -> list[dict]:
    """The DST_UPDATE turns of the clip's steps, one for each moment inside the clip, in order of time."""
    begin, end = clip.seconds(clip.start_frame), clip.seconds(clip.end_frame + 1)
    moments = moves(clip.steps, clip.where)
    if moments and min(moments) > end and min(moments) / 1000 <= end:
        what = f"its steps' times lie behind it: the first is {min(moments):g}, the clip is {begin:g}..{end:g} s"
        raise ProspectError(what, where=clip.where, remedy="times are seconds; divide milliseconds by 1000")
    replies = [turn.end_frame for turn in clip.turns if turn.role == "assistant"]
    turns = []
    for time, transitions in sorted(moments.items()):
        first, last = frames_around(time, clip.fps)
        if last < clip.start_frame or first > clip.end_frame:
            continue
        first, last = max(first, clip.start_frame), min(last, clip.end_frame)
        inside = [frame for frame in replies if first <= frame <= last]
        last = min(inside, key=lambda frame: abs(frame - time * clip.fps), default=last)
        content = [{"id": t.id, "transition": t.transition} for t in transitions]
        turn = {"role": "DST_UPDATE", "content": content, "time": time, "start_frame": first, "end_frame": last}
        turns.append(turn)
    return turns


def moves(steps: Sequence[Step], where: str) -> dict[float, list[Transition]]:
    """What happens at each moment, in seconds: completions first, except of steps that start there too."""
    events: list[tuple[float, int, Transition]] = []
    for step in steps:
        if step.start_ts is None:
            continue
        instant = step.end_ts == step.start_ts
        events.append((step.start_ts, 1, Transition(step.id, "start")))
        if step.end_ts is not None:
            events.append((step.end_ts, 2 if instant else 0, Transition(step.id, "complete")))
            if step.end_ts < step.start_ts:
                what = f"step {step.id} ends at {step.end_ts:g} s, before it starts at {step.start_ts:g} s"
                raise ProspectError(what, where=where, remedy="swap start_ts and end_ts")
    found: dict[float, list[Transition]] = {}
    for time, _, transition in sorted(events, key=lambda event: event[:2]):  # stable: else in the steps' order
        found.setdefault(time, []).append(transition)
    return found


# ---- TSV files -----------------------------------------------------------------------------------


def table_files(path: Path) -> list[Path]:
    """The TSV file, or those of the directory."""
    files = sorted(path.glob("*.tsv")) if path.is_dir() else [path]
    if not files:
        raise ProspectError("holds no *.tsv", where=str(path), remedy="name each file after its video, VIDEO_UID.tsv")
    return files


def read_steps(path: Path) -> list[dict]:
    """The raw steps of a TSV file. Raises ProspectError that names the line."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), delimiter="\t")
        lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="a TSV file in UTF-8") from None
    if missing := [name for name in ("start_ts", "end_ts", "name") if name not in (reader.fieldnames or [])]:
        remedy = "its first line names the columns: type, start_ts, end_ts, name, with tabs between them"
        raise ProspectError(f"has no column {', '.join(missing)}", where=str(path), remedy=remedy)
    steps = []
    for number, line in enumerate(lines, start=2):
        step = {name: line[name] for name in ("type", "id", "name") if line.get(name)}
        steps.append(step | {name: _seconds(line[name], f"{path}, line {number}, {name}") for name in TIMES})
    return steps


def _seconds(cell: str | None, where: str) -> float | None:
    try:
        return float(cell) if cell and cell.strip() else None
    except ValueError:
        raise ProspectError(f"{cell!r:.40} is not a number", where=where, remedy="seconds of the video") from None
