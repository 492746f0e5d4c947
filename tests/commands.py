"""The `pycomm` command as a process that starts in a tenth of the time."""

import sys

# As on a machine without torch, which importing pycomm would load (1 to 3 s) to register the backend. Only for commands
# that need none themselves, because they start ranks: these are processes of their own, with all that they import.
_PROGRAM = "import sys; sys.modules['torch'] = None; from pycomm.cli import main; sys.exit(main())"
PYCOMM = [sys.executable, "-c", _PROGRAM]
