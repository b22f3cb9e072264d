"""Clip files: JSON written by other people and programs in, validated Clip objects and their embeddings out.

Files are a JSON list of clips, one clip object, or JSONL (one clip per line); a clip is read only when asked for. Every
problem of a clip is found before any is reported. Turns without frames get them from their time:

    a turn at 97.2 s, 2 fps:    frames int(96.7*2)..int(97.7*2) = 193..195, three frames

The state of the task is found by replaying transitions from the state at the clip's start. Snapshots in a file
(`dst_state`) serve only to find that first state, because files disagree on whether a snapshot is meant before or after
its turn. In real files a clip-level `initial_dst_state` is the state at the *end*, so it is never read.

A Source is a clip file with the folder of its embeddings: the one way from a file name to a clip and its rows.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prospect.clips import MAX_TEXT, ROLES, Clip, Turn, unpaired_surrogate
from prospect.dst import STATES, TRANSITIONS, State, Step, Transition, UpdateError, apply_update, parse_update
from prospect.embeddings import embedding_names, find_embeddings, read_embeddings
from prospect.errors import ProspectError
from prospect.packs import stamp

FIELDS = {  # of a clip object; any other field is kept in Clip.extra
    "id", "video_uid", "dataset", "fps", "start_frame_idx", "end_frame_idx", "conversation", "dst", "inferred_goal",
    "inferred_knowledge", "embeddings", "embeddings_start_frame_idx",
}  # fmt: skip

TURN_FIELDS = {"from": "role", "value": "content", "timestamp": "time"}  # other names of a turn's fields, and ours

# Far beyond any real clip; they stop a broken file from exhausting the machine.
MAX_TURNS = 20_000
MAX_STEPS = 2_000
MAX_FRAMES = 2_000_000  # eleven days at 2 fps
MAX_NESTING = 100


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a clip: `kind` groups problems in a summary, `field` says where in the clip."""

    kind: str
    where: str  # "file, clip ID"
    field: str  # "turn 3, end_frame"
    what: str
    remedy: str
    fatal: bool = True

    def error(self) -> ProspectError:
        where = f"{self.where}, {self.field}" if self.field else self.where
        return ProspectError(self.what, where=where, remedy=self.remedy)


# ---- clip files ----------------------------------------------------------------------------------


class ClipFile:
    """The clips of one file, as raw JSON objects, in order. It is indexed, not loaded: a clip is read when asked for.

    spans [N,2]: the byte at which each clip begins, and the one behind its end; by default they are looked for.
    """

    def __init__(self, path: str | Path, spans: np.ndarray | None = None):
        self.path = Path(path)
        try:
            self.stamp = stamp(self.path)
            self.spans = _index(self.path) if spans is None else spans
        except FileNotFoundError as error:
            remedy = "check data.train / data.val / --clip"
            raise ProspectError("no such clip file", where=str(self.path), remedy=remedy) from error
        except OSError as error:
            raise ProspectError(f"cannot be read: {error.strerror}", where=str(self.path)) from error
        if len(self) == 0:
            remedy = "a JSON list of clips, one clip, or JSONL"
            raise ProspectError("holds no clip", where=str(self.path), remedy=remedy)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Any:
        begin, end = self.spans[index].tolist()
        with open(self.path, "rb") as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != self.stamp[:2]:  # its clips may be at other places
                remedy = "start again"
                raise ProspectError("has changed since it was opened", where=str(self.path), remedy=remedy)
            file.seek(begin)
            where = f"{self.path}, clip {index}"
            return _parse_json(_decode(file.read(end - begin), where), where)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def clip(self, index: int) -> Clip:
        """The validated clip at `index`. Raises ProspectError at its first problem."""
        return parsed_clip(self[index], str(self.path), index)

    def find(self, name: str) -> int:
        """The index of the clip with this id, or of this number."""
        for index, raw in enumerate(self):
            if isinstance(raw, dict) and clip_id(raw, index) == name:
                return index
        if re.fullmatch("-?[0-9]{1,9}", name) and -len(self) <= int(name) < len(self):
            return int(name) % len(self)
        remedy = f"an id, or a number from 0 to {len(self) - 1}"
        raise ProspectError(f"no clip {name!r}", where=str(self.path), remedy=remedy)


def _index(path: Path) -> np.ndarray:
    """Where each clip of a file begins and ends, in bytes, [N,2]. Raises OSError, ProspectError for any other file."""
    if path.suffix == ".jsonl":
        return _line_spans(path)
    if (spans := _list_spans(path)) is not None:
        return spans
    lines = _line_spans(path)
    # Several objects, one per line, are JSONL whatever the file is called.
    if len(lines) > 1 and _is_object(path, *lines[0].tolist()):
        return lines
    content = path.read_bytes()
    value = _parse_json(_decode(content, str(path)), str(path))
    if not isinstance(value, dict):
        remedy = "a clip file is a JSON list of clips, one clip object, or JSONL"
        raise ProspectError(f"holds a {type(value).__name__}, not clips", where=str(path), remedy=remedy)
    return np.array([[0, len(content)]])


def _line_spans(path: Path) -> np.ndarray:
    spans, position = array("q"), 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                spans.extend((position, position + len(line)))
            position += len(line)
    return np.array(spans).reshape(-1, 2)


BLOCK = 1 << 20  # characters of a JSON list read at once


def _list_spans(path: Path) -> np.ndarray | None:
    """`_index` of a JSON list, of which only a few blocks are ever in memory; None for a file that is not one."""
    decode = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode
    with open(path, "rb") as file:
        position = 3 if file.read(3) == codecs.BOM_UTF8 else 0  # the byte that text[at] is
    spans, text, at, mark = array("q"), "", 0, "["
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while True:
                try:
                    begin = _skip_space(text, at + 1)
                    if text[at] not in mark:  # the mark in front of an item, behind which `begin` is
                        return None
                    if text[at] == "]" or (mark == "[" and text[begin] == "]"):
                        rest = text[begin + (text[at] != "]") :] + file.read()
                        return None if rest.strip(SPACE) else np.array(spans).reshape(-1, 2)
                    end = decode(text, begin)[1]
                    following = _skip_space(text, end)
                    if text[following] not in ",]":  # as between "1" and "1e5"
                        raise ValueError
                    position += len(text[at:begin].encode())
                    spans.append(position)
                    position += len(text[begin:end].encode())
                    spans.append(position)
                    position += following - end  # white space is ASCII
                    at, mark = following, ",]"
                except (IndexError, ValueError):  # what is in memory ends here, or is wrong
                    more = file.read(max(BLOCK, len(text) - at))
                    if not more:
                        return None
                    text, at = text[at:] + more, 0
                    if mark == "[":
                        skipped = _skip_space(text, 0)
                        position, text = position + skipped, text[skipped:]
    except (UnicodeDecodeError, RecursionError):
        return None


SPACE = " \t\n\r"  # JSON's
_space = re.compile(f"[{SPACE}]*")


def _skip_space(text: str, at: int) -> int:
    return _space.match(text, at).end()


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise ProspectError(what, where=where, remedy="save the file as UTF-8") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        what = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise ProspectError(what, where=where, remedy="is the file complete?") from error
    except RecursionError as error:
        raise ProspectError("is nested too deeply", where=where) from error
    except ValueError as error:
        raise ProspectError(f"is not JSON: {error}", where=where) from error


def _is_object(path: Path, begin: int, end: int) -> bool:
    with open(path, "rb") as file:
        file.seek(begin)
        line = file.read(end - begin)
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


# ---- one clip's fields ---------------------------------------------------------------------------


def clip_id(raw: dict[str, Any], index: int) -> str:
    """`id`, by default `{video_uid}_{clip_idx}`; index: the clip's number, for one that names neither."""
    if raw.get("id") is not None:
        return str(raw["id"])
    return f"{raw.get('video_uid', f'clip{index}')}_{raw.get('clip_idx', 0)}"


def parse_clip(raw: Any, file: str, index: int) -> tuple[Clip | None, list[Problem]]:
    """A clip from its JSON object and everything wrong with it; the clip is None when a problem is fatal."""
    if not isinstance(raw, dict):
        what = f"a clip must be a JSON object, not {type(raw).__name__}"
        return None, [Problem("not an object", f"{file}, clip {index}", "", what, "see the README's clip format")]
    reader = _Reader(raw, f"{file}, clip {clip_id(raw, index)}")
    clip = reader.clip(index)
    fatal = any(problem.fatal for problem in reader.problems)
    return (None if fatal else clip), reader.problems


def parsed_clip(raw: Any, file: str, index: int) -> Clip:
    """The clip of a JSON object. Raises ProspectError at its first problem."""
    clip, problems = parse_clip(raw, file, index)
    for problem in problems:
        if problem.fatal:
            raise problem.error()
    assert clip is not None
    return clip


class _Reader:
    """Reads one raw clip field by field. Problems are collected on the way, so that all of them can be reported."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw, self.where, self.problems = raw, where, []

    def problem(self, kind: str, field: str, what: str, remedy: str = "", fatal: bool = True) -> None:
        self.problems.append(Problem(kind, self.where, field, what, remedy, fatal))

    def warn(self, kind: str, field: str, what: str, remedy: str = "") -> None:
        self.problem(kind, field, what, remedy, fatal=False)

    # ---- values ----------------------------------------------------------------------------------

    def text(self, value: Any, field: str, *, required: bool) -> str:
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            self.problem("not text", field, f"must be text, not {type(value).__name__}", "write a string")
            return ""
        if required and not value.strip():
            self.problem("empty text", field, "is empty", "give it text or leave the turn out")
        if len(value) > MAX_TEXT:
            self.problem("text too long", field, f"has {len(value)} characters, more than {MAX_TEXT}", "shorten it")
        if what := unpaired_surrogate(value):
            self.problem("broken text", field, what, "write it as real Unicode")
            return ""
        return value

    def number(self, value: Any, field: str) -> float | None:
        """A finite number, or None and a problem."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problem("not a number", field, f"must be a number, not {value!r:.40}", "write a number")
        elif not abs(value) <= 1e12:  # also infinite ones, and whole numbers that no float can hold
            self.problem("not a number", field, f"is out of range: {value!r:.40}", "write a plausible number")
        else:
            return value
        return None

    def frame(self, value: Any, field: str) -> int | None:
        if type(value) is int and abs(value) <= 1e12:  # as nearly all are
            return value
        number = self.number(value, field)
        if number is None:
            return None
        if number != int(number):
            what = f"must be a whole number, not {value!r:.40}"
            self.problem("not a frame number", field, what, "frames are counted, not timed")
            return None
        return int(number)

    # ---- the clip --------------------------------------------------------------------------------

    def clip(self, index: int) -> Clip | None:
        """The clip; None where its problems leave nothing to build one from."""
        raw = self.raw
        if _nesting(raw) > MAX_NESTING:
            self.problem("nested too deeply", "", f"is nested more than {MAX_NESTING} deep", "flatten the extra fields")
            return None
        id, video_uid = self.names(index)
        fps = self.rate(raw.get("fps", 2))
        start, end = self.frame_range()
        steps = self.steps(raw.get("dst") or [])
        turns = self.turns(raw.get("conversation"), fps, start, end)
        embeddings = self.path(raw.get("embeddings"), "embeddings")
        goal = self.text(raw.get("inferred_goal"), "inferred_goal", required=False)
        knowledge = self.text(raw.get("inferred_knowledge"), "inferred_knowledge", required=False)
        dataset = self.text(raw.get("dataset"), "dataset", required=False)
        if fps is None or start is None or end is None:
            return None
        clip = Clip(
            id=id,
            video_uid=video_uid,
            dataset=dataset,
            fps=fps,
            start_frame=start,
            end_frame=end,
            turns=tuple(turns),
            steps=tuple(steps),
            goal=goal,
            knowledge=knowledge,
            initial_state=self.initial_state(steps, turns, start / fps),
            embeddings=embeddings,
            embeddings_start=self.embeddings_start(start),
            where=self.where,
            extra={key: value for key, value in raw.items() if key not in FIELDS},
        )
        if self.updates_apply(clip):
            self.check_snapshots(clip)
        return clip

    def names(self, index: int) -> tuple[str, str]:
        """The clip's id and its video's; together they name the embedding file."""
        for name in ("id", "video_uid", "clip_idx"):
            if isinstance(self.raw.get(name), bool | float | dict | list):
                what = f"must be text or a whole number, not {self.raw[name]!r:.40}"
                self.problem("bad id", name, what, "name the clip")
        id = self.text(clip_id(self.raw, index), "id", required=True)
        return id, self.text(self.raw.get("video_uid", id), "video_uid", required="video_uid" in self.raw)

    def rate(self, value: Any) -> float | None:
        fps = self.number(value, "fps")
        if fps is not None and not 0 < fps <= 1000:
            what = f"must be above 0 and at most 1000, not {fps}"
            self.problem("bad fps", "fps", what, "frames per second, usually 2")
            return None
        return fps

    def frame_range(self) -> tuple[int | None, int | None]:
        """The clip's first and last frame; None for one that cannot be used."""
        start, end = (self.frame(self.raw.get(name), name) for name in ("start_frame_idx", "end_frame_idx"))
        if start is not None and start < 0:
            self.problem("bad frame range", "start_frame_idx", f"is {start}", "frame numbers start at 0")
        if start is None or end is None:
            return start, end
        if end < start:
            what = f"{end} is before start_frame_idx {start}"
            self.problem("bad frame range", "end_frame_idx", what, "swap them?")
            return start, None
        if end - start + 1 > MAX_FRAMES:
            what = f"{end - start + 1} frames, more than {MAX_FRAMES}"
            self.problem("too many frames", "end_frame_idx", what, "split it")
            return start, None
        return start, end

    def path(self, value: Any, field: str) -> str | None:
        if value is not None and not isinstance(value, str):
            self.problem("not text", field, f"must be a path, not {type(value).__name__}", "a path or nothing")
            return None
        return value

    def embeddings_start(self, start: int) -> int | None:
        """The frame of row 0 of the embedding file, where the clip says it; it has to have the frame `start`."""
        name = "embeddings_start_frame_idx"
        first = None if self.raw.get(name) is None else self.frame(self.raw[name], name)
        if first is not None and not 0 <= first <= start:
            what = f"is {first}, must be from 0 to {start}, where the clip begins"
            self.problem("bad frame range", name, what, "the frame of row 0 of the embedding file")
        return first

    # ---- steps and turns -------------------------------------------------------------------------

    def steps(self, raw: Any) -> list[Step]:
        if not isinstance(raw, list):
            self.problem("bad steps", "dst", f"must be a list of steps, not {type(raw).__name__}", "[{id, name}, ...]")
            return []
        if len(raw) > MAX_STEPS:
            self.problem("bad steps", "dst", f"{len(raw)} steps, more than {MAX_STEPS}", "split the task")
            return []
        steps: dict[str, Step] = {}
        for i, item in enumerate(raw):
            if not isinstance(item, dict):
                what = f"must be an object, not {type(item).__name__}"
                self.problem("bad steps", f"dst[{i}]", what, "{id, name, ...}")
                continue
            if item.get("id") is None:
                remedy = "an id like S1; python -m prospect.convert states IN OUT gives ids"
                self.problem("bad steps", f"dst[{i}], id", "is missing", remedy)
                continue
            id = self.text(item["id"], f"dst[{i}], id", required=True)
            name = self.text(item.get("name"), f"dst[{i}], name", required=True)
            if any(mark in id for mark in (",", "->", "\n")) or id != id.strip():
                what = f"{id!r} cannot be written in an update"
                self.problem("bad steps", f"dst[{i}], id", what, "use an id like S1")
            if id in steps:
                self.problem("duplicate step", f"dst[{i}], id", f"{id!r} occurs twice", "give each step its own id")
                continue
            start, end = (self.seconds(item, key, f"dst[{i}]") for key in ("start_ts", "end_ts"))
            steps[id] = Step(id, name, start, end)
        return list(steps.values())

    def seconds(self, item: dict, key: str, field: str) -> float | None:
        return None if item.get(key) is None else self.number(item[key], f"{field}, {key}")

    def turns(self, raw: Any, fps: float | None, start: int | None, end: int | None) -> list[Turn]:
        if not isinstance(raw, list):
            what = "is missing" if raw is None else f"must be a list of turns, not {type(raw).__name__}"
            self.problem("bad conversation", "conversation", what, "a list of turns, possibly empty")
            return []
        if len(raw) > MAX_TURNS:
            what = f"{len(raw)} turns, more than {MAX_TURNS}"
            self.problem("bad conversation", "conversation", what, "split the clip")
            return []
        turns = [self.turn(item, i, fps, start, end) for i, item in enumerate(raw)]
        return [turn for turn in turns if turn is not None]

    def turn(self, item: Any, i: int, fps: float | None, start: int | None, end: int | None) -> Turn | None:
        """Turn i of the conversation; None where it cannot be used."""
        if not isinstance(item, dict):
            what = f"must be an object, not {type(item).__name__}"
            self.problem("bad turn", f"turn {i}", what, "{role, content, ...}")
            return None
        item = self.in_our_names(item, i)
        role = item.get("role")
        if role not in ROLES:
            what = f"unknown role {role!r:.40}"
            self.problem("unknown role", f"turn {i}, role", what, "one of " + ", ".join(ROLES))
            return None
        before = len(self.problems)
        text, transitions = "", ()
        if role == "DST_UPDATE":
            transitions = self.transitions(item.get("content"), f"turn {i}, content")
        else:
            text = self.text(item.get("content"), f"turn {i}, content", required=True).strip()
        if role == "system":  # prompt text, whatever frames a file gives it
            return Turn(role=role, text=text, transitions=(), start_frame=0, end_frame=0, index=i)
        frames = self.turn_frames(item, i, fps, start, end)
        if frames is None or any(problem.fatal for problem in self.problems[before:]):
            return None
        first, last = frames
        progress = self.text(item.get("progress"), f"turn {i}, progress", required=False).strip()
        return Turn(role, text, transitions, first, last, i, progress)

    def in_our_names(self, item: dict, i: int) -> dict:
        """A turn with its fields named as here. One that is given under both of its names must be the same twice."""
        if not TURN_FIELDS.keys() & item.keys():
            return item
        for other, ours in TURN_FIELDS.items():
            if item.get(other) is not None and item.get(ours) is None:
                item = item | {ours: item[other]}
            elif item.get(other) not in (None, item.get(ours)):
                what = f"is {item[ours]!r:.40}, and `{other}`, another name of it, {item[other]!r:.40}"
                self.problem("two values", f"turn {i}, {ours}", what, "leave one of them out")
        return item

    def transitions(self, raw: Any, field: str) -> tuple[Transition, ...]:
        if isinstance(raw, str):
            try:
                raw = [{"id": t.id, "transition": t.transition} for t in parse_update(raw, "arrow")]
            except UpdateError as error:
                self.problem("bad update", field, str(error), "S1->start, or [{id, transition}]")
                return ()
        if not isinstance(raw, list) or not raw or not all(isinstance(item, dict) for item in raw):
            self.problem("bad update", field, "must be a list of {id, transition}, not empty", "leave the turn out?")
            return ()
        for item in raw:
            if not isinstance(item.get("id"), str) or item.get("transition") not in tuple(TRANSITIONS):
                what = f"cannot read {item!r:.80}"
                self.problem("bad update", field, what, "id: a step's id; transition: start or complete")
                return ()
        return tuple(Transition(item["id"], item["transition"]) for item in raw)

    def turn_frames(
        self, item: dict, i: int, fps: float | None, start: int | None, end: int | None
    ) -> tuple[int, int] | None:
        """A turn's range, inclusive, absolute, inside the clip; None (and a problem) when it has none."""
        given = self.given_frames(item, i, fps)
        if given is None or start is None or end is None:
            return None
        first, last = given
        if last < start or first > end:
            what = f"frames {first}..{last} lie outside the clip's {start}..{end}"
            remedy = "frame numbers are absolute; fix or leave out the turn"
            if item.get("start_frame") is None and start <= item["time"] / 1000 * fps <= end:
                remedy = "times are seconds; divide milliseconds by 1000"
            self.problem("turn outside clip", f"turn {i}", what, remedy)
            return None
        if first < start or last > end:
            what = f"frames {first}..{last} reach outside the clip's {start}..{end} and were clamped"
            self.warn("turn clamped", f"turn {i}", what, "mend the range")
        return max(first, start), min(last, end)

    def given_frames(self, item: dict, i: int, fps: float | None) -> tuple[int, int] | None:
        """A turn's range as the file gives it: its frames, or those within half a second of its time."""
        given = [item.get(key) for key in ("start_frame", "end_frame")]
        if given == [None, None]:
            if item.get("time") is None:
                what = "has neither start_frame and end_frame nor time"
                self.problem("turn without frames", f"turn {i}", what, "give one")
                return None
            time = self.number(item["time"], f"turn {i}, time")
            return None if time is None or fps is None else frames_around(time, fps)
        first, last = (self.frame(value, f"turn {i}, {key}") for value, key in zip(given, ("start_frame", "end_frame")))
        if first is None or last is None:
            return None
        if last < first:
            what = f"{last} is before start_frame {first}"
            self.problem("bad turn range", f"turn {i}, end_frame", what, "swap them?")
            return None
        return first, last

    # ---- the task's state ------------------------------------------------------------------------

    def initial_state(self, steps: list[Step], turns: list[Turn], start_seconds: float) -> State:
        """Each step's state before the clip's first frame, from the first evidence available:

        its first transition in the clip (a `complete` means that it was in progress); else a snapshot that names it
        (the step never moves here, so any snapshot will do); else its times; else not started.
        """
        moved: dict[str, str] = {}
        for turn in sorted(turns, key=lambda turn: turn.end_frame):
            for t in turn.transitions:
                moved.setdefault(t.id, TRANSITIONS[t.transition][0])
        seen = self.first_snapshots()
        state = {}
        for step in steps:
            if step.id in moved:
                state[step.id] = moved[step.id]
            elif step.id in seen:
                state[step.id] = seen[step.id]
            elif step.end_ts is not None and step.end_ts <= start_seconds:
                state[step.id] = "completed"
            elif step.start_ts is not None and step.end_ts is not None and step.start_ts < start_seconds < step.end_ts:
                state[step.id] = "in_progress"
            else:
                state[step.id] = "not_started"
        return state

    def first_snapshots(self) -> dict[str, str]:
        """Each step's state in the first snapshot that names it, by step id."""
        seen: dict[str, str] = {}
        conversation = self.raw.get("conversation")
        for i, item in enumerate(conversation if isinstance(conversation, list) else []):
            snapshot = item.get("dst_state") if isinstance(item, dict) else None
            if snapshot is None:
                continue
            if not isinstance(snapshot, dict) or not all(isinstance(s, str) and s in STATES for s in snapshot.values()):
                what = f"cannot be read and is ignored: {snapshot!r:.60}"
                self.warn("bad snapshot", f"turn {i}, dst_state", what, "{S1: in_progress}")
                continue
            for id, state in snapshot.items():
                seen.setdefault(id, state)
        return seen

    def updates_apply(self, clip: Clip) -> bool:
        """Apply every update in order of time. An illegal one is a problem."""
        state = clip.initial_state
        for turn in clip.updates():
            try:
                state = apply_update(state, turn.transitions)
            except UpdateError as error:
                self.problem("illegal update", f"turn {turn.index}", str(error), "fix the update or the steps in dst")
                return False
        return True

    def check_snapshots(self, clip: Clip) -> None:
        """Apply every update in the file's order. A snapshot that fits neither side of its turn is a warning."""
        state = clip.initial_state
        for turn in clip.turns:
            try:
                after = apply_update(state, turn.transitions)
            except UpdateError:
                return  # the file's order differs from the order of frames: snapshots say nothing then
            snapshot = self.raw["conversation"][turn.index].get("dst_state")
            if isinstance(snapshot, dict):
                for id in sorted(set(snapshot) & set(state)):
                    if snapshot[id] in STATES and snapshot[id] not in (state[id], after[id]):
                        what = f"says {id} is {snapshot[id]!r:.40}; by the transitions it is {after[id]}"
                        field, remedy = f"turn {turn.index}, dst_state", "the transitions are followed"
                        self.warn("snapshot disagrees", field, what, remedy)
            state = after


def frames_around(seconds: float, fps: float) -> tuple[int, int]:
    """The first and last frame of a turn that has only a time: those within half a second of it."""
    return int((seconds - 0.5) * fps), int((seconds + 0.5) * fps)


def _nesting(value: Any) -> int:
    """How deep lists and objects are nested, found level by level so that no depth can exhaust the stack."""
    depth, level = 0, [value]
    while level and depth <= MAX_NESTING:
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [value for values in inside for value in values]
        depth += 1
    return depth


# ---- a clip with its embeddings ------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A clip file and the folder that holds its embeddings."""

    file: ClipFile
    folder: Path
    allow_outside: bool  # may a clip name an embedding file outside this folder?

    def find(self, name: str) -> int:
        """The index of the clip with this id, or of this number."""
        return self.file.find(name)

    def embeddings_path(self, clip: Clip) -> Path:
        names = (clip.embeddings, clip.video_uid)
        return find_embeddings(clip.id, self.folder, *names, allow_outside=self.allow_outside)

    def load(self, index: int, vision_dim: int) -> tuple[Clip, np.ndarray, str | None]:
        """A clip, its embeddings [rows, I, D], and a warning where the two differ by the last frame."""
        clip = self.file.clip(index)
        rows = load_embeddings(clip, self.folder, vision_dim, allow_outside=self.allow_outside)
        clip, warning = fit_rows(clip, len(rows))
        return clip, rows, warning


def open_source(
    path: str | Path, embeddings: str | Path | None, allow_outside: bool, spans: np.ndarray | None = None
) -> Source:
    """A clip file with its embeddings, by default those in `embeddings/` beside it. Raises ProspectError."""
    folder = Path(embeddings) if embeddings else Path(path).parent / "embeddings"
    return Source(ClipFile(path, spans), folder, allow_outside)


def clip_rows(clip: Clip, rows: np.ndarray, path: Path) -> np.ndarray:
    """The clip's rows of its embedding file, a view: all of a file of its own, and of the video's those of its frames.

    Row 0 of the file at `path` is frame `embeddings_start_frame_idx`, by default the clip's first, or frame 0 where
    the file has the name of the video. A row that is missing at the end is left to `fit_rows`. Raises ProspectError
    where the file does not reach as far.
    """
    first = clip.embeddings_start
    if first is None and (clip.embeddings is not None or path.name in embedding_names(clip.id, None)):
        return rows
    first = first or 0
    found = rows[clip.start_frame - first : clip.end_frame + 1 - first]
    if len(found) < max(1, clip.num_frames - 1):
        has = f"{path} has {len(rows)} rows, frames {first}..{first + len(rows) - 1}"
        what = f"{has}; the clip's frames are {clip.start_frame}..{clip.end_frame}"
        remedy = f"row r is frame {first} + r of the video: encode all of it, or set embeddings_start_frame_idx"
        raise ProspectError(what, where=clip.where, remedy=remedy)
    return found


def fit_rows(clip: Clip, rows: int) -> tuple[Clip, str | None]:
    """The clip as its embedding file has it, and a warning where the two differ by the last frame.

    A file written end-exclusive has one row fewer than frames: its last frame is missing, and what was said at it
    moves to the last frame that exists. Any other count is an error.
    """
    if rows == clip.num_frames:
        return clip, None
    if rows != clip.num_frames - 1 or rows == 0:
        what = f"the embedding file has {rows} rows, frames {clip.start_frame}..{clip.end_frame} are {clip.num_frames}"
        remedy = "row r is frame start_frame_idx + r: encode the clip again"
        if clip.num_frames >= 20 and not 0.9 < rows / clip.num_frames < 1.1:  # not a frame or two: another rate
            rate = f"about {rows / clip.num_frames * clip.fps:.3g} rows for a second of the clip, not {clip.fps:g}"
            remedy = f"{rate}: encode at the clip's fps with --clips; of a whole video, set embeddings_start_frame_idx"
        raise ProspectError(what, where=clip.where, remedy=remedy)
    last = clip.end_frame - 1
    in_time = sorted(clip.turns, key=lambda turn: turn.end_frame)  # so that updates moved to one frame keep their order
    turns = tuple(replace(t, start_frame=min(t.start_frame, last), end_frame=min(t.end_frame, last)) for t in in_time)
    warning = f"{clip.where}: one row fewer than frames; frame {last + 1} is not there"
    return replace(clip, end_frame=last, turns=turns), warning


def load_embeddings(clip: Clip, folder: Path, vision_dim: int, *, allow_outside: bool = False) -> np.ndarray:
    """The clip's frame embeddings, [rows, I, D] (I vectors per frame, 1 for a plain [rows, D] file), as stored."""
    path = find_embeddings(clip.id, folder, clip.embeddings, clip.video_uid, allow_outside=allow_outside)
    rows = clip_rows(clip, read_embeddings(path), path)
    rows = rows[:, None] if rows.ndim == 2 else rows
    if rows.shape[-1] != vision_dim:
        what = f"embeddings are {rows.shape[-1]} wide, model.vision_dim is {vision_dim}"
        remedy = f"set model.vision_dim={rows.shape[-1]} or encode again"
        raise ProspectError(what, where=f"{clip.where}, {path}", remedy=remedy)
    return rows
