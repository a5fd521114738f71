"""Uploads to the Hugging Face hub: the hub's own client talks to a local server with the hub's protocol."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from tiny import composed

from fairdiff import hub, jobs
from fairdiff.cli.compose import overrides_of
from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import push  # noqa: E402

FILES = ("adapter/README.md", "adapter/x.safetensors", "audits/a/audit.json", "audits/a/report.html")


class Hub(BaseHTTPRequestHandler):
    """A server that accepts the token "good" with the role `role`, and creates repositories and files unless it is `full`."""

    def do_GET(self):  # noqa: N802 (its name there)
        if "Bearer good" not in self.headers["authorization"]:
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "auth": {"accessToken": {"role": self.server.role}}})
        else:
            self.answer(404, {})

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.server.full:
            self.answer(403, {"error": "no room here"})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.server.url}/me/{json.loads(body)['name']}"})
        elif self.path == "/api/models/me/fair/preupload/main":
            found = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self.answer(200, {"files": found})
        elif self.path == "/api/models/me/fair/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.server.url}/me/fair/commit/abc", "commitOid": "abc"})
        else:
            self.answer(200, {})  # what checks the card's header

    def answer(self, code, found):
        body = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Return a server that this process uses as the hub, with the token "good"."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        running.url, running.held, running.full, running.role = f"http://127.0.0.1:{running.server_port}", {}, False, "write"
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "good")
        for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(key, raising=False)
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def run(tmp_path):
    """A run folder by its files."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of {name}")
    return tmp_path


def ended(capsys, *arguments):
    """Return the error message of scripts/push.py."""
    with pytest.raises(SystemExit) as stop:
        push.main(list(map(str, arguments)))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    return said


def test_a_run_is_uploaded_file_by_file(run, server, capsys):
    push.main([str(run), "me/fair"])
    assert server.held == {Path(name).name: f"of {name}".encode() for name in FILES}
    assert len(capsys.readouterr().out.splitlines()) == 4
    before = {name: (run / name).read_text() for name in FILES}
    server.full = True
    said = ended(capsys, run, "me/fair")
    assert "me/fair: cannot be written: 403" in said and f"`python scripts/push.py {run} me/fair` tries again" in said
    assert before == {name: (run / name).read_text() for name in FILES}


def test_an_audit_of_ones_choice_is_uploaded_instead_of_the_newest(run):
    (run / "audits" / "b").mkdir()
    (run / "audits" / "b" / "report.html").write_text("newer")
    assert hub.files_of(run)["report.html"] == run / "audits" / "b" / "report.html"
    assert hub.files_of(run, run / "audits" / "a")["audit.json"] == run / "audits" / "a" / "audit.json"


def test_pushing_says_what_it_would_upload_and_needs_a_token(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    push.main([str(run), "me/fair", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"me/fair/{Path(name).name}" for name in FILES]
    assert lines[0].endswith(f"({len('of ' + FILES[0])} bytes)")
    assert "repo: " in ended(capsys, run, "not a name", "--dry-run")
    assert "repo: found alone, allowed: you/name" in ended(capsys, run, "alone", "--dry-run")
    assert "no finished training" in ended(capsys, run / "adapter", "me/fair", "--dry-run")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "HF_TOKEN: no token" in ended(capsys, run, "me/fair")


def test_what_would_not_be_uploaded_is_said_before_anything_is_built(server, monkeypatch, tmp_path):
    """The job checks the hub before it loads the model, which does not exist here."""

    def refused(says, repo="me/fair"):
        config = composed(f"hub='{repo}'", "model.path=nowhere")
        with pytest.raises(FairDiffError, match=says) as caught:
            jobs.train_job(config, tmp_path / "run")
        assert "\n" not in str(caught.value) and not (tmp_path / "run" / "run.json").exists()

    refused("nowhere")  # all is well with the hub
    refused("^hub: ", "no name at all")
    refused("^hub: found alone, allowed: you/name", "alone")
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused("^hub: me/fair: the hub does not answer to the token: .*allowed: hub=null, and scripts/push.py later")
    monkeypatch.setenv("HF_TOKEN", "good")
    server.role = "read"
    refused("^HF_TOKEN: the token of me may only read")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("^hub: me/fair: the hub does not answer")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    refused("^HF_TOKEN: no token of the hub is known here; .* or use hub=null")
    assert not server.held


def test_where_it_is_uploaded_is_another_folder_of_no_run():
    from fairdiff.cli.command_line import run_name

    assert run_name(["hub=me/fair"]) == "default" and overrides_of({"hub": "me/fair"}) == ["hub=me/fair"]
