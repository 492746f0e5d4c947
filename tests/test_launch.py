"""`pycomm launch`: what each rank is told, what the terminal shows, and that no rank is left behind, however it ends.

The ranks are small programs without torch. Ranks that must not end by themselves wait for a signal; a test waits for
what they print or for their process to end, never for a time.
"""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys

import pytest
from commands import PYCOMM

from pycomm.errors import InvalidArgument, PycommError
from pycomm.launch import parse_layout, places
from pycomm.launch.environment import rank_environment, reserved_port, resolve_command

LAUNCH = [*PYCOMM, "launch"]
WAITS = "import os, signal; print(os.getpid(), flush=True); signal.pause()"


def heeds_ctrl_c():
    """A shell's background job ignores SIGINT, and so would everything under it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*arguments, **options):
    return subprocess.Popen(
        [*LAUNCH, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=heeds_ctrl_c,
        **options,
    )


def run(*arguments, **options):
    process = start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def start_waiting(n_ranks, *options, program=WAITS):
    """A launch of ranks that wait for a signal, each known by a pidfd once all of them run."""
    process = start("--ranks", str(n_ranks), *options, "--", "python", "-c", program)
    pidfds = [os.pidfd_open(int(process.stdout.readline().split()[-1])) for _ in range(n_ranks)]
    return process, pidfds


def assert_ended(pidfds, within_s=10):
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], within_s)[0], "a rank is still running"
        os.close(pidfd)


def environments(*layout):
    """What each rank finds in its environment, by rank."""
    code, stdout, stderr = run(*layout, "--", "python", "-c", "import json, os; print(json.dumps(dict(os.environ)))")
    assert (code, stderr) == (0, "")
    found = {}
    for line in stdout.splitlines():
        prefix, _, text = line.partition(" ")
        found[int(prefix.strip("[]"))] = json.loads(text)
    return [found[rank] for rank in range(len(found))]


# What each rank is told


def test_one_host_has_torchruns_variables_and_no_label():
    ranks = environments("--ranks", "3")
    assert [e["RANK"] for e in ranks] == ["0", "1", "2"]
    assert [e["LOCAL_RANK"] for e in ranks] == ["0", "1", "2"]
    for e in ranks:
        assert (e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"], e["GROUP_RANK"], e["GROUP_WORLD_SIZE"]) == ("3", "3", "0", "1")
        assert (e["MASTER_ADDR"], e["TORCHELASTIC_RUN_ID"]) == ("127.0.0.1", ranks[0]["TORCHELASTIC_RUN_ID"])
        assert e["MASTER_PORT"] == ranks[0]["MASTER_PORT"]
        assert e.get("PYCOMM_HOST_ID") == os.environ.get("PYCOMM_HOST_ID")


@pytest.mark.parametrize(
    "layout", [("--hosts", "3,1"), ("--hosts", "2", "--ranks-per-host", "2")], ids=["listed", "even"]
)
def test_emulated_hosts_have_labels_and_their_own_local_ranks(layout):
    ranks = environments(*layout)
    ranks_per_host = [3, 1] if "3,1" in layout else [2, 2]
    expected = [(host, local) for host, n_local in enumerate(ranks_per_host) for local in range(n_local)]
    assert [(int(e["GROUP_RANK"]), int(e["LOCAL_RANK"])) for e in ranks] == expected
    assert [e["PYCOMM_HOST_ID"] for e in ranks] == [f"host{host}" for host, _ in expected]
    assert [int(e["LOCAL_WORLD_SIZE"]) for e in ranks] == [ranks_per_host[host] for host, _ in expected]


def test_threads_share_the_cores_unless_the_caller_says_otherwise():
    everyone = places([4])
    cores = len(os.sched_getaffinity(0))
    told = rank_environment(everyone[0], everyone, 1, "run", {})
    assert told["OMP_NUM_THREADS"] == str(max(1, cores // 4))
    assert rank_environment(everyone[0], everyone, 1, "run", {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ((None, None, None), "either --ranks"),
        ((2, "2", None), "either --ranks"),
        ((2, None, 2), "goes with --hosts"),
        ((None, "2", None), "needs --ranks-per-host"),
        ((None, "2,2", 2), "lists the ranks"),
        ((None, "two", 2), "'two'"),
        *(((ranks, None, None), "at least 1 rank") for ranks in (0, -1)),
        *(((None, hosts, None), "at least 1 rank") for hosts in ("2,0", "2,-1")),
        ((None, "2", 0), "at least 1 rank"),
        ((None, "0", 2), "a job a host"),
        ((None, "-1", 2), "a job a host"),
    ],
)
def test_layouts_that_say_nothing_or_two_things_are_refused(arguments, fact):
    with pytest.raises(InvalidArgument, match=fact):
        parse_layout(*arguments)


@pytest.mark.parametrize("ranks_per_host", [[], [0], [2, 0], [-1]])
def test_a_host_without_ranks_is_refused(ranks_per_host):
    with pytest.raises(InvalidArgument, match="at least 1 rank"):
        places(ranks_per_host)


def test_commands_resolve_to_this_interpreter_or_to_themselves():
    assert resolve_command(["python", "a.py", "-x"]) == [sys.executable, "a.py", "-x"]
    assert resolve_command(["a.py", "-x"]) == [sys.executable, "a.py", "-x"]
    assert resolve_command(["-m", "a", "-x"]) == [sys.executable, "-m", "a", "-x"]
    assert resolve_command(["sh", "-c", "true"]) == ["sh", "-c", "true"]
    with pytest.raises(InvalidArgument, match="no command"):
        resolve_command([])


@pytest.mark.parametrize("separator", [[], ["--"]])
@pytest.mark.parametrize("form", ["script", "python script", "-m module"])
def test_a_commands_own_options_reach_it(tmp_path, form, separator):
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:])")
    command = {
        "script": ["program.py"],
        "python script": ["python", "program.py"],
        "-m module": ["-m", "program"],
    }[form]
    code, stdout, stderr = run("--ranks", "1", *separator, *command, "--ranks", "9", "--", "-m", cwd=tmp_path)
    assert (code, stdout, stderr) == (0, "['--ranks', '9', '--', '-m']\n", "")


# What the terminal and the files show


def test_lines_are_prefixed_also_the_last_one_without_an_end():
    program = "import os, sys; sys.stdout.write('one\\ntwo'); sys.stderr.write('10%\\r100%\\n')"
    code, stdout, stderr = run("--ranks", "2", "--", "python", "-c", program)
    assert code == 0
    assert sorted(stdout.splitlines()) == ["[0] one", "[0] two", "[1] one", "[1] two"]
    assert sorted(stderr.splitlines()) == ["[0] 100%", "[1] 100%"]


def test_prefixes_line_up_when_ranks_have_two_digits():
    _, stdout, _ = run("--ranks", "11", "--", "sh", "-c", "echo $RANK")
    assert sorted(stdout.splitlines()) == sorted(f"{f'[{r}]':<4} {r}" for r in range(11))


def test_log_dir_takes_every_ranks_lines_and_the_terminal_the_traceback(tmp_path):
    program = "import os; print('hello'); assert os.environ['RANK'] != '1', 'rank one objects'"
    code, stdout, stderr = run("--ranks", "2", "--log-dir", str(tmp_path / "a/b"), "--", "python", "-c", program)
    assert (code, stdout) == (1, "")
    assert "[1] AssertionError: rank one objects\n" in stderr
    log = (tmp_path / "a/b/rank1.log").read_text()
    assert log.startswith("hello\nTraceback") and log.endswith("AssertionError: rank one objects\n")
    assert (tmp_path / "a/b/rank0.log").read_text() in ("hello\n", "")  # it may have been ended before it came so far


def test_rank0_owns_the_terminal_when_asked():
    """Live progress lines need a terminal; the other ranks stay prefixed."""
    ours, theirs = pty.openpty()
    # One write a line: print() on a terminal writes its parts one by one, and another rank's line may come between.
    program = "import os, sys; sys.stdout.write(f'{os.environ[\"RANK\"]} {sys.stdout.isatty()}\\n')"
    process = subprocess.Popen(
        [*LAUNCH, "--ranks", "2", "--output", "rank0", "--", "python", "-c", program], stdout=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # EIO: the other side is closed
            break
    os.close(ours)
    assert process.wait() == 0
    assert sorted(shown.decode().splitlines()) == ["0 True", "[1] 1 False"]


def test_explain_in_a_job_is_of_that_job_and_said_once():
    command = ("--hosts", "3,1", "--output", "rank0", "--", "-m", "pycomm", "explain")
    code, stdout, stderr = run(*command, "all_reduce", "1MiB")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("all_reduce of 1 MiB on 4 ranks, 2 hosts (host0: 3, host1: 1)\n")
    assert stdout.count("between hosts") == 1 and stdout.count("->") == 1
    code, stdout, stderr = run(*command, "all_reduc", "1MiB")
    assert code != 0 and stdout == "" and "no collective 'all_reduc'" in stderr


def test_output_that_nobody_reads_ends_the_job_quietly():
    process = start("--hosts", "1,1", "--", "sh", "-c", "echo $$; while :; do echo more; done")
    lines = (process.stdout.readline().split() for _ in range(1 << 20))
    pids = {}
    while len(pids) < 2:
        rank, word = next(lines)
        if word != "more":
            pids[rank] = int(word)
    pidfds = [os.pidfd_open(pid) for pid in pids.values()]
    process.stdout.close()
    assert_ended(pidfds)
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


# How it ends


def test_the_cause_is_shown_before_a_consequence_that_came_earlier(tmp_path):
    """Rank 0 loses its peer and has ended of it before rank 2, whose fault it is, gets as far as its own traceback."""
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    program = f"""
import os, select, signal
rank = int(os.environ["RANK"])
if rank == 0:
    open({str(fifo)!r}, "w").write(str(os.getpid()))
    raise RuntimeError("PeerLost: rank 2 is gone")
if rank == 2:
    try:
        select.select([os.pidfd_open(int(open({str(fifo)!r}).read()))], [], [])
    except ProcessLookupError:
        pass  # it has ended already
    raise ValueError("the cause")
signal.pause()
"""
    code, stdout, stderr = run("--ranks", "3", "--", "python", "-c", program)
    lines = stderr.splitlines()
    assert (code, stdout) == (1, "")
    assert lines[0] == "[2] Traceback (most recent call last):"
    assert lines.index("[2] ValueError: the cause") < lines.index("[0] RuntimeError: PeerLost: rank 2 is gone")
    assert lines[-1] == (
        "pycomm launch: rank 2 failed with exit code 1: ValueError: the cause; the other 2 ranks ended with it"
    )


def test_a_consequence_without_a_cause_still_fails_the_job():
    program = "import os, signal; os.environ['RANK'] == '1' or signal.pause(); raise RuntimeError('PeerLost: rank 0')"
    code, _, stderr = run("--ranks", "2", "--", "python", "-c", program)
    assert code == 1
    assert stderr.splitlines()[0] == "[1] Traceback (most recent call last):"
    assert "rank 1 failed with exit code 1: RuntimeError: PeerLost: rank 0; the other rank" in stderr.splitlines()[-1]


def test_a_ranks_exit_code_is_the_launchers_and_its_host_is_named():
    code, _, stderr = run("--hosts", "2,1", "--", "sh", "-c", "test $RANK = 2 && exit 7; sleep 1000")
    assert code == 7
    assert stderr == "pycomm launch: rank 2 (host1) failed with exit code 7; the other 2 ranks ended with it\n"


def test_a_rank_killed_by_a_signal_is_named_and_the_others_end():
    process, pidfds = start_waiting(3)
    signal.pidfd_send_signal(pidfds[1], signal.SIGKILL)
    assert_ended(pidfds)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert stderr.endswith("was ended by SIGKILL; the other 2 ranks ended with it\n")


def test_a_traceback_that_a_rank_survives_is_shown_and_costs_nothing():
    """It logs an exception and goes on: its lines appear before it ends, and it ends well."""
    program = """
import signal, traceback
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
try:
    raise KeyError("logged")
except KeyError:
    traceback.print_exc()
signal.sigwait({signal.SIGTERM})
"""
    process = start("--ranks", "2", "--", "python", "-c", program)
    shown = 0
    while shown < 2:
        shown += "KeyError: 'logged'" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_every_rank_and_give_the_exit_code(number):
    process, pidfds = start_waiting(2)
    process.send_signal(number)
    assert_ended(pidfds)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (stdout, stderr) == ("", f"pycomm launch: ended by {number.name}\n")  # no KeyboardInterrupt of each rank


def test_ranks_that_end_well_when_asked_end_the_job_well():
    program = "import os, signal, sys; signal.signal(15, lambda *_: sys.exit(0)); " + WAITS
    process, pidfds = start_waiting(2, program=program)
    process.terminate()
    assert_ended(pidfds)
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("how", ["grace runs out", "second signal"])
def test_ranks_that_ignore_the_signal_are_killed(how):
    grace_s = "0.2" if how == "grace runs out" else "1000"
    program = (
        "import os, signal; signal.signal(2, signal.SIG_IGN); print(os.getpid(), flush=True)\nwhile 1: signal.pause()"
    )
    process, pidfds = start_waiting(2, "--grace", grace_s, program=program)
    process.send_signal(signal.SIGINT)
    if how == "second signal":
        process.send_signal(signal.SIGTERM)
    assert_ended(pidfds)
    # two signals that arrive together may be delivered in either order
    codes = {128 + signal.SIGINT} | ({128 + signal.SIGTERM} if how == "second signal" else set())
    assert process.wait(timeout=60) in codes


def test_no_rank_survives_a_killed_launcher():
    process, pidfds = start_waiting(3)
    process.kill()
    assert_ended(pidfds)
    process.communicate()


def test_no_child_of_a_rank_survives_the_rank(tmp_path):
    """A data loader's workers, for example. The child says its id; then its rank ends."""
    os.mkfifo(tmp_path / "fifo")
    process = start("--ranks", "1", "--", "sh", "-c", "sleep 1000 & echo $!; read line < fifo", cwd=tmp_path)
    child = os.pidfd_open(int(process.stdout.readline()))
    (tmp_path / "fifo").write_text("end\n")
    assert_ended([child])
    assert process.wait(timeout=60) == 0


# What cannot start


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--ranks", "2", "no-such-program"], "cannot start 'no-such-program' for rank 0: No such file or directory"),
        (["--ranks", "2", "/"], "cannot start '/' for rank 0: Permission denied"),
        (["--ranks", "2"], "no command given"),
        (["--ranks", "0", "true"], "at least 1 rank"),
        (["true"], "either --ranks N"),
        (["--ranks", "1", "--log-dir", "/proc/none", "true"], "/proc/none"),
        *((["--ranks", "1", "--grace", s, "true"], f"--grace is {s}; give") for s in ("nan", "inf", "-1", "1e+300")),
    ],
)
def test_what_cannot_start_is_one_line_and_exit_code_2(arguments, fact):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("pycomm launch: error: ") and fact in stderr


def test_a_port_in_use_is_refused_before_a_rank_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, stdout, stderr = run("--ranks", "2", "--master-port", str(port), "--", "echo", "started")
    assert (code, stdout) == (2, "")
    assert f"cannot use port {port}" in stderr and "leave --master-port out" in stderr
    with pytest.raises(PycommError, match="port 99999"), reserved_port(99999):
        pass


def test_a_reserved_port_is_nobody_elses_but_a_store_can_listen_on_it():
    with reserved_port() as port, reserved_port() as other:
        assert port != other
        with socket.create_server(("", port)) as store:  # sets SO_REUSEADDR, as torch's TCPStore does
            with socket.create_connection(("127.0.0.1", port)):
                store.accept()[0].close()
            with pytest.raises(PycommError, match=f"port {port}"), reserved_port(port):
                pass
