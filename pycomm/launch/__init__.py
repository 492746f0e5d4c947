"""Start the ranks of a program on this machine, as one host or as several emulated ones, and end them together.

Each rank gets torchrun's variables, so a program that runs under torchrun runs here unchanged. Emulated hosts differ in
PYCOMM_HOST_ID: the engine shares memory between equal labels and uses TCP between different ones. That is all, on
loopback, unless links are asked for: then each host is a network namespace with NICs of its own (pycomm/netns.py).

No rank outlives the launcher: each leads its own session, which is killed when its rank ends, and the kernel kills the
rank when the launcher itself is killed (PR_SET_PDEATHSIG). The launcher is one thread around one selector.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pycomm.errors import InvalidArgument
from pycomm.launch.environment import rank_environment, reserved_port, resolve_command
from pycomm.launch.job import Job, bind_to_launcher, say, signals
from pycomm.launch.layout import Place, parse_layout, places
from pycomm.launch.seconds import require_seconds
from pycomm.netns import Network, Unavailable, shaped_hosts

__all__ = ["OUTPUTS", "launch", "parse_layout", "places"]

OUTPUTS = ("prefix", "rank0")


def launch(
    command: Sequence[str],
    ranks_per_host: Sequence[int],
    *,
    links: Sequence[Sequence[str]] | None = None,
    output: str = "prefix",
    log_dir: Path | None = None,
    master_port: int = 0,
    grace_s: float = 10.0,
) -> int:
    """Run command once per rank and wait for all of them; call it from the main thread.

    ranks_per_host: ranks of each host, [n_hosts]; with more than one entry the hosts are emulated.
    links: rate of each NIC in tc's notation, [n_hosts][NICs]. Where no namespaces can be made, a warning says so and
    the hosts are labels alone.
    output: "prefix" puts `[rank]` before each line; "rank0" leaves the launcher's own stdout to rank 0, for live
    progress lines, and prefixes the others. log_dir: what would be prefixed goes to log_dir/rank<r>.log instead.
    grace_s: from the signal that ends the job, or the first failure, until what is left gets SIGKILL; 0 to 1e6.

    Returns 0 when every rank did; the exit code of the rank that failed first, 128 + signal where a signal ended it; or
    128 + the signal that ended the launch. Raises InvalidArgument, and PycommError where a rank cannot be started.
    """
    if output not in OUTPUTS:
        raise InvalidArgument(f"output is one of {', '.join(OUTPUTS)}, got {output!r}")
    require_seconds("the grace period", grace_s, or_zero=True)
    all_places = places(ranks_per_host)
    argv = resolve_command(command)
    run_id = uuid.uuid4().hex[:12]
    width = len(f"[{len(all_places) - 1}] ")
    with contextlib.ExitStack() as stack:
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        signals_fd = stack.enter_context(signals())
        network = _shaped(stack, all_places, links) if links is not None else None
        with _on_host(network, all_places[0]):
            port = stack.enter_context(reserved_port(master_port))
        job = Job(grace_s, echo_failure=log_dir is not None)
        stack.callback(job.end)
        before_exec = bind_to_launcher(os.getpid())
        stdout, stderr = sys.stdout.buffer, sys.stderr.buffer
        for place in all_places:
            outputs: list[tuple[IO[bytes] | None, bytes, bool]]
            prefix = f"[{place.rank}]".ljust(width).encode()
            if place.rank == 0 and (output == "rank0" or (len(all_places) == 1 and log_dir is None)):
                outputs = [(None, b"", True), (stderr, b"", True)]
            elif log_dir is not None:
                outputs = [(stack.enter_context(open(log_dir / f"rank{place.rank}.log", "wb")), b"", False)]
            else:
                outputs = [(stdout, prefix, False), (stderr, prefix, False)]
            environment = rank_environment(place, all_places, port, run_id, os.environ, network)
            with _on_host(network, place):
                job.start(argv, environment, place, outputs, before_exec)
        return job.run(signals_fd)


def _shaped(stack: contextlib.ExitStack, all_places: Sequence[Place], links: Sequence[Sequence[str]]) -> Network | None:
    hosts = list(dict.fromkeys(place.host for place in all_places if place.host is not None))
    if len(hosts) != len(links):
        raise InvalidArgument(f"links are given for {len(links)} hosts, there are {len(hosts)} emulated ones")
    try:
        return stack.enter_context(shaped_hosts(hosts, links))
    except (Unavailable, OSError) as error:
        say(f"warning: --link has no effect: {error}. The hosts are labels on loopback, their links are not shaped")
        return None


def _on_host(network: Network | None, place: Place) -> contextlib.AbstractContextManager[None]:
    if network is None or place.host is None:
        return contextlib.nullcontext()
    return network.inside(place.host)
