"""Pages to look at: a streamed clip on a time line, a clip as it is trained on, the curves of training runs.

    python -m prospect.report RECORDS.jsonl [--clip FILE[:ID or INDEX]] [--pictures SOURCE] [--out PAGE.html]
    python -m prospect.report OUT [--clip FILE] [--out PAGE.html]    OUT: what prospect.evaluate --out has written
    python -m prospect.report A.jsonl B.jsonl ...                    one clip by several checkpoints; or OUT OUT ...
    python -m prospect.report RUN_DIR [RUN_DIR ...] [--out PAGE.html]

A page is one HTML file that needs nothing else: no network, no service. Python gathers what is to be shown into
dataclasses, `write_page` puts them into the page as JSON, and JavaScript draws them.

    timeline.py, .js    Timeline    a clip's records (infer.py --out) beside its reference (--clip)
    tokens.py, .js      Setting     a clip's training sequences, token by token (prospect.show)
    curves.py, .js      Run         a run's metrics.jsonl
    svg.py                          every plot and time line as a figure for a paper: --svg FOLDER
    page.py, common.js, page.html, page.css    what all pages share
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from prospect.clip_files import ClipFile, clip_id
from prospect.clips import Clip
from prospect.errors import ProspectError, run_entry_point
from prospect.names import clip_file_names, parse_clip_name
from prospect.records import REFERENCES, made_by
from prospect.report.curves import read_run, write_runs
from prospect.report.page import said_where
from prospect.report.timeline import Timeline, read_records, timeline, write_timelines


def reference_clips(name: str, ids: Iterable[str]) -> dict[str, Clip]:
    """The clips of FILE (a folder, a pattern) with these ids, or of FILE:ID (or INDEX) that one."""
    path, which = parse_clip_name(name)
    files = [ClipFile(file) for file in clip_file_names([path])]
    if which is not None:
        clip = files[0].clip(files[0].find(which))
        return {clip.id: clip}
    numbered = ((file, index, raw) for file in files for index, raw in enumerate(file) if isinstance(raw, dict))
    places = {clip_id(raw, index): (file, index) for file, index, raw in numbered}
    if missing := [id for id in ids if id not in places]:
        raise ProspectError(f"no clip {missing[0]!r}", where=path, remedy="name the file that was streamed")
    return {id: file.clip(index) for id in ids for file, index in [places[id]]}


def stored_records(source: Path) -> list[Path]:
    """The files of records that `source` stands for: of an evaluation's directory one for each clip."""
    return sorted((source / "records").glob("*.jsonl")) or [source]


def timelines(sources: list[Path], reference: str | None, pictures: str | None) -> list[Timeline]:
    """The time line of every clip of which each source has records, those of the further sources beside the first's.

    reference: a clip file, or one clip of it. Raises ProspectError where nothing is left to show.
    """
    streamed = [
        {id: (records, made_by(file)) for file in stored_records(source) for id, records in read_records(file).items()}
        for source in sources
    ]
    ids = [id for id in streamed[0] if all(id in of for of in streamed)]
    if not ids:
        what = "have no clip in common"
        raise ProspectError(what, where=", ".join(map(str, sources)), remedy="give streams of the same clips")
    clips: dict[str, Clip] = {}
    if reference:
        clips = reference_clips(reference, ids)
        if not (ids := [id for id in clips if id in ids]):
            what = f"holds no record of clip {', '.join(clips)}"
            raise ProspectError(what, where=str(sources[0]), remedy="name another clip")
    if pictures and len(ids) > 1:
        raise ProspectError("--pictures are those of one clip", where="command line", remedy="--clip FILE:ID")
    shown = []
    for id in ids:
        (records, made), *others = (of[id] for of in streamed)
        first = timeline(records, clips.get(id), made, pictures=pictures)
        for (also, made), source in zip(others, sources[1:]):
            if (also[0]["frame_idx"], len(also)) != (records[0]["frame_idx"], len(records)):
                what = f"has other frames of clip {id} than {sources[0]}"
                raise ProspectError(what, where=str(source), remedy="stream the same clip to its end")
            first.beside.append(timeline(also, clips.get(id), made))
        for one, source in zip([first, *first.beside], sources):
            one.made_by = one.made_by or str(source)
        shown.append(first)
    return shown


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m prospect.report", description=__doc__, formatter_class=form)
    what = "files of records or directories of evaluations, of the same clips; or directories of runs"
    parser.add_argument("source", nargs="+", metavar="RECORDS.jsonl|OUT|RUN_DIR", help=what)
    what = "the reference of the records: what should have happened"
    parser.add_argument("--clip", metavar="FILE[:ID|INDEX]", help=what)
    what = "the clip's video, or a directory of pictures, to show frames"
    parser.add_argument("--pictures", metavar="SOURCE", help=what)
    parser.add_argument(
        "--out", metavar="PAGE.html", help="default: RECORDS.html, OUT/timeline.html or RUN_DIR/curves.html"
    )
    what = "write every plot and time line here too, each as a figure for a paper"
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help=what)
    arguments = parser.parse_args()
    sources = [Path(source) for source in arguments.source]
    if sources[0].is_dir() and not (sources[0] / "records").is_dir():
        out = arguments.out or sources[0] / "curves.html"
        write_runs(out, [read_run(directory) for directory in sources], arguments.svg)
    else:
        stored = sources[0] / REFERENCES
        reference = arguments.clip or (str(stored) if stored.exists() else None)
        out = arguments.out or (
            sources[0] / "timeline.html" if sources[0].is_dir() else sources[0].with_suffix(".html")
        )
        write_timelines(out, timelines(sources, reference, arguments.pictures), arguments.svg)
    print(said_where(out))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
