"""A GPU for torch without one: tensors that say cuda:0 and have shapes but no values.

Dispatch, autograd, checkpointing, FSDP2 and AdamW are torch's own. `Watch` sees every kernel: it
raises on a wrong device or a mixture of dtypes, lists waits of the host and counts bytes. Not found
are wrong values, what a kernel does inside, races and fragmentation. Rank 0 of `world`; the others
send nothing.
"""

import shutil
import subprocess
import traceback
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.attention.bias import CausalBias
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import codescaler
import hub
import runs

ROOT, CAPACITY = Path(__file__).parents[1], int(77.5 * 2**30)

# Tells a CPU build of torch that CUDA is there, and gives its tensors a device guard.
SHIM = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks) }
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)
"""
# Kernels of CUDA that want one dtype, where fake tensors let some mixtures pass.
ONE_DTYPE = """mm bmm addmm baddbmm lerp searchsorted index_put_ _index_put_impl_ masked_scatter
index_copy_ index_add_ scatter_ scatter_add_""".split()


def build_shim(folder):
    """Compiles SHIM -> the library to preload; None without g++, or where torch has CUDA."""
    if not shutil.which("g++") or torch.version.cuda:
        return None
    torch_folder = Path(torch.__file__).parent
    (folder / "shim.cpp").write_text(SHIM)
    command = f"g++ -shared -fPIC -std=c++20 -I{torch_folder}/include shim.cpp -o shim.so"
    command += f" -L{torch_folder}/lib -ltorch_cpu -lc10 -Wl,-rpath,{torch_folder}/lib"
    subprocess.run(command.split(), cwd=folder, check=True)
    return folder / "shim.so"


def line():
    """The innermost line of the project that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).parent == ROOT:
            return f"{Path(frame.filename).name}: {frame.line.strip()}"
    return "backward"


def outside(function):
    """The function, executed on real tensors."""

    def run(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


@outside
def made_up(x):
    """What the host reads: a constant's value, else ones."""
    known = x.constant is not None
    return (x.constant if known else torch.ones(x.shape, dtype=x.dtype)).tolist()


class Watch(TorchDispatchMode):
    """Counts kernels by name, waits of the host by line, live and peak bytes of the GPU."""

    def __init__(self):
        super().__init__()
        self.live, self.held, self.paused = 0, WeakIdKeyDictionary(), False
        self.reset()

    def reset(self):
        self.kernels, self.waits, self.attention = Counter(), Counter(), Counter()
        self.peak = self.live

    def resize(self, box, size):
        self.live += size - box[0]
        self.peak, box[0] = max(self.peak, self.live), size

    def wait(self, what, really=True):
        if really:
            self.waits[f"{what} | {line()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[-1]
        if self.paused or func.namespace == "prim":
            return func(*args, **kwargs)
        if DTensor in types:
            return NotImplemented  # its local tensors come here again
        implicit = torch._C.DispatchKey.CompositeImplicitAutograd
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), implicit):
            with self:  # in inference mode composite operations come whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        if on_gpu and name in ONE_DTYPE and len(dtypes) > 1:
            raise TypeError(f"{name} of {dtypes} at {line()}")
        if name.startswith("_fused_adam") and len({x.device for x in tensors}) > 1:
            raise TypeError(f"{name} of tensors on two devices at {line()}")
        if name == "_local_scalar_dense":
            self.wait("to the host", on_gpu)
            return made_up(args[0].reshape(()))
        if name in ("index", "index_put_", "_index_put_impl_"):
            args = (args[0], [new for index in args[1] for new in self.plain(index)], *args[2:])
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            crosses = source.is_cuda != target.is_cuda and source.device.type != "meta"
            if source.is_cuda or not kwargs.get("non_blocking"):
                self.wait("to the host" if source.is_cuda else "to the GPU", crosses)
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and x.is_cuda:
                self.kernels[name] += 1
                storage = x.untyped_storage()
                if storage not in self.held:
                    self.held[storage] = box = [0]
                    weakref.finalize(storage, self.resize, box, 0)
                    self.resize(box, storage.nbytes())
        return out

    def plain(self, index):
        """Of a mask as an index all elements count; the host waits to know how many they are."""
        if index is None or index.dtype != torch.bool:
            return [index]
        self.wait("to the host", index.is_cuda)
        return [torch.empty(index.numel(), dtype=torch.long, device=index.device)] * index.ndim


def convert(module, function, recurse=True):
    """nn.Module._apply: fake parameters cannot be converted in place, new ones take theirs."""
    for child in module.children():
        child._apply(function)  # FSDP's modules have their own
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
    return module


def chosen_attention(watch, real):
    """F.scaled_dot_product_attention with the rules by which torch chooses a kernel on CUDA
    (sdp_utils.cpp of torch 2.13 without cuDNN's; CausalBias._dispatch)."""

    def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        if not q.is_cuda:
            return real(q, k, v, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
        # Flash aligns its causal mask with the lower right, as CausalBias does.
        lower_right, same = isinstance(attn_mask, CausalBias), q.shape[1] == k.shape[1]
        aligned = lower_right or attn_mask is None and (not is_causal or q.shape[2] == k.shape[2])
        half = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
        if half and aligned and (same or enable_gqa):
            watch.attention["flash"] += 1
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, 0.0, lower_right or is_causal)[0]
        assert same and attn_mask is not None, f"the math kernel for {q.dtype} {q.shape} {k.shape}"
        assert attn_mask.dtype == q.dtype and attn_mask.is_cuda, (attn_mask.dtype, attn_mask.device)
        watch.attention["efficient, with a mask"] += 1
        mask = attn_mask.expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]

    return attention


def install(watch, world):
    """Puts stand-ins in the place of what would ask a driver, another rank or a file."""
    cuda, stream, written = torch.cuda, MagicMock(), {}
    real_resize, real_stored = torch.UntypedStorage.resize_, hub.stored_tensors
    real_propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def resize(storage, size):  # FSDP frees what it has gathered
        if storage in watch.held:
            watch.resize(watch.held[storage], size)
        return real_resize(storage, size)

    def propagate(self, schema):  # DTensor's shapes, on fake tensors of the full size
        watch.paused = True
        try:
            return real_propagate(self, schema)
        finally:
            watch.paused = False

    def stored(folder):
        found = {}
        for name, part in real_stored(folder).items():
            found[name] = part[:]
            found[name].get_dtype, found[name].get_shape = part.get_dtype, part.get_shape
        return found

    def save(tensors, file):
        written.update(tensors)
        Path(file).touch() if Path(file).suffix else None

    def opened(file, framework):  # on the CPU, as if they had been computed there
        return SimpleNamespace(keys=written.keys, get_tensor=lambda name: written[name].cpu())

    torch.UntypedStorage.resize_ = resize
    ShardingPropagator._propagate_tensor_meta_non_cached = propagate
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    FakeTensor.tolist = lambda x: watch.wait("to the host", x.is_cuda) or made_up(x)
    torch.nn.Module._apply = convert
    torch.Tensor.record_stream = lambda tensor, stream: None
    # One kernel on CUDA, which keeps its input: so does this one.
    F.rms_norm = lambda x, shape, weight, eps: F.layer_norm(x, shape, weight)
    F.scaled_dot_product_attention = chosen_attention(watch, F.scaled_dot_product_attention)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 8, lambda: 0
    cuda._lazy_init = cuda.set_device = cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.Stream = cuda.Event = MagicMock
    cuda.current_stream = cuda.stream = lambda *args: stream
    cuda.memory_reserved = cuda.memory_allocated = lambda device=None: watch.live
    cuda.max_memory_allocated, cuda.reset_peak_memory_stats = lambda: watch.peak, watch.reset
    cuda.mem_get_info = lambda device=None: (CAPACITY - watch.live, CAPACITY)
    runs.init_device_mesh = outside(runs.init_device_mesh)
    codescaler.causal_lower_right = outside(codescaler.causal_lower_right)
    hub.stored_tensors = outside(stored)
    codescaler.save_torch_state_dict = runs.save_file = save
    runs.safe_open = opened
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    dist.all_gather_object = lambda out, item: out.__setitem__(slice(None), [item] * len(out))
