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

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(SNIPPET,) = re.findall(r"```python\n(.*?)```", README, re.S)  # a reward
(ROW,) = re.findall(r"^{.*}$", README, re.M)  # a problem
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


UNKNOWN = (None, "unknown")


def variant(command):
    return next((VARIANTS[start] for start in VARIANTS if command.startswith(start)), UNKNOWN)


def readme_commands():
    text = README + (ROOT / "tiny" / "README.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        lines = (line.partition("#")[0] for line in block.splitlines())
        found += [command for line in lines for command in line.split("&&")]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    found += re.findall(r"`((?:python|torchrun|pytest)\s[^`]+)`", prose)
    return [c for c in dict.fromkeys(" ".join(command.split()) for command in found) if c]


COMMANDS = readme_commands()


def test_every_command_of_the_readme_is_known():
    assert len(COMMANDS) > 10
    assert [command for command in COMMANDS if variant(command) == UNKNOWN] == []
    unused = [start for start in VARIANTS if not any(c.startswith(start) for c in COMMANDS)]
    assert unused == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project, with a user's problems and reward, for the commands in their order."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    skip = shutil.ignore_patterns("out", ".git", "tests", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skip)
    rows = [json.dumps(json.loads(ROW) | {"id": f"a{i}"}) + "\n" for i in range(12)]
    (folder / "mine.jsonl").write_text("".join(rows))
    text = (folder / "grpo.py").read_text()  # the reader's reward stands below NEEDS
    below = text.replace("def group_advantages(", f"{SNIPPET}\n\ndef group_advantages(", 1)
    (folder / "grpo.py").write_text(below)
    return folder


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) if variant(c)[1] == "slow" else c for c in COMMANDS],
)
def test_readme_command_runs(command, checkout):
    added, why = variant(command)
    if added is None:
        pytest.skip(why)
    program, *words = f"{command} {added}".split()
    line = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else [])]
    facts = {"cwd": checkout, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 600}
    done = subprocess.run([*line, *words], capture_output=True, text=True, **facts)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    if "--verify" in words:
        assert "12 of 12 solutions pass their own tests" in done.stdout


def test_the_reward_of_the_readme_rewards(monkeypatch):
    monkeypatch.setattr(grpo, "REWARDS", dict(grpo.REWARDS))
    exec(SNIPPET, vars(grpo))
    codes = ("x = 1", "x = 1  # longer", None)
    rollouts = [grpo.Rollout(grpo.DUMMY, code=code) for code in codes]
    grpo.REWARDS["short"](rollouts, None)
    short, long, none = (r.reward for r in rollouts)
    assert short > long > none == 0.0
