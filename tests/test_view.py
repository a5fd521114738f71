"""The live page: it shows the content of the run folder, serves nothing else, and generates the images of the audit."""

import base64
import io
import json
import threading
from http.client import HTTPConnection

import numpy as np
import pytest
from PIL import Image
from test_main_job import SMALL
from tiny import composed

from fairdiff.errors import FairDiffError
from fairdiff.jobs import train_job
from fairdiff.view.server import main, serve
from fairdiff.view.state import state


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view") / "seed0"
    train_job(composed(*SMALL, "model.sampling_dtype=float32"), folder)  # pixels of one batch size and another are compared
    return folder


def answer(server, method, path, body=None, headers=None):
    threading.Thread(target=server.handle_request, daemon=True).start()
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=240)
    own = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, path, body, own | (headers or {}))
    found = connection.getresponse()
    content = found.read()
    connection.close()
    return found.status, content


@pytest.fixture
def growing(tmp_path):
    """A folder as training leaves it in the middle of a run."""
    (tmp_path / "run.json").write_text('{"schema": 1, "training": "x"}')
    (tmp_path / "config.yaml").write_text("steps: 10\n")
    rows = [
        {"step": 0, "seconds": 2.0, "loss.align": 1.0, "share.gender.female": 0.2, "target.gender.female": 0.5},
        {"step": 1, "seconds": 4.0, "loss.align": None, "share.gender.female": 0.4, "target.gender.female": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "lo')
    (tmp_path / "pictures").mkdir()
    for name in ("step_000002.png", ".step_000004.png.part"):
        (tmp_path / "pictures" / name).write_bytes(b"image")
    (tmp_path / "secret.txt").write_text("of nobody else")
    return tmp_path


def test_the_state_of_a_run_that_goes_on(growing):
    now = state(growing)
    assert (now["steps"], now["requested"], now["seconds_left"]) == (2, 10, 24)
    assert now["losses"] == {"align": [[0, 1.0]]}
    assert now["shares"]["gender.female"][0] == [0, 0.2]
    assert now["shares"]["gender.female"][1] == [1, pytest.approx((0.9 * 0.2 + 0.4) / 1.9)]
    assert now["targets"] == {"gender.female": 0.5}
    assert now["pictures"] == ["step_000002.png"] and now["reports"] == [] and not now["adapter"]


def test_long_curves_keep_their_last_point(growing):
    rows = [json.dumps({"step": i, "loss.align": float(i), "seconds": 1}) for i in range(1001)]
    (growing / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    points = state(growing)["losses"]["align"]
    assert 300 < len(points) <= 400 and points[-1][0] == 1000


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/state.json", 200),
        ("/pictures/step_000002.png", 200),
        ("/pictures/.step_000004.png.part", 404),
        ("/pictures/../secret.txt", 404),
        ("/pictures/%2e%2e%2fsecret.txt", 404),
        ("/secret.txt", 404),
        ("/config.yaml", 404),
        ("//etc/passwd", 404),
        ("/audits/../report.html", 404),
    ],
)
def test_only_what_the_page_names_is_served(growing, path, status):
    with serve(growing, 0) as server:
        found, content = answer(server, "GET", path)
    assert found == status and b"of nobody else" not in content


@pytest.mark.parametrize("headers", [{"Host": "evil.example:7860"}, {"Origin": "https://evil.example"}])
def test_pages_of_other_sites_are_refused(growing, headers):
    with serve(growing, 0) as server:
        assert answer(server, "GET", "/state.json", headers=headers)[0] == 403
        assert answer(server, "POST", "/look", b"{}", headers)[0] == 403


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"{}", "application/json", "holds no adapter yet"),
        (b"[]", "application/json", "request: allowed"),
        (b"{", "application/json", "Expecting"),
        (b"{}", "text/plain", "allowed: a small request"),
        (b" " * 20_000, "application/json", "allowed: a small request"),
    ],
)
def test_what_cannot_be_answered_is_one_line(growing, body, kind, said):
    with serve(growing, 0) as server:
        status, content = answer(server, "POST", "/look", body, {"Content-Type": kind})
    assert status == 400 and said in json.loads(content)["error"]


def test_a_damaged_row_is_said(growing):
    (growing / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with serve(growing, 0) as server:
        status, content = answer(server, "GET", "/state.json")
    assert status == 500 and "line 2" in json.loads(content)["error"]


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2 and "holds no run.json" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line(growing):
    with serve(growing, 0) as server, pytest.raises(FairDiffError, match=r"^--port: \d+ cannot be used"):
        serve(growing, server.server_address[1])


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), float)


@pytest.mark.slow
def test_the_explorer_shows_the_adapter_at_any_scale(run_folder):
    now = state(run_folder)
    assert now["steps"] == 2 and now["adapter"] and now["reports"] and now["pictures"]

    def look(**changes):
        request = {"prompt": "a photo of the face of a nurse, a person", "scale": 1.0, "seed": 3, "images": 2}
        status, content = answer(server, "POST", "/look", json.dumps(request | changes).encode())
        return status, json.loads(content)

    with serve(run_folder, 0) as server:
        status, full = look()
        assert status == 200 and len(full["pairs"]) == 2
        for pair in full["pairs"]:
            for one in pair.values():
                assert all(sum(classes.values()) == pytest.approx(1, abs=1e-5) for classes in one["reading"].values())
        none, half = look(scale=0.0)[1], look(scale=0.5)[1]
        again, fewer = look()[1], look(images=1)[1]
        distance = [
            np.mean([np.abs(pixels(p["before"]["image"]) - pixels(p["after"]["image"])).mean() for p in found["pairs"]])
            for found in (none, half, full)
        ]
        assert distance[0] < 0.02 and distance[0] < distance[1] < distance[2]
        assert again == full  # the scale before leaves nothing behind
        assert np.abs(pixels(fewer["pairs"][0]["after"]["image"]) - pixels(full["pairs"][0]["after"]["image"])).max() <= 1
        for wrong in ({"prompt": " "}, {"scale": 3}, {"scale": float("nan")}, {"seed": -1}, {"images": 9}, {"images": True}):
            status, said = look(**wrong)
            assert status == 400 and next(iter(wrong)) in said["error"]
