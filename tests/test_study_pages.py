"""Pages of studies: self-contained, escaped, in the style of audits, and computed from records only."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny import whole_audit

from fairdiff.audit.report import render_report
from fairdiff.studies.page import Page, Point, Section, audit_style, curves_chart, ticks, write_html, write_markdown

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import baselines  # noqa: E402
from reproduce.records import record  # noqa: E402


def test_a_page_is_in_the_audits_style_escaped_and_needs_no_network(tmp_path):
    chart = curves_chart({"a <b>": [Point(0, 0.5, 0.4, 0.6, "tip & <more>"), Point(1, 0.2)]}, "bias <x>", "across", 0.1)
    table = Section("Sect <1>", ["`code` & <i>"], ["h"], [["1 | 2"], ["<script>"]], [chart])
    page = Page("T <t>", "Lead.", [table], ["Nothing <else>."], "python scripts/x.py", {"seed": "0"})
    write_html(page, tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text("utf-8")
    assert audit_style() in html and "{" + "%" not in html and "http" not in html.replace("http-equiv", "")
    assert "<script>" not in html and "<i>" not in html and "<code>code</code> &amp; &lt;i&gt;" in html
    assert "tip &amp; &lt;more&gt;" in html and "Nothing &lt;else&gt;." in html and "<b>" not in html
    write_markdown(page, tmp_path / "p.md")
    text = (tmp_path / "p.md").read_text("utf-8")
    assert text.startswith("# T <t>\n\nWritten by `python scripts/x.py`. Lead.\n") and "| 1 · 2 |" in text
    assert "![bias &lt;x&gt;](p-1.svg)" in text and "- Nothing <else>." in text
    drawn = ElementTree.parse(tmp_path / "p-1.svg").getroot()  # well-formed, and it needs no style of a page
    assert drawn.tag.endswith("svg") and "var(" not in (tmp_path / "p-1.svg").read_text("utf-8")
    write_markdown(Page("T", "L", [], [], "x"), tmp_path / "p.md")
    assert not list(tmp_path.glob("*.svg"))  # no chart of an earlier page stays


@pytest.mark.parametrize("low,high", [(0, 0.847), (0.906, 1), (0.05, 1), (0, 160), (-1.5, 0.5), (0, 1e-3), (0, 3), (7, 8.2)])
def test_ticks_are_round_and_cover_the_axis(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert (found[0] - low) < (step := found[1] - found[0]) + 1e-9 and high - found[-1] < step + 1e-9


@pytest.fixture(scope="module")
def audit() -> dict:
    return whole_audit()


def test_pages_of_studies_have_every_rule_of_an_audits_report(audit, tmp_path):
    """And that style has a rule for every class that these pages use."""
    render_report(tmp_path, audit, {}, [])
    report = (tmp_path / "report.html").read_text("utf-8")
    (style,) = re.findall(r"<style>.*?</style>", audit_style(), re.S)
    rules = style.removeprefix("<style>").removesuffix("</style>").strip()
    assert rules in report and "<" not in rules
    chart = curves_chart({"a": [Point(0, 0.5, 0.4, 0.6), Point(1, 0.2)]}, "bias", "across", 0.1)
    write_html(Page("T", "L", [Section("S", ["t"], ["h"], [["1"]], [chart])], ["n"], "x"), tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text("utf-8")
    used = {name for found in re.findall(r'class="?([\w ]+)', html.replace(style, "")) for name in found.split()}
    assert used >= {"lead", "cards", "card", "floor", "whisker"} and not [u for u in used if f".{u}" not in rules]


def test_a_chart_keeps_its_order_and_ends_within_its_box():
    chart = curves_chart({"a": [Point(0.1, 0.9, 0.8, 1.0), Point(0.5, 0.1)], "b": [Point(0.3, 0.3)]}, "t", "x", 0.2)
    box = [float(v) for v in re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups()]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert len(dots) == 5 and all(0 < x < box[0] and 0 < y < box[1] for x, y in dots)
    (x0, y0), (x1, y1), _, (x2, y2), _ = dots  # the names' own among them
    assert x0 < x2 < x1 and y0 < y2 < y1  # more bias stands higher
    assert chart.count("<polyline") == 1 and "NaN" not in curves_chart({"one": [Point(1, 0)]}, "t", "x")


@pytest.fixture
def measured(audit, tmp_path) -> Path:
    """Write docs with records of two methods."""
    made = audit["provenance"] | {"sampling_dtype": "float32", "target": "gender: female 0.5, male 0.5"}
    kept = record(audit | {"provenance": made}) | {"paired_bias": baselines._changes(audit)}
    kept |= {"settings": ["audit.split=validation"]}
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
    assert (measured / "out" / "baselines.html").exists() and (measured / "out" / "baselines.json").exists()
    assert capsys.readouterr().out.endswith("baselines.html\n")


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


def test_the_frontier_compares_methods_at_equal_levels_with_paired_bands():
    """At equal semantics, a method with the same bias and half the loss of semantics wins. "nothing" ends every curve."""
    from harness.frontier_page import page

    bias = [0.8, 0.6, 0.7, 0.9]
    point = {"label": "own, strength 2", "bias": [b / 2 for b in bias], "semantics": [0.9] * 4}
    found = {
        "nothing": {"label": "nothing", "bias": bias, "semantics": [1.0] * 4},
        "curves": {"own": [point], "other": [point | {"label": "other", "semantics": [0.8] * 4}]},
        "quotas": [{"tolerance": 0.1, "costs": [2.0, 3.0], "bias": [0.1, 0.1], "true_bias": [], "nothing_kept": 2}],
        "attribute": "gender", "semantics": "dino", "seed": 0, "split": "validation", "images": 8, "settings": ["x"],
    }  # fmt: skip
    settings, equal, at_bias, quota = page(found, "python x").sections
    assert [row[0] for row in settings.rows] == ["nothing", "own, strength 2", "other"]
    rows = {row[0]: row[1:] for row in equal.rows}
    read = {name: [float(cell.split()[0]) for cell in cells[::2]] for name, cells in rows.items()}
    assert read["own"] == pytest.approx([0.675, 0.525, 0.375], abs=1e-3)  # at .98, .94, .80
    assert read["other"] == pytest.approx([0.7125, 0.6375, 0.375], abs=1e-3)
    assert rows["envelope"][0] == rows["own"][0] and rows["own"][1] == "" and rows["other"][1].startswith("+0.03")
    assert {row[0]: row[1].split()[0] for row in at_bias.rows} == {"own": "0.975", "other": "0.950", "envelope": "0.975"}
    assert quota.rows[0][0] == "± 0.1" and quota.rows[0][1].startswith("2.500") and quota.rows[0][3:] == ["–", "2 of 4"]


def test_thresholds_of_labelled_faces_bring_the_groups_together(tmp_path, capsys):
    import thresholds

    rng, lines = np.random.default_rng(0), ["group,score,label"]
    for group, shift in (("a", 0.0), ("b", 0.8)):
        for _ in range(60):
            label = int(rng.integers(2))
            lines.append(f"{group},{label + shift + 0.6 * rng.standard_normal():.4f},{label}")
    (tmp_path / "faces.csv").write_text("\n".join(lines), "utf-8")
    thresholds.main([str(tmp_path / "faces.csv"), "--constraint", "odds", "--to", str(tmp_path / "t.json")])
    found = json.loads((tmp_path / "t.json").read_text("utf-8"))
    assert found["gaps"]["tpr"] < 1e-6 and found["gaps"]["fpr"] < 1e-6
    low, high = found["gaps_in_new_faces"]["tpr"][1:]
    assert 0 <= low < high < 1 and "tpr: 0.000" in capsys.readouterr().out
    (tmp_path / "bad.csv").write_text("group,score,label\na,x,1\n", "utf-8")
    with pytest.raises(SystemExit):
        thresholds.main([str(tmp_path / "bad.csv")])
    assert "bad.csv, line 2: found" in capsys.readouterr().err
