"""A device that is none: its tensors say that they lie on ``standin:0``, compute on the CPU, and notice every wait.

Torch lets a backend be written in Python under a name of one's own, so ``.device``, ``.to(device)``, the loader's
pinning and accelerate's moving of batches go the ways that they go for a GPU. Every operation is seen below autograd,
by a dispatch mode. What a GPU refuses is refused: tensors of the host and of the device in one operation.

A wait is what makes the host stop until the device has done all that it was given:

- ``item``: a number or a truth of a tensor on the device (``_local_scalar_dense``, ``equal``, ...);
- ``to host``: a copy that blocks, from the device;
- ``to device``: a copy that blocks, or one of memory that is not pinned, to the device;
- ``mask``: the size of the result is known on the device only (``nonzero``, a boolean mask, ``unique``, ...);
- ``host index``: an index on the host for a tensor on the device, which is copied first;
- ``event``: the host waits until the device comes to a point that was marked, and stops only for what the device was
  given before it. So how many operations were given behind it is kept.

What is copied to the host without blocking is NaN, or a number that is none, until the host has waited.
"""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "standin"
ITEMS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.item}
MASKS = {
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten._unique,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
    aten.repeat_interleave,
}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class OnDevice(torch.Tensor):
    """A tensor of the stand-in; ``raw`` holds its values."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
            requires_grad=False,
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    def __repr__(self):
        return f"OnDevice({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device.current.run(func, args, kwargs or {})


class Event:
    """A point in the work of the stand-in, in place of ``torch.Event``, which Python cannot implement for it."""

    def __init__(self, device=None, *, enable_timing=False):
        self.at = 0

    def record(self, stream=None):
        self.at = Device.current.operations

    def synchronize(self):
        Device.current.wait("event", self.at)

    def query(self):
        return all(asked > self.at for asked, *_ in Device.current._under_way)  # the host has waited past it

    def elapsed_time(self, other):
        return float(other.at - self.at)


class Module:
    """What torch asks of a backend's Python module."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def set_device(self, device):
        pass

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_rng_state(self, device=None):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def empty_cache(self):
        pass


class Device(TorchDispatchMode):
    """Runs what is done on the stand-in, and counts waits while ``waits`` is a counter."""

    current = None

    def __init__(self):
        super().__init__()
        Device.current = self
        self.operations = 0
        self.waits = None  # of (kind, place)
        self.moved = 0  # numbers copied to the device
        self.behind = []  # of each event that was waited for: operations given behind it
        self._pinned = {}  # storages, kept so that none is another's
        self._under_way = []  # copies to the host: when they were asked for, where to, of what

    def wait(self, kind, at=None):
        """The host waits, for all that the device was given, or for what it was given before a point."""
        at = self.operations if at is None else at
        for _, copy, values in [one for one in self._under_way if one[0] <= at]:
            copy.copy_(values)
        self._under_way = [one for one in self._under_way if one[0] > at]
        if self.waits is None:
            return
        if kind == "event":
            self.behind.append(self.operations - at)
        packages = ("/hf_importance/", "/transformers/", "/accelerate/")
        found = [one for one in traceback.extract_stack() if any(name in one.filename for name in packages)][-1]
        self.waits[kind, f"{'/'.join(found.filename.split('/')[-2:])}:{found.name}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """Do one operation, of the stand-in or of the host."""
        packet = func.overloadpacket
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        there = any(isinstance(one, OnDevice) for one in tensors)
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if packet is aten.is_pinned:
            return tensors[0].untyped_storage()._cdata in self._pinned
        if packet is aten._pin_memory:
            found = tensors[0].clone()
            self._pinned[found.untyped_storage()._cdata] = found
            return found
        if not there and asked != NAME:
            return func(*args, **kwargs)
        self.operations += 1
        self.look(packet, tensors, args, kwargs, asked)
        raw_args, raw_kwargs = tree_map_only(OnDevice, lambda one: one.raw, (args, kwargs))
        if asked == NAME:
            raw_kwargs = {**raw_kwargs, "device": torch.device("cpu")}
            raw_kwargs.pop("pin_memory", None)
        way = self.copies(packet, args, kwargs, asked) if packet in COPIES else "stays"
        if way == "to host":
            return self.to_host(func, raw_args, raw_kwargs)
        if way == "at once":
            return func(*raw_args, **raw_kwargs)
        found = tree_map_only(torch.Tensor, OnDevice, func(*raw_args, **raw_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, found) if there else found

    def look(self, packet, tensors, args, kwargs, asked):
        """Count what waits, and refuse what a device refuses."""
        here = [one for one in tensors if not isinstance(one, OnDevice) and one.dim() > 0]
        if packet in ITEMS:
            self.wait("item")
        elif packet in MASKS:
            self.wait("mask")
        elif packet in INDEXING:
            indices = [one for one in args[1] if one is not None]
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
                self.wait("mask")
            if any(not isinstance(one, OnDevice) for one in indices):
                self.wait("host index")
        elif packet not in COPIES and here:
            raise RuntimeError(f"all tensors must be on the same device, but {packet} was given two of them")

    def copies(self, packet, args, kwargs, asked):
        """Say which way a copy goes, and count it where it waits."""
        source = args[1] if packet is aten.copy_ else args[0]
        kept = isinstance(source, OnDevice) if asked is None else asked == NAME
        onto = isinstance(args[0], OnDevice) if packet is aten.copy_ else kept
        blocks = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
        if isinstance(source, OnDevice) == onto:
            return "stays"
        self.moved += source.numel() if onto else 0
        if onto and (blocks or source.untyped_storage()._cdata not in self._pinned):
            self.wait("to device")
        if not onto and blocks:
            self.wait("to host")
        return "to device" if onto else "to host" if not blocks else "at once"

    def to_host(self, func, args, kwargs):
        """Copy without blocking: the values come when the host has waited."""
        values = func(*args, **kwargs)
        copy = values.clone() if values is not args[0] else values
        values = values.clone()
        copy.fill_(float("nan") if copy.is_floating_point() else torch.iinfo(copy.dtype).max)
        self._under_way.append((self.operations, copy, values))
        return copy


def begin():
    """Make the stand-in the accelerator of this process, before anything has asked for one."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.Event = Event
    # These pass no dispatch mode. They make a tensor on the host and copy it, and wait for that.
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _by_the_host(getattr(torch, name)))
    return Device()


def _by_the_host(make):
    def made(data, *, dtype=None, device=None, **kwargs):
        there = device is not None and torch.device(device).type == NAME
        found = make(data, dtype=dtype, device=None if there else device, **kwargs)
        return found.to(device) if there else found

    return made
