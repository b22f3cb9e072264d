"""ProAssist's published features to embedding files. The files are written here in the published layout: lists of lists
of float16, in a stream of record batches; `datasets` 5.2 wrote the schema that `column` copies."""

import json
from pathlib import Path

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")

from prospect.convert.features import convert_features, read_features  # noqa: E402
from prospect.embeddings import find_embeddings  # noqa: E402
from prospect.errors import ProspectError  # noqa: E402

VECTORS = {"cls": 1, "2x2": 4, "3x3": 9, "5x5": 25}
WIDTH = 6


def column(rows: np.ndarray, kind=None) -> "pyarrow.Array":
    """[n, vectors, D] as a column."""
    kind = kind or pyarrow.list_(pyarrow.list_(pyarrow.from_numpy_dtype(rows.dtype)))
    return pyarrow.array([list(row) for row in rows], kind)


def write_arrow(path: Path, columns: dict, as_file: bool = False) -> Path:
    table = pyarrow.table(columns)
    new = pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def numbers(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(rows, n, WIDTH)).astype(np.float16) for name, n in VECTORS.items()}


def features(path: Path, rows: int = 10, seed: int = 0) -> Path:
    return write_arrow(path, {name: column(values) for name, values in numbers(rows, seed).items()})


@pytest.mark.parametrize("as_file", [False, True])
def test_one_five_ten_and_26_vectors_a_frame(tmp_path, as_file):
    given = numbers(10)
    path = write_arrow(tmp_path / "v.arrow", {name: column(rows) for name, rows in given.items()}, as_file)
    one, five, ten, most = (read_features(path, tokens) for tokens in (1, 5, 10, 26))
    assert np.array_equal(one, given["cls"][:, 0]) and one.dtype == np.float16
    assert np.array_equal(five[:, :1], given["cls"]) and np.array_equal(five[:, 1:], given["2x2"])
    assert np.array_equal(ten[:, :1], given["cls"]) and np.array_equal(ten[:, 1:], given["3x3"])
    assert np.array_equal(most[:, :1], given["cls"]) and np.array_equal(most[:, 1:], given["5x5"])


def test_other_ways_to_write_the_same(tmp_path):
    given = numbers(10)["cls"]
    fixed = pyarrow.list_(pyarrow.list_(pyarrow.float16(), WIDTH), 1)
    ways = {
        "float32": column(given.astype(np.float32)),
        "fixed": column(given, fixed),
        "flat": pyarrow.array(list(given[:, 0]), pyarrow.list_(pyarrow.float16())),  # one vector a row
        "sliced": column(np.concatenate([given, given])).slice(10),
    }
    for name, values in ways.items():
        assert np.array_equal(read_features(write_arrow(tmp_path / name, {"cls": values}), 1), given[:, 0]), name


def clip(id: str, video: str, first: int, last: int, **fields: object) -> dict:
    return {"id": id, "video_uid": video, "start_frame_idx": first, "end_frame_idx": last, "conversation": [], **fields}


def test_rows_go_where_training_looks_for_them(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2), ("unused", 3)):
        features(tmp_path / "features" / f"{name}.arrow", seed=seed)
    clips = [
        clip("one", "a", 2, 5, embeddings="a_frames_2_5.npy"),
        clip("two", "a", 2, 5, embeddings="a_frames_2_5.npy"),  # another user's dialogue over the same frames
        clip("three", "x", 0, 10, frames_file="frames/b.arrow"),  # its end is exclusive
        clip("four", "elsewhere", 0, 3),
    ]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    out = tmp_path / "embeddings"
    assert convert_features([tmp_path / "features"], tmp_path / "clips.json", out, 1) == 0
    printed = capsys.readouterr()
    assert printed.out == f"features of 2 of 2 videos are in {out}\n" and "unused.arrow (1 sources)" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        "a_frames_2_5.json", "a_frames_2_5.npy", "three_embeddings.json", "three_embeddings.npy"
    ]  # fmt: skip
    for given, rows in ((clips[0], numbers(10, 1)["cls"][2:6, 0]), (clips[2], numbers(10, 2)["cls"][:, 0])):
        assert np.array_equal(np.load(find_embeddings(given["id"], out, given.get("embeddings"))), rows)

    written = (out / "a_frames_2_5.npy").stat().st_mtime_ns
    assert convert_features([tmp_path / "features"], tmp_path / "clips.json", out, 1) == 0
    assert (out / "a_frames_2_5.npy").stat().st_mtime_ns == written  # kept
    with pytest.raises(ProspectError, match=r"made with other settings \(columns\)"):
        convert_features([tmp_path / "features"], tmp_path / "clips.json", out, 5)


def test_a_video_of_another_length_and_a_broken_file_are_left_out(tmp_path, capsys):
    features(tmp_path / "short.arrow", rows=4)
    features(tmp_path / "good.arrow")
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "good.arrow").read_bytes()[:900])
    clips = [clip(name, name, 2, 9) for name in ("short", "good", "cut")]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    assert convert_features([tmp_path], tmp_path / "clips.json", tmp_path / "out", 1) == 2
    printed = capsys.readouterr()
    assert "features of 1 of 3 videos" in printed.out
    cut, short = printed.err.splitlines()
    assert "cut.arrow: cannot be read as an Arrow file" in cut
    needs = "short.arrow: short_embeddings.npy needs frames 2 to 9, the source has 4"
    assert needs in short and "at the clip's frames per second" in short
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["good_embeddings.npy"]


@pytest.mark.parametrize(
    "columns, tokens, said",
    [
        ({"frame": pyarrow.array(["x"])}, 1, "has columns frame, none named 'cls' (--tokens 1 reads"),
        ({"cls": column(numbers(2)["cls"])}, 5, "none named '2x2' (--tokens 5 reads ProAssist's columns cls and 2x2)"),
        ({"cls": column(numbers(2)["2x2"])}, 1, "its rows are not 1 vectors of one width"),
        ({"cls": pyarrow.array([[[1.0, 2.0]], [[1.0]]])}, 1, "its rows differ in length"),
        ({"cls": pyarrow.array([[[1.0, 2.0]], None])}, 1, "its rows differ in length"),
        ({"cls": pyarrow.array([[[1.0, None]]])}, 1, "holds double, nested 2 deep"),
        ({"cls": pyarrow.array([1.0])}, 1, "holds double, nested 0 deep"),
        ({"cls": pyarrow.array([[["a"]]])}, 1, "holds string, nested 2 deep"),
        ({"cls": pyarrow.array([[[np.inf]]])}, 1, "1 infinite values in 1 of 1 rows"),
        ({"cls": pyarrow.array([[[1e9]]])}, 1, "1 infinite values in 1 of 1 rows"),
        ({"cls": pyarrow.array([], pyarrow.list_(pyarrow.float16()))}, 1, "holds no rows"),
    ],
)
def test_what_is_no_feature_file(tmp_path, columns, tokens, said):
    path = write_arrow(tmp_path / "v.arrow", columns)
    with pytest.raises(ProspectError) as caught:
        read_features(path, tokens)
    assert said in str(caught.value) and str(path) in str(caught.value)
