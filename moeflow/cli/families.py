"""The command about the models that can be compressed: families."""

import json as json_
import subprocess
import sys
from typing import Annotated

import typer

from moeflow.cli.common import Json, asking, command


@command()
def families(
    types: Annotated[list[str] | None, typer.Argument(help="only these model types")] = None,
    json: Json = False,
) -> None:
    """List every Mixture-of-Experts model type of the installed transformers: how it is known, or why it is not supported.

    Each is looked at by building a tiny model of it, which takes a second or more: a minute or two for all.
    """
    words = [sys.executable, "-P", "-m", "moeflow.model.structure", "--list", *(types or ())]
    works = count = 0
    with asking(), subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as looking:
        for line in looking.stdout or ():
            if not line.startswith("{"):
                continue
            row = json_.loads(line)
            works, count = works + (row["by"] != "no"), count + 1
            if json:
                print(line, end="", flush=True)
            else:
                about = row.get("why") or f"{row['layout']}; {row['router']}" + ("; shared expert" if row["shared"] else "")
                print(f"{row['type']:<26} {row['by']:<10} {about}", flush=True)
        if looking.wait():
            raise OSError("looking at the model types failed: is transformers installed here?")
    if not json:
        print(f"{works} of {count} work", file=sys.stderr)
