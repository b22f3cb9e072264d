"""From a video, a directory of pictures or an Arrow file to frames at an even rate: which picture is frame k?

Frame k is the last picture shown at or before k / fps seconds. When a picture is shown is read from the file, never
found by counting: a file that says 30 pictures per second often has 29.97, phones and screen recorders change their
rate while they record, and to take every 14th of 29.97 pictures per second for "2 per second" is wrong by 70 ms every
second, two minutes after half an hour. All arithmetic on times is exact (fractions).

    pictures shown    0 ms      40        90       130               260
                      |----A----|----B----|---C----|--------D--------|---E---|(300 ms, end)
    frames, 10 fps    0                   100               200              (300 is not before the end)
                      A                   C                 D

Time 0 is the first picture of the source, whatever its own clock says then. The last picture is shown for as long as
the file says, and frames end with it; the first picture is frame 0 in any case.

    video             the timestamps of its pictures; a rotation that the file asks for (phones) is applied
    picture directory the last number in each file name, at `source_fps` numbers per second; the smallest is time 0, and
                      the picture before a gap stands in for the missing ones
    Arrow file        ProAssist's: column `frame`, a JPEG in base64 or as it is, row n shown at n / source_fps

Videos need PyAV, pictures Pillow, Arrow files pyarrow (requirements-vision.txt); nothing else here does.
"""

import base64
import binascii
import io
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prospect.errors import ProspectError

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
ARROW_ENDING = ".arrow"
LOST_SECONDS = 1  # a video may end this much before what its header declares; more, and it was cut off


@dataclass(frozen=True)
class Shown:
    """One picture of a source: on screen from `start` to `end` (seconds), decoded only when it is asked for."""

    start: Fraction
    end: Fraction
    load: Callable[[], Tensor]  # -> uint8 [3, H, W], red green blue


def frames_at(
    source: Path, fps: Fraction, source_fps: Fraction | None = None, first: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Frames `first`, `first` + 1, ... of a source as (k, picture uint8 [3, H, W]).

    `source_fps` is for sources without a clock, directories and Arrow files; by default it is `fps`. Pictures before
    frame `first` are skipped. Raises ProspectError, naming the source, when it cannot be read or is cut short, in
    the middle of the iteration if that is where it shows.
    """
    for k, shown in sample(_shown(Path(source), source_fps or fps), fps):
        if k >= first:
            yield k, shown.load()


def count_frames(source: Path, fps: Fraction, source_fps: Fraction | None = None) -> int:
    """How many frames `frames_at` will give: exact for directories and Arrow files, what the header says for videos.

    0 when a video's header does not say. Raises ProspectError when the source cannot be opened.
    """
    source = Path(source)
    if source.is_dir():
        return sum(1 for _ in sample(_directory(source, source_fps or fps, warn=False), fps))
    if source.suffix == ARROW_ENDING:
        rows = sum(len(batch) for batch in arrow_batches(source, ["frame"], NOT_FRAMES))
        return math.ceil(rows / (source_fps or fps) * fps)
    with _open_video(source) as (container, stream):
        return math.ceil(_declared_seconds(container, stream) * fps)


def sample(pictures: Iterable[Shown], fps: Fraction) -> Iterator[tuple[int, Shown]]:
    """(k, the last picture shown at or before k / fps) for all k before the end. Pictures come in order of time."""
    k, current = 0, None
    for picture in pictures:
        # Only the next picture's time shows that the current one was the last at or before k / fps.
        while current is not None and k / fps < picture.start:
            yield k, current
            k += 1
        current = picture
    while current is not None and (k / fps < current.end or k / fps <= current.start):
        yield k, current
        k += 1


def _shown(source: Path, source_fps: Fraction) -> Iterator[Shown]:
    if source.is_dir():
        return _directory(source, source_fps)
    return _arrow(source, source_fps) if source.suffix == ARROW_ENDING else _video(source)


# ---- videos --------------------------------------------------------------------------------------


@contextmanager
def _open_video(path: Path) -> Iterator[tuple]:
    """The container and its main video stream (a cover picture is a stream too). Failures are ProspectErrors."""
    av = _optional("av", "videos")
    try:
        if path.stat().st_size == 0:
            raise ProspectError("the file is empty", where=str(path), remedy="copy or record it again")
        container = av.open(str(path))
    except (OSError, av.FFmpegError) as error:
        remedy = "check that it is a complete video: an .mp4 that was cut off has lost the index at its end"
        raise ProspectError(f"cannot be opened as a video: {error.strerror}", where=str(path), remedy=remedy) from None
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise ProspectError("holds no video, only other streams", where=str(path), remedy="name a video file")
        stream.thread_type = "AUTO"
        yield container, stream


def _video(path: Path) -> Iterator[Shown]:
    av = _optional("av", "videos")
    with _open_video(path) as (container, stream):
        zero, last = None, None
        try:
            for frame in container.decode(stream):
                if frame.pts is None:
                    remedy = "put it into a container that has them, with its true rate: ffmpeg -r 30 -i IN OUT.mp4"
                    raise ProspectError("its pictures carry no timestamps", where=str(path), remedy=remedy)
                zero = frame.pts if zero is None else zero
                start = (frame.pts - zero) * frame.time_base
                if last is not None and start < last.start:
                    what = f"its clock runs backwards at {float(last.start):.2f} s"
                    remedy = "rewrite it with one clock: ffmpeg -i IN OUT.mp4"
                    raise ProspectError(what, where=str(path), remedy=remedy)
                end = start + (frame.duration or 0) * frame.time_base
                last = Shown(start, end, lambda frame=frame: _upright(frame))
                yield last
        except av.FFmpegError as error:
            what = f"is damaged at {float(last.end) if last else 0:.2f} s: {error.strerror}"
            raise ProspectError(what, where=str(path), remedy="copy it again") from None
        if last is None:
            raise ProspectError("holds no pictures", where=str(path), remedy="copy or record it again")
        declared = _declared_seconds(container, stream)
        if last.end < declared - LOST_SECONDS:
            what = f"ends at {float(last.end):.2f} s of the {float(declared):.2f} s that its header declares"
            remedy = "copy it again; if this is all there is, rewrite it: ffmpeg -i IN OUT.mp4"
            raise ProspectError(what, where=str(path), remedy=remedy)


def _declared_seconds(container, stream) -> Fraction:
    """How long the video runs according to its header; 0 when it does not say.

    .mp4 and .avi say it for each stream, Matroska in a tag of the stream or, for everything together, in the header;
    the latter counts only where the video is alone, since sound may run longer.
    """
    if stream.duration is not None:
        return stream.duration * stream.time_base
    if tag := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+).*", stream.metadata.get("DURATION", "")):
        return Fraction(tag[1]) * 3600 + Fraction(tag[2]) * 60 + Fraction(tag[3])
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, 1_000_000)
    return Fraction(0)


def _upright(frame) -> Tensor:
    """A decoded picture as it is to be shown, uint8 [3, H, W].

    Phones store what the sensor gave and a display matrix (a b; c d) with it: the pixel at (x, y) is to be shown at
    x' = a x + c y, y' = b x + d y, up to a shift (ISO 14496-12, 8.3.2). Only quarter turns and mirrors are written.
    """
    picture = torch.from_numpy(np.ascontiguousarray(frame.to_ndarray(format="rgb24"))).permute(2, 0, 1)  # [3, H, W]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(b) > abs(a):  # rows become columns
        picture, across, down = picture.transpose(1, 2), c, b
    else:
        across, down = a, d
    return picture.flip([axis for axis, sign in ((2, across), (1, down)) if sign < 0]).contiguous()


# ---- directories of pictures ---------------------------------------------------------------------


def _directory(folder: Path, source_fps: Fraction, warn: bool = True) -> Iterator[Shown]:
    by_number: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURE_ENDINGS:
            continue
        digits = re.findall(r"\d+", path.stem)
        if not digits:
            what = f"the name of {path.name!r} has no number to say when it is shown"
            raise ProspectError(what, where=str(folder), remedy="number the pictures")
        other = by_number.setdefault(int(digits[-1]), path)
        if other is not path:
            what = f"{other.name!r} and {path.name!r} have the same number"
            raise ProspectError(what, where=str(folder), remedy="one directory for each source")
    if not by_number:
        what = f"holds no pictures ({', '.join(sorted(PICTURE_ENDINGS))})"
        raise ProspectError(what, where=str(folder), remedy="name videos and .arrow files themselves")
    numbers = sorted(by_number)
    missing = numbers[-1] - numbers[0] + 1 - len(numbers)
    if missing and warn:
        gap = next(n for n in numbers if n + 1 not in by_number) + 1
        print(
            f"{folder}: {missing} of {missing + len(numbers)} numbers are missing, the first is {gap}; "
            "the picture before each gap stands in for them",
            file=sys.stderr,
        )
    for number, following in zip(numbers, [*numbers[1:], numbers[-1] + 1]):
        path = by_number[number]
        start, end = (Fraction(n - numbers[0]) / source_fps for n in (number, following))
        yield Shown(start, end, lambda path=path: decode_picture(path.read_bytes(), str(path)))


def decode_picture(data: bytes, where: str) -> Tensor:
    """A JPEG, PNG, ... as uint8 [3, H, W], turned the way its EXIF data says it is to be shown."""
    _optional("PIL", "pictures")
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            array = np.array(ImageOps.exif_transpose(image).convert("RGB"))  # [H, W, 3]
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's plug-ins raise all three on damaged files
        raise ProspectError(f"is not a complete picture: {error}", where=where, remedy="copy it again") from None
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


# ---- ProAssist's Arrow files ---------------------------------------------------------------------


NOT_FRAMES = "give ProAssist's frames; its features become embeddings by python -m prospect.convert features"


def _arrow(path: Path, source_fps: Fraction) -> Iterator[Shown]:
    n = None
    values = (value for batch in arrow_batches(path, ["frame"], NOT_FRAMES) for value in batch.column("frame"))
    for n, value in enumerate(values):
        start, end = Fraction(n) / source_fps, Fraction(n + 1) / source_fps
        yield Shown(start, end, lambda n=n, value=value: _decode_row(value, f"{path}: row {n}"))
    if n is None:
        raise ProspectError("holds no rows", where=str(path), remedy="copy it again")


def arrow_batches(path: Path, columns: Sequence[str], remedy: str) -> Iterator:
    """The file's record batches, which have these columns; it is memory-mapped, so that pieces are read when used.

    Raises ProspectError when the file cannot be read, or lacks a column: then with this remedy.
    """
    pyarrow = _optional("pyarrow", "Arrow files")
    try:
        with pyarrow.memory_map(str(path)) as file:
            # With an index at the end. The `datasets` library writes streams, which have none.
            is_file_format = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file_format else pyarrow.ipc.open_stream(file)
            if missing := [name for name in columns if name not in reader.schema.names]:
                what = f"has columns {', '.join(reader.schema.names)[:200]}, none named {missing[0]!r}"
                raise ProspectError(what, where=str(path), remedy=remedy)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file_format else reader
    except (OSError, pyarrow.ArrowException) as error:
        what = f"cannot be read as an Arrow file: {error}"
        raise ProspectError(what, where=str(path), remedy="copy it again") from None


def _decode_row(value: object, where: str) -> Tensor:
    data = value.as_py()
    if not isinstance(data, bytes):
        try:
            data = base64.b64decode(data, validate=True)
        except (TypeError, ValueError, binascii.Error):
            what = "column `frame` is not base64 text"
            raise ProspectError(what, where=where, remedy="copy the file again") from None
    return decode_picture(data, where)


def _optional(package: str, use: str):
    """Import a package of requirements-vision.txt, or report that it is needed for `use`."""
    try:
        return __import__(package)
    except ImportError:
        what = f"{use} need the package {package}, which is not installed"
        raise ProspectError(what, remedy="pip install -r requirements-vision.txt") from None
