"""A second device that is pretended on the processor: it computes with real numbers, refuses operands that lie
elsewhere, as CUDA does, and notes whenever the host would have to wait for it.

What it cannot see: kernels that a real device lacks or computes otherwise, its memory, what overlaps, and calls
that read no tensor (`torch.cuda.synchronize`). Steps written by hand for the processor do not run on it."""
import sys
from collections import Counter
from contextlib import nullcontext

import torch
from torch.optim import optimizer
from torch.utils._pytree import tree_map, tree_map_only

DEVICE = torch.device("lazy") # torch knows the name, and nothing in it computes there; backward needs no thread
aten, META = torch.ops.aten, torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
         aten.unique_consecutive, aten.equal, aten.bincount, aten.repeat_interleave, aten.multinomial,
         aten.histc, aten.is_nonzero}
COPIES, INDEXED = {aten.copy_, aten._to_copy}, {aten.index, aten.index_put, aten.index_put_,
                                                aten._index_put_impl_}
ONE_PLACE = {aten.cat, aten.stack} # that refuse even numbers of the processor

waits = Counter() # operations for which the host waited, with the line that asked


class Pretended(torch.Tensor):
    "A tensor of the pretended device; `inside` holds its numbers."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=DEVICE)
        made.inside = real
        return made

    def __repr__(self): return f"Pretended({self.inside})"

    def tolist(self):
        waits[f"tolist at {asker()}"] += 1
        return self.inside.tolist()

    def numpy(self):
        raise TypeError("what lies on the device has to be brought over first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), func.overloadpacket
        given = []
        tree_map_only(torch.Tensor, given.append, (args, kwargs))
        if op not in COPIES: check(op, given, args, kwargs)
        note(op, args, kwargs)
        there = kwargs.get("device", DEVICE) # where the result is to be
        here = op is aten.copy_ and not isinstance(args[0], Pretended)
        if "device" in kwargs: kwargs["device"] = torch.device("cpu")
        if op is aten._to_copy: kwargs["non_blocking"] = False
        known = {id(t.inside): t for t in given if isinstance(t, Pretended)}
        out = func(*tree_map_only(Pretended, lambda t: t.inside, args),
                   **tree_map_only(Pretended, lambda t: t.inside, kwargs))
        if here: return args[0]
        if torch.Tag.inplace_view in func.tags: # the shape changes, of this as of what is inside
            aten.as_strided_.default.redispatch(META, args[0], out.shape, out.stride(), out.storage_offset())
        if torch.device(there).type != DEVICE.type: return out
        return tree_map(lambda t: known.get(id(t)) if id(t) in known else
                        Pretended(t) if isinstance(t, torch.Tensor) else t, out)


def check(op, given, args, kwargs):
    "Refuse operands that lie elsewhere; numbers without dimensions may be the processor's, and so may indices."
    indices = []
    if op in INDEXED: tree_map_only(torch.Tensor, indices.append, args[1])
    for t in given:
        if isinstance(t, Pretended) or any(t is i for i in indices): continue
        if t.dim() or op in ONE_PLACE:
            raise RuntimeError(f"{op} was given tensors on two devices, one of them {tuple(t.shape)} on the "
                               "processor")
    written = str(op).endswith("_") and type(args[0]) is torch.Tensor
    if written or any(not isinstance(t, Pretended) for t in [kwargs.get("out")] if t is not None):
        raise RuntimeError(f"{op} would write what lies on the device to the processor")


def note(op, args, kwargs):
    "Note if the host has to wait for this."
    if op in INDEXED:
        tensors = []
        tree_map_only(torch.Tensor, tensors.append, args[1:])
        wait = any(not isinstance(t, Pretended) or t.dtype in (torch.bool, torch.uint8) and t is not args[-1]
                   for t in tensors)
    elif op is aten._to_copy: # both ways, unless it is asked not to wait; what is read is waited for
        wait = ("device" in kwargs and torch.device(kwargs["device"]).type != DEVICE.type)
    elif op is aten.copy_:
        arriving = not isinstance(args[1], Pretended)
        wait = (not isinstance(args[0], Pretended)
                or arriving and not (kwargs.get("non_blocking") or args[2:3] == (True,)))
    else:
        wait = op in WAITS
    if wait: waits[f"{op.__name__} at {asker()}"] += 1


def asker() -> str:
    "The innermost line that belongs neither to torch nor to this file."
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 2)[-1]}:{frame.f_lineno}" if frame else "?"


library = torch.library.Library("aten", "IMPL")

def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Pretended(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Pretended(torch.empty_strided(size, stride, dtype=dtype))

def copy_from(self, dst, non_blocking=False): # what `torch.tensor(..., device=...)` calls
    if not non_blocking: waits[f"copy at {asker()}"] += 1
    dst.inside.copy_(self)
    return dst

def local_scalar_dense(self): # of a tensor among the numbers given to `torch.tensor`
    waits[f"item at {asker()}"] += 1
    return self.inside.item()

library.impl("_local_scalar_dense", local_scalar_dense, "Lazy")
library.impl("_copy_from", copy_from, "Lazy")
library.impl("empty.memory_format", empty, "Lazy")
library.impl("empty_strided", empty_strided, "Lazy")

def autocast(device_type, *arguments, **options):
    "torch's, which does not know the device; there, everything is computed in the types that things have."
    return nullcontext() if device_type == DEVICE.type else torch_autocast(device_type, *arguments, **options)

torch_autocast, torch.autocast = torch.autocast, autocast

fused = optimizer._get_fused_kernels_supported_devices
optimizer._get_fused_kernels_supported_devices = lambda: [*fused(), DEVICE.type]
