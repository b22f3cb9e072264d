"""A streamed clip on a time line (drawn by timeline.js): what was said beside what should have been said.

What became of each text is decided by prospect/mistakes.py, the same code that counts in an evaluation, so the picture
and the numbers cannot disagree. Rows are frames counted from the clip's first, as in the metrics.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from prospect.calibration import Calibration
from prospect.clips import Clip
from prospect.dst import STATES, State, write_update
from prospect.errors import ProspectError
from prospect.files import read_lines
from prospect.mistakes import MARKS, Outcome, review_clip
from prospect.report import svg
from prospect.report.page import LOSS_NAMES, differing, number, write_figures, write_page
from prospect.score import TABLE, ClipScore, cell_text, of_nothing, summarise
from prospect.text_metrics import load_similarity

MAX_PICTURES = 96  # in one time line, evenly spaced
PICTURE_HEIGHT = 72  # pixels
LEFT = 66  # of a time line's tracks
STATE_FILLS = ("none", "#e0a83a", "#1d6b4d")
NICE_SECONDS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
Across = Callable[[float], float]  # where a row is along the width


@dataclass
class Event:
    """One mark in a lane of the time line.

    lane    user | wanted (what the assistant should have said) | said | update_wanted | update | context
    status  what became of it, one of prospect.mistakes.VERDICTS; "" where there is no reference to compare with
    note    what else there is to know: how late, why refused, tokens before and after
    """

    row: int
    lane: str
    text: str
    status: str = ""
    note: str = ""


@dataclass
class HeadLane:
    """A head over time, one value a frame: its probability, and the score that decides (prospect/decisions.py)."""

    probability: list[float | None]
    score: list[float | None]  # None: nothing was left to update
    fired: list[int]  # rows
    even_odds: float | None  # the probability that counts as one half; None: not known


@dataclass
class StepLane:
    """A step's state over time, as runs of (first row, last row, index into STATES)."""

    id: str
    name: str
    predicted: list[tuple[int, int, int]]
    reference: list[tuple[int, int, int]] | None


@dataclass
class Timeline:
    """A streamed clip. F frames; tokens has one entry a frame."""

    id: str
    goal: str
    fps: float
    first: int  # absolute number of row 0
    seconds: float  # time of row 0 in the video
    has_reference: bool
    evidence: tuple[float, float]  # the score at which heads fire: lowest and highest it can be, equal where known
    speaking: HeadLane
    update: HeadLane | None  # None: a model without task state
    tokens: list[int]
    events: list[Event]
    step_state: StepLane | None  # as the state head reads it; None: a model without that head
    steps: list[StepLane]
    metrics: list[tuple[str, str]]
    calibration: dict[str, Calibration]  # by head; without a reference there is none
    share_right: float | None  # of the texts due and written; None: nothing to judge
    made: dict[str, Any]  # by what settings the records were made, as far as it is known
    made_by: str  # their checkpoint; "" if not known
    pictures: list[tuple[int, str]] = field(default_factory=list)  # (row, data URI)
    beside: list["Timeline"] = field(default_factory=list)  # the same frames, streamed by other checkpoints


def read_records(path: str | Path) -> dict[str, list[dict]]:
    """Records by clip id, in the order of the file. Raises ProspectError, naming the line, where there is no record."""
    clips: dict[str, list[dict]] = {}
    try:
        lines = read_lines(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read: {error}"
        raise ProspectError(what, where=str(path), remedy="python infer.py --out makes it") from error
    needed = ("clip_id", "frame_idx", "time", "speaking_prob", "dst_update_prob", "speaking_score", "dst_update_score")
    needed += ("dst_state", "step_state")
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
            what = f"the frames of clip {id} do not follow one another"
            remedy = "a file holds each clip once, from its first frame on"
            raise ProspectError(what, where=str(path), remedy=remedy)
    return clips


def timeline(
    records: list[dict],
    clip: Clip | None,
    made: dict[str, Any] | None = None,
    *,
    pictures: str | None = None,
    header_only: bool = False,
) -> Timeline:
    """What the time line of one streamed clip shows.

    records: one a frame (FrameRecord.to_dict). clip: its reference; None shows the prediction alone. made: the settings
    of the records (records.made_by); without infer.evidence, the page shows between which scores it must lie. pictures:
    where the frames are to be seen, anything prospect.vision.frames.frames_at reads.
    header_only: the clip gives goal and steps, and its conversation is no reference (a video streamed live).
    Raises ProspectError when the records are not of this clip.
    """
    first, F = records[0]["frame_idx"], len(records)
    fps = clip.fps if clip else frame_rate(records)
    tracks_state = records[0]["dst_update_prob"] is not None
    made, reference, review = made or {}, None, None
    if clip is not None and not header_only:
        reference = as_far_as_streamed(clip, records)
        review = review_clip(reference, records, load_similarity("lexical"), dst=tracks_state)
    evidence, score = made.get("infer.evidence"), review and review.score
    events = timeline_events(records, reference, review.outcomes if review else {})
    rows = [event.row for event in events]
    return Timeline(
        id=records[0]["clip_id"],
        goal=clip.goal if clip else "",
        fps=fps,
        first=first,
        seconds=records[0]["time"],
        has_reference=reference is not None,
        evidence=evidence_bounds(records) if evidence is None else (evidence, evidence),
        speaking=head_lane(records, "speaking", made.get("infer.speaking_threshold")),
        update=head_lane(records, "dst_update", made.get("infer.dst_threshold")) if tracks_state else None,
        tokens=[record["context_tokens"] for record in records],
        events=events,
        step_state=step_state_lane(records, reference) if records[0]["step_state"] is not None else None,
        steps=step_lanes(records, clip, reference) if tracks_state else [],
        metrics=shown_metrics(score) if score else [],
        calibration=score.calibration if score else {},
        share_right=number(review.share_right()) if review else None,
        made=made,
        made_by=f"{made['checkpoint']}, step {made.get('step')}" if "checkpoint" in made else "",
        pictures=thumbnails(pictures, fps, first, F, rows) if pictures else [],
    )


def frame_rate(records: list[dict]) -> float:
    """Frames per second, from the clock of the records; a single frame is shown for one second."""
    elapsed = records[-1]["time"] - records[0]["time"]
    return (len(records) - 1) / elapsed if elapsed > 0 else 1.0


def as_far_as_streamed(clip: Clip, records: list[dict]) -> Clip:
    """The reference of a stream that was stopped early: the turns up to its last frame."""
    first, last = records[0]["frame_idx"], records[-1]["frame_idx"]
    if first != clip.start_frame or last > clip.end_frame:
        what = f"the records are of frames {first}..{last}, the clip has {clip.start_frame}..{clip.end_frame}"
        raise ProspectError(what, where=clip.where, remedy="give the clip that was streamed")
    if last >= clip.end_frame - 1:  # end-exclusive files lack the last frame; its turns move up
        turns = [replace(t, start_frame=min(t.start_frame, last), end_frame=min(t.end_frame, last)) for t in clip.turns]
    else:
        turns = [turn for turn in clip.turns if turn.end_frame <= last]
    return replace(clip, end_frame=last, turns=tuple(turns))


def head_lane(records: list[dict], head: str, even_odds: float | None) -> HeadLane:
    return HeadLane(
        probability=[number(record[f"{head}_prob"]) for record in records],
        score=[number(record[f"{head}_score"]) for record in records],
        fired=[row for row, record in enumerate(records) if record[f"{head}_decision"]],
        even_odds=even_odds,
    )


def evidence_bounds(records: list[dict]) -> tuple[float, float]:
    """Between which scores `infer.evidence` lies: above every silent one, up to the lowest that fired by itself.

    Where both heads fire, one may have been drawn along by the other, so the higher score alone counts.

    speaking    0.1   0.4   0.7*  0.2*       (* fired)
    update      0.3   0.2   0.5   0.9*                      evidence is in (0.5, 0.7]
    """
    silent, fired = [0.0], [1.0]
    for record in records:
        heads = [(record[f"{head}_score"], record[f"{head}_decision"]) for head in ("speaking", "dst_update")]
        silent += [score for score, fires in heads if not fires and score is not None]
        together = [score for score, fires in heads if fires]
        fired += [max(together)] if together else []
    return max(silent), min(fired)


def timeline_events(records: list[dict], clip: Clip | None, reviewed: dict[str, list[Outcome]]) -> list[Event]:
    """Every mark of the time line, in order of time."""
    events = []
    for row, record in enumerate(records):
        if context := record.get("context_event"):
            note = f"{context['strategy']}: {context['tokens_before']} to {context['tokens_after']} tokens"
            events.append(Event(row, "context", context["summary"] or "", note=note))
        events += [Event(row, "user", text) for text in record.get("user", [])]
    events += reply_events(records, clip, reviewed.get("replies", []))
    events += update_events(records, clip, reviewed.get("updates", []))
    order = ("context", "user", "update_wanted", "update", "wanted", "said")
    return sorted(events, key=lambda event: (event.row, order.index(event.lane)))


def reply_events(records: list[dict], clip: Clip | None, reviewed: list[Outcome]) -> list[Event]:
    """What the assistant said and what it should have said, each with what became of it."""
    said = {row: Event(row, "said", r["text"]) for row, r in enumerate(records) if r["text"] is not None}
    wanted = {} if clip is None else {frame - clip.start_frame: text for frame, text in clip.replies().items()}
    judged(said, reviewed, clip)
    for event in said.values():
        if cut := records[event.row].get("text_cut"):
            event.note = "; ".join(filter(None, (event.note, f"cut off: {cut}")))
    due = [Event(one.due[1], "wanted", wanted[one.due[1]], one.verdict) for one in reviewed if one.due is not None]
    return due + list(said.values())


def update_events(records: list[dict], clip: Clip | None, reviewed: list[Outcome]) -> list[Event]:
    """Task-state updates as written and as they should be, each with what became of it."""
    written = {
        row: Event(row, "update", r["dst_update"]) for row, r in enumerate(records) if r["dst_update"] is not None
    }
    judged(written, reviewed, clip)
    for event in written.values():
        if why := records[event.row].get("invalid_update"):
            event.status, event.note = "illegal", f"not applied: {why}"
    wanted: dict[int, list] = {}  # transitions, by the last row in which they are due
    for turn in clip.updates() if clip else []:
        wanted.setdefault(turn.end_frame - clip.start_frame, []).extend(turn.transitions)
    due = [
        Event(one.due[1], "update_wanted", write_update(wanted[one.due[1]], "arrow"), one.verdict)
        for one in reviewed
        if one.due is not None
    ]
    return due + list(written.values())


def judged(events: dict[int, Event], reviewed: list[Outcome], clip: Clip | None) -> None:
    """Note with the events, by row, what became of them and how late they are."""
    for one in reviewed:
        if one.written is not None:
            seconds = one.seconds(clip.fps)
            events[one.written].status = one.verdict
            events[one.written].note = "" if seconds is None else lateness(seconds)


def lateness(seconds: float) -> str:
    return "on time" if seconds == 0 else f"{abs(seconds):g} s {'late' if seconds > 0 else 'early'}"


def step_lanes(records: list[dict], clip: Clip | None, reference: Clip | None) -> list[StepLane]:
    """Each step's state after every frame, predicted, and where there is a reference as it should be."""
    predicted: list[State] = [record["dst_state"] for record in records]
    due = None if reference is None else reference.states_after()
    names = {step.id: step.name for step in clip.steps} if clip else dict.fromkeys(predicted[0], "")
    lanes = []
    for id, name in names.items():
        mine, wanted = ([s.get(id, "not_started") for s in states] for states in (predicted, due or []))
        lanes.append(StepLane(id, name, state_runs(mine), None if due is None else state_runs(wanted)))
    return lanes


def step_state_lane(records: list[dict], reference: Clip | None) -> StepLane:
    """The state of the most recently started step, as the state head reads it and as it should be."""
    read = state_runs([record["step_state"] for record in records])
    due = None if reference is None else state_runs([STATES[i] for i in reference.latest_step_state()])
    return StepLane("", "Step state (head)", read, due)


def state_runs(states: Sequence[str]) -> list[tuple[int, int, int]]:
    """A step's states over time as (first row, last row, index into STATES)."""
    found: list[tuple[int, int, int]] = []
    for row, state in enumerate(states):
        now = STATES.index(state)
        if found and found[-1][2] == now:
            found[-1] = (found[-1][0], row, now)
        else:
            found.append((row, row, now))
    return found


def shown_metrics(score: ClipScore) -> list[tuple[str, str]]:
    """The evaluation's table for this one clip; text quality needs many clips and is left out."""
    numbers, nothing = summarise([score]), of_nothing([score])
    left_out = ("clips", "frames", "BLEU-4")
    shown = [(title, key) for key, title in TABLE if key in numbers and key not in left_out]
    return [(title, "–" if key in nothing else cell_text(numbers[key])) for title, key in shown]


def thumbnails(source: str, fps: float, first: int, F: int, events: Sequence[int] = ()) -> list[tuple[int, str]]:
    """Small JPEGs of at most MAX_PICTURES frames, evenly spaced, and of as many of these events: (row, data URI)."""
    from prospect.vision.frames import frames_at

    try:
        from PIL import Image
    except ImportError as error:
        remedy = "pip install -r requirements-vision.txt"
        raise ProspectError("pictures need the package Pillow, which is not installed", remedy=remedy) from error
    every, rate = math.ceil(F / MAX_PICTURES), Fraction(fps).limit_denominator(1001)
    rows = sorted(set(events))
    wanted = {*range(0, F, every), *rows[:: math.ceil(len(rows) / MAX_PICTURES) or 1]}
    found = []
    for frame, picture in frames_at(Path(source), rate, first=first):  # uint8 [3, H, W]
        row = frame - first
        if row >= F:
            break
        if row in wanted:
            image, content = Image.fromarray(picture.permute(1, 2, 0).numpy()), io.BytesIO()
            width = max(1, image.width * PICTURE_HEIGHT // image.height)
            image.resize((width, PICTURE_HEIGHT)).save(content, "JPEG", quality=70)
            found.append((row, "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")))
    if not found:
        what = f"has no picture of frames {first}..{first + F - 1}"
        raise ProspectError(what, where=source, remedy="give this clip's own video")
    return found


# ---- as a figure ---------------------------------------------------------------------------------


def timeline_svg(shown: Timeline) -> str:
    """The lanes of a streamed clip, and below them those of the checkpoints beside it."""
    rows, right = len(shown.tokens), svg.WIDTH - 4.0

    def x(row: float) -> float:
        return LEFT + (row + 0.5) / rows * (right - LEFT)

    parts, y = [svg.text(2, 9, shown.goal or shown.id)], 14.0
    for take in (shown, *shown.beside):
        if shown.beside:
            parts.append(svg.text(2, y + 7, take.made_by, colour=svg.SOFT))
            y += 10
        replies = [event.row for event in take.events if event.lane == "wanted"]
        parts += draw_head(take.speaking, "Speak now?", replies, take.evidence, svg.COLOURS[0], x, y)
        parts += draw_marks(take, "wanted", "due", x, y + 34) + draw_marks(take, "said", "said", x, y + 42)
        y += 52
        if take.update is not None:
            updates = [event.row for event in take.events if event.lane == "update_wanted"]
            parts += draw_head(take.update, "Update now?", updates, take.evidence, svg.COLOURS[2], x, y)
            parts += draw_marks(take, "update_wanted", "due", x, y + 34) + draw_marks(
                take, "update", "written", x, y + 42
            )
            y += 52
        for step in take.steps:
            parts += draw_states(step, x, y)
            y += 9
        y += 4
    seconds = rows / shown.fps
    step = next((s for s in NICE_SECONDS if seconds / s <= 5), NICE_SECONDS[-1])
    first = math.ceil(shown.seconds / step)
    for k in range(first, math.floor((shown.seconds + seconds) / step) + 1):
        at = x((k * step - shown.seconds) * shown.fps)
        if at <= right:
            parts += [
                svg.line(at, y - 2, at, y + 1, svg.SOFT),
                svg.text(min(at, right - 8), y + 8, svg.clock(k * step), "middle", svg.SOFT),
            ]
    used = {event.status for take in (shown, *shown.beside) for event in take.events if event.status}
    meaning = [f"{mark} {name.replace('_', ' ')}" for name, mark in MARKS.items() if name in used]
    parts.append(svg.text(2, y + 19, ", ".join(meaning), colour=svg.SOFT, size=6))
    return svg.figure(y + 24, *parts)


def draw_head(
    lane: HeadLane, name: str, due: list[int], evidence: tuple[float, float], colour: str, x: Across, y: float
) -> list[str]:
    """A head's score, the evidence it has to reach, where it fired (dots) and where the reference acts (ticks)."""

    def at(value: float) -> float:
        return y + 28 - 24 * value

    points = [None if value is None else (x(row), at(value)) for row, value in enumerate(lane.score)]
    parts = [svg.text(2, y + 18, name), svg.line(x(-0.5), at(0), x(len(points) - 0.5), at(0))]
    parts += [
        svg.line(x(-0.5), at(value), x(len(points) - 0.5), at(value), svg.SOFT, "2 1.5")
        for value in sorted({*evidence})
    ]
    parts += [svg.line(x(row), at(0), x(row), at(0) + 3, svg.INK) for row in due]
    fired = [svg.dot(x(row), at(lane.score[row]), colour) for row in lane.fired if lane.score[row] is not None]
    return [*parts, svg.path(svg.thinned(points), colour), *fired]


def draw_marks(take: Timeline, lane: str, name: str, x: Across, y: float) -> list[str]:
    """What became of each text of a lane, as a mark; a bar where nothing is judged."""
    events = [event for event in take.events if event.lane == lane]
    return [svg.text(8, y + 6, name, colour=svg.SOFT)] * bool(events) + [
        svg.text(x(event.row), y + 6, MARKS.get(event.status, "|"), "middle") for event in events
    ]


def draw_states(step: StepLane, x: Across, y: float) -> list[str]:
    """A step's state: predicted above, as it should be below. Darker is further."""
    parts = [svg.text(2, y + 5.5, f"{step.id} {step.name}"[:19], size=6)]
    for runs, top in ((step.predicted, y), (step.reference or [], y + 3.5)):
        for first, last, state in runs:
            place = f'x="{x(first - 0.5):.1f}" y="{top:.1f}" width="{x(last + 0.5) - x(first - 0.5):.1f}" height="3"'
            parts.append(f'<rect {place} fill="{STATE_FILLS[state]}"/>' if state else "")
    return [*filter(None, parts), svg.line(x(-0.5), y + 8, x(step.predicted[-1][1] + 0.5), y + 8)]


# ---- the page ------------------------------------------------------------------------------------


def reliability(clips: list[dict[str, Calibration]]) -> list[dict[str, Any]]:
    """What the page draws of each head over all clips: its calibration error, and the points of its curve."""
    heads = {head: sum((of[head] for of in clips if head in of), Calibration()) for of in clips for head in of}
    return [
        {"head": head, "error": number(total.error), "curve": [tuple(map(number, point)) for point in total.curve()]}
        for head, total in heads.items()
    ]


def reliability_figures(curves: list[dict[str, Any]]) -> dict[str, str]:
    found = {}
    for one in curves:
        name = LOSS_NAMES["speaking_binary" if one["head"] == "speaking" else "dst_binary"]
        points = svg.Line("", [(p, share) for p, share, _ in one["curve"]], dots=True)
        title = f"{name} calibration error {one['error']:.4f}"
        found[f"reliability-{one['head']}"] = svg.plot(title, [points], "probability", 1.0, (0.0, 1.0))
    return found


def write_timelines(path: str | Path, timelines: list[Timeline], figures: Path | None = None) -> None:
    """One page; of several clips it shows one at a time, those with the smallest share of right texts first.

    figures: a folder for its figures.
    """
    timelines = sorted(timelines, key=lambda one: (one.share_right is None, one.share_right))
    title = timelines[0].goal or timelines[0].id if len(timelines) == 1 else f"{len(timelines)} streamed clips"
    data = {"states": STATES, "lossNames": LOSS_NAMES, "clips": [asdict(shown) for shown in timelines]}
    data["differing"] = differing([one.made for one in (timelines[0], *timelines[0].beside)])
    for clip, shown in zip(data["clips"], timelines):
        clip["svg"] = timeline_svg(shown)
        for one in (clip, *clip["beside"]):
            del one["made"]
    data["reliability"] = reliability([shown.calibration for shown in timelines])
    data |= {"marks": MARKS, "figures": reliability_figures(data["reliability"])}
    write_page(path, "timeline", title, data)
    if figures is not None:
        write_figures(figures, {clip["id"]: clip["svg"] for clip in data["clips"]} | data["figures"])
