"""Where each rank stands: on which host, and as which of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pycomm.errors import InvalidArgument


@dataclass(frozen=True)
class Place:
    """Where one rank stands. host is the emulated host's label, None when all ranks share this real one."""

    rank: int
    local_rank: int
    local_world_size: int
    host_index: int
    host: str | None

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" ({self.host})" if self.host else "")


def places(ranks_per_host: Sequence[int]) -> list[Place]:
    """Every rank's place, hosts one after the other. Raises InvalidArgument where a host has no rank."""
    _require_ranks(ranks_per_host)
    result: list[Place] = []
    for host_index, n_local in enumerate(ranks_per_host):
        host = f"host{host_index}" if len(ranks_per_host) > 1 else None
        result += [Place(len(result) + local, local, n_local, host_index, host) for local in range(n_local)]
    return result


def parse_layout(ranks: int | None, hosts: str | None, ranks_per_host: int | None) -> list[int]:
    """Ranks of each host from the options: ranks alone; hosts as a count with ranks_per_host, or as a list, "3,1".

    Raises InvalidArgument for options that do not go together, and where there is no host or one without ranks."""
    found = _parsed(ranks, hosts, ranks_per_host)
    _require_ranks(found)
    return found


def _require_ranks(ranks_per_host: Sequence[int]) -> None:
    if not ranks_per_host or min(ranks_per_host) < 1:
        raise InvalidArgument(
            f"each host needs at least 1 rank, and a job a host, got {list(ranks_per_host)} ranks per host"
        )


def _parsed(ranks: int | None, hosts: str | None, ranks_per_host: int | None) -> list[int]:
    if (ranks is None) == (hosts is None):
        raise InvalidArgument("give either --ranks N, for one host, or --hosts, for emulated ones")
    if ranks is not None:
        if ranks_per_host is not None:
            raise InvalidArgument("--ranks-per-host goes with --hosts, not with --ranks")
        return [ranks]
    assert hosts is not None
    try:
        counts = [int(word) for word in hosts.split(",")]
    except ValueError:
        raise InvalidArgument(f"--hosts takes a count or a list of ranks per host such as 3,1, got {hosts!r}") from None
    if len(counts) > 1:
        if ranks_per_host is not None:
            raise InvalidArgument(f"--hosts {hosts} lists the ranks of each host already; leave --ranks-per-host out")
        return counts
    if ranks_per_host is None:
        raise InvalidArgument(f"--hosts {hosts} needs --ranks-per-host R, or a list of ranks per host such as 2,2")
    return [ranks_per_host] * counts[0]
