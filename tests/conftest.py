"""What the data tests share: a tokenizer whose ids can be read by eye, and clips written in a few lines.

The tokenizer has one token for every byte and no merges, and the token of byte b has the id b. So the ids of any text
are simply its UTF-8 bytes, and tables of expected tokens can be written by hand.
"""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from prospect.clip_files import parse_clip
from prospect.clips import Clip
from prospect.config import DataConfig
from prospect.sequence import Sample, lay_out, make_sample, plan_windows
from prospect.tokenizer import Tokenizer

SPECIAL = ["<pad>", "<eos>", "<image>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
PAD, EOS, IMAGE, IM_START, IM_END, BEGIN, START_HEADER, END_HEADER, EOT = range(256, 256 + len(SPECIAL))
SYSTEM = "You are a helpful and proactive assistant."  # the prompt of a clip without a system turn


def byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte: printable ones as they are, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _one_thread_and_usual_signals():
    """The loop takes SIGTERM and SIGINT for itself: give them back. One thread: sums are then added in one order."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


one_thread_and_usual_signals = pytest.fixture(_one_thread_and_usual_signals)  # around each test that names it
one_thread_in_module = pytest.fixture(_one_thread_and_usual_signals, scope="module")  # around a file's fixtures too


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    backend = Backend(models.BPE(vocab={letter: b for b, letter in enumerate(byte_letters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    directory = tmp_path_factory.mktemp("byte_tokenizer")
    backend.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def plain(tokenizer_dir) -> Tokenizer:
    return Tokenizer(tokenizer_dir, "plain")


@pytest.fixture(scope="session")
def chatml(tokenizer_dir) -> Tokenizer:
    return Tokenizer(tokenizer_dir, "chatml")


@pytest.fixture(scope="session")
def llama3(tokenizer_dir) -> Tokenizer:
    return Tokenizer(tokenizer_dir, "llama3")


def raw_clip(turns: list[tuple], start: int, end: int, *, steps: int = 2, **fields) -> dict:
    """A clip's JSON object. turns: (role, content, start_frame, end_frame); the steps are S1 "one", S2 "two", ..."""
    names = ["one", "two", "three", "four", "five", "six"]
    return {
        "id": "clip",
        "fps": 2,
        "start_frame_idx": start,
        "end_frame_idx": end,
        "conversation": [
            {"role": role, "content": content, "start_frame": first, "end_frame": last}
            for role, content, first, last in turns
        ],
        "dst": [{"id": f"S{i + 1}", "name": names[i]} for i in range(steps)],
        **fields,
    }


def read(raw: dict) -> Clip:
    clip, problems = parse_clip(raw, "clips.json", 0)
    assert clip is not None, problems
    return clip


def frame_rows(clip: Clip, per_frame: int = 1) -> np.ndarray:
    """Embeddings [rows, I, 2] that say which frame, and which of its vectors, they are."""
    rows = np.zeros((clip.num_frames, per_frame, 2), np.float32)
    rows[:, :, 0] = np.arange(clip.start_frame, clip.end_frame + 1)[:, None]
    rows[:, :, 1] = np.arange(per_frame)
    return rows


def samples_of(
    clip: Clip, tokenizer: Tokenizer, *, rate: float = 0.0, seed: int = 0, epoch: int = 0, per_frame: int = 1, **config
) -> list[Sample]:
    """All windows of a clip, planned and drawn as Corpus does; config: fields of DataConfig."""
    config = DataConfig(**{"max_seq_len": 100_000, **config})
    windows = plan_windows(clip, lay_out(clip, config, rate, seed, epoch), tokenizer, config, per_frame, seed)
    rows = frame_rows(clip, per_frame)
    layouts = [lay_out(clip, config, rate, seed, epoch, window) for window in windows]  # with the epoch's places
    samples = [
        make_sample(clip, layout, window, rows, tokenizer, config)
        for layout, window in zip(layouts, windows, strict=True)
    ]
    assert [len(sample.input_ids) for sample in samples] == [window.num_tokens for window in windows]
    return samples


def sample_of(clip: Clip, tokenizer: Tokenizer, **options) -> Sample:
    [sample] = samples_of(clip, tokenizer, **options)
    return sample
