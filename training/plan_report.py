"""A plan in words: the table of layouts, why the others lost, and the options that give the first."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from training.config import Config
from training.step_time import AXES

if TYPE_CHECKING:
    from training.plan_layout import Candidate, Plan

_NAMED = 3  # layouts that would be faster but do not fit
_SHOWN = {*(f"layout.{axis}" for axis in ("tp", "cp", "pp", "ep", "zero")), "train.accumulation"}


def why_lost(each: Candidate, first: Candidate) -> str:
    """The part that costs it most against the first choice."""
    more = {name: each.time.parts[name] - first.time.parts[name] for name in each.time.parts}
    name = max(more, key=lambda part: more[part])
    behind = each.time.total_s - first.time.total_s
    if behind <= 1e-9 * first.time.total_s:
        return "as fast; the first does less"
    what = name if name in ("compute", "bubble") else f"{name} exposed"
    return f"{what} +{duration(more[name])} ({behind / first.time.total_s:+.1%} in all)"


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def show(plan: Plan, config: Config, topology: Any, console: Console) -> None:
    """The plan as tables."""
    n_tokens = config.train.global_batch * config.data.seq_len
    needed = config.model.flops_per_token(config.data.seq_len) * n_tokens
    peak = config.monitor.peak_tflops * 1e12 or plan.flops_per_s
    hosts = f"{len(topology.hosts)} host{'s' if len(topology.hosts) > 1 else ''}"
    table = Table(
        title=f"{config.name}: {config.model.n_parameters:,} parameters, {n_tokens:,} tokens a step, "
        f"{topology.n_ranks} ranks on {hosts}, {plan.flops_per_s / 1e12:.4g} TFLOP/s each"
    )
    table.add_column("layout")
    for name in ("step", "MFU", "memory", "bubble"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("exposed")
    table.add_column("why not first")
    for each, memory in plan.fitting:
        time = each.time
        exposed = {axis: time.exposed_s[axis] / time.total_s for axis in AXES if time.exposed_s[axis]}
        table.add_row(
            str(each),
            duration(time.total_s),
            f"{needed / (time.total_s * topology.n_ranks * peak):.1%}",
            f"{memory.total / 2**30:.2f} GiB",
            f"{time.bubble_s / time.total_s:.1%}",
            ", ".join(f"{axis} {share:.1%}" for axis, share in exposed.items()),
            "" if each is plan.first else why_lost(each, plan.first),
        )
    console.print(table)
    if not config.train.memory_gib:
        console.print("Memory was not a limit: give a rank's with --train.memory-gib.", soft_wrap=True)
    for each, reason in plan.unfit[:_NAMED]:
        console.print(f"Does not fit: {each} ({duration(each.time.total_s)}): {reason}", soft_wrap=True)
    if len(plan.unfit) > _NAMED:
        console.print(f"Nor do the fastest of {len(plan.unfit) - _NAMED} other meshes.", soft_wrap=True)
    console.print(f"{plan.n_timed} layouts timed, {plan.refused.total()} are not possible.", soft_wrap=True)
    for reason, n in plan.refused.most_common(_NAMED):
        console.print(f"  {n}: {reason}", soft_wrap=True)
    console.print(f"\nTrain with it: {shlex.join(settings(plan.first.config, config))}", soft_wrap=True)


def settings(chosen: Config, given: Config) -> list[str]:
    """The options that make a run with the given configuration one with the chosen layout: the axes, and whatever else
    is not as it was given."""
    tables = {"layout": (chosen.layout, given.layout), "train": (chosen.train, given.train)}
    options = []
    for table, (found, before) in tables.items():
        for name in (each.name for each in dataclasses.fields(found)):
            value = getattr(found, name)
            if f"{table}.{name}" not in _SHOWN and value == getattr(before, name):
                continue
            option = f"{table}.{name}".replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{option}" if value else f"--{table}.no-{name}".replace("_", "-"))
            else:
                options += [f"--{option}", str(value)]
    return options
