"""What is measured: of a training step's samples, of a policy on held-out problems, of a reward
model on held-out pairs, of a choice among answers. Rows in, numbers and rows of tables out; nothing
here decides anything. Shapes: P pairs, 2 chosen and rejected, 3 styles of an answer.
"""

import itertools
import math
import random
from collections import Counter

import numpy as np

from common import auc, bootstrap, mean
from pairs import MUTANT, NOT_GRADED, problem_of
from runs import gather_lists


def table(rows):
    """Rows (dicts) -> lines of text, text on the left and numbers on the right of their columns;
    rows with other columns begin a new table. An empty line ends each."""
    text = []
    for names, part in itertools.groupby(rows, key=list):
        part = [list(row.values()) for row in part]
        lines = [names, *([cell(value) for value in values] for values in part)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        sides = [str.ljust if isinstance(value, str) else str.rjust for value in part[0]]
        for line in lines:
            cells = [side(*two) for side, *two in zip(sides, line, widths)]
            text.append("  ".join(cells).rstrip())
        text.append("")
    return text


def cell(value):
    """A value as a table shows it."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def estimate(values, seed=0, problems=None, prefix="", name="value"):
    """Values (of these problems; None: each is of its own) -> columns of a table: their mean,
    called `name`, and its 95% interval over problems."""
    found = bootstrap(values, problems, seed=seed) if len(values) else [math.nan] * 3
    return dict(zip((prefix + name, f"{prefix}low", f"{prefix}high"), found))


def parts_of(rows, part_of):
    """{part of the data: its rows}, and "all" where there are several."""
    parts = {}
    for row in rows:
        parts.setdefault(part_of(row), []).append(row)
    if len(parts) > 1:
        parts.pop("all", None)  # of rows without a part, which are in it, too
        parts["all"] = rows
    return parts


# --------------------------------------------------------------------------------------------------
# a training step


def step_metrics(rows):
    """What a step's samples (rows of samples.jsonl, of all ranks) say about it."""
    tested = [row for row in rows if row["verdict"] not in NOT_GRADED]
    codes = [row["code"] for row in rows if row["code"] is not None]
    reasons = Counter(row["reason"] for row in rows if row["code"] is None)
    groups = {row["number"] for row in rows}
    # Where all answers have one reward, every advantage is 0 and nothing is learned.
    with_signal = {row["number"] for row in rows if row["advantage"]}
    return {
        "reward": mean([row["reward"] for row in rows if row["reward"] is not None]),
        "pass_rate": mean([row["verdict"] == "pass" for row in tested]) if tested else "",
        "valid_rate": len(codes) / len(rows),
        "length": mean([row["tokens"] for row in rows]),
        "truncated": mean([not row["finished"] for row in rows]),
        "reasons": " ".join(f"{reason}:{n}" for reason, n in sorted(reasons.items())),
        "groups": len(groups),
        "no_signal": 1 - len(with_signal) / len(groups),
        "code_length": mean([len(code) for code in codes]) if codes else "",
        "tokens": sum(row["tokens"] for row in rows),
    }


# Columns of metrics.csv that are printed, too.
SHOWN = "loss accuracy margin reward pass_rate valid_rate kl entropy grad_norm length".split()


def step_line(step, steps, row):
    """A row of metrics.csv, without its empty cells, as the line that is printed of a step."""
    parts = [f"step {step}/{steps}"]
    parts += [f"{name} {row[name]:.3g}" for name in SHOWN if row.get(name, "") != ""]
    left = int(row["seconds"] * (steps - step))
    speed = row["tokens"] / row["seconds"] / 1000
    parts += [f"{speed:.1f}k tok/s", f"eta {left // 60}m{left % 60:02d}s"]
    if row.get("truncated", 0) > 0.5:
        parts.append(f"CUT {row['truncated']:.0%}: raise --max-new-tokens")
    if row.get("skipped") or not math.isfinite(row["grad_norm"]):
        parts.append("skipped: gradient not finite")
    return " | ".join([*parts, row["reasons"]] if row.get("reasons") else parts)


# --------------------------------------------------------------------------------------------------
# a policy on held-out problems


def evaluate(answer, problems, every, rank=0, world=1):
    """Answers to every `every`-th problem -> a dict a problem, the same list on all ranks.

    `answer(problems, numbers)` gives judged groups of Rollout. A row has part (`problem.source`),
    avg (share of samples that pass), any (whether one does), valid, reward, and `rewards` and
    `passed` of its valid graded samples. Where no sample could be graded, avg is None.
    """
    # All ranks ask equally often, the last time some with nothing: `answer` has collectives.
    rows, size, numbers = [], 64 * world, range(0, len(problems), every)
    for chunk in (numbers[at : at + size][rank::world] for at in range(0, len(numbers), size)):
        for group in answer([problems[i] for i in chunk], chunk):
            graded = [r for r in group if r.verdict not in NOT_GRADED]
            # Invalid answers have reward 0 by rule: they say nothing about the reward model.
            valid = [r for r in graded if r.code is not None and r.reward is not None]
            passed = [r.verdict == "pass" for r in graded]
            row = {"number": group[0].number, "part": group[0].problem.source or "no source"}
            row |= {"avg": mean(passed) if passed else None, "any": float(any(passed))}
            row |= {"valid": mean([r.code is not None for r in group])}
            row |= {"reward": mean([r.reward for r in group if r.reward is not None] or [0.0])}
            row |= {"rewards": [r.reward for r in valid]}
            rows.append(row | {"passed": [r.verdict == "pass" for r in valid]})
    return sorted(gather_lists(rows), key=lambda row: row["number"])


def summary(rows):
    """Does the reward follow execution on held-out problems? -> mean reward, mean AUC of reward
    against passing within a problem, share of failing programs among the tenth with the highest
    rewards, and avg@n."""
    aucs = known_aucs((row["rewards"], row["passed"]) for row in rows)
    ranked = [pair for row in rows for pair in zip(row["rewards"], row["passed"])]
    random.Random(0).shuffle(ranked)  # equal rewards in no order
    ranked.sort(key=lambda pair: -pair[0])
    top = ranked[: max(1, len(ranked) // 10)]
    return {
        "audit_reward": mean([row["reward"] for row in rows]),
        "audit_auc": mean(aucs) if aucs else "",
        "fail_top": mean([not passed for _, passed in top]) if top else "",
        "eval": mean([row["avg"] for row in rows if row["avg"] is not None]),
    }


def summary_line(rows):
    """Evaluation rows -> the line that is printed of them."""
    found, graded = summary(rows), [row for row in rows if row["avg"] is not None]
    parts = [f"avg@n {found['eval']:.3f}", f"pass@n {mean([row['any'] for row in graded]):.3f}"]
    parts += [f"valid {mean([row['valid'] for row in rows]):.3f}"]
    names = ("audit_reward", "audit_auc", "fail_top")
    parts += [f"{name} {found[name]:.3f}" for name in names if found[name] != ""]
    if len(graded) < len(rows):
        parts.append(f"{len(rows) - len(graded)} problems could not be graded")
    return " | ".join(parts)


def by_part(rows):
    """Evaluation rows -> {part: {name: [a value a problem]}}, as result.json has them."""
    parts = {}
    for row in (row for row in rows if row["avg"] is not None):
        for name in ("avg", "any", "valid", "reward"):
            parts.setdefault(row["part"], {}).setdefault(name, []).append(row[name])
    return parts


def final_rows(before, after, n):
    """Evaluation rows before and after training -> rows of a table, one a part of the data."""

    def means(name):
        first, last = (mean([row[name] for row in rows]) for rows in zip(*some))
        return f"{first:.3f} -> {last:.3f}"

    # Problems that were graded both times, so that a gain is that of the same problems.
    both = [two for two in zip(before, after, strict=True) if None not in (r["avg"] for r in two)]
    rows = []
    for part, some in parts_of(both, lambda two: two[0]["part"]).items():
        gain, low, high = bootstrap([last["avg"] - first["avg"] for first, last in some])
        row = {"part": part, "problems": len(some), f"avg@{n}": means("avg")}
        row["gain [95% interval]"] = f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append(row | {f"pass@{n}": means("any"), "valid": means("valid")})
    return rows


# --------------------------------------------------------------------------------------------------
# a reward model on held-out pairs


def known_aucs(problems):
    """[(scores of a problem's programs, whether they pass)] -> the AUC of each problem that has a
    passing and a failing program. Scores of different problems need not be comparable."""
    aucs = [auc(scores, passed) for scores, passed in problems]
    return [value for value in aucs if not math.isnan(value)]


def accuracies(pairs, before, after):
    """How often the chosen program of a pair wins, a tie is no win -> {row of the table: its mean,
    interval over problems and number of pairs}; a gain is after - before.

    `before`, `after`: [(score of chosen, score of rejected)] of each pair. Pairs with a mutant are
    a row of their own, where there are others: both sides have one author and about one length.
    """
    wins = {
        "initialisation": [chosen > rejected for chosen, rejected in before],
        "fine-tuned": [chosen > rejected for chosen, rejected in after],
        "longer program wins": [len(p.chosen) > len(p.rejected) for p in pairs],
        "shorter program wins": [len(p.chosen) < len(p.rejected) for p in pairs],
    }
    wins["gain"] = [b - a for a, b in zip(wins["initialisation"], wins["fine-tuned"])]
    mutants = [i for i, p in enumerate(pairs) if p.source.endswith(MUTANT)]
    others = [i for i, p in enumerate(pairs) if not p.source.endswith(MUTANT)]

    def row(name, chosen):
        problems = [problem_of(pairs[i]) for i in chosen]
        found = estimate([wins[name][i] for i in chosen], problems=problems, name="mean")
        return found | {"count": len(chosen)}

    rows = {name: row(name, others or mutants) for name in wins}
    if others and mutants:
        rows["fine-tuned, right over mutant"] = row("fine-tuned", mutants)
    return rows


def pair_rows(pairs, score_P2, seed):
    """Share of pairs whose chosen program has the higher score, a row a source; a tie is no win."""
    rows, gaps = [], (score_P2[:, 0] - score_P2[:, 1]).tolist()
    for part, some in parts_of([*zip(pairs, gaps)], lambda item: item[0].source).items():
        problems = [problem_of(p) for p, _ in some]
        row = {"part": part, "pairs": len(some), "problems": len(set(problems))}
        row |= estimate([gap > 0 for _, gap in some], seed, problems)
        row["ties"] = mean([gap == 0 for _, gap in some])
        row["longer wins"] = mean([len(p.chosen) > len(p.rejected) for p, _ in some])
        rows.append(row)
    return rows


def rm_bench_rows(pairs, score_P2, seed):
    """RM-Bench, whose items are three pairs, one a style (concise, detailed, with markdown) -> a
    row a domain and one of their mean. Every right answer is compared with every wrong one, and a
    tie loses. Easy: the right one has the richer style; normal: the same; hard: the poorer one.
    """
    scores, items, rows = {}, [], []
    for pair, score_2 in zip(pairs, score_P2, strict=True):  # ids repeat in other domains
        scores.setdefault((pair.source, problem_of(pair)), []).append(score_2)
    for (domain, _), score_32 in scores.items():
        if len(score_32) == 3:
            right_3, wrong_3 = np.transpose(score_32)
            gap_33 = right_3[:, None] - wrong_3  # style of the right answer, of the wrong one
            gaps = {"value": gap_33, "easy": gap_33[np.tril_indices(3, -1)]}
            gaps |= {"normal": gap_33.diagonal(), "hard": gap_33[np.triu_indices(3, 1)]}
            items.append({"domain": domain, "ties": np.mean(gap_33 == 0)})
            items[-1] |= {name: np.mean(gap > 0) for name, gap in gaps.items()}
    counts = Counter(item["domain"] for item in items)
    for domain in [*sorted(counts), "mean"]:
        some = [item for item in items if domain in (item["domain"], "mean")]
        # A domain counts as much as any other in the mean, whatever its number of items.
        weights = [1 / counts[item["domain"]] for item in some]
        row = {"domain": domain, "items": len(some)}
        for name in ("value", "easy", "normal", "hard", "ties"):
            values = [item[name] * weight / mean(weights) for item, weight in zip(some, weights)]
            row |= estimate(values, seed) if name == "value" else {name: mean(values)}
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# a choice among a problem's answers; each estimator is compared with brute force in the tests


def best_of_k(scores, passed, k):
    """P(the sample with the highest score of k passes), the mean over all k-subsets of the n
    samples; equal scores are chosen from by lot. Where `passed` is the score too, an oracle
    chooses: that is pass@k (Chen et al. 2021).

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
        # Programs vote with what they printed or returned on all tests.
        votes = Counter(answers[i] for i in drawn if answers[i] is not None)
        most = max(votes.values(), default=0)
        values.append(mean([passed[i] for i in drawn if votes[answers[i]] == most]))
    return mean(values)


def selected(rows, sizes, tests, scored, seed, suites=16):
    """One problem's answers -> {selector: [P(what it chooses of k passes) for k in sizes]}.

    An answer without a program is chosen only when there is nothing else. The unit tests that
    choose are drawn from those that grade, `suites` times: with all of them they are the oracle.
    """
    passed, cases = [row["passed"] for row in rows], range(rows[0]["num_tests"])
    answers, rng = [row["answer"] for row in rows], random.Random(f"{seed}-{rows[0]['problem']}")

    def by(key):
        scores = [-math.inf if row["code"] is None else key(row) for row in rows]
        return [best_of_k(scores, passed, k) for k in sizes]

    # The score is the number of the chosen tests that pass; an untried test is none.
    def by_tests(chosen):
        return by(lambda row: sum(row["verdicts"][i : i + 1] == ["pass"] for i in chosen))

    found = {"random": [mean(passed)] * len(sizes), "first valid": by(lambda row: 0.0)}
    found["majority vote"] = [majority_at_k(answers, passed, k, seed=seed) for k in sizes]
    for count in tests:
        drawn = [rng.sample(cases, min(count, len(cases))) for _ in range(suites)]
        name = f"{count} unit test{'s' * (count > 1)}"
        found[name] = np.mean([by_tests(chosen) for chosen in drawn], 0).tolist()
    found |= {"reward model": by(lambda row: row["score"])} if scored else {}
    return found | {"oracle": [best_of_k(passed, passed, k) for k in sizes]}
