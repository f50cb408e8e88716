"""transformers knows the quantization method whichever of the two packages is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.sweeps import sweep

KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'lobcq' in known"
ORDERS = {
    "ours first": f"import lobcq_fx; {KNOWN}",
    "transformers first": f"import transformers.quantizers.auto, lobcq_fx; {KNOWN}",
    "transformers first, nothing of it loaded": f"import transformers, lobcq_fx; {KNOWN}",
    "ours first, then a model's class": f"import lobcq_fx; from transformers import LlamaForCausalLM; {KNOWN}",
    "by the public name": f"from lobcq_fx import LobcqQuantizationConfig; {KNOWN}",
}
DAILY = ("ours first", "transformers first", "transformers first, nothing of it loaded")


@pytest.mark.parametrize("order", sweep(ORDERS, DAILY))
def test_the_method_is_registered(order):
    subprocess.run([sys.executable, "-c", ORDERS[order]], check=True)


def test_without_this_package_transformers_knows_no_such_method():
    code = f"try:\n    {KNOWN}\nexcept AssertionError:\n    print('unknown')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "unknown\n"


def test_peft_that_was_imported_first_knows_packed_linears():
    """Ours first: tests/integrations/test_lora.py."""
    pytest.importorskip("peft")
    code = "import peft, lobcq_fx; assert len(peft.LoraConfig()._custom_modules) == 1"
    subprocess.run([sys.executable, "-c", code], check=True)
