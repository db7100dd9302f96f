"""The CUDA paths without CUDA: real dispatch, autograd, checkpointing, FSDP2 and AdamW on fake
tensors, which say cuda:0 and have shapes but no values. Rank 0 of 8; the others send nothing.

    pytest tests/test_fake_cuda.py    # 40 s; needs g++ and a CPU build of torch

Found are tensors on a wrong device, mixtures of dtypes, waits of the host, the attention kernel
and peak memory. Not found are wrong values, what a kernel does inside, races and fragmentation.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
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

ROOT = Path(__file__).parents[1]
CUDA, GIB = "cuda:0", 2**30

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
# Arguments that kernels of CUDA want in one dtype, where fake tensors let some mixtures pass.
ONE_DTYPE = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "lerp", "searchsorted"), (0, 1)),
    **dict.fromkeys(("index_put_", "_index_put_impl_", "masked_scatter"), (0, 2)),
    **dict.fromkeys(("index_copy_", "index_add_", "scatter_", "scatter_add_"), (0, 3)),
}

# --------------------------------------------------------------------------------------------------
# the fake GPU


def line():
    """The innermost line of the project that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).parent == ROOT:
            return f"{Path(frame.filename).name}: {frame.line.strip()}"
    return "backward"


def made_up(tensor):
    """What the host reads: a constant's value, else ones."""
    if tensor.constant is not None:
        return tensor.constant.tolist()
    found = True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
    for size in reversed(tensor.shape):
        found = [found] * size
    return found


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
        if on_gpu and len({args[i].dtype for i in ONE_DTYPE.get(name, ())}) > 1:
            raise TypeError(f"{name} of {[x.dtype for x in tensors]} at {line()}")
        if name.startswith("_fused_adam") and len({x.device for x in tensors}) > 1:
            raise TypeError(f"{name} of tensors on two devices at {line()}")
        if name == "_local_scalar_dense":
            self.wait("to the host", on_gpu)
            return made_up(args[0])
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


class FusedNorm(torch.autograd.Function):
    """The memory of F.rms_norm on CUDA, where it is one kernel."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class Stored:
    """A tensor of a file, which is read outside of the fake tensors."""

    def __init__(self, real):
        self.real, self.get_dtype, self.get_shape = real, real.get_dtype, real.get_shape

    def __getitem__(self, rows):
        with _disable_current_modes():
            return self.real[rows]


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


def install(watch, m, world, capacity):
    """Puts stand-ins in the place of what would ask a driver, another rank or a file."""
    cuda, stream, written = torch.cuda, MagicMock(), {}

    def outside(function):
        def run(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

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

    def save(tensors, file):
        written.update(tensors)
        Path(file).touch() if Path(file).suffix else None

    def opened(file, framework):  # on the CPU, as if they had been computed there
        keys, tensor = (lambda: list(written)), (lambda name: written[name].cpu())
        return types.SimpleNamespace(keys=keys, get_tensor=tensor)

    real_stored = m.hub.stored_tensors
    real_resize, torch.UntypedStorage.resize_ = torch.UntypedStorage.resize_, resize
    real_propagate = ShardingPropagator._propagate_tensor_meta_non_cached
    ShardingPropagator._propagate_tensor_meta_non_cached = propagate
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    FakeTensor.tolist = lambda x: watch.wait("to the host", x.is_cuda) or made_up(x)
    torch.nn.Module._apply = convert
    torch.Tensor.record_stream = lambda tensor, stream: None
    F.rms_norm = lambda x, shape, weight, eps: FusedNorm.apply(x, weight)
    F.scaled_dot_product_attention = chosen_attention(watch, F.scaled_dot_product_attention)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 8, lambda: 0
    cuda._lazy_init = cuda.set_device = cuda.synchronize = lambda *args: None
    cuda.Stream = cuda.Event = MagicMock
    cuda.current_stream = cuda.stream = lambda *args: stream
    cuda.memory_reserved = cuda.memory_allocated = lambda device=None: watch.live
    cuda.mem_get_info = lambda device=None: (capacity - watch.live, capacity)
    m.runs.init_device_mesh = outside(m.runs.init_device_mesh)
    m.codescaler.causal_lower_right = outside(m.codescaler.causal_lower_right)
    m.hub.stored_tensors = lambda folder: {k: Stored(x) for k, x in real_stored(folder).items()}
    m.codescaler.save_torch_state_dict = m.runs.save_file = save
    m.runs.safe_open = opened
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    dist.all_gather_object = lambda out, item: out.__setitem__(slice(None), [item] * len(out))


# --------------------------------------------------------------------------------------------------
# the checks, on the tiny shape


def rollouts(m, number, count, prompt, new, support=None):
    """A group of `count` answers of `new` tokens to one prompt."""
    args = m.problems.Problem("p", "text"), number, [1] * prompt, [4] * new, [-1.0] * new, support
    return [m.pairs.Rollout(*args, advantage=(-1.0) ** i) for i in range(count)]


def pairs(m, count, prompt, program):
    sides = [((2, i, *[3] * (program - 2)), (4, i)) for i in range(count)]
    return [m.train_rm.EncodedPair((1,) * prompt, *side, "p") for side in sides]


def check_forward(m, watch):
    for head, folder in (("lm", "tiny/policy"), ("score", "tiny/reward")):
        model = m.codescaler.load_model(ROOT / folder, head, torch.bfloat16, CUDA)
        hidden_BTD, lengths_B = m.codescaler.continue_prompt(model, [1] * 9, [[2] * 20, [3] * 18])
        result = model.logits(hidden_BTD) if head == "lm" else model.score(hidden_BTD, lengths_B)
        assert hidden_BTD.dtype == torch.bfloat16 and result.dtype == torch.float32
        assert result.is_cuda and set(watch.attention) == {"flash"}, watch.attention
    for sharded in (True, False):
        reward_model = m.codescaler.RewardModel(ROOT / "tiny/reward", CUDA, sharded=sharded)
        assert len(reward_model.score("def f(x)", [f"return x + {i}" for i in range(5)])) == 5


def check_decoding(m, watch):
    model, sampled = m.codescaler.load_model(ROOT / "tiny/policy", "lm", torch.bfloat16, CUDA), []
    for sampling in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95}):
        waits = []
        for tokens in (5, 6):  # the second has one pass and one draw more
            watch.reset()
            found = m.codescaler.generate(model, [[1] * 30, [2] * 20], 2, tokens, **sampling)
            waits.append(watch.waits)
        sampled += [len(completion.ids) for group in found for completion in group]
        assert set(watch.attention) == {"flash", "efficient, with a mask"}, watch.attention
    assert sampled == [6] * 16 and not watch.kernels["sort"], watch.kernels
    return {"waits": waits[1] - waits[0]}


def check_train_rm(m, watch):
    folder = ROOT / "tiny/reward"
    args = m.train_rm.Args(token_budget=60, out=tempfile.mkdtemp())
    run = m.runs.Run(args, m.train_rm.COLUMNS)
    for begun in (True, False):
        model = m.codescaler.load_model(folder, "score", None, CUDA, sharded=True)
        model.checkpointing = True
        optimizer = m.runs.adamw(model, CUDA, 1e-4, 0.01)
        if not begun:
            run.load_optimizer(model, optimizer)
        m.train_rm.update(model, optimizer, pairs(m, 32, 9, 20), args, 0, 8)
        write = partial(m.codescaler.save_model, model, m.codescaler.Tokenizer(folder))
        run.save(write, model, optimizer, {"step": 1})
    for p in model.parameters():
        moment = optimizer.state[p]["exp_avg"]
        assert p.dtype == moment.dtype == torch.float32 and p.is_cuda and moment.is_cuda
    copy = m.codescaler.gathered(model)
    assert copy.model.norm.weight.dtype == torch.bfloat16 and copy.score.weight.dtype == p.dtype
    shutil.rmtree(args.out)


def check_grpo(m, watch):
    for kl, support in ((0.0, None), (0.2, [[4, 5, 6]] * 12)):
        model = m.codescaler.load_model(ROOT / "tiny/policy", "lm", None, CUDA, sharded=True)
        model.checkpointing, reference = bool(kl), None
        if kl:
            kind = "lm", torch.bfloat16, CUDA, True
            reference = m.codescaler.load_model(ROOT / "tiny/policy", *kind).requires_grad_(False)
        args = m.grpo.Args(token_budget=40, kl=kl, dual_clip=3.0, updates=2, temperature=0.6)
        groups = [rollouts(m, number, 4, 9, 12, support) for number in range(2)]
        optimizer = m.runs.adamw(model, CUDA, 1e-4, 0.01)
        found = m.grpo.update(model, reference, optimizer, groups, args, CUDA, 8)
        assert set(watch.attention) == {"flash"} and ("kl" in found) == bool(kl), found


CHECKS = {f.__name__[6:]: f for f in (check_forward, check_decoding, check_train_rm, check_grpo)}

# --------------------------------------------------------------------------------------------------
# peak memory of real shapes


def peak_gib(m, watch, script, shape, world, prompt, answer, count, token_budget):
    """Peak of an update with --checkpointing on one rank, weights and moments included: `count`
    pairs (train_rm) or answers (grpo) of `answer` tokens to one prompt."""
    head = "score" if script == "train_rm" else "lm"
    model = m.codescaler.meta_model(m.bench.SHAPES[f"qwen3-{shape}-shape"], head, torch.float32)
    m.runs.shard(model, model.model.layers, [model.score] if head == "score" else [], CUDA)
    model.to_empty(device=CUDA)
    model.checkpointing = True
    optimizer = m.runs.adamw(model, CUDA, 1e-5, 0.01)
    for number, *size in ((2, 2, 4), (count, prompt, answer)):  # the first makes AdamW's moments
        watch.reset()
        if script == "train_rm":
            args = m.train_rm.Args(token_budget=token_budget)
            m.train_rm.update(model, optimizer, pairs(m, number * world, *size), args, 0, world)
        else:
            args = m.grpo.Args(token_budget=token_budget, kl=0.0)
            group = rollouts(m, 0, number, *size)
            m.grpo.update(model, None, optimizer, [group], args, CUDA, world)
    return {"peak": watch.peak / GIB}


# --------------------------------------------------------------------------------------------------


def main(job):
    """Executes the checks of a job, a dict, and prints a JSON line {name: findings or error}."""
    sys.path.insert(0, str(ROOT))
    m, found = types.SimpleNamespace(), {}
    for name in "hub runs problems codescaler pairs train_rm grpo bench".split():
        if name == job.get("plant", [""])[0]:
            text, (_, old, new) = (ROOT / f"{name}.py").read_text(), job["plant"]
            assert text.count(old) == 1, f"{old!r} is not in {name}.py once"
            module = sys.modules[name] = types.ModuleType(name)
            exec(compile(text.replace(old, new), str(ROOT / f"{name}.py"), "exec"), vars(module))
        setattr(m, name, __import__(name))
    watch = Watch()
    install(watch, m, job.get("world", 8), int(77.5 * GIB))
    for name, arguments in job["checks"].items():
        function = CHECKS.get(name, peak_gib)
        single = torch.autograd.set_multithreading_enabled(False)
        with FakeTensorMode(allow_non_fake_inputs=True), single, watch:
            watch.reset()
            try:
                found[name] = {"error": None} | (function(m, watch, *arguments) or {})
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error} at {line()}"}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def fake_gpu(tmp_path_factory):
    """-> function: a job -> what main() finds, in a process with the shim."""
    if not shutil.which("g++") or torch.version.cuda:
        pytest.skip("needs g++ and a CPU build of torch")
    torch_folder, folder = Path(torch.__file__).parent, tmp_path_factory.mktemp("shim")
    (folder / "shim.cpp").write_text(SHIM)
    command = f"g++ -shared -fPIC -std=c++20 -I{torch_folder}/include shim.cpp -o shim.so"
    command += f" -L{torch_folder}/lib -ltorch_cpu -lc10 -Wl,-rpath,{torch_folder}/lib"
    subprocess.run(command.split(), cwd=folder, check=True)

    def run(**job):
        env = os.environ | {"LD_PRELOAD": str(folder / "shim.so"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, json.dumps(job)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def found(fake_gpu):
    return fake_gpu(checks=dict.fromkeys(CHECKS, []))


@pytest.mark.parametrize("name", CHECKS)
def test_no_wrong_device_dtype_or_kernel(found, name):
    assert found[name]["error"] is None


def test_a_decoding_step_waits_for_the_gpu_once(found):
    (what,) = found["decoding"]["waits"]  # nothing else, neither way
    assert what.startswith("to the host") and found["decoding"]["waits"][what] == 1


LOGP, DENSE = "logp_R1 = p_RN.gather(1, place_R[:, None]).log()", "            if P > 0 and not ids"
PLANTED = {
    "device": ("decoding", "max(self.lengths), device=self.k.device)", "max(self.lengths))"),
    "dtype": ("decoding", "self.slot_R] = k_R1GK[:, 0]", "self.slot_R] = k_R1GK[:, 0].float()"),
    "wait": ("decoding", LOGP, LOGP + " + 0 * float(p_RN.sum())"),
    "mask that FSDP2 casts":
        ("grpo", DENSE, f"            mask = causal_lower_right(T, P + T) if P else None\n{DENSE}"),
}  # fmt: skip


@pytest.mark.parametrize("check, old, new", PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_found(fake_gpu, check, old, new):
    found = fake_gpu(checks={check: []}, plant=["codescaler", old, new])[check]
    assert found["error"] or sum(found["waits"].values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["8b", "14b"])
def test_bench_memory_is_near_the_peak(fake_gpu, shape):
    job = {"memory": ["grpo", shape, 8, 4096, 16384, 2, 20480]}
    bench, peak = pytest.importorskip("bench"), fake_gpu(checks=job)["memory"]["peak"]
    args = bench.MemoryArgs(gpus=8, prompt=4096, response=16384, token_budget=20480)
    items = bench.memory_items(bench.SHAPES[f"qwen3-{shape}-shape"], None, args)
    computed = sum(size for phases, _, size in items if "train" in phases) / GIB
    assert 0.85 < computed / peak < 1.15, (computed, peak)


@pytest.mark.slow
def test_the_command_of_train_rm_for_one_gpu_fits_80_gb(fake_gpu):
    job = {"rm": ["train_rm", "1.7b", 1, 1024, 3072, 10, 32768]}
    assert fake_gpu(checks=job, world=1)["rm"]["peak"] < 70


def test_every_line_of_gpu_sh_runs_on_a_cpu(tmp_path):
    command = ["bash", ROOT / "tests/gpu.sh", "--cpu", tmp_path]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
