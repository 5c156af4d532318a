"""Lets every test folder `import oracles` (pytest puts this file's folder on the path) and makes hypothesis repeatable."""

from __future__ import annotations

import os

# NumPy is only the oracle here, on small matrices; its threads and torch's would wait for each other (10× slower on 2 cores).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")
