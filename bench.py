"""Everything that evaluates. A command measures one thing and prints a table, or JSON with --json.

    python bench.py sample --n 16          # answers to toy:test, judged: 2 minutes on 2 CPU cores
    python bench.py pass                   # avg@n and pass@k of these samples
    python bench.py bon                    # best of N by reward model, majority, unit tests, ...
    python bench.py rm --store out/samples                  # does the score follow execution?
    python bench.py rm --pairs rmbench:total_dataset.json   # RM-Bench; or a file of pairs
    python bench.py memory --model qwen3-8b-shape --gpus 8  # GiB a GPU, computed
    python bench.py plot out/grpo-rm       # curves over the steps; of a store: best of N
    python bench.py show out/grpo-rm --step 3               # what the policy wrote

A store is a run folder that `sample` fills: its samples.jsonl has a row an answer (Rollout.row())
with the verdict of every test and the seconds that things took. Intervals are 95%, over problems.
"""

import csv
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import hub
import metrics
from codescaler import Qwen3, RewardModel, Tokenizer, load_model
from common import UserError, bootstrap, check_least, mean, parse_args, ranks
from extract import MODES
from hub import Config, model_folder, read_json
from metrics import best_of_k, estimate, pass_at_k
from pairs import DOMAINS, NOT_GRADED, execute, load_pairs, rollout
from problems import input_files, load_problems, read_rows
from runs import Run, compute_dtype, setup
from sandbox import Sandbox

log = partial(print, file=sys.stderr, flush=True)  # remarks: stdout has results only


def print_rows(rows, as_json):
    """Results as tables, or as a JSON object a line; rows with other columns begin a new table."""
    if as_json:
        for row in rows:  # JSON has no nan
            print(json.dumps({k: None if v != v else v for k, v in row.items()}))
        return
    for names, part in itertools.groupby(rows, key=list):
        part = list(part)
        lines = [names, *([cell(value) for value in row.values()] for row in part)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        sides = [str.ljust if isinstance(value, str) else str.rjust for value in part[0].values()]
        for line in lines:
            print("  ".join(side(*two) for side, *two in zip(sides, line, widths)).rstrip())
        print()


def cell(value):
    """A value as a table shows it."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


# --------------------------------------------------------------------------------------------------
# sample: fill a store


@dataclass
class SampleArgs:
    model: str = "tiny/policy"  # model that answers: folder, run folder or hub id
    rm: str = "out/rm"  # reward model that scores the programs; none: no scores
    problems: str = "toy:test"  # problems to answer (SPEC[,SPEC...])
    limit: int | None = None  # rows of any data that is loaded
    n: int = 16  # answers to a problem
    temperature: float = 1.0  # of sampling; 0 is greedy
    top_p: float = 1.0  # nucleus sampling: the likeliest tokens that have this probability together
    top_k: int = 0  # sample from so many of the likeliest tokens; 0: from all
    max_new_tokens: int = 160  # longest answer
    prompt_style: str = "plain"  # plain, or lcb: LiveCodeBench's prompt
    enable_thinking: bool = True  # False: answers begin behind an empty think block
    extract: str = "strict"  # extraction mode: strict, paper, last or recover
    timed: int = 16  # problems whose tests run again, in a process each, for their seconds
    sandbox: str | None = None  # isolation level: strict or basic; default: strict on Linux
    out: str = "out/samples"  # folder of the store
    seed: int = 0  # of sampling
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # go on with the store in --out; --no-resume starts over
    json: bool = False  # one JSON object a line


def readable(reward_model, items, prompt_of):
    """The items whose prompt leaves the reward model room for a program; the others are counted."""
    kept = [item for item in items if reward_model.fits(prompt_of(item))]
    if not kept:
        raise UserError(f"--rm reads {reward_model.max_length} tokens: every statement is longer")
    log(f"{len(items) - len(kept)} of {len(items)} left out: longer than the reward model reads")
    return kept


def seconds_of(function, *args, **named):
    """-> (what the call returns, how many seconds it took)."""
    begin = time.perf_counter()
    return function(*args, **named), time.perf_counter() - begin


def judged_rows(group, reward_model, sandbox, apart):
    """One problem's answers (a list of Rollout), scored and executed -> rows of the store, with
    seconds a program: of a score, of all tests in a process and, if `apart`, of a process each."""
    problem, scores, seconds, rows = group[0].problem, {}, {}, []
    valid = list(dict.fromkeys(r.code for r in group if r.code is not None))
    if reward_model:
        found, seconds["score_s"] = seconds_of(reward_model.score, problem.prompt, valid)
        scores = dict(zip(valid, found))
    results, tests_s = seconds_of(execute, sandbox, group, stop_early=False)
    if problem.tests:
        seconds["tests_s"] = tests_s
    if problem.tests and apart:
        alone = [dataclasses.replace(problem.tests, cases=[case]) for case in problem.tests.cases]
        jobs = [(code, tests) for code in valid for tests in alone]
        _, seconds["tests_apart_s"] = seconds_of(sandbox.map, jobs, stop_early=False)
    seconds = {name: total / len(valid) for name, total in seconds.items() if valid}
    for r, result in zip(group, results, strict=True):
        r.score = scores.get(r.code)
        verdicts, answer = (result.verdicts, result.answer) if result else ([], None)
        rows.append(r.row() | {"verdicts": verdicts, "answer": answer} | seconds)
    return rows


def bench_sample(args):
    """Fills a store: n answers to each problem, extracted, scored and graded by all tests. The
    same command goes on after a kill."""
    common.check_choice(args, extract=MODES, prompt_style=("plain", "lcb"))
    check_least(args, 1, "n max_new_tokens")
    check_least(args, 0, "temperature top_k timed")
    check_least(args, 0.01, "top_p", most=1)
    device, has_rm = setup(args.device)[2], args.rm != "none"
    problems = list(enumerate(load_problems(args.problems, args.limit, log=log)))
    inputs = input_files("--problems", args.problems)
    inputs += hub.input_files("--model", args.model)
    inputs += hub.input_files("--rm", args.rm) if has_rm else []
    model = load_model(args.model, "lm", compute_dtype(device), device)
    tokenizer, reward_model = Tokenizer(args.model), None
    if has_rm:
        reward_model = RewardModel(args.rm, device)
        problems = readable(reward_model, problems, lambda item: item[1].prompt)
        reward_model.score("A first pass", ["is slow, and not timed."])
    run = Run(dataclasses.replace(args, json=False), ["step"], inputs)
    # A kill may have left a part of a problem's rows: it is done again.
    count = Counter(row["problem"] for row in run.samples())
    rows = [row for row in run.samples() if count[row["problem"]] == args.n]
    common.write_jsonl(run.dir / "samples.jsonl", rows)
    left = [item for item in problems if count[item[1].id] != args.n]
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sampling |= {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "policy": args.model}
    with Sandbox(level=args.sandbox) as sandbox, tqdm(total=len(left), disable=None) as bar:
        for at in range(0, len(left), 16):
            numbers, asked = zip(*left[at : at + 16])
            groups, seconds = seconds_of(
                rollout, model, tokenizer, asked, args.n, numbers, args.extract, args.prompt_style,
                args.enable_thinking, **sampling,
            )  # fmt: skip
            seconds /= args.n * len(asked)
            for number, group in zip(numbers, groups):
                judged = judged_rows(group, reward_model, sandbox, number < args.timed)
                run.append([row | {"generate_s": seconds} for row in judged])
                bar.update()
    return [{"store": args.out, "problems": len(problems)} | milliseconds(run.samples())]


def milliseconds(rows):
    """{phase: median milliseconds a program}, over the problems where it was timed."""
    by_problem, found = {row["problem"]: row for row in rows}.values(), {}
    for phase in ("generate", "score", "tests", "tests_apart"):
        seconds = [row[f"{phase}_s"] for row in by_problem if f"{phase}_s" in row]
        found |= {f"{phase}_ms": 1e3 * float(np.median(seconds))} if seconds else {}
    return found


# --------------------------------------------------------------------------------------------------
# pass, bon: what a store says


@dataclass
class StoreArgs:
    store: str = "out/samples"  # folder that `bench.py sample` filled
    seed: int = 0  # of the intervals and of drawn tests
    json: bool = False  # one JSON object a line


def read_store(folder):
    """Folder of a store -> {problem id: [row of an answer]}, of the answers that execution graded.
    Raises UserError where there are none."""
    file, groups = Path(folder) / "samples.jsonl", {}
    if not file.is_file():
        raise UserError(f"--store {folder}: no samples.jsonl; `python bench.py sample` makes one")
    rows = [row for row, _ in read_rows(str(file))]
    if any("verdicts" not in row for row in rows):
        raise UserError(f"--store {folder}: not filled by `bench.py sample`: rows without verdicts")
    for row in rows:
        if row["verdict"] not in NOT_GRADED:
            groups.setdefault(row["problem"], []).append(row)
    if not groups:
        raise UserError(f"--store {folder}: no answer was graded; its problems have no tests")
    log(f"{folder}: {sum(map(len, groups.values()))} of {len(rows)} answers graded by execution")
    return groups


def parts_of(groups):
    """{part of the data: its groups}, and "all" where there are several."""
    parts = {}
    for problem, rows in groups.items():
        parts.setdefault(rows[0]["source"] or "all", {})[problem] = rows
    return parts if len(parts) == 1 else {**parts, "all": groups}


def bench_pass(args):
    """avg@n and the unbiased pass@k of a store."""
    rows = []
    for part, groups in parts_of(read_store(args.store)).items():
        counts = [(len(g), sum(r["verdict"] == "pass" for r in g)) for g in groups.values()]
        n = max(size for size, _ in counts)
        measures = {f"avg@{n}": [passing / size for size, passing in counts]}
        for k in (2**i for i in range(n.bit_length())):
            measures[f"pass@{k}"] = [pass_at_k(*count, k) for count in counts if count[0] >= k]
        measures["valid"] = [mean([row["code"] is not None for row in g]) for g in groups.values()]
        for name, values in measures.items():
            row = {"part": part, "problems": len(values), "measure": name}
            rows.append(row | estimate(values, args.seed))
    return rows


@dataclass
class BonArgs(StoreArgs):
    tests: list = field(default_factory=lambda: ["1", "3", "12"])  # numbers of tests that choose


def best_of_n(groups, tests, seed=0):
    """-> ([1, 2, 4, ... up to n], {selector: values [problems, sizes]}), of the problems with as
    many graded answers as any has."""
    n = max(map(len, groups.values()))
    kept = [rows for rows in groups.values() if len(rows) == n]
    if len(kept) < len(groups):
        log(f"{len(groups) - len(kept)} problems left out: fewer than {n} graded answers")
    scored = any(row["score"] is not None for rows in kept for row in rows)
    sizes = [2**i for i in range(n.bit_length())]
    values = [metrics.selected(rows, sizes, tests, scored, seed) for rows in kept]
    return sizes, {name: np.array([v[name] for v in values]) for name in values[0]}


def bench_bon(args):
    """Best of N: how often the program passes that a selector chooses of k samples. The interval
    is that of the largest k; so is the gap, the reward model's value minus the selector's."""
    if not all(text.isdecimal() and int(text) for text in args.tests):
        raise UserError(f"--tests {' '.join(args.tests)}: expected numbers from 1 on")
    groups, rows = read_store(args.store), []
    for part, some in parts_of(groups).items():
        sizes, table = best_of_n(some, list(map(int, args.tests)), args.seed)
        for name, values in table.items():
            row = {"part": part, "problems": len(values), "chosen by": name}
            row |= {f"k={k}": mean(column.tolist()) for k, column in zip(sizes, values.T)}
            row |= estimate(values[:, -1], args.seed)
            gaps = (table["reward model"] - values)[:, -1] if "reward model" in table else []
            rows.append(row | estimate(gaps, args.seed, prefix="gap_"))
    every = [row for group in groups.values() for row in group]
    return [*rows, {"median of a program": "", **milliseconds(every)}]


# --------------------------------------------------------------------------------------------------
# rm: does the reward model prefer what is right?


@dataclass
class RmArgs:
    rm: str = "out/rm"  # reward model: run folder, checkpoint folder or hub id
    pairs: str | None = None  # pair file (as train_rm.py), or rmbench:FILE
    store: str | None = None  # folder that `bench.py sample` filled
    limit: int | None = None  # rows of any data that is loaded
    seed: int = 0  # of the intervals
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    json: bool = False  # one JSON object a line


def bench_rm(args):
    """A reward model against pairs, RM-Bench or the verdicts of a store."""
    if bool(args.pairs) == bool(args.store):
        raise UserError("bench.py rm needs one of --pairs SPEC and --store FOLDER")
    reward_model = RewardModel(args.rm, setup(args.device)[2])
    if args.store:
        groups = itertools.islice(read_store(args.store).items(), args.limit)
        return store_rows(reward_model, dict(groups), args.seed)
    pairs = readable(reward_model, load_pairs(args.pairs, args.limit, log), lambda p: p.prompt)
    texts = [(p.prompt, side) for p in pairs for side in (p.chosen, p.rejected)]
    score_P2 = np.array(reward_model.score_many(texts)).reshape(-1, 2)
    if not args.pairs.startswith("rmbench:"):
        return metrics.pair_rows(pairs, score_P2, args.seed)
    if len(domains := {pair.source for pair in pairs}) < len(DOMAINS):
        log(f"only {', '.join(domains)}: the mean over domains is not RM-Bench's")
    return metrics.rm_bench_rows(pairs, score_P2, args.seed)


def store_rows(reward_model, groups, seed):
    """Does the score follow execution? A row a part: AUC within a problem, over problems with a
    passing and a failing program; best of n; and the rank correlation of score and share of tests
    passed, over all programs. Equal programs count once in the first and the last."""
    table = []
    for part, some in parts_of(groups).items():
        rows = {(r["problem"], r["code"]): r for g in some.values() for r in g if r["code"]}
        texts = [(row["prompt"], row["code"]) for row in rows.values()]
        score = dict(zip(rows, reward_model.score_many(texts), strict=True))
        programs = [(row["problem"], row["verdict"] == "pass") for row in rows.values()]
        within = [value for value, _ in metrics.auc_rows(programs, score.values())]
        best = []
        for problem, group in some.items():
            scores = [score.get((problem, r["code"]), -math.inf) for r in group]
            best.append(best_of_k(scores, [r["verdict"] == "pass" for r in group], len(group)))
        row = {"part": part, "problems": len(some), "programs": len(rows), "both": len(within)}
        row |= estimate(within, seed, prefix="auc ") | estimate(best, seed, prefix="best of n ")
        shares = ranks([row["pass_rate"] for row in rows.values()])
        row["spearman"] = float(np.corrcoef(ranks(list(score.values())), shares)[0, 1])
        table.append(row)
    return table


# --------------------------------------------------------------------------------------------------
# memory: does it fit?

SHAPES = {  # of the published models, and two small ones; `heads` of a kv size of 8 x 128
    f"{name}-shape": Config(vocab, D, layers, heads, kv, K, M, tie_word_embeddings=tied)
    for name, vocab, D, layers, heads, kv, K, M, tied in (
        ("tiny", 8192, 128, 4, 4, 2, 32, 384, True),
        ("small", 32768, 512, 8, 8, 4, 64, 1536, True),
        ("qwen3-0.6b", 151936, 1024, 28, 16, 8, 128, 3072, True),
        ("qwen3-1.7b", 151936, 2048, 28, 16, 8, 128, 6144, True),
        ("qwen3-4b", 151936, 2560, 36, 32, 8, 128, 9728, True),
        ("qwen3-8b", 151936, 4096, 36, 32, 8, 128, 12288, False),
        ("qwen3-14b", 151936, 5120, 40, 40, 8, 128, 17408, False),
    )
}  # fmt: skip


@dataclass
class MemoryArgs:
    model: str = "qwen3-14b-shape"  # policy: a name of SHAPES, a folder or a hub id
    rm: str = "qwen3-8b-shape"  # reward model, likewise; none: execution as the reward
    gpus: int = 8  # ranks that share the states
    gpu_gib: float = 77.5  # usable GiB of a GPU: 79.6 of an 80 GB card without its context
    prompt: int = 4096  # longest prompt in tokens
    response: int = 16384  # longest answer in tokens
    token_budget: int = 20480  # tokens of a training pass
    checkpointing: bool = True  # blocks are computed again in the backward pass
    kl: bool = False  # there is a reference model (grpo.py --kl)
    json: bool = False  # one JSON object a line


def num_parameters(config, head="lm"):
    """-> (parameters of a model, of one of its blocks), counted on a model without memory."""
    with torch.device("meta"):
        model = Qwen3(config, head)
    return [sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0])]


def token_bytes(c):
    """-> (bytes of a token's keys and values, bytes that a block keeps of a token for its backward
    pass), in bf16: residuals and norms (4 D); q, k, v, q and k after norm and rotation, keys and
    values joined to the prompt's, the attention's output; four of the MLP's width."""
    D, H, G, K = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    kept = 4 * D + (H + 2 * G) * K + 2 * (H + G) * K + 2 * G * K + H * K + 4 * c.intermediate_size
    return 4 * c.num_hidden_layers * G * K, 2 * kept


def memory_items(policy, rm, args):
    """[(phases, item, bytes on one GPU)]; a phase needs all of its items at once."""
    (P, block), (kv, kept), V = num_parameters(policy), token_bytes(policy), policy.vocab_size
    R, (rm_kv, rm_kept) = (num_parameters(rm, "score")[0], token_bytes(rm)) if rm else (0, (0, 0))
    layers, length = policy.num_hidden_layers, args.prompt + args.response
    every = "train reduce roll score"
    root = P - layers * block  # embedding and head
    tokens = max(args.token_budget, length)  # a pass has one whole answer at least
    stored = 2 * policy.hidden_size if args.checkpointing else kept
    items = [
        (every, "weights and AdamW's moments, fp32", 12 * P / args.gpus),
        (every, "reference, bf16", 2 * P / args.gpus * args.kl),
        (every, "reward model, bf16", 2 * R / args.gpus),
        ("train reduce", "gradients, fp32", 4 * P / args.gpus),
        ("train reduce", "two gathered blocks, embedding and head, bf16", 2 * (2 * block + root)),
        # At the end of the backward pass, when the activations are gone.
        ("reduce", "largest gradient before it is shared out", 6 * max(block, root)),
        ("train", "activations kept", layers * stored * tokens),
        ("train", "a block computed again", kept * tokens * args.checkpointing),
        ("train", "keys and values of the prompt, and gradients", 2 * kv * args.prompt),
        ("train", "logits of 1024 tokens, fp32, five at once", 5 * 4 * V * 1024),
        ("roll score", "decoding weights, bf16", 2 * P),
        ("score", "gathered reward model, bf16", 2 * R * (args.gpus > 1)),
        ("score", "16384 tokens that are scored", 16384 * (2 * rm_kv + rm_kept)),
    ]  # fmt: skip
    # As rows_that_fit: a row has its keys and values, logits and probabilities.
    free = args.gpu_gib * 2**30 - sum(size for phases, _, size in items if "roll" in phases)
    row = kv * length + 24 * V
    rows = max(0, int(0.9 * free / row))
    return [*items, ("roll", f"{rows} rows of {length} tokens at once", rows * row)]


def bench_memory(args):
    """Memory that a GPU needs in each phase of grpo.py, computed from the shapes."""
    check_least(args, 1, "gpus prompt response token_budget gpu_gib")

    def shape(name):
        return SHAPES.get(name) or Config.from_dict(read_json(model_folder(name) / "config.json"))

    rm, rows = None if args.rm == "none" else shape(args.rm), []
    items = memory_items(shape(args.model), rm, args)
    phases = {"train": "training", "reduce": "sharing of gradients", "roll": "rollout"}
    for key, phase in (phases | ({"score": "scoring"} if rm else {})).items():
        found = {item: size / 2**30 for keys, item, size in items if key in keys and size}
        found[f"total, of {args.gpu_gib:.1f}"] = sum(found.values())
        rows += [{"phase": phase, "item": item, "GiB": size} for item, size in found.items()]
    return rows


# --------------------------------------------------------------------------------------------------
# plot and show: what happened in a run


@dataclass
class PlotArgs:
    runs: list = field(default_factory=list)  # run folders of a trainer, or stores (without a flag)
    out: str = "out/plots"  # folder of the pictures
    json: bool = False  # one JSON object a line


PANELS = {
    "reward": "mean reward, each arm by its own", "pass_rate": "share that passes all tests",
    "valid_rate": "share with a valid program", "eval": "held out: avg@n",
    "audit_auc": "held out: AUC of the reward", "kl": "KL to the initial policy",
    "length": "tokens an answer", "entropy": "entropy of a token (nats)",
    "accuracy": "pair accuracy of a batch", "margin": "score of chosen - rejected",
    "loss": "loss", "grad_norm": "gradient norm",
}  # fmt: skip


def run_panels(args_of):
    """{run folder: its arguments} -> {measure: {arm: (steps, mean, lowest, highest of its runs)}}.

    Runs whose arguments differ in seed and folders only are one arm, which is called by the
    arguments in which the arms differ.
    """
    every, arms, panels = list(args_of.values()), {}, {}
    names = [n for n in every[0] if n not in ("seed", "out", "rm", "resume", "device")]
    differing = [n for n in names if len({str(args.get(n)) for args in every}) > 1]
    for run, args in args_of.items():
        label = " ".join(f"--{name.replace('_', '-')} {args.get(name)}" for name in differing)
        with open(Path(run) / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        label = label or ("all runs" if len(every) > 1 else run)
        arms.setdefault(label, []).append({int(row["step"]): row for row in rows})
    for column, measure in PANELS.items():
        lines = {}
        for label, runs in arms.items():
            # The steps that have a value in all runs: not every step has an audit.
            steps = [s for s in runs[0] if all(run.get(s, {}).get(column) for run in runs)]
            values = np.array([[float(run[step][column]) for step in steps] for run in runs])
            seeds = f" ({len(runs)} seeds: mean and range)" if len(runs) > 1 else ""
            lines[label + seeds] = steps, values.mean(0), values.min(0), values.max(0)
        if any(steps for steps, *_ in lines.values()):
            panels[measure] = lines
    if not panels:
        raise UserError(f"{', '.join(args_of)}: no step in metrics.csv yet")
    return panels


def store_panels(store):
    """The same of a store: {title: {selector: (k, share of problems solved, its interval)}}, the
    best selector first."""
    sizes, table = best_of_n(read_store(store), [1, 3])
    lines = {}
    for name, values in sorted(table.items(), key=lambda item: -item[1][:, -1].mean()):
        low = high = values.mean(0)
        if name == "reward model":
            name, (low, high) = f"{name} (95% interval)", zip(*(bootstrap(v)[1:] for v in values.T))
        lines[name] = list(map(str, sizes)), values.mean(0), low, high
    return {f"{store}: best of k, chosen by ...\nshare of {len(values)} problems solved": lines}


def draw(figure, panels, xlabel):
    """A panel a measure, three a row; a line a label, with its band; one legend for all."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(max(7, 4 * columns), 4.5 if rows == 1 else 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, lines) in itertools.zip_longest(axes, panels.items(), fillvalue=("", {})):
        axis.set_visible(bool(lines))
        for label, (x, middle, low, high) in lines.items():
            axis.plot(x, middle, marker="." if len(x) < 20 else "", linewidth=1, label=label)
            axis.fill_between(x, low, high, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel=xlabel)
        if xlabel == "step":
            axis.xaxis.get_major_locator().set_params(integer=True)
    place = "outside lower center" if len(panels) > 1 else "outside right center"
    figure.legend(*axes[0].get_legend_handles_labels(), loc=place)


def bench_plot(args):
    """Pictures of runs over their steps, and of stores: best of k by selector."""
    if not args.runs:
        raise UserError("bench.py plot needs run folders or stores: python bench.py plot out/rm")
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("bench.py plot needs matplotlib: pip install matplotlib") from None
    for run in args.runs:
        if not (Path(run) / "args.json").is_file():
            raise UserError(f"{run}: no args.json, so neither a run folder nor a store")
    args_of = {run: read_json(Path(run) / "args.json")["args"] for run in args.runs}
    trained = {run: found for run, found in args_of.items() if "n" not in found}
    pictures = {"curves": (run_panels(trained), "step")} if trained else {}
    for store in [run for run in args_of if run not in trained]:
        name = "bon-" + "-".join(Path(store).parts)  # stores of several runs have one last name
        pictures[name.replace("/", "")] = store_panels(store), "k: answers to choose from"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, (panels, xlabel) in pictures.items():
        figure = matplotlib.figure.Figure(layout="constrained", dpi=120)
        draw(figure, panels, xlabel)
        figure.savefig(f"{args.out}/{name}.png")
    return [{"picture": f"{args.out}/{name}.png"} for name in pictures]


@dataclass
class ShowArgs:
    run: str = "out/grpo-rm"  # run folder of grpo.py (without a flag)
    step: int = 1  # step whose samples are shown
    limit: int = 4  # prompts
    json: bool = False  # one JSON object a line


def bench_show(args):
    """A step's prompts and answers, best reward first."""
    check_least(args, 1, "step")
    file, groups = Path(args.run) / "samples.jsonl", {}
    if not file.is_file():
        raise UserError(f"no samples.jsonl in {args.run!r}: give a run folder of grpo.py")
    for row, _ in read_rows(str(file)):
        if row.get("step") == args.step:
            groups.setdefault(row["number"], []).append(row)
    if not groups:
        raise UserError(f"--step {args.step}: {file} has no sample of it")
    groups = list(groups.values())[: args.limit]
    if args.json:
        return [row for group in groups for row in group]
    for group in groups:
        print(f"{'=' * 80}\n{group[0]['problem']}: {group[0]['prompt']}")
        for row in sorted(group, key=lambda row: -(row["reward"] or 0.0)):
            facts = [f"{name} {cell(row[name])}" for name in ("score", "reward", "advantage")]
            valid = row["code"] is not None
            facts += [f"tests: {row['verdict']}" if valid else f"no program: {row['reason']}"]
            print(f"--- {' | '.join(facts)}\n{row['code'] if valid else row['completion']}")
    return []


# --------------------------------------------------------------------------------------------------

COMMANDS = {  # name: what it does, its flags, the one that is given without a flag
    "sample": (bench_sample, SampleArgs), "pass": (bench_pass, StoreArgs),
    "bon": (bench_bon, BonArgs), "rm": (bench_rm, RmArgs), "memory": (bench_memory, MemoryArgs),
    "plot": (bench_plot, PlotArgs, "runs"), "show": (bench_show, ShowArgs, "run"),
}  # fmt: skip


def main():
    name, *flags = sys.argv[1:] or [""]
    if name not in COMMANDS:
        print(__doc__)
        sys.exit(0 if name in ("-h", "--help") else 2)
    command, cls, *positional = COMMANDS[name]
    args = parse_args(cls, flags, *positional, about=command.__doc__)
    for flag, least in (("seed", 0), ("limit", 1)):
        if hasattr(args, flag):
            check_least(args, least, flag)
    print_rows(command(args), args.json)


if __name__ == "__main__":
    common.run_cli(main)
