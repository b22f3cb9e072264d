"""The clips of an evaluation: all checked before the first is streamed, dealt out to the ranks, read in their turn."""

import hashlib
import heapq
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prospect.check import usable_clips
from prospect.clip_files import Source, fit_rows, open_source
from prospect.clips import Clip
from prospect.config import Config
from prospect.context import check_reserved, check_streamable
from prospect.decisions import reference_moments
from prospect.distributed import Ranks
from prospect.errors import ProspectError
from prospect.features import features_of
from prospect.load import unlike_training
from prospect.names import clip_file_names
from prospect.stream import Job
from prospect.tokenizer import Tokenizer


@dataclass(frozen=True)
class Place:
    """A clip: where it is found, its id and its length."""

    source: int
    index: int
    id: str
    frames: int


@dataclass
class Jobs(Sequence[Job]):
    """Clips to be streamed. Each is read from its files whenever it is asked for: many take no more memory than few,
    and hold no more files open."""

    sources: list[Source]
    places: list[Place]
    vision_dim: int
    told: bool = False  # the reference decides when to write

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Job:
        place = self.places[number]
        clip, embeddings, _ = self.sources[place.source].load(place.index, self.vision_dim)
        return Job(clip, embeddings, reference_moments(clip) if self.told else None)

    def clip(self, number: int) -> Clip:
        """Without its embeddings."""
        place = self.places[number]
        return fit_rows(self.sources[place.source].file.clip(place.index), place.frames)[0]

    def only(self, numbers: Iterable[int]) -> "Jobs":
        """The clips of these numbers, in this order."""
        return replace(self, places=[self.places[number] for number in numbers])

    def share(self, ranks: Ranks) -> "Jobs":
        """Those of this rank, the longest first."""
        return self.only(deal([place.frames for place in self.places], ranks.world)[ranks.rank])

    def digests(self) -> dict[str, str]:
        """Of each clip's embeddings, by its id."""
        return {job.clip.id: hashlib.sha256(np.ascontiguousarray(job.embeddings)).hexdigest() for job in self}

    def raw(self, ids: Container[str]) -> Iterator[dict[str, Any]]:
        """The clips with these ids as they are in their files."""
        for place in self.places:
            if place.id in ids:
                yield self.sources[place.source].file[place.index] | {"id": place.id}


def load_jobs(paths: Iterable[str], config: Config, tokenizer: Tokenizer, checkpoint: Path | None = None) -> Jobs:
    """Every clip of the files, ready to be streamed, all checked first as before a training (prospect/check.py).

    A bad clip, an id that occurs twice, or a clip that does not fit into the context (prospect/context.py) raises
    ProspectError, or with `data.on_bad: skip` is left out. What was left out, and warnings, go to stderr, also
    where the clips are not like those `checkpoint` was trained on.
    """
    check_reserved(tokenizer, config)
    folder, outside = config.data.embeddings, config.data.embeddings_outside
    sources = [open_source(path, folder, outside) for path in clip_file_names(paths)]
    usable = usable_clips(sources, config.data, config.model.vision_dim)
    jobs = Jobs(sources, [], config.model.vision_dim)
    for source, index in usable.clips:
        clip, embeddings, _ = sources[source].load(index, config.model.vision_dim)
        try:
            check_streamable(clip, embeddings.shape[1], tokenizer, config)
        except ProspectError as error:
            if config.data.on_bad == "stop":
                raise
            usable.skipped.append(str(error))
            continue
        jobs.places.append(Place(source, index, clip.id, clip.num_frames))
    tell(usable.warnings, usable.skipped)
    if not jobs:
        raise ProspectError("no usable clip", where=", ".join(paths), remedy="python -m prospect.check FILE")
    if checkpoint is not None:
        features = features_of([(sources[place.source], place.index) for place in jobs.places])
        clips = map(jobs.clip, range(len(jobs)))
        tell([f"warning: {line}" for line in unlike_training(checkpoint, clips, config, features)], [])
    return jobs


def tell(warnings: list[str], skipped: list[str]) -> None:
    for line in warnings + [f"skipped: {line}" for line in skipped]:
        print(line, file=sys.stderr)


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Who takes which clips: numbers for each rank, the longest clip first, each given to the rank that has the fewest
    frames so far. No rank gets more than 4/3 of the best there is (Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(number)
        heapq.heappush(loads, (load + lengths[number], rank))
    return shares
