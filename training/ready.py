"""Whether a run can start, before its model is made: what one rank misses, all ranks say."""

from __future__ import annotations

import torch

from training import checks
from training.config import Config
from training.data import Corpus, open_corpus
from training.device import dtype_of
from training.errors import DataError, common
from training.fp8 import require_fp8
from training.machine import process_nbytes
from training.memory import Estimate, require_fit
from training.mesh import Mesh
from training.metered import SLOW_S, MeteredGroup, on_every_rank
from training.sharding import ParamSpec


def require_device(config: Config, mesh: Mesh, specs: dict[str, ParamSpec]) -> Estimate:
    """What this rank needs of memory. All ranks together. specs: of the whole model.

    Raises ConfigError on every rank where the device of one cannot do what is asked, or has not the room."""

    def check() -> Estimate:
        if mesh.device.late:
            checks.offload_on_gpus(config)
        if config.train.matmul == "fp8":
            require_fp8(mesh.device)
        gpu_nbytes = mesh.device.free_nbytes()
        of_process = process_nbytes(dtype_of(config.train.precision)) if gpu_nbytes is None else 0
        return require_fit(config, mesh.layout, specs, of_process, gpu_nbytes)

    return on_every_rank(mesh.world, check)


def open_same_corpus(config: Config, world: MeteredGroup) -> Corpus:
    """The run's data, with enough of it for a batch and an evaluation. All ranks together.

    Raises DataError or ConfigError on every rank where one cannot read it, or reads other data than rank 0."""

    def read() -> Corpus:
        corpus = open_corpus(config.data, config.model.vocab_size)
        corpus.require(config.train.global_batch, config.train.eval_sequences)
        return corpus

    corpus = on_every_rank(world, read)
    fingerprints = torch.empty(world.size, dtype=torch.int64)
    world.all_gather(fingerprints, torch.tensor([corpus.fingerprint()]), timeout_s=SLOW_S)
    differing = (fingerprints != fingerprints[0]).nonzero().flatten().tolist()
    if differing:
        raise common(
            DataError(
                f"rank {differing[0]} reads other data at {corpus.name!r} than rank 0; give every host the same files "
                "(for 'stdlib': the same Python version)"
            )
        )
    return corpus
