"""The process: a request as JSON on standard input and its answer on standard output, or a line of JSON for each model type.

python -m moeflow.model.structure                 reads {"config": ..., "names": [...]}
python -m moeflow.model.structure --list [TYPE ...]
"""

import json
import sys
import warnings

from moeflow.model.structure.anatomy import Unknown
from moeflow.model.structure.building import one_line
from moeflow.model.structure.listing import rows
from moeflow.model.structure.looking import look


def main(words: list[str]) -> int:
    if words[:1] == ["--list"]:
        for row in rows(words[1:]):
            print(json.dumps(row.to_json()), flush=True)
        return 0
    request = json.load(sys.stdin)
    try:
        answer = look(request["config"], request.get("names")).to_json()
    except Unknown as why:
        answer = {"why": str(why)}
    except Exception as error:  # of a model's own code: what it does is not understood
        answer = {"why": one_line(error)}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main(sys.argv[1:]))
