"""What the runs of tiny/paper.sh say: a table with intervals over runs, and a figure.

    python tiny/paper.py table out/paper tiny/worth.png   # prints the table; also OUT/worth.md
    python tiny/paper.py few 8 out/few-8.jsonl            # 8 problems with tests

A value of a run is the mean over the held-out problems; an interval is 95% by Student's t over
runs, so one run has none. Half-finished seeds count in the arms that they have.
"""

import csv
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError, mean, run_cli, write_atomic, write_jsonl  # noqa: E402
from problems import load_problems  # noqa: E402

TESTS = (1, 2, 3, 6, 12)  # of each problem, that the reward or the selector sees
FEW = (2, 8, 64)  # problems with tests, for execution as the reward; all are 1200
MODELS = {  # reward models: how they were trained, and the end of their folders' names
    "150 problems": "-150", "600 problems": "-600", "1200 problems": "", "4000 problems": "-4000",
    "1 epoch": "-epochs-1", "4 epochs": "-epochs-4", "6 epochs": "-epochs-6",
    "early and late policies": "-recipe", "refreshed halfway": "-refreshed",
}  # fmt: skip
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5%, 1 to 9 degrees
MEASURES = {
    "avg@8": "after GRPO, held-out problems; 1200 problems with 12 tests unless another is named",
    "best of 16": "of the first policy's answers, chosen by",
    "AUC": "of the score within a problem, on these answers; reward model trained on",
    "pair accuracy": "on held-out pairs; reward model trained on",
}


# --------------------------------------------------------------------------------------------------
# runs -> values; None where a run is not finished


def json_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def after_grpo(run, arm, when="after"):
    """avg@8 on the held-out problems."""
    for found in json_rows(run / arm / "result.json"):
        return mean([value for part in found[when].values() for value in part["avg"]])


def accuracy(run, model):
    """Of a reward model on held-out pairs."""
    path = run / model / "result.json"
    return json.loads(path.read_text())["fine-tuned"]["mean"] if path.is_file() else None


def column_of(run, file, column, chosen_by=None):
    """A column of the row over all parts in what bench.py printed."""
    for row in json_rows(run / file):
        if row.get("part") == "all" and row.get("chosen by") == chosen_by:
            return row[column]


def unit_tests(k):
    """The name of a selector of bench.py."""
    return f"{k} unit test{'s' * (k > 1)}"


def arms():
    """{(measure, arm): function of a seed's folder}, in the order of the table."""
    found = {("avg@8", "untrained"): partial(after_grpo, arm="exec", when="before")}
    for k in TESTS:
        arm = "exec" if k == 12 else f"exec-tests-{k}"
        found["avg@8", f"execution, {unit_tests(k)}"] = partial(after_grpo, arm=arm)
    for n in FEW:
        arm = f"exec-problems-{n}"
        found["avg@8", f"execution, {n} problems"] = partial(after_grpo, arm=arm)
    for name, end in MODELS.items():
        found["avg@8", f"reward model, {name}"] = partial(after_grpo, arm=f"rm{end}")
    found["avg@8", "reward model, on 4000 problems without tests"] = partial(
        after_grpo, arm="rm-untested"
    )
    for name in ("random", "majority vote", *map(unit_tests, TESTS), "oracle"):
        found["best of 16", name] = partial(
            column_of, file="bon.jsonl", column="value", chosen_by=name
        )
    columns = {"best of 16": "best of n value", "AUC": "auc value"}
    for measure, column in columns.items():
        for name, end in MODELS.items():
            file = f"model{end}/store.jsonl"
            found[measure, f"reward model, {name}"] = partial(column_of, file=file, column=column)
    for name, end in MODELS.items():
        found["pair accuracy", f"reward model, {name}"] = partial(accuracy, model=f"model{end}")
    return found


def auc_over_steps(run, arm):
    """{step: AUC of the reward within held-out problems}, as the trainer measured it; the steps of
    a run that goes on from half of another are counted from there."""
    every, own = (steps_of(run / name) for name in ("rm", arm))
    with open(run / arm / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["audit_auc"]]
    return {every - own + int(row["step"]): float(row["audit_auc"]) for row in rows}


def steps_of(folder):
    return json.loads((folder / "args.json").read_text())["args"]["steps"]


def interval(values):
    """Values of runs -> (mean, low, high); nan where there is one run or none."""
    if len(values) < 2:
        return mean(values), float("nan"), float("nan")
    half = STUDENT[min(len(values), 10) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half


def worth(values, measure, arm):
    """How many tests a problem give what an arm gives, by the curve over K tests."""
    prefix = "execution, " if measure == "avg@8" else ""
    curve = [mean(values[measure, prefix + unit_tests(k)]) for k in TESTS]
    value = mean(values[measure, arm])
    if any(at != at for at in curve):  # a point of the curve was not run
        return ""
    if not curve[0] <= value <= curve[-1]:
        return "fewer than 1" if value < curve[0] else "more than 12"
    return f"{np.interp(value, np.maximum.accumulate(curve), TESTS):.1f}"


def table(values):
    """{(measure, arm): [value of a run]} -> Markdown."""
    lines = []
    for measure, about in MEASURES.items():
        lines += [f"\n**{measure}** {about}\n", "| arm | runs | mean | 95% interval | in tests |"]
        lines.append("|---|---|---|---|---|")
        for (of, arm), found in values.items():
            if of == measure and found:
                value, low, high = interval(found)
                tests = (
                    worth(values, of, arm)
                    if of in ("avg@8", "best of 16") and "reward" in arm
                    else ""
                )
                span = f"[{low:.3f}, {high:.3f}]" if len(found) > 1 else "-"
                cells = arm, len(found), f"{value:.3f}", span, tests
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# the figure


def draw(values, runs, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")

    def curve(axis, x, measure, names, label, **style):
        there = [(at, name) for at, name in zip(x, names) if values[measure, name]]
        if not there:
            return
        x, names = zip(*there)
        middle, low, high = np.array([interval(values[measure, name]) for name in names]).T
        few = [len(values[measure, name]) < 3 for name in names]  # their intervals say nothing
        low, high = np.where(few, middle, low), np.where(few, middle, high)
        (line,) = axis.plot(x, middle, marker="o", label=label, **style)
        axis.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())
        return line.get_color()

    def level(axis, measure, name, label, **style):
        if values[measure, name]:
            axis.axhline(mean(values[measure, name]), label=label, linestyle="--", **style)

    for measure, prefix, color in (
        ("avg@8", "execution, ", "tab:blue"),
        ("best of 16", "", "tab:green"),
    ):
        names = [prefix + unit_tests(k) for k in TESTS]
        what = "GRPO, rewarded by K tests" if prefix else "best of 16, chosen by K tests"
        curve(a, TESTS, measure, names, what, color=color)
        for width, name in ((1, "1200 problems"), (2.5, "4000 problems")):
            what = f"the same by the reward model ({name})"
            level(a, measure, f"reward model, {name}", what, color=color, linewidth=width)
    a.set(title="a. What is the reward model worth in tests?", xlabel="K: tests a problem")
    a.set_xticks(TESTS)
    problems = list(MODELS)[:4]
    for measure in MEASURES:
        names = [f"reward model, {name}" for name in problems]
        sizes = [int(name.split()[0]) for name in problems]
        label = measure + (" after GRPO" if measure == "avg@8" else "")
        color = curve(b, sizes, measure, names, label)
        for marker, name in (("v", "1 epoch"), ("^", "6 epochs")):
            value = interval(values[measure, f"reward model, {name}"])[0]
            label = f"the same at {name} (else 3)" if measure == "pair accuracy" else None
            b.plot(
                [1200], [value], marker, color=color, label=label, markersize=9, fillstyle="none"
            )
    b.set(title="b. What do more verified problems and epochs buy?", xscale="log")
    b.set(xlabel="verified problems that the reward model was trained on")
    b.set_xticks(sizes, sizes)
    b.set_xlim(130, 5000)
    b.minorticks_off()
    names = [*(f"execution, {n} problems" for n in FEW), f"execution, {unit_tests(12)}"]
    curve(c, [*FEW, 1200], "avg@8", names, "execution, all 12 tests")
    level(c, "avg@8", "reward model, 1200 problems", "reward model, the 1200 it was trained on")
    other = "reward model, on 4000 problems without tests"
    level(c, "avg@8", other, other, color="tab:orange")
    level(c, "avg@8", "untrained", "before training", color="grey")
    c.set(
        title="c. When are there too few problems with tests?",
        xscale="log",
        ylabel="avg@8 after GRPO",
    )
    c.set(xlabel="problems with tests, for execution as the reward")
    c.set_xticks([*FEW, 1200], [*FEW, 1200])
    c.minorticks_off()
    draw_auc(d, runs)
    for axis in (a, b):
        axis.set_ylabel("share")
    a.set_ylim(bottom=0.42)  # room for the legends
    b.set_ylim(top=1.1)
    for axis, place in ((a, "lower right"), (b, "upper left"), (c, "lower right"), (d, "best")):
        axis.legend(loc=place, fontsize="small", ncols=2 if axis is b else 1)
    figure.suptitle(f"Means of up to {len(runs)} runs; bands: 95% intervals of 3 or more")
    figure.savefig(path, dpi=110)


def draw_auc(axis, runs):
    """How well the reward follows execution over the steps, with and without a refresh."""
    for arm, label in (("rm", "one reward model"), ("rm-refreshed", "refreshed halfway")):
        found = [auc_over_steps(run, arm) for run in runs if after_grpo(run, arm)]
        if not found:
            continue
        steps = sorted(set.intersection(*map(set, found)))
        middle, low, high = zip(*(interval([one[step] for one in found]) for step in steps))
        axis.plot(steps, middle, marker="o", label=label)
        axis.fill_between(steps, low, high, alpha=0.15, linewidth=0)
    axis.set(title="d. Does the reward still follow execution?", xlabel="GRPO step")
    axis.set_ylabel("AUC of the reward within held-out problems")


def main():
    match sys.argv[1:]:
        case ["few", count, file] if count.isdecimal():
            write_jsonl(file, load_problems("toy:train", int(count)))
        case ["table", folder, figure]:
            runs = sorted(run for run in Path(folder).iterdir() if (run / "bon.jsonl").is_file())
            if not runs:
                raise UserError(f"{folder}: no finished seed; tiny/paper.sh makes them")
            found = {key: [value_of(run) for run in runs] for key, value_of in arms().items()}
            values = {key: [v for v in some if v is not None] for key, some in found.items()}
            text = table(values)
            write_atomic(Path(folder) / "worth.md", text)
            draw(values, runs, figure)
            print(f"{text}\n{figure}")
        case _:
            raise UserError("python tiny/paper.py table FOLDER PICTURE, or few COUNT FILE")


if __name__ == "__main__":
    run_cli(main)
