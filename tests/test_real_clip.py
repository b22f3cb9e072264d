"""A real clip, learned by heart and streamed back: every turn where it belongs, every update right, nothing else said.

The conversation is a real one (Assembly101). Its frames are not public here, so stand-in embeddings are made from its
task state plus noise. The model learns this one clip by heart from them, so the figures say that data, training and
streaming fit together, and nothing about how well such a model would see.

It is trained on the clip alone, as it is, with the default settings and a smaller model.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CLIP = ROOT.parent / "shared" / "data" / "assembly101_clip.json"
WIDTH = 64
EMBEDDINGS = "stand_in.npy"

# Written by hand from the file: the decision frame (end_frame) of each turn, and what stands there.
UPDATES = {
    195: "S1->start",
    214: "S1->complete, S2->start",
    305: "S2->complete, S3->start",
    371: "S3->complete, S4->start",
    396: "S4->complete, S5->start",
    425: "S5->complete, S6->start",
    451: "S6->complete",
}
REPLIES = {
    195: "Great! Let's get started.",
    214: "Now, let's screw the chassis together.",
    226: "Next, attach the wheels",
    262: "Great job on the first wheel!",
    305: "Now, let's attach the roller to the arm.",
    371: "Great progress!",
    396: "Now, let's attach the cabin window",
    425: "Almost done!",
}


def stand_in_embeddings() -> np.ndarray:
    """[259, WIDTH] float16: a random look per task state, changing where the real clip's state does, plus noise."""
    rng = np.random.default_rng(0)
    looks = rng.standard_normal((len(UPDATES) + 1, WIDTH))
    state_of = np.searchsorted(sorted(UPDATES), np.arange(193, 452), side="right")
    return (looks[state_of] + 0.3 * rng.standard_normal((259, WIDTH))).astype(np.float16)


@pytest.mark.skipif(not CLIP.exists(), reason="the real clip is not part of the project")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_real_clip_learned_by_heart_is_streamed_back(tmp_path, seed):
    (tmp_path / "embeddings").mkdir()
    np.save(tmp_path / "embeddings" / EMBEDDINGS, stand_in_embeddings())
    clip = tmp_path / "clip.json"
    clip.write_text(json.dumps(json.loads(CLIP.read_text()) | {"embeddings": EMBEDDINGS}))
    settings = [
        f"run.out={tmp_path}", "run.name=real", f"run.seed={seed}", f"data.train={clip}", f"data.val={clip}",
        "data.sample=null", f"model.vision_dim={WIDTH}", "model.hidden_size=96", "model.intermediate_size=256",
        "model.num_hidden_layers=2", "train.max_steps=200", "train.eval_every=200", "data.allow_leaks=true",
    ]  # fmt: skip
    train = [sys.executable, "train.py", "config.yaml", *settings]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True, timeout=300)
    records = tmp_path / "records.jsonl"
    checkpoint = ["--checkpoint", str(tmp_path / "real" / "last"), "--out", str(records)]
    infer = [sys.executable, "infer.py", "--clip", str(clip), *checkpoint]
    subprocess.run(infer, cwd=ROOT, check=True, capture_output=True, timeout=120)
    records = [json.loads(line) for line in records.read_text().splitlines()]

    assert [record["frame_idx"] for record in records] == list(range(193, 452))
    updates = {record["frame_idx"]: record["dst_update"] for record in records if record["dst_update"]}
    check_events(updates, UPDATES, lambda said, wanted: said == wanted)
    replies = {record["frame_idx"]: record["text"] for record in records if record["text"]}
    check_events(replies, REPLIES, lambda said, wanted: said.startswith(wanted))
    assert not any(record["invalid_update"] for record in records)
    assert records[-1]["dst_state"] == {f"S{n}": "completed" for n in range(1, 7)}


def check_events(said: dict[int, str], wanted: dict[int, str], same) -> None:
    """One for one, in order, each within +-1 s (2 frames) and saying the same."""
    assert len(said) == len(wanted), f"{said} for {wanted}"
    for (frame, text), (due, reference) in zip(sorted(said.items()), sorted(wanted.items())):
        assert abs(frame - due) <= 2 and same(text, reference), f"{frame}: {text!r} for {due}: {reference!r}"
