"""Where frame embeddings come from and how large they are: are these the ones that a model was trained on?

A model takes any vectors of its width. Those of another vision tower, of another pooling or at another scale raise no
error: the decisions merely mean nothing. So the features of a corpus are looked at in a few rows, kept in the
checkpoint, and compared with those that the model is given later.

    made     what `python -m prospect.encode` wrote beside each file: model, digest of its weights, pooling, ...
    scale    mean norm of a vector, mean and deviation of its numbers; all that is known of other files
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from prospect.clip_files import Source, clip_rows
from prospect.embeddings import read_embeddings
from prospect.packs import read_bytes

CLIPS, ROWS = 64, 16  # looked at, at most: of a file, and of a clip
TOLERANCE = 1.25  # norms and deviations that differ by a larger factor are not of one kind

# What encode writes that is of one file, or changes its vectors by less than rounding does.
NOT_COMPARED = {"source", "first_frame", "rows", "dtype", "fps", "source_fps", "precision", "revision"}


@dataclass(frozen=True)
class Features:
    """made: by encode's names, empty where unknown. scale: `norm`, `mean`, `deviation`; empty in older checkpoints."""

    made: dict[str, str]
    scale: dict[str, float]

    def __str__(self) -> str:
        by = f", made by {self.made['model']} ({self.made['pool']})" if self.made else ""
        return "mean norm {norm:.4g}, mean {mean:.2g}, deviation {deviation:.4g}".format(**self.scale) + by


def features_of(clips: Sequence[tuple[Source, int]]) -> Features:
    """Of clips, each a source and a number in it: evenly spread clips and rows, the same ones whenever it is asked.

    Raises ProspectError where a clip or its embeddings cannot be read.
    """
    looked_at, made = [], []
    for at in evenly(len(clips), CLIPS):
        source, index = clips[at]
        clip = source.file.clip(index)
        path = source.embeddings_path(clip)
        rows = clip_rows(clip, read_embeddings(path), path)  # [rows, D] or [rows, I, D]
        looked_at.append(rows[evenly(len(rows), ROWS)])
        made.append(made_by(path))
    names = set.intersection(*map(set, made))
    return Features({name: " and ".join(sorted({of[name] for of in made})) for name in names}, scale_of(looked_at))


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers 0..count-1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))


def scale_of(parts: Sequence[np.ndarray]) -> dict[str, float]:
    """Of vectors in several arrays [..., D]; each array counts the same."""
    found = []
    for part in parts:
        part = part.astype(np.float64)
        found.append((np.linalg.norm(part, axis=-1).mean(), part.mean(), (part**2).mean()))
    norm, mean, square = np.mean(found, axis=0).tolist()
    return {"norm": norm, "mean": mean, "deviation": max(square - mean**2, 0.0) ** 0.5}


def facts_beside(path: Path) -> dict:
    """What encode wrote beside an embedding file; nothing where something else made it."""
    try:
        facts = json.loads(read_bytes(path.with_suffix(".json")))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and "weights_sha256" in facts else {}


def made_by(path: Path) -> dict[str, str]:
    """Of what encode wrote beside an embedding file, that by which others are compared with it."""
    return comparable(facts_beside(path))


def rate_of(path: Path) -> float | None:
    """The rows for a second of the video, where encode wrote them beside an embedding file."""
    with contextlib.suppress(KeyError, ValueError, ArithmeticError):
        return float(Fraction(str(facts_beside(path)["fps"])))
    return None


def comparable(facts: dict) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if name not in NOT_COMPARED}


def by_dataset(clips: Sequence[tuple[Source, int]]) -> dict[str, Features]:
    """The features of each clip file and, where it holds several data sets, of each of them."""
    by_file: dict[str, list[tuple[Source, int]]] = {}
    for source, index in clips:
        by_file.setdefault(str(source.file.path), []).append((source, index))
    found = {}
    for path, of_file in by_file.items():
        parts: dict[str, list[tuple[Source, int]]] = {}
        for at in evenly(len(of_file), CLIPS):
            source, index = of_file[at]
            parts.setdefault(source.file.clip(index).dataset, []).append((source, index))
        for name, part in parts.items():
            found[f"{path}, {name or 'unnamed'}" if len(parts) > 1 else path] = features_of(part)
    return found


def difference(these: Features, those: Features) -> str:
    """How `these` differ from `those` by more than a little, in words; "" where they do not, or where that is unknown.

    Scale is compared where nothing else is known to differ.
    """
    names = sorted(name for name in these.made.keys() & those.made.keys() if these.made[name] != those.made[name])
    if set(names) - {"model"}:  # the name alone is only a directory's
        return "; ".join(f"{name} {these.made[name]:.40}, not {those.made[name]:.40}" for name in names)
    if not these.scale or not those.scale:
        return ""
    here, there = these.scale, those.scale
    sizes = {name: sorted((here[name], there[name])) for name in ("norm", "deviation")}
    names = [name for name, (small, large) in sizes.items() if large > TOLERANCE * small]
    if abs(here["mean"] - there["mean"]) > (TOLERANCE - 1) * there["deviation"]:
        names.append("mean")
    return "; ".join(f"{name} {here[name]:.4g}, not {there[name]:.4g}" for name in names)


def warnings(these: Features, those: Features, checkpoint: str | Path) -> list[str]:
    """One line, or none, for a checkpoint that was trained on `those` and is given `these`."""
    found = difference(these, those)
    return [f"the embeddings are not like those that {checkpoint} was trained on: {found}"] if found else []
