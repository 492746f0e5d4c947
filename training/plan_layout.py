"""Searches the layouts of some ranks on a topology, times each (step_time.py), and says why the others lost.

Tried: every tp, cp and pp that divides the ranks, the ep that divide both, experts spread or split over tp, ZeRO 0 to 3
over all copies, stages or copies outermost, 1F1B, interleaved (2 and 4 chunks), ZB-H1 and ZBV, and accumulation:
without a pipeline every divisor of a data parallel rank's sequences, with one those of pp to 8 pp. GPipe is not: 1F1B
idles as long and holds less. All else is the configuration's."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from rich.console import Console

import pycomm
from pycomm.errors import TopologyError
from training import checks, ranges, schedules
from training.config import Config
from training.device import choose_device, device_here, dtype_of
from training.errors import ConfigError
from training.layer_rate import Alone, planning_flops
from training.layout import Layout, resolve_layout
from training.links import Links
from training.machine import process_nbytes, share_cores
from training.memory import Estimate, require_fit
from training.mesh import Mesh
from training.metered import MeteredGroup, on_rank_0
from training.model import specs_of_whole
from training.plan_report import duration, show
from training.sharding import ParamSpec
from training.step_time import Costs, StepTime, step_time

if TYPE_CHECKING:
    from pycomm.group import Group

_SCHEDULES: tuple[tuple[schedules.Name, int], ...] = (
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zb_h1", 1),
    ("zbv", 1),
)
_OUTERMOST: tuple[Literal["pp", "dp"], ...] = ("pp", "dp")


@dataclass(frozen=True)
class Candidate:
    """A layout that the model can have. config is the run's with it."""

    config: Config
    layout: Layout
    time: StepTime

    @property
    def mesh(self) -> tuple[int, ...]:
        at = self.layout
        return at.dp, at.tp, at.cp, at.pp, at.ep

    @property
    def order(self) -> tuple[Any, ...]:
        """Faster first; of equally fast ones that which does less."""
        chosen = self.config.layout
        does = (chosen.zero, chosen.pp, chosen.cp, chosen.tp, self.layout.ep, chosen.chunks)
        return self.time.total_s, *does, chosen.outermost == "dp"

    def __str__(self) -> str:
        chosen, accumulation = self.config.layout, self.config.train.accumulation
        text = str(self.layout)
        if chosen.pp > 1:
            text += f", {chosen.schedule}" + (f" × {chosen.chunks}" if chosen.chunks > 1 else "")
        text += f", zero {chosen.zero}" if chosen.zero else ""
        return text + (f", accumulation {accumulation}" if accumulation > 1 else "")


@dataclass(frozen=True)
class Plan:
    """fitting: the fastest of each mesh that fits, with its largest rank's memory, the fastest first.

    unfit: the fastest of each mesh that does not fit, where it comes before the last of those, with the reason.
    refused: reasons of layouts that the model cannot have, and how many each."""

    fitting: tuple[tuple[Candidate, Estimate], ...]
    unfit: tuple[tuple[Candidate, str], ...]
    refused: Counter[str]
    n_timed: int
    flops_per_s: float

    @property
    def first(self) -> Candidate:
        return self.fitting[0][0]


def whole_specs(config: Config) -> dict[str, ParamSpec]:
    """Of the whole model, without a group."""
    return specs_of_whole(config.model, cast(Mesh, Alone()))


def search(
    config: Config,
    topology: Any,
    flops_per_s: float,
    process_nbytes: int = 0,
    gpu_nbytes: int | None = None,
    on_gpus: bool = False,
) -> Plan:
    """The best config.plan.show meshes of a topology's ranks (pycomm.Topology). flops_per_s: that a rank reaches.
    process_nbytes, gpu_nbytes: as memory.require_fit() takes them. on_gpus: whether the ranks are, where
    train.device is "auto".

    Raises ConfigError where no layout is possible, or none fits train.memory_gib."""
    ranges.check(config)
    checks.plans(config)
    links, refused, specs = Links(topology), Counter[str](), whole_specs(config)
    costs = Costs(config.model, specs)
    candidates = [
        Candidate(each, layout, step_time(each, layout, costs, links, flops_per_s))
        for each, layout in _possible(config, topology.n_ranks, refused, on_gpus)
    ]
    if not candidates:
        why = f": {refused.most_common(1)[0][0]}" if refused else ""
        raise ConfigError(f"no layout of {topology.n_ranks} ranks is possible{why}")
    fitting: dict[tuple[int, ...], tuple[Candidate, Estimate]] = {}
    unfit: dict[tuple[int, ...], tuple[Candidate, str]] = {}
    for each in sorted(candidates, key=lambda each: each.order):
        if each.mesh in fitting:
            continue
        try:
            fitting[each.mesh] = (each, require_fit(each.config, each.layout, specs, process_nbytes, gpu_nbytes))
        except ConfigError as error:
            unfit.setdefault(each.mesh, (each, str(error)))
        if len(fitting) == config.plan.show:
            break
    if not fitting:
        raise ConfigError(
            f"none of {len(candidates)} layouts of {topology.n_ranks} ranks fits; the fastest would be "
            f"{next(iter(unfit.values()))[0]}: {next(iter(unfit.values()))[1]}"
        )
    return Plan(tuple(fitting.values()), tuple(unfit.values()), refused, len(candidates), flops_per_s)


def _possible(
    config: Config, n_ranks: int, refused: Counter[str], on_gpus: bool = False
) -> Iterator[tuple[Config, Layout]]:
    """Every layout that resolve_layout() accepts; refused: counts what it said of the others."""
    sharded = config.train.offload_parameters or config.train.offload_gradients  # by ZeRO, also on one rank
    divisors = [n for n in range(1, n_ranks + 1) if n_ranks % n == 0]
    for tp in divisors:
        for cp in (n for n in divisors if n <= config.plan.max_cp and n_ranks // tp % n == 0):
            for pp in (n for n in divisors if n <= config.plan.max_pp and n_ranks // (tp * cp) % n == 0):
                dp = n_ranks // (tp * cp * pp)
                experts = math.gcd(dp, config.model.n_experts) if config.model.n_experts else 1
                for schedule, chunks in _SCHEDULES if pp > 1 else _SCHEDULES[:1]:
                    for accumulation in _accumulations(config.train.global_batch, dp, pp):
                        for ep, over_tp in _experts(config, experts, tp):
                            both = pp > 1 and dp > ep
                            zeros = range(4 if dp * cp * tp > 1 or sharded else 1)
                            outermosts = _OUTERMOST[: 2 if both else 1]
                            for zero, outermost in itertools.product(zeros, outermosts):
                                layout = dataclasses.replace(
                                    config.layout,
                                    tp=tp,
                                    cp=cp,
                                    pp=pp,
                                    schedule=schedule,
                                    chunks=chunks,
                                    stage_layers="",
                                    ep=ep,
                                    experts_over_tp=over_tp,
                                    zero=zero,
                                    zero_ranks=0,
                                    outermost=outermost,
                                    auto=False,
                                )  # settings() prints what it changes
                                train = dataclasses.replace(config.train, accumulation=accumulation)
                                each = dataclasses.replace(config, layout=layout, train=train)
                                try:
                                    resolved = resolve_layout(each, n_ranks)
                                    if on_gpus:
                                        checks.offload_on_gpus(each)
                                except ConfigError as error:
                                    refused[str(error)] += 1
                                    continue
                                yield each, resolved


def _experts(config: Config, most: int, tp: int) -> list[tuple[int, Literal["none", "spread", "split"]]]:
    """Expert parallel ranks, which divide `most`, and what tp does to experts."""
    cuts: list[Literal["none", "spread", "split"]] = ["none"]
    if config.model.n_experts and tp > 1:
        cuts += ["spread", "split"]
    return [(ep, cut) for ep in range(1, most + 1) if most % ep == 0 for cut in cuts]


def _accumulations(global_batch: int, dp: int, pp: int) -> list[int]:
    """Micro-batches to try; [1] where dp does not divide the batch, which is refused by name then."""
    if global_batch % dp:
        return [1]
    sequences = global_batch // dp
    divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
    if pp == 1:
        return divisors
    return [n for n in divisors if pp <= n <= 8 * pp] or divisors[-1:]


def plan(config: Config) -> None:
    """The command: plans for config.plan's topology and prints."""
    asked = config.plan
    ranges.check(config)
    if not asked.topology:
        raise ConfigError(
            "plan needs the ranks' hosts and links: --topology FILE, as `pycomm topo --save FILE` writes it in a job, "
            "or written by hand (docs/topology.md)"
        )
    try:
        topology = pycomm.Topology.load(asked.topology)
    except TopologyError as error:
        raise ConfigError(str(error)) from error
    if asked.gpus > topology.n_ranks:
        raise ConfigError(f"--gpus is {asked.gpus}, {asked.topology} has {topology.n_ranks} ranks; add hosts to it")
    if 0 < asked.gpus < topology.n_ranks:
        topology = topology.select(range(asked.gpus))
    console = Console(highlight=False)
    show(search(config, topology, planning_flops(config, device_here(config.train.device))), config, topology, console)


def automatic(config: Config, world: Group) -> Config:
    """config with the first choice for the world's ranks, the same on every rank; they call it together."""
    share_cores(world)
    device = choose_device(config.train.device, world)
    gpu_nbytes = device.free_nbytes()
    of_process = process_nbytes(dtype_of(config.train.precision)) if gpu_nbytes is None else 0
    rate = torch.tensor([planning_flops(config, device)], dtype=torch.float64)
    world.all_reduce(rate, "min")  # a step is as fast as its slowest rank

    def first() -> dict[str, Any]:
        chosen = search(config, world.topology, float(rate), of_process, gpu_nbytes, device.late).first
        print(f"layout.auto: {chosen}; {duration(chosen.time.total_s)} a step expected", flush=True)
        return {
            "layout": dataclasses.asdict(chosen.config.layout),
            "accumulation": chosen.config.train.accumulation,
        }

    chosen = on_rank_0(MeteredGroup(world, "world"), first)
    return dataclasses.replace(
        config,
        layout=dataclasses.replace(config.layout, **chosen["layout"]),
        train=dataclasses.replace(config.train, accumulation=chosen["accumulation"]),
    )
