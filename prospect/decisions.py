"""When would the heads have fired? One teacher-forced pass over clips, each head's numbers and its best threshold.

    teacher_forced     sequences, with the reference conversation in place -> losses, and probabilities at every frame
    traces             the sequences of each clip put together again
    decision_report    precision, recall, F1, ... of each head, and the threshold with the best event F1

train.py runs this at every validation, `python -m prospect.evaluate --sweep` on any clips. What a number means stands in
prospect/metrics.py.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from prospect.data import Corpus, collate
from prospect.metrics import DecisionCounts, auroc, average_precision, best_threshold, decision_metrics
from prospect.model import IGNORE, LOSS_CLASSES, Prospect, count_labels, loss_sums
from prospect.sequence import Sample, frame_labels

HEADS = {"speaking": "assistant", "dst": "DST_UPDATE"}  # each head, and the role whose turns it decides
FRAMES_AT_ONCE = 256  # whose LM logits are held at the same time, with infer.decision=lm


@dataclass
class ClipTrace:
    """Both heads' probabilities at every frame of a clip, given the reference conversation.

    probabilities and labels [F] by head, row 0 being the clip's first frame. At a frame that the sequence leaves out
    (`data.frames`, the turns layout, truncation) the probability is 0 and the label -100. events: the rows at which the
    reference speaks or updates.
    """

    clip_id: str
    fps: float
    probabilities: dict[str, np.ndarray]  # "speaking", "dst"
    labels: dict[str, np.ndarray]
    events: dict[str, list[int]]


@torch.no_grad()
def teacher_forced(
    model: Prospect,
    corpus: Corpus,
    batches: Iterable[list[int]],
    device: torch.device,
    bce: str,
    decision: str,
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> tuple[Tensor, Tensor, list[tuple[int, int, int, np.ndarray, np.ndarray, np.ndarray]]]:
    """One forward over each batch of sequences with the reference conversation in place.

    decision: infer.decision. With `lm` the probability of speaking is 1 - P(end token) at the frame instead of the
    head's, as when streaming: a threshold found here is one for what it will be compared with. An LM taught by
    `data.silence_lm` knows silent frames, which the end token follows, and those that a reply follows. At the frames
    of a reply's range before its last it has no label; if it fires there, the event is found early, in most ranges
    within EVENT_TOLERANCE. It is for models without task state: before an update comes no end token either.

    Returns loss sums [7], label counts [7] (both float64, on the CPU) and, for each sequence, a row of
    (file, clip, first unit, frames, speaking probability, dst probability), the last three [F].
    """
    sums, counts = torch.zeros(2, len(LOSS_CLASSES), dtype=torch.float64)
    rows = []
    for batch in batches:
        samples: list[Sample] = [corpus[(0, index)] for index in batch]
        tensors = collate(samples, corpus.tokenizer.pad_id)
        with autocast():
            hidden = model(tensors["input_ids"].to(device), tensors["image_embeds"].to(device))
            sums += loss_sums(model, hidden, tensors, bce).double().cpu()
        counts += count_labels(tensors)
        for b, (index, sample) in enumerate(zip(batch, samples)):
            states = hidden[b, torch.from_numpy(sample.decision_positions).to(device)]  # [F,H]
            if decision == "lm":
                end = corpus.tokenizer.end_id
                parts = [read(model.lm_head, part).softmax(-1)[:, end] for part in states.split(FRAMES_AT_ONCE)]
                speaking = 1 - torch.cat(parts)  # [F]
            else:
                speaking = read(model.speaking_decision_head, states).sigmoid()[:, 0]
            dst = torch.zeros_like(speaking)
            if model.dst_update_head is not None:
                dst = read(model.dst_update_head, states).sigmoid()[:, 0]
            entry, found = corpus.entries[index], [part.cpu().numpy() for part in (speaking, dst)]
            rows.append((entry.file, entry.clip, entry.window.first, sample.frames, *found))
    return sums, counts, rows


def read(head: nn.Linear, states: Tensor) -> Tensor:
    """A head's logits at states [F,H], in fp32, computed in the precision in which the head is stored."""
    return head(states.to(head.weight.dtype)).float()


def traces(corpus: Corpus, rows: list[tuple]) -> list[ClipTrace]:
    """Put the sequences of each clip together again; a frame that a window repeats counts where it was first shown."""
    found: list[ClipTrace] = []
    rows = sorted(rows, key=lambda row: row[:3])
    for key, group in itertools.groupby(rows, key=lambda row: row[:2]):
        parts = list(group)
        frames, first = np.unique(np.concatenate([part[3] for part in parts]), return_index=True)
        clip, _ = corpus.load(*key)
        shown = frames - clip.start_frame  # rows
        all_labels = frame_labels(clip, corpus.config, 1.0, corpus.seed, 0)
        trace = ClipTrace(clip.id, clip.fps, {}, {}, {})
        for i, (head, role) in enumerate(HEADS.items()):
            trace.probabilities[head] = np.zeros(clip.num_frames)
            trace.probabilities[head][shown] = np.concatenate([part[4 + i] for part in parts])[first]
            trace.labels[head] = np.full(clip.num_frames, IGNORE)
            trace.labels[head][shown] = all_labels[i][shown]
            ends = {turn.end_frame - clip.start_frame for turn in clip.turns if turn.role == role}
            trace.events[head] = sorted(ends.intersection(shown.tolist()))
        found.append(trace)
    return found


def decision_report(clips: list[ClipTrace], heads: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers of each head over all clips, and each head's best threshold (by event F1)."""
    numbers: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    for head in heads:
        threshold, _ = best_threshold([(c.probabilities[head], c.events[head], c.fps) for c in clips])
        thresholds[head] = threshold
        counts = DecisionCounts()
        for c in clips:
            counts += decision_metrics(c.probabilities[head], c.labels[head], c.events[head], threshold, c.fps)
        numbers |= {f"{head}_{name}": value for name, value in counts.summary().items()}
        pooled = [np.concatenate([getattr(c, part)[head] for c in clips]) for part in ("probabilities", "labels")]
        numbers[f"{head}_average_precision"], numbers[f"{head}_auroc"] = average_precision(*pooled), auroc(*pooled)
        numbers[f"{head}_threshold"] = threshold
    return numbers, thresholds
