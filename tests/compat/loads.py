"""Does what we save load elsewhere? A run's final folder in transformers 4.57 and 5, and in lm-eval's command line.

    python tests/compat/loads.py

Each reader gets a virtual environment of its own under build/compat, made once and without nrt-fast in it; the models
are saved by this Python's nrt-fast. A reader passes if its logits, or log-likelihoods, are those computed here. The
last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

COMPAT = Path(__file__).parents[2] / "build/compat"
READERS = {
    "transformers-4.57": ["transformers==4.57.6"],
    "transformers-5": ["transformers==5.23.0"],
    "lm-eval": ["lm-eval[hf]==0.4.13"],
}
QUESTION = "a coin shows tails , ned flips , gus flips , what does it show ?"
ANSWERS = ("it shows tails .", "it shows heads .")
TOLERANCE = 1e-4  # of fp32 logits and log-likelihoods, computed in another order


def main() -> None:
    """Save, install, read."""
    COMPAT.mkdir(parents=True, exist_ok=True)
    save_models()
    figures = {}
    for name, packages in READERS.items():
        python = environment(name, packages)
        started = time.perf_counter()
        read = lm_eval if name == "lm-eval" else transformers
        figures[name] = read(python) | {"seconds": round(time.perf_counter() - started, 1)}
        print(f"{name}: {figures[name]}", flush=True)
    print(json.dumps(figures))


def save_models() -> None:
    """The default run, two steps of it, and a model whose rotary embeddings are Llama 3's; with their logits."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from nrt_fast import Model, TrainConfig, train

    final = COMPAT / "run/final"
    if not final.is_dir():
        train(TrainConfig(output_dir=str(final.parent), max_steps=2, num_eval_prompts=16, eval_steps=0, device="cpu"))
    torch.manual_seed(0)
    scaled = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=180, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, rope_parameters={
                "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        )
    )  # fmt: skip
    Model.from_hf(scaled).save_pretrained(COMPAT / "llama3")
    ids = AutoTokenizer.from_pretrained(final)(QUESTION).input_ids
    for folder in (final, COMPAT / "llama3"):
        logits = Model.from_pretrained(folder).logits(ids)
        expected = {"ids": ids, "logits": logits.tolist()}
        (COMPAT / f"{folder.name}.json").write_text(json.dumps(expected))


def environment(name: str, packages: list[str], alone: str | None = None) -> Path:
    """The Python of a virtual environment with these packages, and one without what it asks for.

    It is made if it is not there, or was not completed.
    """
    folder = COMPAT / name
    python, done = folder / "bin/python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        last = [["--no-deps", alone]] if alone else []
        for wanted in (["torch==2.13.0"], [*packages, "torch==2.13.0"], *last):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        done.touch()
    return python


def transformers(python: Path) -> dict[str, object]:
    """Both models in that environment's transformers."""
    output = subprocess.run([python, "-I", __file__, "--read"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def read() -> None:
    """Run inside an environment: print how far its logits are from those that were saved."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    figures = {"transformers": transformers.__version__}
    for folder in (COMPAT / "run/final", COMPAT / "llama3"):
        expected = json.loads((COMPAT / f"{folder.name}.json").read_text())
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            logits = model(torch.tensor([expected["ids"]])).logits[0]
        error = (logits - torch.tensor(expected["logits"])).abs().max().item()
        assert error < TOLERANCE, f"{folder}: logits are {error} apart"
        figures[f"{folder.name}: logits apart"] = error
    tokenizer = AutoTokenizer.from_pretrained(COMPAT / "run/final")
    assert tokenizer(QUESTION).input_ids == json.loads((COMPAT / "final.json").read_text())["ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
    assert chat == f"<bos> {QUESTION}", chat
    print(json.dumps(figures))


def lm_eval(python: Path) -> dict[str, object]:
    """A task of two rows by lm-eval's command line: its log-likelihoods beside ours."""
    import torch
    from transformers import AutoTokenizer

    from nrt_fast import Model

    final, tasks, output = COMPAT / "run/final", COMPAT / "tasks", COMPAT / "lm_eval_output"
    write_task(tasks)
    subprocess.run(
        [
            python, "-I", "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={final},dtype=float32",
            "--tasks", "coins", "--include_path", tasks, "--device", "cpu", "--log_samples", "--output_path", output,
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    samples = max(output.rglob("samples_coins_*.jsonl"), key=lambda path: path.stat().st_mtime)
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    found = [float(row["filtered_resps"][0][0]) for row in rows]
    model, tokenizer = Model.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    expected = []
    for answer in ANSWERS:
        prompt, ids = tokenizer(QUESTION).input_ids, tokenizer(f"{QUESTION} {answer}").input_ids
        logprobs = model.logits(ids).log_softmax(-1)[len(prompt) - 1 : -1]
        expected.append(logprobs.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum().item())
    error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert error < TOLERANCE and all(map(math.isfinite, found)), f"lm-eval {found}, ours {expected}"
    return {"log-likelihoods": found, "apart": error}


def write_task(folder: Path) -> None:
    """A task of lm-eval that needs no hub: a YAML file and its rows."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": QUESTION, "answer": answer} for answer in ANSWERS]
    (folder / "coins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "coins.yaml").write_text(
        "task: coins\noutput_type: loglikelihood\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'coins.jsonl'}}}}}\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: ' {{answer}}'\nmetric_list: [{metric: acc}]\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", action="store_true", help="inside an environment: read what was saved")
    read() if parser.parse_args().read else main()
