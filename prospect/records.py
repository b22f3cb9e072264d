"""An evaluation's folder: a records file for every streamed clip, the clips themselves, and the settings of both.

    OUT/records/CLIP.jsonl            one record per frame, in order, written when the clip has ended
    OUT/records-reference/CLIP.jsonl  the same of the model that was told when (--moments reference)
    OUT/references.jsonl              the clips, as in their files: what the records are scored against
    OUT/settings.json                 all that decides what the records are; infer.py --out X.jsonl: X.settings.json
    OUT/metrics.json, metrics.md      what was printed
    OUT/clips.jsonl                   every clip's numbers and outcomes, the worst first (prospect/mistakes.py)

Interrupted and started again, an evaluation resumes with the clips that have no complete records, if the settings are
still those.
"""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prospect.clips import Clip
from prospect.errors import ProspectError
from prospect.files import read_json, read_lines, write_json, write_whole
from prospect.stream import FrameRecord

RECORDS, RECORDS_TOLD, REFERENCES = "records", "records-reference", "references.jsonl"
FIELDS = {field.name for field in dataclasses.fields(FrameRecord)}


def records_file(records_dir: Path, clip_id: str) -> Path:
    """Where a clip's records lie: named by its id."""
    return records_dir / f"{file_name(clip_id)}.jsonl"


def file_name(id: str) -> str:
    """An id, written so that any is a file name, and no two the same."""
    name = urllib.parse.quote(id, safe=" ")
    if len(name) > 200:  # file systems end at 255 bytes
        name = f"{name[:160]}-{hashlib.sha256(id.encode()).hexdigest()[:32]}"
    return name


def read_records(path: Path, clip: Clip) -> list[dict] | None:
    """The records of a clip from its first frame on; None where there is no file, or a record in it is not whole."""
    try:
        records = [json.loads(line) for line in read_lines(path)]
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: broken off, or not UTF-8
        return None
    except OSError as error:
        raise ProspectError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not all(isinstance(record, dict) and record.keys() == FIELDS for record in records):
        return None
    first = clip.start_frame
    whole = [record["frame_idx"] for record in records] == list(range(first, first + len(records)))
    return records if whole else None


def settings_beside(path: Path) -> Path:
    """Where the settings lie by which `infer.py --out path` made its records."""
    return path.with_name(f"{path.stem}.settings.json")


def made_by(path: Path) -> dict[str, Any]:
    """The settings by which a file of records was made, by name, wherever they lie; {} where there are none."""
    for settings in (settings_beside(path), path.parent.parent / "settings.json"):
        if settings.is_file():
            return read_json(settings)
    return {}


def write_references(out: Path, clips: Iterable[dict[str, Any]]) -> None:
    """The clips that are evaluated, as they are in their files, so that `out` can be scored again by itself."""
    with write_whole(out / REFERENCES) as file:
        for clip in clips:
            file.write(json.dumps(clip).encode() + b"\n")


def same_settings(out: Path, wanted: dict[str, Any]) -> None:
    """Begin the folder `out`, or make sure that the records it holds were made with these very settings.

    Raises ProspectError naming what differs, and where nothing can be written there.
    """
    path, remedy = out / "settings.json", "name another --out, or remove this one"
    try:
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProspectError(f"cannot be used: {error.strerror}", where=str(out), remedy="name another --out") from error
    try:
        then = read_json(path) if any((out / RECORDS).glob("*.jsonl")) else wanted
    except ProspectError as error:
        what = "does not tell by which settings its records were made"
        raise ProspectError(what, where=str(path), remedy=remedy) from error
    names = [name for name in sorted({*then, *wanted}) if then.get(name) != wanted.get(name)]
    if names:
        differ = "; ".join(f"{name} was {then.get(name)}, is {wanted.get(name)}" for name in names)
        raise ProspectError(f"holds records made with other settings: {differ}", where=str(out), remedy=remedy)
    write_json(path, wanted)
