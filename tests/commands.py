"""`pycomm` as a process that starts in a tenth of the time, for launch, explain, and bench where that starts ranks."""

import sys

# As on a machine without torch, which importing pycomm would load (1 to 3 s) to register the backend, and which these
# commands do not need. The ranks that they start are processes of their own, with all that they import.
_PROGRAM = "import sys; sys.modules['torch'] = None; from pycomm.cli import main; sys.exit(main())"
PYCOMM = [sys.executable, "-c", _PROGRAM]
