"""Who may import whom: the picture of the architecture. The order of `LAYERS` is it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    "moeflow.step",
    "moeflow.store",
    "moeflow.sources",
    "moeflow.arch",
    "moeflow.model",
    "moeflow.serve",
    "moeflow.methods",
    "moeflow.run",
    "moeflow.report",
    "moeflow.job",
    "moeflow.result",
    "moeflow.api",
    "moeflow.recompress",
    "moeflow.cli",
    "pipelines",
]
ONLY_IN = {
    "ray": {"moeflow.run.ray"},
    "boto3": {"moeflow.store", "moeflow.sources"},
    "botocore": {"moeflow.store", "moeflow.sources"},
    "huggingface_hub": {"moeflow.sources", "moeflow.report.card"},
    "torch": {"moeflow.model", "moeflow.methods", "moeflow.serve"},
    "transformers": {"moeflow.model", "moeflow.methods", "moeflow.serve"},
    "vllm": {"moeflow.serve"},
    "datasets": set(),
    "pyarrow": {"moeflow.methods.data"},
    "deepspeed": {"moeflow.methods.finetune"},
    "lm_eval": {"moeflow.methods.judge"},
}
NEVER = {
    ("moeflow.store", "moeflow.sources"),
    ("moeflow.model", "moeflow.sources"),
    ("moeflow.arch", "moeflow.step"),
    ("moeflow.arch", "moeflow.store"),
    ("moeflow.model", "moeflow.store"),
    ("moeflow.methods", "moeflow.store"),
    ("moeflow.methods", "moeflow.serve"),
    ("moeflow.serve", "moeflow.step"),
    ("moeflow.serve", "moeflow.store"),
    ("moeflow.serve", "moeflow.sources"),
    ("moeflow.run", "moeflow.serve"),
    ("moeflow.report", "moeflow.serve"),
    ("moeflow.cli", "moeflow.serve"),
    ("moeflow.run", "moeflow.arch"),
    ("moeflow.run", "moeflow.model"),
    ("moeflow.run", "moeflow.methods"),
    ("moeflow.report", "moeflow.arch"),
    ("moeflow.report", "moeflow.model"),
    ("moeflow.report", "moeflow.methods"),
    *((one, other) for one in ("moeflow.job", "moeflow.result", "moeflow.api") for other in ("moeflow.arch", "moeflow.methods")),
    ("moeflow.cli", "moeflow.arch"),
    ("moeflow.cli", "moeflow.model"),
    ("moeflow.cli", "moeflow.methods"),
}
SOURCES = sorted([*ROOT.glob("moeflow/**/*.py"), *ROOT.glob("pipelines/*.py")])


FLOOR = ("graph", "records", "scores", "moments", "rewrite", "allocate", "reports", "recorded", "rare")
"""The shared floor of `moeflow.methods`: what every verb stands on."""


def room_of(module: str) -> str | None:
    """The room of `moeflow.methods` that a module lies in, "floor" for a file of the shared floor."""
    inside = module.split(".")[2:] if module.startswith("moeflow.methods.") else []
    return None if not inside else "floor" if inside[0] in FLOOR else inside[0]


def layer_of(module: str) -> str | None:
    return next((layer for layer in LAYERS if module == layer or module.startswith(layer + ".")), None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here_ = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = layer_of(here_)
    for module in imports(path):
        owners = ONLY_IN.get(module.split(".")[0])
        assert owners is None or any(here_ == o or here_.startswith(o + ".") for o in owners), (
            f"{path.name} imports {module}, which belongs to {owners}"
        )
        there = layer_of(module)
        if here and there:
            assert LAYERS.index(there) <= LAYERS.index(here), f"{path.name} imports {module}, which stands above it"
            assert (here, there) not in NEVER, f"{path.name} imports {module}: these two never meet"


@pytest.mark.parametrize("path", sorted(ROOT.glob("moeflow/methods/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_verb_imports_another(path: Path) -> None:
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    others = {room for m in imports(path) if (room := room_of(m)) is not None} - {here, "floor"}
    assert here == "recipes" or not others, f"{path.name} of {here} imports {others}; what two verbs need is on the shared floor"


def test_a_room_has_steps_without_torch_and_its_steps_are_named_after_it() -> None:
    for file in sorted(ROOT.glob("moeflow/methods/**/*.py")):
        room = room_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        room = file.stem if room == "floor" else room
        names = re.findall(r'^@step\(\s*"([^".]+)\.', file.read_text(), re.M)
        assert set(names) <= {room}, f"{file} of {room} defines steps of {set(names)}"
        assert not names or room == file.stem or file.name == "steps.py", f"{file} defines steps outside steps.py"
    python(
        "import sys, importlib, pathlib\n"
        "for f in pathlib.Path('moeflow/methods').glob('*/steps.py'):\n"
        "    importlib.import_module('.'.join(f.with_suffix('').parts))\n"
        "assert 'torch' not in sys.modules"
    )


def functions(path: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


def test_no_signature_of_a_method_or_a_pipeline_has_more_than_ten_parameters() -> None:
    for path in (*ROOT.glob("moeflow/methods/**/*.py"), *ROOT.glob("pipelines/*.py")):
        for f in functions(path):
            count = sum(map(len, (f.args.posonlyargs, f.args.args, f.args.kwonlyargs))) + bool(f.args.vararg) + bool(f.args.kwarg)
            assert count <= 10, f"{path}: {f.name} has {count} parameters; make a value of those that belong together"


def test_the_inputs_of_a_step_have_names() -> None:
    for path in ROOT.glob("moeflow/**/*.py"):
        for f in functions(path):
            steps = [
                d for d in f.decorator_list if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "step"
            ]
            assert not steps or f.args.vararg is None, f"{path}: the step {f.name} takes *{f.args.vararg and f.args.vararg.arg}"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pipelines_are_planned_without_torch() -> None:
    """Building a graph and finding it stored takes no second that importing torch would."""
    names = ", ".join(sorted(p.stem for p in ROOT.glob("pipelines/*.py")))
    loaded = python(f"import sys; sys.path.insert(0, 'pipelines'); import {names}; print(*sys.modules)").split()
    assert {"mixtral", "tiny"} <= set(loaded) and not {"torch", "transformers", "ray", "pyarrow"} & set(loaded)


NEEDS_TRITON = "ragged_kernel.py"
"""Imported where a GPU's torch is, and no sooner."""


def test_the_tensor_code_runs_where_ray_and_boto3_are_not_installed() -> None:
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in ("arch", "model", "methods")
        for p in sorted((ROOT / "moeflow" / room).rglob("*.py"))
        if p.name not in ("steps.py", NEEDS_TRITON) and "recipes" not in p.parts
    ]
    assert len(modules) > 40
    python(
        "import importlib, sys\n"
        "sys.modules |= dict.fromkeys(('ray', 'boto3', 'botocore', 'deepspeed'))\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )


def test_the_plug_in_of_vllm_costs_nothing_before_vllm_calls_it() -> None:
    loaded = python("import sys, moeflow.serve.plugin, moeflow.serve.ways; print(*sys.modules)").split()
    assert not {"vllm", "torch", "transformers"} & set(loaded)


def test_a_finished_pipeline_is_found_finished_without_torch(tmp_path: Path) -> None:
    """Also the digests of the steps' sources are had without importing what the steps import."""
    told = python(
        "import sys; sys.path.insert(0, 'pipelines'); import tiny; from moeflow.step import upstream\n"
        "from moeflow.sources import pin\n"
        "target = tiny.build(pin(tiny.MODEL, kind='model'))\n"
        "print(len({s.source for s in upstream([target, *target.reports])}), 'torch' in sys.modules)"
    )
    assert told.split() == ["21", "False"]
