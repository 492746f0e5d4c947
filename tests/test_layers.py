"""Who may import whom (docs/design.md, section 2), held by walking Python's imports and C++'s includes.

The checker is itself tested on small trees that break each rule."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports what stands in an earlier row; modules of one row do not know each other. Every module has a row.
PYTHON_ROWS = [
    ["errors"],
    ["hosts"],
    ["topology_file"],
    ["topology"],
    ["schedule"],
    ["planners", "calls"],
    ["traffic"],
    ["fairness"],
    ["check", "project", "simulate", "predict", "table", "pairs"],
    ["own"],
    ["tuner"],
    ["explain"],
    ["plot", "device_choice"],
    ["qdisc"],
    ["machine", "gpus"],
    ["discover"],
    ["planning"],
    ["agreement"],
    ["group"],
    ["devices"],
    ["backend", "distributed", "overlap", "moe", "measure", "timing", "wire"],
    ["netns"],
    ["launch"],
    ["tune_devices"],
    ["tune"],
    ["topo"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
ROW = {module: row for row, modules in enumerate(PYTHON_ROWS) for module in modules}
NUMPY_ALONE = ROW["explain"]  # up to here: no torch, no extension, no clock, no environment
PUBLIC = {"errors", "moe", "overlap"}  # the modules that the trainer may name beside `import pycomm`
CLOCK_AND_ENVIRONMENT = {"datetime", "os", "platform", "socket", "subprocess", "time"}

CPP_LAYERS = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "cpu", "cuda", "torch"},
}
# Which layers may include <...> headers of a kind.
CPP_SYSTEM = [
    ("torch", re.compile(r"(torch|c10|ATen|pybind11)/|Python\.h"), {"torch"}),
    ("CUDA", re.compile(r"cuda|cooperative_groups"), {"cuda"}),
    ("NCCL's own", re.compile(r"nccl"), set()),  # opened at run time, by our own declarations
    ("sockets", re.compile(r"sys/(socket|un|epoll|uio)\.h|netinet/|arpa/|netdb\.h|poll\.h"), {"cpu", "torch"}),
]


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import that runs, also inside functions. `from a import b` is a.b."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*parents, *([child.module] if child.module else [])])
                yield from ((child.lineno, f"{base}.{alias.name}") for alias in child.names)
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def python_violations(root: Path) -> list[str]:
    found = []
    modules = {"_C"} | {path.name.split(".")[0] for path in (root / "pycomm").iterdir()}
    for path in sorted((root / "pycomm").rglob("*.py")):
        inside = path.relative_to(root / "pycomm")
        own = inside.parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the façade: it hands out what the modules define
        where = path.relative_to(root)
        if own not in ROW:
            found.append(f"{where}: '{own}' has no row in tests/test_layers.py; say there what it may import")
            continue
        for line, name in imports(path, ".".join(["pycomm", *inside.parent.parts])):
            top, *rest = name.split(".")
            target = rest[0] if rest and rest[0] in modules else ""
            if top == "training":
                found.append(f"{where}:{line}: imports {name}; the library does not know the trainer")
            elif top == "pycomm" and target == "_C":
                if ROW[own] <= NUMPY_ALONE:
                    found.append(f"{where}:{line}: imports {name}; up to explain, numpy alone")
            elif top == "pycomm" and not target:
                if ROW[own] <= ROW["group"]:
                    found.append(f"{where}:{line}: imports {name} from the package, which imports '{own}'")
            elif top == "pycomm":
                if target != own and ROW.get(target, -1) >= ROW[own]:
                    found.append(f"{where}:{line}: '{own}' imports '{target}', which stands beside or above it")
            elif ROW[own] <= NUMPY_ALONE:
                if top not in sys.stdlib_module_names and top != "numpy":
                    found.append(f"{where}:{line}: imports {name}; up to explain, numpy alone")
                elif top in CLOCK_AND_ENVIRONMENT:
                    found.append(f"{where}:{line}: imports {name}; up to explain, no clock and no environment")
    for path in sorted((root / "training").rglob("*.py")):
        where = path.relative_to(root)
        for line, name in imports(path, ".".join(path.relative_to(root).parent.parts)):
            if name.startswith("pycomm.") and name.split(".")[1] not in PUBLIC:
                found.append(f"{where}:{line}: imports {name}; the trainer sees pycomm and its {sorted(PUBLIC)}")
            if name.startswith("torch.distributed"):
                found.append(f"{where}:{line}: imports {name}; the trainer communicates through pycomm alone")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                found.append(f"{where}:{node.lineno}: uses torch.distributed; it communicates through pycomm alone")
    return found


def cpp_violations(root: Path) -> list[str]:
    found = []
    csrc = root / "csrc"
    extension_headers = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cc", ".cu", ".cuh", ".inc"}):
        where = path.relative_to(root)
        layer = path.relative_to(csrc).parts[0]
        if layer not in CPP_LAYERS:
            found.append(f"{where}: '{layer}' is no layer; there are {', '.join(CPP_LAYERS)}")
            continue
        for line, text in enumerate(path.read_text().splitlines(), 1):
            if not (match := re.match(r'\s*#\s*include\s*([<"])([^>"]+)', text)):
                continue
            kind, header = match.groups()
            if header == "torch/extension.h":
                extension_headers.append(str(where))
            if kind == '"':
                if header.split("/")[0] not in CPP_LAYERS[layer]:
                    found.append(f'{where}:{line}: {layer} includes "{header}"')
                elif not (csrc / header).is_file():
                    found.append(f'{where}:{line}: "{header}" is not a path from csrc/')
                continue
            for name, pattern, allowed in CPP_SYSTEM:
                if pattern.match(header) and layer not in allowed:
                    found.append(f"{where}:{line}: {layer} includes <{header}>, one of {name} headers")
    if len(extension_headers) > 1:
        found.append(f"torch/extension.h, a minute to compile, is included by {', '.join(extension_headers)}")
    return found


def test_python_imports_point_one_way() -> None:
    assert python_violations(ROOT) == []


def test_cpp_includes_point_one_way() -> None:
    assert cpp_violations(ROOT) == []


GOOD = {
    "pycomm/__init__.py": "from pycomm.group import Group\nfrom pycomm import moe",
    "pycomm/errors.py": "",
    "pycomm/schedule.py": "import math\nimport numpy as np\nfrom pycomm.errors import ScheduleError",
    "pycomm/planners/__init__.py": "from pycomm.planners import ring\nfrom pycomm.schedule import Schedule",
    "pycomm/planners/ring.py": "from . import shapes\nfrom pycomm import schedule",
    "pycomm/planners/shapes.py": "from ..schedule import Schedule",
    "pycomm/group.py": "import os\nimport torch\nfrom pycomm import _C\nfrom pycomm.planners import PLANNERS",
    "pycomm/moe.py": "import pycomm\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pycomm.cli import x",
    "pycomm/cli.py": "def run():\n    from pycomm import group",
    "training/run.py": "import torch\nimport pycomm\nfrom pycomm.moe import x\nfrom training import model",
    "csrc/core/a.h": "#include <vector>",
    "csrc/cpu/b.cc": '#include <sys/socket.h>\n#include "core/a.h"',
    "csrc/cuda/c.cu": '#include <cuda_runtime.h>\n#include "core/a.h"',
    "csrc/torch/d.cc": '#include <torch/extension.h>\n#include "core/a.h"\n#include "cuda/c.cu"',
}


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    root = tree(tmp_path, GOOD)
    assert python_violations(root) == []
    assert cpp_violations(root) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("pycomm/schedule.py", "from pycomm.planners import ring", "schedule.py:1: 'schedule' imports 'planners'"),
        ("pycomm/schedule.py", "def f():\n  from pycomm import group", "schedule.py:2: 'schedule' imports 'group'"),
        ("pycomm/planners/ring.py", "from .. import group", "ring.py:1: 'planners' imports 'group'"),
        ("pycomm/moe.py", "import pycomm.overlap", "moe.py:1: 'moe' imports 'overlap'"),
        ("pycomm/overlap.py", "from pycomm.moe import x", "overlap.py:1: 'overlap' imports 'moe'"),
        ("pycomm/schedule.py", "import torch", "numpy alone"),
        ("pycomm/schedule.py", "from pycomm import _C", "numpy alone"),
        ("pycomm/schedule.py", "import time", "no clock"),
        ("pycomm/schedule.py", "from os import environ", "no environment"),
        ("pycomm/schedule.py", "import pycomm", "which imports 'schedule'"),
        ("pycomm/group.py", "import training.run", "does not know the trainer"),
        ("pycomm/new.py", "", "has no row"),
        ("training/run.py", "from pycomm.group import x", "the trainer sees pycomm and its"),
        ("training/run.py", "import torch.distributed as dist", "through pycomm alone"),
        ("training/run.py", "import torch\ntorch.distributed.barrier()", "run.py:2: uses torch.distributed"),
        ("csrc/core/x.h", '#include "cpu/b.cc"', 'x.h:1: core includes "cpu/b.cc"'),
        ("csrc/cpu/x.cc", '#include "cuda/c.cu"', 'cpu includes "cuda/c.cu"'),
        ("csrc/cuda/x.cu", "#include <torch/all.h>", "cuda includes <torch/all.h>, one of torch headers"),
        ("csrc/cuda/x.cu", "# include <nccl.h>", "one of NCCL's own headers"),
        ("csrc/cpu/x.cc", "#include <cuda_runtime_api.h>", "one of CUDA headers"),
        ("csrc/core/x.cc", "#include <netinet/in.h>", "one of sockets headers"),
        ("csrc/cpu/x.cc", "#include <pybind11/pybind11.h>", "one of torch headers"),
        ("csrc/core/x.cc", '#include "core/gone.h"', "not a path from csrc/"),
        ("csrc/core/x.cc", '#include "a.h"', 'core includes "a.h"'),
        ("csrc/extra/x.cc", "", "'extra' is no layer"),
        ("csrc/torch/x.cc", "#include <torch/extension.h>", "is included by csrc/torch/d.cc, csrc/torch/x.cc"),
    ],
)
def test_each_broken_rule_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    root = tree(tmp_path, GOOD | {"pycomm/overlap.py": "", file: text})
    found = python_violations(root) + cpp_violations(root)
    assert len(found) == 1
    assert message in found[0]
