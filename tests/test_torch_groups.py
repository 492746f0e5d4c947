"""Groups beside the default one: made, used at once, split, destroyed and made again."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch_ranks import BACKEND, run_torch_ranks


@pytest.fixture(params=["aaaa", "aabb", "abab"], ids=["4 ranks", "2x2", "interleaved"])
def hosts(request):
    return request.param


def sum_of_ranks(group, ranks, numel=1000):
    """An all_reduce of the global rank over a group gives the sum of its members' ranks."""
    x = torch.full((numel,), float(dist.get_rank()))
    dist.all_reduce(x, group=group)
    assert torch.equal(x, torch.full((numel,), float(sum(ranks)))), ranks


def test_new_groups_of_any_ranks(hosts):
    run_torch_ranks(check_new_groups, 4, hosts=hosts)


def check_new_groups(rank, n):
    if rank in (1, 3):
        sum_of_ranks(dist.new_group([1, 3], use_local_synchronization=True), [1, 3])
    subsets = [[0, 1], [1, 3], [0, 2, 3], [2], [3, 0], [0, 1, 2, 3]]
    groups = [dist.new_group(ranks) for ranks in subsets]
    for ranks, group in zip(subsets, groups, strict=True):
        if rank not in ranks:
            assert group is dist.GroupMember.NON_GROUP_MEMBER
            continue
        assert dist.get_world_size(group) == len(ranks)
        assert dist.get_process_group_ranks(group) == sorted(ranks)
        assert dist.get_group_rank(group, rank) == sorted(ranks).index(rank)
        sum_of_ranks(group, ranks)
        root = sorted(ranks)[-1]
        told = torch.full((3,), float(rank))
        dist.broadcast(told, root, group=group)
        assert torch.equal(told, torch.full((3,), float(root)))
        gathered = torch.empty(len(ranks))
        dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)]), group=group)
        assert gathered.tolist() == [float(r) for r in sorted(ranks)]
        dist.barrier(group=group)
    sum_of_ranks(None, range(4))


def test_groups_work_at_once_in_an_order_of_their_own(hosts):
    run_torch_ranks(check_at_once, 4, hosts=hosts)


def check_at_once(rank, n):
    """Every rank is in three groups and issues their collectives, all asynchronous, in an order of its own."""
    subsets = [[0, 1, 2, 3], [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]]
    groups = [dist.group.WORLD]
    for sides in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]):
        made = [dist.new_group(side) for side in sides]
        groups.append(next(g for g, side in zip(made, sides, strict=True) if rank in side))
    order = [0, 1, 2] if rank % 2 else [2, 0, 1]
    for repeat in range(20):
        tensors = [torch.full((1 + 9000 * (repeat % 3),), float(rank + i)) for i in range(3)]
        works = {i: dist.all_reduce(tensors[i], group=groups[i], async_op=True) for i in order}
        for i in (1, 2, 0):
            works[i].wait()
            assert torch.equal(tensors[i], torch.full_like(tensors[i], float(sum(r + i for r in subsets[i]))))


def test_new_subgroups_and_their_enumeration(hosts):
    run_torch_ranks(check_subgroups, 4, hosts=hosts)


def check_subgroups(rank, n):
    mine, groups = dist.new_subgroups(group_size=2)
    assert len(groups) == 2
    sum_of_ranks(mine, [rank // 2 * 2, rank // 2 * 2 + 1])
    mine, groups = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    sum_of_ranks(mine, [rank % 2, rank % 2 + 2])


def test_split_group_of_the_process_group():
    """torch.distributed.split_group asks for an accelerator, Gloo's too; what it calls below does not."""
    run_torch_ranks(check_split, 4, hosts="aabb")


def check_split(rank, n):
    side = [0, 3] if rank in (0, 3) else [1, 2]
    part = dist.group.WORLD.split_group(side, timedelta(seconds=30), None, f"side{side[0]}", "a side")
    x = torch.full((100,), float(rank))
    part.allreduce(x).wait()
    assert torch.equal(x, torch.full((100,), 3.0))
    assert (part.size(), part.rank()) == (2, side.index(rank))


def test_a_device_mesh_has_a_group_per_axis(hosts):
    run_torch_ranks(check_mesh, 4, hosts=hosts)


def check_mesh(rank, n):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sum_of_ranks(mesh.get_group("tp"), [rank // 2 * 2, rank // 2 * 2 + 1])
    sum_of_ranks(mesh.get_group("dp"), [rank % 2, rank % 2 + 2])
    assert list(mesh.get_coordinate()) == [rank // 2, rank % 2]
    flat = mesh["dp", "tp"]._flatten()
    sum_of_ranks(flat.get_group(), range(4))


def test_destroyed_groups_can_be_made_again(hosts):
    run_torch_ranks(check_again, 4, hosts=hosts)


def check_again(rank, n):
    store = dist.distributed_c10d._get_default_store()
    side = dist.new_group([0, 1])
    if rank < 2:
        sum_of_ranks(side, [0, 1])
        dist.destroy_process_group(side)
    sum_of_ranks(None, range(4))
    for generation in range(3):
        dist.destroy_process_group()
        assert not dist.is_initialized()
        dist.init_process_group(BACKEND, store=dist.PrefixStore(f"again{generation}", store), rank=rank, world_size=n)
        sum_of_ranks(None, range(4))
        assert dist.get_backend() == BACKEND


def test_many_groups_are_made_and_used_soon():
    run_torch_ranks(check_many, 4, hosts="aabb")


def check_many(rank, n):
    groups = [dist.new_group([0, 1, 2, 3] if i % 2 else [i // 2 % 2, 2 + i // 2 % 2]) for i in range(24)]
    for i, group in enumerate(groups):
        ranks = [0, 1, 2, 3] if i % 2 else [i // 2 % 2, 2 + i // 2 % 2]
        if rank in ranks:
            sum_of_ranks(group, ranks, numel=10)
