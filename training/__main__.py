"""python -m training run [preset] [--model.n-layers 6 ...]: train, or resume, or show a finished run.
python -m training sample [preset] [--sample.prompt "class " ...]: text from the run's newest checkpoint.

preset is a name in training/presets or a .toml file; "default" when left out. One process is one rank: start several
with `pycomm launch --hosts 2 --ranks-per-host 2 -- python -m training run`.
"""

from __future__ import annotations

import os
import sys

import tyro

from training.config import Config, load_preset, resolve_layout
from training.errors import ConfigError, TrainingError

COMMANDS = ("run", "sample")
USAGE_ERROR = 2
INTERRUPTED = 130  # as shells have it


def parse(arguments: list[str]) -> tuple[str, Config]:
    """The command and its configuration. Raises ConfigError; leaves the program for --help and unknown options."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command!r}; there are {' and '.join(COMMANDS)}")
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else "default"
    return command, tyro.cli(
        Config,
        default=load_preset(preset),
        args=rest,
        prog=f"python -m training {command} {preset}",
        console_outputs=_is_rank_0(),
    )


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str]) -> int:
    """The program; returns its exit status. What a user can put right is one line, anything else a traceback."""
    if "RANK" not in os.environ:  # no launcher started this process: it is a job of one rank
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        command, config = parse(arguments)
        resolve_layout(config, int(os.environ["WORLD_SIZE"]))  # refused before torch is loaded or a group is joined
        import pycomm
        from training import run

        with pycomm.init() as world:
            {"run": run.run, "sample": run.sample}[command](config, world)
        return 0
    except TrainingError as error:
        if _is_rank_0():
            print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
