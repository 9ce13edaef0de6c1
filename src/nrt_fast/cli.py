"""The command line: arguments to a TrainConfig, errors to one line. torch is imported after parsing only."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nrt_fast import __version__
from nrt_fast.config import TrainConfig
from nrt_fast.types import UserError

HELP = """\
usage: nrt-fast <command> [--help]

Native Reasoning Training: reasoning learnt from questions and reference answers alone.

commands:
  train        train a model; without arguments, the built-in starter on the built-in tasks

options:
  -h, --help   show this help
  --version    show the version
"""
TRAIN_USAGE = "nrt-fast train [--config FILE.yaml] [--field value ...] [--print_config] [--dry_run]"
GROUPS = {
    "model_name_or_path": "Model and data",
    "objective": "Objective",
    "prompts_per_step": "Step",
    "output_dir": "Run",
}
"""Title of each group of the help, at its first field."""
OTHER_OPTIONS = ("config", "dry_run", "print_config", "help")
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list, or text with commas",
    dict: "a mapping such as {key: value}",
}
METAVARS = {bool: "{true,false}", int: "N", float: "X", str: "TEXT", list: "A,B", dict: "{KEY: VALUE}"}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for bad input (told in one line on stderr), 130 for Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print("nrt-fast: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nrt-fast: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"nrt-fast {__version__}")
    elif command in COMMANDS:
        COMMANDS[command](argv[1:])
    else:
        raise UserError(f"unknown command {command}{_did_you_mean(command, COMMANDS)}; there is: {', '.join(COMMANDS)}")
    return 0


def train(argv: list[str]) -> None:
    """Parse a run's configuration and start it."""
    if {"-h", "--help"} & set(argv):
        print(_train_help(), end="")
        return
    config, dry_run = parse_train(argv)
    # OpenMP reads it when torch is loaded. Threads that spin for long while they wait starve each other as soon as the
    # machine has anything else to do: a step of the demo took ten times as long (docs/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from nrt_fast import loop

    (loop.dry_run if dry_run else loop.train)(config)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": train}


def parse_train(argv: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration that the arguments make, and whether it is only to be tried.

    Raises:
        UserError: an unknown field, or a value that its field cannot have.
    """
    _check_options(argv)
    parser = _train_parser()
    try:
        values = vars(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise UserError(_describe(str(error), argv)) from error
    values["dataset_weights"] = _weights(values["dataset_weights"])
    if isinstance(values["resume_from_checkpoint"], bool):
        values["resume_from_checkpoint"] = "auto" if values["resume_from_checkpoint"] else "false"
    config = TrainConfig(**{field.name: values[field.name] for field in fields(TrainConfig)})
    config.check()
    return config, values["dry_run"]


def _train_parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="nrt-fast train", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--dry_run", action="store_true")
    hints = get_type_hints(TrainConfig)
    hints["dataset_weights"] |= str  # comma-separated numbers
    hints["resume_from_checkpoint"] |= bool  # YAML's own false
    for field in fields(TrainConfig):
        parser.add_argument(f"--{field.name}", type=hints[field.name], default=field.default)
    return parser


def _train_help() -> str:
    """The same options with their docstrings, by argparse alone: importing jsonargparse takes longer than all of it."""
    from docstring_parser import parse_from_object

    formatter = partial(argparse.HelpFormatter, max_help_position=30)
    group = parser = argparse.ArgumentParser(usage=TRAIN_USAGE, formatter_class=formatter)
    group.add_argument("--config", metavar="FILE.yaml", help="YAML file of fields; options on the command line win")
    group.add_argument("--print_config", action="store_true", help="print the configuration as YAML, and stop")
    group.add_argument("--dry_run", action="store_true", help="check the input, show the plan, and stop")
    hints = get_type_hints(TrainConfig)
    helps = {parameter.arg_name: parameter.description for parameter in parse_from_object(TrainConfig).params}
    for field in fields(TrainConfig):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        text = helps[field.name].replace("%", "%%") + ("" if field.default is None else f" (default: {field.default})")
        group.add_argument(f"--{field.name}", metavar=_metavar(hints[field.name]), help=text)
    return parser.format_help()


def _main_type(hint: Any) -> tuple[Any, tuple]:
    """The first type of a union, bare, and its arguments: list and (str,) of list[str] | str | None."""
    if get_origin(hint) in (Union, UnionType):
        hint = get_args(hint)[0]
    return get_origin(hint) or hint, get_args(hint)


def _metavar(hint: Any) -> str:
    kind, members = _main_type(hint)
    return "{" + ",".join(members) + "}" if kind is Literal else METAVARS[kind]


def _expected(hint: Any, value: str) -> str:
    kind, members = _main_type(hint)
    if kind is Literal:
        return f"one of {', '.join(members)} is expected{_did_you_mean(value, members)}"
    return f"{EXPECTED[kind]} is expected"


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _option_name(argument: str) -> str | None:
    """Field of an option: --field, --field=value, --field.key or --field+."""
    return re.split(r"[=.+]", argument[2:])[0] if argument.startswith("--") else None


def _check_options(argv: list[str]) -> None:
    names = [field.name for field in fields(TrainConfig)]
    known = [*names, *OTHER_OPTIONS]
    for argument, following in zip_longest(argv, argv[1:], fillvalue=""):
        name = _option_name(argument)
        if name is not None and name not in known:
            raise UserError(f"unknown option --{name}{_did_you_mean(name, known, '--')}")
        if name == "config":
            _check_file(argument.partition("=")[2] or following, [*names, "dry_run"])


def _check_file(path: str, known: list[str]) -> None:
    import yaml

    if not Path(path).expanduser().is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(Path(path).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: invalid YAML ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: lines of the form field: value are expected")
    for name in values:
        if name not in known:
            raise UserError(f"--config {path}: unknown field {name}{_did_you_mean(str(name), known)}")


def _weights(value: list[float] | str | None) -> list[float] | None:
    try:
        return [float(number) for number in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        raise UserError(f"--dataset_weights: {value!r} is not valid; comma-separated numbers are expected") from None


def _describe(message: str, argv: list[str]) -> str:
    """jsonargparse's several lines about a value, as one line about what the field takes."""
    found = re.match(r'Parser key "(\w+)":.*(?:Got value|Given value): (.*)$', message, re.DOTALL)
    if not found:
        return message
    name, value = found.groups()
    place = f"--{name}" if name in map(_option_name, argv) else f"{name} in the --config file"
    return f"{place}: {value!r} is not valid; {_expected(get_type_hints(TrainConfig)[name], value)}"


if __name__ == "__main__":
    sys.exit(main())
