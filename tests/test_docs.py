"""The pages are correct: commands compose into plans, links have targets, and reference pages match the code."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import whole_audit

from fairdiff.cli.main import main
from fairdiff.cli.messages import RENAMED
from fairdiff.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import reference  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
MEASURED = {"results.md", "search.md", "performance.md"}  # generated: their commands are those of the day of measuring
MAINS = {  # command -> its file of conf, whether it trains
    "python train.py": ("config", True), "python scripts/audit.py": ("measure", False),
    "fairdiff-train": ("config", True), "fairdiff-audit": ("measure", False),
}  # fmt: skip
START = re.compile(r"(?:python (?:train|scripts/audit)\.py|fairdiff-(?:train|audit))(?= |$)")
# the same by several processes, which is composed as by one
LAUNCHER = re.compile(r"(?:accelerate launch|torchrun)(?: --[\w-]+ [\w.]+)+ (?=(?:train|scripts/audit)\.py)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.M | re.S)  # a file that the page lets the reader make


def commands(text: str) -> list[str]:
    """Return the commands that train or audit, from indented lines and from code in sentences."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    alone = [LAUNCHER.sub("python ", code) for code in [*lines, *spans]]
    return [part for code in alone for part in code.split(" && ") if START.match(part)]


COMMANDS = [
    (page, command) for page in PAGES if page.name not in MEASURED for command in commands(page.read_text("utf-8"))
]


@pytest.mark.parametrize("page,command", COMMANDS, ids=[f"{page.stem}: {command[:60]}" for page, command in COMMANDS])
def test_every_command_composes_and_its_prompts_and_targets_are_there(page, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, content in FILE.findall(page.read_text("utf-8")):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(content, "utf-8")
    name = START.match(command)[0]
    config_name, trains = MAINS[name]
    overrides = shlex.split(
        re.sub(r"<[\w ]+>", "x", command.removeprefix(name)).replace("--cfg job", ""), comments=True
    )
    planned = []
    monkeypatch.setattr(sys, "argv", ["x.py", *overrides])
    main(lambda config, folder: planned.append(make_plan(config, training=trains)), config_name)()
    assert planned and all(plan.audit for plan in planned)


def test_the_pages_have_commands_and_files():
    """The pages have commands of every kind, so that the test above checks something."""
    assert len(COMMANDS) > 40 and {START.match(command)[0] for _, command in COMMANDS} == set(MAINS)
    files = {file for page in PAGES for file, _ in FILE.findall(page.read_text("utf-8"))}
    assert {"joint.csv", "train.txt", "own/attribute/glasses.yaml"} <= files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_script_exists(page):
    text = page.read_text("utf-8")
    for link in LINK.findall(FENCE.sub("", text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link
    for script in re.findall(r"python (scripts/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), script


def anchors(page: Path) -> set[str]:
    """Return the link anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in nav, page


def test_the_configuration_page_is_what_the_schemas_say():
    assert reference.PAGE.read_text("utf-8") == reference.page(), "python scripts/reference.py"


def test_every_key_and_choice_says_what_it_is():
    """Every key has an explanation, and the file of every choice begins with a sentence about it."""
    rows = [line.split(" | ") for line in reference.page().splitlines() if line.startswith("| `") or line.startswith("| **`")]
    assert len(rows) > 100 and not [row[0] for row in rows if len(row[-1].strip(" |")) < 10]
    texts = {path.name: path.read_text("utf-8") for path in Path(reference.CONF).glob("*/*.yaml")}
    without = [name for name, text in texts.items() if not text.removeprefix("# @package _global_\n").startswith("# ")]
    assert not without


def test_the_changelog_names_every_renamed_key():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert not [old for old in RENAMED if f"`{old}" not in text]


def test_the_page_of_audit_json_names_every_key_and_no_other():
    text = (ROOT / "docs" / "reference" / "audit_json.md").read_text("utf-8")
    parts = re.split(r"^## .+\n|^(?=\| key of)", text, flags=re.M)[1:]
    named = [{k for row in re.findall(r"^\| (`.+?) \|", p, re.M) for k in re.findall(r"`(\w+)`", row)} for p in parts]
    found = whole_audit()
    assert text.count(found["schema"]) == 2
    model = found["models"]["after"]
    gender = model["attributes"]["gender"]
    shown = [found, model, gender, gender["target"], gender["per_prompt"][0], found["paired"], found["named"]]
    shown.append(found["without_people"])
    assert named == [set(part) for part in shown]
    words = set(re.findall(r"`(\w+)`", text))  # the keys below those
    change, others = found["paired"]["attributes"], found["without_people"]
    deeper = [gender["bias"], gender["target"]["total_variation"], gender["corrected"], gender["per_prompt"][0]["bias"]]
    deeper += [gender["per_prompt"][0]["target"], change["gender"], change["race"]["drift"]]
    deeper += [others["relative_drift"], others["per_prompt"][0], gender["bias"]["worst_tenth"]]
    deeper += [found["named"]["attributes"]["gender"], found["named"]["per_prompt"][0], found["guidance"][0]]
    deeper += [found["judge"], gender["wordings"], gender["wordings"]["each"][0]]
    for part in deeper:
        assert set(part) <= words, set(part) - words
