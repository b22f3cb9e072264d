"""Clips that training and validation share: validation would take for understanding what was learned by heart.

A validation clip leaks when a training clip has its id, or is of the same video (`video_uid`: another stretch of it
shows the same person, place and task), or has the same embeddings: a file of the same name and content.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import basename
from pathlib import Path

from prospect.errors import ProspectError
from prospect.packs import read_bytes

NAMED = 5  # leaks in an error's line


@dataclass(frozen=True, slots=True)
class Origin:
    """What tells where a clip comes from. where: "file, clip ID", for messages."""

    where: str
    id: str
    video_uid: str
    embeddings: str | Path  # text where there are many: it takes a fraction of the memory


def leaks(train: Sequence[Origin], val: Sequence[Origin]) -> list[str]:
    """A line for every validation clip that leaks: a training clip, and what both share."""
    ids, videos = {clip.id: clip for clip in train}, {clip.video_uid: clip for clip in train}
    others = [clip for clip in val if clip.id not in ids and clip.video_uid not in videos]
    names = {basename(clip.embeddings) for clip in train} & {basename(clip.embeddings) for clip in others}
    files = {str(clip.embeddings): clip for clip in train if basename(clip.embeddings) in names}  # clips may share one
    contents = {digest(path): clip for path, clip in files.items()}
    found = []
    for clip in val:
        if other := ids.get(clip.id):
            shared = "id"
        elif other := videos.get(clip.video_uid):
            shared = f"video {clip.video_uid!r}"
        elif basename(clip.embeddings) in names and (other := contents.get(digest(clip.embeddings))):
            shared = f"embeddings {basename(clip.embeddings)!r}"
        else:
            continue
        found.append(f"{clip.where} has the same {shared} as {other.where}")
    return found


def digest(path: str | Path) -> bytes:
    return hashlib.sha256(read_bytes(Path(path))).digest()


def check_leaks(train: Sequence[Origin], val: Sequence[Origin], allowed: bool) -> list[str]:
    """The warning of leaks that are allowed, or none. Raises ProspectError where there are others."""
    found = leaks(train, val)
    if not found:
        return []
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    what = f"{len(found)} of {len(val)} validation clips leak into training: {'; '.join(found[:NAMED])}{more}"
    if not allowed:
        remedy = "leave them out of data.train or data.val, or set data.allow_leaks=true"
        raise ProspectError(what, where="data.val", remedy=remedy)
    return [f"data.val: {what}"]
