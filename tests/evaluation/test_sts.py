from __future__ import annotations

import math

import pytest
import torch

from lobcq_fx.evaluation import SentencePair, sentences_of, spearman, sts


def test_ranks_without_ties_by_the_textbooks_formula() -> None:
    """1 - 6 sum(d^2) / (n (n^2 - 1)), which holds where no value is there twice."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(40, generator=generator), torch.rand(40, generator=generator)
    places = [sorted(values.tolist()) for values in (one, other)]
    differences = [places[0].index(a) - places[1].index(b) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert spearman(one, other) == pytest.approx(1 - 6 * sum(d * d for d in differences) / (40 * (40**2 - 1)))
    assert spearman(one, one.exp()) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    found = spearman(torch.tensor([0.0, 7.0, 7.0, 9.0]), torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_embeddings_at_known_angles() -> None:
    pairs = [SentencePair(f"a{n}", f"b{n}", score) for n, score in enumerate((1.0, 0.0, 5.0))]
    assert sentences_of(pairs) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    east = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    angles = torch.tensor([0.5, 1.5, 1.0])  # cosines rank 3, 1, 2
    found = sts(torch.cat((east, torch.stack((angles.cos(), angles.sin()), dim=1))), pairs)
    assert found.spearman == pytest.approx(0.5)  # of scores that rank 2, 1, 3
    assert found.pairs == 3


def test_what_cannot_be_ranked() -> None:
    pairs = [SentencePair("a", "b", 1.0), SentencePair("c", "d", 2.0)]
    with pytest.raises(ValueError, match="3 embeddings for 2 pairs"):
        sts(torch.ones(3, 4), pairs)
    with pytest.raises(ValueError, match="nothing to rank"):
        sts(torch.ones(4, 4), pairs)
