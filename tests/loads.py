"""Load checkpoints with the transformers of this process, and say as JSON how far their logits are from those beside them.

python -m tests.loads FOLDER        # of checkpoints, each with `expected.pt`: ids and logits
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import moeflow  # noqa: F401  transformers then loads compressed checkpoints

EXPECTED = "expected.pt"


@torch.inference_mode()
def apart(folder: Path) -> float | str:
    """The largest difference of a logit, in fp32; or what it is refused with."""
    ids, logits = torch.load(folder / EXPECTED)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return float((model(ids).logits - logits).abs().max())
    except Exception as error:  # whatever a release raises over a form
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    print(json.dumps({folder.name: apart(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}))
