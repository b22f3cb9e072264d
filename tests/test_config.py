"""The configuration: every field commented in config.yaml, overrides, and what is refused."""

import ast
import dataclasses
import io
import sys
import tokenize
from pathlib import Path

import pytest
import yaml
from tiny import write_tiny_config, write_tiny_corpus

import train
from prospect.build import model_shape
from prospect.config import Config, HybridConfig, Repeated, apply_overrides, load_config, make_config, to_dict
from prospect.errors import ProspectError

ROOT = Path(__file__).parent.parent
BACKBONES = Path(__file__).parent / "fixtures" / "backbones"


def keys(values: dict, prefix: str = "") -> set[str]:
    return {
        k
        for key, value in values.items()
        for k in (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def test_config_yaml_holds_every_field_and_no_other():
    assert keys(yaml.safe_load((ROOT / "config.yaml").read_text())) == keys(to_dict(Config()))


def test_config_yaml_differs_from_the_defaults_only_for_the_short_run():
    """Five hundred steps on the sample corpus; everything else says what is the default anyway."""
    shipped, default = load_config(ROOT / "config.yaml"), Config()
    default.data.sample, default.train.max_steps = "easy", 500
    default.train.eval_every = default.train.save_every = 125
    assert shipped == default


def comments_in_code() -> dict[str, str]:
    """The comment of every field in config.py by its key: the lines of their own above it, then what is beside it."""
    source = (ROOT / "prospect/config.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.strip("# ") for token in tokens if token.type == tokenize.COMMENT}
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    found = {}

    def read(section: ast.ClassDef, prefix: str) -> None:
        last = section.lineno  # of what came before a field
        for node in section.body:
            if isinstance(node, ast.AnnAssign):
                key, kind = prefix + node.target.id, ast.unparse(node.annotation)
                lines = range(last + 1, node.end_lineno + 1)
                found[key] = " ".join(by_line[line] for line in lines if line in by_line)
                if kind in classes:
                    read(classes[kind], f"{key}.")
            last = node.end_lineno

    read(classes["Config"], "")
    return found


def comments_in_yaml(text: str) -> dict[str, str]:
    """The same of config.yaml. A comment above a blank line belongs to no key; no value holds a '#'."""
    found, path, above = {}, [], []
    for line in text.splitlines():
        content, _, comment = line.partition("#")
        key = content.partition(":")[0].strip()
        if not key:
            above = [*above, comment.strip()] if comment else []
            continue
        path = [*path[: (len(line) - len(line.lstrip())) // 2], key]
        found[".".join(path)] = " ".join([*above, comment.strip()]).strip()
        above = []
    return found


def test_a_yaml_comment_is_found_above_and_beside_its_key():
    text = "# the file\n\na:  # all of a\n  # first\n  # second\n  b: 1    # third\n  c:\n    d: 2\n  e: 3  # last\n"
    assert comments_in_yaml(text) == {
        "a": "all of a", "a.b": "first second third", "a.c": "", "a.c.d": "", "a.e": "last"}  # fmt: skip


def test_config_yaml_and_config_py_comment_every_field_in_the_same_words():
    text = (ROOT / "config.yaml").read_text()
    assert comments_in_yaml(text) == comments_in_code()
    assert max(map(len, text.splitlines())) <= 120


def test_the_shipped_configurations_load():
    for path in [ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")]:
        load_config(path)


def test_a_dry_run_of_the_plans_configuration(monkeypatch, capsys):
    """Without its weights, from the backbone's published shape: it fits four cards of 24 GB, and not one."""
    arguments = ["train.py", str(ROOT / "configs" / "smolvlm2-2.2b-full.yaml"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert train.main() == 0
    parameters, memory, printed = capsys.readouterr().out.split("\n", 2)
    block = 4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048  # SmolVLM2-2.2B has 24, and an LM head apart from its embeddings
    ours = 2 * 2048**2 + 2 * 2048 + 5 * 2049  # the projector and three heads
    trained = 24 * block + 2 * 49280 * 2048 + 2048 + ours
    assert f"; {trained / 1e6:,.1f} M are trained" in parameters
    weights, activations = 18 * trained / 1e9, 8192 * (24 * 4 * 2048 + 30 * 2048 + 8 * 8192) / 1e9
    assert f" {weights:.1f} trained parameters with AdamW, {activations:.1f} activations of 8,192 tokens" in memory
    logits = 8192 / 3 * 49280 * 10 / 1e9  # of a third of the tokens, with their gradient
    assert weights > 24 and weights / 4 + activations + logits < 0.6 * 24
    settings = yaml.safe_load(printed)
    wanted = {"learning_rate": 1e-5, "num_epochs": 10, "warmup_steps": 1000, "gradient_accumulation_steps": 8}
    wanted |= {"weight_decay": 0.01, "schedule": "cosine", "precision": "fp16", "parallel": "fsdp", "max_steps": None}
    assert {name: settings["train"][name] for name in wanted} == wanted
    data = settings["data"]
    assert (data["max_seq_len"], data["batch_tokens"], settings["loss"]["bce"]) == (4096, 2 * 4096, "focal")


def test_a_dry_run_counts_for_other_ranks_with_the_backbone_there(tmp_path, monkeypatch, capsys):
    """Adapters of rank 3 in two layers 32 wide: 2 x 3 x (2 (32 + 32) + 2 (32 + 8) + 3 (32 + 64)) parameters."""
    write_tiny_corpus(tmp_path)
    settings = [
        f"model.backbone={BACKBONES / 'llama-3'}",
        "train.tune=lora",
        "train.lora_rank=3",
        "train.precision=bf16",
    ]
    config = str(write_tiny_config(tmp_path, *settings, "data.template=llama3", "train.parallel=fsdp"))
    monkeypatch.setattr(sys, "argv", ["train.py", config, "--dry-run", "--ranks", "4"])
    assert train.main() == 0
    shown = capsys.readouterr().out
    assert "4 rank(s) x 1 micro-batch(es) = 4 micro-batch(es), fsdp" in shown
    assert ", 2,976 adapters, " in shown and "GB on each of 4 GPUs (fsdp): 0.0 frozen weights" in shown
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    monkeypatch.setattr(sys, "argv", ["train.py", config, "--ranks", "4"])
    with pytest.raises(ProspectError, match="is for --dry-run"):
        train.main()


def test_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: a.json}\n")
    overrides = [
        "train.learning_rate=1e-4",
        "data.hybrid.random_share=0.5",
        "train.max_steps=7",
        "run.name=3",
        "data.dst=false",
        "train.max_steps=null",
    ]
    config = load_config(tmp_path / "c.yaml", overrides)
    assert config.data.train == ["a.json"]
    assert (config.train.learning_rate, config.data.hybrid.random_share, config.run.name) == (1e-4, 0.5, "3")
    assert config.data.dst is False and config.train.max_steps is None


def test_a_mixture_of_files(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: [a.json, {path: b.jsonl, repeat: 6}]}")
    config = load_config(tmp_path / "c.yaml")
    assert config.data.train == ["a.json", Repeated("b.jsonl", 6)]
    assert config.data.train_files() == [Repeated("a.json", 1), Repeated("b.jsonl", 6)]
    stored = yaml.safe_load(yaml.safe_dump(to_dict(config)))  # as a checkpoint keeps it
    assert make_config(stored, "stored") == config
    config = load_config(tmp_path / "c.yaml", ["data.train=[c.json, {path: d.json, repeat: 2}]"])
    assert config.data.train == ["c.json", Repeated("d.json", 2)]
    assert load_config(tmp_path / "c.yaml", ["data.train=c.json"]).data.train == ["c.json"]
    assert load_config(tmp_path / "c.yaml", ["data.train={path: c.json, repeat: 2}"]).data.train[0].repeat == 2


@pytest.mark.parametrize(("text", "told"), [
    *((f"data: {{train: [b.json, {entry}]}}", "data.train must be clip files, each FILE or {path: FILE, repeat: N}")
      for entry in ("{path: a.json, repeat: 0}", "{path: a.json, repeat: 1.5}", "{path: a.json, repeat: true}",
                    "{path: a.json}", "{repeat: 2}", "{path: a.json, repeat: 2, weight: 1}", "{path: 3, repeat: 2}",
                    "3", "[a.json]", "null")),
    ("data: {train: null}", "data.train must be clip files"),
    ("data: {train: [a.json, b.json, {path: a.json, repeat: 2}]}", "data.train names a.json twice"),
    ("data: {val: [{path: a.json, repeat: 2}]}", "data.val must be text"),
    ("trian: {}", "unknown key trian (did you mean train?)"),
    ("train: {learnin_rate: 1}", "train.learning_rate?"),
    ("train: {compile: 'False'}", "train.compile must be bool"),
    ("train: {max_steps: 1.5}", "train.max_steps must be int"),
    ("train: {max_steps: true}", "train.max_steps must be int"),
    ("train: {max_steps: 0}", "train.max_steps must lie between"),
    ("data: {layout: rows}", "one of stream, turns"),
    ("data: {max_seq_len: 9000}", "data.batch_tokens 4096 cannot hold"),
    ("model: {hidden_size: 100, num_attention_heads: 3}", "not a multiple"),
    ("train: []", "train must be a section"),
    ("[1, 2]", "must hold sections"),
    ("a: [", "is not YAML"),
    ("train: {tune: lora}", "needs a pretrained model.backbone"),
    ("train: {beta1: 1.0}", "train.beta1 must lie between 0 and 0.999999, not 1.0"),
    ("model: {intermediate_size: 0}", "model.intermediate_size must lie between"),
    ("model: {rope_theta: 0}", "model.rope_theta must lie between"),
])  # fmt: skip
def test_what_is_refused(tmp_path, text, told):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ProspectError) as caught:
        load_config(tmp_path / "c.yaml")
    assert told in str(caught.value)


NUMBERS = {
    f"{prefix}{field.name}": int if "int" in str(field.type) else float
    for prefix, section in [
        *((f"{name}.", section) for name, section in vars(Config()).items()),
        ("data.hybrid.", HybridConfig()),
    ]
    for field in dataclasses.fields(section)
    if field.type in (int, float, int | None, float | None)
}


def test_no_number_is_without_bounds():
    """No number of the configuration may be negative, endless or none at all."""
    accepted = []
    for key in NUMBERS:
        for text in ("-1", "1e30", ".nan", ".inf", "-.inf", "1" + "0" * 24):
            try:
                make_config(apply_overrides({}, [f"{key}={text}"]), "here")
                accepted.append(f"{key}={text}")
            except ProspectError as error:
                assert error.what.startswith(f"{key} must ")
    assert accepted == []
    assert len(NUMBERS) > 50 and {NUMBERS["train.beta1"], NUMBERS["train.max_steps"]} == {int, float}


def test_without_task_state_there_is_no_state_head(plain):
    config = Config()
    assert model_shape(config, plain).dst_state_head
    config.data.dst = False
    assert config.model.dst_state_head and not model_shape(config, plain).dst_state_head


def test_all_problems_are_told_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {max_step: 1, compile: 3}\nloss: {bce: median}")
    with pytest.raises(ProspectError) as caught:
        load_config(tmp_path / "c.yaml")
    assert all(part in str(caught.value) for part in ("max_step", "train.compile", "mean, balanced, focal"))
