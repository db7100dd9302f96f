"""What both trainers stand on: ranks and FSDP2, the optimizer, the run folder, checkpoints, resume.

    rank, world, device = setup()            # plain python, or a rank of torchrun
    run = Run(args, COLUMNS, [("--pairs", "pairs.jsonl")], rank)
    state = run.load() or {"step": 0}        # the same command goes on where it was killed
    run.load_optimizer(model, optimizer)
    for step in steps(state, 100, 1, save):                        # save() calls run.save(...)

Every rank makes the same calls.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

# GPU memory in segments that grow, since rollouts and updates ask for blocks of other sizes. Torch
# reads it before its first allocation. What the user has set stays.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common import Terminated, UserError, write_atomic, write_jsonl

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

START_OVER = "choose another --out or start over with --no-resume"
MAKE_ROOM = "make room and give the same command again; the last checkpoint is whole"

# --------------------------------------------------------------------------------------------------
# ranks: one process a GPU


def setup(device=None):
    """-> (rank, number of ranks, device). Plain python is rank 0 of 1; the ranks of torchrun find
    each other here. Raises UserError for a device that is not there."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = int(os.environ.get("LOCAL_RANK", 0))  # of this machine
    count = torch.cuda.device_count()
    device = device or ("cuda" if count else "cpu")
    if device not in ("cpu", "cuda") or device == "cuda" and gpu >= count:
        raise UserError(f"--device {device}: expected cpu, or cuda and a GPU a rank; {count} here")
    if device == "cuda":
        device = f"cuda:{gpu}"
        torch.cuda.set_device(device)
        # cuDNN's attention plans every new shape on the host, and decoding has a new one each token
        # (reported by others, not measured here).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not dist.is_initialized() and (world > 1 or device != "cpu"):
        # One GPU is a group of one rank, which asks no network: FSDP2 computes in bf16 there, too.
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        # Tensors travel between GPUs by NCCL, Python objects between hosts by gloo.
        backend = "gloo" if device == "cpu" else "nccl" if alone else "cpu:gloo,cuda:nccl"
        # Ranks wait for the longest rollout and for rank 0's files, NCCL by itself 10 minutes only.
        dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)
        if alone or device == "cpu":  # else NCCL warns and gloo may abort; several GPUs might hang
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return rank, world, device


def leave():
    """The end of a run that succeeded, on all ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def total(tensor):
    """Sum over ranks, in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_lists(items):
    """The lists of all ranks, one after the other, the same on each; a barrier, too."""
    lists = [items] * num_ranks()
    if len(lists) > 1:
        dist.all_gather_object(lists, items)  # pickled, over gloo
    return [item for part in lists for item in part]


@contextlib.contextmanager
def explain(what, advice, all_ranks=False):
    """An error with a file in the block becomes a UserError: what failed, why, and what to do.
    With `all_ranks` the ranks wait for each other at the end, and an error of one ends all."""
    error = None
    try:
        yield
    except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as found:
        is_told = isinstance(found, UserError)  # by a block inside
        error = found if is_told else UserError(f"{what} ({found}): {advice}")
    if any(gather_lists([bool(error)])) if all_ranks else error:
        raise error or SystemExit(2)  # the rank that met the error is the one that prints it


# --------------------------------------------------------------------------------------------------
# the model and its optimizer: FSDP2 deals the rows of every tensor to the ranks


def compute_dtype(device):
    """What matrices are multiplied in: bf16 on CUDA; fp32 on CPUs, which are slow in bf16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def shard(model, units, fp32_units, device):
    """FSDP2 over all ranks, in place; nothing without a process group (one CPU). A module of
    `units` is gathered while it computes, in compute_dtype(), one of `fp32_units` in fp32.
    `device` is where a model on meta will be. Gradients are means over the ranks. Every rank must
    run as many forward and backward passes."""
    if dist.is_initialized():
        kind = torch.device(device).type
        mesh = init_device_mesh(kind, (num_ranks(),))
        # fp32 master weights, fp32 sums of gradients over ranks, bf16 products on CUDA
        mixed = MixedPrecisionPolicy(param_dtype=compute_dtype(kind), reduce_dtype=torch.float32)
        for unit in fp32_units:
            fully_shard(unit, mesh=mesh)
        for unit in [*units, model]:  # the root last: it takes what is left
            fully_shard(unit, mesh=mesh, mp_policy=mixed)


def local(p):
    """What this rank holds of a tensor: its rows, or all of it."""
    return p.to_local() if isinstance(p, DTensor) else p


def rows_of(p):
    """The slice of a tensor's first dimension that this rank holds; the last may hold none."""
    rank = p.device_mesh.get_local_rank() if isinstance(p, DTensor) else 0
    ranks = p.device_mesh.size() if isinstance(p, DTensor) else 1
    start = min(rank * math.ceil(p.shape[0] / ranks), p.shape[0])  # 5 rows on 2 ranks: 3 and 2
    return slice(start, start + local(p).shape[0])


def full_parameters(model):
    """Yields (name, full tensor) of each parameter, gathered one at a time. All ranks call it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass without a backward pass left gathered, in bf16
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


def steps(state, last, save_every, save):
    """`for step in steps(...)`: the steps after state["step"], which counts them, up to `last`;
    `save()` is called every so many and after the last. On Ctrl-C or SIGTERM, on any rank, the step
    in flight is finished and saved, then KeyboardInterrupt or Terminated is raised on all ranks; a
    second signal acts at once."""
    noted = []  # the exceptions to raise

    def note(number, frame):
        noted.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        if len(noted) > 1:
            raise noted[-1]
        # print() may be what the signal interrupts.
        os.write(2, b"stopping after this step; once more to stop now\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while state["step"] < last:
            yield state["step"] + 1
            state["step"] += 1
            stop = gather_lists(noted)  # the same on each rank: all stop at one step
            if state["step"] % save_every == 0 or state["step"] == last or stop:
                save()
            if stop:
                raise stop[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop := gather_lists(noted):  # too late for the last step
        raise stop[0]


class Run:
    """A run folder: args.json, metrics.csv (a row a step), samples.jsonl and checkpoint/. All ranks
    open it. Raises UserError if another run is in it, or if an argument or the content of one of
    `inputs`, a list of (flag, path), is not what it was started with."""

    # What runs write. args.json goes last: until then the folder says what it holds.
    files = "metrics.csv samples.jsonl pairs.jsonl result.json checkpoint checkpoint.new args.json"
    may_differ = ("steps", "resume", "device", "out", "collect_only")  # may be new on resume

    def __init__(self, args, columns, inputs=(), rank=0):
        self.dir, self.rank, self.columns = Path(args.out), rank, columns
        self.checkpoint, self.new = self.dir / "checkpoint", self.dir / "checkpoint.new"
        self.metrics, self.answers = self.dir / "metrics.csv", self.dir / "samples.jsonl"
        with explain(f"cannot open --out {self.dir}", START_OVER, all_ranks=True):
            if rank == 0:
                self._open(dataclasses.asdict(args), inputs)

    def _open(self, args, inputs):
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.dir / ".lock", "w")  # held as long as this object lives
        if fcntl:
            with explain(f"cannot lock --out {self.dir}, is another run in it?", "choose another"):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not args["resume"]:
            self._start_over(inputs)
        self._finish_save()  # what a kill has left undone
        self._write_args(args, inputs)
        # Drop from the logs what was not saved, or cut short. Collected samples have no step.
        step = (self.load() or {"step": 0})["step"]
        rows = [row for row in self._lines(self.metrics)[1:] if int(row.split(",")[0]) <= step]
        write_atomic(self.metrics, "\n".join([",".join(self.columns), *rows, ""]))
        if self.answers.exists():
            write_jsonl(self.answers, [r for r in self.samples() if r.get("step", 0) <= step])

    def _start_over(self, inputs):
        """Removes what runs write and nothing else; refuses if an input lies in the folder."""
        for flag, path in inputs:
            if Path(path).resolve().is_relative_to(self.dir.resolve()):
                raise UserError(f"--no-resume would delete {flag} {path}: choose another --out")
        for path in map(self.dir.joinpath, self.files.split()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _write_args(self, args, inputs):
        """Writes args.json, if it agrees with that of a run that has begun."""
        hashes = {}  # no folders in the names: that of a hub id changes with its revision
        for flag, path in inputs:
            name = f"content of {flag} {Path(path).name}"
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            hashes[name] = hashes.get(name, "") + digest
        about = {"args": args, "inputs": hashes, "torch": torch.__version__, "python": sys.version}
        path = self.dir / "args.json"
        if path.exists() and (self.checkpoint.exists() or self.answers.exists()):
            now = self._binding(about)
            for name, was in self._binding(json.loads(path.read_text())).items():
                if now.get(name) != was:  # None: a file that is no longer there
                    text = f"{self.dir} was started with {name} {was}, now it is {now.get(name)}"
                    raise UserError(f"{text}: give what it was, {START_OVER}")
        write_atomic(path, json.dumps(about, indent=1) + "\n")

    def _binding(self, about):
        """{flag or content: value} of what args.json says and a resumed run must repeat."""
        args = {name: v for name, v in about["args"].items() if name not in self.may_differ}
        return {f"--{name.replace('_', '-')}": v for name, v in args.items()} | about["inputs"]

    def log(self, **row):
        """Appends a row to metrics.csv; a column that this step does not have is an empty cell."""
        assert row.keys() <= set(self.columns), row.keys()
        cells = [str(row.get(column, "")) for column in self.columns]
        self._append(self.metrics, ",".join(cells) + "\n")

    def append(self, rows):
        """Appends dicts to samples.jsonl."""
        # ASCII: a line ends where its row ends, whatever a program contains.
        self._append(self.answers, "".join(json.dumps(row) + "\n" for row in rows))

    def write_result(self, result):
        if self.rank == 0:
            write_atomic(self.dir / "result.json", json.dumps(result) + "\n")

    def _append(self, path, text):
        if self.rank == 0:
            with explain(f"cannot write {path}", MAKE_ROOM), open(path, "a") as file:
                file.write(text)

    def _lines(self, path):
        """The lines of a log but a last one that a kill cut short."""
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def samples(self):
        """The rows of samples.jsonl; for rank 0, which writes it."""
        return [json.loads(line) for line in self._lines(self.answers)]

    def save(self, write_model, model, optimizer, state):
        """Writes checkpoint/ whole or not at all. All ranks call it. `write_model(folder)` gathers
        the weights on all ranks before rank 0 writes them; `state` is a dict with "step" and what
        else JSON holds. Raises UserError."""
        with explain(f"cannot write {self.new}", MAKE_ROOM, all_ranks=True):
            write_model(self.new)  # leaves the parameters sharded, as the optimizer knows them
            moments = {
                f"{name}.{key}": local(value).contiguous()  # of a tensor the rows of this rank
                for name, p in model.named_parameters()
                for key, value in optimizer.state.get(p, {}).items()
            }
            (self.new / "optimizer").mkdir(parents=True, exist_ok=True)
            save_file(moments, self.new / "optimizer" / f"rank{self.rank:05d}.safetensors")
        with explain(f"cannot write {self.new}", MAKE_ROOM, all_ranks=True):
            if self.rank == 0:
                # state.json says that all is there, so the rest is on the disk before it.
                for path in filter(Path.is_file, self.new.rglob("*")):
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
                write_atomic(self.new / "state.json", json.dumps(state))
                self._finish_save()

    def _finish_save(self):
        """checkpoint.new becomes checkpoint if it is complete. Opening the run calls it, too."""
        if (self.new / "state.json").exists():
            shutil.rmtree(self.checkpoint, ignore_errors=True)  # there may be none yet
            os.rename(self.new, self.checkpoint)
        shutil.rmtree(self.new, ignore_errors=True)  # of a save that was killed or failed

    def load(self):
        """-> `state` as it was last saved, or None where there is no checkpoint."""
        path = self.checkpoint / "state.json"
        return json.loads(path.read_text()) if self.checkpoint.exists() else None

    def load_optimizer(self, model, optimizer):
        """Step counts and moments of the checkpoint, which any number of ranks wrote on any device;
        learning rate, decay and kernel stay those of this command. Does nothing where there is no
        checkpoint. Raises UserError."""
        folder = self.checkpoint / "optimizer"
        if not self.checkpoint.exists():
            return
        if self.rank == 0:
            print(f"continuing {self.dir} at step {self.load()['step']}")
        with explain(f"{folder} is damaged", START_OVER):
            files = [safe_open(file, "pt") for file in sorted(folder.iterdir())]
            if not files[0].keys():
                return  # saved before the first update
            # The optimizer's own tensors: zeros, on the devices and in the shards of this command.
            for name, values in get_optimizer_state_dict(model, optimizer)["state"].items():
                for key, value in values.items():
                    parts = [file.get_tensor(f"{name}.{key}") for file in files]
                    # Rows were dealt to the files in the order of their ranks; a count is in each.
                    full = torch.cat(parts)[rows_of(value)] if value.ndim else parts[0]
                    local(value).copy_(full)
