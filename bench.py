"""Everything that produces a number: each command measures one thing and prints a table, or JSON lines with --json.

    python bench.py sandbox                # programs a second, ours beside two usual ways; about two minutes on a CPU
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor


def emit(row, args, widths):
    """One result: a JSON line on stdout, or a line of a table under the heading that the first row prints."""
    if args.json:
        print(json.dumps(row), flush=True)
        return
    cells = {k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items()}
    if not getattr(args, "headed", False):
        print("  ".join(f"{k:>{widths.get(k, 10)}s}" for k in cells))
        args.headed = True
    print("  ".join(f"{v:>{widths.get(k, 10)}s}" for k, v in cells.items()), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# sandbox: the same small programs through our sandbox, through the way of openai/human-eval, and `python -I` a test

PROGRAM = "def solve(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total\n"
STDIN_PROGRAM = PROGRAM + "n = int(input())\nprint(solve(map(int, input().split())))\n"


def sandbox_tests(n, kind):
    inputs = [list(range(k, k + 5)) for k in range(n)]
    if kind == "call":
        cases = [{"args": [xs], "expected": sum(xs)} for xs in inputs]
        return {"kind": "call", "entry_point": "solve", "cases": cases}
    cases = [{"input": f"{len(xs)}\n{' '.join(map(str, xs))}\n", "output": f"{sum(xs)}\n"} for xs in inputs]
    return {"kind": "stdin", "cases": cases}


def humaneval_child(program, result, timeout):
    """The child of openai/human-eval's check_correctness, retold: a temporary folder, destructive functions switched
    off inside the process, output swallowed, an alarm, and program and tests executed together."""
    with tempfile.TemporaryDirectory() as folder:
        keep = os.rmdir, os.chdir, shutil.rmtree, os.unlink, os.getcwd
        home = os.getcwd()
        os.chdir(folder)
        for module, names in (
            (os, "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate "
                 "replace unlink fchmod fchown chmod chown chroot lchown getcwd chdir"),
            (shutil, "rmtree move chown"), (subprocess, "Popen"),
        ):  # fmt: skip
            for name in names.split():
                if hasattr(module, name):
                    setattr(module, name, None)

        def alarm(signum, frame):
            raise TimeoutError

        try:
            signal.signal(signal.SIGALRM, alarm)
            signal.setitimer(signal.ITIMER_REAL, timeout)
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                exec(program, {})
            result.append("passed")
        except BaseException as error:
            result.append(f"failed: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.rmdir, os.chdir, shutil.rmtree, os.unlink, os.getcwd = keep
            os.chdir(home)


def by_humaneval(count, tests, workers):
    """human-eval's way: a Manager and a forked Process per program, from a pool of threads."""
    lines = [f"assert solve({xs}) == {sum(xs)}" for xs in (list(range(k, k + 5)) for k in range(tests))]
    program = PROGRAM + "\n".join(lines)
    fork = multiprocessing.get_context("fork")

    def one(_):
        with fork.Manager() as manager:
            result = manager.list()
            process = fork.Process(target=humaneval_child, args=(program, result, 3.0))
            process.start()
            process.join(4)
            if process.is_alive():
                process.kill()
            return list(result) == ["passed"]

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, range(count)))


def by_interpreter(count, tests, workers):
    """A fresh `python -I` a test, over pipes, without any isolation."""
    cases = sandbox_tests(tests, "stdin")["cases"]

    def one(_):
        for case in cases:
            done = subprocess.run([sys.executable, "-I", "-c", STDIN_PROGRAM], input=case["input"].encode(),
                                  capture_output=True)  # fmt: skip
            if done.stdout.decode() != case["output"]:
                return False
        return True

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, range(count)))


def by_sandbox(kind, level):
    from sandbox import Sandbox

    def way(count, tests, workers):
        program = PROGRAM if kind == "call" else STDIN_PROGRAM
        with Sandbox(workers, level) as sb:
            sb.map([(program, sandbox_tests(1, kind))] * workers)  # start every worker
            begin = time.perf_counter()
            results = sb.map([(program, sandbox_tests(tests, kind))] * count)
            way.seconds = time.perf_counter() - begin
        return sum(r.passed for r in results)

    return way


def cpu_seconds():
    """CPU of this process and of the ended processes below it."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measure(way, count, tests, workers):
    """(programs a second, CPU ms a program). A pool's start-up is left out of both: it is paid once a run."""
    idle = 0.0
    if hasattr(way, "seconds") or way.__name__ == "way":
        begin = cpu_seconds()
        way(0, tests, workers)
        idle = cpu_seconds() - begin
    begin, cpu = time.perf_counter(), cpu_seconds()
    passed = way(count, tests, workers)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu - idle
    if passed != count:
        raise RuntimeError(f"{passed} of {count} programs passed: the measurement is void")
    return count / getattr(way, "seconds", seconds), 1e3 * cpu / count


def bench_sandbox(argv):
    """Programs a second and CPU ms a program, with 1 and 2 workers, 1 and 10 tests, all in one run."""
    parser = argparse.ArgumentParser(prog="bench.py sandbox", description=bench_sandbox.__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    parser.add_argument("--limit", type=int, default=40, help="programs a row of the slow ways (ours: 10 times)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row; the median is printed")
    parser.add_argument("--sandbox", choices=("strict", "basic"), default="strict", help="level of isolation")
    args = parser.parse_args(argv)
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  (a trainer's process holds it, and every fork of that process pays for it)
    ways = {
        "ours, stdin": by_sandbox("stdin", args.sandbox), "ours, call": by_sandbox("call", args.sandbox),
        "human-eval": by_humaneval, "python -I": by_interpreter,
    }  # fmt: skip
    rows = {(w, t, n): [] for t in (1, 10) for n in (1, 2) for w in ways}
    for done in range(args.rounds):  # rounds outside: a busy moment of the machine hits every way alike
        for (name, tests, workers), samples in rows.items():
            count = args.limit * (10 if name.startswith("ours") else 1) // (4 if tests > 1 else 1)
            samples.append(measure(ways[name], max(count, 4), tests, workers))
        if sys.stderr.isatty():
            print(f"round {done + 1}/{args.rounds}", file=sys.stderr)
    table = {}
    for key, samples in rows.items():
        table[key] = [statistics.median(column) for column in zip(*samples, strict=True)]
    load = os.getloadavg()[0]
    for (name, tests, workers), (rate, cpu) in table.items():
        other_rate, other_cpu = table["human-eval", tests, workers]
        emit({
            "row": "sandbox", "way": name, "tests": tests, "workers": workers, "programs_s": rate, "cpu_ms": cpu,
            "rate_x": rate / other_rate, "cpu_x": cpu / other_cpu, "torch": "torch" in sys.modules,
            "level": args.sandbox if name.startswith("ours") else "none", "load": load,
        }, args, {"way": 12, "row": 8, "tests": 5, "workers": 7, "torch": 6, "level": 7, "load": 5})  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------

COMMANDS = {"sandbox": bench_sandbox}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[command](argv[1:])
    except (RuntimeError, ValueError, OSError) as error:  # SandboxError is a RuntimeError
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
