"""ProAssist's published features as embedding files: no video, no vision encoder.

    python -m prospect.convert features ARROW_OR_DIR ... --clips CLIPS --out embeddings/ [--tokens 1]

ProAssist (arXiv 2506.05904) publishes the SigLIP features of each video as an Arrow file with the name of its frames'
file (a dialogue's `frames_file`), in `features/MODEL@LAYER/`. Row k is frame k of the video, at 2 frames per second:

    cls      [1, 1152]    SigLIP's pooled output
    2x2      [4, 1152]    means of the patches, over a grid
    3x3      [9, 1152]    likewise
    5x5      [25, 1152]   likewise; no published model reads it

    --tokens 1     cls            -> [rows, 1152]
    --tokens 5     cls and 2x2    -> [rows, 5, 1152]
    --tokens 10    cls and 3x3    -> [rows, 10, 1152]
    --tokens 26    cls and 5x5    -> [rows, 26, 1152]

`python -m prospect.encode --tokens` makes the same of the pictures. The rows of every clip go to the file where
training looks for them (prospect/vision/cuts.py), and a file that is there already, made of the same, is kept.

The layout is what ProAssist's encode_frames.py writes: lists of lists of float16, in a stream of the `datasets`
library. Other floats and lists of fixed size are read too. Needs pyarrow (requirements-vision.txt).
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prospect.embeddings import check_finite
from prospect.errors import ProspectError
from prospect.vision.cuts import is_done, plan_cuts, write_cut
from prospect.vision.frames import ARROW_ENDING, arrow_batches

COLUMNS = {1: ("cls",), 5: ("cls", "2x2"), 10: ("cls", "3x3"), 26: ("cls", "5x5")}  # by vectors per frame


def convert_features(sources: list[Path], clips: Path, out: Path, tokens: int) -> int:
    """Write the embedding file of every clip of these Arrow files, or of those in these directories.

    A source that cannot be used is reported on stderr and left out. Returns the exit status: 2 if there was one.
    """
    cuts = plan_cuts(arrow_files(sources), out, "npy", clips)
    made_by = {"columns": list(COLUMNS[tokens])}
    broken = 0
    for source, of_source in tqdm(cuts.items(), desc="features", unit="video", disable=None):
        missing = [cut for cut in of_source if not is_done(cut, source, made_by)]
        try:
            rows = read_features(source, tokens) if missing else None
            for cut in missing:
                write_cut(rows, cut, source, made_by)
        except ProspectError as error:
            broken += 1
            tqdm.write(f"left out: {error}", file=sys.stderr)
    print(f"features of {len(cuts) - broken} of {len(cuts)} videos are in {out}")
    return 2 if broken else 0


def arrow_files(sources: list[Path]) -> list[Path]:
    """The sources, with each directory's Arrow files in its place."""
    found = []
    for source in sources:
        inside = sorted(source.glob(f"*{ARROW_ENDING}")) if source.is_dir() else [source]
        if not inside:
            raise ProspectError(
                f"holds no *{ARROW_ENDING}", where=str(source), remedy="features/MODEL@LAYER of a data set"
            )
        found += inside
    return found


def read_features(path: Path, tokens: int) -> np.ndarray:
    """All rows of a feature file, float16, [rows, D] for one token a frame, else [rows, tokens, D].

    Raises ProspectError when the file cannot be read, lacks a column, or holds something else in it.
    """
    remedy = f"--tokens {tokens} reads ProAssist's columns {' and '.join(COLUMNS[tokens])}"
    pieces = [
        np.concatenate([_vectors(batch.column(name), f"{path}, column {name}") for name in COLUMNS[tokens]], axis=1)
        for batch in arrow_batches(path, COLUMNS[tokens], remedy)
        if len(batch)
    ]  # [n, tokens, D]
    if not pieces:
        raise ProspectError("holds no rows", where=str(path), remedy="copy it again")
    if any(piece.shape[1:] != (tokens, pieces[0].shape[2]) for piece in pieces):
        raise ProspectError(f"its rows are not {tokens} vectors of one width", where=str(path), remedy=remedy)
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is refused
        rows = np.concatenate(pieces).astype(np.float16, copy=False)
    check_finite(rows, str(path))
    return rows[:, 0] if tokens == 1 else rows


def _vectors(column, where: str) -> np.ndarray:
    """A column of lists of vectors, or of vectors, as [rows, vectors, D]."""
    from pyarrow import compute, types  # pyarrow is there: it has read the file

    shape = [len(column)]
    while types.is_list(column.type) or types.is_fixed_size_list(column.type) or types.is_large_list(column.type):
        lengths = set(compute.unique(compute.list_value_length(column)).to_pylist())  # None: a row that is null
        if len(lengths) > 1 or None in lengths:
            raise ProspectError("its rows differ in length", where=where, remedy="copy the file again")
        shape.append(lengths.pop())
        column = column.flatten()
    if len(shape) not in (2, 3) or not types.is_floating(column.type) or column.null_count:
        what = f"holds {column.type}, nested {len(shape) - 1} deep"
        raise ProspectError(what, where=where, remedy="a list of vectors, or one vector, in each row")
    return column.to_numpy(zero_copy_only=False).reshape(shape[0], -1, shape[-1])
