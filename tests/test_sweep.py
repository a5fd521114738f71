"""A sweep puts each of its runs where the same run lands by itself."""

import sys

import pytest

from fairdiff.cli import main


def folders(name: str, overrides: list[str], monkeypatch) -> list[str]:
    """Where the runs of one command line land."""
    found = []
    monkeypatch.setattr(sys, "argv", ["x.py", *overrides])
    main(lambda config, folder: found.append(folder.relative_to(folder.cwd()).as_posix()), name)()
    return found


@pytest.mark.parametrize(
    "name,seed,first",
    [
        ("config", "seed", "outputs/gender/adapter.rank=2/seed0"),
        ("measure", "audit.seed", "outputs/audit/gender/adapter.rank=2,audit.seed=0/seed0"),
    ],
)
def test_a_sweep_lands_where_its_runs_would(name, seed, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = folders(name, ["-m", "experiment=gender,race", f"{seed}=0,1", "adapter.rank=2"], monkeypatch)
    alone = [
        folders(name, [f"experiment={experiment}", f"{seed}={n}", "adapter.rank=2"], monkeypatch)[0]
        for experiment in ("gender", "race")
        for n in (0, 1)
    ]
    assert swept == alone and len(set(swept)) == 4
    assert swept[0] == first
