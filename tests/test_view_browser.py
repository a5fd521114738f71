"""The live page and its explorer in a browser, wide and on a phone: it fits, curves grow, prompts are tried, errors shown.

The page talks to a real server over a folder as training leaves it. What answers a prompt in the short tests makes pictures
of what arrived; in the slow one it is the explorer with a trained adapter.
"""

import base64
import io
import json
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw
from test_main_job import SMALL
from tiny import composed

from fairdiff.errors import FairDiffError
from fairdiff.jobs import train_job
from fairdiff.view.server import serve

WIDTHS = (1280, 390)


def rows(count: int) -> str:
    """Return the rows of metrics.jsonl after so many steps."""
    every = [
        {"step": i, "seconds": 1.0, "loss.align": 1 / (i + 1), "loss.image": 0.1, "validation.clip_i": 0.9,
         "share.gender.female": 0.2 + i / 100, "target.gender.female": 0.5}
        for i in range(count)
    ]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in every)


@pytest.fixture
def growing(tmp_path):
    """A folder as training leaves it in the middle of a run, with a name that no phone is wide enough for."""
    folder = tmp_path / ("a_run_with_a_name_of_many_words_and_no_space_in_it_" * 3) / "seed0"
    (folder / "pictures").mkdir(parents=True)
    (folder / "run.json").write_text('{"schema": 1, "training": "x"}')
    (folder / "config.yaml").write_text("steps: 40\n")
    (folder / "metrics.jsonl").write_text(rows(20))
    for steps in (8, 16):
        Image.new("RGB", (1600, 200), (9 * steps, 40, 90)).save(folder / "pictures" / f"step_{steps:06}.png")
    return folder


@pytest.fixture
def visit(browser):
    """Open the page of a folder at a width; it must make no requests to other servers and log no errors."""
    ends, asked = [], []

    def visit(folder, width: int, look=None):
        server = serve(folder, 0)
        if look is not None:
            server.RequestHandlerClass.args[0].explorer = SimpleNamespace(look=look)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}/"
        context = browser.new_context(viewport={"width": width, "height": 900})
        ends.extend([context.close, server.shutdown, server.server_close])
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url) if not request.url.startswith((here, "data:")) else None)
        page.on("pageerror", lambda error: asked.append(str(error)))
        page.goto(here)
        return page

    yield visit
    for end in ends:
        end()
    assert asked == []


def fits(page, width: int) -> bool:
    """Check that the page does not scroll horizontally, and that no text or button lies beyond the edge."""
    cut = page.evaluate(
        """() => [...document.querySelectorAll('h1, p, svg, img, label, input, button, figcaption, .card')]
        .filter((one) => one.getClientRects().length && one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert cut == []
    return page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_curves_appear_and_grow_while_training_goes_on(visit, growing, width):
    page = visit(growing, width)
    page.locator("#shares svg").wait_for()
    assert page.locator("#status").inner_text().startswith("20 of 40 steps, about 20 seconds left")
    assert page.locator("#bar").evaluate("one => one.value / one.max") == 0.5
    assert [page.locator(f"#{part} svg").count() for part in ("shares", "losses", "validation")] == [1, 2, 1]
    line = page.locator("#losses polyline").first
    assert len(line.get_attribute("points").split(" ")) == 20 and page.locator("#shares svg line.target").count() == 1
    assert "target 0.50" in page.locator("#shares svg").get_attribute("aria-label")
    assert page.locator("#picture").get_attribute("src") == "/pictures/step_000016.png"  # the newest
    page.locator("#picture-at").press("ArrowLeft")
    assert page.locator("#picture-name").inner_text() == "8 steps"
    assert fits(page, width) and page.locator("#try:visible").count() == 0 and page.locator("#not-yet").is_visible()
    (growing / "metrics.jsonl").write_text(rows(30))
    page.wait_for_function("document.querySelector('#losses polyline').getAttribute('points').split(' ').length === 30")
    assert page.locator("#picture-name").inner_text() == "8 steps"  # whoever looks back stays there


def painted(request: dict) -> list[dict]:
    """Return pairs of images that show the request; raise an error if the prompt contains "refuse"."""
    if "refuse" in request["prompt"]:
        raise FairDiffError("prompt: found one that is refused, <b>allowed</b>: " + "others" * 60)
    found = []
    for i in range(request["images"]):
        pair = {}
        for name in ("before", "after"):
            picture = Image.new("RGB", (64, 64), "navy")
            ImageDraw.Draw(picture).text((2, 2), f"{name} {request['scale']} {i}", "white")
            reading = {} if i else {"gender": {"female": 0.25, "male": 0.75}}
            picture.save(out := io.BytesIO(), "png")
            uri = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
            pair[name] = {"image": uri, "reading": reading}
        found.append(pair)
    return found


def finish(folder) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter.json").write_text("{}")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_prompt_is_sent_and_both_images_are_shown_with_the_reading(visit, growing, width):
    finish(growing)
    sent = []
    page = visit(growing, width, lambda request: sent.append(request) or painted(request))
    form = page.locator("#try")
    form.wait_for()
    form.get_by_label("Prompt").fill("a photo of a <i>judge</i>")
    form.get_by_label("Seed").fill("12")
    form.get_by_label("Images").fill("3")
    form.get_by_label("Prompt").press("Enter")
    page.locator("#pairs .pair").nth(2).wait_for()
    assert sent == [{"prompt": "a photo of a <i>judge</i>", "scale": 1, "seed": 12, "images": 3}]
    assert page.locator("#pairs img").count() == 6
    assert page.locator("#pairs img").evaluate_all("all => all.every((one) => one.complete && one.naturalWidth === 64)")
    captions = page.locator("#pairs figcaption").all_inner_texts()
    assert captions[:2] == ["before male 75 %", "after male 75 %"] and captions[2] == "before no face found"
    assert page.locator("#pairs img").first.get_attribute("alt") == "before: male 75 %"
    assert "never identity" in page.locator("#said").inner_text() and fits(page, width)
    form.get_by_label("Scale of the adapter").fill("0.5")  # another scale is shown at once
    page.wait_for_function("document.querySelector('#scale-text').textContent === '0.5'")
    deadline = time.monotonic() + 60
    while len(sent) < 2 and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert sent[1] == sent[0] | {"scale": 0.5}


@pytest.mark.parametrize("width", WIDTHS)
def test_errors_are_shown_as_text_and_the_page_goes_on(visit, growing, width):
    finish(growing)
    page = visit(growing, width, painted)
    form, said = page.locator("#try"), page.locator("#said")
    form.wait_for()
    form.get_by_label("Prompt").fill("refuse me")
    form.locator("button").click()
    page.locator("#said.error").wait_for()
    assert said.inner_text().startswith("prompt: found one that is refused, <b>allowed</b>") and fits(page, width)
    assert said.locator("b").count() == 0 and form.locator("button").is_enabled()
    form.get_by_label("Prompt").fill("a nurse")
    form.locator("button").click()
    page.locator("#pairs .pair").first.wait_for()
    assert page.locator("#said.error").count() == 0
    (growing / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    page.locator("#status.error").wait_for()
    assert "line 2" in page.locator("#status").inner_text() and fits(page, width)
    (growing / "metrics.jsonl").write_text(rows(21))
    page.wait_for_function("document.querySelector('#status').textContent.startsWith('21 of 40')")
    assert page.locator("#status.error").count() == 0


@pytest.mark.slow
def test_the_explorer_of_a_real_run_answers_in_the_browser(visit, tmp_path):
    folder = tmp_path / "run" / "seed0"
    train_job(composed(*SMALL), folder)
    page = visit(folder, 390)
    page.locator("#try").wait_for()
    page.locator("#try").get_by_label("Images").fill("2")
    page.locator("#try button").click()
    page.locator("#pairs .pair").nth(1).wait_for()
    assert page.locator("#pairs img").count() == 4 and fits(page, 390)
    assert page.locator("#reports a").count() == 1
