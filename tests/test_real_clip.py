"""A real clip, learned by heart and streamed back: every turn where it belongs, every update right, nothing else said.

The conversation is a real one (Assembly101). Its frames are not public here, so stand-in embeddings are made from its
task state plus noise. The model learns this one clip by heart from them, so the figures say that data, training and
streaming fit together, and nothing about how well such a model would see.

Streaming may act at any frame of a turn's range, and what follows then stands behind another frame than in the file. A
model that has learned one clip by heart has never seen that, so it is trained on three readings of the clip, in which the
turns act at the first, the second and the last frame of their ranges.
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
    """[259, WIDTH] float16: one random look per task state, which changes where the real clip's state does, plus noise."""
    rng = np.random.default_rng(0)
    looks = rng.standard_normal((len(UPDATES) + 1, WIDTH))
    state_of = np.searchsorted(sorted(UPDATES), np.arange(193, 452), side="right")
    return (looks[state_of] + 0.3 * rng.standard_normal((259, WIDTH))).astype(np.float16)


def readings(clip: dict) -> list[dict]:
    """The clip with its updates and replies ending on the first, second and last frame of their ranges.

    The reply that answers the user, whose text stands at frame 195 in all of them, keeps to that frame.
    """
    found = []
    for late in range(3):
        reading = json.loads(json.dumps(clip)) | {"id": f"reading{late}", "embeddings": EMBEDDINGS}
        for turn in reading["conversation"]:
            if turn["role"] == "assistant" and turn["end_frame"] == 195:
                turn["start_frame"] = 195
            elif turn["role"] in ("assistant", "DST_UPDATE"):
                turn["end_frame"] = turn["start_frame"] + late
        found.append(reading)
    return found


@pytest.mark.skipif(not CLIP.exists(), reason="the real clip is not part of the project")
def test_the_real_clip_learned_by_heart_is_streamed_back(tmp_path):
    (tmp_path / "embeddings").mkdir()
    clip = json.loads(CLIP.read_text())
    np.save(tmp_path / "embeddings" / EMBEDDINGS, stand_in_embeddings())
    (tmp_path / "readings.json").write_text(json.dumps(readings(clip)))
    (tmp_path / "clip.json").write_text(json.dumps(clip | {"embeddings": EMBEDDINGS}))
    settings = [
        f"run.out={tmp_path}", "run.name=real", f"data.train={tmp_path / 'readings.json'}", f"data.val={tmp_path / 'clip.json'}",
        "data.sample=null", f"model.vision_dim={WIDTH}", "model.hidden_size=96", "model.intermediate_size=256", "model.num_hidden_layers=2",
        "data.neg_frame_sampling_rate=1.0", "train.max_steps=200", "train.eval_every=200", "train.learning_rate=3e-3",
    ]  # fmt: skip
    train = [sys.executable, "train.py", "config.yaml", *settings]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True, timeout=300)
    records = tmp_path / "records.jsonl"
    infer = [
        sys.executable,
        "infer.py",
        "--clip",
        str(tmp_path / "clip.json"),
        "--checkpoint",
        str(tmp_path / "real" / "last"),
        "--out",
        str(records),
    ]
    subprocess.run(infer, cwd=ROOT, check=True, capture_output=True, timeout=120)
    records = [json.loads(line) for line in records.read_text().splitlines()]

    assert [record["frame_idx"] for record in records] == list(range(193, 452))
    check_events(
        {r["frame_idx"]: r["dst_update"] for r in records if r["dst_update"]},
        UPDATES,
        lambda said, wanted: said == wanted,
    )
    check_events(
        {r["frame_idx"]: r["text"] for r in records if r["text"]}, REPLIES, lambda said, wanted: said.startswith(wanted)
    )
    assert not any(record["invalid_update"] for record in records)
    assert records[-1]["dst_state"] == {f"S{n}": "completed" for n in range(1, 7)}


def check_events(said: dict[int, str], wanted: dict[int, str], same) -> None:
    """One for one, in order, each within +-1 s (2 frames) and saying the same."""
    assert len(said) == len(wanted), f"{said} for {wanted}"
    for (frame, text), (due, reference) in zip(sorted(said.items()), sorted(wanted.items())):
        assert abs(frame - due) <= 2 and same(text, reference), f"{frame}: {text!r} for {due}: {reference!r}"
