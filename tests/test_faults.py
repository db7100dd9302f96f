"""What goes wrong around a run: kills, full disks, spoilt weights, absurd flags.    pytest tests/test_faults.py

Damaged and mis-shaped checkpoints are in test_model.py, missing files and Ctrl-C in test_runs.py, lost ranks in
test_ranks.py.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_runs import GRPO, RM, ROOT, rows, run, same_weights, without_times
from tokenizers import Tokenizer as FastTokenizer

import bench
import codescaler
import grpo
import train_rm
from codescaler import Tokenizer, load_model
from common import UserError
from train_rm import Args

TRAINERS = {
    "train_rm.py": ["train_rm.py", *RM],
    "grpo.py": ["grpo.py", "--reward", "rm", "--rm", "tiny/reward", *GRPO],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{trainer: (run folder of an uninterrupted run, its seconds)}, made when asked for."""
    found = {}

    def of(trainer):
        if trainer not in found:
            out, start = tmp_path_factory.mktemp("whole") / trainer, time.perf_counter()
            run(*TRAINERS[trainer], "--out", out)
            found[trainer] = out, time.perf_counter() - start
        return found[trainer]

    return of


def start(command, **given):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **given,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("trainer", TRAINERS)
def test_sigkill_at_a_random_moment_changes_nothing(trainer, seed, whole, tmp_path):
    command = [*TRAINERS[trainer], "--out", tmp_path / "run"]
    rng, (straight, seconds) = random.Random(f"{trainer}-{seed}"), whole(trainer)
    for _ in range(2):  # the second kill hits the resumed run, unless that ended before
        process = start(command)
        time.sleep(rng.uniform(0.2, 0.95) * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run(*command)
    assert same_weights(straight, tmp_path / "run")
    assert without_times(straight) == without_times(tmp_path / "run")


@pytest.fixture
def pairs_command(tmp_path):
    """train_rm.py on a file of 16 pairs: seconds a run."""
    lines = [
        json.dumps({"prompt": f"Add {i}.", "chosen": f"a + {i}", "rejected": f"a - {i}", "id": f"{i}#0"})
        for i in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    words = "--batch 4 --split pair --held-out 0.25 --steps".split()
    return ["train_rm.py", "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "run", *words]


def test_a_full_disk_loses_nothing(pairs_command, tmp_path):
    out = tmp_path / "run"
    run(*pairs_command, "3")
    before = load_file(out / "checkpoint" / "model.safetensors")
    shut = (2**20, 2**20)  # no file over 1 MiB
    process = start([*pairs_command, "4"], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, shut))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.startswith("error: cannot write") and str(out) in errors
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == 3
    after = load_model(out / "checkpoint", "score", device="cpu").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_sigterm_between_saves_loses_no_step(pairs_command, tmp_path):
    out = tmp_path / "run"
    process = start([*pairs_command, "2000", "--save-every", "1000"])
    while process.poll() is None and not ((out / "metrics.csv").exists() and len(rows(out)) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == len(rows(out)) >= 3


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing but a test catches it."""


def saved_step(run_, model, tokenizer, step):
    torch.nn.init.constant_(model.model.norm.weight, step)
    run_.save(model, tokenizer, step=step, optimizer={"state": {}, "param_groups": []})


def test_a_kill_between_any_two_steps_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    model, tokenizer = load_model("tiny/policy", "lm", device="cpu"), Tokenizer("tiny/policy")
    args, found, point = Args(out=str(tmp_path / "run")), [], 0
    while not found or found[-1] != "finished":
        shutil.rmtree(args.out, ignore_errors=True)
        saved_step(codescaler.Run(args, ["step"]), model, tokenizer, 1)
        left = point

        def dying(real):
            def call(*given, **named):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*given, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "fsync"):
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(codescaler, "remove", dying(codescaler.remove))
            try:
                saved_step(codescaler.Run(args, ["step"]), model, tokenizer, 2)
                outcome = "finished"
            except Killed:
                outcome = "killed"
        opened = codescaler.Run(args, ["step"])
        step = opened.load()["step"]
        norm = load_file(opened.checkpoint / "model.safetensors")["model.norm.weight"]
        assert step in (1, 2) and norm.eq(step).all()  # weights and state are of one step
        found.append("finished" if outcome == "finished" else step)
        point += 1
    assert found.count(1) >= 3 and found.count(2) >= 1  # killed before and after the new one took its place


@pytest.mark.parametrize(
    "file, line",
    [("metrics.csv", "step\nabc,1\n"), ("samples.jsonl", '{"step": 1\n'), ("args.json", "{"),
     ("checkpoint/state.pt", "x")],
)  # fmt: skip
def test_garbled_files_of_a_run_are_named(file, line, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / file).write_text(line)
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        opened = codescaler.Run(Args(out=str(tmp_path)), ["step"])
        opened.load()
        opened.samples()


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl"])
def test_a_full_disk_under_the_log_is_named(name, tmp_path):
    opened = codescaler.Run(Args(out=str(tmp_path)), ["step"])
    (tmp_path / name).symlink_to("/dev/full")  # every write to it raises ENOSPC
    with pytest.raises(UserError, match=f"{name} .*No space left"):
        opened.log(step=1) if name == "metrics.csv" else opened.append([{"step": 1}])


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    shutil.copytree(ROOT / "tiny" / "policy", tmp_path / "policy")
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "policy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight holds values that are not finite"):
        load_model(tmp_path / "policy", "lm", device="cpu")


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    shutil.copytree(ROOT / "tiny" / "policy", tmp_path / "policy")
    tokenizer = FastTokenizer.from_file(str(tmp_path / "policy" / "tokenizer.json"))
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(tmp_path / "policy" / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json has 513 tokens, expected at most the 512"):
        load_model(tmp_path / "policy", "lm", device="cpu")


@pytest.mark.parametrize(
    "command, found",
    [
        ("grpo.py --group 0", "--group 0"),
        ("grpo.py --temperature 0", "--temperature 0.0"),
        ("grpo.py --lr -1", "--lr -1.0"),
        ("grpo.py --lr inf", "--lr inf"),
        ("grpo.py --steps -1", "--steps -1"),
        ("train_rm.py --lr nan", "--lr nan"),
        ("train_rm.py --batch 0", "--batch 0"),
        ("train_rm.py --held-out 1.5", "--held-out 1.5"),
        ("train_rm.py --limit 0", "--limit 0"),
        ("train_rm.py --center-at nan", "--center-at nan"),
        ("train_rm.py --length-balance nan", "--length-balance nan"),
        ("train_rm.py --epochs 0", "--epochs 0.0"),
        ("grpo.py --group 1", "--group 1"),
        ("grpo.py --eval-top-p 7", "--eval-top-p 7.0"),
    ],
)
def test_absurd_flags_are_named(command, found, monkeypatch):
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(UserError, match=found + ": expected"):
        {"grpo.py": grpo, "train_rm.py": train_rm}[sys.argv[0]].arguments()


def test_no_resume_removes_what_runs_write_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "checkpoint").mkdir()
    for name in ("notes.md", "mine/a.txt", "checkpoint/state.pt", "metrics.csv", "pairs.jsonl"):
        (tmp_path / name).write_text("x")
    codescaler.Run(Args(out=str(tmp_path), resume=False), ["step"])
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "args.json", "mine", "notes.md"}
    assert (tmp_path / "mine" / "a.txt").read_text() == "x"


@pytest.mark.parametrize("flag", ["pairs", "init", "policy"])
def test_no_resume_never_deletes_an_input_of_the_run(flag, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("x")
    (tmp_path / "checkpoint").mkdir()
    given = {"pairs": "pairs.jsonl", "init": "", "policy": "checkpoint"}[flag]
    value = str(tmp_path / given)
    args = Args(out=str(tmp_path), resume=False, **{flag: [value] if flag == "policy" else value})
    with pytest.raises(UserError, match=f"--no-resume would delete --{flag} .*choose another --out"):
        codescaler.Run(args, ["step"])
    assert (tmp_path / "pairs.jsonl").exists() and (tmp_path / "checkpoint").exists()


def test_no_pair_and_one_pair_are_too_few(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    args = Args(pairs=str(pairs), out=str(tmp_path / "run"))
    pairs.write_text("")
    with pytest.raises(UserError, match="pairs.jsonl: no rows"):
        train_rm.get_pairs(args, None, "cpu", print, 0, 1)
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "a = 1", "rejected": "a = 2", "id": "1#0"}) + "\n")
    with pytest.raises(UserError, match="too few for --batch 32: give more pairs .--pairs"):
        train_rm.get_pairs(args, None, "cpu", print, 0, 1)


def test_one_problem_can_be_trained_on(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "one", "prompt": "Add one."}) + "\n")
    run(*TRAINERS["grpo.py"], "--problems", tmp_path / "one.jsonl", "--out", tmp_path / "run", "--steps", "1")
    assert len(rows(tmp_path / "run")) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --out .*file/run: Not a directory"):
        codescaler.Run(Args(out=str(tmp_path / "file" / "run")), ["step"])


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    if os.access(tmp_path / "shut", os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(UserError, match="cannot write to --out .*shut/run: Permission denied"):
        codescaler.Run(Args(out=str(tmp_path / "shut" / "run")), ["step"])


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text("step,loss,reward,pass_rate,valid_rate\n1,0,0,0,0\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises ImportError
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench.COMMANDS["plot"]([str(tmp_path)])
