"""A stand-in for the Hugging Face hub on loopback: what huggingface_hub asks of it to make and fill repositories."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_TestTokenThatNobodyMaySee0123456789"
LARGE = (".bin", ".safetensors", ".model")  # stored as LFS objects, by their hash


class HubServer:
    """``with HubServer() as hub: hub.url`` is what HF_ENDPOINT takes.

    ``public``, ``private``: names of repositories that are there at the start. ``fail``: {part of a path: status},
    answered in place of what was asked. ``taken``: the namespaces that the token may write to.

    ``repos``: {name: {"private": bool, "branches": {branch: {path: bytes}}}}. ``log``: (method, path, Authorization).
    """

    def __init__(self, public=(), private=(), fail=None, taken=("me",)):
        self.repos = {name: self._new(False) for name in public} | {name: self._new(True) for name in private}
        self.fail, self.taken = fail or {}, taken
        self.log, self.objects, self.lock = [], {}, threading.Lock()

    @staticmethod
    def _new(private):
        return {"private": private, "branches": {"main": {".gitattributes": b""}}}

    def __enter__(self):
        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.http = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def files(self, name, branch="main"):
        """{path: bytes} of a repository, without the hub's own file."""
        return {k: v for k, v in self.repos[name]["branches"][branch].items() if k != ".gitattributes"}

    def answer(self, method, path, headers, body):
        """(status, json) or (status, json, headers) for a request."""
        token = headers["Authorization"]
        self.log.append((method, path, token))
        for part, status in self.fail.items():
            if part in path:
                return status, {"error": f"told to fail with {status}"}
        if match := re.fullmatch(r"/lfs/(\w+)", path):  # the storage: the address is signed, no token is due
            if token:
                return 400, {"error": "a token was sent to the storage"}
            if hashlib.sha256(body).hexdigest() != match[1]:
                return 400, {"error": "not the bytes of that hash"}
            self.objects[match[1]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/(batch|verify)", path):
            if match[1] not in self.repos:
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            return self.objects_of(match[1], json.loads(body)) if match[2] == "batch" else (200, {})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path)
        if not match or match[1] not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        name, action, branch = match[1], match[2], unquote(match[3] or "main")
        repo = self.repos[name]
        if action is None:
            more = {"sha": "0" * 40, "tags": [], "siblings": [{"rfilename": f} for f in self.files(name)]}
            return 200, {"_id": "1", "id": name, "modelId": name, "private": repo["private"], **more}
        if action == "branch":
            if branch in repo["branches"]:
                return 409, {"error": "Reference already exists"}
            repo["branches"][branch] = dict(repo["branches"]["main"])
            return 200, {}
        if branch not in repo["branches"]:
            return 404, {"error": f"Invalid rev id: {branch}"}, {"X-Error-Code": "RevisionNotFound"}
        files = repo["branches"][branch]
        if action == "tree":
            return 200, [{"type": "file", "path": p, "oid": "0" * 40, "size": len(d)} for p, d in files.items()]
        if action == "preupload":
            modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}"}
        return 404, {"error": "Not found"}

    def create(self, request):
        name = f"{request['organization']}/{request['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        if request["organization"] not in self.taken:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        # huggingface_hub 2 says visibility where older ones say private; the hub's default is public
        self.repos[name] = self._new(request.get("private", request.get("visibility") == "private"))
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def validate(self, content):
        try:
            _, front, _ = content.split("---\n", 2)
            assert isinstance(yaml.safe_load(front), dict)
        except Exception as error:
            return 400, {"errors": [{"message": f"no valid yaml: {error}"}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def objects_of(self, name, request):
        header = {"Authorization": f"Bearer {TOKEN}"}
        verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify", "header": header}
        found = []
        for thing in request["objects"]:
            upload = {"href": f"{self.url}/lfs/{thing['oid']}?signature=secret", "header": {}}
            more = {} if thing["oid"] in self.objects else {"actions": {"upload": upload, "verify": verify}}
            found.append({**thing, **more})
        return 200, {"transfer": "basic", "objects": found}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: HubServer

    def log_message(self, *_):
        pass

    def file(self):
        """One file of a repository, whole, a part, or (HEAD) what it is; whether that was asked for."""
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path)
        if not match:
            return False
        with self.owner.lock:
            self.owner.log.append((self.command, self.path, self.headers["Authorization"]))
            repo = self.owner.repos.get(match[1])
        data = repo and repo["branches"]["main"].get(unquote(match[3]))
        code = "RepoNotFound" if repo is None else "EntryNotFound" if data is None else None
        if repo is not None and repo["private"]:
            code = "GatedRepo"
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        whole, data = len(data or b""), b"" if code else data[int(part[1]) : int(part[2]) + 1] if part else data
        self.send_response(403 if code == "GatedRepo" else 404 if code else 206 if part else 200)
        if code:
            self.send_header("X-Error-Code", code)
        else:
            self.send_header("ETag", f'"{hashlib.sha256(repo["branches"]["main"][unquote(match[3])]).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Linked-Size", str(whole))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return True

    def handle_one(self):
        if self.command in ("HEAD", "GET") and self.file():
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.owner.lock:
            status, answer, *more = self.owner.answer(self.command, urlsplit(self.path).path, self.headers, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        error = {"X-Error-Message": answer["error"]} if isinstance(answer, dict) and "error" in answer else {}
        for key, value in {**(more[0] if more else {}), **error, "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one
