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
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from codescaler import RewardModel, Tokenizer, load_model
from common import UserError, bootstrap, check_least, mean, parse_args, ranks
from extract import MODES
from hub import Config, model_folder, read_json, weight_files
from metrics import auc_rows
from pairs import DOMAINS, NOT_GRADED, execute, load_pairs, problem_of, rmbench_item, rollout
from problems import input_files, load_problems, read_rows
from runs import Run, compute_dtype, setup
from sandbox import Sandbox

log = partial(print, file=sys.stderr, flush=True)  # remarks: stdout has results only


def print_rows(rows, as_json):
    """Results as tables, or as a JSON object a line; rows with other columns begin a new table."""
    if as_json:  # which has no nan
        rows = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        return print("\n".join(map(json.dumps, rows)))
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


def estimate(values, seed, groups=None):
    """Values of problems -> columns of a table: their mean and its interval."""
    found = bootstrap(values, groups, seed=seed) if len(values) else [math.nan] * 3
    return dict(zip(("value", "low", "high"), found))


# --------------------------------------------------------------------------------------------------
# estimators: each is compared with brute force in tests/test_bench.py


def pass_at_k(n, c, k):
    """P(one of k samples passes) when c of n passed: 1 - C(n-c, k) / C(n, k), which is unbiased
    (Chen et al. 2021).

    >>> round(pass_at_k(4, 1, 2), 3)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def best_of_k(scores, passed, k):
    """P(the sample with the highest score of k passes), the mean over all k-subsets of the n
    samples; equal scores are chosen from by lot.

    >>> best_of_k([3.0, 2.0, 1.0], [False, True, True], k=2)   # of 3 pairs, 2 hold the first
    0.3333333333333333
    """
    n, above, value = len(scores), 0, 0.0
    ranked = sorted(zip(scores, passed, strict=True), key=lambda sample: -sample[0])
    for _, tied in itertools.groupby(ranked, key=lambda sample: sample[0]):
        tied = [right for _, right in tied]
        # Subsets that hold one of these and none above them.
        ways = math.comb(n - above, k) - math.comb(n - above - len(tied), k)
        value += ways * mean(tied)
        above += len(tied)
    return value / math.comb(n, k)


def majority_at_k(answers, passed, k, rounds=200, seed=0):
    """P(a sample with the most frequent answer of k passes), the mean over `rounds` random
    subsets. None is no answer and has no vote; where nobody votes any sample is chosen."""
    rng, values = np.random.default_rng(seed), []
    for _ in range(rounds):
        drawn = rng.permutation(len(answers))[:k]
        votes = Counter(answers[i] for i in drawn if answers[i] is not None)
        most = max(votes.values(), default=0)
        values.append(mean([passed[i] for i in drawn if votes[answers[i]] == most]))
    return mean(values)


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
    top_p: float = 1.0  # sample from the likeliest tokens with this probability in all
    top_k: int = 0  # sample from so many of the likeliest tokens; 0: from all
    max_new_tokens: int = 160  # longest answer
    prompt_style: str = "plain"  # plain, or lcb: LiveCodeBench's prompt
    enable_thinking: bool = True  # False: answers begin behind an empty think block
    extract: str = "strict"  # extraction mode: strict, paper, last or recover
    timed: int = 16  # problems whose tests run again for their seconds: together, and one by one
    sandbox: str | None = None  # isolation level: strict or basic; default: strict on Linux
    out: str = "out/samples"  # folder of the store
    seed: int = 0  # of sampling
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # go on with the store in --out; --no-resume starts over
    json: bool = False  # one JSON object a line


def readable(reward_model, items, prompt_of):
    """The items whose prompt leaves the reward model room for a program; the others are counted."""
    kept = [item for item in items if reward_model.fits(prompt_of(item))]
    log(f"{len(items) - len(kept)} of {len(items)} left out: longer than the reward model reads")
    return kept


def judged_rows(group, reward_model, sandbox, timed):
    """One problem's answers (a list of Rollout), scored and executed -> rows of the store, with
    seconds a program: of a score and, if `timed`, of all tests in one process and in one each."""
    problem, scores, seconds, rows = group[0].problem, {}, {}, []
    valid = list(dict.fromkeys(r.code for r in group if r.code is not None))
    if reward_model and valid:
        begin = time.perf_counter()
        scores = dict(zip(valid, reward_model.score(problem.prompt, valid)))
        seconds["score_s"] = (time.perf_counter() - begin) / len(valid)
    results = execute(sandbox, group, stop_early=False)
    if timed and valid and problem.tests:
        apart = [dataclasses.replace(problem.tests, cases=[case]) for case in problem.tests.cases]
        for name, suites in {"tests_s": [problem.tests], "tests_apart_s": apart}.items():
            begin = time.perf_counter()
            sandbox.map([(code, suite) for code in valid for suite in suites], stop_early=False)
            seconds[name] = (time.perf_counter() - begin) / len(valid)
    for r, result in zip(group, results, strict=True):
        r.score = scores.get(r.code)
        verdicts, answer = (result.verdicts, result.answer) if result else ([], None)
        rows.append(r.row() | {"verdicts": verdicts, "answer": answer} | seconds)
    return rows


def bench_sample(argv):
    """Fills a store: n answers to each problem, extracted, scored and graded by all tests. The
    same command goes on after a kill."""
    args = parse_args(SampleArgs, argv, about=bench_sample.__doc__)
    common.check_choice(args, extract=MODES, prompt_style=("plain", "lcb"))
    check_least(args, 1, "n limit max_new_tokens")
    check_least(args, 0, "temperature top_k timed")
    check_least(args, 0.01, "top_p", most=1)
    device, has_rm = setup(args.device)[2], args.rm != "none"
    problems = list(enumerate(load_problems(args.problems, args.limit, log=log)))
    inputs = input_files("--problems", args.problems)
    inputs += [("--model", file) for file in weight_files(args.model)]
    inputs += [("--rm", file) for file in weight_files(args.rm)] if has_rm else []
    model = load_model(args.model, "lm", compute_dtype(device), device)
    tokenizer, reward_model = Tokenizer(args.model), None
    if has_rm:
        reward_model = RewardModel(args.rm, device)
        problems = readable(reward_model, problems, lambda item: item[1].prompt)
        reward_model.score("A first pass", ["is slow, and not timed."])
    run = Run(dataclasses.replace(args, json=False), ["step"], inputs)
    # A kill may have left a part of a problem's rows: it is done again.
    count, rows = Counter(row["problem"] for row in run.samples()), run.samples()
    rows = [row for row in rows if count[row["problem"]] == args.n]
    common.write_jsonl(run.dir / "samples.jsonl", rows)
    left = [item for item in problems if count[item[1].id] != args.n]
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sampling |= {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "policy": args.model}
    with Sandbox(level=args.sandbox) as sandbox, tqdm(total=len(left), disable=None) as bar:
        for at in range(0, len(left), 16):
            (numbers, asked), begin = zip(*left[at : at + 16]), time.perf_counter()
            groups = rollout(
                model, tokenizer, asked, args.n, numbers, args.extract, args.prompt_style,
                args.enable_thinking, **sampling,
            )  # fmt: skip
            seconds = (time.perf_counter() - begin) / (args.n * len(asked))
            for number, group in zip(numbers, groups):
                judged = judged_rows(group, reward_model, sandbox, number < args.timed)
                run.append([row | {"generate_s": seconds} for row in judged])
                bar.update()
    about = {"store": args.out, "problems": len(problems)}
    print_rows([about | milliseconds(run.samples())], args.json)


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


def bench_pass(argv):
    """avg@n and the unbiased pass@k of a store."""
    args, rows = parse_args(StoreArgs, argv, about=bench_pass.__doc__), []
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
    print_rows(rows, args.json)


@dataclass
class BonArgs(StoreArgs):
    tests: list = field(default_factory=lambda: ["1", "3", "12"])  # numbers of tests that choose


SUITES = 16  # random choices of K tests that the unit-test selector is averaged over


def selected(rows, sizes, tests, scored, seed):
    """One problem's answers -> {selector: [P(what it chooses of k passes) for k in sizes]}.

    An answer without a program is chosen only when there is nothing else. The unit tests that
    choose are drawn from those that grade: with all of them the selector is the oracle.
    """
    passed, cases = [row["verdict"] == "pass" for row in rows], range(rows[0]["num_tests"])
    answers, rng = [row["answer"] for row in rows], random.Random(f"{seed}-{rows[0]['problem']}")

    def by(key):
        scores = [-math.inf if row["code"] is None else key(row) for row in rows]
        return [best_of_k(scores, passed, k) for k in sizes]

    def by_tests(chosen):
        return by(lambda row: sum(row["verdicts"][i : i + 1] == ["pass"] for i in chosen))

    found = {"random": [mean(passed)] * len(sizes), "first valid": by(lambda row: 0.0)}
    found["majority vote"] = [majority_at_k(answers, passed, k, seed=seed) for k in sizes]
    for count in tests:
        suites = [rng.sample(cases, min(count, len(cases))) for _ in range(SUITES)]
        found[f"{count} unit test{'s' * (count > 1)}"] = np.mean(
            [by_tests(suite) for suite in suites], 0
        ).tolist()
    found |= {"reward model": by(lambda row: row["score"])} if scored else {}
    return found | {"oracle": [pass_at_k(len(rows), sum(passed), k) for k in sizes]}


def best_of_n(groups, tests, seed=0):
    """-> ([1, 2, 4, ... up to n], {selector: values [problems, sizes]}), of the problems with as
    many graded answers as any has."""
    n = max(map(len, groups.values()))
    kept = [rows for rows in groups.values() if len(rows) == n]
    if len(kept) < len(groups):
        log(f"{len(groups) - len(kept)} problems left out: fewer than {n} graded answers")
    scored = any(row["score"] is not None for rows in kept for row in rows)
    sizes = [2**i for i in range(n.bit_length())]
    values = [selected(rows, sizes, tests, scored, seed) for rows in kept]
    return sizes, {name: np.array([v[name] for v in values]) for name in values[0]}


def bench_bon(argv):
    """Best of N: how often the program passes that a selector chooses of k samples. The interval
    is that of the largest k; so is the gap, the reward model's value minus the selector's."""
    args = parse_args(BonArgs, argv, about=bench_bon.__doc__)
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
            row |= {f"gap_{key}": x for key, x in estimate(gaps, args.seed).items()}
            rows.append(row)
    every = [row for group in groups.values() for row in group]
    print_rows([*rows, {"median of a program": "", **milliseconds(every)}], args.json)


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


def bench_rm(argv):
    """A reward model against pairs, RM-Bench or the verdicts of a store."""
    args = parse_args(RmArgs, argv, about=bench_rm.__doc__)
    if bool(args.pairs) == bool(args.store):
        raise UserError("bench.py rm needs one of --pairs SPEC and --store FOLDER")
    reward_model = RewardModel(args.rm, setup(args.device)[2])
    if args.store:
        groups = itertools.islice(read_store(args.store).items(), args.limit)
        rows = store_rows(reward_model, dict(groups), args.seed)
    elif args.pairs.startswith("rmbench:"):
        found = read_rows(args.pairs.removeprefix("rmbench:"), args.limit)
        rows = rm_bench(reward_model, [rmbench_item(*row) for row in found], args.seed)
    else:
        rows = pair_rows(reward_model, load_pairs(args.pairs, args.limit, log), args.seed)
    print_rows(rows, args.json)


def pair_rows(reward_model, pairs, seed):
    """Share of pairs whose chosen program has the higher score, a row a source; a tie is no win."""
    pairs, rows = readable(reward_model, pairs, lambda pair: pair.prompt), []
    texts = [(p.prompt, code) for p in pairs for code in (p.chosen, p.rejected)]
    scores = reward_model.score_many(texts)
    scored = list(zip(pairs, scores[::2], scores[1::2], strict=True))
    for part in dict.fromkeys([*(p.source for p in pairs), "all"]):
        some = [found for found in scored if part in (found[0].source, "all")]
        groups = [problem_of(p) for p, _, _ in some]
        row = {"part": part, "pairs": len(some), "problems": len(set(groups))}
        row |= estimate([float(chosen > rejected) for _, chosen, rejected in some], seed, groups)
        row["ties"] = mean([chosen == rejected for _, chosen, rejected in some])
        row["longer wins"] = mean([len(p.chosen) > len(p.rejected) for p, _, _ in some])
        rows.append(row)
    return rows


def rm_bench(reward_model, items, seed):
    """Items (domain, prompt, chosen[3], rejected[3]) of RM-Bench -> a row a domain, a row of their
    mean, and the matrices: how often the right answer in a style scores above the wrong one in
    another, a tie losing. It is easy where the right answer has the richer style, hard where the
    wrong one has it. Answers are read whole, as the benchmark does it."""
    items, rows, matrices = readable(reward_model, items, lambda item: item[1]), [], []
    texts = [(prompt, text) for _, prompt, *sides in items for side in sides for text in side]
    score_N23 = np.array(reward_model.score_many(texts)).reshape(len(items), 2, 3)
    gap_N33, domain_N = (
        score_N23[:, 0, :, None] - score_N23[:, 1, None, :],
        np.array(items, object)[:, 0],
    )
    domains = [domain for domain in DOMAINS if domain in domain_N]
    for domain in domains:
        gap_M33 = gap_N33[domain_N == domain]
        right_33, value_M = (gap_M33 > 0).mean(0), (gap_M33 > 0).mean((1, 2))
        row = {"domain": domain, "items": len(gap_M33)}
        row |= {"easy": right_33[np.tril_indices(3, -1)].mean(), "normal": right_33.trace() / 3}
        row |= {"hard": right_33[np.triu_indices(3, 1)].mean()} | estimate(value_M, seed)
        rows.append({**row, "ties": (gap_M33 == 0).mean()})
        for style, line in zip(("concise", "detailed", "markdown"), right_33):
            over = zip(("over concise", "over detailed", "over markdown"), line)
            matrices.append({"domain": domain, "right answer": style, **dict(over)})
    if len(domains) < len(DOMAINS):
        log(f"only {', '.join(domains)}: the mean over domains is not RM-Bench's")
    means = {name: mean([row[name] for row in rows]) for name in rows[0] if name != "domain"}
    # Weighted so that the mean over items is the mean over domains.
    weight_N = [len(items) / len(domains) / (domain_N == domain).sum() for domain in domain_N]
    means |= {"items": len(items)} | estimate((gap_N33 > 0).mean((1, 2)) * weight_N, seed)
    return [*rows, {"domain": "mean", **means}, *matrices]


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
        within = [value for value, _ in auc_rows(programs, score.values())]
        row = {"part": part, "problems": len(some), "programs": len(rows), "both": len(within)}
        row |= {f"auc {key}": x for key, x in estimate(within, seed).items()}
        best = []
        for problem, group in some.items():
            scores = [score.get((problem, r["code"]), -math.inf) for r in group]
            best.append(best_of_k(scores, [r["verdict"] == "pass" for r in group], len(group)))
        row |= {f"best of n {key}": x for key, x in estimate(best, seed).items()}
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


def num_parameters(c, head="lm"):
    """-> (parameters of a model, of one of its blocks). A tied head has none of its own.

    >>> num_parameters(SHAPES["qwen3-8b-shape"])[0]
    8190735360
    """
    D, H, G, K = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    block = D * (2 * H + 2 * G) * K + 3 * D * c.intermediate_size + 2 * D + 2 * K
    head = D if head == "score" else 0 if c.tie_word_embeddings else D * c.vocab_size
    return c.num_hidden_layers * block + D * c.vocab_size + D + head, block


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
    layers, length = policy.num_hidden_layers, args.prompt + args.response
    every = "train reduce roll score"
    R, (rm_kv, rm_kept) = (num_parameters(rm, "score")[0], token_bytes(rm)) if rm else (0, (0, 0))
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


def bench_memory(argv):
    """Memory that a GPU needs in each phase of grpo.py, computed from the shapes."""
    args = parse_args(MemoryArgs, argv, about=bench_memory.__doc__)
    check_least(args, 1, "gpus prompt response token_budget gpu_gib")

    def shape(name):
        return SHAPES.get(name) or Config.from_dict(read_json(model_folder(name) / "config.json"))

    items = memory_items(shape(args.model), None if args.rm == "none" else shape(args.rm), args)
    phases = {
        "train": "training",
        "reduce": "sharing of gradients",
        "roll": "rollout",
        **({} if args.rm == "none" else {"score": "scoring"}),
    }
    rows = []
    for key, phase in phases.items():
        found = {item: size / 2**30 for names, item, size in items if key in names and size}
        found[f"total, of {args.gpu_gib:.1f}"] = sum(found.values())
        rows += [{"phase": phase, "item": item, "GiB": size} for item, size in found.items()]
    print_rows(rows, args.json)


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


def read_metrics(folder):
    """metrics.csv of a run folder -> {column: {step: value}}, empty cells left out."""
    with open(Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: {int(r["step"]): float(r[name]) for r in rows if r.get(name)} for name in PANELS}


def arms_of(runs):
    """Runs whose arguments differ in seed and folders only are one arm: {label: [metrics]}. The
    label has the arguments in which the arms differ."""
    every, arms = [read_json(Path(run) / "args.json")["args"] for run in runs], {}
    names = every[0].keys() - {"seed", "out", "rm", "resume", "device"}
    differing = [n for n in every[0] if n in names and len({str(a.get(n)) for a in every}) > 1]
    for run, args in zip(runs, every):
        label = " ".join(f"--{name.replace('_', '-')} {args.get(name)}" for name in differing)
        arms.setdefault(label or "all runs" * (len(runs) > 1) or run, []).append(read_metrics(run))
    return arms


def plot_runs(plt, runs, path):
    """A panel a column: the mean over an arm's seeds, and their range as a band."""
    arms = arms_of(runs)
    names = [name for name in PANELS if any(m[name] for found in arms.values() for m in found)]
    if not names:
        raise UserError(f"{runs[0]}: no step in its metrics.csv yet")
    size = -(-len(names) // 3), 3
    figure, axes = plt.subplots(*size, figsize=(12, 2.8 * size[0]), layout="constrained")
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.set_axis_off()
            continue
        for label, found in arms.items():
            steps = sorted(set.intersection(*(set(metrics[name]) for metrics in found)))
            values = np.array([[metrics[name][s] for s in steps] for metrics in found])
            seeds = f" ({len(found)} seeds: mean and range)" if len(found) > 1 else ""
            axis.plot(steps, values.mean(0), label=label + seeds, linewidth=1)
            axis.fill_between(steps, values.min(0), values.max(0), alpha=0.2, linewidth=0)
        axis.set(title=PANELS[name], xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=120)


def plot_store(plt, store, path):
    """Best of k by selector: accuracy of the chosen program over k."""
    sizes, table = best_of_n(read_store(store), [1, 3])
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in sorted(table.items(), key=lambda item: -item[1][:, -1].mean()):
        (line,) = axis.plot(sizes, values.mean(0), marker=".", linewidth=1, label=name)
        if name == "reward model":
            line.set_linewidth(3)
            low, high = zip(*(bootstrap(column)[1:] for column in values.T))
            color, label = line.get_color(), "its 95% interval"
            axis.fill_between(sizes, low, high, alpha=0.15, color=color, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, sizes)
    axis.set(xlabel="k: answers to choose from", ylabel="share of problems solved")
    axis.set_title(f"Best of k: {store}, {len(table['random'])} problems")
    figure.legend(loc="outside right center", title="chosen by (best first)")
    figure.savefig(path, dpi=120)


def bench_plot(argv):
    """Pictures of runs over their steps, and of stores: best of k by selector."""
    args = parse_args(PlotArgs, argv, about=bench_plot.__doc__, positional="runs")
    if not args.runs:
        raise UserError("bench.py plot needs run folders or stores: python bench.py plot out/rm")
    try:
        import matplotlib
    except ImportError:
        raise UserError("bench.py plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stores = [run for run in args.runs if "n" in read_json(Path(run) / "args.json")["args"]]
    folders, out = [run for run in args.runs if run not in stores], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [(plot_runs, folders, out / "curves.png")] if folders else []
    pictures += [(plot_store, store, out / f"bon-{Path(store).name}.png") for store in stores]
    for plot, what, path in pictures:
        plot(pyplot, what, path)
        print_rows([{"picture": str(path)}], args.json)


@dataclass
class ShowArgs:
    run: str = "out/grpo-rm"  # run folder of grpo.py (without a flag)
    step: int = 1  # step whose samples are shown
    limit: int = 4  # prompts
    json: bool = False  # one JSON object a line


def bench_show(argv):
    """A step's prompts and answers, best reward first."""
    args = parse_args(ShowArgs, argv, about=bench_show.__doc__, positional="run")
    check_least(args, 1, "step limit")
    file, groups = Path(args.run) / "samples.jsonl", {}
    if not file.is_file():
        raise UserError(f"no samples.jsonl in {args.run!r}: give a run folder of grpo.py")
    rows = [row for row, _ in read_rows(str(file)) if row.get("step") == args.step]
    if not rows:
        raise UserError(f"--step {args.step}: {file} has no sample of it")
    for row in rows:
        groups.setdefault(row["number"], []).append(row)
    for group in itertools.islice(groups.values(), args.limit):
        if args.json:
            print_rows(group, args.json)
            continue
        print(f"{'=' * 80}\n{group[0]['problem']}: {group[0]['prompt']}")
        for row in sorted(group, key=lambda row: -(row["reward"] or 0.0)):
            facts = [f"{name} {cell(row[name])}" for name in ("score", "reward", "advantage")]
            valid = row["code"] is not None
            facts += [f"tests: {row['verdict']}" if valid else f"no program: {row['reason']}"]
            print(f"--- {' | '.join(facts)}\n{row['code'] if valid else row['completion']}")


# --------------------------------------------------------------------------------------------------

COMMANDS = {"sample": bench_sample, "pass": bench_pass, "bon": bench_bon, "rm": bench_rm,
            "memory": bench_memory, "plot": bench_plot, "show": bench_show}  # fmt: skip


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    common.run_cli(main)
