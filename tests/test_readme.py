"""Every command of the two READMEs runs, in a small size and in their order.

A command that is in README.md or tiny/README.md and not in VARIANTS fails the test: documentation
cannot rot unseen.    pytest tests/test_readme.py [-m slow]
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
from problems import load_problems, verify_solutions
from sandbox import Sandbox

ROOT = Path(__file__).parents[1]
RM = "--limit 40 --group 4 --batch 8 --steps 2 --max-new-tokens 96"
GRPO = "--limit 8 --prompts 2 --group 4 --steps 1 --eval-group 2 --max-new-tokens 96"
# How a command begins -> what is added to make it small; None: it is not run, and why. The first
# that fits counts.
VARIANTS = {
    "pip install": (None, "the tests run in what it installed"),
    "torchrun --nproc": (None, "several GPUs; tests/test_ranks.py runs two ranks"),
    "python codescaler.py score --rm LARK-Lab": (None, "network"),
    "torchrun train_rm.py": (RM, "slow"),
    "torchrun grpo.py": (GRPO, "slow"),
    "python train_rm.py --init Qwen": (None, "network"),
    "python train_rm.py": (f"{RM} --no-resume", "slow"),
    "python grpo.py --reward exec --problems mine": (GRPO, "slow"),
    "python grpo.py": (f"{GRPO} --no-resume", "slow"),
    "python bench.py sample": ("--limit 4 --n 2", "slow"),
    "python bench.py bon": ("", "slow"),
    "python bench.py memory": ("", ""),
    "python problems.py": ("", ""),
    "python tiny/make.py": (None, "20 minutes"),
    "python sandbox.py --check": ("", ""),
    "tiny/paper.sh": (None, "hours; its commands are those above"),
    "python tests/speed.py": (None, "needs trl; tests/test_bench.py runs its parts"),
}
MINE = [  # mine.jsonl, which stands for a user's problems
    {"id": f"a{i}", "prompt": f"Write add{i}(a), which adds {i}.",
     "solution": f"def add{i}(a): return a + {i}",
     "tests": {"kind": "call", "entry_point": f"add{i}",
               "cases": [{"args": [1], "expected": 1 + i}]}}
    for i in range(12)
]  # fmt: skip


def readme_commands():
    files, found = (ROOT / "README.md", ROOT / "tiny" / "README.md"), []
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        found += [
            part.strip()
            for line in block.splitlines()
            for part in line.partition("#")[0].split("&&")
        ]
    inline = re.findall(
        r"`((?:python|torchrun|pytest)\s[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    found += [" ".join(command.split()) for command in inline]
    return [command for command in dict.fromkeys(found) if command]


def snippet():
    """The Python of the README: a reward."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return text


def variant(command):
    return next((VARIANTS[start] for start in VARIANTS if command.startswith(start)), None)


def marked(command):
    added, why = variant(command) or ("", "")
    return pytest.param(command, marks=pytest.mark.slow if why == "slow" else ())


def test_every_command_of_the_readme_is_known():
    assert len(readme_commands()) > 10
    assert [command for command in readme_commands() if variant(command) is None] == []
    commands = readme_commands()
    unused = [start for start in VARIANTS if not any(c.startswith(start) for c in commands)]
    assert unused == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project, with a user's problems and reward, for the commands in their order."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    skip = shutil.ignore_patterns("out", ".git", "tests", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skip)
    lines = [json.dumps(row) + "\n" for row in MINE]
    (folder / "mine.jsonl").write_text("".join(lines))
    text = (folder / "grpo.py").read_text()  # the reader's reward stands below NEEDS
    below = text.replace("def group_advantages(", f"{snippet()}\n\ndef group_advantages(", 1)
    (folder / "grpo.py").write_text(below)
    return folder


@pytest.mark.parametrize("command", [marked(command) for command in readme_commands()])
def test_readme_command_runs(command, checkout):
    added, why = variant(command)
    if added is None:
        pytest.skip(why)
    if " plot " in command:
        pytest.importorskip("matplotlib")
    words = f"{command} {added}".split()
    program = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, *program, *words[1:]]
    done = subprocess.run(
        line, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_problem_of_the_readme_passes_its_own_test(tmp_path):
    (line,) = re.findall(r"^{.*}$", (ROOT / "README.md").read_text(), re.M)
    (tmp_path / "mine.jsonl").write_text(line)
    problems = load_problems(str(tmp_path / "mine.jsonl"))
    with Sandbox(1, "basic") as sandbox:
        assert [result.passed for result in verify_solutions(problems, sandbox)] == [True]


def test_the_reward_of_the_readme_rewards(monkeypatch):
    monkeypatch.setattr(grpo, "REWARDS", dict(grpo.REWARDS))
    exec(snippet(), vars(grpo))
    codes = ("x = 1", "x = 1  # longer", None)
    rollouts = [grpo.Rollout(grpo.DUMMY, code=code) for code in codes]
    grpo.REWARDS["short"](rollouts, None)
    short, long, none = (r.reward for r in rollouts)
    assert short > long > none == 0.0
