"""Both trainers as a user runs them: small runs, resuming after a kill, and mistakes.    pytest tests/test_runs.py"""

import csv
import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import codescaler
from problems import load_problems

ROOT = Path(__file__).parents[1]
RM = "--limit 40 --group 4 --batch 8 --steps 4 --held-out 0.3 --max-new-tokens 96".split()
GRPO = "--limit 12 --prompts 3 --group 4 --steps 4 --eval-group 2 --eval-every 2 --eval-limit 4".split()
GRPO += ["--max-new-tokens", "96"]


def run(*args, check=True, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread adds in one order: results can be compared by bit
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "checkpoint" / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder):
    with open(Path(folder) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def without_times(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


@pytest.fixture(scope="module")
def rm_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("rm") / "run"
    return out, run("train_rm.py", "--out", out, *RM).stdout


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    return out, run("grpo.py", "--reward", "rm", "--rm", "tiny/reward", "--out", out, *GRPO).stdout


def kill_after(step, out, *command):
    """Starts a trainer and kills it (SIGKILL) once its metrics hold `step` steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    metrics = Path(out) / "metrics.csv"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) <= step):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_train_rm_prints_the_funnel_and_the_table(rm_run):
    out, text = rm_run
    for word in (
        "problems",
        "valid",
        "unique",
        "with both",
        "pairs",
        "step 4/4",
        "initialisation",
        "longer program wins",
    ):
        assert word in text
    assert [row["step"] for row in rows(out)] == ["1", "2", "3", "4"]
    assert list(rows(out)[0])[:5] == ["step", "loss", "reward", "pass_rate", "valid_rate"]
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(
        set(p) == {"prompt", "chosen", "rejected", "id", "source", "margin", "num_tests"} for p in pairs
    )
    args = json.loads((out / "args.json").read_text())
    assert args["args"]["batch"] == 8 and args["torch"] == torch.__version__


def test_grpo_prints_steps_and_the_table(grpo_run):
    out, text = grpo_run
    for word in ("before:", "step 4/4", "pass ", "valid ", "toy:test", "toy:unseen", "gain [95% interval]"):
        assert word in text
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 3 * 4
    for s in samples:
        assert (s["code"] is None) == (s["reward"] == 0.0) and (s["code"] is None) == (s["reason"] != "ok")
    assert rows(out)[1]["eval"] and not rows(out)[0]["eval"]


def test_killed_and_resumed_equals_uninterrupted(rm_run, grpo_run, tmp_path):
    for whole, command in (
        (rm_run[0], ["train_rm.py", *RM]),
        (grpo_run[0], ["grpo.py", "--reward", "rm", "--rm", "tiny/reward", *GRPO]),
    ):
        out = tmp_path / command[0]
        command += ["--out", out]
        kill_after(2, out, *command)
        assert len(rows(out)) < 4
        assert "continuing" in run(*command).stdout
        assert same_weights(whole, out)
        assert without_times(whole) == without_times(out)


def test_a_killed_collection_goes_on(rm_run, tmp_path):
    whole, _ = rm_run
    done = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "run"
    out.mkdir()
    (out / "samples.jsonl").write_text("".join(done[:80]) + done[80][:50])  # 20 of 40 problems and a torn line
    run("train_rm.py", "--out", out, "--collect-only", *RM)
    assert (out / "pairs.jsonl").read_text() == (whole / "pairs.jsonl").read_text()


def test_a_finished_run_prints_its_table_again(rm_run, grpo_run):
    table = rm_run[1][rm_run[1].index("held-out pairs") :]
    assert table in run("train_rm.py", "--out", rm_run[0], *RM).stdout
    command = ["grpo.py", "--reward", "rm", "--rm", "tiny/reward", "--out", grpo_run[0], *GRPO]
    table = grpo_run[1][grpo_run[1].index("held-out problems") :]
    assert table in run(*command).stdout


def test_steps_may_be_raised_and_nothing_else(grpo_run, tmp_path):
    command = ["grpo.py", "--reward", "rm", "--rm", "tiny/reward", *GRPO]
    short = [*command, "--out", tmp_path / "a", "--steps", "2"]
    run(*short)
    run(*command, "--out", tmp_path / "a")
    assert same_weights(grpo_run[0], tmp_path / "a")
    refused = run(*command, "--out", tmp_path / "a", "--lr", "1", check=False)
    assert refused.returncode == 2 and "--lr 0.0" in refused.stderr and "now it is 1.0" in refused.stderr


def test_exec_reward_is_the_verdict(tmp_path):
    run("grpo.py", "--reward", "exec", "--out", tmp_path / "run", *GRPO, "--steps", "1")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {s["reward"] for s in samples} <= {0.0, 1.0}
    assert all((s["verdict"] == "pass") == (s["reward"] == 1.0) for s in samples)


def test_problems_without_tests_can_be_trained_on(tmp_path):
    command = [
        "grpo.py",
        "--reward",
        "rm",
        "--rm",
        "tiny/reward",
        "--problems",
        "toy:untested",
        "--out",
        tmp_path / "run",
    ]
    text = run(*command, *GRPO, "--steps", "1").stdout
    assert "pass -" in text and not rows(tmp_path / "run")[0]["pass_rate"]


def test_zero_head_starts_at_ln_2(tmp_path, rm_run):
    pairs = rm_run[0] / "pairs.jsonl"
    run("train_rm.py", "--init", "tiny/policy", "--pairs", pairs, "--out", tmp_path / "run", *RM, "--steps", "1")
    assert float(rows(tmp_path / "run")[0]["loss"]) == pytest.approx(0.6931, abs=1e-3)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run("train_rm.py", "--out", tmp_path / "run", *RM, check=False)
    assert refused.returncode == 2 and "in use by another run" in refused.stderr


MISTAKES = [
    ("grpo.py --reward rm --rm nowhere", "nowhere"),
    ("grpo.py --reward rm --rm tiny/policy", "train_rm.py"),
    ("grpo.py --reward best", "--reward best"),
    ("grpo.py --reward exec --problems toy:untested", "none has tests"),
    ("grpo.py --policy nowhere --reward exec", "nowhere"),
    ("grpo.py --reward exec --problems empty.jsonl", "empty.jsonl"),
    ("train_rm.py --pairs nowhere.jsonl", "nowhere.jsonl"),
    ("train_rm.py --init nowhere --limit 8", "nowhere"),
    ("train_rm.py --out /proc/nothing", "/proc/nothing"),
    ("train_rm.py --unknown 1", "--unknown"),
    ("train_rm.py --device tpu", "--device tpu"),
    ("train_rm.py --sandbox none --limit 8", "none"),
    ("problems.py toy:nothing", "toy:nothing"),
    ("codescaler.py score --rm tiny/reward --problem nowhere.md a.py", "nowhere.md"),
    ("codescaler.py generate --model nowhere hello", "nowhere"),
    ("codescaler.py generate hello --max-new-tokens 0", "--max-new-tokens 0"),
    ("codescaler.py generate hello --temperature -1", "--temperature -1"),
    ("codescaler.py generate hello --device tpu", "--device tpu"),
    ("train_rm.py --split half", "--split half: expected problem, pair"),
    ("train_rm.py --length-balance 0.3", "--length-balance 0.3"),
    ("grpo.py --rm tiny/reward --eval-problems toy:untested", "none has tests"),
    ("bench.py paper --out README.md", "README.md"),
]


@pytest.fixture
def script(monkeypatch, capsys):
    """script(name, *args) -> (exit code, stdout, stderr): runs a file as `python name` does, but in this process,
    which has imported torch already (3 s a command)."""

    def execute(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        monkeypatch.chdir(ROOT)
        inherited = signal.getsignal(signal.SIGTERM)
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, inherited)
        return code, *capsys.readouterr()

    return execute


@pytest.mark.parametrize("command, found", MISTAKES)
def test_a_mistake_is_one_clear_line(command, found, tmp_path, script):
    words = command.split()
    if words[0] in ("grpo.py", "train_rm.py") and "--out" not in words:
        words += ["--out", tmp_path / "run"]
    code, _, errors = script(*words)
    assert code == 2 and found in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_start_that_failed_binds_no_later_one(tmp_path, script):
    out = tmp_path / "run"
    code, _, errors = script("grpo.py", "--rm", "nowhere", *GRPO, "--out", out)
    assert code == 2 and "nowhere" in errors
    code, _, errors = script("grpo.py", "--rm", "tiny/reward", *GRPO, "--steps", "0", "--limit", "2", "--out", out)
    assert code == 0, errors
    assert json.loads((out / "args.json").read_text())["args"]["rm"] == "tiny/reward"


def test_a_mistake_of_the_model_is_found_before_pairs_are_collected(tmp_path, script):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(ROOT / "tiny" / "reward" / name, tmp_path / "model" / name)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    code, _, errors = script("train_rm.py", "--init", tmp_path / "model", "--out", tmp_path / "run")
    assert code == 2 and "model.safetensors is damaged" in errors and not (tmp_path / "run").exists()


def test_statements_that_the_reward_model_cannot_read_are_left_out(tmp_path, script):
    model = codescaler.load_model("tiny/reward", "score", device="cpu")
    codescaler.save_model(model, codescaler.Tokenizer("tiny/reward"), tmp_path / "rm", max_length=100)
    found = load_problems("toy:train", 6)
    found.append(dataclasses.replace(found[0], id="long", prompt=found[0].prompt * 20))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(dataclasses.asdict(p)) + "\n" for p in found))
    command = ["grpo.py", "--rm", tmp_path / "rm", *GRPO, "--steps", "1", "--eval-problems", tmp_path / "own.jsonl"]
    code, printed, errors = script(*command, "--problems", tmp_path / "own.jsonl", "--out", tmp_path / "run")
    assert code == 0 and printed.count("1 problems left out: over the 100 tokens that --rm reads") == 2, errors
    assert int(rows(tmp_path / "run")[0]["rm_cut"]) > 0  # programs that lost their end are counted


def test_a_mistake_ends_the_process_with_2():
    done = run("train_rm.py", "--device", "tpu", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["train_rm.py", "grpo.py", "problems.py", "extract.py", "sandbox.py", "codescaler.py", "bench.py"]
)
def test_help(name, script):
    code, text, _ = script(name, "--help")
    assert code == 0 and "python" in text


def test_generate_command_takes_the_documented_flags(script):
    command = ["codescaler.py", "generate", "--model", "tiny/policy", "Reverse the list.", "-n", "2"]
    assert "--- 2/2:" in script(*command, "--max-new-tokens", "8")[1]


def test_score_command_ranks_programs(tmp_path, script):
    (tmp_path / "p.md").write_text("Given a list of integers, sort in ascending order. solve(xs) returns the list.")
    (tmp_path / "good.py").write_text("def solve(xs):\n    xs = sorted(xs)\n    return xs\n")
    (tmp_path / "broken.py").write_text("def solve(xs:\n")
    command = ["codescaler.py", "score", "--rm", "tiny/reward", "--problem", tmp_path / "p.md", "--json"]
    _, text, _ = script(*command, tmp_path / "broken.py", tmp_path / "good.py")
    found = [json.loads(line) for line in text.splitlines()]
    assert [Path(row["program"]).name for row in found] == ["good.py", "broken.py"]
    assert found[0]["reward"] > found[1]["reward"] == 0.0 and found[1]["reason"] == "syntax_error"


def test_a_signal_during_a_save_waits_for_its_end():
    done, inherited = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), codescaler.signals_wait():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the block ran on")
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_ctrl_c_saves_and_exits_0(tmp_path):
    command = [sys.executable, "grpo.py", "--reward", "exec", "--out", str(tmp_path / "run"), *GRPO, "--steps", "500"]
    command += ["--save-every", "100"]
    # A shell starts background jobs with SIGINT ignored, and children inherit that: as from a terminal, not as from us.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.csv"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == len(rows(tmp_path / "run")) >= 2  # nothing that was logged is lost
