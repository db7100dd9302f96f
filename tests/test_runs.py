"""Both trainers as a user runs them: small runs, going on after a kill, and mistakes.

pytest tests/test_runs.py
"""

import csv
import functools
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import run_cli, write_jsonl
from tiny import world

ROOT = Path(__file__).parents[1]
RM = "train_rm.py --limit 40 --group 4 --batch 8 --steps 4 --held-out 0.3 --max-new-tokens 96"
GRPO = "grpo.py --rm tiny/reward --limit 12 --prompts 3 --group 4 --steps 4 --eval-group 2"
GRPO += " --eval-every 2 --audit-every 3 --max-new-tokens 96 --temperature 1"
TRAINERS = {"train_rm.py": RM.split(), "grpo.py": GRPO.split()}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # one thread adds in one order: equal bits


def heed_interrupts():
    """A shell starts background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*words, env=()):
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT | dict(env), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed_interrupts,
    )  # fmt: skip


def run(*words):
    """Runs a command to its end -> what it printed."""
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows(folder):
    with open(Path(folder) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def wait_for_rows(process, out, count):
    metrics = out / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and len(rows(out)) >= count):
        time.sleep(0.01)


def samples(folder):
    with open(folder / "samples.jsonl") as file:
        return [json.loads(line) for line in file]


def saved_step(out):
    return json.loads((out / "checkpoint" / "state.json").read_text())["step"]


def write_pairs(folder):
    row = {"chosen": "a + 1", "rejected": "a - 1"}
    pairs = [row | {"prompt": f"Add {i}.", "id": f"{i}#0"} for i in range(40)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder / "pairs.jsonl"


def same_run(a, b):
    """To the bit: weights, metrics and samples."""
    one, two = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (a, b))
    assert rows(a) == rows(b) and samples(a) == samples(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(trainer) -> (run folder of a run without a kill, what it printed), made when asked."""

    @functools.cache
    def of(trainer):
        out = tmp_path_factory.mktemp(trainer) / "run"
        return out, run(*TRAINERS[trainer], "--out", out)

    return of


# --------------------------------------------------------------------------------------------------
# what a run prints and leaves behind


PRINTED = {
    "train_rm.py": ["mutant pairs", "step 4/4", "longer program wins", "AUC within a problem"],
    "grpo.py": ["before:", "step 4/4", "pass_rate ", "held out", "gain [95% interval]", "fail_top"],
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_steps_and_a_table_are_printed_the_table_again_when_finished(whole, trainer):
    out, text = whole(trainer)
    assert [words for words in PRINTED[trainer] if words not in text] == []
    assert [row["step"] for row in rows(out)] == ["1", "2", "3", "4"]
    assert json.loads((out / "result.json").read_text())
    table = text[text.index("\n\n") :]
    assert "95%" in table and run(*TRAINERS[trainer], "--out", out).endswith(table)


def test_what_grpo_leaves_behind(whole):
    out, _ = whole("grpo.py")
    assert len(samples(out)) == 4 * 3 * 4
    for row in samples(out):
        facts = row["reward"] != 0.0, row["reason"] == "ok", row["score"] is not None
        assert set(facts) == {row["code"] is not None}
    assert [bool(row["eval"]) for row in rows(out)] == [False, True, False, True]


# --------------------------------------------------------------------------------------------------
# going on


def test_raising_steps_changes_nothing_before(whole, tmp_path):
    run(*GRPO.split(), "--steps", "1", "--out", tmp_path)
    run(*GRPO.split(), "--out", tmp_path)
    assert same_run(whole("grpo.py")[0], tmp_path)


slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(10)]


@pytest.mark.parametrize("seed", [None, *slow])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_killed_and_repeated_equals_never_killed(whole, trainer, seed, tmp_path):
    """Killed once after two steps or, slow, twice at random moments."""
    rng, command = random.Random(seed), [*TRAINERS[trainer], "--out", tmp_path / "run"]
    for _ in range(1 if seed is None else 2):
        process = start(*command)
        if seed is None:
            wait_for_rows(process, tmp_path / "run", 2)
        else:
            time.sleep(rng.uniform(2, 12))
        process.kill()
        process.communicate()
    assert seed is not None or 2 <= len(rows(tmp_path / "run")) < 4
    assert "continuing" in run(*command) or seed is not None
    assert same_run(whole(trainer)[0], tmp_path / "run")


# --------------------------------------------------------------------------------------------------
# mistakes, in this process, which has imported torch already


@pytest.fixture
def script(monkeypatch, capsys):
    """script(name, *args) -> (exit code, stdout, stderr), as of `python name`."""

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


MISTAKES = [
    ("grpo.py --rm nowhere", "nowhere"),
    ("grpo.py --rm tiny/policy", "train_rm.py"),
    ("grpo.py --reward exec --problems toy:untested", "--problems toy:untested"),
    ("grpo.py --rm tiny/reward --eval-problems toy:untested", "--eval-problems toy:untested"),
    ("grpo.py --policy tiny/reward --reward exec", "score.weight"),
    ("grpo.py --reward exec --problems {}/empty.jsonl", "empty.jsonl"),
    ("grpo.py --temperature 0", "--temperature 0.0: expected"),
    ("grpo.py --lr inf", "--lr inf: expected"),
    ("grpo.py --top-p 7", "--top-p 7.0: expected"),
    ("train_rm.py --lr nan", "--lr nan: expected"),
    ("train_rm.py --held-out 1.5", "--held-out 1.5: expected"),
    ("train_rm.py --epochs 0", "--epochs 0.0: expected"),
    ("train_rm.py --pairs {}/pairs.jsonl --batch 99", "too few for --batch 99"),
    ("train_rm.py --pairs {}/pairs.jsonl --collect-only", "--collect-only"),
    ("train_rm.py --pairs {}/pairs.jsonl --decontaminate x", "--decontaminate"),
    ("train_rm.py --pairs {}/pairs.jsonl --verify", "--verify"),
    ("train_rm.py --pairs {}/empty.jsonl", "empty.jsonl"),
    ("train_rm.py --pairs nowhere.jsonl", "nowhere.jsonl"),
    ("train_rm.py --problems toy:untested", "none has tests"),
    ("train_rm.py --policy nowhere --limit 8", "nowhere"),
    ("train_rm.py --init {}/cut", "model.safetensors is damaged"),
    ("train_rm.py --out /proc/nothing", "/proc/nothing"),
    ("train_rm.py --unknown 1", "--unknown"),
    ("train_rm.py --device tpu", "--device tpu"),
    ("train_rm.py --sandbox none --limit 8", "none"),
    ("problems.py toy:nothing", "toy:nothing"),
    ("codescaler.py score --rm tiny/reward --problem nowhere.md a.py", "nowhere.md"),
    ("codescaler.py generate --model nowhere hello", "nowhere"),
    ("codescaler.py generate hello --max-new-tokens 0", "--max-new-tokens 0: expected"),
]


@pytest.mark.parametrize("command, found", MISTAKES)
def test_a_mistake_is_one_clear_line(command, found, tmp_path, script):
    write_pairs(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(ROOT / "tiny" / "reward", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 10**6)
    words = command.format(tmp_path).split()
    if words[0] in ("grpo.py", "train_rm.py") and "--out" not in words:
        words += ["--out", tmp_path / "run"]
    code, _, errors = script(*words)
    errors = [line for line in errors.splitlines() if "score head begins with zeros" not in line]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and found in errors[0]
    assert not list(tmp_path.glob("run/samples.jsonl"))


def test_an_error_about_a_path_is_a_mistake_and_another_is_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: open("/nowhere"))
    assert capsys.readouterr().err == "error: [Errno 2] No such file or directory: '/nowhere'\n"
    with pytest.raises(OSError):
        run_cli(lambda: os.close(-1))


INPUTS = {  # a file -> a command that reads it
    "pairs.jsonl": "train_rm.py --pairs {0}/pairs.jsonl --batch 4 --steps 1",
    "init/config.json": "train_rm.py --pairs {0}/pairs.jsonl --init {0}/init --batch 4 --steps 1",
    "candidates.jsonl": "train_rm.py --candidates {0}/candidates.jsonl --limit 3 --collect-only",
    "problems.jsonl": "grpo.py --problems {0}/problems.jsonl --reward exec --steps 1 --limit 2",
}


@pytest.mark.parametrize("file", INPUTS)
def test_other_contents_of_an_input_are_refused(file, tmp_path, script):
    write_pairs(tmp_path)
    shutil.copytree(ROOT / "tiny" / "reward", tmp_path / "init")
    problems = [row for row, _ in world.rows("train", 3)]
    candidates = [{"problem": row["id"], "code": row["solution"]} for row in problems]
    write_jsonl(tmp_path / "problems.jsonl", problems)
    write_jsonl(tmp_path / "candidates.jsonl", candidates)
    out = tmp_path / "o:1"  # a colon in a path is no format
    command = [*INPUTS[file].format(tmp_path).split(), "--out", out]
    assert script(*command)[0] == script(*command)[0] == 0
    with open(tmp_path / file, "a") as changed:
        changed.write("\n")
    code, _, errors = script(*command)
    flag = Path(file).parts[0].removesuffix(".jsonl")
    assert code == 2 and len(errors.splitlines()) == 1
    assert f"{out} was started with content of --{flag}" in errors


@pytest.mark.parametrize("size", [2**20, 2**22])  # the weights do not fit, or AdamW's moments
def test_a_full_disk_loses_nothing(size, tmp_path, script):
    command = ["train_rm.py", "--pairs", write_pairs(tmp_path), "--out", tmp_path / "run"]
    command += ["--batch", "4"]
    assert script(*command, "--steps", "2")[0] == 0
    weights = tmp_path / "run" / "checkpoint" / "model.safetensors"
    before, limits = weights.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # of a file
    try:
        code, _, errors = script(*command, "--steps", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and len(errors.splitlines()) == 1
    assert errors.startswith(f"error: cannot write {tmp_path}")
    assert saved_step(tmp_path / "run") == 2 and weights.read_bytes() == before


def test_problems_without_tests_can_be_trained_on(tmp_path, script):
    command = [*GRPO.split(), "--problems", "toy:untested", "--steps", "1", "--out", tmp_path]
    assert "pass_rate" not in script(*command)[1] and not rows(tmp_path)[0]["pass_rate"]


def test_a_head_of_zeros_starts_at_ln_2(tmp_path, script):
    command = [*RM.split(), "--init", "tiny/policy", "--steps", "1"]
    command += ["--pairs", write_pairs(tmp_path)]
    assert script(*command, "--out", tmp_path / "run")[0] == 0
    assert float(rows(tmp_path / "run")[0]["loss"]) == pytest.approx(0.6931, abs=1e-3)


def test_the_commands_of_the_model_file(tmp_path, script):
    texts = {"p.md": "Given a list of integers, sort in ascending order. solve(xs) returns it."}
    texts |= {"bad.py": "def solve(xs:", "good.py": "def solve(xs):\n    return sorted(xs)\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    command = ["codescaler.py", "score", "--rm", "tiny/reward", "--problem"]
    command += [tmp_path / name for name in texts]
    good, bad = map(json.loads, script(*command, "--json")[1].splitlines())
    assert good["program"].endswith("good.py") and good["reward"] > 0 and good["reason"] == "ok"
    assert bad["reward"] == 0 and bad["reason"] == "syntax_error"
    _, first, second = script(*command)[1].splitlines()
    assert first.split()[2:] == ["ok", good["program"]] and "syntax_error" in second
    command = ["codescaler.py", "generate", "Reverse the list.", "-n", "2", "--max-new-tokens", "8"]
    assert "--- 2:" in script(*command)[1]


SCRIPTS = ["train_rm.py", "grpo.py", "problems.py", "sandbox.py", "codescaler.py", "bench.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, script):
    code, text, _ = script(name, "--help")
    assert code == 0 and "python" in text
