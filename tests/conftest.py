"""For all tests: no tuning table of the user's own bears on what is tested."""

import os

import pytest

os.environ["PYCOMM_TUNE_DIR"] = "/nonexistent"


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): pytest-xdist runs these tests in one process")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Where tests run in several processes (make test), those that share a fixture of their module stay together: it is
    made once, and many of their ranks took part in it."""
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture.scope == "module" for of_name in definitions for fixture in of_name):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


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
