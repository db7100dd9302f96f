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

Partial credit (`stop_early=False`) runs every test and divides by their true number. The released
CodeScaler code stops at the first failure after j passes and pays j/(j+1) whatever the number of
tests (lcb_check_correctness).
"""

import contextlib
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
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from decimal import Decimal

from tqdm import tqdm

import confined
from common import UserError, parse_args, run_cli
from testcode import FAILURES, as_call, encode

# --------------------------------------------------------------------------------------------------
# limits and results

VERDICTS = (
    "pass", "wrong_answer", "runtime_error", "timeout", "memory", "output_limit", "syntax_error",
    "sandbox_violation", "unsupported", "harness_error",
)  # fmt: skip
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
    """`verdicts`: one word a test that was run. `pass_rate`: passes / all tests (a true rate if
    stop_early=False). `trusted`: False when a test could not be judged (unsupported,
    harness_error): mask such a sample, do not score it. `degraded`: the level was basic. `cpu_s`,
    `wall_s`: seconds over all tests. `detail`: about the first failure. `answer`: a short hash of
    what was printed or returned in the tests that were run, None if that is nothing or if it cannot
    be seen (other test code): programs with equal ones answer alike."""

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
def raise_limit():
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
def fork():
    if os.fork() == 0: os._exit(0)
def queue_signals():  # what is queued counts for the user, whose own timers then fail
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    for _ in range(200): os.kill(os.getpid(), signal.SIGRTMIN)
    for _ in range(100):
        if not signal.sigtimedwait([signal.SIGRTMIN], 0): raise OSError
def timer():
    if ctypes.CDLL(None).timer_create(0, None, ctypes.create_string_buffer(8)): raise OSError
tries = {
    "landlock: read /etc/passwd": lambda: open("/etc/passwd"),
    "landlock: list /": lambda: os.listdir("/"),
    "landlock: write a temporary file": lambda: open(temporary + "/.sandbox_probe", "w"),
    "landlock: write shared memory": lambda: open("/dev/shm/.sandbox_probe", "w"),
    "seccomp: truncate a file": lambda: os.open("/dev/null", os.O_RDONLY | os.O_TRUNC),
    "seccomp: open a socket": socket.socket,
    "seccomp: fork": fork,
    "seccomp: signal the parent": lambda: os.kill(os.getppid(), 0),
    "seccomp: hidden memory": lambda: os.memfd_create("x"),
    "seccomp: remove a file": lambda: os.unlink("/none"),
    "seccomp: create a timer": timer,
    "rlimits: raise a limit": raise_limit,
    "rlimits: queue signals": queue_signals,
}
done = []
for name, attempt in tries.items():
    try: attempt()
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
_warned = False


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
        can_tell = hasattr(os, "sched_getaffinity")
        cpus = len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
        self.count = workers or max(1, cpus // ranks)
        options = {"basic": level == "basic", "without": without, "landlock_abi": landlock_abi}
        self.all = [Worker(options) for _ in range(self.count)]
        self.free = queue.LifoQueue()  # the last used is the warmest
        for worker in self.all:
            self.free.put(worker)
        try:
            self._report = self._probe()
            missing = self._report["missing"]
            if level == "strict" and missing:
                notes = "; ".join(f"{k}: {v}" for k, v in self._report["notes"].items())
                raise SandboxError(
                    f"level strict is missing {', '.join(missing)} here"
                    f"{f' ({notes})' if notes else ''}; choose --sandbox basic to run with less"
                )
        except BaseException:
            self.close()
            raise
        if level == "basic":
            warn_once(f"sandbox level basic, missing: {', '.join(missing) or 'nothing'}")

    def __enter__(self):
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
        worker, limits = self.all[0], Limits()
        tests = Tests("stdin", [])
        try:
            judge = Judge(worker, PROBE, tests, limits, True)
            run = judge.run_once(tempfile.gettempdir(), MAX_EXTRA)
            tried, done = json.loads(run.out)
        except WorkerDied as error:
            raise SandboxError(f"the sandbox server died at its first program: {error}") from None
        except json.JSONDecodeError:
            text = run.err.strip()[-300:]
            raise SandboxError(f"the sandbox runs no program here: {run.word} {text}") from None
        tried.append("server: run 400 threads")
        done += tried[-1:] * (run.why != confined.THREADS)
        notes, active = dict(worker.layers["notes"]), list(worker.layers["active"])
        for name in done:
            layer, what = name.split(": ")
            if layer in active:
                active.remove(layer)
                notes[layer] = f"did not stop: {what}"
        abi = worker.layers.get("landlock")
        if abi and abi < 3:
            notes["landlock"] = f"ABI {abi} does not govern truncation; seccomp refuses it"
        return {
            "level": self.level,
            "degraded": self.level == "basic",
            "layers": {k: k in active for k in LAYERS},
            "missing": [k for k in LAYERS if k not in active],
            "landlock_abi": abi,
            "attempts": {k: k not in done for k in tried},
            "notes": notes,
            "workers": self.count,
            "machine": platform.machine(),
        }

    def report(self):
        """{level, degraded, layers: {name: bool}, missing, landlock_abi, attempts: {what: refused},
        notes, workers, machine}."""
        return self._report

    def run(self, code, tests, limits=None, stop_early=True, repeat=1):
        """One program's Result. ValueError without tests; a program never raises.

        repeat=2 runs a passing program again: a program that passes only sometimes does not pass
        (detail "flaky").
        """
        tests = as_tests(tests)
        limits = limits or Limits()
        if seconds := tests.time_limit:
            limits = Limits(2 * seconds, seconds, limits.memory_mb, limits.output_mb)
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
                except (WorkerDied, SandboxError, OSError) as error:
                    self._usable()
                    words = ["harness_error"] * (1 if stop_early else len(tests.cases))
                    result = Result(False, words, 0.0, trusted=False)
                    result.detail = f"{error} ({attempt}x)"
        finally:
            self.free.put(worker)
        result.degraded = self.level == "basic"
        return result

    def map(self, jobs, limits=None, stop_early=True, progress=False, repeat=1):
        """[(code, tests), ...] -> [Result, ...] in the same order, over all workers."""
        jobs = list(jobs)
        for _, tests in jobs:
            as_tests(tests)
        shown = progress and sys.stderr.isatty()
        bar = tqdm(total=len(jobs), desc="running programs", unit="program", disable=not shown)
        pool = ThreadPoolExecutor(self.count)
        try:
            futures = [pool.submit(self.run, *job, limits, stop_early, repeat) for job in jobs]
            for future in as_completed(futures):
                future.result()
                bar.update()
            return [future.result() for future in futures]
        finally:  # Ctrl-C arrives here; the threads stop after the program they are at
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()


def warn_once(text):
    global _warned
    if not _warned:
        print(f"warning: {text}", file=sys.stderr)
    _warned = True


SHAPES = {  # the keys of a case, one way or the other
    "stdin": ["input, output"],
    "call": ["args, expected", "args, any_of"],
    "assert": ["assert", "check"],
}
TYPES = {"args": list | tuple, "any_of": list | tuple, "expected": object}  # the rest are texts


def as_tests(tests):
    """`Tests`, or a dict with its keys; checked, so that a mistake is not scored as a failing
    program. Raises ValueError."""
    if isinstance(tests, dict):
        empty = {"kind": None, "entry_point": None, "setup": "", "time_limit": None}
        tests = types.SimpleNamespace(**empty | tests)
    cases, limit = getattr(tests, "cases", None), getattr(tests, "time_limit", None)
    if not isinstance(cases, list | tuple) or not cases:
        raise ValueError("no tests: a program without tests cannot be run for a verdict")
    if tests.kind not in SHAPES:
        raise ValueError(f"tests.kind is {tests.kind!r}, expected stdin, call or assert")
    for i, case in enumerate(cases):
        keys, shapes = case if isinstance(case, dict) else {}, SHAPES[tests.kind]
        fit = {key for key in keys if isinstance(keys[key], TYPES.get(key, str))}
        if not any(fit.issuperset(shape.split(", ")) for shape in shapes):
            wanted = f"{' or '.join(shapes)} (args and any_of are lists, the rest texts)"
            raise ValueError(f"tests.cases[{i}] is {reprlib.repr(case)}, expected {wanted}")
    for name in ("entry_point", "setup"):
        if not isinstance(value := getattr(tests, name), str | None):
            raise ValueError(f"tests.{name} is a {type(value).__name__}, expected a text")
    if limit is not None and not (isinstance(limit, int | float) and 1e-3 <= limit <= 1e5):
        raise ValueError(f"tests.time_limit is {limit!r:.80}, expected seconds")
    if tests.kind == "call" and not tests.entry_point:
        raise ValueError("tests of kind call need an entry_point")
    if not tests.entry_point and any("check" in c for c in tests.cases):
        raise ValueError("a check(candidate) test needs an entry_point")
    return tests


# --------------------------------------------------------------------------------------------------
# judging: one suite of tests, in the caller


class Judge:
    """One program against one suite, run by `worker`. `words` and `details` hold a verdict and its
    explanation by case number; `decided` says that no more are needed."""

    def __init__(self, worker, code, tests, limits, stop_early):
        self.worker, self.tests, self.limits, self.stop_early = worker, tests, limits, stop_early
        self.cpu = self.wall = 0.0
        self.cpu_left = (5 + len(tests.cases) / 5) * limits.cpu_s
        self.wait_left = SUITE_WAIT * limits.wall_s
        self.words, self.details, self.answers, self.decided = {}, {}, {}, False
        # All that the program's process is told before it runs:
        names = [tests.entry_point] if tests.entry_point else []
        self.job = {"code": code, "setup": tests.setup or "", "names": names}

    def grade(self):
        cases = {self.stdin: [], self.calls: [], self.session: []}
        for i, case in enumerate(self.tests.cases):
            step, item = self.plan(case)
            if step:
                cases[step].append((i, item))
            else:
                self.set(i, "unsupported", item)
        for step, left in cases.items():
            while left and not self.decided:
                if self.cpu_left <= 0 or self.wait_left <= 0:
                    self.set_all(left, "timeout", "the tests before used up the time of all")
                    break
                left = step(left)
        n = len(self.tests.cases)
        done = sorted(self.words)
        failed = next((i for i in done if self.words[i] != "pass"), None)
        if self.stop_early and failed is not None:
            done = done[: done.index(failed) + 1]
        words = [self.words[i] for i in done]
        passes = words.count("pass")
        result = Result(passes == n, words, passes / n, self.cpu, self.wall)
        result.trusted = not {"unsupported", "harness_error"} & set(words)
        if failed is not None:
            detail = f"test {failed}: {self.details[failed] or self.words[failed]}"
            result.detail = detail.encode("utf-8", "replace").decode()  # no lone surrogates
        if self.answers:
            text = repr(sorted(self.answers.items()))
            result.answer = hashlib.sha256(text.encode()).hexdigest()[:12]
        return result

    def plan(self, case):
        """(how a case is run, what is needed for that); (None, why it cannot be judged)."""
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
            return self.calls, (entry, encode((entry, tuple(case["args"]), ())), answers, "")
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            return None, f"the test holds no plain data: {error}"

    def set(self, i, word, detail="", said=None):
        """Note a verdict, and `said`: the bytes that were printed or returned."""
        self.words[i], self.details[i] = word, detail.strip()[-500:]
        if said is not None and word in ("pass", "wrong_answer"):
            self.answers[i] = hashlib.sha256(said).hexdigest()
        self.decided = self.decided or (self.stop_early and word != "pass")

    def set_all(self, cases, word, detail):
        for i, _ in cases:
            self.set(i, word, detail)
        return []

    def execute(self, mode, fds, errors, tick=None):
        """Run a process over these descriptors, or program and tester -> the program's Run, with
        the verdict that the end of either gives. `errors`: what each writes its errors to."""
        runs = self.worker.run(mode, fds, self.limits, (self.cpu_left, self.wait_left), tick)
        cpu, cap = sum(run.cpu for run in runs), self.limits.output_mb << 20
        self.cpu, self.wall = self.cpu + cpu, self.wall + runs[0].wall
        self.cpu_left -= cpu
        self.wait_left -= max(0.0, runs[0].wall - cpu / confined.IDLE)
        runs[0].flooded = max(os.fstat(fd).st_size for fd in fds[1:3]) >= cap
        for run, fd in zip(runs, errors):
            size = os.fstat(fd).st_size
            text = os.pread(fd, 1 << 16, max(0, size - (1 << 16))).decode("utf-8", "replace")
            run.word, run.err = ending(run, self.limits), text
        return next((run for run in runs if run.word), runs[0])

    def run_once(self, text, most):
        """Run the program over one input -> Run, with the first `most` bytes that it printed."""
        job, given = json.dumps(self.job).encode(), text.encode("utf-8", "surrogatepass")
        with memory_files(job, b"", b"", given) as fds:
            run = self.execute(confined.RUN, fds, fds[2:3])
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
        job = {"compare": True, "lines": self.tests.kind == "assert"}
        job["names"] = sorted({name for _, (name, *_) in cases})
        questions = "".join(f"{question}\n" for _, (_, question, *_) in cases).encode()
        with memory_files(json.dumps(self.job | job).encode(), b"", b"", questions, b"") as fds:
            return self.follow(confined.CALLS, fds, fds[2:3], cases)

    def session(self, cases):
        """Test code in the tester's process, the program in its own, a socket between them."""
        job = self.job | {"compare": False, "lines": False}
        test = {"cases": [case for _, case in cases], "setup": self.job["setup"],
                "entry": self.tests.entry_point, "limit": self.limits.output_mb << 20}  # fmt: skip
        jobs = [json.dumps(job).encode() for job in (job, test)]
        with memory_files(jobs[0], b"", b"", jobs[1], b"", b"") as fds:
            job, out, err, test, said, reports = fds
            fds = [job, out, err, test, said, said, reports]
            return self.follow(confined.SESSION, fds, [err, said], cases)

    def follow(self, mode, fds, errors, cases):
        """Read what is written for these cases, a line each after a first one, while it is written.
        Returns the cases that are left when a process ended: the next one begins there."""
        left, lines, ready = deque(cases), Lines(fds[-1]), False

        def read():
            """Judge the answers that have come; true if no more are needed."""
            nonlocal ready
            while left and not self.decided:
                i, item = left[0]
                _, _, expected, exact = item if mode == confined.CALLS else ("", "", [], "")
                line = lines.next(MAX_EXTRA + 20 * max(map(len, expected), default=0))
                if line is None:
                    return False
                if ready and (line or mode == confined.CALLS):  # the tester's empty ones mark time
                    left.popleft()
                    if mode == confined.SESSION:  # the tester's own words
                        self.set(i, *json.loads(line))
                    else:
                        said = None if line.startswith(b"?") else line
                        self.set(i, *judge_answer(line, expected, exact), said)
                ready = True
            return True

        run = self.execute(mode, fds, errors, read)
        read()
        word, detail = run.word or "runtime_error", run.err or "the program ended early"
        if not ready:  # it never came to the calls: that is the verdict of all
            return self.set_all(left, word, detail)
        if word in ("memory", "output_limit") and len(left) < len(cases):
            return list(left)  # what the calls before used is not this one's
        if left and not self.decided:
            self.set(left.popleft()[0], word, detail)
        return list(left)


def ending(run, limits):
    """The verdict word a process's end gives, "" if it ended well. The exit codes are the program's
    to choose; they only ever pick among failures."""
    signal_number = run.status & 127
    if run.why in (confined.BROKEN, confined.THREADS):
        return "harness_error" if run.why == confined.BROKEN else "sandbox_violation"
    if run.flooded or signal_number == getattr(signal, "SIGXFSZ", -1):
        return "output_limit"
    if run.why in (confined.WALL, confined.CPU) or signal_number == getattr(signal, "SIGXCPU", -1):
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
    if any(same_text(value, line, exact) for value in expected):
        return "pass", ""
    wanted = b" or ".join(expected)[:200].decode().replace("\t", " ")
    return "wrong_answer", f"answered {got[:200]}, expected {wanted}"


# --------------------------------------------------------------------------------------------------
# comparison: text against text, linear in both, without making objects of what a program wrote

# Only text that every printer of numbers writes: no "1_0", no full-width digits, no "+7", no "007",
# no exponent that would take Decimal minutes.
NUMBER = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
VALUE = re.compile(r"(-?[0-9]+)|(-?0x[0-9a-f]+)|(-?[0-9.]+(?:e[+-]?[0-9]+)?|-?inf)")


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


def close(expected, actual):
    """testlib's doubleCompare: absolute or relative 1e-6; the 1e-15 lets 0 equal a rounding error.
    NaN and inf fail."""
    kind = type(expected)
    return abs(actual - expected) <= kind("1e-6") * max(1, abs(expected)) + kind("1e-15")


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
    return pairwise(plain_lines(expected), plain_lines(actual), rb"[^ \n]+|\n", same_number)


def plain_lines(data):
    """Bytes with one space between the tokens of a line and nothing around the lines: only \\n ends
    a line, after CRLF became that, and only blanks of ASCII separate tokens."""
    data = data.replace(b"\r\n", b"\n").translate(bytes.maketrans(b"\t\v\f", b"   "))
    while b"  " in data:  # each pass halves the longest run
        data = data.replace(b"  ", b" ")
    return data.replace(b" \n", b"\n").replace(b"\n ", b"\n").strip(b" \n")


def same_number(expected, actual):
    """Two printed tokens: is an integer met exactly (6.0 will do, 6.0000001 will not), another
    number nearly?"""
    if not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    left, right = Decimal(expected.decode()), Decimal(actual.decode())
    return left == right if expected.lstrip(b"-").isdigit() else close(left, right)


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
        left, right = left.decode("ascii", "replace"), right.decode("ascii", "replace")
        if left[0] == right[0] == "k":  # the key of a dict
            left, right = left[1:], right[1:]
            if not exact and left == f'"{right}"':
                return VALUE.fullmatch(right) is not None
        left, right = number_of(left, exact), number_of(right, exact)
        if left is None or right is None:
            return False
        if exact or isinstance(left, int) or abs(left) == float("inf"):
            return left == right
        return abs(right) <= sys.float_info.max and close(left, right)

    return pairwise(expected, actual, rb"[^\t]+", same)


def number_of(token, exact):
    """The number that a token means, None if it means something else."""
    if exact and token in ("true", "false"):
        return token == "true"
    if not (found := VALUE.fullmatch(token)):
        return None
    whole, hexadecimal, real = found.groups()
    try:
        return int(whole) if whole else float(real) if real else int(hexadecimal, 16)
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------
# the caller's side of a server


class WorkerDied(Exception):
    pass


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
            view = memoryview(data)
            while view:
                view = view[os.write(fds[-1], view) :]
            os.lseek(fds[-1], 0, os.SEEK_SET)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


class Lines:
    """The lines of a file that another process is writing."""

    def __init__(self, fd):
        self.fd, self.at, self.searched = fd, 0, 0

    def next(self, most):
        """The next line without its end, at most `most + 1` bytes; None if it has not come."""
        line = os.pread(self.fd, most + 1, self.at)
        if (end := line.find(b"\n")) >= 0:
            self.at += end + 1
            return line[:end]
        at = max(self.at + len(line), self.searched)
        while block := os.pread(self.fd, 1 << 16, at):
            if (end := block.find(b"\n")) >= 0:
                self.at = at + end + 1
                return line
            at += len(block)
        self.searched = at  # no end of a line before it
        return None


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
    """One server process, started when first needed. A dead server raises WorkerDied and is
    replaced at the next run."""

    def __init__(self, options):
        readable, modules = library_paths()
        self.options = {**options, "readable": readable, "path": modules, "caller": os.getpid()}
        self.process = self.control = None
        self.busy = self.ended = False
        self.lock = threading.Lock()  # of starting and closing, which may come from two threads
        self.layers = {"active": [], "notes": {}}

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
                raise WorkerDied("closed")
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
            pause = 20 if tick else 1000  # milliseconds
            poller = select.poll()  # select() knows no descriptors above 1023
            poller.register(control, select.POLLIN)
            while not poller.poll(pause):
                if time.monotonic() > end:
                    raise OSError("the sandbox server does not answer")
                if tick and tick():
                    control.sendall(b"k")
                    tick, pause = None, 1000
            control.settimeout(10)
            reply = control.recv(confined.REPLY.size, socket.MSG_WAITALL)
            if len(reply) != confined.REPLY.size:
                raise OSError("the sandbox server died")
        except (OSError, ValueError) as error:  # ValueError: another thread has closed the socket
            self.close()
            raise WorkerDied(str(error)) from None
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
    readable = [path for path in keep if path and os.path.exists(path)]
    return list(dict.fromkeys(readable)), list(dict.fromkeys(filter(None, modules)))


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
    global _warned
    _warned = True  # what is missing is what this prints
    with Sandbox(1, "basic") as sb:
        report = sb.report()
    holds = "does not hold" if report["missing"] else "holds"
    print(f"level strict {holds} on {platform.system()} {platform.release()} {report['machine']}")
    for name, holds in report["layers"].items():
        extra = f" (ABI {report['landlock_abi']})" if name == "landlock" and holds else ""
        note = report["notes"].get(name, "")
        print(f"  {'holds  ' if holds else 'MISSING'}  {name}{extra}{f': {note}' if note else ''}")
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
            loaded = json.load(file)
        as_tests(loaded)
    except (ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"--tests {tests}: {error}") from None
    with Sandbox(1, level) as sb:
        result = sb.run(code, loaded, stop_early=not every)
    print(json.dumps(vars(result)))
    return 0 if result.passed else 1


def main():
    args = parse_args(Args, positional="program")
    sys.set_int_max_str_digits(0)
    try:
        if args.check:
            sys.exit(check())
        if not (args.program and args.tests):
            raise UserError("give PROGRAM.py and --tests TESTS.json, or --check")
        sys.exit(run_file(args.program, args.tests, args.sandbox, args.all))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


if __name__ == "__main__":
    run_cli(main)
