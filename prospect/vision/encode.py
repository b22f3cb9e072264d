"""Videos, picture directories and Arrow files in; one file of frame embeddings out for each. The offline phase.

    python -m prospect.encode VIDEO... --vision DIR --out embeddings/ [--fps 2]
    torchrun --nproc_per_node=4 -m prospect.encode VIDEO... --vision DIR --out embeddings/

    kitchen.mp4 -> frames.py: picture k, the last one shown at or before k / fps   (a thread, ahead of the encoding)
                -> tower.py: picture -> I vectors of D numbers                     (batches, on the GPU if there is one)
                -> embeddings/kitchen_embeddings.npy    float16, [rows, D], or [rows, I, D] when a frame is I vectors
                   embeddings/kitchen_embeddings.json   what made it: model, revision, fps, pooling

Row k is frame k of the source. With `--clips FILE` the rows of each clip, start_frame_idx .. end_frame_idx, are written
to their own files, where training looks for them (prospect/vision/cuts.py).

A run that was stopped is resumed by the same command: finished sources are skipped, and a half-finished one resumes
where it stopped (its rows so far are kept in a hidden file, whose name depends on everything that shapes them). A
source that cannot be read is reported and left out; the others are encoded, and the exit status is then 2. Several
processes share the sources by length, the longest first. Decoding is usually the slower side, so more processes than
GPUs (--nproc_per_node=4 on one GPU) decode several videos at once.
"""

import argparse
import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from prospect.config import DTYPES, torch_dtype
from prospect.errors import ProspectError, print_next, run_entry_point
from prospect.files import WRITING
from prospect.vision.cuts import Cut, is_done, plan_cuts, write_cut
from prospect.vision.frames import count_frames, frames_at
from prospect.vision.tower import POOLS, VisionEncoder, checkpoint_revision, load_vision_encoder, weights_sha256

END = object()  # what the decoding thread sends after the last batch


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the rows of a file; written beside it, and compared before a file is skipped."""

    model: str  # the checkpoint's directory name
    revision: str | None  # the commit it was downloaded from, where that is known
    weights_sha256: str  # of the vision tensors
    fps: str  # frames per second, as a fraction: "2", "30000/1001"
    source_fps: str  # of sources without a clock
    pool: str  # "pooled" (SigLIP, CLIP), "projected" (CLIP), "mean", "all" or "top-left-tile" (SmolVLM2)
    vectors_per_frame: int  # I
    width: int  # D
    precision: str  # of the arithmetic; the rows are float16


# ---- one source ----------------------------------------------------------------------------------


def encode_source(
    encoder: VisionEncoder, source: Path, settings: Settings, part: Path, batch_size: int, bar: tqdm
) -> np.ndarray:
    """All rows of a source, float16 [rows, D] or [rows, I, D], a memory map of `part`, which keeps them as they come.

    Rows that `part` holds from an earlier run are not computed again. Raises ProspectError when the source cannot be
    read to its end or a vector is not finite.
    """
    row_shape = (settings.vectors_per_frame, settings.width) if settings.vectors_per_frame > 1 else (settings.width,)
    row_bytes = 2 * settings.vectors_per_frame * settings.width
    done = part.stat().st_size // row_bytes if part.exists() else 0
    bar.update(done)
    try:
        with open(part, "ab") as file:
            file.truncate(done * row_bytes)  # half a row, if the machine crashed while it was written
            frames = frames_at(source, Fraction(settings.fps), Fraction(settings.source_fps), first=done)
            for batch in ahead(batches(frames, batch_size), size=2):
                rows = encode_batch(encoder, [picture for _, picture in batch], settings.precision)  # [B, I, D]
                bad = np.flatnonzero(~np.isfinite(rows).all(axis=(1, 2)))
                if len(bad):
                    what = f"frame {batch[bad[0]][0]} gives a vector that is not finite in float16"
                    remedy = "use --precision fp32; if that is what you use, download the checkpoint again"
                    raise ProspectError(what, where=str(source), remedy=remedy)
                file.write(rows.tobytes())
                file.flush()
                bar.update(len(batch))
    except ProspectError:  # a broken source stays broken: nothing to resume from next time
        part.unlink()
        raise
    except OSError as error:  # the disk is full, or a picture of a directory cannot be read
        what = f"{error.strerror}: {error.filename or part}"
        raise ProspectError(what, where=str(source), remedy="make room, or check it may be read") from None
    return np.memmap(part, dtype=np.float16, mode="r").reshape(-1, *row_shape)


@torch.inference_mode()
def encode_batch(encoder: VisionEncoder, pictures: list[Tensor], precision: str) -> np.ndarray:
    """Pictures, uint8 [3, H, W] on the CPU -> float16 [B, I, D]; arithmetic in `precision` where that is safe (amp)."""
    device = next(encoder.parameters()).device
    with torch.autocast(device.type, torch_dtype(precision), enabled=precision != "fp32"):
        return encoder([picture.to(device, non_blocking=True) for picture in pictures]).half().cpu().numpy()


def batches(frames: Iterator[tuple[int, Tensor]], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    batch = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def ahead(items: Iterator, size: int) -> Iterator:
    """The same items, made by a thread that is up to `size` of them ahead: it decodes while the caller encodes.

    An error in the thread is raised here, after the items before it. Leaving early stops the thread.
    """
    line: queue.Queue = queue.Queue(maxsize=size)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return line.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(END)
        except BaseException as error:  # whatever it is, the thread that waits for the items must see it
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := line.get()) is not END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


# ---- the run -------------------------------------------------------------------------------------


def deal(lengths: list[int], n_ranks: int) -> list[list[int]]:
    """Which sources each rank takes: the longest first, always to the rank that has the least so far."""
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    totals = [0] * n_ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = totals.index(min(totals))
        shares[rank].append(i)
        totals[rank] += lengths[i]
    return shares


def parse_fps(text: str) -> Fraction:
    try:
        fps = Fraction(text)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if fps <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate: 2, 0.5 or 30000/1001")
    return fps


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    every_pool = sorted({pool for pools in POOLS.values() for pool in pools})
    parser = argparse.ArgumentParser(prog="python -m prospect.encode", description="Videos into frame embeddings.")
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="INPUT", help="video, directory of pictures, or .arrow file")
    add("--vision", type=Path, required=True, help="directory of a SigLIP, CLIP or SmolVLM2 checkpoint")
    add("--out", type=Path, required=True, help="directory for the embeddings, created if missing")
    add("--fps", type=parse_fps, default=Fraction(2), help="frames per second (default 2)")
    add("--source-fps", type=parse_fps, help="pictures per second in directories and Arrow files (default: --fps)")
    add("--clips", type=Path, help="clip file (JSON or JSONL): write one file for each clip")
    tokens_help = "SigLIP, CLIP: 1 (pooled, the default), 5 (and 2x2 means), 10 (and 3x3 means) or 26 (and 5x5 means)"
    add("--tokens", type=int, help=tokens_help)
    pool_help = (
        "SmolVLM2: mean of the whole picture (default), all of its vectors, or top-left-tile, which reproduces files "
        "that hold only the first vector of the first tile; CLIP: pooled (default), or projected as it is for texts"
    )
    add("--pool", choices=every_pool, help=pool_help)
    add("--format", choices=["npy", "pkl", "safetensors"], default="npy", dest="ending", help="default npy")
    add("--batch-size", type=int, default=32, help="pictures per batch (default 32)")
    add("--precision", choices=sorted(DTYPES), help="default: fp16 on a GPU, fp32 on the CPU")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    out = arguments.out
    rank, n_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

    cuts = plan_cuts(arguments.sources, out, arguments.ending, arguments.clips)
    encoder = load_vision_encoder(arguments.vision, arguments.pool, arguments.tokens)
    settings = settings_of(arguments, encoder, device)
    encoder.to(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be created: {error.strerror}"
        raise ProspectError(what, where=str(out), remedy="give another --out") from None

    # Every rank finds the same sources and lengths, so all agree on their shares without communicating.
    missing, lengths, unreadable = sources_to_encode(cuts, settings)
    mine = [missing[i] for i in deal(lengths, n_ranks)[rank]]
    frames = dict(zip(missing, lengths))
    if rank == 0:
        for failure in unreadable:
            print(f"left out: {failure}", file=sys.stderr)
        print(
            f"{len(cuts)} sources: {len(cuts) - len(missing) - len(unreadable)} done, {len(missing)} to encode "
            f"({sum(lengths)} frames) on {n_ranks} x {device.type} in {settings.precision}, "
            f"{settings.vectors_per_frame} x {settings.width} numbers per frame"
        )
    if n_ranks > 1:  # only to wait for each other at the end: a rank that exits with an error would kill the others
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()  # nobody writes before everybody has seen what is done
    hidden = True if rank else None  # None: shown on a terminal only
    with tqdm(total=sum(frames[source] for source in mine), unit="frame", desc="encode", disable=hidden) as bar:
        failures = encode_all(encoder, mine, cuts, settings, arguments, bar)
    if n_ranks > 1:
        failures = gathered(failures, n_ranks)
    failures += unreadable
    if rank == 0:
        print(f"embeddings of {len(cuts) - len(failures)} of {len(cuts)} sources are in {out}")
        if arguments.clips and not failures:
            print_next(f"python -m prospect.check {arguments.clips} --embeddings {out}")
    return 2 if failures else 0


def settings_of(arguments: argparse.Namespace, encoder: VisionEncoder, device: torch.device) -> Settings:
    return Settings(
        **settings_of_tower(encoder, arguments.vision),
        fps=str(arguments.fps),
        source_fps=str(arguments.source_fps or arguments.fps),
        precision=arguments.precision or ("fp16" if device.type == "cuda" else "fp32"),
    )


def settings_of_tower(encoder: VisionEncoder, directory: Path) -> dict[str, str | int | None]:
    """What the tower has to do with the rows: Settings without the frame rates and the precision."""
    return {
        "model": directory.resolve().name,
        "revision": checkpoint_revision(directory),
        "weights_sha256": weights_sha256(encoder),
        "pool": encoder.pool,
        "vectors_per_frame": encoder.vectors_per_frame,
        "width": encoder.width,
    }


def sources_to_encode(cuts: dict[Path, list[Cut]], settings: Settings) -> tuple[list[Path], list[int], list[str]]:
    """The sources that have a file missing, the length of each in frames, and what is wrong with those left out.

    Every such source is opened for its length, which takes milliseconds. Raises ProspectError where a file was made
    with other settings.
    """
    missing, lengths, unreadable = [], [], []
    for source, of_source in cuts.items():
        done = [is_done(cut, source, asdict(settings)) for cut in of_source]  # all are checked: any may refuse the run
        if all(done):
            continue
        try:
            lengths.append(count_frames(source, Fraction(settings.fps), Fraction(settings.source_fps)))
            missing.append(source)
        except ProspectError as error:
            unreadable.append(str(error))
    return missing, lengths, unreadable


def encode_all(
    encoder: VisionEncoder,
    sources: list[Path],
    cuts: dict[Path, list[Cut]],
    settings: Settings,
    arguments: argparse.Namespace,
    bar: tqdm,
) -> list[str]:
    """Encode this rank's sources; returns what is wrong with those left out."""
    failures = []
    for source in sources:
        try:
            encode_and_write(encoder, source, cuts[source], settings, arguments.out, arguments.batch_size, bar)
        except ProspectError as error:
            failures.append(str(error))
            tqdm.write(f"left out: {error}", file=sys.stderr)
    return failures


def gathered(failures: list[str], n_ranks: int) -> list[str]:
    """The failures of all ranks."""
    of_ranks: list = [None] * n_ranks
    dist.all_gather_object(of_ranks, failures)
    dist.destroy_process_group()
    return [failure for of_rank in of_ranks for failure in of_rank]


def encode_and_write(
    encoder: VisionEncoder, source: Path, cuts: list[Cut], settings: Settings, out: Path, batch_size: int, bar: tqdm
) -> None:
    """Encode one source, write its files, and remove the rows kept meanwhile."""
    identity = json.dumps([str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns, asdict(settings)])
    part = out / f".{source.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}{WRITING}"
    rows = encode_source(encoder, source, settings, part, batch_size, bar)
    for cut in cuts:
        write_cut(rows, cut, source, asdict(settings))
    part.unlink()


if __name__ == "__main__":
    run_entry_point(main)
