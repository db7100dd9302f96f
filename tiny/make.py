"""Makes the two checkpoints of the toy world, stand-ins for models that need a GPU:

    python tiny/make.py                # both; about 20 minutes on 2 cores
    python tiny/make.py policy         # tiny/policy, in place of Qwen3-8B-Base
    python tiny/make.py reward         # tiny/reward, in place of Skywork-Reward-V2-Qwen3

The policy is pretrained on answers to toy problems in which most operations are written correctly
most of the time and the rest of the time with one systematic misconception (`>` for `>=`, `//` for
`%`, a wrong slice, no empty-list case); a tenth of the answers is malformed. So it starts with a
pass rate near 0.3, and sampling often finds a right answer: the situation that reinforcement
learning needs.

The reward model is general, not ours: it is trained by train_rm.py from the policy's trunk on
correct programs against randomly corrupted ones (a step replaced, dropped, swapped, or with another
constant), never on the policy's own mistakes. It knows its own kind of pair and less of the
policy's: the gap that fine-tuning on verified pairs closes.

Both are Qwen3 checkpoints in Hugging Face layout. Nothing outside this folder knows that they are
small.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import codescaler  # noqa: E402
import hub  # noqa: E402
from problems import Problem, policy_prompt  # noqa: E402
from tiny import world  # noqa: E402

CONFIG = dict(
    hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=384, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6,
    max_position_embeddings=2048,
)  # fmt: skip
VOCAB_SIZE, SPECIALS = 512, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
POLICY_STEPS, POLICY_BATCH, POLICY_LR = 1600, 32, 2e-3
GENERIC_PROBLEMS, PAIRS_A_PROBLEM, REWARD_LR = 20_000, 4, 1e-3

# --------------------------------------------------------------------------------------------------
# what the policy believes: operation -> the wrong expression it also writes

MISCONCEPTIONS = {
    "keep_gt": "[x for x in xs if x >= {k}]",
    "keep_ge": "[x for x in xs if x > {k}]",
    "keep_lt": "[x for x in xs if x <= {k}]",
    "keep_le": "[x for x in xs if x < {k}]",
    "keep_even": "[x for x in xs if x % 2]",
    "keep_odd": "[x for x in xs if x % 2 == 0]",
    "keep_multiple": "[x for x in xs if x // {k} == 0]",
    "drop_multiple": "[x for x in xs if x // {k} != 0]",
    "subtract": "[{k} - x for x in xs]",
    "multiply": "[x ** {k} for x in xs]",
    "quotient": "[x % {k} for x in xs]",
    "remainder": "[x // {k} for x in xs]",
    "square": "[x * 2 for x in xs]",
    "negate": "[-abs(x) for x in xs]",
    "absolute": "[-x for x in xs]",
    "cap": "[max(x, {k}) for x in xs]",
    "floor": "[min(x, {k}) for x in xs]",
    "first": "xs[{k}:]",
    "last": "xs[:{k}]",
    "skip_first": "xs[:{k}]",
    "skip_last": "xs[-{k}:]",
    "every_second": "xs[1::2]",
    "ascending": "sorted(xs)[::-1]",
    "descending": "xs[::-1]",
    "reverse": "sorted(xs, reverse=True)",
    "dedupe": "list(set(xs))",
    "running_sum": "[sum(xs[:i]) for i in range(len(xs))]",
    "running_max": "[max(xs[i:]) for i in range(len(xs))]",
    "differences": "[a - b for a, b in zip(xs, xs[1:])]",
    "pair_sums": "[a + b for a, b in zip(xs, xs)]",
    "count": "max(xs)",
    "distinct": "len(xs)",
    "max": "max(xs)",
    "min": "min(xs)",
    "first_item": "xs[0]",
    "last_item": "xs[-1]",
    "spread": "max(xs) - min(xs)",
}
# Other spellings of the right and of the same wrong expression. Each form occurs on both sides
# (`not x < k` is right for "at least", wrong for "greater than"), or the reward model would like a
# form, and the policy learn to write it.
RIGHT_SPELLINGS = {
    "keep_gt": "[x for x in xs if not x <= {k}]",
    "keep_ge": "[x for x in xs if not x < {k}]",
    "keep_lt": "[x for x in xs if not x >= {k}]",
    "keep_le": "[x for x in xs if not x > {k}]",
    "keep_even": "[x for x in xs if not x % 2]",
    "keep_odd": "[x for x in xs if x % 2 != 0]",
    "square": "[x * x for x in xs]",
    "negate": "[0 - x for x in xs]",
    "reverse": "list(reversed(xs))",
    "descending": "sorted(xs)[::-1]",
    "max": "max(xs) if xs else 0",
    "min": "min(xs) if xs else 0",
}
WRONG_SPELLINGS = {
    "keep_gt": "[x for x in xs if not x < {k}]",
    "keep_ge": "[x for x in xs if not x <= {k}]",
    "keep_lt": "[x for x in xs if not x > {k}]",
    "keep_le": "[x for x in xs if not x >= {k}]",
    "keep_even": "[x for x in xs if x % 2 != 0]",
    "keep_odd": "[x for x in xs if not x % 2]",
    "square": "[x + x for x in xs]",
    "negate": "[0 - abs(x) for x in xs]",
    "reverse": "sorted(xs)[::-1]",
    "descending": "list(reversed(xs))",
    "max": "max(xs) if len(xs) > 1 else 0",
    "min": "min(xs) if len(xs) > 1 else 0",
}
OPENINGS = [
    "Each step is one line.",
    "I do the steps in order.",
    "One line for each step.",
    "Here is the function.",
]


def misconception_rate(name):
    """How often the policy gets this operation wrong: between 0.20 and 0.45, fixed by its name."""
    return (
        0.20 + 0.25 * (zlib.crc32(f"rate {name}".encode()) % 1000) / 1000
        if name in MISCONCEPTIONS
        else 0.0
    )


def write_expression(op, k, rng, wrong):
    usual = MISCONCEPTIONS[op.name] if wrong else op.code
    spellings = WRONG_SPELLINGS if wrong else RIGHT_SPELLINGS
    return (spellings.get(op.name, usual) if rng.random() < 0.3 else usual).format(k=k)


def write_program(steps, result, rng):
    """Expressions -> source text, with one of a few names for the list."""
    name = rng.choice(["xs", "xs", "nums", "items"])
    lines = [f"    xs = {e}" for e in steps] + [f"    return {result}"]
    return re.sub(r"\bxs\b", name, "\n".join(["def solve(xs):", *lines]))


def policy_program(composition, rng):
    """A program as the policy's corpus has it: each operation wrong at its own rate."""
    ops, ks = [*composition.steps, composition.reduction], [*composition.constants, 0]
    expressions = [
        write_expression(op, k, rng, rng.random() < misconception_rate(op.name))
        for op, k in zip(ops, ks)
    ]
    return write_program(expressions[:-1], expressions[-1], rng)


def policy_answer(composition, rng):
    """A sentence and one fenced block, or (one in ten) something malformed."""
    program, opening = policy_program(composition, rng), rng.choice(OPENINGS)
    block = f"```python\n{program}\n```"
    kind = rng.random()
    if kind < 0.02:
        return opening
    if kind < 0.05:
        return f"{opening}\n\n{block}\n\nOr:\n\n```python\n{policy_program(composition, rng)}\n```"
    if kind < 0.09:  # a syntax error: one closing bracket or colon is missing
        places = [m.start() for m in re.finditer(r"[\])]|:\n", block)]
        at = rng.choice(places)
        block = block[:at] + block[at + 1 :]
    return f"{opening}\n\n{block}"


# --------------------------------------------------------------------------------------------------
# the policy


def train_tokenizer(texts, path):
    """Byte-level BPE of VOCAB_SIZE tokens with Qwen3's chat specials, digits one by one as in
    Qwen3's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    words = r"'s|'t| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n?|\s*\n|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))


def conversations(count, seed=0):
    """`count` (user turn, answer) of the policy's corpus."""
    rng = random.Random(f"corpus-{seed}")
    stream = world.stream("pretrain", seed)
    for _ in range(count):
        composition, statement, _ = next(stream)
        user = policy_prompt(Problem("", statement))
        yield user, policy_answer(composition, rng)


def make_policy(out=HERE / "policy", steps=POLICY_STEPS):
    """Pretrains tiny/policy."""
    started = time.time()
    corpus = list(conversations(steps * POLICY_BATCH))
    print(f"corpus: {len(corpus)} conversations, {time.time() - started:.0f}s")
    sample = [text for pair in corpus[:4000] for text in pair]
    train_tokenizer(sample + ["<|im_start|>user\n<|im_start|>assistant\n"] * 200, out)
    tokenizer = codescaler.Tokenizer(out)
    config = hub.Config(vocab_size=tokenizer.num_tokens, **CONFIG)
    model = codescaler.init_weights(codescaler.Qwen3(config, head="lm"), seed=0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=POLICY_LR, betas=(0.9, 0.95), weight_decay=0.1
    )
    end = tokenizer.encode("<|im_end|>")
    for step in range(steps):
        rows, starts = [], []
        for user, answer in corpus[step * POLICY_BATCH : (step + 1) * POLICY_BATCH]:
            prompt = codescaler.prompt_ids(tokenizer, user)
            rows.append(prompt + tokenizer.encode(answer) + end)
            starts.append([len(prompt)])
        ids_BT, lengths_B = codescaler.pad_rows(rows)
        target_T = torch.arange(1, ids_BT.shape[1])  # the state at a token predicts the next one
        mask_BT = (target_T >= torch.tensor(starts)) & (target_T < lengths_B[:, None])
        hidden_BTD, _ = model(ids_BT)
        logp_BT, _ = codescaler.token_logprobs(model, hidden_BTD[:, :-1], ids_BT[:, 1:], mask_BT)
        loss = -logp_BT.sum() / mask_BT.sum()
        for group in optimizer.param_groups:  # warmup, then linear to a tenth
            group["lr"] = POLICY_LR * min((step + 1) / 50, 1 - 0.9 * step / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step}/{steps} | loss {loss.item():.3f} | {time.time() - started:.0f}s",
                flush=True,
            )
    codescaler.save_model(model, tokenizer, out)


# --------------------------------------------------------------------------------------------------
# the general reward model


def corrupt(composition, rng):
    """Expressions of a right program, in any of their spellings, with one random change.

    Both sides of a pair have the same spellings and "insert" is as likely as "drop": a reward model
    that learned to like a spelling, or longer programs, would be found out by a policy within ten
    steps.
    """
    steps, result = right_expressions(composition, rng)
    i, kind = (
        rng.randrange(len(steps)),
        rng.choice(["replace", "constant", "drop", "insert", "swap", "reduce"]),
    )
    if kind in ("replace", "constant"):
        op = rng.choice(world.STEPS) if kind == "replace" else composition.steps[i]
        steps[i] = write_expression(op, rng.choice(op.constants), rng, wrong=False)
    elif kind == "drop":
        del steps[i]
    elif kind == "insert":
        for _ in range(rng.choice([1, 1, 2, 3])):
            op = rng.choice([*world.STEPS, *composition.steps])
            steps.insert(
                rng.randrange(len(steps) + 1),
                write_expression(op, rng.choice(op.constants), rng, wrong=False),
            )
    elif kind == "swap":
        j = rng.randrange(len(steps))
        steps[i], steps[j] = steps[j], steps[i]
    else:
        result = write_expression(rng.choice(world.REDUCTIONS), 0, rng, wrong=False)
    return steps, result


def right_expressions(composition, rng):
    steps = [
        write_expression(op, k, rng, wrong=False)
        for op, k in zip(composition.steps, composition.constants)
    ]
    return steps, write_expression(composition.reduction, 0, rng, wrong=False)


def is_policys_mistake(composition, steps, result):
    """Whether the corrupted program has, in place of a right expression, one that the policy would
    write."""
    tables = (MISCONCEPTIONS, WRONG_SPELLINGS)
    own = {
        t[op.name].format(k=k)
        for op, k in zip(composition.steps, composition.constants)
        for t in tables
        if op.name in t
    }
    new = set(steps) - set(composition.expressions()[0])
    return bool(own & new) or result in [t.get(composition.reduction.name) for t in tables]


def fails(steps, result, cases):
    try:
        return any(world.run_steps(steps, result, c["args"][0]) != c["expected"] for c in cases)
    except (IndexError, ValueError, ZeroDivisionError, TypeError):
        return True


def generic_pairs(count, seed=1):
    """Correct program against a corrupted one that fails a test, as rows of a pairs file, for
    `count` problems."""
    rng = random.Random(f"generic-{seed}")
    for number, (composition, statement, cases) in enumerate(world.stream("pretrain", seed)):
        if number == count:
            return
        for i in range(PAIRS_A_PROBLEM):
            while True:
                wrong = corrupt(composition, rng)
                if fails(*wrong, cases) and not is_policys_mistake(composition, *wrong):
                    break
            yield {
                "prompt": statement,
                "chosen": write_program(*right_expressions(composition, rng), rng),
                "rejected": write_program(*wrong, rng),
                "id": f"generic/{number}#{i}",
                "source": "generic",
            }


def make_reward(out=HERE / "reward", count=GENERIC_PROBLEMS):
    """Trains tiny/reward."""
    work = ROOT / "out" / "tiny-reward"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with open(work / "generic.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in generic_pairs(count))
    subprocess.run(
        [sys.executable, "train_rm.py", "--pairs", str(work / "generic.jsonl"),
         "--init", str(HERE / "policy"), "--out", str(work / "run"), "--lr", str(REWARD_LR),
         "--epochs", "1", "--center", "0", "--held-out", "0.03", "--save-every", "50"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    model = codescaler.load_model(work / "run" / "checkpoint", head="score")
    shutil.rmtree(out, ignore_errors=True)
    codescaler.save_model(model, codescaler.Tokenizer(work / "run" / "checkpoint"), out)


if __name__ == "__main__":
    what = sys.argv[1:] or ["policy", "reward"]
    if set(what) - {"policy", "reward"}:
        sys.exit(__doc__)
    if "policy" in what:
        make_policy()
    if "reward" in what:
        make_reward()
