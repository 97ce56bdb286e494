"""What all tests share. Imported on bare interpreters too, where neither torch nor numpy nor matplotlib is there."""

import os
import signal
from pathlib import Path

import torchvision_schemas  # noqa: F401

TESTS = Path(__file__).resolve().parent

# In the background of a shell's script, Ctrl-C is ignored by all that is started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# In the environment, before anything is imported: the processes that tests start inherit it.
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on two cores a second thread makes the small models slower
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
