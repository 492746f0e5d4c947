"""Collectives on arrays of other libraries: DLPack on the host; __cuda_array_interface__ and DLPack on a device (host
memory over a fake NCCL here) on the arrays' own stream."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_nccl import build
from spawn import run_ranks

from pycomm import _C
from pycomm.calls import CALL_PLANNERS
from pycomm.errors import InvalidArgument, PeerTimeout
from pycomm.planners import PLANNERS
from pycomm.table import Times, TuningTable
from pycomm.tune import report, tune
from pycomm.tune_devices import DEVICE_SIZES, Device, tune_devices


class OnHost:
    """An array that has nothing but DLPack; of an older library, which takes no arguments but `stream`."""

    def __init__(self, array: Any, older: bool = False) -> None:
        self.array = array
        self.older = older

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        if self.older and options:
            raise TypeError("unexpected keyword argument")
        return self.array.__dlpack__(**options)


class OnDevice:
    """An array as CuPy's, by __cuda_array_interface__."""

    def __init__(self, array: Any, stream: int | None = None, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            "strides": None if array.flags.c_contiguous else array.strides,
            "stream": stream,
            **changes,
        }


class OnDeviceByDlpack(OnHost):
    device = 0
    asked: tuple[Any, ...] = ()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device)

    def __dlpack__(self, stream: Any = None, **options: Any) -> Any:
        self.asked += (stream,)
        return super().__dlpack__(**options)


def test_dlpack_on_the_host_is_read_and_written_in_place() -> None:
    run_ranks(_on_host, 2)


def _on_host(group: Any) -> None:
    for older in (False, True):
        x = torch.full((3, 5), float(group.rank + 1), dtype=torch.bfloat16)
        assert group.all_reduce(given := OnHost(x, older)) is given
        assert x.unique().tolist() == [3.0]
        whole, mine = torch.zeros(6, dtype=torch.int64), np.full(3, group.rank, np.int64)
        work = group.all_gather(OnHost(whole, older), OnHost(mine), async_op=True)
        work.wait()
        assert whole.tolist() == [0, 0, 0, 1, 1, 1]
    fixed = np.ones(4)
    fixed.flags.writeable = False
    with pytest.raises(InvalidArgument, match=r"read-only|readonly"):
        group.all_reduce(OnHost(fixed))
    with pytest.raises(InvalidArgument, match=r"not C-contiguous; copy it, with ascontiguousarray\(\)"):
        group.all_reduce(OnHost(torch.ones(4, 4).t()[:2]))
    with pytest.raises(
        InvalidArgument, match=r"takes a torch tensor, a numpy array, or one with .*, got <class 'list'>"
    ):
        group.all_reduce([1.0])
    odd_class = type("Odd", (OnHost,), {"__dlpack_device__": lambda self: (7, 0)})
    with pytest.raises(InvalidArgument, match="device of DLPack's type 7"):
        group.all_reduce(odd_class(torch.ones(3)))


def test_arrays_on_a_device_take_nccl_in_the_order_of_their_stream() -> None:
    library = str(build())
    variables = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library, "PYCOMM_CUDA_HIERARCHICAL_BYTES": "64"}
    run_ranks(_on_device, 4, hosts=["a", "b", "a", "b"], environment=variables)


def _on_device(group: Any) -> None:
    fake = ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"])
    fake.fake_device_delay(300)
    fake.fake_device_new_stream.restype = ctypes.c_void_p
    stream = fake.fake_device_new_stream()

    def synchronize() -> None:
        fake.fake_device_synchronize(ctypes.c_void_p(stream))

    # What was put on the stream comes first, and what is put on it next comes after; nobody waits in between.
    x = np.zeros(1000, np.uint8)
    for _ in range(5):
        fake.fake_device_fill(ctypes.c_void_p(stream), ctypes.c_void_p(x.ctypes.data), group.rank + 1, x.nbytes)
        group.all_reduce(OnDevice(x, stream), op="max")
        group.all_reduce(OnDevice(x, stream), op="sum")
        synchronize()
        assert (x == 16).all()
    for numel in (0, 1, 7, 40000):
        _every_collective(group, numel, stream, synchronize)
        # Ranks of a host side by side, so that what crosses hosts goes in one piece each.
        side_by_side = group.new_group([0, 2, 1, 3])
        _every_collective(side_by_side, numel, stream, synchronize)
        side_by_side.close()
    # Messages; async; DLPack, on the host's own stream here.
    given = np.full(300, group.rank, np.int32)
    if group.rank < 2:
        peer = 1 - group.rank
        work = group.send(OnDevice(given, stream), peer, async_op=True)
        assert group.recv(OnDevice(got := np.zeros_like(given), stream), peer) == peer
        synchronize()
        work.wait()
        assert (got == peer).all()
    y = torch.ones(3, dtype=torch.float16)
    work = group.all_reduce(by_dlpack := OnDeviceByDlpack(y), async_op=True)
    work.wait()
    assert y.tolist() == [4.0] * 3 and by_dlpack.asked[-1] == 1
    _refusals(group, stream, fake)
    _rows_by_index()
    group.barrier()
    synchronize()
    fake.fake_device_free_stream(ctypes.c_void_p(stream))


def test_wait_without_a_limit_makes_the_stream_wait_and_not_the_host() -> None:
    library = str(build())
    run_ranks(_streams_wait, 2, environment={"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library})


def _streams_wait(group: Any) -> None:
    fake = ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"])
    fake.fake_device_new_stream.restype = ctypes.c_void_p
    stream = fake.fake_device_new_stream()
    x, given = np.ones(1000, np.float32), np.full(50, group.rank, np.int32)
    others = [np.zeros(50, np.int32) for _ in range(2)]
    group.all_reduce(OnDevice(x, stream))  # the ranks meet
    group.exchange([(OnDevice(given), 1 - group.rank)], [(OnDevice(others[0]), 1 - group.rank)])
    word = np.zeros(1)
    if group.rank == 1:  # begins once rank 0 has come through all its waits
        group.recv(word, 0)
    works = [
        group.all_reduce(OnDevice(x, stream), async_op=True),
        group.exchange(
            [(OnDevice(given, stream), 1 - group.rank)], [(OnDevice(others[1], stream), 1 - group.rank)], async_op=True
        ),
    ]
    for work in works:
        work.wait()
    if group.rank == 0:
        assert not any(work.is_completed() for work in works)
        with pytest.raises(PeerTimeout, match="not done within 10 ms; it goes on"):
            works[0].wait(timeout_s=0.01)
        group.send(word, 1)
    fake.fake_device_synchronize(ctypes.c_void_p(stream))  # behind what was waited for
    assert (x == 4).all() and all((other == 1 - group.rank).all() for other in others)
    works[0].wait(timeout_s=20)
    with pytest.raises(InvalidArgument, match="one array is on cpu, another on cuda:0"):
        group.exchange([(OnDevice(x, stream), 1 - group.rank)], [(x, 1 - group.rank)])
    with pytest.raises(InvalidArgument, match="cannot exchange with rank 2"):
        group.exchange([(x, 2)])
    # The host's memory: the same call.
    host = np.zeros(50, np.int32)
    group.exchange([(given, 1 - group.rank)], [(host, 1 - group.rank)], tag=7)
    assert (host == 1 - group.rank).all()
    work = group.exchange([(given, 1 - group.rank)], [(others[0], 1 - group.rank)], async_op=True)
    work.wait(timeout_s=20)
    assert work.is_completed() and (others[0] == 1 - group.rank).all()
    group.barrier()
    fake.fake_device_free_stream(ctypes.c_void_p(stream))


def test_what_is_measured_on_devices_decides_in_the_next_job(tmp_path: Path) -> None:
    library = str(build())
    variables = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library, "PYCOMM_TUNE_FILE": ""}
    hosts = ["a", "b", "a", "b"]
    tables = run_ranks(_tuned, 4, hosts=hosts, environment=variables)
    table = tables[0]
    assert all(other == table for other in tables[1:])
    assert [(one.collective, one.algorithm) for one in table.device_times] == [
        (collective, way) for collective in CALL_PLANNERS for way in ("native", "hierarchical")
    ]
    assert all(one.points[0][0] == DEVICE_SIZES[0] for one in table.device_times)
    for said in (report(table), report(dataclasses.replace(table, times=()))):  # a slow host has time for no size
        assert "on devices:" in said
    assert said.count("(0 of 8 sizes measured)") == len(PLANNERS)
    # Made up, so that what is chosen is known: hierarchical from 1 MiB on, by far.
    sizes = (1 << 16, 1 << 22)
    times = {"native": (1e-5, 1e-3), "hierarchical": (1e-4, 1e-4)}
    made = [Times("all_reduce", way, tuple(zip(sizes, seconds, strict=True))) for way, seconds in times.items()]
    path = tmp_path / "table.json"
    dataclasses.replace(table, device_times=tuple(made)).save(path)
    variables |= {"PYCOMM_TUNE_FILE": str(path), "PYCOMM_EXPLAIN": "1"}
    run_ranks(_takes_what_won, 4, hosts=hosts, environment=variables)


def _device(group: Any) -> tuple[Device, Any]:
    fake = ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"])
    fake.fake_device_new_stream.restype = ctypes.c_void_p
    stream = fake.fake_device_new_stream()
    device = Device(
        lambda numel: OnDevice(np.zeros(numel, np.float32), stream),
        lambda: fake.fake_device_synchronize(ctypes.c_void_p(stream)),
    )
    return device, fake


def _tuned(group: Any) -> TuningTable:
    device, _ = _device(group)
    part = group.new_group([0, 1, 2])
    if part is not None:
        with pytest.raises(InvalidArgument, match="hosts with as many ranks each"):
            tune_devices(part, device, 1.0)
    return tune(group, 0.2, device)


def _takes_what_won(group: Any) -> None:
    """Of a call, NCCL's whole is over one communicator, the other way over those of a host and across as well."""
    device, fake = _device(group)
    for numel, hierarchical in ((1 << 12, False), (1 << 20, True)):
        group.all_reduce(array := device.zeros(numel))
        device.settle()
        assert not array.array.any()
        assert (fake.fake_nccl_n_communicators() > 1) == hierarchical
    # What has no times, and a group of other ranks, go as they would without a table.
    assert group._devices.choices("all_gather", 0, False) == ((None, "native"),)
    pair = group.new_group([0, 1])
    if pair is not None:
        assert pair._devices.choices("all_reduce", 0, False) == ((None, "native"),)


class Rows(OnDevice):
    @property
    def shape(self) -> Any:
        return self.array.shape


def _rows_by_index() -> None:
    """Calls with arrays of a device reach the kernels, whose own checks answer; no GPU is needed for that."""
    rows, index = Rows(np.zeros((2, 4), np.float32)), OnDevice(np.zeros(1, np.int64))
    on_host, host_index = np.zeros((2, 4), np.float32), np.zeros(1, np.int64)
    one, ends = Rows(np.zeros((1, 4), np.float32)), OnDevice(np.array([0, 1]))
    weights = OnDevice(np.zeros(2, np.float32))
    values, coded = Rows(np.zeros((2, 128), np.float32)), Rows(np.zeros(265, np.uint8)[1:].reshape(2, 132))
    calls = (
        (
            lambda: _C.copy_rows(rows, [rows] * 129, index, index),
            "'expand_rows' takes 1 to 128 buffers of rows",
        ),
        (lambda: _C.combine_rows(one, [rows] * 129, index, index, ends), "'combine_rows' takes 1 to 128 buffers"),
        (lambda: _C.encode_rows(coded, values, "fp8"), "'encode_rows' needs buffers 4-byte aligned"),
        (lambda: _C.copy_rows(rows, [on_host], index, index), "one tensor is on cuda:0, another on cpu"),
        (
            lambda: _C.pack_coded_rows([coded], OnDevice(np.arange(3)), *[OnDevice(np.arange(2))] * 2, values),
            "'encode_rows' needs buffers 4-byte aligned",
        ),
        (lambda: _C.expand_coded_rows(values, [coded] * 129, index, index), "'decode_rows' takes 1 to 128 buffers"),
        (
            lambda: _C.weigh_rows(rows, None, [rows] * 129, index, index, None, None, weights, None),
            "'weigh_rows' takes 1 to 128 buffers",
        ),
        (
            lambda: _C.weigh_rows(rows, None, [on_host], index, index, None, None, weights, None),
            "one tensor is on cuda:0, another on cpu",
        ),
    )
    for call, text in calls:
        with pytest.raises(InvalidArgument, match=text if hasattr(_C, "cuda_info") else "built without CUDA"):
            call()
    with pytest.raises(InvalidArgument, match="one tensor is on the CPU, another on cuda:0"):
        _C.copy_rows(on_host, [rows], host_index, host_index)
    for refused, text in (
        (lambda: _C.weigh_rows(on_host, None, [], host_index, host_index, None, None, on_host, None), "on the CPU"),
        (lambda: _C.weigh_rows(rows, weights, [rows], index, index, None, None, weights, None), "both dots and b"),
        (lambda: _C.expand_coded_rows(values, [values], index, index), "132 bytes as fp8, not 128 float32"),
        (lambda: _C.pack_coded_rows([coded], index, index, index, values), "starts has 1 entries, not 3"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            refused()


@pytest.mark.parametrize("with_nccl", [False, True])
def test_arrays_on_a_device_go_through_the_host_between_hosts(with_nccl: bool) -> None:
    library = str(build())
    variables = {
        "PYCOMM_NCCL_LIB": library if with_nccl else "/nowhere/libnccl.so.2",  # with it, inside hosts it has its part
        "PYCOMM_TEST_DEVICE": library,
        "PYCOMM_CUDA_BETWEEN_HOSTS": "tcp",
    }
    run_ranks(_through_host, 4, with_nccl, hosts=["a", "b", "a", "b"], environment=variables)


def _through_host(group: Any, with_nccl: bool) -> None:
    fake = ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"])
    fake.fake_device_delay(300)
    fake.fake_device_new_stream.restype = ctypes.c_void_p
    stream = fake.fake_device_new_stream()

    def synchronize() -> None:
        fake.fake_device_synchronize(ctypes.c_void_p(stream))

    x = np.zeros(1000, np.uint8)
    for _ in range(3):
        fake.fake_device_fill(ctypes.c_void_p(stream), ctypes.c_void_p(x.ctypes.data), group.rank + 1, x.nbytes)
        group.all_reduce(OnDevice(x, stream), op="max")
        group.all_reduce(OnDevice(x, stream), op="bxor", async_op=True).wait()
        group.all_reduce(OnDevice(x, stream))
        synchronize()
        assert (x == 0).all()
    sent = group.stats().bytes_between_hosts
    for numel in (0, 1, 7, 40000):
        _every_collective(group, numel, stream, synchronize)
    assert group.stats().bytes_between_hosts > sent
    assert fake.fake_nccl_n_communicators() == with_nccl
    if with_nccl:  # what is inside hosts goes over NCCL, and its sums across
        big, before = np.ones(1 << 16, np.float32), group.stats()
        group.all_reduce(OnDevice(big, stream))
        synchronize()
        after = group.stats()
        assert (big == 4).all() and after.bytes_inside_hosts == before.bytes_inside_hosts
        assert after.bytes_between_hosts - before.bytes_between_hosts >= big.nbytes // 2
    # Uneven pieces, a wire with its residual, messages.
    counts = [0, 3, 1, 2]
    mine = np.full(counts[group.rank], group.rank, np.int64)
    whole = np.zeros(6, np.int64)
    group.all_gather(OnDevice(whole, stream), OnDevice(mine, stream), counts)
    rows, given = [group.rank + 2 * rank for rank in range(4)], [rank + 2 * group.rank for rank in range(4)]
    out = np.concatenate([np.full(count, 10 * group.rank + rank) for rank, count in enumerate(rows)])
    got = np.zeros(sum(given), np.int64)
    group.all_to_all(OnDevice(got, stream), OnDevice(out, stream), given, rows)
    y = np.random.default_rng(group.rank).standard_normal(500).astype(np.float32)
    exact, lost = y.astype(np.float64), np.full(500, 9, np.float32)
    group.all_reduce(exact)
    group.all_reduce(OnDevice(y, stream), wire="int8", wire_residual=OnDevice(lost, stream))
    peer = (group.rank + 2) % 4
    if group.rank < 2:
        group.send(OnDevice(whole, stream), peer)
    else:
        group.recv(OnDevice(received := np.zeros_like(whole), stream), peer)
    synchronize()
    assert whole.tolist() == [1, 1, 1, 2, 3, 3] and (group.rank < 2 or (received == whole).all())
    assert got.tolist() == [10 * rank + group.rank for rank, count in enumerate(given) for _ in range(count)]
    group.all_reduce(everything := lost.astype(np.float64))
    assert np.allclose(y + everything, exact, atol=1e-4) and not np.allclose(y, exact, atol=1e-4)
    group.barrier()
    fake.fake_device_free_stream(ctypes.c_void_p(stream))


def _every_collective(group: Any, numel: int, stream: int, synchronize: Any) -> None:
    n, me = group.size, group.rank
    mine = np.arange(numel, dtype=np.int64) + 100 * me
    everyone = np.concatenate([np.arange(numel) + 100 * rank for rank in range(n)])

    def check(run: Any, result: Any, expected: Any) -> None:
        run()
        synchronize()
        assert (result == expected).all(), (result, expected)

    x = mine.copy()
    check(lambda: group.all_reduce(OnDevice(x, stream)), x, n * np.arange(numel) + 100 * n * (n - 1) // 2)
    average = mine.copy()  # of integers NCCL takes it whole, hierarchical or not
    check(lambda: group.all_reduce(OnDevice(average, stream), op="avg"), average, x // n)
    whole = np.full(n * numel, -1)
    check(lambda: group.all_gather(OnDevice(whole, stream), OnDevice(mine, stream)), whole, everyone)
    part = np.full(numel, -1)
    check(lambda: group.reduce_scatter(OnDevice(part, stream), OnDevice(whole, stream)), part, n * mine)
    pieces = (np.arange(n * numel) + 1_000_000 * me).reshape(n, numel)
    got = np.full_like(pieces, -1)
    check(
        lambda: group.all_to_all(OnDevice(got, stream), OnDevice(pieces, stream)),
        got,
        np.arange(numel) + numel * me + 1_000_000 * np.arange(n)[:, None],
    )
    x = mine.copy()
    check(lambda: group.broadcast(OnDevice(x, stream), 1), x, np.arange(numel) + 100)
    check(lambda: group.reduce(OnDevice(x, stream), 2, "max"), x, np.arange(numel) + 100)
    out = np.full(n * numel, -1)
    if me == 3:
        check(lambda: group.gather(OnDevice(out, stream), OnDevice(mine, stream), 3), out, everyone)
    else:
        group.gather(None, OnDevice(mine, stream), 3)
    part = np.full(numel, -1)
    source = OnDevice(everyone, stream) if me == 0 else None
    check(lambda: group.scatter(OnDevice(part, stream), source), part, mine)


def _refusals(group: Any, stream: int, fake: Any) -> None:
    """Bad input is told before anything is sent: the group goes on afterwards."""
    ones = np.ones(4)
    before = group.stats().ops
    for text, call in {
        "not C-contiguous": lambda: group.all_reduce(OnDevice(np.ones((4, 4)).T[:2], stream)),
        "the array is read-only": lambda: group.all_reduce(OnDevice(ones, data=(ones.ctypes.data, True))),
        r"bytes are swapped \(>f8\)": lambda: group.all_reduce(OnDevice(ones, typestr=">f8")),
        "names no dtype": lambda: group.all_reduce(OnDevice(ones, typestr="|V8")),
        "has a mask": lambda: group.all_reduce(OnDevice(ones, mask=OnDevice(ones))),
        "stream is 0": lambda: group.all_reduce(OnDevice(ones, stream=0)),
        "one array is on cuda:0, another on cpu": lambda: group.all_to_all(OnDevice(ones, stream), np.ones(4)),
        "stand on two streams of cuda:0": lambda: group.all_to_all(OnDevice(ones, stream), OnDevice(ones)),
        "NCCL has no sum of int16": lambda: group.all_reduce(OnDevice(np.ones(4, np.int16), stream)),
        "NCCL has no band of int64": lambda: group.all_reduce(OnDevice(np.ones(4, np.int64), stream), op="band"),
        "5 elements do not divide by 4": lambda: group.all_to_all(OnDevice(np.ones(5)), OnDevice(np.ones(5))),
        "name the source": lambda: group.recv(OnDevice(ones, stream)),
        "have no tag": lambda: group.send(OnDevice(ones, stream), (group.rank + 1) % 4, tag=3),
        "wire_nonfinite is of CPU": lambda: group.all_reduce(
            OnDevice(np.ones(4, np.float32), stream), wire="fp8", wire_nonfinite="raise"
        ),
    }.items():
        with pytest.raises(InvalidArgument, match=text):
            call()
    elsewhere = OnDeviceByDlpack(torch.ones(3))
    elsewhere.device = 1
    with pytest.raises(InvalidArgument, match="the array is on cuda:1, this group works on cuda:0"):
        group.all_reduce(elsewhere)
    group.all_reduce(OnDevice(ones, stream))
    fake.fake_device_synchronize(ctypes.c_void_p(stream))
    assert (ones == 4).all() and group.stats().ops == before
