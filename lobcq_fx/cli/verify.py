"""`lobcq verify`: is a quantized model's folder what was saved?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lobcq_fx.cli.options import JsonOption


def verify(
    model: Annotated[
        Path, typer.Argument(metavar="DIR", show_default=False, help="Folder that [bold]lobcq quantize[/] wrote.")
    ],
    json: JsonOption = False,
) -> None:
    """Compare every file and tensor of a quantized model with the digests that were saved with it.

    Prints the folder's own digest: compare it with one that its author published, since whoever can change the folder
    can change the digests in it.
    """
    from lobcq_fx.cli.console import messages, print_json
    from lobcq_fx.cli.failures import InputError
    from lobcq_fx.storage.checkpoint import verify_folder

    with messages.status("Reading"):
        index, problems = verify_folder(model)
    if json:
        print_json({"model": str(model), "blake3": index.digest, "tensors": len(index.tensors), "problems": problems})
    elif not problems:
        typer.echo(f"{model} is what was saved: {len(index.files)} files, {len(index.tensors)} tensors")
        typer.echo(f"blake3 {index.digest}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(f"{model} is not what was saved:\n{lines}\nRemedy: get the folder again")
