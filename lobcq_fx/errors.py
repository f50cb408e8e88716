"""What can go wrong, as types a caller can catch. Every message names the layer or value and the remedy."""


class LobcqError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LobcqError, ValueError):
    """A setting is unknown, contradicts another, or selects nothing."""


class OperandError(LobcqError, ValueError):
    """An op was called with an operand of another dtype, shape, device or value than it takes."""


class TraceError(LobcqError):
    """A model could not be captured as one FX graph."""


class CallError(LobcqError, TypeError):
    """A quantized model was called in a way its traced graph cannot serve."""


class CalibrationError(LobcqError):
    """Calibration data are missing, unusable, or never reached a layer."""


class CheckpointError(LobcqError):
    """A saved folder is incomplete, damaged, of another version, or would be overwritten."""


class NotStreamedError(LobcqError):
    """A model cannot be quantized weight by weight, but can be in memory."""


class RankError(LobcqError):
    """Another process of the same launch failed, or is gone, and with it the work of all."""


class ExportError(LobcqError):
    """A model cannot be exported as asked, or the exported one computes something else."""


class DataError(LobcqError):
    """A file with data to evaluate on is missing, damaged, or lacks a field."""


class ReportError(LobcqError):
    """A report cannot be drawn: what draws it is not installed."""
