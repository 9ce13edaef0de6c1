"""What the TRL adapter asks of a trainer, without TRL, and the log-probabilities that it has to find."""

import types

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, DELIMITER = 2, 3  # of word_tokenizer("</think>")


def word_tokenizer(*names, size=67):
    """The words w0, w1, ..., of which the named take the places of w3, w4, ..."""
    words = [f"w{index}" for index in range(size)]
    words[1], words[EOS], words[3 : 3 + len(names)] = "<unk>", "<eos>", names
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="w0")


class TrainerStandIn:
    """What the adapter asks of a GRPOTrainer of TRL 1.0 or later."""

    def __init__(self, module, tokenizer=None, global_step=0):
        self.model, self.processing_class = module, tokenizer or word_tokenizer("</think>")
        self.accelerator = types.SimpleNamespace(unwrap_model=lambda model: model, num_processes=1)
        self.args = types.SimpleNamespace(
            per_device_train_batch_size=6, steps_per_generation=1, per_device_eval_batch_size=6,
            generation_kwargs=None, mask_truncated_completions=False,
        )  # fmt: skip
        self.num_generations = 3
        self.state = types.SimpleNamespace(global_step=global_step)
        self.metrics, self.columns = {}, {}

    def _tokenize_prompts(self, prompts):
        return self.processing_class(prompts, add_special_tokens=False)["input_ids"], None, {}

    def _log_metric(self, name, value):
        self.metrics[name] = value

    def _log_completion_extra(self, column, values):
        self.columns[column] = values


@torch.no_grad()
def naive_logprobs(module, context, answer):
    """One forward of everything, log_softmax, gather: of each answer token."""
    was_training = module.training
    logits = module.eval()(torch.tensor([context + answer]), use_cache=False).logits[0, len(context) - 1 : -1]
    module.train(was_training)
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
