"""For all tests: no tuning table of the user's own, and nothing that the machine's name service says, bears on them."""

import os

import pytest

os.environ["PYCOMM_TUNE_DIR"] = "/nonexistent"
# torch's store asks for the name of each client's address, and warns where the machine's DNS does not answer.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


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
