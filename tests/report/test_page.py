"""The page of a version: alone, escaped, and only with what the version has."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moeflow.report import about, charts, usage
from moeflow.store import Store, versions
from tests.report.conftest import call, last_json
from tests.report.told_pipeline import MARKUP

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Page(HTMLParser):
    """What a page refers to, its headings, and its tags with attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "rect", "path", "circle", "polyline"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def text(told: Path) -> str:
    made = call(told, "report", "told_pipeline@1", "-o", told / "page.html", "--json")
    assert last_json(made)["bytes"] == (told / "page.html").stat().st_size
    return (told / "page.html").read_text()


def test_a_page_needs_nothing_else_and_runs_nothing(text: str) -> None:
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert not [a for _, a in page.tags if {"src", "href", "style"} & a.keys() or any(k.startswith("on") for k in a)]
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text


def test_a_page_has_the_sections_of_what_the_version_has_and_no_others(text: str) -> None:
    assert Page(text).headings == [
        "How good it is", "What it writes", "What was kept", "How fast it is", "Every figure", "How to load it", "How it was made",
        "What it cost", "What it was made from",
    ]  # fmt: skip


def test_what_a_model_writes_is_text_on_the_page(text: str) -> None:
    assert MARKUP not in text and MARKUP in "".join(Page(text).words)


def test_tasks_have_their_interval_chance_wins_and_losses_and_prompts_stand_side_by_side(text: str) -> None:
    words = "".join(Page(text).words)
    assert "scores of tasks" in words and "guessing: 0.25" in text and "40 items, 1 won, 9 lost" in words
    assert "8 sequences of 16 tokens" in words and "8 items" not in words
    assert "-25.0 %, worse" in words and "second 22" in words and "second 23" not in words
    assert "7 more are in its reports: moeflow show told_pipeline@1 --json" in words


def test_the_map_crosses_out_what_went_and_shades_by_the_use_that_the_calibration_counted(told: Path, text: str) -> None:
    opened = Store.open(str(told / "store"))
    of = about.of(opened, "told_pipeline@1")
    assert of.checkpoint is not None
    (cross,) = (a["d"] or "" for tag, a in Page(text).tags if tag == "path" and a.get("class") == "cross")
    gone = sum(8 - len(layer.kept or ()) for layer in of.checkpoint.layers)
    assert gone == 6 and cross.count("M") == gone
    # search=frequency: what stays is what the calibration has used most
    for layer in of.checkpoint.layers:
        use = of.usage[layer.was]
        assert sum(use) == pytest.approx(2), "two experts a token"
        assert {*layer.kept} == {*sorted(range(8), key=lambda e: -use[e])[:6]}  # type: ignore[misc]


def test_without_its_calibration_a_version_has_a_map_without_shades(told: Path, tmp_path: Path) -> None:
    shutil.copytree(told / "store", tmp_path / "store")
    opened = Store.open(str(tmp_path / "store"))
    key = versions.resolve(opened, "told_pipeline@1").key  # type: ignore[union-attr]
    opened.blobs.delete([f"manifests/{m.key}.json" for m in versions.lineage(opened, key).values() if m.step == usage.OBSERVE])
    assert call(tmp_path, "report", "told_pipeline@1", "-o", tmp_path / "page.html").exit_code == 0
    text = (tmp_path / "page.html").read_text()
    assert "What was kept" in text and "stronger its colour" not in text and 'class="kept ux"' in text


def test_a_page_where_it_cannot_be_written_is_refused_before_anything_is_read(told: Path, tmp_path: Path) -> None:
    for out, said in ((tmp_path, "that is a folder"), (tmp_path / "no" / "page.html", "its folder is not there")):
        refused = call(told, "report", "told_pipeline@1", "-o", out)
        assert refused.exit_code == 2 and said in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert call(told, "report", "nobody", "-o", tmp_path / "page.html").exit_code == 2
    assert call(told, "report", "told_pipeline@2", "-o", "-").stdout.startswith("<!doctype html>")


def test_pictures_hold_what_they_are_given() -> None:
    bars = charts.bars([("0", 0.0), ("1", 2.0), ("<2>", 1.0)], axis="")
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([0-9.]+)"', bars)]
    assert heights[0] == 0 and heights[1] == pytest.approx(2 * heights[2], abs=0.2) and "<2>" not in bars
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and charts.ticks(3.0, 3.0) == [3.0]
    assert len(charts.thinned([(float(n), 0.0) for n in range(5000)])) <= 401
    one = charts.plane([charts.Point(50, 0.1), charts.Point(60, 0.0), charts.Point(70, 0.01, kind="here")], x="x", y="y")
    assert one.count("<circle") == 3 and "nan" not in one
    assert charts.experts([]) == "" and charts.curves({}, x="", y="") == "" and charts.plane([], x="", y="") == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize(("width", "scheme"), [(1100, 1), (1100, 0), (375, 1)])
def test_a_browser_shows_the_page_whole_in_light_in_dark_and_on_a_phone(text: str, tmp_path: Path, width: int, scheme: int) -> None:
    """`scheme`: what the browser prefers, 0 for dark."""
    (tmp_path / "page.html").write_text(text)
    (tmp_path / "frame.html").write_text(
        f"<iframe src=page.html style='border:0;width:{width}px;height:900px'></iframe><script>onload = () => {{"
        "const inside = document.querySelector('iframe').contentDocument, root = inside.documentElement;"
        "const pictures = [...inside.querySelectorAll('svg')].map(s => s.getBoundingClientRect());"
        "document.title = JSON.stringify([root.scrollWidth, getComputedStyle(inside.body).backgroundColor,"
        "pictures.length, pictures.filter(b => b.width < 100 || b.height < 20).length]) }</script>"
    )
    words = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
        f"--user-data-dir={tmp_path / 'browser'}", f"--blink-settings=preferredColorScheme={scheme}",
        "--virtual-time-budget=5000", f"file://{tmp_path / 'frame.html'}",
    ]  # fmt: skip
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    (told,) = re.findall(r"<title>\[(\d+),\"([^\"]*)\",(\d+),(\d+)\]</title>", dom.replace("&quot;", '"'))
    scrolled, paper, pictures, squeezed = told
    assert int(scrolled) <= width, "nothing is wider than the screen"
    assert paper == ("rgb(255, 255, 255)" if scheme else "rgb(17, 20, 24)")
    assert int(pictures) > 5 and int(squeezed) == 0
