"""Short forwards as CUDA graphs: a frame, or a token of every reply, launched at once instead of kernel by kernel.

A token goes through some dozen small kernels in every layer, and Python launches them more slowly than the card runs
them. A graph is recorded once and then launched whole, but it repeats exactly what was recorded: the same shapes at the
same addresses, and nothing that the host decides in between. So inside it

    every stream of the cache runs    those not asked for write behind their last token, where nobody looks
    whole stretches are looked at     of 512 positions, with a graph for each number of them; the rest is masked
    positions are a tensor            and with them the places to write to, the mask and the angles of RoPE

Elsewhere the same blocks run, in the streams that are asked for and over what they hold, and give the same.
Recorded by hand rather than by torch.compile: the kernels and their results are those of an eager forward, and no
compiler is needed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prospect.model import KVCache, Llama, sent

STRETCH = 512

Forward = tuple[Tensor, Tensor, Callable[[], Tensor]]  # x [streams,T,H] and begins [streams]; what runs on them


class ForwardGraph:
    """Forwards of few tokens in a cache's streams: recorded when a shape is first met, then replayed."""

    def __init__(self, llama: Llama, cache: KVCache):
        self.llama, self.cache = llama, cache
        self.forwards: dict[tuple[int, int], Forward] = {}  # by the number of tokens, and how far queries look

    def __call__(self, x: Tensor, streams: list[int]) -> Tensor:
        """x [B,T,H] -> [B,T,H], behind what `streams` [B] hold."""
        cache, T = self.cache, x.shape[1]
        ids, begins = sent([*streams, *cache.lengths], x.device).split([len(streams), len(cache.lengths)])
        needed = T + max(cache.lengths[stream] for stream in streams)
        end = min(math.ceil(needed / STRETCH) * STRETCH, cache.capacity)
        assert needed <= end or len(streams) > 1, f"{needed} tokens in a cache of {cache.capacity}"
        if (T, end) not in self.forwards:
            self.forwards[T, end] = self.record(x, begins, end)
        all_x, all_begins, forward = self.forwards[T, end]
        all_x.zero_().index_copy_(0, ids, x)  # zeros: nothing of an older frame, which may not have been finite
        all_begins.copy_(begins)
        for stream in streams:
            cache.lengths[stream] += T
        return forward().index_select(0, ids)

    def record(self, x: Tensor, begins: Tensor, end: int) -> Forward:
        cache, (_, T, H) = self.cache, x.shape
        everyone = torch.arange(len(begins), device=x.device)
        x, begins = x.new_zeros(len(begins), T, H), begins.clone()

        def forward() -> Tensor:
            slots = cache.slots(slice(None), everyone, begins, T, end)
            return self.llama.blocks(x, slots.rope, cache, slots)

        return x, begins, recorded(forward)


def recorded(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same as a CUDA graph. A forward that is repeated writes what it wrote, so it may run more than once here."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what libraries allocate when first used must not be recorded
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
