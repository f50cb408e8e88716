"""`lobcq serve`: transformers' server, which knows LO-BCQ here."""

from __future__ import annotations

import typer

from lobcq_fx.cli.options import ModelArgument


def serve(context: typer.Context, model: ModelArgument) -> None:
    """Serve a float or quantized language model over HTTP, as OpenAI's interface has it.

    It is `transformers serve` with this model, and takes its options: --host, --port, --device, --compile ...
    (`transformers serve --help`).
    """
    from transformers.utils.import_utils import is_serve_available

    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.cli.inputs import causal_lm_folder

    folder = causal_lm_folder(model)
    if not is_serve_available():
        raise InputError('serving needs more packages: pip install "lobcq-fx[serve]"')
    from transformers.cli.transformers import app

    app(["serve", str(folder.path), *context.args], prog_name="lobcq")  # ends the process
