"""Sixteen named runs of the pipelines, and a digest of every tensor file that each of them publishes: are they what they were?

    OMP_NUM_THREADS=1 python -m benchmarks.digests [NAME...]

Run it before and after a change that is to change no byte, on one machine, and compare. It takes the trained Mixtral and the texts
in ../shared, and tiny random models of other families. Raises FileNotFoundError where ../shared is absent.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.quality import SHARED
from moeflow.run import in_process, pipeline
from moeflow.store import Store
from tests import running, tiny

PIPELINES = Path(__file__).parents[1] / "pipelines"
TEXT = f"{SHARED}/data/wikitext2_validation.jsonl#text,python:stdlib/[!s-z]*.py"
HELD_OUT = f"{SHARED}/data/wikitext2_test.jsonl#text"
PASS = ["calibration.batch=4", "calibration.dtype=float32", "calibration.sequences=16", "calibration.length=128"]
TRAINED = [
    f"model={SHARED}/models/mixtral-21m",
    f"tokens={TEXT}",
    f"heldout={HELD_OUT}",
    "heldout.sequences=2",
    "heldout.length=128",
]
TRAINED += PASS
RECORD = ["calibration.record=1024", "calibration.per_expert=16"]
GENETIC = ["search.population=10", "search.generations=3"]
MOEI2 = [*TRAINED, *RECORD, *GENETIC, "counts.measured=512", "decomposition.measured=512", "tune=none"]
UNIFIED = [*TRAINED, *RECORD, "slim.group=32", "decompose.multiple=32"]
OURS = [
    "counts.rule=exact", "search=swap", "search.span=1", "decomposition.svd=whitened", "decomposition.ranks=global",
]  # fmt: skip
SMALL = ["calibration.sequences=8", "calibration.length=16", "calibration.batch=2", "heldout.sequences=2", "heldout.length=16"]
SMALL += ["calibration.record=128", "calibration.per_expert=4"]
TUNE = [
    "tune.rows=8", "tune.batch=4", "tune.epochs=1", "tune.rate=1e-2", "tune.length=16", "tune.text=@",
    "gang.processes=1", "gang.zero=0", "gang.offload=false",
]  # fmt: skip
TUNED = [*TUNE, "heldout=@", "heldout.sequences=2", "heldout.length=16"]

RUNS: dict[str, tuple[str, str, list[str]]] = {
    "tiny": ("tiny", "", []),
    "naee": ("mixtral", "", [*TRAINED, "keep=6", "skipping=median"]),
    "naee progressive": ("mixtral", "", [*TRAINED, "keep=4", "search=progressive", "skipping=1.7"]),
    "moei2": ("mixtral_moei2", "", MOEI2),
    "moei2 ours": ("mixtral_moei2", "", [*MOEI2, *OURS, "decomposition.multiple=32"]),
    "moei2 qwen": (
        "qwen15_moe", "qwen2_moe",
        [*SMALL, *GENETIC, "tokens=@", "tune=none", "search.inputs=progressive", "decomposition.rare=keep"],
    ),
    "moei2 deepseek": (
        "deepseek_v2_lite", "deepseek_v2", [*SMALL, *GENETIC, "tokens=@", "tune=none", *OURS, "decomposition.multiple=2"],
    ),
    "moei2 lora": (
        "mixtral_moei2", "mixtral",
        [*SMALL, *GENETIC, "tokens=@", "counts.importance=recon", "decomposition.importance=recon", *TUNE],
    ),
    "unified": ("mixtral_unified", "", [*UNIFIED, "trim.dropped=2"]),
    "unified trim first": (
        "mixtral_unified", "",
        [*UNIFIED, "order=trim,slim", "trim=experts", "trim.dropped=2", "slim=gptq", "slim.inputs=sequential"],
    ),
    "unified blocks": ("mixtral_unified", "", [*UNIFIED, "trim=decoder_layers", "trim.dropped=1", "slim=sparsegpt"]),
    "unified low rank": ("mixtral_unified", "", [*UNIFIED, "order=decompose,slim", "slim=gptq", "slim.tasks=2"]),
    "unified deepseek": (
        "deepseek_v2_lite_unified", "deepseek_v2",
        [*SMALL, "tokens=@", "order=trim,slim", "trim=experts", "trim.dropped=2", "slim=wanda", "slim.shared=true"],
    ),
    "unified qwen": ("qwen15_moe_unified", "qwen2_moe", [*SMALL, "tokens=@", "slim.group=8", "trim.dropped=1"]),
    "olmoe": ("olmoe", "olmoe", TUNED),
    "phimoe": ("phimoe", "phimoe", [*TUNED, "tune=compressed_experts", "tune.loss=kl"]),
}  # fmt: skip
"""By name: the pipeline, the family of a tiny random model where it is not the trained one, and the words; @ is a token matrix."""


def digests(name: str, work: Path) -> dict[str, str]:
    """The digest of every tensor file that this run publishes."""
    file, family, words = RUNS[name]
    if family:
        folder = work / name.replace(" ", "-")
        folder.mkdir()
        matrix = running.matrix_of(folder).spec
        words = [f"model={tiny.write(family, folder / 'model')}", *(w.replace("=@", f"={matrix}") for w in words)]
    store = Store.open(str(work / "store"))
    target = running.alone(pipeline.call(pipeline.load(PIPELINES / f"{file}.py"), words))
    in_process.run([target], store)
    artifact = store.artifact(target.key)  # whose folder goes with it
    files = sorted(artifact.folder().rglob("*.safetensors"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in names or RUNS:
            files = digests(name, Path(folder))
            whole = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
            print(f"{name:20} {whole}  {len(files)} files", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
