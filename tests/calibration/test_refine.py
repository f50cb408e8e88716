import pytest
import torch

from lobcq_fx.calibration import fit_codebooks, refine_codebooks
from lobcq_fx.calibration.selection import select_codebooks
from lobcq_fx.calibration.synthetic import synthetic
from lobcq_fx.calibration.universal import sqnr_db
from lobcq_fx.format import FormatSpec, check_codebooks

SPEC = FormatSpec(4, 64)


def test_refinement_gains_and_stays_in_the_format():
    arrays = synthetic("laplace", (512, 64), seed=1)
    rounded = fit_codebooks(arrays, SPEC, max_iterations=10).codebooks
    refined = refine_codebooks(rounded, [arrays])
    check_codebooks(refined, SPEC)
    assert sqnr_db(arrays, SPEC, refined) > sqnr_db(arrays, SPEC, rounded) + 0.02


def test_no_single_move_improves_a_refined_set():
    """By brute force through encode and decode: every entry of every codebook, one step either way."""
    arrays = synthetic("gaussian", (64, 64), seed=2)
    refined = refine_codebooks(fit_codebooks(arrays, FormatSpec(2, 64)).codebooks, [arrays])
    reached = sqnr_db(arrays, FormatSpec(2, 64), refined)
    for k, j, step in [(k, j, step) for k in range(2) for j in range(16) for step in (-1, 1)]:
        moved = refined.clone()
        moved[k, j] = (moved[k, j] + step).clamp(-31, 31)
        assert sqnr_db(arrays, FormatSpec(2, 64), moved.sort(dim=1).values) < reached + 0.002


def test_the_start_is_left_alone():
    arrays = synthetic("gaussian", (64, 64), seed=3)
    start = fit_codebooks(arrays, SPEC, max_iterations=2).codebooks
    before = start.clone()
    refine_codebooks(start, [arrays])
    assert torch.equal(start, before)


def test_targets_say_which_operand_matters():
    operands = [synthetic(source, (256, 64), seed=4) for source in ("gaussian", "student-t4")]
    start = fit_codebooks(torch.cat(operands), SPEC, max_iterations=5).codebooks
    first = refine_codebooks(start, operands, targets=[30.0, 0.0])
    second = refine_codebooks(start, operands, targets=[0.0, 30.0])
    assert sqnr_db(operands[0], SPEC, first) > sqnr_db(operands[0], SPEC, second)
    assert sqnr_db(operands[1], SPEC, second) > sqnr_db(operands[1], SPEC, first)


def test_zeros_can_be_refined_on():
    start = fit_codebooks(torch.zeros((4, 64)), SPEC).codebooks
    assert torch.equal(refine_codebooks(start, [torch.zeros((4, 64))]), start)


@pytest.mark.parametrize("count", [1, 2])
def test_selection_finds_the_best_subset(count):
    """Against every subset of a small pool, by brute force through encode and decode."""
    arrays = synthetic("laplace", (128, 64), seed=5)
    pool = torch.cat([fit_codebooks(arrays, FormatSpec(2, 64), seed=s, max_iterations=3).codebooks for s in range(3)])
    chosen = select_codebooks(pool, count, [arrays], targets=[0.0])
    spec = FormatSpec(count, 64)
    subsets = torch.combinations(torch.arange(len(pool)), count)
    best = max(sqnr_db(arrays, spec, pool[subset]) for subset in subsets)
    assert sqnr_db(arrays, spec, chosen) == pytest.approx(best, abs=0.02)


def test_selection_from_a_pool_that_is_too_small_repeats():
    arrays = synthetic("gaussian", (32, 64), seed=6)
    pool = fit_codebooks(arrays, FormatSpec(2, 64)).codebooks
    assert select_codebooks(pool, 4, [arrays], targets=[0.0]).shape == (4, 16)
