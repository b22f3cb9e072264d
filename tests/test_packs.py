"""Packs: the same bytes back, the same rows and run, and whatever an index says, no file outside."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import VISION_DIM, tiny_config, train_here, write_tiny_corpus

from prospect import check, embeddings, packs
from prospect.build import load_corpus, load_tokenizer
from prospect.embeddings import find_embeddings, read_embeddings
from prospect.errors import ProspectError
from prospect.features import features_of
from prospect.leaks import digest

pytestmark = pytest.mark.usefixtures("one_thread_and_usual_signals")


def call(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["embeddings", *map(str, words)])
    return embeddings.main()


@pytest.fixture
def folder(tmp_path) -> Path:
    """One file of each kind, and what is no embedding file."""
    draw, folder = np.random.default_rng(0), tmp_path / "files"
    (folder / "sub/deep").mkdir(parents=True)
    for name, dtype in (("half", np.float16), ("whole", np.float32), ("double", np.float64), ("big", ">f2")):
        np.save(folder / f"{name}.npy", draw.standard_normal((7, 5)).astype(dtype))
    np.save(folder / "sub/deep/vectors.npy", draw.standard_normal((7, 3, 5)).astype(np.float16))
    np.save(folder / "by column.npy", np.asfortranarray(draw.standard_normal((7, 5)).astype(np.float16)))
    rows = torch.from_numpy(draw.standard_normal((7, 5)).astype(np.float32))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        save_file(
            {"embeddings": rows.to(dtype).clone(), "other": rows.clone()}, folder / f"{str(dtype)[6:]} 漢字.safetensors"
        )
    (folder / "half.json").write_text(json.dumps({"weights_sha256": "abc", "model": "tower", "pool": "mean"}))
    (folder / "notes.txt").write_text("not packed")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unpacking_gives_the_same_bytes_and_reading_the_same_rows(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packs, "PART_SIZE", 700)  # so that there are several parts
    assert call(monkeypatch, "pack", folder, tmp_path / "packed") == 0
    assert capsys.readouterr().out.startswith("packed 10 files, 0.00 GB, into ")
    parts = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert len(parts) > 3 and parts[0] == "pack-00000.bin" and parts[-1] == "pack.index"
    assert call(monkeypatch, "unpack", tmp_path / "packed", tmp_path / "again") == 0
    expected = files_of(folder)
    del expected["notes.txt"]
    assert files_of(tmp_path / "again") == expected
    for name in expected:
        if not name.endswith(".json"):
            alone, packed = read_embeddings(folder / name), read_embeddings(tmp_path / "packed" / name)
            assert packed.dtype == alone.dtype and not packed.flags.writeable
            assert np.array_equal(packed, alone), name
            assert digest(folder / name) == digest(tmp_path / "packed" / name)
    bf16 = read_embeddings(tmp_path / "packed/bfloat16 漢字.safetensors")
    exact = read_embeddings(tmp_path / "packed/float32 漢字.safetensors")
    assert bf16.dtype == np.float32 and np.array_equal(bf16, torch.from_numpy(exact.copy()).bfloat16().float().numpy())


def test_packing_is_the_same_bytes_each_time(folder, tmp_path):
    for name in ("a", "b"):
        packs.pack(folder, tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_file_by_itself_comes_first_and_a_new_pack_is_seen(folder, tmp_path):
    packed = tmp_path / "packed"
    packs.pack(folder, packed)
    assert find_embeddings("half", packed, None) == packed / "half.npy"
    assert find_embeddings("x", packed, "sub/deep/vectors.npy") == packed / "sub/deep/vectors.npy"
    before = packs.stamp(packed / "half.npy")
    assert before[0] == (folder / "half.npy").stat().st_size
    np.save(packed / "whole.npy", np.ones((2, 5), np.float16))
    assert len(read_embeddings(packed / "whole.npy")) == 2
    for path in packed.iterdir():
        path.unlink()
    (folder / "half.npy").unlink()
    packs_again = tmp_path / "other"
    packs.pack(folder, packs_again)
    for path in packs_again.iterdir():
        os.replace(path, packed / path.name)
    with pytest.raises(ProspectError, match="no embeddings at"):
        find_embeddings("half", packed, None)
    assert packs.stamp(packed / "whole.npy") != before and len(read_embeddings(packed / "whole.npy")) == 7


def test_checking_and_training_work_on_a_pack_and_resume_from_files(tmp_path, monkeypatch, capsys):
    write_tiny_corpus(tmp_path)
    assert train_here(tmp_path, "train.max_steps=1", "train.save_every=1") == 0
    packs.pack(tmp_path / "embeddings", tmp_path / "packed")
    where = f"data.embeddings={tmp_path / 'packed'}"
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path / "train.json"), "--embeddings", str(tmp_path / "packed")])
    capsys.readouterr()
    assert (
        check.main() == 0
        and f"12 clips, 236 frames: 0 errors, 0 warnings; embeddings {VISION_DIM}" in capsys.readouterr().out
    )
    tokenizer = load_tokenizer(tiny_config(tmp_path))
    one, other = (load_corpus(tiny_config(tmp_path, *words), tokenizer, "train") for words in ([], [where]))
    assert one.plan.digests == other.plan.digests and one.plan.table.tolist() == other.plan.table.tolist()
    assert features_of([(one.sources[0], c) for c in range(12)]) == features_of(
        [(other.sources[0], c) for c in range(12)]
    )
    (tmp_path / "embeddings").rename(tmp_path / "away")
    assert train_here(tmp_path, "train.max_steps=2", where) == 0  # resumes: the data are the same
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_what_made_the_embeddings_is_read_from_the_pack(folder, tmp_path):
    from prospect.features import made_by

    packs.pack(folder, tmp_path / "packed")
    assert made_by(tmp_path / "packed/half.npy") == {"weights_sha256": "abc", "model": "tower", "pool": "mean"}
    assert made_by(tmp_path / "packed/whole.npy") == {}


def test_what_cannot_be_packed_or_unpacked_is_refused_with_the_remedy(folder, tmp_path):
    with pytest.raises(ProspectError, match="is not a directory"):
        packs.pack(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ProspectError, match="exists and is not an empty directory"):
        packs.pack(folder, folder)
    with pytest.raises(ProspectError, match="is not a pack"):
        packs.unpack(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProspectError, match="there is no .npy or .safetensors file"):
        packs.pack(tmp_path / "empty", tmp_path / "out")
    np.ones((2, 3)).dump(folder / "old.pkl")
    with pytest.raises(ProspectError, match="1 pickles, which cannot be packed") as raised:
        packs.pack(folder, tmp_path / "out")
    assert raised.value.remedy == f"python -m prospect.embeddings convert {folder} NEW, and pack that"
    assert not (tmp_path / "out").exists()


def write_index(packed: Path, *rows: tuple) -> None:
    dtype = [("name", "S20"), ("part", "<u4"), ("offset", "<u8"), ("size", "<u8")]
    with open(packed / "pack.index", "wb") as file:
        np.save(file, np.array(sorted(rows), dtype))


@pytest.mark.parametrize(
    "row, what",
    [
        ((b"a.npy", 0, 0, 10**15), "pack-00000.bin is shorter than its index says (copy the pack again)"),
        ((b"a.npy", 0, 10**15, 100), "pack-00000.bin is shorter than its index says (copy the pack again)"),
        ((b"a.npy", 0, 0, 100), "claims more than the file holds"),
        ((b"a.npy", 7, 0, 100), "cannot be read: No such file"),
        ((b"a.npy", 0, 0, 0), "the file is empty"),
        ((b"a.npy", 0, 64, 10), "broken .npy file"),
        ((b"a.safetensors", 0, 0, 100), "broken .safetensors file"),
        ((b"a.safetensors", 0, 2**64 - 1, 2**64 - 1), "pack-00000.bin is shorter than its index says"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, row, what):
    packed = tmp_path / "packed"
    packed.mkdir()
    np.save(packed / "a.npy", np.ones((3, 5), np.float16))
    (packed / "a.npy").rename(packed / "pack-00000.bin")
    write_index(packed, row)
    with pytest.raises(ProspectError) as raised:
        read_embeddings(packed / row[0].decode())
    assert what in str(raised.value), str(raised.value)


def test_a_pack_holds_no_objects_and_nothing_outside(tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    with open(packed / "pack-00000.bin", "wb") as file:
        np.save(file, np.array([{"an": "object"}], object), allow_pickle=True)
    size = (packed / "pack-00000.bin").stat().st_size
    write_index(packed, (b"a.npy", 0, 0, size), (b"../../b.npy", 0, 0, size))
    with pytest.raises(ProspectError, match="broken .npy file: 'the header claims more than the file holds|object"):
        read_embeddings(packed / "a.npy")
    with pytest.raises(ProspectError, match=r"names a file outside: '../../b.npy'"):
        packs.unpack(packed, tmp_path / "x/y")
    assert not (tmp_path / "b.npy").exists()
    with pytest.raises(ProspectError, match="lie outside"):
        find_embeddings("b", packed, "../../b.npy")
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04" * 30):
        (packed / "pack.index").write_bytes(content)
        os.utime(packed / "pack.index", ns=(1, len(content)))
        with pytest.raises(ProspectError, match="is not the index of a pack.*pack the folder again"):
            find_embeddings("a", packed, None)


def test_a_pack_keeps_no_file_open_but_its_index(folder, tmp_path):
    packed = tmp_path / "packed"
    packs.pack(folder, packed)
    read_embeddings(packed / "half.npy")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_embeddings(packed / "half.npy")[3:4].copy()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupted_pack_is_none(folder, tmp_path, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(packs.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packs.pack(folder, tmp_path / "packed")
    assert list((tmp_path / "packed").iterdir()) == []
