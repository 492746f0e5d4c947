"""TOML presets: files whose tables are the dataclasses of config.py; what one leaves out keeps the default.

Nothing here knows torch or pycomm, so a wrong preset is refused before a process joins a group."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from training.config import Config
from training.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


def load_preset(preset: str) -> Config:
    """The Config of a preset by name, or of the TOML file of that path.

    Raises ConfigError for an unknown preset or key (naming the nearest one), bad TOML, or a value of another type.
    """
    path = Path(preset)
    if path.suffix != ".toml":
        path = PRESETS / f"{preset}.toml"
        if not path.is_file():
            known = sorted(file.stem for file in PRESETS.glob("*.toml"))
            raise ConfigError(f"there is no preset {preset!r}; {nearest(preset, known)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the preset {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    config: Config = _from_table(Config, {"name": path.stem, **table}, str(path), "")
    return config


def to_toml(config: Config) -> str:
    """A preset of the values that are not the defaults."""
    lines: list[str] = []
    tables: list[str] = []
    for key, value in dataclasses.asdict(config).items():
        default = dataclasses.asdict(Config())[key]
        if not isinstance(value, dict):
            lines.append(f"{key} = {_toml(value)}")
        elif changed := {name: each for name, each in value.items() if each != default[name]}:
            tables += ["", f"[{key}]", *(f"{name} = {_toml(each)}" for name, each in changed.items())]
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)  # TOML's strings, numbers and booleans are JSON's


def _from_table(kind: type, table: dict[str, Any], source: str, prefix: str) -> Any:
    types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in types:
            raise ConfigError(f"{source}: unknown key {prefix + key!r}; {nearest(key, list(types), prefix)}")
        values[key] = _checked_value(types[key], value, source, prefix + key)
    return kind(**values)


def _checked_value(expected: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {key!r} is a table, got {value!r}; write [{key}]")
        return _from_table(typing.cast(type, expected), value, source, key + ".")
    if typing.get_origin(expected) is Literal:
        if value not in typing.get_args(expected):
            raise ConfigError(f"{source}: {key!r} is one of {', '.join(typing.get_args(expected))}, got {value!r}")
        return value
    if typing.get_origin(expected) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {key!r} is a table, got {value!r}; write [{key}]")
        of_values = typing.get_args(expected)[1]
        return {name: _checked_value(of_values, each, source, f"{key}.{name}") for name, each in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{source}: {key!r} is a {expected.__name__}, got {value!r}")
    return value


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Of the known names the one that was probably meant, in words, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"the nearest is {prefix + close[0]!r}"
    return f"there are {', '.join(prefix + each for each in known)}"
