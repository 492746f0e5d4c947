"""The commands beside run, on one small run: text to vocabulary and shards, training, and what is asked of it then."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training_runs import tiny

from training.commands import prepare
from training.config import Config
from training.data import open_corpus
from training.errors import ConfigError
from training.live import LiveTable
from training.metrics import Sinks, check_sinks, read_metrics
from training.presets import load_preset, to_toml

ROOT = Path(__file__).parents[1]

# All in one process, which imports torch once; what each command printed is a line of JSON.
PROGRAM = """
import contextlib, io, json, os, sys
from training.__main__ import main
for arguments in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code
    for key in ("RANK", "WORLD_SIZE"):
        os.environ.pop(key, None)
    print(json.dumps([status, printed.getvalue()]), flush=True)
"""


def commands(*lines: str) -> list[tuple[int, str]]:
    """Status and output of each command line of pycomm-train."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([line.split() for line in lines])],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [(status, printed) for status, printed in map(json.loads, done.stdout.splitlines())]


def test_from_text_to_an_exported_model_and_back(tmp_path: Path) -> None:
    out = f"--out-dir {tmp_path}"
    vocabulary = f"--data.tokenizer {tmp_path}/tokenizer.json --model.vocab-size 320"
    data = f"--data.path {tmp_path}/shards --data.end-of-document 0 --data.document-mask {vocabulary}"
    run = f"tiny {out} {data} --name bpe"
    watched = "--monitor.tensorboard --monitor.deterministic --monitor.profile-first 3 --monitor.profile-steps 2"
    results = commands(
        f"prepare {tmp_path}/shards tiny --data.path {argparse.__file__} {vocabulary}",
        f"run {run} --train.steps 5 --monitor.peak-tflops 0.5 {watched}",
        f"eval {run}",
        f"sample {run} --sample.prompt import --sample.n-tokens 5",
        f"inspect checkpoint {tmp_path}/bpe",
        f"export {run} --export.precision fp32",
        f"import {tmp_path}/bpe/hugging_face tiny {out} {data} --name again",
        f"eval {tmp_path}/again/again.toml",
        f"scorecard {run}",
        f"import {tmp_path}/bpe/hugging_face tiny {out} --name again",
        f"inspect {tmp_path}/nowhere",
        "export tiny --out-dir /nonexistent",
    )
    for status, printed in results[:9]:
        assert status == 0, printed
    prepared, ran, evaluated, sampled, inspected, exported, imported, evaluated_again, scored, *refused = results
    assert "a vocabulary of 320 was trained" in prepared[1] and "--data.end-of-document 0" in prepared[1]
    assert "MFU" in ran[1] and "step 5/5" in ran[1]
    assert sampled[1].startswith("import")
    assert "step 5, sequence 40" in inspected[1] and "every value is finite" in inspected[1]
    assert "blocks.1.attention.query.weight" in inspected[1] and "32 × 32" in inspected[1]
    assert "config.json and fp32 safetensors" in exported[1] and "Go on from it with" in imported[1]
    for figure in ("T_compute", "T_comm", "T_serial", "T ", "exposed communication", "T/max(T_compute, T_comm)"):
        assert f" {figure}" in scored[1]
    loss = evaluated[1].partition("held-out loss ")[2].split()[0]
    assert "bpe at step 5" in evaluated[1] and "again at step 0" in evaluated_again[1]
    assert f"held-out loss {loss} " in evaluated_again[1]  # the same model
    for (status, printed), message in zip(
        refused,
        ("has a checkpoint already; choose another --name", "there is no checkpoint at", "train it with: pycomm-train"),
        strict=True,
    ):
        assert status == 2 and printed.startswith("error: ") and message in printed

    records = read_metrics(tmp_path / "bpe" / "metrics.jsonl")
    config = load_preset(str(tmp_path / "again" / "again.toml"))
    flops = config.model.flops_per_token(config.data.seq_len)
    for record in records:
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * flops / 0.5e12)
        assert record["slowest_rank"] == 0 and record["peak_memory_bytes"] > 2**20
    trace = json.loads((tmp_path / "bpe" / "profile" / "steps_3-4_rank_0.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert list((tmp_path / "bpe" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_preset_that_is_written_reads_the_same(tmp_path: Path) -> None:
    config = tiny(tmp_path, data={"mix": {"a b.jsonl": 0.25, "c": 2.0}}, model={"rope_base": 1e-5, "block": "gpt2"})
    (tmp_path / "x.toml").write_text(to_toml(config))
    assert load_preset(str(tmp_path / "x.toml")) == config


def test_prepared_shards_hold_the_text_and_its_documents(tmp_path: Path) -> None:
    text = tmp_path / "in.jsonl"
    documents = [f"document {n}: " + "some text of it, " * n for n in range(1, 60)]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    config = tiny(model={"vocab_size": 300}, data={"path": str(text), "tokenizer": str(tmp_path / "t" / "tok.json")})
    prepare(config, tmp_path / "shards")
    data = {"path": str(tmp_path / "shards"), "end_of_document": 0, "document_mask": True, "seq_len": 4}
    corpus = open_corpus(tiny(data={**data, "tokenizer": config.data.tokenizer}).data, 300)
    tokens = [int(token) for w in range(corpus.n_train + corpus.n_val) for token in corpus.tokens_at(w)[:-1]]
    decoded = corpus.tokenizer.decode(tokens).split("<|endoftext|>")
    assert decoded[:-1] == documents[: len(decoded) - 1] and len(decoded) == len(documents)
    assert documents[-1].startswith(decoded[-1])
    with pytest.raises(ConfigError, match=r"prepare needs --data\.tokenizer"):
        prepare(tiny(), tmp_path)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = Config()
    check_sinks(config)
    for key in ("tensorboard", "wandb"):
        config = load_preset("tiny")
        object.__setattr__(config.monitor, key, True)
        with pytest.raises(ConfigError, match=f"monitor.{key} needs the package {key}: pip install {key}"):
            check_sinks(config)


WANDB = """
calls = []


class Run:
    def log(self, values, step):
        calls.append(("log", step, values))

    def finish(self):
        calls.append(("finish",))


def init(**given):
    calls.append(("init", given))
    return Run()
"""


def test_weights_and_biases_gets_each_record_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    preset = load_preset("tiny")
    monitor = dataclasses.replace(preset.monitor, wandb=True, wandb_project="of a test")
    config = dataclasses.replace(preset, out_dir=str(tmp_path / "runs"), monitor=monitor)
    check_sinks(config)
    for first_step in (1, 3):
        sinks = Sinks(config, first_step)
        for step in (first_step, first_step + 1):
            sinks.write({"step": step, "loss": 2.5, "exposed_by_axis": {"tp": 0.25}})
        sinks.close()
    calls = sys.modules.pop("wandb").calls
    assert [each[0] for each in calls] == 2 * ["init", "log", "log", "finish"]
    first, again = (each[1] for each in calls if each[0] == "init")
    assert first == again and len(first["id"]) == 32 and first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("of a test", "tiny", str(config.run_dir))
    assert first["config"] == dataclasses.asdict(config)
    logged = [each[1:] for each in calls if each[0] == "log"]
    assert logged == [(step, {"loss": 2.5, "exposed_by_axis/tp": 0.25}) for step in (1, 2, 3, 4)]
    assert [each["step"] for each in read_metrics(config.run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    other = dataclasses.replace(config, name="other")
    Sinks(other, 1).close()
    assert sys.modules.pop("wandb").calls[0][1]["id"] != first["id"]


def record(step: int) -> dict[str, Any]:
    return {
        "step": step, "loss": 2.5, "grad_norm": 1.25, "tokens_per_s": 12345.6, "mfu": 0.314, "exposed_share": 0.25,
        "exposed_by_axis": {"world": 0.05, "tp": 0.2}, "peak_memory_bytes": 300 << 20, "slowest_rank": 3,
        "slowest_excess_s": 0.012,
    }  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_shows_what_a_person_asks_for(terminal: bool) -> None:
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=terminal, width=200, color_system=None)
    with LiveTable(console, 20) as live:
        live.show({**record(9), "eval_loss": 2.25})
        live.show(record(10))
    shown = " ".join(printed.getvalue().split())
    for figure in (
        "step 10/20", "loss 2.5000", "eval 2.2500", "grad norm 1.25", "tokens/s 12,346", "MFU 31%",
        "exposed comm 25% (world 5%, tp 20%)", "peak memory 300 MiB", "slowest rank 3 +12 ms",
    ):  # fmt: skip
        assert figure in shown
