"""A streamed clip against its reference: one clip's counts, the numbers of a set of clips, and their table.

`score_clip` compares the records of one clip with its conversation; `summarise` adds counts of clips and divides once
at the end; `table` writes what comes first. What each number means is defined in prospect/metrics.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prospect.calibration import Calibration, calibration, streamed_labels
from prospect.clips import Clip, Turn
from prospect.config import DataConfig
from prospect.dst import STATES, UpdateError, parse_update
from prospect.metrics import (
    EVENT_TOLERANCE,
    Counts,
    Event,
    TaskStateCounts,
    confusion,
    event_counts,
    macro_f1,
    match_dialogue,
    match_events,
    ratio,
    state_matrix,
    sum_dialogue,
    task_state_metrics,
    window_of,
)
from prospect.text_metrics import Similarity, text_metrics, weighted_by_jaccard
from prospect.timing_metrics import TimingCounts, timing_counts

HEADS = {"speaking": ("assistant", "speaking"), "dst": ("DST_UPDATE", "dst_update")}  # role; name in the records


@dataclass
class ClipScore:
    """One streamed clip against its reference. Counts only: scores of clips are added, then divided."""

    clip_id: str
    dataset: str
    frames: int
    dialogue: dict[str, Any]  # match_dialogue's counts and rates
    correct_pairs: list[tuple[str, str]]  # (what was said, what should have been), of correct pairs
    events: dict[str, Counts]  # of each head: every decision to write is one predicted event
    replies: Counts  # matched: in time, and naming the right step
    task_state: TaskStateCounts
    step_state: np.ndarray  # [3,3] confusion of the state head, zeros without one
    timing: TimingCounts
    calibration: dict[str, Calibration]  # of each head
    refreshes: int  # times the context was full


def score_clip(clip: Clip, records: list[dict], similarity: Similarity, dst: bool) -> ClipScore:
    """Compare the records of a streamed clip (one a frame, as FrameRecord.to_dict gives them) with its conversation.

    dst: whether the model tracks the task state.
    """
    first, F = clip.start_frame, len(records)
    said = {record["frame_idx"] - first: record["text"] for record in records if record["text"] is not None}
    wanted = {frame - first: text for frame, text in clip.replies().items()}
    said_rows, wanted_rows = list(said), list(wanted)
    alike = np.abs(similarity.between([said[row] for row in said_rows], [wanted[row] for row in wanted_rows]))  # [P, R]
    window = window_of(clip.dataset)
    dialogue = match_dialogue(said_rows, wanted_rows, alike, num_frames=F, fps=clip.fps, window_seconds=window)
    pairs = [(said[said_rows[p]], wanted[wanted_rows[r]]) for p, r in dialogue["correct_pairs"]]

    events, reliability = {}, {}
    for head, (role, name) in HEADS.items() if dst else [("speaking", HEADS["speaking"])]:
        rows = decided(records, f"{name}_decision")
        events[head] = event_counts(rows, rows_of(clip, role), clip.fps)
        probabilities = np.array([record[f"{name}_prob"] for record in records])
        reliability[head] = calibration(probabilities, streamed_labels(clip, role, rows, DataConfig(dst=dst)))
    timing = timing_counts(
        said,
        list(zip(rows_of(clip, "assistant"), wanted.values())),
        alike,
        similarity.between,
        [row for row, record in enumerate(records) if record["speaking_decision"] or record["dst_update_decision"]],
        [event for role in ("user", "assistant", "DST_UPDATE") for event in rows_of(clip, role)],
        num_frames=F,
        fps=clip.fps,
    )
    task_state, step_state = TaskStateCounts(), np.zeros((3, 3), np.int64)
    if dst:
        task_state = score_task_state(clip, records, window)
        step_state = score_step_state(clip, records)
    replies = Counts(sum(right for _, _, right in timely_replies(clip, records)), len(said), len(wanted))
    return ClipScore(
        clip_id=clip.id,
        dataset=clip.dataset or "unnamed",
        frames=F,
        dialogue=dialogue,
        correct_pairs=pairs,
        events=events,
        replies=replies,
        task_state=task_state,
        step_state=step_state,
        timing=timing,
        calibration=reliability,
        refreshes=sum(record["context_event"] is not None for record in records),
    )


def decided(records: list[dict], decision: str) -> list[int]:
    """The rows at which a head fired."""
    return [row for row, record in enumerate(records) if record[decision]]


def rows_of(clip: Clip, role: str) -> list[Event]:
    """The rows in which each text of `role` is due."""
    return [(first - clip.start_frame, last - clip.start_frame) for first, last in clip.events(role)]


def timely_replies(clip: Clip, records: list[dict]) -> list[tuple[int, int, bool]]:
    """The replies said within their event: (index of the reply, of the reference, whether it names the right step)."""
    said = [(row, record["text"]) for row, record in enumerate(records) if record["text"] is not None]
    wanted = list(clip.replies().values())
    names = [step.name for step in clip.steps]
    pairs = match_events([row for row, _ in said], rows_of(clip, "assistant"), int(EVENT_TOLERANCE * clip.fps))
    return [(p, r, says_the_same(said[p][1], wanted[r], names)) for p, r in pairs]


def named_step(text: str, step_names: list[str]) -> int | None:
    """Index of the one step whose name occurs in `text`, whatever the case; None when none does, or several."""
    found = [index for index, name in enumerate(step_names) if name.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def says_the_same(reply: str, wanted: str, step_names: list[str]) -> bool:
    """Whether a reply names the step that `wanted` names; where that names none ("All done."), begins as it does."""
    step = named_step(wanted, step_names)
    return reply.split(".")[0] == wanted.split(".")[0] if step is None else named_step(reply, step_names) == step


def score_task_state(clip: Clip, records: list[dict], window: tuple[float, float]) -> TaskStateCounts:
    """The predicted state at every frame, and every applied transition, against the reference's.

    While an update is due, the states before and after it are both right.
    """
    first = clip.start_frame
    written = [record for record in records if record["dst_update"] is not None]
    applied = [record for record in written if record["invalid_update"] is None]
    ids = [step.id for step in clip.steps]
    return task_state_metrics(
        state_matrix([record["dst_state"] for record in records], ids),
        state_matrix(clip.states_after(), ids),
        [state_matrix(clip.states_after(moment), ids) for moment in (first_frame, frame_behind)],
        [(record["frame_idx"] - first, t) for record in applied for t in read_update(record["dst_update"])],
        [(turn.end_frame - first, t) for turn in clip.updates() for t in turn.transitions],
        num_generated=len(written),
        num_valid=len(applied),
        fps=clip.fps,
        window_seconds=window,
    )


def first_frame(turn: Turn) -> int:
    return turn.start_frame


def frame_behind(turn: Turn) -> int:
    return turn.end_frame + 1


def score_step_state(clip: Clip, records: list[dict]) -> np.ndarray:
    """The state head's confusion [3,3] over all frames; while an update is due, with and without it is right."""
    if any(record["step_state"] is None for record in records):
        return np.zeros((3, 3), np.int64)
    predicted = np.array([STATES.index(record["step_state"]) for record in records])
    reference, updates = clip.latest_step_state(), clip.updates()
    for made in range(len(updates) + 1):  # so many updates as early as may be, the others as late
        early = {turn.index for turn in updates[:made]}
        right = clip.latest_step_state(
            lambda turn, early=early: first_frame(turn) if turn.index in early else frame_behind(turn)
        )
        reference = np.where(predicted == right, predicted, reference)
    return confusion(predicted, reference)


def read_update(text: str):
    """The transitions of an update that was applied, in whichever format it was written."""
    try:
        return parse_update(text, "arrow")
    except UpdateError:
        return parse_update(text, "json")


def decision_numbers(scores: list[ClipScore]) -> dict[str, float]:
    """When the heads fired, what the replies named, and the task state: all numbers that need no text metric."""
    numbers: dict[str, float] = {}
    parts = {f"{head}_event": [score.events[head] for score in scores] for head in scores[0].events}
    for part, counts in (parts | {"replies_right": [score.replies for score in scores]}).items():
        total = sum(counts, Counts())
        numbers |= {f"{part}_{name}": getattr(total, name) for name in ("precision", "recall", "f1")}
    if "dst" in scores[0].events:
        numbers |= sum((score.task_state for score in scores), TaskStateCounts()).summary()
    if (states := sum(score.step_state for score in scores)).any():
        numbers["state_head_accuracy"] = ratio(np.trace(states), states.sum())
        numbers["state_head_macro_f1"] = macro_f1(states)
    return numbers | {"combined_score": combined_score(numbers)}


def task_scores(numbers: dict[str, float]) -> dict[str, float]:
    """How well each task is done, 0..1: `events`, when to write (the heads' mean event F1); `replies`, what to say (F1
    of those right); `state`, what has been done (joint goal accuracy), where the model tracks it."""
    f1 = [numbers[name] for name in ("speaking_event_f1", "dst_event_f1") if name in numbers]
    scores = {"events": sum(f1) / len(f1), "replies": numbers["replies_right_f1"]}
    return scores | ({"state": numbers["joint_goal_accuracy"]} if "joint_goal_accuracy" in numbers else {})


def combined_score(numbers: dict[str, float]) -> float:
    """The mean of `task_scores`. It compares models with the same tasks, not one with task state and one without."""
    scores = task_scores(numbers)
    return sum(scores.values()) / len(scores)


def summarise(scores: list[ClipScore]) -> dict[str, Any]:
    """All numbers of a set of clips, and the heads' reliability curves. Clips are added in the order of their ids:
    rounding makes no difference then."""
    scores = sorted(scores, key=lambda score: score.clip_id)
    dialogue = sum_dialogue([score.dialogue for score in scores])
    numbers: dict[str, float] = {key: value for key, value in dialogue.items() if not key.endswith(("_sum", "_count"))}
    numbers |= decision_numbers(scores)
    numbers |= sum((score.timing for score in scores), TimingCounts()).summary()
    for head in scores[0].calibration:
        total = sum((score.calibration[head] for score in scores), Calibration())
        # To four digits: the last ones of a probability depend on what else was in the batch.
        curve = [(round(p, 4), round(share, 4), frames) for p, share, frames in total.curve()]
        numbers |= {f"{head}_ece": round(total.error, 4), f"{head}_reliability": curve}
    pairs = [pair for score in scores for pair in score.correct_pairs]
    texts = text_metrics([said for said, _ in pairs], [wanted for _, wanted in pairs])
    numbers |= texts.scores | weighted_by_jaccard(texts.scores, dialogue["jaccard_index"])
    totals = {name: sum(getattr(score, name) for score in scores) for name in ("frames", "refreshes")}
    return numbers | totals | {"clips": len(scores)}


def of_nothing(scores: list[ClipScore]) -> set[str]:
    """The rates that have nothing to be a rate of in these clips. Sums count them as 0; one clip shows a dash."""
    dialogue = sum_dialogue([score.dialogue for score in scores])
    right, missed, redundant = (dialogue[f"num_{name}"] for name in ("matched", "missed", "redundant"))
    matched = right + dialogue["num_mismatched"]
    items = {"f1": matched + missed + redundant, "precision": matched + redundant, "recall": matched + missed}
    items |= {"jaccard_index": items["f1"], "missing_rate": items["recall"], "redundant_rate": items["precision"]}
    items |= {"time_diff": right, "BLEU-4": right, "semantic_score": dialogue["semantic_count"]}
    parts = {f"{head}_event": [score.events[head] for score in scores] for head in scores[0].events}
    state = sum((score.task_state for score in scores), TaskStateCounts())
    parts |= {"replies_right": [score.replies for score in scores], "transition": [state.transitions]}
    for part, counts in parts.items():
        total = sum(counts, Counts())
        items |= {f"{part}_precision": total.predicted, f"{part}_recall": total.reference}
        items |= {f"{part}_f1": total.predicted + total.reference}
    items |= dict.fromkeys(("joint_goal_accuracy", "step_state_accuracy"), state.frames)
    return {name for name, count in (items | {"valid_update_ratio": state.generated}).items() if not count}


# ---- the table -----------------------------------------------------------------------------------


# What the table shows first; metrics.json holds everything.
TABLE = (
    ("f1", "dialogue F1"), ("precision", "precision"), ("recall", "recall"), ("jaccard_index", "Jaccard"),
    ("missing_rate", "missed"), ("redundant_rate", "redundant"),
    ("time_diff", "time difference, s"), ("semantic_score", "semantic score"),
    ("speaking_event_f1", "speaking event F1"), ("dst_event_f1", "update event F1"),
    ("replies_right_f1", "replies right (F1)"),
    ("joint_goal_accuracy", "joint goal accuracy"), ("step_state_accuracy", "step-state accuracy"),
    ("state_head_accuracy", "state head accuracy"), ("combined_score", "combined score"),
    ("transition_f1", "transition F1"), ("valid_update_ratio", "valid updates"),
    ("BLEU-4", "BLEU-4"), ("refreshes", "context refreshes"), ("clips", "clips"), ("frames", "frames"),
)  # fmt: skip


# The second table: when replies come, what the others cost, and what the heads' probabilities are worth.
TIMING_TABLE = (
    ("timeliness_f1", "Timeliness-F1@5"), ("pauc", "PAUC"),
    ("chunk_macro_f1", "macro F1, chunks of 8 s"), ("chunk_g_mean", "G-Mean, chunks of 8 s"),
    ("time_f1", "time F1, 3 s"), ("content_accuracy", "content accuracy"), ("joint_f1", "joint F1, 3 s"),
    ("duplicate_share", "duplicates"), ("replies_per_minute", "replies per minute"),
    ("false_alarms_per_quiet_hour", "false alarms per quiet hour"),
    ("speaking_ece", "speaking calibration error"), ("dst_ece", "update calibration error"),
)  # fmt: skip


OPTIONAL_TEXT_METRICS = ("METEOR", "CIDEr")  # they need other programs; shown where they could be computed


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a number, a column a dataset, and one for their mean where there are several; two tables."""
    names = list(results) if len(results) > 2 else [name for name in results if name != "macro"]
    lines = []
    tables = (("", (*TABLE, *((name, name) for name in OPTIONAL_TEXT_METRICS))), ("timing ", TIMING_TABLE))
    for corner, rows in tables:
        cells = [(title, [results[name].get(key) for name in names]) for key, title in rows]
        shown = [(title, row) for title, row in cells if any(cell is not None for cell in row)]
        if shown:
            lines += ["", f"| {corner}| " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        lines += [f"| {title} | {' | '.join(map(cell_text, row))} |" for title, row in shown]
    return "\n".join(lines[1:])


def cell_text(value: float | None) -> str:
    """None: a count has no mean over datasets."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def not_computed(results: dict[str, dict[str, float]]) -> str:
    """The text metrics that are missing from the results of a dataset, each with the reason."""
    reasons = text_metrics([], []).absent  # what is not installed; else the program failed on these very texts
    missing = [name for name in OPTIONAL_TEXT_METRICS if any(name not in numbers for numbers in results.values())]
    return ", ".join(f"{name} ({reasons.get(name, 'its program failed')})" for name in missing)
