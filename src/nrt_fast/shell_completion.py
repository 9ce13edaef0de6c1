"""Scripts that complete commands, options and choices in a shell, made from the commands' own fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_type_hints

from nrt_fast.arguments import OTHER_OPTIONS, Arguments, docstrings, main_type

BASH = """\
_nrt_fast() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if ((COMP_CWORD == 1)); then
        words="{commands} --help --version"
    elif [[ $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _nrt_fast nrt-fast
"""
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


def script(shell: Literal["bash", "zsh", "fish"], commands: dict[str, tuple[str, Arguments]]) -> str:
    """The script to source.

    Args:
        commands: summary and arguments of each command.
    """
    if shell == "fish":
        return "\n".join(_fish(commands)) + "\n"
    bash = BASH.format(
        commands=" ".join(commands),
        options="\n".join(_case(name, _options(arguments)) for name, (_, arguments) in commands.items()),
        choices="\n".join(
            _case(f'"{name} {place}"', members)
            for name, (_, arguments) in commands.items()
            for field, members in _choices(arguments).items()
            for place in [f"--{field}", *[name] * (field == arguments.positional)]
        ),
    )
    return ZSH * (shell == "zsh") + bash


def _case(pattern: str, words: list[str]) -> str:
    return f'            {pattern}) words="{" ".join(words)}" ;;'


def _options(arguments: Arguments) -> list[str]:
    return [f"--{name}" for name in (*arguments.names, *OTHER_OPTIONS, *arguments.flags, "help")]


def _choices(arguments: Arguments) -> dict[str, list[str]]:
    """What may follow an option, by field, where that is known."""
    kinds = {name: main_type(hint) for name, hint in get_type_hints(arguments.config).items()}
    literals = {name: list(members) for name, (kind, members) in kinds.items() if kind is Literal}
    return literals | {name: ["true", "false"] for name, (kind, _) in kinds.items() if kind is bool}


def _fish(commands: dict[str, tuple[str, Arguments]]) -> Iterator[str]:
    complete = "complete -c nrt-fast"
    for name, (summary, arguments) in commands.items():
        yield f"{complete} -n __fish_use_subcommand -f -a {name} -d {_quoted(summary)}"
        here = f"-n '__fish_seen_subcommand_from {name}'"
        helps, choices = docstrings(arguments.config) | OTHER_OPTIONS | arguments.flags, _choices(arguments)
        for option in (*arguments.names, "config"):
            values = f"-x -a {_quoted(' '.join(choices[option]))}" if option in choices else "-r"
            yield f"{complete} {here} -l {option} {values} -d {_quoted(helps[option])}"
        for flag in ("print_config", *arguments.flags):
            yield f"{complete} {here} -l {flag} -d {_quoted(helps[flag])}"
        if arguments.positional in choices:
            yield f"{complete} {here} -f -a {_quoted(' '.join(choices[arguments.positional]))}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
