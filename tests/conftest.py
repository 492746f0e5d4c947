"""For all tests: no tuning table of the user's own, and nothing that the machine's name service says, bears on them."""

import os

import pytest

os.environ["PYCOMM_TUNE_DIR"] = "/nonexistent"
# torch's store asks for the name of each client's address, and warns where the machine's DNS does not answer.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# What takes longest comes first, so that several tests at a time end together (xdist goes by the tests in a file).
LONGEST = [
    "test_training_matrix.py",
    "test_wire.py",
    "test_group.py",
    "test_training_device.py",
    "test_training_run.py",
    "test_training_compile.py",
    "test_bench.py",
    "test_predict.py",
    "test_tune.py",
    "test_training_memory.py",
    "test_training_plan.py",
    "test_training_parity.py",
    "test_torch_suite.py",
    "test_readme.py",
    "test_training_synchronise.py",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def pycomm_command(capsys):
    """pycomm_command("explain", "all_reduce", ..): (exit code, stdout, stderr) of the command, run in this process: a
    process of its own would spend two seconds on importing torch."""
    from pycomm.cli import main

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
