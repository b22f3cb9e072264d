"""Our templates against the families' own chat templates, rendered by transformers (templates.json, written by
make_backbone_fixtures.py), and the tokens of a backbone's tokenizer."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from prospect.errors import ProspectError
from prospect.model import Prospect
from prospect.tokenizer import Piece, Tokenizer, make_template
from prospect.weights import load_model

BACKBONES = Path(__file__).parent / "fixtures" / "backbones"
RENDERED = json.loads((BACKBONES / "templates.json").read_text(encoding="utf-8"))
FOLDERS = {"chatml": "smollm2", "llama3": "llama-3", "smolvlm": "smolvlm2", "qwen2.5": "qwen2.5"}  # by family
TEMPLATES = {"qwen2.5": "chatml"}  # of a family that has not given its template its name
NO_THOUGHT = "<think>\n\n</think>\n\n"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's, which ours leaves out


def pieces_of(template, chat: list) -> list[Piece]:
    """A chat as data.py writes it: bos, and each turn with what follows it."""
    begin = [Piece(template.bos, control=True)] if template.bos else []
    return begin + [piece for role, text in chat for piece in template.turn(role, text) + template.suffix()]


def written(pieces: list[Piece]) -> str:
    return "".join(piece.text * piece.repeat for piece in pieces)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("case", range(3))
def test_chats_are_written_byte_for_byte_as_the_family_writes_them(name, case):
    template, expected = make_template(TEMPLATES.get(name, name), "", ""), RENDERED[name][case]
    pieces = pieces_of(template, expected["chat"])
    assert written(pieces).encode() == expected["text"].encode()
    assert (written(pieces) + written(template.header("assistant"))).encode() == expected[
        "with_generation_prompt"
    ].encode()


@pytest.mark.parametrize("case", range(3))
def test_llama_3_1_differs_in_its_two_dates_alone(case):
    expected = RENDERED["llama3.1"][case]
    assert expected["text"].count(DATES) == 1
    assert written(pieces_of(make_template("llama3", "", ""), expected["chat"])) == expected["text"].replace(DATES, "")


@pytest.mark.parametrize("case", range(3))
def test_qwen_3_differs_in_an_empty_thought_before_the_last_answer_alone(case):
    expected = RENDERED["qwen3"][case]
    ends_with_an_answer = expected["chat"][-1][0] == "assistant"
    assert expected["text"].count(NO_THOUGHT) == ends_with_an_answer == (case != 1)
    ours = written(pieces_of(make_template("chatml", "", ""), expected["chat"]))
    assert ours == expected["text"].replace(NO_THOUGHT, "")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("case", range(2))  # the third chat has texts that begin with white space and a forged <image>
def test_chats_become_the_tokens_that_the_familys_tokenizer_gives(name, case):
    directory, expected = BACKBONES / FOLDERS[name], RENDERED[name][case]
    tokenizer = Tokenizer(directory, TEMPLATES.get(name, name))
    theirs = Backend.from_file(str(directory / "tokenizer.json")).encode(expected["text"], add_special_tokens=False).ids
    assert tokenizer.encode(pieces_of(tokenizer.template, expected["chat"])) == theirs


@pytest.mark.parametrize(
    "text", ["Schritt 12: die Ra\u0308der!\n\nDann  weiter.", "e\u0301 \u1112\u1161\u11ab", "it's\t10x"]
)
def test_qwen_texts_are_normalized_and_split_as_qwens_tokenizer_does(text):
    """A combining mark becomes part of its letter (NFC), and every token still knows at which character it starts."""
    tokenizer = Tokenizer(BACKBONES / "qwen2.5", "chatml")
    theirs = Backend.from_file(str(BACKBONES / "qwen2.5" / "tokenizer.json")).encode(text, add_special_tokens=False)
    ids, starts = tokenizer.encode_pieces([Piece("ab"), Piece(text), Piece("<|im_end|>", control=True)])
    assert ids[2:-1].tolist() == theirs.ids and ids[-1] == 274
    assert tokenizer.decode(ids[2:-1]) == unicodedata.normalize("NFC", text)
    assert starts[2:].tolist() == [2 + begin for begin, _ in theirs.offsets] + [2 + len(text)]
    pieces = [text[begin:end] for begin, end in theirs.offsets]
    assert all(unicodedata.combining(piece[0]) == 0 for piece in pieces)


def test_qwen_control_tokens_and_the_padded_vocabulary():
    # ids: 272 of text, then <|endoftext|>, <|im_start|>, <|im_end|>, two that are not special; the model has 288 rows
    tokenizer = Tokenizer(BACKBONES / "qwen2.5", "chatml")
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.image_id) == (274, 272, 277)
    tokenizer.check_vocabulary(288)
    said = tokenizer.encode([Piece("<tool_call><|im_end|><image>")])
    assert max(said) < 272 and tokenizer.decode(said) == "<tool_call><|im_end|><image>"


def test_end_and_pad_tokens_by_template():
    # ids: 288 in all, the control tokens of each fixture last, in the order of make_backbone_fixtures.py
    chatml, llama3, smolvlm = (Tokenizer(BACKBONES / FOLDERS[name], name) for name in ("chatml", "llama3", "smolvlm"))
    assert (chatml.end_id, chatml.pad_id) == (287, 287)  # <|im_end|>, which pads too
    assert (llama3.end_id, llama3.pad_id) == (286, 286)  # <|eot_id|>, not <|end_of_text|>
    assert (smolvlm.end_id, smolvlm.pad_id) == (287, 285)  # <end_of_utterance>, padded with <|im_end|>


def test_image_is_found_or_added_behind_the_vocabulary():
    assert Tokenizer(BACKBONES / "smolvlm2", "smolvlm").image_id == 286  # SmolVLM2 has one
    tokenizer = Tokenizer(BACKBONES / "llama-3", "llama3")
    assert tokenizer.image_id == 288  # one more than the LM head knows
    model: Prospect = load_model(BACKBONES / "llama-3", vision_dim=16, image_token_id=tokenizer.image_id)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (288, 32)


@pytest.mark.parametrize("name, folder", [("llama3", "smollm2"), ("chatml", "llama-3"), ("smolvlm", "smollm2")])
def test_a_template_of_another_family_is_refused(name, folder):
    with pytest.raises(ProspectError, match=f"data.template={name} needs"):
        Tokenizer(BACKBONES / folder, name)


def test_plain_begins_with_bos_where_the_tokenizer_does(tmp_path):
    assert Tokenizer(BACKBONES / "smollm2", "plain").template.bos == ""  # names a bos token, but puts it nowhere
    shutil.copytree(BACKBONES / "llama-3", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    begin = "<|begin_of_text|>"  # as Llama 3's own tokenizer.json has it
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [283], "tokens": [begin]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path, "plain")
    assert tokenizer.template.bos == begin
    ids = tokenizer.encode(pieces_of(tokenizer.template, [("user", "hi")]))
    assert ids[0] == 283 and ids[-1] == 286 and ids.count(283) == 1


def test_every_family_has_a_header_for_updates():
    names = ("plain", "smolvlm", "chatml", "llama3")
    assert [written(make_template(name, "", "").header("DST_UPDATE")) for name in names] == [
        "[DST_UPDATE]",
        "[DST_UPDATE]",
        "<|im_start|>DST_UPDATE\n",
        "<|start_header_id|>DST_UPDATE<|end_header_id|>\n\n",
    ]
