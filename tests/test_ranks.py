"""Two ranks, and one in a process group as on a GPU, compute what plain Python computes, and go on
from each other's checkpoints.

Run with `pytest tests/test_ranks.py`; what the tests start as a rank, with RANK, WORLD_SIZE and
PYTHONPATH set, is `python tests/test_ranks.py TASK FOLDER`, or a trainer.
"""

import os
import signal
import socket
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_model import BUDGET, CONTINUED, LM, PROMPTS, RM, TINY, continued_loss, ids_of
from test_runs import rows, samples, saved_step, start, wait_for_rows, write_pairs

import codescaler as cs
import runs
from common import run_cli

ROOT = Path(__file__).parents[1]
# Other numbers of passes on each rank, and a rank without a prompt.
WORK = {"unequal": CONTINUED, "one rank has none": CONTINUED[2:]}

# --------------------------------------------------------------------------------------------------
# what every number of ranks does


def models(folder):
    """Name -> (checkpoint, head): a reward model, a tied and an untied language model."""
    return {"rm": (RM, "score"), "tied": (LM, "lm"), "untied": (folder / "untied", "lm")}


def gradients(path, head, work, rank=0, world=1, checkpointing=False):
    """Loss, gradient norm and gradients of all ranks, each of which does its share of the work."""
    model = cs.load_model(path, head, device="cpu", sharded=True)
    model.checkpointing, losses = checkpointing, torch.zeros(())
    for prompt, past, batch in cs.training_passes(model, work[rank::world], len, BUDGET):
        rows = batch or [[0]]
        hidden_BTD, lengths_B = cs.continue_prompt(model, prompt, rows, past)
        loss = continued_loss(model, hidden_BTD, lengths_B, rows) * bool(batch)
        (loss * world).backward()
        losses += loss.detach()
    norm = runs.clip_gradients(model, 1e9)
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    held = sum(runs.local(p).numel() for p in model.parameters())
    return {"loss": runs.total(losses), "norm": norm, "grads": grads, "held": held}


def all_gradients(folder, rank=0, world=1, **how):
    return {
        f"{name}, {kind}": gradients(*model, work, rank, world, **how)
        for name, model in models(folder).items()
        for kind, work in WORK.items()
    }


def samples_of(model, rank=0, world=1):
    """Each rank decodes its own prompts, another number of steps on each."""
    mine = range(rank, len(PROMPTS), world)
    prompts = [PROMPTS[i] for i in mine]
    groups = cs.generate(model, prompts, 2, 5 + 3 * rank, prompt_keys=list(mine))
    return [(i, [ids[:5] for ids in group]) for i, group in zip(mine, ids_of(groups))]


# --------------------------------------------------------------------------------------------------
# what a rank does, in a process of its own


def save_after_a_pass(folder, name):
    """A forward pass leaves some weights gathered, in the dtype of its products -> the model."""
    model = cs.load_model(folder / "untied", device="cpu", sharded=True)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    cs.save_model(model, cs.Tokenizer(TINY), folder / name)
    return model


def two_task(folder, rank, world):
    found = {how: all_gradients(folder, rank, world, checkpointing=how) for how in (False, True)}
    model = save_after_a_pass(folder, "saved by two")
    plain = cs.gathered(model)
    found["samples"] = runs.gather_lists(samples_of(plain, rank, world))
    found["half"] = cs.gathered(model, torch.bfloat16).model.norm.weight.dtype
    reward_model = cs.RewardModel(ROOT / "tiny" / "reward", "cpu", sharded=True)
    found["score"] = reward_model.score("Return the sum.", ["x = 1", "y"][: 1 + rank])[0]
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    found["waits"] = options._timeout.total_seconds()
    torch.save(found, folder / f"rank{rank}.pt")


def one_task(folder, rank, world):
    """One rank in a process group of its own, which setup() makes on a GPU; then in bf16."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {False: all_gradients(folder), True: all_gradients(folder, checkpointing=True)}
    runs.compute_dtype = lambda device: torch.bfloat16  # as on CUDA
    found["half"] = all_gradients(folder)
    save_after_a_pass(folder, "saved by one in bf16")
    torch.save(found, folder / "one.pt")


def start_ranks(command, world):
    """Starts a command on every rank -> the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"PYTHONFAULTHANDLER": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)}
    return [start(*command, env=env | {"RANK": str(rank)}) for rank in range(world)]


def ended(processes):
    """Waits for all -> (exit codes, what they said)."""
    try:
        said = [process.communicate(timeout=600)[1] for process in processes]
        return [process.returncode for process in processes], "".join(said)[-3000:]
    finally:
        for process in processes:
            process.kill()


def finish(command, world=1):
    """Runs a command on every rank to its end. Where a signal ended a rank it is started once more,
    aloud: once in several hundred starts a rank dies inside torch 2.13, releasing a tensor."""
    codes, said = ended(start_ranks(command, world))
    if min(codes) < 0:
        warnings.warn(f"{command}: exit codes {codes}, started again\n{said}", stacklevel=2)
        codes, said = ended(start_ranks(command, world))
    assert codes == [0] * world, said


# --------------------------------------------------------------------------------------------------
# the model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, what plain Python finds, what each of two ranks finds, what a group of one finds)"""
    folder = tmp_path_factory.mktemp("ranks")
    config = replace(cs.load_model(LM, device="cpu").config, tie_word_embeddings=False)
    untied = cs.init_weights(cs.Qwen3(config), std=0.2)
    cs.save_model(untied, cs.Tokenizer(TINY), folder / "untied")
    alone = all_gradients(folder) | {"samples": samples_of(untied)}
    finish([__file__, "two", folder], world=2)
    finish([__file__, "one", folder])
    return folder, alone, *(torch.load(folder / f"{n}.pt") for n in ("rank0", "rank1", "one"))


def near(a, b):
    """To 1e-5 of the largest value of the tensor."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", ["rm", "tied", "untied"])
def test_gradients_are_those_of_one_process(ranks, name, work, checkpointing):
    _, alone, *others = ranks
    wanted = alone[f"{name}, {work}"]
    for found in (other[checkpointing][f"{name}, {work}"] for other in others):
        assert near(found["loss"], wanted["loss"])
        assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
        assert set(found["grads"]) == set(wanted["grads"])
        for parameter, grad in wanted["grads"].items():
            assert grad.any() and near(found["grads"][parameter], grad), parameter
    held = [other[checkpointing][f"{name}, {work}"]["held"] for other in others[:2]]
    assert sum(held) == wanted["held"] and max(held) < 0.55 * sum(held)


@pytest.mark.parametrize("name", ["rm", "tied", "untied"])
def test_bf16_keeps_fp32_gradients_near_those_of_fp32(ranks, name):
    half, full = (found[f"{name}, unequal"] for found in (ranks[4]["half"], ranks[1]))
    assert {grad.dtype for grad in half["grads"].values()} == {torch.float32}
    a, b = (torch.cat([v["grads"][n].flatten() for n in full["grads"]]) for v in (half, full))
    assert not torch.equal(a, b) and torch.cosine_similarity(a, b, dim=0) > 0.99


def test_gathered_models_sample_score_and_are_saved_as_one(ranks):
    folder, alone, *both, _ = ranks
    (score,) = cs.RewardModel(ROOT / "tiny" / "reward", "cpu").score("Return the sum.", ["x = 1"])
    for found in both:
        assert sorted(found["samples"]) == alone["samples"] and found["half"] == torch.bfloat16
        assert found["score"] == pytest.approx(score, abs=1e-5)
    given = cs.load_model(folder / "untied", device="cpu").state_dict()
    for name in ("saved by two", "saved by one in bf16"):
        saved = cs.load_model(folder / name, device="cpu")
        assert all(torch.equal(given[name], p) for name, p in saved.named_parameters())


def test_a_rank_waits_for_a_rollout_of_an_hour(ranks):
    assert ranks[2]["waits"] > 3600


# --------------------------------------------------------------------------------------------------
# the trainers


TRAINERS = {
    "train_rm.py": "--pairs {}/pairs.jsonl --batch 8 --save-every 99 --steps 16",
    "grpo.py": "--rm tiny/reward --prompts 3 --group 4 --steps 6 --limit 5 --eval-group 2 "
    "--save-every 99 --max-new-tokens 96",
}


@pytest.mark.parametrize("script", TRAINERS)
def test_any_number_of_ranks_trains_as_one(tmp_path, script):
    """Started on two ranks, of which one is interrupted, gone on with on one, and on two again: the
    samples and verdicts of one process, numbers within 1e-4. Prompts do not divide by two."""
    write_pairs(tmp_path)
    command = [script, *TRAINERS[script].format(tmp_path).split(), "--device", "cpu", "--out"]
    whole, out = tmp_path / "one", tmp_path / "several"
    finish([*command, whole])
    for world, steps, number, code in ((2, 1, signal.SIGINT, 130), (1, 3, signal.SIGTERM, 143)):
        processes = start_ranks([*command, out], world)
        wait_for_rows(processes[-1], out, steps)
        processes[-1].send_signal(number)
        codes, said = ended(processes)
        assert codes == [code] * world and "Traceback" not in said, said
        assert saved_step(out) == len(rows(out)) >= steps  # nothing that was logged is lost
        assert len(list((out / "checkpoint" / "optimizer").iterdir())) == world
    finish([*command, out], world=2)
    one, several = rows(whole), rows(out)
    assert any(float(row["loss"]) for row in one)
    for a, b in zip(one, several, strict=True):
        for name in ("loss", "grad_norm", "accuracy", "pass_rate", "kl", "lr", "tokens", "eval"):
            if a.get(name):
                assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-3, abs=1e-4), name
    if script == "grpo.py":
        exact = ("step", "number", "completion", "code", "reason", "verdict")
        one, several = ([[row[k] for k in exact] for row in samples(run)] for run in (whole, out))
        assert len(one) == 6 * 3 * 4 and one == several
        scores = [[row["score"] or 0.0 for row in samples(run)] for run in (whole, out)]
        assert any(scores[0]) and scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_a_mistake_of_rank_0_ends_all_ranks_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    codes, said = ended(start_ranks(["train_rm.py", "--out", tmp_path / "file"], world=2))
    assert codes == [2, 2] and said.count("error: ") == 1 and "Traceback" not in said


def test_two_ranks_collect_the_pairs_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    command = "train_rm.py --collect-only --limit 30 --group 2 --max-new-tokens 96 --out".split()
    finish([*command, one])
    finish([*command, two], world=2)
    texts = {name: (one / name).read_text() for name in ("pairs.jsonl", "samples.jsonl")}
    assert len(texts["pairs.jsonl"].splitlines()) > 20
    assert texts == {name: (two / name).read_text() for name in texts}
    (two / "pairs.jsonl").unlink()  # as if killed in the middle of a line
    half = len(texts["samples.jsonl"]) // 2
    (two / "samples.jsonl").write_text(texts["samples.jsonl"][:half])
    finish([*command, two], world=2)
    assert texts == {name: (two / name).read_text() for name in texts}


if __name__ == "__main__":

    def main():
        task, folder = sys.argv[1], Path(sys.argv[2])
        world = int(os.environ["WORLD_SIZE"])
        rank = runs.setup("cpu")[0] if world > 1 else 0
        {"two": two_task, "one": one_task}[task](folder, rank, world)

    run_cli(main)
