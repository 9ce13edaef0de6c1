"""What the tests share: the device, memory that is never zero by luck, tiny models and runs, real data if present."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so it comes before any import of one
torch.set_num_threads(1)  # tensors are tiny here: a second thread would wait, or on a busy machine be waited for
os.environ["OMP_NUM_THREADS"] = "1"  # the same in processes that tests start
SHARED_DATA = Path(__file__).parents[2] / "shared/data"
TINY = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
TINY_RUN = {
    "max_prompt_length": 64, "max_trace_length": 12, "max_answer_length": 16, "num_eval_prompts": 2, "max_steps": 3,
    "prompts_per_step": 2, "num_generations": 3, "learning_rate": 1e-3, "warmup_steps": 0, "save_steps": 1,
    "eval_steps": 0, "device": "cpu", "dtype": "float32",
}  # fmt: skip
NUM_QUESTIONS = 10  # fewer than a run of five steps draws


def pytest_collection_modifyitems(items):
    if DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def poisoned_memory():
    """Uninitialised tensors hold NaN, or the largest integer, so that a cell nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data of {SHARED_DATA}, which is no part of the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def make_module():
    """Builder of tiny transformers models. Every parameter is random: no bias is 0, no norm is 1, logits spread."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(model_type: str = "llama", seed: int = 0, **config) -> torch.nn.Module:
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TINY | config))).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.data = noise * (0.4 if "embed" in name else 1.4 * parameter.shape[1] ** -0.5)
            else:
                parameter.data = 0.3 * noise + (0.0 if "bias" in name else 1.0)
        return module

    return build


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """Writer of folders with the shape of Llama 3.1 8B or 3.2 3B, and no weights."""
    from transformers import LlamaConfig

    shapes = {
        "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    }

    def folder(size: str) -> Path:
        path = tmp_path_factory.mktemp("models") / size
        vocabulary = {"vocab_size": 128256, "tie_word_embeddings": size == "3b"}
        LlamaConfig(
            **shapes[size], **vocabulary, num_key_value_heads=8, max_position_embeddings=131072
        ).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def reference_logits():
    """What everything is compared with: [T, V] of one sequence, by transformers, without a cache or a batch."""

    @torch.no_grad()
    def logits(module: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
        return module(torch.tensor([token_ids]), use_cache=False).logits[0]

    return logits


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Builder of configurations that train in a second: the starter on a few of its tasks."""
    from nrt_fast.config import TrainConfig
    from nrt_fast.starter import tasks

    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tasks.rows("train", NUM_QUESTIONS, seed=0)))

    def config(output_dir: Path, **fields) -> TrainConfig:
        return TrainConfig(**(TINY_RUN | {"dataset_name": str(path), "output_dir": str(output_dir)} | fields))

    return config


@pytest.fixture(scope="session")
def file_size_limit():
    """Context in which this process cannot write a longer file: the kernel refuses, as it does on a full disk."""

    @contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def measured():
    """What a run's metrics say, line by line, without the timings."""
    from nrt_fast.metrics import read_metrics

    def rows(output_dir: Path) -> list[dict[str, float]]:
        return [
            {name: value for name, value in row.items() if name != "step_time" and not name.startswith("perf/")}
            for row in read_metrics(output_dir / "metrics.jsonl")
        ]

    return rows


@pytest.fixture(scope="session")
def finished(tiny_run, tmp_path_factory) -> Path:
    """The folder of a run of five steps, with a checkpoint of each; to be read only."""
    from nrt_fast.loop import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(folder, max_steps=5, save_total_limit=5, eval_steps=2, logging_steps=3))
    return folder
