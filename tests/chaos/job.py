"""Start a Ray head as the demo does, submit one command to it as a job, and follow that: `python -m tests.chaos.job COMMAND`."""

import asyncio
import importlib.util
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from tests.chaos.driver import ROOT


def main(entrypoint: str) -> int:
    """Exit code 0 if the job succeeded. The first line says the process of the head."""
    logging.disable(logging.WARNING)
    demo, folder = _demo(), Path(tempfile.mkdtemp(prefix="mf"))  # short, because sockets lie in it
    try:
        with demo.head(folder) as (process, address):
            print(f"head {process.pid}", flush=True)
            done = asyncio.run(demo.follow(address, demo.submit(process, address, entrypoint)))
    except Exception as error:  # the head was killed, which Ray's client says in many ways
        print(f"error: the job was lost: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if done == "SUCCEEDED" else 1


def _demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "infra" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
