"""`pycomm launch` and `pycomm explain` as processes that start in a tenth of the time."""

import sys

# As on a machine without torch, which importing pycomm would load (1 to 3 s) to register the backend, and which these
# commands do not need. The ranks that launch starts are processes of their own, with all that they import.
_PROGRAM = "import sys; sys.modules['torch'] = None; from pycomm.cli import main; sys.exit(main())"
PYCOMM = [sys.executable, "-c", _PROGRAM]
