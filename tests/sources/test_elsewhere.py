"""Layers of a source that stays where it is are not written: they are read there, until a checkpoint is made of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from moeflow.methods.calibrate.steps import Calibration
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.fewer_active.steps import Skipping
from moeflow.methods.graph import Model
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import moei2, naee
from moeflow.methods.trim import steps as trim
from moeflow.methods.trim.steps import Trimming
from moeflow.model.quiet import load_whole
from moeflow.run import StepFailed
from moeflow.sources import How, pin
from moeflow.sources.elsewhere import Elsewhere, Seen, is_note, weights
from moeflow.step import Step, upstream
from moeflow.store import Store, s3, versions
from tests import running, servers, tiny
from tests.models import calibrated
from tests.sources.test_sources import old

SHARD = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return old(tiny.write("mixtral", tmp_path / "model"))


def model_at(folder: Path, how: How = "refer") -> Model:
    return checkpoint.pinned(pin(str(folder), kind="model", how=how))


def bytes_of(store: Store, layer: Step) -> bytes:
    read = running.read(store, layer)
    return read.read("layer.safetensors", 0, read.size("layer.safetensors"))


def test_a_file_is_read_out_of_its_pieces_whatever_the_range(tmp_path: Path) -> None:
    first, second, head = bytes(range(40)), bytes(range(100, 160)), b"head"
    parts = [(0, "a", 5, 9), (0, "a", 9, 12), (1, "b", 0, 20), (0, "a", 30, 40), (1, "b", 20, 21)]
    inputs = {"a": first, "b": second}
    whole = head + b"".join(inputs[name][start:stop] for _, name, start, stop in parts)
    (tmp_path / "whole").write_bytes(whole)
    file = Elsewhere.load(Elsewhere.of(tmp_path / "whole", len(head), parts).dump())
    assert len(file.pieces) == 4, "neighbours are one piece"
    for start, stop in combinations(range(len(whole) + 1), 2):
        got = b"".join(p if isinstance(p, bytes) else inputs[p[1]][p[2] : p[3]] for p in file.between(start, stop))
        assert got == whole[start:stop]
    with pytest.raises(ValueError, match="not those of its pieces"):
        Elsewhere.of(tmp_path / "whole", len(head), parts[:-1])


def test_a_layer_is_the_same_file_as_a_copy_and_has_no_bytes_in_the_store(folder: Path, tmp_path: Path) -> None:
    stores = {how: Store.open(str(tmp_path / how)) for how in ("refer", "copy")}
    layers = {how: model_at(folder, how).layers[1] for how in stores}  # type: ignore[arg-type]
    for how, store in stores.items():
        running.run(store, layers[how])
    there, here = (store.manifest(layers[how].key) for how, store in stores.items())
    elsewhere, copied = (running.read(store, layers[how]) for how, store in stores.items())
    assert there.digest == here.digest and there.bytes < 0.05 * here.bytes
    assert elsewhere.names() == copied.names() and [elsewhere.size(n) for n in elsewhere.names()] == [
        *map(copied.size, copied.names())
    ]
    for name in copied.names():
        assert elsewhere.file(name).read_bytes() == copied.file(name).read_bytes()
        assert (elsewhere.folder() / name).read_bytes() == copied.read(name, 0, copied.size(name))
    assert sorted(p.name for p in elsewhere.folder().iterdir()) == copied.names(), "no note lies among the files"


def skipped(seen: Calibration) -> Model:
    return fewer_active.skip(seen, Skipping())


BY_LAYER = Counts(keep=0.75, rule="paper", importance="recon")
WRITES = ("rewrite.experts", "checkpoint.own")
"""The steps that write a layer's file, of which each links what another has written."""

MADE: dict[str, Callable[[Calibration], Model]] = {
    "as it is": lambda seen: seen.model,
    "pruned": lambda seen: naee.prune(seen, 5, Search("frequency")),
    "pruned by a run's counts": lambda seen: moei2.prune(seen, BY_LAYER, Search("swap")),
    "skipping": skipped,
    "without a block": lambda seen: trim.trim(seen, Trimming("moe_blocks", 1)),
    "without a decoder layer": lambda seen: trim.trim(seen, Trimming("decoder_layers", 1)),
    "Compressed Experts": lambda seen: fewer_active.attach(seen.model),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_checkpoint_has_every_byte_and_rests_on_nothing_outside_the_store(
    made: Callable[[Calibration], Model], folder: Path, tmp_path: Path
) -> None:
    digests = {}
    for how in ("refer", "copy"):
        model = model_at(folder, how)  # type: ignore[arg-type]
        target, store = checkpoint.checkpoint_of(made(calibrated(model, tmp_path))), Store.open(str(tmp_path / how))
        running.run(store, target)
        manifest = store.manifest(target.key)
        assert not any(map(is_note, manifest.files)) and not manifest.stands_for
        digests[how] = manifest.digest
        if how == "refer":
            last = [s for s in upstream([target]) if s.name in WRITES]
            written = {f.sha256: f.size for s in last for f in store.manifest(s.key).files.values()}
            assert sum(s.spec.writes for s in last) == pytest.approx(sum(written.values()), rel=0.1), "what is written is planned"
            assert versions.publish(store, "result", target.key) == 1
            moved = folder.rename(tmp_path / "gone")
            store.fetch(target.key, tmp_path / "pulled")
            moved.rename(folder)
    assert digests["refer"] == digests["copy"]


@pytest.mark.parametrize("order", [("refer", "copy"), ("copy", "refer")])
@pytest.mark.parametrize("made", [MADE["as it is"], MADE["without a block"]], ids=["as it is", "without a block"])
def test_no_result_is_taken_from_what_was_made_only_to_be_read(
    order: tuple[How, How], made: Callable[[Calibration], Model], folder: Path, tmp_path: Path
) -> None:
    """Early cutoff knows equal contents, and the files of one may lie at the source."""
    store = running.store_in(tmp_path)
    for how in order:
        model = made(calibrated(model_at(folder, how), tmp_path))
        running.run(store, checkpoint.text_model_of(model))
        result = checkpoint.checkpoint_of(model)
        running.run(store, result)
        assert not any(map(is_note, store.manifest(result.key).files)) and not store.manifest(result.key).stands_for


@pytest.mark.parametrize("then", ["refer", "copy"])
def test_a_layer_that_was_not_read_again_is_found_where_the_source_is_now(then: How, folder: Path, tmp_path: Path) -> None:
    store, before = running.store_in(tmp_path), model_at(folder).layers[1]
    running.run(store, before)
    wanted = bytes_of(store, before)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    shutil.rmtree(folder)
    layer = model_at(moved, then).layers[1]
    assert {s.name for s in running.run(store, layer).steps if s.state == "run"} == {
        "sources.reference" if then == "refer" else "sources.file"
    }
    if then == "copy":
        shutil.rmtree(moved)
    assert bytes_of(store, layer) == wanted
    with pytest.raises(ValueError, match="is not on this machine.*with -p source=copy"):
        bytes_of(store, before)


def test_what_changed_behind_a_layer_that_is_stored_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    store, model = running.store_in(tmp_path), model_at(folder)
    running.run(store, *model.layers)
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / SHARD).write_bytes(data)
    with pytest.raises(
        StepFailed, match="has changed since it was pinned: .*; with -p source=copy the store keeps a copy"
    ) as failed:
        running.run(store, checkpoint.checkpoint_of(model))
    assert "\n" not in str(failed.value)


def test_a_note_that_leads_to_other_bytes_is_noticed_when_they_are_copied(folder: Path, tmp_path: Path) -> None:
    store, layer = running.store_in(tmp_path), model_at(folder).layers[1]
    running.run(store, layer)
    read = running.read(store, layer)
    assert isinstance(read, Seen)
    [(name, file)] = read.elsewhere.items()
    read.elsewhere[name] = replace(file, pieces=tuple((i, n, start - 8, stop - 8) for i, n, start, stop in file.pieces))
    with pytest.raises(ValueError, match="made of bytes that have changed"):
        read.copy(name, tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


def test_what_lies_at_the_source_cannot_be_published(folder: Path, tmp_path: Path) -> None:
    store, listed = running.store_in(tmp_path), checkpoint.text_model_of(model_at(folder))
    running.run(store, listed)
    assert (running.read(store, listed).folder() / "config.json").exists()
    assert load_whole(running.read(store, listed).folder()).config.num_hidden_layers == 3, "it can be loaded all the same"
    with pytest.raises(ValueError, match=r"model-00001-of-0000\d.safetensors of .* lies outside the store"):
        versions.publish(store, "result", listed.key)


def test_layers_of_objects_are_downloaded_once_for_all_steps_of_a_machine(
    folder: Path, server: servers.Proxy, bucket: str, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        s3.client(server.url).upload_file(str(path), bucket, f"models/{path.name}")
    store, layer = (
        running.store_in(tmp_path),
        checkpoint.pinned(pin(f"s3://{bucket}/models?endpoint={server.url}", kind="model")).layers[1],
    )
    running.run(store, layer)
    server.requests.clear()
    sizes = []
    for _ in range(3):
        read = running.read(store, layer)
        sizes.append(Path(str(weights(read, "layer.safetensors"))).stat().st_size)
        assert isinstance(read, Seen) and read.reads == sizes[-1], "what is asked for counts, here already or not"
    assert {*sizes} == {read.size("layer.safetensors")} and sum(r.received for r in server.requests) <= sizes[0]
