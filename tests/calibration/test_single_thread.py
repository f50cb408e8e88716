import pytest
import torch

from lobcq_fx.calibration import fit_codebooks
from lobcq_fx.calibration.single_thread import single_thread
from lobcq_fx.calibration.synthetic import synthetic
from lobcq_fx.format import FormatSpec


@single_thread()
def fail_with_the_number_of_threads() -> None:
    raise KeyError(torch.get_num_threads())


def test_the_number_of_threads_is_given_back_even_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError, match="1"):
            fail_with_the_number_of_threads()
        assert torch.get_num_threads() == 2
        fit_codebooks(synthetic("gaussian", (32, 64), seed=0), FormatSpec(2, 64), max_iterations=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
