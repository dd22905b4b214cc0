"""How the tests' model hub takes uploads: a repository is made, each file is sent inside a commit, and who may not is refused."""

import base64
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.servers import Hub

Answer = tuple[int, dict[str, Any]]


def answer(hub: "Hub", path: str, body: bytes) -> Answer:
    """What the hub says to a POST: the endpoints that huggingface_hub's `create_repo` and `upload_folder` ask."""
    if path == "/api/repos/create":
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        return _refused(hub, repo) or (200, {"url": f"{hub.url}/{repo}", "name": repo})
    about = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path)
    if about is None:
        return 404, {"error": f"nothing at {path}"}
    repo, what, branch = about.groups()
    if refused := _refused(hub, repo):
        return refused
    if what == "preupload":
        files = json.loads(body)["files"]
        return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
    lines = [json.loads(line) for line in body.splitlines()]
    files = {v["path"]: base64.b64decode(v["content"]) for v in (one["value"] for one in lines if one["key"] == "file")}
    commit = hub.put(f"models/{repo}", files, branch)
    return 200, {"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}


def _refused(hub: "Hub", repo: str) -> Answer | None:
    if repo.partition("/")[0] in hub.writers:
        return None
    return 403, {"error": "You don't have the rights to create a model under this namespace"}
