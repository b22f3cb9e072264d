"""A clip as it is trained on, token by token (drawn by tokens.js). prospect.show --html writes this page."""

from dataclasses import asdict, dataclass
from pathlib import Path

from prospect.dst import STATES
from prospect.model import IGNORE
from prospect.report.page import LOSS_NAMES, write_page
from prospect.sequence import LABEL_KEYS, Sample
from prospect.tokenizer import Tokenizer


@dataclass
class TokenTable:
    """A training sequence of T tokens. Every list has T entries.

    starts: the character of the sequence's text at which each token starts. frames: the absolute number of the frame
    that an <image> belongs to, None elsewhere. labels: by LABEL_KEYS, None where nothing is learned.
    """

    clip_id: str
    ids: list[int]
    texts: list[str]
    starts: list[int]
    frames: list[int | None]
    labels: dict[str, list[int | None]]


@dataclass
class Setting:
    """All sequences of one clip under one configuration, and how many labels of each class they carry."""

    title: str
    sequences: list[TokenTable]
    counts: dict[str, int]


def token_table(sample: Sample, tokenizer: Tokenizer) -> TokenTable:
    """A training sample for the page. Of a frame's several <image> tokens the last is the one that is decided at."""
    ids, starts = tokenizer.encode_pieces(sample.formatted.pieces)  # as make_sample encodes it
    per_frame = len(sample.image_embeds) // max(1, len(sample.frames))
    frames: list[int | None] = [None] * len(ids)
    for position, frame in zip(sample.decision_positions.tolist(), sample.frames.tolist()):
        for earlier in range(per_frame):
            frames[position - earlier] = frame
    labels = {key: [None if v == IGNORE else v for v in sample.labels[key].tolist()] for key in LABEL_KEYS}
    texts = {id: tokenizer.decode([id]) for id in set(ids.tolist())}
    return TokenTable(sample.clip_id, ids.tolist(), [texts[id] for id in ids.tolist()], starts.tolist(), frames, labels)


def write_settings(path: str | Path, title: str, settings: list[Setting]) -> None:
    """One page; two settings are shown side by side."""
    names = dict(zip(LABEL_KEYS, LOSS_NAMES.values()))
    shown = [asdict(setting) for setting in settings]
    write_page(path, "tokens", title, {"states": STATES, "labelNames": names, "settings": shown})
