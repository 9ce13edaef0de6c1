"""nrt-fast generate: questions in, text out: on a terminal id by id, in a file line by line."""

import io
import json
import random
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nrt_fast import cli, generate_command
from nrt_fast.config import GenerateConfig, TrainConfig
from nrt_fast.data import Limits, load_data, load_tokenizer, text_of_each
from nrt_fast.engine import Engine, Generated
from nrt_fast.generate_command import Question, answer_all, detokenized, read_questions, show, show_stream
from nrt_fast.source import open_source
from nrt_fast.starter import MODEL_DIR
from nrt_fast.types import Traces, UserError

QUESTION = "a coin shows tails , ned flips , gus flips , joe waits , what does it show ?"
TEXTS = (
    "hello  world",
    " naïve café 東京 🙂👩‍🚀 x",
    "\n a\tb\n\n",
    "\U0001d518\U0001d52b",
    "é",
    "日本語のテキスト",
    "",
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as byte-level BPE without merges: most characters above ASCII are several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space is part of the piece after it, what is in no piece is bytes."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "▁the": 258, "a": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def starter():
    return load_tokenizer(str(MODEL_DIR))


# Text from ids


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(detokenized(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids)
    if make is byte_tokenizer:
        assert "".join(pieces) == text
        assert pieces == list(text), "each character comes with its last byte, and no sooner"


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
def test_pieces_of_any_ids_make_their_text(make):
    tokenizer, numbers = make(), random.Random(0)
    for _ in range(200):
        text = "".join(chr(numbers.choice((97, 32, 233, 0x65E5, 0x1F642))) for _ in range(numbers.randrange(12)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(detokenized(ids, tokenizer)) == tokenizer.decode(ids)


def test_broken_bytes_are_shown_at_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a日", add_special_tokens=False)["input_ids"]
    assert list(detokenized(ids[:-1], tokenizer)) == ["a", "\ufffd"]
    assert "".join(detokenized([*ids[:-1], *ids[:1]], tokenizer)) == tokenizer.decode([*ids[:-1], *ids[:1]])


def test_words_keep_their_spaces_and_eos_is_not_shown(starter):
    ids = starter("it shows heads .", add_special_tokens=False)["input_ids"]
    assert list(detokenized([*ids, starter.eos_token_id], starter)) == ["it", " shows", " heads", " ."]


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
def test_each_id_has_its_text(make):
    tokenizer = make()
    ids = tokenizer("the 日 a", add_special_tokens=False)["input_ids"]
    texts = text_of_each(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    last = texts.index("日")
    assert texts[last - 2 : last] == ["", ""], "a character comes with the last of its bytes"
    assert text_of_each([], tokenizer) == []


def test_a_special_token_has_its_name(starter):
    assert text_of_each([*starter("it shows").input_ids, starter.eos_token_id], starter) == ["it", " shows", "<eos>"]


def test_pieces_come_as_the_ids_do(starter):
    ids = starter("it shows heads .", add_special_tokens=False)["input_ids"]
    taken = []
    pieces = detokenized((taken.append(token) or token for token in ids), starter)
    assert next(pieces) == "it" and len(taken) == 1
    assert next(pieces) == " shows" and len(taken) == 2


# What is shown


def shown(stream, tokenizer, terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=20)
    show_stream(stream, tokenizer, console)
    return file.getvalue()


@pytest.fixture
def stream(starter):
    def ids(text):
        return starter(text, add_special_tokens=False)["input_ids"]

    trace, answer = ids("so heads , tails , heads , tails , heads"), [*ids("it shows heads ."), starter.eos_token_id]
    return [("trace", token) for token in trace] + [("answer", token) for token in answer]


def test_without_a_terminal_there_is_text_alone(stream, starter):
    """The console is narrower than the trace: no line is broken that was not."""
    text = shown(stream, starter, terminal=False)
    assert text == "so heads , tails , heads , tails , heads\n\nit shows heads .\n"


def test_on_a_terminal_the_trace_is_dim(stream, starter):
    text = shown(stream, starter, terminal=True)
    assert "\x1b[2mso\x1b[0m\x1b[2m heads\x1b[0m" in text
    assert text.endswith("it shows heads .\n")


def test_an_empty_trace_leaves_no_empty_lines(stream, starter):
    assert shown([pair for pair in stream if pair[0] == "answer"], starter, terminal=False) == "it shows heads .\n"
    assert shown([], starter, terminal=False) == "\n"


def test_control_characters_do_not_reach_the_terminal():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\x1b[31mb\r\nc\x07", add_special_tokens=False)["input_ids"]
    text = shown([("trace", token) for token in ids], tokenizer, terminal=False)
    assert text == "a\ufffd[31mb\ufffd\nc\ufffd\n"


# A file of questions


class FakeEngine:
    """Answers with the prompt's length, and notes what it is asked."""

    eos_ids = (3,)

    def __init__(self):
        self.calls = []

    def generate(self, prompts, **options):
        self.calls.append((len(prompts), options))
        G = options["num_generations"]
        traces = Traces(
            [[[8] * g for g in range(G)] for _ in prompts], [], [[-1.0] + [None] * (G - 1) for _ in prompts]
        )
        return Generated(traces, [[[len(prompt)] * (g + 1) for g in range(G)] for prompt in prompts])

    def stream(self, prompt, **options):
        self.calls.append((1, options))
        yield from [("trace", 8), ("answer", len(prompt)), ("answer", 3)]


def fake_tokenizer():
    return SimpleNamespace(decode=lambda ids, **kwargs: " ".join(map(str, ids)))


def config(**fields):
    return GenerateConfig(**({"max_prompt_length": 9, "max_trace_length": 5, "max_answer_length": 4} | fields))


def test_a_row_for_every_question_in_order(monkeypatch):
    monkeypatch.setattr(generate_command, "TRACES_AT_A_TIME", 4)
    questions = [Question([{"role": "user", "content": f"q{n}"}], f"row {n}") for n in range(5)]
    engine = FakeEngine()
    rows = list(answer_all(engine, questions, [[1] * (n + 1) for n in range(5)], fake_tokenizer(),
                           config(num_generations=2, input_file="x", seed=7)))  # fmt: skip
    assert [(row["question"], row["where"]) for row in rows] == [(f"q{n}", f"row {n}") for n in range(5)]
    assert rows[3]["generations"] == [
        {"trace": "", "answer": "4", "ended": "delimiter", "trace_ids": [], "answer_ids": [4]},
        {"trace": "8", "answer": "4 4", "ended": "repetition", "trace_ids": [8], "answer_ids": [4, 4]},
    ]
    assert [size for size, _ in engine.calls] == [2, 2, 1]
    assert [options["seed"] for _, options in engine.calls] == [7, 9, 11], "noise differs from piece to piece"
    assert engine.calls[0][1] == {
        "num_generations": 2, "max_trace_length": 5, "max_answer_length": 4, "temperature": 1.0, "seed": 7
    }  # fmt: skip


def test_one_question_streams_and_several_answers_do_not():
    file = io.StringIO()
    engine, console = FakeEngine(), Console(file=file)
    show(engine, [1, 1], fake_tokenizer(), config(question="q"), console)
    assert file.getvalue() == "8\n\n2 3\n"
    show(engine, [1, 1], fake_tokenizer(), config(question="q", num_generations=2), console)
    assert file.getvalue().splitlines()[3:] == ["1 of 2", "2", "2 of 2", "8", "", "2 2"]


@pytest.mark.parametrize(
    ("name", "text", "questions"),
    [
        ("q.txt", "\ufeffone ?\n\n  two ?  \n", ["one ?", "two ?"]),
        ("q.jsonl", '{"question": "one ?"}\n{"prompt": "two ?", "n": 1}\n', ["one ?", "two ?"]),
        ("q.csv", "instruction,input\none,more\n", ["one\n\nmore"]),
        ("q.json", '[{"messages": [{"role": "user", "content": "one ?"}, {"role": "assistant", "content": "1"}]}]',
         ["one ?"]),
        ("q.jsonl", '{"conversations": [{"from": "human", "value": "one ?"}]}\n', ["one ?"]),
    ],
)  # fmt: skip
def test_questions_of_every_kind(name, text, questions, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [q.text for q in read_questions(GenerateConfig(input_file=str(tmp_path / name)))] == questions


def test_a_named_field_wins(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "no", "deep": {"text": "yes"}}\n')
    (question,) = read_questions(GenerateConfig(input_file=str(tmp_path / "q.jsonl"), prompt_field="deep.text"))
    assert question.text == "yes"
    assert question.where.endswith("q.jsonl, row 1")


def test_prompts_are_those_of_training(tmp_path):
    row = {"question": "sort 2 8 1 , which comes first ?", "answer": "the digit in that place is 1 ."}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    path = str(tmp_path / "q.jsonl")
    source = open_source(GenerateConfig(device="cpu"))
    trained = load_data(TrainConfig(dataset_name=path), source.tokenizer, Limits(64, 16), 0).train[0]
    asked = generate_command.encode(
        read_questions(GenerateConfig(input_file=path)), source, config(max_prompt_length=64)
    )
    assert asked == [trained.prompt_ids]


# The command, on the built-in model


@pytest.fixture
def command(capsys):
    def run(*argv):
        code = cli.main(["generate", *argv, "--device=cpu", "--dtype=float32"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def test_a_question(command):
    out = command(QUESTION)
    trace, answer = out.split("\n\n")
    assert trace and re.fullmatch(r"it shows (heads|tails) \.\n", answer)
    assert "\x1b" not in out
    assert command("--seed", "0", QUESTION) == command("--question", QUESTION) == out
    assert command(f"--question={QUESTION}", "--seed=5", "--temperature", "0") == command(QUESTION, "--temperature=0")


def test_streamed_and_written_are_the_same(command, tmp_path):
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n")
    command("--input_file", f"{tmp_path}/q.txt", "--output_file", f"{tmp_path}/out/a.jsonl")
    (generation,) = json.loads((tmp_path / "out/a.jsonl").read_text())["generations"]
    assert command(QUESTION) == f"{generation['trace']}\n\n{generation['answer']}\n"


def test_lines_go_to_standard_output_without_a_file(command, tmp_path):
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n" * 3)
    rows = [
        json.loads(line) for line in command("--input_file", f"{tmp_path}/q.txt", "--num_generations=2").splitlines()
    ]
    assert len(rows) == 3
    for row in rows:
        assert row["question"] == QUESTION and len(row["generations"]) == 2
        for generation in row["generations"]:
            assert generation["ended"] == "delimiter"
            assert len(generation["trace"].split()) == len(generation["trace_ids"])


def test_limits_hold(command):
    out = command(QUESTION, "--max_trace_length=3", "--max_answer_length=2", "--temperature=0")
    trace, answer = out.split("\n\n")
    assert len(trace.split()) <= 3 and len(answer.split()) <= 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of a question and input_file is needed"),
        (["why ?", "--input_file", "q.txt"], "one of a question and input_file is needed"),
        (["  "], "the question is empty"),
        (["why ?", "how ?"], "unrecognized arguments: how ?"),
        (["why ?", "--prompt_field", "q"], "prompt_field cannot take effect: there are no rows with fields"),
        (["--input_file", "nowhere.txt"], "input_file nowhere.txt cannot be read"),
        (["--input_file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--input_file", "{}/empty.txt"], "empty.txt: no questions"),
        (["--input_file", "{}/bytes.txt"], "bytes.txt cannot be read"),
        (["--input_file", "{}/rows.jsonl"], "rows.jsonl, row 1: question not found; name prompt_field among: x"),
        (["--input_file", "{}/answer.jsonl"], "answer.jsonl, row 1: no question (no user turn in field 'messages')"),
        (["why ?", "--num_generations", "0"], "num_generations is 0; it should be at least 1"),
        (["why ?", "--temperature", "-1"], "temperature is -1.0; it should be at least 0"),
        (["why ?", "--max_prompt_length", "1"], "the question: the prompt has 4 tokens, max_prompt_length is 1"),
        (["why ?", "--dataset_name", "x"], "unknown option --dataset_name"),
        (["why ?", "--sed", "1"], "unknown option --sed; did you mean --seed?"),
        (["why ?", "--output_file", "{}/empty.txt"], "empty.txt is there already; choose another"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "rows.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "answer.jsonl").write_text('{"messages": [{"role": "assistant", "content": "1"}]}\n')
    assert (
        cli.main(["generate", *(argument.format(tmp_path) if "{}" in argument else argument for argument in argv)]) == 2
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nrt-fast: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_template_arguments_need_a_template():
    source = SimpleNamespace(tokenizer=byte_tokenizer())
    questions = [Question([{"role": "user", "content": "why ?"}], "the question")]
    with pytest.raises(UserError, match="chat_template_kwargs cannot take effect: the tokenizer has no chat template"):
        generate_command.encode(questions, source, config(chat_template_kwargs={"a": 1}))


def test_half_an_answer_file_is_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_command, "TRACES_AT_A_TIME", 1)
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n" * 3)
    real, calls = Engine.generate, []

    def breaks(self, prompts, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, **options)

    monkeypatch.setattr(Engine, "generate", breaks)
    argv = ["generate", f"--input_file={tmp_path}/q.txt", f"--output_file={tmp_path}/a.jsonl", "--device=cpu"]
    assert cli.main(argv) == 130
    assert len([json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]) == 2
