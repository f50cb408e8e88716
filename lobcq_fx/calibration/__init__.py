"""What observers gather from activations, and the LO-BCQ codebook fit."""

from lobcq_fx.calibration.fit import CodebookFit, fit_codebooks
from lobcq_fx.calibration.refine import refine_codebooks
from lobcq_fx.calibration.statistics import ActivationStatistics

__all__ = ["ActivationStatistics", "CodebookFit", "fit_codebooks", "refine_codebooks"]
