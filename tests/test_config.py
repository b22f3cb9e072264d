"""The configuration: every field commented in config.yaml, overrides, and what is refused."""

from pathlib import Path

import pytest
import yaml

from prospect.config import Config, load_config, to_dict
from prospect.errors import ProspectError

ROOT = Path(__file__).parent.parent


def keys(values: dict, prefix: str = "") -> set[str]:
    return {
        k
        for key, value in values.items()
        for k in (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def test_config_yaml_holds_every_field_and_no_other():
    assert keys(yaml.safe_load((ROOT / "config.yaml").read_text())) == keys(to_dict(Config()))


def test_the_shipped_configurations_load():
    for path in [ROOT / "config.yaml", *(ROOT / "configs").glob("*.yaml")]:
        load_config(path)


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


@pytest.mark.parametrize(("text", "told"), [
    ("trian: {}", "unknown key trian (did you mean train?)"),
    ("train: {learnin_rate: 1}", "train.learning_rate?"),
    ("train: {compile: 'False'}", "train.compile must be bool"),
    ("train: {max_steps: 1.5}", "train.max_steps must be int"),
    ("train: {max_steps: true}", "train.max_steps must be int"),
    ("train: {max_steps: 0}", "train.max_steps must lie between"),
    ("data: {layout: rows}", "one of stream, turns"),
    ("data: {max_seq_len: 9000}", "data.batch_tokens 4096 cannot hold"),
    ("model: {hidden_size: 100, num_attention_heads: 3}", "not a multiple"),
    ("data: {dst: false}\nmodel: {dst_state_head: true}", "dst_state_head needs data.dst"),
    ("train: []", "train must be a section"),
    ("[1, 2]", "must hold sections"),
    ("a: [", "is not YAML"),
    ("train: {tune: lora}", "needs a pretrained model.backbone"),
])  # fmt: skip
def test_what_is_refused(tmp_path, text, told):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ProspectError) as caught:
        load_config(tmp_path / "c.yaml")
    assert told in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {max_step: 1, compile: 3}\nloss: {bce: median}")
    with pytest.raises(ProspectError) as caught:
        load_config(tmp_path / "c.yaml")
    assert all(part in str(caught.value) for part in ("max_step", "train.compile", "mean, balanced, focal"))
