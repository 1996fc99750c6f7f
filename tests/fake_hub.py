"""A Hub on this machine, and other Pythons that use it: huggingface_hub reads its environment when it is imported."""

import base64
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from normfree.errors import InputError

WEIGHTS = save({"head.weight": np.arange(3000, dtype=np.float32).reshape(30, 100)}, {"licence": "Apache-2.0"})
CONFIG = {"architecture": "dm_nfnet_f0", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 192, 192]}}
numbers = itertools.count()
TOKEN = "hf_of_ann"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@functools.lru_cache(maxsize=32)
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """Repositories in memory behind two HTTP servers: the site, and the host that LFS files are redirected to.

    `sent` has what is sent instead of a file's true content; `refusals` has (status, X-Error-Code) of repositories.
    """

    def __init__(self):
        self.reset()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), self.handler()) for _ in range(2)]
        self.site, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self):
        """One repository, of a new name since clients share a cache."""
        self.repo = f"ann/nfnet.{next(numbers)}"
        self.uri = f"hf://{self.repo}"
        self.files = {"model.safetensors": WEIGHTS, "config.json": json.dumps(CONFIG).encode()}
        self.repos = {self.repo: {"main": self.files}}
        self.sent, self.refusals, self.uploads, self.log = {}, {}, {}, []
        self.dropped = 0  # how many of the next downloads break off half-way

    def stop(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def handler(self):
        def handle(request):
            body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
            on_site = request.server is self.servers[0]
            if any(part in request.path for part in ("/resolve/", "/cdn/", "/commit/")):  # files, no small talk
                self.log.append((request.command, request.path, request.headers.get("Authorization"), on_site))
            status, headers, content = self.answer(request.command, request.path.strip("/"), request.headers, body)
            request.send_response(status)
            for name, value in ({"Content-Length": len(content)} | headers).items():
                request.send_header(name, str(value))
            request.end_headers()
            if request.command == "GET" and self.dropped and not on_site:
                self.dropped -= 1
                content = content[: len(content) // 2]
            if request.command != "HEAD":
                request.wfile.write(content)

        methods = {f"do_{method}": handle for method in ("HEAD", "GET", "POST", "PUT")}
        return type("Handler", (BaseHTTPRequestHandler,), {**methods, "log_message": lambda *_: None})

    def answer(self, method, path, headers, body):
        """(status, headers, content) of one request."""
        parts = path.split("/")
        if parts[0] == "cdn":
            if method == "PUT":
                self.uploads[parts[1]] = body
                return 200, {}, b""
            content = self.sent.get(parts[1]) or self.content(parts[1])
            start = int(headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            whole = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
            return 206 if start else 200, whole, content[start:]
        if parts[2:3] == ["resolve"]:
            return self.resolve("/".join(parts[:2]), parts[3].replace("%2F", "/"), "/".join(parts[4:]))
        if path == "api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if method == "POST" and headers.get("Authorization") != f"Bearer {TOKEN}":
            return 403, {"X-Error-Message": "You have no right to write"}, b"{}"
        data = [json.loads(line) for line in body.splitlines()]
        return 200, {}, json.dumps(self.api(path, data)).encode()

    def content(self, oid):
        files = (file for revisions in self.repos.values() for files in revisions.values() for file in files.values())
        return next(file for file in files if sha256(file) == oid)

    def resolve(self, repo, revision, name):
        if repo in self.refusals:
            status, code = self.refusals[repo]
            return status, {"X-Error-Code": code}, b""
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[repo][revision]
        tree = sorted((path, sha256(content)) for path, content in files.items())
        commit = {"X-Repo-Commit": git_sha1(repr(tree).encode())}
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"} | commit, b""
        content = files[name]
        if name.endswith((".safetensors", ".bin")):
            oid = sha256(content)
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content), "ETag": '"pointer"'}
            return 302, commit | linked | {"Location": f"{self.cdn}/cdn/{oid}"}, b""
        return 200, commit | {"ETag": f'"{git_sha1(content)}"'}, self.sent.get(name) or content

    def api(self, path, data):
        """JSON of the answer to a write, or about a repository."""
        if path == "api/repos/create":
            repo = f"{data[0]['organization']}/{data[0]['name']}"
            self.repos.setdefault(repo, {"main": {}})
            self.visibility = data[0].get("visibility")
            return {"url": f"{self.site}/{repo}"}
        if "/preupload/" in path:
            modes = [(file["path"], "regular" if file["path"].endswith(".md") else "lfs") for file in data[0]["files"]]
            return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
        if path.endswith("info/lfs/objects/batch"):
            upload = [{"href": f"{self.cdn}/cdn/{item['oid']}"} for item in data[0]["objects"]]
            actions = [item | {"actions": {"upload": to}} for item, to in zip(data[0]["objects"], upload, strict=True)]
            return {"transfer": "basic", "objects": actions}
        if "/commit/" in path:
            repo, revision = path.removeprefix("api/models/").split("/commit/")
            files = self.repos[repo].setdefault(revision, {})
            for line in data[1:]:
                value = line["value"]
                regular = line["key"] == "file"
                files[value["path"]] = base64.b64decode(value["content"]) if regular else self.uploads.pop(value["oid"])
            return {"commitUrl": f"{self.site}/{repo}/commit/abc", "commitOid": "abc"}
        return {"id": path.removeprefix("api/models/")}


def hub_environment(site: str, cache: Path) -> dict[str, str]:
    """Of a Python that takes `site` for the Hub."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return others | {
        "HF_ENDPOINT": site,
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # plain LFS, which the server here speaks
        "NO_PROXY": "127.0.0.1",
    }


# normfree.weights would import torch, which these calls do not need
SCRIPT = """
import json, sys, types
package = types.ModuleType("normfree.weights")
package.__path__ = [sys.argv[1]]
sys.modules["normfree.weights"] = package
if sys.argv[2] == "without":
    sys.modules["huggingface_hub"] = None
from normfree.config import InputError
from normfree.weights import hub
assert sys.modules.get("huggingface_hub") is None and "torch" not in sys.modules
for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        value = getattr(hub, name)(**arguments)
        answer = [value if name == "fetch_config" else str(value), None]
    except InputError as error:
        answer = [None, str(error)]
    print(json.dumps(answer), flush=True)
"""


class Client:
    """Calls the functions of normfree.weights.hub in another Python, whose environment is given."""

    def __init__(self, site: str, cache: Path, library="with", **environment):
        self.cache = cache
        package = Path(importlib.util.find_spec("normfree.weights.hub").origin).parent
        command = [sys.executable, "-c", SCRIPT, str(package), library]
        pipe = subprocess.PIPE
        self.environment = hub_environment(site, cache) | environment
        self.python = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)

    def call(self, name, **arguments):
        """The value, or InputError as it was raised; anything else that is raised ends the other Python."""
        self.python.stdin.write(json.dumps([name, arguments]) + "\n")
        self.python.stdin.flush()
        value, error = json.loads(self.python.stdout.readline())
        if error is not None:
            assert "\n" not in error
            raise InputError(error)
        return value

    def fetch(self, uri, **arguments):
        return Path(self.call("fetch", uri=uri, **arguments))

    def blobs(self, repo):
        return [path.name for path in (self.cache / "hub" / f"models--{repo.replace('/', '--')}").glob("blobs/*")]

    def stop(self):
        self.python.communicate(timeout=60)
