"""Clip files to batches: the corpus, the collate function, and one deterministic order for every rank and resume.

    Corpus             the sequences of clip files, as planned; (epoch, i) gives sequence i with that epoch's negatives
    collate            samples -> the batch, right-padded
    epoch_batches      one epoch's micro-batches; DataOrder joins epochs into one endless stream
    StepSampler        the share of that stream that a rank takes, step after step
    MicroBatches       the share's keys -> batches, in the loop's own process or in workers

What one sequence is made of is in prospect/sequence.py.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prospect.clips import Clip
from prospect.config import IGNORE, DataConfig
from prospect.distributed import signals_held
from prospect.errors import ProspectError
from prospect.model import added, count_labels, find_targets
from prospect.plan import Entries, Entry, Plan, Wanted, make_plan, open_planned
from prospect.sequence import Sample, generator, lay_out, make_sample
from prospect.tokenizer import Tokenizer

# ---- the corpus ----------------------------------------------------------------------------------


def as_streamed(config: DataConfig) -> DataConfig:
    """The settings by which sequences hold what streaming sees: every frame of every clip, once."""
    return replace(config, layout="stream", frames="all", long_clips="split")


class Corpus:
    """Clip files with their embeddings, planned into sequences.

    The plan stays in memory (prospect/plan.py), by default made here; clips and embeddings are read when needed.

    `corpus[(epoch, i)]` is sequence i with the negatives of that epoch: it depends on nothing else, so any worker,
    rank or resumed run makes the same. repeats: how often an epoch shows each file, by default once; a clip shown
    three times has three sequences, with the draws that it would have in three epochs.

    All clips are checked first (prospect/check.py). With `on_bad: stop` a bad one raises ProspectError, which says how
    many more there are; with `skip` bad ones are left out, and `skipped` names each. `warnings` has the first of each
    kind. `prompts` is the share of the clips whose prompt has each of its parts (see prompt_parts).
    """

    def __init__(
        self,
        paths: Sequence[str],
        config: DataConfig,
        tokenizer: Tokenizer,
        vision_dim: int,
        *,
        rate: float,
        seed: int,
        repeats: Sequence[int] | None = None,
        plan: Plan | None = None,
    ):
        self.config, self.tokenizer, self.vision_dim, self.rate, self.seed = config, tokenizer, vision_dim, rate, seed
        self.repeats = repeats or [1] * len(paths)
        self.plan = plan or make_plan(Wanted(paths, config, tokenizer, vision_dim, seed, self.repeats))
        self.sources = open_planned(paths, config, self.plan)
        self.warnings, self.skipped, self.updates = self.plan.warnings, self.plan.skipped, self.plan.updates
        self.entries, self.prompts = Entries(self.plan), self.plan.prompts

    def load(self, file: int, index: int) -> tuple[Clip, np.ndarray]:
        """A clip and its embeddings [rows, I, D]."""
        clip, embeddings, _ = self.sources[file].load(index, self.vision_dim)
        return clip, embeddings

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        entry = self.entries[index]
        clip, embeddings = self.load(entry.file, entry.clip)
        layout = lay_out(clip, self.config, self.rate, self.seed, self.draw(epoch, entry), entry.window)
        return make_sample(clip, layout, entry.window, embeddings, self.tokenizer, self.config)

    def draw(self, epoch: int, entry: Entry) -> int:
        """Which draw of its negatives and text places a sequence has: 0, 1, ..., each once."""
        return epoch * self.repeats[entry.file] + entry.repetition

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [number of sequences]."""
        return self.plan.table[:, 6].astype(np.int64)

    def clips(self) -> np.ndarray:
        """The clips that give a sequence, [number of clips, 2]: file and number, in order."""
        return np.unique(self.plan.table[:, :2], axis=0)

    def shares(self) -> np.ndarray:
        """Each file's share of the tokens of an epoch, [number of files]."""
        tokens = np.bincount(self.plan.table[:, 0], self.lengths(), len(self.sources))
        return tokens / tokens.sum()


def label_counts(corpus: Corpus, epoch: int = 0) -> dict[str, Tensor]:
    """Labels of one epoch by class: what train.py logs when it has seen the epoch once."""
    pad_id = corpus.tokenizer.pad_id
    return added(count_labels(collate([corpus[(epoch, index)]], pad_id)["targets"]) for index in range(len(corpus)))


def counts_line(counts: dict[str, Tensor]) -> str:
    return "  ".join(f"{name} {int(count)}" for name, count in counts.items())


# ---- the batch -----------------------------------------------------------------------------------


def collate(samples: Sequence[Sample], pad_id: int, multiple: int = 1) -> dict[str, Tensor | list | dict]:
    """Samples to one right-padded batch, T being a multiple of `multiple`.

    input_ids, attention_mask and the labels are [B,T]; image_embeds [frames in batch, D] stand in the order of the
    <image> tokens; targets are the labels as the loss takes them (see find_targets). Padding is known by its position
    alone: causal attention never lets a real token look at it, and its labels are -100. For messages, and always on the
    host: clip_ids and video_ids name each sequence, frame_indices and timestamps hold for each the absolute numbers and
    the times (seconds of the video) of its <image> tokens.
    """
    B, T = len(samples), max(len(sample.input_ids) for sample in samples)
    T += -T % multiple
    input_ids = torch.full((B, T), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((B, T), dtype=torch.bool)
    labels = {key: torch.full((B, T), IGNORE, dtype=torch.long) for key in samples[0].labels}
    for b, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[b, :length] = torch.from_numpy(sample.input_ids)
        attention_mask[b, :length] = True
        for key in labels:
            labels[key][b, :length] = torch.from_numpy(sample.labels[key])
    image_embeds = torch.from_numpy(np.concatenate([sample.image_embeds for sample in samples]))  # [F, D]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_embeds": image_embeds,
        **labels,
        "targets": find_targets(labels | {"attention_mask": attention_mask}),
        "clip_ids": [sample.clip_id for sample in samples],
        "video_ids": [sample.video_id for sample in samples],
        "frame_indices": [at_images(sample, sample.frames) for sample in samples],
        "timestamps": [at_images(sample, sample.times) for sample in samples],
    }


def at_images(sample: Sample, of_frames: np.ndarray) -> np.ndarray:
    """A value of each frame [F] at each of its <image> tokens, [F*I]."""
    return np.repeat(of_frames, len(sample.image_embeds) // max(1, len(sample.frames)))


def contents(batch: dict) -> list[str]:
    """What each sequence of a batch shows, for messages."""
    keys = ("clip_ids", "video_ids", "frame_indices", "timestamps")
    return [
        f"{clip}: frames {frames.min()}..{frames.max()} of video {video}, {times.min():.1f} to {times.max():.1f} s"
        for clip, video, frames, times in zip(*map(batch.get, keys))
    ]


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with what a forward reads on the device; a pinned batch is copied without waiting for the device."""

    def sent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}

    inputs = {key: batch[key] for key in ("input_ids", "image_embeds")}
    return batch | sent(inputs) | {"targets": sent(batch["targets"])}


# ---- the order of the batches --------------------------------------------------------------------


POOL_BATCHES = 8  # batches' worth of sequences that are sorted by length together
COUNTED = 100  # epochs whose batches are counted one by one to know how many steps a run has


def epoch_batches(lengths: np.ndarray, batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The micro-batches of one epoch: lists of sequence numbers, each at most `batch_tokens` once padded.

    Sequences are shuffled, sorted by length within pools of a few batches (so that a batch holds like lengths and pads
    little, while its company changes from epoch to epoch), cut at the budget, and the batches shuffled again.
    """
    draw = generator(seed, epoch, "order")
    order = draw.permutation(len(lengths))
    pool = max(1, int(POOL_BATCHES * batch_tokens / max(lengths.mean(), 1)))
    batches: list[list[int]] = []
    for begin in range(0, len(order), pool):
        batches += ordered_batches(lengths, batch_tokens, order[begin : begin + pool])
    return [batches[i] for i in draw.permutation(len(batches))]


def ordered_batches(
    lengths: np.ndarray, batch_tokens: int, indices: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Sequences (all of them, or `indices`) from the shortest to the longest, cut into batches at the token budget.

    For validation as it stands: the order is the same whatever came before.
    """
    indices = range(len(lengths)) if indices is None else indices
    batch: list[int] = []
    for index in sorted(map(int, indices), key=lambda i: (lengths[i], i)):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:  # the newest is the longest so far
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padding_share(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """Share of a padded epoch that is padding."""
    real = sum(int(lengths[batch].sum()) for batch in batches)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1 - real / padded


class DataOrder:
    """The endless stream of micro-batches, one epoch after another, each epoch in an order of its own.

    A place in it is (epoch, position): micro-batches of that epoch already taken, by all ranks together. No number of
    ranks is part of it, so a run can go on with another.
    """

    def __init__(self, lengths, batch_tokens: int, seed: int):
        self.lengths = lengths  # [number of sequences] tokens of each
        self.batches = functools.lru_cache(maxsize=2)(lambda epoch: epoch_batches(lengths, batch_tokens, seed, epoch))

    def stream(self, epoch: int, position: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, sequence numbers) of each micro-batch from a place on."""
        while True:
            for batch in self.batches(epoch)[position:]:
                yield epoch, batch
            epoch, position = epoch + 1, 0

    def advance(self, epoch: int, position: int, taken: int) -> tuple[int, int]:
        """The place after `taken` more micro-batches."""
        position += taken
        while position >= len(self.batches(epoch)):
            epoch, position = epoch + 1, position - len(self.batches(epoch))
        return epoch, position

    def left(self, epoch: int, position: int, num_epochs: int) -> int:
        """Micro-batches from a place to the end of `num_epochs` epochs.

        Epochs differ by a few. Those from COUNTED on, which are not made before they are needed, count as many as the
        first; by how much those that are over differed from that is made up for, so the end does not move on the way.
        """
        if num_epochs <= COUNTED:
            return max(0, sum(len(self.batches(e)) for e in range(epoch, num_epochs)) - position)
        first = len(self.batches(0))
        ahead = sum(len(self.batches(e)) for e in range(epoch, COUNTED)) + (num_epochs - max(epoch, COUNTED)) * first
        more = sum(len(self.batches(e)) - first for e in range(COUNTED, epoch))
        return max(0, ahead - more - position)


class StepSampler:
    """For this rank, step after step, the keys of its micro-batches: lists of (epoch, sequence number).

    All ranks take the same stretch of the stream for a step and deal it out by tokens, largest first, back and forth
    (0 1 1 0 0 1 ...), each getting the same number of micro-batches.
    """

    def __init__(self, order: DataOrder, epoch: int, position: int, rank: int, world: int, per_rank: int):
        self.order, self.start, self.rank, self.world, self.per_rank = order, (epoch, position), rank, world, per_rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        lengths, world = self.order.lengths, self.world
        stream = self.order.stream(*self.start)
        while True:
            group = [next(stream) for _ in range(world * self.per_rank)]
            group.sort(key=lambda item: -int(lengths[item[1]].max()) * len(item[1]))  # stable: equal ones stay in order
            for number in range(self.per_rank):
                dealt = group[number * world : (number + 1) * world]
                epoch, batch = dealt[self.rank if number % 2 == 0 else world - 1 - self.rank]
                yield [(epoch, index) for index in batch]


class MicroBatches(Dataset):
    """Keys of sequences to a collated batch, here or in a worker process."""

    def __init__(self, corpus: Corpus, multiple: int):
        self.corpus, self.multiple = corpus, multiple

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict | ProspectError:
        try:
            return collate([self.corpus[key] for key in keys], self.corpus.tokenizer.pad_id, self.multiple)
        except ProspectError as error:  # raised by the receiver: a worker would wrap it into its own traceback
            return error


def received(loader: DataLoader) -> Iterator[dict]:
    with signals_held():  # one that came while a worker starts would kill it
        batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, ProspectError):
                raise batch
            yield batch
    finally:
        del batches  # its workers end with it, also where a traceback keeps this frame
