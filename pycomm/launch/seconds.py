"""Seconds from a command line."""

from __future__ import annotations

from typing import Final

from pycomm.errors import InvalidArgument

_MOST_S: Final = 1e6  # 11 days; the system's own waits count milliseconds in 31 bits


def require_seconds(option: str, seconds: float, or_zero: bool = False) -> None:
    """Raises InvalidArgument unless seconds are above 0, or 0 where that is allowed, and at most 1e6: also for NaN."""
    if not (0 < seconds <= _MOST_S or (or_zero and seconds == 0)):
        least = "of 0 or more" if or_zero else "above 0"
        raise InvalidArgument(f"{option} is {seconds:g}; give seconds {least}, at most {_MOST_S:g}")
