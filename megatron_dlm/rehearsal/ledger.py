"""What a step asks of a machine: bytes held, FLOPs, bytes moved, collectives, and waits of the host for the device.

Recorded at torch's dispatcher, so it works on fake tensors and on real ones alike: the tests compare the two.
"""

from __future__ import annotations

import math
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import megatron_dlm

aten = torch.ops.aten
# Calls that wait for the device where their input is there: the number, or a shape, is needed on the host.
_WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
}
_ATTENTION = "scaled_dot_product"
_FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


class Collective(NamedTuple):
    """Collectives of one kind in one group."""

    kind: str
    """all_gather, reduce_scatter, all_reduce, broadcast, send, receive, ..."""
    group: str
    """tensor, pipeline, data, ..."""
    ranks: int
    """Of the group."""
    nodes: int
    """Over which they are spread."""


class Wait(NamedTuple):
    """A place in the code where the host waits for the device."""

    what: str
    where: str


class Ledger(TorchDispatchMode):
    """Records what is done while the block lasts, under the ``phase`` that it was in."""

    def __init__(self, groups: Mapping[str, dist.ProcessGroup], *, ranks_per_node: int = 8) -> None:
        """
        Args:
            groups: by name; a group of the same ranks has the same one.
        """
        super().__init__()
        self.phase = ""
        self.held = self.peak = self.saved = 0
        """Bytes of the tensors made here that exist now, and at most; and of those at most, saved for backward."""
        self.flops: Counter[tuple[str, str]] = Counter()
        """By phase and kind: matmul, attention, attention_backward."""
        self.moved: Counter[str] = Counter()
        """Bytes that other operations read and write, by phase."""
        self.calls: Counter[tuple[str, Collective]] = Counter()
        self.sent: Counter[tuple[str, Collective]] = Counter()
        """Bytes of the larger of input and output, by phase and collective."""
        self.waits: Counter[Wait] = Counter()
        self._names = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}
        self._ranks_per_node = ranks_per_node
        self._on_host: set[int] = set()
        self._storages: dict[int, int] = {}
        self._kept: set[int] = set()
        self._kept_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> Ledger:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        on_host = bool(inputs) and all(_key(tensor) in self._on_host for tensor in inputs)
        for tensor in inputs:  # what was there before is not this step's
            self._storages.setdefault(_key(tensor), 0)
        if func in _WAITS:
            if not on_host:
                self.waits[Wait(_WAITS[func], _where())] += 1
            if func is aten._local_scalar_dense.default and type(args[0]) is not Tensor:
                return 1.0 if args[0].is_floating_point() else 1  # a fake tensor has no number
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        output = func(*args, **kwargs)
        self._count(func, args, kwargs, inputs, output)
        for tensor in _tensors(output):
            self._hold(tensor)
            if on_host:
                self._on_host.add(_key(tensor))
        return output

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], output: Any) -> None:
        packet, name = func.overloadpacket, func.__name__
        if _ATTENTION in name:
            backward = "backward" in name
            query, key = inputs[backward : backward + 2]  # the backward pass has the output's gradient before them
            products = query.shape[:3].numel() * key.shape[2] * query.shape[3]
            # Two products forward; five backward, which computes the scores again. torch's own count refuses groups.
            self.flops[self.phase, "attention" + "_backward" * backward] += (10 if backward else 4) * products
        elif packet in flop_registry:
            self.flops[self.phase, "matmul"] += flop_registry[packet](*args, **kwargs, out_val=output)
        elif func.namespace != "prim" and not func.is_view and name.split(".")[0] not in _FREE:
            # What is written in place was read before, unless it is overwritten.
            read = inputs[1:] if name.split(".")[0] in _OVERWRITES else inputs
            self.moved[self.phase] += _bytes(read) + _bytes(_tensors(output))

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.__name__.split(".")[0]
        group = next((found for found in map(_group, tree_leaves((args, kwargs))) if found is not None), None)
        ranks = tuple(dist.get_process_group_ranks(group)) if group else ()
        nodes = len({rank // self._ranks_per_node for rank in ranks})
        collective = Collective(_KINDS.get(name, name), self._names.get(ranks, "other"), len(ranks), nodes)
        self.calls[self.phase, collective] += 1
        self.sent[self.phase, collective] += max(_bytes(_tensors(part)) for part in args[:2])
        if "coalesced" in name and any(type(tensor) is not Tensor for tensor in _tensors(args)):
            return FakeWork().boxed()  # torch has no fake of these
        return func(*args, **kwargs)

    def on_host(self, tensor: Tensor, *, wait: str = "") -> Tensor:
        """Take ``tensor`` for one that the host can read without waiting; ``wait`` says how it got there."""
        if wait:
            self.waits[Wait(wait, _where())] += 1
        self._on_host.add(_key(tensor))
        return tensor

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = size
        self.held += size
        weakref.finalize(storage, self._drop, key)
        if self.held > self.peak:
            self.peak, self.saved = self.held, self._kept_bytes

    def _keep(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key in self._storages and key not in self._kept:
            self._kept.add(key)
            self._kept_bytes += self._storages[key]
        return tensor

    def _drop(self, key: int) -> None:
        size = self._storages.pop(key)
        self._on_host.discard(key)
        self.held -= size
        if key in self._kept:
            self._kept.remove(key)
            self._kept_bytes -= size


_OVERWRITES = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_"}
_KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
    "recv_": "receive",
}


def _group(value: Any) -> dist.ProcessGroup | None:
    """The process group behind an argument of a collective, which the dispatcher has in a box."""
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value)
        except RuntimeError:  # a box with something else, such as how to reduce
            return None
    return value if isinstance(value, dist.ProcessGroup) else None


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)


def _where() -> str:
    """The innermost line of ours or of megatron that is being executed, such as ``training/optimizer.py:120``."""
    own = Path(megatron_dlm.__file__).parent
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if "megatron" in path.parts and "core" in path.parts:
            return f"megatron/core/{'/'.join(path.parts[path.parts.index('core') + 1 :])}:{frame.lineno}"
        if path.is_relative_to(own) and "rehearsal" not in path.parts:
            return f"{path.relative_to(own)}:{frame.lineno}"
    return "elsewhere"
