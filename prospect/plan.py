"""The plan of a corpus: every sequence that its clips give, made once, by one process for all ranks.

To plan a clip's windows is to tokenize all of its texts, so this is done once and kept (prospect/kept.py). What every
rank needs of a plan is small and has no object for each clip: a table with a row for every sequence, and the bytes at
which the clips of a file begin and end.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from prospect.check import usable_clips
from prospect.clip_files import Source, clip_rows, fit_rows, open_source
from prospect.config import DataConfig
from prospect.embeddings import read_embeddings
from prospect.errors import ProspectError
from prospect.kept import Found, Task, find_all
from prospect.leaks import Origin, check_leaks
from prospect.packs import stamp
from prospect.processes import Processes
from prospect.sequence import Window, lay_out, plan_windows, prompt_parts
from prospect.tokenizer import Tokenizer

LARGE = 8 << 20  # bytes of clip files: some thousand clips

# Settings of the data on which no window depends.
ELSEWHERE = {
    "train", "val", "embeddings", "embeddings_outside", "sample", "on_bad", "allow_leaks", "workers", "batch_tokens",
    "neg_frame_sampling_rate", "val_neg_frame_sampling_rate",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One training sequence of the corpus: which file, which clip of it, which window of that clip."""

    file: int
    clip: int
    window: Window
    repetition: int = 0  # 0, 1, ... in a file that an epoch shows several times


@dataclass
class Plan:
    """spans: of each clip file (ClipFile.spans). table [S,8]: of each sequence file, clip, repetition, and its window:
    first, learn, end, num_tokens, summarized; and `units` of those that have them, by sequence.

    warnings, skipped, updates, prompts: see Corpus. digests: what was read, by file (see `checkpoint.fingerprint`).
    origins: where the clips come from, for the rank that looks for leaks.
    """

    sizes: list[int]  # of the clip files, in bytes
    spans: list[np.ndarray]
    table: np.ndarray
    units: dict[int, tuple[int, ...]]
    updates: int
    warnings: list[str]
    skipped: list[str]
    prompts: dict[str, float]
    digests: list[tuple[str, str]]
    origins: list[Origin] = field(default_factory=list)


class Entries(Sequence):
    """The sequences of a plan, each made when it is asked for."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan.table)

    def __getitem__(self, index: int) -> Entry:
        file, clip, repetition, *window, summarized = self.plan.table[index].tolist()
        return Entry(file, clip, Window(*window, self.plan.units.get(index), bool(summarized)), repetition)


@dataclass(frozen=True)
class Wanted:
    """What a plan is made of. See Corpus."""

    paths: Sequence[str]
    config: DataConfig
    tokenizer: Tokenizer
    vision_dim: int
    seed: int
    repeats: Sequence[int]


def plan_both(train: Wanted, val: Wanted, allow_leaks: bool) -> tuple[Plan, Plan, list[str]]:
    """The plans of training and validation, without origins, and what is to be reported of clips that both have.

    Large files are planned in a process of its own, with which all the memory goes that looking at every clip takes.
    """
    sizes = [os.path.getsize(path) for path in (*train.paths, *val.paths) if os.path.exists(path)]
    if sum(sizes) < LARGE:
        return plan_here((train, val, allow_leaks), None)
    with Processes(plan_here, (train, val, allow_leaks), 1) as process:
        return process.submit(None).result()


def plan_here(given: tuple[Wanted, Wanted, bool], nothing: None) -> tuple[Plan, Plan, list[str]]:
    train, val, allow_leaks = given
    plans = [make_plan(train), make_plan(val)]
    shared = check_leaks(plans[0].origins, plans[1].origins, allow_leaks)
    return *(replace(plan, origins=[]) for plan in plans), shared


def make_plan(wanted: Wanted) -> Plan:
    """Check all clips, and plan the sequences of those that are good. Raises ProspectError as Corpus does."""
    paths, config, repeats = wanted.paths, wanted.config, wanted.repeats
    sources = [open_source(path, config.embeddings, config.embeddings_outside) for path in paths]
    usable = usable_clips(sources, config, wanted.vision_dim)
    rows = array("i")  # of the table, one behind another
    units: dict[int, tuple[int, ...]] = {}
    origins: list[Origin] = []
    prompts: dict[str, int] = {}
    embeddings = [hashlib.sha256() for _ in sources]
    task = windows_task(config, wanted.tokenizer, wanted.seed)
    for (f, c), found in zip(usable.clips, find_all(sources, usable.clips, task), strict=True):
        if "refused" in found.value:
            error = ProspectError(found.value["refused"], where=found.value["where"], remedy=found.value["remedy"])
            if config.on_bad == "stop":
                raise error
            usable.skipped.append(str(error))
            continue
        for repetition in range(repeats[f]):
            for *window, of_window in found.value["windows"]:
                if of_window is not None:
                    units[len(rows) // 8] = tuple(of_window)
                rows.extend((f, c, repetition, *window))
        if found.value["windows"]:
            embeddings[f].update(f"{found.path.name} {found.stamp[0]}\n".encode())
        origins.append(Origin(f"{paths[f]}, clip {found.id}", found.id, found.value["video_uid"], str(found.path)))
        for part, there in found.value["prompt"].items():
            prompts[part] = prompts.get(part, 0) + there
    if usable.skipped:
        clips = sum(len(source.file) for source in sources)
        usable.warnings.append(f"{len(usable.skipped)} of {clips} clips are skipped (data.on_bad=skip)")
    if not rows:
        where = ", ".join(map(str, paths))
        raise ProspectError("no usable clip", where=where, remedy="python -m prospect.check FILE")
    return Plan(
        [source.file.stamp[0] for source in sources],
        [source.file.spans for source in sources],
        np.array(rows, np.int32).reshape(-1, 8),
        units,
        usable.updates,
        usable.warnings,
        usable.skipped,
        {part: count / len(origins) for part, count in prompts.items()},
        [(content(source.file.path), digest.hexdigest()) for source, digest in zip(sources, embeddings)],
        origins,
    )


def open_planned(paths: Sequence[str], config: DataConfig, plan: Plan) -> list[Source]:
    """The files of a plan that another process may have made. Raises ProspectError where one is another file here."""
    sources = []
    for path, size, spans in zip(paths, plan.sizes, plan.spans):
        sources.append(open_source(path, config.embeddings, config.embeddings_outside, spans))
        if (here := sources[-1].file.stamp[0]) != size:
            remedy = "let all ranks see the same files"
            raise ProspectError(f"has {here} bytes, and {size} for rank 0", where=str(path), remedy=remedy)
    return sources


# ---- one clip ------------------------------------------------------------------------------------


def windows_task(config: DataConfig, tokenizer: Tokenizer, seed: int) -> Task:
    settings = {name: value for name, value in asdict(config).items() if name not in ELSEWHERE}
    return Task("windows", find_windows, (config, tokenizer, seed), depends_on=[settings, tokenizer.digest(), seed])


def find_windows(source: Source, index: int, given: tuple[DataConfig, Tokenizer, int]) -> Found:
    """The windows of a good clip, and what else a start needs of it; or why a text of it fits no window."""
    config, tokenizer, seed = given
    clip = source.file.clip(index)
    path = source.embeddings_path(clip)
    before = stamp(path)
    rows = clip_rows(clip, read_embeddings(path), path)  # [rows, D] or [rows, I, D]
    per_frame = rows.shape[1] if rows.ndim == 3 else 1
    clip, _ = fit_rows(clip, len(rows))
    try:
        # No window depends on which silent frames are negatives: none are drawn.
        windows = plan_windows(clip, lay_out(clip, config, 0.0, seed, 0), tokenizer, config, per_frame, seed)
    except ProspectError as error:
        refused = {"refused": error.what, "where": error.where, "remedy": error.remedy}
        return Found(refused, clip.id, clip.embeddings, clip.video_uid, path)
    value = {
        "windows": [(w.first, w.learn, w.end, w.num_tokens, w.summarized, w.units) for w in windows],
        "video_uid": clip.video_uid,
        "prompt": prompt_parts(clip, config),
    }
    return Found(value, clip.id, clip.embeddings, clip.video_uid, path, before)


def content(path: Path) -> str:
    """The digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
