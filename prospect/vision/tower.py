"""The vision tower: pictures in, the vectors that a language model sees as one frame out.

Three published families are read, straight from their Hugging Face directories, without any other library:

    SigLIP    (google/siglip-so400m-patch14-384, D = 1152)             picture -> patches -> one pooled vector
    CLIP      (openai/clip-vit-large-patch14-336, D = 1024)            picture -> patches -> the class token
    SmolVLM2  (HuggingFaceTB/SmolVLM2-2.2B-Instruct, D = 2048)         picture -> patches -> connector -> a few vectors

They share the tower, a plain pre-norm vision transformer (ViT, arXiv 2010.11929; SigLIP, arXiv 2303.15343; CLIP,
arXiv 2103.00020):

    picture [3, H, W] uint8 -> preprocess.py: resized, rescaled, normalised [3, S, S]
            -> cut into P = (S // patch)^2 patches, each one linear map to C numbers, plus a learned position
            -> N_L blocks: x += attention(norm(x)); x += mlp(norm(x))
            -> norm                                               the last hidden state, [P, C]

and differ in what follows. SigLIP lets one learned query look at all patches (attention pooling, arXiv 1810.00825):
that is its "CLS" vector. CLIP has a true one, a learned vector that goes through the blocks with the patches, and can
map it into the space it shares with texts. ProAssist (arXiv 2506.05904) uses this pooled vector as I = 1 vector per
frame, and adds 2x2, 3x3 or 5x5 means of the patches for I = 5, 10 or 26. SmolVLM2 (arXiv 2504.05299) has none: it folds
every s x s square of patches into one vector of s*s*C numbers (pixel shuffle) and maps it to the language model's
width: P / s^2 vectors per picture (81 in 2.2B).

Dimensions: B pictures, P patches, C width of the tower, D width of what comes out, I vectors per frame, S picture side.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prospect.errors import ProspectError
from prospect.files import read_json
from prospect.vision.preprocess import WANTED, Preprocessing, prepare, read_preprocessing

FAMILIES = {  # by config.json's model_type; a tower saved by itself has a type of its own
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "clip": "clip",
    "clip_vision_model": "clip",
    "smolvlm": "smolvlm",
}
POOLS = {  # the first of each is the default
    "siglip": ("pooled",),
    "clip": ("pooled", "projected"),
    "smolvlm": ("mean", "all", "top-left-tile"),
}
GRID_OF_TOKENS = {1: 0, 5: 2, 10: 3, 26: 5}  # "pooled": I vectors per frame = that one + this many squared means


# ---- what the directory says ---------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """The shape of the tower, from config.json. Fields have the names and the defaults of Hugging Face's files."""

    model_type: str  # the family: "siglip", "clip" or "smolvlm"
    hidden_size: int  # C
    intermediate_size: int  # width inside the MLP
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # S, pixels
    patch_size: int  # pixels
    layer_norm_eps: float
    hidden_act: str  # one of ACTIVATIONS
    scale_factor: int  # SmolVLM: s, the side of the squares that the connector folds; others: 1
    output_size: int  # D of what is mapped: by SmolVLM's connector, by CLIP's projection; SigLIP: C

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that fill no patch (6 of 384 at patch 14) are never seen."""
        return self.image_size // self.patch_size


def read_config(directory: Path) -> VisionConfig:
    """The tower's shape from `directory`/config.json. ProspectError when it is not a checkpoint of one of FAMILIES."""
    where = str(directory / "config.json")
    whole = read_json(directory / "config.json", if_missing=WANTED)
    family = FAMILIES.get(whole.get("model_type"))
    if family is None:
        what = f"model_type {whole.get('model_type')!r} is not a vision tower that is known here"
        raise ProspectError(what, where=where, remedy=WANTED)
    # Files leave out what equals the family's default, so the defaults belong to the format.
    sizes = {"intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224} | {
        "siglip": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 16},
        "clip": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 32},
        "smolvlm": {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
    }[family]
    defaults = sizes | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    if family == "clip":
        defaults |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    by_itself = whole["model_type"].endswith("_vision_model")
    fields = defaults | (whole if by_itself else whole.get("vision_config") or {})

    if fields.get("vision_use_head", True) is False:
        raise ProspectError("this SigLIP has no pooling head", where=where, remedy="use a checkpoint that has one")
    if fields["hidden_act"] not in ACTIVATIONS:
        what = f"activation {fields['hidden_act']!r} is not known here"
        raise ProspectError(what, where=where, remedy="use a GELU tower")
    mapped_to, output_size = {
        "siglip": ("hidden_size", fields["hidden_size"]),
        "clip": ("projection_dim", whole.get("projection_dim", 512)),
        "smolvlm": ("text_config.hidden_size", (whole.get("text_config") or {}).get("hidden_size")),
    }[family]
    for name, value in [*((name, fields[name]) for name in sizes), (mapped_to, output_size)]:
        if type(value) is not int or value < 1:
            what = f"{name} is {value!r}, wanted a positive whole number"
            raise ProspectError(what, where=where, remedy="copy it again")
    config = VisionConfig(
        model_type=family,
        scale_factor=whole.get("scale_factor", 2) if family == "smolvlm" else 1,
        output_size=output_size,
        **{name: fields[name] for name in defaults},
    )
    if config.hidden_size % config.num_attention_heads or config.grid < 1 or config.grid % config.scale_factor:
        heads, grid = f"width {config.hidden_size} with {config.num_attention_heads} heads", f"a grid of {config.grid}"
        what = f"{heads}, {grid} patches with scale_factor {config.scale_factor}: one does not divide the other"
        raise ProspectError(what, where=where, remedy="copy the checkpoint again")
    return config


# ---- the tower -----------------------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by their names in config.json
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Attention(nn.Module):
    """Every patch looks at every patch. Queries, keys and values come from one product (three in the checkpoint)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        B, P, C = x.shape
        qkv = self.qkv(x).view(B, P, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, N, P, C/N]
        mixed = F.scaled_dot_product_attention(q, k, v)  # no mask: the picture is all there at once
        return self.out(mixed.transpose(1, 2).reshape(B, P, C))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """[B, 3, S, S] -> last hidden state [B, P, C]; CLIP's has the class token before the patches, [B, 1 + P, C].

    Patch i (row by row) has position i. SmolVLM's reference looks positions up by the fraction of the side at which a
    patch starts; for whole pictures and tiles, which fill the square, and the published grids (27 and 32 patches
    per side) that is the same.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, clip = config.hidden_size, config.model_type == "clip"
        # CLIP's patches have no bias: the positions, added next, are one for each.
        self.patches = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size, bias=not clip)
        self.class_token = nn.Parameter(torch.empty(C)) if clip else None
        self.positions = nn.Parameter(torch.empty(clip + config.grid**2, C))  # [P, C] or [1 + P, C]
        # CLIP alone norms the sum, which also brings the class token to the size of the patches.
        self.norm_before = nn.LayerNorm(C, eps=config.layer_norm_eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # [B, P, C]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm_before(x + self.positions)
        for block in self.blocks:
            x = block(x)
        if self.class_token is not None:  # CLIP learned its last norm for this vector; the patches are used without it
            return torch.cat([self.norm(x[:, :1]), x[:, 1:]], dim=1)
        return self.norm(x)


class PoolingHead(nn.Module):
    """SigLIP's summary of a picture: one learned query attends to all patches. [B, P, C] -> [B, C]"""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))  # the query
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        B, P, C = x.shape
        q = self.query(self.probe).view(1, 1, self.n_heads, C // self.n_heads).transpose(1, 2)  # [1, N, 1, C/N]
        key_value = self.key_value(x).view(B, P, 2, self.n_heads, C // self.n_heads)
        k, v = key_value.permute(2, 0, 3, 1, 4)  # 2 x [B, N, P, C/N]
        mixed = F.scaled_dot_product_attention(q.expand(B, -1, -1, -1), k, v)  # [B, N, 1, C/N]
        pooled = self.out(mixed.transpose(1, 2).reshape(B, C))
        return pooled + self.mlp(self.norm(pooled))


class Connector(nn.Module):
    """SmolVLM's way into the language model: [B, P, C] -> [B, P/s^2, D], s x s neighbours side by side, then one map.

    With s = 2 and a grid of 4, patch numbers:      0  1 |  2  3
                                                    4  5 |  6  7      vector 0 = patches 0 1 4 5, in this order;
                                                   ------+------      vector 1 = patches 2 3 6 7; row by row
                                                    8  9 | 10 11
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.grid, self.s = config.grid, config.scale_factor
        self.proj = nn.Linear(config.hidden_size * self.s**2, config.output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, P, C = x.shape
        n = self.grid // self.s  # squares along one side
        squares = x.view(B, n, self.s, n, self.s, C).permute(0, 1, 3, 2, 4, 5)  # [B, n, n, s, s, C]
        return self.proj(squares.reshape(B, n * n, self.s**2 * C))


def grid_means(x: Tensor, n: int) -> Tensor:
    """Means of the patches over n x n equal regions, row by row: [B, P, C] -> [B, n*n, C].

    Where n does not divide the grid the regions overlap by one row: 27 patches in two are 0..13 and 13..26.
    """
    B, P, C = x.shape
    grid = math.isqrt(P)
    picture = x.transpose(1, 2).reshape(B, C, grid, grid)
    return F.adaptive_avg_pool2d(picture, n).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """Pictures to frame vectors, [B, I, D] float32: prepare, tower, pool.

    `pool` is "pooled" for SigLIP and CLIP, with `tokens` 1, 5, 10 or 26 vectors per frame (the pooled one, then the
    2x2, 3x3 or 5x5 means, row by row), or for CLIP "projected" (I = 1: the pooled one in the space shared with texts);
    for SmolVLM2 it is "mean" (of the whole picture's vectors, I = 1), "all" of them (I = P/s^2), or "top-left-tile"
    (I = 1: the first vector of the first tile, see preprocess.py).
    """

    def __init__(self, config: VisionConfig, preprocessing: Preprocessing, pool: str, tokens: int):
        super().__init__()
        self.config, self.preprocessing, self.pool, self.tokens = config, preprocessing, pool, tokens
        self.tower = Tower(config)
        if config.model_type == "siglip":
            self.head = PoolingHead(config)
        elif config.model_type == "smolvlm":
            self.connector = Connector(config)
        elif pool == "projected":
            self.projection = nn.Linear(config.hidden_size, config.output_size, bias=False)

    @property
    def vectors_per_frame(self) -> int:
        """I"""
        if self.pool == "all":
            return (self.config.grid // self.config.scale_factor) ** 2
        return self.tokens

    @property
    def width(self) -> int:
        """D"""
        return self.config.hidden_size if self.pool == "pooled" else self.config.output_size

    def forward(self, pictures: list[Tensor]) -> Tensor:
        pixels = prepare(pictures, self.preprocessing, tile=self.pool == "top-left-tile")  # [B, 3, S, S]
        return self.pool_patches(self.tower(pixels)).float()  # [B, I, D]

    def pool_patches(self, x: Tensor) -> Tensor:
        """The last hidden state, [B, P, C] or CLIP's [B, 1 + P, C] -> what is kept of it, [B, I, D]."""
        if self.config.model_type == "smolvlm":
            vectors = self.connector(x)  # [B, P/s^2, D]
            if self.pool == "mean":
                return vectors.mean(dim=1, keepdim=True)
            return vectors if self.pool == "all" else vectors[:, :1]
        if self.config.model_type == "clip":
            pooled, x = x[:, :1], x[:, 1:]  # [B, 1, C], [B, P, C]
        else:
            pooled = self.head(x)[:, None]
        if self.pool == "projected":
            return self.projection(pooled)
        grid = GRID_OF_TOKENS[self.tokens]
        return torch.cat([pooled, grid_means(x, grid)], dim=1) if grid else pooled


# ---- reading the weights -------------------------------------------------------------------------


def tensor_names(encoder: VisionEncoder) -> dict[str, list[str]]:
    """Our parameter names -> the checkpoint's, several where ours is theirs stacked along the first dimension.

    SigLIP's head has the stacked query, key and value of torch's MultiheadAttention: "#q" and "#kv" are parts of it.
    """
    names = {  # of every family; those that this encoder has are picked out at the end
        "tower.patches.weight": ["vision_model.embeddings.patch_embedding.weight"],
        "tower.patches.bias": ["vision_model.embeddings.patch_embedding.bias"],
        "tower.class_token": ["vision_model.embeddings.class_embedding"],
        "tower.positions": ["vision_model.embeddings.position_embedding.weight"],
        "head.probe": ["vision_model.head.probe"],
        "projection.weight": ["visual_projection.weight"],
        "connector.proj.weight": ["connector.modality_projection.proj.weight"],
    }
    for kind in ("weight", "bias"):
        names[f"tower.norm_before.{kind}"] = [f"vision_model.pre_layrnorm.{kind}"]  # sic
        names[f"tower.norm.{kind}"] = [f"vision_model.post_layernorm.{kind}"]
        for i in range(encoder.config.num_hidden_layers):
            ours, theirs = f"tower.blocks.{i}", f"vision_model.encoder.layers.{i}"
            names[f"{ours}.norm1.{kind}"] = [f"{theirs}.layer_norm1.{kind}"]
            names[f"{ours}.attention.qkv.{kind}"] = [f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            names[f"{ours}.attention.out.{kind}"] = [f"{theirs}.self_attn.out_proj.{kind}"]
            names[f"{ours}.norm2.{kind}"] = [f"{theirs}.layer_norm2.{kind}"]
            names[f"{ours}.mlp.fc1.{kind}"] = [f"{theirs}.mlp.fc1.{kind}"]
            names[f"{ours}.mlp.fc2.{kind}"] = [f"{theirs}.mlp.fc2.{kind}"]
        names[f"head.query.{kind}"] = [f"vision_model.head.attention.in_proj_{kind}#q"]
        names[f"head.key_value.{kind}"] = [f"vision_model.head.attention.in_proj_{kind}#kv"]
        names[f"head.out.{kind}"] = [f"vision_model.head.attention.out_proj.{kind}"]
        names[f"head.norm.{kind}"] = [f"vision_model.head.layernorm.{kind}"]
        names[f"head.mlp.fc1.{kind}"] = [f"vision_model.head.mlp.fc1.{kind}"]
        names[f"head.mlp.fc2.{kind}"] = [f"vision_model.head.mlp.fc2.{kind}"]
    return {name: names[name] for name, _ in encoder.named_parameters()}


def load_vision_encoder(directory: Path, pool: str | None = None, tokens: int | None = None) -> VisionEncoder:
    """The encoder of a downloaded SigLIP, CLIP or SmolVLM2 checkpoint, float32 on the CPU, in eval mode.

    `pool` and `tokens` default to what the family offers first: one vector per frame. Only the vision tensors are read,
    from one safetensors file or from the shards that the index names.
    Raises ProspectError: not such a checkpoint, a pooling it does not have, or tensors that are missing or misshapen
    (named together).
    """
    directory = Path(directory)
    config = read_config(directory)
    preprocessing = read_preprocessing(directory, config.model_type, config.image_size)
    pool = pool or POOLS[config.model_type][0]
    tokens = tokens or 1
    offered = GRID_OF_TOKENS if pool == "pooled" else (1,)
    if pool not in POOLS[config.model_type] or tokens not in offered:
        what = f"pooling {pool!r} with {tokens} tokens per frame is not what a {config.model_type} tower gives"
        remedy = "pooled: SigLIP and CLIP, 1, 5, 10 or 26 tokens; projected: CLIP; mean, all, top-left-tile: SmolVLM2"
        raise ProspectError(what, where=str(directory), remedy=remedy)
    with torch.device("meta"):  # no memory is filled with random numbers that are replaced at once
        encoder = VisionEncoder(config, preprocessing, pool, tokens)
    encoder.load_state_dict(_read_tensors(directory, encoder), assign=True)
    return encoder.requires_grad_(False).eval()


def _read_tensors(directory: Path, encoder: VisionEncoder) -> dict[str, Tensor]:
    index = directory / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    opened = {}
    for name in files:
        try:
            file = safetensors.safe_open(directory / name, framework="pt")
        except Exception as error:  # OSError when it is not there, SafetensorError when it is broken
            remedy = "download the safetensors of the checkpoint again"
            raise ProspectError(f"cannot be read: {error}", where=str(directory / name), remedy=remedy) from None
        opened |= dict.fromkeys(file.keys(), file)

    # The tower is called model.vision_model.X in SmolVLM, vision_model.X elsewhere, or X alone when saved by itself.
    probe = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(probe) for name in opened if name.endswith(probe)]
    prefix = prefixes[0] if prefixes else "vision_model."
    outer = prefix.removesuffix("vision_model.")

    def read(name: str) -> Tensor | None:
        name, _, part = name.partition("#")
        inner = name.removeprefix("vision_model.")
        name = prefix + inner if inner != name else outer + name
        if name not in opened:
            return None
        tensor = opened[name].get_tensor(name).float()
        third = len(tensor) // 3
        return {"": tensor, "q": tensor[:third], "kv": tensor[third:]}[part]

    state, problems = {}, []
    parameters = dict(encoder.named_parameters())
    for ours, theirs in tensor_names(encoder).items():
        parts = [read(name) for name in theirs]
        absent = [name.partition("#")[0] for name, part in zip(theirs, parts) if part is None]
        problems += [f"{name} is missing" for name in absent]
        if not absent:
            state[ours] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            shape, wanted = list(state[ours].shape), list(parameters[ours].shape)
            if shape != wanted:
                problems.append(f"{theirs[0]} has shape {shape}, wanted {wanted}")
    if problems:
        more = "; ..." if len(problems) > 8 else ""
        what = f"{len(problems)} tensors do not fit config.json: {'; '.join(problems[:8])}{more}"
        raise ProspectError(what, where=str(directory), remedy="download the complete checkpoint again")
    return state


def weights_sha256(encoder: VisionEncoder) -> str:
    """A fingerprint of exactly these weights, so that embeddings of two towers are never confused."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def checkpoint_revision(directory: Path) -> str | None:
    """The commit that `directory` was downloaded from, where the Hugging Face tools recorded it; else None.

    A cache names its directory ``snapshots/COMMIT``; ``download --local-dir`` keeps it in a note for each file.
    """
    commit = re.compile(r"[0-9a-f]{40}")
    resolved = directory.resolve()
    if commit.fullmatch(resolved.name):
        return resolved.name
    for note in sorted((resolved / ".cache" / "huggingface" / "download").glob("config.json.metadata")):
        first_line = note.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip()
        if commit.fullmatch(first_line):
            return first_line
    return None
