"""The report is one self-contained, well-formed file that shows the numbers of audit.json and all required notes."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console
from tiny_world import TinyGenerator, TinyPrompt

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.estimand import ends_of
from fairdiff.audit.figures import Mark, line_chart, range_line
from fairdiff.audit.generate import run_audit
from fairdiff.audit.headline import change_of, changes, four_fifths, headline, margin, rms
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.report import render_report, summary_table
from fairdiff.audit.wording import comparison, distance_of, interval, not_measured, number, signed
from fairdiff.errors import FairDiffError

VOID = {"meta", "br", "img", "input"}


class Page(HTMLParser):
    """A parser that checks that tags nest, and collects text and addresses."""

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
    assert len(page.addresses) == 2 * (3 * 8 + 2)  # images of people one by one, the others as strips
    assert not re.search(r"https?://|@import|url\(|<script [^>]*src|<link", html)


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


def test_change_and_verdict_are_of_one_quantity_and_explain_each_other(make):
    audit, html = make(targets={"gender": [0.5, 0.5]})
    entry, pair = audit["models"]["after"]["attributes"]["gender"], audit["paired"]["attributes"]["gender"]
    assert headline(audit).startswith("Female and male each within 45 to 55\u00a0%: ")
    assert headline(audit).endswith(", for these 3 prompts")
    (said,) = changes(audit)
    assert said.startswith("The gender RMS gap fell from ") and number(rms(entry)["value"], 2) in said
    assert said in " ".join("".join(Page(html).text).split()).replace("\u00a0", " ")
    where, kinds = {"within": "below", "beyond": "above", "undecided": "tell"}, {}
    for kind, ends in (("fell", [-0.3, -0.1]), ("no clear change", [-0.3, 0.1]), ("rose", [0.1, 0.3])):
        pair["squared_distance"]["ci95"] = ends
        for verdict in where:
            entry["target"]["verdict_these"] = verdict
            found = change_of(audit, "gender")
            assert found["kind"] == kind
            kinds[kind, verdict] = found["explained"]
    unclear = {("fell", "beyond"), ("fell", "undecided"), ("rose", "within"), ("no clear change", "within")}
    assert all(kinds[key] for key in unclear) and not kinds["fell", "within"] and not kinds["rose", "beyond"]


@pytest.mark.parametrize(
    "target,says",
    [
        ({"female": 0.5, "male": 0.5}, "female and male each within 45 to 55 %"),
        ({"female": 0.8, "male": 0.2}, "female within 76 to 84 %, male within 16 to 24 %"),
        (dict.fromkeys("abcd", 0.25), "each gender within 82.7 to 117.3 % of its target share"),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, "a within 45 to 55 %, b and c within 20.7 to 29.3 %"),
        ({"a": 1.0, "b": 0.0}, "gender within a distance of 0.10 of each prompt's target"),
    ],
)
def test_the_margin_is_what_it_leaves_each_class(target, says):
    """The margin is the share of a class at D = .10 if the other classes change in proportion, which makes D smallest."""
    uniform = len(set(target.values())) == 1
    entry = {"target": {"shares": target, "delta": 0.1, "uniform": uniform, "requested": True}}
    entry["per_prompt"] = [{"target": {"shares": target}}] * 2
    audit = {"models": {"before": {"attributes": {"gender": entry}}}}
    assert margin(audit, "gender").replace("\u00a0", " ") == says
    if all(target.values()):
        name, t = next(iter(target.items()))
        p = {k: (t + 0.1 * (t * (1 - t)) ** 0.5 if k == name else v) for k, v in target.items()}
        rest = (1 - p[name]) / (1 - t)
        p = {k: v if k == name else v * rest for k, v in p.items()}
        assert sum((p[k] - v) ** 2 / v for k, v in target.items()) == pytest.approx(0.01)
        end = p[name] / t if uniform and len(target) > 2 else p[name]
        assert f"to {100 * end:.1f}".removesuffix(".0") in says


def test_targets_that_differ_by_prompt_and_the_four_fifths():
    ratio = {"flagged": True, "value": 0.7, "ci95": [None, None], "ci95_these": [0.6, 0.75]}
    ratio |= {"ci95_all": [None, None], "ci95_all_these": [0.55, 0.79]}
    shares = {name: {"share": 0.2, "ratio": ratio} for name in ("a", "b")}
    prompts = [{"target": {"shares": {"a": p, "b": 1 - p}}} for p in (0.4, 0.6)]
    entry = {"shares": shares, "per_prompt": prompts}
    entry["target"] = {"shares": {"a": 0.5, "b": 0.5}, "delta": 0.1, "uniform": True, "requested": True}
    audit = {"models": {"before": {"attributes": {"x": entry}}}}
    assert margin(audit, "x") == "x within a distance of 0.10 of each prompt's target"
    assert four_fifths(audit, "x")["answer"] == "no" and len(four_fifths(audit, "x")["below"]) == 2
    for ends, answer in (([0.7, 0.79], "cannot tell"), ([0.81, 1.2], "yes"), ([None, None], "cannot tell")):
        ratio["ci95_these"], ratio["ci95_all_these"] = ends, [0.6, 1.3]  # "no" is said of all classes at once
        assert four_fifths(audit, "x")["answer"] == answer


def test_training_is_credited_with_the_difference_to_the_untrained_adapter(make):
    """The untrained adapter accounts for part of the change: it goes from .95 to .68, and training from there to near 0."""
    audit, html = make(("before", "start", "after"), targets={"gender": [0.5, 0.5]})
    bias = {m: audit["models"][m]["attributes"]["gender"]["bias"]["mean"] for m in ("before", "start", "after")}
    moved = audit["trained"]["attributes"]["gender"]["bias"]
    assert moved["difference"] == pytest.approx(bias["after"] - bias["start"])
    assert audit["paired"]["attributes"]["gender"]["bias"]["difference"] == pytest.approx(
        bias["after"] - bias["before"]
    )
    D = {m: rms(audit["models"][m]["attributes"]["gender"])["value"] for m in ("before", "start", "after")}
    (said,) = changes(audit)
    assert said.startswith(f"The gender RMS gap fell from {D['start']:.2f} [") and f"* to {D['after']:.2f} [" in said
    assert " by training; the frozen model has " + f"{D['before']:.2f} [" in said
    page = " ".join("".join(Page(html).text).split())
    assert "by training" in page.lower() and interval(ends_of(moved)) in page
    assert len(Page(html).addresses) == 3 * (3 * 8 + 2)
    audit["trained"]["attributes"]["gender"]["squared_distance"]["ci95"] = [-0.3, 0.1]
    assert "shows no clear change by training" in changes(audit)[0]


@pytest.mark.parametrize("target,moved,verdict", [("gender", "age", "cannot tell"), ("age", "gender", "no")])
def test_an_attribute_without_a_target_has_its_drift_and_a_verdict(make, target, moved, verdict):
    """The generators differ in gender only. Age depends on the noise and stays, but 72 images are too few to tell."""
    audit, html = make(targets={target: [0.5, 0.5]})
    entry = audit["paired"]["attributes"][moved]
    assert "drift" not in audit["paired"]["attributes"][target]
    words = {"margin": 0.06, "stayed_within": "cannot tell", "stayed_within_these": verdict}
    shares = entry["drift"]["shares"]
    assert entry["drift"] == entry["bias"] | words | {"shares": shares} and list(shares) == audit["attributes"][moved]
    row, of_class = comparison(audit)["attributes without a target"]
    first = audit["attributes"][moved][0]
    step = [audit["models"][m]["attributes"][moved]["shares"][first]["share"] for m in ("before", "after")]
    assert of_class["change"][0] == pytest.approx(step[1] - step[0]) == shares[first]["difference"]
    assert f"{first} {signed(shares[first]['difference'])} {interval(ends_of(shares[first]))}" in html
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
    assert f'<span class="a">{rms(after)["value"]:.2f}</span>' in html and "RMS distance" in text
    assert headline(audit).startswith("Female within 70.7 to 79.3") and "total variation" in text
    assert interval(ends_of(audit["paired"]["attributes"]["gender"]["total_variation"])) in text
    age = audit["models"]["after"]["attributes"]["age"]
    assert distance_of(age)["key"] == "bias"


def test_mean_shares_stand_as_judged_and_with_the_judges_error_undone(make):
    audit, html = make(targets={"gender": [0.75, 0.25]}, confusion={"gender": [[95, 5], [10, 90]]})
    text = " ".join("".join(Page(html).text).split())
    after = audit["models"]["after"]["attributes"]["gender"]
    for shares in (after["shares"], after["corrected"]["shares"]):
        low, high = (f"{100 * end:.0f}" for end in ends_of(shares["female"])[:2])
        assert f"{number(100 * shares['female']['share'], 0)} % [{low}, {high}]*".replace(" ", " ") in text
    # for a target other than parity, the total variation is shown, not the bias
    moved = after["corrected"]["total_variation"]
    before = audit["models"]["before"]["attributes"]["gender"]["corrected"]["total_variation"]
    assert f"gender distance to target is {number(before['mean'])} {interval(ends_of(before))} before" in text
    assert f"{number(moved['mean'])} {interval(ends_of(moved))} after" in text
    assert "corrected for the judge's errors, differ" in text


def test_a_combination_has_its_distance_and_verdict_on_the_page_as_judged(make):
    audit, html = make(targets={"gender": [0.5, 0.5], "age": [0.5, 0.5]}, confusion={"gender": [[95, 5], [10, 90]]})
    entry = audit["models"]["after"]["joint"]["gender×age"]
    row = next(row for row in comparison(audit)["combinations"] if row["name"] == "gender×age D")
    assert row["after"] == (entry["target"]["distance"]["value"], ends_of(entry["target"]["distance"]))
    assert row["verdict"] in ("on target*", "off target*", "not decided*") and "not undone" in row["note"]
    assert "gender×age D" in html and row["verdict"] in html
    untargeted, _ = make(targets={"gender": [0.5, 0.5]})
    assert [row["name"] for row in comparison(untargeted)["combinations"]] == ["gender×age bias"]


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
    assert re.findall(r'data-group aria-label="(\w+)', html)[:4] == ["nurse", "tennis", "pilot", "baker"]


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


def test_the_terminal_table_of_three_attributes_has_room_for_its_verdicts(make):
    audit, _ = make(targets={"gender": [0.5, 0.5]})
    audit = json.loads(json.dumps(audit, ensure_ascii=False).replace("gender×age", "gender×race×age"))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(audit))
    text = console.export_text()
    assert "gender×race×age" in text and "cannot" in text and "…" not in text


def test_figures_of_change_have_signs():
    assert [signed(v) for v in (0.5, -0.25, 0.0, None)] == ["+0.500", "−0.250", "+0.000", "–"]
    assert interval([None, None]) == "" and interval([-0.1, 0.2]) == "[−0.100, 0.200]"


def test_what_judges_semantics_is_said(make):
    audit, _ = make()
    assert "image term" in " ".join(not_measured(audit)) and "captioned" not in " ".join(not_measured(audit))
    audit["provenance"]["CLIP"] = "ViT-H-14/laion2b_s32b_b79k"
    assert "captioned" in " ".join(not_measured(audit))
    del audit["models"]["after"]
    assert "image term" not in " ".join(not_measured(audit))


def test_a_line_of_a_table_uses_its_whole_width_and_nothing_leaves_it():
    svg = range_line({"before": Mark(0.2, 0.1, 0.3), "after": Mark(1.2, 0.4, 1.3), "start": None}, 1.0, 0.5)
    assert re.findall(r'cx="([\d.]+)%"', svg) == ["20.00", "100.00"] and "viewBox" not in svg
    assert svg.count("whisker") == 2 and 'x1="50.00%" x2="50.00%"' in svg


def test_every_prompt_has_its_numbers_as_text_and_its_pictures_their_labels(make):
    audit, html = make(targets={"gender": [0.5, 0.5]}, nobody=("before",))
    text = " ".join("".join(Page(html).text).split())
    after = audit["models"]["after"]["attributes"]["gender"]
    for item in after["per_prompt"]:
        found = item["target"]["distance"]
        assert f"{found['value']:.2f} {interval(found['ci95_all'], lambda v: number(v, 2))}" in text
        low, high = (f"{100 * end:.0f}" for end in item["shares"]["female"]["ci95"])
        assert f"[{low}, {high}]" in text and item["prompt"] in text
    assert f"{after['target']['prompts_certain']['off']} certainly off" in text
    assert str(after["target"]["prompts_certain"]["images_for_within"]) in text
    assert html.count(" data-noface>") + html.count(" data-noface data-low>") == 3 * 8 and "no face" in text
    assert "title=" not in html  # no note that a phone cannot show


def test_images_of_the_training_stand_on_the_page_the_first_and_the_last_among_them(make, tmp_path):
    audit, page = make()
    assert "Images during training" not in page
    for steps in range(10, 90, 10):
        Image.new("RGB", (8, 8), (steps, 0, 0)).save(tmp_path / f"step_{steps:06d}.png")
    (tmp_path / "step_000080.png").write_bytes(b"damaged")
    page = render_report(tmp_path, audit, {}, [], tmp_path).read_text("utf-8")
    assert "Images during training" in page and "after 10 steps<" in page and "after 80 steps" not in page
    assert page.count('class="learnt"') == 3


def test_an_audit_of_one_model_has_neither_columns_nor_rows_of_an_adapter(make):
    audit, html = make(("before",), targets={"gender": [0.5, 0.5]})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(audit))
    text, page = console.export_text(), "".join(Page(html).text)
    assert "between seeds" in text and "between seeds" in page
    assert not any(word in text for word in ("after", "change", "CLIP-I", "drift"))
    assert not any(word in page for word in ("Before and after", "CLIP-I (", "drift –", "absent encoder"))
    assert 'data-label="before"' in html and 'data-label="after"' not in html and 'data-label="change"' not in html
