"""This machine's limits, measured: the rate of a large matrix product and the bandwidth of reading memory.

A benchmark's own rate divided by these is its share of the hardware limit.
"""

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Seconds of the fastest of several runs: other load can only slow one down."""
    times = []
    for _ in range(repeats + 1):  # the first is warm-up
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; a multiplication and an addition count as two operations."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device)


def read_bandwidth(device: str, dtype: torch.dtype) -> float:
    """Bytes per second read from memory by a matrix-vector product far larger than every cache."""
    rows, columns = (65536, 16384) if device == "cuda" else (16384, 8192)
    matrix = torch.ones(rows, columns, device=device, dtype=dtype)
    vector = torch.ones(columns, device=device, dtype=dtype)
    return matrix.numel() * matrix.element_size() / seconds(lambda: matrix @ vector, device)
