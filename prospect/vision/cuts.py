"""Which rows of which source go to which embedding file, and the files themselves.

A source is a video, a directory of pictures or an Arrow file; its row k is frame k. Without a clip file it becomes one
file, {name}_embeddings.*, with a clip file one for each clip of its video, where training looks for it:

    the clip's own `embeddings`, else {id}_embeddings    rows start_frame_idx .. end_frame_idx, both included
    with `embeddings_start_frame_idx`: the same, else {video_uid}_embeddings    all rows from that one on

Clips of one video that name one file share it, when they share their frames. Beside every file a .json says what made
it; a file made from the same source in the same way is kept.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prospect.clip_files import ClipFile, clip_id
from prospect.embeddings import ENDINGS, embedding_names, write_embeddings
from prospect.errors import ProspectError
from prospect.files import read_json, write_json
from prospect.names import clip_file_names


@dataclass(frozen=True)
class Cut:
    """Rows `first` .. `last` (inclusive; None: to the end) of a source, and the file that they go to."""

    path: Path
    first: int
    last: int | None


def plan_cuts(sources: list[Path], out: Path, ending: str, clips: Path | None) -> dict[Path, list[Cut]]:
    """The files to be written for each source: one, or with a clip file one for each clip of the video.

    ending: of files whose clips name none. A source without a clip is left out, and reported on stderr. ProspectError
    when two sources would write the same file, a clip lacks its frames, or no source has a clip.
    """
    by_name: dict[str, Path] = {}
    for source in sources:
        name = source.resolve().name if source.is_dir() else source.stem
        if by_name.setdefault(name, source) != source:
            what = f"{by_name[name]} and {source} would be written to the same file"
            raise ProspectError(what, where=str(out), remedy="run them with two --out")
    if clips is None:
        return {source: [Cut(out / f"{name}_embeddings.{ending}", 0, None)] for name, source in by_name.items()}

    cuts: dict[Path, dict[Path, Cut]] = {source: {} for source in sources}
    files = map(ClipFile, clip_file_names([clips]))
    for index, clip in (numbered for file in files for numbered in enumerate(file)):
        source = next((by_name[name] for name in source_names(clip) if name in by_name), None)
        if source is None:
            continue  # a clip of a video that is not encoded now
        where = f"{clips}: clip {clip_id(clip, index)}"
        cut = _cut_of(clip, index, out, ending, where)
        if cuts[source].setdefault(cut.path, cut) != cut:
            what = "two clips have this id, or name one file, and have different frames"
            remedy = "give each clip an `id`, or `embeddings_start_frame_idx` where the file is the whole video's"
            raise ProspectError(what, where=where, remedy=remedy)
    without = [str(source) for source, of_source in cuts.items() if not of_source]
    if len(without) == len(cuts):
        what = f"no clip of {', '.join(without[:5])}"
        raise ProspectError(what, where=str(clips), remedy="a clip's video_uid or frames_file must name its video")
    if without:
        print(f"left out, for want of a clip: {', '.join(without[:5])} ({len(without)} sources)", file=sys.stderr)
    return {source: list(of_source.values()) for source, of_source in cuts.items() if of_source}


def _cut_of(clip: dict, index: int, out: Path, ending: str, where: str) -> Cut:
    fields = ("start_frame_idx", "end_frame_idx", "embeddings", "embeddings_start_frame_idx")
    first, last, named, begin = (clip.get(name) for name in fields)
    frames = type(first) is int and type(last) is int and 0 <= first <= last
    frames = frames and (begin is None or type(begin) is int and 0 <= begin <= first)
    if not frames or not isinstance(named, str | None):
        what = f"frames {first!r} to {last!r}, or its `embeddings`, cannot be written"
        raise ProspectError(what, where=where, remedy="run python -m prospect.check")
    owner = clip_id(clip, index)
    if begin is not None:  # the file is the whole video's
        owner, first, last = str(clip.get("video_uid", owner)), begin, None
    name = embedding_names(owner, named)[0]
    path = out / (name if named is not None else Path(name).with_suffix(f".{ending}"))
    if (
        path.suffix not in ENDINGS
        or "\0" in name
        or not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(out))
    ):
        what = f"its embeddings cannot be written as {name!r}"
        raise ProspectError(what, where=where, remedy=f"a path inside {out} that ends in {', '.join(ENDINGS)}")
    return Cut(path, first, last)


def source_names(clip: object) -> list[str]:
    """The names that a clip's video may have: its `frames_file`'s, its uid, or the uid without its first word.

    The last is for Assembly101, where one recording holds two videos, assembly_NAME and disassembly_NAME.
    """
    if not isinstance(clip, dict):
        return []
    uid = str(clip.get("video_uid"))
    return [Path(str(clip.get("frames_file", ""))).stem, uid, uid.partition("_")[2]]


def is_done(cut: Cut, source: Path, made_by: dict) -> bool:
    """Whether the file was written from this source, `made_by` this. ProspectError when it was made differently."""
    if not cut.path.exists():
        return False
    wanted = made_by | {"source": source.name, "first_frame": cut.first}
    try:
        facts = read_json(cut.path.with_suffix(".json"))
        other = [name for name, value in wanted.items() if facts.get(name) != value]
        if cut.last is not None and facts.get("rows") not in (cut.last - cut.first + 1, cut.last - cut.first):
            other.append("rows")
    except ProspectError:
        other = ["how it was made is not known"]
    if other:
        what = f"is there already, made with other settings ({', '.join(other)})"
        raise ProspectError(what, where=str(cut.path), remedy="give another --out, or remove the file")
    return True


def write_cut(rows: np.ndarray, cut: Cut, source: Path, made_by: dict) -> None:
    """Write a cut of a source's rows [rows, D] or [rows, I, D], float16, and beside it what made it.

    Each file is written aside and renamed. The JSON is first, so that no embeddings exist without it. Raises
    ProspectError where the source does not have all the rows.
    """
    # A clip that ends one frame after the source was written with its end exclusive; training accepts such clips.
    last = len(rows) - 1 if cut.last in (None, len(rows)) else cut.last
    if last >= len(rows) or cut.first > last:
        what = f"{cut.path.name} needs frames {cut.first} to {last}, the source has {len(rows)}"
        remedy = "is it the clip's video, at the clip's frames per second? else correct its end_frame_idx"
        raise ProspectError(what, where=str(source), remedy=remedy)
    facts = {"source": source.name, "first_frame": cut.first, "rows": last - cut.first + 1, "dtype": "float16"}
    write_json(cut.path.with_suffix(".json"), made_by | facts)
    write_embeddings(rows[cut.first : last + 1], cut.path)
