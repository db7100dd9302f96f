"""Verified problems -> preference pairs: sample programs, run the tests, pair what passes with what fails.

    python train_rm.py --collect-only                 # collects, prints the funnel, keeps samples.jsonl and pairs.jsonl
    python train_rm.py --pairs out/rm/pairs.jsonl      # trains on pairs that exist

The rule (CodeScaler, section "preference data"): a program that passes all tests is preferred to one that fails any.
The rest (deduplication, caps, least number of tests, mutants of passing programs) is ours, and a line of the funnel.
"""

import ast
import dataclasses
import hashlib
import json
import math
import os
import random
from dataclasses import dataclass

from codescaler import generate
from extract import extract_code
from problems import UserError, need, policy_prompt, read_rows


@dataclass(frozen=True)
class Pair:
    """`chosen` and `rejected` are bare programs, no fences; `margin` (optional) is the pass-rate gap between them."""

    prompt: str
    chosen: str
    rejected: str
    id: str
    source: str
    margin: float | None = None


@dataclass(frozen=True)
class Sample:
    """One candidate program: what was sampled, what was extracted and what the tests said. A row of samples.jsonl.
    `parent`: for a mutant, the passing program it was made from; its `completion` is empty."""

    problem: str
    prompt: str
    completion: str
    code: str | None
    reason: str
    verdict: str | None = None  # None: not executed, because there is no valid program
    pass_rate: float | None = None
    num_tests: int = 0
    source: str = ""
    parent: str | None = None


# ----------------------------------------------------------------------------------------------------------------------
# pair files


def load_pairs(spec, limit=None, allow_empty_prompt=False):
    """Pairs of a file: our own pairs.jsonl, `codescalerpair:PATH` (question_content, code_pos, code_neg) or
    `rmbench:PATH` (RM-Bench; a pair for each of an item's three styles).

    Rows of CodeScalerPair name no problem, so pairs of the same question share an id prefix and are split together.
    A statement that is null or empty is an error unless `allow_empty_prompt`. Raises UserError with file, row, key and
    what was found.
    """
    kind, _, path = spec.partition(":")
    if kind in ("codescalerpair", "rmbench"):
        read, rows = {"codescalerpair": codescaler_pair, "rmbench": rmbench_pairs}[kind], read_rows(path, limit)
        return [pair for row, where in rows for pair in read(filled(row, allow_empty_prompt), where)]
    if spec.endswith((".jsonl", ".json", ".jsonl.gz", ".parquet")):
        return [own_pair(filled(row, allow_empty_prompt), where) for row, where in read_rows(spec, limit)]
    raise UserError(f"--pairs {spec!r}: expected a .jsonl file of our own, codescalerpair:PATH or rmbench:PATH")


STATEMENT_KEYS = ("prompt", "question_content", "question")


def filled(row, allow_empty_prompt):
    """With --allow-empty-prompt, a null statement becomes an empty one."""
    return {k: "" if v is None and k in STATEMENT_KEYS else v for k, v in row.items()} if allow_empty_prompt else row


def own_pair(row, where):
    texts = {key: need(row, where, key) for key in ("prompt", "chosen", "rejected", "id")}
    return Pair(**texts, source=row.get("source", ""), margin=row.get("margin"))


def codescaler_pair(row, where):
    question = need(row, where, "question_content", "question")
    # A row without a problem id is grouped by its statement; `number` keeps the pairs of a problem apart.
    problem = str(row.get("question_id") or f"{hash_text(question):016x}")
    number = where.rpartition(" ")[2]
    chosen, rejected = need(row, where, "code_pos"), need(row, where, "code_neg")
    return [Pair(question, chosen, rejected, f"{problem}#{number}", "codescalerpair")]


def rmbench_pairs(row, where):
    """The three same-style pairs of an RM-Bench item: concise, detailed plain text, detailed markdown."""
    chosen, rejected = (need(row, where, key, kind=list) for key in ("chosen", "rejected"))
    if len(chosen) != 3 or len(rejected) != 3:
        raise UserError(f"{where}: {len(chosen)} chosen and {len(rejected)} rejected, expected 3 styles of each")
    item, domain = str(row.get("id", where)), str(row.get("domain", row.get("subset", "")))
    prompt = need(row, where, "prompt")
    return [Pair(prompt, c, r, f"{item}/{i}", domain) for i, (c, r) in enumerate(zip(chosen, rejected))]


def hash_text(text):
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def problem_of(pair):
    """The problem a pair belongs to: what the split and the bootstrap keep together."""
    return pair.id.partition("#")[0]


def split_pairs(pairs, held_out, seed=0, by="problem"):
    """(train, held-out); `held_out` is a fraction of the problems, whose pairs are all held out. by="pair" holds out
    pairs of problems that are trained on: an easier question, for data with too few problems to hold any out."""
    if by not in ("problem", "pair"):
        raise UserError(f"--split {by}: expected problem or pair")
    group_of = problem_of if by == "problem" else lambda pair: pair.id
    groups = sorted({group_of(p) for p in pairs})
    random.Random(f"split-{seed}").shuffle(groups)
    test = set(groups[: max(1, round(held_out * len(groups)))]) if held_out else set()
    return [p for p in pairs if group_of(p) not in test], [p for p in pairs if group_of(p) in test]


# ----------------------------------------------------------------------------------------------------------------------
# candidates: rollouts, extracted, deduplicated, executed


class _Normalise(ast.NodeTransformer):
    """Renames arguments and assigned variables by order of appearance and drops docstrings."""

    def __init__(self, tree):
        stores = (
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.arg) or isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        )
        names = dict.fromkeys(n.arg if isinstance(n, ast.arg) else n.id for n in stores)
        self.names = {name: f"v{i}" for i, name in enumerate(names)}

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)

    def visit_arg(self, node):
        return ast.copy_location(ast.arg(self.names[node.arg]), node)

    def visit_Expr(self, node):
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_text else self.generic_visit(node)


def normalised(code):
    """A program's text with locals renamed and comments, docstrings and layout dropped: equal texts are one program.

    >>> normalised("def f(a):  # first\\n    return a") == normalised("def f(b): return b")
    True
    """
    try:
        tree = ast.parse(code)
        return ast.unparse(_Normalise(tree).visit(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


COMPARISONS = {ast.Gt: ast.GtE, ast.Lt: ast.LtE, ast.Eq: ast.NotEq}
OPERATORS = {ast.Add: ast.Sub, ast.Mod: ast.FloorDiv, ast.Mult: ast.Pow, ast.And: ast.Or}
SWAPS = {**COMPARISONS, **OPERATORS, **{b: a for a, b in [*COMPARISONS.items(), *OPERATORS.items()]}}


def replacements(node):
    """What may stand in a node's place in a mutant; None means that the statement is dropped."""
    if type(node) in SWAPS:  # comparison, boundary, operator
        return [SWAPS[type(node)]()]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [ast.Constant(node.value + 1), ast.Constant(abs(node.value - 1))]
    if isinstance(node, ast.UnaryOp):  # a lost `not` or minus sign
        return [node.operand]
    if isinstance(node, ast.IfExp):  # a lost special case
        return [node.body]
    if isinstance(node, ast.Slice) and node.step is None and (node.lower is None) != (node.upper is None):
        return [ast.Slice(node.upper, node.lower)]
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        return [None]
    return []


def mutants(code, count, seed=0):
    """Up to `count` different programs, each with one small change in the syntax tree of `code`."""
    if count <= 0:
        return []
    tree, sites = ast.parse(code), []
    for number, node in enumerate(ast.walk(tree)):
        for name, value in ast.iter_fields(node):
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    negated = [ast.UnaryOp(ast.Not(), child)] if name in ("test", "ifs") else []
                    sites += [(number, name, i, new) for new in replacements(child) + negated]
    random.Random(f"mutants-{seed}-{code}").shuffle(sites)
    found = {}
    for number, name, i, new in sites:
        changed = ast.parse(code)
        node = list(ast.walk(changed))[number]
        value = getattr(node, name)
        if not isinstance(value, list):
            setattr(node, name, new)
        elif new is not None:
            value[i] = new
        elif len(value) > 1:
            del value[i]
        found[ast.unparse(ast.fix_missing_locations(changed))] = None
        if len(found) == count:
            break
    found.pop(ast.unparse(tree), None)
    return list(found)


def execute(sandbox, jobs, stop_early=True):
    """[(problem, code or None)] -> [Result or None], running equal programs of a problem once.

    None where there is no program or the problem has no tests.
    """
    keys = [(p.id, normalised(code)) if code is not None and p.tests else None for p, code in jobs]
    first = {key: job for key, job in zip(reversed(keys), reversed(jobs)) if key is not None}
    results = sandbox.map([(code, p.tests) for p, code in first.values()], stop_early=stop_early)
    by_key = dict(zip(first, results))
    return [by_key.get(key) for key in keys]


def collect_samples(problems, model, tokenizer, sandbox, args, done=(), progress=None):
    """Yields lists of Sample, a few problems at a time: rollout, extract, execute. Problems in `done` are skipped.

    With args.mutants, each passing program is also mutated that often. args: group (samples a problem), temperature,
    max_new_tokens, seed, prompt_style, extract, mutants.
    """
    for at in range(0, len(problems), 128):
        chunk = [(at + i, p) for i, p in enumerate(problems[at : at + 128]) if p.id not in done]
        if not chunk:
            continue
        prompts = [
            tokenizer.encode(tokenizer.chat([{"role": "user", "content": policy_prompt(p, args.prompt_style)}], True))
            for _, p in chunk
        ]
        completions = generate(
            model, prompts, n=args.group, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            stop_ids=tokenizer.stop_ids, seed=args.seed, prompt_keys=[key for key, _ in chunk],
        )  # fmt: skip
        texts = [(p, tokenizer.decode(c.ids)) for (_, p), group in zip(chunk, completions) for c in group]
        found = [extract_code(text, args.extract) for _, text in texts]
        results = execute(sandbox, [(p, e.code) for (p, _), e in zip(texts, found)], stop_early=False)
        samples = [
            Sample(
                p.id, p.prompt, text, e.code, e.reason, r and verdict_of(r), r and r.pass_rate,
                len(p.tests.cases), p.source,
            )
            for (p, text), e, r in zip(texts, found, results)
        ]  # fmt: skip
        passing = {(s.problem, normalised(s.code)): s for s in reversed(samples) if s.verdict == "pass"}
        made = [(s, code) for s in passing.values() for code in mutants(s.code, args.mutants, args.seed)]
        problem_by_id = {p.id: p for _, p in chunk}
        results = execute(sandbox, [(problem_by_id[s.problem], code) for s, code in made])
        samples += [
            Sample(
                s.problem, s.prompt, "", code, "ok", verdict_of(r), r.pass_rate, s.num_tests, s.source,
                parent=ast.unparse(ast.parse(s.code)),
            )
            for (s, code), r in zip(made, results)
        ]  # fmt: skip
        order = {p.id: i for i, p in chunk}  # a problem's rows stand together: a kill leaves one problem unfinished
        yield sorted(samples, key=lambda s: order[s.problem])


def verdict_of(result):
    """One word for a program: "pass", or the first verdict that is not."""
    return "pass" if result.passed else next(v for v in result.verdicts if v != "pass")


# ----------------------------------------------------------------------------------------------------------------------
# the pair rule

NOT_GRADED = (None, "harness_error", "unsupported")
MUTANT = "/mutant"  # ends the source of a pair whose rejected program is a mutant


def make_pairs(samples, max_pairs=4, min_tests=3, seed=0, max_mutants=2):
    """Samples -> (pairs, funnel): all-pass over any-fail within a problem, at most `max_pairs` a problem, and at most
    `max_mutants` passing programs over a failing mutant of theirs.

    Pairs of a problem are dealt so that no program is used twice before each other one was used once: a popular wrong
    program must not outvote the rest. `funnel` is a list of (what, how many are left, rule).
    """
    by_problem = {}
    for sample in samples:
        by_problem.setdefault(sample.problem, []).append(sample)
    mutant_pairs = []
    counts = dict.fromkeys(("samples", "valid", "unique", "executed", "passing", "with both", "mutants"), 0)
    pairs = []
    for problem, everything in by_problem.items():
        # A mutant that passes proves little and is dropped; both sides are unparsed, so that layout tells nothing.
        wrong_mutants = [s for s in everything if s.parent and s.verdict not in ("pass", *NOT_GRADED)]
        counts["mutants"] += len(wrong_mutants)
        if wrong_mutants and wrong_mutants[0].num_tests >= min_tests:
            random.Random(f"mutant-pairs-{seed}-{problem}").shuffle(wrong_mutants)
            mutant_pairs += [
                Pair(s.prompt, s.parent, s.code, f"{problem}#mutant{i}", f"{s.source}{MUTANT}", 1.0 - s.pass_rate)
                for i, s in enumerate(wrong_mutants[:max_mutants])
            ]
        group = [s for s in everything if not s.parent]
        valid = [s for s in group if s.code is not None]
        unique = list({normalised(s.code): s for s in reversed(valid)}.values())
        # A harness error says nothing about the program, and a pass on two tests says little.
        graded = [s for s in unique if s.verdict not in NOT_GRADED and s.num_tests >= min_tests]
        good = [s for s in graded if s.verdict == "pass"]
        bad = [s for s in graded if s.verdict != "pass"]
        for key, found in zip(counts, (group, valid, unique, graded, good), strict=False):
            counts[key] += len(found)
        counts["with both"] += bool(good and bad)
        rng = random.Random(f"pairs-{seed}-{problem}")
        rng.shuffle(good)
        rng.shuffle(bad)
        for i in range(min(max_pairs, len(good) * len(bad))):
            # Shifting by one a round visits every couple once: (0,0) (1,1) .. and, after a round, (0,1) (1,2) ..
            g, b = good[i % len(good)], bad[(i + i // math.lcm(len(good), len(bad))) % len(bad)]
            pairs.append(Pair(g.prompt, g.code, b.code, f"{problem}#{i}", g.source, 1.0 - b.pass_rate))
    funnel = [
        ("problems", len(by_problem), "with tests"),
        ("samples", counts["samples"], "sampled from the policy"),
        ("valid", counts["valid"], "exactly one valid program, by extract.py"),
        ("unique", counts["unique"], "one of each normalised syntax tree a problem"),
        ("executed", counts["executed"], f"at least {min_tests} tests (--min-tests), no harness error"),
        ("passing", counts["passing"], "programs that pass all tests"),
        ("with both", counts["with both"], "problems with a passing and a failing program"),
        ("pairs", len(pairs), f"all-pass over any-fail, at most {max_pairs} a problem (--max-pairs)"),
        ("mutants", counts["mutants"], "passing programs with one small change that fail a test (--mutants)"),
        ("mutant pairs", len(mutant_pairs), f"a passing program over its mutant, at most {max_mutants} a problem"),
    ]
    return pairs + mutant_pairs, funnel


def print_funnel(funnel):
    for what, count, rule in funnel:
        print(f"  {what:<14}{count:>8}   {rule}")


def write_jsonl(path, rows):
    """Dataclass rows to a file, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
