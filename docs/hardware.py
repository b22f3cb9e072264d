"""Writes the table of docs/cluster.md: what fits on which cards.

    python docs/hardware.py

Each figure is that of `train.py --dry-run --ranks N`, with the logits of a third of the tokens on top.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prospect.config import Config, ModelSection, TrainConfig
from prospect.memory import memory_of, planned_model

PAGE = Path(__file__).resolve().parent / "cluster.md"
BEGIN, END = "<!-- begin: python docs/hardware.py -->\n", "<!-- end -->\n"
MODELS = ("SmolLM2-1.7B", "Llama-3.2-3B", "Llama-3.1-8B")
CARDS = (24, 40, 80, 141)  # GB
USABLE = 0.9  # of a card: the rest is for CUDA, workspace and fragments


def gigabytes(model: str, tune: str) -> dict[tuple[bool, int], float]:
    """What a run of 4,096 tokens per rank in bf16 takes of each card, by activation checkpointing and ranks (FSDP)."""
    train = TrainConfig(tune=tune, precision="bf16", parallel="fsdp")
    config = Config(model=ModelSection(backbone=model), train=train)
    config.data.batch_tokens = 4096
    planned = planned_model(config)
    logits = config.data.batch_tokens / 3 * planned.config.vocab_size * 10  # bf16, fp32, and the gradient in fp32
    needed = {}
    for train.activation_checkpointing in (False, True):
        for ranks in (1, 4, 8):
            needed[train.activation_checkpointing, ranks] = (memory_of(planned, config, ranks).total + logits) / 1e9
    return needed


def cell(needed: float) -> str:
    fitting = [f"{card} GB" for card in CARDS if needed <= USABLE * card]
    return f"{needed:.1f}: {fitting[0] if fitting else 'none'}"


def table() -> str:
    lines = [
        "| model | trained | activation checkpointing | 1 card | 4 cards | 8 cards |",
        "|---|---|---|---:|---:|---:|",
    ]
    for model in MODELS:
        for tune, trained in (("full", "all"), ("lora", "LoRA, rank 16")):
            needed = gigabytes(model, tune)
            for checkpointing in (False, True):
                cells = [cell(needed[checkpointing, ranks]) for ranks in (1, 4, 8)]
                lines.append(f"| {' | '.join([model, trained, 'yes' if checkpointing else 'no', *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
