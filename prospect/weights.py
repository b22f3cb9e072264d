"""Weights in and out: Hugging Face directories, our checkpoints, and the export from ours to theirs.

Everything is safetensors and JSON. One layout serves checkpoints and exports:

    config.json                   Hugging Face's config, and our own settings under the key "prospect"
    model.safetensors             the transformer (or shards with model.safetensors.index.json)
    prospect.safetensors          mm_projector and the decision heads
    adapter_config.json,          LoRA adapters, as peft writes them
    adapter_model.safetensors

A backbone has only the first two. A checkpoint of `tune: full` has the first three. A checkpoint of `tune: heads` or
`lora` leaves the transformer out and names its directory in config.json: loading combines the two. An export
(`python -m prospect.weights export CHECKPOINT OUT`) has its adapters merged and contains the full transformer, so that
`AutoModelForCausalLM.from_pretrained` opens it.

A model is opened on the meta device, where it has shapes and types but no memory: names, shapes and types of all files
are compared there. Then it is filled: each rank maps its own rows of a tensor (all, or under FSDP its share) from the
file and moves them to its device, so that nothing is allocated twice and nothing initialised that a file overwrites.
"""

import argparse
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prospect.config import DataConfig
from prospect.distributed import laid_out, own_rows
from prospect.errors import ProspectError, run_entry_point
from prospect.files import WRITING, read_json, write_json
from prospect.model import LoraConfig, ModelConfig, Prospect, RopeScaling, drawn_weights
from prospect.tune import (
    PEFT_PREFIX,
    TARGETS,
    count_parameters,
    drawn_adapters,
    is_adapter,
    is_ours,
    merge_lora,
    meta_model,
    peft_config,
)

MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
OUR_FILE = "prospect.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FLOAT_TYPES = ("F32", "BF16", "F16")  # safetensors' names of the types a Llama may be stored in


# ---- config.json ---------------------------------------------------------------------------------

# LlamaConfig's own defaults: a config.json may leave out what equals them (SmolVLM2's text_config does). Qwen's differ
# in sizes alone, which its files name; one left out would not fit the tensors.
LLAMA_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip

# Fields that would change the result, with the values under which they do not: anything else is refused by name.
NEUTRAL = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "qk_layer_norms": (None, False),
    "attention_dropout": (None, 0),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
}

# The table of names, both ways: what Hugging Face calls our `model.`, by kind of checkpoint. Everything
# after it, and all other names, are the same on both sides.
TEXT_PREFIX = {"llama": "model.", "smolvlm": "model.text_model."}
# What is beside the text model and is ignored: SmolVLM2's vision tower, and a buffer that old Llama files carry.
LEFT_ALONE = ("model.vision_model.", "model.connector.")
OLD_BUFFER = ".rotary_emb.inv_freq"
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "smolvlm": "SmolVLMForConditionalGeneration",
}  # fmt: skip

# ModelConfig's fields that are not the transformer's: our settings, and where its weights came from.
SETTINGS = ("vision_dim", "image_token_id", "speaking_head", "dst", "dst_state_head")
NOT_SHAPE = (*SETTINGS, "lora", "backbone", "backbone_mark")


def read_config(directory: str | Path) -> ModelConfig:
    """The config.json of a backbone or of one of our checkpoints. Raises what `parse_config` raises."""
    path = Path(directory) / "config.json"
    return parse_config(read_json(path, if_missing="is this a model directory?"), str(path))


class Fields:
    """The fields of a JSON object, each checked as it is read; what is wrong with them is noted in `problems`."""

    def __init__(self, values: dict[str, Any], problems: list[str]):
        self.values, self.problems = values, problems

    def number(self, key: str, default: float | None, low: float, high: float) -> Any:
        """A number between low and high, an int where the limits are ints. Absent and null mean the default."""
        value = default if self.values.get(key) is None else self.values[key]
        kind = int if isinstance(low, int) else int | float
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
            self.problems.append(f"{key} {value!r}")
            return low
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{key} {value!r}")
        return bool(value)

    def inner(self, key: str) -> "Fields":
        """An object inside this one. Absent and null mean an empty one."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            self.problems.append(f"{key} {value!r}")
            value = {}
        return Fields(value, self.problems)

    def neutral(self, key: str) -> None:
        """Note a field whose value would change the result."""
        value = self.values.get(key, NEUTRAL[key][0])
        if value not in NEUTRAL[key]:
            self.problems.append(f"{key} {value!r}")


def parse_config(values: dict[str, Any], where: str) -> ModelConfig:
    """A model's shape from Hugging Face's fields and, in one of our checkpoints, its settings from ours.

    Raises ProspectError naming everything that model.py does not compute, and every value that makes no sense.
    """
    problems: list[str] = []
    outer = Fields(values, problems)
    has_text = "text_config" in values
    text = outer.inner("text_config") if has_text else outer
    kind, model_type = str(values.get("model_type")), str(text.values.get("model_type"))
    if kind not in ARCHITECTURES or has_text != (kind == "smolvlm"):
        problems.append(f"model_type {values.get('model_type')!r}")
    elif has_text and model_type != "llama":
        problems.append(f"text_config.model_type {text.values.get('model_type')!r}")
    elif values.get("architectures") not in (None, [ARCHITECTURES[kind]]):
        problems.append(f"architectures {values['architectures']}")
    for key in NEUTRAL:
        if key != "sliding_window" or not model_type.startswith("qwen"):  # theirs counts where use_sliding_window
            text.neutral(key)

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    shape = {key: text.number(key, LLAMA_DEFAULTS[key], 1, 10**7) for key in sizes}
    shape["num_hidden_layers"] = text.number("num_hidden_layers", LLAMA_DEFAULTS["num_hidden_layers"], 1, 1000)
    shape["rms_norm_eps"] = text.number("rms_norm_eps", LLAMA_DEFAULTS["rms_norm_eps"], 0.0, 1.0)
    heads = shape["num_attention_heads"]
    shape["num_key_value_heads"] = text.number("num_key_value_heads", heads, 1, heads)
    default = 128 if model_type == "qwen3" else shape["hidden_size"] // heads  # Qwen3's is no share of the width
    shape["head_dim"] = text.number("head_dim", default, 2, 10**4)
    if text.values.get("layer_types") not in (None, ["full_attention"] * shape["num_hidden_layers"]):
        problems.append("layer_types other than full_attention")
    if heads % shape["num_key_value_heads"]:
        problems.append(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {shape['num_key_value_heads']}"
        )
    if shape["head_dim"] % 2:
        problems.append(f"head_dim {shape['head_dim']} is odd")
    shape |= {key: text.flag(key, False) for key in ("attention_bias", "mlp_bias")}
    # In a SmolVLM2 file, the outer field counts: the LM head is outside the text model.
    shape["tie_word_embeddings"] = outer.flag("tie_word_embeddings", False)

    config = ModelConfig(**shape, model_type=model_type, **parse_rope(text), **parse_settings(outer))
    if problems:
        what = f"not a model that can be loaded: {', '.join(problems)}"
        remedy = "plain Llama 2/3, Qwen2.5, Qwen3, SmolLM2 and SmolVLM2 checkpoints can"
        raise ProspectError(what, where=where, remedy=remedy)
    return config


def parse_rope(text: Fields) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the old style (fields of these names) or the new (`rope_parameters`)."""
    rope = text.inner("rope_parameters")
    if not rope.values:
        old = text.inner("rope_scaling").values
        rope = Fields({"rope_theta": text.values.get("rope_theta"), **old}, text.problems)
    rope.neutral("partial_rotary_factor")
    theta = rope.number("rope_theta", LLAMA_DEFAULTS["rope_theta"], 1.0, 1e12)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind != "llama3":
        if kind != "default":
            text.problems.append(f"rope_type {kind!r}")
        return {"rope_theta": theta}
    low, high = rope.number("low_freq_factor", None, 1e-6, 1e9), rope.number("high_freq_factor", None, 1e-6, 1e9)
    if high <= low:
        text.problems.append(f"high_freq_factor {high} is not above low_freq_factor {low}")
    original = rope.number("original_max_position_embeddings", None, 1, 10**9)
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(rope.number("factor", None, 1e-6, 1e9), low, high, original),
    }


def parse_settings(outer: Fields) -> dict[str, Any]:
    """Our own settings, which one of our checkpoints keeps under "prospect"."""
    if "prospect" not in outer.values:
        return {}
    ours = outer.inner("prospect")
    settings = {
        "vision_dim": ours.number("vision_dim", None, 1, 10**7),
        "image_token_id": ours.number("image_token_id", None, 0, 10**8),
        "speaking_head": ours.flag("speaking_head", True),
        "dst": ours.flag("dst", True),
        "dst_state_head": ours.flag("dst_state_head", False),
        "backbone": str(ours.values.get("backbone", "")),
        "backbone_mark": str(ours.values.get("backbone_mark", "")),
    }
    lora = ours.inner("lora")
    if lora.values:
        targets = lora.values.get("targets")
        if not isinstance(targets, list) or not targets or not set(map(str, targets)) <= set(TARGETS):
            ours.problems.append(f"lora targets {targets!r}")
        rank, alpha = lora.number("rank", None, 1, 10**5), lora.number("alpha", None, 0.0, 1e6)
        settings["lora"] = LoraConfig(rank, alpha, lora.number("dropout", 0.0, 0.0, 0.99), targets)
    return settings


def hf_config(config: ModelConfig, eos_token_id: int | list[int] | None) -> dict[str, Any]:
    """config.json of a checkpoint. The RoPE fields are in the old style, which every version of transformers reads."""
    ours = {key: getattr(config, key) for key in SETTINGS}
    if config.lora:
        ours["lora"] = dataclasses.asdict(config.lora)
    shape = transformer_shape(config)
    scaling = shape.pop("rope_scaling")
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        **shape,
        "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "prospect": ours,
    }


def transformer_shape(config: ModelConfig) -> dict[str, Any]:
    """The fields that Hugging Face has too: not our settings, nor where the weights came from."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_SHAPE}


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: a safetensors file, and the tensor's name in it."""

    path: Path
    name: str


def open_file(path: Path) -> Any:
    """A safetensors file, mapped into memory; its tensors are read when they are touched."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ProspectError(f"no {path.name}", where=str(path.parent), remedy="copy the directory again") from error
    except (SafetensorError, OSError) as error:
        raise ProspectError(f"cannot be read: {error}", where=str(path), remedy="copy the file again") from error


def transformer_tensors(directory: Path) -> dict[str, Stored]:
    """The transformer's tensors of a directory, by our names, from one file or from shards."""
    files = [directory / MODEL_FILE]
    if not files[0].exists() and (directory / INDEX_FILE).exists():
        shards = read_json(directory / INDEX_FILE).get("weight_map")
        is_map = isinstance(shards, dict) and shards
        if not is_map or not all(Path(str(name)).name == name for name in shards.values()):
            what = "weight_map is not one of names to files"
            raise ProspectError(what, where=str(directory / INDEX_FILE), remedy="copy it again")
        files = [directory / name for name in sorted(set(shards.values()))]
        missing = [path.name for path in files if not path.exists()]
        if missing:
            raise ProspectError(f"missing shards: {', '.join(missing)}", where=str(directory), remedy="copy them too")
    elif not files[0].exists():
        old = any(directory.glob("*.bin"))
        remedy = "convert the .bin files to safetensors" if old else "copy the weights too"
        raise ProspectError(f"no {MODEL_FILE} and no {INDEX_FILE}", where=str(directory), remedy=remedy)
    kind = "smolvlm" if "text_config" in read_json(directory / "config.json") else "llama"
    prefix = TEXT_PREFIX[kind]
    stored = {}
    for path in files:
        with open_file(path) as file:
            names = file.keys()
        for name in names:
            if name.endswith(OLD_BUFFER) or (kind == "smolvlm" and name.startswith(LEFT_ALONE)):
                continue
            ours = "model." + name.removeprefix(prefix) if name.startswith(prefix) else name
            stored[ours] = Stored(path, name)
    return stored


def our_tensors(directory: Path) -> dict[str, Stored]:
    """The projector, the heads and the adapters of one of our checkpoints, by our names."""
    stored = {}
    for path, prefix in ((directory / OUR_FILE, ""), (directory / ADAPTER_FILE, PEFT_PREFIX)):
        if path.exists():
            with open_file(path) as file:
                stored |= {name.removeprefix(prefix): Stored(path, name) for name in file.keys()}
    return stored


def trained_tensors(model: Prospect, directory: str | Path) -> dict[str, Stored]:
    """The tensors of a checkpoint of `model`: all, or what it holds beside its backbone. Raises what `check` raises."""
    directory = Path(directory)
    stored, expected = our_tensors(directory), tensors_of(model)
    if read_config(directory).backbone:
        expected = {name: tensor for name, tensor in expected.items() if is_ours(name) or is_adapter(name)}
    else:
        stored |= transformer_tensors(directory)
    check(stored, expected, str(directory))
    return stored


def slices(stored: dict[str, Stored]) -> Iterator[tuple[str, Any]]:
    """(our name, what `[rows]` reads from the file) for every tensor."""
    files = {path: open_file(path) for path in {entry.path for entry in stored.values()}}
    for name, entry in stored.items():
        yield name, files[entry.path].get_slice(entry.name)


def check(stored: dict[str, Stored], expected: dict[str, Tensor], where: str) -> None:
    """Raise ProspectError naming all tensors that are missing, unexpected, mis-shaped or of a strange type."""
    wrong = []
    for name, part in slices({name: stored[name] for name in expected.keys() & stored.keys()}):
        if tuple(part.get_shape()) != tuple(expected[name].shape):
            wrong.append(f"{name} is {part.get_shape()}, not {list(expected[name].shape)}")
        elif part.get_dtype() not in FLOAT_TYPES:
            wrong.append(f"{name} is stored as {part.get_dtype()}")
    problems = [
        f"{kind}: {'; '.join(names[:8])}" + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
        for kind, names in (
            ("missing", sorted(expected.keys() - stored.keys())),
            ("unexpected", sorted(stored.keys() - expected.keys())),
            ("wrong", sorted(wrong)),
        )
        if names
    ]
    if problems:
        what = f"tensors do not fit. {'. '.join(problems)}"
        raise ProspectError(what, where=where, remedy="config.json and files must belong together")


def tensors_of(model: Prospect) -> dict[str, Tensor]:
    """Every tensor of the model by name; a tied LM head is the embedding matrix, not its own tensor."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def open_model(directory: str | Path, given: dict[str, Any], dtype: torch.dtype) -> tuple[Prospect, dict[str, Stored]]:
    """A directory's model on the meta device, frozen, and where its tensors are stored. A backbone has none of ours.

    given: settings asked for, None: not asked for. Raises ProspectError when config.json asks for what model.py does
    not compute, when a checkpoint has other settings than those given, and what `check` raises.
    """
    directory = Path(directory)
    values = read_json(directory / "config.json")
    is_checkpoint = "prospect" in values
    config = settled_config(values, given, directory)
    backbone = Path(config.backbone)
    model = meta_model(config).to(dtype).requires_grad_(False)
    stored = transformer_tensors(backbone) | (our_tensors(directory) if is_checkpoint else {})
    tied_copy = stored.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    expected = {name: tensor for name, tensor in tensors_of(model).items() if is_checkpoint or not is_ours(name)}
    check(stored, expected, str(directory))
    if tied_copy is not None:
        check_tied(stored["model.embed_tokens.weight"], tied_copy)
    config.backbone_mark = fingerprint(backbone)
    return model, stored


def fill_model(model: Prospect, stored: dict[str, Stored], device: str | torch.device, seed: int) -> None:
    """Give a model on the meta device its values, from files or, where no file has them, drawn from `seed`.

    One tensor after another, each rank its own rows, as the type and on the device that they stay in. On a CPU what is
    frozen stays in the mapped file; what is trained gets memory of its own, which no other checkpoint can pull away.
    Raises ProspectError for a value beyond fp16's range.
    """
    empty, state = dict(model.named_parameters()), {}
    new = empty.keys() - stored.keys()
    adapters = {name for name in new if is_adapter(name)}
    drawn = chain(drawn_adapters(model, seed, adapters), drawn_weights(model, seed, new - adapters))
    for name, value in chain(slices(stored), drawn):
        rows = value[own_rows(empty[name])]
        kept = rows.to(device, empty[name].dtype, copy=empty[name].requires_grad)
        if kept.dtype == torch.float16 != rows.dtype and not kept.isfinite().all():
            what = f"{name} holds values beyond fp16's range"
            raise ProspectError(what, where=str(stored[name].path.parent), remedy="choose bf16 or fp32")
        state[name] = laid_out(kept, empty[name])
    model.load_state_dict(state, strict=False, assign=True)  # names have been compared
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rope_frequencies = model.model.rope_frequencies.to(device)  # in no file, and never on meta


def load_model(
    directory: str | Path,
    *,
    vision_dim: int | None = None,
    image_token_id: int | None = None,
    speaking_head: bool | None = None,
    dst: bool | None = None,
    dst_state_head: bool | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Prospect:
    """A model from a backbone directory, with new projector and heads drawn from `seed`, or from our own checkpoint.

    A checkpoint has its own settings; naming others than it has is an error. Raises what `open_model` and `fill_model`
    raise.
    """
    given = {"vision_dim": vision_dim, "image_token_id": image_token_id, "speaking_head": speaking_head}
    model, stored = open_model(directory, given | {"dst": dst, "dst_state_head": dst_state_head}, dtype)
    fill_model(model, stored, device, seed)
    return model.requires_grad_(True)


def settled_config(values: dict[str, Any], given: dict[str, Any], directory: Path) -> ModelConfig:
    """What a config.json says together with the settings asked for (None: not asked for), and where the backbone is.

    Raises ProspectError when a checkpoint has other settings, or when its backbone is no longer what it was.
    """
    where = str(directory / "config.json")
    config = parse_config(values, where)
    given = {key: value for key, value in given.items() if value is not None}
    there = {key: getattr(config, key) for key in given}
    if "prospect" in values and there != given:
        other = [f"{key} {there[key]}, not {given[key]}" for key in given if there[key] != given[key]]
        what = f"this checkpoint has {', '.join(other)}"
        raise ProspectError(what, where=str(directory), remedy="use its own settings")
    config = dataclasses.replace(config, **given, backbone=config.backbone or str(directory.resolve()))
    if config.backbone_mark:
        check_backbone(Path(config.backbone), config, where)
    return config


def fingerprint(backbone: Path) -> str:
    """16 hex digits of a backbone's first weight: two fine-tunings of one model share their config, but not this."""
    stored = transformer_tensors(backbone).get("model.layers.0.self_attn.q_proj.weight")
    if stored is None:
        return ""  # not a complete backbone: the comparison of names reports it
    weight = open_file(stored.path).get_tensor(stored.name)
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy()).hexdigest()[:16]


def check_backbone(backbone: Path, config: ModelConfig, where: str) -> None:
    """Raise ProspectError unless the transformer that a checkpoint was trained on is still there and unchanged."""
    if not (backbone / "config.json").exists():
        what = f"the backbone of this checkpoint is not at {backbone}"
        raise ProspectError(what, where=where, remedy='write where it is now into "backbone" under "prospect"')
    there = transformer_shape(read_config(backbone)) | {"backbone_mark": fingerprint(backbone)}
    here = transformer_shape(config) | {"backbone_mark": config.backbone_mark}
    other = [f"{key} {there[key]}, not {here[key]}" for key in here if there[key] != here[key]]
    if other:
        what = f"{backbone} is not the backbone that this checkpoint was trained on: {', '.join(other)}"
        raise ProspectError(what, where=where, remedy="put the right one there")


def check_tied(embeddings: Stored, head: Stored) -> None:
    """Some files store the tied LM head as well: both must then be equal."""
    first, second = (open_file(entry.path).get_tensor(entry.name) for entry in (embeddings, head))
    if not torch.equal(first, second):
        what = "tie_word_embeddings is true, but lm_head.weight differs from the embeddings"
        raise ProspectError(what, where=str(head.path), remedy="set tie_word_embeddings to false in config.json")


# ---- writing -------------------------------------------------------------------------------------


def save_model(
    model: Prospect,
    directory: str | Path,
    *,
    eos_token_id: int | list[int] | None = None,
    names: set[str] | None = None,
) -> None:
    """Write a checkpoint's weights and config.json. names: only these tensors; the others then stay in the backbone."""
    state = {name: tensor for name, tensor in model.state_dict().items() if names is None or name in names}
    save_state(state, model.config, directory, eos_token_id=eos_token_id)


def save_state(
    state: dict[str, Tensor], config: ModelConfig, directory: str | Path, *, eos_token_id: int | list[int] | None = None
) -> None:
    """`save_model` for a state dict that was gathered from several ranks. Each tensor keeps its type."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    adapters = {PEFT_PREFIX + name: tensor for name, tensor in state.items() if is_adapter(name)}
    ours = {name: tensor for name, tensor in state.items() if is_ours(name)}
    transformer = {name: tensor for name, tensor in state.items() if not is_ours(name) and not is_adapter(name)}
    values = hf_config(config, eos_token_id)
    if not transformer:
        values["prospect"] |= {"backbone": config.backbone, "backbone_mark": config.backbone_mark}
    write_json(directory / "config.json", values)
    if adapters:
        write_json(directory / ADAPTER_CONFIG, peft_config(config))
    for name, tensors in ((MODEL_FILE, transformer), (OUR_FILE, ours), (ADAPTER_FILE, adapters)):
        if tensors:
            save_file(tensors, directory / name, metadata={"format": "pt"})
            shutil.copymode(directory / "config.json", directory / name)  # save_file lets only the owner read


# ---- export --------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model: Prospect) -> Tensor:
    """A model's output for a fixed random sequence with frames in it: LM logits and decisions, [1,T,V+heads]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=generator)  # [1,T]
    ids[ids == model.config.image_token_id] = 0 if model.config.image_token_id else 1
    ids[0, 8:12] = model.config.image_token_id
    frames = torch.randn(4, model.config.vision_dim, generator=generator)  # [F,D]
    hidden = model(ids, frames)  # [1,T,H]
    heads = [head for head in (model.lm_head, model.speaking_decision_head, model.dst_update_head) if head is not None]
    return torch.cat([head(hidden) for head in heads], dim=-1)


def export(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Write a checkpoint as a complete model: transformer with adapters merged in fp32, projector, heads and tokenizer.

    Returns the largest differences between the outputs of the checkpoint, of the merged model, and of the model written
    and read back; `dtype` is the stored type, whose rounding the last one shows. `out` appears only on success.
    Raises ProspectError when `checkpoint` is not one of ours or cannot be loaded, or `out` exists or cannot be written.
    """
    values = read_json(checkpoint / "config.json")
    if "prospect" not in values:
        what = "is a backbone, not a checkpoint of PROSPECT"
        raise ProspectError(what, where=str(checkpoint), remedy="nothing needs exporting")
    if out.exists():
        raise ProspectError("exists already", where=str(out), remedy="name a new directory")
    missing = [name for name in TOKENIZER_FILES if not (checkpoint / name).exists()]
    if missing:
        raise ProspectError(f"no {', '.join(missing)}", where=str(checkpoint), remedy="copy the tokenizer's files too")
    model = load_model(checkpoint).eval()
    adapted = probe(model)
    merge_lora(model)
    merged = probe(model)
    aside = out.with_name(f".{out.name}{WRITING}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        save_model(model.to(dtype), aside, eos_token_id=values.get("eos_token_id"))
        for name in TOKENIZER_FILES:
            shutil.copy(checkpoint / name, aside / name)
        reloaded = probe(load_model(aside).eval())
        os.rename(aside, out)
    except (OSError, SafetensorError) as error:
        remedy = "make room, or choose another place"
        raise ProspectError(f"cannot be written: {error}", where=str(out), remedy=remedy) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {
        "adapter and merged": float((adapted - merged).abs().max()),
        "merged and reloaded": float((merged - reloaded).abs().max()),
        "adapter and reloaded": float((adapted - reloaded).abs().max()),
    }


def checked(directory: Path, template: str) -> str:
    """Load a model directory together with its tokenizer, and describe it in one line."""
    from prospect.tokenizer import Tokenizer  # imported here: weights need no tokenizer, only this command does

    tokenizer = Tokenizer(directory, template)
    config = load_model(directory).config
    tokenizer.check_vocabulary(config.vocab_size)
    counts = count_parameters(config)
    parts = ", ".join(f"{count:,} {part}" for part, count in counts.items() if count)
    return f"{directory}: {sum(counts.values()):,} parameters: {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m prospect.weights", description="Inspect a model directory, or export a checkpoint."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("check", help="load a backbone or a checkpoint and count its parameters")
    look.add_argument("directory", type=Path)
    look.add_argument(
        "--template", choices=get_args(DataConfig.__annotations__["template"]), default="plain", help="data.template"
    )
    ship = commands.add_parser("export", help="merge adapters and write a directory that transformers can load")
    ship.add_argument("checkpoint", type=Path)
    ship.add_argument("out", type=Path)
    ship.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="how to store the result"
    )
    arguments = parser.parse_args()
    if arguments.command == "check":
        print(checked(arguments.directory, arguments.template))
        return
    differences = export(arguments.checkpoint, arguments.out, getattr(torch, arguments.dtype))
    print(f"{arguments.out}: written in {arguments.dtype}; largest differences of logits:")
    for pair, difference in differences.items():
        print(f"  {pair:22} {difference:.2e}")


if __name__ == "__main__":
    run_entry_point(main)
