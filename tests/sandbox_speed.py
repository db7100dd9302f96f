"""Programs a second and CPU ms a program: the sandbox beside the way of openai/human-eval, with 1
and 2 workers, 1 and 10 tests. The parent holds torch, as a trainer does, and each fork pays for it.

    python tests/sandbox_speed.py                # a table; about 3 minutes on 2 cores
    python tests/sandbox_speed.py --json         # one JSON object a line
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import UserError, parse_args, run_cli  # noqa: E402
from sandbox import Sandbox  # noqa: E402

PROGRAM = "def solve(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total\n"
STDIN_PROGRAM = PROGRAM + "n = int(input())\nprint(solve(map(int, input().split())))\n"
# What human-eval switches off inside the process, the names of os
HIDDEN = (
    "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames "
    "truncate replace unlink fchmod fchown chmod chown chroot lchown getcwd chdir".split()
)


@dataclass
class Args:
    json: bool = False  # one JSON object a line on stdout
    limit: int = 40  # programs a row of the slow ways (ours: 10 times)
    rounds: int = 5  # measurements of each row; the median is printed


def tests_of(n, kind):
    """n tests of a program that adds numbers."""
    cases = []
    for xs in (list(range(k, k + 5)) for k in range(n)):
        if kind == "stdin":
            cases.append({"input": f"5\n{' '.join(map(str, xs))}\n", "output": f"{sum(xs)}\n"})
        elif kind == "call":
            cases.append({"args": [xs], "expected": sum(xs)})
        else:  # a line that is no plain call
            cases.append({"assert": f"assert abs(solve({xs}) - {sum(xs)}) < 1e-6"})
    return {"kind": kind, "cases": cases, "entry_point": "solve"}


def by_sandbox(kind, count, tests, workers):
    """Our way -> (programs that passed, seconds without the start)."""
    program = STDIN_PROGRAM if kind == "stdin" else PROGRAM
    with Sandbox(workers) as sb:
        sb.map([(program, tests_of(1, kind))] * workers)  # start every worker
        begin = time.perf_counter()
        results = sb.map([(program, tests_of(tests, kind))] * count)
        return sum(result.passed for result in results), time.perf_counter() - begin


def humaneval_child(program, result, timeout):
    """A temporary folder, functions hidden, output swallowed, an alarm, all in one process."""
    keep, home = dict(vars(os)), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        vars(os).update(dict.fromkeys(HIDDEN))
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(program, {})
            result.append("passed")
        except BaseException as error:
            result.append(f"failed: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        vars(os).update(keep)
        os.chdir(home)


def by_humaneval(count, tests, workers):
    """human-eval's way: a Manager and a forked Process a program, from a pool of threads."""
    cases = tests_of(tests, "call")["cases"]
    lines = [f"assert solve({case['args'][0]}) == {case['expected']}" for case in cases]
    program, fork = PROGRAM + "\n".join(lines), multiprocessing.get_context("fork")

    def one(_):
        with fork.Manager() as manager:
            result = manager.list()
            process = fork.Process(target=humaneval_child, args=(program, result, 3.0))
            process.start()
            process.join(4)
            return list(result) == ["passed"]

    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, range(count))), time.perf_counter() - begin


def measure(way, count, tests, workers):
    """(programs a second, CPU ms a program); a pool's start-up is left out of both."""

    def run(count):  # -> CPU seconds of this process and of the ended ones below it, and the rest
        before = os.times()[:4]
        passed, seconds = way(count, tests, workers)
        return sum(os.times()[:4]) - sum(before), passed, seconds

    idle, *_ = run(0)
    cpu, passed, seconds = run(count)
    if passed != count:
        raise UserError(f"{passed} of {count} programs passed: start the measurement again")
    return count / seconds, 1e3 * (cpu - idle) / count


def main():
    args = parse_args(Args)
    ways = {f"ours, {kind}": partial(by_sandbox, kind) for kind in ("stdin", "call", "assert")}
    ways["human-eval"] = by_humaneval
    rows = {(way, tests, n): [] for tests in (1, 10) for n in (1, 2) for way in ways}
    for _ in range(args.rounds):  # rounds outside: a busy moment hits every way alike
        for (way, tests, workers), samples in rows.items():
            count = args.limit * (10 if way.startswith("ours") else 1) // (4 if tests > 1 else 1)
            samples.append(measure(ways[way], max(count, 4), tests, workers))
    for (way, tests, workers), samples in rows.items():
        rate, cpu = (statistics.median(column) for column in zip(*samples, strict=True))
        row = {"way": way, "tests": tests, "workers": workers, "programs_s": rate, "cpu_ms": cpu}
        text = f"{way:16s} {tests:3d} tests, {workers} workers: {rate:7.1f}/s, {cpu:6.2f} ms CPU"
        print(json.dumps(row) if args.json else text, flush=True)


if __name__ == "__main__":
    run_cli(main)
