"""Train the small Mixtral that stands in `models/mixtral-small`, on the sources of Python's standard library.

    OMP_NUM_THREADS=1 infra/python.sh infra/train_small_model.py models/mixtral-small

The model is a step of a graph like any other, so a training that was interrupted goes on from its last partial state. The same
Python and torch give the same bytes on the same kind of machine; other versions of Python have other sources.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.pretrain.steps import Pretraining, Shape
from moeflow.methods.recipes import pretrained
from moeflow.run import in_process
from moeflow.sources import Texts
from moeflow.store import Store

TEXTS = "python:stdlib/[!s-z]*.py"
"""The files of the standard library whose names begin with s to z are kept for measuring."""

SHAPE = Shape(width=64, ffn=96, layers=4, heads=4, experts=8, vocabulary=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that the checkpoint is written to; it must not exist")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--store", help="where the steps are stored (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(options.store or folder)
        how = Pretraining(steps=options.steps, batch=options.batch, length=128, seed=options.seed)
        model = pretrained.mixtral(Texts(TEXTS), how, SHAPE)
        target = checkpoint.checkpoint_of(model)
        outcome = in_process.run([target], store)
        for note in (n for s in outcome.steps for n in s.notes):
            print(note)
        store.fetch(target.key, options.out)


if __name__ == "__main__":
    main()
