"""Steps from a recipe and a dialogue: which turns name which steps, by hand, and what is reported as not found."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import raw_clip

from prospect.convert.steps import Report, clips_with_steps, first_turns, recipe_steps, turn_similarity
from prospect.errors import ProspectError
from prospect.text_metrics import load_similarity

REAL = Path(__file__).parents[2] / "shared" / "data"
LEXICAL = load_similarity("lexical")
RECIPE = "Making tea\n1. Boil the water\n 2) Pour it over the tea\n3. Add some sugar\nThen drink it."


def steps_of(tmp_path, turns, **fields) -> tuple[list[dict], Report]:
    (tmp_path / "clips.json").write_text(json.dumps([raw_clip(turns, 0, 99, dst=[], **fields)]))
    report = Report()
    [made] = clips_with_steps(tmp_path / "clips.json", None, LEXICAL, 0.3, report)
    return made["dst"], report


def test_the_numbered_lines_of_a_recipe_are_its_steps():
    assert recipe_steps(RECIPE) == ["Boil the water", "Pour it over the tea", "Add some sugar"]


def test_steps_start_when_they_are_named_and_end_when_the_next_starts(tmp_path):
    turns = [
        ("assistant", "Hello! What a fine day.", 2, 2),
        ("assistant", "First, boil the water.", 10, 12),
        ("user", "Pour it over the tea?", 20, 20),  # a user names a step: that starts none
        ("assistant", "Not yet. Keep the water on the stove.", 20, 21),
        ("assistant", "It boils! Now pour it over the tea.", 40, 41),
        ("assistant", "Well done.", 60, 60),
    ]
    found, report = steps_of(tmp_path, turns, inferred_knowledge=RECIPE)
    # Two frames a second: the turns end at 6, 20.5 and 30 s.
    assert found == [
        {"type": "step", "id": "S1", "name": "Boil the water", "start_ts": 6.0, "end_ts": 20.5},
        {"type": "step", "id": "S2", "name": "Pour it over the tea", "start_ts": 20.5, "end_ts": 30.0},
    ]
    line = f"{tmp_path}/clips.json, clip clip: no turn names 3. Add some sugar"
    assert str(report) == f"{line}\n1 clips: 2 of 3 steps are named by a turn"


def test_a_last_step_that_begins_with_the_last_turn_has_no_end(tmp_path):
    found, _ = steps_of(tmp_path, [("assistant", "Boil the water.", 10, 10)], inferred_knowledge=RECIPE)
    assert [(step["id"], step["start_ts"], step["end_ts"]) for step in found] == [("S1", 5.0, None)]


def test_turns_go_to_steps_in_order_for_the_largest_sum():
    similarity = np.array([[0.9, 0.0, 0.0], [0.5, 0.6, 0.9], [0.0, 0.8, 0.0], [0.2, 0.2, 0.7]])
    # Turn 1 is most like step 2, but then turn 2 could not be step 1: 0.9 + 0.6 + 0.8 + 0.7 is more.
    assert first_turns(similarity, 0.3) == [0, 1, 3]
    # From 0.75 on only 0.15 + 0.15 (step 2) or 0.15 + 0.05 (step 1) are left: step 1 is not named.
    assert first_turns(similarity, 0.75) == [0, None, 1]


def test_a_turn_that_holds_a_steps_words_names_it():
    [row] = turn_similarity(
        ["Great. So now, please, boil the WATER, and then wait for it."], ["Boil the water", "Wait"], LEXICAL
    )
    assert row[0] == 1.0 and row[1] == 1.0
    [row] = turn_similarity(["Boil the waters."], ["Boil the water"], LEXICAL)
    assert 0.3 < row[0] < 1.0


def test_clips_with_steps_and_without_a_recipe(tmp_path):
    clips = [raw_clip([("assistant", "Add sugar", 5, 5)], 0, 9, id=id, steps=n) for id, n in (("a", 2), ("b", 0))]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    report = Report()
    assert list(clips_with_steps(tmp_path / "clips.json", None, LEXICAL, 0.3, report))[0] == clips[0]
    assert "clip b: no recipe" in str(report) and str(report).endswith("; 1 clips have steps already and keep them")
    (tmp_path / "recipe.txt").write_text("1. Add some sugar")
    _, made = clips_with_steps(tmp_path / "clips.json", tmp_path / "recipe.txt", LEXICAL, 0.3, Report())
    assert [step["name"] for step in made["dst"]] == ["Add some sugar"]
    (tmp_path / "recipe.txt").write_text("Add some sugar")
    with pytest.raises(ProspectError, match="has no numbered line"):
        list(clips_with_steps(tmp_path / "clips.json", tmp_path / "recipe.txt", LEXICAL, 0.3, Report()))


@pytest.mark.skipif(not REAL.exists(), reason="the real clip is not part of the project")
def test_what_it_finds_in_a_real_dialogue(tmp_path):
    """Its steps truly start at 97.2, 106.8, 152.1, 185.0, 197.9 and 212.3 s. Four are found, S2 ten seconds early."""
    clip = json.loads((REAL / "assembly101_clip.json").read_text()) | {"dst": []}
    clip["conversation"] = [turn for turn in clip["conversation"] if turn["role"] != "DST_UPDATE"]
    (tmp_path / "clips.json").write_text(json.dumps(clip))
    [made] = clips_with_steps(tmp_path / "clips.json", None, LEXICAL, 0.3, Report())
    found = {step["id"]: step["start_ts"] for step in made["dst"]}
    assert found == pytest.approx({"S2": 97.2, "S3": 152.1, "S4": 185.0, "S5": 197.9}, abs=0.5)
