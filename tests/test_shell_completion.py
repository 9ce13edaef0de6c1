"""The bash script in a bash; zsh runs the same function; the fish script line by line."""

import re
import shlex
import subprocess

import pytest

from nrt_fast import cli
from nrt_fast.shell_completion import script

COMMANDS = {name: (command.summary, command.arguments) for name, command in cli.COMMANDS.items()}


def completed(tmp_path, *words):
    """What bash offers for the last word."""
    path = tmp_path / "completion.bash"
    path.write_text(script("bash", COMMANDS))
    code = f'. {path}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _nrt_fast; echo "${{COMPREPLY[@]}}"'
    result = subprocess.run(["bash", "-c", code, "bash", *words], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["nrt-fast", "e"], ["eval", "export", "estimate"]),
        (["nrt-fast", "--v"], ["--version"]),
        (["nrt-fast", "train", "--max_st"], ["--max_steps"]),
        (["nrt-fast", "train", "--dry"], ["--dry_run"]),
        (["nrt-fast", "score", "--max_st"], []),
        (["nrt-fast", "train", "--objective", "nrt-w"], ["nrt-ws", "nrt-ws-inv"]),
        (["nrt-fast", "train", "--use_peft", ""], ["true", "false"]),
        (["nrt-fast", "train", "--dtype", "x"], []),
        (["nrt-fast", "completion", ""], ["bash", "zsh", "fish"]),
        (["nrt-fast", "report", "ru"], []),
    ],
)
def test_bash(words, offered, tmp_path):
    assert completed(tmp_path, *words) == offered


def test_bash_knows_every_option(tmp_path):
    for name, (_, arguments) in COMMANDS.items():
        offered = completed(tmp_path, "nrt-fast", name, "--")
        assert offered == [f"--{o}" for o in (*arguments.names, "config", "print_config", *arguments.flags, "help")]


def test_zsh_is_the_bash_script_behind_its_bash_completion():
    first, rest = script("zsh", COMMANDS).split("\n", 1)
    assert first == "autoload -Uz compinit bashcompinit && compinit && bashcompinit"
    assert rest == script("bash", COMMANDS)


def test_fish_knows_every_option_with_its_help():
    lines = [shlex.split(line.replace("\\'", "")) for line in script("fish", COMMANDS).splitlines()]
    assert all(line[:3] == ["complete", "-c", "nrt-fast"] for line in lines)
    told = {(line[4].split()[-1], line[6]): line for line in lines if line[5] == "-l"}
    for name, (_, arguments) in COMMANDS.items():
        for option in (*arguments.names, "config", "print_config", *arguments.flags):
            assert len(told[name, option][-1]) > 5
    objectives = told["train", "objective"]
    assert objectives[7:9] == ["-x", "-a"] and "nrt-ws" in objectives[9].split()
    assert re.search(r"-f -a 'bash zsh fish'$", script("fish", COMMANDS), re.MULTILINE)


def test_the_command_prints_it(capsys):
    assert cli.main(["completion", "fish"]) == 0
    assert capsys.readouterr().out == script("fish", COMMANDS)
    assert cli.main(["completion"]) == 2
    assert "a shell is needed" in capsys.readouterr().err
