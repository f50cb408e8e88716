"""`python -m lobcq_fx`: the `lobcq` command, where launchers such as torchrun want a module."""

from lobcq_fx.cli import app

app(prog_name="lobcq")
