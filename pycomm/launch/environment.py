"""What each rank is started with: its variables, its command, and the port of the store."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence

from pycomm.errors import InvalidArgument, PycommError
from pycomm.launch.layout import Place
from pycomm.netns import Network


def rank_environment(
    place: Place,
    all_places: Sequence[Place],
    master_port: int,
    run_id: str,
    base: Mapping[str, str],
    network: Network | None = None,
) -> dict[str, str]:
    """The environment of one rank: base, torchrun's variables, and PYCOMM_HOST_ID on an emulated host; with a network,
    the addresses of its host's NICs.

    OMP_NUM_THREADS is the cores divided by the ranks, unless base has it: more threads than cores wait for each other.
    """
    environment = dict(base)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(all_places))))
    environment.setdefault("PYTHONUNBUFFERED", "1")  # a rank that is killed loses no line it printed
    environment.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(len(all_places)),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
        GROUP_RANK=str(place.host_index),
        GROUP_WORLD_SIZE=str(all_places[-1].host_index + 1),
        ROLE_NAME="default",
        ROLE_RANK=str(place.rank),
        ROLE_WORLD_SIZE=str(len(all_places)),
        MASTER_ADDR="127.0.0.1" if network is None else network.store_address(),
        MASTER_PORT=str(master_port),
        TORCHELASTIC_RUN_ID=run_id,
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_USE_AGENT_STORE="False",  # rank 0 serves the store
    )
    if place.host is not None:
        environment["PYCOMM_HOST_ID"] = place.host
        if network is not None:
            environment["PYCOMM_ADDRESS"] = ",".join(network.addresses(place.host))
            environment["GLOO_SOCKET_IFNAME"] = "nic0"  # Gloo would take the address of the machine's name
            environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store warns that these addresses have no names
    return environment


def resolve_command(command: Sequence[str]) -> list[str]:
    """The program to start: `python`, `-m module` and `script.py` run in this interpreter, anything else as it is."""
    if not command:
        raise InvalidArgument("no command given; write it last, as in: pycomm launch --ranks 2 -- python train.py")
    first, *rest = command
    if first in ("python", "python3"):
        return [sys.executable, *rest]
    if first == "-m" or first.endswith(".py"):
        return [sys.executable, *command]
    return list(command)


@contextlib.contextmanager
def reserved_port(port: int = 0) -> Iterator[int]:
    """A port that no one else is given while the context lasts, yet that rank 0's store can listen on.

    The socket is bound but does not listen: the kernel hands the port to nobody who asks for a free one, and a listener
    that sets SO_REUSEADDR, as torch's TCPStore does, may still take it. port 0 means any.
    Raises PycommError where another process listens on the port.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", port))  # every address, as the store binds
        except (OSError, OverflowError) as error:
            raise PycommError(
                f"cannot use port {port} of this machine for the ranks' store: {error}; "
                "leave --master-port out to have a free port chosen"
            ) from error
        yield holder.getsockname()[1]
