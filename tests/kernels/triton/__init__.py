"""The Triton kernels, in Triton's interpreter where no GPU is asked for."""

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install 'lobcq-fx[triton]')", allow_module_level=True)
