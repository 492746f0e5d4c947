"""Checks of a configuration that need neither tensors nor ranks. Each raises ConfigError: both sides and the fix."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from training.errors import ConfigError

if TYPE_CHECKING:
    from training.config import Config
    from training.layout import Layout


def zero(config: Config, resolved: Layout) -> None:
    layout = config.layout
    if not 0 <= layout.zero <= 3:
        raise ConfigError(f"layout.zero is {layout.zero}; give 0 (no sharding), 1, 2 or 3")
    if config.train.offload_parameters and layout.zero < 3:
        raise ConfigError(
            f"train.offload_parameters needs layout.zero 3, it is {layout.zero}: only ZeRO 3 has "
            "blocks in memory no longer than they compute; set layout.zero to 3 (with layout.zero_ranks 1 each rank's "
            "file has all that it would have without ZeRO, and no parameters are exchanged)"
        )
    if config.train.offload_gradients and layout.zero < 2:
        raise ConfigError(
            f"train.offload_gradients needs layout.zero 2 or 3, it is {layout.zero}: below that every backward adds to "
            "whole gradients; set layout.zero to 2 or more"
        )
    if layout.zero == 0:
        if layout.zero_ranks:
            raise ConfigError(f"layout.zero_ranks is {layout.zero_ranks} but layout.zero is 0; set layout.zero to 1..3")
        return
    if layout.zero_ranks:
        divides("layout.zero_ranks", layout.zero_ranks, "data × context parallel ranks", resolved.dp * resolved.cp)
        if config.model.n_experts:
            copies = resolved.dp * resolved.cp * resolved.tp // resolved.expert_ranks
            divides("layout.zero_ranks", layout.zero_ranks, "ranks that hold the same experts", copies)


def offload_on_gpus(config: Config) -> None:
    """Of a run whose ranks are on GPUs, where the optimizer's state can leave for the host and the rest cannot."""
    train, layout, sync = config.train, config.layout, config.sync
    for name, given in (
        ("offload_parameters", train.offload_parameters),
        ("offload_gradients", train.offload_gradients),
    ):
        if given:
            raise ConfigError(
                f"train.{name} is for CPUs, this run's ranks are on GPUs; leave it out (layout.zero 3 leaves a rank "
                "1/n of parameters, gradients and state), or set train.device to 'cpu'"
            )
    if not train.offload_optimizer:
        return
    if layout.zero:
        raise ConfigError(
            f"train.offload_optimizer on GPUs is of whole parameters, layout.zero is {layout.zero}, which leaves a "
            "rank 1/n of the state on the GPU: set layout.zero to 0, or train.offload_optimizer to false"
        )
    if sync.method != "synchronous":
        raise ConfigError(
            f"train.offload_optimizer on GPUs does not hold what sync.method {sync.method!r} keeps between exchanges; "
            "set train.offload_optimizer to false, or sync.method to 'synchronous'"
        )


def context(config: Config) -> None:
    model, layout = config.model, config.layout
    if layout.cp == 1:
        return
    pieces = 2 * layout.cp * layout.tp
    if config.data.seq_len % pieces:
        raise ConfigError(
            f"data.seq_len ({config.data.seq_len}) is no multiple of 2 × layout.cp × layout.tp ({pieces}): each "
            "context parallel rank has an early and a late part of the sequence, cut over its tp ranks; change one"
        )
    if layout.context == "ulysses":
        for name, heads in (("model.n_heads", model.n_heads), ("model.n_kv_heads", model.n_kv_heads)):
            divides("layout.tp × layout.cp", layout.tp * layout.cp, name, heads)


def divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{divisor_name} ({divisor}) does not divide {name} ({value}); change one of them")


# What each method of [sync] reads beside `workers`.
_SETTINGS = {
    "synchronous": (),
    "local_sgd": ("every",),
    "diloco": ("every", "outer_lr", "outer_momentum"),
    "streaming_diloco": ("every", "outer_lr", "outer_momentum", "fragments", "delay", "mixing"),
    "stale": ("staleness",),
}


def synchronisation(config: Config, world_size: int) -> None:
    sync = config.sync
    known = _SETTINGS[sync.method]
    for each in dataclasses.fields(sync):
        value = getattr(sync, each.name)
        if each.name not in ("method", "workers", *known) and value != each.default:
            users = " or ".join(repr(method) for method, names in _SETTINGS.items() if each.name in names)
            raise ConfigError(
                f"sync.{each.name} is {value}, which sync.method {sync.method!r} does not read; leave it out, or set "
                f"sync.method to {users}"
            )
    if sync.method == "synchronous":
        if sync.workers != 1:
            raise ConfigError(
                f"sync.workers is {sync.workers} but sync.method is 'synchronous', whose ranks are one worker; choose "
                f"another method ({', '.join(each for each in _SETTINGS if each != sync.method)}), or 1 worker"
            )
        if config.wire.outer != "none":
            raise ConfigError(
                f"wire.outer is {config.wire.outer!r} but sync.method is 'synchronous': there are no workers to "
                "exchange with; set wire.dp for gradients, or choose another method"
            )
        return
    if sync.workers < 2:
        raise ConfigError(
            f"sync.method {sync.method!r} needs sync.workers of at least 2 (the number of hosts, say), "
            f"got {sync.workers}"
        )
    divides("sync.workers", sync.workers, "the ranks", world_size)
    divides("sync.workers", sync.workers, "train.global_batch", config.train.global_batch)
    if config.layout.auto:
        plans(config)
    if config.model.router_bias:
        raise ConfigError(
            f"model.router_bias moves by the load of all ranks in each step, which sync.method {sync.method!r} does "
            "not gather; balance with model.aux_loss_weight instead"
        )
    for name, value, low, high in (
        ("every", sync.every, 1, None),
        ("fragments", sync.fragments, 1, min(config.model.n_layers, sync.every)),
        ("delay", sync.delay, 0, sync.every - 1),
        ("staleness", sync.staleness, 1, None),
    ):
        if name in known and (value < low or (high is not None and value > high)):
            most = "" if high is None else f" and at most {high}"
            of = {"fragments": " (one for each layer, and one exchange a step)", "delay": " (below sync.every)"}
            raise ConfigError(f"sync.{name} is {value}; give at least {low}{most}{of.get(name, '')}")
    for name, ratio in (("outer_momentum", sync.outer_momentum), ("mixing", sync.mixing)):
        if name in known and not 0.0 <= ratio < 1.0:
            raise ConfigError(f"sync.{name} is {ratio}; it must be at least 0 and below 1")
    if "outer_lr" in known and not 0.0 < sync.outer_lr < math.inf:
        raise ConfigError(f"sync.outer_lr is {sync.outer_lr}; it must be above 0")


def plans(config: Config) -> None:
    """The planner's own check."""
    if config.sync.method != "synchronous":
        raise ConfigError(
            f"plan and layout.auto time synchronous steps, not sync.method {config.sync.method!r}; give the axes "
            "(layout.tp, layout.pp, ...), or plan a worker's ranks with sync.method 'synchronous'"
        )


def wires(config: Config) -> None:
    wire, layout = config.wire, config.layout
    if wire.pp != "none":
        raise ConfigError(
            f"wire.pp is {wire.pp!r}, but activations go between stages as messages, which have no wire; leave it out "
            "(train.precision 'bf16' halves them)"
        )
    if wire.cp != "none" and layout.context == "ring" and layout.cp > 1:
        raise ConfigError(
            f"wire.cp is {wire.cp!r}, but ring attention passes keys and values on as messages, which have no wire; "
            "set layout.context to 'ulysses', or leave it out"
        )
    if wire.ep not in ("none", "bf16", "fp8"):
        raise ConfigError(f"wire.ep is {wire.ep!r}; rows travel to their experts as bf16 or fp8: give one of these")
    if wire.tp != "none" and layout.tp_overlap == "always":
        raise ConfigError(
            f"wire.tp is {wire.tp!r} with layout.tp_overlap 'always', whose pieces are messages, which have no wire; "
            "set layout.tp_overlap to 'never', or leave wire.tp out"
        )
    if layout.zero and wire.dp != "none" and wire.error_feedback:
        raise ConfigError(
            f"wire.dp {wire.dp!r} with layout.zero {layout.zero} has no error feedback: a reduce_scatter does not say "
            "what coding lost; set wire.error_feedback to false, or layout.zero to 0"
        )


def products(config: Config, resolved: Layout) -> None:
    """Of train.matmul, train.compile and train.cuda_graph."""
    train = config.train
    if train.cuda_graph:
        _captures(config)
    if train.compile and config.layout.schedule in ("zb_h1", "zbv") and config.layout.pp > 1:
        raise ConfigError(
            f"train.compile with layout.schedule {config.layout.schedule!r}: weight gradients that are put off are not "
            "in a compiled backward; set schedule to '1f1b' or 'interleaved', or train.compile to false"
        )
    if train.matmul != "fp8":
        return
    if train.precision != "bf16":
        raise ConfigError(
            f"train.matmul 'fp8' gives bf16 results, train.precision is {train.precision!r}; set it to 'bf16'"
        )
    if config.layout.tp_overlap == "always":
        raise ConfigError(
            "train.matmul 'fp8' with layout.tp_overlap 'always', whose pieces are no fp8 products; set tp_overlap to "
            "'never'"
        )
    for name, size in _widths(config, resolved).items():
        if size % 16:
            raise ConfigError(f"train.matmul is 'fp8', whose products need multiples of 16; {name} is {size}")


def _widths(config: Config, resolved: Layout) -> dict[str, int]:
    """Of what linear layers multiply on a rank, by name. Rows of tokens may be any number."""
    model, tp = config.model, resolved.tp
    widths = {"model.d_model": model.d_model}
    if model.latent:
        widths |= {
            "model.q_lora_rank": model.q_lora_rank,
            "model.kv_lora_rank": model.kv_lora_rank,
            "model.kv_lora_rank + model.qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
            "model.n_heads × width of a query / layout.tp": model.n_heads * model.qk_width // tp,
            "model.n_heads × width of a value / layout.tp": model.n_heads * model.v_width // tp,
            "model.n_heads × width of a key and a value / layout.tp": (
                model.n_heads * (model.head_width + model.v_width) // tp
            ),
        }
        if resolved.cp > 1 and config.layout.context == "ulysses" and config.layout.context_latents:
            widths["model.n_heads × width of a key and a value / (layout.tp × layout.cp)"] = (
                model.n_heads * (model.head_width + model.v_width) // (tp * resolved.cp)
            )
    else:
        widths["model.n_heads × head width / layout.tp"] = model.n_heads * model.head_width // tp
        widths["model.n_kv_heads × head width / layout.tp"] = model.n_kv_heads * model.head_width // tp
    with_experts = [model.has_experts(index) for index in range(model.n_layers)]
    if not all(with_experts):
        widths["model.d_ff / layout.tp"] = model.d_ff // tp
    if any(with_experts):
        slices = tp if resolved.experts_over_tp == "split" else 1
        widths["the width of an expert on a rank"] = model.expert_width // slices
        widths["the width of shared experts / layout.tp"] = model.n_shared_experts * model.expert_width // tp
    return widths


def _captures(config: Config) -> None:
    layout, train = config.layout, config.train
    for asked, what in (
        (layout.pp > 1, f"layout.pp {layout.pp}, whose stages exchange messages"),
        (layout.cp > 1 and layout.context == "ring", "layout.context 'ring', whose ranks exchange messages"),
        (layout.tp_overlap == "always", "layout.tp_overlap 'always', whose ranks exchange messages"),
        (layout.zero > 0, f"layout.zero {layout.zero}, whose memory comes and goes from step to step"),
        (config.model.n_experts > 0, "experts, whose rows the host counts"),
        (
            train.offload_activations or train.offload_optimizer or train.offload_parameters or train.offload_gradients,
            "offloading",
        ),
        (config.sync.method != "synchronous", f"sync.method {config.sync.method!r}, whose steps are not all alike"),
    ):
        if asked:
            raise ConfigError(f"train.cuda_graph cannot capture a step with {what}; set one of them to its default")
