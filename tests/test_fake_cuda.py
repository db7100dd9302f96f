"""The CUDA paths without CUDA, on the fake GPU of fake_cuda.py, as rank 0 of 8.

    pytest tests/test_fake_cuda.py    # 40 s; needs g++ and a CPU build of torch

Found are tensors on a wrong device, mixtures of dtypes, waits of the host, the attention kernel
and peak memory.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_cuda import Watch, build_shim, install, line
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[1]
CUDA, GIB = "cuda:0", 2**30

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
    shim = build_shim(tmp_path_factory.mktemp("shim"))
    if shim is None:
        pytest.skip("needs g++ and a CPU build of torch")

    def run(**job):
        env = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
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
