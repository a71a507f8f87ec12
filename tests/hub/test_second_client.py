"""The tests' own Hub through another client: npm's @huggingface/hub, where Node finds it (``NODE_PATH``)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

_SCRIPT = """
const { whoAmI, createRepo, uploadFiles, listFiles, downloadFile } = require("@huggingface/hub");
const [hubUrl, accessToken, repo] = process.argv.slice(1);
const access = { hubUrl, accessToken };
(async () => {
  const large = new Blob([new Uint8Array(300000).fill(7)]);
  await createRepo({ repo: "me/second", ...access });
  const files = [{ path: "a.safetensors", content: large }];
  await uploadFiles({ repo: "me/second", files, ...access, useXet: false });
  const found = {};
  for (const name of ["me/second", repo])
    for await (const file of listFiles({ repo: name, recursive: true, ...access }))
      if (file.type === "file" && file.path !== ".gitattributes") {
        const blob = await downloadFile({ repo: name, path: file.path, ...access, xet: false });
        const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
        found[name + ":" + file.path] = Buffer.from(digest).toString("hex");
      }
  console.log(JSON.stringify({ name: (await whoAmI(access)).name, found }));
})();
"""


@pytest.fixture
def node() -> str:
    """Node, if it finds the package."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node")
    if subprocess.run([program, "-e", "require('@huggingface/hub')"], capture_output=True).returncode:
        pytest.skip("needs npm's @huggingface/hub (npm install @huggingface/hub, and NODE_PATH)")
    return program


def test_a_second_client_writes_and_reads(hub: HubServer, node: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    contents = {"config.json": b"{}", "model.safetensors": os.urandom(200_000)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    hub.store.add_folder("org/model", folder)
    command = [node, "-e", _SCRIPT, hub.url, TOKEN, "org/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = {f"org/model:{name}": sha256(data).hexdigest() for name, data in contents.items()}
    expected["me/second:a.safetensors"] = sha256(b"\7" * 300_000).hexdigest()
    assert json.loads(done.stdout) == {"name": "me", "found": expected}
