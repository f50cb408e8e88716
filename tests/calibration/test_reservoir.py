import pytest
import torch

from lobcq_fx.calibration.reservoir import Reservoir


def test_keeps_everything_while_there_is_room():
    reservoir = Reservoir(10, seed=0)
    reservoir.add(torch.arange(6).view(3, 2))
    assert sorted(reservoir.rows().tolist()) == [[0, 1], [2, 3], [4, 5]]


def test_never_keeps_more_than_its_capacity_and_only_rows_it_was_given():
    reservoir = Reservoir(7, seed=0)
    for start in range(0, 100, 9):
        reservoir.add(torch.arange(start, start + 9).view(-1, 1))
        assert len(reservoir.rows()) == min(7, start + 9)
    assert reservoir.num_seen == 108
    assert len(set(reservoir.rows().flatten().tolist())) == 7


@pytest.mark.parametrize("cut", [1, 3, 50, 1000])
def test_the_sample_does_not_depend_on_how_the_stream_is_cut(cut):
    rows = torch.arange(1000).view(-1, 1)
    whole, parts = Reservoir(64, seed=5), Reservoir(64, seed=5)
    whole.add(rows)
    for part in rows.split(cut):
        parts.add(part)
    assert torch.equal(whole.rows(), parts.rows())


def test_every_row_is_equally_likely_to_stay():
    trials, capacity, rows = 2000, 5, torch.arange(20).view(-1, 1)
    counts = torch.zeros(20)
    for seed in range(trials):
        reservoir = Reservoir(capacity, seed)
        for part in rows.split(6):
            reservoir.add(part)
        counts += torch.bincount(reservoir.rows().flatten(), minlength=20)
    expected = trials * capacity / 20
    chi_squared = float(((counts - expected) ** 2 / (expected * (1 - capacity / 20))).sum()) * 19 / 20
    assert chi_squared < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom lie below


def test_an_unused_reservoir_says_so():
    with pytest.raises(RuntimeError, match="add"):
        Reservoir(3, seed=0).rows()
