"""Two ranks, and one in a process group as on a GPU, compute what plain Python computes, and a checkpoint of one number
of ranks is read by another.

Run with `pytest tests/test_ranks.py`; what the tests start as a rank, with RANK and WORLD_SIZE set, is
    python tests/test_ranks.py TASK FOLDER
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import codescaler as cs  # noqa: E402
import grpo  # noqa: E402
import train_rm  # noqa: E402
from common import UserError, run_cli  # noqa: E402

GOLDEN, POLICY = ROOT / "tests" / "golden", ROOT / "tiny" / "policy"
PROMPTS = [[5, 6, 7], [9] * 12, [3, 4] * 4]


@dataclass
class Args:
    out: str
    resume: bool = True


# ----------------------------------------------------------------------------------------------------------------------
# what every number of ranks does


def models(folder):
    """Name -> (checkpoint, head): a reward model, a tied and an untied language model."""
    return {"rm": (GOLDEN / "rm", "score"), "tied": (GOLDEN / "lm_tied", "lm"), "untied": (folder / "untied", "lm")}


def start(path, head="lm", sharded=False):
    model = cs.load_model(path, head, device="cpu", sharded=sharded)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def loss_of(model, ids_BT, lengths_B):
    """A sum over rows: of scores with weights that differ, or of the log-probabilities of all tokens but the first."""
    if model.head == "score":
        score_B = model.score(model(ids_BT, lengths_B), lengths_B)
        return (score_B * (1 + lengths_B % 3)).sum() / 4
    logp_BT, _ = cs.token_logprobs(model, ids_BT, torch.ones_like(lengths_B), lengths_B, chunk=7)
    return -logp_BT.sum() / 50


def update(model, optimizer, rank=0, world=1):
    """One optimizer step on a rank's share of four rows -> loss, gradient norm and gradients, those of all ranks."""
    golden = load_file(GOLDEN / "rm" / "golden.safetensors")
    ids_BT, lengths_B = golden["right.input_ids"][:4] % model.num_tokens, golden["right.attention_mask"][:4].sum(1)
    loss = loss_of(model, ids_BT[rank::world], lengths_B[rank::world])
    (loss * world).backward()
    norm = cs.clip_gradients(model, 1e9)
    grads = {name: cs.whole(p.grad) for name, p in cs.parameters_at_rest(model)}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": cs.total(loss.detach()), "norm": norm, "grads": grads}


def shared_update(model, rank=0, world=1):
    """Gradients where each rank's answers share one prompt: two passes forward, one backward."""
    answers = [[7, 8, 9, 10], [3, 2], [4, 4, 4]]
    losses = []
    for prompt in PROMPTS[rank:2:world]:
        if model.head == "score":  # the prompt's own last token is not used
            _, answer_BTD, lengths_B = cs.continue_prompts(model, [prompt], answers, [0, 0, 0])
            loss = model.score(answer_BTD, lengths_B).sum() * len(prompt)
        else:
            loss = -cs.group_logprobs(model, prompt, answers, chunk=2)[0].sum() * len(prompt)
        (loss * world).backward()
        losses.append(loss.detach())
    return {"loss": cs.total(sum(losses)), "grads": {n: cs.whole(p.grad) for n, p in cs.parameters_at_rest(model)}}


def weights_of(model):
    return {name: cs.whole(p).clone() for name, p in cs.parameters_at_rest(model)}


def samples_of(model, rank=0, world=1):
    """Each rank decodes its own prompts, another number of steps on each -> [(prompt number, ids of its samples)]."""
    mine = range(rank, len(PROMPTS), world)
    groups = cs.generate(model, [PROMPTS[i] for i in mine], n=2, max_new_tokens=5 + rank, prompt_keys=list(mine))
    return [(i, [c.ids[:5] for c in group]) for i, group in zip(mine, groups)]


def go_on(run, rank=0, world=1):
    """Continues a run folder by a step and saves it -> the weights."""
    state = run.load()
    model, optimizer = start(run.checkpoint, sharded=True)
    run.load_optimizer(optimizer, state)
    update(model, optimizer, rank, world)
    run.save(model, cs.Tokenizer(POLICY), optimizer=optimizer.state_dict(), step=state["step"] + 1)
    return weights_of(model)


# ----------------------------------------------------------------------------------------------------------------------
# what a rank does, in a process of its own


def compare_models(folder, rank=0, world=1):
    found = {}
    for name, (path, head) in models(folder).items():
        model, optimizer = start(path, head, sharded=True)
        held = sum(cs.local(p).numel() for p in model.parameters())
        found[name] = {**update(model, optimizer, rank, world), "held": held, "weights": weights_of(model)}
        for checkpointing in (False, True):
            model, _ = start(path, head, sharded=True)
            model.checkpointing = checkpointing
            found[name + " shared" + " recomputed" * checkpointing] = shared_update(model, rank, world)
    return found


def compare_task(folder, rank, world):
    found = compare_models(folder, rank, world)
    model, optimizer = start(folder / "untied", sharded=True)
    update(model, optimizer, rank, world)
    plain = cs.gathered(model)
    found["gathered"] = dict(plain.named_parameters())
    found["half"] = cs.gathered(model, torch.bfloat16).model.norm.weight.dtype
    found["samples"] = cs.gather_lists(samples_of(plain, rank, world))
    found["agree"] = [cs.agree(rank == 1), cs.agree(False)]
    found["second"] = go_on(cs.Run(Args(str(folder / "run")), ["step"], rank), rank, world)
    torch.save(found, folder / f"rank{rank}.pt")


def one_task(folder, rank, world):
    """One rank in a process group of its own, which setup() makes on a GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = compare_models(folder)
    found["second"] = go_on(cs.Run(Args(str(folder / "run of one")), ["step"]))
    model, optimizer = start(folder / "untied", sharded=True)
    found["samples"] = samples_of(cs.gathered(model))
    update(model, optimizer)
    cs.move_moments(optimizer, "meta")
    found["moved"] = [
        (type(value).__name__, str(value.device), value.shape == p.shape and cs.local(value).shape == cs.local(p).shape)
        for p, state in optimizer.state.items() for value in state.values() if value.ndim
    ]  # fmt: skip
    cs.compute_dtype = lambda device: torch.bfloat16  # as on CUDA
    for name, (path, head) in models(folder).items():
        model, optimizer = start(path, head, sharded=True)
        ids_BT = torch.tensor([PROMPTS[1]])
        hidden_BTD = model(ids_BT)
        out = model.score(hidden_BTD, torch.tensor([12])) if head == "score" else model.logits(hidden_BTD)
        dtypes = [hidden_BTD.dtype, out.dtype]
        model, optimizer = start(path, head, sharded=True)
        model.checkpointing = True
        found[name + " half"] = {**update(model, optimizer), "dtypes": dtypes, "weights": weights_of(model)}
    torch.save(found, folder / "one.pt")


def lost_task(folder, rank, world):
    if rank == 1:
        os._exit(9)
    with cs.phase("update"):
        cs.total(torch.ones(1))


def hang_task(folder, rank, world):
    with cs.phase("rollout", minutes=0.02):
        if rank == 1:
            time.sleep(60)
        cs.total(torch.ones(1))


def fake_task(folder, rank, world):
    """Bytes a rank holds of the 8B and 14B shapes on 8 ranks, without memory and without the other ranks: weights,
    gradients and what AdamW keeps after a step."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = {}
    for rank in (0, 7):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        for name in ("qwen3-8b-shape", "qwen3-14b-shape"):
            for head in ("lm", "score"):
                with torch.device("meta"):
                    model = cs.shard(cs.Qwen3(cs.SHAPES[name], head), "cpu")
                optimizer = cs.adamw(model.parameters(), "cpu")
                for p in model.parameters():
                    p.grad = torch.empty_like(p)
                if head == "lm":
                    optimizer.step()
                moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
                held = [
                    sum(cs.local(v).numel() * v.element_size() for v in values)
                    for values in (model.parameters(), [p.grad for p in model.parameters()], moments)
                ]
                units = sum(isinstance(module, cs.FSDPModule) for module in model.modules())
                found[rank, name, head] = held, units
        dist.destroy_process_group()
    torch.save(found, folder / "fake.pt")


def start_ranks(task, folder, world=2, timeout=120):
    """Runs a task on every rank, a process each -> [(exit code, stderr)].

    Where a signal ended a rank they are all started once more, aloud: once in several hundred starts one of two ranks
    died inside torch 2.13 (a protection fault in libtorch_cpu, releasing a tensor), which nothing brought back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(world), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, __file__, task, str(folder)]

    def once():
        processes = [
            subprocess.Popen(command, env={**common, "RANK": str(rank)}, cwd=ROOT, text=True, stderr=subprocess.PIPE)
            for rank in range(world)
        ]
        try:
            return [(p.wait(timeout), p.stderr.read()) for p in processes]
        finally:
            for p in processes:
                p.kill()

    ended = once()
    for rank, (code, said) in enumerate(ended):
        if code < 0:
            warnings.warn(f"task {task}: signal {-code} ended rank {rank}: started again\n{said[-3000:]}", stacklevel=2)
            return once()
    return ended


# ----------------------------------------------------------------------------------------------------------------------
# tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, what plain Python finds, what each of two ranks finds, what a process group of one finds)."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = cs.Tokenizer(POLICY)
    untied = cs.Qwen3(replace(cs.load_model(GOLDEN / "lm_tied", device="cpu").config, tie_word_embeddings=False))
    cs.init_weights(untied, std=0.2)
    cs.save_model(untied, tokenizer, folder / "untied")
    alone = {"samples before": samples_of(start(folder / "untied")[0])}
    for name, (path, head) in models(folder).items():
        model, optimizer = start(path, head)
        alone[name] = {**update(model, optimizer), "weights": weights_of(model)}
        alone[name + " shared"] = shared_update(start(path, head)[0])
    alone["samples"] = samples_of(model)

    model, optimizer = start(POLICY)
    update(model, optimizer)
    run = cs.Run(Args(str(folder / "run")), ["step"])
    run.save(model, tokenizer, optimizer=optimizer.state_dict(), step=1)
    run._lock.close()
    shutil.copytree(folder / "run", folder / "run of one")
    for name in ("second", "third"):
        update(model, optimizer)
        alone[name] = weights_of(model)

    ended = start_ranks("compare", folder)
    assert [code for code, _ in ended] == [0, 0], ended[0][1][-3000:] + ended[1][1][-3000:]
    ended = start_ranks("one", folder, world=1)
    assert ended[0][0] == 0, ended[0][1][-3000:]
    return folder, alone, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)], torch.load(folder / "one.pt")


def close(a, b, tolerance=1e-5):
    """Relative to the largest value of the tensor."""
    return (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("recomputed", ["", " recomputed"])
@pytest.mark.parametrize("name", ["rm shared", "tied shared", "untied shared"])
def test_gradients_of_a_shared_prompt(ranks, name, recomputed):
    _, alone, both, one = ranks
    for found in (ranks[name + recomputed] for ranks in (*both, one)):
        assert close(found["loss"], alone[name]["loss"])
        for parameter, grad in alone[name]["grads"].items():
            assert grad.any() and close(found["grads"][parameter], grad), parameter


@pytest.mark.parametrize("name", ["rm", "tied", "untied"])
def test_loss_and_gradients(ranks, name):
    _, alone, both, one = ranks
    for found in [*both, one]:
        assert close(found[name]["loss"], alone[name]["loss"])
        assert found[name]["norm"] == pytest.approx(alone[name]["norm"], rel=1e-5)
        assert set(found[name]["grads"]) == set(alone[name]["grads"])
        for parameter, grad in alone[name]["grads"].items():
            assert grad.any() and close(found[name]["grads"][parameter], grad), parameter
    held = [found[name]["held"] for found in both]
    assert sum(held) == sum(w.numel() for w in alone[name]["weights"].values())
    assert max(held) < 0.55 * sum(held)


def test_gathered_weights_are_the_same_on_every_rank(ranks):
    _, alone, both, one = ranks
    assert one["samples"] == alone["samples before"]
    for found in both:
        for name, weight in found["gathered"].items():
            assert torch.equal(weight, both[0]["untied"]["weights"][name])
            assert (weight - alone["untied"]["weights"][name]).abs().max() < 1e-3  # a step of Adam is 0.01
        assert found["half"] == torch.bfloat16
        assert found["agree"] == [True, False]
        assert sorted(found["samples"]) == alone["samples"]


def test_a_checkpoint_of_one_rank_goes_on_on_two_and_back(ranks):
    folder, alone, both, one = ranks
    names = set(alone["second"])
    assert all(torch.equal(both[0]["second"][n], both[1]["second"][n]) for n in names)
    for found in (both[0], one):
        assert all(close(found["second"][n], alone["second"][n], 1e-3) for n in names)
    assert (folder / "run" / "checkpoint" / "optimizer").is_dir()
    written = load_file(folder / "run" / "checkpoint" / "model.safetensors")
    assert set(written) == names and all(torch.equal(written[n], both[0]["second"][n]) for n in names)
    third = go_on(cs.Run(Args(str(folder / "run of one")), ["step"]))  # sharded over one
    assert all(close(third[n], alone["third"][n], 1e-3) for n in names)
    third = go_on(cs.Run(Args(str(folder / "run")), ["step"]))
    assert all(close(third[n], alone["third"][n], 1e-3) for n in names)
    assert not (folder / "run" / "checkpoint" / "optimizer").exists()
    moved = max((third[n] - alone["second"][n]).abs().max() for n in names)
    assert moved > 1e-3  # the comparison above is of steps that were made


@pytest.mark.parametrize("name", ["rm", "tied", "untied"])
def test_half_precision_keeps_full_precision_where_it_matters(ranks, name):
    _, alone, _, one = ranks
    half, full = one[name + " half"], alone[name]
    assert half["dtypes"] == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in [*half["weights"].values(), *half["grads"].values()]} == {torch.float32}
    h, f = (torch.cat([v["grads"][n].flatten() for n in sorted(full["grads"])]) for v in (half, full))
    assert not torch.equal(h, f) and torch.cosine_similarity(h, f, dim=0) > 0.99
    assert half["norm"] == pytest.approx(full["norm"], rel=0.05)


def test_optimizer_offload_changes_no_result(ranks, monkeypatch):
    _, _, _, one = ranks
    assert one["moved"] and all(found == ("DTensor", "meta", True) for found in one["moved"])
    moves, move = [], cs.move_moments

    def counted(optimizer, device=None):
        moves.append(device)
        move(optimizer, device)

    monkeypatch.setattr(cs, "move_moments", counted)
    weights = []
    for offload in (False, True):
        model = cs.load_model(POLICY, device="cpu")
        optimizer = cs.adamw(model.parameters(), "cpu", offload, lr=0.01)
        for _ in range(2):
            update(model, optimizer)
        again = cs.adamw(model.parameters(), "cpu", offload, lr=0.01)
        again.load_state_dict(optimizer.state_dict())
        update(model, again)
        weights.append(weights_of(model))
    assert moves == [None, "cpu", None, "cpu", "cpu", None, "cpu"]  # two steps, loading, a step
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_one_gpu_gets_a_process_group_of_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: asked.append((args, options)))
    assert cs.setup() == (0, 1, "cuda:0") and cs.setup("cpu") == (0, 1, "cpu")
    ((backend,), options), *more = asked
    assert backend == "cpu:gloo,cuda:nccl" and options["world_size"] == 1 and not more


def test_a_shape_is_trained_from_random_weights(tmp_path, monkeypatch, capsys):
    config = replace(cs.load_model(POLICY, device="cpu").config, vocab_size=700)  # more ids than the tokenizer knows
    monkeypatch.setitem(cs.SHAPES, "qwen3-test-shape", config)
    pair = {"chosen": "def solve(xs):\n    return xs", "rejected": "def solve(xs):\n    return 0", "source": "t"}
    pairs = [json.dumps(pair | {"id": str(i), "prompt": f"Return xs, {i}."}) for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    common = ["--random-init", "--device", "cpu", "--steps", "1", "--out"]
    rm = ["--init", "qwen3-test-shape", "--pairs", str(tmp_path / "pairs.jsonl"), "--batch", "4"]
    models = ["--policy", "qwen3-test-shape", "--rm", "qwen3-test-shape"]
    policy = [*models, "--prompts", "1", "--group", "2", "--limit", "1"]
    for module, flags in ((train_rm, rm), (grpo, [*policy, "--max-new-tokens", "8", "--eval-group", "2"])):
        out = tmp_path / module.__name__
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags, *common, str(out)])
        module.main()
        assert len(cs.read_lines(out / "metrics.csv")) == 2
        assert cs.load_model(out, "score" if module is train_rm else "lm", device="cpu").config.vocab_size == 700
    monkeypatch.setattr(sys, "argv", ["train_rm", *rm, "--out", str(tmp_path / "refused")])
    with pytest.raises(UserError, match="--random-init"):
        train_rm.main()


@pytest.mark.gpu
def test_one_gpu_takes_the_way_of_several():
    _, _, device = cs.setup("cuda")
    model = cs.load_model(POLICY, device=device, sharded=True)
    optimizer = cs.adamw(model.parameters(), device, offload=True, lr=0.01)
    ids_BT, lengths_B = cs.pad_rows(PROMPTS, device)
    before = None
    for _ in range(3):
        loss = loss_of(model, ids_BT, lengths_B)
        before = before or loss.item()
        loss.backward()
        cs.clip_gradients(model, 1.0)
        optimizer.step()
        assert {s["exp_avg"].device.type for s in optimizer.state.values()} == {"cpu"}
        assert cs.total(torch.ones(1)).item() == 1 and cs.gather_lists([1]) == [1]
    assert model(ids_BT, lengths_B).dtype == torch.bfloat16 and loss.item() < before
    dist.destroy_process_group()


def test_only_the_first_rank_writes_samples(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    for rank, left in ((1, 3), (0, 1)):
        run = cs.Run(Args(str(tmp_path)), ["step"], rank)
        assert [row["step"] for row in run.samples()] == [1, 2]
        run.drop_samples_after(1)
        assert len(cs.read_lines(tmp_path / "samples.jsonl")) == left


@pytest.mark.parametrize("task, message", [("lost", "rank 0 in phase 'update': lost the other"), ("hang", "over 0.02")])
def test_a_rank_that_is_gone_ends_the_others(tmp_path, task, message):
    (code, said), _ = start_ranks(task, tmp_path)
    assert code != 0 and message in said and "Traceback" not in said, said


def run_on(ranks, flags, out):
    """A script on so many ranks, started."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, *flags.split(), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_ranks_collect_the_pairs_of_one(tmp_path):
    flags = "train_rm.py --collect-only --limit 30 --group 2 --max-new-tokens 96"
    started = [run_on(1, flags, tmp_path / "one"), run_on(2, flags, tmp_path / "two")]
    assert [process.wait(120) for process in started] == [0, 0]
    wanted = (tmp_path / "one" / "pairs.jsonl").read_text()
    assert len(wanted.splitlines()) > 20 and (tmp_path / "two" / "pairs.jsonl").read_text() == wanted
    (tmp_path / "two" / "pairs.jsonl").unlink()
    samples = (tmp_path / "two" / "samples.jsonl").read_text()
    assert samples == (tmp_path / "one" / "samples.jsonl").read_text()
    (tmp_path / "two" / "samples.jsonl").write_text(samples[: len(samples) // 2])  # killed in the middle of a line
    assert run_on(2, flags, tmp_path / "two").wait(120) == 0
    assert (tmp_path / "two" / "pairs.jsonl").read_text() == wanted
    assert (tmp_path / "two" / "samples.jsonl").read_text() == samples


def pair_rows(count):
    pair = {"chosen": "def solve(xs):\n    return sum(xs)", "rejected": "def solve(xs):\n    return 0", "source": "t"}
    return [json.dumps(pair | {"id": str(i), "prompt": f"Add up xs and {i % 9}."}) + "\n" for i in range(count)]


@pytest.mark.parametrize("script", ["train_rm.py --pairs {}/pairs.jsonl --batch 8 --save-every 9",
                                    "grpo.py --rm tiny/reward --prompts 3 --group 4 --max-new-tokens 96"])  # fmt: skip
def test_two_ranks_train_as_one(tmp_path, script):
    """Four steps from one seed, an uneven number of prompts: the same samples and verdicts, losses within 1e-4."""
    (tmp_path / "pairs.jsonl").write_text("".join(pair_rows(60)))
    flags = f"{script} --steps 4 --device cpu --limit {60 if 'pairs' in script else 5}".format(tmp_path)
    started = [run_on(ranks, flags, tmp_path / str(ranks)) for ranks in (1, 2)]
    assert [process.wait(180) for process in started] == [0, 0]
    one, two = (bench.read_metrics(tmp_path / ranks) for ranks in ("1", "2"))
    assert len(one["loss"]) == 4 and all(float(loss) != 0 for loss in one["loss"].values())
    for name in ("loss", "grad_norm"):
        assert {k: float(v) for k, v in two[name].items()} == pytest.approx(
            {k: float(v) for k, v in one[name].items()}, abs=1e-4 * max(1, *map(float, one[name].values()))
        )
    if script.startswith("grpo"):
        rows = [[json.loads(line) for line in open(tmp_path / ranks / "samples.jsonl")] for ranks in ("1", "2")]
        exact = ("step", "number", "completion", "code", "reason", "verdict")
        assert len(rows[0]) == 4 * 3 * 4 and {row["verdict"] for row in rows[0]} >= {"pass", "wrong_answer"}
        assert [[row[k] for k in exact] for row in rows[0]] == [[row[k] for k in exact] for row in rows[1]]
        scores = [[row["score"] or 0.0 for row in some] for some in rows]
        assert any(scores[0]) and scores[1] == pytest.approx(scores[0], abs=1e-4)
        assert two["pass_rate"] == one["pass_rate"]


def test_every_rank_judges_as_often(monkeypatch):
    """A sharded reward model is gathered in each call, so a rank that made one call less would hang the others."""
    monkeypatch.setattr(grpo, "rollout", lambda *_: [])
    for problems, calls in ((129, 2), (128, 1), (1, 1)):
        for rank in range(2):
            judged = []
            grpo.evaluate(None, None, [None] * problems, 1, judged.append, grpo.Args(), rank, world=2)
            assert len(judged) == calls


def test_8b_and_14b_over_eight_ranks(tmp_path):
    done = start_ranks("fake", tmp_path, world=1)
    assert done[0][0] == 0, done
    found, plain = torch.load(tmp_path / "fake.pt"), {}
    with torch.device("meta"):
        for _, name, head in found:
            plain[name, head] = plain.get((name, head)) or cs.Qwen3(cs.SHAPES[name], head)
    for (rank, name, head), (held, units) in found.items():
        model, shape = plain[name, head], cs.SHAPES[name]
        # fp32 shards: rows are dealt in runs of an eighth, rounded up; the score head is one row, so rank 0 has it.
        runs = {n: -(-p.shape[0] // 8) for n, p in model.named_parameters()}
        rows = {n: min(runs[n], max(0, p.shape[0] - rank * runs[n])) for n, p in model.named_parameters()}
        assert held[0] == held[1] == sum(4 * rows[n] * p[0].numel() for n, p in model.named_parameters())
        assert units == len(model.model.layers) + 3  # the embedding, the head, the root
        items = bench.memory_budget(shape, shape, bench.MemoryArgs())[0]["optimizer step"]  # of `bench.py memory`
        if head == "lm":
            named = ("weights, fp32", "gradients, fp32", "moments, fp32")
            assert held == [pytest.approx(items[item], rel=1e-3) for item in named]
        else:
            assert held[0] / 2 == pytest.approx(items["reward model, bf16"], rel=1e-3)  # fp32 here


if __name__ == "__main__":

    def main():
        task, folder = sys.argv[1], Path(sys.argv[2])
        rank, world, _ = cs.setup("cpu", timeout_minutes=0.15)
        tasks = {"compare": compare_task, "one": one_task, "lost": lost_task, "hang": hang_task, "fake": fake_task}
        tasks[task](folder, rank, world)

    run_cli(main)
