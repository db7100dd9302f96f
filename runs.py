"""What both trainers stand on: ranks and FSDP2, the optimizer, the run folder, checkpoints, resume.

    rank, world, device = setup()            # plain python, or a rank of torchrun
    shard(model, model.layers)               # FSDP2, in place; nothing on one CPU
    optimizer = adamw(model, device, lr=1e-4, weight_decay=0.1)
    run = Run(args, COLUMNS, [("--pairs", "pairs.jsonl")], rank)
    if state := run.load():                  # the same command goes on where it was killed
        run.load_optimizer(model, optimizer)
    run.save(write_model, model, optimizer, {"step": 1})

A model is any nn.Module. Every rank makes the same calls; rank 0 alone writes, but for the
optimizer, of which each rank writes its rows.
"""

import atexit
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# GPU memory in segments that grow: rollouts and updates in turn ask for blocks of other sizes.
# Torch reads it before its first allocation on a GPU. What the user has set stays.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
)

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import Terminated, UserError, content_hash, write_atomic

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

MEND = "mend it, choose another --out or start over with --no-resume"
MAKE_ROOM = "the checkpoint before is whole; make room and give the same command again"

# --------------------------------------------------------------------------------------------------
# ranks: one process a GPU


def setup(device=None, timeout_minutes=30):
    """-> (rank, number of ranks, device). Plain python is rank 0 of 1; under torchrun the ranks
    find each other here. One GPU gets a process group of one rank, so that it trains in the way of
    several. A collective that waits longer than the timeout ends the process. Raises UserError."""
    present = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    device = device or present[0]
    if device not in present:
        raise UserError(f"--device {device}: expected {' or '.join(present)} on this machine")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device, count = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.cuda.device_count()
        if torch.device(device).index >= count:
            raise UserError(f"--nproc-per-node over {count}: each rank needs a GPU of its own")
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (world > 1 or device != "cpu"):
        # Tensors travel between GPUs by NCCL, Python objects between hosts by gloo.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        timeout = datetime.timedelta(minutes=timeout_minutes)
        dist.init_process_group(backend, timeout=timeout, **alone)
        if alone or device == "cpu":  # else NCCL warns and gloo may abort; several GPUs might hang
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return rank, world, device


def num_ranks():
    """How many processes take part; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(tensor):
    """Sum over ranks, in place; the tensor itself where there is one rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_lists(items):
    """The lists of all ranks, one after the other in the order of the ranks; the same on each."""
    if num_ranks() == 1:
        return items
    lists = [None] * num_ranks()  # all_gather_object pickles, over gloo
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def agree(flag):
    """Whether any rank says so: what stops one must stop all, since none can go on alone."""
    return any(gather_lists([bool(flag)]))  # a barrier, too


@contextlib.contextmanager
def fail_together():
    """A UserError on one rank ends all of them, each with exit code 2: the rank that met it says
    what it is, none waits for it. All ranks wait here for each other."""
    error = None
    try:
        yield
    except UserError as found:
        error = found
    if agree(error):  # a rank that left alone would let the others wait for the timeout
        raise error or SystemExit(2)


# --------------------------------------------------------------------------------------------------
# the model and its optimizer: FSDP2 deals the rows of every tensor to the ranks


def compute_dtype(device):
    """What matrices are multiplied in: bf16 on CUDA; fp32 on CPUs, which are slow in bf16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def shard(model, units, fp32_units=(), device=None):
    """FSDP2 over all ranks, in place -> the model. Nothing without a process group (one CPU).

    Each module of `units` is gathered while it computes and dropped again; what is in none goes
    with the whole model. Shards stay in the model's dtype (fp32 in training) and compute in
    compute_dtype(), `fp32_units` as they are. `device`: where a model on meta will be. After
    backward() gradients are means over the ranks: a loss that is a sum over them is multiplied by
    their number. Every rank must run as many forward and backward passes.
    """
    if dist.is_initialized():
        kind = torch.device(device or next(model.parameters()).device).type
        mesh = init_device_mesh(kind, (num_ranks(),))
        # fp32 master weights and sums of gradients, bf16 products on CUDA
        mixed = MixedPrecisionPolicy(param_dtype=compute_dtype(kind), reduce_dtype=torch.float32)
        for unit in fp32_units:
            fully_shard(unit, mesh=mesh)
        for unit in [*units, model]:  # the root last: it takes what is left
            fully_shard(unit, mesh=mesh, mp_policy=mixed)
    return model


def local(p):
    """What this rank holds of a parameter, or of a tensor like it: its rows, or all of it."""
    return p.to_local() if isinstance(p, DTensor) else p


def rows_of(p):
    """The slice of a parameter's first dimension that this rank holds: equal runs, rounded up, so
    that the last ranks may hold fewer or none."""
    if not isinstance(p, DTensor):  # not sharded
        return slice(0, p.shape[0])
    run = math.ceil(p.shape[0] / p.device_mesh.size())  # 5 rows on 2 ranks: 3 and 2
    start = min(p.device_mesh.get_local_rank() * run, p.shape[0])
    return slice(start, start + local(p).shape[0])


def full_parameters(model):
    """Yields (name, full tensor) of each parameter, gathered one at a time. All ranks call it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass some are still gathered, in bf16
    for name, p in model.named_parameters():
        yield name, (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def adamw(model, device, lr, weight_decay, betas=(0.9, 0.999)):
    """AdamW, on CUDA as one kernel without temporary copies. Matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    fused = torch.device(device).type == "cuda" or None  # None: torch chooses
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=fused)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model, max_norm):
    """Scales the gradients to a global norm of at most `max_norm` -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # of a shard a DTensor
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


# --------------------------------------------------------------------------------------------------
# run folders: what the trainers leave behind, and how the same command goes on after a kill


class Interrupt:
    """In `with Interrupt() as interrupt:` Ctrl-C and SIGTERM are only noted, so that a trainer can
    finish the step in flight, ask agreed(), save and raise it. One more than `patience` of them
    takes effect at once; what nobody has raised takes effect at the end of the block."""

    def __init__(self, patience=1):
        self.noted, self.patience = [], patience

    def __enter__(self):
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
        self.before = {n: signal.signal(n, self._note) for n in numbers}  # ignored ones stay so
        return self

    def _note(self, number, frame):
        self.noted.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        if len(self.noted) > self.patience:
            raise self.noted[-1]
        if self.patience == 1:  # not print(), which may be what the signal interrupts
            os.write(2, b"stopping after this step; once more to stop now\n")

    def agreed(self):
        """-> the exception to raise if any rank is asked to stop, else None. All ranks call it."""
        return next(iter(gather_lists(self.noted)), None)  # the first one, the same on all

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # A signal of the last step, or of a save: whoever waits outside the block gets it now.
        for kind in self.noted if error is None else ():
            signal.raise_signal(signal.SIGTERM if kind is Terminated else signal.SIGINT)


@contextlib.contextmanager
def plainly(what, advice):
    """What is wrong with a file that is read or written in the block, as a UserError."""
    try:
        yield
    except UserError:  # a ValueError, too, but it says what it is
        raise
    except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        raise UserError(f"{what} ({error}): {advice}") from None


def remove(path):
    """Deletes a file, or a folder with all that it holds; nothing where there is none."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def lines(path):
    """The lines of a text file but a last one that a kill cut short."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def git_commit():
    """The commit of the code that runs, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git here
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


class Run:
    """A run folder: args.json, metrics.csv (a row a step), samples.jsonl and checkpoint/.

    Opening it locks it (one run a folder), compares the arguments and the contents of `inputs`, a
    list of (flag, path), with those it was started with, and drops what was logged after the last
    complete step. All ranks open it. Raises UserError, which names the flag that differs.
    """

    # What runs write. args.json goes last: until then the folder says what it holds.
    files = ("metrics.csv", "samples.jsonl", "pairs.jsonl", "funnel.json", "result.json",
             "checkpoint", "checkpoint.new", "args.json")  # fmt: skip
    may_differ = ("steps", "resume", "device", "out", "collect_only")  # they change no result

    def __init__(self, args, columns, inputs=(), rank=0):
        self.dir, self.rank, self.columns = Path(args.out), rank, columns
        self.checkpoint, self.new = self.dir / "checkpoint", self.dir / "checkpoint.new"
        with fail_together(), plainly(f"cannot open --out {self.dir}", "choose another"):
            if rank == 0:
                self._open(dataclasses.asdict(args), inputs)

    def _open(self, args, inputs):
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.dir / ".lock", "w")  # held as long as this object lives
        try:
            if fcntl:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.dir} is in use by another run: choose another") from None
        if not args["resume"]:
            self._start_over(args, inputs)
        self._finish_save()  # what a kill has left undone
        self._write_args(args, inputs)
        self._drop_after(state["step"] if (state := self.load()) else 0)

    def _start_over(self, args, inputs):
        """Removes what runs write and nothing else that the folder holds; an input is refused."""
        doomed = {(self.dir / name).resolve() for name in self.files}
        for flag, value in [*self._flags(args).items(), *inputs]:
            for path in filter(None, value if isinstance(value, list) else [value]):
                place = Path(str(path)).resolve()  # of a number, a place where nothing is
                if place == self.dir.resolve() or doomed & {place, *place.parents}:
                    raise UserError(f"--no-resume would delete {flag} {path}: choose another --out")
        for name in self.files:
            remove(self.dir / name)

    def _flags(self, args):
        """{flag: value} of the arguments that must stay as they are."""
        kept = {name: value for name, value in args.items() if name not in self.may_differ}
        return {f"--{name.replace('_', '-')}": value for name, value in kept.items()}

    def _write_args(self, args, inputs):
        hashes = {f"content of {flag} {path}": content_hash(path) for flag, path in inputs}
        path, new = self.dir / "args.json", self._flags(args) | hashes
        begun = [self.dir / name for name in ("checkpoint", "samples.jsonl", "pairs.jsonl")]
        if path.exists() and any(map(Path.exists, begun)):  # a start that failed binds nobody
            with plainly(f"{path} is damaged", MEND):
                saved = json.loads(path.read_text())
                old = self._flags(saved["args"]) | saved["inputs"]
            for name in new:  # a flag that the run did not have yet binds nothing
                if name in old and old[name] != new[name]:
                    raise UserError(
                        f"{self.dir} was started with {name} {old[name]}, now it is {new[name]}: "
                        "give what it was, or another --out, or start over with --no-resume"
                    )
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"commit": git_commit(), "command": sys.argv}
        text = json.dumps({"args": args, "inputs": hashes, **versions}, indent=1)
        write_atomic(path, text + "\n")

    def _drop_after(self, step):
        """Drops from the logs what was not saved; a row of samples.jsonl without a step stays."""
        metrics, samples = self.dir / "metrics.csv", self.dir / "samples.jsonl"
        with plainly(f"{metrics} is damaged", MEND):
            rows = [row for row in lines(metrics)[1:] if int(row.split(",")[0]) <= step]
        write_atomic(metrics, "\n".join([",".join(self.columns), *rows, ""]))
        with plainly(f"{samples} is damaged", MEND):
            rows = [row for row in lines(samples) if json.loads(row).get("step", 0) <= step]
        if samples.exists():
            write_atomic(samples, "".join(row + "\n" for row in rows))

    def log(self, **row):
        """Appends a row to metrics.csv."""
        assert row.keys() <= set(self.columns), set(row) - set(self.columns)
        # A column that this step does not have (no evaluation, no audit) is an empty cell.
        cells = (row.get(column, "") for column in self.columns)
        texts = (f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)
        self._append("metrics.csv", ",".join(texts) + "\n")

    def append(self, rows):
        """Appends dicts to samples.jsonl."""
        # json.dumps writes ASCII: a line ends where its row ends, whatever a program contains
        self._append("samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _append(self, name, text):
        if self.rank == 0:
            with plainly(f"cannot write {self.dir / name}", MAKE_ROOM):
                with open(self.dir / name, "a", encoding="utf-8") as file:
                    file.write(text)

    def samples(self):
        """The rows of samples.jsonl; for rank 0, which goes on writing it."""
        return [json.loads(line) for line in lines(self.dir / "samples.jsonl")]

    def save(self, write_model, model, optimizer, state):
        """Writes checkpoint/ whole or not at all; signals wait for its end. All ranks call it.

        `write_model(folder)` writes config, weights and tokenizer; all ranks call it. `state` is a
        dict with "step" and what else JSON holds: keys are text, a tuple comes back as a list.
        """
        text, failed = json.dumps(state), (f"cannot write {self.new}", MAKE_ROOM)
        # AdamW's step counts and moments by parameter name; of a tensor the rows of this rank.
        moments = {
            f"{name}.{key}": local(value).contiguous()
            for name, p in model.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()
        }
        with Interrupt(patience=math.inf):
            with fail_together(), plainly(*failed):
                (self.new / "optimizer").mkdir(parents=True, exist_ok=True)
                save_file(moments, self.new / "optimizer" / f"rank{self.rank:05d}.safetensors")
            # Not together: the others may wait in a gather, out of which only torchrun takes them.
            with plainly(*failed):
                write_model(self.new)
            with fail_together(), plainly(*failed):
                if self.rank == 0:
                    # state.json says that all is there, so the rest is on the disk before it.
                    for file in filter(Path.is_file, self.new.rglob("*")):
                        with open(file, "rb+") as opened:
                            os.fsync(opened.fileno())
                    write_atomic(self.new / "state.json", text)
                    self._finish_save()

    def _finish_save(self):
        """checkpoint.new becomes checkpoint if it is complete, which is when it has a state.json.
        What a kill leaves undone here is done when the run is opened again."""
        if (self.new / "state.json").exists():
            remove(self.checkpoint)  # killed here, the new one is whole
            os.rename(self.new, self.checkpoint)
        remove(self.new)  # of a save that was killed or failed

    def load(self):
        """-> `state` of the last complete step, or None. Raises UserError."""
        if not self.checkpoint.exists():
            return None
        with plainly(f"{self.checkpoint} is not whole, or none of a run", MEND):
            return json.loads((self.checkpoint / "state.json").read_text())

    def load_optimizer(self, model, optimizer):
        """Gives AdamW the step counts and moments of the checkpoint, which any number of ranks
        wrote on any device. Learning rate, decay and kernel stay those of this command."""
        folder, fused = self.checkpoint / "optimizer", optimizer.defaults["fused"]
        with plainly(f"{folder} is damaged", MEND), contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(f, "pt")) for f in sorted(folder.iterdir())]
            for name, p in model.named_parameters():
                # The step count is on the GPU for the fused kernel, on the host for the others.
                step = files[0].get_tensor(f"{name}.step")
                optimizer.state[p] = {"step": step.to(p.device) if fused else step}
                for key in ("exp_avg", "exp_avg_sq"):
                    # A tensor's rows are dealt to the files in the order of their ranks.
                    full = torch.cat([file.get_tensor(f"{name}.{key}") for file in files])
                    optimizer.state[p][key] = torch.zeros_like(p)  # sharded like p
                    local(optimizer.state[p][key]).copy_(full[rows_of(p)])
