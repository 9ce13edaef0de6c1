"""``nrt-fast init``: a configuration to start from, with every field of ``nrt-fast train`` under its docstring."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_type_hints

from nrt_fast.arguments import Arguments, docstrings, main_type
from nrt_fast.tool_config import InitConfig
from nrt_fast.types import UserError

SET = ("model_name_or_path", "dataset_name", "num_generations", "objective", "output_dir")  # by nearly everyone
WIDTH = 100
HEAD = """\
nrt-fast train --config {file}

These are all fields, with their defaults. As it stands, this file trains the built-in starter model on the built-in
tasks. Name your own model and data, and take the # away from what you want to change. Fields without a value are
derived from the model, the data and the machine; nrt-fast train --config {file} --dry_run tells what they become.
"""


def init(config: InitConfig, arguments: Arguments) -> None:
    """Write the file and say what to do with it.

    Args:
        arguments: of the command that the file is for.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    path = Path(config.file).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_yaml(arguments, config.file))
    except FileExistsError:
        raise UserError(f"{path} is there already; name another file: nrt-fast init my-run.yaml") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"{path} is written; nrt-fast train --config {path} starts the run, with --dry_run it only tries one step")


def starter_yaml(arguments: Arguments, name: str) -> str:
    """Every field of a command under its docstring; those that nearly everyone sets are uncommented."""
    return "\n".join(_lines(arguments, name)) + "\n"


def _lines(arguments: Arguments, name: str) -> Iterator[str]:
    import yaml

    yield from _comment(HEAD.format(file=name))
    helps, hints = docstrings(arguments.config), get_type_hints(arguments.config)
    for field in fields(arguments.config):
        if field.name in arguments.groups:
            yield from ("", f"## {arguments.groups[field.name]}")
        kind, members = main_type(hints[field.name])
        choices = f" One of {', '.join(members)}." if kind is Literal else ""
        yield from ("", *_comment(helps[field.name] + choices))
        value = yaml.safe_dump({field.name: field.default}, allow_unicode=True).rstrip().replace(" null", "")
        yield value if field.name in SET else f"# {value}"


def _comment(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.split("\n\n")):
        yield from ["#"] * (number > 0)
        yield from (f"# {line}" for line in textwrap.wrap(paragraph, WIDTH))
