"""What a process finds out about its machine, beside what other tools say; GPUs from an NVML written for the test."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spawn import run_ranks

from pycomm.errors import InvalidArgument, PycommError
from pycomm.machine import Interface, local_address, local_addresses, local_interfaces, parse_cpu_list, this_machine


@given(st.sets(st.integers(0, 300)))
def test_lists_of_cores_are_read(cores):
    runs = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    assert parse_cpu_list(text + "\n") == tuple(sorted(cores))


@pytest.mark.parametrize("text", ["a", "1-", "0-2;4", "-3"])
def test_other_lists_are_not(text):
    with pytest.raises(InvalidArgument, match="is no list of cores"):
        parse_cpu_list(text)


def test_a_machine_is_what_the_system_says():
    machine = this_machine()
    assert machine.host_name == socket.gethostname()
    assert machine.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert f"net:[{machine.network_namespace}]" == os.readlink("/proc/self/ns/net")
    assert f"ipc:[{machine.ipc_namespace}]" == os.readlink("/proc/self/ns/ipc")
    assert set(machine.cores) == os.sched_getaffinity(0)
    names = {name for _, name in socket.if_nameindex()}
    assert {interface.name for interface in machine.interfaces} <= names
    lo = machine.interface("lo")
    assert "127.0.0.1" in lo.addresses and lo.bytes_per_s is None and lo.why
    assert all((one.bytes_per_s is None) == bool(one.why) for one in machine.interfaces)


def test_interfaces_that_are_down_are_left_out():
    up = {one.name for one in this_machine().interfaces}
    for _, name in socket.if_nameindex():
        flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)
        assert (name in up) <= (flags & 1 == 1)


def own_label(group):
    return this_machine().host_id, group.host_ids[group.rank]


def test_the_name_of_a_host_is_the_engines():
    for mine, engines in run_ranks(own_label, 2):
        assert mine == engines


def test_the_traffics_interfaces_are_those_of_its_addresses(monkeypatch):
    monkeypatch.setenv("PYCOMM_ADDRESS", "127.0.0.7,lo,192.0.2.77")
    machine = this_machine()
    assert machine.carriers == ("lo",)
    assert [text for text in machine.unknown if "192.0.2.77" in text] == [
        "the interface of 192.0.2.77: no interface that is up has this name or address"
    ]
    monkeypatch.delenv("PYCOMM_ADDRESS")
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    with pytest.raises(PycommError, match="no route to MASTER_ADDR=no such host"):
        local_address()


def test_words_of_the_traffics_addresses_are_names_or_addresses_of_both_families(monkeypatch):
    monkeypatch.setenv("PYCOMM_ADDRESS", "lo, 127.0.0.7,::1,192.0.2.77")
    assert local_addresses() == ("127.0.0.1", "127.0.0.7", "::1", "192.0.2.77")
    assert local_interfaces() == ("lo",)
    link = Interface("eth7", "veth", ("fe80::7", "2001:db8::7"), None)
    monkeypatch.setattr("pycomm.machine._interfaces", lambda unknown: (link,))
    for words, addresses in (("eth7", "fe80::7%eth7"), ("2001:db8::7", "2001:db8::7"), ("fe80::7%eth7",) * 2):
        monkeypatch.setenv("PYCOMM_ADDRESS", words)
        assert (local_addresses(), local_interfaces()) == ((addresses,), ("eth7",))


def test_outside_a_job_every_address_counts():
    assert "lo" not in this_machine(in_a_job=False).carriers


# GPUs

NVML = r"""
#include <stdio.h>
#include <string.h>
typedef struct { int index; } Device;
static Device devices[3] = {{0}, {1}, {2}};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char* nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Other"; }
int nvmlDeviceGetCount_v2(unsigned* n) { *n = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Device** d) { *d = &devices[i]; return 0; }
int nvmlDeviceGetName(Device* d, char* out, unsigned n) { snprintf(out, n, "Test GPU %d", d->index); return 0; }
int nvmlDeviceGetUUID(Device* d, char* out, unsigned n) { snprintf(out, n, "GPU-%d", d->index); return 0; }
int nvmlDeviceGetNvLinkState(Device* d, unsigned link, int* active) {
  if (d->index == 2) return 3;
  if (link >= 4) return 2;
  *active = link != 1;
  return 0;
}
#ifdef P2P
int nvmlDeviceGetP2PStatus(Device* a, Device* b, int what, int* status) {
  *status = (a->index == 2 || b->index == 2) && what == 1 ? 5 : 0;
  return 0;
}
#endif
"""

SHOW = """
import dataclasses, json
from pycomm.gpus import find_gpus
gpus, unknown = find_gpus()
print(json.dumps([[dataclasses.asdict(gpu) for gpu in gpus], unknown]))
"""


def gpus_with(folder, *flags):
    """find_gpus() in a process that finds this NVML first; an empty folder: none."""
    if flags:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "the extension's compiler is gone"
        (folder / "nvml.c").write_text(NVML)
        command = [compiler, "-shared", "-fPIC", *flags, "nvml.c", "-o", "libnvidia-ml.so.1"]
        subprocess.run(command, cwd=folder, check=True, timeout=300)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(done.stdout)


def test_gpus_nvlinks_and_peers_are_what_nvml_says(tmp_path):
    gpus, unknown = gpus_with(tmp_path, "-DINIT=0", "-DP2P")
    assert unknown == []
    assert [gpu["name"] for gpu in gpus] == ["Test GPU 0", "Test GPU 1", "Test GPU 2"]
    assert [gpu["uuid"] for gpu in gpus] == ["GPU-0", "GPU-1", "GPU-2"]
    assert [gpu["nvlinks"] for gpu in gpus] == [3, 3, 0]
    assert [gpu["peers"] for gpu in gpus] == [[1], [0], []]  # who only reads is no peer


def test_what_nvml_does_not_know_is_said(tmp_path):
    gpus, unknown = gpus_with(tmp_path, "-DINIT=0")
    assert len(gpus) == 3
    assert "P2P between GPU 0 and GPU 1: this driver has no nvmlDeviceGetP2PStatus" in unknown
    assert len(unknown) == 6


def test_a_driver_that_does_not_answer_is_said(tmp_path):
    assert gpus_with(tmp_path, "-DINIT=9") == [[], ["GPUs: nvmlInit_v2: Driver Not Loaded"]]
