"""pycomm.distributed is torch.distributed with another default backend: same names, signatures, objects and errors."""

import inspect
from datetime import timedelta

import pytest
import torch
import torch.distributed
from torch_ranks import RanksFailed, run_torch_ranks

import pycomm.distributed as dist

PUBLIC = sorted(name for name in dir(torch.distributed) if not name.startswith("_"))
OURS = {"get_default_backend_for_device", "init_device_mesh", "init_process_group"}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_with_torchs_signature(name):
    theirs, ours = getattr(torch.distributed, name), getattr(dist, name)
    assert name in dist.__all__ and name in dir(dist)
    if name not in OURS:
        assert ours is theirs
    elif callable(theirs):
        assert inspect.signature(ours) == inspect.signature(theirs)


def test_only_what_is_meant_to_differ_does():
    differ = {name for name in PUBLIC if getattr(dist, name) is not getattr(torch.distributed, name)}
    assert differ == OURS


def test_a_name_that_torch_lacks_is_refused():
    with pytest.raises(AttributeError, match="no_such_name"):
        dist.no_such_name  # noqa: B018


def test_the_default_for_cpu_tensors_is_pycomm():
    assert dist.get_default_backend_for_device("cpu") == "pycomm"
    assert dist.get_default_backend_for_device(torch.device("cpu")) == "pycomm"
    assert dist.is_backend_available("pycomm")
    with pytest.raises(ValueError, match="meta"):
        dist.get_default_backend_for_device("meta")


def test_errors_are_torchs():
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        dist.all_reduce(torch.ones(1))
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        dist.split_group(split_ranks=[[0]])
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        dist.monitored_barrier()


def test_groups_made_without_naming_a_backend():
    run_torch_ranks(check_default_backend, 4, hosts="aabb")


def check_default_backend(rank, n):
    store = torch.distributed.distributed_c10d._get_default_store()
    torch.distributed.destroy_process_group()
    dist.init_process_group(store=dist.PrefixStore("ours", store), rank=rank, world_size=n)
    assert dist.get_backend() == "pycomm"
    x = torch.ones(5)
    dist.all_reduce(x)
    torch.distributed.all_reduce(x)
    assert torch.equal(x, torch.full((5,), float(n * n)))
    pair = dist.new_group([0, 1])
    assert rank >= 2 or dist.get_backend(pair) == "pycomm"
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="world size"):
        dist.init_process_group("gloo", rank=0, init_method="tcp://127.0.0.1:1")
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=n)
    assert dist.get_backend() == "gloo"  # who names a backend gets it
    dist.monitored_barrier(timeout=timedelta(seconds=20))


def test_split_group_and_monitored_barrier():
    run_torch_ranks(check_split, 4, hosts="aabb")


def check_split(rank, n):
    for split_ranks in ([[0, 1], [3, 2]], [[1, 3], [0, 2]], [[3, 0]]):
        part = dist.split_group(split_ranks=split_ranks, group_desc="part")
        mine = next((ranks for ranks in split_ranks if rank in ranks), None)
        if mine is None:
            assert part is None
            continue
        assert dist.get_process_group_ranks(part) == sorted(mine)
        x = torch.full((10,), float(rank))
        dist.all_reduce(x, group=part)
        assert torch.equal(x, torch.full((10,), float(sum(mine))))
        if len(split_ranks) == 2:  # a part of a part, in the part's own ranks
            half = dist.split_group(part, [[1], [0]])
            assert dist.get_process_group_ranks(half) == [rank]
    for wrong in (None, [], [[0], []]):
        with pytest.raises(ValueError, match="empty"):
            dist.split_group(split_ranks=wrong)
    dist.monitored_barrier(timeout=timedelta(seconds=20))
    dist.monitored_barrier(dist.new_group(), timeout=timedelta(seconds=20), wait_all_ranks=True)


def test_init_device_mesh_initialises_pycomm():
    run_torch_ranks(check_mesh, 2, hosts="ab")


def check_mesh(rank, n):
    import os

    store = torch.distributed.distributed_c10d._get_default_store()
    torch.distributed.destroy_process_group()
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(server.port))
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=store.get("port").decode(),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    mesh = dist.init_device_mesh("cpu", (n,))
    assert dist.get_backend() == "pycomm" and mesh.size() == n
    x = torch.ones(3)
    dist.all_reduce(x, group=mesh.get_group())
    assert torch.equal(x, torch.full((3,), float(n)))
    dist.destroy_process_group()
    store.set(f"done{rank}", "")
    store.wait([f"done{r}" for r in range(n)])  # rank 0 serves until all are done


def test_a_failed_rank_is_reported_with_its_traceback():
    """The helper that every test here rests on does see failures."""
    with pytest.raises(RanksFailed, match=r"rank 1 of 2: Traceback(?s:.*)ValueError: rank one objects"):
        run_torch_ranks(fail, 2)


def fail(rank, n):
    if rank == 1:
        raise ValueError("rank one objects")
