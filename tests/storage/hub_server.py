"""The few routes of the Hub that a download needs, over a folder of repositories; it counts the bytes it serves.

python hub_server.py FOLDER      prints its address; GET /served tells {path: bytes}
FOLDER/org/name/...              the files of main; FOLDER/org/name@rev/... those of another revision
FOLDER/datasets/org/name/...     those of a data set
"""

import hashlib
import json
import re
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = "(?P<kind>models|datasets)"
INFO = re.compile(rf"/api/{KIND}/{REPO}(?:/revision/(?P<rev>[^?]+))?")
TREE = re.compile(rf"/api/{KIND}/{REPO}/tree/(?P<rev>[^?/]+)(?:/(?P<under>[^?]*))?")
FILE = re.compile(rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)")

SERVED: Counter = Counter()
LOCK = threading.Lock()


class Hub(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/served":
            return self.reply(200, json.dumps(SERVED).encode(), count=False)
        if path.startswith("/api/models/gated/") or path.startswith("/gated/"):
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if (found := TREE.fullmatch(path)) and (folder := self.folder(found)):
            return self.reply(200, json.dumps([self.blob(folder, f, "path") for f in self.files(folder)]).encode())
        if (found := FILE.fullmatch(path)) and (folder := self.folder(found)):
            return self.file(folder, found["file"])
        if (found := INFO.fullmatch(path)) and (folder := self.folder(found)):
            siblings = [self.blob(folder, f, "rfilename") for f in self.files(folder)]
            told = {"id": found["repo"], "sha": self.sha(folder), "siblings": siblings, "tags": [], "private": False}
            return self.reply(200, json.dumps(told).encode())
        names = re.findall(REPO, path.removeprefix("/api/models").removeprefix("/api/datasets"))
        known = any((root / r).is_dir() for r in names for root in (self.root, self.root / "datasets"))
        return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    do_HEAD = do_GET

    def folder(self, found):
        rev = found["rev"] or "main"
        root = self.root / "datasets" if found["kind"] == "datasets" else self.root
        for path in root.glob("*/*"):
            repo, _, other = str(path.relative_to(root)).partition("@")
            if repo == found["repo"] and rev in (other or "main", self.sha(path)):
                return path
        return None

    def files(self, folder):
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def sha(self, folder):
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def blob(self, folder, file, key):
        data = (folder / file).read_bytes()
        return {key: file, "type": "file", "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def file(self, folder, name):
        if not (folder / name).is_file():
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(folder)})
        data = (folder / name).read_bytes()
        told = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.sha(folder), "Accept-Ranges": "bytes",
        }  # fmt: skip
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(found[1]), min(int(found[2] or len(data)) + 1, len(data))
            told["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.reply(206, data[start:stop], told)
        return self.reply(200, data, told)

    def reply(self, status, body, headers=None, count=True):
        if count and self.command == "GET":
            with LOCK:
                SERVED[self.path.split("?")[0]] += len(body)
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
