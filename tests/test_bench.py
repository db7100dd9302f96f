"""Estimators against brute force, and every command on tiny models and files.    pytest tests/test_bench.py"""

import fcntl
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import problems as data  # not `Tests` by name: pytest would collect it
import train_rm
from bench import best_of_k, majority_at_k, pass_at_k, sign_flip_p, spearman
from codescaler import Config, KVCache, Qwen3, RewardModel, load_model
from common import UserError, bootstrap
from pairs import load_pairs
from problems import load_problems
from sandbox import Sandbox

ROOT = Path(__file__).parent.parent
POLICY, REWARD = str(ROOT / "tiny/policy"), str(ROOT / "tiny/reward")


def run_json(capsys, command, argv):
    """Rows that a command prints with --json."""
    capsys.readouterr()
    command([*map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_printed_settings_are_commands(monkeypatch, capsys):
    bench.bench_settings([])
    text = capsys.readouterr().out.replace("\\\n", " ")
    commands = re.findall(r"python bench\.py (\w+) (.*?)(?: {2,}#.*)?$", text, re.M)
    assert len(commands) == 9 and {name for name, _ in commands} == {"sample", "pass", "bon", "rm"}
    parse, parsed = bench.parse_args, []

    def stop(cls, argv, about):
        parsed.append(parse(cls, argv, about=about))
        raise UserError("parsed, not run")

    monkeypatch.setattr(bench, "parse_args", stop)
    for name, arguments in commands:
        with pytest.raises(UserError, match="parsed, not run"):
            bench.COMMANDS[name](shlex.split(arguments))
    assert (parsed[0].temperature, parsed[0].top_p, parsed[0].n, parsed[0].extract) == (0.6, 0.95, 8, "last")


# ---------------------------------------------------------------------------------------------------------- estimators


def subsets(n, k):
    return list(itertools.combinations(range(n), k))


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, c in ((1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)):
        passed = [i < c for i in range(n)]
        for k in range(1, n + 1):
            expected = np.mean([any(passed[i] for i in s) for s in subsets(n, k)])
            assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_best_of_k_is_the_mean_over_all_subsets_and_orders_of_ties():
    rng = random.Random(0)
    for _ in range(12):
        n = rng.randint(1, 5)
        scores = [rng.choice([-math.inf, 0.0, 1.0, 2.5]) for _ in range(n)]
        passed = [rng.random() < 0.5 for _ in range(n)]
        for k, verify in itertools.product(range(1, n + 1), (1, 2, 3)):
            found = []
            for order in itertools.permutations(range(n), k):  # every order of every subset: ties fall either way
                top = sorted(order, key=lambda i: -scores[i])[:verify]
                found.append(any(passed[i] for i in top))
            assert best_of_k(scores, passed, k, verify) == pytest.approx(np.mean(found)), (scores, passed, k, verify)


def test_best_of_k_has_the_right_limits():
    scores, passed = [0.3, 0.9, 0.1, 0.5], [True, False, False, True]
    assert best_of_k(scores, passed, 1) == pytest.approx(0.5)  # of one sample there is no choice
    assert best_of_k(scores, passed, 4) == 0.0  # the favourite of all fails
    assert all(best_of_k(scores, passed, k, verify=4) == pytest.approx(pass_at_k(4, 2, k)) for k in range(1, 5))


def test_majority_is_the_mean_over_all_subsets():
    rng = random.Random(1)
    for _ in range(20):
        n = rng.randint(1, 7)
        answers = [rng.choice(["a", "b", "c", None]) for _ in range(n)]
        passed = [answer == "a" or (answer == "b" and rng.random() < 0.3) for answer in answers]
        share = {a: np.mean([p for x, p in zip(answers, passed) if x == a]) for a in answers if a is not None}
        found = majority_at_k(tuple(answers), tuple(passed))
        assert len(found) == n
        for k in range(1, n + 1):
            values = []
            for subset in subsets(n, k):
                votes = [answers[i] for i in subset if answers[i] is not None]
                most = max(map(votes.count, votes), default=0)
                winners = [a for a in set(votes) if votes.count(a) == most]
                values.append(np.mean([share[a] for a in winners]) if winners else 0.0)
            assert found[k - 1] == pytest.approx(np.mean(values)), (answers, passed, k)


def test_spearman_equals_pearson_of_mean_ranks():
    x, y = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 0.0, 0.5, 0.0, 0.0]
    rank = {value: np.mean([i for i, v in enumerate(sorted(x)) if v == value]) for value in x}
    assert bench.ranks(x).tolist() == [rank[v] for v in x]
    assert spearman(x, y) == pytest.approx(np.corrcoef(bench.ranks(x), bench.ranks(y))[0, 1])
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(
        -1
    )
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_sign_flip_test_counts_the_sign_patterns():
    gaps = [0.3, 0.1, -0.05, 0.2]
    flips = [abs(sum(s * g for s, g in zip(signs, gaps))) for signs in itertools.product((1, -1), repeat=4)]
    assert sign_flip_p(gaps) == pytest.approx(np.mean([f >= abs(sum(gaps)) - 1e-12 for f in flips]))
    assert sign_flip_p([0.1] * 5) == 2 / 32
    assert sign_flip_p([0.0] * 40) == 1.0 and sign_flip_p([1.0] * 40) < 0.001


def test_interval_agrees_with_the_bootstrap_over_groups_of_one():
    values = [float(i % 3 == 0) for i in range(90)]
    ours, theirs = bootstrap(values), bootstrap(values, range(90))
    assert ours[0] == pytest.approx(theirs[0]) and ours[1:] == pytest.approx(theirs[1:], abs=0.03)
    assert bench.paired([1.0, 1.0], [0.5, 0.5]) == (0.5, 0.5, 0.5)
    for mean, *ends in (bootstrap([0.5]), bootstrap([0.0, 1.0], "aa")):  # one problem says nothing about others
        assert mean == 0.5 and np.isnan(ends).all()


def test_t_interval():
    value, low, high = bench.t_interval([1.0, 2.0, 3.0])  # standard error 1 / sqrt(3), t = 4.303 with 2 degrees
    assert (
        value == 2.0 and high - value == pytest.approx(4.303 / math.sqrt(3)) and value - low == pytest.approx(high - 2)
    )
    assert math.isnan(bench.t_interval([1.0])[1])


# --------------------------------------------------------------------------------------------------- sample, pass, bon


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    bench.bench_sample(["--model", POLICY, "--rm", REWARD, "--limit", "6", "--n", "4", "--timed", "1", "--timed-tests",
                        "14", "--inject", "solution", "--out", str(folder), "--json"])  # fmt: skip
    return folder


def test_a_store_that_is_being_filled_is_not_filled_twice(tmp_path):
    command = [sys.executable, "bench.py", "sample", "--rm", "none", "--limit", "4", "--n", "1", "--out", str(tmp_path)]
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is in use by another run" in done.stderr
    assert not (tmp_path / "store.jsonl").exists()


def test_store_has_a_header_and_a_row_a_sample(store):
    header, groups = bench.read_store(store)
    assert header["n"] == 4 and header["model"] == POLICY and header["extract"] == "strict" and header["torch"]
    assert len(groups) == 6 and all(len(rows) == 5 for rows in groups.values())
    for rows in groups.values():
        assert [row["sample"] for row in rows] == [0, 1, 2, 3, 4]
        assert rows[4]["verdict"] == "pass" and rows[4]["mean_logp"] is None  # the injected solution
        for row in rows:
            assert (row["score"] is None) == (row["code"] is None)
            assert row["mean_logp"] is None or row["mean_logp"] <= 0
            assert (row["verdict"] == "invalid") == (row["code"] is None)
            assert row["verdict"] != "pass" or (row["answer"] == rows[4]["answer"] and set(row["verdicts"]) == {"pass"})
    timed = [rows[0]["batched_s"] is not None and rows[0]["split_s"] > 0 for rows in groups.values()]
    assert timed == [True] + [False] * 5


def test_a_killed_store_goes_on_with_the_same_samples(store, tmp_path):
    whole = (store / "store.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "store.jsonl").write_text("".join(whole[:13]) + whole[13][:40])  # two problems and a half, torn
    argv = ["--model", POLICY, "--rm", REWARD, "--limit", "6", "--n", "4", "--timed", "1", "--timed-tests", "14",
            "--inject", "solution", "--out", str(tmp_path)]  # fmt: skip
    bench.bench_sample(argv)
    kept = ("problem", "sample", "completion", "code", "reason", "verdicts", "answer")
    rows = [[{k: row[k] for k in kept} for row in itertools.chain(*bench.read_store(path)[1].values())]
            for path in (store, tmp_path)]  # fmt: skip
    assert rows[0] == rows[1]
    with pytest.raises(UserError, match="its header has temperature 1.0, now it is 0.5"):
        bench.bench_sample([*argv, "--temperature", "0.5"])


def test_a_start_that_failed_and_another_version_do_not_bind_a_store(tmp_path):
    argv = ["--limit", "1", "--n", "1", "--max-new-tokens", "8", "--out", str(tmp_path)]
    for wrong in (["--rm", "nowhere"], ["--rm", "none", "--prompt-style", "x"], ["--rm", "none", "--sandbox", "x"]):
        with pytest.raises(UserError):
            bench.bench_sample([*argv, *wrong])
    assert not (tmp_path / "store.jsonl").exists()
    bench.bench_sample([*argv, "--rm", "none"])
    header, *rows = map(json.loads, open(tmp_path / "store.jsonl"))
    older = {k: v for k, v in header.items() if k not in ("problems_id", "rm_prompt")}
    (tmp_path / "store.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (older, *rows)))
    bench.bench_sample([*argv, "--rm", "none"])
    other = header | {"problems_id": "other problems"}
    (tmp_path / "store.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (other, *rows)))
    with pytest.raises(UserError, match="its header has problems_id 'other problems'"):
        bench.bench_sample([*argv, "--rm", "none"])


def test_a_store_that_is_not_whole_says_so(store, tmp_path, capsys):
    whole = (store / "store.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "store.jsonl").write_text("".join(whole[:13]))
    bench.bench_pass(["--store", str(tmp_path)])
    assert "holds 2 of 6 problems" in capsys.readouterr().err
    header, row = json.loads(whole[0]), json.loads(whole[1])
    del row["verdict"]
    for text in ("{}", '{"header": 1}', "[1]", *(json.dumps(header) + "\n" + json.dumps(bad) for bad in ([1, 2], row))):
        (tmp_path / "store.jsonl").write_text(text + "\n")
        with pytest.raises(UserError, match="expected a store of `bench.py sample`"):
            bench.bench_pass(["--store", str(tmp_path)])
    (tmp_path / "store.jsonl").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(UserError, match="expected a store"):
        bench.bench_pass(["--store", str(tmp_path)])


def test_scores_of_texts_that_the_model_does_not_read_are_refused(store, tmp_path):
    header, *rows = (store / "store.jsonl").read_text().splitlines(keepends=True)
    changed = json.dumps(json.loads(header) | {"rm_prompt": "full"}) + "\n"
    (tmp_path / "store.jsonl").write_text(changed + "".join(rows))
    with pytest.raises(UserError, match="was read as full statements"):
        bench.bench_rm(["--rm", REWARD, "--store", str(tmp_path)])


def test_pass_and_bon_agree_with_the_store(store, capsys):
    groups = bench.read_store(store)[1]
    passed = [[row["verdict"] == "pass" for row in rows] for rows in groups.values()]
    rows = run_json(capsys, bench.bench_pass, ["--store", store])
    found = {row["measure"]: row["value"] for row in rows if row["part"] == "all"}
    assert found["avg@5"] == pytest.approx(np.mean(passed)) and found["pass@5"] == 1.0
    rows = run_json(capsys, bench.bench_bon, ["--store", store, "--tests", "2"])
    value = {(row["k"], row["selector"]): row["accuracy"] for row in rows if row.get("part") == "all"}
    assert {k for k, _ in value} == {1, 2, 3, 4, 5}
    for k in range(1, 6):
        assert value[k, "oracle"] == pytest.approx(found.get(f"pass@{k}", value[k, "oracle"]))
        assert all(value[k, name] <= value[k, "oracle"] + 1e-9 for kk, name in value if kk == k)
        assert value[k, "reward model, verify 2"] >= value[k, "reward model"] - 1e-9
    best = [max((r for r in rows if r["code"] is not None), key=lambda r: r["score"]) for rows in groups.values()]
    assert value[5, "reward model"] == pytest.approx(np.mean([r["verdict"] == "pass" for r in best]), abs=0.01)
    timing = next(row for row in rows if "timing" in row)
    assert timing["tests_apart_ms_p50"] > 0 and timing["generate_ms_p95"] >= timing["generate_ms_p50"] > 0


MBPP = [
    {"text": "Add two numbers.", "code": "def add(a, b):\r\n    return a + b", "task_id": 1, "test_setup_code": "",
     "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]},
    {"text": "Largest item.", "code": "def largest(xs):\n    return max(xs)", "task_id": 2, "test_setup_code": "",
     "test_list": ["assert largest([1, 5]) == 5", "assert largest([2]) == 2"]},
]  # fmt: skip


def test_with_reference_solutions_as_samples_the_oracle_is_1(tmp_path, capsys):
    file = tmp_path / "mbpp.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MBPP))
    bench.bench_sample(["--n", "0", "--inject", "solution", "--rm", "none", "--problems", f"mbpp:{file}", "--extract",
                        "last", "--out", str(tmp_path / "s")])  # fmt: skip
    assert [r["value"] for r in run_json(capsys, bench.bench_pass, ["--store", tmp_path / "s"])] == [1.0, 1.0]
    rows = run_json(capsys, bench.bench_bon, ["--store", tmp_path / "s"])
    assert {r["selector"]: r["accuracy"] for r in rows if r.get("k") == 1}["oracle"] == 1.0
    assert not any("reward model" in r.get("selector", "") for r in rows)


def test_answers_are_what_programs_return_and_print():
    call = data.Tests("call", [{"args": [2], "expected": 0}, {"args": [3], "expected": 0}], "f")
    stdin = data.Tests("stdin", [{"input": "2\n", "output": "x"}])
    asserts = data.Tests("assert", [{"assert": "assert f(2) == 0"}])
    codes = ["def f(x): return x * 2", "def f(y):\n    return y + y", "def f(x): return x ** 2", "def f(x): 1 / 0"]
    with Sandbox(1, "basic") as sandbox:

        def answers(tests, codes):
            return [r.answer for r in sandbox.map([(code, tests) for code in codes], stop_early=False)]

        same, also, other, broken = answers(call, codes)
        assert same == also and same != other and broken is None
        one, two, three = answers(stdin, ["print(int(input()) * 2)", "print('4 ')", "print(5)"])
        assert one == two != three
        twice, square = answers(asserts, [codes[0], codes[2]])
        assert twice == square is not None  # 2 * 2 == 2 ** 2


def test_ungraded_samples_are_left_out_and_a_store_without_any_is_refused():
    rows = {"p": [{"verdict": "pass"}, {"verdict": "harness_error"}, {"verdict": None}]}
    assert bench.graded_groups(rows) == {"p": [{"verdict": "pass"}]}
    with pytest.raises(UserError, match="no sample was graded"):
        bench.graded_groups({"p": [{"verdict": None}]})


@pytest.mark.parametrize("argv, message", [
    (["--n", "0"], "--n 0"), (["--inject", "tests"], "--inject tests"), (["--rm", "nowhere"], "nowhere"),
])  # fmt: skip
def test_sample_mistakes(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bench.bench_sample(["--model", POLICY, "--limit", "2", "--out", str(tmp_path), *argv])


# ------------------------------------------------------------------------------------------------------------------ rm


@pytest.fixture(scope="module")
def reward_model():
    return RewardModel(REWARD, device="cpu")


def rmbench_rows():
    answers = [f"answer {i} {'word ' * (i % 3)}" for i in range(24)]
    return [
        {"id": f"{domain}/{i}", "domain": domain, "prompt": f"question {i}", "chosen": answers[6 * i : 6 * i + 3],
         "rejected": answers[6 * i + 3 : 6 * i + 6]}
        for i, domain in enumerate(["chat", "code", "safety-refuse", "safety-response"])
    ]  # fmt: skip


def test_rm_bench_matrix_equals_single_comparisons(reward_model, tmp_path, capsys):
    file = tmp_path / "rm.json"
    file.write_text(json.dumps(rmbench_rows()))
    rows = run_json(capsys, bench.bench_rm, ["--rm", REWARD, "--pairs", f"rmbench:{file}"])
    table = {row["domain"]: row for row in rows if "easy" in row}
    assert table["safety"]["items"] == 2 and list(table) == ["chat", "code", "safety", "all"]
    cells = {"easy": [], "normal": [], "hard": []}
    for row in rmbench_rows()[2:]:
        score = {s: reward_model.score(row["prompt"], [s])[0] for s in row["chosen"] + row["rejected"]}
        for i, j in itertools.product(range(3), repeat=2):
            level = "normal" if i == j else "easy" if i > j else "hard"
            cells[level].append(score[row["chosen"][i]] > score[row["rejected"][j]])
    for level, wins in cells.items():
        assert table["safety"][level] == pytest.approx(np.mean(wins))
    assert table["all"]["average"] == pytest.approx(np.mean([table[d]["average"] for d in ("chat", "code", "safety")]))
    matrices = [row for row in rows if "chosen" in row and row["domain"] == "chat"]
    assert [row["chosen"] for row in matrices] == ["concise", "detailed", "markdown"]


def test_a_file_of_one_domain_names_it_and_bad_rows_are_refused(tmp_path):
    rows = rmbench_rows()[:1]
    del rows[0]["domain"]
    for name in ("code_filtered.json", "other.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    assert load_pairs(f"rmbench:{tmp_path}/code_filtered.json")[0].source == "code"
    with pytest.raises(UserError, match="expected one of chat, code, math, safety"):
        load_pairs(f"rmbench:{tmp_path}/other.json")


def test_long_answers_lose_their_beginning_and_batches_change_nothing(reward_model):
    items = [("q", "alpha " * n) for n in (3, 90, 30, 31)]
    together = bench.score_texts(reward_model, items, max_length=64)
    assert together == pytest.approx([bench.score_texts(reward_model, [i], 64)[0] for i in items], abs=1e-4)
    ids = reward_model.tokenizer.encode(
        reward_model.tokenizer.chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": items[1][1]}])
    )
    ids_BT = torch.tensor([ids[-64:]])
    hidden = reward_model.model(ids_BT, torch.tensor([64]))
    assert together[1] == pytest.approx(reward_model.model.score(hidden, torch.tensor([64])).item(), abs=1e-4)


def test_pair_accuracy_and_calibration(tmp_path, capsys):
    rm = tmp_path / "rm"
    shutil.copytree(REWARD, rm)
    pairs = [{"prompt": p.prompt, "chosen": p.solution, "rejected": p.solution.replace("xs", "None", 1),
              "id": f"{p.id}#0", "source": p.source} for p in load_problems("toy:test", 12)]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = run_json(capsys, bench.bench_rm, ["--rm", rm, "--pairs", file, "--calibrate"])
    model = RewardModel(str(rm), device="cpu")
    wins = [model.score(p["prompt"], [p["chosen"]])[0] > model.score(p["prompt"], [p["rejected"]])[0] for p in pairs]
    assert rows[-1]["part"] == "all" and rows[-1]["accuracy"] == pytest.approx(np.mean(wins))
    calibration = json.loads((rm / "calibration.json").read_text())
    assert calibration["n"] == 24 and {"slope", "intercept", "ece", "auc"} <= set(calibration)


def test_calibration_error_does_not_depend_on_the_order_of_the_programs():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=1000)
    passed = list(rng.random(1000) < 1 / (1 + np.exp(-2 * scores)))
    drawn = train_rm.fit_calibration(list(scores), passed)["ece"]
    right, wrong = ([s for s, p in zip(scores, passed) if p == kind] for kind in (True, False))
    in_turn = [s for both in zip(right, wrong) for s in both]  # as pair files have them
    turned = train_rm.fit_calibration(in_turn, [True, False] * (len(in_turn) // 2))["ece"]
    assert drawn < 0.06 and turned < 0.06


def test_store_correlation_equals_its_definition(store, capsys, reward_model):
    rows = run_json(capsys, bench.bench_rm, ["--rm", REWARD, "--store", store])
    found = next(row for row in rows if row.get("part") == "all")
    aucs, programs = [], 0
    for group in bench.read_store(store)[1].values():
        unique = list({row["code"]: row for row in group if row["code"] is not None}.values())
        programs += len(unique)
        scores = reward_model.score(unique[0]["prompt"], [row["code"] for row in unique])
        good, bad = (
            [s for s, r in zip(scores, unique) if (r["verdict"] == "pass") == wanted] for wanted in (True, False)
        )
        if good and bad:
            aucs.append(np.mean([(g > b) + 0.5 * (g == b) for g in good for b in bad]))
    assert found["programs"] == programs and found["with_both"] == len(aucs)
    assert found["auc_within"] == pytest.approx(np.mean(aucs))
    assert sum(row.get("programs_in_bin", 0) for row in rows) == programs


# --------------------------------------------------------------------------------------------------------------- paper


def test_a_unit_runs_once_and_a_failed_or_interrupted_one_is_not_done(tmp_path):
    log = tmp_path / "log"
    count = [sys.executable, "-c", f"open({str(log)!r}, 'a').write('x'); print('out')"]
    for _ in range(2):
        bench.run_unit("a", count, tmp_path, 1)
    assert log.read_text() == "x" and (tmp_path / "a.out").read_text() == "out\n"
    for name, end in (("b", "sys.exit('no such thing')"), ("c", "print('interrupted', file=sys.stderr)")):
        with pytest.raises(UserError, match=f"unit {name} ended"):
            bench.run_unit(name, [sys.executable, "-c", f"import sys; {end}"], tmp_path, 1)
        assert not (tmp_path / f"{name}.json").exists()
    bench.run_unit("c", [sys.executable, "-c", "pass"], tmp_path, 1)  # says nothing: its log still ends in the old line
    assert (tmp_path / "c.json").exists() and (tmp_path / "c.log").read_text() == "interrupted\n"


def test_rl_claims_pair_arms_by_seed_and_problem(tmp_path):
    arms = ("claim1-rm", "claim1-exec", "claim2-exec-few", "claim2-rm-few", "claim2-rm-more")
    for a, seed in itertools.product(range(5), range(2)):
        folder = tmp_path / f"{arms[a]}-{seed}"
        folder.mkdir()
        after = {"x": {"avg": [0.1 * a + 0.02 * seed, 0.2]}, "y": {"avg": [0.1 * a]}}
        before = {"x": {"avg": [0.0, 0.1]}, "y": {"avg": [0.0]}}
        (folder / "result.json").write_text(json.dumps({"n": 8, "before": before, "after": after}))
    rows = bench.rl_claims(tmp_path, range(2))
    gap = next(row for row in rows if row.get("difference") == "claim1-rm - claim1-exec")
    assert gap["value"] == pytest.approx(-0.2 / 3) and gap["runs"] == 2 and gap["p_runs"] == 0.5
    assert gap["p_problems"] == pytest.approx(0.5)  # differences -0.1, 0, -0.1 under random signs
    args = bench.PaperArgs(seeds=2)
    page = bench.results_md(rows, args, 3.0)
    assert all(claim in page and figure in page for claim, (figure, _) in bench.CLAIMS.items())
    assert "claim2-rm-more - untrained" in page


@pytest.mark.slow
def test_paper_end_to_end(tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "paper", "--steps", "1", "--limit", "8", "--seeds", "1",
               "--n", "2", "--out", str(tmp_path)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["claim"] for row in rows} == set(bench.CLAIMS)
    assert "## Claim 4" in (tmp_path / "results.md").read_text()
    before = (tmp_path / "units/claim1-rm-0.json").read_text()
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "units/claim1-rm-0.json").read_text() == before


# --------------------------------------------------------------------------------------------------------------- speed


def test_workloads_follow_their_laws():
    work = bench.score_workload(16, 8, 100)
    assert [len(answers) for _, answers in work] == [8, 8] and work == bench.score_workload(16, 8, 100)
    assert all(300 <= len(p) <= 700 and all(80 <= len(a) <= 400 for a in answers) for p, answers in work)
    prompts, stops = bench.generate_workload(20, 8, 64, 100, 500, 500)
    assert {len(p) for p in prompts} == {500} and min(stops) >= 8 and 0.25 < stops.count(64) / 160 < 0.4


def test_needed_flops_and_bytes_worked_example():
    c = Config(11, 2, 1, 2, 1, 3, 5)
    block = 2 * (2 * 2 + 2 * 1) * 3 + 3 * 2 * 5 + 4 + 6  # matrices and norms
    # A prompt of 2 with answers of 1 and 2 tokens: 5 tokens; 3 + 3 + (3 + 4) query-key pairs.
    assert bench.group_flops(c, [(2, [1, 2])], heads=3) == 2 * block * 5 + 4 * 2 * 3 * 13 + 2 * 2 * 11 * 3
    assert bench.decode_bytes(c, [(2, [1, 2])], 4) == 4 * ((block + 22) + (2 + 1) * 2 * 1 * 3)


@pytest.mark.parametrize("peer", [False, True])
def test_speed_rows_are_equal_to_their_references(peer, monkeypatch, capsys):
    if peer:
        pytest.importorskip("trl")
    monkeypatch.setitem(bench.SPEED_SIZES, "tiny", (2, [(1, 2, 8)], 1, (1, 2, 8)))
    monkeypatch.setattr(bench, "machine_floor", lambda device: (1e11, 1e10))
    argv = ["--device", "cpu", "--seconds", "0", *(["--peer"] if peer else [])]
    rows = run_json(capsys, bench.bench_speed, argv)
    assert [row["row"] for row in rows] == ["score", "generate", "rm_step", "grpo_step"]
    for row in rows:
        assert row["config"] == "tiny" and row["device"] == "cpu" and row["rounds"] == 1
        assert row["ours_s"] > 0 and row["floor_fraction"] > 0 and row["tokens_s"] > 0
        assert (row["ratio"] is not None) == (row["peer_s"] is not None) == peer
        if peer or row["row"] in ("score", "generate"):  # without a peer a plain pass over each row is the reference
            assert row["max_abs_diff"] < 1e-5


def test_speed_mistakes():
    with pytest.raises(UserError, match="--config huge: expected one of tiny"):
        bench.bench_speed(["--config", "huge"])


# --------------------------------------------------------------------------------------------------- memory, plot, show


def test_memory_counts_are_those_of_the_model():
    for path, head in ((POLICY, "lm"), (REWARD, "score")):
        model = load_model(path, head=head, device="cpu")
        assert bench.num_parameters(model.config, head) == sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        untied = Qwen3(bench.SHAPES["qwen3-8b-shape"])
    assert bench.num_parameters(untied.config) == sum(p.numel() for p in untied.parameters()) == 8190735360
    cache = KVCache(model.config, 1, 99, torch.bfloat16)
    assert bench.kv_bytes(model.config) * 100 == sum(t.nelement() * 2 for t in (cache.k, cache.v))


def test_memory_table_adds_up_and_the_largest_rollout_is_the_largest(capsys):
    argv = ["--model", "qwen3-8b-shape", "--rm", "qwen3-8b-shape", "--prompt", "4096", "--response", "16384"]
    rows = run_json(capsys, bench.bench_memory, argv)
    for phase in ("training", "optimizer step", "rollout", "scoring"):
        sizes = [row["gib"] for row in rows if row.get("phase") == phase]
        assert sum(sizes[:-1]) == pytest.approx(sizes[-1])
    states = [row["gib"] for row in rows if row.get("item") in ("weights, fp32", "moments, fp32", "gradients, fp32")][
        :3
    ]
    assert sum(states) == pytest.approx(16 * 8190735360 / 8 / 2**30)
    args = bench.MemoryArgs()
    policy = bench.shape_of("qwen3-8b-shape")
    budget, row = bench.memory_budget(policy, policy, args)
    fits, free = bench.largest_rollout(budget, row, args), args.gpu_gib * 2**30 - sum(budget["rollout"].values())
    assert fits * row <= 0.7 * free < (fits + 1) * row and rows[-1]["rollout_rows"] == fits > 0
    one_answer, _ = bench.memory_budget(policy, policy, bench.MemoryArgs(token_budget=1))  # a pass holds a whole one
    longer, _ = bench.memory_budget(policy, policy, bench.MemoryArgs(token_budget=1, response=2 * args.response))
    kept = [sum(b["training"].values()) for b in (one_answer, budget, longer)]
    assert kept[0] == kept[1] < kept[2] and args.prompt + args.response == args.token_budget
    for flag, size, used in (("rm_offload", 2 * 7568409600 / 8, None),
                             ("optimizer_offload", 8 * 8190735360 / 8, "optimizer step")):  # fmt: skip
        more = bench.MemoryArgs(**{flag: True})
        saved, _ = bench.memory_budget(policy, policy, more)
        assert bench.largest_rollout(saved, row, more) > fits
        less = {phase: sum(items.values()) - sum(saved[phase].values()) for phase, items in budget.items()}
        assert less == {phase: pytest.approx(0 if phase == used else size, abs=1) for phase in budget}


def test_memory_check_does_the_work_of_every_phase(capsys):
    argv = ["--model", str(POLICY), "--rm", str(REWARD), "--prompt", "16", "--response", "8", "--token-budget", "40"]
    rows = run_json(
        capsys, bench.bench_memory, [*argv, "--gpus", "1", "--gpu-gib", "0.03", "--check", "--device", "cpu"]
    )
    assert [row["phase"] for row in rows[-3:]] == ["training", "rollout", "scoring"]
    assert all(row["tokens_s"] > 0 and row["peak_gib"] is None for row in rows[-3:])


def write_run(folder, seed, steps=4):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"args": {"reward": "rm", "seed": seed, "out": str(folder)}}))
    lines = ["step,loss,reward,reasons,eval"]
    lines += [f"{s},0.1,{s + seed},no_block:2 unclosed:1,{'' if s % 2 else 0.5}" for s in range(1, steps + 1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_runs_that_differ_in_their_seed_are_one_band(tmp_path):
    runs = [write_run(tmp_path / f"run{seed}", seed) for seed in (0, 2)]
    ((label, metrics),) = bench.run_groups(runs)
    steps, middle, low, high = bench.over_steps(metrics, "reward")
    assert label == "run0 (2 seeds)" and steps == [1, 2, 3, 4]
    assert (middle.tolist(), low.tolist(), high.tolist()) == ([2, 3, 4, 5], [1, 2, 3, 4], [3, 4, 5, 6])
    assert bench.over_steps(metrics, "eval")[0] == [2, 4] and bench.over_steps(metrics, "kl")[0] == []


def test_plot_writes_pictures(tmp_path, store):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / f"run{seed}", seed) for seed in (0, 2)]
    bench.bench_plot([*runs, str(store), "--out", str(tmp_path / "plots")])
    pictures = list((tmp_path / "plots").iterdir())
    assert len(pictures) == 2 and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_plot_without_matplotlib_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bench.bench_plot([write_run(tmp_path / "run", 0)])


def test_show_prints_a_step(tmp_path, capsys):
    row = {"step": 3, "number": 0, "prompt": "Add.", "completion": "text", "reason": "ok", "score": 1.5, "reward": 1.7,
           "advantage": 0.2, "verdict": "pass", "tokens": 9, "code": "def f():\n    return 'x'  # y"}  # fmt: skip
    lines = [row, {**row, "code": None, "reason": "no_block", "completion": "no program", "score": None}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    bench.bench_show([str(tmp_path), "--step", "3", "--no-color"])
    out = capsys.readouterr().out
    assert "prompt 0: Add." in out and row["code"] in out and "no program" in out and "reward 1.700" in out
    with pytest.raises(UserError, match="has steps 3 to 3"):
        bench.bench_show([str(tmp_path), "--step", "4"])


@pytest.mark.parametrize("code", ['def f(x):\n    return \'a\' + """b\nc""" if x else 12  # end', "x = (", ""])
def test_highlighting_changes_no_text(code):
    assert re.sub("\033\\[[0-9;]*m", "", bench.highlighted(code)) == code


def test_cells_and_percentiles():
    assert [bench.cell(v) for v in (0.5, 1234.5, math.nan, None, "a", 3)] == ["0.500", "1234", "-", "-", "a", "3"]
    assert bench.percentile([3, 1, 2], 0.5) == 2 and math.isnan(bench.percentile([], 0.5))
