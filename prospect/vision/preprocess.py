"""A picture becomes the square that a vision tower looks at, just as the checkpoint's own processor would make it.

    uint8 [3, H, W]    SigLIP     -> S x S, whatever its shape
                       CLIP       -> its shorter side at a given length -> the middle S x S
                       SmolVLM2   -> its longer side at a given length -> whole tiles of S x S -> all of it as S x S
    -> rescaled to 0..1 and normalised, channel by channel: float32 [3, S, S]

CLIP's middle square leaves 44 % of a 16:9 frame unseen. To squeeze the whole frame into the square instead, as
ProAssist does, write into preprocessor_config.json: "do_center_crop": false, "size": {"height": S, "width": S}.

SmolVLM2's processor turns a picture into a *list*: the picture is enlarged, cut into tiles (4 x 4 of them when it is
square), and the whole picture, scaled down, comes LAST. Taking element [0, 0] of what the model makes of that list, in
the belief that it is a global summary, gives one corner token of the top left tile: the rest of the picture is never
looked at. Here the whole picture is prepared; `tile=True` is for files of the other kind.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from prospect.errors import ProspectError
from prospect.files import read_json

WANTED = "give the directory of a downloaded SigLIP, CLIP or SmolVLM2 checkpoint"

# ---- what the directory says ---------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the tower's input, from preprocessor_config.json."""

    image_size: int  # S: the side of the square that enters the tower
    shortest_edge: int | None  # CLIP: the picture is first scaled to this, and its middle S x S kept
    longest_edge: int | None  # SmolVLM: the picture is first scaled to this; both None: straight to S x S
    splits: bool  # SmolVLM: the processor cuts tiles of S x S before it scales the whole picture down
    kernel: str  # "bilinear", "bicubic" or "lanczos"
    rescale: float  # a pixel of 0..255 is multiplied by this (1/255), or 1.0
    mean: tuple[float, float, float]  # then (x - mean) / std, channel by channel
    std: tuple[float, float, float]


def read_preprocessing(directory: Path, family: str, side: int) -> Preprocessing:
    """How pictures are prepared, from preprocessor_config.json (or, in newer checkpoints, processor_config.json).

    family: "siglip", "clip" or "smolvlm"; side: the tower's image_size, S.
    ProspectError when a step is asked for that is not known here, or the result would not fit the tower.
    """
    path = directory / "preprocessor_config.json"
    if not path.exists() and (directory / "processor_config.json").exists():
        path = directory / "processor_config.json"
    settings = read_json(path, if_missing=WANTED)
    settings = settings.get("image_processor", settings)
    where = str(path)

    def sides(name: str, *of_a_number: str) -> dict:
        """A size by the names of its sides. Older files give one number, which stands for these."""
        size = settings.get(name)
        return size if isinstance(size, dict) else dict.fromkeys(of_a_number, size)

    size, crop = sides("size", "shortest_edge"), sides("crop_size", "height", "width")
    crops = settings.get("do_center_crop", family == "clip")
    edge, final = None, [size.get("height"), size.get("width")]
    if family == "smolvlm":
        edge, final = "longest_edge", [sides("max_image_size").get("longest_edge")]
    elif family == "clip" and crops:
        edge, final = "shortest_edge", [crop.get("height"), crop.get("width")]

    kernel = {1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(settings.get("resample"))
    unknown = [f"no {name}" for name in ("do_resize", "do_normalize") if not settings.get(name, True)]
    if kernel is None:
        unknown.append(f"resample {settings.get('resample')!r}")
    if crops and family != "clip":
        unknown.append("do_center_crop")
    elif edge and not (type(size.get(edge)) is int and size[edge] >= (side if crops else 1)):
        unknown.append(f"size {size}")
    remedy = "give the preprocessor_config.json that was published with the checkpoint"
    if unknown:
        what = f"{', '.join(unknown)}: not a preprocessing that is known here"
        raise ProspectError(what, where=where, remedy=remedy)
    if any(length != side for length in final):
        what = f"pictures become {' x '.join(map(str, final))} pixels, the tower has positions for {side}"
        raise ProspectError(what, where=where, remedy=remedy)
    mean, std = tuple(settings.get("image_mean", ())), tuple(settings.get("image_std", ()))
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ProspectError("image_mean or image_std is not three numbers", where=where, remedy="copy the file again")
    return Preprocessing(
        image_size=side,
        shortest_edge=size[edge] if edge == "shortest_edge" else None,
        longest_edge=size[edge] if edge == "longest_edge" else None,
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
        if preprocessing.shortest_edge is not None:
            height, width = shortest_edge_size(*group.shape[-2:], preprocessing.shortest_edge)
            top, left = (height - side) // 2, (width - side) // 2
            group = resize(group, height, width, preprocessing.kernel)[..., top : top + side, left : left + side]
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


def shortest_edge_size(height: int, width: int, shortest: int) -> tuple[int, int]:
    """CLIP's first step: the shorter side becomes `shortest`, the other keeps the shape (rounded down)."""
    longer = int(shortest * max(height, width) / min(height, width))
    return (shortest, longer) if height <= width else (longer, shortest)


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
