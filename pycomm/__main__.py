"""`python -m pycomm`: the `pycomm` command where it is not on the path."""

import sys

from pycomm.cli import main

sys.exit(main())
