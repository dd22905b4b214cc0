"""What a model's own card says is read wherever the model lies, and a card that says nothing stops nobody."""

from pathlib import Path

import pytest

from moeflow.sources.card import facts_of
from moeflow.store import s3
from tests import servers

CARD = "---\nlicense: other\nlicense_name: ours\nlanguage:\n- en\nbase_model: org/first\nwidget: [1]\n---\n# Ours\n"
SAYS = {"license": "other", "license_name": "ours", "language": ["en"], "base_model": "org/first"}


def test_a_card_in_a_folder(tmp_path: Path) -> None:
    assert facts_of(str(tmp_path)) == {}
    for text, says in (
        (CARD, SAYS),
        ("# No head\n", {}),
        ("---\n{\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: 1\n---\n", {}),
    ):
        (tmp_path / "README.md").write_text(text)
        assert facts_of(str(tmp_path)) == says
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert facts_of(str(tmp_path)) == {}


def test_a_card_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.put("models/org/told", {"README.md": CARD.encode()})
        assert facts_of(f"hf://models/org/told@{commit}") == SAYS
        assert facts_of(f"hf://models/org/none@{commit}") == {}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # where nothing listens
    assert facts_of(f"hf://models/org/told@{commit}") == {}, "a hub that does not answer loses no run"


def test_a_card_in_a_bucket(s3_url: str, bucket: str, server: servers.Proxy) -> None:
    assert facts_of(s3_url) == {}
    s3.client(server.url).put_object(Bucket=bucket, Key="pre/fix/README.md", Body=CARD.encode())
    assert facts_of(s3_url) == SAYS
