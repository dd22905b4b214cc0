"""Snapshots from which an interrupted training continues: DeepSpeed's state of every process, the curve, and the best state."""

import errno
import json
import shutil
from dataclasses import asdict
from typing import Any

import torch

from moeflow.methods.finetune.curve import Curve, state_of
from moeflow.methods.finetune.learner import quiet
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.finetune.trained import parameters_of
from moeflow.step import Context

TAG = "engine"
CURVE = "curve.json"


class Snapshots:
    """Writes snapshots and resumes from them.

    `at` is the step of the newest snapshot, and `base` is added to a step for its snapshot's number. `best` is the folder in which
    rank 0 keeps the parameters of the best step.
    """

    def __init__(self, context: Context, engine: Any, gang: Gang) -> None:
        self.context, self.engine, self.at, self.base = context, engine, 0, 0
        self.folder = context.scratch / "state"
        self.best = self.folder / "best"
        self.folder.mkdir()
        # only the same layout can read a snapshot; one of another number of processes is never resumed
        self.layout = {"zero": gang.zero, "offload": gang.offload}

    def resumed(self, fresh: Curve) -> Curve:
        """Continue from the newest snapshot if there is one that fits. Returns the curve up to there, or else `fresh`."""
        if (kept := self.context.resume()) is None:
            return fresh
        mine = json.loads((kept / f"rank-{self.context.rank}.json").read_text())
        curve = Curve(**json.loads((kept / CURVE).read_text()))
        if mine["steps"] != curve.steps:
            raise RuntimeError(f"rank {self.context.rank} has the state of step {mine['steps']}, and rank 0 that of {curve.steps}")
        if mine["layout"] != self.layout:
            self.base = mine["at"]  # later snapshots must have higher numbers than the unreadable one
            self.context.note(f"a snapshot of {mine['layout']} cannot be read with {self.layout}; the training starts again")
            return fresh
        with quiet():
            self.engine.load_checkpoint(str(kept), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False)
        if self.context.rank == 0 and (kept / "best").is_dir():
            shutil.copytree(kept / "best", self.best)
        self.at, self.base = curve.steps, mine["at"] - curve.steps
        self.context.note(f"goes on behind step {curve.steps}")
        return curve

    def save(self, curve: Curve) -> None:
        """Save the state after the curve's last step. Raises ValueError if it is not finite, OSError if the disk is full."""
        if not self.at:
            # the weights, their fp32 copy and Adam's moments, and a copy of all for the store
            divided = self.context.processes if self.layout["zero"] else 1
            need, free = 2 * (4 + 12 / divided) * curve.trained, shutil.disk_usage(self.folder).free
            if need > free:
                raise OSError(errno.ENOSPC, f"a snapshot needs {need:,.0f} bytes, and {free:,} are free", str(self.folder))
        self.check(curve)
        with quiet():
            self.engine.save_checkpoint(str(self.folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        for script in self.folder.glob("zero_to_*.py"):
            script.unlink()
        number = self.base + curve.steps
        mine = {"steps": curve.steps, "at": number, "layout": self.layout}
        (self.folder / f"rank-{self.context.rank}.json").write_text(json.dumps(mine))
        if self.context.rank == 0:
            (self.folder / CURVE).write_text(json.dumps(asdict(curve)))
        self.context.save(self.folder, at=number)
        self.at = curve.steps

    def check(self, curve: Curve) -> None:
        """Raise ValueError, in every process, if any process has a trained parameter that is not finite."""
        tensors = [getattr(p, "ds_tensor", p) for p in parameters_of(self.engine.module).values()]
        good = torch.tensor(float(all(bool(t.isfinite().all()) for t in tensors)), device=self.engine.device)
        torch.distributed.all_reduce(good, op=torch.distributed.ReduceOp.MIN)
        if not good:
            raise ValueError(f"a trained parameter is not finite behind step {curve.steps}; {state_of(self.at)}")
