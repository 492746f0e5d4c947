"""The errors pycomm raises. Each message states the fact, both sides of it, and what to do.

They also derive from the built-in error a caller would catch anyway: TimeoutError, ConnectionError, ValueError."""


class PycommError(RuntimeError):
    """Anything pycomm refuses or fails at."""


class TopologyError(PycommError, ValueError):
    """A topology that contradicts itself, or that a planner cannot use."""


class ScheduleError(PycommError):
    """A schedule that does not do what its collective promises; the message names transfer, round and chunk."""


class InvalidArgument(PycommError, ValueError):
    """A wrong argument, found before anything was sent."""


class PeerTimeout(PycommError, TimeoutError):
    """A peer did not answer before the deadline; the message names it, the op and how far the op had come."""


class PeerLost(PycommError, ConnectionError):
    """A peer's process ended, or its connection broke, while it was needed."""


class CollectiveMismatch(PycommError):
    """Two ranks called different collectives, or the same one with other arguments; the message names both."""


class GroupClosed(PycommError):
    """The group was closed, or broke in an earlier call; the message repeats why."""


class NonfiniteError(PycommError, FloatingPointError):
    """The result of a call with wire_nonfinite="raise" holds NaN or infinity. It stands; the group goes on."""


class PycommWarning(RuntimeWarning):
    """The system refuses something at set-up and a slower path is taken; the message names ranks, host, what was
    refused, what is used instead and what to do. One per refusal and host."""
