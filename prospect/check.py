"""Check every clip and its embeddings before anything is learned from them.

    python -m prospect.check FILE ... [--embeddings DIR] [--vision-dim N] [--strict] [--workers N]

Each problem is one line: file, clip, turn and field, what is wrong, and what to do about it. A table counts them by
kind. Then comes the scale of each file's embeddings; it is a warning where two files, or two data sets of one, differ
(prospect/features.py). Exit status 2 when there are errors (with --strict: or warnings), else 0. Training runs the same
checks at its start, and stops there or skips the bad clips (`data.on_bad: skip`).

prospect/clip_files.py checks a clip's own fields, prospect/embeddings.py the bytes of an embedding file. This file
combines the two for all clips: a file for every clip, of the right width, one row per frame, every number finite, no id
used twice, and updates where the steps' own times say. Only the clips being checked and their embeddings are in memory.
This command checks everything anew; before training, what was found and has not changed since is believed
(prospect/kept.py). When nothing is wrong, the command that trains on these clips is printed.
"""

import argparse
import contextlib
import importlib
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from tqdm import tqdm

from prospect.clip_files import Problem, Source, clip_id, clip_rows, fit_rows, open_source, parse_clip
from prospect.clips import Clip
from prospect.config import DataConfig
from prospect.embeddings import check_finite, read_embeddings
from prospect.errors import ProspectError, print_next, run_entry_point
from prospect.features import by_dataset, difference, rate_of
from prospect.kept import Found, Task, find_all
from prospect.names import clip_file_names
from prospect.packs import stamp
from prospect.processes import cores

TOLERANCE = 2.0  # seconds between a step's own time and its update, from which on they disagree


@dataclass
class Checked:
    """The findings about one clip. width: D of its embeddings, None where they cannot be read."""

    id: str | None = None  # None: not even an id can be read
    width: int | None = None
    frames: int = 0
    updates: int = 0  # DST_UPDATE turns
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.fatal]


# ---- one clip ------------------------------------------------------------------------------------


def check_clip(source: Source, index: int, vision_dim: int | None) -> Found:
    """Everything wrong with one clip and its embeddings, as the fields of Checked. vision_dim None: any width."""
    found = Found(checked := Checked())
    try:
        raw = source.file[index]
        clip, checked.problems = parse_clip(raw, str(source.file.path), index)
    except ProspectError as error:  # a broken line of a JSONL file
        raw, checked.problems = None, [as_problem("not JSON", error)]
    if isinstance(raw, dict):
        checked.id = found.id = clip_id(raw, index)
        if clip is not None:
            checked.frames, checked.updates = clip.num_frames, len(clip.updates())
            checked.problems += step_time_problems(clip, source.file.path)
        names = (raw.get(name) for name in ("embeddings", "video_uid"))
        found.named, found.video = (name if isinstance(name, str) else None for name in names)
        check_embeddings(found, source, clip, vision_dim)
    if checked.errors:
        found.stamp = None
    found.value = astuple(checked)
    return found


def check_embeddings(found: Found, source: Source, clip: Clip | None, vision_dim: int | None) -> None:
    """Add what is wrong with a clip's embedding file to what was found; rows do not count for a broken clip (None)."""
    checked: Checked = found.value
    where = f"{source.file.path}, clip {checked.id}"

    def note(kind: str, what: str, remedy: str) -> None:
        checked.problems.append(Problem(kind, where, "embeddings", what, remedy))

    try:
        path = found.find(source)
    except ProspectError as error:
        return note("no embeddings", error.what, error.remedy)
    with contextlib.suppress(OSError):  # what that is, reading reports
        found.stamp = stamp(path)
    try:
        rows = read_embeddings(path)  # [rows, D] or [rows, I, D]
    except ProspectError as error:
        return note("broken embeddings", f"{path}: {error.what}", error.remedy)
    checked.width = rows.shape[-1]
    if vision_dim not in (None, checked.width):
        what = f"{path}: embeddings are {checked.width} wide, model.vision_dim is {vision_dim}"
        note("wrong width", what, f"set model.vision_dim={checked.width} or encode again")
    try:
        file, rows = rows, rows if clip is None else clip_rows(clip, rows, path)
    except ProspectError as error:
        return note("wrong row count", error.what, error.remedy)
    rate = None if rows is file else rate_of(path)  # of a whole video's file, which has rows for any clip at any rate
    if rate is not None and not math.isclose(rate, clip.fps, rel_tol=0.01):
        what = f"{path}: encoded at {rate:g} rows per second, the clip's fps is {clip.fps:g}"
        note("wrong rate", what, "encode at the clip's fps, or correct it and the clip's frames")
    try:
        check_finite(rows, str(path))
    except ProspectError as error:
        note("not finite", f"{path}: {error.what}", error.remedy)
    if clip is None:
        return
    try:
        _, warning = fit_rows(clip, len(rows))
    except ProspectError as error:
        return note("wrong row count", error.what, error.remedy)
    if warning:
        what = warning.removeprefix(f"{clip.where}: ")
        remedy = "nothing to do where the file's end_frame_idx is exclusive"
        checked.problems.append(Problem("last row missing", where, "", what, remedy, fatal=False))


def step_time_problems(clip: Clip, path: Path) -> list[Problem]:
    """A warning where the steps' own times (start_ts, end_ts) and the clip's updates disagree, else nothing."""
    begin, end = clip.seconds(clip.start_frame), clip.seconds(clip.end_frame + 1)
    updates = {(t.id, t.transition): turn for turn in clip.updates() for t in turn.transitions}
    times = [(step.id, "start", step.start_ts) for step in clip.steps if step.start_ts is not None]
    times += [(step.id, "complete", step.end_ts) for step in clip.steps if step.end_ts is not None]
    remedy = f"python -m prospect.convert states {shlex.quote(str(path))} OUT.json"
    if not updates:
        if not any(begin <= time <= end for _, _, time in times):
            return []
        what = "its steps have times, but no DST_UPDATE turn moves them"
        return [Problem("times without updates", clip.where, "dst", what, remedy, fatal=False)]
    found = []
    for id, transition, time in times:
        turn = updates.get((id, transition))
        if turn is None:
            if begin + TOLERANCE <= time <= end - TOLERANCE:
                found.append(f"{id} has its {transition} at {time:g} s, and no update")
        elif max(clip.seconds(turn.start_frame) - time, time - clip.seconds(turn.end_frame)) > TOLERANCE:
            at = clip.seconds(turn.end_frame)
            found.append(f"{id} has its {transition} at {time:g} s, and the update at {at:g} s")
    if not found:
        return []
    what = found[0] + (f"; and {len(found) - 1} more" if len(found) > 1 else "")
    remedy = f"correct the times, or make the updates of them: {remedy} --replace"
    return [Problem("times and updates disagree", clip.where, "dst", what, remedy, fatal=False)]


def as_problem(kind: str, error: ProspectError) -> Problem:
    return Problem(kind, error.where, "", error.what, error.remedy)


# ---- all clips -----------------------------------------------------------------------------------


def check_all(
    sources: Sequence[Source], vision_dim: int | None, workers: int | None = None, keep: bool = True
) -> Iterator[tuple[int, int, Checked]]:
    """Each clip of the sources, in order: source, number, findings. An id that occurs twice is among its problems.

    workers, keep: see prospect/kept.py.
    """
    clips = [(number, index) for number, source in enumerate(sources) for index in range(len(source.file))]
    task = Task("check", check_clip, vision_dim, depends_on=vision_dim)
    seen: dict[str, int] = {}  # the source of each id
    for (number, index), found in zip(clips, find_all(sources, clips, task, workers, keep), strict=True):
        checked = Checked(*found.value)
        checked.problems = [Problem(*problem) for problem in checked.problems]
        path = str(sources[number].file.path)
        if checked.id in seen:
            what = f"the id {checked.id!r} occurs twice (also in {sources[seen[checked.id]].file.path})"
            where = f"{path}, clip {checked.id}"
            checked.problems.append(Problem("duplicate id", where, "id", what, "give each clip an id of its own"))
        elif checked.id is not None:
            seen[checked.id] = number
        yield number, index, checked


# ---- before training -----------------------------------------------------------------------------


@dataclass
class Usable:
    """The clips to learn from, as (source, index); a line for each clip left out; the first warning of each kind."""

    clips: list[tuple[int, int]] = field(default_factory=list)
    updates: int = 0  # DST_UPDATE turns of these clips
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def usable_clips(sources: Sequence[Source], config: DataConfig, vision_dim: int) -> Usable:
    """Check all clips. With `data.on_bad: stop` the first error is raised; it reports how many more there are and how
    to list them. With `skip` the bad clips are left out, and each is named."""
    usable = Usable()
    errors: list[Problem] = []
    bad_clips = 0
    first_of_kind: dict[str, Problem] = {}
    of_kind: Counter[str] = Counter()
    for number, index, checked in check_all(sources, vision_dim):
        for problem in checked.problems:
            if not problem.fatal:
                first_of_kind.setdefault(problem.kind, problem)
                of_kind[problem.kind] += 1
        if not checked.errors:
            usable.clips.append((number, index))
            usable.updates += checked.updates
            continue
        errors += checked.errors
        bad_clips += 1
        more = len(checked.errors) - 1
        others = f"; and {more} more problem(s) of this clip" if more else ""
        usable.skipped.append(f"{checked.errors[0].error()}{others}")
    command = check_command(sources, config, vision_dim)
    if errors and config.on_bad == "stop":
        first = errors[0].error()
        if len(errors) > 1:
            listed = f"{len(errors) - 1} more problem(s), in {bad_clips} clip(s) in all: {command}"
            first.remedy = f"{first.remedy}; {listed}" if first.remedy else listed
        raise first
    for kind, problem in first_of_kind.items():
        more = of_kind[kind] - 1
        usable.warnings.append(f"{problem.error()}" + (f"; and {more} more like it: {command}" if more else ""))
    return usable


def refuse_without_updates(updates: int, config: DataConfig) -> None:
    """Raise ProspectError where task state is to be learned (data.dst) from clips that have no update."""
    if config.dst and not updates:
        what = "no clip has a DST_UPDATE turn: with data.dst=true a model would learn never to update"
        remedy = "make them from step times, python -m prospect.convert states IN OUT; step times from dialogues, "
        remedy += "python -m prospect.convert steps IN OUT; or train without task state, data.dst=false"
        raise ProspectError(what, where=", ".join(file.path for file in config.train_files()), remedy=remedy)


def check_command(sources: Sequence[Source], config: DataConfig, vision_dim: int) -> str:
    """The command that lists all problems of these clips."""
    words = ["python -m prospect.check", *[str(source.file.path) for source in sources], f"--vision-dim {vision_dim}"]
    words += [f"--embeddings {config.embeddings}"] if config.embeddings else []
    words += ["--embeddings-outside"] if config.embeddings_outside else []
    return " ".join(words)


# ---- main ----------------------------------------------------------------------------------------


def width_problem(widths: Counter[int]) -> Problem | None:
    """Embeddings of several widths in one data set, where none was asked for."""
    if len(widths) < 2:
        return None
    counts = ", ".join(f"{count} files of {width}" for width, count in widths.most_common())
    what = f"embeddings are not all of one width: {counts}"
    return Problem("wrong width", "", "", what, "name the right one with --vision-dim to see the others")


def table(errors: Counter[str], warnings: Counter[str]) -> str:
    lines = [f"{'kind of problem':28}{'errors':>8}{'warnings':>10}"]
    for kind in sorted(errors | warnings, key=lambda kind: (-errors[kind], -warnings[kind], kind)):
        lines.append(f"{kind:28}{errors[kind]:8}{warnings[kind]:10}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m prospect.check", description="Check clips and their embeddings.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="clip files (JSON or JSONL), folders of them, or patterns")
    add("--embeddings", metavar="DIR", help="folder of embedding files; default: embeddings/ beside each file")
    add("--embeddings-outside", action="store_true", help="allow clips to name files outside that folder")
    add("--vision-dim", type=int, metavar="N", help="width that embeddings must have; default: any, the same for all")
    add("--strict", action="store_true", help="warnings count as errors")
    add("--workers", type=int, default=cores(), metavar="N", help="processes; default: one per core")
    arguments = parser.parse_args()
    for name in ("vision_dim", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ProspectError(f"--{name.replace('_', '-')} must be at least 1, not {value}", where="command line")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    errors, warnings, widths = Counter(), Counter(), Counter()
    clips = frames = updates = 0
    usable: list[tuple[Source, int]] = []

    def show(problem: Problem) -> None:
        (errors if problem.fatal else warnings)[problem.kind] += 1
        tqdm.write(f"{'error' if problem.fatal else 'warning'}: {problem.error()}", file=sys.stdout)

    sources = []
    for path in clip_file_names(arguments.files):
        try:
            sources.append(open_source(path, arguments.embeddings, arguments.embeddings_outside))
        except ProspectError as error:
            show(as_problem("bad clip file", error))
    for number, index, checked in check_all(sources, arguments.vision_dim, arguments.workers, keep=False):
        clips, frames, updates = clips + 1, frames + checked.frames, updates + checked.updates
        widths.update([checked.width] if checked.width else [])
        usable += [] if checked.errors else [(sources[number], index)]
        for problem in checked.problems:
            show(problem)
    if arguments.vision_dim is None and (problem := width_problem(widths)):
        show(problem)
    features = by_dataset(usable)
    for name, found in features.items():
        first, those = next(iter(features.items()))
        if what := difference(found, those):
            what = f"the embeddings are not like those of {first}: {what}"
            show(Problem("other features", name, "", what, "encode all of them in one way", fatal=False))

    if errors or warnings:
        print(table(errors, warnings))
    for name, found in features.items():
        print(f"{name}: {found}")
    total = f"{clips} clips, {frames} frames: {errors.total()} errors, {warnings.total()} warnings"
    print(f"{total}; embeddings {', '.join(map(str, sorted(widths)))} wide" if widths else total)
    if errors or (arguments.strict and warnings):
        return 2
    print_next(train_command(arguments, widths.most_common(1)[0][0], updates))
    return 0


def train_command(arguments: argparse.Namespace, width: int, updates: int) -> str:
    """How to train on the checked files; of several, the last is for validation."""
    *train, val = arguments.files if len(arguments.files) > 1 else [*arguments.files, "VAL.json"]
    name = Path(clip_file_names(train)[0]).stem
    words = ["python", "train.py", "config.yaml", f"run.name={name}", "data.sample=null"]
    words += [f"data.train={train[0] if len(train) == 1 else '[' + ', '.join(train) + ']'}", f"data.val={val}"]
    words += [f"data.embeddings={arguments.embeddings}"] if arguments.embeddings else []
    words += ["data.embeddings_outside=true"] if arguments.embeddings_outside else []
    words += [f"model.vision_dim={width}"] + ([] if updates else ["data.dst=false"])
    return shlex.join(words)


if __name__ == "__main__":
    # Under its own name, by which the processes that check clips know it.
    run_entry_point(importlib.import_module("prospect.check").main)
