"""The report: one self-contained HTML file about a quantized model."""

from lobcq_fx.report.render import write_report

__all__ = ["write_report"]
