"""The training loop of a fine-tuning, which each process of a gang runs, with torch.distributed and DeepSpeed.

Shapes are suffixes: N sequences, n some of them, L positions.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.methods.finetune.batches import Rows, batch_of, dealt
from moeflow.methods.finetune.curve import Curve, of_step, of_validation
from moeflow.methods.finetune.deepspeed_config import used
from moeflow.methods.finetune.learner import distributed, engine_of, learning, load
from moeflow.methods.finetune.peft_format import inexpressible, write_adapter
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.finetune.snapshots import Snapshots
from moeflow.methods.finetune.steps import TRAINING
from moeflow.methods.finetune.teacher import Predictions, States, Teacher, loss_sum
from moeflow.methods.finetune.trained import collect, parameters_of, write
from moeflow.model.layout import Folder, read_config
from moeflow.step import Artifact, Context


class Tuning:
    """One process's side of a training."""

    def __init__(
        self, context: Context, folder: Path, rows: Rows, teacher: Teacher | None, heldout: Mapping[str, Rows], recipe: Recipe,
        gang: Gang, device: torch.device,
    ) -> None:  # fmt: skip
        self.context, self.recipe, self.gang, self.device = context, recipe, gang, device
        self.rows, self.teacher, self.heldout = rows, teacher, heldout
        self.config = used(recipe, gang, rows.length)
        self.micro = int(self.config["train_micro_batch_size_per_gpu"])
        model = load(folder, recipe, self.config, device, checkpointing=gang.checkpointing)
        self.engine = engine_of(model, self.config, decay=recipe.decay)
        self.curve = Curve(sum(getattr(p, "ds_numel", p.numel()) for p in parameters_of(model).values()))
        self.snapshots = Snapshots(context, self.engine, gang)

    def run(self) -> Path:
        """Train from the last snapshot on. Returns the folder where rank 0 has stored the trained parameters."""
        self.curve = self.snapshots.resumed(self.curve)
        began = time.monotonic() - self.curve.seconds
        for at, values in self.curve.told():
            self.context.scalars(at, values)
        if not self.curve.validations:
            self._validate(0)
        learning(self.engine.module, True)
        for step in range(self.curve.steps, self.recipe.steps):
            self._step(step)
            self.curve.seconds = time.monotonic() - began
            done = step + 1
            if done == self.recipe.steps or (self.recipe.every and done % self.recipe.every == 0):
                self._validate(done)
            if done % self.gang.save_every == 0 and done < self.recipe.steps:
                self.snapshots.save(self.curve)
        if self.recipe.keep == "last":
            self.snapshots.check(self.curve)
            collect(self.engine.module, self.snapshots.best, writes=self.context.rank == 0)
            self.curve.best = self.recipe.steps
        self.curve.seconds = time.monotonic() - began
        return self.snapshots.best

    def _step(self, step: int) -> None:
        began = time.monotonic()
        rate = self.recipe.rate_at(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        rows = batch_of(step, self.recipe.batch, len(self.rows), self.recipe.seed)
        total = max(1, int(self.rows.counts_N[rows].sum()))
        batches = dealt(rows, self.context.rank, self.context.processes, self.micro)
        # DeepSpeed averages over processes and micro-batches; the loss is the mean over the tokens of the whole batch
        weight = self.context.processes * len(batches) / total
        loss = 0.0
        for at, part in enumerate(batches):
            # makes dropout, if the configuration has any, the same at every attempt
            torch.manual_seed(int(np.random.default_rng([self.recipe.seed, step, self.context.rank, at]).integers(2**63)))
            summed = self._loss(self.rows, part, self.teacher)
            self.engine.backward(summed * weight)
            self.engine.step()
            loss += summed.item()
        loss = self._sum(loss) / total
        tokens = self.recipe.batch * self.rows.length
        speed = tokens / (time.monotonic() - began)
        self.context.scalars(step + 1, of_step(loss, rate, speed))
        self.curve.add(loss, rate, speed, kept=self.snapshots.at)
        detail = f"loss {loss:.3f}  {speed:,.0f} tokens/s  lr {rate:.1e}"
        self.context.progress((step + 1) * tokens, self.recipe.steps * tokens, "tokens", detail)

    def _loss(self, rows: Rows, part: np.ndarray, teacher: Teacher | None = None) -> Tensor:
        """The loss of a micro-batch of these rows, summed over its learned tokens."""
        ids_nL, learned_nL = (torch.from_numpy(p).to(self.device) for p in rows.at(part))
        taught = None if teacher is None else teacher.of(part, learned_nL)
        logits_nLV = self.engine(input_ids=ids_nL, use_cache=False).logits
        return loss_sum(logits_nLV, ids_nL, learned_nL, taught, self.recipe.divergence)

    @torch.no_grad()
    def _validate(self, done: int) -> None:
        """Measure the mean loss on each held-out text; keep the trained parameters if they are the best so far."""
        if not self.heldout:
            return
        learning(self.engine.module, False)
        losses = {name: self._mean(rows) for name, rows in self.heldout.items()}
        learning(self.engine.module, True)
        self.context.scalars(done, of_validation(losses))
        if self.curve.validated(done, losses, kept=self.snapshots.at) and self.recipe.keep == "best":
            collect(self.engine.module, self.snapshots.best, writes=self.context.rank == 0)

    def _mean(self, rows: Rows) -> float:
        """The mean loss over all tokens of a held-out text. Every process runs the same number of batches; a few do not count."""
        mine = np.arange(len(rows))[self.context.rank :: self.context.processes]
        most = math.ceil(math.ceil(len(rows) / self.context.processes) / self.micro)
        total = 0.0
        for at in range(0, most * self.micro, self.micro):
            part = mine[at : at + self.micro]
            summed = self._loss(rows, part if len(part) else np.array([0])).item()
            total += summed if len(part) else 0.0
        return self._sum(total) / int(rows.counts_N.sum())

    def _sum(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total)


def tune(
    context: Context, checkpoint: Artifact, data: Artifact, teacher: Sequence[Path], head: Artifact | None,
    heldout: Mapping[str, Artifact], recipe: Recipe,
) -> None:  # fmt: skip
    """Train, and write the trained layers, `training.json` and `deepspeed.json` into the step's folder.

    `teacher`: files of its predictions or, if its `head` is there, of its hidden states.
    """
    folder = checkpoint.folder()
    gang = Gang(context.processes, **context.settings)
    with distributed(context.local_rank, gpus=gang.gpus, offload=gang.offload) as device:
        if recipe.dtype == "bfloat16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            context.note("this processor has no instructions for bf16: dtype='float32' trains ten times as fast here")
        rows, texts = Rows.of(data), {name: Rows.of(matrix) for name, matrix in heldout.items()}
        taught = None if not teacher else Predictions(teacher) if head is None else States(teacher, head)
        tuning = Tuning(context, folder, rows, taught, texts, recipe, gang, device)
        trained = tuning.run()
    if context.rank == 0:
        files = sorted(trained.glob("*.safetensors"))
        for done, _ in enumerate(write(Folder(folder), read_config(Folder(folder)), trained, context.out, recipe), 1):
            context.progress(done, len(files), "layers")
        if recipe.adapter:
            additions = {name: tensor for file in files for name, tensor in load_file(file).items()}
            if why := inexpressible(additions, recipe):
                context.note(f"no adapter is written: {why}")
            else:
                write_adapter(additions, tuning.engine.module, recipe, context.out / "adapter")
        (context.out / TRAINING).write_text(json.dumps(asdict(tuning.curve)) + "\n")
        (context.out / "deepspeed.json").write_text(json.dumps(tuning.config, indent=1) + "\n")
        context.note(tuning.curve.summary())
