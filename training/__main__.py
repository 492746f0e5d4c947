"""pycomm-train COMMAND ...  (python -m training is the same)

  run     [PRESET] [--model.n-layers 6 ...]   train, or resume, or show a finished run
  plan    [PRESET] --gpus 64 --topology FILE  which layout would be fastest there, and why; trains nothing
  scorecard [PRESET] [...]                    what overlapping gains in one of its steps; trains nothing
  eval    [PRESET] [...]                      the held-out loss of the run's newest checkpoint
  sample  [PRESET] [--sample.prompt "def "]   text of it
  export  [PRESET] [--export.folder DIR]      it as a Hugging Face model
  import  DIR [PRESET] --name NAME [...]      a Hugging Face model as the start of a run
  inspect CHECKPOINT                          what a checkpoint, or a run's newest one, holds
  prepare DIR [PRESET] --data.tokenizer FILE  text as token shards in DIR; trains the vocabulary if FILE is not there

PRESET is a name in training/presets or a .toml file; "default" when left out. One process is one rank: start several
with `pycomm launch --hosts 2 --ranks-per-host 2 -- pycomm-train run`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from training import ranges
from training.config import Config
from training.errors import ConfigError, TrainingError, common
from training.layout import resolve_layout
from training.presets import load_preset, nearest

COMMANDS = ("run", "plan", "scorecard", "eval", "sample", "export", "import", "inspect", "prepare")
_PLAN_OPTIONS = ("gpus", "topology", "tflops", "max-cp", "max-pp", "show")  # of [plan], for `plan` without the prefix
_TAKE_A_PATH = ("import", "inspect", "prepare")
USAGE_ERROR = 2
INTERRUPTED = 130  # as shells have it


def parse(arguments: list[str]) -> tuple[str, Path | None, Config]:
    """The command, the path that it takes, and its configuration. Raises ConfigError; leaves the program for --help and
    unknown options."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command!r}; {nearest(command, COMMANDS)}")
    path = None
    if command in _TAKE_A_PATH and "--help" not in rest:
        if command == "inspect" and rest[:1] == ["checkpoint"]:
            rest.pop(0)
        if not rest or rest[0].startswith("-"):
            raise ConfigError(f"{command} needs a path: pycomm-train {command} PATH; pycomm-train --help shows all")
        path = Path(rest.pop(0))
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else "default"
    default = load_preset(preset)
    if command == "import" and path is not None:
        from training.hugging_face import read_config

        default = dataclasses.replace(default, name=path.resolve().name, model=read_config(path))
    if command == "plan":
        rest = [f"--plan.{each[2:]}" if each[2:].split("=")[0] in _PLAN_OPTIONS else each for each in rest]
    import tyro  # slow to import, and a wrong command needs none of it

    config = tyro.cli(
        Config, default=default, args=rest, prog=f"pycomm-train {command} {preset}", console_outputs=_is_rank_0()
    )
    return command, path, config


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str]) -> int:
    """The program; returns its exit status. What a user can put right is one line, anything else a traceback."""
    if "RANK" not in os.environ:  # no launcher started this process: it is a job of one rank
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    rank = int(os.environ["RANK"])
    try:
        try:
            command, path, config = parse(arguments)
            _check(command, config)
        except TrainingError as error:
            # No rank knows of another one yet, and hosts may differ in their files: one rank of each host says it.
            common(error, rank if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
            raise
        _do(command, path, config)
        return 0
    except TrainingError as error:
        if error.said_by in (None, rank):
            print(_in_words(error, rank), file=sys.stderr, flush=True)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _in_words(error: TrainingError, rank: int) -> str:
    """With the rank that it is of, where there are others that may not have it."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or error.said_by == 0
    return f"error: {error}" if alone else f"rank {rank}: error: {error}"


def _check(command: str, config: Config) -> None:
    """Refuses what cannot be before torch is loaded or a group is joined."""
    if command not in ("run", "scorecard", "eval", "sample"):
        return
    if config.layout.auto:
        ranges.check(config)
    else:
        resolve_layout(config, int(os.environ["WORLD_SIZE"]))


def _do(command: str, path: Path | None, config: Config) -> None:
    if command == "plan":
        from training import plan_layout

        return plan_layout.plan(config)
    from training import commands

    if command == "inspect" and path is not None:
        return commands.inspect(path)
    if command == "prepare" and path is not None:
        return commands.prepare(config, path)
    import pycomm

    with pycomm.init() as world:
        if config.layout.auto:
            from training import plan_layout

            config = plan_layout.automatic(config, world)
        if command == "run":
            from training.run import run

            return run(config, world)
        if command == "scorecard":
            from training.scorecard import score

            return score(config, world)
        if command == "import" and path is not None:
            return commands.import_(config, world, path)
        return {"eval": commands.evaluate, "sample": commands.sample, "export": commands.export}[command](config, world)


def console() -> int:
    """The entry point of pycomm-train."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
