"""benchmarks/GPU.md of what benchmarks/gpu.py has measured: a section for each kind of stage, a table in each.

A stage without a result stands there as not yet measured, with the command that measures it.
"""

import statistics
from typing import Any

import numpy as np

Row = dict[str, Any]  # what was measured of one thing, by name

INTRODUCTION = """# On a GPU

`python benchmarks/gpu.py` measures all of this, in stages of at most 8 minutes; started again it does what is missing.
Weights are random but those of the default run. transformers computes in the same process on the same weights.
"""

SAME = """
Against the CPU in fp32: losses relative to their size, gradients to the largest number in their tensor, probabilities
as they are. In bf16 the card may be twice as far off as the CPU is in bf16.
"""
DEFAULT = """
The README's two commands; and the records of one checkpoint on the card against those on the CPU, in fp32.
"""
TRAINING = """
A sequence of 4,096 tokens per step: forward, backward, clipping and AdamW, as train.py does it, with fp32 weights and
bf16 arithmetic (LoRA: frozen weights in bf16). MFU is what a step needs, as added up below the table, per second, as a
share of the rate in NVIDIA's data sheet (bf16, dense); in brackets, of the rate of a large matrix product. "Announced"
is the figure of `train.py --dry-run`, without logits and workspace. transformers computes both losses in one pass over
all logits, and clips nothing.
"""
SILENT = """
In bf16, one token per frame. A step is one frame in every stream. The last column is what a frame must read, weights
and cache, in bytes per second, as a share of what a large matrix-vector product reads.
"""
WRITING = """
In bf16, turns of up to 32 tokens in all streams at once. Random weights repeat themselves, which ends a turn early: a
token's time is a turn's divided by its tokens. Tokens per second are of all streams together.
"""
PICTURES = """
SigLIP so400m, 27 blocks, fp16, from pixels to the pooled vector.
"""


def page(found: dict[str, dict[str, Any]], stages: list[str]) -> str:
    """The page. found: the results by stage; stages: all that there are."""
    sections = {
        "Does it compute the same?": ("correctness", SAME, correctness_table),
        "The default run": ("default-run", DEFAULT, default_table),
        "Training": ("train-", TRAINING, training_table),
        "Silent frames": ("stream-", SILENT, streaming_table),
        "Writing": ("generate-", WRITING, generation_table),
        "Pictures": ("encode", PICTURES, encoding_table),
    }
    parts = [INTRODUCTION, *sorted({f"Machine: {result['machine']}.\n" for result in found.values()})]
    for title, (begins, prose, table) in sections.items():
        names = [name for name in stages if name.startswith(begins)]
        rows = [row for name in names if name in found for row in found[name]["rows"]]
        parts.append(f"## {title}\n{prose}")
        if rows:
            parts.append("\n".join(table(rows)) + "\n")
        missing = [name for name in names if name not in found]
        parts += [f"{name}: not yet measured (`python benchmarks/gpu.py --stage {name}`)\n" for name in missing]
    return "\n".join(parts)


def markdown(columns: list[str], rows: list[list[str]], texts: int = 1) -> list[str]:
    """A table whose first columns are text, and whose others are numbers."""
    lines = [columns, ["---"] * texts + ["---:"] * (len(columns) - texts), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def on_or_off(graphs: bool | None) -> str:
    return {True: "on", False: "off", None: ""}[graphs]


def correctness_table(rows: list[Row]) -> list[str]:
    columns = ["", "largest difference", "allowed"]
    return markdown(columns, [[r["what"], f"{r['difference']:.1e}", f"{r['limit']:.1e}"] for r in rows])


def default_table(rows: list[Row]) -> list[str]:
    columns = ["", "seconds", "frames", "frames that differ", "probabilities differ by", "last validation"]
    cells = []
    for r in rows:
        compared = [f"{r['frames']:,}", str(r["differ"]), f"{r['difference']:.1e}"] if "frames" in r else ["", "", ""]
        validation = ", ".join(f"{name} {value:.3f}" for name, value in r.get("evaluation", {}).items())
        cells.append([r["what"], f"{r['seconds']:.0f}", *compared, validation])
    return markdown(columns, cells)


def training_table(rows: list[Row]) -> list[str]:
    columns = [
        "model",
        "by",
        "ms per step",
        "tokens/s",
        "speed-up",
        "MFU",
        "peak memory, GB",
        "announced",
        "first loss",
    ]
    cells, arithmetic = [], {}
    for r in rows:
        name = r["shape"] + (", activation checkpointing" if r["checkpointing"] else "")
        flops, announced = sum(r["flops"].values()), f"{r['estimate'] / 1e9:.1f}"
        arithmetic[r["shape"]] = f"- {r['shape']}: {flops / 1e12:.2f} TFLOP = {' + '.join(r['flops'])}"
        if "failed" in r:
            cells.append([name, r["who"], r["failed"], *[""] * 4, announced, ""])
            continue
        step, memory = statistics.median(r["seconds"]), f"{r['memory'] / 1e9:.1f}" if r["memory"] else ""
        peers = [p for p in rows if p["shape"] == r["shape"] and p["who"] == "transformers" and "seconds" in p]
        speed_up = f"{statistics.median(peers[0]['seconds']) / step:.2f}x" if peers else ""
        mfu = (f"{flops / step / r['peak']:.0%} " if r["peak"] else "") + f"({flops / step / r['matmul']:.0%})"
        speed = [f"{1e3 * step:.1f}", f"{r['tokens'] / step:,.0f}", speed_up, mfu]
        cells.append([name, r["who"], *speed, memory, announced, f"{r['loss']:.4f}"])
    return [*markdown(columns, cells, 2), "", "What a step needs:", "", *arithmetic.values()]


def streaming_table(rows: list[Row]) -> list[str]:
    columns = ["model", "by", "CUDA graphs", "streams", "ms per step, median", "p95", "frames/s", "share of bandwidth"]
    cells = []
    for r in rows:
        median, p95 = statistics.median(r["seconds"]), float(np.percentile(r["seconds"], 95))
        alone = r["streams"] == 1 and r["who"] == "ours"  # the others read a weight once for many frames
        share = f"{r['bytes'] / median / r['bandwidth']:.0%}" if alone else ""
        name = f"{r['shape']}, {r['frames']} frames after {r['prompt']} tokens"
        speed = [f"{1e3 * median:.2f}", f"{1e3 * p95:.2f}", f"{r['shown'] / sum(r['seconds']):,.0f}", share]
        cells.append([name, r["who"], on_or_off(r["graphs"]), str(r["streams"]), *speed])
    return markdown(columns, cells, 3)


def generation_table(rows: list[Row]) -> list[str]:
    columns = ["model", "by", "CUDA graphs", "streams", "ms per token, median", "p95 of turns", "tokens/s"]
    cells = []
    for r in rows:
        each = [1e3 * seconds * r["streams"] / tokens for seconds, tokens in r["turns"]]  # of one stream
        rate = sum(tokens for _, tokens in r["turns"]) / sum(seconds for seconds, _ in r["turns"])
        speed = [f"{statistics.median(each):.2f}", f"{np.percentile(each, 95):.2f}", f"{rate:,.0f}"]
        cells.append([r["shape"], r["who"], on_or_off(r["graphs"]), str(r["streams"]), *speed])
    return markdown(columns, cells, 3)


def encoding_table(rows: list[Row]) -> list[str]:
    columns = [
        "",
        "pictures/s",
        "share of a large matrix product",
        "answers differ by",
        "preparing one of 1280 x 720, ms",
    ]
    return markdown(columns, [
        [f"{r['who']}, {r['batch']} at a time", f"{r['rate']:,.1f}", f"{r['rate'] * r['flops'] / r['matmul']:.0%}",
         f"{r['difference']:.1e}", f"{1e3 * r['preparing']:.1f}"] for r in rows])  # fmt: skip
