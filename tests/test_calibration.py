"""Reliability by hand, and labels of streamed frames as training would give them."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip, read
from tiny import tiny_clip

from prospect.calibration import Calibration, calibration, streamed_labels
from prospect.clips import Clip
from prospect.config import DataConfig
from prospect.sequence import frame_labels, text_places

DOC = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_example_of_the_document():
    p = np.array([0.05, 0.05, 0.05, 0.05, 0.65, 0.65, 0.9, 0.95, 0.5])
    labels = np.array([0, 0, 0, 0, 1, 0, 1, 1, -100])
    found = calibration(p, labels)
    assert f"ECE = {found.error:.5f}." in DOC and re.search("ECE = 0.08125", DOC)
    assert found.curve() == [pytest.approx(row) for row in ((0.05, 0.0, 4), (0.65, 0.5, 2), (0.925, 1.0, 2))]


def test_a_certain_head_falls_into_the_last_bin_and_nothing_is_no_error():
    assert calibration(np.array([1.0, 0.0]), np.array([1, 0])).frames == (1, *[0] * 8, 1)
    assert Calibration().error == 0.0 and Calibration().curve() == []


@pytest.mark.parametrize("seed", range(10))
def test_random_cases_by_a_plain_loop(seed):
    draw = np.random.default_rng(seed)
    parts = [(draw.random(n), draw.integers(-1, 2, n)) for n in draw.integers(1, 60, 3)]
    parts = [(p, np.where(labels < 0, -100, labels)) for p, labels in parts]
    found = sum((calibration(*part) for part in parts), Calibration())
    p, labels = (np.concatenate(pooled) for pooled in zip(*parts))
    error, kept = 0.0, int((labels >= 0).sum())
    for b in range(10):
        inside = [i for i in range(len(p)) if labels[i] >= 0 and b / 10 <= p[i] < (b + 1) / 10]
        if inside:
            confidence, share = np.mean([p[i] for i in inside]), np.mean([labels[i] for i in inside])
            error += len(inside) / kept * abs(confidence - share)
    assert found.error == pytest.approx(error)


# ---- labels of streamed frames -------------------------------------------------------------------


def trained_labels(clip: Clip, role: str, data: DataConfig) -> np.ndarray:
    """Those of training with every text at the end of its range."""
    frames = np.arange(clip.start_frame, clip.end_frame + 1)
    places = text_places(clip, data, frames, None, frames[:0])
    return frame_labels(clip, data, places, 1.0, 0, 0)[role == "DST_UPDATE"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("role", ["assistant", "DST_UPDATE"])
def test_who_writes_at_the_end_of_every_range_has_the_labels_of_training(seed, role):
    draw = np.random.default_rng(seed)
    clip = read(tiny_clip(draw, "clip", 30 + seed, replies=4, words=2))
    written = [last - clip.start_frame for _, last in clip.events(role)]
    expected = trained_labels(clip, role, DataConfig())
    assert (streamed_labels(clip, role, written, DataConfig()) == expected).all() and expected.sum() > 0
    assert (streamed_labels(clip, role, [], DataConfig()) == expected).all()  # due until the end


def test_once_it_is_said_it_is_due_no_longer():
    clip = read(raw_clip([("assistant", "one", 10, 14)], 8, 20))  # may stand from its middle, frame 12, on
    row = 12 - 8
    expected = {(): [4, 5, 6], (row,): [4], (5, 6): [4, 5], (3, 5): [], (1, 11): [4, 5, 6]}  # written -> positive rows
    for written, positive in expected.items():
        labels = streamed_labels(clip, "assistant", list(written), DataConfig())
        assert np.flatnonzero(labels).tolist() == positive, written


def test_an_answer_is_not_due_before_the_question():
    clip = read(raw_clip([("user", "what?", 10, 14), ("assistant", "one", 10, 14)], 8, 20))
    assert np.flatnonzero(streamed_labels(clip, "assistant", [], DataConfig())).tolist() == [6]
