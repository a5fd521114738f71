"""The report in a browser, wide and on a phone: it fits, sorts, filters, enlarges by keyboard and loads nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_world import TinyGenerator

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.generate import run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.report import render_report
from fairdiff.compare import command as compare

WIDTHS = (1280, 390)


@pytest.fixture
def report(plan, measurer, noise, tmp_path_factory, made={}) -> Path:  # noqa: B006, one page for all tests
    if made:
        return made["page"]
    folder = tmp_path_factory.mktemp("report")
    tiny = {"before": TinyGenerator(2.0, faceless=0.2), "after": TinyGenerator(0.1, faceless=0.2)}
    records = run_audit(plan, tiny, measurer, noise, folder, lambda n: None)
    spec = MetricSpec(plan.attributes, {"path": "colours"}, {"gender": [0.5, 0.5]})
    history = [{"step": i, "loss.align": 1 / (i + 1)} for i in range(5)]
    audit = json.loads(json.dumps(compute_metrics(records, spec), allow_nan=False))
    (folder / "audit.json").write_text(json.dumps(audit))
    made["page"] = render_report(folder, audit, {"target": ["gender: female 0.5"]}, history)
    return made["page"]


@pytest.fixture
def visit(browser, report):
    """Open the report at a width; it must make no other requests and log no errors."""
    contexts, asked = [], []

    def visit(width: int, javascript: bool = True):
        context = browser.new_context(viewport={"width": width, "height": 900}, java_script_enabled=javascript)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(str(error)))
        page.on("console", lambda message: asked.append(message.text))
        page.goto(report.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [url for url in asked if url != report.as_uri() and not url.startswith("data:")] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_width_whatever_is_open(visit, width):
    page = visit(width)
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        """() => [...document.querySelectorAll('h1, p, td, th, svg, img, summary, form.filter')]
        .filter((one) => !one.closest('.scroll') && one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert cut == []
    lines = page.locator("svg.line").evaluate_all("all => all.map((one) => one.getBoundingClientRect().width)")
    assert lines and min(lines) > 80  # whole ranges, never a part of one


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_is_sorted_by_its_buttons(visit, width):
    page = visit(width)
    head = page.locator("#table-1 th", has_text="prompt").first
    names = page.locator("#table-1 tbody th")
    assert head.get_attribute("aria-sort") == "none"
    for direction, wanted in (("ascending", ["baker", "nurse", "pilot"]), ("descending", ["pilot", "nurse", "baker"])):
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == direction
        assert [name.split("\n")[0] for name in names.all_inner_texts()] == wanted
    number = page.locator("#table-1 th", has_text="distance D")
    number.locator("button").click()
    values = page.locator("#table-1 tbody td:nth-child(3)").evaluate_all("all => all.map((one) => +one.dataset.value)")
    assert values == sorted(values) and head.get_attribute("aria-sort") == "none"


@pytest.mark.parametrize("width", WIDTHS)
def test_filters_leave_what_they_say(visit, width):
    page = visit(width)
    table, form = page.locator("#table-1"), page.locator("form[data-of=table-1]")
    form.get_by_label("Prompt").fill("NURSE")
    assert table.locator("tbody tr:visible").count() == 1
    assert form.locator("output").inner_text() == "1 of 3 shown"
    pairs, form = page.locator("#groups details.pair"), page.locator("form[data-of=groups]")
    every = pairs.count()
    assert every == 3 * 8 == page.locator("#groups details.pair:visible").count()
    for label, mark in (("class changed", "data-changed"), ("no face", "data-noface"), ("low confidence", "data-low")):
        form.get_by_label(label).check()
        left = page.locator("#groups details.pair:visible").count()
        assert left == page.locator(f"#groups details.pair[{mark}]").count() < every
        assert left > 0 or mark == "data-low"
        form.get_by_label(label).uncheck()
    form.get_by_label("Class after").select_option("gender male")
    shown = page.locator("#groups details.pair:visible .picture.after").all_inner_texts()
    assert shown and all(text.strip().startswith("male") for text in shown)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_pair_is_enlarged_and_closed_by_the_keyboard(visit, width):
    page = visit(width)
    pair = page.locator("details.pair").nth(1)
    image = pair.locator("img").first
    small = image.bounding_box()["width"]
    pair.locator("summary").focus()
    page.keyboard.press("Enter")
    assert image.bounding_box()["width"] > 1.4 * small
    assert "the judge's probabilities" in pair.inner_text() and pair.locator("img").count() == 2
    page.keyboard.press("Escape")
    assert pair.get_attribute("open") is None and image.bounding_box()["width"] == small
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('details.pair') !== null")


@pytest.mark.parametrize("width", WIDTHS)
def test_without_javascript_all_that_matters_is_there(visit, width):
    page = visit(width, javascript=False)
    assert page.locator("form.filter:visible").count() == 0 and page.locator("button").count() == 0
    assert page.locator("h1").is_visible() and page.locator("#table-1 tbody tr:visible").count() == 3
    assert page.locator("#table-1 caption").is_visible()
    pair = page.locator("details.pair").first
    pair.locator("summary").click()
    assert "probabilities" in pair.inner_text() and page.locator("details.pair img:visible").count() == 3 * 8 * 2
    for text in page.locator("#table-1 tbody tr").first.locator("td").all_inner_texts():
        assert text.strip()


def test_a_screen_reader_has_names_for_everything(visit):
    page = visit(1280)
    assert page.locator("img:not([alt])").count() == 0 and page.locator("html[lang]").count() == 1
    assert page.locator("svg:not([aria-label]):not([aria-hidden])").count() == 0
    named = "all => all.every((one) => one.labels.length > 0)"
    assert page.locator("input, select").evaluate_all(named)
    assert page.locator("table.sortable th[scope=row]").count() == 3 * 2 and page.locator("h1").count() == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_fits_its_width(browser, report, plan, measurer, noise, tmp_path, width):
    """The comparison is of the report's audit and one whose folder has a long name."""
    other = tmp_path / "runs" / ("adapter.path=" + "a_long_name_" * 12)
    shutil.copytree(report.parent, other)
    compare.main([str(report.parent), str(other), "--out", str(tmp_path)])
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto((tmp_path / "comparison.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("table").count() > 4 and page.locator("h1").count() == 1
    context.close()
