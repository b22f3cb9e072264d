"""Updates: written, read back, checked and applied, against values written by hand."""

import pytest

from prospect.dst import Transition, UpdateError, apply_update, legal_updates, parse_update, write_update

COMPLETE_1, START_2 = Transition("S1", "complete"), Transition("S2", "start")
STATE = {"S1": "in_progress", "S2": "not_started", "S3": "completed"}


@pytest.mark.parametrize(
    "dst_format, transitions, text",
    [
        ("arrow", [COMPLETE_1], "S1->complete"),
        ("arrow", [COMPLETE_1, START_2], "S1->complete, S2->start"),
        ("arrow", [Transition("étape 漢", "start")], "étape 漢->start"),
        ("json", [COMPLETE_1], '[{"id": "S1", "transition": "complete"}]'),
        (
            "json",
            [COMPLETE_1, START_2],
            '[{"id": "S1", "transition": "complete"}, {"id": "S2", "transition": "start"}]',
        ),
        ("json", [Transition('a "b"', "start")], '[{"id": "a \\"b\\"", "transition": "start"}]'),
    ],
)
def test_writes_and_reads_back(dst_format, transitions, text):
    assert write_update(transitions, dst_format) == text
    assert parse_update(text, dst_format) == transitions


def test_spaces_are_forgiven():
    assert parse_update(" S1 -> complete ,S2->start", "arrow") == [COMPLETE_1, START_2]


@pytest.mark.parametrize("text", ["", "S1", "->start", "S1->", "S1->start,", "S1 start", "S1->start; S2->start", ","])
def test_refuses_what_is_no_arrow_update(text):
    with pytest.raises(UpdateError):
        parse_update(text, "arrow")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        "null",
        '"S1"',
        '["S1"]',
        "[null]",
        "[[]]",
        '[{"id": "S1"}]',
        '[{"transition": "start"}]',
        '[{"id": 1, "transition": "start"}]',
        '[{"id": "S1", "transition": ["start"]}]',
        '[{"id": "S1", "transition": "start", "why": "so"}]',
        '[{"id": "S1", "transition": "start"}',
        "S1->start",
        "[" * 5000,
    ],
)
def test_refuses_what_is_no_json_update(text):
    with pytest.raises(UpdateError):
        parse_update(text, "json")


def test_applies_in_order_and_leaves_its_input_alone():
    state = dict(STATE)
    after = apply_update(state, [COMPLETE_1, START_2, Transition("S2", "complete")])
    assert after == {"S1": "completed", "S2": "completed", "S3": "completed"}
    assert state == STATE


@pytest.mark.parametrize(
    "transition, says",
    [
        (Transition("S9", "start"), "unknown step 'S9'"),
        (Transition("S1", "pause"), "unknown transition 'pause'"),
        (Transition("S1", "start"), "cannot start S1, which is in_progress"),
        (Transition("S2", "complete"), "cannot complete S2, which is not_started"),
        (Transition("S3", "start"), "cannot start S3, which is completed"),
        (Transition("S3", "complete"), "cannot complete S3, which is completed"),
    ],
)
def test_an_illegal_update_is_refused_whole(transition, says):
    state = dict(STATE)
    with pytest.raises(UpdateError, match=says):
        apply_update(state, [COMPLETE_1, transition] if transition.id != "S1" else [transition])
    assert state == STATE


def test_legal_updates():
    assert legal_updates(STATE) == [COMPLETE_1, START_2]
    assert legal_updates({"S3": "completed"}) == []
