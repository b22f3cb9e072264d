"""A card that is only pretended: the real code runs on a machine without one, and every copy and every wait is noted.

    with pretended_card() as card:
        model.to(card.device)  # "cuda:0"
        card.events.clear()
        model(input_ids, image_embeds)
    assert card.counts() == Counts(copies=0, waits=0), card.report()

A tensor on the card is a CPU tensor of the class OnCard, which says that its device is cuda:0. So values are real,
loops that depend on them take their real course, and results can be compared with the CPU's (to rounding: for tensors
of a class of their own torch sums some products in another order), through backward and the optimizer too. Torch's
FakeTensorMode has no values, and its backward asks for a real device.
An operation on tensors of the host and of the card is refused, as CUDA refuses it. What passes between them is noted:

    copy in, out   host to card, card to host. Waits, unless it is non_blocking and the host's memory is pinned
    wait           the host needs a value of the card: item, bool(tensor), nonzero, a mask as an index

A copy from memory that is not pinned waits for all that the card has queued, whatever its arguments say.

Not covered: kernels and the precision of the card itself, and which attention kernel CUDA would choose; what C++ does
below the operations that it dispatches, but for HIDDEN_WAITS; NCCL; and torch.autocast("cuda"), which turns itself off
where there is no card ("cpu" inserts the same casts).
"""

import collections
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types as in_optimizers
from torch.utils._foreach_utils import _foreach_supported_types as in_clipping
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
CARD, HOST = torch.device("cuda:0"), torch.device("cpu")

aten = torch.ops.aten
VALUE_NEEDED = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
HIDDEN_WAITS = {aten.masked_scatter_backward.default}  # masked_select in it
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class OnCard(Tensor):
    """A tensor whose Python side says cuda:0. To C++ it is on the CPU, so moves to the host are seen here alone."""

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__) or (
                func is Tensor.to and isinstance(args[0], OnCard) and names_host([*args[1:], *kwargs.values()])
            ):
                CURRENT[-1].note("copy out", not kwargs.get("non_blocking", False), func.__name__)
                args = (args[0].clone().as_subclass(Tensor), *args[1:])
            return func(*args, **kwargs)


def names_host(arguments: list) -> bool:
    """Whether arguments of Tensor.to name the CPU, or a tensor on it."""
    devices = [value.device if isinstance(value, Tensor) else value for value in arguments]
    return any(isinstance(value, (str, torch.device)) and torch.device(value) == HOST for value in devices)


@dataclass(frozen=True)
class Event:
    kind: str  # copy in, copy out or wait
    waits: bool  # whether the host is held up
    operation: str
    place: str  # the line of ours that brought it about: "prospect/model.py:473 read"


@dataclass(frozen=True)
class Counts:
    copies: int  # between host and card, either way
    waits: int  # copies that wait, and values that the host needs


def counted(events: list[Event]) -> Counts:
    return Counts(sum(event.kind != "wait" for event in events), sum(event.waits for event in events))


class PretendedCard(TorchDispatchMode):
    """While entered, torch takes device="cuda:0" and `events` has every copy and wait, in order."""

    device = CARD

    def __init__(self):
        super().__init__()
        self.events: list[Event] = []
        self.pinned: dict[int, Tensor] = {}  # by the address of their memory, kept so that it is not used again

    def counts(self) -> Counts:
        return counted(self.events)

    def report(self) -> str:
        """The events, alike ones together: what to print where counts are not the expected ones."""
        lines = [f"{e.place}: {e.kind} by {e.operation}{', waits' * e.waits}" for e in self.events]
        return "\n".join(f"{times} x {line}" for line, times in collections.Counter(lines).items())

    def note(self, kind: str, waits: bool, operation: str) -> None:
        frame = sys._getframe()
        while frame is not None and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = "outside"
        if frame is not None:
            path = Path(frame.f_code.co_filename).relative_to(ROOT)
            place = f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        self.events.append(Event(kind, waits, operation, place))

    def is_pinned(self, host: Tensor) -> bool:
        return host.untyped_storage().data_ptr() in self.pinned

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if made_of_others(func):  # in inference mode operations made of others come here whole
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [tensor for value in (*args, *kwargs.values()) for tensor in tensors_in(value)]
        on_card = [isinstance(tensor, OnCard) for tensor in tensors]
        target = kwargs.get("device")
        if torch._C._current_autograd_node() is not None:
            target = None if tensors else CARD  # backward's C++ makes its zeros where, as it sees it, gradients are
        to_card = any(on_card) if target is None else target.type == "cuda"
        kwargs |= {"device": HOST} if "device" in kwargs else {}
        kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}

        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            self.pinned[pinned.untyped_storage().data_ptr()] = pinned
            return pinned
        if func is aten._to_copy.default:
            if to_card and not on_card[0]:
                self.note("copy in", not (kwargs.get("non_blocking") and self.is_pinned(args[0])), "to")
            elif on_card[0] and not to_card:
                self.note("copy out", not kwargs.get("non_blocking"), "to")
        elif func is aten.copy_.default:
            if on_card[0] != on_card[1]:
                host, blocking = args[on_card.index(False)], not (kwargs.get("non_blocking") or args[2:] == (True,))
                self.note("copy in" if on_card[0] else "copy out", blocking or not self.is_pinned(host), "copy_")
            to_card = on_card[0]
        elif func in INDEXING and any(on_card):
            assert on_card[0], f"{func}: a tensor of the host, indexed by one of the card"
            for index in args[1]:
                if index is not None and not isinstance(index, OnCard):
                    self.note("copy in", True, "an index")
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note("wait", True, "a mask as an index")
        elif any(on_card):
            strangers = [tensor for tensor in tensors if not isinstance(tensor, OnCard) and tensor.ndim > 0]
            assert not strangers, f"{func}: tensors of the card and of the host, {[tuple(s.shape) for s in strangers]}"
            if func in HIDDEN_WAITS or VALUE_NEEDED & set(func.tags):
                self.note("wait", True, func.overloadpacket.__name__)

        out = func(*args, **kwargs)
        if not to_card:
            return placed(out, Tensor, [])
        return placed(out, OnCard, tensors)


CURRENT: list[PretendedCard] = []  # the one that is entered


@contextlib.contextmanager
def pretended_card() -> Iterator[PretendedCard]:
    """Inside, torch takes device="cuda:0", and what passes between host and card is noted."""
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists, with_indices=False):  # C++ says cpu of every tensor
        [device] = {tensor.device for tensors in lists for tensor in tensors if tensor is not None}
        return {(device, dtype): value for (_, dtype), value in group(lists, with_indices).items()}

    pretended = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_rng_state", lambda device: torch.get_rng_state()),  # what draws on the card draws there
        (torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state)),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.accelerator, "is_available", lambda: True),  # else a DataLoader does not pin
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in pretended:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        for types in (in_clipping, in_optimizers):  # those for which foreach and fused kernels are used
            types.append(OnCard)
            stack.callback(types.remove, OnCard)
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # else Module.to would keep the host's class
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) is then a copy that is dispatched
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        card = stack.enter_context(PretendedCard())
        CURRENT.append(card)
        stack.callback(CURRENT.pop)
        yield card


def tensors_in(value: Any) -> list[Tensor]:
    """Those of an argument: itself, or the members of a list."""
    return [one for one in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(one, Tensor)]


def placed(out: Any, where: type[Tensor], given: list[Tensor]) -> Any:
    """An operation's output as tensors of the host or of the card; what works in place gives back what it was given."""
    if isinstance(out, (list, tuple)):
        return type(out)(placed(one, where, given) for one in out)
    if not isinstance(out, Tensor) or any(out is one for one in given):
        return out
    return out.as_subclass(where)


@functools.cache
def made_of_others(func: torch._ops.OpOverload) -> bool:
    return func._can_decompose()


@functools.cache
def is_ours(path: str) -> bool:
    """Whether code of this file is the product's: not torch's, not a test's."""
    return path.startswith((str(ROOT / "prospect"), str(ROOT / "train.py"), str(ROOT / "infer.py")))
