"""The GPUs of this machine as NVML sees them: names, NVLinks, and which of them reach each other's memory.

NVML is opened at run time (libnvidia-ml.so.1, which comes with the driver); no CUDA context is made. Its own text says
what could not be found out. Source: NVIDIA, NVML API Reference Guide."""

from __future__ import annotations

import ctypes
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LIBRARY: Final = "libnvidia-ml.so.1"

_NVLINK_MAX: Final = 18  # NVML_NVLINK_MAX_LINKS
_P2P_READ, _P2P_WRITE = 0, 1  # nvmlGpuP2PCapsIndex_t
_OK, _NOT_SUPPORTED, _INVALID_ARGUMENT = 0, 3, 2  # nvmlReturn_t


@dataclass(frozen=True)
class Gpu:
    """index: NVML's. nvlinks: how many NVLinks are up. peers: the GPUs whose memory this one reads and writes."""

    index: int
    name: str
    uuid: str
    nvlinks: int
    peers: tuple[int, ...]


class _Refused(Exception):
    """An NVML call that failed, with its text."""


class _Nvml:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvmlErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object) -> int:
        """The return code. Raises _Refused where this driver has no such function."""
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise _Refused(f"this driver has no {name}") from None
        return int(function(*arguments))

    def require(self, name: str, *arguments: object) -> None:
        code = self.call(name, *arguments)
        if code != _OK:
            raise _Refused(f"{name}: {self._library.nvmlErrorString(code).decode(errors='replace')}")

    def text(self, name: str, device: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(96)
        self.require(name, device, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode(errors="replace")


def nccl_wheel() -> str:
    """The libnccl.so.2 that torch's wheels brought, or ""."""
    path = Path(sysconfig.get_path("purelib")) / "nvidia/nccl/lib/libnccl.so.2"
    return str(path) if path.exists() else ""


def find_gpus() -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """(GPUs, what could not be found out and why). Without an NVIDIA driver both are empty."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return (), ()
    unknown: list[str] = []
    nvml = _Nvml(library)
    try:
        nvml.require("nvmlInit_v2")
    except _Refused as refused:
        return (), (f"GPUs: {refused}",)
    try:
        return _gpus(nvml, unknown), tuple(unknown)
    except _Refused as refused:
        return (), (f"GPUs: {refused}",)
    finally:
        nvml.call("nvmlShutdown")


def _gpus(nvml: _Nvml, unknown: list[str]) -> tuple[Gpu, ...]:
    count = ctypes.c_uint()
    nvml.require("nvmlDeviceGetCount_v2", ctypes.byref(count))
    devices: list[ctypes.c_void_p] = []
    for index in range(count.value):
        device = ctypes.c_void_p()
        nvml.require("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        devices.append(device)
    return tuple(
        Gpu(
            index,
            nvml.text("nvmlDeviceGetName", device),
            nvml.text("nvmlDeviceGetUUID", device),
            _nvlinks(nvml, index, device, unknown),
            _peers(nvml, index, devices, unknown),
        )
        for index, device in enumerate(devices)
    )


def _nvlinks(nvml: _Nvml, index: int, device: ctypes.c_void_p, unknown: list[str]) -> int:
    up = 0
    for link in range(_NVLINK_MAX):
        active = ctypes.c_int()
        try:
            code = nvml.call("nvmlDeviceGetNvLinkState", device, ctypes.c_uint(link), ctypes.byref(active))
            if code in (_NOT_SUPPORTED, _INVALID_ARGUMENT):  # no NVLink, or no more of them
                break
            if code != _OK:
                raise _Refused(f"nvmlDeviceGetNvLinkState returned {code}")
        except _Refused as refused:
            unknown.append(f"NVLinks of GPU {index}: {refused}")
            break
        up += active.value == 1
    return up


def _peers(nvml: _Nvml, index: int, devices: list[ctypes.c_void_p], unknown: list[str]) -> tuple[int, ...]:
    found = []
    for other in range(len(devices)):
        if other == index:
            continue
        try:
            statuses = []
            for what in (_P2P_READ, _P2P_WRITE):
                status = ctypes.c_int()
                nvml.require(
                    "nvmlDeviceGetP2PStatus",
                    devices[index],
                    devices[other],
                    ctypes.c_int(what),
                    ctypes.byref(status),
                )
                statuses.append(status.value)
        except _Refused as refused:
            unknown.append(f"P2P between GPU {index} and GPU {other}: {refused}")
            continue
        if statuses == [_OK, _OK]:  # NVML_P2P_STATUS_OK
            found.append(other)
    return tuple(found)
