"""Every recipe of docs/extend.md, applied to a copy of the repository as the page has it: a tiny model is trained with
it, and streamed. What a recipe changes is written on the page alone; here stands only how its effect is seen."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import write_tiny_config, write_tiny_corpus

ROOT = Path(__file__).parent.parent
BACKBONES = ROOT / "tests" / "fixtures" / "backbones"
INTRODUCTION, *SECTIONS = (ROOT / "docs" / "extend.md").read_text().split("\n## ")
RECIPES = {title: text for title, _, text in (section.partition("\n") for section in SECTIONS)}

# train.py with the settings given, then its checkpoint streamed and scored, all by the copy in this folder.
DRIVE = """
import runpy, sys
import torch
torch.set_num_threads(1)
folder, *settings = sys.argv[1:]
for name, *arguments in (
    ["train.py", f"{folder}/config.yaml", *settings],
    ["prospect.evaluate", "--checkpoint", f"{folder}/runs/tiny/last", "--data", f"{folder}/val.json",
     "--out", f"{folder}/evaluation"],
):
    sys.argv = [name, *arguments]
    try:
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
"""


def hunks(recipe: str) -> list[tuple[str, str, str]]:
    """(file, what stands there, what is to stand there) of every hunk of a recipe."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", recipe, re.DOTALL):
        for of_file in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            file, _, lines = of_file.partition("\n")
            for hunk in re.split(r"^@@\n", lines, flags=re.MULTILINE):
                old, new = (
                    "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in kept) for kept in (" -", " +")
                )
                found.append((file, old, new))
    return found


def apply(recipe: str, copy: Path) -> None:
    for file, old, new in hunks(recipe):
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{file} has this {text.count(old)} times:\n{old}"
        (copy / file).write_text(text.replace(old, new))
        compile((copy / file).read_text(), file, "exec")


def size(recipe: str) -> tuple[int, int]:
    """Files that a recipe touches, and lines that it adds."""
    lines = [line for block in re.findall(r"```diff\n(.*?)```", recipe, re.DOTALL) for line in block.splitlines()]
    return len({file for file, _, _ in hunks(recipe)}), sum(line.startswith("+") for line in lines)


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in ("train.py", "infer.py", "config.yaml"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    shutil.copytree(ROOT / "prospect", tmp_path / "copy" / "prospect", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_fits_the_code_as_it_is(title, copy):
    apply(RECIPES[title], copy)
    assert hunks(RECIPES[title]) or "```python" in RECIPES[title]


def test_the_table_counts_files_and_lines_of_every_recipe():
    rows = re.findall(r"^\| (?:and )?(.*?) \|.*\| (\d+), (\d+) \|$", INTRODUCTION, re.MULTILINE)
    listed = [(int(files), int(lines)) for _, files, lines in rows]
    head, *others = map(size, RECIPES.values())
    assert [tuple(map(sum, zip(*listed[:2]))), *listed[2:]] == [head, *others]
    assert all(files <= 3 for files, _ in listed)


def run(recipe: str, copy: Path, *settings: str, name: str = "run") -> tuple[list[dict], list[dict], dict]:
    """Lines of metrics.jsonl, records of all clips and numbers, of a run with a recipe and the settings it names."""
    apply(recipe, copy)
    folder = copy.parent / name
    folder.mkdir()
    write_tiny_corpus(folder, clips=4)
    for script in re.findall(r"```python\n(.*?)```", recipe, re.DOTALL):
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    write_tiny_config(folder, "train.max_steps=2", "train.warmup_steps=0", "train.eval_every=2", "train.save_every=2")
    named = re.findall(r"`([a-z]+\.\w+=\w+)`", recipe)  # the page's own settings
    command = [sys.executable, "-c", DRIVE, str(folder), *named, *settings]
    environment = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    records = [
        json.loads(line)
        for path in sorted((folder / "evaluation" / "records").glob("*"))
        for line in path.read_text().splitlines()
    ]
    return log, records, json.loads((folder / "evaluation" / "metrics.json").read_text())["results"]


def backbone(folder: Path, name: str, **changes) -> str:
    """A tiny published model in a folder, with fields of its config.json changed; as a setting."""
    shutil.copytree(BACKBONES / name, folder / "backbone")
    path = folder / "backbone" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return f"model.backbone={folder / 'backbone'}"


@pytest.mark.slow
def test_a_third_decision_head(copy):
    log, records, _ = run(RECIPES["A third decision head"], copy)
    steps = [line for line in log if "lr" in line]
    labels = [line["counts"]["busy_pos"] + line["counts"]["busy_neg"] for line in steps]
    assert sum(labels) > 0 and all((line["busy"] > 0) == (count > 0) for line, count in zip(steps, labels))
    assert log[-1]["evaluation"]["loss_busy"] > 0
    assert "busy_head.weight" in load_file(copy.parent / "run/runs/tiny/last/prospect.safetensors")
    probabilities = {record["busy_prob"] for record in records}
    assert len(probabilities) > 10 and all(0 < probability < 1 for probability in probabilities)


@pytest.mark.slow
def test_another_loss(copy):
    plain, poly = run("", copy, name="plain")[0], run(RECIPES["Another loss"], copy)[0]
    for term in ("speaking_binary", "dst_binary"):
        # In the first step both runs have the same model. 1 - p is added, and 1 - e^-x is concave.
        before, after = plain[0][term], poly[0][term]
        assert before + 0.2 < after <= before + 1 - math.exp(-before), term


@pytest.mark.slow
def test_another_template(copy):
    _, records, _ = run(RECIPES["Another template"], copy, backbone(copy.parent, "smollm2"), "train.tune=lora")
    assert records


@pytest.mark.slow
def test_another_context_strategy(copy):
    settings = ("data.max_seq_len=300", "infer.evidence=0.2")
    _, records, _ = run(RECIPES["Another context strategy"], copy, *settings)
    events = [record["context_event"] for record in records if record["context_event"] is not None]
    assert events and {event["strategy"] for event in events} == {"drop_with_dst"}
    assert all(event["tokens_after"] < event["tokens_before"] for event in events)


@pytest.mark.slow
def test_another_backbone(copy):
    renamed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    setting = backbone(copy.parent, "llama-3", **renamed)
    _, records, _ = run(RECIPES["Another backbone"], copy, setting, "train.tune=lora", "data.template=llama3")
    assert records


@pytest.mark.slow
def test_own_vision_features(copy):
    _, records, _ = run(RECIPES["Your own vision features"], copy)
    quiet = ("text", "dst_update", "context_event")
    grown = {
        b["context_tokens"] - a["context_tokens"]
        for a, b in zip(records, records[1:])
        if a["clip_id"] == b["clip_id"] and not b["user"] and all(b[key] is None for key in quiet)
    }
    assert grown == {5}


@pytest.mark.slow
def test_a_metric(copy):
    _, records, results = run(RECIPES["A metric"], copy, "infer.evidence=0.2")
    [numbers] = [found for name, found in results.items() if name != "macro"]
    assert numbers["words"] == sum(len(record["text"].split()) for record in records if record["text"] is not None) > 0
