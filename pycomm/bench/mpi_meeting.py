"""Where the companion's MPI ranks come to: connections on loopback, believed once they have proved that they know the
key."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Final

_MOMENT_S: Final = 0.2


class Meeting:
    """Whoever connects proves on a thread of its own that it knows the key, so that a stranger who says nothing holds
    up nobody; it is dropped when the meeting closes. The other end is multiprocessing.connection.Client."""

    def __init__(self, key: bytes, backlog: int) -> None:
        self._key = key
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._listener.settimeout(_MOMENT_S)
        self._unproved: set[socket.socket] = set()
        self._came: queue.SimpleQueue[tuple[Connection, Any]] = queue.SimpleQueue()

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()
        for stream in list(self._unproved):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)  # its thread ends

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def next(self) -> tuple[Connection, Any] | None:
        """A connection to one who knows the key, and what it said first; None where a moment passes without one."""
        with contextlib.suppress(TimeoutError):
            stream, _ = self._listener.accept()
            self._unproved.add(stream)
            threading.Thread(target=self._greet, args=(stream,), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            return self._came.get_nowait()
        return None

    def _greet(self, stream: socket.socket) -> None:
        with stream:
            connection = Connection(os.dup(stream.fileno()))
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
                said = connection.recv()
            except Exception:  # whatever a stranger may say
                connection.close()
            else:
                self._came.put((connection, said))
            finally:
                self._unproved.discard(stream)
