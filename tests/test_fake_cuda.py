"""The CUDA paths without CUDA, on the fake GPU of fake_cuda.py, as rank 0 of 8.

    pytest tests/test_fake_cuda.py    # a minute; needs g++ and a CPU build of torch

Found are tensors on a wrong device, mixtures of dtypes, waits of the host, the attention kernel
and peak memory.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import speed
import torch
from fake_cuda import Watch, build_shim, install, line
from torch._subclasses.fake_tensor import FakeTensorMode

import bench
import codescaler as cs
import grpo
import runs
import train_rm
from pairs import Rollout
from problems import Problem

TINY, CUDA = Path(__file__).parents[1] / "tiny", "cuda:0"

# --------------------------------------------------------------------------------------------------
# the checks: functions of the watch, which raise or return what they have found


def update(script, model, optimizer, args, sizes, reference=None, support=None):
    """An update of train_rm or grpo -> what it returns; `sizes`: prompts of this rank, pairs or
    answers to each, tokens of a prompt and of an answer."""
    world, (prompts, count, prompt, answer) = runs.num_ranks(), sizes
    if script == "train_rm":
        sides = [[(side, i, *[4] * (answer - 2)) for side in (2, 3)] for i in range(count)]
        pair, numbers = train_rm.EncodedPair, range(prompts)
        batch = [pair((number,) * prompt, *two, "") for number in numbers for two in sides]
        return train_rm.update(model, optimizer, batch * world, args, 0, world)
    groups, facts = [], ([1] * prompt, [4] * answer, [-1.0] * answer, support)
    for number in range(prompts):
        answers = [Rollout(Problem("p", ""), number, *facts) for _ in range(count)]
        for i, rollout in enumerate(answers):
            rollout.advantage = (-1.0) ** i
        groups.append(answers)
    return grpo.update(model, reference, optimizer, groups, args, CUDA, world)


def check_forward(watch):
    for head, folder in (("lm", "policy"), ("score", "reward")):
        model = cs.load_model(TINY / folder, head, torch.bfloat16, CUDA)
        hidden_BTD, lengths_B = cs.continue_prompt(model, [1] * 9, [[2] * 20, [3] * 18])
        result = model.logits(hidden_BTD) if head == "lm" else model.score(hidden_BTD, lengths_B)
        assert hidden_BTD.dtype == torch.bfloat16 and result.dtype == torch.float32
        assert result.is_cuda and set(watch.attention) == {"flash"}, watch.attention
    for sharded in (True, False):
        reward_model = cs.RewardModel(TINY / "reward", CUDA, sharded=sharded)
        assert len(reward_model.score("def f(x)", [f"return x + {i}" for i in range(5)])) == 5


def check_decoding(watch):
    model, sampled = cs.load_model(TINY / "policy", "lm", torch.bfloat16, CUDA), []
    for sampling in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95}):
        waits = []
        for tokens in (5, 6):  # the second has one pass and one draw more
            watch.reset()
            found = cs.generate(model, [[1] * 30, [2] * 20], 2, tokens, **sampling)
            waits.append(watch.waits)
        sampled += [len(completion.ids) for group in found for completion in group]
        assert set(watch.attention) == {"flash", "efficient, with a mask"}, watch.attention
    assert sampled == [6] * 16 and not watch.kernels["sort"], watch.kernels
    return waits[1] - waits[0]


def check_train_rm(watch):
    """Two updates, the second after a save and a resume; the moments come back from a CPU."""
    args = train_rm.Args(token_budget=60, out=tempfile.mkdtemp())
    run = runs.Run(args, train_rm.COLUMNS)
    for begun in (True, False):
        model = cs.load_model(TINY / "reward", "score", None, CUDA, sharded=True)
        model.checkpointing = True
        optimizer = runs.adamw(model, CUDA, 1e-4, 0.01)
        if not begun:
            run.load_optimizer(model, optimizer)
        update("train_rm", model, optimizer, args, (2, 4, 9, 20))
        write = partial(cs.save_model, model, cs.Tokenizer(TINY / "reward"))
        run.save(write, model, optimizer, {"step": 1})
    for p in model.parameters():
        moment = optimizer.state[p]["exp_avg"]
        assert p.dtype == moment.dtype == torch.float32 and p.is_cuda and moment.is_cuda
    copy = cs.gathered(model)
    assert copy.model.norm.weight.dtype == torch.bfloat16 and copy.score.weight.dtype == p.dtype
    shutil.rmtree(args.out)


def check_grpo(watch):
    for kl, support in ((0.0, None), (0.2, [[4, 5, 6]] * 12)):
        model = cs.load_model(TINY / "policy", "lm", None, CUDA, sharded=True)
        model.checkpointing, reference = bool(kl), None
        if kl:
            reference = cs.load_model(TINY / "policy", "lm", torch.bfloat16, CUDA, True)
            reference.requires_grad_(False)
        args = grpo.Args(token_budget=40, kl=kl, dual_clip=3.0, updates=2, temperature=0.6)
        optimizer = runs.adamw(model, CUDA, 1e-4, 0.01)
        found = update("grpo", model, optimizer, args, (2, 4, 9, 12), reference, support)
        assert set(watch.attention) == {"flash"} and ("kl" in found) == bool(kl), found


def check_speed(watch):
    """The rows that tests/gpu.sh measures on a GPU."""
    args = speed.Args(rounds=0, device="cuda")
    for row, size in zip(speed.ROWS, (8, (2, 2, 4), 32, (2, 2, 4))):
        assert getattr(speed, row)(args, size)["peak_gib"] > 0


def check_memory(watch, script, name, *sizes):
    """Peak of an update on one rank, weights and moments included, and what bench.py computes;
    `sizes`: pairs or answers to one prompt, tokens of the prompt, of an answer, of a pass."""
    is_rm = script == "train_rm"
    count, prompt, answer, budget = map(int, sizes)
    model = speed.random_model(speed.Args(name, device="cuda"), "score" if is_rm else "lm", True)
    optimizer = runs.adamw(model, CUDA, 1e-5, 0.01)
    args = train_rm.Args() if is_rm else grpo.Args(kl=0.0)
    args.token_budget = budget
    update(script, model, optimizer, args, (1, 2, 2, 4))  # makes the moments
    watch.reset()
    update(script, model, optimizer, args, (1, count, prompt, answer))
    sizes = dict(prompt=prompt, response=answer, token_budget=budget, gpus=runs.num_ranks())
    items = bench.memory_items(model.config, None, bench.MemoryArgs(**sizes))
    computed = sum(size for phases, _, size in items if "train" in phases)
    return watch.peak / 2**30, computed / 2**30


def check_planted(watch, what):
    """Decoding with a mistake in it."""
    draw, write = cs.draw, cs.KVCache.write
    planted = {
        "device": (cs, "draw", lambda p, u: draw(p, u.cpu())),
        "dtype": (cs.KVCache, "write", lambda cache, i, k, v: write(cache, i, k.float(), v)),
        "wait": (cs, "draw", lambda p, u: draw(p, u + 0 * float(p.sum()))),
    }
    with mock.patch.object(*planted[what]):
        return check_decoding(watch)


def main(checks):
    """Makes checks, given as name and arguments in a text -> {text: (what was found, error)}."""
    watch, found = Watch(), {}
    install(watch, int(os.environ["WORLD_SIZE"]))
    for check in checks:
        name, *arguments = check.split()
        single = torch.autograd.set_multithreading_enabled(False)
        with FakeTensorMode(allow_non_fake_inputs=True), single, watch:
            watch.reset()
            try:
                found[check] = globals()[f"check_{name}"](watch, *arguments), None
            except Exception as error:
                found[check] = None, f"{type(error).__name__}: {error} at {line()}"
    return found


# --------------------------------------------------------------------------------------------------
# the tests, which execute main() in a process with the shim


@pytest.fixture(scope="module")
def fake_gpu(tmp_path_factory):
    """-> function: what main() finds as one of several ranks."""
    shim = build_shim(tmp_path_factory.mktemp("shim"))
    if shim is None:
        pytest.skip("needs g++ and a CPU build of torch")

    def run(*checks, ranks=8):
        env = {"LD_PRELOAD": shim, "PYTHONPATH": TINY.parent, "OMP_NUM_THREADS": 1, "RANK": 0}
        env = os.environ | {k: str(v) for k, v in (env | {"WORLD_SIZE": ranks}).items()}
        command = [sys.executable, __file__, *checks]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


CHECKS = ["forward", "decoding", "train_rm", "grpo", "speed"]
PLANTED = ["planted device", "planted dtype", "planted wait"]


@pytest.fixture(scope="module")
def found(fake_gpu):
    return fake_gpu(*CHECKS, *PLANTED)


@pytest.mark.parametrize("check", CHECKS)
def test_no_wrong_device_dtype_or_kernel(found, check):
    assert found[check][1] is None


def test_a_wrong_device_and_a_mixture_of_dtypes_are_found(found):
    assert "on the same device" in found["planted device"][1]
    assert "index_put_ of" in found["planted dtype"][1]


def test_a_decoding_step_waits_for_the_gpu_once(found):
    ((what, count),) = found["decoding"][0].items()  # nothing else, neither way
    assert what.startswith("to the host") and count == 1
    assert sum(found["planted wait"][0].values()) == 2  # a second one would be seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "update, ranks",
    [
        ("grpo qwen3-8b 2 4096 16384 20480", 8),
        ("grpo qwen3-14b 2 4096 16384 20480", 8),
        ("train_rm qwen3-1.7b 10 1024 3072 32768", 1),  # README's command for one GPU
    ],
)
def test_an_update_fits_80_gb_and_bench_memory_is_near_its_peak(fake_gpu, update, ranks):
    ((peak, computed), error) = fake_gpu(f"memory {update}", ranks=ranks)[f"memory {update}"]
    assert peak < 70 and 0.85 < computed / peak < 1.15, (peak, computed)


def test_every_line_of_gpu_sh_runs_on_a_cpu(tmp_path):
    command = ["bash", TINY.parent / "tests/gpu.sh", "--cpu", tmp_path]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
