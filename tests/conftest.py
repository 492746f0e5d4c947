"""For all tests: no tuning table of the user's own bears on what is tested."""

import os

os.environ["PYCOMM_TUNE_DIR"] = "/nonexistent"
