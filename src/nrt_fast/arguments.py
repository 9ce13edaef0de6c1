"""Arguments to a configuration, for any dataclass of fields: options over YAML files, help, errors of one line."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, fields
from dataclasses import field as default
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nrt_fast.types import UserError, did_you_mean

OTHER_OPTIONS = {
    "config": "YAML file of fields; options on the command line win",
    "print_config": "print the configuration as YAML, and stop",
}
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list, or text with commas",
    dict: "a mapping such as {key: value}",
}
METAVARS = {bool: "{true,false}", int: "N", float: "X", str: "TEXT", list: "A,B", dict: "{KEY: VALUE}"}


@dataclass(frozen=True)
class Arguments:
    """What a command takes.

    Attributes:
        config: frozen dataclass with a default for every field, whose docstrings are the help, and with ``check``.
        flags: name and help of options that take no value and are no field.
        positional: field that an argument without an option's name goes to; all such arguments, where it is a list.
        groups: title of each group of the help, by its first field.
    """

    config: type
    flags: dict[str, str] = default(default_factory=dict)
    positional: str | None = None
    groups: dict[str, str] = default(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all fields."""
        return [field.name for field in fields(self.config)]


def parse(argv: list[str], arguments: Arguments) -> tuple[Any, set[str]]:
    """The checked configuration that the arguments make, and the flags among them.

    Raises:
        UserError: an unknown field, or a value that its field cannot have.
    """
    argv = _check_options(argv, arguments)
    try:
        values = vars(_parser(arguments).parse_args(argv))
    except argparse.ArgumentError as error:
        raise UserError(_describe(str(error), argv, arguments)) from error
    for name in arguments.names:
        values[name] = LENIENT[name][1](values[name]) if name in LENIENT else values[name]
    config = arguments.config(**{name: values[name] for name in arguments.names})
    config.check()
    return config, {name for name in arguments.flags if values[name]}


def _parser(arguments: Arguments):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    for name in arguments.flags:
        parser.add_argument(f"--{name}", action="store_true")
    hints = get_type_hints(arguments.config)
    for field in fields(arguments.config):
        hint = hints[field.name] | LENIENT[field.name][0] if field.name in LENIENT else hints[field.name]
        parser.add_argument(f"--{field.name}", type=hint, default=field.default)
    return parser


def _weights(value: list[float] | str | None) -> list[float] | None:
    try:
        return [float(number) for number in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        raise UserError(f"--dataset_weights: {value!r} is not valid; comma-separated numbers are expected") from None


def _resume(value: str | bool) -> str:
    return {True: "auto", False: "false"}[value] if isinstance(value, bool) else value


LENIENT = {"dataset_weights": (str, _weights), "resume_from_checkpoint": (bool, _resume)}
"""Fields that are also written as another type: comma-separated numbers, YAML's own false."""


def help_text(usage: str, arguments: Arguments) -> str:
    """The same options with their docstrings, by argparse alone: importing jsonargparse takes longer than all of it."""
    formatter = partial(argparse.HelpFormatter, max_help_position=30)
    group = parser = argparse.ArgumentParser(usage=usage, formatter_class=formatter)
    group.add_argument("--config", metavar="FILE.yaml", help=OTHER_OPTIONS["config"])
    for name, text in {"print_config": OTHER_OPTIONS["print_config"], **arguments.flags}.items():
        group.add_argument(f"--{name}", action="store_true", help=text)
    hints, helps = get_type_hints(arguments.config), docstrings(arguments.config)
    for field in fields(arguments.config):
        if field.name in arguments.groups:
            group = parser.add_argument_group(arguments.groups[field.name])
        text = helps[field.name].replace("%", "%%") + ("" if field.default is None else f" (default: {field.default})")
        group.add_argument(f"--{field.name}", metavar=_metavar(hints[field.name]), help=text)
    return parser.format_help()


def docstrings(config: type) -> dict[str, str]:
    """Of each field, from the class that describes it; a class that only changes a default need not do so again."""
    from docstring_parser import parse_from_object

    described = (parameter for base in reversed(config.__mro__[:-1]) for parameter in parse_from_object(base).params)
    return {parameter.arg_name: parameter.description for parameter in described if parameter.description}


def main_type(hint: Any) -> tuple[Any, tuple]:
    """The first type of a union, bare, and its arguments: list and (str,) of list[str] | str | None."""
    if get_origin(hint) in (Union, UnionType):
        hint = get_args(hint)[0]
    return get_origin(hint) or hint, get_args(hint)


def _metavar(hint: Any) -> str:
    kind, members = main_type(hint)
    return "{" + ",".join(members) + "}" if kind is Literal else METAVARS[kind]


def _expected(hint: Any, value: str) -> str:
    kind, members = main_type(hint)
    if kind is Literal:
        return f"one of {', '.join(members)} is expected{did_you_mean(value, members)}"
    return f"{EXPECTED[kind]} is expected"


def _option_name(argument: str) -> str | None:
    """Field of an option: --field, --field=value, --field.key or --field+."""
    return re.split(r"[=.+]", argument[2:])[0] if argument.startswith("--") else None


def _check_options(argv: list[str], arguments: Arguments) -> list[str]:
    """The arguments, the positional one as an option; UserError for an option or a field of a file that is unknown."""
    known, without_value = [*arguments.names, *OTHER_OPTIONS, *arguments.flags], ["print_config", *arguments.flags]
    checked, rest, positional = [], list(argv), arguments.positional
    several = positional is not None and main_type(get_type_hints(arguments.config)[positional])[0] is list
    while rest:
        argument, following = rest[0], rest[1] if len(rest) > 1 else ""
        name = _option_name(argument)
        if name is None and several:
            argument, length = f"--{positional}+={argument}", 1
        elif name is None and positional and f"--{positional}" not in map(_before_value, checked):
            argument, length = f"--{positional}={argument}", 1
        elif name is None:
            raise UserError(f"unrecognized arguments: {argument}")
        elif name not in known:
            raise UserError(f"unknown option --{name}{did_you_mean(name, known, '--')}")
        else:
            length = 1 if "=" in argument or name in without_value else 2
        if name == "config":
            _check_file(argument.partition("=")[2] or following, [*arguments.names, *arguments.flags])
        checked += [argument, *rest[1:length]]
        rest = rest[length:]
    return checked


def _before_value(argument: str) -> str:
    return argument.partition("=")[0]


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
            raise UserError(f"--config {path}: unknown field {name}{did_you_mean(str(name), known)}")


def _describe(message: str, argv: list[str], arguments: Arguments) -> str:
    """jsonargparse's several lines about a value, as one line about what the field takes."""
    found = re.match(r'Parser key "(\w+)":.*(?:Got value|Given value): (.*)$', message, re.DOTALL)
    if not found:
        return message
    name, value = found.groups()
    place = f"--{name}" if name in map(_option_name, argv) else f"{name} in the --config file"
    return f"{place}: {value!r} is not valid; {_expected(get_type_hints(arguments.config)[name], value)}"
