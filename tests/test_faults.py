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

import codescaler
import grpo
import train_rm
from codescaler import Tokenizer, load_model
from problems import Problem, UserError
from train_rm import Args

TRAINERS = {
    "train_rm.py": ["train_rm.py", *RM],
    "grpo.py": ["grpo.py", "--reward", "rm", "--rm", "tiny/reward", *GRPO],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{trainer: run folder of an uninterrupted run}, made when asked for."""
    folders = {}

    def of(trainer):
        if trainer not in folders:
            folders[trainer] = tmp_path_factory.mktemp("whole") / trainer
            run(*TRAINERS[trainer], "--out", folders[trainer])
        return folders[trainer]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("trainer", TRAINERS)
def test_sigkill_at_a_random_moment_changes_nothing(trainer, seed, whole, tmp_path):
    command = [sys.executable, *TRAINERS[trainer], "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng, seconds = random.Random(f"{trainer}-{seed}"), 25
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(2, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(*TRAINERS[trainer], "--out", tmp_path / "run")
    assert same_weights(whole(trainer), tmp_path / "run")
    assert without_times(whole(trainer)) == without_times(tmp_path / "run")


def test_a_full_disk_loses_nothing(tmp_path):
    out, command = tmp_path / "run", TRAINERS["grpo.py"]
    run(*command, "--out", out, "--steps", "3")
    done = subprocess.run(
        [sys.executable, *command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),  # no file over 1 MiB
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: cannot write") and str(out) in done.stderr
    assert torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"] == 3
    run(*command, "--out", out)
    assert [row["step"] for row in rows(out)] == ["1", "2", "3", "4"]


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


def mistake(found, *command):
    done = run(*command, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-500:]
    assert found in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    shutil.copytree(ROOT / "tiny" / "policy", tmp_path / "policy")
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "policy" / "model.safetensors", {"format": "pt"})
    command = ["codescaler.py", "generate", "--model", tmp_path / "policy", "hello"]
    mistake("model.norm.weight holds values that are not finite", *command)


@pytest.mark.parametrize(
    "command, found",
    [
        ("grpo.py --group 0", "--group 0"),
        ("grpo.py --temperature 0", "--temperature 0.0"),
        ("grpo.py --lr -1", "--lr -1.0"),
        ("grpo.py --steps -1", "--steps -1"),
        ("train_rm.py --lr nan", "--lr nan"),
        ("train_rm.py --batch 0", "--batch 0"),
        ("train_rm.py --held-out 1.5", "--held-out 1.5"),
        ("train_rm.py --limit 0", "--limit 0"),
    ],
)
def test_absurd_flags_are_named(command, found, monkeypatch):
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(UserError, match=found + ": expected"):
        {"grpo.py": grpo, "train_rm.py": train_rm}[sys.argv[0]].arguments()


def test_no_rows_and_one_row(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("")
    mistake("pairs.jsonl: no rows", "train_rm.py", "--pairs", pairs, "--out", tmp_path / "a")
    row = {"prompt": "p", "chosen": "a = 1", "rejected": "a = 2", "id": "1#0"}
    pairs.write_text(json.dumps(row) + "\n")
    mistake("too few for --batch 32", "train_rm.py", "--pairs", pairs, "--out", tmp_path / "b")
    problem = Problem("one", "Add one.", None, None, "mine")
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": problem.id, "prompt": problem.prompt}) + "\n")
    command = [*TRAINERS["grpo.py"], "--problems", tmp_path / "one.jsonl", "--out", tmp_path / "c", "--steps", "1"]
    run(*command)
    assert len(rows(tmp_path / "c")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    mistake("shut", "grpo.py", "--reward", "exec", "--out", tmp_path / "shut" / "run")


@pytest.mark.parametrize("package, command", [("matplotlib", ["plot", "RUN"])])
def test_a_missing_optional_package_is_named(package, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,loss,reward,pass_rate,valid_rate\n1,0,0,0,0\n")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('not here')")
    words = [str(tmp_path / "run") if word == "RUN" else word for word in command]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "bench.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and f"pip install {package}" in done.stderr and "Traceback" not in done.stderr
