"""What is measured: of a training step's samples, of a policy on held-out problems, of a reward
model on held-out pairs, of a choice among answers. Rows in, numbers and lines of text out; nothing
here decides anything. Shapes: P pairs, N items (M of one domain), 2 chosen and rejected, 3 styles.
"""

import itertools
import math
import random
from collections import Counter

import numpy as np

from common import auc, bootstrap, mean
from pairs import MUTANT, NOT_GRADED, problem_of
from runs import gather_lists


def estimate(values, seed, groups=None, prefix=""):
    """Values of problems -> columns of a table: their mean and its interval."""
    found = bootstrap(values, groups, seed=seed) if len(values) else [math.nan] * 3
    return dict(zip((f"{prefix}value", f"{prefix}low", f"{prefix}high"), found))


# --------------------------------------------------------------------------------------------------
# a training step


def format_eta(seconds):
    """Seconds -> 1m05s."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


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


def step_line(step, args, m, eta):
    """What is printed of a step."""
    parts = [
        f"step {step}/{args.steps} | reward {m['reward']:.3f}",
        f"pass {m['pass_rate']:.2f}" if m["pass_rate"] != "" else "pass -",
        f"valid {m['valid_rate']:.2f} | kl {m.get('kl', 0.0):.4f}",
        f"clip {m.get('clip_low', 0.0) + m.get('clip_high', 0.0):.3f}",
        f"ent {m.get('entropy', 0.0):.2f} | gnorm {m['grad_norm']:.2f} | len {m['length']:.0f}",
        f"{m['tokens'] / m['seconds'] / 1000:.1f}k tok/s | eta {format_eta(eta)}",
        f"CUT {m['truncated']:.0%}: raise --max-new-tokens" if m["truncated"] > 0.5 else "",
        "skipped: gradient not finite" if m.get("skipped") else "",
        m["reasons"],
    ]
    return " | ".join(part for part in parts if part)


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
    # Within a problem: scores of different problems need not be comparable.
    aucs = [auc(row["rewards"], row["passed"]) for row in rows]
    aucs = [value for value in aucs if not math.isnan(value)]
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
    names = {"audit_reward": "reward", "audit_auc": "auc", "fail_top": "fail_top"}
    parts += [f"{name} {found[key]:.2f}" for key, name in names.items() if found[key] != ""]
    if len(graded) < len(rows):
        parts.append(f"{len(rows) - len(graded)} problems could not be graded")
    return " | ".join(parts)


def by_part(rows):
    """Evaluation rows -> {part: {name: [a value a problem]}}, as result.json has them."""
    parts = {}
    for row in rows:
        if row["avg"] is not None:
            for name in ("avg", "any", "valid", "reward"):
                parts.setdefault(row["part"], {}).setdefault(name, []).append(row[name])
    return parts


def final_table(before, after, args):
    """Held-out results before and after as lines of text, one a part of the data."""
    # Of the problems that were graded both times, so that a gain is that of the same problems.
    n, graded = args.eval_group, {row["number"] for row in before if row["avg"] is not None}
    graded &= {row["number"] for row in after if row["avg"] is not None}
    before, after = ([r for r in rows if r["number"] in graded] for rows in (before, after))
    lines = [
        f"{len(graded)} problems ({args.eval_problems}), {n} samples each, graded by execution"
    ]
    heads = f"{f'avg@{n}':>17}{'gain [95% interval]':>28}{f'pass@{n}':>17}{'valid':>17}"
    lines.append(f"{'part':<16}{'problems':>9}{heads}")
    parts = list(by_part(before))
    for part in [*parts, "all"] if len(parts) > 1 else parts:
        one, two = ([r for r in rows if part in (r["part"], "all")] for rows in (before, after))
        gains = [b["avg"] - a["avg"] for a, b in zip(one, two, strict=True)]
        gain, low, high = bootstrap(gains)
        avg, any_, valid = (
            f"{mean([r[key] for r in one]):.3f} -> {mean([r[key] for r in two]):.3f}"
            for key in ("avg", "any", "valid")
        )
        interval = f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"{part:<16}{len(one):>9}{avg:>17}{interval:>28}{any_:>17}{valid:>17}")
    return lines


# --------------------------------------------------------------------------------------------------
# a reward model on held-out pairs


def accuracies(pairs, before, after):
    """{row of the table: [(1 where the chosen program wins, its problem), ...]}; a tie is no win,
    and a gain is after - before.

    `before`, `after`: [(score of chosen, score of rejected)] of each pair. Pairs with a mutant are
    a row of their own, where there are others: both sides have one author and about one length.
    """
    mutant = [p.source.endswith(MUTANT) for p in pairs]
    mutant = [False] * len(pairs) if all(mutant) else mutant
    wins = {
        "initialisation": [float(c > r) for c, r in before],
        "fine-tuned": [float(c > r) for c, r in after],
        "longer program wins": [float(len(p.chosen) > len(p.rejected)) for p in pairs],
        "shorter program wins": [float(len(p.chosen) < len(p.rejected)) for p in pairs],
    }
    wins["gain"] = [b - a for a, b in zip(wins["initialisation"], wins["fine-tuned"])]
    rows = {
        name: [(value, problem_of(p)) for value, p, m in zip(values, pairs, mutant) if not m]
        for name, values in wins.items()
    }
    changed = zip(wins["fine-tuned"], pairs, mutant)
    rows["fine-tuned, right over mutant"] = [(value, problem_of(p)) for value, p, m in changed if m]
    return {name: values for name, values in rows.items() if values}


def pair_rows(pairs, score_P2, seed):
    """Share of pairs whose chosen program has the higher score, a row a source; a tie is no win."""
    rows, gap_P = [], score_P2[:, 0] - score_P2[:, 1]
    for part in dict.fromkeys([*(p.source for p in pairs), "all"]):
        some = [i for i, p in enumerate(pairs) if part in (p.source, "all")]
        problems = [problem_of(pairs[i]) for i in some]
        row = {"part": part, "pairs": len(some), "problems": len(set(problems))}
        row |= estimate(gap_P[some] > 0, seed, problems)
        row["ties"] = mean(gap_P[some] == 0)
        row["longer wins"] = mean([len(pairs[i].chosen) > len(pairs[i].rejected) for i in some])
        rows.append(row)
    return rows


def rm_bench_rows(pairs, score_P2, seed):
    """RM-Bench, whose items are three pairs, one a style -> a row a domain and one of their mean.

    "c>d": how often the right answer in concise style scores above the wrong one in detailed style
    (m: markdown); a tie loses. It is easy where the right answer has the richer style, hard where
    the wrong one has it.
    """
    items, rows = {}, []  # domain and id name an item: ids repeat
    for pair, score_2 in zip(pairs, score_P2, strict=True):
        items.setdefault((pair.source, problem_of(pair)), []).append(score_2)
    items = {item: scores for item, scores in items.items() if len(scores) == 3}
    # Every right answer against every wrong one: [item, style of the right, style of the wrong].
    score_N32 = np.array([*items.values()]).reshape(-1, 3, 2)
    gap_N33 = score_N32[:, :, None, 0] - score_N32[:, None, :, 1]
    wins_N33, easy, hard = gap_N33 > 0, np.tril_indices(3, -1), np.triu_indices(3, 1)
    columns = {"easy": wins_N33[:, *easy].mean(1), "normal": wins_N33.trace(axis1=1, axis2=2) / 3}
    columns |= {"hard": wins_N33[:, *hard].mean(1), "ties": (gap_N33 == 0).mean((1, 2))}
    columns |= {f"{'cdm'[i]}>{'cdm'[j]}": wins_N33[:, i, j] for i, j in np.ndindex(3, 3)}
    domain_N = np.array([domain for domain, _ in items])
    domains, index_N, counts = np.unique(domain_N, return_inverse=True, return_counts=True)
    for domain in [*domains, "mean"]:
        some = (domain_N == domain) | (domain == "mean")
        # A domain counts as much as any other, whatever its number of items.
        weight_M = 1 / counts[index_N[some]]
        weight_M /= weight_M.mean()
        row = {"domain": domain, "items": int(some.sum())}
        row |= estimate(wins_N33[some].mean((1, 2)) * weight_M, seed)
        for name, value_N in columns.items():
            row[name] = float((value_N[some] * weight_M).mean())
        rows.append(row)
    return rows


def interval_rows(rows):
    """{name: [(value, problem), ...]} -> (lines of text, what result.json keeps): means with 95%
    intervals over problems."""
    lines, result = [], {}
    for name, values in rows.items():
        share, low, high = bootstrap(*zip(*values))
        count, problems = len(values), len({problem for _, problem in values})
        where = f"{count} pairs of {problems} problems" if count > problems else f"{count} problems"
        lines.append(f"{name:<40}{share:>9.3f}   [{low:.3f}, {high:.3f}]   {where}")
        result[name] = {"mean": share, "low": low, "high": high, "count": count}
    return lines, result


def auc_rows(programs, scores):
    """Does the score follow execution? [(problem, ..., passed)] and their scores -> [(AUC within a
    problem, problem)], of problems with a passing and a failing program."""
    groups = {}
    for (problem, *_, passed), score in zip(programs, scores, strict=True):
        groups.setdefault(problem, []).append((score, passed))
    found = [(auc(*zip(*group)), problem) for problem, group in groups.items()]
    return [(value, problem) for value, problem in found if not math.isnan(value)]


# --------------------------------------------------------------------------------------------------
# a choice among a problem's answers; each estimator is compared with brute force in the tests


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
        # Programs vote with what they printed or returned on all tests.
        votes = Counter(answers[i] for i in drawn if answers[i] is not None)
        most = max(votes.values(), default=0)
        values.append(mean([passed[i] for i in drawn if votes[answers[i]] == most]))
    return mean(values)


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

    # The score is the number of the chosen tests that pass; an untried test is none.
    def by_tests(chosen):
        return by(lambda row: sum(row["verdicts"][i : i + 1] == ["pass"] for i in chosen))

    found = {"random": [mean(passed)] * len(sizes), "first valid": by(lambda row: 0.0)}
    found["majority vote"] = [majority_at_k(answers, passed, k, seed=seed) for k in sizes]
    for count in tests:
        suites = [rng.sample(cases, min(count, len(cases))) for _ in range(SUITES)]
        name = f"{count} unit test{'s' * (count > 1)}"
        found[name] = np.mean([by_tests(suite) for suite in suites], 0).tolist()
    found |= {"reward model": by(lambda row: row["score"])} if scored else {}
    return found | {"oracle": [pass_at_k(len(rows), sum(passed), k) for k in sizes]}
