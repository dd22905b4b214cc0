"""How many bytes a step asks of the store, counted at the server."""

from pathlib import Path

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import naee
from moeflow.run import in_process
from moeflow.sources import pin
from moeflow.step import upstream
from moeflow.store import Store
from moeflow.store.manifest import CHUNK
from tests import running, servers, tiny


def test_dropping_experts_of_a_layer_reads_at_most_that_layer_s_file_and_assembling_moves_no_weight(
    s3_url: str, server: servers.Proxy, tmp_path: Path
) -> None:
    folder = tiny.write("mixtral", tmp_path / "model", hidden_size=128, intermediate_size=512)
    model = checkpoint.pinned(pin(str(folder), kind="model", how="copy"))  # what is referred to is read from the folder
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(4, 16))
    target = checkpoint.checkpoint_of(naee.prune(calibrate.run(model, matrix, Pass(batch=4, shard=4)), keep=6))
    steps = upstream([target])
    chosen = [s for s in steps if s.name == "prune.choose"]
    dropped = [s for s in steps if s.name == "rewrite.experts"]
    in_process.run(chosen, Store.open(s3_url, tmp_path / "one"))
    size = model.layers[0].spec.output.nbytes

    def received(*wanted: object) -> int:
        """Bytes that the server sent of blobs while these steps ran on a machine whose cache is empty."""
        cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        server.requests.clear()
        in_process.run(wanted, Store.open(s3_url, cache))  # type: ignore[arg-type]
        return sum(r.received for r in server.requests if r.method == "GET" and "/blobs/" in r.path)

    assert 0.7 * size < received(dropped[0]) <= 1.01 * size
    in_process.run(dropped, Store.open(s3_url, tmp_path / "two"))
    moved = received(target)
    assert moved < len(dropped) * CHUNK + 0.1 * size  # of each layer's file its header, which is verified with its chunk
    sent = [r.sent for r in server.requests if r.method == "PUT" and "/blobs/" in r.path]
    assert len(sent) <= 3 and sum(sent) < 0.02 * target.spec.output.nbytes
