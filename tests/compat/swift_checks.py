"""``swift rlhf`` on a CPU with our plugin in it; run by peers.py with ms-swift installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from served_policy import STARTER
from swift.callbacks import callbacks_map
from swift.rewards import orms

from nrt_fast.adapters import swift as adapter
from nrt_fast.starter import tasks
from nrt_fast.types import UserError

PLUGIN = '''
"""The reward as a user has it, and beside it what transformers makes of the same rows at the same moment."""
import json
import torch
from swift.rewards import orms
from swift.template import TemplateMeta, register_template
from nrt_fast.adapters.swift import NRT

register_template(
    TemplateMeta("starter", prefix=["<bos> "], prompt=["{{QUERY}} <think>"], chat_sep=None, suffix=["<eos>"])
)
LOG = __file__ + ".jsonl"


@torch.no_grad()
def logprobs(module, context, answer):
    logits = module(torch.tensor([context + answer]), use_cache=False).logits[0, len(context) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


class Watched(NRT):
    reward, reward_clip = "CHOICE", "none"

    def __call__(self, completions, **columns):
        given = super().__call__(completions, **columns)
        module, tokenizer = self.trainer.model.eval(), self.trainer.template.tokenizer
        with open(LOG, "a") as file:
            for row, reward in enumerate(given):
                question = columns["messages"][row][0]["content"]
                prompt = tokenizer("<bos> " + question + " <think>", add_special_tokens=False)["input_ids"]
                answer = tokenizer(columns["solution"][row] + " <eos>", add_special_tokens=False)["input_ids"]
                ids = columns["response_token_ids"][row]
                trace = ids[: ids.index(5)] if 5 in ids else ids
                log_c = logprobs(module, prompt + trace + [5], answer)
                log_b = logprobs(module, prompt + [5], answer)
                expected = {"ws_log": -(log_c.exp() * log_b).mean(), "gm": log_c.mean().exp()}["CHOICE"]
                json.dump({"reward": reward, "expected": float(expected), "closed": 5 in ids}, file)
                file.write("\\n")
        module.train()
        return given


orms["nrt"] = Watched
'''
ARGUMENTS = """--rlhf_type grpo --model_type llama --template starter --use_hf true --reward_funcs nrt --callbacks nrt
    --tuner_type full --torch_dtype float32 --num_generations 4 --per_device_train_batch_size 8
    --max_completion_length 14 --max_length 64 --max_steps 2 --learning_rate 1e-2 --lr_scheduler_type constant
    --report_to none --logging_steps 1 --save_strategy no --eval_strategy no --gradient_checkpointing false
    --use_vllm false --dataset_num_proc 1 --dataloader_num_workers 0 --split_dataset_ratio 0
    --bf16 false --fp16 false --use_cpu true""".split()


@pytest.mark.parametrize("choice", ["ws_log", "gm"])
def test_swift_rlhf_trains_on_our_reward_of_the_live_weights(tmp_path, choice):
    plugin, data = tmp_path / "plugin.py", tmp_path / "data.jsonl"
    plugin.write_text(PLUGIN.replace("CHOICE", choice))
    rows = [
        {"messages": [{"role": "user", "content": row["question"]}], "solution": row["answer"]}
        for row in tasks.rows("train", 8, seed=0)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = subprocess.run(
        [sys.executable, "-m", "swift.cli.rlhf", "--model", str(STARTER), "--external_plugins", str(plugin),
         "--dataset", str(data), "--stop_words", "</think>", "--output_dir", str(tmp_path / "out"), *ARGUMENTS],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'rewards/Watched/mean'" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "plugin.py.jsonl").read_text().splitlines()]
    assert len(lines) == 16, "two steps of eight completions, with an update of the weights between them"
    given, expected = (torch.tensor([line[name] for line in lines]) for name in ("reward", "expected"))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert {line["closed"] for line in lines} == {True, False}, "traces of both kinds are needed"


def test_the_plugin_registers_both_names():
    assert orms["nrt"] is adapter.NRT
    assert callbacks_map["nrt"] is adapter.NRTCallback


def test_without_the_callback_it_says_so():
    with pytest.raises(UserError, match="valid: --callbacks nrt"):
        orms["nrt"](args=None)
