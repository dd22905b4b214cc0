"""Print the list of the installed transformers, as it is pinned here:

python -m tests.model.families > tests/model/families/transformers-VERSION.json
"""

import json
import sys
from contextlib import redirect_stdout

with redirect_stdout(sys.stderr):  # libraries say things while they are imported
    from moeflow.model.structure.listing import rows

    listed = {row.model_type: row.to_json() for row in rows()}
left_out = ("type", "proven")
print(json.dumps({name: {k: v for k, v in row.items() if k not in left_out} for name, row in listed.items()}, indent=1))
