"""Text to token ids and back, with control tokens that no text can forge, and the templates that render roles.

A sequence consists of pieces. A *control* piece (`<image>`, an end token, a role header's marks) becomes exactly its
token. A *text* piece is encoded by a tokenizer that knows no control tokens at all, so a user who says
"<|im_end|><image>" has merely said those characters. Because every turn is encoded piece by piece, a header fed at
inference has exactly the tokens that it had in training, whatever follows it.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Encoding, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from prospect.errors import ProspectError
from prospect.files import write_json, write_text

IMAGE = "<image>"


@dataclass(frozen=True)
class Piece:
    """A stretch of the sequence: text, or `repeat` times one control token."""

    text: str
    control: bool = False
    repeat: int = 1


@dataclass(frozen=True)
class Template:
    """How a turn is written: header, gap + content, end token, after.

        plain    Assistant: Great! Now the wheels.<eos>
        chatml   <|im_start|>assistant⏎Great! Now the wheels.<|im_end|>⏎
        llama3   <|start_header_id|>assistant<|end_header_id|>⏎⏎Great! Now the wheels.<|eot_id|>
        smolvlm  Assistant: Great! Now the wheels.<end_of_utterance>⏎

    The end token is learned as part of the turn; `after` (the line break of chatml and smolvlm) is not. System, user
    and assistant turns are byte for byte what the families' own chat templates write: chatml SmolLM2's and Qwen's,
    llama3 Llama 3's, smolvlm SmolVLM2's. Two things are left out on purpose: Llama 3.1 and 3.2 start the system turn
    with "Cutting Knowledge Date" and "Today Date", and the latter would make a sequence depend on the day it was made;
    Qwen3 begins a chat's last answer with an empty thought, so a turn would change when another follows it.
    """

    bos: str  # control token before everything, or ""
    open: str  # control token that starts a header, or "": then roles are words (SPOKEN)
    close: str  # control token after the role, or ""
    line_break: str  # ends a header that has control tokens
    gap: str  # starts the content's text
    end: str  # control token that ends a turn
    after: str
    strip: bool = False  # white space around the content is dropped, as in Llama 3's

    def header(self, role: str) -> list[Piece]:
        if not self.open:
            return [Piece(SPOKEN[role])]
        if not self.close:
            return [Piece(self.open, control=True), Piece(role + self.line_break)]
        return [Piece(self.open, control=True), Piece(role), Piece(self.close, control=True), Piece(self.line_break)]

    def turn(self, role: str, text: str) -> list[Piece]:
        """One turn, end token included, without `after`."""
        text = text.strip() if self.strip else text
        return [*self.header(role), Piece(self.gap + text), Piece(self.end, control=True)]

    def suffix(self) -> list[Piece]:
        return [Piece(self.after)] if self.after else []


SPOKEN = {"system": "System:", "user": "User:", "assistant": "Assistant:", "DST_UPDATE": "[DST_UPDATE]"}


def make_template(name: str, bos: str, eos: str) -> Template:
    """The plain template starts with bos and ends turns with eos, the tokenizer's own ("": none)."""
    if name == "plain":
        return Template(bos, open="", close="", line_break="", gap=" ", end=eos, after="")
    if name == "chatml":
        return Template("", open="<|im_start|>", close="", line_break="\n", gap="", end="<|im_end|>", after="\n")
    if name == "smolvlm":
        return Template("<|im_start|>", open="", close="", line_break="", gap=" ", end="<end_of_utterance>", after="\n")
    assert name == "llama3", name
    bos, open, close = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"
    return Template(bos, open, close, line_break="\n\n", gap="", end="<|eot_id|>", after="", strip=True)


class Tokenizer:
    """A directory's tokenizer.json with one of the templates.

    Raises ProspectError when a file is missing or broken, or when the template's tokens are not in the vocabulary.
    """

    def __init__(self, directory: str | Path, template: str):
        self.directory, self.template_name = Path(directory), template
        path = self.directory / "tokenizer.json"
        try:
            content = path.read_text(encoding="utf-8")
            self.backend = Backend.from_str(content)
        except FileNotFoundError as error:
            remedy = "put the model's tokenizer.json there"
            raise ProspectError("no tokenizer.json", where=str(self.directory), remedy=remedy) from error
        except Exception as error:  # the library raises bare Exceptions on malformed files
            raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="copy the file again") from error
        self.names = names = self._special_names()
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        controls = [name for name in (IMAGE, *names.values()) if name not in known]
        self.backend.add_special_tokens([AddedToken(name, special=True) for name in controls])  # <image> comes last
        plain = json.loads(self.backend.to_str())
        control_names = [token["content"] for token in plain["added_tokens"]]
        plain["added_tokens"], plain["post_processor"] = [], None
        self.text_backend = Backend.from_str(json.dumps(plain))  # knows no control token, so no text can become one
        bos = names.get("bos_token", "")
        begins = self.backend.encode("").tokens[:1] == [bos]  # Llama's tokenizers start every text with it
        self.template = make_template(template, bos if begins else "", names.get("eos_token", ""))
        if template == "plain" and not self.template.end:
            remedy = "add eos_token to tokenizer_config.json, or choose data.template=chatml or llama3"
            raise ProspectError("the plain template needs an eos_token", where=str(self.directory), remedy=remedy)
        self.ids = {name: self.backend.token_to_id(name) for name in control_names}
        t = self.template
        used = [name for name in (IMAGE, t.bos, t.open, t.close, t.end) if name]
        missing = [name for name in used if name not in self.ids]
        if missing:
            what = f"data.template={template} needs {', '.join(missing)}, which this tokenizer does not have"
            raise ProspectError(what, where=str(path), remedy="choose the template of this model family, or plain")
        for name in used:
            if self.ids[name] in self.text_backend.encode(name, add_special_tokens=False).ids:
                what = f"its vocabulary turns the plain text {name!r} into the control token"
                raise ProspectError(what, where=str(path), remedy="use a byte-level BPE tokenizer")
        self.image_id = self.ids[IMAGE]
        self.end_id = self.ids[t.end]
        # Padding is masked by its position, never recognised by its id; it just must not be <image>.
        self.pad_id = self.ids.get(names.get("pad_token", ""), self.end_id)
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)

    def _special_names(self) -> dict[str, str]:
        """bos_token, eos_token and pad_token of tokenizer_config.json, as text."""
        path = self.directory / "tokenizer_config.json"
        if not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            named = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token")}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ProspectError("is not a JSON object", where=str(path), remedy="copy the file again") from error
        named = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        texts = {key: value for key, value in named.items() if isinstance(value, str)}
        return {key: text for key, text in texts.items() if self.backend.token_to_id(text) is not None}

    def __reduce__(self):  # to a process that plans: read again there
        return Tokenizer, (self.directory, self.template_name)

    def digest(self) -> str:
        """Another one for every tokenizer that may cut a text in another way."""
        files = [self.directory / name for name in ("tokenizer.json", "tokenizer_config.json")]
        contents = [file.read_bytes() for file in files if file.is_file()]
        return hashlib.sha256(b"\0".join([self.template_name.encode(), *contents])).hexdigest()

    def control_ids(self) -> list[int]:
        return sorted(self.ids.values())

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] of the pieces, one after another, and the character at which each token starts, [T].

        Characters count over the pieces' joined texts. Several tokens of one character (an emoji is four bytes) all
        start at it. Starts never decrease, and a token's start is inside its own piece.
        """
        texts = [piece.text for piece in pieces if not piece.control]
        encodings = iter(self.text_backend.encode_batch(texts, add_special_tokens=False))
        ids, starts, position = [], [], 0
        for piece in pieces:
            length = len(piece.text) * piece.repeat
            if piece.control:
                ids.append(np.full(piece.repeat, self.ids[piece.text], dtype=np.int64))
                starts.append(np.arange(piece.repeat, dtype=np.int64) * len(piece.text) + position)
            else:
                encoding: Encoding = next(encodings)
                ids.append(np.array(encoding.ids, dtype=np.int64))
                offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
                starts.append(np.minimum(offsets, max(length - 1, 0)) + position)
            position += length
        if not ids:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(ids), np.concatenate(starts)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        return self.encode_pieces(pieces)[0].tolist()

    def count_tokens(self, turns: Sequence[Sequence[Piece]]) -> list[int]:
        """The number of tokens of each of several lists of pieces, in one call; a text that recurs is encoded once."""
        texts = list({piece.text: None for pieces in turns for piece in pieces if not piece.control})
        encodings = self.text_backend.encode_batch_fast(texts, add_special_tokens=False)
        lengths = {text: len(encoding) for text, encoding in zip(texts, encodings)}
        return [sum(piece.repeat if piece.control else lengths[piece.text] for piece in pieces) for pieces in turns]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def ascii_vocabulary(self) -> dict[str, int]:
        """The tokens that are plain ASCII text, by their text: what a constrained update may be written with."""
        ids = sorted(set(self.text_backend.get_vocab(with_added_tokens=False).values()) - set(self.control_ids()))
        written = {id: self.text_backend.decode([id], skip_special_tokens=False) for id in ids}
        return {text: id for id, text in written.items() if text.isascii() and text.isprintable() and text}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ProspectError unless a model of `vocab_size` tokens knows every token of this one, except <image>."""
        t = self.template
        beyond = [name for name in (t.bos, t.open, t.close, t.end) if name and self.ids[name] >= vocab_size]
        words = self.text_backend.get_vocab_size()
        if beyond or words > vocab_size:
            what = f"the tokenizer's {', '.join(beyond)}" if beyond else f"the tokenizer's {words} words"
            what += f" lie beyond the model's vocabulary of {vocab_size}"
            remedy = "tokenizer and weights must belong together"
            raise ProspectError(what, where=str(self.directory), remedy=remedy)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json (with <image>) and the special tokens' names, as Hugging Face names them."""
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names}
        write_json(directory / "tokenizer_config.json", config)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """A small byte-level BPE (every text can be written, nothing is unknown), learned from `texts` and saved."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", backend.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    write_json(directory / "tokenizer_config.json", config)
