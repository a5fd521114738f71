"""Pages of studies: self-contained, escaped, in the audit's style, and made of records alone."""

import json
import re
import sys
from pathlib import Path

import pytest
from tiny import whole_audit

from fairdiff.studies.page import Page, Point, Section, audit_style, curves_chart, write_html, write_markdown

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import baselines  # noqa: E402
from reproduce.records import record  # noqa: E402


def test_a_page_is_in_the_audits_style_escaped_and_needs_no_network(tmp_path):
    chart = curves_chart({"a <b>": [Point(0, 0.5, 0.4, 0.6, "tip & <more>"), Point(1, 0.2)]}, "bias <x>", "across", 0.1)
    table = Section("Sect <1>", ["`code` & <i>"], ["h"], [["1 | 2"], ["<script>"]], [chart])
    page = Page("T <t>", "Lead.", [table], ["Nothing <else>."], "python scripts/x.py", {"seed": "0"})
    write_html(page, tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text("utf-8")
    assert audit_style() in html and "--before" in audit_style() and "http" not in html.replace("http-equiv", "")
    assert "<script>" not in html and "<i>" not in html and "<code>code</code> &amp; &lt;i&gt;" in html
    assert "tip &amp; &lt;more&gt;" in html and "Nothing &lt;else&gt;." in html and "<b>" not in html
    write_markdown(page, tmp_path / "p.md")
    text = (tmp_path / "p.md").read_text("utf-8")
    assert text.startswith("# T <t>\n\nWritten by `python scripts/x.py`. Lead.\n") and "| 1 · 2 |" in text
    assert "<svg" not in text and "- Nothing <else>." in text


def test_a_chart_keeps_its_order_and_ends_within_its_box():
    chart = curves_chart({"a": [Point(0.1, 0.9, 0.8, 1.0), Point(0.5, 0.1)], "b": [Point(0.3, 0.3)]}, "t", "x", 0.2)
    box = [float(v) for v in re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups()]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert len(dots) == 3 and all(0 < x < box[0] and 0 < y < box[1] for x, y in dots)
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x0 < x2 < x1 and y0 < y2 < y1  # more bias stands higher
    assert chart.count("<polyline") == 1 and "NaN" not in curves_chart({"one": [Point(1, 0)]}, "t", "x")


@pytest.fixture
def measured(tmp_path) -> Path:
    """docs with records of two methods."""
    audit = whole_audit()
    audit["provenance"] |= {"sampling_dtype": "float32", "target": "gender: female 0.5, male 0.5"}
    kept = record(audit) | {"settings": ["audit.split=validation"], "paired_bias": baselines._changes(audit)}
    folder = tmp_path / "docs" / "measurements" / "studies"
    folder.mkdir(parents=True)
    text = json.dumps({"validation": {"UCE": kept, "debiasVL": kept}})
    (folder / "baselines.json").write_text(text, "utf-8")
    return tmp_path


def test_the_page_of_baselines_is_made_of_its_records_alone(measured, capsys):
    options = ["--docs", str(measured / "docs"), "--folder", str(measured / "out"), "--render"]
    baselines.main(options)
    page = (measured / "docs" / "studies" / "baselines.md").read_text("utf-8")
    for line in ("| UCE |", "| debiasVL |", "| nothing |", "## What this does not show"):
        assert line in page
    assert page.count("| UCE |") == 2 and "[" in page and "*" in page  # intervals, of these prompts only
    assert (measured / "out" / "report.html").exists() and (measured / "out" / "baselines.json").exists()
    assert capsys.readouterr().out.endswith("report.html\n")


@pytest.mark.parametrize(
    "options,said",
    [
        (["nonsense"], "baseline: found nonsense, allowed: ethical intervention, random phrases, UCE, debiasVL"),
        (["--adapter", "x"], "--adapter: found x, allowed: NAME=PATH"),
        (["--adapter", "x=/nowhere"], "no such file, allowed: the folder or the file of an adapter"),
        (["--render"], "no such file, allowed: one that this command has written"),
    ],
)
def test_what_is_not_there_is_one_line(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        baselines.main([*options, "--docs", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert end.value.code == 2 and said in (line := capsys.readouterr().err) and line.count("\n") == 1
