"""A user's numbers go to the user's own folder; only --publish writes to docs."""

import importlib
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench  # noqa: E402
from benchmark.config import BenchConfig, use_schema  # noqa: E402
from reproduce import place  # noqa: E402

from fairdiff.cli.main import main  # noqa: E402
from fairdiff.config import Config  # noqa: E402

PAGES = {  # command: its page and its records, where there are some in docs
    "results": "results.md", "search": "search.md", "interval_coverage": "explanation/coverage.md",
    "label_errors": "explanation/label_errors.md", "baselines": "studies/baselines.md",
    "frontier": "studies/frontier.md", "drift": "studies/drift.md", "localize": "studies/localize.md",
    "languages": "studies/languages.md", "label_influence": "studies/label_influence.md",
    "reading_errors": "studies/reading_errors.md", "judge_noise": "studies/judge_noise.md",
}  # fmt: skip
FOLDERS = {name for name, page in PAGES.items() if page.startswith("studies")}  # with an HTML page beside their audits


def state(folder: Path) -> dict[Path, int]:
    """Return the time at which each file was written, so that rewriting the same bytes is detected."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(place, "OWN", tmp_path / "own")
    return tmp_path / "own"


def render(command: str, tmp_path: Path, *options: str) -> None:
    where = ["--folder", str(tmp_path / "audits")] if command in FOLDERS else []
    importlib.import_module(command).main(["--render", *where, *options])


@pytest.mark.parametrize("command", PAGES)
def test_a_page_by_default_is_whole_and_leaves_docs_untouched(command, own, tmp_path, capsys):
    published, before = ROOT / "docs" / PAGES[command], state(ROOT / "docs")
    if published.exists():
        render(command, tmp_path)
        assert (own / PAGES[command]).read_bytes() == published.read_bytes()
    else:
        with pytest.raises(SystemExit):
            render(command, tmp_path)
        assert f"{own / 'measurements' / 'studies' / command}.json: no such file" in capsys.readouterr().err
    assert state(ROOT / "docs") == before


@pytest.mark.parametrize("command", [name for name, page in PAGES.items() if (ROOT / "docs" / page).exists()])
def test_publish_writes_the_published_page_and_nothing_of_ones_own(command, own, tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs" / "measurements", docs / "measurements")
    monkeypatch.setattr(place, "DOCS", docs)
    render(command, tmp_path, "--publish")
    assert (docs / PAGES[command]).read_bytes() == (ROOT / "docs" / PAGES[command]).read_bytes() and not own.exists()


def test_ones_own_record_stays_and_the_others_are_the_published_ones(own):
    published = place.DOCS / "measurements" / "search"
    first, *others = sorted(published.rglob("*.json"))
    kept = place.records_in(own, "search")
    mine = kept / first.relative_to(published)
    mine.write_text("{}")
    assert place.records_in(own, "search") == kept and mine.read_text() == "{}" and others
    assert all((kept / file.relative_to(published)).read_bytes() == file.read_bytes() for file in others)
    assert not place.records_in(own, "coverage.json", seeded=False).exists()
    assert not place.records_in(own.parent / "elsewhere", "coverage.json").exists()


def test_the_page_of_the_benchmark_too(own, tmp_path, monkeypatch):
    assert {f.name: f.default for f in fields(BenchConfig)}["report"] == str(ROOT / "outputs/reproduced/performance.md")
    before = state(ROOT / "docs")
    use_schema()
    monkeypatch.setattr(sys, "argv", ["bench.py", "part=[]", f"report={own}/performance.md", f"hydra.run.dir={tmp_path}/b"])
    try:
        main(bench.job, "bench")()
    finally:
        ConfigStore.instance().store(name="schema", node=Config)
    assert (own / "performance.md").read_bytes() == (ROOT / "docs" / "performance.md").read_bytes()
    assert state(ROOT / "docs") == before


def test_no_command_has_a_place_of_its_own():
    """One file defines the option; the test above covers its use by new commands."""
    files = [*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/*/*.py")]
    assert [f.name for f in files if '"--docs"' in f.read_text("utf-8")] == ["place.py"]
    assert {f.stem for f in files if re.search(r"add_(place|study)\(", f.read_text("utf-8"))} == {*PAGES, "place", "publish"}
