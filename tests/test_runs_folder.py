"""runs.py alone, with a model of three layers.    pytest tests/test_runs_folder.py

What several ranks leave and go on from is in test_ranks.py.
"""

import contextlib
import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import runs
from common import Terminated, UserError


@dataclass
class Args:
    out: str
    resume: bool = True
    steps: int = 3
    lr: float = 0.1


def opened(out, inputs=(), **args):
    return runs.Run(Args(str(out), **args), ["step", "loss"], inputs)


def start():
    """A model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 1, bias=False))
    return model, runs.adamw(model, "cpu", lr=0.1, weight_decay=0.1)


def train(model, optimizer, step):
    torch.manual_seed(step)
    model(torch.randn(4, 4)).square().sum().backward()
    runs.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def same(model, weights):
    """To the bit."""
    return all(torch.equal(full, weights[name]) for name, full in model.state_dict().items())


def save(run, model, optimizer, step):
    def write_model(folder):
        folder.mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / "model.pt")

    run.save(write_model, model, optimizer, {"step": step})


def saved_run(out, steps=1):
    """A run folder after so many steps, closed again -> (model, optimizer)."""
    run, (model, optimizer) = opened(out), start()
    for step in range(1, steps + 1):
        train(model, optimizer, step)
        run.append([{"step": step}])
        run.log(step=step, loss=0.5)
    save(run, model, optimizer, steps)
    return model, optimizer


def go_on(out):
    """-> (run, step, model, optimizer) of a checkpoint."""
    run, (model, optimizer) = opened(out), start()
    model.load_state_dict(torch.load(run.checkpoint / "model.pt"))
    run.load_optimizer(model, optimizer)
    return run, run.load()["step"], model, optimizer


# --------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("steps", [0, 2])  # 0: saved before the first update
def test_a_resumed_run_takes_the_same_steps_to_the_bit(steps, tmp_path):
    straight, optimizer = saved_run(tmp_path, steps)
    _, step, model, resumed = go_on(tmp_path)
    for number in (3, 4):
        train(straight, optimizer, number)
        train(model, resumed, number)
    assert step == steps and same(straight, model.state_dict())


def test_the_present_device_and_flags_decide_the_kernel_of_the_optimizer(tmp_path):
    model, _ = saved_run(tmp_path)
    fused = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opened(tmp_path).load_optimizer(model, fused)
    assert fused.param_groups[0]["fused"] and fused.param_groups[0]["lr"] == 0.3
    assert same(model, before) and all(fused.state[p]["step"] == 1 for p in model.parameters())


class Killed(BaseException):
    """Stands for SIGKILL: nothing but a test catches it."""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    left, steps = 0, []

    def dying(real):
        def call(*given, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*given, **named)

        return call

    disk = [(os, name) for name in "mkdir rmdir unlink replace rename fsync".split()]
    while left <= 0:  # until a save has ended with calls left
        out = tmp_path / str(len(steps))
        model, optimizer = saved_run(out)
        first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        run = opened(out)
        train(model, optimizer, 2)
        left = len(steps)  # so many calls that change the disk
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for module, name in [*disk, (runs, "save_file"), (torch, "save")]:
                patch.setattr(module, name, dying(getattr(module, name)))
            save(run, model, optimizer, 2)
        run._lock.close()
        run, step, found, _ = go_on(out)
        assert same(found, model.state_dict() if step == 2 else first) and not run.new.exists()
        steps.append(step)
    assert steps == sorted(steps) and steps.count(1) > 5 and steps.count(2) > 5


def test_a_full_disk_under_the_log_is_named(tmp_path):
    run = opened(tmp_path)
    run.answers.symlink_to("/dev/full")  # every write to it raises ENOSPC
    with pytest.raises(UserError, match="samples.jsonl .*No space left"):
        run.append([{"step": 1}])


# --------------------------------------------------------------------------------------------------
# what binds a run, what is removed, what is dropped


def test_what_changes_a_result_is_refused_by_flag(tmp_path):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    pairs.write_text("1\n")
    save(opened(out, [("--pairs", pairs)]), *start(), 1)
    assert opened(out, [("--pairs", pairs)], steps=9).load()
    with pytest.raises(UserError, match="started with --lr 0.1, now it is 0.2"):
        opened(out, [("--pairs", pairs)], lr=0.2)
    for flag, text, now in (("--init", "1\n", "None"), ("--pairs", "2\n", "53c234e5e8472b6a")):
        pairs.write_text(text)
        with pytest.raises(UserError, match=f"content of --pairs pairs.jsonl .*now it is {now}"):
            opened(out, [(flag, pairs)])


def test_a_start_that_failed_binds_nobody(tmp_path):
    opened(tmp_path, lr=1.0)
    opened(tmp_path, lr=2.0)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["lr"] == 2.0


def test_no_resume_removes_what_runs_write_and_nothing_else(tmp_path):
    saved_run(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    assert opened(tmp_path, resume=False).load() is None
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".lock", "args.json", "metrics.csv", "notes.md"]


def test_no_resume_never_deletes_an_input(tmp_path):
    saved_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoint")
    path = tmp_path / "link" / "model.pt"
    with pytest.raises(UserError, match=f"--no-resume would delete --rm {path}: .*another --out"):
        opened(tmp_path / "run", [("--rm", path)], resume=False)
    assert path.exists()


def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch):
    first = opened(tmp_path)
    with pytest.raises(UserError, match="another run"):
        opened(tmp_path)
    monkeypatch.setattr(runs, "fcntl", None)  # as on Windows, where nothing is locked
    assert first.dir == opened(tmp_path).dir


def test_what_was_logged_after_the_checkpoint_or_cut_short_is_dropped(tmp_path):
    saved_run(tmp_path, steps=2)
    for name, text in (("metrics.csv", "3,0.5\n4,0."), ("samples.jsonl", '{"step": 3}\n{}\n{"st')):
        with open(tmp_path / name, "a") as file:
            file.write(text)
    run = opened(tmp_path)
    run.log(step=3)  # a column that is not given is an empty cell
    assert run.metrics.read_text() == "step,loss\n1,0.5\n2,0.5\n3,\n"
    assert run.samples() == [{"step": 1}, {"step": 2}, {}]


@pytest.mark.parametrize(
    "file, text",
    [("metrics.csv", "step\nabc,1\n"), ("samples.jsonl", '{"step": 1\n'), ("args.json", "{"),
     ("checkpoint/state.json", "x"), ("checkpoint/optimizer/rank00000.safetensors", "x")],
)  # fmt: skip
def test_a_damaged_folder_is_named(file, text, tmp_path):
    saved_run(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}.*--no-resume"):
        opened(tmp_path).load_optimizer(*start())


# --------------------------------------------------------------------------------------------------
# the loop


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(
    "number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_first_signal_ends_the_step_and_the_second_is_raised(number, kind, again):
    before, state, saved, done = signal.getsignal(number), {"step": 3}, [], []
    with pytest.raises(KeyboardInterrupt) as raised:
        for step in runs.steps(state, 20, 4, lambda: saved.append(state["step"])):
            for _ in range(1 + again if step == 6 else 0):
                signal.raise_signal(number)
            done.append(step)
    assert raised.type is kind and signal.getsignal(number) is before
    assert (done, saved) == (([4, 5], [4]) if again else ([4, 5, 6], [4, 6]))


def test_the_last_step_is_saved():
    state, saved = {"step": 0}, []
    for _ in runs.steps(state, 3, 2, lambda: saved.append(state["step"])):
        pass
    assert saved == [2, 3] and not list(runs.steps(state, 3, 1, saved.clear))
