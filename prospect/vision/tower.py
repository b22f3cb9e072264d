"""The vision tower: pictures in, the vectors that a language model sees as one frame out.

Two published families are read, straight from their Hugging Face directories, without any other library:

    SigLIP    (google/siglip-so400m-patch14-384, D = 1152)             picture -> patches -> one pooled vector
    SmolVLM2  (HuggingFaceTB/SmolVLM2-2.2B-Instruct, D = 2048)         picture -> patches -> connector -> a few vectors

They share the tower, a plain pre-norm vision transformer (ViT, arXiv 2010.11929; SigLIP, arXiv 2303.15343):

    picture [3, H, W] uint8 -> resized, rescaled, normalised [3, S, S]
            -> cut into P = (S // patch)^2 patches, each one linear map to C numbers, plus a learned position
            -> N_L blocks: x += attention(norm(x)); x += mlp(norm(x))
            -> norm                                               the last hidden state, [P, C]

and differ in what follows. SigLIP lets one learned query look at all patches (attention pooling, arXiv 1810.00825):
that is its "CLS" vector. ProAssist (arXiv 2506.05904) uses it as I = 1 vector per frame, and adds 2x2 or 3x3 means of
the last hidden state for I = 5 or 10. SmolVLM2 (arXiv 2504.05299) folds every s x s square of patches into one vector
of s*s*C numbers (pixel shuffle) and maps it to the language model's width: P / s^2 vectors per picture (81 in 2.2B).

There is no CLS token in SmolVLM2, and its processor turns a picture into a *list*: the picture is enlarged, cut into
tiles (4 x 4 of them when it is square), and the whole picture, scaled down, comes LAST. Taking element [0, 0] of that
list, in the belief that it is a global summary, gives one corner token of the top left tile: the rest of the picture is
never looked at. Here the whole picture is encoded; `pool="top-left-tile"` reproduces files of the other kind.

Dimensions: B pictures, P patches, C width of the tower, D width of what comes out, I vectors per frame, S picture side.
"""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prospect.errors import ProspectError
from prospect.files import read_json

POOLS = {"siglip": ("pooled",), "smolvlm": ("mean", "all", "top-left-tile")}  # the first of each is the default
GRID_OF_TOKENS = {1: 0, 5: 2, 10: 3}  # SigLIP: I vectors per frame = the pooled one + this many squared means


WANTED = "give the directory of a downloaded SigLIP or SmolVLM2 checkpoint"

# ---- what the directory says ---------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """The shape of the tower, from config.json. Fields have the names and the defaults of Hugging Face's files."""

    model_type: str  # "siglip" or "smolvlm"
    hidden_size: int  # C
    intermediate_size: int  # width inside the MLP
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # S, pixels
    patch_size: int  # pixels
    layer_norm_eps: float
    hidden_act: str  # "gelu_pytorch_tanh" or "gelu"
    scale_factor: int  # SmolVLM: s, the side of the squares that the connector folds; SigLIP: 1
    output_size: int  # D: C for SigLIP, the language model's width for SmolVLM

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that fill no patch (6 of 384 at patch 14) are never seen."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the tower's input, from preprocessor_config.json."""

    image_size: int  # S: the side of the square that enters the tower
    longest_edge: int | None  # SmolVLM: the picture is first scaled to this; None: straight to S x S
    splits: bool  # SmolVLM: the processor cuts tiles of S x S before it scales the whole picture down
    kernel: str  # "bilinear", "bicubic" or "lanczos"
    rescale: float  # a pixel of 0..255 is multiplied by this (1/255), or 1.0
    mean: tuple[float, float, float]  # then (x - mean) / std, channel by channel
    std: tuple[float, float, float]


def read_config(directory: Path) -> VisionConfig:
    """The tower's shape from `directory`/config.json. ProspectError when it is not a SigLIP or SmolVLM checkpoint."""
    where = str(directory / "config.json")
    whole = read_json(directory / "config.json", if_missing=WANTED)
    families = {"siglip": "siglip", "siglip_vision_model": "siglip", "smolvlm": "smolvlm"}
    model_type = families.get(whole.get("model_type"))
    if model_type is None:
        what = f"model_type {whole.get('model_type')!r} is not a vision tower that is known here"
        raise ProspectError(what, where=where, remedy=WANTED)
    # Files leave out what equals the family's default, so the defaults belong to the format.
    defaults = {
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
    }
    if model_type == "siglip":
        defaults |= {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    else:
        defaults |= {"hidden_size": 1152, "num_attention_heads": 16, "image_size": 224, "patch_size": 32}
    fields = defaults | (whole if whole["model_type"] == "siglip_vision_model" else whole.get("vision_config") or {})

    if fields.get("vision_use_head", True) is False:
        raise ProspectError("this SigLIP has no pooling head", where=where, remedy="use a checkpoint that has one")
    if fields["hidden_act"] not in ("gelu_pytorch_tanh", "gelu"):
        what = f"activation {fields['hidden_act']!r} is not known here"
        raise ProspectError(what, where=where, remedy="use a GELU tower")
    text_width = (whole.get("text_config") or {}).get("hidden_size")
    output_size = fields["hidden_size"] if model_type == "siglip" else text_width
    for name, value in [*((name, fields[name]) for name in defaults), ("text_config.hidden_size", output_size)]:
        if name not in ("hidden_act", "layer_norm_eps") and (type(value) is not int or value < 1):
            what = f"{name} is {value!r}, wanted a positive whole number"
            raise ProspectError(what, where=where, remedy="copy it again")
    config = VisionConfig(
        model_type=model_type,
        scale_factor=1 if model_type == "siglip" else whole.get("scale_factor", 2),
        output_size=output_size,
        **{name: fields[name] for name in defaults},
    )
    if config.hidden_size % config.num_attention_heads or config.grid < 1 or config.grid % config.scale_factor:
        heads, grid = f"width {config.hidden_size} with {config.num_attention_heads} heads", f"a grid of {config.grid}"
        what = f"{heads}, {grid} patches with scale_factor {config.scale_factor}: one does not divide the other"
        raise ProspectError(what, where=where, remedy="copy the checkpoint again")
    return config


def read_preprocessing(directory: Path, config: VisionConfig) -> Preprocessing:
    """How pictures are prepared, from preprocessor_config.json (or, in newer checkpoints, processor_config.json).

    ProspectError when a step is asked for that is not known here, or the result would not fit the tower.
    """
    path = directory / "preprocessor_config.json"
    if not path.exists() and (directory / "processor_config.json").exists():
        path = directory / "processor_config.json"
    settings = read_json(path, if_missing=WANTED)
    settings = settings.get("image_processor", settings)
    where = str(path)

    kernel = {1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(settings.get("resample"))
    size, tile = (settings[name] if isinstance(settings.get(name), dict) else {} for name in ("size", "max_image_size"))
    if config.model_type == "siglip":
        sides, longest_edge = [size.get("height"), size.get("width")], None
    else:
        sides, longest_edge = [tile.get("longest_edge")], size.get("longest_edge")
    missing = [name for name in ("do_resize", "do_normalize") if not settings.get(name, True)]
    missing += [name for name in ("do_center_crop",) if settings.get(name)]
    if kernel is None or missing or (config.model_type == "smolvlm" and type(longest_edge) is not int):
        asked = f"resample {settings.get('resample')!r}, size {size}, {', '.join(missing) or 'no crop'}"
        what = f"{asked}: not a preprocessing that is known here"
        remedy = "give the preprocessor_config.json that was published with the checkpoint"
        raise ProspectError(what, where=where, remedy=remedy)
    if any(side != config.image_size for side in sides):
        what = f"pictures become {' x '.join(map(str, sides))} pixels, the tower has positions for {config.image_size}"
        remedy = "give the preprocessor_config.json that was published with the checkpoint"
        raise ProspectError(what, where=where, remedy=remedy)
    mean, std = tuple(settings.get("image_mean", ())), tuple(settings.get("image_std", ()))
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ProspectError("image_mean or image_std is not three numbers", where=where, remedy="copy the file again")
    return Preprocessing(
        image_size=config.image_size,
        longest_edge=longest_edge,
        splits=settings.get("do_image_splitting", True),
        kernel=kernel,
        rescale=settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0,
        mean=mean,
        std=std,
    )


# ---- preparing a picture -------------------------------------------------------------------------


def bicubic(x: Tensor) -> Tensor:
    """The cubic convolution of Keys (1981) with a = -1/2."""
    x = x.abs()
    return torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)


KERNELS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {  # name: (how far it reaches, weight at distance x)
    "bilinear": (1.0, lambda x: 1 - x.abs()),
    "bicubic": (2.0, bicubic),
    "lanczos": (3.0, lambda x: torch.sinc(x) * torch.sinc(x / 3)),
}
# Pillow's weights are integers of 1/2^22: 8 bits of pixel + 22 + room for a sign and an overshoot = 32.
FIXED_POINT = 22


@lru_cache(maxsize=64)
def resampling_weights(n_in: int, n_out: int, kernel: str) -> tuple[Tensor, Tensor]:
    """For each of n_out pixels, which of n_in pixels it is made of and their weights.

    Output pixel i has its centre at (i + 1/2) * n_in / n_out of the input. When the picture shrinks, the kernel is
    stretched by the same factor, so that every input pixel counts (antialiasing). Returns indices [T, n_out] int64 and
    weights [T, n_out] int32 in units of 2**-FIXED_POINT, T the taps; unused taps have weight 0.
    Source: the convention of Pillow's ``Image.resize``, which the reference processors call.
    """
    reach, weight_at = KERNELS[kernel]
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    centre = (torch.arange(n_out, dtype=torch.float64) + 0.5) * scale  # [n_out]
    first = (centre - reach * stretch + 0.5).long().clamp(min=0)
    end = (centre + reach * stretch + 0.5).long().clamp(max=n_in)
    index = first + torch.arange(int((end - first).max()))[:, None]  # [T, n_out]
    weights = weight_at(((index - centre + 0.5) / stretch).clamp(-reach, reach))
    weights = torch.where(index < end, weights, 0.0)
    weights = weights / weights.sum(0) * 2**FIXED_POINT
    weights = (weights + 0.5 * weights.sign()).to(torch.int32)  # rounds away from zero at the half, as Pillow does
    return index.clamp(max=n_in - 1), weights


def resize(pictures: Tensor, height: int, width: int, kernel: str) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, height, width], bit for bit what Pillow (up to 12) gives, on any device.

    First along the rows, then along the columns; the picture between the two is rounded to whole numbers. (Pillow 13
    takes the columns of some tall pictures first, which moves single pixels by a few levels; torch does not.)
    """
    x = pictures.permute(3, 0, 1, 2)  # [W, B, 3, H]: the side that is resized comes first, so that a tap is whole rows
    for n_out in (width, height):
        n_in = len(x)
        if n_in != n_out:
            index, weights = (table.to(x.device) for table in resampling_weights(n_in, n_out, kernel))
            rows = x.contiguous().int()
            x = torch.full((n_out, *rows.shape[1:]), 1 << (FIXED_POINT - 1), dtype=torch.int32, device=rows.device)
            for tap, weight in zip(index, weights):  # few: 4 where bicubic enlarges, 21 from 1920 to 384
                x.addcmul_(rows.index_select(0, tap), weight[:, None, None, None])
            x = (x >> FIXED_POINT).clamp_(0, 255).to(torch.uint8)
        x = x.permute(3, 1, 2, 0)  # [W, B, 3, H] -> [H, B, 3, W], and after the second turn back again
    return x.permute(1, 2, 3, 0)


def prepare(pictures: list[Tensor], preprocessing: Preprocessing, tile: bool = False) -> Tensor:
    """Pictures, uint8 [3, H, W] of any sizes -> the tower's input [B, 3, S, S] float32.

    The whole picture by default; with `tile` the top left of the tiles that SmolVLM's processor cuts.
    """
    side = preprocessing.image_size
    out: list[Tensor | None] = [None] * len(pictures)
    for shape in {picture.shape for picture in pictures}:  # pictures of one size go through together
        members = [i for i, picture in enumerate(pictures) if picture.shape == shape]
        group = torch.stack([pictures[i] for i in members])  # [b, 3, H, W]
        if preprocessing.longest_edge is not None:
            height, width = longest_edge_size(*group.shape[-2:], preprocessing.longest_edge)
            group = resize(group, height, width, preprocessing.kernel)
            if preprocessing.splits:
                # Enlarged to whole tiles. The picture that enters last is made from *this* one, so this step is part
                # of what the whole picture looks like, too.
                height, width = whole_tiles_size(height, width, side)
                group = resize(group, height, width, preprocessing.kernel)
        group = group[..., :side, :side] if tile else resize(group, side, side, preprocessing.kernel)
        for i, picture in zip(members, group):
            out[i] = picture
    pixels = torch.stack(out).float() * preprocessing.rescale  # [B, 3, S, S]
    mean = torch.tensor(preprocessing.mean, device=pixels.device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=pixels.device)[:, None, None]
    return (pixels - mean) / std


def longest_edge_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """SmolVLM's first step: the longer side becomes `longest`, the other keeps the shape and is made even (upwards)."""
    if width >= height:
        short = int(longest / (width / height))
        return max(short + short % 2, 1), longest
    short = int(longest * (width / height))
    return longest, max(short + short % 2, 1)


def whole_tiles_size(height: int, width: int, side: int) -> tuple[int, int]:
    """SmolVLM's second step: both sides rounded up to whole tiles; the shorter follows the enlarged longer one."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / aspect) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * aspect) / side) * side


# ---- the tower -----------------------------------------------------------------------------------


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
        self.approximate = "tanh" if config.hidden_act == "gelu_pytorch_tanh" else "none"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


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
    """[B, 3, S, S] -> last hidden state [B, P, C].

    Patch i (row by row) has position i. SmolVLM's reference looks positions up by the fraction of the side at which a
    patch starts; for whole pictures and tiles, which fill the square, and the published grids (27 and 32 patches
    per side) that is the same.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patches = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(torch.empty(config.grid**2, config.hidden_size))  # [P, C]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions  # [B, P, C]
        for block in self.blocks:
            x = block(x)
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

    `pool` is "pooled" for SigLIP, with `tokens` 1, 5 or 10 vectors per frame (the pooled one, then the 2x2 or 3x3
    means, row by row); for SmolVLM2 it is "mean" (of the whole picture's vectors, I = 1), "all" of them (I = P/s^2), or
    "top-left-tile" (I = 1: the first vector of the first tile, see the top of this file).
    """

    def __init__(self, config: VisionConfig, preprocessing: Preprocessing, pool: str, tokens: int):
        super().__init__()
        self.config, self.preprocessing, self.pool, self.tokens = config, preprocessing, pool, tokens
        self.tower = Tower(config)
        if config.model_type == "siglip":
            self.head = PoolingHead(config)
        else:
            self.connector = Connector(config)

    @property
    def vectors_per_frame(self) -> int:
        """I"""
        if self.pool == "all":
            return (self.config.grid // self.config.scale_factor) ** 2
        return self.tokens

    def forward(self, pictures: list[Tensor]) -> Tensor:
        pixels = prepare(pictures, self.preprocessing, tile=self.pool == "top-left-tile")  # [B, 3, S, S]
        return self.pool_patches(self.tower(pixels)).float()  # [B, I, D]

    def pool_patches(self, x: Tensor) -> Tensor:
        """The last hidden state [B, P, C] -> what is kept of it, [B, I, D]."""
        if self.config.model_type == "siglip":
            pooled = self.head(x)[:, None]  # [B, 1, C]
            grid = GRID_OF_TOKENS[self.tokens]
            return torch.cat([pooled, grid_means(x, grid)], dim=1) if grid else pooled
        vectors = self.connector(x)  # [B, P/s^2, D]
        if self.pool == "mean":
            return vectors.mean(dim=1, keepdim=True)
        return vectors if self.pool == "all" else vectors[:, :1]


# ---- reading the weights -------------------------------------------------------------------------


def tensor_names(config: VisionConfig) -> dict[str, list[str]]:
    """Our parameter names -> the checkpoint's, several where ours is theirs stacked along the first dimension.

    SigLIP's head has the stacked query, key and value of torch's MultiheadAttention: "#q" and "#kv" are parts of it.
    """
    names = {
        "tower.patches.weight": ["vision_model.embeddings.patch_embedding.weight"],
        "tower.patches.bias": ["vision_model.embeddings.patch_embedding.bias"],
        "tower.positions": ["vision_model.embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        names[f"tower.norm.{kind}"] = [f"vision_model.post_layernorm.{kind}"]
        for i in range(config.num_hidden_layers):
            ours, theirs = f"tower.blocks.{i}", f"vision_model.encoder.layers.{i}"
            names[f"{ours}.norm1.{kind}"] = [f"{theirs}.layer_norm1.{kind}"]
            names[f"{ours}.attention.qkv.{kind}"] = [f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            names[f"{ours}.attention.out.{kind}"] = [f"{theirs}.self_attn.out_proj.{kind}"]
            names[f"{ours}.norm2.{kind}"] = [f"{theirs}.layer_norm2.{kind}"]
            names[f"{ours}.mlp.fc1.{kind}"] = [f"{theirs}.mlp.fc1.{kind}"]
            names[f"{ours}.mlp.fc2.{kind}"] = [f"{theirs}.mlp.fc2.{kind}"]
    if config.model_type == "smolvlm":
        names["connector.proj.weight"] = ["connector.modality_projection.proj.weight"]
        return names
    names["head.probe"] = ["vision_model.head.probe"]
    for kind in ("weight", "bias"):
        names[f"head.query.{kind}"] = [f"vision_model.head.attention.in_proj_{kind}#q"]
        names[f"head.key_value.{kind}"] = [f"vision_model.head.attention.in_proj_{kind}#kv"]
        names[f"head.out.{kind}"] = [f"vision_model.head.attention.out_proj.{kind}"]
        names[f"head.norm.{kind}"] = [f"vision_model.head.layernorm.{kind}"]
        names[f"head.mlp.fc1.{kind}"] = [f"vision_model.head.mlp.fc1.{kind}"]
        names[f"head.mlp.fc2.{kind}"] = [f"vision_model.head.mlp.fc2.{kind}"]
    return names


def load_vision_encoder(directory: Path, pool: str | None = None, tokens: int | None = None) -> VisionEncoder:
    """The encoder of a downloaded SigLIP or SmolVLM2 checkpoint, float32 on the CPU, in eval mode.

    `pool` and `tokens` default to what the family offers first: one vector per frame. Only the vision tensors are read,
    from one safetensors file or from the shards that the index names.
    Raises ProspectError: not such a checkpoint, a pooling it does not have, or tensors that are missing or misshapen
    (named together).
    """
    directory = Path(directory)
    config = read_config(directory)
    preprocessing = read_preprocessing(directory, config)
    pool = pool or POOLS[config.model_type][0]
    tokens = tokens or 1
    offered = GRID_OF_TOKENS if config.model_type == "siglip" else (1,)
    if pool not in POOLS[config.model_type] or tokens not in offered:
        what = f"pooling {pool!r} with {tokens} tokens per frame is not what a {config.model_type} tower gives"
        remedy = "SigLIP: 1, 5 or 10 tokens, pooled; SmolVLM2: mean, all or top-left-tile"
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

    # The tower is called vision_model.X in SigLIP, model.vision_model.X in SmolVLM, or X alone when saved by itself.
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
    for ours, theirs in tensor_names(encoder.config).items():
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
