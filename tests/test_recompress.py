"""moeflow recompress: what a scheduler calls. The newest fine-tune is compressed, judged, promoted and told, once."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from moeflow import recompress
from moeflow.cli import app
from moeflow.recompress import Exit
from moeflow.report import about, trackers
from moeflow.report.recipe import text
from moeflow.store import Store, labels, s3, versions
from moeflow.store.claims import claimed
from moeflow.store.runs import Mark
from tests import fine_tuned, servers

PIPELINE = Path(fine_tuned.__file__)
Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`moeflow recompress`, of the folder `tunes`, as `fit@N` into `store`, for the label `production`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*words: object) -> Result:
        common = ["recompress", PIPELINE, "--source", "tunes", "--store", "store", "--promote", "production", "--name", "toy"]
        settle = [] if "--settle" in words else ["--settle", "0s"]
        return CliRunner().invoke(app, [str(w) for w in (*common, *settle, *words)], catch_exceptions=False)

    return call


@contextmanager
def webhook(*answers: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that takes notices: its address, and those it has got; it answers so, then 200."""
    got: list[dict[str, Any]] = []
    left = [*answers]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = left.pop(0) if left else 200
            if status == 200:
                got.append(json.loads(body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook/secret", got
    finally:
        server.shutdown()
        server.server_close()


def error(result: Result) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line


def store() -> Store:
    return Store.open("store")


def test_a_fine_tune_becomes_a_version_and_the_label_moves_once(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    first = cli("--gate", "kl<0.02", "--gate", "kl<=1.5x promoted")
    assert first.exit_code == Exit.PROMOTED, first.output
    assert "toy@1 is the first: nothing was promoted" in first.stdout and "production is toy@1" in first.stdout
    again = cli("--gate", "kl<0.02", "--gate", "kl<=1.5x promoted")
    assert again.exit_code == Exit.NOTHING_NEW and "nothing new: " in again.stderr
    assert [m.ref for m in labels.history(store(), "production")] == ["toy@1"]
    (version,) = versions.list(store())
    assert version.record["gate"] == ["kl<0.02", "kl<=1.5x promoted"] and version.record["source"]["uri"].endswith("/tunes/a")


def test_a_version_has_a_whole_recipe_from_which_it_is_made_again_and_later_ones_too(cli: Cli) -> None:
    model = fine_tuned.write(Path("tunes/a"), 1)
    assert cli().exit_code == Exit.PROMOTED
    opened = store()
    Path("recipe.yaml").write_text(text(about.of(opened, "toy@1")))
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    assert recipe["parameters"] == {"model": str(model.absolute()), "fail": False} and recipe["name"] == "toy"
    again = CliRunner().invoke(app, ["run", "recipe.yaml", "--store", "store"])
    assert again.exit_code == 0 and "toy@1  " in again.stdout
    fine_tuned.write(Path("tunes/b"), 2)
    words = ["recompress", "recipe.yaml", "--source", "tunes", "--store", "store", "--promote", "production", "--settle", "0s"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == Exit.PROMOTED and "production is toy@2, which was toy@1" in done.stdout, done.output


def test_its_runs_are_tracked_and_a_tracker_that_cannot_be_is_refused_before_it_looks(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    class Lines:
        def __init__(self, where: str, run: str) -> None:
            lines.append(f"{run} to {where}")

        def told(self, told: Mapping[str, str]) -> None:
            lines.extend(f"{name}={value}" for name, value in told.items())

        def scalars(self, values: Sequence[trackers.Scalar]) -> None:
            lines.extend(f"{one.name} is {one.value}" for one in values)

        def close(self, *, failed: bool) -> None:
            lines.append(f"failed: {failed}")

    monkeypatch.setitem(trackers.TRACKERS, "lines", trackers.Kind("json", "WHERE", Lines))
    model = fine_tuned.write(Path("tunes/a"), 1)
    assert cli("--track", "lines:here").exit_code == Exit.PROMOTED
    assert lines[0] == "toy to here" and {f"model={model.absolute()}", "version=toy@1", "compressed/kl[prose] is 0.01"} <= {*lines}
    assert lines[-1] == "failed: False"
    wrong = cli("--track", "comet:here", "--source", "absent")
    assert wrong.exit_code == Exit.WRONG and "--track comet:here: 'comet' is no tracker" in error(wrong)


def test_a_pipeline_that_comes_with_moeflow_is_named_without_its_file(cli: Cli) -> None:
    Path("tunes").mkdir()
    words = ["recompress", "mixtral", "--source", "tunes", "--store", "store", "--promote", "production", "--settle", "0s"]
    assert "tunes" in error(CliRunner().invoke(app, words))
    fine_tuned.write(Path("tunes/a"), 1)
    assert "the pipeline has no parameter 'kept'; did you mean" in error(CliRunner().invoke(app, [*words, "-p", "kept=4"]))


def test_a_broken_fine_tune_is_refused_and_the_label_stays(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    cli("--gate", "kl<0.02")
    fine_tuned.write(Path("tunes/b"), 2, kl=0.9, keep=(1, 3))
    refused = cli("--gate", "kl<0.02")
    assert refused.exit_code == Exit.REFUSED
    assert "toy@2 is not promoted: kl[prose] is 0.9, and < 0.02 fails" in refused.stdout
    assert "choices: 1 of 1 layers changed; 33% of the kept experts are the same" in refused.stdout
    assert "kl[prose]: 0.01 -> 0.9" in refused.stdout
    assert cli("--gate", "kl<0.02").exit_code == Exit.NOTHING_NEW, "it was judged"
    assert versions.labelled(store()) == {"production": "toy@1"}
    assert cli("--gate", "kl<1").exit_code == Exit.PROMOTED, "another gate is another question"


def test_the_plan_says_what_early_cutoff_will_save(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1, shards=4)
    cli()
    fine_tuned.write(Path("tunes/b"), 2, shards=4)
    told = json.loads(cli("--json").stdout)
    assert told["event"] == "promoted" and told["was"] == "toy@1"
    assert "plan:" not in cli("--gate", "kl<1").stderr, "these bytes are stored"
    fine_tuned.write(Path("tunes/c"), 3, shards=4)
    planned = cli().stderr
    most, left = map(int, re.findall(r"plan: of (\d+) steps behind the new files at most (\d+) are to run", planned)[0])
    assert most > 8 and left == 1, planned


def test_half_a_checkpoint_is_tried_again_later(cli: Cli) -> None:
    folder = fine_tuned.write(Path("tunes/a"), 1)
    shard = folder / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    result = cli("--json")
    assert result.exit_code == Exit.LATER == 75 and "try again later: " in result.stderr and shard.name in result.stderr
    assert json.loads(result.stdout)["event"] == "later"
    shard.write_bytes(data)
    assert cli().exit_code == Exit.PROMOTED


def test_a_checkpoint_that_changes_between_two_looks_is_still_being_written(cli: Cli) -> None:
    folder = fine_tuned.write(Path("tunes/a"), 1)
    timer = threading.Timer(0.2, lambda: fine_tuned.write(folder, 7, kl=0.011))
    timer.start()
    result = cli("--settle", "1s")
    timer.join()
    assert result.exit_code == Exit.LATER and "changed between two looks" in result.stderr
    assert cli("--marker", "DONE").exit_code == Exit.LATER
    (folder / "DONE").touch()
    assert cli("--marker", "DONE", "--settle", "1h").exit_code == Exit.PROMOTED, "with a marker nothing is waited for"


@pytest.mark.slow
def test_nothing_new_is_said_by_a_few_requests(server: servers.Proxy, bucket: str, cli: Cli) -> None:
    client, where = s3.client(server.url), f"?endpoint={server.url}"
    for name, data in fine_tuned.files(1).items():
        client.put_object(Bucket=bucket, Key=f"tunes/a/{name}", Body=data)
    words = ["--source", f"s3://{bucket}/tunes{where}", "--store", f"s3://{bucket}/store{where}"]
    assert cli(*words).exit_code == Exit.PROMOTED
    server.reset()
    assert cli(*words).exit_code == Exit.NOTHING_NEW
    assert server.count() <= 8, [r.path for r in server.requests]


def test_of_two_at_once_one_works_and_the_other_leaves(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    other = Mark(Store.open("store"), [])
    with claimed(store(), "recompress-production", other.name):
        result = cli()
    assert result.exit_code == Exit.LATER and "another run is compressing for production now" in result.stderr
    other.end()
    assert cli().exit_code == Exit.PROMOTED


def test_what_another_run_did_between_the_look_and_the_start_is_not_done_again(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    opened, request = Store.open("store"), recompress.Request(PIPELINE, "tunes", "production", "toy", settle=0.0)
    there = recompress.find(request, opened, say=print)
    assert cli().exit_code == Exit.PROMOTED
    with pytest.raises(recompress.NothingNew, match="by another run meanwhile"), recompress.alone(request, opened, there):
        pass


def test_a_label_that_another_process_moves_meanwhile_stays_there(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    cli()
    fine_tuned.write(Path("tunes/b"), 2)
    consider = recompress.promotion.consider

    def then_moved(opened: Store, *words: Any) -> Any:
        considered = consider(opened, *words)
        monkeypatch.undo()
        versions.publish(opened, "other", considered.version.key)
        versions.promote(opened, "other@1", "production", about={"by": "a person"})
        return considered

    monkeypatch.setattr(recompress.promotion, "consider", then_moved)
    with monkeypatch.context() as there:
        there.chdir(Path.cwd())
        result = cli()
    assert result.exit_code == Exit.LATER and "production was moved to other@1 by a person" in result.stderr
    assert versions.labelled(store()) == {"production": "other@1"}


def test_an_interrupted_call_is_done_again(cli: Cli) -> None:
    """A version that was published and never judged, as a killed driver leaves it."""
    fine_tuned.write(Path("tunes/a"), 1)
    cli("--gate", "kl<0.02")
    opened = store()
    opened.blobs.delete([e.name for e in opened.blobs.list("recompressed/")] + [e.name for e in opened.blobs.list("labels/")])
    assert cli("--gate", "kl<0.02").exit_code == Exit.PROMOTED
    assert [v.ref for v in versions.list(opened)] == ["toy@1"]


@pytest.mark.slow
def test_old_versions_of_this_name_go_and_labelled_ones_stay(cli: Cli) -> None:
    for n in range(1, 5):
        fine_tuned.write(Path(f"tunes/{n}"), n, kl=0.01 * n)
        assert cli("--keep", "1", "--gate", "kl<0.03").exit_code == (Exit.PROMOTED if n < 3 else Exit.REFUSED)
    assert [v.ref for v in versions.list(store())] == ["toy@1", "toy@2", "toy@4"], "toy@1 is what a rollback returns to"


@pytest.mark.slow
def test_a_label_that_is_the_name_of_versions_is_refused_before_anything_runs(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    cli()
    result = cli("--name", "other", "--promote", "toy")
    assert result.exit_code == Exit.WRONG and "'toy' is the name of versions" in error(result)


def test_nothing_new_may_count_as_success_and_an_idle_call_deletes_nothing(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    cli()
    assert cli("--nothing-new", "0", "--keep", "1").exit_code == 0 and "nothing new: " in cli("--nothing-new", "0").stderr


def test_a_notice_has_the_comparison(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    with webhook() as (url, got):
        cli("--gate", "kl<0.02", "--notify", url)
        fine_tuned.write(Path("tunes/b"), 2, kl=0.5)
        cli("--gate", "kl<0.02", "--notify", url)
        assert cli("--gate", "kl<0.02", "--notify", url).exit_code == Exit.NOTHING_NEW
        cli("-p", "fail=true", "--notify", url)
    assert [n["event"] for n in got] == ["promoted", "refused", "failed"], "nothing new is no news"
    refused = got[1]
    assert (refused["version"], refused["was"], refused["label"]) == ("toy@2", "toy@1", "production")
    assert refused["figures"][0] == {
        "figure": "kl[prose]", "unit": "", "original": 0.0, "compressed": 0.5, "interval": None, "promoted": 0.01,
    }  # fmt: skip
    assert refused["gate"][0]["state"] == "fails" and refused["layers"][0]["overlap"] == 1.0
    assert "it is to fail" in got[2]["why"] and got[2]["exit"] == 2


def test_a_model_so_broken_that_its_figures_are_no_numbers_is_refused_and_told_in_json(cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1, kl=float("nan"))
    with webhook() as (url, got):
        result = cli("--gate", "kl<0.02", "--notify", url, "--json")
    assert result.exit_code == Exit.REFUSED and "NaN" not in result.stdout
    assert got[0]["event"] == "refused" and got[0]["figures"][0]["compressed"] == "nan"


def test_a_webhook_that_answers_500_changes_nothing_and_is_tried_again(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeflow.report.notice.PAUSES", (0.0, 0.0))
    fine_tuned.write(Path("tunes/a"), 1)
    with webhook(500, 500, 500) as (url, got):
        result = cli("--notify", url)
        assert result.exit_code == Exit.PROMOTED and versions.labelled(store()) == {"production": "toy@1"}
        assert "answered 500; it is kept, and sent after the next one" in result.stderr and "secret" not in result.stderr
        fine_tuned.write(Path("tunes/b"), 2)
        assert "notice" not in cli("--notify", url).stderr
    assert [n["version"] for n in got] == ["toy@2", "toy@1"]
    with webhook(500) as (url, got):
        fine_tuned.write(Path("tunes/c"), 3)
        cli("--notify", url)
    assert [n["version"] for n in got] == ["toy@3"], "one answer of 500 is got over at once"


def test_a_command_gets_the_notice_on_its_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeflow.report.notice.PAUSES", (0.0, 0.0))
    fine_tuned.write(Path("tunes/a"), 1)
    assert cli("--notify", "tee told.json").exit_code == Exit.PROMOTED
    assert json.loads(Path("told.json").read_text())["event"] == "promoted"
    fine_tuned.write(Path("tunes/b"), 2)
    absent = cli("--notify", "no-such-command")
    assert absent.exit_code == Exit.PROMOTED and "the notice was not taken: no-such-command" in absent.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "absent"], "absent"),
        (["--gate", "gsm8k>=0.95x"], "which no step of this pipeline measures"),
        (["--gate", "kl"], "write a bound like"),
        (["--notify", "ftp://x"], "write https://host/path"),
        (["--notify", "'"], "is no command"),
        (["-p", "model=tunes/a"], "--source says what is compressed"),
        (["--promote", "a/b"], "use at most 128 letters"),
        (["--promote", "toy"], "a label needs another name"),
        (["--marker", "a/b"], "name a file in the checkpoint's own folder"),
        (["--settle", "soon"], "write a number and s, m, h or d"),
        (["-p", "fail=true"], "it is to fail"),
    ],
)
def test_a_wrong_request_is_told_in_one_line_and_does_nothing(words: list[str], said: str, cli: Cli) -> None:
    fine_tuned.write(Path("tunes/a"), 1)
    result = cli(*words)
    assert result.exit_code == Exit.WRONG and said in error(result)
    assert not Path("store").exists() or not versions.list(store())


def test_an_adapter_without_a_base_is_refused_by_name(cli: Cli) -> None:
    adapter = Path("tunes/a")
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(fine_tuned.shard(b"xx"))
    (adapter / "adapter_config.json").write_text("{}")
    result = cli()
    assert result.exit_code == Exit.WRONG and "names no model as its base; say it with -p model=BASE" in error(result)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "models/absent/there"}')
    result = cli()
    assert result.exit_code == Exit.WRONG and "its base cannot be had" in error(result)


def test_zero_shards_without_a_config_are_refused_by_name(cli: Cli) -> None:
    folder = Path("tunes/a/global_step5")
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"x")
    result = cli()
    assert result.exit_code == Exit.WRONG and "has ZeRO shards and no config.json; copy" in error(result)


def test_an_adapter_is_merged_into_the_base_that_it_names(cli: Cli) -> None:
    base = fine_tuned.write(Path("base"), 1)
    adapter = Path("tunes/a")
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(fine_tuned.shard(b"xx"))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base.absolute())}))
    assert cli().exit_code == Exit.PROMOTED
    (version,) = versions.list(store())
    assert version.record["source"]["base"] == str(base.absolute())
    assert version.record["given"] == [f"model={base.absolute()}", f"adapter={adapter.absolute()}"]
