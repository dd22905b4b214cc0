"""Models and stores that many tests share."""

from pathlib import Path

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=list(tiny.FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, of one family after the other."""
    return tiny.write(request.param, tmp_path_factory.mktemp(request.param))
