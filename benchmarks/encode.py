"""Frames per second of the SigLIP tower: prospect/vision/tower.py against transformers, same weights, same pictures.

    pip install -r requirements-vision.txt transformers==5.23.0
    python benchmarks/encode.py [--batch 2] [--repeats 5] [--threads 2] [--layers 27]

The shape is so400m-patch14-384 with random weights: 27 blocks of width 1152, 729 patches, 0.67 TFLOP per picture. On a
GPU both run under amp in fp16, on the CPU in fp32. The two take turns, so that other load slows both, and each turn's
ratio is taken before the median. Only the towers are compared, from pixels to the pooled vector; preparing a 720p
picture is timed by itself. With --peak (the device's TFLOP/s), the share of it that is reached is printed too.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself, not installed

from prospect.errors import run_entry_point
from prospect.vision.preprocess import prepare
from prospect.vision.tower import VisionConfig, load_vision_encoder

SHAPE = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, image_size=384, patch_size=14)
PREPROCESSING = dict(size={"height": 384, "width": 384}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def flops(config: VisionConfig) -> float:
    """Floating-point operations per picture; a multiplication and an addition count as two."""
    P, C, hidden = config.grid**2, config.hidden_size, config.intermediate_size
    patches = 2 * P * 3 * config.patch_size**2 * C
    block = 2 * P * (4 * C * C + 2 * C * hidden) + 2 * 2 * P * P * C  # linear maps, then scores and mixing
    head = 2 * P * 2 * C * C  # keys and values; the rest is for one vector
    return patches + config.num_hidden_layers * block + head


def seconds(function: Callable[[], torch.Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Compared:
    """Pictures per second of both, how far their answers differ at most, and the seconds that preparing one takes."""

    theirs: float
    ours: float
    ratios: list[float]  # of each turn
    difference: float
    preparing: float
    flops: float  # of a picture


@torch.inference_mode()
def compare(device: torch.device, batch: int, repeats: int, layers: int) -> Compared:
    """Both towers in turns on random pictures."""
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=layers, **SHAPE)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
        ours = load_vision_encoder(Path(folder))
    theirs, ours = theirs.to(device), ours.to(device)
    pixels = torch.rand(batch, 3, 384, 384, device=device) * 2 - 1

    def run_theirs() -> torch.Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return theirs(pixels).pooler_output

    def run_ours() -> torch.Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return ours.pool_patches(ours.tower(pixels))[:, 0]

    difference = (run_theirs().float() - run_ours().float()).abs().max().item()  # warms both up
    turns = [(seconds(run_theirs, device), seconds(run_ours, device)) for _ in range(repeats)]
    their_time, our_time = (statistics.median(times) for times in zip(*turns))
    picture = torch.randint(0, 256, (3, 720, 1280), dtype=torch.uint8, device=device)
    prepare([picture], ours.preprocessing)
    preparing = seconds(lambda: prepare([picture], ours.preprocessing), device)
    ratios = [their_seconds / our_seconds for their_seconds, our_seconds in turns]
    return Compared(batch / their_time, batch / our_time, ratios, difference, preparing, flops(ours.config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="pictures at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=27, help="fewer for a quick look")
    parser.add_argument("--peak", type=float, help="the device's peak in TFLOP/s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    found = compare(device, arguments.batch, arguments.repeats, arguments.layers)
    print(f"{device.type}, {arguments.threads} threads, batches of {arguments.batch}, {arguments.layers} blocks, "
          f"{found.flops / 1e12:.3f} TFLOP per picture; largest difference {found.difference:.1e}")  # fmt: skip
    for name, speed in (("transformers", found.theirs), ("prospect", found.ours)):
        share = f" = {speed * found.flops / 1e12 / arguments.peak:.0%} of peak" if arguments.peak else ""
        print(f"{name:>12}  {speed:8.3f} frames/s  {speed * found.flops / 1e9:10.1f} GFLOP/s{share}")
    each_turn = ", ".join(f"{ratio:.3f}" for ratio in found.ratios)
    print(f"prospect / transformers, frames per second: {statistics.median(found.ratios):.3f} (turns {each_turn})")
    print(f"preparing a picture of 1280 x 720: {1000 * found.preparing:.0f} ms")


if __name__ == "__main__":
    run_entry_point(main)
