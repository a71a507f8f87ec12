"""What the tests' Hub answers at every address that its clients use, as recorded from huggingface_hub 2.4."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml
from hub_store import DATE, LARGE, Blob, Commit, Discussion, HubError, Repo

if TYPE_CHECKING:
    from hub_handler import Handler

_REPO = r"(?P<id>[^/]+/[^/]+)"
_SMALL_LIMIT = 10 << 20


def answer(handler: Handler) -> None:
    for method, pattern, route in _ROUTES:
        match = re.fullmatch(pattern, handler.route)
        if match and handler.command in method.split():
            route(handler, **match.groupdict())
            return
    raise HubError(404, f"Sorry, we can't find {handler.command} {handler.route}")


def _whoami(handler: Handler) -> None:
    user = handler.user()
    if user is None:
        raise HubError(401, "Invalid username or password.")
    role = {"type": "access_token", "accessToken": {"role": "write" if user.write else "read"}}
    orgs = [{"name": name, "type": "org"} for name in user.orgs]
    handler.json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": role})


def _create(handler: Handler) -> None:
    asked = json.loads(handler.body)
    user = handler.user()
    owner = asked.get("organization") or (user.name if user else "")
    handler.writer(owner)
    id = f"{owner}/{asked['name']}"
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    url = f"{handler.hub.url}/{id}"
    try:
        handler.store.create(id, private=private)
    except HubError as error:
        error.body["url"] = url
        raise
    handler.json({"url": url, "name": id, "id": id})


def _validate_yaml(handler: Handler) -> None:
    content = json.loads(handler.body)["content"]
    head = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    if head is None:
        handler.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        return
    try:
        found = yaml.safe_load(head[1])
        problems = [] if isinstance(found, dict) else ["metadata is no mapping"]
    except yaml.YAMLError as error:
        problems = [str(error)]
    if not problems and found.get("base_model_relation") and not found.get("base_model"):
        problems = ["base_model_relation needs base_model"]
    handler.json({"errors": [{"message": text} for text in problems], "warnings": []}, 400 if problems else 200)


def _info(handler: Handler, id: str, rev: str = "main") -> None:
    repo = handler.repo(id)
    commit = repo.commit(rev)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if handler.query.get("blobs"):
        for sibling, blob in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.sha256:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
    card = commit.files.get("README.md")
    head = re.match(r"---\n(.*?)\n---\n", card.path.read_text(), re.DOTALL) if card else None
    data = yaml.safe_load(head[1]) if head else {}
    fields = {name: data[name] for name in ("library_name", "pipeline_tag") if name in data}
    fixed = {"tags": data.get("tags", []), "downloads": 0, "likes": 0, "createdAt": DATE, "lastModified": DATE}
    state = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
    names = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.sha}
    handler.json(names | state | fixed | fields | {"siblings": siblings, "cardData": data})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry | ({"xetHash": blob.xet_hash} if blob.xet_hash else {})


def _folders(commit: Commit) -> set[str]:
    return {path[:i] for path in commit.files for i, letter in enumerate(path) if letter == "/"}


def _folder_entry(commit: Commit, path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": commit.sha, "size": 0, "path": path}


def _expanded(handler: Handler, commit: Commit, entries: list[dict[str, Any]], expand: bool) -> list[dict[str, Any]]:
    last = {"lastCommit": {"id": commit.sha, "title": commit.title, "date": DATE}} if expand else {}
    return [entry | last for entry in entries]


def _tree(handler: Handler, id: str, rev: str, folder: str | None = None) -> None:
    commit = handler.repo(id).commit(rev)
    inside = f"{folder}/" if folder else ""
    entries = [_entry(path, blob) for path, blob in commit.files.items()]
    entries += [_folder_entry(commit, path) for path in _folders(commit)]
    entries = [entry for entry in entries if entry["path"].startswith(inside)]
    if handler.query.get("recursive", "").lower() not in ("true", "1"):
        entries = [entry for entry in entries if "/" not in entry["path"][len(inside) :]]
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {rev!r}", "EntryNotFound")
    entries.sort(key=lambda entry: entry["path"])
    at, page = int(handler.query.get("cursor", 0)), handler.hub.page
    headers = {}
    if len(entries) > at + page:
        query = "&".join(f"{key}={value}" for key, value in (handler.query | {"cursor": str(at + page)}).items())
        headers["Link"] = f'<{handler.hub.url}{handler.path.split("?")[0]}?{query}>; rel="next"'
    expand = handler.query.get("expand", "").lower() in ("true", "1")
    handler.json(_expanded(handler, commit, entries[at : at + page], expand), headers=headers)


def _paths_info(handler: Handler, id: str, rev: str) -> None:
    commit = handler.repo(id).commit(rev)
    if "json" in (handler.headers.get("Content-Type") or ""):
        asked = json.loads(handler.body)
        paths, expand = asked["paths"], bool(asked.get("expand"))
    else:
        form = parse_qs(handler.body.decode())
        paths, expand = form.get("paths", []), form.get("expand", ["False"])[0].lower() == "true"
    entries = [_entry(path, commit.files[path]) for path in paths if path in commit.files]
    entries += [_folder_entry(commit, path) for path in paths if path in _folders(commit)]
    handler.json(_expanded(handler, commit, entries, expand))


def _refs(handler: Handler, id: str) -> None:
    repo = handler.repo(id)
    found = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.refs.items()]
    pulls = [{"name": ref["name"], "ref": ref["name"], "targetCommit": ref["targetCommit"]} for ref in found]
    branches = [ref for ref in found if not ref["name"].startswith("refs/pr/")]
    pulls = [ref for ref in pulls if ref["name"].startswith("refs/pr/")]
    handler.json({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})


def _commits(handler: Handler, id: str, rev: str) -> None:
    repo = handler.repo(id)
    about = {"message": "", "date": DATE, "authors": [{"user": repo.owner}]}
    handler.json([{"id": commit.sha, "title": commit.title} | about for commit in repo.history(rev)])


def _resolve(handler: Handler, id: str, rev: str, path: str) -> None:
    repo = handler.repo(id)
    user = handler.user()
    if repo.gated and (user is None or user.name not in (repo.owner, *repo.allowed)):
        text = f"Access to model {id} is restricted and you are not in the authorized list."
        raise HubError(403 if user else 401, text, "GatedRepo")
    commit = repo.commit(rev)
    if path not in commit.files:
        text = "Entry not found"
        headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": text, "X-Repo-Commit": commit.sha}
        handler.json({"error": text}, 404, headers)
        return
    blob = commit.files[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if blob.sha256 is None:
        _send_file(handler, blob, headers)
        return
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    headers["Location"] = f"{handler.hub.cdn}/{id}/resolve/cdn.{blob.sha256}/{path}"
    if blob.xet_hash:
        refresh = f"{handler.hub.url}/api/models/{id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "X-Xet-Refresh-Route": refresh, "Link": f'<{refresh}>; rel="xet-auth"'}
    handler.send(302, b"", headers)


def _cdn(handler: Handler, id: str, sha256: str, path: str) -> None:
    if handler.record.host != "localhost":
        raise HubError(400, "This is no address of the CDN")
    blob = handler.store.large[sha256]
    _send_file(handler, blob, {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"})


def _send_file(handler: Handler, blob: Blob, headers: dict[str, str]) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if asked is None:
        handler.send(200, blob.path, headers, 0, blob.size)
        return
    first, last = int(asked[1]), min(int(asked[2] or blob.size - 1), blob.size - 1)
    if first >= blob.size:
        handler.send(416, b"", headers | {"Content-Range": f"bytes */{blob.size}"})
        return
    headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
    handler.send(206, blob.path, headers, first, last - first + 1)


def _preupload(handler: Handler, id: str, rev: str) -> None:
    repo = handler.repo(id)
    if not (handler.query.get("create_pr") or rev.startswith("refs/pr/")):
        handler.writer(repo.owner)
    commit = repo.commit(rev)
    files = []
    for file in json.loads(handler.body)["files"]:
        binary = b"\0" in base64.b64decode(file.get("sample") or "")
        large = file["path"].endswith(LARGE) or file["size"] > _SMALL_LIMIT or binary
        old = commit.files.get(file["path"])
        mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append({"path": file["path"]} | mode | ({"oid": old.etag} if old else {}))
    handler.json({"files": files})


def _lfs_batch(handler: Handler, id: str) -> None:
    repo = handler.repo(id)
    if handler.user() is None:
        raise HubError(401, "Invalid username or password.")
    asked = json.loads(handler.body)
    objects = []
    for item in asked["objects"]:
        found: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in handler.store.large:
            put = {"href": f"{handler.hub.cdn}/upload/{item['oid']}", "header": {}}
            verify = {"href": f"{handler.hub.url}/{repo.id}.git/info/lfs/objects/verify", "header": {}}
            found["actions"] = {"upload": put, "verify": verify}
        objects.append(found)
    handler.json({"transfer": "basic", "objects": objects})


def _lfs_put(handler: Handler, sha256: str) -> None:
    (handler.store.blobs / sha256).write_bytes(handler.body)
    handler.send(200, b"", {"ETag": f'"{sha256}"'})


def _lfs_verify(handler: Handler, id: str) -> None:
    asked = json.loads(handler.body)
    handler.store.find_large(asked["oid"], asked["size"])
    handler.json({})


def _xet_token(handler: Handler, id: str, kind: str, rev: str) -> None:
    repo = handler.repo(id)
    if kind == "write" and not (handler.query.get("create_pr") or rev.startswith("refs/pr/")):
        handler.writer(repo.owner)
    if handler.store.xet is None:
        raise HubError(404, "No Xet here")
    view, expires = handler.store.xet.view(), int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": view, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    handler.json({"casUrl": view, "accessToken": "xet", "exp": expires}, headers=headers)


def _commit(handler: Handler, id: str, rev: str) -> None:
    repo = handler.repo(id)
    user = handler.user()
    pull = handler.query.get("create_pr") or rev.startswith("refs/pr/")
    if user is None or not pull:
        user = handler.writer(repo.owner)
    lines = [json.loads(line) for line in handler.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    added, removed = _operations(handler, repo.commit(rev), lines)
    url = None
    if handler.query.get("create_pr"):
        num = handler.store.open_discussion(repo, header["summary"], user.name, True).num
        rev, url = f"refs/pr/{num}", f"{handler.hub.url}/{id}/discussions/{num}"
    commit = handler.store.commit(repo, rev, header["summary"], added, removed, header.get("parentCommit") or "")
    page = f"{handler.hub.url}/{id}/commit/{commit.sha}"
    handler.json({"success": True, "commitOid": commit.sha, "commitUrl": page, "pullRequestUrl": url})


def _operations(handler: Handler, old: Commit, lines: list[dict[str, Any]]) -> tuple[dict[str, Blob], set[str]]:
    added, removed = {}, set()
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            added[value["path"]] = handler.store.small(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            known = handler.store.large.get(value["oid"])
            added[value["path"]] = known or handler.store.find_large(value["oid"], value["size"])
        elif key == "deletedFile":
            removed.add(value["path"])
        elif key == "deletedFolder":
            removed |= {path for path in old.files if path.startswith(value["path"].rstrip("/") + "/")}
    return added, removed


def _discussion(repo: Repo, found: Discussion) -> dict[str, Any]:
    author = {"name": found.author}
    about = {"num": found.num, "title": found.title, "status": found.status, "createdAt": DATE, "author": author}
    pull = f"refs/pr/{found.num}" in repo.refs
    changes = {"base": "refs/heads/main", "mergeCommitId": found.merged}
    place = {"repo": {"name": repo.id, "type": "model"}, "isPullRequest": pull, "filesWithConflicts": []}
    return about | place | {"changes": changes, "events": [], "diff": ""}


def _discussions(handler: Handler, id: str) -> None:
    repo = handler.repo(id)
    if handler.command == "GET":
        found = [_discussion(repo, item) for item in repo.discussions]
        handler.json({"discussions": found, "count": len(found), "start": 0})
        return
    user = handler.user()
    if user is None:
        raise HubError(401, "Invalid username or password.")
    asked = json.loads(handler.body)
    pull = bool(asked.get("pullRequest"))
    handler.json(_discussion(repo, handler.store.open_discussion(repo, asked["title"], user.name, pull)))


def _discussion_details(handler: Handler, id: str, num: str) -> None:
    repo = handler.repo(id)
    if int(num) > len(repo.discussions):
        raise HubError(404, "Discussion not found")
    handler.json(_discussion(repo, repo.discussions[int(num) - 1]))


def _status(handler: Handler, id: str, num: str) -> None:
    repo = handler.repo(id)
    status = json.loads(handler.body)["status"]
    handler.store.set_status(repo, int(num), status)
    event = {"id": "1", "type": "status-change", "createdAt": DATE, "author": {"name": repo.owner}}
    handler.json({"newStatus": event | {"data": {"status": status}}})


def _auth_check_write(handler: Handler, id: str) -> None:
    handler.writer(handler.repo(id).owner)
    handler.json({})


def _merge(handler: Handler, id: str, num: str) -> None:
    repo = handler.repo(id)
    handler.writer(repo.owner)
    handler.store.merge(repo, int(num))
    handler.json({})


_API = f"/api/models/{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", _API, _info),
    ("GET", rf"{_API}/revision/(?P<rev>.+)", _info),
    ("GET", rf"{_API}/refs", _refs),
    ("GET", rf"{_API}/commits/(?P<rev>refs/pr/\d+|[^/]+)", _commits),
    ("GET", rf"{_API}/tree/(?P<rev>refs/pr/\d+|[^/]+)(/(?P<folder>.+))?", _tree),
    ("POST", rf"{_API}/paths-info/(?P<rev>.+)", _paths_info),
    ("POST", rf"{_API}/preupload/(?P<rev>.+)", _preupload),
    ("GET", rf"{_API}/xet-(?P<kind>read|write)-token/(?P<rev>.+)", _xet_token),
    ("POST", rf"{_API}/commit/(?P<rev>.+)", _commit),
    ("GET POST", rf"{_API}/discussions", _discussions),
    ("GET", rf"{_API}/discussions/(?P<num>\d+)", _discussion_details),
    ("POST", rf"{_API}/discussions/(?P<num>\d+)/status", _status),
    ("POST", rf"{_API}/discussions/(?P<num>\d+)/merge", _merge),
    ("GET", rf"{_API}/auth-check/write", _auth_check_write),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _lfs_verify),
    ("PUT", r"/upload/(?P<sha256>[0-9a-f]{64})", _lfs_put),
    ("GET HEAD", rf"/{_REPO}/resolve/cdn\.(?P<sha256>[0-9a-f]{{64}})/(?P<path>.+)", _cdn),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", _resolve),
]
