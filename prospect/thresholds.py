"""When would the heads have fired? One teacher-forced pass over clips, each head's numbers and its best threshold.

    teacher_forced     sequences, with the reference conversation in place -> losses, and probabilities at every frame
    traces             the sequences of each clip put together again
    decision_report    precision, recall, F1, ... of each head, and the threshold with the best event F1

train.py runs this at every validation, `python -m prospect.evaluate --sweep` on any clips. Every number is defined in
prospect/metrics.py.
"""

import contextlib
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prospect.config import Config
from prospect.data import Corpus, collate, to_device
from prospect.errors import ProspectError
from prospect.metrics import (
    DecisionCounts,
    HeadTrace,
    auroc,
    average_precision,
    best_threshold,
    even_odds,
    threshold_curve,
)
from prospect.model import IGNORE, Prospect, count_labels, loss_sums
from prospect.sequence import Sample, lay_out

FRAMES_AT_ONCE = 256  # whose LM logits are held at the same time, with infer.decision=lm


@dataclass
class SequenceTrace:
    """Both heads' probabilities at the frames of one sequence, and where in the corpus it stands."""

    file: int
    clip: int
    first_unit: int  # of the sequence's window
    frames: np.ndarray  # [F] absolute numbers
    probabilities: dict[str, np.ndarray]  # by head, [F]
    labels: dict[str, np.ndarray]  # by head, [F], at sampling rate 1.0


@dataclass
class TeacherForced:
    """One batch with the reference conversation in place: loss sums and label counts by class, and each sequence."""

    sums: dict[str, Tensor]  # float64, on the CPU
    counts: dict[str, Tensor]
    sequences: list[SequenceTrace]


class ForcedBatch(NamedTuple):  # a tuple, so that a data loader pins what is in it
    """Sequences as a forward takes them, all of it made on the CPU."""

    tensors: dict[str, Tensor | list]  # from collate
    positions: list[Tensor]  # of each sequence, [F]: where its decisions are read
    sequences: list[SequenceTrace]  # still without probabilities


class ForcedBatches(Dataset):
    """Lists of sequence numbers to batches, here or in a worker process."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __getitem__(self, batch: list[int]) -> ForcedBatch | ProspectError:
        try:
            return make_batch(self.corpus, batch)
        except ProspectError as error:  # raised by the receiver, as in data.MicroBatches
            return error


def make_batch(corpus: Corpus, batch: list[int]) -> ForcedBatch:
    samples: list[Sample] = [corpus[(0, index)] for index in batch]
    sequences = []
    for index, sample in zip(batch, samples):
        entry, labels = corpus.entries[index], reference_labels(corpus, index)
        sequences.append(SequenceTrace(entry.file, entry.clip, entry.window.first, sample.frames, {}, labels))
    positions = [torch.from_numpy(sample.decision_positions) for sample in samples]
    return ForcedBatch(collate(samples, corpus.tokenizer.pad_id), positions, sequences)


@torch.no_grad()
def teacher_forced(
    model: Prospect,
    corpus: Corpus,
    batch: list[int] | ForcedBatch,
    config: Config,
    autocast: contextlib.AbstractContextManager | None = None,
) -> TeacherForced:
    """One forward over sequences with the reference conversation in place. batch: their numbers, or made already.

    With `infer.decision: lm` the probability of speaking is 1 - P(end token) at the frame instead of the head's, as
    when streaming, so the threshold is tuned on the quantity that streaming compares it with. An LM taught by
    `data.silence_lm` knows silent frames, which the end token follows, and those that a reply follows. It is for
    models without task state: before an update comes no end token either.
    """
    device = model.lm_head.weight.device
    batch = batch if isinstance(batch, ForcedBatch) else make_batch(corpus, batch)
    on_device = to_device(batch.tensors, device)
    with autocast or contextlib.nullcontext():
        hidden = model(on_device["input_ids"], on_device["image_embeds"])
        sums = loss_sums(model, hidden, on_device["targets"], config.loss)
    for b, (sequence, positions) in enumerate(zip(batch.sequences, batch.positions)):
        states = hidden[b, positions.to(device, non_blocking=True)]  # [F,H]
        parts = [
            model.decision_probabilities(part, config.infer.decision, corpus.tokenizer.end_id)
            for part in states.split(FRAMES_AT_ONCE)
        ]
        sequence.probabilities = {head: torch.cat([part[head] for part in parts]).cpu().numpy() for head in parts[0]}
    counts = count_labels(batch.tensors["targets"])
    return TeacherForced({k: v.double().cpu() for k, v in sums.items()}, counts, batch.sequences)


def reference_labels(corpus: Corpus, index: int) -> dict[str, np.ndarray]:
    """The decision labels of a sequence's frames, by head, with every silent frame a negative."""
    entry = corpus.entries[index]
    clip, _ = corpus.load(entry.file, entry.clip)
    layout = lay_out(clip, corpus.config, 1.0, corpus.seed, corpus.draw(0, entry), entry.window)
    shown = np.repeat(entry.window.shows(len(layout.units) - 1), np.diff(layout.units))  # [F of the clip] bool
    return {"speaking": layout.speaking[shown], "dst": layout.dst[shown]}


def traces(corpus: Corpus, sequences: list[SequenceTrace]) -> dict[str, list[HeadTrace]]:
    """Each head's trace of every clip: its sequences put together, a repeated frame counted where it was first shown.

    At a frame that the sequences leave out (`data.frames`, the turns layout, truncation) the probability is 0 and the
    label -100.
    """
    found: dict[str, list[HeadTrace]] = {}
    sequences = sorted(sequences, key=lambda part: (part.file, part.clip, part.first_unit))
    for (file, number), group in itertools.groupby(sequences, key=lambda part: (part.file, part.clip)):
        parts = list(group)
        frames, first = np.unique(np.concatenate([part.frames for part in parts]), return_index=True)
        clip, _ = corpus.load(file, number)
        shown = frames - clip.start_frame  # rows
        for head in parts[0].probabilities:
            probabilities, labels = np.zeros(clip.num_frames), np.full(clip.num_frames, IGNORE)
            probabilities[shown] = np.concatenate([part.probabilities[head] for part in parts])[first]
            labels[shown] = np.concatenate([part.labels[head] for part in parts])[first]
            found.setdefault(head, []).append(HeadTrace(probabilities, labels, clip.fps))
    return found


def decision_report(heads: dict[str, list[HeadTrace]]) -> dict[str, float]:
    """Numbers of each head over all clips, at the threshold with the best event F1, which is among them; and the
    probability that stands for even odds, from which streaming's decisions start."""
    numbers: dict[str, float] = {}
    for head, clips in heads.items():
        threshold = best_threshold(threshold_curve(clips))
        counts = sum((clip.decisions(threshold) for clip in clips), DecisionCounts())
        numbers |= {f"{head}_{name}": value for name, value in counts.summary().items()}
        pooled = [np.concatenate([getattr(clip, part) for clip in clips]) for part in ("probabilities", "labels")]
        numbers[f"{head}_average_precision"], numbers[f"{head}_auroc"] = average_precision(*pooled), auroc(*pooled)
        numbers[f"{head}_threshold"] = threshold
        numbers[f"{head}_even_odds"] = even_odds(clips)
    return numbers
