#!/usr/bin/env python3
"""The smallest model server: it maps the files of a model's folder and serves what they hold.

    shmctl exec bert -- python3 serve.py --model {} --port 8001

GET /healthz answers "ok"; GET / lists each file with its size and SHA-256, computed on
the shared pages. It stands for a real server in the systemd and Docker examples.
"""

import argparse
import hashlib
import json
import mmap
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def map_files(folder):
    maps = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size):
        with open(path, "rb") as f:
            maps[str(path.relative_to(folder))] = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    return maps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with the model's files")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    maps = map_files(args.model)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/healthz":
                body = b"ok\n"
            else:
                files = {n: {"bytes": len(m), "sha256": hashlib.sha256(m).hexdigest()} for n, m in maps.items()}
                body = json.dumps({"pid": os.getpid(), "files": files}).encode() + b"\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
