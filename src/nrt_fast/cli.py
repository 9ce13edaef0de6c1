"""The command line: a command, its configuration, errors as one line. torch is imported after parsing only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nrt_fast import __version__
from nrt_fast.arguments import Arguments, help_text, parse
from nrt_fast.config import (
    EstimateConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    ReportConfig,
    ScoreConfig,
    TrainConfig,
)
from nrt_fast.tool_config import CompletionConfig, DoctorConfig, InitConfig
from nrt_fast.types import UserError, did_you_mean

GROUPS = {"model_name_or_path": "Model", "num_generations": "Sampling"}
TRAIN_GROUPS = GROUPS | {
    "dataset_name": "Data",
    "push_to_hub": "Hub",
    "dataset_weights": "Training data",
    "objective": "Objective",
    "prompts_per_step": "Step",
    "use_peft": "LoRA",
    "output_dir": "Run",
}


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Attributes:
        summary: its line in the help.
        usage: what follows its name.
        run: called with the configuration and the flags; returns the exit code, or None for 0.
    """

    summary: str
    usage: str
    arguments: Arguments
    run: Callable[[Any, set[str]], int | None]


def _train(config: TrainConfig, flags: set[str]) -> int:
    from nrt_fast import distributed, heap, loop, source

    if source.choose_device(config.device).type == "cpu":
        heap.keep_freed_memory()
    with distributed.joined(config.ddp_timeout, config.device):
        if "dry_run" in flags:
            loop.dry_run(config)
            return 0
        return 3 if loop.train(config).get("stopped_on") else 0


def _estimate(config: EstimateConfig, flags: set[str]) -> None:
    from nrt_fast import run

    run.estimate(config)


def _score(config: ScoreConfig, flags: set[str]) -> None:
    from nrt_fast import score_command

    score_command.score_dataset(config)


def _eval(config: EvalConfig, flags: set[str]) -> None:
    from nrt_fast import eval_command

    eval_command.evaluate_dataset(config)


def _generate(config: GenerateConfig, flags: set[str]) -> None:
    from nrt_fast import generate_command

    generate_command.generate(config)


def _export(config: ExportConfig, flags: set[str]) -> None:
    from nrt_fast import export_command

    export_command.export(config)


def _report(config: ReportConfig, flags: set[str]) -> None:
    from nrt_fast import report_command

    report_command.report(config)


def _init(config: InitConfig, flags: set[str]) -> None:
    from nrt_fast import init_command

    init_command.init(config, COMMANDS["train"].arguments)


def _doctor(config: DoctorConfig, flags: set[str]) -> int:
    from nrt_fast import doctor

    return 0 if doctor.examine(config) else 1


def _completion(config: CompletionConfig, flags: set[str]) -> None:
    from nrt_fast import shell_completion

    commands = {name: (command.summary, command.arguments) for name, command in COMMANDS.items()}
    print(shell_completion.script(config.shell, commands), end="")


COMMANDS = {
    "train": Command(
        "train a model; without arguments, the built-in starter on the built-in tasks",
        "[--config FILE.yaml] [--field value ...] [--print_config] [--dry_run]",
        Arguments(TrainConfig, {"dry_run": "check the input, show the plan, and stop"}, groups=TRAIN_GROUPS),
        _train,
    ),
    "score": Command(
        "measure on your data whether thinking helps the model, before any training",
        "[--config FILE.yaml] [--field value ...] [--print_config]",
        Arguments(ScoreConfig, groups=GROUPS | {"dataset_name": "Data", "num_prompts": "Scores"}),
        _score,
    ),
    "eval": Command(
        "measure gain and accuracy on held-out items, with a trace and without one",
        "[--config FILE.yaml] [--field value ...] [--print_config]",
        Arguments(EvalConfig, groups=GROUPS | {"dataset_name": "Data", "num_prompts": "Evaluation"}),
        _eval,
    ),
    "generate": Command(
        "answer a question, or a file of them, after thinking",
        '"QUESTION" [--config FILE.yaml] [--field value ...] [--print_config]',
        Arguments(GenerateConfig, positional="question", groups=GROUPS | {"question": "Questions"}),
        _generate,
    ),
    "export": Command(
        "write a trained model or adapter to a folder of its own, the adapter merged if asked for",
        "--model_name_or_path FOLDER --output_dir NEW [--merge_lora true] [--config FILE.yaml] [--print_config]",
        Arguments(ExportConfig, groups={"push_to_hub": "Hub", "model_name_or_path": "Export"}),
        _export,
    ),
    "report": Command(
        "draw a run, or several in the same charts, as one HTML page",
        "RUN [RUN2 ...] [--output_file FILE.html] [--config FILE.yaml] [--print_config]",
        Arguments(ReportConfig, positional="runs", groups={"runs": "Report"}),
        _report,
    ),
    "estimate": Command(
        "tell a run's memory without loading weights or touching a device",
        "[--config FILE.yaml] [--field value ...] [--device_memory_gib X] [--print_config]",
        Arguments(EstimateConfig, groups=TRAIN_GROUPS | {"device_memory_gib": "Machine"}),
        _estimate,
    ),
    "init": Command(
        "write a configuration to start from, with every field of train and what it means",
        "[FILE.yaml]",
        Arguments(InitConfig, positional="file", groups={"file": "Init"}),
        _init,
    ),
    "doctor": Command(
        "tell what runs here and why nothing faster does, and test that every op is exact",
        "[--device DEVICE]",
        Arguments(DoctorConfig, groups={"device": "Self-test"}),
        _doctor,
    ),
    "completion": Command(
        "print a script that completes commands, options and choices in a shell",
        "bash|zsh|fish",
        Arguments(CompletionConfig, positional="shell", groups={"shell": "Completion"}),
        _completion,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 where doctor found something inexact, 2 for bad input (told in one
    line on stderr), 3 for a run that an alarm of ``stop_on`` stopped, 130 for Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print("nrt-fast: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nrt-fast: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help"):
        print(_help(), end="")
    elif name == "--version":
        print(f"nrt-fast {__version__}")
    elif name not in COMMANDS:
        raise UserError(f"unknown command {name}{did_you_mean(name, COMMANDS)}; there are: {', '.join(COMMANDS)}")
    elif {"-h", "--help"} & set(rest):
        print(help_text(f"nrt-fast {name} {COMMANDS[name].usage}", COMMANDS[name].arguments), end="")
    else:
        config, flags = parse(rest, COMMANDS[name].arguments)
        # OpenMP reads it when torch is loaded. Threads that spin for long while they wait starve each other as soon as
        # the machine has anything else to do: a step of the demo took ten times as long (docs/LOG.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        if _is_to_be_launched(name, config):
            from nrt_fast import launch

            return launch.launch(argv, config.num_processes)
        return COMMANDS[name].run(config, flags) or 0
    return 0


def _is_to_be_launched(name: str, config: Any) -> bool:
    """Whether this process is to start several that train; those that torchrun has started are there already.

    Raises:
        UserError: torchrun has started another number of them, or another command.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if name != "train":
        if num_ranks > 1:
            raise UserError(f"nrt-fast {name} is one process, but torchrun started {num_ranks}; only train is several")
        return False
    if num_ranks > 1 and config.num_processes not in (1, num_ranks):
        raise UserError(f"num_processes is {config.num_processes}, but torchrun started {num_ranks}; leave it out")
    return num_ranks == 1 and config.num_processes > 1 and "RANK" not in os.environ


def _help() -> str:
    commands = "".join(f"  {name:<12} {command.summary}\n" for name, command in COMMANDS.items())
    return (
        f"usage: nrt-fast <command> [--help]\n\ncommands:\n{commands}\n"
        "options:\n  -h, --help   show this help\n  --version    show the version\n"
    )


if __name__ == "__main__":
    sys.exit(main())
