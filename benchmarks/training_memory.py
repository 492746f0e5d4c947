"""What ranks need in memory, beside the estimate and ZeRO-3's bound: python benchmarks/training_memory.py [SECTION ..]

Four ranks on this host, new processes for each layout. Three figures:

    process   the most that was resident (VmHWM) while the trainer was made, and in its steps from the second on
    base      what Python and the libraries had resident before (training.machine.process_nbytes(): measured after a
              step of a few numbers); the estimate begins with it
    counted   bytes of all live tensors' storages, the most of what is seen before and after each block's forward and
              backward, and when each parameter of a block has its gradient; the libraries' own buffers are not in it.
              At the same places: what is resident beyond the base as anonymous memory, of files (libraries' code that
              is run for the first time, and what is offloaded) and shared (the groups')

The other sections hold the process against training/memory.py's estimate for several layouts; "zero3" is ZeRO-3 of 24
layers with hardly any activations (16 tokens a rank, recomputed), beside 16 bytes a parameter (fp32 parameter,
gradient, two moments) over the ranks, and the largest layer. Needs no root. A run replaces its own sections in
results/training_memory.json; training_report.py writes docs/training_figures.md."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import environment, read_json, run_ranks, sections_and_dry, write_json

import pycomm
from training.config import Config
from training.device import dtype_of
from training.machine import process_nbytes
from training.memory import estimate
from training.model import specs_of_whole
from training.presets import load_preset
from training.trainer import Trainer

N_RANKS = 4
LIMIT_S = 600  # for the ranks of one set-up
MODEL = {"vocab_size": 4096, "n_layers": 6, "d_model": 768, "n_heads": 12, "n_kv_heads": 12, "d_ff": 2048}
DEEP = {"vocab_size": 1024, "n_layers": 24, "d_model": 512, "n_heads": 8, "n_kv_heads": 8, "d_ff": 1536}
EXPERTS = {"n_experts": 8, "top_k": 2, "n_shared_experts": 1, "n_dense_layers": 1, "d_ff_expert": 512}
LATENT = {"kv_lora_rank": 128, "q_lora_rank": 256, "head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
NARROW = {"n_layers": 4, "d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1408}
ALL_HEADS = {"n_kv_heads": NARROW["n_heads"]}  # latents have no groups
LONG = {"seq_len": 1024, "global_batch": 4}  # what activations are most of


@dataclass(frozen=True)
class Setup:
    """What is not as in MODEL with data parallel ranks."""

    layout: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    seq_len: int = 64
    global_batch: int = 8
    document_mask: bool = False


LAYOUTS: dict[str, dict[str, Setup]] = {
    "data": {
        "dp 4": Setup(),
        "dp 4, ZeRO-1": Setup({"zero": 1}),
        "dp 4, ZeRO-3": Setup({"zero": 3}),
        "dp 4, full recomputation": Setup(train={"recompute": "full"}),
    },
    "model": {
        "tp 4": Setup({"tp": 4}),
        "pp 4, 1f1b": Setup({"pp": 4}, {"accumulation": 8}),
        "dp 2 × cp 2": Setup({"cp": 2}),
    },
    "bf16": {
        "dp 4, bf16": Setup(train={"precision": "bf16"}),
        "dp 4, ZeRO-2, bf16": Setup({"zero": 2}, {"precision": "bf16"}),
        "dp 4, ZeRO-3, bf16": Setup({"zero": 3}, {"precision": "bf16"}),
        "dp 2 × tp 2, long, bf16": Setup({"tp": 2}, {"precision": "bf16"}, NARROW, **LONG),
    },
    "experts": {
        "experts, ep 4": Setup({"ep": 4}, model=EXPERTS),
        "experts, ep 2 × tp 2, split": Setup({"ep": 2, "tp": 2, "experts_over_tp": "split"}, model=EXPERTS),
        "experts, ep 4, ZeRO-3, long": Setup({"ep": 4, "zero": 3}, {}, NARROW | EXPERTS, **LONG),
    },
    "latents": {
        "latents, dp 2 × tp 2": Setup({"tp": 2}, model=LATENT),
        "latents, dp 4, long": Setup({}, {}, NARROW | LATENT | ALL_HEADS, **LONG),
        "latents, cp 4, long": Setup({"cp": 4}, {}, NARROW | LATENT | ALL_HEADS, **LONG),
    },
    "pipelines": {
        "dp 2 × pp 2, interleaved × 3": Setup(
            {"pp": 2, "schedule": "interleaved", "chunks": 3}, {"accumulation": 4}, global_batch=16
        ),
        "pp 4, zb_h1, long": Setup({"pp": 4, "schedule": "zb_h1"}, {"accumulation": 8}, NARROW, 512, 8),
        "pp 2 × tp 2, zbv, long": Setup({"pp": 2, "tp": 2, "schedule": "zbv"}, {"accumulation": 4}, NARROW, 1024, 4),
    },
    "offload": {
        "dp 4, optimizer in files": Setup(train={"offload_optimizer": True}),
        "dp 4, ZeRO-3, all in files": Setup(
            {"zero": 3}, {"offload_optimizer": True, "offload_parameters": True, "offload_activations": True}
        ),
        "dp 4, long, activations in files": Setup({}, {"offload_activations": True}, NARROW, **LONG),
    },
    "masks": {
        "dp 4, long": Setup({}, {}, NARROW, **LONG),
        "dp 4, long, documents": Setup({}, {}, NARROW, **LONG, document_mask=True),
        "dp 4, long, documents, selective": Setup({}, {"recompute": "selective"}, NARROW, **LONG, document_mask=True),
        "cp 4, long, documents": Setup({"cp": 4}, {}, NARROW, **LONG, document_mask=True),
    },
}
SECTIONS = (*LAYOUTS, "zero3")
N_STEPS = 3
MIB = 1 << 20


def config_of(setup: Setup, folder: str = "unused") -> Config:
    tiny = load_preset("tiny")
    data = {"path": argparse.__file__, "seq_len": setup.seq_len, "document_mask": setup.document_mask}
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, **MODEL | setup.model),
        data=dataclasses.replace(tiny.data, **data),
        layout=dataclasses.replace(tiny.layout, **setup.layout),
        train=dataclasses.replace(
            tiny.train, **{"eval_sequences": 4, "global_batch": setup.global_batch, "offload_dir": folder} | setup.train
        ),
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


KINDS = {"anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem"}  # parts of what is resident


def resident() -> dict[str, int]:
    return {kind: status_bytes(key) for kind, key in KINDS.items()}


class Count:
    """The most storages_nbytes() and resident() around the blocks' forward and backward, and at their parameters'
    gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.most = 0
        self.resident = dict.fromkeys(KINDS, 0)
        self._hooks = []
        for block in model.blocks.values():
            self._hooks += [
                block.register_forward_pre_hook(self._look),
                block.register_forward_hook(self._look),
                block.register_full_backward_pre_hook(self._look),
                block.register_full_backward_hook(self._look),
            ]
            self._hooks += [p.register_post_accumulate_grad_hook(self._look) for p in block.parameters()]

    def _look(self, *_: object) -> None:
        self.most = max(self.most, storages_nbytes())
        self.resident = {kind: max(nbytes, self.resident[kind]) for kind, nbytes in resident().items()}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def run(store: Any, rank: int, n_ranks: int, config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=100) as world:
        base, of_base = process_nbytes(dtype_of(config.train.precision)), resident()
        forget_peak()
        trainer = Trainer(config, world)
        making = status_bytes("VmHWM")
        trainer.train_step()
        forget_peak()
        for _ in range(N_STEPS - 2):
            trainer.train_step()
        steps = status_bytes("VmHWM")
        count = Count(trainer.model)
        trainer.train_step()
        count.close()
        specs = specs_of_whole(config.model, trainer.mesh)
        predicted = estimate(config, trainer.mesh.layout, specs, trainer.mesh.pp_index, base)
        block = max(sum(p.numel() for p in b.parameters()) for b in trainer.model.blocks.values())
        parameters = trainer.n_parameters
        trainer.close()
    return {
        "base": base,
        "making": making,
        "steps": steps,
        "counted": count.most,
        "beyond_base": {kind: nbytes - of_base[kind] for kind, nbytes in count.resident.items()},
        "estimate": {**dataclasses.asdict(predicted), "total": predicted.total},
        "block_numel": block,
        "n_parameters": parameters,
    }


def kinds(found: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {nbytes / MIB:.0f}" for kind, nbytes in found["beyond_base"].items())


def estimate_section(section: str) -> dict[str, Any]:
    results = {}
    for name, setup in LAYOUTS[section].items():
        with tempfile.TemporaryDirectory() as folder:
            found = run_ranks(run, N_RANKS, config_of(setup, folder), timeout_s=LIMIT_S)
        results[name] = found
        for rank, each in enumerate(found):
            predicted, peak, base = each["estimate"]["total"], max(each["making"], each["steps"]), each["base"]
            print(
                f"{name:<32} rank {rank}: made {each['making'] / MIB:6.0f}  steps {each['steps'] / MIB:6.0f}  counted "
                f"{each['counted'] / MIB:6.0f}  base {base / MIB:4.0f}  estimate {predicted / MIB:6.0f} MiB, "
                f"{predicted / peak - 1:+.1%}; beyond the base {(predicted - base) / (peak - base) - 1:+.1%}"
                f"; {kinds(each)}",
                flush=True,
            )
    return results


def zero3_section() -> list[dict[str, Any]]:
    setup = Setup({"zero": 3}, {"recompute": "full"}, DEEP, 16, 4)
    found = run_ranks(run, N_RANKS, config_of(setup), timeout_s=LIMIT_S)
    for rank, each in enumerate(found):
        share, layer = 16 * each["n_parameters"] / N_RANKS, 4 * each["block_numel"]
        print(
            f"zero3 rank {rank}: total / ranks {share / MIB:.0f}, a layer's parameters {layer / MIB:.0f} MiB; counted "
            f"{each['counted'] / MIB:.0f} ({each['counted'] / (share + layer):.3f} of both), beyond the base: steps "
            f"{(each['steps'] - each['base']) / MIB:.0f}, made {(each['making'] - each['base']) / MIB:.0f} MiB; "
            f"{kinds(each)}",
            flush=True,
        )
    return found


def main() -> None:
    wanted, dry = sections_and_dry(__doc__ or "", SECTIONS)
    for section in wanted:
        about = environment()
        results = estimate_section(section) if section in LAYOUTS else zero3_section()
        if not dry:
            record = read_json("training_memory") | {section: {"environment": about, "results": results}}
            write_json("training_memory", {key: record[key] for key in SECTIONS if key in record})


if __name__ == "__main__":
    main()
