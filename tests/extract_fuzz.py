"""What only a developer of extract.py measures: hostile texts, and how many programs each mode
finds.

    python tests/extract_fuzz.py --fuzz 2000            # hostile texts through every mode, 20 s
    python tests/extract_fuzz.py --measure FILE.jsonl   # share of programs found, a minute for MBPP

FILE has rows with `code` (known programs, which are garbled in fifteen ways; a program counts as
found if it comes back as the same syntax tree) or with `response` (real answers; any program
counts).
"""

import ast
import json
import random
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import extract  # noqa: E402
from common import parse_args, run_cli  # noqa: E402
from extract import MODES, REASONS, defines, extract_code, judge  # noqa: E402
from problems import need, read_rows  # noqa: E402


@dataclass
class Args:
    fuzz: int = 0  # run this many hostile answers through every mode
    measure: str = ""  # a JSON Lines file: share of its programs found by each mode


def hostile(rng, programs):
    """A response nobody would write: program text and fences, cut, repeated, nested, with odd
    characters."""
    parts = [
        "```", "```python\n", "\n```\n", "~~~", "<think>", "</think>", "\x00", "\ud800", "\f", "\t",
        "\r\n", "\u2028", '"""', "'", "\\", "(", "[", "{", "finally:", "try:\n", "lambda:", "not ",
        "- ", "\u201c", ">>> ", "1: ", "%x", "if x:", "\n    ", "x = 1\n", "def f():\n", "return",
        "\\d", "é", "0x", "9" * 50, ":=", "*", "prose ", "&lt;", "\ufeff", "> ", "class A:0\n",
        "with a: ", "match x:\n", "async ", "f'{", "@a\n", ";", "main()\n", "Done\n",
    ]  # fmt: skip
    text = ""
    for _ in range(rng.randint(1, 12)):
        part = rng.choice(parts) if rng.random() < 0.7 else rng.choice(programs)
        text += part * (rng.choice((1, 1, 1, 2, 30, 300)) if len(part) < 12 else 1)
    for _ in range(rng.randint(0, 4)):  # delete, duplicate or swap a span
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((text[:a] + text[b:], text[:b] + text[a:], text[b:] + text[:a]))[:20_000]
    return text


def fuzz(count, seed=0):
    """Runs `count` hostile texts through every mode -> the slowest call and how often each reason
    was given. Raises AssertionError where an answer breaks the contract."""
    source = Path(extract.__file__).read_text(encoding="utf-8")
    programs = [source[i : i + 700] for i in range(0, len(source) - 700, 700)]
    rng, slowest, tally = random.Random(seed), 0.0, Counter()
    for _ in range(count):
        text = hostile(rng, programs)
        for mode in MODES:
            start, entry_point = time.process_time(), rng.choice((None, "f", "Solution.f"))
            code, reason = extract_code(text, mode, entry_point)
            slowest = max(slowest, time.process_time() - start)
            tally[f"{mode} {reason}"] += 1
            assert reason in REASONS and (code is not None) == (reason == "ok"), (text, mode)
            if code is not None and mode in ("strict", "recover"):
                verdict = judge(code)
                assert verdict.reason == "ok", (text, mode, code)
                assert defines(verdict.tree, entry_point or ""), (text, mode, code)
    return {"slowest_s": round(slowest, 3), **dict(sorted(tally.items()))}


def garblings(code, rng):
    """A known program -> {kind: (response, program that must come back)}."""
    lines = code.split("\n")
    fenced = f"```python\n{code}\n```"
    cut = code[: rng.randint(len(code) // 3, len(code) - 1)]
    kept = cut.split("\n")
    while kept and judge("\n".join(kept)).tree is None:
        kept.pop()
    usage = "```python\nprint(solution_result)\n```"
    doctest = "\n".join(("... " if line[:1].isspace() else ">>> ") + line for line in lines)
    numbered = "\n".join(f"{n:3d}  {line}" for n, line in enumerate(lines, 1))
    return {
        "fenced": (f"Here is the solution:\n\n{fenced}\n\nIt works.", code),
        "fence with odd tag": (f"Here it is:\n\n``` Python 3.11 \n{code}\n```\n", code),
        "CRLF": (f"Sure.\n{fenced}\nDone.".replace("\n", "\r\n"), code),
        "draft in thoughts": (f"<think>\n```python\n{cut}\n```\n</think>\n{fenced}", code),
        "usage block after it": (f"{fenced}\nUse it like this:\n{usage}", code),
        "split in two blocks": (f"```python\n{lines[0]}\n```\nthen\n{fenced}", code),
        "unclosed": (f"Here:\n```python\n{code}", code),
        "no fence": (f"The function below does this.\n\n{code}\n\nIt runs in linear time.", code),
        "indented, no fence": (f"So:\n\n{textwrap.indent(code, '    ')}\n\nIt runs.", code),
        "line numbers": (f"```\n{numbered}\n```", code),
        "doctest": (f"```python\n{doctest}\n```", code),
        "smart quotes": (fenced.replace('"', "\u201d").replace("'", "\u2019"), code),
        "prose in the fence": (f"```python\n{code}\n\nIt returns the result.\n```", code),
        "magics": (f"```python\n%matplotlib inline\n!pip install numpy\n{code}\n```", code),
        "truncated": (f"Here:\n```python\n{cut}", "\n".join(kept)),
    }


def measure(path):
    """Prints the share of programs found, per mode: known ones garbled, compared as syntax trees,
    or real responses."""
    hits, wrong, counts, seconds = (Counter() for _ in range(4))
    for number, (row, where) in enumerate(read_rows(path)):
        if "code" in row:
            code = need(row, where, "code").replace("\r\n", "\n").replace("\r", "\n").strip("\n")
            cases = garblings(code, random.Random(number)) if code else {}
        else:
            cases = {row.get("shape", "response"): (need(row, where, "response"), None)}
        for kind, (text, truth) in cases.items():
            known = judge(truth) if truth is not None else None
            if known and known.reason != "ok":
                continue  # cut so early that no program is left
            counts[kind] += 1
            for mode in MODES:
                start = time.perf_counter()
                code = extract_code(text, mode).code
                seconds[mode] += time.perf_counter() - start
                back = judge(code).tree if code is not None else None
                same = back and (not known or ast.dump(back) == ast.dump(known.tree))
                hits[kind, mode] += bool(same)
                wrong[mode] += code is not None and not same
    calls = max(1, counts.total())
    print(f"{'response':28}{'n':>6}" + "".join(f"{mode:>10}" for mode in MODES))
    for kind, n in counts.items():
        print(f"{kind:28}{n:6}" + "".join(f"{hits[kind, mode] / n:10.3f}" for mode in MODES))
    shares = "".join(f"{wrong[mode] / calls:10.3f}" for mode in MODES)
    speeds = "".join(f"{calls / max(seconds[mode], 1e-9):10.0f}" for mode in MODES)
    print(f"{'another text or no program':34}{shares}\n{'responses per second':34}{speeds}")


def main():
    args = parse_args(Args)
    if args.fuzz:
        print(json.dumps(fuzz(args.fuzz), indent=1))
    if args.measure:
        measure(args.measure)


if __name__ == "__main__":
    run_cli(main)
