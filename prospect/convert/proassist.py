"""ProAssist's prepared dialogues as our clips, and back.

    python -m prospect.convert proassist IN.jsonl OUT.json            prepared dialogues -> clips
    python -m prospect.convert proassist IN.json OUT.jsonl --reverse  such clips -> prepared dialogues

ProAssist (arXiv 2506.05904) publishes 30,135 dialogues as JSONL. A conversation there is literally the order in which
the model sees things: ranges of frames, [start, end) with the end excluded, with texts between them. Our clips have no
frame entries: each turn names its frames. An assistant's text follows the last frame of its turn, a user's text
precedes it (so that the frame can decide the answer), hence

    prepared   frames 11..15   user "I want"   frames 15..16   assistant "Great"   frames 16..21
    shown      f11 f12 f13 f14 User: I want f15 Assistant: Great f16 f17 f18 f19 f20
    ours       user 15..15, the frame after its text; assistant 15..15, the frame before its text; clip 11..20 inclusive

Each turn covers that one frame, as ProAssist decides each text at one frame. The way back rebuilds the ranges from the
turns. Every dialogue is converted back at once and compared: one that would not return exactly as it came is refused
by name.

Fields that a dialogue has and our clips lack are carried along unchanged (`metadata`, `progress`, `labels`, ...). We
add:

    id                 {video_uid}_{clip_idx}_{user_id}: several dialogues belong to one stretch of one video. A
                       repeated id gets _2, _3, ... in the order of the file
    embeddings         {video_uid}_frames_{start}_{end}.npy, relative to data.embeddings: frames start..end of the
                       video, both included, row 0 being frame start. Dialogues of one video over the same frames share
                       the file
    inferred_goal, inferred_knowledge    `metadata`'s task_goal and knowledge, where given
    dst                [], as no task state is known
    unanswered         user turns after the last frame: no frame is left to answer them, so they are kept apart
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prospect.clip_files import ClipFile
from prospect.errors import ProspectError

ADDED_TO_CLIP = ("id", "embeddings", "inferred_goal", "inferred_knowledge", "dst", "unanswered")
ADDED_TO_TURN = ("start_frame", "end_frame")


def to_clip(sample: dict[str, Any], where: str) -> dict[str, Any]:
    """One prepared ProAssist dialogue as a raw clip. `where` names it in messages.

    Raises ProspectError for a dialogue that our clips cannot hold exactly.
    """
    start, end = (_frame(sample, field, where) for field in ("start_frame_idx", "end_frame_idx"))
    taken = [field for field in ADDED_TO_CLIP if field in sample]
    if taken:
        raise ProspectError(f"has a field of its own named {taken[0]}", where=where, remedy="is it converted already?")
    video, number, metadata = sample.get("video_uid"), sample.get("clip_idx", 0), sample.get("metadata") or {}
    if not isinstance(video, str) or not isinstance(metadata, dict):
        raise ProspectError("must have video_uid, a text, and metadata, an object", where=where)
    conversation, unanswered = _turns(sample, start, end, where)

    user = metadata.get("user_id")
    clip = {**sample, "end_frame_idx": end - 1, "conversation": conversation}
    clip["id"] = f"{video}_{number}" if user is None else f"{video}_{number}_{user}"
    clip["embeddings"] = f"{video}_frames_{start}_{end - 1}.npy"
    for ours, theirs in (("inferred_goal", "task_goal"), ("inferred_knowledge", "knowledge")):
        if isinstance(metadata.get(theirs), str):
            clip[ours] = metadata[theirs]
    clip["dst"] = []
    if unanswered:
        clip["unanswered"] = unanswered

    if to_prepared(clip, where) != sample:
        what = "its frames are not one unbroken run from start_frame_idx to end_frame_idx, split by texts"
        raise ProspectError(what, where=where, remedy="no clip of ours can express that; leave the dialogue out")
    return clip


def _turns(sample: dict[str, Any], start: int, end: int, where: str) -> tuple[list[dict], list[dict]]:
    """The turns of a prepared dialogue over the frames [start, end), and the user's turns after the last of them."""
    conversation, unanswered = [], []
    upcoming = start  # the first frame not yet shown
    latest = (start - 1, 1)  # where the previous text is: (its frame, 0 before or 1 after that frame)
    for i, entry in enumerate(_entries(sample, where)):
        here = f"{where}, entry {i}"
        if entry["role"] == "frames":
            upcoming = _frame(entry, "end", here)
        elif entry["role"] == "system":
            if conversation or upcoming != start:
                raise ProspectError("a system text inside the dialogue", where=here, remedy="move it to the front")
            conversation.append(dict(entry))
        elif entry["role"] == "user" and upcoming >= end:
            unanswered.append(dict(entry))
        elif entry["role"] in ("user", "assistant"):
            position = (upcoming, 0) if entry["role"] == "user" else (upcoming - 1, 1)
            if position[0] < start:
                what = "an assistant's text before the first frame"
                raise ProspectError(what, where=here, remedy="some frame has to decide it")
            if position < latest or unanswered:
                what = "an answer without a frame between it and the user's text"
                raise ProspectError(what, where=here, remedy="a frame after the user's text has to decide the answer")
            latest = position
            conversation.append({**entry, "start_frame": position[0], "end_frame": position[0]})
        else:
            what = f"unknown role {entry['role']!r:.40}"
            raise ProspectError(what, where=here, remedy="system, frames, user, assistant")
    return conversation, unanswered


def to_prepared(clip: dict[str, Any], where: str) -> dict[str, Any]:
    """The prepared ProAssist dialogue of a raw clip that `to_clip` made; ProspectError for any other kind of turn."""
    start, end = _frame(clip, "start_frame_idx", where), _frame(clip, "end_frame_idx", where) + 1
    conversation: list[dict[str, Any]] = []
    upcoming = start

    def show_until(frame: int) -> None:
        nonlocal upcoming
        if frame > upcoming:
            conversation.append({"role": "frames", "start": upcoming, "end": frame})
            upcoming = frame

    for i, turn in enumerate(_entries(clip, where)):
        here = f"{where}, turn {i}"
        if turn["role"] not in ("system", "user", "assistant"):
            what = f"a turn of role {turn['role']!r:.40} has no place in a ProAssist dialogue"
            raise ProspectError(what, where=here, remedy="only clips that this converter made can go back")
        if turn["role"] != "system":
            show_until(_frame(turn, "end_frame", here) + (turn["role"] == "assistant"))
        conversation.append({field: value for field, value in turn.items() if field not in ADDED_TO_TURN})
    show_until(end)
    conversation += clip.get("unanswered", [])
    kept = {field: value for field, value in clip.items() if field not in ADDED_TO_CLIP}
    return {**kept, "end_frame_idx": end, "conversation": conversation}


def _entries(dialogue: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The conversation, after checking that every entry is an object with a role."""
    entries = dialogue.get("conversation")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "role" in entry for entry in entries):
        raise ProspectError("must be a list of objects with a role", where=f"{where}, conversation")
    return entries


def _frame(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProspectError(f"must be a frame number, not {value!r:.40}", where=f"{where}, {name}")
    return value


def clips_of(path: Path) -> Iterator[dict[str, Any]]:
    """The clips of a file of prepared dialogues, one at a time, with ids made distinct."""
    used: set[str] = set()
    for where, sample in _objects(path):
        clip = to_clip(sample, where)
        names = itertools.chain([clip["id"]], (f"{clip['id']}_{n}" for n in itertools.count(2)))
        clip["id"] = next(name for name in names if name not in used)
        used.add(clip["id"])
        yield clip


def prepared_of(path: Path) -> Iterator[dict[str, Any]]:
    """The prepared dialogues of a file of converted clips, one at a time."""
    return (to_prepared(clip, where) for where, clip in _objects(path))


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, value in enumerate(ClipFile(path)):
        where = f"{path}, dialogue {index}"
        if not isinstance(value, dict):
            raise ProspectError(f"must be a JSON object, not {type(value).__name__}", where=where)
        yield where, value
