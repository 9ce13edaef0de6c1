"""Every code block of README.md and docs/ does what its page says, run from top to bottom as a reader would.

A page has a folder of its own with the files that pages speak of. A block runs by its language:

python         executed; the blocks of a page share their names
yaml           checked as a configuration of train, and kept as run.yaml
bash, console  one command after another; what a console block shows under a command is compared ("..." skips)

A command on something that is not here (a hub id, a GPU) is parsed and checked only. A block, or a line of one, that
cannot be tested at all says why, for its readers too: ``# not run: needs a GPU``. NOT_RUN counts those.
"""

import json
import re
import shlex
import shutil
import tomllib
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import NamedTuple

import pytest

from nrt_fast import arguments, cli
from nrt_fast.starter import MODEL_DIR, tasks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
NOT_RUN = 11
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^(\$ )?(nrt-fast|make|pip|python) ", re.MULTILINE)
REASON = re.compile(r"# not run: .+")
INCLUDED = re.compile(r'--8<-- "(.+)"\n')
LLAMA_WORDS = {"vocab_size": 128256, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 512}
SMALL = {"train": ["--dry_run", "--prompts_per_step=2"], "score": ["--num_prompts=4"], "eval": ["--num_prompts=4"]}


class Block(NamedTuple):
    """A fenced block: its language, its text, and where it is."""

    language: str
    text: str
    where: str


def blocks(page):
    """The blocks of a page that are code; one without a language is a transcript if it starts a program of ours."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language = match[1] or ("console" if PROGRAM.match(match[2]) else "text")
        if language != "text":
            yield Block(language, match[2], f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}")


def commands(block):
    """(command, what is shown under it) for each command of a block."""
    text = block.text.replace("\\\n", " ")
    if not text.startswith("$ "):
        return [(line, "") for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(part.partition("\n")[::2]) for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]


@pytest.fixture
def workspace(tmp_path, finished, make_module, llama_folder, monkeypatch):
    """The working folder, with what pages speak of: data, configuration, models, a finished run."""
    rows = tasks.rows("train", 100, seed=0)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in ("runs/demo", "runs/mine"):
        shutil.copytree(finished, tmp_path / run)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(MODEL_DIR)
    make_module("llama", **LLAMA_WORDS).save_pretrained(tmp_path / "path/to/folder")
    (tmp_path / "llama-3.1-8b").symlink_to(llama_folder("8b"))
    (tmp_path / "run.yaml").write_text("dataset_name: pairs.jsonl\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # what pages show is a CPU's
    return tmp_path


def run_python(text, names):
    for path in INCLUDED.findall(text):
        assert (ROOT / path).parent.name == "examples", "tests/test_examples.py runs those"
    exec(INCLUDED.sub("", text), names)


def check_configuration(text):
    text = INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(), text)
    Path("run.yaml").write_text(text)
    arguments.parse(["--config", "run.yaml"], cli.COMMANDS["train"].arguments)


def run_command(line, shown, capsys):
    """Run a line of a shell, or check what it names."""
    if REASON.search(line):
        return
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif program == "pip":
        assert words.pop(0) == "install"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {extra for word in words for extra in re.findall(r"\[(\w+)\]", word)} <= set(extras)
    else:
        assert program == "nrt-fast", f"{program}: say why it is not run"
        run_nrt_fast(words, shown, capsys)


def run_nrt_fast(words, shown, capsys):
    words, target = (words[:-2], words[-1]) if {">", ">>"} & set(words) else (words, None)
    if not {"--print_config", "--help", "--version"} & set(words):
        if not is_here(words):
            return
        words += [] if shown else SMALL.get(words[0], [])
    Path("scores.jsonl").unlink(missing_ok=True)
    capsys.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as stopped:
        code = stopped.code
    told = capsys.readouterr()
    assert code == (2 if "nrt-fast: error" in shown else 0), told.err
    if target:
        path = Path(target).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told.out)
    checker, flags = OutputChecker(), ELLIPSIS | NORMALIZE_WHITESPACE
    assert not shown or checker.check_output(shown, told.out + told.err, flags), told.out + told.err


def is_here(words):
    """Parse a command; whether what it runs on is here."""
    config, _ = arguments.parse(words[1:], cli.COMMANDS[words[0]].arguments)
    names = [getattr(config, "model_name_or_path", None), *getattr(config, "dataset_names", [])]
    names += getattr(config, "folders", [])
    here = words[0] == "estimate" or getattr(config, "device", "auto") in ("auto", "cpu")
    return here and all(Path(name).exists() for name in names if name)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.name)
def test_page(page, workspace, capsys):
    names = {"__name__": "__main__", "prompts": [[1, 2, 3]], "answers": [[4, 5]]}  # what a library's user has
    for block in blocks(page):
        if REASON.match(block.text):
            continue
        lines = commands(block) if block.language in ("bash", "console") else [(block.text, "")]
        for text, shown in lines:
            try:
                if block.language == "python":
                    run_python(text, names)
                elif block.language == "yaml":
                    check_configuration(text)
                else:
                    run_command(text, shown, capsys)
            except BaseException as error:
                error.add_note(f"in {block.where}: {text}")
                raise


def test_every_language_is_known():
    assert {block.language for page in PAGES for block in blocks(page)} <= {"python", "yaml", "bash", "console"}


def test_what_is_not_run_is_counted():
    reasons = [reason for page in PAGES for block in blocks(page) for reason in REASON.findall(block.text)]
    assert len(reasons) == NOT_RUN, reasons
