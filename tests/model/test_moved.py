"""Layers that are moved to a device while others compute are what they were in their files. The device is an emulated one."""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeflow.arch import Config, Family
from moeflow.methods.calibrate import forking
from moeflow.model import passes
from moeflow.model.alternatives import Kept
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Folder, read_config
from moeflow.model.moved import Moved, arriving
from moeflow.model.packed import ADDED_IN, ADDED_OUT, BLOCK_SCALE, BLOCKS, PACKED, SCALE, SCALES, SHAPE, repacked
from moeflow.model.spec import Recording
from moeflow.model.stream import HIDDEN, Stream
from tests import compressed, emulated_gpu, tiny
from tests.emulated_gpu import OnGPU, emulated


@pytest.fixture
def in_every_form(tmp_path: Path) -> Path:
    """A matrix in each form that one has on disk: as it is, in FP8, in MXFP4, and packed with and without something added."""
    codes = repacked(torch.randint(-8, 8, (16, 32)).to(torch.int8), 4)
    packed = {PACKED: codes, SCALE: torch.rand(16, 4), SHAPE: torch.tensor([16, 32])}
    forms = {
        "whole": {"": torch.randn(16, 32)},
        "fp8": {"": torch.randn(16, 32).to(torch.float8_e4m3fn), BLOCK_SCALE: torch.rand(2, 4)},
        "mxfp4": {
            BLOCKS: torch.randint(0, 256, (16, 2, 16)).to(torch.uint8),
            SCALES: torch.randint(120, 130, (16, 2)).to(torch.uint8),
        },
        "packed": packed,
        "added": packed | {ADDED_OUT: torch.randn(16, 2), ADDED_IN: torch.randn(2, 32)},
    }
    tensors = {name + end: t.clone() for name, parts in forms.items() for end, t in parts.items()}
    save_file(tensors, tmp_path / "layer.safetensors")
    return tmp_path / "layer.safetensors"


@pytest.mark.parametrize("room", [0, 5000, 10**9])
def test_as_many_tensors_as_there_is_room_for_are_there_before_they_are_asked_for(room: int, in_every_form: Path) -> None:
    read = Tensors(in_every_form)
    with emulated():
        moved = Moved(in_every_form, torch.device("cuda"), room)
        tensors = {name: moved[name] for name in moved}
        there = [name for name, t in tensors.items() if isinstance(t, OnGPU)]
        for name, t in tensors.items():
            assert torch.equal(t.cpu(), read[name]) and t.dtype == read[name].dtype and torch.equal(moved.lent(name).cpu(), t.cpu())
    assert {*tensors} == {*read} == {"whole", "fp8", "mxfp4", "packed", "added"}
    taken = sum(read[name].nbytes for name in there)
    assert taken <= room and len(there) == {0: 0, 5000: 2, 10**9: 5}[room]


def test_layers_that_arrive_on_a_device_compute_what_they_do_from_their_files(tmp_path: Path) -> None:
    """Some experts whole, others of differing ranks; also where there is room for a part of a layer's tensors alone."""
    folder = compressed.compress(tiny.write("mixtral", tmp_path / "model"), tmp_path / "compressed")
    config = read_config(Folder(folder))
    layers, files = [*range(Family.of(config).num_layers)], []
    tensors = Tensors(folder)
    for i in layers:
        files.append(tmp_path / f"layer-{i}")
        save_file({n: tensors[n] for n in tensors if n.startswith(Family.of(config).prefix(i))}, files[-1])
    start_NLD = torch.randn(2, 8, config["hidden_size"], generator=torch.Generator().manual_seed(0))

    def ends(device: str) -> Iterator[Tensor]:
        stream, states = Stream(config, device=device, dtype="float32"), {HIDDEN: start_NLD.to(device)}
        for layer, arrived in arriving(zip(layers, files, strict=True), stream.device):
            states = stream.run(stream.layer(arrived, layer), layer, states)
            yield states[HIDDEN].cpu()

    with torch.inference_mode():
        expected = [*ends("cpu")]
        for memory in (80 * 10**9, 400_000):
            with emulated(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(emulated_gpu, "MEMORY", memory)
                torch.testing.assert_close([*ends("cuda")], expected)


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[tuple[Config, list[tuple[int, Path]]]]:
    """The configuration and the layers' files of a tiny model; what is kept of a device that is emulated is forgotten."""
    config = read_config(Folder(tiny.write("mixtral", tmp_path / "model")))
    tensors, layers = Tensors(tmp_path / "model"), []
    for i in range(Family.of(config).num_layers):
        layers.append((i, tmp_path / f"layer-{i}"))
        save_file({n: tensors[n] for n in tensors if n.startswith(Family.of(config).prefix(i))}, layers[-1][1])
    passes._stream.cache_clear()
    yield config, layers
    passes._stream.cache_clear()


def on_both(work: Callable[[str], Any]) -> tuple[Any, Any]:
    """What this gives on the processor and on the device; it is told the name of either."""
    expected = work("processor")
    passes._stream.cache_clear()
    with emulated():
        return work("device"), expected


def test_a_pass_on_a_device_is_that_on_the_processor(whole: tuple[Config, list[tuple[int, Path]]], tmp_path: Path) -> None:
    """States stay there between layers, and what is recorded comes back."""
    config, layers = whole
    save_file({HIDDEN: torch.randn(4, 8, config["hidden_size"])}, tmp_path / "start")

    def through(name: str) -> dict[str, Tensor]:
        folder = tmp_path / name
        folder.mkdir()
        how: dict[str, Any] = {"count": len(layers), "batch": 3, "dtype": "float32", "progress": lambda *_: None}
        passes.through(config, tmp_path / "start", layers, folder / "end", recording=Recording(16, between=8), **how)
        return {f"{file.name} {n}": t for file in folder.iterdir() for n, t in load_file(file).items()}

    seen, expected = on_both(through)
    assert {*seen} == {*expected} and len(seen) > 10
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_a_pass_holds_the_layer_that_computes_and_the_next_one_and_no_more(
    whole: tuple[Config, list[tuple[int, Path]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not also the tensors that the layer was made of; so it is planned (`memory.passing`)."""
    config, layers = whole
    save_file({HIDDEN: torch.randn(2, 8, config["hidden_size"])}, tmp_path / "start")
    run, moved, held, arrived = Stream.run, Moved.__init__, list[int](), list[int]()

    def moving(*args: Any) -> None:
        moved(*args)
        arrived.append(1)

    def on_device() -> dict[int, int]:
        storages = [t.held.untyped_storage() for t in gc.get_objects() if type(t) is OnGPU]
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    gc.collect()
    before = on_device().keys()

    def counting(stream: Stream, *args: Any) -> Any:
        latest = time.monotonic() + 30
        while len(arrived) < min(len(held) + 2, len(layers)) and time.monotonic() < latest:
            time.sleep(0.01)  # until the next layer is there
        held.append(sum(size for at, size in on_device().items() if at not in before))
        return run(stream, *args)

    monkeypatch.setattr(Stream, "run", counting)
    monkeypatch.setattr(Moved, "__init__", moving)
    how: dict[str, Any] = {"count": len(layers), "batch": 0, "dtype": "float32", "progress": lambda *_: None}
    with emulated():
        passes.through(config, tmp_path / "start", layers, tmp_path / "end", **how)
    size = max(sum(t.nbytes for t in load_file(file).values()) for _, file in layers)
    assert 0.9 * size < max(held) < 2.2 * size


def test_forks_on_a_device_are_those_on_the_processor(whole: tuple[Config, list[tuple[int, Path]]]) -> None:
    config, layers = whole
    start_NLD, told = torch.randn(4, 8, config["hidden_size"]), list[int]()

    def forked(_: str) -> dict[str, Tensor]:
        stages = (forking.Stage(i, file, {"two": Kept((0, 1)), "file": layers[0][1]} if i == 0 else {}) for i, file in layers)
        how: dict[str, Any] = {"forks": 2, "batch": 3, "dtype": "float32", "progress": told.append}
        own_NLD, made = forking.through(config, {HIDDEN: start_NLD}, stages, **how)
        return {"own": own_NLD.cpu()} | {name: t.cpu() for (_, name), t in made.items()}

    seen, expected = on_both(forked)
    assert {*seen} == {"own", "two", "file"} and not torch.equal(seen["own"], seen["two"])
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert told == 2 * [*range(1, len(layers) + 1)]


def test_a_file_that_is_missing_is_told_when_its_layer_is_due(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "first")
    arrived = arriving([(0, tmp_path / "first"), (1, tmp_path / "second")], torch.device("cpu"))
    name, tensors = next(arrived)
    assert name == 0 and torch.equal(tensors["a"], torch.ones(2))
    with pytest.raises(FileNotFoundError, match="second"):
        next(arrived)
