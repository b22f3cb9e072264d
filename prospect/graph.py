"""Short forwards as CUDA graphs: a frame, or a token of every reply, launched at once instead of kernel by kernel.

A token goes through some dozen small kernels in every layer, and Python launches them more slowly than the card runs
them. A graph is recorded once and then launched whole, but it repeats exactly what was recorded: the same shapes at the
same addresses, and nothing that the host decides in between. So inside it

    every stream of the cache runs       those not asked for write behind their last token, where nobody looks
    the whole capacity is looked at      what a stream does not hold is masked
    positions are a tensor               and with them the places to write to, the mask and the angles of RoPE

Elsewhere the same blocks run, in the streams that are asked for and over what they hold, and give the same.
Recorded by hand rather than by torch.compile: the kernels and their results are those of an eager forward, and no
compiler is needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prospect.model import KVCache, Llama, sent


class ForwardGraph:
    """Forwards of few tokens in a cache's streams: recorded when their number T is first met, then replayed."""

    def __init__(self, llama: Llama, cache: KVCache):
        self.llama, self.cache = llama, cache
        self.forwards: dict[
            int, tuple[Tensor, Tensor, Callable[[], Tensor]]
        ] = {}  # by T: inputs, and what runs on them

    def __call__(self, x: Tensor, streams: list[int]) -> Tensor:
        """x [B,T,H] -> [B,T,H], behind what `streams` [B] hold."""
        cache, T = self.cache, x.shape[1]
        ids, begins = sent([*streams, *cache.lengths], x.device).split([len(streams), len(cache.lengths)])
        if T not in self.forwards:
            self.forwards[T] = self.record(x, begins)
        all_x, all_begins, forward = self.forwards[T]
        all_x.zero_().index_copy_(0, ids, x)  # zeros: nothing of an older frame, which may not have been finite
        all_begins.copy_(begins)
        for stream in streams:
            cache.lengths[stream] += T
            assert len(streams) > 1 or cache.lengths[stream] <= cache.capacity, f"more than {cache.capacity} tokens"
        return forward().index_select(0, ids)

    def record(self, x: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        cache, (_, T, H) = self.cache, x.shape
        everyone = torch.arange(len(begins), device=x.device)
        x, begins = x.new_zeros(len(begins), T, H), begins.clone()

        def forward() -> Tensor:
            slots = cache.slots(slice(None), everyone, begins, T, cache.capacity)
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
