"""Evaluation: every clip streamed and scored; and the teacher-forced pass that picks the heads' thresholds.

    python -m prospect.evaluate --checkpoint DIR --data FILE [FILE ...] [--out DIR] [--streams 8] [section.key=value ...]
    python -m prospect.evaluate --checkpoint DIR --data FILE --sweep

The first streams every clip (with look-ahead, several at once), writes one records file a clip and then metrics.json and
metrics.md under --out, and prints the table. Interrupted and started again, it goes on with the clips that are missing.
The second picks each head's threshold on these clips from one teacher-forced pass, prints the curve and stores the
choice in the checkpoint.

What each number means stands in prospect/metrics.py. All of them are sums over clips, divided once at the end, so they
do not depend on look-ahead or on how many streams run at once.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prospect.checkpoint import read_state
from prospect.clips import Clip, ClipFile
from prospect.config import Config
from prospect.data import Corpus, Sample, collate, frame_labels, ordered_batches
from prospect.dst import UpdateError, apply_update, parse_update
from prospect.errors import ProspectError, run_entry_point
from prospect.metrics import (
    THRESHOLDS,
    Counts,
    DecisionCounts,
    TaskStateCounts,
    auroc,
    average_precision,
    best_threshold,
    by_dataset,
    decision_metrics,
    event_counts,
    match_dialogue,
    state_matrix,
    sum_dialogue,
    task_state_metrics,
    threshold_curve,
    window_of,
)
from prospect.model import LOSS_CLASSES, Prospect, count_labels, loss_sums
from prospect.setup import load_for_inference, load_job
from prospect.stream import Job, stream_jobs
from prospect.text_metrics import Similarity, load_similarity, text_metrics, weighted_by_jaccard


HEADS = {"speaking": "assistant", "dst": "DST_UPDATE"}  # each head, and the role whose turns it decides


@dataclass
class ClipTrace:
    """Both heads' probabilities at every frame of a clip, given the reference conversation.

    frames [F] absolute numbers, increasing; probabilities and labels [F] by head; events: rows of `frames` at which the
    reference speaks or updates.
    """

    clip_id: str
    fps: float
    frames: np.ndarray
    probabilities: dict[str, np.ndarray]  # "speaking", "dst"
    labels: dict[str, np.ndarray]
    events: dict[str, list[int]]


@torch.no_grad()
def teacher_forced(
    model: Prospect, corpus: Corpus, batches: Iterable[list[int]], device: torch.device, bce: str, autocast
) -> tuple[Tensor, Tensor, list[tuple[int, int, int, np.ndarray, np.ndarray, np.ndarray]]]:
    """One forward over each batch of sequences with the reference conversation in place.

    Returns loss sums [7], label counts [7] (both float64, on the CPU) and, for each sequence, a row of
    (file, clip, first unit, frames, speaking probability, dst probability), the last three [F].
    """
    sums, counts = torch.zeros(len(LOSS_CLASSES), dtype=torch.float64), torch.zeros(len(LOSS_CLASSES), dtype=torch.float64)
    rows = []
    for batch in batches:
        samples: list[Sample] = [corpus[(0, index)] for index in batch]
        tensors = collate(samples, corpus.tokenizer.pad_id)
        with autocast():
            hidden = model(tensors["input_ids"].to(device), tensors["image_embeds"].to(device))
            sums += loss_sums(model, hidden, tensors, bce).double().cpu()
        counts += count_labels(tensors)
        for b, (index, sample) in enumerate(zip(batch, samples)):
            states = hidden[b, torch.from_numpy(sample.decision_positions).to(device)].to(model.speaking_decision_head.weight.dtype)
            speaking = model.speaking_decision_head(states).float().sigmoid()[:, 0].cpu().numpy()
            dst = speaking * 0 if model.dst_update_head is None else model.dst_update_head(states).float().sigmoid()[:, 0].cpu().numpy()
            entry = corpus.entries[index]
            rows.append((entry.file, entry.clip, entry.window.first, sample.frames, speaking, dst))
    return sums, counts, rows


def traces(corpus: Corpus, rows: list[tuple]) -> list[ClipTrace]:
    """Put the sequences of each clip together again; a frame that a window repeats counts where it was first shown."""
    found: list[ClipTrace] = []
    rows = sorted(rows, key=lambda row: row[:3])
    for key, group in itertools.groupby(rows, key=lambda row: row[:2]):
        parts = list(group)
        frames, first = np.unique(np.concatenate([part[3] for part in parts]), return_index=True)
        clip, _ = corpus.load(*key)
        labels = frame_labels(clip, corpus.config, 1.0, corpus.seed, 0)
        place = {int(frame): row for row, frame in enumerate(frames)}
        ends = {head: sorted({turn.end_frame for turn in clip.turns if turn.role == role}) for head, role in HEADS.items()}
        found.append(ClipTrace(
            clip.id,
            clip.fps,
            frames,
            {head: np.concatenate([part[4 + i] for part in parts])[first] for i, head in enumerate(HEADS)},
            {head: labels[i][frames - clip.start_frame] for i, head in enumerate(HEADS)},
            {head: [place[frame] for frame in ends[head] if frame in place] for head in HEADS},
        ))  # fmt: skip
    return found


def decision_report(clips: list[ClipTrace], heads: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers of each head over all clips, and each head's best threshold (by event F1)."""
    numbers: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    for head in heads:
        threshold, _ = best_threshold([(c.probabilities[head], c.events[head]) for c in clips], clips[0].fps)
        thresholds[head] = threshold
        counts = sum((decision_metrics(c.probabilities[head], c.labels[head], c.events[head], threshold, c.fps) for c in clips), DecisionCounts())
        pooled = [np.concatenate([getattr(c, part)[head] for c in clips]) for part in ("probabilities", "labels")]
        numbers |= {f"{head}_{name}": value for name, value in counts.summary().items()}
        numbers |= {f"{head}_average_precision": average_precision(*pooled), f"{head}_auroc": auroc(*pooled), f"{head}_threshold": threshold}
    return numbers, thresholds


# ------------------------------------------------------------------------------------------------- streamed clips


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
    """Compare the records of a streamed clip (one a frame, as FrameRecord.to_dict gives them) with its conversation."""
    first, F = clip.start_frame, len(records)
    said = {record["frame_idx"] - first: record["text"] for record in records if record["text"] is not None}
    wanted: dict[int, str] = {}
    for turn in clip.turns:
        if turn.role == "assistant":  # several at one frame are one text, as in training
            row = turn.end_frame - first
            wanted[row] = f"{wanted[row]} {turn.text}" if row in wanted else turn.text
    said_rows, wanted_rows = sorted(said), sorted(wanted)
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
    first, F = clip.start_frame, len(records)
    reference_states, state, updates = [], clip.initial_state, clip.updates()
    for frame in range(first, first + F):  # the state after the updates that stand at the frame
        while updates and updates[0].end_frame <= frame:
            state = apply_update(state, updates.pop(0).transitions)
        reference_states.append(state)
    written = [record for record in records if record["dst_update"] is not None]
    applied = [record for record in written if record["invalid_update"] is None]
    ids = [step.id for step in clip.steps]
    return task_state_metrics(
        state_matrix([record["dst_state"] for record in records], ids),
        state_matrix(reference_states, ids),
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
    """All numbers of a set of clips."""
    dialogue = sum_dialogue([score.dialogue for score in scores])
    numbers: dict[str, float] = {key: value for key, value in dialogue.items() if not key.endswith(("_sum", "_count"))}
    for head in scores[0].events:
        counts = sum((score.events[head] for score in scores), Counts())
        numbers |= {f"{head}_event_precision": counts.precision, f"{head}_event_recall": counts.recall, f"{head}_event_f1": counts.f1}
    if "dst" in scores[0].events:
        numbers |= sum((score.task_state for score in scores), TaskStateCounts()).summary()
    pairs = [pair for score in scores for pair in score.correct_pairs]
    texts = text_metrics([said for said, _ in pairs], [wanted for _, wanted in pairs])
    numbers |= texts.scores | weighted_by_jaccard(texts.scores, dialogue["jaccard_index"])
    numbers |= {"clips": len(scores), "frames": sum(score.frames for score in scores), "refreshes": sum(score.refreshes for score in scores)}
    return numbers


def stream_and_score(
    model: Prospect, tokenizer, jobs: list[Job], config: Config, similarity: Similarity, *, streams: int, records_dir: Path | None = None
) -> Iterator[ClipScore]:
    """Stream the clips and score each as it ends; with records_dir, one JSONL file a clip, and clips that have one are not streamed again."""
    def records_file(job: Job) -> Path | None:
        return None if records_dir is None else records_dir / f"{job.clip.id}.jsonl"

    missing = []
    for job in jobs:
        path = records_file(job)
        if path is not None and path.exists():
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            yield score_clip(job.clip, records, similarity, config.data.dst)
        else:
            missing.append(job)
    collected: dict[int, list[dict]] = {}
    for job, records in stream_jobs(model, tokenizer, missing, config, streams=streams):
        done = collected.setdefault(id(job), [])
        done += [record.to_dict() for record in records]
        if len(done) == len(job.embeddings):
            del collected[id(job)]
            if path := records_file(job):
                aside = path.with_suffix(".writing")
                aside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in done), encoding="utf-8")
                os.replace(aside, path)
            yield score_clip(job.clip, done, similarity, config.data.dst)


def load_jobs(paths: Iterable[str], config: Config) -> list[Job]:
    """Every clip of the files, with its embeddings."""
    files = [ClipFile(path) for path in paths]
    return [load_job(file, index, config)[0] for file in files for index in range(len(file))]


# ----------------------------------------------------------------------------------------------------- reporting

# What the table shows first; metrics.json holds everything.
TABLE = (
    ("f1", "dialogue F1"), ("precision", "precision"), ("recall", "recall"), ("jaccard_index", "Jaccard"),
    ("missing_rate", "missed"), ("redundant_rate", "redundant"), ("time_diff", "time difference, s"), ("semantic_score", "semantic score"),
    ("speaking_event_f1", "speaking event F1"), ("dst_event_f1", "update event F1"), ("joint_goal_accuracy", "joint goal accuracy"),
    ("step_state_accuracy", "step-state accuracy"), ("transition_f1", "transition F1"), ("valid_update_ratio", "valid updates"),
    ("BLEU-4", "BLEU-4"), ("refreshes", "context refreshes"), ("clips", "clips"), ("frames", "frames"),
)  # fmt: skip


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a row a number, a column a dataset."""
    names = list(results) if len(results) > 2 else [name for name in results if name != "macro"]  # one dataset is its own mean
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for key, title in TABLE:
        cells = [results[name].get(key) for name in names]
        if any(cell is not None for cell in cells):
            lines.append(f"| {title} | " + " | ".join("" if c is None else str(c) if isinstance(c, int) else f"{c:.3f}" for c in cells) + " |")
    return "\n".join(lines)


def footing(checkpoint: Path, config: Config, similarity: Similarity, command: str) -> str:
    """What stands beside every table: command, checkpoint step, thresholds, the similarity's name."""
    infer = config.infer
    dst = f", updates {infer.dst_threshold:.4f}" if config.data.dst else ""
    return (
        f"command: `{command}`  \ncheckpoint: {checkpoint}, step {read_state(checkpoint).step}; thresholds: speaking {infer.speaking_threshold:.4f}{dst}; "
        f"strategy: {infer.strategy}; decision: {infer.decision}; similarity: {similarity.name}"
    )


def sweep(checkpoint: Path, corpus: Corpus, model: Prospect, config: Config) -> None:
    """Pick each head's threshold by event F1 from one teacher-forced pass, print the curve, store the choice."""
    device = model.lm_head.weight.device
    batches = list(ordered_batches(corpus.lengths(), config.data.batch_tokens))
    _, _, rows = teacher_forced(model, corpus, tqdm(batches, desc="teacher-forced"), device, config.loss.bce, contextlib.nullcontext)
    clips = traces(corpus, rows)
    heads = list(HEADS) if config.data.dst else ["speaking"]
    numbers, thresholds = decision_report(clips, heads)
    for head in heads:
        curve = threshold_curve([(c.probabilities[head], c.events[head]) for c in clips], clips[0].fps)
        print(f"\n{head}: event precision, recall and F1 by threshold")
        print("| threshold | P | R | F1 |\n|---:|---:|---:|---:|")
        for threshold, counts in list(zip(THRESHOLDS, curve))[::10]:
            print(f"| {threshold:.4f} | {counts.precision:.3f} | {counts.recall:.3f} | {counts.f1:.3f} |")
        print(f"chosen: {thresholds[head]:.4f}, event F1 {numbers[f'{head}_event_f1']:.3f}; "
              f"average precision {numbers[f'{head}_average_precision']:.3f}, AUROC {numbers[f'{head}_auroc']:.3f}")
    state = read_state(checkpoint)
    state.thresholds |= thresholds
    write_json(checkpoint / "state.json", dataclasses.asdict(state))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="clip files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="records, metrics.json and metrics.md go here")
    parser.add_argument("--streams", type=int, default=8, help="clips streamed at once")
    parser.add_argument("--similarity", default="lexical", metavar="lexical|DIR", help="DIR: a local sentence-transformers model")
    parser.add_argument("--sweep", action="store_true", help="pick the heads' thresholds on these clips and store them")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config, tokenizer, model = load_for_inference(arguments.checkpoint, arguments.overrides)
    if arguments.sweep:
        corpus = Corpus(arguments.data, config.data, tokenizer, config.model.vision_dim, rate=1.0, seed=config.run.seed)
        sweep(arguments.checkpoint, corpus, model, config)
        return 0
    if arguments.streams < 1:
        raise ProspectError("--streams must be at least 1", where="command line")
    similarity = load_similarity(arguments.similarity)
    jobs = load_jobs(arguments.data, config)
    records_dir = None
    if arguments.out:
        records_dir = arguments.out / "records"
        records_dir.mkdir(parents=True, exist_ok=True)
        same_settings(arguments.out / "settings.json", arguments, config)
    started = time.perf_counter()
    scoring = stream_and_score(model, tokenizer, jobs, config, similarity, streams=arguments.streams, records_dir=records_dir)
    scores = list(tqdm(scoring, total=len(jobs), desc="clips", dynamic_ncols=True))
    results = by_dataset([(score.dataset, score) for score in scores], summarise)
    command = "python -m prospect.evaluate " + " ".join(
        ["--checkpoint", str(arguments.checkpoint), "--data", *arguments.data, *arguments.overrides])
    report = table(results) + "\n\n" + footing(arguments.checkpoint, config, similarity, command)
    print(report)
    print(f"{sum(score.frames for score in scores)} frames in {time.perf_counter() - started:.1f} s")
    if arguments.out:
        write_json(arguments.out / "metrics.json", {"command": command, "similarity": similarity.name, "results": results})
        (arguments.out / "metrics.md").write_text(report + "\n", encoding="utf-8")
    return 0


def write_json(path: Path, values: dict) -> None:
    """Written aside and renamed: never half there."""
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(aside, path)


def same_settings(path: Path, arguments: argparse.Namespace, config: Config) -> None:
    """Records found under --out are taken over only when they were made by the same checkpoint with the same settings."""
    settings = {
        "checkpoint": str(arguments.checkpoint.resolve()), "step": read_state(arguments.checkpoint).step, "infer": vars(config.infer) | {"lookahead": None}}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        remedy = "name another --out, or remove this one"
        raise ProspectError("holds records made with other settings", where=str(path.parent), remedy=remedy)
    write_json(path, settings)


if __name__ == "__main__":
    run_entry_point(main)
