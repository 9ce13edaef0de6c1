"""The configuration that ``init`` writes: train accepts it, it says what every field means, nothing is overwritten."""

import re
from dataclasses import fields

import yaml

from nrt_fast import arguments, cli
from nrt_fast.config import TrainConfig
from nrt_fast.init_command import SET

TRAIN = cli.COMMANDS["train"].arguments


def written(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert cli.main(["init", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path} is written; nrt-fast train --config {path}")
    return path


def test_train_accepts_it_as_the_default_run(tmp_path, capsys):
    config, _ = arguments.parse(["--config", str(written(tmp_path, capsys))], TRAIN)
    assert config == TrainConfig()


def test_only_what_newcomers_set_is_uncommented(tmp_path, capsys):
    assert tuple(yaml.safe_load(written(tmp_path, capsys).read_text())) == tuple(
        field.name for field in fields(TrainConfig) if field.name in SET
    )


def test_every_field_stands_under_its_docstring_with_its_default(tmp_path, capsys):
    text = written(tmp_path, capsys).read_text()
    path = tmp_path / "all.yaml"
    path.write_text(re.sub(rf"^# ({'|'.join(TRAIN.names)}):", r"\1:", text, flags=re.MULTILINE))
    assert list(yaml.safe_load(path.read_text())) == TRAIN.names
    assert arguments.parse(["--config", str(path)], TRAIN)[0] == TrainConfig()
    comments = " ".join(text.replace("\n#", "").split())
    for name, told in arguments.docstrings(TrainConfig).items():
        assert " ".join(told.split()) in comments, name
    assert "One of none, selective, full." in comments


def test_a_file_that_is_there_stays(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert cli.main(["init", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"nrt-fast: error: {path} is there already")
    assert path.read_text() == "mine"


def test_a_folder_that_is_not_there_is_told(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "no/run.yaml")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_it_is_named_run_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init"]) == 0
    assert (tmp_path / "run.yaml").is_file()
