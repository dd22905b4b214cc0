"""The process: a request as JSON on standard input and its answer on standard output, or a line of JSON for each model type.

python -m moeflow.model.structure                 reads {"config": ..., "names": [...] or null}
python -m moeflow.model.structure --list [TYPE ...]
"""

import json
import sys
import warnings
from typing import Any

from moeflow.model.structure.anatomy import Unknown
from moeflow.model.structure.building import one_line
from moeflow.model.structure.listing import rows
from moeflow.model.structure.looking import look


def main(words: list[str]) -> int:
    if words[:1] == ["--list"]:
        for row in rows(words[1:]):
            print(json.dumps(row.to_json()), flush=True)
        return 0
    print(json.dumps(answer(json.load(sys.stdin))))
    return 0


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is found of a request, or why nothing is."""
    try:
        return look(request["config"], request.get("names")).to_json()
    except Unknown as why:
        return {"why": str(why)}
    except Exception as error:  # of a model's own code: what it does is not understood
        return {"why": one_line(error)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main(sys.argv[1:]))
