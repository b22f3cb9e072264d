"""Pages to look at: a streamed clip on a time line, a clip as it is trained on, the curves of training runs.

    python -m prospect.report RECORDS.jsonl [--clip FILE[:ID or INDEX]] [--pictures SOURCE] [--out PAGE.html]
    python -m prospect.report RUN_DIR [RUN_DIR ...] [--out PAGE.html]

A page is one HTML file that needs nothing else: no network, no service. this folder holds its parts. Python gathers
what is to be shown into the dataclasses below, `write_page` puts them into the page as JSON, and the page draws them.

    Timeline    a clip's records (infer.py --out) beside its reference (--clip)   timeline.js
    Setting     a clip's training sequences, token by token (prospect.show)       tokens.js
    Run         a run's metrics.jsonl                                             curves.js

Which reply counts as matched is decided by prospect/metrics.py, the same code that scores an evaluation, so the picture
and the numbers cannot disagree. Rows are frames counted from the clip's first, as in the metrics.
"""

import argparse
import base64
import html
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from prospect.clip_files import ClipFile, parse_clip_name
from prospect.clips import Clip
from prospect.dst import STATES, State, write_update
from prospect.errors import ProspectError
from prospect.files import read_lines, write_whole
from prospect.metrics import pair_updates, window_of
from prospect.model import IGNORE
from prospect.score import TABLE, ClipScore, read_update, score_clip, summarise
from prospect.sequence import LABEL_KEYS, Sample
from prospect.text_metrics import load_similarity
from prospect.tokenizer import Tokenizer

PAGES = Path(__file__).parent
MAX_PICTURES = 96  # in one time line, evenly spaced
PICTURE_HEIGHT = 72  # pixels
MAX_POINTS = 2000  # of a run's curves; longer runs are averaged over equal stretches of their lines


# ---- the page ------------------------------------------------------------------------------------


def write_page(path: str | Path, kind: str, title: str, data: Any) -> None:
    """Write the page `kind` (a script in prospect/report/) with its data to `path`, whole or not at all.

    The data is escaped so that no text in it can end the script element it stands in; the page shows text as text.
    Raises ProspectError when the file cannot be written.
    """
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "style": part("page.css"), "data": embedded}
    parts["script"] = part("common.js") + part(f"{kind}.js")
    skeleton = part("page.html").split("{{")
    page = skeleton[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in skeleton[1:]))
    with write_whole(Path(path)) as file:
        file.write(
            page.encode("utf-8", "replace")
        )  # half of a surrogate pair can stand in a JSON string, and in no file


def part(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")


def number(value: Any, digits: int = 6) -> float | int | None:
    """A number for the page, to so many significant digits; None where it is missing or not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


# ---- a streamed clip -----------------------------------------------------------------------------


@dataclass
class Event:
    """One mark in a lane of the time line.

    lane    user | wanted (what the assistant should have said) | said | update_wanted | update | context
    status  matched, or how it failed: mismatched (other words), missed, redundant, refused (an illegal update);
            "" where there is no reference to compare with
    note    what else there is to know: how late, why refused, tokens before and after
    """

    row: int
    lane: str
    text: str
    status: str = ""
    note: str = ""


@dataclass
class StepLane:
    """One step's state over time, as runs of (first row, last row, index into STATES)."""

    id: str
    name: str
    predicted: list[tuple[int, int, int]]
    reference: list[tuple[int, int, int]] | None


@dataclass
class Timeline:
    """A streamed clip. F frames; probabilities and tokens have one entry a frame."""

    id: str
    goal: str
    fps: float
    first: int  # absolute number of row 0
    seconds: float  # time of row 0 in the video
    has_reference: bool
    speaking: list[float | None]
    update: list[float | None] | None  # None: a model without task state
    spoke: list[int]  # rows at which the head fired
    updated: list[int]
    tokens: list[int]
    thresholds: dict[str, tuple[float, float]]  # by head, lowest and highest value it can have; equal where it is known
    events: list[Event]
    steps: list[StepLane]
    metrics: list[tuple[str, str]]
    pictures: list[tuple[int, str]] = field(default_factory=list)  # (row, data URI)


def read_records(path: str | Path) -> dict[str, list[dict]]:
    """Records by clip id, in the order of the file. Raises ProspectError, naming the line, where there is no record."""
    clips: dict[str, list[dict]] = {}
    try:
        lines = read_lines(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ProspectError(
            f"cannot be read: {error}", where=str(path), remedy="python infer.py --out makes it"
        ) from error
    needed = ("clip_id", "frame_idx", "time", "speaking_prob", "dst_update_prob", "dst_state")
    for at, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            missing = [key for key in needed if key not in record]
        except (ValueError, TypeError, RecursionError):
            missing = ["JSON"]
        if missing:
            what = f"is not a record of a streamed frame (no {missing[0]})"
            raise ProspectError(what, where=f"{path}, line {at}", remedy="python infer.py --out makes records")
        clips.setdefault(record["clip_id"], []).append(record)
    if not clips:
        raise ProspectError("holds no record", where=str(path), remedy="python infer.py --out makes records")
    for id, records in clips.items():
        frames = [record["frame_idx"] for record in records]
        if frames != list(range(frames[0], frames[0] + len(frames))):
            remedy = "a file holds each clip once, from its first frame on"
            raise ProspectError(f"the frames of clip {id} do not follow one another", where=str(path), remedy=remedy)
    return clips


def timeline(
    records: list[dict],
    clip: Clip | None,
    thresholds: dict[str, float] | None = None,
    *,
    pictures: str | None = None,
    header_only: bool = False,
) -> Timeline:
    """What the time line of one streamed clip shows.

    records: one a frame (FrameRecord.to_dict). clip: its reference; None shows the prediction alone. thresholds: by
    head ("speaking", "dst"); without them, the page shows between which probabilities they must lie. pictures: where
    the frames are to be seen, anything prospect.vision.frames.frames_at reads.
    header_only: the clip gives goal and steps, and its conversation is no reference (a video streamed live).
    Raises ProspectError when the records are not of this clip.
    """
    first, F = records[0]["frame_idx"], len(records)
    fps = clip.fps if clip else frame_rate(records)
    tracks_state = records[0]["dst_update_prob"] is not None
    reference, score = None, None
    if clip is not None and not header_only:
        reference = as_far_as_streamed(clip, records)
        score = score_clip(reference, records, load_similarity("lexical"), dst=tracks_state)
    heads = {"speaking": "speaking", "dst": "dst_update"} if tracks_state else {"speaking": "speaking"}
    if thresholds is None:
        bounds = {head: threshold_bounds(records, name) for head, name in heads.items()}
    else:
        bounds = {head: (thresholds[head], thresholds[head]) for head in heads}
    return Timeline(
        id=records[0]["clip_id"],
        goal=clip.goal if clip else "",
        fps=fps,
        first=first,
        seconds=records[0]["time"],
        has_reference=reference is not None,
        speaking=[number(record["speaking_prob"]) for record in records],
        update=[number(record["dst_update_prob"]) for record in records] if tracks_state else None,
        spoke=[row for row, record in enumerate(records) if record["speaking_decision"]],
        updated=[row for row, record in enumerate(records) if record["dst_update_decision"]],
        tokens=[record["context_tokens"] for record in records],
        thresholds=bounds,
        events=timeline_events(records, reference, score),
        steps=step_lanes(records, clip, reference) if tracks_state else [],
        metrics=shown_metrics(score) if score else [],
        pictures=thumbnails(pictures, fps, first, F) if pictures else [],
    )


def frame_rate(records: list[dict]) -> float:
    """Frames a second, from the records' own clock; a single frame does not tell, and is shown for a second."""
    elapsed = records[-1]["time"] - records[0]["time"]
    return (len(records) - 1) / elapsed if elapsed > 0 else 1.0


def as_far_as_streamed(clip: Clip, records: list[dict]) -> Clip:
    """The reference of a stream that was stopped early: the turns up to its last frame."""
    first, last = records[0]["frame_idx"], records[-1]["frame_idx"]
    if first != clip.start_frame or last > clip.end_frame:
        what = f"the records are of frames {first}..{last}, the clip has {clip.start_frame}..{clip.end_frame}"
        raise ProspectError(what, where=clip.where, remedy="give the clip that was streamed")
    if last >= clip.end_frame - 1:  # a file written end-exclusive lacks its last frame; what stands there moves up
        turns = [replace(t, start_frame=min(t.start_frame, last), end_frame=min(t.end_frame, last)) for t in clip.turns]
    else:
        turns = [turn for turn in clip.turns if turn.end_frame <= last]
    return replace(clip, end_frame=last, turns=tuple(turns))


def threshold_bounds(records: list[dict], head: str) -> tuple[float, float]:
    """Between which probabilities a head's threshold lies: above every silent one below the lowest that fired.

    probabilities   0.1   0.4   0.7*  0.9*       (* fired)      the threshold is in (0.4, 0.7]
    """
    fired = [record[f"{head}_prob"] for record in records if record[f"{head}_decision"]]
    highest = min(fired, default=1.0)
    silent = [record[f"{head}_prob"] for record in records if not record[f"{head}_decision"]]
    return max((p for p in silent if p < highest), default=0.0), highest


def timeline_events(records: list[dict], clip: Clip | None, score: ClipScore | None) -> list[Event]:
    """Every mark of the time line, in order of time."""
    events = []
    for row, record in enumerate(records):
        if context := record.get("context_event"):
            note = f"{context['strategy']}: {context['tokens_before']} to {context['tokens_after']} tokens"
            events.append(Event(row, "context", context["summary"] or "", note=note))
        events += [Event(row, "user", text) for text in record.get("user", [])]
    events += dialogue_events(records, clip, score) + update_events(records, clip)
    order = ("context", "user", "update_wanted", "update", "wanted", "said")
    return sorted(events, key=lambda event: (event.row, order.index(event.lane)))


def dialogue_events(records: list[dict], clip: Clip | None, score: ClipScore | None) -> list[Event]:
    """What the assistant said and what it should have said, paired as in prospect.metrics.match_dialogue."""
    said = [Event(row, "said", r["text"]) for row, r in enumerate(records) if r["text"] is not None]
    for event in said:
        if cut := records[event.row].get("text_cut"):
            event.note = f"cut off: {cut}"
    if clip is None or score is None:
        return said
    wanted = [Event(frame - clip.start_frame, "wanted", text, "missed") for frame, text in clip.replies().items()]
    for event in said:
        event.status = "redundant"
    correct = set(score.dialogue["correct_pairs"])
    for p, r in score.dialogue["pairs"]:
        said[p].status = wanted[r].status = "matched" if (p, r) in correct else "mismatched"
        said[p].note = "; ".join(filter(None, (lateness(said[p].row - wanted[r].row, clip.fps), said[p].note)))
    return wanted + said


def lateness(rows: int, fps: float) -> str:
    return "on time" if rows == 0 else f"{abs(rows) / fps:g} s {'late' if rows > 0 else 'early'}"


def update_events(records: list[dict], clip: Clip | None) -> list[Event]:
    """Task-state updates as written and as they should be, paired transition by transition as in the metrics.

    An update is matched when all of its transitions are.
    """
    predicted, moves = [], []  # events; (row, transition) of those applied
    for row, record in enumerate(records):
        if record["dst_update"] is None:
            continue
        refused = record.get("invalid_update")
        status = "refused" if refused else "" if clip is None else "matched"
        note = f"not applied: {refused}" if refused else ""
        predicted.append(Event(row, "update", record["dst_update"], status, note))
        if not refused:
            moves += [(row, t) for t in read_update(record["dst_update"])]
    if clip is None:
        return predicted
    by_row: dict[int, list] = {}
    for turn in clip.updates():
        by_row.setdefault(turn.end_frame - clip.start_frame, []).extend(turn.transitions)
    wanted_moves = [(row, t) for row, transitions in by_row.items() for t in transitions]
    window = tuple(int(seconds * clip.fps) for seconds in window_of(clip.dataset))
    pairs = pair_updates(moves, wanted_moves, window, same_meaning=True)
    hit, found = {p for p, _ in pairs}, {r for _, r in pairs}
    unpaired = {move[0] for move in moves if move not in hit}
    late = {p[0]: lateness(p[0] - r[0], clip.fps) for p, r in pairs}
    for event in predicted:
        if event.status == "matched":
            event.status, event.note = "redundant" if event.row in unpaired else "matched", late.get(event.row, "")
    wanted = [
        Event(
            row,
            "update_wanted",
            write_update(transitions, "arrow"),
            "matched" if all((row, t) in found for t in transitions) else "missed",
        )
        for row, transitions in by_row.items()
    ]
    return wanted + predicted


def step_lanes(records: list[dict], clip: Clip | None, reference: Clip | None) -> list[StepLane]:
    """Each step's state after every frame, predicted, and where there is a reference as it should be."""
    predicted: list[State] = [record["dst_state"] for record in records]
    due = None if reference is None else reference.states_after()
    names = {step.id: step.name for step in clip.steps} if clip else dict.fromkeys(predicted[0], "")
    return [
        StepLane(id, name, state_runs(predicted, id), None if due is None else state_runs(due, id))
        for id, name in names.items()
    ]


def state_runs(states: Sequence[State], id: str) -> list[tuple[int, int, int]]:
    """A step's states over time as (first row, last row, index into STATES)."""
    found: list[tuple[int, int, int]] = []
    for row, state in enumerate(states):
        now = STATES.index(state.get(id, "not_started"))
        if found and found[-1][2] == now:
            found[-1] = (found[-1][0], row, now)
        else:
            found.append((row, row, now))
    return found


def shown_metrics(score: ClipScore) -> list[tuple[str, str]]:
    """The evaluation's table for this one clip; text quality needs many clips and is left out."""
    numbers = summarise([score])
    shown = [
        (title, numbers[key]) for key, title in TABLE if key in numbers and key not in ("clips", "frames", "BLEU-4")
    ]
    return [(title, str(value) if isinstance(value, int) else f"{value:.3f}") for title, value in shown]


def thumbnails(source: str, fps: float, first: int, F: int) -> list[tuple[int, str]]:
    """Small JPEGs of at most MAX_PICTURES frames, evenly spaced: (row, data URI)."""
    from prospect.vision.frames import frames_at

    try:
        from PIL import Image
    except ImportError as error:
        remedy = "pip install -r requirements-vision.txt"
        raise ProspectError("pictures need the package Pillow, which is not installed", remedy=remedy) from error
    every = math.ceil(F / MAX_PICTURES)
    found = []
    for frame, picture in frames_at(
        Path(source), Fraction(fps).limit_denominator(1001), first=first
    ):  # uint8 [3, H, W]
        row = frame - first
        if row >= F:
            break
        if row % every == 0:
            image, content = Image.fromarray(picture.permute(1, 2, 0).numpy()), io.BytesIO()
            image.resize((max(1, image.width * PICTURE_HEIGHT // image.height), PICTURE_HEIGHT)).save(
                content, "JPEG", quality=70
            )
            found.append((row, "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")))
    if not found:
        raise ProspectError(
            f"has no picture of frames {first}..{first + F - 1}", where=source, remedy="give this clip's own video"
        )
    return found


def write_timelines(path: str | Path, timelines: list[Timeline]) -> None:
    """One page; of several clips it shows one at a time."""
    title = timelines[0].goal or timelines[0].id if len(timelines) == 1 else f"{len(timelines)} streamed clips"
    write_page(path, "timeline", title, {"states": STATES, "clips": [asdict(shown) for shown in timelines]})


# ---- a clip as it is trained on ------------------------------------------------------------------


@dataclass
class TokenTable:
    """A training sequence of T tokens. Every list has T entries.

    starts: the character of the sequence's text at which each token starts. frames: the absolute number of the frame
    that an <image> belongs to, None elsewhere. labels: by LABEL_KEYS, None where nothing is learned.
    """

    clip_id: str
    ids: list[int]
    texts: list[str]
    starts: list[int]
    frames: list[int | None]
    labels: dict[str, list[int | None]]


@dataclass
class Setting:
    """All sequences of one clip under one configuration, and how many labels of each class they carry."""

    title: str
    sequences: list[TokenTable]
    counts: dict[str, int]


def token_table(sample: Sample, tokenizer: Tokenizer) -> TokenTable:
    """A training sample for the page. Of a frame's several <image> tokens the last is the one that is decided at."""
    ids, starts = tokenizer.encode_pieces(sample.formatted.pieces)  # as make_sample encodes it
    per_frame = len(sample.image_embeds) // max(1, len(sample.frames))
    frames: list[int | None] = [None] * len(ids)
    for position, frame in zip(sample.decision_positions.tolist(), sample.frames.tolist()):
        for earlier in range(per_frame):
            frames[position - earlier] = frame
    labels = {key: [None if v == IGNORE else v for v in sample.labels[key].tolist()] for key in LABEL_KEYS}
    texts = {id: tokenizer.decode([id]) for id in set(ids.tolist())}
    return TokenTable(sample.clip_id, ids.tolist(), [texts[id] for id in ids.tolist()], starts.tolist(), frames, labels)


def write_settings(path: str | Path, title: str, settings: list[Setting]) -> None:
    """One page; two settings stand side by side."""
    data = {"states": STATES, "labelKeys": LABEL_KEYS, "settings": [asdict(setting) for setting in settings]}
    write_page(path, "tokens", title, data)


# ---- a run's curves ------------------------------------------------------------------------------

# Which label counts a loss is divided by.
COUNTS_OF = {
    "speaking_gen": ("speaking_gen",), "speaking_binary": ("speaking_pos", "speaking_neg"), "dst_gen": ("dst_gen",),
    "dst_binary": ("dst_pos", "dst_neg"), "dst_state": ("dst_state",),
}  # fmt: skip
TRAINING_CURVES = ("loss", *COUNTS_OF, "lr", "grad_norm", "tokens_per_second", "padding")


@dataclass
class Run:
    """A run's metrics.jsonl. curves and counts have one entry for each of `steps`, evaluation for each `evaluated`."""

    name: str
    steps: list[float]
    curves: dict[str, list[float | None]]
    counts: dict[str, list[float | None]]  # by loss
    skipped: list[int]  # steps that were not taken, because loss or gradient were not finite
    evaluated: list[int]
    evaluation: dict[str, list[float | None]]
    best_step: int | None  # the evaluation with the lowest loss, as train.py chooses its best checkpoint


def read_run(directory: str | Path) -> Run:
    """A run's curves; an unfinished last line is left out. Raises ProspectError where there are none."""
    path = Path(directory) / "metrics.jsonl"
    try:
        written = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="give a run's directory") from error
    trained, evaluations, skipped = [], [], []
    for at, line in enumerate(written[:-1], start=1):  # what follows the last line break is still being written
        try:
            numbers = json.loads(line)
            step = int(numbers["step"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProspectError(
                "is not a line of metrics", where=f"{path}, line {at}", remedy="remove the line"
            ) from error
        if "evaluation" in numbers:
            evaluations.append((step, numbers["evaluation"]))
        elif "skipped" in numbers:
            skipped.append(step)
        else:
            trained.append(numbers)
    if not trained and not evaluations:
        raise ProspectError("holds no step", where=str(path), remedy="wait for the first step")
    stretches = list(equal_stretches(trained, MAX_POINTS))
    names = [name for name in TRAINING_CURVES if any(number(line.get(name)) not in (None, 0) for line in trained)]
    learned = [name for name in names if name in COUNTS_OF]
    measured = evaluation_names(evaluations)
    losses = [(step, numbers["loss"]) for step, numbers in evaluations if number(numbers.get("loss")) is not None]
    return Run(
        name=str(directory),
        steps=[mean(line["step"] for line in stretch) for stretch in stretches],
        curves={name: [mean(line.get(name) for line in stretch) for stretch in stretches] for name in names},
        counts={name: [mean(labels(line, name) for line in stretch) for stretch in stretches] for name in learned},
        skipped=skipped,
        evaluated=[step for step, _ in evaluations],
        evaluation={name: [number(numbers.get(name)) for _, numbers in evaluations] for name in measured},
        best_step=min(losses, key=lambda pair: (pair[1], pair[0]))[0] if losses else None,
    )


def labels(line: dict, loss: str) -> int:
    return sum(line.get("counts", {}).get(name, 0) for name in COUNTS_OF[loss])


def equal_stretches(lines: list[dict], most: int) -> Iterator[list[dict]]:
    """The lines in at most `most` groups of equal size, but for the last."""
    size = max(1, math.ceil(len(lines) / most))
    return (lines[begin : begin + size] for begin in range(0, len(lines), size))


def mean(values: Iterable[Any]) -> float | int | None:
    """Of those that are there and finite."""
    found = [value for value in map(number, values) if value is not None]
    return number(sum(found) / len(found)) if len(found) > 1 else found[0] if found else None


def evaluation_names(evaluations: list[tuple[int, dict]]) -> list[str]:
    """Every number that some evaluation has, the losses first, in the order in which they are logged."""
    names = list(dict.fromkeys(name for _, numbers in evaluations for name in numbers))
    used = [name for name in names if any(numbers.get(name) for _, numbers in evaluations)]  # no row of zeros
    return sorted(used, key=lambda name: (name != "loss", not name.startswith("loss")))


def write_runs(path: str | Path, runs: list[Run]) -> None:
    """One page; several runs are laid over each other."""
    write_page(
        path, "curves", "Training: " + ", ".join(run.name for run in runs), {"runs": [asdict(run) for run in runs]}
    )


# ---- main ----------------------------------------------------------------------------------------


def reference_clips(name: str, ids: Iterable[str]) -> dict[str, Clip]:
    """The clips of FILE with these ids, or of FILE:ID (or INDEX) that one."""
    path, which = parse_clip_name(name)
    file = ClipFile(path)
    if which is None:
        return {id: file.clip(file.find(id)) for id in ids}
    clip = file.clip(file.find(which))
    return {clip.id: clip}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prospect.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", nargs="+", metavar="RECORDS.jsonl|RUN_DIR", help="records of one file, or directories of runs"
    )
    parser.add_argument(
        "--clip", metavar="FILE[:ID|INDEX]", help="the reference of the records: what should have happened"
    )
    parser.add_argument(
        "--pictures", metavar="SOURCE", help="the clip's video, or a directory of pictures, to show frames"
    )
    parser.add_argument("--out", metavar="PAGE.html", help="default: RECORDS.html, or RUN_DIR/curves.html")
    arguments = parser.parse_args()
    source = Path(arguments.source[0])
    if source.is_dir():
        out = arguments.out or source / "curves.html"
        write_runs(out, [read_run(directory) for directory in arguments.source])
    else:
        if len(arguments.source) > 1:
            raise ProspectError(
                "records are shown one file at a time", where="command line", remedy="or give directories of runs"
            )
        records = read_records(source)
        clips: dict[str, Clip] = {}
        if arguments.clip:
            clips = reference_clips(arguments.clip, records)
            records = {id: records[id] for id in clips if id in records}
            if not records:
                raise ProspectError(
                    f"holds no record of clip {', '.join(clips)}", where=str(source), remedy="name another clip"
                )
        if arguments.pictures and len(records) > 1:
            raise ProspectError("--pictures are those of one clip", where="command line", remedy="--clip FILE:ID")
        out = arguments.out or source.with_suffix(".html")
        write_timelines(
            out, [timeline(of_clip, clips.get(id), pictures=arguments.pictures) for id, of_clip in records.items()]
        )
    print(f"{out}  ({os.path.getsize(out) / 1000:.0f} kB)")
    return 0
