"""What the trainer's ranks need in memory, beside its estimate and ZeRO-3's bound: python benchmarks/training_memory.py

Four ranks on this host, new processes for each layout. Two figures:

    process   the most that was resident (VmHWM) while the trainer was made, and in its steps from the second on, less
              what was resident after a small trainer's step in the same process (libraries, threads, groups)
    counted   bytes of all live tensors' storages, the most of what is seen before and after each block's forward and
              backward; the libraries' own buffers are not in it

"estimate" holds the process against training/memory.py's for several layouts; "zero3" is ZeRO-3 with hardly any
activations, beside 16 bytes a parameter (fp32 parameter, gradient, two moments) over the ranks, and the largest layer.
Needs no root. Writes results/training_memory.json; training_report.py writes docs/training_figures.md."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch
from common import environment, run_ranks, write_json

import pycomm
from training.config import Config, load_preset
from training.memory import Estimate, estimate
from training.model import specs_of_whole
from training.trainer import Trainer

N_RANKS = 4
MODEL = {"vocab_size": 1024, "d_model": 512, "n_heads": 8, "n_kv_heads": 8, "d_ff": 1536}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp 4": ({}, {}),
    "dp 4, ZeRO-1": ({"zero": 1}, {}),
    "dp 4, ZeRO-3": ({"zero": 3}, {}),
    "dp 4, full recomputation": ({}, {"recompute": "full"}),
    "tp 4": ({"tp": 4}, {}),
    "pp 4, 1f1b": ({"pp": 4}, {"accumulation": 8}),
    "dp 2 × cp 2": ({"cp": 2}, {}),
}
N_STEPS = 3


def config_of(layout: dict[str, Any], train: dict[str, Any], n_layers: int, seq_len: int, global_batch: int) -> Config:
    tiny = load_preset("tiny")
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, n_layers=n_layers, **MODEL),
        data=dataclasses.replace(tiny.data, path=argparse.__file__, seq_len=seq_len),
        layout=dataclasses.replace(tiny.layout, **layout),
        train=dataclasses.replace(tiny.train, global_batch=global_batch, **train),
    )


def status_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def storages_nbytes() -> int:
    """Of all tensors that Python knows, each storage once."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":  # isinstance() would wake lazy objects
            storage = each.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


class Count:
    """The most storages_nbytes() around the blocks' forward and backward."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.most = 0
        self._hooks = []
        for block in model.blocks.values():
            self._hooks += [
                block.register_forward_pre_hook(self._look),
                block.register_forward_hook(self._look),
                block.register_full_backward_pre_hook(self._look),
                block.register_full_backward_hook(self._look),
            ]

    def _look(self, *_: object) -> None:
        self.most = max(self.most, storages_nbytes())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def run(store: Any, rank: int, n_ranks: int, config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=100) as world:
        small = load_preset("tiny")
        small = dataclasses.replace(small, data=config.data, layout=config.layout, train=config.train)
        small = dataclasses.replace(small, model=dataclasses.replace(small.model, n_layers=config.model.n_layers))
        before = Trainer(small, world)
        before.train_step()
        before.close()
        del before
        gc.collect()
        base, base_counted = status_bytes("VmRSS"), storages_nbytes()
        forget_peak()
        trainer = Trainer(config, world)
        making = status_bytes("VmHWM") - base
        trainer.train_step()
        forget_peak()
        for _ in range(N_STEPS - 2):
            trainer.train_step()
        steps = status_bytes("VmHWM") - base
        count = Count(trainer.model)
        trainer.train_step()
        count.close()
        specs = specs_of_whole(config.model, trainer.mesh)
        predicted = estimate(config, trainer.mesh.layout, specs, trainer.mesh.pp_index)
        block = max(sum(p.numel() for p in _held(b)) for b in trainer.model.blocks.values())
        parameters = trainer.n_parameters
        trainer.close()
    return {
        "making": making,
        "steps": steps,
        "counted": count.most - base_counted,
        "estimate": {**dataclasses.asdict(predicted), "total": predicted.total},
        "block_numel": block,
        "n_parameters": parameters,
    }


def _held(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return list(module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="print, and leave the record as it is")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "ranks": N_RANKS, "estimate": {}}
    mib = 1 << 20
    for name, (layout, train) in LAYOUTS.items():
        found = run_ranks(run, N_RANKS, config_of(layout, train, 4, 128, 8), timeout_s=200)
        record["estimate"][name] = found
        for rank, each in enumerate(found):
            predicted: Estimate = each["estimate"]["total"]
            peak = max(each["making"], each["steps"])
            print(
                f"{name:<26} rank {rank}: made {each['making'] / mib:6.0f}  steps {each['steps'] / mib:6.0f}  counted "
                f"{each['counted'] / mib:6.0f}  estimate {predicted / mib:6.0f} MiB, {predicted / peak - 1:+.1%}",
                flush=True,
            )
    found = run_ranks(run, N_RANKS, config_of({"zero": 3}, {}, 8, 16, 4), timeout_s=200)
    record["zero3"] = found
    for rank, each in enumerate(found):
        share, layer = 16 * each["n_parameters"] / N_RANKS, 4 * each["block_numel"]
        print(
            f"zero3 rank {rank}: total / ranks {share / mib:.0f}, a layer's parameters {layer / mib:.0f} MiB; counted "
            f"{each['counted'] / mib:.0f}, steps {each['steps'] / mib:.0f}, made {each['making'] / mib:.0f} MiB; bound "
            f"{(1.1 * share + layer) / mib:.0f} MiB",
            flush=True,
        )
    if not options.dry:
        print(f"written: {write_json('training_memory', record)}")


if __name__ == "__main__":
    main()
