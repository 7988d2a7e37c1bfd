"""For ``pytest -p tests.forked``: the server of `workers` is forked from each of pytest's own processes, once that has
imported everything and before pytest takes what is printed. By itself the server would import it all again."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    sys.path.insert(0, str(Path(__file__).parent))
    import workers

    workers.fork_server()
