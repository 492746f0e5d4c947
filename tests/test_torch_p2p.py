"""send, recv and their kin on CPU tensors: tags, any source, many in flight, both directions at once."""

import pytest
import torch
import torch.distributed as dist
from torch_ranks import run_torch_ranks


@pytest.fixture(params=["aa", "ab", "aabb"], ids=["2 ranks", "2 hosts", "2x2"])
def hosts(request):
    return request.param


def numbered(numel, salt, dtype=torch.float32):
    return ((torch.arange(numel) * 3 + salt) % 100).to(dtype)


def test_every_dtype_and_size_arrives(hosts):
    run_torch_ranks(check_ring, len(hosts), hosts=hosts)


def check_ring(rank, n):
    """Each rank sends to the next, even ranks first, so that no send needs to be buffered."""
    following, previous = (rank + 1) % n, (rank - 1) % n
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.complex64):
        for numel in (0, 1, 1000, 300_001):
            received = torch.empty(numel, dtype=dtype)
            mine = numbered(numel, rank, dtype)
            if rank % 2 == 0:
                dist.send(mine, following)
                assert dist.recv(received, previous) == previous
            else:
                assert dist.recv(received, previous) == previous
                dist.send(mine, following)
            assert torch.equal(received, numbered(numel, previous, dtype)), (dtype, numel)


def test_tags_match_whatever_the_order(hosts):
    run_torch_ranks(check_tags, len(hosts), hosts=hosts)


def check_tags(rank, n):
    """Sent as 0, 1, 2, 3; received as 3, 1, 0, 2."""
    if rank == 0:
        for work in [dist.isend(numbered(1000 + tag, tag), n - 1, tag=tag) for tag in range(4)]:
            work.wait()
    elif rank == n - 1:
        received = {tag: torch.empty(1000 + tag) for tag in (3, 1, 0, 2)}
        for work in [dist.irecv(x, 0, tag=tag) for tag, x in received.items()]:
            work.wait()
        for tag, x in received.items():
            assert torch.equal(x, numbered(1000 + tag, tag)), tag


def test_messages_of_one_tag_keep_their_order(hosts):
    run_torch_ranks(check_order, len(hosts), hosts=hosts)


def check_order(rank, n):
    if rank == 0:
        works = [dist.isend(numbered(50 + i, i), n - 1, tag=7) for i in range(40)]
        for work in works:
            work.wait()
    elif rank == n - 1:
        for i in range(40):
            x = torch.empty(50 + i)
            dist.recv(x, 0, tag=7)
            assert torch.equal(x, numbered(50 + i, i)), i


def test_receiving_from_any_source(hosts):
    run_torch_ranks(check_any_source, len(hosts), hosts=hosts)


def check_any_source(rank, n):
    if rank == 0:
        found = []
        for _ in range(n - 1):
            x = torch.empty(100)
            source = dist.recv(x, tag=3)
            assert torch.equal(x, numbered(100, source)), source
            found.append(source)
        assert sorted(found) == list(range(1, n))
        x = torch.empty(5)
        work = dist.irecv(x)
        work.wait()
        assert torch.equal(x, numbered(5, 55)) and work._source_rank() == n - 1
    else:
        dist.send(numbered(100, rank), 0, tag=3)
    if rank == n - 1:
        dist.send(numbered(5, 55), 0)  # tag 0: not taken for one of those above


def test_all_pairs_at_once(hosts):
    run_torch_ranks(check_pairs, len(hosts), hosts=hosts)


def check_pairs(rank, n):
    others = [r for r in range(n) if r != rank]
    received = {r: torch.empty(70_000 + r) for r in others}
    works = [dist.isend(numbered(70_000 + rank, 10 * rank + r), r) for r in others]
    works += [dist.irecv(x, r) for r, x in received.items()]
    for work in reversed(works):
        work.wait()
    for r, x in received.items():
        assert torch.equal(x, numbered(70_000 + r, 10 * r + rank))

    received = {r: torch.empty(9) for r in others}
    operations = [dist.P2POp(dist.irecv, x, r) for r, x in received.items()]
    operations += [dist.P2POp(dist.isend, numbered(9, rank + 20), r) for r in others]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for r, x in received.items():
        assert torch.equal(x, numbered(9, r + 20))


def test_beside_collectives_and_on_subgroups(hosts):
    run_torch_ranks(check_beside_collectives, len(hosts), hosts=hosts)


def check_beside_collectives(rank, n):
    """Point-to-point and collectives of two groups are in flight together."""
    edge = dist.new_group([0, n - 1])
    total = torch.full((100_000,), float(rank))
    all_reduce = dist.all_reduce(total, async_op=True)
    if rank in (0, n - 1):
        x = torch.empty(1000)
        pair = [
            dist.isend(numbered(1000, rank), n - 1 - rank, group=edge),
            dist.irecv(x, n - 1 - rank, group=edge),
        ]
        for work in pair:
            work.wait()
        assert torch.equal(x, numbered(1000, n - 1 - rank))
        with_group_ranks = torch.empty(3)
        if rank == 0:
            dist.send(numbered(3, 1), group=edge, group_dst=1)
        else:
            dist.recv(with_group_ranks, group=edge, group_src=0)
            assert torch.equal(with_group_ranks, numbered(3, 1))
    all_reduce.wait()
    assert torch.equal(total, torch.full((100_000,), float(sum(range(n)))))
