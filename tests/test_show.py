"""The table that shows the labels, and its counts against those that the training loop logs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_config, write_tiny_corpus

from prospect import show
from prospect.config import load_config
from prospect.data import epoch_batches
from prospect.model import LOSS_CLASSES

ROOT = Path(__file__).parent.parent


def run_show(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["show", *map(str, arguments)])
    show.main()
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path)
    return tmp_path


def test_the_table_of_a_clip_written_by_hand(folder, monkeypatch, capsys):
    """Three frames: the user speaks before the last, the assistant answers there, in plain sight."""
    clip = {
        "id": "hand", "start_frame_idx": 7, "end_frame_idx": 9, "conversation": [
            {"role": "user", "content": "Hi", "start_frame": 9, "end_frame": 9},
            {"role": "assistant", "content": "Yes", "start_frame": 9, "end_frame": 9},
        ],
    }  # fmt: skip
    (folder / "hand.json").write_text(json.dumps(clip))
    import numpy as np

    np.save(folder / "embeddings" / "hand.npy", np.ones((3, 16), np.float32))
    config = write_tiny_config(folder, "data.neg_frame_sampling_rate=1.0")
    printed = run_show(monkeypatch, capsys, config, "--clip", folder / "hand.json:hand", "--all")
    lines = [line.split() for line in printed.splitlines() if "<image>" in line]
    # position, token, frame, time at 2 fps, then speaking, dst_update and dst_state where they are labelled
    expected = [["f7", "3.5s", "0", "0", "0"], ["f8", "4.0s", "0", "0", "0"], ["f9", "4.5s", "1", "0", "0"]]
    assert [line[2:] for line in lines] == expected
    assert printed.startswith("\nhand: frames 7..9 of video hand, 3.5 to 4.5 s; ")
    answered = next(i for i, line in enumerate(printed.splitlines()) if " f9 " in line)
    assert (
        printed.splitlines()[answered + 1].split()[1] == printed.splitlines()[answered + 1].split()[2]
    )  # learned as it stands


def test_a_clip_is_found_whose_file_and_id_hold_colons(folder, monkeypatch, capsys):
    clips = json.loads((folder / "train.json").read_text())
    clips[1] |= {"id": "kitchen:12:a", "embeddings": f"{clips[1]['id']}_embeddings.npy"}
    assert (folder / "embeddings" / clips[1]["embeddings"]).exists()
    (folder / "a:b.json").write_text(json.dumps(clips))
    config = write_tiny_config(folder)
    for name, shown in (("kitchen:12:a", "kitchen:12:a"), ("1", "kitchen:12:a"), ("0", clips[0]["id"])):
        printed = run_show(monkeypatch, capsys, config, "--clip", f"{folder}/a:b.json:{name}")
        assert printed.startswith(f"\n{shown}: ")
    assert run_show(monkeypatch, capsys, config, "--clip", f"{folder}/a:b.json").startswith(f"\n{clips[0]['id']}: ")


def test_counts_are_those_that_training_logs(folder, monkeypatch, capsys):
    """One epoch of training, every step logged: its label counts add up to what show prints for the epoch."""
    config_file = write_tiny_config(folder)
    printed = run_show(monkeypatch, capsys, config_file)
    shown = printed.splitlines()[-1].removeprefix("labels of one epoch:").split()
    shown = {name: int(count) for name, count in zip(shown[::2], shown[1::2])}

    config = load_config(config_file)
    corpus, _, _ = show.open_corpus(config, None, "train")
    steps = len(epoch_batches(corpus.lengths(), config.data.batch_tokens, config.run.seed, 0))
    command = [sys.executable, "train.py", str(config_file), f"train.max_steps={steps}", "train.log_every=1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    log = [
        json.loads(line) for line in (Path(config.run.out) / config.run.name / "metrics.jsonl").read_text().splitlines()
    ]
    logged = {name: sum(line["counts"][name] for line in log if "counts" in line) for name in LOSS_CLASSES}
    assert shown == logged
    assert shown["speaking_pos"] > 0 and shown["dst_gen"] > 0


def test_a_row_takes_the_colour_of_what_is_learned():
    def colour(*labels: str) -> str:
        return show.TokenRow("0", "x", "", "", *labels).colour()

    assert colour("x", "", "", "", "") == show.GREEN and colour("", "1", "", "1", "0") == show.GREEN
    assert colour("", "", "x", "", "") == show.BLUE and colour("", "0", "", "1", "0") == show.BLUE
    assert colour("", "0", "", "0", "0") == show.DIM
