"""Estimators against brute force, and every command on tiny models.   pytest tests/test_bench.py"""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from bench import best_of_k, majority_at_k, pass_at_k
from codescaler import KVCache, Qwen3, RewardModel, load_model
from common import UserError
from problems import load_problems

ROOT = Path(__file__).parent.parent
POLICY, REWARD = str(ROOT / "tiny/policy"), str(ROOT / "tiny/reward")


def run_json(capsys, command, *argv):
    """Rows that a command prints with --json."""
    capsys.readouterr()
    command([*map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --------------------------------------------------------------------------------------------------
# estimators


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, c):
    passed = [i < c for i in range(n)]
    for k in range(1, n + 1):
        expected = np.mean([any(s) for s in itertools.combinations(passed, k)])
        assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(12))
def test_best_of_k_is_the_mean_over_all_subsets_and_orders_of_ties(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    scores = [rng.choice([-math.inf, 0.0, 1.0, 2.5]) for _ in range(n)]
    passed = [rng.random() < 0.5 for _ in range(n)]
    for k in range(1, n + 1):
        found = [
            passed[max(order, key=lambda i: scores[i])]  # max takes the first of equals
            for order in itertools.permutations(range(n), k)
        ]
        assert best_of_k(scores, passed, k) == pytest.approx(np.mean(found))


@pytest.mark.parametrize("seed", range(4))
def test_majority_is_close_to_the_mean_over_all_subsets(seed):
    rng = random.Random(seed)
    answers = [rng.choice(["a", "b", "c", None]) for _ in range(6)]
    passed = [answer == "a" or (answer == "b" and rng.random() < 0.3) for answer in answers]
    for k in range(1, 7):
        found = []
        for subset in itertools.combinations(range(6), k):
            votes = [answers[i] for i in subset if answers[i] is not None]
            most = max(map(votes.count, votes), default=0)
            winners = [i for i in subset if votes.count(answers[i]) == most]
            found.append(np.mean([passed[i] for i in winners]))
        estimated = majority_at_k(answers, passed, k, rounds=4000)
        assert estimated == pytest.approx(np.mean(found), abs=0.03)


# --------------------------------------------------------------------------------------------------
# stores


@pytest.fixture(scope="module")
def sample_argv():
    return ["--model", POLICY, "--rm", REWARD, "--limit", "6", "--n", "4", "--timed", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, sample_argv):
    folder = tmp_path_factory.mktemp("store")
    bench.bench_sample([*sample_argv, "--out", str(folder)])
    return folder


def test_a_store_has_a_judged_row_an_answer(store):
    groups = bench.read_store(store)
    assert len(groups) == 6 and all(len(rows) == 4 for rows in groups.values())
    for row in itertools.chain(*groups.values()):
        assert (row["score"] is None) == (row["code"] is None) == (row["verdict"] == "invalid")
        assert (row["verdict"] == "pass") == (set(row["verdicts"]) == {"pass"})
        assert row["num_tests"] == 12 and row["generate_s"] > 0 and row["prompt"]
    for rows in groups.values():  # programs that pass answer alike
        assert len({row["answer"] for row in rows if row["verdict"] == "pass"}) <= 1
    timed = ["tests_s" in rows[0] for rows in groups.values()]
    assert timed == [True] + [False] * 5


def test_a_killed_store_goes_on_with_the_same_answers(store, sample_argv, tmp_path):
    lines = (store / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "args.json").write_text((store / "args.json").read_text())
    (tmp_path / "samples.jsonl").write_text("".join(lines[:10]) + lines[10][:40])
    bench.bench_sample([*sample_argv, "--out", str(tmp_path)])
    kept = ("problem", "completion", "code", "verdicts", "answer")
    one, two = (
        [
            {key: row[key] for key in kept}
            for rows in bench.read_store(path).values()
            for row in rows
        ]
        for path in (store, tmp_path)
    )
    assert one == two


def test_a_store_of_other_arguments_is_refused_by_name(store, sample_argv):
    with pytest.raises(UserError, match="--temperature 1.0, now it is 0.5"):
        bench.bench_sample([*sample_argv, "--out", str(store), "--temperature", "0.5"])


@pytest.mark.parametrize(
    "text, message",
    [(None, "no samples.jsonl"), ('{"verdict": "pass"}\n', "rows without verdicts"),
     ('{"verdict": null, "verdicts": []}\n', "no answer was graded"), ("[1]\n", "not an object")],
)  # fmt: skip
def test_what_is_no_store_is_refused(tmp_path, text, message):
    if text:
        (tmp_path / "samples.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        bench.read_store(tmp_path)


def fake_rows(problem, verdicts, scores, source="x"):
    """Rows of a store with 2 tests: "10" passes the first test only, "" is no program."""
    rows = []
    for word, score in zip(verdicts, scores, strict=True):
        passed = ["pass" if digit == "1" else "wrong_answer" for digit in word]
        verdict = "invalid" if not word else "pass" if word == "11" else "wrong_answer"
        row = {"problem": problem, "prompt": problem, "source": source, "verdict": verdict}
        row |= {"code": word and f"{word}{score}" or None, "answer": word or None, "score": score}
        rows.append(
            row | {"verdicts": passed, "num_tests": 2, "pass_rate": passed.count("pass") / 2}
        )
    return rows


@pytest.fixture
def small_store(tmp_path):
    rows = fake_rows("p", ["11", "10", "00", ""], [0.5, 2.0, 1.0, None])
    rows += fake_rows("q", ["11", "11", "00", "00"], [3.0, 1.0, 2.0, 0.0], "y")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_pass_counts_the_store(small_store, capsys):
    rows = run_json(capsys, bench.bench_pass, "--store", small_store)
    found = {(row["part"], row["measure"]): row["value"] for row in rows}
    assert found["all", "avg@4"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert found["x", "pass@2"] == pytest.approx(1 / 2)
    assert found["y", "pass@2"] == pytest.approx(5 / 6)
    assert found["all", "valid"] == pytest.approx(7 / 8)


def test_best_of_4_by_each_selector(small_store, capsys):
    rows = run_json(capsys, bench.bench_bon, "--store", small_store, "--tests", "1", "2")
    found = {row["chosen by"]: row["k=4"] for row in rows if row.get("part") == "x"}
    assert found["random"] == 1 / 4 and found["first valid"] == pytest.approx(1 / 3)
    assert found["reward model"] == 0.0 and found["majority vote"] == pytest.approx(1 / 3)
    assert found["2 unit tests"] == found["oracle"] == 1.0
    gaps = {row["chosen by"]: row["gap_value"] for row in rows if row.get("part") == "all"}
    assert gaps["oracle"] == pytest.approx(-0.5) and gaps["reward model"] == 0.0
    assert 0.5 <= found["1 unit test"] <= 1.0  # the first test ties two programs, the second none


def test_an_answer_that_was_not_graded_is_left_out(small_store, capsys):
    file = small_store / "samples.jsonl"
    file.write_text(file.read_text().replace("invalid", "harness_error"))
    rows = run_json(capsys, bench.bench_pass, "--store", small_store)
    found = {(row["part"], row["measure"]): row["value"] for row in rows}
    assert found["x", "avg@3"] == pytest.approx(1 / 3)


def test_bon_refuses_numbers_of_tests_that_are_none(small_store):
    with pytest.raises(UserError, match="--tests 0"):
        bench.bench_bon(["--store", str(small_store), "--tests", "0"])


# --------------------------------------------------------------------------------------------------
# rm


class Scorer:
    """A reward model of fixed scores; a prompt "long" is too long for it."""

    def __init__(self, scores):
        self.scores = scores

    def fits(self, prompt):
        return prompt != "long"

    def score_many(self, items):
        return [self.scores[text] for _, text in items]


def test_rm_bench_counts_its_matrix():
    scores = dict(a=3.0, b=2.0, c=1.0, d=2.5, e=2.0, f=0.0)
    items = [
        ("code", "q", ["a", "b", "c"], ["d", "e", "f"]),
        ("chat", "long", ["a"] * 3, ["d"] * 3),
    ]
    row, mean, *matrix = bench.rm_bench(Scorer(scores), items, 0)
    # concise: beats d, e, f; detailed: ties e, beats f; markdown: beats f.
    assert (row["easy"], row["normal"], row["hard"]) == pytest.approx((0, 2 / 3, 1))
    assert row["value"] == pytest.approx(5 / 9) == mean["value"]
    assert row["ties"] == pytest.approx(1 / 9) and row["items"] == 1
    assert [list(line.values())[2:] for line in matrix] == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]


def test_rm_benchs_mean_is_over_domains():
    scores = {"good": 1.0, "bad": 0.0}
    right, wrong = ["good"] * 3, ["bad"] * 3
    items = [("code", "q", right, wrong)] + [("chat", "q", wrong, right)] * 3
    rows = bench.rm_bench(Scorer(scores), items, 0)
    assert [row["value"] for row in rows[:3]] == pytest.approx([0.0, 1.0, 0.5])


def test_store_rows_follow_their_definitions(small_store):
    groups = bench.read_store(small_store)
    scores = {row["code"]: row["score"] for rows in groups.values() for row in rows}
    x, y, both = bench.store_rows(Scorer(scores), groups, 0)
    assert x["auc value"] == 0.0 and y["auc value"] == pytest.approx(3 / 4)
    assert both["programs"] == 7 and both["both"] == 2
    assert x["best of n value"] == 0.0 and y["best of n value"] == 1.0


def test_pair_accuracy(tmp_path, capsys):
    pairs = [
        {"prompt": p.prompt, "chosen": p.solution, "rejected": p.solution.replace("xs", "None", 1),
         "id": f"{p.id}#0", "source": p.source} for p in load_problems("toy:test", 8)
    ]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = run_json(capsys, bench.bench_rm, "--rm", REWARD, "--pairs", file)
    model = RewardModel(REWARD, "cpu")
    wins = [np.subtract(*model.score(p["prompt"], [p["chosen"], p["rejected"]])) > 0 for p in pairs]
    assert rows[-1]["part"] == "all" and rows[-1]["value"] == pytest.approx(np.mean(wins))


# --------------------------------------------------------------------------------------------------
# memory


def test_memory_counts_are_those_of_the_model():
    for path, head in ((POLICY, "lm"), (REWARD, "score")):
        model = load_model(path, head, device="cpu")
        count = sum(p.numel() for p in model.parameters())
        assert bench.num_parameters(model.config, head)[0] == count
    with torch.device("meta"):
        untied = Qwen3(bench.SHAPES["qwen3-8b-shape"])
    assert bench.num_parameters(untied.config)[0] == sum(p.numel() for p in untied.parameters())
    cache = KVCache(model.config, 1, 100, torch.bfloat16)
    assert bench.token_bytes(model.config)[0] * 100 == 2 * (cache.k.nelement() + cache.v.nelement())


def test_the_rollout_fills_the_gpu_but_not_over_it(capsys):
    rows = run_json(capsys, bench.bench_memory, "--model", "qwen3-8b-shape", "--gpus", "8")
    total = {row["phase"]: row["GiB"] for row in rows if row["item"].startswith("total")}
    assert set(total) == {"training", "sharing of gradients", "rollout", "scoring"}
    assert 60 < total["rollout"] < 77.5


def test_more_gpus_need_less_each_and_a_reference_model_more(capsys):
    def training(*flags):
        rows = run_json(capsys, bench.bench_memory, "--rm", "none", *flags)
        return next(row["GiB"] for row in rows if row["item"].startswith("total"))

    assert training("--gpus", "16") < training() < training("--kl")
    assert training() < training("--no-checkpointing")


# --------------------------------------------------------------------------------------------------
# plot, show


def write_run(folder, seed, reward="rm"):
    folder.mkdir()
    args = {"args": {"reward": reward, "seed": seed, "out": str(folder)}}
    (folder / "args.json").write_text(json.dumps(args))
    lines = ["step,loss,reward,reasons,eval"]
    lines += [f"{s},0.1,{s + seed},no_block:2,{'' if s % 2 else 0.5}" for s in range(1, 5)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path):
    runs = [write_run(tmp_path / f"{r}{s}", s, r) for r in ("rm", "exec") for s in (0, 2)]
    arms = bench.arms_of(runs)
    assert {label: len(found) for label, found in arms.items()} == {
        "--reward rm": 2,
        "--reward exec": 2,
    }
    assert arms["--reward rm"][1]["reward"] == {1: 3.0, 2: 4.0, 3: 5.0, 4: 6.0}
    assert arms["--reward rm"][0]["eval"] == {2: 0.5, 4: 0.5}


def test_plot_writes_pictures(tmp_path, store, capsys):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / f"run{seed}", seed) for seed in (0, 2)]
    rows = run_json(capsys, bench.bench_plot, *runs, store, "--out", tmp_path / "plots")
    pictures = [Path(row["picture"]).read_bytes() for row in rows]
    assert len(pictures) == 2 and all(p.startswith(b"\x89PNG") for p in pictures)


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench.bench_plot([write_run(tmp_path / "run", 0)])


def test_show_prints_a_step_best_reward_first(tmp_path, capsys):
    row = {"step": 3, "number": 0, "problem": "a1", "prompt": "Add.", "completion": "text"}
    row |= {"reason": "ok", "score": 1.5, "reward": 1.7, "advantage": 0.2, "verdict": "pass"}
    row["code"] = "def f(): return 1"
    other = row | {"code": None, "reason": "no_block", "completion": "prose", "reward": 0.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps(other) + "\n" + json.dumps(row) + "\n")
    bench.bench_show([str(tmp_path), "--step", "3"])
    out = capsys.readouterr().out
    assert "a1: Add." in out and "reward 1.700" in out and "no program: no_block" in out
    assert out.index(row["code"]) < out.index("prose")
    with pytest.raises(UserError, match="--step 4"):
        bench.bench_show([str(tmp_path), "--step", "4"])


# --------------------------------------------------------------------------------------------------
# speed


@pytest.mark.parametrize("row, size", [("score", 8), ("generate", (2, 3, 8))])
def test_speed_measures_what_a_plain_pass_computes(row, size):
    import speed

    found = getattr(speed, row)(speed.Args(rounds=1, seconds=0), size)
    assert found["max_abs_diff"] < 1e-5 and found["ours_s"] > 0


def test_forced_stops_end_each_sample_where_they_say():
    import speed

    model = speed.random_model(speed.Args(), "lm")
    stops = [3, 1, 5, 2]
    groups = speed.generate_ours(model, [[2, 3], [4, 5, 6]], 2, 5, stops)
    assert [len(c.ids) for group in groups for c in group] == stops
