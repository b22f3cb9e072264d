"""frames.py and encode.py of prospect/vision/ on videos made here: the right picture for every frame, complete files.

The videos carry their picture numbers in blocks of 8 x 8 pixels, 16 bits, so that no codec blurs them. What is expected
is computed here from the times at which the pictures were put in, never by the code under test.
"""

import base64
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from bisect import bisect_right
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from prospect.embeddings import find_embeddings
from prospect.errors import ProspectError
from prospect.vision import encode
from prospect.vision.encode import ahead, deal
from prospect.vision.frames import Shown, count_frames, frames_at, sample
from prospect.vision.tower import load_vision_encoder

av = pytest.importorskip("av")
pyarrow = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures" / "vision"
SIGLIP, CLIP, SMOLVLM = FIXTURES / "siglip", FIXTURES / "clip", FIXTURES / "smolvlm"
WIDTH, HEIGHT = 64, 16  # 8 x 2 blocks: the 16 bits of the picture's number
CYCLE = 1024  # the long videos begin to count anew after so many pictures, 17 seconds and more
TICKS = 60_000  # time base of the test videos: 24, 25, 29.97 (2002 ticks) and 60 pictures a second are whole numbers


def drawn(number: int) -> np.ndarray:
    """Picture `number` as YUV 4:2:0, [24, 64]: its bits in black and white, no colour."""
    bits = np.array([number >> i & 1 for i in range(16)], np.uint8).reshape(2, 8)
    luma = np.kron(16 + 219 * bits, np.ones((8, 8), np.uint8))
    return np.concatenate([luma, np.full((8, 64), 128, np.uint8)])


def number_of(picture: torch.Tensor) -> int:
    """The number that is drawn in a picture, uint8 [3, 16, 64]."""
    assert picture.dtype == torch.uint8 and picture.shape == (3, HEIGHT, WIDTH)
    bits = picture.float().mean(0).view(2, 8, 8, 8).mean((1, 3)).flatten() > 128
    return sum(1 << i for i in range(16) if bits[i])


def write_video(
    path: Path,
    ticks: list[int],
    sound: bool = False,
    numbers: list[int] | None = None,
    options: dict | None = None,
    codec_options: dict | None = None,
) -> Path:
    """An MPEG-4 video whose picture i is shown from ticks[i] / TICKS seconds on."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25), options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        stream.codec_context.thread_count = 1
        if sound:
            track = container.add_stream("aac", rate=16000)
            for i in range(8):
                block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                block.sample_rate, block.pts = 16000, 1024 * i
                container.mux(track.encode(block))
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(drawn(i if numbers is None else numbers[i]), format="yuv420p")
            frame.pts, frame.time_base = tick, Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            container.mux(track.encode())
    return path


@cache
def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.stack([drawn(number)[:HEIGHT]] * 3, axis=-1)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_long_video(path: Path, ticks: list[int]) -> Path:
    """The same as motion JPEG, put together from ready pictures (ten minutes are many); drawn is i modulo CYCLE."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "mjpeg", rate=Fraction(TICKS * len(ticks), ticks[-1] - ticks[0]).limit_denominator(1001)
        )
        stream.width, stream.height, stream.pix_fmt, stream.time_base = WIDTH, HEIGHT, "yuvj420p", Fraction(1, TICKS)
        for i, tick in enumerate(ticks):
            packet = av.Packet(jpeg(i % CYCLE))
            packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = (
                stream,
                tick,
                tick,
                Fraction(1, TICKS),
                True,
            )
            packet.duration = (ticks[i + 1] if i + 1 < len(ticks) else 2 * tick - ticks[i - 1]) - tick
            container.mux(packet)
    return path


def even(rate: Fraction, seconds: int) -> list[int]:
    return [round(i * TICKS / rate) for i in range(int(rate * seconds))]


def numbers(path: Path, fps: str = "2", **more: object) -> list[int]:
    """The numbers drawn in frames 0, 1, ... of a source; the frame numbers themselves are checked on the way."""
    frames = list(frames_at(path, Fraction(fps), **more))
    assert [k for k, _ in frames] == list(range(len(frames)))
    return [number_of(picture) for _, picture in frames]


# ---- Which picture is frame k --------------------------------------------------------------------


def test_the_drawing_at_the_top_of_frames():
    shown = [Shown(Fraction(a, 1000), Fraction(b, 1000), name) for name, a, b in
             [("A", 0, 40), ("B", 40, 90), ("C", 90, 130), ("D", 130, 260), ("E", 260, 300)]]  # fmt: skip
    assert [(k, picture.load) for k, picture in sample(shown, Fraction(10))] == [(0, "A"), (1, "C"), (2, "D")]


def test_a_picture_that_begins_exactly_at_k_over_fps_is_frame_k():
    shown = [Shown(Fraction(n, 2), Fraction(n + 1, 2), n) for n in range(4)]
    assert [picture.load for _, picture in sample(shown, Fraction(2))] == [0, 1, 2, 3]
    assert [picture.load for _, picture in sample(shown, Fraction(4))] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [picture.load for _, picture in sample(shown, Fraction(1))] == [0, 2]
    one = [Shown(Fraction(0), Fraction(0), "only")]  # a file that does not say how long its last picture is shown
    assert [(k, picture.load) for k, picture in sample(one, Fraction(2))] == [(0, "only")]


@pytest.mark.parametrize("rate", [
    "30000/1001", *(pytest.param(rate, marks=pytest.mark.slow) for rate in ("24", "25", "60")),
])  # fmt: skip
def test_ten_minutes_without_drift(tmp_path, rate):
    rate = Fraction(rate)
    path = write_long_video(tmp_path / "even.mp4", even(rate, 600))
    # Picture n is shown at n / rate, so at k / 2 the last one is number floor(k / 2 * rate).
    assert numbers(path) == [k * rate.numerator // (2 * rate.denominator) % CYCLE for k in range(1200)]
    assert count_frames(path, Fraction(2)) == 1200


def test_ten_minutes_of_variable_rate_that_begin_late(tmp_path):
    random = np.random.default_rng(0)
    ticks = np.cumsum(np.concatenate([[7321], random.integers(TICKS // 120, TICKS // 8, 9000)])).tolist()
    path = write_long_video(tmp_path / "variable.mp4", ticks)
    end = 2 * ticks[-1] - ticks[-2] - ticks[0]  # the last picture is shown as long as the one before it
    assert 580 < end / TICKS < 620
    # Time 0 is the first picture, though the file's own clock then says 7321 ticks.
    wanted = [(bisect_right(ticks, ticks[0] + tick) - 1) % CYCLE for tick in range(0, end, TICKS // 2)]
    assert numbers(path) == wanted


def test_pictures_that_are_stored_out_of_order(tmp_path):
    """Codecs store a picture after the later ones that it is predicted from (B pictures)."""
    path = write_video(tmp_path / "b.mp4", even(Fraction(25), 10), codec_options={"bf": "2"})
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(container.streams.video[0]) if packet.pts is not None]
    assert stored != sorted(stored)
    assert numbers(path) == [k * 25 // 2 for k in range(20)]


def test_frames_more_often_than_pictures_and_less(tmp_path):
    path = write_video(tmp_path / "slow.mp4", [0, 60_000, 240_000])  # shown at 0, 1 and 4 seconds, the last for 3
    assert numbers(path)[:9] == [0, 0, 1, 1, 1, 1, 1, 1, 2]
    assert numbers(path, "1/3")[:2] == [0, 1]
    assert [k for k, _ in frames_at(path, Fraction(2), first=5)][:2] == [5, 6]


def test_matroska_rounds_its_clock_to_milliseconds_and_is_believed(tmp_path):
    path = write_video(tmp_path / "video.mkv", even(Fraction(30000, 1001), 10))
    rounded = [(2 * n * 1001 + 30) // 60 for n in range(299)]  # n * 1001 / 30 milliseconds, halves upwards
    assert numbers(path) == [bisect_right(rounded, 500 * k) - 1 for k in range(20)]
    assert count_frames(path, Fraction(2)) == 20


# ---- Videos as they come -------------------------------------------------------------------------


def test_rotated_phone_videos(tmp_path):
    """The matrix in the track header turns the picture: all eight ways to turn and mirror, by the formula."""
    path = write_video(tmp_path / "upright.mp4", even(Fraction(25), 1), numbers=[0b1001] * 25)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    upright = next(frames_at(path, Fraction(2)))[1]
    for a, b, c, d in [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ]:
        one = 1 << 16
        data[place : place + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
        turned = tmp_path / "turned.mp4"
        turned.write_bytes(data)
        # Pixel (x, y) goes to (a x + c y, b x + d y), shifted so that the smallest coordinates are 0.
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
        to_x, to_y = a * x + c * y, b * x + d * y
        expected = np.zeros((3, np.ptp(to_y) + 1, np.ptp(to_x) + 1), np.uint8)
        expected[:, to_y - to_y.min(), to_x - to_x.min()] = upright.numpy()
        assert np.array_equal(next(frames_at(turned, Fraction(2)))[1].numpy(), expected), (a, b, c, d)
    # The ordinary phone: held upright, stored lying. Its first row (bits 1 0 0 1) is the last column, from the top.
    assert upright[0, 4, 4] > 128 and expected.shape == (3, 64, 16)


@pytest.mark.parametrize("sound", [False, True])
def test_with_and_without_sound(tmp_path, sound):
    assert numbers(write_video(tmp_path / "video.mp4", even(Fraction(25), 3), sound=sound)) == [0, 12, 25, 37, 50, 62]


def test_cut_off_empty_and_other_files_say_what_is_wrong(tmp_path):
    ticks = even(Fraction(25), 20)
    whole = write_video(tmp_path / "whole.mp4", ticks).read_bytes()
    index_first = write_video(tmp_path / "first.mp4", ticks, options={"movflags": "+faststart"}).read_bytes()
    matroska = write_video(tmp_path / "whole.mkv", ticks).read_bytes()
    only_sound = tmp_path / "sound.m4a"
    with av.open(str(only_sound), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=16000)
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.sample_rate, block.pts = 16000, 0
        container.mux(track.encode(block))
        container.mux(track.encode())
    cases = {
        "cut.mp4": (whole[: len(whole) // 2], "cannot be opened as a video.*lost the index"),
        "early.mp4": (index_first[: len(index_first) // 2], r"(ends at|is damaged at) \d+\.\d\d s"),
        "cut.mkv": (matroska[: len(matroska) // 2], r"ends at \d+\.\d\d s of the 20\.00 s"),
        "empty.mp4": (b"", "the file is empty"),
        "text.mp4": (b"hello", "cannot be opened as a video"),
        "sound.mp4": (only_sound.read_bytes(), "holds no video, only other streams"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ProspectError, match=message) as caught:
            list(frames_at(tmp_path / name, Fraction(2)))
        assert name in str(caught.value)
    with pytest.raises(ProspectError, match="No such file"):
        list(frames_at(tmp_path / "absent.mp4", Fraction(2)))


# ---- Directories and Arrow files -----------------------------------------------------------------


def save_picture(path: Path, number: int) -> None:
    luma = drawn(number)[:HEIGHT]
    Image.fromarray(np.stack([luma] * 3, axis=-1)).save(path)


def test_a_directory_with_gaps(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in (10, 11, 14, 9):  # sorted as text, 9 would come last
        save_picture(folder / f"cam2_frame{n}.png", n)
    (folder / "notes.txt").write_text("not a picture")
    assert numbers(folder) == [9, 10, 11, 11, 11, 14]
    assert "2 of 6 numbers are missing, the first is 12" in capsys.readouterr().err
    assert numbers(folder, "1", source_fps=Fraction(3)) == [9, 11]  # 0 s and 1 s: numbers 9 and 12, which is missing
    assert count_frames(folder, Fraction(2)) == 6


def test_directories_that_cannot_be_read(tmp_path):
    with pytest.raises(ProspectError, match="holds no pictures"):
        list(frames_at(tmp_path, Fraction(2)))
    save_picture(tmp_path / "a1.png", 1)
    (tmp_path / "b2.jpg").write_bytes(b"half a picture")
    with pytest.raises(ProspectError, match="b2.jpg.*is not a complete picture"):
        list(frames_at(tmp_path, Fraction(2)))
    save_picture(tmp_path / "c01.png", 1)
    with pytest.raises(ProspectError, match="'a1.png' and 'c01.png' have the same number"):
        list(frames_at(tmp_path, Fraction(2)))
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(ProspectError, match="'a.png' has no number"):
        list(frames_at(tmp_path, Fraction(2)))


def test_a_picture_is_turned_as_its_exif_note_says(tmp_path):
    luma = np.zeros((8, 16), np.uint8)
    luma[:, 8:] = 255  # right half white
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn a quarter clockwise to view": right becomes bottom
    Image.fromarray(luma).save(tmp_path / "1.png", exif=exif)
    picture = next(frames_at(tmp_path, Fraction(2)))[1]
    assert picture.shape == (3, 16, 8) and picture[0, :8].max() == 0 and picture[0, 8:].min() == 255


def write_arrow(path: Path, rows: list[object], column: str = "frame", as_file: bool = False) -> Path:
    table = pyarrow.table({column: rows})
    new = pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def as_base64(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def test_arrow_files_of_proassist(tmp_path):
    rows = [as_base64(n) for n in (5, 6, 7, 8, 9)]
    assert numbers(write_arrow(tmp_path / "stream.arrow", rows)) == [5, 6, 7, 8, 9]
    assert numbers(write_arrow(tmp_path / "file.arrow", rows, as_file=True)) == [5, 6, 7, 8, 9]
    assert numbers(write_arrow(tmp_path / "bytes.arrow", [jpeg(5), jpeg(6)])) == [5, 6]
    assert numbers(tmp_path / "stream.arrow", "1", source_fps=Fraction(2)) == [5, 7, 9]
    assert count_frames(tmp_path / "stream.arrow", Fraction(1), Fraction(2)) == 3

    with pytest.raises(ProspectError, match="has columns cls, none named 'frame'"):
        list(frames_at(write_arrow(tmp_path / "features.arrow", rows, column="cls"), Fraction(2)))
    with pytest.raises(ProspectError, match="row 1.*not base64"):
        list(frames_at(write_arrow(tmp_path / "bad.arrow", [rows[0], "???"]), Fraction(2)))
    with pytest.raises(ProspectError, match="row 0.*not base64"):
        list(frames_at(write_arrow(tmp_path / "null.arrow", [None, rows[0]]), Fraction(2)))
    with pytest.raises(ProspectError, match="holds no rows"):
        list(frames_at(write_arrow(tmp_path / "none.arrow", pyarrow.array([], pyarrow.string())), Fraction(2)))
    data = (tmp_path / "stream.arrow").read_bytes()
    for name, content in (
        ("cut.arrow", data[: len(data) // 2]),
        ("empty.arrow", b""),
        ("text.arrow", b"hello, world, hello"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProspectError, match=f"{name}.*cannot be read as an Arrow file"):
            list(frames_at(tmp_path / name, Fraction(2)))


# ---- Embeddings ----------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return encode.main([str(argument) for argument in arguments])


def test_rows_are_the_frames_in_every_format(tmp_path):
    video = write_video(tmp_path / "kitchen.mp4", even(Fraction(25), 4))
    # The rows by another way: the pictures that the video was made from, one by one.
    encoder = load_vision_encoder(SIGLIP)
    pictures = [picture for _, picture in frames_at(video, Fraction(2))]
    expected = torch.cat([encoder([picture])[0] for picture in pictures]).half().numpy()  # [8, 32]
    for ending in ("npy", "pkl", "safetensors"):
        out = tmp_path / ending
        assert run(video, "--vision", SIGLIP, "--out", out, "--format", ending, "--batch-size", 3) == 0
        path = out / f"kitchen_embeddings.{ending}"
        assert sorted(p.name for p in out.iterdir()) == sorted([path.name, "kitchen_embeddings.json"])
        if ending == "npy":
            rows = np.load(path)
        elif ending == "pkl":
            rows = pickle.loads(path.read_bytes())
        else:
            from safetensors.numpy import load_file

            rows = load_file(path)["embeddings"]
        assert type(rows) is np.ndarray and rows.dtype == np.float16 and rows.shape == (8, 32)
        np.testing.assert_allclose(rows.astype(np.float32), expected.astype(np.float32), atol=2e-3)
    assert len({row.tobytes() for row in rows}) == 8  # every picture its own row
    facts = json.loads((out / "kitchen_embeddings.json").read_text())
    wanted = {
        "model": "siglip",
        "revision": None,
        "fps": "2",
        "pool": "pooled",
        "vectors_per_frame": 1,
        "width": 32,
        "rows": 8,
    }
    assert wanted.items() <= facts.items() and facts["source"] == "kitchen.mp4" and len(facts["weights_sha256"]) == 64


@pytest.mark.parametrize("vision, options, shape", [
    (SIGLIP, ["--tokens", 5], (6, 5, 32)), (SIGLIP, ["--tokens", 10], (6, 10, 32)), (SMOLVLM, [], (6, 20)),
    (CLIP, ["--tokens", 26], (6, 26, 24)), (CLIP, ["--pool", "projected"], (6, 20)),
    (SMOLVLM, ["--pool", "all"], (6, 4, 20)), (SMOLVLM, ["--pool", "top-left-tile"], (6, 20)),
])  # fmt: skip
def test_shapes_of_the_poolings(tmp_path, vision, options, shape):
    video = write_video(tmp_path / "v.mp4", even(Fraction(25), 3))
    assert run(video, "--vision", vision, "--out", tmp_path / "out", *options) == 0
    assert np.load(tmp_path / "out" / "v_embeddings.npy").shape == shape


def test_stopped_and_started_again(tmp_path, monkeypatch):
    video, out = write_video(tmp_path / "v.mp4", even(Fraction(25), 5)), tmp_path / "out"
    command = (video, "--vision", SIGLIP, "--out", out, "--batch-size", 2)
    assert run(video, "--vision", SIGLIP, "--out", tmp_path / "at-once", "--batch-size", 2) == 0

    seen: list[int] = []
    whole_batch = encode.encode_batch

    def stops_in_the_third_batch(encoder, pictures, precision):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.extend(number_of(picture) for picture in pictures)
        return whole_batch(encoder, pictures, precision)

    monkeypatch.setattr(encode, "encode_batch", stops_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    left = list(out.iterdir())
    assert (
        len(left) == 1 and left[0].name.startswith(".v.mp4.") and left[0].name.endswith(".writing")
    )  # nothing half written to be read
    with open(left[0], "ab") as file:
        file.write(b"half a row")

    def counts(encoder, pictures, precision):
        seen.extend(number_of(picture) for picture in pictures)
        return whole_batch(encoder, pictures, precision)

    monkeypatch.setattr(encode, "encode_batch", counts)
    assert run(*command) == 0
    assert seen == [k * 25 // 2 for k in range(10)]  # every frame once
    rows = np.load(out / "v_embeddings.npy")
    assert np.array_equal(rows, np.load(tmp_path / "at-once" / "v_embeddings.npy"))
    assert sorted(path.name for path in out.iterdir()) == ["v_embeddings.json", "v_embeddings.npy"]

    assert run(*command) == 0 and len(seen) == 10  # done: nothing is encoded again
    with pytest.raises(ProspectError, match=r"made with other settings \(fps, source_fps\)"):
        run(*command, "--fps", 1)
    (out / "v_embeddings.json").unlink()
    with pytest.raises(ProspectError, match="how it was made is not known"):
        run(*command)


def test_broken_sources_are_reported_and_the_others_done(tmp_path, capsys):
    good = write_video(tmp_path / "good.mp4", even(Fraction(25), 2))
    cut = tmp_path / "cut.mkv"
    data = write_video(tmp_path / "whole.mkv", even(Fraction(25), 20)).read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    empty = tmp_path / "empty.mp4"
    empty.touch()
    out = tmp_path / "out"
    assert run(cut, empty, good, "--vision", SIGLIP, "--out", out) == 2
    captured = capsys.readouterr()
    assert "empty.mp4: the file is empty" in captured.err and "cut.mkv: ends at" in captured.err
    assert "1 of 3 sources" in captured.out
    assert sorted(path.name for path in out.iterdir()) == ["good_embeddings.json", "good_embeddings.npy"]


def test_values_that_float16_cannot_hold(tmp_path, monkeypatch, capsys):
    video = write_video(tmp_path / "v.mp4", even(Fraction(25), 2))
    whole_batch = encode.encode_batch

    def overflows(encoder, pictures, precision):
        rows = whole_batch(encoder, pictures, precision)
        rows[1, 0, 3] = np.inf
        return rows

    monkeypatch.setattr(encode, "encode_batch", overflows)
    assert run(video, "--vision", SIGLIP, "--out", tmp_path / "out") == 2
    assert "frame 1 gives a vector that is not finite" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_one_file_for_each_clip(tmp_path):
    arrow = write_arrow(tmp_path / "nusar_7.arrow", [as_base64(n) for n in range(12)])
    video = write_video(tmp_path / "kitchen.mp4", even(Fraction(25), 6))
    clips = [
        {"id": "one", "video_uid": "kitchen", "start_frame_idx": 2, "end_frame_idx": 5},
        {"video_uid": "kitchen", "clip_idx": 1, "start_frame_idx": 6, "end_frame_idx": 12},  # its end is exclusive
        {"video_uid": "assembly_nusar_7", "clip_idx": 0, "start_frame_idx": 0, "end_frame_idx": 3},
        {
            "video_uid": "x",
            "clip_idx": 0,
            "frames_file": "frames/nusar_7.arrow",
            "start_frame_idx": 8,
            "end_frame_idx": 8,
        },
        {"video_uid": "another", "start_frame_idx": 0, "end_frame_idx": 3},
    ]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, clips)))
    for source in (arrow, video):
        assert run(source, "--vision", SIGLIP, "--out", tmp_path / "whole") == 0
    kitchen, nusar = (np.load(tmp_path / "whole" / f"{name}_embeddings.npy") for name in ("kitchen", "nusar_7"))
    out = tmp_path / "out"
    assert run(arrow, video, "--vision", SIGLIP, "--out", out, "--clips", tmp_path / "clips.jsonl") == 0
    wanted = {"one": kitchen[2:6], "kitchen_1": kitchen[6:12], "assembly_nusar_7_0": nusar[0:4], "x_0": nusar[8:9]}
    assert sorted(path.name for path in out.glob("*.npy")) == sorted(f"{name}_embeddings.npy" for name in wanted)
    for name, rows in wanted.items():
        assert np.array_equal(np.load(out / f"{name}_embeddings.npy"), rows), name
    assert json.loads((out / "one_embeddings.json").read_text())["first_frame"] == 2

    clips[0]["end_frame_idx"] = 13
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, clips)))
    with pytest.raises(ProspectError, match=r"one_embeddings.npy.*other settings \(rows\)"):
        run(video, "--vision", SIGLIP, "--out", out, "--clips", tmp_path / "clips.jsonl")
    assert run(video, "--vision", SIGLIP, "--out", tmp_path / "out2", "--clips", tmp_path / "clips.jsonl") == 2
    clips[1]["id"] = "one"
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, clips)))
    with pytest.raises(ProspectError, match="two clips have this id"):
        run(video, "--vision", SIGLIP, "--out", tmp_path / "out3", "--clips", tmp_path / "clips.jsonl")


def test_clips_that_name_their_file_share_it(tmp_path, capsys):
    """Converted dialogues of one video over the same frames name one file: it is written once, and found."""
    video = write_video(tmp_path / "kitchen.mp4", even(Fraction(25), 6))
    other = write_video(tmp_path / "unused.mp4", even(Fraction(25), 2))
    named = {"video_uid": "kitchen", "start_frame_idx": 2, "end_frame_idx": 5, "embeddings": "sub/kitchen_2_5.npy"}
    clips = [named | {"id": "one"}, named | {"id": "two"}]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    command = [video, other, "--vision", SIGLIP, "--clips", tmp_path / "clips.json", "--format", "pkl", "--out"]
    assert run(*command, tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "unused.mp4 (1 sources)" in printed.err
    assert printed.out.endswith(f"next:\npython -m prospect.check {tmp_path}/clips.json --embeddings {tmp_path}/out\n")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["kitchen_2_5.json", "kitchen_2_5.npy"]
    for clip in clips:
        assert len(np.load(find_embeddings(clip["id"], tmp_path / "out", clip["embeddings"]))) == 4

    wrong = {
        "frames of its own": ([clips[0], clips[1] | {"end_frame_idx": 6}], "have different frames"),
        "outside": ([named | {"embeddings": "../a.npy"}], "cannot be written as '../a.npy'"),
        "no known ending": ([named | {"embeddings": "a.arrow"}], "cannot be written as 'a.arrow'"),
        "not text": ([named | {"embeddings": 5}], "or its `embeddings`, cannot be written"),
        "of no video": ([named | {"video_uid": "x"}], "no clip of"),
    }
    for clips, said in wrong.values():
        (tmp_path / "clips.json").write_text(json.dumps(clips))
        with pytest.raises(ProspectError, match=said):
            run(*command, tmp_path / "out2")


def test_two_sources_of_one_name(tmp_path):
    with pytest.raises(ProspectError, match="would be written to the same file"):
        run(tmp_path / "a" / "v.mp4", tmp_path / "b" / "v.mkv", "--vision", SIGLIP, "--out", tmp_path)


def test_sources_are_dealt_by_length():
    # Longest first, to whom has least: 9 | 7; 5 to the second (12), 4 to the first (13), 3 to the second (15), 2 first.
    assert deal([2, 9, 5, 7, 4, 3], 2) == [[1, 4, 0], [3, 2, 5]]
    assert deal([], 2) == [[], []] and deal([0, 0], 3) == [[0, 1], [], []]


def test_decoding_runs_ahead_and_its_errors_arrive_in_order():
    def three_and_an_error():
        yield from (1, 2, 3)
        raise ProspectError("broken")

    seen = []
    with pytest.raises(ProspectError, match="broken"):
        for item in ahead(three_and_an_error(), size=1):
            seen.append(item)
    assert seen == [1, 2, 3]
    assert list(ahead(iter([1, 2, 3]), size=2)) == [1, 2, 3]
    endless = ahead(iter(int, 1), size=1)
    assert next(endless) == 0
    endless.close()  # returns: the thread is told to stop


@pytest.mark.slow
def test_the_command_on_two_processes(tmp_path):
    """torchrun: the sources are shared out, and a broken one ends neither the other process nor the other sources."""
    videos = [
        write_video(tmp_path / f"v{i}.mp4", even(Fraction(25), seconds)) for i, seconds in enumerate((6, 1, 2, 3))
    ]
    cut = tmp_path / "cut.mkv"
    data = write_video(tmp_path / "whole.mkv", even(Fraction(25), 20)).read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "prospect.encode",
    ]
    sources = [str(path) for path in (*videos, cut)]
    result = subprocess.run(
        [*launcher, *sources, "--vision", str(SIGLIP), "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert "5 to encode (64 frames) on 2 x cpu in fp32" in result.stdout and "4 of 5 sources" in result.stdout, (
        result.stderr
    )
    assert f"left out: {cut}: ends at" in result.stderr
    assert [len(np.load(out / f"v{i}_embeddings.npy")) for i in range(4)] == [12, 2, 4, 6]


def test_the_command_ends_with_one_line(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "prospect.encode",
        "v.mp4",
        "--vision",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "config.json: cannot be read" in result.stderr
    assert not (tmp_path / "out").exists()
