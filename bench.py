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
from common import UserError, check_least, mean, parse_args
from extract import MODES
from hub import Config, model_folder, read_json
from metrics import best_of_k, estimate, parts_of
from pairs import DOMAINS, NOT_GRADED, execute, load_pairs, rollout
from problems import input_files, load_problems, read_rows
from runs import Run, compute_dtype, setup
from sandbox import Sandbox

log = partial(print, file=sys.stderr, flush=True)  # remarks: stdout has results only
TIMED = 16  # problems of a store whose tests run again, in a process each, for their seconds


@dataclass
class Args:  # of every command
    json: bool = False  # one JSON object a line


def print_rows(rows, as_json):
    """Results as tables, or as a JSON object a line."""
    if as_json:  # JSON has no nan
        lines = [json.dumps({k: None if v != v else v for k, v in row.items()}) for row in rows]
    else:
        lines = metrics.table(rows)
    for line in lines:
        print(line)


# --------------------------------------------------------------------------------------------------
# sample: fill a store


@dataclass
class SampleArgs(Args):
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
    sandbox: str | None = None  # isolation level: strict or basic; default: strict on Linux
    out: str = "out/samples"  # folder of the store
    seed: int = 0  # of sampling
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # go on with the store in --out; --no-resume starts over


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


def judged_rows(group, reward_model, sandbox):
    """One problem's answers (a list of Rollout), scored and executed -> rows of the store, with
    seconds a program: of a score, of all tests in a process and, now and then, of a process each.
    """
    problem, scores, seconds, rows = group[0].problem, {}, {}, []
    valid = list(dict.fromkeys(r.code for r in group if r.code is not None))
    if reward_model:
        found, seconds["score_s"] = seconds_of(reward_model.score, problem.prompt, valid)
        scores = dict(zip(valid, found))
    results, tests_s = seconds_of(execute, sandbox, group, stop_early=False)
    if problem.tests:
        seconds["tests_s"] = tests_s
    if problem.tests and group[0].number < TIMED:
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
    check_least(args, 0, "temperature top_k")
    check_least(args, 0.01, "top_p", most=1)
    device = setup(args.device)[2]
    problems = list(enumerate(load_problems(args.problems, args.limit, log=log)))
    inputs = input_files("--problems", args.problems) + hub.input_files("--model", args.model)
    inputs += [] if args.rm == "none" else hub.input_files("--rm", args.rm)
    model = load_model(args.model, "lm", compute_dtype(device), device)
    tokenizer = Tokenizer(args.model)
    reward_model = None if args.rm == "none" else RewardModel(args.rm, device)
    if reward_model:
        problems = readable(reward_model, problems, lambda item: item[1].prompt)
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
            for group in groups:
                judged = judged_rows(group, reward_model, sandbox)
                run.append([row | {"generate_s": seconds} for row in judged])
                bar.update()
    return [{"store": args.out, "problems": len(problems)} | milliseconds(run.samples())]


def milliseconds(rows):
    """{phase: median milliseconds a program}, over the answers where it was timed."""
    found = {}
    for phase in ("generate", "score", "tests", "tests_apart"):
        found[f"{phase}_ms"] = [1e3 * row[f"{phase}_s"] for row in rows if f"{phase}_s" in row]
    return {name: float(np.median(values)) for name, values in found.items() if values}


# --------------------------------------------------------------------------------------------------
# pass, bon: what a store says


@dataclass
class StoreArgs(Args):
    store: str = "out/samples"  # folder that `bench.py sample` filled
    seed: int = 0  # of the intervals, of drawn tests


def read_store(folder, limit=None):
    """Folder of a store -> {part of the data: [the rows of a problem]}, of the answers that
    execution graded and the first `limit` problems; the last part is all. Raises UserError."""
    file, groups = Path(folder, "samples.jsonl"), {}
    if not file.is_file():
        raise UserError(f"--store {folder}: no samples.jsonl; `python bench.py sample` makes one")
    rows = [row for row, _ in read_rows(str(file))]
    if any("verdicts" not in row for row in rows):
        raise UserError(f"--store {folder}: not filled by `bench.py sample`: rows without verdicts")
    for row in rows:
        if row["verdict"] not in NOT_GRADED:
            row["passed"] = row["verdict"] == "pass"
            groups.setdefault(row["problem"], []).append(row)
    if not groups:
        raise UserError(f"--store {folder}: no answer was graded; its problems have no tests")
    log(f"{folder}: {sum(map(len, groups.values()))} of {len(rows)} answers graded by execution")
    return parts_of(list(groups.values())[:limit], lambda group: group[0]["source"] or "all")


def bench_pass(args):
    """avg@n and the unbiased pass@k of a store."""
    rows = []
    for part, groups in read_store(args.store).items():
        passed = [[row["passed"] for row in group] for group in groups]
        n = max(map(len, passed))
        measures = {f"avg@{n}": list(map(mean, passed))}
        for k in (2**i for i in range(n.bit_length())):
            # Best of k by an oracle.
            measures[f"pass@{k}"] = [best_of_k(p, p, k) for p in passed if len(p) >= k]
        measures["valid"] = [mean([row["code"] is not None for row in g]) for g in groups]
        for name, values in measures.items():
            row = {"part": part, "problems": len(values), "measure": name}
            rows.append(row | estimate(values, args.seed))
    return rows


@dataclass
class BonArgs(StoreArgs):
    tests: list = field(default_factory=lambda: ["1", "3", "12"])  # numbers of tests that choose


def bench_bon(args):
    """Best of N: how often the program passes that a selector chooses of k samples. Value and
    interval are those of the largest k; so is the gap, the reward model's value minus the
    selector's on the same problems."""
    if not all(text.isdecimal() and int(text) for text in args.tests):
        raise UserError(f"--tests {' '.join(args.tests)}: expected numbers from 1 on")
    table, tests = [], list(map(int, args.tests))
    for part, some in read_store(args.store).items():
        n = max(map(len, some))
        kept = [rows for rows in some if len(rows) == n]
        if len(kept) < len(some):
            log(f"{len(some) - len(kept)} problems left out: fewer than {n} graded answers")
        scored = any(row["score"] is not None for rows in kept for row in rows)
        sizes = [2**i for i in range(n.bit_length())]
        found = [metrics.selected(rows, sizes, tests, scored, args.seed) for rows in kept]
        for name in found[0]:
            columns = list(zip(*(one[name] for one in found)))  # of each size, the problems' values
            row = {"part": part, "problems": len(kept), "chosen by": name}
            row |= {f"k={k}": mean(column) for k, column in zip(sizes, columns)}
            row |= estimate(columns[-1], args.seed)
            gaps = [one["reward model"][-1] - one[name][-1] for one in found] if scored else []
            table.append(row | estimate(gaps, args.seed, prefix="gap_"))
    times = milliseconds([row for rows in some for row in rows])  # the last part is all
    return [*table, {"median of a program": "", **times}]


# --------------------------------------------------------------------------------------------------
# rm: does the reward model prefer what is right?


@dataclass
class RmArgs(StoreArgs):
    store: str | None = None  # folder that `bench.py sample` filled
    pairs: str | None = None  # or: pair file (as train_rm.py), or rmbench:FILE
    rm: str = "out/rm"  # reward model: run folder, checkpoint folder or hub id
    limit: int | None = None  # rows of any data that is loaded
    device: str | None = None  # cpu or cuda; default: cuda where there is one


def bench_rm(args):
    """A reward model against the verdicts of a store, against pairs or RM-Bench."""
    if bool(args.pairs) == bool(args.store):
        raise UserError("bench.py rm needs one of --pairs SPEC and --store FOLDER")
    reward_model = RewardModel(args.rm, setup(args.device)[2])
    if args.store:
        return store_rows(reward_model, read_store(args.store, args.limit), args.seed)
    pairs = readable(reward_model, load_pairs(args.pairs, args.limit, log), lambda p: p.prompt)
    texts = [(p.prompt, side) for p in pairs for side in (p.chosen, p.rejected)]
    score_P2 = np.array(reward_model.score_many(texts)).reshape(-1, 2)
    if not args.pairs.startswith("rmbench:"):
        return metrics.pair_rows(pairs, score_P2, args.seed)
    if len(domains := {pair.source for pair in pairs}) < len(DOMAINS):
        log(f"only {', '.join(domains)}: the mean over domains is not RM-Bench's")
    return metrics.rm_bench_rows(pairs, score_P2, args.seed)


def store_rows(reward_model, parts, seed):
    """Does the score follow execution? A row a part: AUC within a problem, over problems with a
    passing and a failing program, where equal programs count once; and best of n."""
    *_, every = parts.values()
    texts = [(r["prompt"], r["code"]) for rows in every for r in rows if r["code"] is not None]
    score, table = dict(zip(texts, reward_model.score_many(texts), strict=True)), []

    def scores_and_passed(rows):
        # An answer without a program is chosen last.
        scores = [score.get((row["prompt"], row["code"]), -math.inf) for row in rows]
        return scores, [row["passed"] for row in rows]

    for part, some in parts.items():
        programs = [{row["code"]: row for row in rows if row["code"]} for rows in some]
        aucs = metrics.known_aucs(scores_and_passed(of_code.values()) for of_code in programs)
        best = [best_of_k(*scores_and_passed(rows), len(rows)) for rows in some]
        row = {"part": part, "problems": len(some), "programs": sum(map(len, programs))}
        row |= {"both": len(aucs)} | estimate(aucs, seed, prefix="auc ")
        table.append(row | estimate(best, seed, prefix="best of n "))
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
class MemoryArgs(Args):
    model: str = "qwen3-14b-shape"  # policy: a name of SHAPES, a folder or a hub id
    rm: str = "qwen3-8b-shape"  # reward model, likewise; none: execution as the reward
    gpus: int = 8  # ranks that share the states
    gpu_gib: float = 77.5  # usable GiB of a GPU: 79.6 of an 80 GB card without its context
    prompt: int = 4096  # longest prompt in tokens
    response: int = 16384  # longest answer in tokens
    token_budget: int = 20480  # tokens of a training pass
    checkpointing: bool = True  # blocks are computed again in the backward pass
    kl: bool = False  # there is a reference model (grpo.py --kl)


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
    every = "training reduction rollout scoring"
    root = P - layers * block  # embedding and head
    tokens = max(args.token_budget, length)  # a pass has one whole answer at least
    stored = 2 * policy.hidden_size if args.checkpointing else kept
    items = [
        (every, "weights and AdamW's moments, fp32", 12 * P / args.gpus),
        (every, "reference, bf16", 2 * P / args.gpus * args.kl),
        (every, "reward model, bf16", 2 * R / args.gpus),
        ("training reduction", "gradients, fp32", 4 * P / args.gpus),
        ("training reduction", "two gathered blocks, embedding, head", 2 * (2 * block + root)),
        # At the end of the backward pass, when the activations are gone.
        ("reduction", "largest gradient before it is shared out", 6 * max(block, root)),
        ("training", "activations kept", layers * stored * tokens),
        ("training", "a block computed again", kept * tokens * args.checkpointing),
        ("training", "keys and values of the prompt, and gradients", 2 * kv * args.prompt),
        ("training", "logits of 1024 tokens, fp32, five at once", 5 * 4 * V * 1024),
        ("rollout scoring", "decoding weights, bf16", 2 * P),
        ("scoring", "gathered reward model, bf16", 2 * R * (args.gpus > 1)),
        ("scoring", "16384 tokens that are scored", 16384 * (2 * rm_kv + rm_kept)),
    ]  # fmt: skip
    # As rows_that_fit: a row has its keys and values, logits and probabilities.
    free = args.gpu_gib * 2**30 - sum(size for phases, _, size in items if "rollout" in phases)
    row = kv * length + 24 * V
    rows = max(0, int(0.9 * free / row))
    return [*items, ("rollout", f"{rows} rows of {length} tokens at once", rows * row)]


def bench_memory(args):
    """Memory that a GPU needs in each phase of grpo.py, computed from the shapes."""
    check_least(args, 1, "gpus prompt response token_budget gpu_gib")

    def shape(name):
        return SHAPES.get(name) or Config.from_dict(read_json(model_folder(name) / "config.json"))

    rm, rows = None if args.rm == "none" else shape(args.rm), []
    items = memory_items(shape(args.model), rm, args)
    for phase in ("training", "reduction", "rollout", *(["scoring"] if rm else [])):
        found = {item: size / 2**30 for phases, item, size in items if phase in phases and size}
        found[f"total, of {args.gpu_gib:.1f}"] = sum(found.values())
        rows += [{"phase": phase, "item": item, "GiB": size} for item, size in found.items()]
    return rows


# --------------------------------------------------------------------------------------------------
# plot and show: what happened in a run


@dataclass
class PlotArgs(Args):
    runs: list = field(default_factory=lambda: ["out/grpo-rm"])  # run folders, or stores
    out: str = "out/plot.png"  # the picture


def run_panels(args_of):
    """{run folder: its arguments} -> {column: {arm: (steps, mean, lowest, highest of its runs)}}.

    Runs whose arguments differ in seed and folders only are one arm, which is called by the
    few arguments in which the arms differ, or else by their folders.
    """
    every, arms, panels = args_of.values(), {}, {}
    names = dict.fromkeys(name for args in every for name in args)
    names = [n for n in names if n not in ("seed", "out", "rm", "resume", "device")]
    differing = [n for n in names if len({str(args.get(n)) for args in every}) > 1]
    for run, args in args_of.items():
        label = " ".join(f"--{name.replace('_', '-')} {args.get(name)}" for name in differing)
        label = run if len(differing) > 4 else label  # of two scripts most flags differ
        with open(Path(run) / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = {int(row["step"]): row for row in csv.DictReader(file)}
        arms.setdefault(label or "all runs", []).append(rows)
    columns = [*metrics.SHOWN, "eval", "audit_auc"]
    for column, (label, runs) in itertools.product(columns, arms.items()):
        # The steps that have a value in all runs: not every step has an audit.
        steps = [s for s in runs[0] if all(run.get(s, {}).get(column) for run in runs)]
        values = np.array([[float(run[step][column]) for step in steps] for run in runs])
        if steps:
            line = steps, values.mean(0), values.min(0), values.max(0)
            seeds = f" ({len(runs)} runs: mean and range)" if len(runs) > 1 else ""
            panels.setdefault(column, {})[label + seeds] = line
    return panels


def store_panels(store):
    """The same of a store: {store and part: {selector: (k, share of problems solved, no band)}}."""
    panels = {}
    for row in bench_bon(BonArgs(store=store))[:-1]:
        shares = {name: value for name, value in row.items() if name.startswith("k=")}
        line = list(shares), *[list(shares.values())] * 3
        panels.setdefault(f"{store}\nbest of k, {row['part']}", {})[row["chosen by"]] = line
    return panels


def bench_plot(args):
    """A picture of runs over their steps (of several seeds: mean and range), or of stores: the
    share of problems solved by the best of k."""
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("bench.py plot needs matplotlib: pip install matplotlib") from None
    for run in args.runs:
        if not Path(run, "args.json").is_file():
            raise UserError(f"{run}: no args.json, so neither a run folder nor a store")
    if Path(args.out).suffix != ".png":
        raise UserError(f"--out {args.out}: expected the name of a .png file")
    args_of = {run: read_json(Path(run, "args.json"))["args"] for run in args.runs}
    stores = [run for run in args.runs if "n" in args_of[run]]  # a flag of `sample` only
    panels = run_panels({run: args_of[run] for run in args.runs if run not in stores})
    for store in stores:
        panels |= store_panels(store)
    if not panels:
        raise UserError(f"{', '.join(args.runs)}: no step in metrics.csv yet")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = matplotlib.figure.Figure((6 * columns, 4 * rows), dpi=120, layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, place)
        axis.set_title(title, fontsize="small")
        for label, (x, middle, low, high) in lines.items():
            look = {"color": f"C{labels.index(label)}", "marker": "." if len(x) < 20 else ""}
            axis.plot(x, middle, linewidth=1, label=label, **look)
            axis.fill_between(x, low, high, alpha=0.2, linewidth=0, color=look["color"])
            axis.set_xlabel("" if isinstance(x[0], str) else "step")
        axis.legend(fontsize="small")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    return [{"picture": args.out}]


@dataclass
class ShowArgs(Args):
    run: str = "out/grpo-rm"  # run folder of grpo.py (without a flag)
    step: int = 1  # step whose samples are shown
    limit: int = 4  # prompts


def bench_show(args):
    """A step's prompts and answers, best reward first."""
    check_least(args, 1, "step")
    groups = {}
    for row, _ in read_rows(f"{args.run}/samples.jsonl"):
        if row.get("step") == args.step:
            groups.setdefault(row["number"], []).append(row)
    if not groups:
        raise UserError(f"--step {args.step}: {args.run} has no sample of it")
    groups = list(groups.values())[: args.limit]
    if args.json:
        return [row for group in groups for row in group]
    for group in groups:
        print(f"{'=' * 80}\n{group[0]['problem']}: {group[0]['prompt']}")
        for row in sorted(group, key=lambda row: -(row["reward"] or 0.0)):
            valid = row["code"] is not None
            facts = [f"{name} {metrics.cell(row[name])}" for name in ("reward", "advantage")]
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
