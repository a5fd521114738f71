"""Audits beside each other: every run's own numbers, means over seeds by hand, and no row shared by what cannot compare."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_world import TinyGenerator

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.compare import comparison_tables, find_audits
from fairdiff.audit.estimand import ends_of
from fairdiff.audit.generate import run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.wording import interval, number, signed
from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import compare  # noqa: E402


@pytest.fixture
def audited(plan, measurer, noise, tmp_path):
    """Writes runs/<name>/audit.json of an adapter with this offset, and returns the audit."""

    def audited(name: str, offset: float, seed: int = 7, prompts: int = 3) -> dict:
        audit_plan, folder = replace(plan, seed=seed, prompts=plan.prompts[:prompts]), tmp_path / "runs" / name
        tiny = {"before": TinyGenerator(2.0), "after": TinyGenerator(offset)}
        records = run_audit(audit_plan, tiny, measurer, noise, folder, lambda n: None)
        spec = MetricSpec(plan.attributes, targets={"gender": [0.5, 0.5]}, judge={"path": "colours"})
        audit = json.loads(json.dumps(compute_metrics(records, spec), allow_nan=False))
        (folder / "audit.json").write_text(json.dumps(audit))
        return audit

    return audited


def shown(tables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def rows(text: str, name: str) -> list[list[str]]:
    """The lines below the number `name`, each split into its cells."""
    lines = text.split(f" {name} ", 1)[1].splitlines()[1:]
    return [line.split() for line in lines[: next(i for i, line in enumerate(lines) if not line.strip())]]


def test_every_run_has_its_own_numbers_and_seeds_their_mean(audited, tmp_path):
    fair = [audited(f"fair/seed{seed}", 0.1, seed) for seed in (7, 8)]
    skewed = audited("skewed/seed7", 1.0)
    found = find_audits([tmp_path / "runs"])
    assert list(found) == ["fair/seed7", "fair/seed8", "skewed/seed7"]
    tables = comparison_tables(found)
    assert len(tables) == 1
    first, second, mean, third = rows(shown(tables), "gender bias")
    for row, audit in ((first, fair[0]), (second, fair[1]), (third, skewed)):
        bias = {model: entry["attributes"]["gender"]["bias"] for model, entry in audit["models"].items()}
        assert row[1:3] == [number(bias["before"]["mean"]), number(bias["after"]["mean"])]
        assert " ".join(row[3:5]) == interval(ends_of(bias["after"]))
        assert row[5] == signed(audit["paired"]["attributes"]["gender"]["bias"]["difference"])
    a, b = (audit["models"]["after"]["attributes"]["gender"]["bias"]["mean"] for audit in fair)
    assert a != b
    assert " ".join(mean).startswith("fair: mean of 2 seeds")
    assert mean[6:9] == [number((a + b) / 2), "±", number(abs(a - b) / 2**0.5)]
    assert "skewed: mean" not in shown(tables)


def test_runs_of_other_prompts_judges_or_targets_have_a_table_of_their_own(audited, tmp_path):
    audited("all/seed7", 0.1)
    audited("some/seed7", 0.1, prompts=2)
    tables = comparison_tables(find_audits([tmp_path / "runs" / "all", tmp_path / "runs" / "some"]))
    assert [table.title.split(",")[0] for table in tables] == ["3 prompts × 24 pictures", "2 prompts × 24 pictures"]
    path = tmp_path / "runs" / "all" / "seed7" / "audit.json"
    for part, key, value in (("hashes", "judge", "other"), ("target", "female", 0.7)):
        other = json.loads(path.read_text())
        if part == "hashes":
            other["provenance"]["hashes"][key] = value
        else:
            for prompt in other["models"]["after"]["attributes"]["gender"]["per_prompt"]:
                prompt["target"]["shares"][key] = value
        assert len(comparison_tables({"a": json.loads(path.read_text()), "b": other})) == 2


def test_runs_from_anywhere_keep_their_names_and_only_seeds_are_averaged(audited, tmp_path):
    for name in ("a/run", "b/run", "b/run/seed7", "b/run/seed8"):
        audited(name, 0.1)
    found = find_audits([tmp_path / "runs" / "a", tmp_path / "runs" / "b"])
    assert list(found) == ["a/run", "b/run", "b/run/seed7", "b/run/seed8"]
    names = [row[0] for row in rows(shown(comparison_tables(found)), "gender bias")]
    assert names == ["a/run", "b/run", "b/run/seed7", "b/run/seed8", "b/run:"]  # the last is the mean of two


def test_an_audit_in_its_run_folder_has_the_name_of_the_run(audited, tmp_path):
    """Runs lie in seed<n>, their audits in seed<n>/audits/<name>: each seed's short audit, a longer one, one later."""
    for seed in (7, 8):
        for name, prompts in ((f"test-2x24-{seed}", 2), (f"test-3x24-{seed}", 3)):
            audited(f"fair/seed{seed}/audits/{name}", 0.1, seed, prompts)
    tables = comparison_tables(find_audits([tmp_path / "runs"]))
    assert [[row[0] for row in rows(shown([t]), "gender bias")] for t in tables] == [["seed7", "seed8", "mean"]] * 2
    (alone,) = comparison_tables(find_audits([tmp_path / "runs" / "fair" / "seed7" / "audits" / "test-2x24-7"]))
    assert [row[0] for row in rows(shown([alone]), "gender bias")] == ["seed7"]
    audited("fair/seed7/audits/test-3x24-more", 0.0)
    _, longer = comparison_tables(find_audits([tmp_path / "runs"]))
    names = [row[0] for row in rows(shown([longer]), "gender bias")]
    assert names == ["seed7/audits/test-3x24-7", "seed7/audits/test-3x24-more", "seed8"]  # no seed twice in a mean


def test_seeds_of_one_run_by_themselves(audited, tmp_path):
    for seed in (7, 8):
        audited(f"seed{seed}", 0.1, seed)
    names = [row[0] for row in rows(shown(comparison_tables(find_audits([tmp_path / "runs"]))), "gender bias")]
    assert names == ["seed7", "seed8", "mean"]


def test_what_is_no_audit_ends_as_one_line(audited, tmp_path, capsys):
    with pytest.raises(FairDiffError, match="found no finished run"):
        find_audits([tmp_path])
    for text in ("{", "[]", '{"schema": "other/1"}'):
        (tmp_path / "audit.json").write_text(text)
        with pytest.raises(FairDiffError, match=r"audit\.json: is no audit"):
            find_audits([tmp_path])
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path)])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_script_prints_them(audited, tmp_path, capsys):
    audited("fair/seed7", 0.1)
    compare.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "gender bias" in said and "perceived presentation" in said


def test_a_sweep_has_a_picture(audited, tmp_path, capsys):
    from PIL import Image

    for name, offset in (("a/seed7", 0.1), ("b/seed7", 1.0)):
        audited(name, offset)
    compare.main([str(tmp_path / "runs"), "--picture", str(tmp_path / "sweep.png")])
    with Image.open(tmp_path / "sweep.png") as image:
        assert image.size == (960, 720)
    assert "seed7" in capsys.readouterr().out
