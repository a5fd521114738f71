"""The live page over HTTP, on this machine only. It serves named files of one run folder and nothing else."""

import argparse
import json
import sys
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import unquote

from fairdiff.cli.ending import ending
from fairdiff.errors import FairDiffError
from fairdiff.training.tracking import PICTURES
from fairdiff.view.state import require_run, state

PAGE = Path(__file__).with_name("page.html")
LARGEST_REQUEST = 10_000  # bytes
HERE = ("127.0.0.1", "localhost")


class Run:
    """Access to one run folder for the page; the explorer is loaded when it is first used."""

    def __init__(self, folder: Path):
        require_run(folder)
        self.folder, self.explorer, self.lock = folder, None, Lock()

    def file(self, path: str) -> tuple[bytes, str] | None:
        """Content and type of a path that the page names, None for any other."""
        parts = path.strip("/").split("/")
        if path == "/":
            return PAGE.read_bytes(), "text/html; charset=utf-8"
        if path == "/state.json":
            return json.dumps(state(self.folder)).encode(), "application/json"
        now = state(self.folder)
        if len(parts) == 2 and parts[0] == PICTURES and parts[1] in now["pictures"]:
            return (self.folder / PICTURES / parts[1]).read_bytes(), "image/png"
        if len(parts) == 2 and parts[0] == "audits" and parts[1] in now["reports"]:
            return (self.folder / "audits" / parts[1] / "report.html").read_bytes(), "text/html; charset=utf-8"
        return None

    def look(self, request: object) -> list[dict]:
        """`Explorer.look`, FairDiffError before the adapter is saved."""
        if not isinstance(request, dict):
            raise FairDiffError("request: allowed: prompt, scale, seed and images")
        with self.lock:
            if self.explorer is None:
                if not state(self.folder)["adapter"]:
                    raise FairDiffError(f"{self.folder}: holds no adapter yet; it is saved when training ends")
                from fairdiff.view.explorer import Explorer  # loads the model's libraries

                self.explorer = Explorer(self.folder)
        return self.explorer.look(request)


class Handler(BaseHTTPRequestHandler):
    """Answers GET for `Run.file` and POST /look; quiet."""

    def __init__(self, run: Run, *args, **kwargs):
        self.run = run
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if not self._from_here():
            return
        try:
            found = self.run.file(unquote(self.path.split("?")[0]))
        except (FairDiffError, OSError) as error:  # a file may go meanwhile
            return self._say(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})
        if found is None:
            return self._say(HTTPStatus.NOT_FOUND, {"error": f"{self.path}: there is no such page"})
        self._send(HTTPStatus.OK, *found)

    def do_POST(self) -> None:
        if not self._from_here():
            return
        length = self.headers.get("Content-Length") or "0"
        fits = length.isdecimal() and int(length) <= LARGEST_REQUEST
        if self.path != "/look" or not fits or self.headers.get("Content-Type") != "application/json":
            return self._say(HTTPStatus.BAD_REQUEST, {"error": "allowed: a small request of JSON to /look"})
        try:
            self._say(HTTPStatus.OK, {"pairs": self.run.look(json.loads(self.rfile.read(int(length))))})
        except (FairDiffError, ValueError) as error:
            self._say(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _from_here(self) -> bool:
        """Refuse pages of other sites, which may reach this server by a name of their own for 127.0.0.1."""
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        origin = self.headers.get("Origin")
        if host in HERE and (origin is None or origin.split("://")[-1].rsplit(":", 1)[0] in HERE):
            return True
        self._say(HTTPStatus.FORBIDDEN, {"error": "allowed: from this machine"})
        return False

    def _say(self, status: HTTPStatus, answer: dict) -> None:
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of this run folder on 127.0.0.1; port 0 takes a free one. FairDiffError for a port that is taken."""
    run = Run(folder)
    try:
        return ThreadingHTTPServer((HERE[0], port), partial(Handler, run))
    except OSError as error:
        raise FairDiffError(f"--port: {port} cannot be used ({error.strerror}), allowed: another one, 0 takes any") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("fairdiff-view", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder, such as outputs/gender/default/seed0")
    parser.add_argument("--port", type=int, default=7860, choices=range(65536), metavar="N", help="default: 7860")
    args = parser.parse_args(argv)
    with ending("stopped"):
        try:
            server = serve(args.run, args.port)
        except FairDiffError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        with server:
            print(f"the page of {args.run}: http://{HERE[0]}:{server.server_address[1]}/ (Ctrl-C stops)", flush=True)
            server.serve_forever()
