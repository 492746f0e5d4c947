"""Text from a trained model, one token after another, in any layout: all ranks compute, rank 0 draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from training.config import SampleConfig
from training.errors import ConfigError, common
from training.trainer import Trainer


def generate(trainer: Trainer, prompt: Sequence[int], config: SampleConfig) -> Iterator[int]:
    """config.n_tokens tokens that follow prompt (at least one token), the same on every rank.

    Each token costs one forward of it alone while all fit seq_len, and without context parallel ranks; else one over
    the context. Raises ConfigError for a token of the prompt that the model does not have."""
    vocab_size = trainer.config.model.vocab_size
    foreign = [token for token in prompt if not 0 <= token < vocab_size]
    if foreign:
        raise common(ConfigError(f"the prompt has the token {foreign[0]}, the model those of 0 to {vocab_size - 1}"))
    generator = torch.Generator().manual_seed(config.seed)
    tokens, cache = list(prompt), trainer.new_cache()
    for _ in range(config.n_tokens):
        logits = trainer.next_token_logits(tokens, cache)
        token = torch.tensor([choose(logits, config.temperature, config.top_k, generator)])
        trainer.mesh.world.broadcast(token, 0)  # hosts may round differently; one of them decides
        tokens.append(int(token))
        yield tokens[-1]


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """A token drawn from logits [V] / temperature, among the top_k likeliest (0: all); temperature 0: the likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def sample_text(trainer: Trainer, config: SampleConfig) -> str:
    """The prompt and what the model makes of it, as text, or as numbers where the vocabulary is not known.

    An empty prompt begins with a line break. For numbers, the prompt is token ids separated by spaces."""
    tokenizer = trainer.corpus.tokenizer
    if trainer.config.model.vocab_size == 256 or trainer.config.data.tokenizer != "bytes":
        (encoded,) = tokenizer.encode([("sample.prompt", (config.prompt or "\n").encode())])
        prompt = [int(token) for token in encoded]
        return tokenizer.decode([*prompt, *generate(trainer, prompt, config)])
    prompt = [int(word) for word in config.prompt.split() if word.isdecimal()] or [0]
    return " ".join(map(str, [*prompt, *generate(trainer, prompt, config)]))
