"""The range of each number of a configuration, whatever the others are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import ConfigError

if TYPE_CHECKING:
    from training.config import Config

_ALONE = 1 << 63  # seeds below it are a key each
_IN_A_MIX = 1 << 40  # above it a source's number is in the key (data/corpus.py)


def check(config: Config) -> None:
    """Of all of them, but what an axis or a method of [sync] reads (layout.py, checks.py). Raises ConfigError with a
    number's name, its value and what to give."""
    model, data, train = config.model, config.data, config.train
    for name, value in (
        ("data.seq_len", data.seq_len),
        ("train.steps", train.steps),
        ("train.global_batch", train.global_batch),
        ("train.accumulation", train.accumulation),
        ("train.loss_chunk", train.loss_chunk),
        ("train.eval_every", train.eval_every),
        ("train.eval_sequences", train.eval_sequences),
        ("train.checkpoint_every", train.checkpoint_every),
        ("train.keep_checkpoints", train.keep_checkpoints),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    model.check()
    if model.block == "gpt2" and data.seq_len > model.max_seq_len:
        raise ConfigError(
            f"data.seq_len is {data.seq_len}, the position table has model.max_seq_len = {model.max_seq_len} rows; "
            "change one of them"
        )
    if train.bucket_kib < 0:
        raise ConfigError(f"train.bucket_kib is {train.bucket_kib}; give KiB, or 0 for what the links ask for")
    if config.layout.ep < 0:
        raise ConfigError(f"layout.ep is {config.layout.ep}; give ranks, or 0 for as many as divide both")
    if not config.name or Path(config.name).name != config.name:
        raise ConfigError(f"name is {config.name!r}; it names a folder in out_dir, so it must not hold a path")
    _data(config)
    _settings(config)
    _prompt(config)


def _data(config: Config) -> None:
    data, vocab_size, seed = config.data, config.model.vocab_size, config.train.seed
    if not 0.0 < data.val_fraction < 1.0:
        raise ConfigError(f"data.val_fraction is {data.val_fraction}; it must lie between 0 and 1")
    if not -1 <= data.end_of_document < vocab_size:
        raise ConfigError(
            f"data.end_of_document is {data.end_of_document}; give a token below model.vocab_size ({vocab_size}), or "
            "-1 for the tokenizer's own"
        )
    for path, weight in data.mix.items():
        if not 0.0 < weight < math.inf:
            raise ConfigError(f"data.mix gives {path} the weight {weight:g}; give a number above 0")
    limit = _IN_A_MIX if data.mix else _ALONE
    if not 0 <= seed < limit:
        what = " with data.mix" if data.mix else ""
        raise ConfigError(f"train.seed is {seed}; give 0 to {limit - 1}{what}")


def _settings(config: Config) -> None:
    """Numbers that are no sizes: of the optimizer, and of what is done beside training."""
    optimizer, sample, monitor, plan = config.optimizer, config.sample, config.monitor, config.plan
    for name, value, fits, fix in (
        ("optimizer.lr", optimizer.lr, optimizer.lr > 0, "give a rate above 0, such as 3e-4"),
        ("optimizer.min_lr_ratio", optimizer.min_lr_ratio, 0 <= optimizer.min_lr_ratio <= 1, "give 0 to 1"),
        ("optimizer.warmup_steps", optimizer.warmup_steps, optimizer.warmup_steps >= 0, "give steps, or 0 for none"),
        ("optimizer.beta1", optimizer.beta1, 0 <= optimizer.beta1 < 1, "give at least 0 and below 1, such as 0.9"),
        ("optimizer.beta2", optimizer.beta2, 0 <= optimizer.beta2 < 1, "give at least 0 and below 1, such as 0.95"),
        ("optimizer.eps", optimizer.eps, optimizer.eps > 0, "give a number above 0, such as 1e-8"),
        ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "give 0 for none, or above"),
        ("optimizer.clip_norm", optimizer.clip_norm, optimizer.clip_norm >= 0, "give a norm, or 0 for no clipping"),
        ("sample.n_tokens", sample.n_tokens, sample.n_tokens >= 0, "give how many tokens follow the prompt"),
        ("sample.temperature", sample.temperature, sample.temperature >= 0, "give 0 for the likeliest token, or above"),
        ("sample.top_k", sample.top_k, sample.top_k >= 0, "give a number of tokens, or 0 for all"),
        ("sample.seed", sample.seed, 0 <= sample.seed < _ALONE, f"give 0 to {_ALONE - 1}"),
        ("train.memory_gib", config.train.memory_gib, config.train.memory_gib >= 0, "give GiB, or 0 for no limit"),
        ("monitor.peak_tflops", monitor.peak_tflops, monitor.peak_tflops >= 0, "give TFLOP/s, or 0 to measure"),
        ("monitor.max_loss_jump", monitor.max_loss_jump, monitor.max_loss_jump >= 0, "give nats, or 0 for never"),
        ("monitor.profile_first", monitor.profile_first, monitor.profile_first >= 0, "give a step, or 0 for none"),
        ("monitor.profile_steps", monitor.profile_steps, monitor.profile_steps >= 1, "give at least 1"),
        ("plan.gpus", plan.gpus, plan.gpus >= 0, "give ranks, or 0 for those of the topology"),
        ("plan.tflops", plan.tflops, plan.tflops >= 0, "give TFLOP/s, or 0 to measure"),
        ("plan.max_cp", plan.max_cp, plan.max_cp >= 1, "give at least 1"),
        ("plan.max_pp", plan.max_pp, plan.max_pp >= 1, "give at least 1"),
        ("plan.show", plan.show, plan.show >= 1, "give at least 1"),
    ):
        if not (fits and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}; {fix}")


def _prompt(config: Config) -> None:
    """Of sample.prompt where it is token ids."""
    vocab_size = config.model.vocab_size
    if vocab_size == 256 or config.data.tokenizer != "bytes":
        return
    for word in config.sample.prompt.split():
        if word.isdecimal() and int(word) >= vocab_size:
            raise ConfigError(
                f"sample.prompt has the token {word}, model.vocab_size is {vocab_size}; give tokens of 0 to "
                f"{vocab_size - 1}"
            )
