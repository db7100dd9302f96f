"""Verified problems -> preference pairs: candidate programs, run the tests, pair what passes with what fails.

    python train_rm.py --collect-only                       # rollouts of a policy; leaves samples, pairs and the funnel
    python train_rm.py --collect-only --candidates mutants --mutants 6 --problems mbpp:mbpp.jsonl --out out/mbpp
    python train_rm.py --pairs out/mbpp/pairs.jsonl         # trains on pairs that exist

The rule (CodeScaler, section "preference data"): a program that passes all tests is preferred to one that fails any.
The rest (deduplication, caps, least number of tests, near misses, mutants, decontamination, augmentation) is ours; each
rule is an argument and a line of the funnel, which says how many rows it removed.
"""

import ast
import builtins
import dataclasses
import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field

from codescaler import Tokenizer, compute_dtype, gather_lists, generate, load_model
from common import UserError
from extract import Extraction, extract_code
from problems import need, policy_prompt, read_rows, rm_prompt


@dataclass(frozen=True)
class Pair:
    """`chosen` and `rejected` are bare programs, no fences; `margin` (optional) is the pass-rate gap between them,
    `num_tests` the number of tests that told them apart."""

    prompt: str
    chosen: str
    rejected: str
    id: str
    source: str
    margin: float | None = None
    num_tests: int | None = None


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
    policy: str = ""  # the model that it was sampled from


@dataclass
class PairRules:
    """What decides which programs are paired. train_rm.py's flags inherit it."""

    min_tests: int = 3  # fewest tests that make a program verified
    max_pairs: int = 8  # most pairs of two candidates a problem
    mutants: int = 2  # mutants tried of each passing program, and most mutant pairs a problem; 0: none
    repeat: int = 2  # runs that a passing program must pass; one that does so only sometimes is dropped
    survivor_tests: int = 10  # fewest tests that make a passing mutant a right program; with fewer it is dropped
    max_uses: int = 8  # most pairs that one program is in, of candidates and of mutants each
    near_miss: float = 0.5  # share of rejected programs that pass half of the tests or more, where there are enough
    length_balance: float = 1.0  # largest share of pairs that the longer, or shorter, program wins, 0.5 to 1
    decontaminate: list = field(default_factory=list)  # problems of evaluations (SPEC): what resembles them is dropped


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
        read = {"codescalerpair": codescaler_pair, "rmbench": rmbench_pairs}[kind]
    elif spec.endswith((".jsonl", ".json", ".jsonl.gz", ".parquet")):
        read, path = own_pair, spec
    else:
        raise UserError(f"--pairs {spec!r}: expected a .jsonl file of our own, codescalerpair:PATH or rmbench:PATH")
    pairs = []
    for row, where in read_rows(path, limit):
        found = read(filled(row, allow_empty_prompt), where)
        if not (found[0].prompt or allow_empty_prompt):
            raise UserError(f"{where}: the statement is empty (train_rm.py --allow-empty-prompt accepts that)")
        pairs += found
    return pairs


STATEMENT_KEYS = ("prompt", "question_content", "question")


def filled(row, allow_empty_prompt):
    """With --allow-empty-prompt, a null statement becomes an empty one."""
    return {k: "" if v is None and k in STATEMENT_KEYS else v for k, v in row.items()} if allow_empty_prompt else row


def own_pair(row, where):
    """A row of our own schema: the fields of Pair, whose defaults take the place of nulls."""
    unknown = set(row) - {f.name for f in dataclasses.fields(Pair)}
    if unknown:
        raise UserError(f"{where}: unknown key {sorted(unknown)}")
    row = {"source": ""} | {key: value for key, value in row.items() if value is not None}
    for key in ("margin", "num_tests"):
        if key in row and not math.isfinite(need(row, where, key, kind=int | float)):
            raise UserError(f"{where}: key {key!r} should be a number, found {row[key]}")
    texts = {key: need(row, where, key) for key in ("prompt", "chosen", "rejected", "id", "source")}
    return [Pair(**texts, margin=row.get("margin"), num_tests=row.get("num_tests"))]


def codescaler_pair(row, where):
    """A row of CodeScaler's pairs: question_content (or question), code_pos, code_neg."""
    question = need(row, where, "question_content", "question")
    # A row without a problem id is grouped by its statement; `number` keeps the pairs of a problem apart.
    problem = str(row.get("question_id") or row.get("task_id") or f"{hash_text(question or where):016x}")
    number = where.rpartition(" ")[2]
    chosen, rejected = need(row, where, "code_pos"), need(row, where, "code_neg")
    return [Pair(question, chosen, rejected, f"{problem}#{number}", "codescalerpair")]


DOMAINS = ("chat", "code", "math", "safety")  # safety-refuse and safety-response are one domain


def rmbench_item(row, where):
    """An RM-Bench row -> (domain, prompt, chosen[3], rejected[3]) of the styles concise, detailed plain text and
    detailed markdown. Files of one domain carry it in their name (code_filtered.json)."""
    name = need(row, where, "domain") if "domain" in row else os.path.basename(where)
    domain = next((d for d in DOMAINS if name.startswith(d)), None)
    if domain is None:
        raise UserError(f"{where}: domain {row.get('domain')!r}: expected one of {', '.join(DOMAINS)}")
    sides = [need(row, where, key, kind=list) for key in ("chosen", "rejected")]
    if any(len(side) != 3 or not all(isinstance(text, str) for text in side) for side in sides):
        raise UserError(f"{where}: chosen and rejected should be lists of three texts")
    return domain, need(row, where, "prompt"), *sides


def rmbench_pairs(row, where):
    """The three same-style pairs of an RM-Bench item, which is one problem."""
    domain, prompt, *sides = rmbench_item(row, where)
    return [Pair(prompt, c, r, f"{row.get('id', where)}#{i}", domain) for i, (c, r) in enumerate(zip(*sides))]


def hash_text(text):
    """64 bits that tell texts apart, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def problem_of(pair):
    """The problem a pair belongs to: what the split and the bootstrap keep together."""
    return pair.id.rpartition("#")[0] or pair.id


def split_pairs(pairs, held_out, seed=0, by="problem"):
    """(train, held-out); `held_out` is a fraction of the problems, whose pairs are all held out. Problems whose
    statements are near duplicates are one problem here. by="pair" holds out pairs of problems that are trained on: an
    easier question, for data with too few problems to hold any out."""
    if by not in ("problem", "pair"):
        raise UserError(f"--split {by}: expected problem or pair")
    cluster = near_duplicates({problem_of(p): p.prompt for p in pairs})
    group_of = (lambda pair: cluster[problem_of(pair)]) if by == "problem" else lambda pair: pair.id
    groups = sorted({group_of(p) for p in pairs})
    random.Random(f"split-{seed}").shuffle(groups)
    test = set(groups[: max(1, round(held_out * len(groups)))]) if held_out else set()
    return [p for p in pairs if group_of(p) not in test], [p for p in pairs if group_of(p) in test]


# ----------------------------------------------------------------------------------------------------------------------
# problems that resemble each other


def ngrams(text, n):
    """The set of n-tuples of neighbouring words, in lower case and without punctuation.

    >>> sorted(ngrams("Sort it, then sum.", 3))
    [('it', 'then', 'sum'), ('sort', 'it', 'then')]
    """
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[i:] for i in range(n))))


def near_duplicates(statements, least=0.8, n=3):
    """{problem: statement} -> {problem: cluster}; a cluster is named by one of its problems. Problems of a cluster are
    chained by statements whose sets of `n` neighbouring words overlap by `least` (intersection over union).

    Only statements that share one of their rarest n-grams are compared: two sets that overlap by `least` agree on one
    of the first `len - ceil(least * len) + 1` in any common order (prefix filter: Chaudhuri et al. 2006).
    """
    grams = {problem: ngrams(text, n) for problem, text in statements.items()}
    frequency, holders, cluster = Counter(g for found in grams.values() for g in found), {}, {p: p for p in statements}

    def root(problem):
        while cluster[problem] != problem:
            problem = cluster[problem]
        return problem

    for problem, found in grams.items():
        rare = sorted(found, key=lambda g: (frequency[g], g))[: len(found) - math.ceil(least * len(found)) + 1]
        for other in {other for g in rare for other in holders.get(g, ())}:
            if len(found & grams[other]) >= least * len(found | grams[other]):
                cluster[root(problem)] = root(other)
        for g in rare:
            holders.setdefault(g, []).append(problem)
    return {problem: root(problem) for problem in statements}


def case_keys(tests, least=24):
    """Texts of the test cases without spaces; those under `least` characters say too little to tell problems apart."""
    cases = tests.cases if tests else []
    texts = [t for c in cases for t in (c["check"].splitlines() if "check" in c else [json.dumps([*c.values()])])]
    return {text for text in (re.sub(r"\s|\\n", "", t) for t in texts) if len(text) >= least}


def decontaminate(problems, evaluation, n=13):
    """Problems -> (those that do not resemble one of the problems in `evaluation`, rows of the funnel).

    A problem is dropped if it shares `n` neighbouring words with a statement (a shorter statement: all of its words),
    or a test case of some length. 13 words are the rule of GPT-3's appendix C.
    """
    seen, cases = set(), set()
    for problem in evaluation:
        seen |= ngrams(problem.prompt, n) or ngrams(problem.prompt, len(re.findall(r"\w+", problem.prompt)))
        cases |= case_keys(problem.tests)
    lengths = {len(gram) for gram in seen} - {0}
    alike = {p.id for p in problems if any(ngrams(p.prompt, length) & seen for length in lengths)}
    shared = {p.id for p in problems if case_keys(p.tests) & cases} - alike
    kept = [p for p in problems if p.id not in alike | shared]
    against = f"{len(evaluation)} evaluation problems (--decontaminate)"
    return kept, [
        ("loaded", len(problems), "before decontamination"),
        ("loaded", len(problems) - len(alike), f"no {n} words in common with {against}: {len(alike)} removed"),
        ("loaded", len(kept), f"no test case in common with {against}: {len(shared)} removed"),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# programs that are the same


class _Normalise(ast.NodeTransformer):
    """Renames arguments and local variables by order of appearance; drops docstrings and annotations of functions.
    Names that something outside may use stay: those of the module and of keyword arguments."""

    def __init__(self, tree):
        outside = {k.arg for k in ast.walk(tree) if isinstance(k, ast.keyword)} | module_names(tree)
        names = (n.arg if isinstance(n, ast.arg) else n.id for n in ast.walk(tree) if binds(n))
        self.names = {name: f"v{i}" for i, name in enumerate(dict.fromkeys(n for n in names if n not in outside))}

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)

    def visit_arg(self, node):
        return ast.copy_location(ast.arg(self.names.get(node.arg, node.arg)), node)

    def generic_visit(self, node):
        if isinstance(getattr(node, "body", None), list):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        return super().generic_visit(node)


def binds(node):
    return isinstance(node, ast.arg) or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def is_text(statement):
    """A statement that is only a string: a docstring, or a comment of another kind."""
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def module_names(tree):
    """Names bound outside of functions (of the module or of a class) or declared global: a test may use them."""
    names, todo = set(), [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if binds(node):
                names.add(node.id)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                todo.append(node)
    declared = (n.names for n in ast.walk(tree) if isinstance(n, ast.Global | ast.Nonlocal))
    return names.union(*declared)


def normalised(code):
    """A program's text with locals renamed and comments, docstrings and layout dropped: equal texts are one program.

    >>> normalised("def f(a):  # first\\n    return a") == normalised("def f(b): return b")
    True
    """
    try:
        tree = ast.parse(code)
        return ast.unparse(ast.fix_missing_locations(_Normalise(tree).visit(tree)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


def laid_out(code):
    """A program's text in the layout of `ast.unparse`, without comments: equal texts behave alike in every test, which
    `normalised` does not promise (a test may name an argument: `f(xs=[1])`)."""
    try:
        return ast.unparse(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


# ----------------------------------------------------------------------------------------------------------------------
# mutants: a right program with one small change

COMPARISONS = {ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn, ast.Is: ast.IsNot}
BOUNDARIES = {ast.Gt: ast.GtE, ast.Lt: ast.LtE}
OPERATORS = {ast.Add: ast.Sub, ast.Mod: ast.FloorDiv, ast.Mult: ast.Pow, ast.And: ast.Or, ast.BitAnd: ast.BitOr}
SWAPS = {
    operator: table | {b: a for a, b in table.items()}
    for operator, table in (("comparison", COMPARISONS), ("boundary", BOUNDARIES), ("operator", OPERATORS))
}
CALLS = {"min": "max", "any": "all", "max": "min", "all": "any"}


def replacements(node, name, variables):
    """[(operator, what may stand in the place of `node`)]; None there means that the statement is dropped. `name` is
    the field of its parent that the node is in, `variables` the names that the program assigns."""
    found = [(operator, table[type(node)]()) for operator, table in SWAPS.items() if type(node) in table]
    if name in ("test", "ifs"):
        found += [("branch", ast.UnaryOp(ast.Not(), node))]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        found += [("constant", ast.Constant(not node.value))]
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        found += [("constant", ast.Constant(value)) for value in (node.value + 1, abs(node.value - 1))]
    elif isinstance(node, ast.UnaryOp):  # a lost `not` or minus sign
        found += [("operator", node.operand)]
    elif isinstance(node, ast.IfExp):  # a lost special case
        found += [("branch", node.body), ("branch", node.orelse)]
    elif isinstance(node, ast.Slice) and node.step is None and (node.lower is None) != (node.upper is None):
        found += [("slice", ast.Slice(node.upper, node.lower))]
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in variables:
        found += [("variable", ast.Name(other, ast.Load())) for other in variables if other != node.id]
    elif isinstance(node, ast.Name) and node.id in CALLS:
        found += [("operator", ast.Name(CALLS[node.id], ast.Load()))]
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp):
        found += [("return", ast.Return(side)) for side in (node.value.left, node.value.right)]
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
        found += [("return", ast.Return(node.value.args[0]))]
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Compare | ast.BoolOp):
        found += [("return", ast.Return(ast.UnaryOp(ast.Not(), node.value)))]
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Break | ast.Continue) and not is_text(node):
        found += [("statement", None)]
    elif isinstance(node, ast.If):
        found += [("statement", None)]
    return found


def mutants(code, count, seed=0):
    """Up to `count` different programs, each with one small change in the syntax tree of `code`: comparison, boundary,
    operator, constant, branch, slice, return, variable or a dropped statement, as evenly as the program allows."""
    if count <= 0:
        return []
    tree, sites = ast.parse(code), {}
    inside = {
        n.target.id for n in ast.walk(tree) if isinstance(n, ast.comprehension) and isinstance(n.target, ast.Name)
    }
    variables = sorted({n.arg if isinstance(n, ast.arg) else n.id for n in ast.walk(tree) if binds(n)} - inside)
    for number, node in enumerate(ast.walk(tree)):
        for name, value in ast.iter_fields(node):
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST):
                    for operator, new in replacements(child, name, variables):
                        sites.setdefault(operator, []).append((number, name, i, new))
    rng = random.Random(f"mutants-{seed}-{code}")
    kinds = list(sites.values())
    rng.shuffle(kinds)
    for kind in kinds:
        rng.shuffle(kind)
    same, found = ast.unparse(tree), {}
    dealt = (kind[turn] for turn in range(max(map(len, kinds), default=0)) for kind in kinds if turn < len(kind))
    for number, name, i, new in dealt:
        changed = ast.parse(code)
        node = list(ast.walk(changed))[number]
        value = getattr(node, name)
        if not isinstance(value, list):
            setattr(node, name, new)
        elif new is not None:
            value[i] = new
        elif len(value) > 1:
            del value[i]
        mutant = ast.unparse(ast.fix_missing_locations(changed))
        if mutant != same:
            found[mutant] = None
        if len(found) == count:
            break
    return list(found)


# ----------------------------------------------------------------------------------------------------------------------
# candidates: rollouts, a file of samples or mutants of the solutions; extracted, executed


def execute(sandbox, jobs, stop_early=True, repeat=1):
    """[(problem, code or None)] -> [Result or None], running equal programs of a problem once.

    None where there is no program or the problem has no tests.
    """
    keys = [(p.id, laid_out(code)) if code is not None and p.tests else None for p, code in jobs]
    first = {key: job for key, job in zip(reversed(keys), reversed(jobs)) if key is not None}
    results = sandbox.map([(code, p.tests) for p, code in first.values()], stop_early=stop_early, repeat=repeat)
    by_key = dict(zip(first, results))
    return [by_key.get(key) for key in keys]


def verdict_of(result):
    """One word for a program: "pass", "flaky" if it passed in one run and not in the next, or the first verdict that
    is not a pass."""
    if result.passed or result.detail.startswith("flaky"):
        return "pass" if result.passed else "flaky"
    return next(v for v in result.verdicts if v != "pass")


def verify(sandbox, answers, policy, args):
    """[(problem, completion, Extraction)] -> list of Sample with verdicts, and with `args.mutants` mutants of each
    passing program. The rows of a problem stand together: a kill leaves one problem unfinished."""

    def samples_of(rows):
        results = execute(sandbox, [(p, code) for p, _, code, *_ in rows], stop_early=False, repeat=args.repeat)
        return [
            Sample(
                p.id, rm_prompt(p, args.rm_prompt, args.prompt_style), completion, code, reason, r and verdict_of(r),
                r and r.pass_rate, len(p.tests.cases), p.source, parent, policy,
            )
            for (p, completion, code, reason, parent), r in zip(rows, results)
        ]  # fmt: skip

    problem_by_id = {p.id: p for p, _, _ in answers}
    samples = samples_of([(p, completion, e.code, e.reason, None) for p, completion, e in answers])
    passing = {(s.problem, normalised(s.code)): s for s in reversed(samples) if s.verdict == "pass"}
    samples += samples_of(
        [
            (problem_by_id[s.problem], "", code, "ok", laid_out(s.code))
            for s in passing.values()
            for code in mutants(s.code, args.mutants, args.seed)
        ]
    )
    order = {problem: i for i, problem in enumerate(problem_by_id)}
    return sorted(samples, key=lambda s: order[s.problem])


def prompt_ids(tokenizer, problem, style):
    """The ids that a policy answers: the problem as a user turn, and the beginning of the assistant's."""
    user = {"role": "user", "content": policy_prompt(problem, style)}
    return tokenizer.encode(tokenizer.chat([user], add_generation_prompt=True))


def rollouts(model, tokenizer, numbered, args):
    """[(number, problem)] -> [(problem, completion, Extraction)], args.group of each problem. `number` is the key of
    the problem's random numbers."""
    prompts = [prompt_ids(tokenizer, p, args.prompt_style) for _, p in numbered]
    completions = generate(
        model, prompts, n=args.group, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        stop_ids=tokenizer.stop_ids, seed=args.seed, prompt_keys=[number for number, _ in numbered],
    )  # fmt: skip
    texts = [(p, tokenizer.decode(c.ids)) for (_, p), group in zip(numbered, completions) for c in group]
    return [(p, text, extract_code(text, args.extract)) for p, text in texts]


def given_programs(problems, args):
    """{problem id: [(completion, Extraction)]} without a model: the problems' own solutions (--candidates mutants) or a
    file whose rows have `problem` and `completion` or `code`, such as any samples.jsonl. Raises UserError if there is
    nothing for these problems."""
    found = {}
    if args.candidates == "mutants":
        found = {p.id: [("", Extraction(p.solution, "ok"))] for p in problems if p.solution}
    else:
        for row, where in read_rows(args.candidates):
            if "header" not in row and not row.get("parent"):  # a store's first row; a mutant, which is made again
                found.setdefault(need(row, where, "problem"), []).append(candidate(row, where, args.extract))
    if not any(p.id in found for p in problems):
        raise UserError(f"--candidates {args.candidates}: no program for any of {len(problems)} problems; expected "
                        "mutants (the problems need solutions) or a file with the ids of --problems")  # fmt: skip
    return found


def candidate(row, where, extract):
    """A row of a file of samples -> (completion, Extraction)."""
    if row.get("completion") or "completion" in row and row.get("code") is None:
        return need(row, where, "completion"), extract_code(row["completion"], extract)
    code = need(row, where, "code")
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", Extraction(None, "syntax_error")
    return "", Extraction(code, "ok")


def collect_samples(problems, args, sandbox, done=(), device="cpu", rank=0, world=1):
    """Yields lists of Sample, a few problems at a time, the same on all ranks; each rank does its share of them. What
    is in `done`, a set of (policy, problem id), is skipped.

    args: PairRules, and candidates, policy, group, temperature, max_new_tokens, seed, prompt_style, extract.
    """
    order = {p.id: number for number, p in enumerate(problems)}
    for policy in args.policy if args.candidates == "policy" else [""]:
        if policy:
            model, tokenizer = load_model(policy, "lm", compute_dtype(device), device), Tokenizer(policy)
        else:
            given = given_programs(problems, args)
        todo = [(number, p) for number, p in enumerate(problems) if (policy, p.id) not in done]
        for at in range(0, len(todo), 128 * world):
            mine = todo[at : at + 128 * world][rank::world]
            if policy:
                answers = rollouts(model, tokenizer, mine, args)
            else:
                answers = [(p, *answer) for _, p in mine for answer in given.get(p.id, ())]
            # In the order of the problems on any number of ranks: it decides which pairs are drawn.
            yield sorted(gather_lists(verify(sandbox, answers, policy, args)), key=lambda s: order[s.problem])


# ----------------------------------------------------------------------------------------------------------------------
# the pair rule

NOT_GRADED = (None, "harness_error", "unsupported", "flaky")
MUTANT = "/mutant"  # ends the source of a pair whose rejected program is a mutant


def make_pairs(samples, rules, seed=0):
    """Samples -> (pairs, funnel): all-pass over any-fail within a problem, and pairs whose rejected program is a mutant
    of a passing one. `rules`: a PairRules.

    `funnel` is a list of (what, how many are left, the rule with its value and how many it removed).
    """
    rng = random.Random(f"pairs-{seed}")
    funnel = [("problems", len({s.problem for s in samples}), "with tests")]
    programs, changed = [s for s in samples if not s.parent], [s for s in samples if s.parent]

    funnel.append(("samples", len(programs), "candidates: rollouts, programs of a file or reference solutions"))
    valid = keep(funnel, "valid", programs, lambda s: s.code is not None, "exactly one valid program, by extract.py")
    groups = by_problem(graded(funnel, ("unique", "executed"), valid, rules.min_tests))
    passing = {problem: [s for s in group if s.verdict == "pass"] for problem, group in groups.items()}
    failing = {problem: [s for s in group if s.verdict != "pass"] for problem, group in groups.items()}
    funnel.append(("passing", sum(map(len, passing.values())), "programs that pass all tests"))
    both = [problem for problem in groups if passing[problem] and failing[problem]]
    funnel.append(("with both", len(both), "problems with a passing and a failing program"))
    dealt = []
    for problem in both:
        rng.shuffle(passing[problem])
        bad = near_misses(failing[problem], rules.near_miss, rng)
        # Shifting by one a round visits every couple once: (0,0) (1,1) .. and, after a round, (0,1) (1,2) ..; no
        # program is used twice before each other one was used once: a popular wrong one must not outvote the rest.
        good, turns = passing[problem], math.lcm(len(passing[problem]), len(bad))
        dealt.append([(good[i % len(good)], bad[(i + i // turns) % len(bad)]) for i in range(len(good) * len(bad))])
    pairs = select(funnel, "pairs", dealt, rules.max_pairs, "--max-pairs", rules, rng)

    known = {(s.problem, normalised(s.code)) for s in valid}
    rule = "none of the candidates"
    changed = keep(funnel, "mutants", changed, lambda s: (s.problem, normalised(s.code)) not in known, rule)
    changed = graded(funnel, ("mutants", "mutants"), changed, rules.min_tests)
    changed = keep(
        funnel, "mutants", changed, lambda s: s.verdict != "pass" or s.num_tests >= rules.survivor_tests,
        f"a mutant that passes is right only with {rules.survivor_tests} tests or more (--survivor-tests)",
    )  # fmt: skip
    dealt = []
    for group in by_problem(changed).values():
        right = {s.parent: [dataclasses.replace(s, code=s.parent)] for s in group}
        for s in group:
            right[s.parent] += [s] if s.verdict == "pass" else []
        bad = near_misses([s for s in group if s.verdict != "pass"], rules.near_miss, rng)
        dealt.append([(right[s.parent][i % len(right[s.parent])], s) for i, s in enumerate(bad)])
    mutant_pairs = select(funnel, "mutant pairs", dealt, rules.mutants, "--mutants", rules, rng)
    return pairs + mutant_pairs, funnel


def keep(funnel, what, rows, test, rule):
    """The rows that pass `test`, and a line of the funnel."""
    kept = [row for row in rows if test(row)]
    funnel.append((what, len(kept), f"{rule}: {len(rows) - len(kept)} removed"))
    return kept


def by_problem(samples):
    """Samples -> {problem: its samples}."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample.problem, []).append(sample)
    return groups


def graded(funnel, what, samples, min_tests):
    """One sample of each program of a problem, of those whose verdict says something."""
    first = {(s.problem, normalised(s.code)): s for s in reversed(samples)}
    # A mutant equal to the program that it was made from is no mutant.
    first = [s for (_, tree), s in reversed(first.items()) if not s.parent or tree != normalised(s.parent)]
    unique, executed = what
    numbers = set(map(id, first))
    samples = keep(funnel, unique, samples, lambda s: id(s) in numbers, "one of each normalised syntax tree a problem")
    rule = f"at least {min_tests} tests (--min-tests)"
    samples = keep(funnel, executed, samples, lambda s: s.num_tests >= min_tests, rule)
    rule = "the same verdict when a passing program is run again (--repeat)"
    samples = keep(funnel, executed, samples, lambda s: s.verdict != "flaky", rule)
    return keep(funnel, executed, samples, lambda s: s.verdict not in NOT_GRADED, "a verdict, no harness error")


def near_misses(failing, share, rng):
    """Failing programs in random order, but so that of the first n about `share` * n pass half of the tests or more."""
    rng.shuffle(failing)
    near, far = ([s for s in failing if (s.pass_rate >= 0.5) == wanted] for wanted in (True, False))
    order, taken = [], 0
    while near or far:
        from_near = bool(near) and (not far or taken < share * (len(order) + 1))
        order.append((near if from_near else far).pop())
        taken += from_near
    return order


def select(funnel, what, dealt, most, flag, rules, rng):
    """Couples (passing, failing sample) of each problem, in the order in which they are wanted -> pairs."""
    funnel.append((what, sum(map(len, dealt)), "couples of a passing and a failing program of a problem"))
    pairs, overused, kind = [], 0, "mutant" if what == "mutant pairs" else ""
    for couples in dealt:
        uses, number = Counter(), 0
        for good, bad in couples:
            if max(uses[good.code], uses[bad.code]) >= rules.max_uses:
                overused += 1
            elif number < most:
                uses.update((good.code, bad.code))
                pair_id, source = f"{good.problem}#{kind}{number}", good.source + (MUTANT if kind else "")
                gap = 1.0 - bad.pass_rate
                pairs.append(Pair(good.prompt, good.code, bad.code, pair_id, source, gap, good.num_tests))
                number += 1
    left = funnel[-1][1] - overused
    funnel.append((what, left, f"at most {rules.max_uses} with one program (--max-uses): {overused} removed"))
    removed, near = left - len(pairs), sum(pair.margin <= 0.5 for pair in pairs)
    rule = f"at most {most} a problem ({flag}): {removed} removed"
    funnel.append((what, len(pairs), f"{rule}; near misses {near}, sought {rules.near_miss:.0%} (--near-miss)"))
    ahead = [[p for p in pairs if sign * len(p.chosen) > sign * len(p.rejected)] for sign in (1, -1)]
    more, share = max(ahead, key=len), rules.length_balance
    most = len(more) if share >= 1 else int((len(pairs) - len(more)) * share / (1 - share))
    surplus = set(map(id, rng.sample(more, max(0, len(more) - most))))
    rule = f"the longer, or the shorter, wins at most {share:.0%} (--length-balance)"
    return keep(funnel, what, pairs, lambda pair: id(pair) not in surplus, rule)


def print_funnel(funnel, log=print):
    """(what, count, rule) rows as the table that the trainer prints."""
    for what, count, rule in funnel:
        log(f"  {what:<14}{count:>8}   {rule}")


def write_jsonl(path, rows):
    """Dataclass rows to a file, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


# ----------------------------------------------------------------------------------------------------------------------
# augmentation, ours: rewrites that change nothing, and programs that only look right

NAMES = "value item total result current count index acc temp data found entry left right best".split()
REMARKS = ("main part", "helper values", "go on", "prepare", "next step", "see the statement", "as described")
CLAIMS = (
    "Correct solution: passes all tests.",
    "Verified against every test case, including the edge cases.",
    "This is the accepted reference implementation.",
)
INTROSPECTION = {"eval", "exec", "locals", "globals", "vars", "dir", "__import__"}


class _Rename(ast.NodeTransformer):
    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


def renamed(code, rng):
    """The program with other names for the variables of its functions. Arguments keep theirs, since a test may name
    them; so does every name that is also bound in another way, and all of them where code is looked at by name."""
    tree = ast.parse(code)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words = set(re.findall(r"\w+", code))
    fixed = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} | module_names(tree) | set(dir(builtins))
    for node in ast.walk(tree):  # functions, classes, imports, `except .. as name`, patterns
        fixed |= {value for key in ("name", "asname", "rest") if isinstance(value := getattr(node, key, None), str)}
    local = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and binds(n)} - fixed)
    if used & INTROSPECTION or not local:
        return code
    fresh = [n for n in NAMES if n not in words | fixed]
    rng.shuffle(fresh)
    fresh += [f"{word}_{i}" for i, word in enumerate(NAMES * len(local)) if f"{word}_{i}" not in words | fixed]
    return ast.unparse(_Rename(dict(zip(local, fresh))).visit(tree))


def stripped(code):
    """The program without comments, docstrings and its layout."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
    return ast.unparse(tree)


def commented(code, rng):
    """The program with remarks that say nothing, each on a line of its own before a statement."""
    lines, starts = code.split("\n"), {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.stmt) and not lines[node.lineno - 1][: node.col_offset].strip():
            starts[node.lineno - 1] = lines[node.lineno - 1][: node.col_offset]
    for at in sorted(rng.sample(sorted(starts), min(2, len(starts))), reverse=True):
        lines.insert(at, f"{starts[at]}# {rng.choice(REMARKS)}")
    return "\n".join(lines)


def rewrites(code, seed=0):
    """{"renamed" | "stripped" | "commented": program}: the same program in other words. What would not change is left
    out, and so is everything of a text that is no Python."""
    rng = random.Random(f"rewrites-{seed}-{code}")
    try:
        found = {"renamed": renamed(code, rng), "stripped": stripped(code), "commented": commented(code, rng)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return {name: text for name, text in found.items() if text != code}


def vacuous(code):
    """A program with the functions of `code`, none of which does anything."""
    tree = ast.parse(code)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        function.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(tree)) if functions else "print()"


def headed(code, text, docstring):
    """The program with a text at its head: a comment, or the docstring of its first function (else of the module)."""
    if not docstring:
        return f"# {text}\n{code}"
    tree = ast.parse(code)
    owner = next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)), tree)
    owner.body.insert(0, ast.Expr(ast.Constant(text)))
    return ast.unparse(tree)


def adversarial(pair, other, seed=0):
    """{kind: (right program, wrong program that looks right)}. The wrong one is the rejected one with a comment or a
    docstring that claims success ("claim"; "claim vs remark" where the right one has text too, which claims nothing:
    a model that has seen no comments dislikes every one), the chosen one emptied ("vacuous"), or `other`, the right
    program of another problem. The last two were not executed: a problem may be solved by them by chance. A text that
    is no Python gets no docstring and is not emptied."""
    rng = random.Random(f"adversarial-{seed}-{pair.id}")
    claim, remark, docstring = rng.choice(CLAIMS), rng.choice(REMARKS), rng.random() < 0.5
    found = {"other problem": (pair.chosen, other)}
    try:
        found["vacuous"] = pair.chosen, vacuous(pair.chosen)
        wrong = headed(pair.rejected, claim, docstring)
        found["claim"] = pair.chosen, wrong
        found["claim vs remark"] = headed(pair.chosen, remark, docstring), wrong
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return {kind: both for kind, both in found.items() if normalised(both[1]) != normalised(pair.chosen)}


def other_programs(pairs, seed=0):
    """For each pair a chosen program of another problem; its own rejected one where there is no other problem."""
    rng, found = random.Random(f"other-{seed}"), []
    for pair in pairs:
        drawn = (rng.choice(pairs) for _ in range(20))
        found.append(next((p.chosen for p in drawn if problem_of(p) != problem_of(pair)), pair.rejected))
    return found


def augment(pairs, seed=0, rewritten=0.5, adversarial_share=0.5):
    """Pairs to add to `pairs`: for a share `rewritten` of them one with both sides rewritten, and for a share
    `adversarial_share` one whose rejected program only looks right. Ours: CodeScalerPair as released has neither.

    An added pair belongs to the problem of the pair that it was made from, and the end of its source names its kind.
    """
    rng, added = random.Random(f"augment-{seed}"), []

    def add(pair, kind, chosen, rejected):
        name = pair.id + ("+" if "#" in pair.id else "#") + kind
        added.append(
            dataclasses.replace(pair, chosen=chosen, rejected=rejected, id=name, source=f"{pair.source}/{kind}")
        )

    for pair, other in zip(pairs, other_programs(pairs, seed)):
        if rng.random() < rewritten:
            # Every side is rewritten in a way of its own: the way must not tell which side is right.
            sides = [rewrites(code, seed) or {"same": code} for code in (pair.chosen, pair.rejected)]
            sides = [rng.choice([*side.values()]) for side in sides]
            if sides != [pair.chosen, pair.rejected]:
                add(pair, "rewritten", *sides)
        if rng.random() < adversarial_share:
            found = adversarial(pair, other, seed)
            if not found:  # no Python
                continue
            kind = rng.choice(sorted(found))
            right, wrong = found[kind]
            if kind.startswith("claim") and rng.random() < 0.5:  # a claim alone must not tell the wrong program
                right = headed(pair.chosen, rng.choice(CLAIMS), rng.random() < 0.5)
            add(pair, kind.replace(" ", "-"), right, wrong)
    return added
