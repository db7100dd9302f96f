"""What every file stands on: errors, command lines from dataclasses, whole files, statistics.

A script is two calls of this file:

    args = parse_args(Args)    # one flag a field of a dataclass; the comment behind it is its help
    run_cli(main)              # a mistake is one line on stderr and exit code 2; Ctrl-C exits 130
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np


class UserError(ValueError):
    """A mistake the user can mend. The message names the thing, the value and the flag."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script the way Ctrl-C does, but with exit code 143."""


# --------------------------------------------------------------------------------------------------
# command lines


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError: one line on stderr."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def parse_args(cls, argv=None, positional=None, about=None):
    """Command line -> an instance of the dataclass `cls`, one flag a field. Raises UserError.

    `steps: int = 60  # GRPO steps` gives `--steps INT` with that help. A bool gives
    `--flag/--no-flag`, a list takes several values, `positional` names a field that is given
    without a flag. A comment on a line of its own begins a group of flags in --help. The module
    docstring heads the help, or `about`, the docstring of a script's command.
    """
    classes = [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    source = "\n".join(map(inspect.getsource, classes))
    parser = Parser(
        prog=" ".join([os.path.basename(sys.argv[0]), *sys.argv[1 : 2 if about else 1]]),
        usage=f"%(prog)s {f'[{positional} ...] ' if positional else ''}[--flag value ...]",
        description=inspect.cleandoc(about or sys.modules[cls.__module__].__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given gets the default of its field
    )
    section, fields = parser, {f.name: f for f in dataclasses.fields(cls)}
    for line in source.splitlines():
        if comment := re.match(r"\s+# (.*)", line):
            section = parser.add_argument_group(comment[1])
        elif (field := re.match(r"\s+(\w+): [^#]*#\s*(.*)", line)) and field[1] in fields:
            # The first: a subclass that names a field again changes only its default.
            add_argument(section, fields.pop(field[1]), field[2], field[1] == positional)
    assert not fields, f"{cls} has fields without a comment: {list(fields)}"
    return cls(**vars(parser.parse_args(argv)))


def add_argument(section, f, text, positional):
    """The argparse argument of one dataclass field."""
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    is_list, flag = isinstance(default, list), "--" + f.name.replace("_", "-")
    names = [f"-{f.name}", flag] if len(f.name) == 1 else [flag]  # `-n 4` as well as `--n 4`
    if positional:
        names, options = [f.name], {"nargs": "*" if is_list else "?"}
    elif f.type is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif is_list:  # `--policy A --policy B` as well as `--policy A B`
        options = {"nargs": "+", "action": "extend", "metavar": "STR"}
    else:
        kind = getattr(f.type, "__args__", [f.type])[0]  # of `int | None` the int
        options = {"type": kind, "metavar": kind.__name__.upper()}
    text = f"{text} (default: {default})".replace("%", "%%")
    section.add_argument(*names, help=text, **options)


def check_least(args, least, names, most=math.inf):
    """Raises UserError if an argument of these names (separated by spaces; None counts as not
    given) is below `least`, above `most`, infinite or not a number."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            bound = f" and at most {most}" if most < math.inf else ""
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}{bound}")


def check_choice(args, **allowed):
    """Raises UserError if an argument is none of the words allowed for it."""
    for name, words in allowed.items():
        if getattr(args, name) not in words:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UserError(f"{flag}: expected {', '.join(words)}")


def run_cli(main):
    """Runs `main()` as a program. Exit codes: 2 after a user's mistake, 130 after Ctrl-C and 143
    after SIGTERM: `train_rm.py && grpo.py` does not go on with half a reward model."""

    def on_sigterm(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        main()
    except BrokenPipeError:  # `python problems.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as e:
        if isinstance(e, OSError) and not e.filename:  # not about a path: no mistake of the user
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:  # the trainers save before this is reached
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        # At once: threads of gloo may abort an interpreter that takes itself apart in its own time.
        os._exit(143 if isinstance(stop, Terminated) else 130)


# --------------------------------------------------------------------------------------------------
# files that are whole or absent


def write_atomic(path, data):
    """All of `data` (text or bytes) is at `path`, on the disk, or what was there before."""
    new = Path(f"{path}.tmp")
    with open(new, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def write_jsonl(path, rows):
    """Dicts or dataclass instances to a file, one JSON object a line, whole or not at all."""
    dicts = (row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in dicts))


# --------------------------------------------------------------------------------------------------
# statistics


def mean(values):
    """Arithmetic mean; nan of nothing."""
    return sum(values) / len(values) if len(values) else math.nan


def bootstrap(values, groups=None, rounds=1000, seed=0):
    """-> (mean, low, high): the mean of `values` and its 95% interval, resampling whole groups
    (problems; None: each value is one) with replacement; nan for one group."""
    values = np.asarray(values, dtype=float)
    groups = range(len(values)) if groups is None else groups
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = [number[group] for group in groups]
    sums, sizes = np.bincount(index, values), np.bincount(index)
    if len(sums) < 2:
        return float(values.mean()), math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(sums), size=(rounds, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def ranks(values):
    """Ranks from 0, equal values sharing their mean rank.

    >>> ranks([5.0, 1.0, 5.0]).tolist()
    [1.5, 0.0, 1.5]
    """
    values = np.asarray(values, dtype=float)
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[index]


def auc(scores, passed):
    """P(a passing program scores above a failing one), a tie counting half; nan when there is only
    one kind.

    >>> auc([3.0, 2.0, 2.0, 1.0], [True, True, False, False])
    0.875
    """
    passed = np.asarray(passed, dtype=bool)
    good, bad = passed.sum(), (~passed).sum()
    if not (good and bad):
        return math.nan
    return float((ranks(scores)[passed].sum() - good * (good - 1) / 2) / (good * bad))
