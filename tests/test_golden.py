"""A real pretrained model, stories260K: logits of transformers, the published story, the published loss."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nrt_fast import Engine, Model

BOS, EOS = 1, 2
STORY_STEPS = 256  # llama2.c's default
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def checkpoints(shared_data):
    return shared_data / "checkpoints"


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints / "stories260K/hf"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return Model.from_pretrained(folder)


@pytest.fixture(scope="module")
def published_story(checkpoints):
    """The greedy sample of the model's card."""
    card = (checkpoints / "stories260K/original/stories260K.md").read_text(encoding="utf-8")
    return re.search(r"-t 0\.0\n(.*?)\n```", card, re.DOTALL)[1]


@pytest.fixture(scope="module")
def stories(checkpoints, tokenizer):
    text = (checkpoints / "tinystories_sample.txt").read_text(encoding="utf-8")
    parts = [part.strip() for part in text.split("<|endoftext|>")]
    return [tokenizer(part, add_special_tokens=False).input_ids for part in parts if part]


def test_logits_equal_transformers(model, folder, stories, reference_logits):
    ids = [BOS, *stories[0]][:200]
    assert len(ids) == 200
    reference = reference_logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    torch.testing.assert_close(model.logits(ids), reference, rtol=0, atol=TOLERANCE)


def test_greedy_rollout_tells_the_published_story(model, tokenizer, published_story):
    engine = Engine(model, delimiter_id=BOS, eos_id=EOS)
    traces = engine.rollout([[BOS]], num_generations=2, max_trace_length=STORY_STEPS, temperature=0.0)
    for ids in traces.trace_ids[0]:
        assert tokenizer.decode(ids) == published_story


def test_greedy_answer_tells_the_published_story(model, tokenizer, published_story):
    """The answer after an empty trace whose delimiter is the story's first token."""
    first = int(model.logits([BOS])[-1].argmax())
    engine = Engine(model, delimiter_id=first, eos_id=EOS)
    thoughts = engine.think(
        [[BOS]], [[EOS] * (STORY_STEPS - 1)], [0], num_generations=0, max_trace_length=1, temperature=0.0, seed=0,
        step=0, answer_greedily=True,
    )  # fmt: skip
    ((answer,),) = thoughts.answers
    assert tokenizer.decode([first, *answer]) == published_story


def test_loss_is_the_published_one(model, stories):
    """Nats a token: every story on its own after BOS, its mean over its own tokens, then the mean of the five."""
    losses = []
    for story in stories:
        logprobs = model.logits([BOS, *story[:-1]]).log_softmax(dim=-1)
        losses.append(-logprobs.gather(1, torch.tensor(story)[:, None]).mean().item())
    assert sum(losses) / len(losses) == pytest.approx(1.2376, abs=5e-4)


def test_the_engine_scores_stories_alike(model, stories):
    """Scored as answers behind BOS, where the delimiter is a story's first token, in one ragged batch."""
    engine = Engine(model, delimiter_id=stories[0][0], eos_id=EOS)
    told = [story for story in stories if story[0] == stories[0][0]]
    assert len(told) > 1
    scores = engine.score([[BOS]] * len(told), [[] for _ in told], [story[1:] for story in told])
    for story, logprobs in zip(told, scores.baseline_logprobs):
        reference = model.logits([BOS, *story[:-1]]).log_softmax(dim=-1).gather(1, torch.tensor(story)[:, None])
        torch.testing.assert_close(logprobs, reference[1:, 0], rtol=0, atol=2e-5)


def test_a_saved_copy_loads_in_transformers(model, stories, reference_logits, tmp_path):
    model.save_pretrained(tmp_path)
    ids = [BOS, *stories[1]]
    reference = reference_logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids)
    torch.testing.assert_close(model.logits(ids), reference, rtol=0, atol=TOLERANCE)
