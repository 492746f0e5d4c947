"""A run from start to end: resume, train, evaluate, save, and leave a sample, a curve and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from training import checkpoint_files
from training.config import Config
from training.generate import sample_text
from training.live import LiveTable
from training.machine import be_deterministic, matmul_flops, share_cores
from training.metered import MeteredGroup, on_rank_0
from training.metrics import Sinks, check_sinks, plot_losses, read_metrics
from training.profile import StepProfiler
from training.report import Totals, communication_paragraph, max_peak_memory, training_paragraph
from training.step_result import StepResult
from training.trainer import Trainer

if TYPE_CHECKING:
    from pycomm.group import Group

_SAME_KEYSTROKE_S = 1.0  # a terminal and a launcher may both pass on one Ctrl-C


def run(config: Config, world: Group) -> None:
    """Trains until config.train.steps, from the run's newest checkpoint if there is one; then reports.

    Raises KeyboardInterrupt where a signal stopped it, with its state saved.
    A run that is complete is not trained further: its report is shown again, with a fresh evaluation and sample."""
    if config.monitor.deterministic:
        be_deterministic()
    on_rank_0(MeteredGroup(world, "world"), lambda: check_sinks(config))
    console = Console(quiet=world.rank != 0, highlight=False)
    share_cores(world)
    with contextlib.closing(Trainer(config, world)) as trainer:
        _run(trainer, console)


def _run(trainer: Trainer, console: Console) -> None:
    config = trainer.config
    resumed = trainer.resume()
    first_step = trainer.progress.step + 1
    console.print(
        f"{config.name}: {trainer.n_parameters:,} parameters, {trainer.mesh.layout}, "
        f"{trainer.corpus.n_tokens:,} tokens of {trainer.corpus.name}; "
        + (f"resumed at step {trainer.progress.step}" if resumed else "a new run"),
        soft_wrap=True,
    )
    newest = checkpoint_files.latest(config.run_dir) if resumed and trainer.mesh.world.rank == 0 else None
    for change in checkpoint_files.changed_since(newest, config) if newest else []:
        console.print(f"  {change}", soft_wrap=True)
    if trainer.progress.step >= config.train.steps:
        console.print(
            f"It is complete: {config.train.steps} steps were asked for. Train further with --train.steps N.",
            soft_wrap=True,
        )
        _finish(trainer, console, trainer.evaluate(), None)
        return
    if resumed:
        on_rank_0(trainer.mesh.world, lambda: _require_same_data(trainer))
    totals = Totals()
    metrics = Sinks(config, first_step) if trainer.mesh.world.rank == 0 else None
    with contextlib.closing(metrics) if metrics else contextlib.nullcontext(), _stop_on_signal(trainer):
        eval_loss = _train(trainer, console, metrics, totals)
    if eval_loss is None:
        console.print(
            f"Interrupted after step {trainer.progress.step}; the checkpoint is complete. Run again to resume.",
            soft_wrap=True,
        )
        raise KeyboardInterrupt
    _finish(trainer, console, eval_loss, totals)


def _require_same_data(trainer: Trainer) -> None:
    newest = checkpoint_files.latest(trainer.config.run_dir)
    if newest is not None:
        checkpoint_files.require_same_data(newest, trainer.config, trainer.corpus.fingerprint())


def _train(trainer: Trainer, console: Console, metrics: Sinks | None, totals: Totals) -> float | None:
    """Steps until the end, saving on the way and at the end; the last held-out loss, None when asked to stop."""
    train, monitor = trainer.config.train, trainer.config.monitor
    peak_flops = _peak_flops(trainer)
    flops_per_token = trainer.config.model.flops_per_token(trainer.config.data.seq_len)
    eval_loss = None
    profiler = StepProfiler(trainer.config.run_dir / "profile", monitor, trainer.mesh.world.rank)
    with LiveTable(console, train.steps) as live, contextlib.closing(profiler):
        while trainer.progress.step < train.steps:
            step = trainer.progress.step + 1
            profiler.before(step)
            trainer.submit_step()
            profiler.after(step)
            done = step == train.steps
            evaluates, saves = done or step % train.eval_every == 0, done or step % train.checkpoint_every == 0
            results = trainer.results(until_now=evaluates or saves)
            stopping = any(result.stopping for result in results)
            for result in results + (trainer.results(until_now=True) if stopping else []):
                totals.add(result)
                record = _record(result, trainer.mesh.worker.size, flops_per_token / peak_flops)
                if evaluates and result.step == step:
                    eval_loss = trainer.evaluate()
                    record["eval_loss"] = eval_loss
                if metrics is not None:
                    metrics.write(record)
                live.show(record)
            if saves or stopping:
                trainer.save()
            if stopping and not done:
                return None
    return eval_loss


def _peak_flops(trainer: Trainer) -> float:
    """FLOP/s of all ranks together, given or measured; all ranks together."""
    given = trainer.config.monitor.peak_tflops * 1e12
    total = torch.tensor([given or matmul_flops(trainer.dtype, trainer.device)], dtype=torch.float64)
    trainer.mesh.world.all_reduce(total)
    return float(total)


def _record(result: StepResult, n_ranks: int, peak_s_per_token: float) -> dict[str, Any]:
    record = dataclasses.asdict(result)
    del record["stopping"]
    del record["blocked_by_axis_s"]
    by_axis = record.pop("exposed_by_axis_s")
    tokens_per_s = result.n_tokens / result.step_s
    return {
        **record,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * peak_s_per_token,
        "bubble_share": result.share(result.bubble_s, n_ranks),
        "exposed_share": result.share(result.exposed_s, n_ranks),
        "exposed_by_axis": {axis: result.share(s, n_ranks) for axis, s in by_axis.items()},
    }


def _finish(trainer: Trainer, console: Console, eval_loss: float, totals: Totals | None) -> None:
    """The sample, the loss curve and the report; totals None: the report that the run left, if it did."""
    config, directory = trainer.config, trainer.config.run_dir
    text = sample_text(trainer, config.sample)
    peak_bytes = max_peak_memory(trainer)
    if trainer.mesh.world.rank != 0:
        return
    report_path, curve_path, sample_path = (directory / name for name in ("report.txt", "loss.png", "sample.txt"))
    if totals is not None:
        paragraphs = (
            training_paragraph(trainer, totals, eval_loss, peak_bytes),
            communication_paragraph(trainer, totals),
        )
        _replace(report_path, "\n\n".join(paragraphs) + "\n")
    _replace(sample_path, text + "\n")
    plot_losses(read_metrics(directory / "metrics.jsonl"), curve_path, config.name)
    console.rule("sample")
    console.print(text, markup=False, soft_wrap=True)
    console.rule("report")
    if totals is None:
        console.print(f"Held-out loss {eval_loss:.4f} nats a token. The report of the process that trained last:\n")
    if report_path.exists():
        console.print(report_path.read_text(), markup=False, soft_wrap=True)
    console.print(f"In {directory}: metrics.jsonl, loss.png, sample.txt, report.txt, checkpoints/", soft_wrap=True)


def _replace(path: Path, text: str) -> None:
    """Writes a file so that it appears complete."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


@contextlib.contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a stop after the step that is running; a later SIGINT interrupts at once."""
    asked_at: float | None = None

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        if asked_at is not None and number == signal.SIGINT and now - asked_at > _SAME_KEYSTROKE_S:
            raise KeyboardInterrupt
        asked_at = now if asked_at is None else asked_at
        trainer.stop_requested = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
