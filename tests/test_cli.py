"""The command line: what it accepts, what it says, how fast it says it, and the checks of a configuration."""

import re
import resource
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import yaml

import nrt_fast
from nrt_fast import arguments, cli
from nrt_fast.config import (
    PRESETS,
    EstimateConfig,
    EvalConfig,
    GenerateConfig,
    ReportConfig,
    ScoreConfig,
    TrainConfig,
)
from nrt_fast.types import UserError


def parse(*argv, command="train"):
    return arguments.parse(list(argv), cli.COMMANDS[command].arguments)[0]


def error_line(capsys, *argv):
    """The one line on stderr of a command that fails on its input."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nrt-fast: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("nrt-fast: error: ").rstrip("\n")


@pytest.fixture
def loop(monkeypatch):
    """Stands in for nrt_fast.loop; notes what it is called with."""
    calls = []

    def train(config):
        calls.append(("train", config))
        return {"steps": 1}

    fake = SimpleNamespace(calls=calls, train=train, dry_run=lambda config: calls.append(("dry_run", config)))
    monkeypatch.setattr(nrt_fast, "loop", fake, raising=False)
    return fake


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# What is accepted


def test_no_argument_is_the_default(loop):
    assert cli.main(["train"]) == 0
    assert loop.calls == [("train", TrainConfig())]


def test_dry_run(loop):
    assert cli.main(["train", "--dry_run", "--seed", "3"]) == 0
    assert loop.calls == [("dry_run", TrainConfig(seed=3))]


def test_options_of_every_type():
    config = parse(
        "--learning_rate", "2e-6", "--max_steps=20", "--drop_cut_reward", "true", "--objective", "nrt-gm",
        "--chat_template_kwargs", "{enable_thinking: true}", "--warmup_steps", "0.1", "--model_name_or_path", "1e3",
        "--resume_from_checkpoint", "false", "--dataset_name", "a.jsonl,b.jsonl", "--report_to", "wandb,trackio",
    )  # fmt: skip
    assert config == TrainConfig(
        learning_rate=2e-6, max_steps=20, drop_cut_reward=True, objective="nrt-gm",
        chat_template_kwargs={"enable_thinking": True}, warmup_steps=0.1, model_name_or_path="1e3",
        resume_from_checkpoint="false", dataset_name="a.jsonl,b.jsonl", report_to="wandb,trackio",
    )  # fmt: skip
    assert config.dataset_names == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("text", ["1,2.5", "[1, 2.5]", "1, 2.5"])
def test_weights_as_lists_or_with_commas(text, tmp_path):
    names = ("--dataset_name", "a.jsonl,b.jsonl")
    assert parse(*names, "--dataset_weights", text).dataset_weights == [1.0, 2.5]
    assert parse(*names, f"--dataset_weights={text}").dataset_weights == [1.0, 2.5]
    path = write(tmp_path / "c.yaml", f"dataset_weights: {text}\n")
    assert parse(*names, "--config", path).dataset_weights == [1.0, 2.5]


def test_options_win_over_the_file(tmp_path):
    path = write(
        tmp_path / "c.yaml",
        "learning_rate: 2e-6\nseed: 4\ndataset_name: [a.jsonl, b.jsonl]\nresume_from_checkpoint: false\n",
    )
    for argv in (["--config", path, "--seed", "5"], [f"--config={path}", "--seed=5"]):
        assert parse(*argv) == TrainConfig(
            learning_rate=2e-6, seed=5, dataset_name=["a.jsonl", "b.jsonl"], resume_from_checkpoint="false"
        )


def test_printed_configuration_is_a_configuration(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--objective", "jepo", "--learning_rate", "1e-5", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert set(yaml.safe_load(printed)) == {field.name for field in fields(TrainConfig)} | {"dry_run"}
    path = write(tmp_path / "c.yaml", printed)
    assert parse("--config", path) == TrainConfig(objective="jepo", learning_rate=1e-5)


@pytest.mark.parametrize(
    "command", sorted(cli.COMMANDS.keys() - {"export", "report", "init", "doctor", "completion"})
)  # which have none of these fields
def test_every_command_reads_what_it_prints(command, tmp_path, capsys):
    question = ["why ?"] if command == "generate" else []
    with pytest.raises(SystemExit):
        cli.main([command, *question, "--seed", "3", "--max_trace_length=7", "--print_config"])
    path = write(tmp_path / "c.yaml", capsys.readouterr().out)
    config = parse("--config", path, command=command)
    assert (config.seed, config.max_trace_length) == (3, 7)
    assert config == parse(*question, "--seed=3", "--max_trace_length=7", command=command)


def test_what_commands_share_is_written_once():
    shared = set(vars(ScoreConfig(seed=1))) & set(vars(GenerateConfig(question="q")))
    assert {"model_name_or_path", "delimiter", "seed", "max_trace_length", "num_generations"} <= shared
    assert set(vars(TrainConfig())) < set(vars(EstimateConfig()))
    assert set(vars(EvalConfig())) - set(vars(ScoreConfig())) == {"metrics", "output_dir"}
    assert GenerateConfig.num_generations == EvalConfig.num_generations == 1
    assert ScoreConfig.num_generations == TrainConfig.num_generations == 8


@pytest.mark.parametrize(
    "argv",
    [["why ?", "--seed", "3"], ["--seed", "3", "why ?"], ["--seed=3", "why ?"], ["--question=why ?", "--seed=3"]],
)
def test_a_question_may_stand_anywhere(argv):
    assert parse(*argv, command="generate") == GenerateConfig(question="why ?", seed=3)


def test_several_folders_stand_one_after_another():
    assert parse("a", "--output_file", "f.html", "b,c", "1", command="report") == ReportConfig(
        ["a", "b,c", "1"], "f.html"
    )


# What is refused


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "unknown command trian; did you mean train?; there are: train, score,"),
        (["scor", "--help"], "unknown command scor; did you mean score?"),
        (["score", "--dry_run"], "unknown option --dry_run"),
        (["score", "stray"], "unrecognized arguments: stray"),
        (["estimate", "--device_memory_gib", "big"], "--device_memory_gib: 'big' is not valid; a number is expected"),
        (["generate", "a", "b"], "unrecognized arguments: b"),
        (["generate", "a", "--question", "b", "c"], "unrecognized arguments: c"),
        (["generate", "--config", "none.yaml"], "--config none.yaml: no such file"),
        (["train", "--learning_rte", "1"], "unknown option --learning_rte; did you mean --learning_rate?"),
        (["train", "--learning-rate=1"], "unknown option --learning-rate; did you mean --learning_rate?"),
        (["train", "--xyzzy"], "unknown option --xyzzy"),
        (["train", "--seed", "1.5"], "--seed: '1.5' is not valid; a whole number is expected"),
        (["train", "--seed"], "argument --seed: expected one argument"),
        (["train", "--learning_rate", "fast"], "--learning_rate: 'fast' is not valid; a number is expected"),
        (["train", "--drop_cut_reward", "7"], "--drop_cut_reward: '7' is not valid; true or false is expected"),
        (
            ["train", "--dtype", "float16"],
            "--dtype: 'float16' is not valid; one of auto, float32, bfloat16 is expected",
        ),
        (["train", "--dataset_weights", "1,x"], "--dataset_weights: '1,x' is not valid; comma-separated numbers are"),
        (["train", "--chat_template_kwargs", "x"], "--chat_template_kwargs: 'x' is not valid; a mapping such as {key:"),
        (["train", "stray"], "unrecognized arguments: stray"),
        (["train", "--config", "none.yaml"], "--config none.yaml: no such file"),
    ],
)
def test_bad_arguments(capsys, loop, argv, line):
    assert error_line(capsys, *argv).startswith(line)
    assert loop.calls == []


def test_bad_choice_is_guessed(capsys):
    line = error_line(capsys, "train", "--objective", "nrt_ws")
    assert "one of nrt-ws, nrt-ws-inv, " in line and line.endswith("; did you mean nrt-ws?")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("learning_rte: 1\n", "unknown field learning_rte; did you mean learning_rate?"),
        ("seed: 1\nconfig: other.yaml\n", "unknown field config"),
        ("1: 2\n", "unknown field 1"),
        ("seed: [1\n", "invalid YAML"),
        ("seed: \x00\n", "invalid YAML"),
        ("- seed\n", "lines of the form field: value are expected"),
        ("", "lines of the form field: value are expected"),
    ],
)
def test_bad_configuration_files(capsys, tmp_path, text, line):
    path = write(tmp_path / "c.yaml", text)
    assert error_line(capsys, "train", "--config", path).startswith(f"--config {path}: {line}")


def test_bad_value_in_a_configuration_file(capsys, tmp_path):
    path = write(tmp_path / "c.yaml", "num_generations: many\n")
    line = error_line(capsys, "train", "--config", path)
    assert line == "num_generations in the --config file: 'many' is not valid; a whole number is expected"


def test_configuration_file_that_is_not_text(capsys, tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"seed: \xff\n")
    assert "cannot be read" in error_line(capsys, "train", "--config", str(tmp_path / "c.yaml"))


def test_errors_of_the_run_are_one_line(capsys, loop):
    def train(_config):
        raise UserError("a.jsonl, row 3: invalid JSON\nat column 5")

    loop.train = train
    assert error_line(capsys, "train") == "a.jsonl, row 3: invalid JSON at column 5"


def test_interrupt(capsys, loop):
    def train(_config):
        raise KeyboardInterrupt

    loop.train = train
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "nrt-fast: interrupted\n"


# Checks of a configuration


@pytest.mark.parametrize("objective", PRESETS)
def test_every_preset_is_valid(objective):
    TrainConfig(objective=objective).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 0}, "num_generations is 0; it should be at least 1"),
        ({"num_generations": 1}, "num_generations is 1; an advantage compares at least 2 traces"),
        ({"temperature": 0.0}, "temperature is 0.0; it should be above 0"),
        ({"epsilon": 1.0}, "epsilon is 1.0; it should be under 1"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it should be finite"),
        ({"max_answer_length": 1}, "max_answer_length is 1; it should be at least 2"),
        ({"seed": -1}, "seed is -1; it should be at least 0"),
        (
            {"trace_loss": "reinforce", "epsilon": 0.1},
            "epsilon cannot take effect: trace_loss reinforce clips no ratio",
        ),
        ({"trace_loss": "none", "std_floor": 0.1}, "std_floor cannot take effect: trace_loss is none"),
        ({"objective": "sft", "format_coef": 0.1}, "format_coef cannot take effect: objective sft has no traces"),
        ({"objective": "rlpr", "answer_weight": "reward"}, "answer_weight cannot take effect: answer_coef is 0"),
        *(
            (
                {"reward": reward, "reward_scale": "weight"},
                f"reward_scale cannot take effect: reward {reward} has no weights to sum; ws_inv and ws_log have",
            )
            for reward in ("gm", "am", "r3")
        ),
        (
            {"objective": "sft", "num_generations": 4},
            "num_generations cannot take effect: objective sft has no traces",
        ),
        ({"objective": "sft", "temperature": 0.3}, "temperature cannot take effect: objective sft has no traces"),
        *(
            (
                fields | {"answer_weight": "reward"},
                f"answer_weight reward unlearns answers where R is negative, as {reward} can be; valid: reward prob, "
                "am, gm, ws_inv or ws_log, or answer_weight fixed or derived",
            )
            for reward, fields in (
                ("logp", {"objective": "jepo"}),
                ("logp", {"reward": "logp", "reward_clip": "zero"}),
                ("r3", {"objective": "r3"}),
            )
        ),
        (
            {"objective": "sft", "answer_coef": 0.0},
            "answer_coef is 0 and trace_loss none: neither answers nor traces train; valid: answer_coef above 0",
        ),
        (
            {"objective": "rlpr", "trace_loss": "none"},
            "answer_coef is 0 and trace_loss none: neither answers nor traces train; valid: answer_coef above 0, or "
            "trace_loss cispo, reinforce or ppo",
        ),
        (
            {"objective": "jepo", "baseline": "ema"},
            "baseline cannot take effect: reward logp without a clip reads none",
        ),
        ({"objective": "jepo", "reward": "ws_log"}, "reward ws_log is measured against a baseline; baseline is none"),
        ({"objective": "jepo", "reward_clip": "zero"}, "reward_clip zero is a clip at a baseline; baseline is none"),
        (
            {"objective": "rlpr", "format_coef": 1.5},
            "format_coef is 1.5; as a share of the reward it should be at most 1",
        ),
        ({"answer_field": "a"}, "answer_field cannot take effect: the built-in tasks name theirs"),
        (
            {"dataset_name": "a", "dataset_eval_split": "test"},
            "dataset_eval_split cannot take effect: there is no eval_dataset_name",
        ),
        (
            {"eval_dataset_name": "a", "num_eval_prompts": 0},
            "eval_dataset_name cannot take effect: num_eval_prompts is 0",
        ),
        ({"dataset_name": " , "}, "dataset_name is empty; leave it out for the built-in tasks"),
        ({"dataset_name": "a,b", "dataset_weights": [1.0]}, "dataset_weights has 1 numbers for 2 data sets"),
        (
            {"dataset_name": "a,b", "dataset_weights": [1.0, 0.0]},
            "dataset_weights are [1.0, 0.0]; each should be above 0",
        ),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(UserError) as raised:
        TrainConfig(**values).check()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "values",
    [
        *({"reward": reward, "answer_weight": "reward"} for reward in ("prob", "am", "gm", "ws_inv", "ws_log")),
        {"objective": "verifree", "reward": "logp", "answer_coef": 0.0},
        {"trace_loss": "none"},
        {"answer_coef": 0.0},
        {"objective": "nrt-gm", "reward_clip": "none", "drop_cut_reward": True, "baseline": "frozen"},
        {"reward": "ws_inv", "reward_scale": "weight"},
    ],
    ids=str,
)
def test_values_that_can_be(values):
    TrainConfig(**values).check()


# Help


def run_cli(*argv):
    return subprocess.run([sys.executable, "-m", "nrt_fast.cli", *argv], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["--version"]])
def test_help_is_quick(argv):
    """Seconds of processor time, which other programs on the machine do not add to."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(5):
        start = spent()
        run_cli(*argv)
        times.append(spent() - start)
    assert min(times) < 0.3


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from nrt_fast import cli; [cli.main([name, '--help']) for name in cli.COMMANDS]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'rich', 'jsonargparse'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_describes_every_field(command):
    text, taken = run_cli(command, "--help").stdout, cli.COMMANDS[command].arguments
    assert text.startswith(f"usage: nrt-fast {command} ")
    for name in taken.names:
        assert re.search(rf"^  --{name} \S+( |\n {{20}})", text, re.MULTILINE), f"{name} has no text"
    for flag in taken.flags:
        assert f"  --{flag} " in text
    for title in taken.groups.values():
        assert f"\n{title}:\n" in text


def test_help_tells_types_and_defaults():
    text = run_cli("train", "--help").stdout
    assert "--reward {logp,prob,am,gm,ws_inv,ws_log,r3}\n" in text
    assert "(default: nrt-ws)" in text
    assert "Traces sampled for each prompt. (default: 8)" in text
    assert "Traces sampled for each prompt. (default: 1)" in run_cli("generate", "--help").stdout


def test_version():
    assert run_cli("--version").stdout == f"nrt-fast {nrt_fast.__version__}\n"


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert "usage: nrt-fast <command>" in capsys.readouterr().out
