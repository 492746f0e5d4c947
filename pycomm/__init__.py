"""pycomm: communication for distributed training: collectives on CPU memory, planned, proved, explained, never hanging.

    group = pycomm.init()                                    # started by `pycomm launch` or torchrun
    group.all_reduce(x)

    torch.distributed.init_process_group("pycomm")           # or as torch's backend: importing pycomm registers it

Planning (topology, schedule, planners, check, simulate, tuner, explain) needs numpy alone; where torch or the compiled
engine is missing it still imports, and only what needs them raises."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pycomm.discover import Topology
    from pycomm.group import Group, Stats, Work, empty, init
    from pycomm.tuner import costs
    from pycomm.wire import quantise, wire_hook

# Public names and where they live; imported when first used.
_HOMES = {
    "Group": "pycomm.group",
    "Stats": "pycomm.group",
    "Work": "pycomm.group",
    "costs": "pycomm.tuner",
    "empty": "pycomm.group",
    "init": "pycomm.group",
    "Topology": "pycomm.discover",
    "quantise": "pycomm.wire",
    "wire_hook": "pycomm.wire",
}

__all__ = ["Group", "Stats", "Topology", "Work", "__version__", "costs", "empty", "init", "quantise", "wire_hook"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pycomm' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"pycomm.{name} needs torch and the compiled engine, and {error.name} is missing here. Install torch 2.11 "
            "to 2.15, then build pycomm beside it: pip install --no-build-isolation . (docs/install.md)"
        ) from error


def _register_backend() -> None:
    try:
        from pycomm.backend import register
    except ModuleNotFoundError:  # no torch, or the engine is not built
        return
    register()


_register_backend()
