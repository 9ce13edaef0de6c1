"""Write docs/configuration.md, the fields of ``nrt-fast train``: ``python docs/write_configuration.py``."""

from dataclasses import Field, fields
from pathlib import Path
from typing import Literal, get_type_hints

from nrt_fast.arguments import docstrings, main_type
from nrt_fast.cli import COMMANDS
from nrt_fast.config import PRESETS
from nrt_fast.resolve import SCALES

PAGE = Path(__file__).with_name("configuration.md")
OF_SCALE = {
    "max_prompt_length": "prompt", "max_trace_length": "trace", "max_answer_length": "answer",
    "num_eval_prompts": "heldout", "prompts_per_step": "prompts_per_step", "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps", "eval_steps": "eval_steps", "save_steps": "save_steps",
}  # fmt: skip
HEAD = """\
# Every field of train

Options of `nrt-fast train` on the command line, keys of its YAML file and fields of `nrt_fast.config.TrainConfig`
have the same names. `nrt-fast init` writes them as a file to start from; other commands have some of them
([commands](commands.md)). An unknown field is an error, and so is one that could have no effect.

Two values are those on CUDA and on a CPU; lengths shrink with the model's context, batches with the data. The
objective's defaults are those of nrt-ws; the other presets are in [their table](choosing.md). Where no default
stands, the meaning says what happens. `nrt-fast train --dry_run` tells what each becomes.
"""


def default_of(field: Field) -> str:
    """What a field is that nobody sets; empty where the data or the memory plan decide, or nothing happens."""
    if field.name in OF_SCALE:
        cuda, cpu = (getattr(SCALES[kind], OF_SCALE[field.name]) for kind in ("cuda", "cpu"))
        return str(cuda) if cuda == cpu else f"{cuda}, {cpu}"
    value = getattr(PRESETS["nrt-ws"], field.name, None) if field.default is None else field.default
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def page() -> str:
    """This page's text, from the configuration itself."""
    arguments = COMMANDS["train"].arguments
    helps, hints = docstrings(arguments.config), get_type_hints(arguments.config)
    lines = [HEAD.rstrip()]
    for field in fields(arguments.config):
        if field.name in arguments.groups:
            lines += ["", f"## {arguments.groups[field.name]}", "", "| field | default | |", "|---|---|---|"]
        kind, members = main_type(hints[field.name])
        choices = f" One of {', '.join(members)}." if kind is Literal else ""
        meaning = f"{helps[field.name]}{choices}".replace("\n", " ").replace("<", "&lt;")
        lines.append(f"| `{field.name}` | {default_of(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
