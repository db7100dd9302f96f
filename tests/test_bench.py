"""Estimators against brute force, and every command on tiny models.   pytest tests/test_bench.py"""

import io
import itertools
import json
import math
import random
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import speed
import torch

import bench
from codescaler import KVCache, RewardModel
from common import UserError, write_jsonl
from metrics import best_of_k, majority_at_k, pair_rows, rm_bench_rows
from pairs import Pair

ROOT = Path(__file__).parent.parent
POLICY, REWARD = str(ROOT / "tiny/policy"), str(ROOT / "tiny/reward")


def printed(*words):
    """What `python bench.py WORDS` prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["bench.py", *map(str, words)])
        bench.main()
    return out.getvalue()


def rows_of(*words):
    return [json.loads(line) for line in printed(*words, "--json").splitlines()]


# --------------------------------------------------------------------------------------------------
# estimators


@pytest.mark.parametrize("seed", range(12))
def test_estimators_are_means_over_all_subsets_and_orders_of_ties(seed):
    rng = random.Random(seed)
    n = rng.randint(1, 6)
    scores = [rng.choice([-math.inf, 0.0, 1.0, 2.5]) for _ in range(n)]
    passed = [rng.random() < 0.5 for _ in range(n)]
    answers = [rng.choice(["a", "b", "c", None]) for _ in range(n)]
    for k in range(1, n + 1):
        best, any_passes, majority = [], [], []
        for order in itertools.permutations(range(n), k):
            best.append(passed[max(order, key=lambda i: scores[i])])  # the first of equals
            any_passes.append(any(passed[i] for i in order))
            votes = [answers[i] for i in order if answers[i] is not None]
            most = max(map(votes.count, votes), default=0)
            majority.append(np.mean([passed[i] for i in order if votes.count(answers[i]) == most]))
        assert best_of_k(scores, passed, k) == pytest.approx(np.mean(best))
        assert best_of_k(passed, passed, k) == pytest.approx(np.mean(any_passes))  # pass@k
        estimated = majority_at_k(answers, passed, k, rounds=3000)
        assert estimated == pytest.approx(np.mean(majority), abs=0.03)


# --------------------------------------------------------------------------------------------------
# stores

SAMPLE = ["sample", "--model", POLICY, "--rm", REWARD, "--limit", 6, "--n", 4]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    printed(*SAMPLE, "--out", folder)
    return folder


def test_a_store_has_a_judged_row_an_answer(store):
    *_, groups = bench.read_store(store).values()
    assert len(groups) == 6 and all(len(rows) == 4 for rows in groups)
    for row in itertools.chain(*groups):
        assert (row["score"] is None) == (row["code"] is None) == (row["verdict"] == "invalid")
        assert row["passed"] == (row["verdict"] == "pass") == (set(row["verdicts"]) == {"pass"})
        assert row["num_tests"] == 12 and row["generate_s"] > 0 and row["prompt"]
    for rows in groups:  # programs that pass answer alike
        assert len({row["answer"] for row in rows if row["passed"]}) <= 1


def test_a_killed_store_goes_on_with_the_same_answers_and_no_other_arguments(store, tmp_path):
    lines = (store / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "args.json").write_text((store / "args.json").read_text())
    (tmp_path / "samples.jsonl").write_text("".join(lines[:10]) + lines[10][:40])
    with pytest.raises(UserError, match="--temperature 1.0, now it is 0.5"):
        printed(*SAMPLE, "--out", tmp_path, "--temperature", 0.5)
    printed(*SAMPLE, "--out", tmp_path)
    kept = ("problem", "completion", "code", "verdicts", "answer")
    texts = [(folder / "samples.jsonl").read_text() for folder in (store, tmp_path)]
    rows = ([json.loads(line) for line in text.splitlines()] for text in texts)
    one, two = ([[row[key] for key in kept] for row in some] for some in rows)
    assert one == two


def test_the_last_part_is_all_also_beside_rows_without_a_part():
    parts = bench.parts_of(["all", "toy", "all"], lambda row: row)
    assert [*parts.items()] == [("toy", ["toy"]), ("all", ["all", "toy", "all"])]


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="no samples.jsonl; .* makes one"):
        bench.read_store(tmp_path)
    write_jsonl(tmp_path / "samples.jsonl", [{"verdict": "pass"}])
    with pytest.raises(UserError, match="rows without verdicts"):
        bench.read_store(tmp_path)
    write_jsonl(tmp_path / "samples.jsonl", [{"verdict": None, "verdicts": []}])
    with pytest.raises(UserError, match="no answer was graded"):
        bench.read_store(tmp_path)


def fake_rows(problem, words, scores, source="x"):
    """Rows of a store with 2 tests: "10" passes the first test only, "" is no program."""
    for word, score in zip(words, scores, strict=True):
        verdicts = ["pass" if digit == "1" else "wrong_answer" for digit in word]
        verdict = "invalid" if not word else "pass" if word == "11" else "wrong_answer"
        row = {"problem": problem, "prompt": problem, "source": source, "verdict": verdict}
        row |= {"code": word and f"{word}{score}" or None, "answer": word or None, "score": score}
        yield row | {"verdicts": verdicts, "num_tests": 2}


@pytest.fixture
def small_store(tmp_path):
    rows = [*fake_rows("p", ["11", "10", "00", ""], [0.5, 2.0, 1.0, None]),
            *fake_rows("q", ["11", "11", "00", "00"], [3.0, 1.0, 2.0, 0.0], "y")]  # fmt: skip
    write_jsonl(tmp_path / "samples.jsonl", rows)
    return tmp_path


def test_pass_counts_the_store_but_for_what_was_not_graded(small_store):
    rows = rows_of("pass", "--store", small_store)
    found = {(row["part"], row["measure"]): row["value"] for row in rows}
    assert found["all", "avg@4"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert found["x", "pass@2"] == pytest.approx(1 / 2)
    assert found["y", "pass@2"] == pytest.approx(5 / 6)
    assert found["all", "valid"] == pytest.approx(7 / 8)
    file = small_store / "samples.jsonl"
    file.write_text(file.read_text().replace("invalid", "harness_error"))
    rows = rows_of("pass", "--store", small_store)
    assert [r["value"] for r in rows if r["measure"] == "avg@3"] == [pytest.approx(1 / 3)]


def test_best_of_4_by_each_selector(small_store):
    rows = rows_of("bon", "--store", small_store, "--tests", 1, 2)
    found = {row["chosen by"]: row["k=4"] for row in rows if row.get("part") == "x"}
    assert found["random"] == 1 / 4 and found["first valid"] == pytest.approx(1 / 3)
    assert found["reward model"] == 0.0 and found["majority vote"] == pytest.approx(1 / 3)
    assert found["2 unit tests"] == found["oracle"] == 1.0
    assert 0.5 <= found["1 unit test"] <= 1.0  # the first test ties two programs, the second none
    for words in (("bon", "--tests", 0), ("pass", "--seed", -1)):
        with pytest.raises(UserError, match=f"{words[1]} {words[2]}"):
            printed(*words, "--store", small_store)


# --------------------------------------------------------------------------------------------------
# rm


def test_rm_bench_counts_its_matrix_and_weighs_domains_alike():
    right, wrong = [3.0, 2.0, 1.0], [2.5, 2.0, 0.0]
    # Ids repeat from domain to domain. One code item, and three chat items that are all wrong.
    items = [("code/1", right, wrong), *((f"chat/{i}", [0.0] * 3, [1.0] * 3) for i in (1, 2, 3))]
    pairs = [Pair("q", "", "", f"{name}#{i}", name[:4]) for name, *_ in items for i in range(3)]
    score_P2 = np.array([sides for _, *both in items for sides in zip(*both)])
    pairs.append(Pair("q", "", "", "chat/4#0", "chat"))  # of whose item two pairs are left out
    chat, code, mean = rm_bench_rows(pairs, np.array([*score_P2, [1.0, 0.0]]), 0)
    # Concise beats all; detailed ties with detailed, beats markdown; markdown beats markdown.
    assert [code[name] for name in ("easy", "normal", "hard")] == pytest.approx([0, 2 / 3, 1])
    assert code["value"] == pytest.approx(5 / 9) and code["ties"] == pytest.approx(1 / 9)
    assert chat["value"] == 0 and chat["items"] == 3
    assert mean["domain"] == "mean" and mean["value"] == pytest.approx(5 / 18)


def test_a_file_of_rm_bench_is_scored_without_the_rows_that_do_not_fit(tmp_path):
    row = {"id": 1, "domain": "chat", "prompt": "q", "chosen": [*"abc"], "rejected": [*"def"]}
    rows = [row, row | {"domain": "math"}, row | {"chosen": [1]}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = rows_of("rm", "--rm", REWARD, "--pairs", f"rmbench:{tmp_path / 'a.jsonl'}")
    assert [(r["domain"], r["items"]) for r in found] == [("chat", 1), ("math", 1), ("mean", 2)]


def test_scores_beside_verdicts_follow_their_definitions(small_store, monkeypatch):
    rows = itertools.chain(*bench.read_store(small_store)["all"])
    score = {row["code"]: row["score"] for row in rows}
    monkeypatch.setattr(RewardModel, "score_many", lambda self, items: [score[c] for _, c in items])
    x, y, both = rows_of("rm", "--rm", REWARD, "--store", small_store)
    assert x["auc value"] == 0.0 and y["auc value"] == pytest.approx(3 / 4)
    assert both["part"] == "all" and both["programs"] == 7 and both["both"] == 2
    assert x["best of n value"] == 0.0 and y["best of n value"] == 1.0


def test_pair_accuracy():
    pairs = [Pair("q", "long", "x", f"{p}#0", source) for p, source in zip("abc", "sst")]
    rows = pair_rows(pairs, np.array([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), 0)
    assert [row["part"] for row in rows] == ["s", "t", "all"]
    for name in ("value", "ties"):
        assert [row[name] for row in rows] == pytest.approx([1 / 2, 0, 1 / 3])
    assert rows[2]["problems"] == 3 and rows[2]["longer wins"] == 1


# --------------------------------------------------------------------------------------------------
# memory


def test_memory_counts_are_those_of_the_model():
    assert bench.num_parameters(bench.SHAPES["qwen3-8b-shape"])[0] == 8190735360  # as published
    config = bench.SHAPES["tiny-shape"]
    cache = KVCache(config, 1, 100, torch.bfloat16)
    assert bench.token_bytes(config)[0] * 100 == 2 * (cache.k.nelement() + cache.v.nelement())


def test_memory_of_each_phase():
    def totals(*flags):
        rows = rows_of("memory", "--model", "qwen3-8b-shape", *flags)
        return {row["phase"]: row["GiB"] for row in rows if row["item"].startswith("total")}

    default = totals()
    assert [*default] == ["training", "reduction", "rollout", "scoring"]
    assert 60 < default["rollout"] < 77.5  # it fills the GPU, but not over it
    train = {flags: totals(*flags.split())["training"] for flags in ("--gpus 16", "", "--kl")}
    assert train["--gpus 16"] < train[""] < train["--kl"]
    assert train[""] < totals("--no-checkpointing")["training"]
    assert "scoring" not in totals("--rm", "none")


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
    runs = {(r, s): write_run(tmp_path / f"{r}{s}", s, r) for r in ("rm", "exec") for s in (0, 2)}
    args_of = {run: {"reward": r, "seed": s} for (r, s), run in runs.items()}
    panels = bench.run_panels(args_of)
    assert [*panels] == ["loss", "reward", "eval"]
    arms = [f"--reward {reward} (2 runs: mean and range)" for reward in ("rm", "exec")]
    assert [*panels["reward"]] == arms
    steps, *lines = panels["reward"][arms[0]]
    assert steps == [1, 2, 3, 4]
    assert [[*line] for line in lines] == [[2, 3, 4, 5], [1, 2, 3, 4], [3, 4, 5, 6]]
    assert panels["eval"][arms[0]][0] == [2, 4]


def test_plot_writes_a_picture(tmp_path, store, monkeypatch):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / f"run{seed}", seed) for seed in (0, 2)]
    (row,) = rows_of("plot", *runs, store, "--out", tmp_path / "plots" / "a.png")
    assert Path(row["picture"]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        printed("plot", *runs)


def test_show_prints_a_step_best_reward_first(tmp_path):
    row = {"step": 3, "number": 0, "problem": "a1", "prompt": "Add.", "completion": "text"}
    row |= {"reason": "ok", "score": 1.5, "reward": 1.7, "advantage": 0.2, "verdict": "pass"}
    row["code"] = "def f(): return 1"
    other = row | {"code": None, "reason": "no_block", "completion": "prose", "reward": 0.0}
    write_jsonl(tmp_path / "samples.jsonl", [other, row])
    out = printed("show", tmp_path, "--step", 3)
    assert "a1: Add." in out and "reward 1.700" in out and "no program: no_block" in out
    assert out.index(row["code"]) < out.index("prose")
    assert rows_of("show", tmp_path, "--step", 3) == [other, row]
    with pytest.raises(UserError, match="--step 4"):
        printed("show", tmp_path, "--step", 4)


# --------------------------------------------------------------------------------------------------
# speed


@pytest.mark.parametrize("row, size", [("score", 8), ("generate", (2, 3, 8))])
def test_speed_measures_what_a_plain_pass_computes(row, size):
    found = getattr(speed, row)(speed.Args(rounds=0), size)
    assert found["max_abs_diff"] < 1e-5 and found["ours_s"] > 0


def test_forced_stops_end_each_sample_where_they_say():
    model, stops = speed.random_model(speed.Args(), "lm"), [3, 1, 5, 2]
    groups = speed.generate_ours(model, [[2, 3], [4, 5, 6]], 2, 5, stops)
    assert [len(c.ids) for group in groups for c in group] == stops
