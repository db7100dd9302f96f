"""runs.py alone, with a model of two layers.    pytest tests/test_runs_folder.py"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import runs
from common import Terminated, UserError
from runs import Interrupt, Run, adamw

COLUMNS = ["step", "loss"]
RANKS = multiprocessing.get_context("spawn")


@dataclass
class Args:
    out: str
    resume: bool = True
    steps: int = 3
    lr: float = 0.1
    pairs: str = ""
    policy: list = field(default_factory=list)


def start():
    """A model whose tensors do not divide by two, each second layer a unit of FSDP2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 1, bias=False))
    runs.shard(model, [model[0]], [model[2]])
    return model, adamw(model, "cpu", lr=0.1, weight_decay=0.1)


def train(model, optimizer, step, rank=0, world=1):
    """One step on this rank's share of four rows; the loss is a sum over rows."""
    torch.manual_seed(step)
    x = torch.randn(4, 4)[rank::world]
    (world * model(x).square().sum()).backward()
    runs.clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return {name: full.clone() for name, full in runs.full_parameters(model)}


def save(run, model, optimizer, step):
    def write_model(folder):
        full = weights(model)
        if run.rank == 0:
            torch.save(full, folder / "model.pt")

    run.save(write_model, model, optimizer, {"step": step})


def go_on(run):
    """-> (step, model, optimizer) of a checkpoint."""
    state = run.load()
    model, optimizer = start()
    for name, full in torch.load(run.checkpoint / "model.pt").items():
        p = dict(model.named_parameters())[name]
        runs.local(p.data).copy_(full[runs.rows_of(p)])
    run.load_optimizer(model, optimizer)
    return state["step"], model, optimizer


def saved_run(out, steps=1, **args):
    """A run folder after so many steps, closed again -> (model, optimizer)."""
    run = Run(Args(str(out), **args), COLUMNS)
    model, optimizer = start()
    for step in range(1, steps + 1):
        train(model, optimizer, step)
        run.append([{"step": step}])
        run.log(step=step, loss=0.5)
        save(run, model, optimizer, step)
    return model, optimizer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------
# checkpoints


def test_a_resumed_run_takes_the_same_steps_to_the_bit(tmp_path):
    straight, optimizer = saved_run(tmp_path, steps=2)
    step, model, resumed = go_on(Run(Args(str(tmp_path)), COLUMNS))
    train(straight, optimizer, 3)
    train(model, resumed, 3)
    assert step == 2 and same(weights(straight), weights(model))


def test_the_present_device_and_flags_decide_the_kernel_of_the_optimizer(tmp_path):
    model, _ = saved_run(tmp_path)
    fused = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    Run(Args(str(tmp_path)), COLUMNS).load_optimizer(model, fused)
    assert fused.param_groups[0]["fused"] and fused.param_groups[0]["lr"] == 0.3
    train(model, fused, 2)
    assert all(fused.state[p]["step"] == 2 for p in model.parameters())


def test_only_matrices_decay():
    matrices, vectors = start()[1].param_groups
    assert [p.ndim for p in matrices["params"]] == [2, 2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0


class Killed(BaseException):
    """Stands for SIGKILL: nothing but a test catches it."""


def save_until(left, run, model, optimizer, monkeypatch):
    """Saves step 2, killed at the call number `left` that changes the disk -> whether it ended."""

    def dying(real):
        def call(*given, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*given, **named)

        return call

    with monkeypatch.context() as patch:
        names = "mkdir rmdir unlink replace rename fsync".split()
        for module, name in [(os, name) for name in names] + [(runs, "save_file"), (torch, "save")]:
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            save(run, model, optimizer, 2)
        except Killed:
            return False
    return True


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    steps, ended = [], False
    while not ended:
        out = tmp_path / str(len(steps))
        model, optimizer = saved_run(out)
        first = weights(model)
        train(model, optimizer, 2)
        ended = save_until(len(steps), Run(Args(str(out)), COLUMNS), model, optimizer, monkeypatch)
        step, found, _ = go_on(Run(Args(str(out)), COLUMNS))
        assert same(weights(found), weights(model) if step == 2 else first)
        assert not (out / "checkpoint.new").exists()
        steps.append(step)
    assert steps == sorted(steps) and steps.count(1) > 5 and steps.count(2) > 5


@pytest.mark.parametrize("what", ["model", "optimizer", "state"])
def test_a_full_disk_is_named_and_the_old_checkpoint_stays(what, tmp_path):
    model, optimizer = saved_run(tmp_path)
    run = Run(Args(str(tmp_path)), COLUMNS)
    limits, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    state = {"step": 2, "rest": "x" * (10**4 if what == "state" else 0)}
    big = nn.Linear(100, 100)
    adam = adamw(big, "cpu", 0.1, 0.1)
    big(torch.ones(100)).sum().backward()
    adam.step()
    given = (big, adam) if what == "optimizer" else (model, optimizer)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # no larger file can be written
    try:
        with pytest.raises(UserError, match="cannot write .*File too large.*make room"):
            size = 10**4 if what == "model" else 0
            run.save(lambda folder: (folder / "w").write_bytes(b"x" * size), *given, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    del run
    step, found, _ = go_on(Run(Args(str(tmp_path)), COLUMNS))
    assert step == 1 and same(weights(found), weights(model))


def test_a_state_that_does_not_come_back_is_refused_before_anything_is_written(tmp_path):
    run = Run(Args(str(tmp_path)), COLUMNS)
    with pytest.raises(TypeError):
        run.save(lambda folder: None, *start(), {"step": torch.tensor(1)})
    assert not run.new.exists()


# --------------------------------------------------------------------------------------------------
# what binds a run


@pytest.mark.parametrize(
    "change, message",
    [({"lr": 0.2}, "started with --lr 0.1, now it is 0.2"), ({"policy": ["a"]}, "--policy"),
     ({"steps": 9}, None), ({}, None)],
)  # fmt: skip
def test_arguments_that_change_a_result_are_refused_by_flag(change, message, tmp_path):
    saved_run(tmp_path)
    args = replace(Args(str(tmp_path)), **change)
    if message is None:
        assert Run(args, COLUMNS).load() == {"step": 1}
    else:
        with pytest.raises(UserError, match=message):
            Run(args, COLUMNS)


def test_another_content_of_an_input_is_refused_by_flag(tmp_path):
    pairs, args = tmp_path / "pairs.jsonl", Args(str(tmp_path / "run"), pairs="pairs.jsonl")
    pairs.write_text("1\n")
    run = Run(args, COLUMNS, [("--pairs", pairs)])
    save(run, *start(), 1)
    del run
    assert Run(args, COLUMNS, [("--pairs", pairs)]).load()
    pairs.write_text("1\n2\n")
    with pytest.raises(UserError, match="started with content of --pairs"):
        Run(args, COLUMNS, [("--pairs", pairs)])


def test_a_start_that_failed_binds_nobody(tmp_path):
    Run(Args(str(tmp_path), lr=1.0), COLUMNS)
    Run(Args(str(tmp_path), lr=2.0), COLUMNS)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["lr"] == 2.0


def test_args_json_says_what_ran(tmp_path):
    Run(Args(str(tmp_path)), COLUMNS)
    about = json.loads((tmp_path / "args.json").read_text())
    assert about["torch"] == torch.__version__ and about["command"] == sys.argv
    assert about.keys() == {"args", "inputs", "python", "torch", "commit", "command"}


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.git_commit() == "unknown"


def test_no_resume_removes_what_runs_write_and_nothing_else(tmp_path):
    saved_run(tmp_path)
    for name in ("notes.md", "pairs.jsonl", "mine"):
        (tmp_path / name).write_text("x")
    run = Run(Args(str(tmp_path), resume=False), COLUMNS)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "args.json", "metrics.csv", "notes.md", "mine"}
    assert run.load() is None and (tmp_path / "metrics.csv").read_text() == "step,loss\n"


@pytest.mark.parametrize("given", ["pairs.jsonl", "", "checkpoint", "checkpoint/model.pt"])
@pytest.mark.parametrize("how", ["pairs", "policy", "inputs"])
def test_no_resume_never_deletes_an_input(given, how, tmp_path):
    saved_run(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("x")
    path = str(tmp_path / given)
    named = {} if how == "inputs" else {how: [path] if how == "policy" else path}
    inputs = [("--problems", path)] if how == "inputs" else []
    with pytest.raises(UserError, match="--no-resume would delete --.*choose another --out"):
        Run(Args(str(tmp_path), resume=False, **named), COLUMNS, inputs)
    assert (tmp_path / "checkpoint" / "model.pt").exists() and (tmp_path / "pairs.jsonl").exists()


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first = Run(Args(str(tmp_path)), COLUMNS)
    with pytest.raises(UserError, match="in use by another run"):
        Run(Args(str(tmp_path)), COLUMNS)
    del first
    Run(Args(str(tmp_path)), COLUMNS)


def test_without_fcntl_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "fcntl", None)
    opened = [Run(Args(str(tmp_path)), COLUMNS) for _ in range(2)]
    assert len(opened) == 2


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot open --out .*{place} .*choose another"):
        Run(Args(str(tmp_path / place)), COLUMNS)


# --------------------------------------------------------------------------------------------------
# logs


def test_what_was_logged_after_the_checkpoint_or_cut_short_is_dropped(tmp_path):
    saved_run(tmp_path, steps=2)
    with open(tmp_path / "metrics.csv", "a") as metrics:
        metrics.write("3,0.5\n4,0.")
    with open(tmp_path / "samples.jsonl", "a") as samples:
        samples.write('{"step": 3}\n{"id": "collected"}\n{"st')
    run = Run(Args(str(tmp_path)), COLUMNS)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.5\n"
    assert run.samples() == [{"step": 1}, {"step": 2}, {"id": "collected"}]


def test_columns_that_are_not_given_stay_empty_and_unknown_ones_are_a_mistake(tmp_path):
    run = Run(Args(str(tmp_path)), COLUMNS)
    run.log(step=1)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,\n"
    with pytest.raises(AssertionError):
        run.log(step=2, gain=1.0)


@pytest.mark.parametrize(
    "file, text",
    [("metrics.csv", "step\nabc,1\n"), ("samples.jsonl", '{"step": 1\n'), ("samples.jsonl", "3\n"),
     ("args.json", "{"), ("checkpoint/state.json", "x"), ("checkpoint/state.json", None)],
)  # fmt: skip
def test_damaged_files_are_named(file, text, tmp_path):
    saved_run(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{file.split('/')[0]} is .*--no-resume"):
        Run(Args(str(tmp_path)), COLUMNS)


@pytest.mark.parametrize("keep", ["nothing", "no tensor", "half"])
def test_a_damaged_optimizer_is_named(keep, tmp_path):
    model, optimizer = saved_run(tmp_path)
    file = tmp_path / "checkpoint" / "optimizer" / "rank00000.safetensors"
    if keep == "half":
        file.write_bytes(file.read_bytes()[:200])
    elif keep == "nothing":
        file.unlink()
    else:
        runs.save_file({"other": torch.ones(1)}, file)
    with pytest.raises(UserError, match="optimizer is damaged"):
        Run(Args(str(tmp_path)), COLUMNS).load_optimizer(model, optimizer)


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl"])
def test_a_full_disk_under_the_log_is_named(name, tmp_path):
    run = Run(Args(str(tmp_path)), COLUMNS)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/full")  # every write to it raises ENOSPC
    with pytest.raises(UserError, match=f"{name} .*No space left"):
        run.log(step=1) if name == "metrics.csv" else run.append([{"step": 1}])


# --------------------------------------------------------------------------------------------------
# signals


@pytest.fixture
def handled():
    """Both signals raise, as run_cli has it, whatever the tests were started under."""

    def terminated(number, frame):
        raise Terminated

    old = [signal.signal(signal.SIGINT, signal.default_int_handler),
           signal.signal(signal.SIGTERM, terminated)]  # fmt: skip
    yield
    signal.signal(signal.SIGINT, old[0])
    signal.signal(signal.SIGTERM, old[1])


KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


@pytest.mark.parametrize("number, kind", KINDS)
def test_the_first_signal_is_noted_and_the_second_raised(number, kind, handled):
    with pytest.raises(KeyboardInterrupt) as raised, Interrupt() as interrupt:
        assert interrupt.agreed() is None
        signal.raise_signal(number)
        assert interrupt.agreed() is kind
        signal.raise_signal(number)
        pytest.fail("the second signal was swallowed")
    assert raised.type is kind and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number, kind", KINDS)
def test_a_signal_after_the_last_step_is_not_lost(number, kind, handled):
    with pytest.raises(kind), Interrupt():
        signal.raise_signal(number)


@pytest.mark.parametrize("number, kind", KINDS)
def test_signals_during_a_save_wait_for_its_end(number, kind, handled, tmp_path):
    run = Run(Args(str(tmp_path)), COLUMNS)
    with pytest.raises(kind):
        run.save(lambda folder: signal.raise_signal(number), *start(), {"step": 1})
    assert run.load() == {"step": 1}


def test_ignored_signals_stay_ignored(handled):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.agreed() is None


# --------------------------------------------------------------------------------------------------
# ranks


class Scored(nn.Module):
    """A body and a head in fp32, as a reward model has them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.body(x)
        return hidden, self.head(hidden.float())


def mixed_precision():
    """-> dtypes of the body's output, of the head's, and of the weights after a forward pass."""
    plain, runs.compute_dtype = runs.compute_dtype, lambda device: torch.bfloat16  # as on CUDA
    model = Scored()
    model.scale = nn.Parameter(torch.ones(3))  # in no unit: goes with the whole
    runs.shard(model, [model.body], [model.head])
    dtypes = [out.dtype for out in model(torch.ones(1, 4))]
    runs.compute_dtype = plain
    return [*dtypes, {p.dtype for _, p in runs.full_parameters(model)}]


def rank_main(rank, port, folder):
    """What one of two ranks does."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    assert runs.setup("cpu", timeout_minutes=1) == (rank, 2, "cpu")
    found = {"agree": [runs.agree(rank == 1), runs.agree(False)]}
    found["lists"] = runs.gather_lists([rank] * (rank + 1))
    found["total"] = runs.total(torch.tensor(rank + 1.0))
    found["dtypes"] = mixed_precision()
    with Interrupt() as interrupt:
        interrupt.noted += [Terminated] * rank  # rank 1 alone was asked to stop
        found["stop"] = interrupt.agreed()
        interrupt.noted.clear()
    # The checkpoint of one rank goes on here, and that of these two will go on with one.
    run = Run(Args(str(folder / "one")), COLUMNS, rank=rank)
    step, model, optimizer = go_on(run)
    found["rows"] = {name: runs.rows_of(p) for name, p in model.named_parameters()}
    train(model, optimizer, step + 1, rank, world=2)
    save(run, model, optimizer, step + 1)
    train(model, optimizer, step + 2, rank, world=2)
    found["weights"] = weights(model)
    torch.save(found, folder / f"rank{rank}.pt")
    (folder / "file").write_text("")
    try:
        Run(Args(str(folder / "file")), COLUMNS, rank=rank)
    except UserError:
        sys.exit(20)
    except SystemExit as end:
        sys.exit(10 + end.code)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """-> (folder, what both ranks found, their exit codes)."""
    folder = tmp_path_factory.mktemp("ranks")
    saved_run(folder / "one", steps=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [RANKS.Process(target=rank_main, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return folder, found, [process.exitcode for process in ranks]


def test_ranks_add_gather_and_agree(two_ranks):
    for found in two_ranks[1]:
        assert found["agree"] == [True, False] and found["lists"] == [0, 1, 1]
        assert found["total"] == 3 and found["stop"] is Terminated


def test_rows_are_dealt_in_runs(two_ranks):
    first, second = (found["rows"] for found in two_ranks[1])
    assert (first["0.weight"], second["0.weight"]) == (slice(0, 3), slice(3, 5))
    assert (first["2.weight"], second["2.weight"]) == (slice(0, 1), slice(1, 1))


def test_shards_stay_in_fp32_and_compute_in_bf16_but_for_fp32_units(two_ranks):
    for found in two_ranks[1]:
        assert found["dtypes"] == [torch.bfloat16, torch.float32, {torch.float32}]


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_two_ranks_go_on_from_one_and_compute_the_same(two_ranks, tmp_path):
    model, _ = saved_run(tmp_path, steps=4)
    assert all(close(found["weights"], weights(model)) for found in two_ranks[1])


def test_one_process_goes_on_from_two_ranks(two_ranks, tmp_path):
    folder, found, _ = two_ranks
    shutil.copytree(folder / "one", tmp_path / "one")
    assert len(list((tmp_path / "one" / "checkpoint" / "optimizer").iterdir())) == 2
    step, model, optimizer = go_on(Run(Args(str(tmp_path / "one")), COLUMNS))
    train(model, optimizer, step + 1)
    assert step == 3 and close(weights(model), found[0]["weights"])


def test_an_error_of_rank_0_on_opening_ends_all_ranks(two_ranks):
    assert two_ranks[2] == [20, 12]  # rank 0 says what it is, the other leaves with code 2


@pytest.mark.parametrize(
    "given, wanted",
    [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
     ({"PYTORCH_ALLOC_CONF": "backend:native"}, None)],
)  # fmt: skip
def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise(given, wanted):
    code = "import os, runs; print(os.environ['PYTORCH_ALLOC_CONF'])"
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=clean | given, capture_output=True, text=True)
    assert done.stdout.strip() == (wanted or "backend:native")
