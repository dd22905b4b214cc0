"""Runs that are hurt on purpose, again and again, each compared with the bytes of an undisturbed one: `make chaos MINUTES=60`.

    python -m tests.chaos --minutes 60 [--seed N] [--only KIND]... [--store folder|moto|seaweedfs]...
        [--rounds N] [--without-ray] [--json]

A round takes one kind of trouble (`kinds.py`; `clusters.py` and `gang.py` for those that need a Ray head) to a store of its own
on one place (`places.py`): it hurts a few runs, then lets one end in peace. Nothing that is stored after any of them may differ
from what an undisturbed run stores. A round's name holds its seed: `--seed N --only KIND --store STORE` has it again, but for the
moments at which processes are hit.
"""
