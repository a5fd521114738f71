"""The report is one self-contained, well-formed file that shows what audit.json holds, and says what it must."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console
from tiny_world import TinyGenerator, TinyPrompt

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.estimand import ends_of
from fairdiff.audit.figures import Mark, Row, line_chart, share_chart
from fairdiff.audit.generate import run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.report import render_report, summary_table
from fairdiff.audit.wording import comparison, distance_of, headline, interval, not_measured, signed
from fairdiff.errors import FairDiffError

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that tags nest and gathers text and addresses."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def history():
    rows = [{"step": i, "loss.align": 1 / (i + 1), "bias.gender": 0.5, "grad_norm": 1.0} for i in range(9)]
    return [*rows, {"step": 9, "loss.align": None, "grad_norm": 2.0}]


@pytest.fixture
def judge():
    return {"path": "colours", "same_as_training_judge": False}


@pytest.fixture
def make(plan, measurer, noise, tmp_path, judge, history):
    def make(generators=("before", "after"), without_people=True, nobody=(), named=(), **spec):
        audit_plan = replace(plan, without_people=plan.without_people if without_people else [], named=named)
        offsets = {"before": 2.0, "start": 1.0, "after": 0.1}
        tiny = {model: TinyGenerator(offset, faceless=float(model in nobody)) for model, offset in offsets.items()}
        records = run_audit(audit_plan, {m: tiny[m] for m in generators}, measurer, noise, tmp_path, lambda n: None)
        audit = compute_metrics(records, MetricSpec(plan.attributes, **{"judge": judge} | spec))
        audit = json.loads(json.dumps(audit, allow_nan=False))
        path = render_report(tmp_path, audit, {"target": ["gender: female 0.5"]}, history)
        return audit, path.read_text(encoding="utf-8")

    return make


def test_the_page_says_how_often_a_named_class_is_shown_and_which_prompts_are_worst(make, plan):
    named = [TinyPrompt(f"{p.text}, a woman", "occupation", p.subject, names="gender.female") for p in plan.prompts]
    audit, html = make(targets={"gender": [0.5, 0.5]}, named=named)
    text = " ".join("".join(Page(html).text).split())
    kept = audit["named"]["attributes"]["gender"]["kept"]
    assert f"the share of faces that show it is {kept['before']['mean']:.2f}" in text
    assert f"female {100 * kept['before']['mean']:.0f}" in text and "3 prompts" in text
    entry = audit["models"]["after"]["attributes"]["gender"]
    worst = max(entry["per_prompt"], key=lambda p: p["bias"]["value"])["subject"]
    assert f"The worst tenth of the prompts ({worst}) has {entry['bias']['worst_tenth']['mean']:.2f}" in text
    assert {"gender kept", "gender worst"} <= {row["name"] for rows in comparison(audit).values() for row in rows}


def test_a_chart_shows_every_model_at_every_guidance_scale():
    lines = {
        "before": [(1.0, Mark(0.5, 0.4, 0.6)), (7.5, Mark(0.9, 0.8, 1.0))],
        "after": [(1.0, Mark(0.1)), (7.5, None)],
    }
    svg = line_chart(lines, 0.1, "gender bias", "guidance")
    assert svg.count("<circle") == 3 and svg.count("whisker") == 2 and ">7.5<" in svg and "after, 1: 0.100<" in svg
    left, right = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"[^>]+dot before', svg))
    assert left < right
    assert line_chart({"before": [(2.0, None)]}, None, "gender bias", "guidance").count("<circle") == 0


def test_one_file_that_asks_nothing_of_the_network(make):
    _, html = make(targets={"gender": [0.5, 0.5]})
    page = Page(html)
    assert page.addresses and all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert len(page.addresses) == 2 * (3 + 2)
    assert not re.search(r"https?://|@import|url\(|<script", html)


@pytest.mark.parametrize("size", [0, 20, 100])
def test_a_damaged_strip_is_one_line_that_says_what_to_do(size, make, tmp_path, history):
    audit, _ = make()
    strip = next((tmp_path / "records" / "after").glob("*.png"))
    strip.write_bytes(strip.read_bytes()[:size])
    with pytest.raises(FairDiffError) as caught:
        render_report(tmp_path, audit, {}, history)
    said = str(caught.value)
    assert said.startswith(f"{strip}: cannot be read as an image (") and "repeat the run's command" in said
    assert "\n" not in said


def test_it_shows_what_the_audit_holds(make):
    audit, html = make(targets={"gender": [0.5, 0.5]}, confusion={"gender": [[95, 5], [10, 90]]})
    text = " ".join("".join(Page(html).text).split())
    for model in ("before", "after"):
        entry = audit["models"][model]["attributes"]["gender"]
        assert f"{entry['bias']['mean']:.2f}" in text
        assert interval(ends_of(entry["bias"])) in text
        assert interval(ends_of(entry["corrected"]["bias"])) in text
        assert f"{entry['bias']['floor']:.3f}" in text
    assert interval(audit["without_people"]["relative_drift"]["ci95"]) in text
    for words in ("perceived presentation", "not the one used as training signal", "gender: female 0.5", "loss align",
                  "b0", "a0", "j0", "What was not measured", "nurse", "teapot", "[95, 5]"):  # fmt: skip
        assert words in text, words


def test_headline_follows_the_paired_interval(make):
    audit, _ = make(targets={"gender": [0.5, 0.5]})
    assert headline(audit).startswith("Gender bias fell from ")
    audit["paired"]["attributes"]["gender"]["bias"]["ci95"] = [-0.3, 0.1]
    assert "shows no clear change" in headline(audit)
    audit["paired"]["attributes"]["gender"]["bias"]["ci95"] = [0.1, 0.3]
    assert "rose" in headline(audit)


def test_training_is_credited_with_the_difference_to_the_untrained_adapter(make):
    """Most of the change is the untrained adapter's: from .95 to .68, and then to near 0."""
    audit, html = make(("before", "start", "after"), targets={"gender": [0.5, 0.5]})
    bias = {m: audit["models"][m]["attributes"]["gender"]["bias"]["mean"] for m in ("before", "start", "after")}
    moved = audit["trained"]["attributes"]["gender"]["bias"]
    assert moved["difference"] == pytest.approx(bias["after"] - bias["start"])
    assert audit["paired"]["attributes"]["gender"]["bias"]["difference"] == pytest.approx(
        bias["after"] - bias["before"]
    )
    said = headline(audit)
    assert f"fell from {bias['start']:.2f} to {bias['after']:.2f} by training" in said
    assert f"(the frozen model: {bias['before']:.2f})" in said
    page = " ".join("".join(Page(html).text).split())
    assert "by training" in page and interval(ends_of(moved)) in page and len(Page(html).addresses) == 3 * (3 + 2)
    audit["trained"]["attributes"]["gender"]["bias"]["ci95"] = [-0.3, 0.1]
    assert "shows no clear change by training" in headline(audit)


@pytest.mark.parametrize("target,moved,verdict", [("gender", "age", "cannot tell"), ("age", "gender", "no")])
def test_an_attribute_without_a_target_has_its_drift_and_a_verdict(make, target, moved, verdict):
    """The generators differ in gender alone: age, which follows the noise, stays, but 72 images are too few to tell."""
    audit, html = make(targets={target: [0.5, 0.5]})
    entry = audit["paired"]["attributes"][moved]
    assert "drift" not in audit["paired"]["attributes"][target]
    words = {"margin": 0.06, "stayed_within": "cannot tell", "stayed_within_these": verdict}
    assert entry["drift"] == entry["bias"] | words
    row = comparison(audit)["attributes without a target"][0]
    assert row["change"] == (entry["bias"]["difference"], [*entry["bias"]["ci95_these"], "*"])
    assert row["verdict"] == f"{verdict}*"
    assert "No target was set for this attribute" in html


@pytest.mark.parametrize(
    "confusion,says", [([[95, 5], [10, 90]], "and the judge's error removed"), ([[53, 47], [47, 53]], "hardly tells")]
)
def test_the_card_says_what_the_verdict_rests_on_and_why_it_cannot_be_told(make, confusion, says):
    audit, html = make(targets={"gender": [0.5, 0.5]}, confusion={"gender": confusion})
    text = " ".join("".join(Page(html).text).split())
    assert says in text and "these prompts" in text and "needs 36" in text
    _, html = make(targets={"gender": [0.5, 0.5]})
    assert "this judge's errors were never measured" in html.replace("&#39;", "'")


def test_a_target_that_is_not_parity_is_judged_by_its_distance_not_by_bias(make):
    audit, html = make(targets={"gender": [0.75, 0.25]})
    after = audit["models"]["after"]["attributes"]["gender"]
    text = " ".join("".join(Page(html).text).split())
    assert distance_of(after)["mean"] == after["target"]["total_variation"]["mean"] != after["bias"]["mean"]
    assert f'<span class="a">{distance_of(after)["mean"]:.2f}</span>' in html
    assert headline(audit).startswith("Gender distance to target ") and "total variation" in text
    assert interval(ends_of(audit["paired"]["attributes"]["gender"]["total_variation"])) in text
    age = audit["models"]["after"]["attributes"]["age"]
    assert distance_of(age)["key"] == "bias"


def test_a_judge_that_also_trained_is_called_out(make):
    audit, html = make(judge={"path": "colours", "same_as_training_judge": True})
    assert "the one that trained the adapter" in html and "not the one used as training signal" not in html
    assert any("independent opinion" in line for line in not_measured(audit))


def test_one_model_and_no_unrelated_prompts(make):
    audit, html = make(generators=("before",), without_people=False)
    assert Page(html).open == [] and headline(audit).startswith("Gender bias is ")
    assert "Prompts without people" not in html
    summary_table(audit)


@pytest.mark.parametrize("nobody", [("before",), ("after",), ("before", "after")])
@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.75, 0.25]])
def test_a_model_that_shows_no_face_still_gets_its_report(make, nobody, shares):
    confusion = {"gender": [[95, 5], [10, 90]]}
    audit, html = make(nobody=nobody, targets={"gender": shares}, confusion=confusion)
    assert Page(html).open == [] and headline(audit)
    summary_table(audit)
    for model in ("before", "after"):
        assert audit["models"][model]["no_face"]["rate"] == (model in nobody)


def test_the_pictures_in_sight_are_of_every_kind_of_prompt(plan, make):
    plan.prompts.append(TinyPrompt("a photo of a person who plays tennis, a person", "sport", "tennis"))
    _, html = make()
    assert re.findall(r"<figcaption[^>]*><b>(\w+)", html)[:4] == ["nurse", "tennis", "pilot", "baker"]


def test_names_from_outside_are_escaped(plan, make):
    evil = "<script>alert(1)</script>"
    plan.prompts.append(TinyPrompt(f"a photo of {evil}, a person", "occupation", evil))
    _, html = make()
    assert evil not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize("generators,width", [(("before", "after"), 80), (("before", "start", "after"), 96)])
def test_the_terminal_table_fits_and_names_every_number(make, generators, width):
    audit, _ = make(generators, targets={"gender": [0.5, 0.5]})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(audit))
    text = console.export_text()
    assert "…" not in text
    for rows in comparison(audit).values():
        assert all(row["name"] in text for row in rows)
    assert f"{audit['models']['after']['attributes']['gender']['bias']['mean']:.2f}" in text


def test_figures_of_change_have_signs():
    assert [signed(v) for v in (0.5, -0.25, 0.0, None)] == ["+0.500", "−0.250", "+0.000", "–"]
    assert interval([None, None]) == "" and interval([-0.1, 0.2]) == "[−0.100, 0.200]"


def test_what_judges_semantics_is_said(make):
    audit, _ = make()
    assert "preservation loss" in " ".join(not_measured(audit)) and "captions" not in " ".join(not_measured(audit))
    audit["provenance"]["CLIP"] = "ViT-H-14/laion2b_s32b_b79k"
    assert "captions" in " ".join(not_measured(audit))
    del audit["models"]["after"]
    assert "preservation loss" not in " ".join(not_measured(audit))


def test_labels_of_any_length_leave_the_chart_its_place():
    rows = [
        Row(
            "a photo of " + "very " * 40 + "long prompts", {"before": Mark(0.2, 0.1, 0.3), "after": Mark(0.5, 0.4, 0.6)}
        )
    ]
    for classes in (1, 2, 4):
        svg = share_chart([(f"class {i}", rows) for i in range(classes)], "shares")
        places = [float(x) for x in re.findall(r'circle cx="([-\d.]+)"', svg)]
        width = float(re.search(r'viewBox="0 0 (\d+)', svg)[1])
        assert places == sorted(places) and 0 < places[0] and places[-1] < width
        assert all(after - before > 20 for before, after in zip(places[::2], places[1::2], strict=True))
