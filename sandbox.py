"""Run untrusted programs against tests and return verdicts that the program cannot forge.

    python sandbox.py --check                          # which layers hold here, each tried out
    python sandbox.py PROGRAM.py --tests TESTS.json    # exit 0 if every test passes, 1 if not

A few milliseconds a program (`python tests/sandbox_speed.py`); start-up is about 0.2 s, once.

    caller   holds tests and expected outputs, compares text     sandbox.py: `Sandbox`, `Judge`
      | one packet: limits + file descriptors                    <- exit status, CPU, peak memory
    server   a bare interpreter, once per worker, which forks    confined.py
      | fork
    program  limits -> seccomp -> compile and run; whatever it says is only a claimed answer
    tester   limits -> seccomp -> test code                      testcode.py

A test of kind `stdin` is a process; the calls of kind `call` share one, and the next one begins
at the first answer that is missing. A line `assert f(1) == 2` is such a call. Other test code runs
in a process of its own, the tester, which calls the program's function with plain data and gets
plain data. Nothing that a program wrote is ever rebuilt as an object in the caller.

Promised at level "strict" (Linux 5.13 or newer on x86_64): a program sees neither the expected
outputs nor another program's data, opens no network socket, starts no process, writes no file,
reads nothing but the interpreter's libraries, signals nobody, dies at its limits and with its
parent, leaves nothing behind. A layer that is missing is an error, never a silent fallback. Level
"basic" keeps the comparison in the caller and whatever layers there are, and promises no more than
another process with limits. Whether a test can be judged is decided by the test and the machine,
never by the answer.

Not promised: safety from kernel or CPU bugs (use a virtual machine against people), from guessed or
hard-coded answers (weak tests), fair timing on a loaded machine, or that one right answer of many
is recognised (no checkers). A program may `stat` any path and read where a link points, learn the
host's name, and read the tests' setup. The calls of one process can borrow time from each other,
since all arguments are known at once, and from what the suite may use, by what they write to the
file of answers. The limit of output is the process's: it begins anew where that is reached.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import queue
import re
import reprlib
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from decimal import Decimal

from tqdm import tqdm

import confined
from common import UserError, parse_args, run_cli
from testcode import FAILURES, as_call, encode

# --------------------------------------------------------------------------------------------------
# limits and results

MAX_EXTRA = 1 << 16  # bytes an answer may have beyond twenty times the expected one's
SUITE_WAIT = 3  # times a test's wall limit that all tests together may spend waiting


class SandboxError(UserError):
    """The sandbox cannot give what was asked for; the message says what is missing, what to do."""


@dataclass(frozen=True)
class Tests:
    """How a program is checked. Cases by kind:
    "stdin":  {"input": str, "output": str}
    "call":   {"args": [...], "expected": value}, calling `entry_point` (`f`, or `Solution.method`);
              or {"args": [...], "any_of": [value, ...]} where each of the values is right
    "assert": {"assert": "assert f(1) == 2"} or {"check": "def check(candidate): ..."}
    `setup` runs before the program, and before a test's own code; `time_limit` is CPU seconds a
    test (None: the sandbox's default)."""

    kind: str
    cases: list
    entry_point: str | None = None
    setup: str = ""
    time_limit: float | None = None


@dataclass(frozen=True)
class Limits:
    """Per test: seconds of wall clock (only stops programs that wait), seconds of CPU (decides
    timeouts), MiB of address space, MiB of output. Test code that calls the program has them for
    each call. n tests together may use `5 + n / 5` times the CPU limit and `SUITE_WAIT` times the
    wall limit."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_mb: int = 1024
    output_mb: int = 16


@dataclass
class Result:
    """`verdicts`: one word a test that was run: pass, wrong_answer, runtime_error, timeout, memory,
    output_limit, syntax_error, sandbox_violation, unsupported or harness_error. `pass_rate`: passes
    / all tests (a true rate if stop_early=False; the released CodeScaler code stops at the first
    failure). `trusted`: False when a test could not be judged (unsupported, harness_error): mask
    such a sample, do not score it. `degraded`: the level was basic. `detail`: about the first
    failure. `answer`: a short hash of what was printed or returned in the tests that were run, None
    if that is nothing or if it cannot be seen (other test code): programs with equal ones answer
    alike."""

    passed: bool
    verdicts: list[str]
    pass_rate: float
    cpu_s: float = 0.0
    wall_s: float = 0.0
    trusted: bool = True
    degraded: bool = False
    detail: str = ""
    answer: str | None = None


# --------------------------------------------------------------------------------------------------
# the sandbox

# Each line tries something forbidden, without harm if it succeeds; what succeeds is printed. A name
# starts with the layer that should stop it.
PROBE = """
import ctypes, json, os, resource, signal, socket, threading, time
temporary = input()  # the machine's folder for temporary files
def queue_signals():  # what is queued counts for the user, whose own timers then fail
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    for _ in range(200): os.kill(os.getpid(), signal.SIGRTMIN)
    assert all(signal.sigtimedwait([signal.SIGRTMIN], 0) for _ in range(100))
tries = {
    "landlock: read /etc/passwd": "open('/etc/passwd')",
    "landlock: list /": "os.listdir('/')",
    "landlock: write a temporary file": "open(temporary + '/.sandbox_probe', 'w')",
    "landlock: write shared memory": "open('/dev/shm/.sandbox_probe', 'w')",
    "seccomp: truncate a file": "os.open('/dev/null', os.O_RDONLY | os.O_TRUNC)",
    "seccomp: open a socket": "socket.socket()",
    "seccomp: fork": "os.fork() or os._exit(0)",
    "seccomp: signal the parent": "os.kill(os.getppid(), 0)",
    "seccomp: hidden memory": "os.memfd_create('x')",
    "seccomp: remove a file": "os.unlink('/none')",
    "seccomp: create a timer": "assert not ctypes.CDLL(None).timer_create(0, None, bytes(8))",
    "rlimits: raise a limit": "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "rlimits: queue signals": "queue_signals()",
}
done = []
for name, text in tries.items():
    try: exec(text)
    except FileNotFoundError: done.append(name)
    except Exception: pass  # also what this system does not know
    else: done.append(name)
print(json.dumps([list(tries), done]), flush=True)
threading.stack_size(1 << 16)  # then more threads than any pool starts, which the server ends
for _ in range(400): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
time.sleep(1)
"""
LAYERS = ("rlimits", "no_new_privs", "seccomp", "landlock")
ON_LINUX = sys.platform == "linux"


class Sandbox:
    """A pool of servers, by default one worker a CPU, shared out among the ranks of torchrun. Use
    as `with Sandbox() as sb:`; safe to share between threads, not with a forked process. `level`
    None is strict on Linux, basic elsewhere.

    Raises SandboxError if level "strict" cannot be had. For tests: `without` switches layers off,
    `landlock_abi` is the highest ABI to use.
    """

    def __init__(self, workers=None, level=None, without=(), landlock_abi=99):
        level = level or ("strict" if ON_LINUX else "basic")
        if level not in ("strict", "basic"):
            raise SandboxError(f"--sandbox {level}: expected strict or basic")
        if confined.resource is None or (level == "strict" and not ON_LINUX):
            system = platform.system()
            raise SandboxError(f"level strict needs Linux, this is {system}; use --sandbox basic")
        self.level, self.closed, self.owner = level, False, os.getpid()
        cpus = len(os.sched_getaffinity(0)) if ON_LINUX else os.cpu_count() or 1
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
        count = workers or max(1, cpus // ranks)
        options = {"basic": level == "basic", "without": without, "landlock_abi": landlock_abi}
        self.all = [Worker(options) for _ in range(count)]
        self.free = queue.LifoQueue()  # the last used is the warmest
        for worker in self.all:
            self.free.put(worker)
        try:
            self._report = self._probe()
            missing = self._report["missing"]
            if level == "strict" and missing:
                notes = "; ".join(f"{name}: {self._report['notes'][name]}" for name in missing)
                raise SandboxError(
                    f"level strict is missing {', '.join(missing)} here ({notes}); "
                    "choose --sandbox basic to run with less"
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        if self.level == "basic":
            missing = ", ".join(self._report["missing"]) or "nothing"
            warn_once(f"sandbox level basic, missing: {missing}")
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """End every server. A thread that runs or waits for a program gets a SandboxError."""
        self.closed = True
        if os.getpid() == self.owner:  # a forked caller must not end its parent's servers
            for worker in self.all:
                worker.close(for_good=True)
            self.free.put(None)  # wakes one waiting thread, which wakes the next

    def _probe(self):
        """Start one worker and let a program try what must not work."""
        worker = self.all[0]
        judge = Judge(worker, PROBE, Tests("stdin", []), Limits(), True)
        run = judge.run_once(tempfile.gettempdir(), MAX_EXTRA)
        try:
            tried, done = json.loads(run.out)
        except json.JSONDecodeError:
            text = run.err.strip()[-300:]
            raise SandboxError(f"the sandbox runs no program here: {run.word} {text}") from None
        tried.append("server: run 400 threads")
        done += tried[-1:] * (run.why != confined.THREADS)
        abi, missing = worker.layers["landlock"], dict(worker.layers["missing"])
        for name in done:
            layer, what = name.split(": ")
            if layer in LAYERS:
                missing.setdefault(layer, f"did not stop: {what}")
        notes = {"landlock": f"ABI {abi}"} if abi else {}
        if abi and abi < 3:
            notes["landlock"] += " does not govern truncation; seccomp refuses it"
        return {
            "level": self.level,
            "degraded": self.level == "basic",
            "layers": {layer: layer not in missing for layer in LAYERS},
            "missing": [layer for layer in LAYERS if layer in missing],
            "landlock_abi": abi,
            "attempts": {name: name not in done for name in tried},
            "notes": notes | missing,
            "workers": len(self.all),
        }

    def report(self):
        """{level, degraded, layers: {name: bool}, missing, landlock_abi, attempts: {what: refused},
        notes, workers}."""
        return self._report

    def run(self, code, tests, limits=None, stop_early=True, repeat=1):
        """One program's Result. ValueError without tests; a program never raises.

        repeat=2 runs a passing program again: a program that passes only sometimes does not pass
        (detail "flaky").
        """
        tests = as_tests(tests)
        limits = limits or Limits()
        if seconds := tests.time_limit:
            limits = replace(limits, wall_s=2 * seconds, cpu_s=seconds)
        results = []
        while len(results) < repeat and all(result.passed for result in results):
            results.append(self._grade(code, tests, limits, stop_early))
        last = results[-1]
        last.cpu_s = sum(result.cpu_s for result in results)
        last.wall_s = sum(result.wall_s for result in results)
        if len(results) > 1 and not last.passed:
            last.detail = f"flaky: passed once, then {last.detail}"
        return last

    def _usable(self):
        if os.getpid() != self.owner:
            raise SandboxError("the sandbox belongs to the process that made it, not to its fork")
        if self.closed:
            raise SandboxError("the sandbox is closed")

    def _grade(self, code, tests, limits, stop_early):
        self._usable()
        worker = self.free.get()
        try:
            for attempt in (1, 2):  # a server that died is replaced, once
                self._usable()
                try:
                    result = Judge(worker, code, tests, limits, stop_early).grade()
                    if "harness_error" not in result.verdicts:
                        break
                except (SandboxError, OSError) as error:
                    self._usable()
                    words = ["harness_error"] * (1 if stop_early else len(tests.cases))
                    result = Result(False, words, 0.0, trusted=False)
                    result.detail = f"{error} ({attempt}x)"
        finally:
            self.free.put(worker)
        result.degraded = self.level == "basic"
        return result

    def map(self, jobs, limits=None, stop_early=True, progress=False):
        """[(code, tests), ...] -> [Result, ...] in the same order, over all workers."""
        jobs = list(jobs)
        for _, tests in jobs:
            as_tests(tests)
        pool = ThreadPoolExecutor(len(self.all))
        try:
            futures = [pool.submit(self.run, *job, limits, stop_early) for job in jobs]
            done = as_completed(futures)
            for future in tqdm(done, total=len(jobs), disable=None if progress else True):
                future.result()
            return [future.result() for future in futures]
        finally:  # Ctrl-C arrives here; the threads stop after the program they are at
            pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


CASES = {  # the keys of a case and what they hold, one way or the other
    "stdin": [{"input": str, "output": str}],
    "call": [
        {"args": list | tuple, "expected": object},
        {"args": list | tuple, "any_of": list | tuple},
    ],
    "assert": [{"assert": str}, {"check": str}],
}


def fits(case, shape):
    has = isinstance(case, dict) and case.keys() >= shape.keys()
    return has and all(isinstance(case[key], kind) for key, kind in shape.items())


def as_tests(tests):
    """`Tests`, or a dict with its keys; checked, so that a mistake is not scored as a failing
    program. Raises ValueError."""
    try:
        if not isinstance(tests, Tests):
            known = {f.name for f in fields(Tests)}
            tests = Tests(**{key: value for key, value in dict(tests).items() if key in known})
    except TypeError as error:
        raise ValueError(f"tests are no Tests: {error}") from None
    if not isinstance(tests.cases, list | tuple) or not tests.cases:
        raise ValueError("no tests: a program without tests cannot be run for a verdict")
    if tests.kind not in CASES:
        raise ValueError(f"tests.kind is {tests.kind!r}, expected stdin, call or assert")
    for i, case in enumerate(tests.cases):
        if not any(fits(case, shape) for shape in CASES[tests.kind]):
            wanted = " or ".join(map(", ".join, CASES[tests.kind]))
            raise ValueError(
                f"tests.cases[{i}] is {reprlib.repr(case)}, expected {wanted} "
                "(args and any_of are lists, the rest texts)"
            )
    for name in ("entry_point", "setup"):
        if not isinstance(value := getattr(tests, name), str | None):
            raise ValueError(f"tests.{name} is a {type(value).__name__}, expected a text")
    limit = tests.time_limit
    if limit is not None and not (isinstance(limit, int | float) and 1e-3 <= limit <= 1e5):
        raise ValueError(f"tests.time_limit is {limit!r:.80}, expected seconds")
    needs_name = tests.kind == "call" or any("check" in case for case in tests.cases)
    if needs_name and not tests.entry_point:
        raise ValueError("tests of kind call, and check(candidate), need an entry_point")
    return tests


# --------------------------------------------------------------------------------------------------
# judging: one suite of tests, in the caller


class Judge:
    """One program against one suite, run by `worker`. `found` holds (verdict, explanation, hash of
    the answer or None) by case number; `decided` says that no more are needed."""

    def __init__(self, worker, code, tests, limits, stop_early):
        self.worker, self.tests, self.limits, self.stop_early = worker, tests, limits, stop_early
        self.cpu = self.wall = 0.0
        self.cpu_left = (5 + len(tests.cases) / 5) * limits.cpu_s
        self.wait_left = SUITE_WAIT * limits.wall_s
        self.found, self.decided = {}, False
        # All that the program's process is told before it runs:
        names = [tests.entry_point] if tests.entry_point else []
        self.job = {"code": code, "setup": tests.setup or "", "names": names}

    def grade(self):
        ways = {self.stdin: [], self.calls: [], self.session: []}
        for i, case in enumerate(self.tests.cases):
            way, item = self.plan(case)
            if way:
                ways[way].append((i, item))
            else:
                self.set(i, "unsupported", item)
        for way, left in ways.items():
            while left and not self.decided:
                if self.cpu_left <= 0 or self.wait_left <= 0:
                    left = self.set_all(left, "timeout", "the tests before used up the time of all")
                else:
                    left = way(left)
        done = sorted(self.found)
        failed = next((i for i in done if self.found[i][0] != "pass"), None)
        if self.stop_early and failed is not None:
            done = done[: done.index(failed) + 1]
        words = [self.found[i][0] for i in done]
        n, passes = len(self.tests.cases), words.count("pass")
        result = Result(passes == n, words, passes / n, self.cpu, self.wall)
        result.trusted = not {"unsupported", "harness_error"} & set(words)
        if failed is not None:
            word, detail, _ = self.found[failed]
            text = f"test {failed}: {detail or word}"
            result.detail = text.encode("utf-8", "replace").decode()  # no lone surrogates
        if answers := [(i, said) for i, (*_, said) in sorted(self.found.items()) if said]:
            result.answer = hashlib.sha256(repr(answers).encode()).hexdigest()[:12]
        return result

    def plan(self, case):
        """(how a case is run, what is needed for that); (None, why it cannot be judged). A call
        needs (name, question, right answers, whether they are compared as Python does)."""
        if self.tests.kind == "stdin":
            return self.stdin, case
        entry = self.tests.entry_point
        if self.tests.kind == "assert":
            call = as_call(case["assert"], entry) if "assert" in case else None
            if call and (entry or not re.search(rf"\b{call[0]}\b", self.job["setup"])):
                return self.calls, call
            return self.session, case
        values = case["any_of"] if "any_of" in case else [case["expected"]]
        try:
            answers = [encode(value, compare=True).encode() for value in values]
            return self.calls, (entry, encode((entry, tuple(case["args"]), ())), answers, False)
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            return None, f"the test holds no plain data: {error}"

    def set(self, i, word, detail="", said=None):
        """Note a verdict, and `said`: the bytes that were printed or returned."""
        shown = said is not None and word in ("pass", "wrong_answer")
        answer = hashlib.sha256(said).hexdigest() if shown else None
        self.found[i] = word, detail.strip()[-500:], answer
        self.decided = self.decided or (self.stop_early and word != "pass")

    def set_all(self, cases, word, detail):
        for i, _ in cases:
            self.set(i, word, detail)
        return []

    def execute(self, mode, fds, tick=None):
        """Run a process over these descriptors, or program and tester -> the program's Run, with
        the verdict that the end of either gives."""
        runs = self.worker.run(mode, fds, self.limits, (self.cpu_left, self.wait_left), tick)
        cpu, wall = sum(run.cpu for run in runs), runs[0].wall
        self.cpu, self.wall = self.cpu + cpu, self.wall + wall
        self.cpu_left -= cpu
        self.wait_left -= max(0.0, wall - cpu / confined.IDLE)
        sizes = [os.fstat(fd).st_size for fd in fds]
        runs[0].flooded = max(sizes[1:3]) >= self.limits.output_mb << 20
        for run, at in zip(runs, (2, 4)):  # where the program's errors are, and the tester's
            text = os.pread(fds[at], 1 << 16, max(0, sizes[at] - (1 << 16)))
            run.word, run.err = ending(run, self.limits), text.decode("utf-8", "replace")
        return next((run for run in runs if run.word), runs[0])

    def run_once(self, text, most):
        """Run the program over one input -> Run, with the first `most` bytes that it printed."""
        job, given = json.dumps(self.job).encode(), text.encode("utf-8", "surrogatepass")
        with memory_files(job, b"", b"", given) as fds:
            run = self.execute(confined.RUN, fds)
            if not run.word and run.cpu > self.limits.cpu_s:
                run.word = "timeout"
            run.out = os.pread(fds[1], most, 0)
            return run

    def stdin(self, cases):
        """A process a test: run the first of these, return the others."""
        i, case = cases[0]
        expected = case["output"].encode("utf-8", "surrogatepass")
        run = self.run_once(case["input"], MAX_EXTRA + 20 * len(expected) + 1)
        word, detail = run.word, run.err
        if not word:
            word = "pass" if same_output(expected, run.out) else "wrong_answer"
            got = run.out[:200].decode("utf-8", "replace")
            detail = f"printed {got!r}, expected {case['output'][:200]!r}"
        self.set(i, word, detail, run.out.strip())
        return cases[1:]

    def calls(self, cases):
        """One process answers call after call."""
        names = sorted({name for _, (name, *_) in cases})
        job = {"compare": True, "lines": self.tests.kind == "assert", "names": names}
        job = json.dumps(self.job | job).encode()
        questions = "".join(f"{question}\n" for _, (_, question, *_) in cases).encode()
        with memory_files(job, b"", b"", questions, b"") as fds:
            return self.follow(confined.CALLS, fds, cases)

    def session(self, cases):
        """Test code in the tester's process, the program in its own, a socket between them."""
        job = self.job | {"compare": False, "lines": False}
        test = {"cases": [case for _, case in cases], "setup": self.job["setup"],
                "entry": self.tests.entry_point, "limit": self.limits.output_mb << 20}  # fmt: skip
        job, test = (json.dumps(part).encode() for part in (job, test))
        with memory_files(job, b"", b"", test, b"", b"") as fds:
            return self.follow(confined.SESSION, fds, cases)

    def follow(self, mode, fds, cases):
        """Read what is written for these cases, a line each after a first one, while it is written.
        Returns the cases that are left when a process ended: the next one begins there."""
        left, lines, ready = deque(cases), lines_of(fds[-1]), False

        def read():
            """Judge the answers that have come; true if no more are needed."""
            nonlocal ready
            while left and not self.decided:
                if (line := next(lines)) is None:
                    return False
                if not ready:
                    ready = True
                elif mode == confined.CALLS:
                    i, (_, _, expected, exact) = left.popleft()
                    said = None if line.startswith(b"?") else line
                    self.set(i, *judge_answer(line, expected, exact), said)
                elif line:  # the tester's own words; its empty lines mark time
                    self.set(left.popleft()[0], *json.loads(line))
            return True

        run = self.execute(mode, fds, read)
        read()
        word, detail = run.word or "runtime_error", run.err or "the program ended early"
        if not ready:  # it never came to the calls: that is the verdict of all
            return self.set_all(left, word, detail)
        if word in ("memory", "output_limit") and len(left) < len(cases):
            return list(left)  # what the calls before used is not this one's
        if left and not self.decided:
            self.set(left.popleft()[0], word, detail)
        return list(left)


def lines_of(fd):
    """The lines of a file that another process is writing, without their ends; None where the next
    one has not come."""
    text, at = bytearray(), 0
    while True:
        while (end := text.find(b"\n")) >= 0:
            yield bytes(memoryview(text)[:end])
            del text[: end + 1]
        block = os.pread(fd, 1 << 20, at)
        text += block
        at += len(block)
        if not block:
            yield None


def ending(run, limits):
    """The verdict word a process's end gives, "" if it ended well. The exit codes are the program's
    to choose; they only ever pick among failures."""
    signal_number = run.status & 127
    if run.why in (confined.BROKEN, confined.THREADS):
        return "harness_error" if run.why == confined.BROKEN else "sandbox_violation"
    if run.flooded or signal_number == getattr(signal, "SIGXFSZ", -1):
        return "output_limit"
    if run.why == confined.TIME or signal_number == getattr(signal, "SIGXCPU", -1):
        return "timeout"
    if run.status == 0 or run.why == confined.ASKED:
        return ""
    if run.rss > 0.9 * (limits.memory_mb << 20):
        return "memory"
    if signal_number == signal.SIGSYS:
        return "sandbox_violation"
    words = {code: word for word, code in confined.EXIT_CODES.items()}
    return words.get(run.status >> 8, "runtime_error")


def judge_answer(line, expected, exact):
    """One answer, which may hold anything, against the right ones -> (word, detail)."""
    got = line[:300].decode("utf-8", "replace").replace("\t", " ")
    if line.startswith(b"!"):
        return FAILURES.get(got[1:].split(" ")[0], "runtime_error"), got[1:]
    for value in expected:
        if len(line) <= MAX_EXTRA + 20 * len(value) and same_text(value, line, exact):
            return "pass", ""
    wanted = b" or ".join(expected)[:200].decode().replace("\t", " ")
    return "wrong_answer", f"answered {got[:200]}, expected {wanted}"


# --------------------------------------------------------------------------------------------------
# comparison: text against text, linear in both, without making objects of what a program wrote

# Only text that every printer of numbers writes: no "1_0", no full-width digits, no "+7", no "007",
# no exponent that would take Decimal minutes.
NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)((?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)")
TRUTH = {b"true": True, b"false": False}


def pairwise(expected, actual, token, same):
    """Are the texts (bytes) equal, token by token, where `same(left, right)` knows what else is?"""
    if expected == actual:
        return True
    pairs = itertools.zip_longest(re.finditer(token, expected), re.finditer(token, actual))
    for found in pairs:
        left, right = (match and match.group() for match in found)
        if left != right and not (
            left and right and len(left) + len(right) < 800 and same(left, right)
        ):
            return False
    return True


def number_of(token):
    """The number that a token means, an int or a Decimal; None if it means something else."""
    if not (found := NUMBER.fullmatch(token)):
        return None
    return Decimal(token.decode()) if found[1] else int(token)


def near(expected, actual):
    """Is an integer met exactly (6.0 will do, 6.0000001 will not), another number nearly? That is
    testlib's doubleCompare: absolute or relative 1e-6; the 1e-15 lets 0 equal a rounding error."""
    if expected is None or actual is None:
        return False
    if isinstance(expected, int):
        return expected == actual
    return abs(actual - expected) <= Decimal("1e-6") * max(1, abs(expected)) + Decimal("1e-15")


def same_output(expected, actual):
    """Does printed text (str or bytes) meet the expected text? Same lines, same blank-separated
    tokens; numbers by value.

    Trailing blanks, blank lines around the text and CRLF do not count; case and order do.

    >>> same_output("0.333333\\n", "0.33333333")
    True
    """
    expected, actual = (
        text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        for text in (expected, actual)
    )
    if len(actual) > MAX_EXTRA + 20 * len(expected):
        return False

    def same(left, right):
        return near(number_of(left), number_of(right))

    return pairwise(plain_lines(expected), plain_lines(actual), rb"[^ \n]+|\n", same)


def plain_lines(data):
    """Bytes with one space between the tokens of a line and nothing around the lines: only \\n ends
    a line, after CRLF became that, and only blanks of ASCII separate tokens."""
    data = data.replace(b"\r\n", b"\n").translate(bytes.maketrans(b"\t\v\f", b"   "))
    while b"  " in data:  # each pass halves the longest run
        data = data.replace(b"  ", b" ")
    return data.replace(b" \n", b"\n").replace(b"\n ", b"\n").strip(b" \n")


def same_value(expected, actual):
    """Does a returned value meet the expected one, which may come from JSON?

    Tuples equal lists, dict keys may be the JSON text of an int, floats are met to 1e-6; True is
    not 1, a set is not a list, NaN is only met by NaN.

    >>> same_value([1, 0.3], (1, 0.1 + 0.2))
    True
    """
    return same_text(*(encode(value, compare=True).encode() for value in (expected, actual)))


def same_text(expected, actual, exact=False):
    """The same for what `encode(value, compare=True)` gives (bytes). exact "==" is Python's own
    comparison (1 == 1.0 == True, a tuple is no list), "is" that of None, True and False."""
    if exact == "is":
        return expected == actual

    def same(left, right):
        if not exact and {left, right} == {b"[", b"("}:
            return True
        if left[:1] == right[:1] == b"k":  # the key of a dict
            left, right = left[1:], right[1:]
            if not exact and left == b'"%s"' % right:  # as JSON has it
                return value_of(right) is not None or right in (b"inf", b"-inf")
        if exact:
            left, right = (TRUTH.get(token, value_of(token)) for token in (left, right))
            return left is not None and left == right
        return near(value_of(left), value_of(right))

    return pairwise(expected, actual, rb"[^\t]+", same)


def value_of(token):
    """The same of a token of `encode`: long integers are hexadecimal, a float is its binary value
    and not the short text of it."""
    if re.fullmatch(rb"-?0x[0-9a-f]+", token):
        return int(token, 16)
    number = number_of(token)
    return Decimal(float(number)) if isinstance(number, Decimal) else number


# --------------------------------------------------------------------------------------------------
# the caller's side of a server


@contextlib.contextmanager
def memory_files(*contents):
    """Unnamed files in memory. A program's stdin is a regular file, since fast readers ask for its
    size, and so is its stdout: nobody needs to keep a pipe from filling, and RLIMIT_FSIZE caps a
    flood."""
    fds = []
    try:
        for data in contents:
            if hasattr(os, "memfd_create"):
                fds.append(os.memfd_create("io", os.MFD_CLOEXEC))
            else:
                with tempfile.TemporaryFile() as file:
                    fds.append(os.dup(file.fileno()))
            with open(fds[-1], "wb", closefd=False) as file:
                file.write(data)
            os.lseek(fds[-1], 0, os.SEEK_SET)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@dataclass
class Run:
    """What one process left: how it ended, what it cost (seconds, bytes), what it wrote."""

    status: int
    cpu: float
    rss: int
    why: int
    wall: float
    out: bytes = b""
    err: str = ""
    word: str = ""  # the verdict its end alone gives, "" if it ended well
    flooded: bool = False


class Worker:
    """One server process, started when first needed. A dead server raises SandboxError and is
    replaced at the next run."""

    def __init__(self, options):
        readable, modules = library_paths()
        self.options = {**options, "readable": readable, "path": modules, "caller": os.getpid()}
        self.process = self.control = None
        self.busy = self.ended = False
        self.lock = threading.Lock()  # of starting and closing, which may come from two threads

    def start(self):
        here, there = socket.socketpair()
        # The stack limit must hold before the interpreter starts: the kernel lays memory out then.
        first = 'ulimit -S -s 262144 || ulimit -S -s "$(ulimit -H -s)"; exec "$@"'
        command = ["/bin/sh", "-c", first, "sh", sys.executable, "-s", "-S", "-X", "utf8"]
        threads = {f"{k}_NUM_THREADS": "1" for k in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        arguments = [str(there.fileno()), json.dumps(self.options)]
        with there:
            self.process = subprocess.Popen(
                [*command, confined.__file__, *arguments],
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads},
                pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, cwd="/", start_new_session=True,
            )  # fmt: skip
        here.settimeout(60)
        self.control = here
        hello = b""
        with contextlib.suppress(OSError):
            hello = here.makefile("rb").readline()
        if not hello.endswith(b"\n"):
            self.process.kill()
            text = self.process.stderr.read().decode(errors="replace").strip()
            self.end_server()
            raise SandboxError(f"the sandbox server did not start: {text[-300:] or 'no message'}")
        self.process.stderr.close()
        self.layers = json.loads(hello)

    def close(self, for_good=False):
        with self.lock:
            self.ended = self.ended or for_good
            self.end_server()

    def end_server(self):
        """The server leaves at the end of its socket, and its program dies with it; if not, it is
        killed."""
        if self.control:
            with contextlib.suppress(OSError):  # wakes a thread that waits on it, unlike close()
                self.control.shutdown(socket.SHUT_RDWR)
            self.control.close()
        if self.process:
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process, self.control, self.busy = None, None, False

    def run(self, mode, fds, limits, budget, tick=None):
        """Run one program, or program and tester, to the end -> [Run, ...]. `budget`: seconds of
        CPU and of waiting that are left. `tick()` is called now and then; true ends the program.
        """
        with self.lock:
            if self.ended:
                raise SandboxError("closed")
            if self.busy or (self.process and self.process.poll() is not None):
                self.end_server()  # busy: Ctrl-C came since, the next reply would be the old one's
            if self.process is None:
                self.start()
            control, self.busy = self.control, True
        sizes = limits.memory_mb << 20, limits.output_mb << 20
        request = confined.REQUEST.pack(mode, limits.cpu_s, limits.wall_s, *budget, *sizes)
        end = time.monotonic() + 20 * budget[0] + budget[1] + 60  # then the server is at fault
        try:
            socket.send_fds(control, [b"r"], fds)
            control.sendall(request)
            poller = select.poll()  # select() knows no descriptors above 1023
            poller.register(control, select.POLLIN)
            while not poller.poll(20):  # milliseconds
                if time.monotonic() > end:
                    raise OSError("the sandbox server does not answer")
                if tick and tick():
                    control.sendall(b"k")
                    tick = None
            reply = control.recv(confined.REPLY.size, socket.MSG_WAITALL)
            if len(reply) != confined.REPLY.size:
                raise OSError("the sandbox server died")
        except (OSError, ValueError) as error:  # ValueError: another thread has closed the socket
            self.close()
            raise SandboxError(str(error)) from None
        self.busy = False
        *rows, wall = confined.REPLY.unpack(reply)
        runs = [Run(*rows[:4], wall), Run(*rows[4:], wall)]
        return runs if mode == confined.SESSION else runs[:1]


def library_paths():
    """(what a program may read: the interpreter's libraries, the installed packages, the C
    libraries, time zones; where it finds modules)."""
    paths = sysconfig.get_paths()
    modules = [paths["stdlib"], sysconfig.get_config_var("DESTSHARED")]
    modules += [paths["purelib"], paths["platlib"]]
    keep = [*modules, paths["platstdlib"], os.path.join(sys.base_prefix, "lib")]
    keep += "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /etc/ld.so.cache".split()
    keep += "/etc/localtime /usr/share/zoneinfo /dev/null /dev/zero /dev/urandom".split()
    return list(filter(None, keep)), list(filter(None, modules))


# --------------------------------------------------------------------------------------------------
# command line


@dataclass
class Args:
    program: str = ""  # a Python file
    tests: str = ""  # JSON file: {"kind", "cases", "entry_point"?, "setup"?, "time_limit"?}
    check: bool = False  # show which layers of isolation hold here
    all: bool = False  # run every test, also after a failure
    sandbox: str = ""  # isolation level: strict or basic (default: strict on Linux, else basic)


def check():
    """Print the probe's findings. Exit code 0 if level strict holds, 1 if not."""
    sb = Sandbox(1, "basic")
    sb.close()
    report = sb.report()
    holds = "does not hold" if report["missing"] else "holds"
    print(f"level strict {holds} on {platform.system()} {platform.release()} {platform.machine()}")
    for name, holds in report["layers"].items():
        note = f": {report['notes'][name]}" if name in report["notes"] else ""
        print(f"  {'holds  ' if holds else 'MISSING'}  {name}{note}")
    for name, refused in report["attempts"].items():
        print(f"  {'refused' if refused else 'WORKED '}  {name}")
    print("  visible  stat of any path, the host's name")
    if report["missing"]:
        print("  --sandbox basic runs with what there is")
    return 1 if report["missing"] else 0


def run_file(program, tests, level, every):
    """Run one program against the tests of a file, print the Result as JSON."""
    with open(program, encoding="utf-8", errors="surrogateescape") as file:
        code = file.read()
    try:
        with open(tests, encoding="utf-8") as file:
            suite = as_tests(json.load(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--tests {tests}: {error}") from None
    with Sandbox(1, level) as sb:
        result = sb.run(code, suite, stop_early=not every)
    print(json.dumps(vars(result)))
    return 0 if result.passed else 1


def main():
    args = parse_args(Args, positional="program")
    sys.set_int_max_str_digits(0)
    if args.check:
        sys.exit(check())
    if not (args.program and args.tests):
        raise UserError("give PROGRAM.py and --tests TESTS.json, or --check")
    sys.exit(run_file(args.program, args.tests, args.sandbox, args.all))


if __name__ == "__main__":
    run_cli(main)
