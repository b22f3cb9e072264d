"""A streamed clip against its reference: one clip's counts, the numbers of a set of clips, and their table.

`score_clip` compares the records of one clip with its conversation; `summarise` adds counts of clips and divides once
at the end; `table` writes what comes first. What each number means is defined in prospect/metrics.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prospect.clips import Clip
from prospect.dst import UpdateError, parse_update
from prospect.metrics import (
    Counts,
    TaskStateCounts,
    event_counts,
    match_dialogue,
    state_matrix,
    sum_dialogue,
    task_state_metrics,
    window_of,
)
from prospect.text_metrics import Similarity, text_metrics, weighted_by_jaccard


@dataclass
class ClipScore:
    """One streamed clip against its reference. Counts only: scores of clips are added, then divided."""

    clip_id: str
    dataset: str
    frames: int
    dialogue: dict[str, Any]  # match_dialogue's counts and rates
    correct_pairs: list[tuple[str, str]]  # (what was said, what should have been), of correct pairs
    events: dict[str, Counts]  # of each head, as it fired while streaming
    task_state: TaskStateCounts
    refreshes: int  # times the context was full


def score_clip(clip: Clip, records: list[dict], similarity: Similarity, dst: bool) -> ClipScore:
    """Compare the records of a streamed clip (one a frame, as FrameRecord.to_dict gives them) with its conversation.

    dst: whether the model tracks the task state.
    """
    first, F = clip.start_frame, len(records)
    said = {record["frame_idx"] - first: record["text"] for record in records if record["text"] is not None}
    wanted = {frame - first: text for frame, text in clip.replies().items()}
    said_rows, wanted_rows = list(said), list(wanted)
    alike = similarity.between([said[row] for row in said_rows], [wanted[row] for row in wanted_rows])  # [P, R]
    window = window_of(clip.dataset)
    dialogue = match_dialogue(said_rows, wanted_rows, alike, num_frames=F, fps=clip.fps, window_seconds=window)
    pairs = [(said[said_rows[p]], wanted[wanted_rows[r]]) for p, r in dialogue["correct_pairs"]]

    events = {"speaking": event_counts(np.array([r["speaking_decision"] for r in records]), wanted_rows, clip.fps)}
    task_state = TaskStateCounts()
    if dst:
        update_rows = sorted({turn.end_frame - first for turn in clip.updates()})
        events["dst"] = event_counts(np.array([r["dst_update_decision"] for r in records]), update_rows, clip.fps)
        task_state = score_task_state(clip, records, window)
    refreshes = sum(record["context_event"] is not None for record in records)
    return ClipScore(clip.id, clip.dataset or "unnamed", F, dialogue, pairs, events, task_state, refreshes)


def score_task_state(clip: Clip, records: list[dict], window: tuple[float, float]) -> TaskStateCounts:
    """The predicted state at every frame, and every applied transition, against the reference's."""
    first = clip.start_frame
    written = [record for record in records if record["dst_update"] is not None]
    applied = [record for record in written if record["invalid_update"] is None]
    ids = [step.id for step in clip.steps]
    return task_state_metrics(
        state_matrix([record["dst_state"] for record in records], ids),
        state_matrix(clip.states_after(), ids),
        [(record["frame_idx"] - first, t) for record in applied for t in read_update(record["dst_update"])],
        [(turn.end_frame - first, t) for turn in clip.updates() for t in turn.transitions],
        num_generated=len(written),
        num_valid=len(applied),
        fps=clip.fps,
        window_seconds=window,
    )


def read_update(text: str):
    """The transitions of an update that was applied, in whichever format it was written."""
    try:
        return parse_update(text, "arrow")
    except UpdateError:
        return parse_update(text, "json")


def summarise(scores: list[ClipScore]) -> dict[str, float]:
    """All numbers of a set of clips. They are added in the order of their ids: rounding makes no difference then."""
    scores = sorted(scores, key=lambda score: score.clip_id)
    dialogue = sum_dialogue([score.dialogue for score in scores])
    numbers: dict[str, float] = {key: value for key, value in dialogue.items() if not key.endswith(("_sum", "_count"))}
    for head in scores[0].events:
        counts = sum((score.events[head] for score in scores), Counts())
        for name in ("precision", "recall", "f1"):
            numbers[f"{head}_event_{name}"] = getattr(counts, name)
    if "dst" in scores[0].events:
        numbers |= sum((score.task_state for score in scores), TaskStateCounts()).summary()
    pairs = [pair for score in scores for pair in score.correct_pairs]
    texts = text_metrics([said for said, _ in pairs], [wanted for _, wanted in pairs])
    numbers |= texts.scores | weighted_by_jaccard(texts.scores, dialogue["jaccard_index"])
    totals = {name: sum(getattr(score, name) for score in scores) for name in ("frames", "refreshes")}
    return numbers | totals | {"clips": len(scores)}


# What the table shows first; metrics.json holds everything.


# ---- the table -----------------------------------------------------------------------------------


TABLE = (
    ("f1", "dialogue F1"), ("precision", "precision"), ("recall", "recall"), ("jaccard_index", "Jaccard"),
    ("missing_rate", "missed"), ("redundant_rate", "redundant"),
    ("time_diff", "time difference, s"), ("semantic_score", "semantic score"),
    ("speaking_event_f1", "speaking event F1"), ("dst_event_f1", "update event F1"),
    ("joint_goal_accuracy", "joint goal accuracy"), ("step_state_accuracy", "step-state accuracy"),
    ("transition_f1", "transition F1"), ("valid_update_ratio", "valid updates"),
    ("BLEU-4", "BLEU-4"), ("refreshes", "context refreshes"), ("clips", "clips"), ("frames", "frames"),
)  # fmt: skip


OPTIONAL_TEXT_METRICS = ("METEOR", "CIDEr")  # they need other programs; shown where they could be computed


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a number, a column a dataset, and one for their mean where there are several."""
    names = list(results) if len(results) > 2 else [name for name in results if name != "macro"]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for key, title in (*TABLE, *((name, name) for name in OPTIONAL_TEXT_METRICS)):
        cells = [results[name].get(key) for name in names]
        if any(cell is not None for cell in cells):
            lines.append(f"| {title} | {' | '.join(map(cell_text, cells))} |")
    return "\n".join(lines)


def cell_text(value: float | None) -> str:
    """None: a count has no mean over datasets."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def not_computed(results: dict[str, dict[str, float]]) -> str:
    """The text metrics that are missing from the results of a dataset, each with the reason."""
    reasons = text_metrics([], []).absent  # what is not installed; else the program failed on these very texts
    missing = [name for name in OPTIONAL_TEXT_METRICS if any(name not in numbers for numbers in results.values())]
    return ", ".join(f"{name} ({reasons.get(name, 'its program failed')})" for name in missing)
