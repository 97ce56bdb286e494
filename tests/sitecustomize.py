"""Python runs this as it starts, in the processes that tests start: conftest.py puts the folder on PYTHONPATH."""

import torchvision_schemas  # noqa: F401
