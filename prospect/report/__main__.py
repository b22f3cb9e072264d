"""Pages to look at: a streamed clip on a time line, a clip as it is trained on, the curves of training runs.

    python -m prospect.report RECORDS.jsonl [--clip FILE[:ID or INDEX]] [--pictures SOURCE] [--out PAGE.html]
    python -m prospect.report OUT --clip FILE [--out PAGE.html]      OUT: what prospect.evaluate --out has written
    python -m prospect.report RUN_DIR [RUN_DIR ...] [--out PAGE.html]

A page is one HTML file that needs nothing else: no network, no service. Python gathers what is to be shown into
dataclasses, `write_page` puts them into the page as JSON, and JavaScript draws them.

    timeline.py, .js    Timeline    a clip's records (infer.py --out) beside its reference (--clip)
    tokens.py, .js      Setting     a clip's training sequences, token by token (prospect.show)
    curves.py, .js      Run         a run's metrics.jsonl
    page.py, common.js, page.html, page.css    what all pages share
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from prospect.clip_files import ClipFile, clip_id
from prospect.clips import Clip
from prospect.errors import ProspectError, run_entry_point
from prospect.names import clip_file_names, parse_clip_name
from prospect.report.curves import read_run, write_runs
from prospect.report.timeline import read_records, timeline, write_timelines


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


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m prospect.report", description=__doc__, formatter_class=form)
    what = "records of one file, an evaluation's directory, or directories of runs"
    parser.add_argument("source", nargs="+", metavar="RECORDS.jsonl|OUT|RUN_DIR", help=what)
    what = "the reference of the records: what should have happened"
    parser.add_argument("--clip", metavar="FILE[:ID|INDEX]", help=what)
    what = "the clip's video, or a directory of pictures, to show frames"
    parser.add_argument("--pictures", metavar="SOURCE", help=what)
    parser.add_argument(
        "--out", metavar="PAGE.html", help="default: RECORDS.html, OUT/timeline.html or RUN_DIR/curves.html"
    )
    arguments = parser.parse_args()
    source = Path(arguments.source[0])
    stored = sorted((source / "records").glob("*.jsonl"))  # of an evaluation, one file for each clip
    if source.is_dir() and not stored:
        out = arguments.out or source / "curves.html"
        write_runs(out, [read_run(directory) for directory in arguments.source])
    else:
        if len(arguments.source) > 1:
            what = "records are shown one file at a time"
            raise ProspectError(what, where="command line", remedy="or give directories of runs")
        records = {id: of for file in stored or [source] for id, of in read_records(file).items()}
        clips: dict[str, Clip] = {}
        if arguments.clip:
            clips = reference_clips(arguments.clip, records)
            records = {id: records[id] for id in clips if id in records}
            if not records:
                what = f"holds no record of clip {', '.join(clips)}"
                raise ProspectError(what, where=str(source), remedy="name another clip")
        if arguments.pictures and len(records) > 1:
            raise ProspectError("--pictures are those of one clip", where="command line", remedy="--clip FILE:ID")
        out = arguments.out or (source / "timeline.html" if stored else source.with_suffix(".html"))
        pictures = arguments.pictures
        shown = [timeline(of_clip, clips.get(id), pictures=pictures) for id, of_clip in records.items()]
        write_timelines(out, shown)
    print(f"{out}  ({os.path.getsize(out) / 1000:.0f} kB)")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
