"""The ranks of a run: one process alone, or several under torchrun, on one node or many.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without it a run is rank 0 of 1 and nothing is exchanged.

Two ways to share the work, both of which leave the same gradient on every rank (`train.parallel`):

    ddp     every rank holds the whole model; gradients are averaged while backward runs (arXiv 2006.15704)
    fsdp    every rank holds 1/world of each weight, gradient and moment; a block's weights are gathered just before it
            runs and released after it (FSDP2's fully_shard; ZeRO stage 3, arXiv 1910.02054)

Everything that ranks exchange about the run itself (counts, votes to stop, errors) is small, stays on the host and goes
through gloo, so that asking never waits for a GPU.
"""

import contextlib
import ctypes
import datetime
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from prospect.config import TrainConfig, torch_dtype
from prospect.errors import ProspectError
from prospect.model import Prospect


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None  # with several ranks: notes that any may leave and look for at any time

    @property
    def main(self) -> bool:
        """Rank 0 alone logs and writes."""
        return self.rank == 0


ALONE = Ranks(0, 1, torch.device("cpu"))


def pick_device(wanted: str, local_rank: int = 0, local_world: int = 1) -> torch.device:
    """`auto` is cuda where there is one; of several ranks on this machine, each takes the device of its own number.

    Raises ProspectError, the same on all of them, for a device that does not exist or that all would share.
    """
    try:
        kind = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    except RuntimeError as error:
        raise ProspectError(f"unknown device {wanted!r}", where="config", remedy="auto, cpu, cuda or cuda:1") from error
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise ProspectError("there is no CUDA device", where="config", remedy="train.device=cpu, or auto")
        devices = torch.cuda.device_count()
        if kind.index is not None and local_world > 1:
            what = f"{wanted} would be the one device of {local_world} ranks"
            raise ProspectError(what, where="config", remedy="train.device=cuda: each rank takes one of its own")
        if kind.index is None and local_world > devices:
            what = f"{local_world} ranks, but this machine has {devices} CUDA device(s)"
            raise ProspectError(what, where="torchrun", remedy=f"--nproc_per_node={devices}")
        kind = torch.device("cuda", kind.index if kind.index is not None else local_rank)
        if kind.index >= devices:
            what = f"there is no {kind}, this machine has {devices} CUDA device(s)"
            raise ProspectError(what, where="config", remedy="they are numbered from cuda:0 on")
        torch.cuda.set_device(kind)
    return kind


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ProspectError for bf16 on a GPU older than Ampere: torch would imitate it, many times slower."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        what, remedy = f"{device} has no bf16", "train.precision=fp16; for streaming infer.precision=fp16"
        raise ProspectError(what, where="config", remedy=remedy)


def start_ranks(device: str, patience: datetime.timedelta | None = None) -> Ranks:
    """Join the other ranks, with nccl between GPUs and gloo between hosts.

    patience: how long a rank waits for another; None: as long as torch has it, half an hour or less.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    place = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    store = None
    if world > 1:
        # torchrun's store outlives the workers: without a prefix of their own, restarted workers would find the
        # addresses of dead ones in it and wait for them.
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        # Never freed: gloo's destructor holds Python's lock while it waits for a thread, and if that thread is just
        # dropping the tensors of the last exchange, it waits for this lock. A rank that fails would hang, not end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    return Ranks(rank, world, place, store)


def stop_ranks(ranks: Ranks) -> None:
    if ranks.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


# ---- talking to each other -----------------------------------------------------------------------


def all_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all ranks, in place."""
    if ranks.world > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_named(numbers: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Each number summed over all ranks, in one exchange."""
    return dict(zip(numbers, all_sum(torch.stack(list(numbers.values())), ranks)))


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether the flag is set on any rank, so that all ranks stop at the same step."""
    return bool(all_sum(torch.tensor(float(flag)), ranks) > 0)


def to_main(value: Any, ranks: Ranks) -> list[Any]:
    """The value of every rank, in rank order, on rank 0; on the others nothing."""
    if ranks.world == 1:
        return [value]
    gathered: list[Any] = [None] * ranks.world if ranks.main else []
    dist.gather_object(value, gathered or None)
    return gathered


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """The value of every rank, in rank order, on every rank."""
    if ranks.world == 1:
        return [value]
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on every rank."""
    given = [value]
    if ranks.world > 1:
        dist.broadcast_object_list(given)
    return given[0]


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """A block that every rank runs. If it fails on any rank, all exit, so that none waits for one that is gone.

    The first rank that failed raises its error. The others exit silently with the same status, so the user sees one
    error line. A long block asks `failed_elsewhere` now and then whether to go on.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
        if ranks.store is not None:
            ranks.store.set("failed", str(ranks.rank))
    failed = gather_objects(error is not None, ranks)
    if any(failed):
        if failed.index(True) == ranks.rank:
            raise error
        sys.exit(2)


def failed_elsewhere(ranks: Ranks) -> bool:
    """Whether a rank has failed in a block of `together`: what is left to do in it is for nothing."""
    return ranks.store is not None and ranks.store.check(["failed"])


@contextlib.contextmanager
def main_alone_prints(ranks: Ranks) -> Iterator[None]:
    """A block in which only rank 0 is heard. An error that leaves it is printed by whichever rank raised it."""
    with contextlib.ExitStack() as stack:
        if not ranks.main:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


# ---- sharing the work ----------------------------------------------------------------------------


def share_model(model: Prospect, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """What the training loop calls instead of `model`: a DDP wrapper around it, or with FSDP the model itself.

    The losses are part of the model's forward, so either way every parameter's use is seen.
    """
    if ranks.world == 1 or config.parallel == "fsdp":
        return model
    # The one buffer, RoPE's frequencies, is the same on all ranks: nothing to send at every forward. (Torch's argument
    # for that has another name from 2.13 on, where the old one warns.)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["model.rope_frequencies"])
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard_model(model: Prospect, config: TrainConfig, ranks: Ranks) -> None:
    """With FSDP: make every parameter of a model on the meta device this rank's rows of it, before it has values."""
    if ranks.world == 1 or config.parallel == "ddp":
        return
    # The blocks' matrices, nearly all of the weights, are gathered in the 16-bit type in which autocast uses them; the
    # rest as it is, so that norms, embeddings and what adds up in the residual stream are fp32, as they are on one rank
    # and under DDP. Gradients are summed over ranks in fp32. Inputs keep their type: RoPE's angles stay in fp32.
    dtype = None if config.precision == "fp32" else torch_dtype(config.precision)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    matrices = replace(policy, param_dtype=dtype)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in model.model.layers:
        fully_shard([block.self_attn, block.mlp], mesh=mesh, mp_policy=matrices)  # gathered together
    # The root holds the rest: norms, embeddings, projector, LM head, decision heads. It stays gathered until backward
    # is done with it, because evaluation reads the heads after forward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Under DDP, let backward only add to this rank's gradients: they are averaged once, in a step's last backward.

    FSDP averages after every micro-batch: to keep unaveraged gradients it would have to hold them in full.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def release(model: nn.Module) -> None:
    """After a forward without backward: free what FSDP has gathered, so that parameters are shards again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full (every rank must call this); any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(like: Tensor) -> slice | EllipsisType:
    """Which rows of a full tensor this rank holds where it is laid out like `like`: under FSDP a share, else all."""
    if not isinstance(like, DTensor):
        return ...
    share = math.ceil(len(like) / like.device_mesh.size())  # as torch.chunk deals them out: the last ranks may get none
    first = min(share * like.device_mesh.get_local_rank(), len(like))
    return slice(first, min(first + share, len(like)))


def laid_out(rows: Tensor, like: Tensor) -> Tensor:
    """This rank's `own_rows` of a tensor as that tensor, laid out like `like`."""
    if not isinstance(like, DTensor):
        return rows
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, or any other tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- being stopped -------------------------------------------------------------------------------


class StopRequest:
    """SIGTERM or SIGINT asks the loop to finish its step, save and exit; a second Ctrl-C exits at once.

    torchrun forwards a Ctrl-C to ranks that have already received it from the terminal, so a second one counts as the
    user's only when it comes more than a second later.
    """

    def __init__(self):
        self.requested = False
        self.first = 0.0  # when it came, seconds of the monotonic clock
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT and time.monotonic() - self.first > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.first = True, time.monotonic()


STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals that ask to stop wait until the end of the block. Processes that start inside begin with them held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """For processes that prepare data: a signal to the whole group must not kill them during an unfinished step."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
