"""Collectives with a wire against the numpy oracle, bit for bit, over emulated hosts; ranks are processes."""

import copy
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch_ranks import RanksFailed, run_torch_ranks
from wire_oracle import WIRES, coded_nbytes, expected, round_trip

import pycomm
from pycomm.errors import InvalidArgument, NonfiniteError
from pycomm.overlap import GradientBuckets
from pycomm.planners import PLANNERS
from pycomm.schedule import CODED
from pycomm.topology import Link, Switch, Topology
from pycomm.tuner import candidates, choice_table, choose

LAYOUTS = ("ab", "aabb", "aaabcc", "abcab", "abbc")  # a letter is a rank's host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 0, less than a rank, a block, not multiples of one, beyond a segment of 16,384 values for each rank
SIZES = (0, 1, 5, 128, 1000, 70001, 300000)


def run(fn, hosts, *args, **kwargs):
    return run_ranks(fn, len(hosts), *args, hosts=list(hosts), **kwargs)


def data(kind, numel, rank, seed=0):
    """fp32 values that are hard to code."""
    rng = np.random.default_rng([numel, rank, seed])
    x = rng.standard_normal(numel).astype(np.float32)
    if kind == "outliers":
        x[rng.random(numel) < 0.01] *= np.float32(1e6)
    elif kind == "magnitudes":
        x *= np.exp2(rng.integers(-60, 60, numel)).astype(np.float32)
    elif kind == "subnormal":
        x = (x * np.float32(2.0**-126)).astype(np.float32)
    elif kind == "zeros":
        x[:] = np.where(rng.random(numel) < 0.5, -0.0, 0.0)
    elif kind == "nonfinite":
        x[rng.random(numel) < 0.002] = np.inf
        x[rng.random(numel) < 0.002] = -np.inf
        x[rng.random(numel) < 0.002] = np.nan
    return x


def values(kind, numel, rank, dtype):
    return torch.from_numpy(data(kind, numel, rank)).to(dtype)


def plan(group, collective, nbytes, algorithm=None):
    chosen = algorithm or choose(choice_table(group.topology, collective, 0, coded=group.wire_links), nbytes)
    return PLANNERS[collective][chosen](group.topology, 0)


def same(got, want):
    """Equal bits; of NaNs any."""
    got, want = got.float().numpy(), want.float().numpy()
    return np.array_equal(np.isnan(got), np.isnan(want)) and np.array_equal(
        np.nan_to_num(got).view(np.int32), np.nan_to_num(want).view(np.int32)
    )


def uneven(n, numel):
    return [numel // n * (rank % 3) + (rank == 0) * 3 for rank in range(n)]


def call(group, collective, wire, dtype, numel, kind="normal", op="sum", counts=None, algorithm=None):
    """Runs one collective on data() and returns (what came, what the oracle has). numel: the tensor's, or a piece's.
    counts: of pieces, which are even without."""
    n, me = group.size, group.rank
    options = {"wire": wire, "algorithm": algorithm}
    if collective == "all_to_all":
        counts = [[count + i * 7 for count in counts] if counts else [numel] * n for i in range(n)]
        lengths = [sum(of_rank) for of_rank in counts]
    elif collective == "all_gather":
        lengths = counts or [numel] * n
    else:
        total = numel if collective == "all_reduce" else sum(counts) if counts else numel * n
        lengths = [total] * n
    x = values(kind, lengths[me], me, dtype)
    if collective == "all_reduce":
        schedule = plan(group, collective, numel * 4, algorithm)
        come, cut = [numel] * n, None
        output = group.all_reduce(x, op, **options)
    elif collective == "reduce_scatter":
        come = cut = counts or [numel] * n
        output = torch.full((come[me],), 7.0, dtype=dtype)
        schedule = plan(group, collective, len(x) * 4, algorithm)
        group.reduce_scatter(output, x, op, counts, **options)
    elif collective == "all_gather":
        come, cut = [sum(lengths)] * n, None
        output = torch.full((come[me],), 7.0, dtype=dtype)
        schedule = plan(group, collective, len(output) * 4, algorithm)
        group.all_gather(output, x, counts, **options)
    else:
        even = len({count for row in counts for count in row}) == 1
        come, cut = [sum(row[rank] for row in counts) for rank in range(n)], counts
        output = torch.full((come[me],), 7.0, dtype=dtype)
        schedule = plan(group, collective, len(x) * 4, algorithm or (None if even else "pairwise"))
        group.all_to_all(
            output, x, None if even else [row[me] for row in counts], None if even else counts[me], **options
        )
    # The oracle is slow and knows all ranks: the first runs it, and gives each rank what it should have.
    want = np.empty(sum(come), np.float32)
    if me == 0:
        xs = [values(kind, length, rank, dtype).float().numpy() for rank, length in enumerate(lengths)]
        np.concatenate(expected(schedule, group.topology.sides(group.wire_links), xs, wire, op, cut), out=want)
    group.broadcast(want)
    begin = sum(come[:me])
    return output, torch.from_numpy(want[begin : begin + come[me]]).to(dtype)


def every_wire_and_dtype(group, collective):
    shared = []
    for wire in WIRES:
        for dtype in DTYPES:
            if (wire, dtype) == ("bf16", torch.float16):
                continue
            for numel in SIZES if dtype == torch.float32 else (1000, 70001):
                for counts in (None, uneven(group.size, numel)):
                    if counts is not None and collective == "all_reduce":
                        continue
                    piece = numel if collective == "all_reduce" else numel // group.size
                    got, want = call(group, collective, wire, dtype, piece, counts=counts)
                    assert same(got, want), (wire, dtype, numel, counts)
                    shared.append(got.float().numpy().tobytes())
    return hashlib.sha256(b"".join(shared)).hexdigest() if collective in ("all_reduce", "all_gather") else None


@pytest.mark.parametrize("collective", CODED)
@pytest.mark.parametrize("hosts", LAYOUTS)
def test_every_wire_and_dtype_gives_the_oracles_bits(hosts, collective):
    assert len(set(run(every_wire_and_dtype, hosts, collective))) == 1


def hard_values(group):
    for collective in CODED:
        for wire in WIRES:
            for kind in ("outliers", "magnitudes", "subnormal", "zeros", "nonfinite"):
                got, want = call(group, collective, wire, torch.float32, 3000, kind)
                assert same(got, want), (collective, wire, kind)


@pytest.mark.parametrize("hosts", ["aab", "abc"])
def test_outliers_subnormals_zeros_and_what_is_not_finite(hosts):
    run(hard_values, hosts)


def every_algorithm_and_op(group):
    for collective in CODED:
        for algorithm in candidates(group.topology, collective, coded=group.wire_links):
            for op in ("sum", "avg", "min", "max") if "reduce" in collective else ("sum",):
                got, want = call(group, collective, "int8", torch.float32, 50000, op=op, algorithm=algorithm)
                assert same(got, want), (collective, algorithm, op)


@pytest.mark.parametrize("hosts", ["aabb", "aabcc"])
def test_every_algorithm_that_a_wire_can_run_on_and_every_op(hosts):
    run(every_algorithm_and_op, hosts)


def between_racks(group):
    """Hosts a and b hang from one switch, c and d from another."""
    uplink = Link(1e-4, 1e7)
    hosts = [dataclasses.replace(host, switch="01"[index // 2]) for index, host in enumerate(group.topology.hosts)]
    racks = dataclasses.replace(group.topology, hosts=tuple(hosts), switches=(Switch("0", uplink), Switch("1", uplink)))
    everyone = range(group.size)
    with pytest.raises(InvalidArgument, match="wire_links 'racks', but the topology has no switches"):
        group.new_group(everyone, wire_links="racks")
    with pytest.raises(InvalidArgument, match="wire_links is 'rack'; choose from hosts, racks"):
        group.new_group(everyone, wire_links="rack")
    with group.replan(racks) as planned, planned.new_group(everyone, wire_links="racks") as coded:
        assert (planned.wire_links, coded.wire_links) == ("hosts", "racks")
        with coded.split(0) as child:
            assert child.wire_links == "racks"
        every_algorithm_and_op(coded)
        usable = candidates(racks, "all_reduce", coded="racks")
        assert set(usable) - set(candidates(racks, "all_reduce", coded="hosts"))
        assert "halving_doubling" in coded.explain("all_reduce", 1 << 20, wire="int8")
        x = data("normal", 1 << 16, group.rank)
        sent = {}
        for where in (planned, coded):
            before = where.stats().bytes_between_hosts
            where.all_reduce(x.copy(), wire="int8", algorithm="hierarchical_direct")
            sent[where] = where.stats().bytes_between_hosts - before
        assert sent[planned] < sent[coded]  # what stays in a rack crosses hosts whole
        # A rack by itself has no link of the class.
        with coded.split(int(racks.rack_index[group.rank])) as rack:
            plain = rack.all_reduce(x.copy())
            lost = np.full(1 << 16, 3, np.float32)
            assert rack.all_reduce(x.copy(), wire="int4", wire_residual=lost).tobytes() == plain.tobytes()
            assert not lost.any()
        return losses(coded)


def test_a_wire_between_racks_alone_gives_the_oracles_bits():
    results = run(between_racks, "aabccd")
    total, exact, _ = results[0]
    pending = sum(residual.astype(np.float64) for _, _, residual in results)
    assert np.abs(total + pending - exact).max() < 1e-3


def links_of(group):
    return group.wire_links


def test_the_environment_chooses_the_links_of_a_job(tmp_path):
    racks = Topology.emulated([1, 1], Link(1e-5, 1e9))
    hosts = [dataclasses.replace(host, name=name, switch=name) for host, name in zip(racks.hosts, "ab", strict=True)]
    switches = tuple(Switch(name, Link(1e-4, 1e7)) for name in "ab")
    dataclasses.replace(racks, hosts=tuple(hosts), switches=switches).save(tmp_path / "racks.toml")
    asked = {"PYCOMM_WIRE_LINKS": "racks"}
    topology = {"PYCOMM_TOPOLOGY": str(tmp_path / "racks.toml")}
    assert run(links_of, "ab") == ["hosts"] * 2
    assert run(links_of, "ab", environment=asked | topology) == ["racks"] * 2
    with pytest.raises(RanksFailed, match="PYCOMM_WIRE_LINKS=racks needs a topology with switches"):
        run(links_of, "ab", environment=asked)
    with pytest.raises(RanksFailed, match="PYCOMM_WIRE_LINKS='wan' is none of hosts, racks"):
        run(links_of, "ab", environment={"PYCOMM_WIRE_LINKS": "wan"})


def many_at_once(group):
    xs = [data("normal", 40000 + i, group.rank, i) for i in range(12)]
    works = [group.all_reduce(x, wire=WIRES[i % 4] if i % 5 else None, async_op=True) for i, x in enumerate(xs)]
    for work in works:
        work.wait()
    again = [data("normal", 40000 + i, group.rank, i) for i in range(12)]
    for i, (x, y) in enumerate(zip(xs, again, strict=True)):
        group.all_reduce(y, wire=WIRES[i % 4] if i % 5 else None)
        assert x.tobytes() == y.tobytes()


def test_asynchronous_calls_and_repeats_give_the_same_bits():
    run(many_at_once, "aabc")


def on_one_host(group):
    for wire in WIRES:
        for algorithm in (None, "ring"):
            x = data("magnitudes", 5000, group.rank)
            plain = group.all_reduce(x.copy(), algorithm=algorithm)
            assert group.all_reduce(x.copy(), wire=wire, algorithm=algorithm).tobytes() == plain.tobytes()
            loss = np.full(5000, 3, np.float32)
            group.all_reduce(x.copy(), wire=wire, algorithm=algorithm, wire_residual=loss)
            assert not loss.any()
        half = torch.from_numpy(data("normal", 999, group.rank)).half()
        if wire != "bf16":
            assert torch.equal(group.all_reduce(half.clone(), wire=wire), group.all_reduce(half.clone()))


def test_on_one_host_a_wire_changes_nothing():
    run(on_one_host, "aaa")


def counted(group):
    """Bytes between hosts of an all_reduce of 2^18 values, by wire."""
    sent = {}
    for wire in WIRES:
        before = group.stats().bytes_between_hosts
        group.all_reduce(np.ones(1 << 18, np.float32), wire=wire, algorithm="hierarchical")
        sent[wire] = group.stats().bytes_between_hosts - before
    return sent


def test_stats_count_what_crosses():
    for sent in run(counted, "aabb"):
        for wire in WIRES:
            # Each rank sends one quarter of the tensor to be summed and one that it has summed, and its fingerprint.
            assert sent[wire] == 2 * coded_nbytes(wire, 1 << 16) + 64, wire


def losses(group):
    """Over 20 calls, what was summed, what should have been and what this rank's residual still holds."""
    residual = np.zeros(5000, np.float32)
    total, exact = np.zeros(5000), np.zeros(5000)
    for step in range(20):
        x = data("normal", 5000, group.rank, step)
        for rank in range(group.size):
            exact += data("normal", 5000, rank, step)
        total += group.all_reduce(x + residual, wire="int4", wire_residual=residual)
    return total, exact, residual


@pytest.mark.parametrize("hosts", ["aabb", "abc", "aaabcc"])
def test_with_its_residual_nothing_is_lost_for_good(hosts):
    results = run(losses, hosts)
    total, exact, _ = results[0]
    pending = sum(residual.astype(np.float64) for _, _, residual in results)
    assert np.abs(pending).max() > 0.1
    assert np.abs(total + pending - exact).max() < 1e-3  # fp32 rounding of 20 sums
    assert all(np.array_equal(total, other) for other, _, _ in results)


def raising(group):
    x = np.ones(1000, np.float32)
    group.all_reduce(x.copy(), wire="int8", wire_nonfinite="raise")
    if group.rank == 0:
        x[7] = np.inf
    passed = group.all_reduce(x.copy(), wire="int8")
    assert 1 <= (~np.isfinite(passed)).sum() <= 128
    for wire in ("int8", "bf16"):
        with pytest.raises(NonfiniteError, match="holds NaN or infinity, and wire_nonfinite is 'raise'"):
            group.all_reduce(x.copy(), wire=wire, wire_nonfinite="raise")
        work = group.all_reduce(x.copy(), wire=wire, wire_nonfinite="raise", async_op=True)
        with pytest.raises(NonfiniteError):
            work.wait()
    too_large = torch.full((300,), 60000.0, dtype=torch.float16)
    with pytest.raises(NonfiniteError):
        group.all_reduce(too_large, wire="int8", wire_nonfinite="raise")  # the sum overflows fp16
    assert group.all_reduce(np.ones(3, np.float32))[0] == group.size


@pytest.mark.parametrize("hosts", ["aab", "aa"])
def test_what_is_not_finite_raises_by_choice_and_the_group_goes_on(hosts):
    run(raising, hosts)


def other_wires(group, mine):
    for _ in range(2 * group.size):  # on one host a rank may be told by another's next call
        group.all_reduce(np.ones(100, np.float32), wire=mine[group.rank])


@pytest.mark.parametrize("hosts", ["ab", "aab", "aa"])
@pytest.mark.parametrize("other", [None, "fp8"])
def test_ranks_with_other_wires_hear_of_it(hosts, other):
    with pytest.raises(RanksFailed) as caught:
        run(other_wires, hosts, [other if rank == 0 else "int8" for rank in range(len(hosts))])
    assert str(caught.value).count("CollectiveMismatch: ") >= len(hosts)
    assert "wire int8" in str(caught.value)


def refusals(group):
    x, half = np.ones(8, np.float32), torch.ones(8, dtype=torch.float16)
    for match, wrong in (
        ("'int3' is none of bf16, fp8, int8, int4", lambda: group.all_reduce(x, wire="int3")),
        ("codes float32, bfloat16 and float16, not int64", lambda: group.all_reduce(np.ones(8, np.int64), wire="int8")),
        ("not float64", lambda: group.all_gather(np.ones(8 * group.size), np.ones(8), wire="fp8")),
        ("save no byte", lambda: group.all_reduce(half, wire="bf16")),
        ("error of a product has no bound", lambda: group.all_reduce(x, "product", wire="int8")),
        ("neither pass nor raise", lambda: group.all_reduce(x, wire="int8", wire_nonfinite="skip")),
        ("there is no wire; give one", lambda: group.all_reduce(x, wire_nonfinite="raise")),
        ("there is no wire; give one", lambda: group.all_reduce(x, wire_residual=x.copy())),
        ("must be float32 of x's 8", lambda: group.all_reduce(x, wire="int8", wire_residual=x[:4].copy())),
        ("all_reduce of float32", lambda: group.all_reduce(half, wire="int8", wire_residual=x)),
        ("no meaning for max", lambda: group.all_reduce(x, "max", wire="int8", wire_residual=x.copy())),
        ("With a wire choose from pairwise, ", lambda: group.all_reduce(x, wire="int8", algorithm="doubling")),
        ("unexpected keyword argument 'wire'", lambda: group.broadcast(x, wire="int8")),
    ):
        with pytest.raises(TypeError if "keyword" in match else InvalidArgument, match=match):
            wrong()
    assert group.all_reduce(x)[0] == group.size  # nothing was sent


def test_wrong_arguments_are_refused_before_anything_is_sent():
    run(refusals, "abc")


WIDTHS = (20, 300, 30)


def gradients_of(group, seed):
    """A network and its gradients on this rank's data, flat in the order of its parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)))
    x = torch.randn(8, WIDTHS[0], generator=torch.Generator().manual_seed(100 * seed + group.rank))
    return model, x


def bucketed(group, wire, error_feedback):
    """Sums over 10 steps of what the buckets give and of the exact gradients, and the worst single step's error."""
    model, _ = gradients_of(group, 0)
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=5000, wire=wire, error_feedback=error_feedback)
    n = sum(parameter.numel() for parameter in model.parameters())
    given, exact, worst = torch.zeros(n), torch.zeros(n), 0.0
    for step in range(10):
        _, x = gradients_of(group, step)
        model(x).square().mean().backward()
        buckets.wait()
        coded = torch.cat([buckets.gradient(p).flatten() for p in model.parameters()])
        own = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        plain = torch.cat([gradient.flatten() for gradient in own])
        group.all_reduce(plain)
        given, exact, worst = given + coded, exact + plain, max(worst, float((coded - plain).abs().max()))
    buckets.close()
    return given.numpy(), exact.numpy(), worst


@pytest.mark.parametrize("wire", ["int8", "int4", "fp8"])
def test_buckets_with_error_feedback_lose_no_more_in_ten_steps_than_in_one(wire):
    fed = run(bucketed, "aab", wire, True)
    given, exact, worst = fed[0]
    assert all(np.array_equal(given, other) for other, _, _ in fed)
    assert 0 < worst < 1
    assert np.abs(given - exact).max() < 2.5 * worst  # what the last step lost is all that is missing
    without, exact, _ = run(bucketed, "aab", wire, False)[0]
    assert np.linalg.norm(given - exact) < 0.7 * np.linalg.norm(without - exact)


def ddp_hook(rank, n, wire, error_feedback):
    """As bucketed(), through DistributedDataParallel."""
    group = dist.group.WORLD
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)))
    alone = copy.deepcopy(model)
    ddp = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.005)
    ddp.register_comm_hook(group, pycomm.wire_hook(wire, error_feedback=error_feedback))
    size = sum(parameter.numel() for parameter in model.parameters())
    given, exact = torch.zeros(size), torch.zeros(size)
    for step in range(10):
        x = torch.randn(8, WIDTHS[0], generator=torch.Generator().manual_seed(100 * step + rank))
        ddp(x).square().mean().backward()
        given += torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        own = torch.cat([g.flatten() for g in torch.autograd.grad(alone(x).square().mean(), list(alone.parameters()))])
        dist.all_reduce(own, dist.ReduceOp.AVG)
        exact += own
    return given.numpy(), exact.numpy()


def test_a_ddp_hook_trains_with_a_wire():
    fed = run_torch_ranks(ddp_hook, 3, "int4", True, hosts=list("aab"))
    assert all(np.array_equal(given, fed[0][0]) for given, _ in fed)
    error = np.linalg.norm(fed[0][0] - fed[0][1])
    without = run_torch_ranks(ddp_hook, 3, "int4", False, hosts=list("aab"))
    assert 0 < error < 0.7 * np.linalg.norm(without[0][0] - without[0][1])


def test_a_hook_of_an_unknown_wire_is_refused():
    with pytest.raises(InvalidArgument, match="'int3' is none of bf16, fp8, int8, int4"):
        pycomm.wire_hook("int3")


def test_buckets_that_cannot_feed_back_are_refused():
    class Two:
        size = 2

    parameters = list(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(InvalidArgument, match=r"float32 buckets.*error_feedback=False"):
        GradientBuckets(parameters, Two(), wire="int8", dtype=torch.bfloat16)
    with pytest.raises(InvalidArgument, match=r"got torch\.float32 and max"):
        GradientBuckets(parameters, Two(), wire="int8", op="max")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", ["normal", "outliers", "magnitudes", "subnormal", "zeros", "nonfinite"])
def test_quantise_is_the_oracles_round_trip(wire, kind):
    for numel in (0, 1, 129, 20000):
        x = data(kind, numel, 0)
        assert same(torch.from_numpy(pycomm.quantise(x, wire)), torch.from_numpy(round_trip(x, wire)))
        as_half = torch.from_numpy(x).bfloat16().reshape(1, -1)
        got = pycomm.quantise(as_half, wire)
        assert got.dtype == torch.bfloat16 and got.shape == as_half.shape
        assert same(got.flatten(), torch.from_numpy(round_trip(as_half.flatten().float().numpy(), wire)).bfloat16())
    with pytest.raises(InvalidArgument, match="not int64"):
        pycomm.quantise(np.ones(3, np.int64), wire)
