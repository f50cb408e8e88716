"""The command line: `lobcq quantize | eval | generate | report | calibrate | bench`.

Importing it costs no torch: a command imports what it needs when it runs.
"""

from lobcq_fx.cli.application import app

__all__ = ["app"]
