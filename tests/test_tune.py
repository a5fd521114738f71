"""A search for small bias and drift: it resumes the trial in which it was killed, and never repeats a trial."""

import json
import sys
from pathlib import Path

import pytest
from tiny import whole_audit

from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import tune  # noqa: E402

VARY = ["adapter.learning_rate=log(1e-3,1e-1)", "loss.image=linear(.1,1)", "adapter=choice(lora_text,lora_unet)"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Instead of training, write an audit whose bias and drift depend on the settings, or raise like a kill."""
    audit, done = whole_audit(), []

    def train(overrides):
        done.append(overrides)
        if len(done) == 3:
            raise KeyboardInterrupt
        rate = float(overrides[2].split("=")[1])
        after = audit["models"]["after"]
        after["attributes"]["gender"]["bias"]["mean"] = rate
        after["clip_i"]["mean"] = after["dino"]["mean"] = 1 - 0.001 / rate
        run = tmp_path / f"run{len(done)}"
        (run / "audits" / "a").mkdir(parents=True)
        (run / "audits" / "a" / "audit.json").write_text(json.dumps(audit))
        return run

    monkeypatch.setattr(tune.fairdiff, "train", train, raising=False)
    return done


def test_a_killed_search_goes_on(trained, tmp_path, capsys):
    pytest.importorskip("optuna")
    arguments = [str(tmp_path / "study"), "--trials", "5", "--fix", "steps=2", "--vary", *VARY]
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 130
    tune.main(arguments)
    assert len(trained) == 6 and trained[3] == trained[2]  # the trial that was killed, and five finished ones
    assert len({tuple(overrides) for overrides in trained}) == 5
    assert all(o[:2] == ["audit.split=validation", "steps=2"] for o in trained)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "study created" not in said.err  # the search's own words suffice
    assert len(lines) == 5 + 5  # a line a trial, and all are best: less bias costs drift here
    assert [float(line.split()[1].strip(",")) for line in lines[-5:]] == sorted(
        float(line.split()[1].strip(",")) for line in lines[-5:]
    )
    tune.main(arguments)
    assert len(trained) == 6  # nothing is left to do


@pytest.mark.parametrize("text", ["a", "a=log(1)", "a=log(2,1)", "a=uniform(1,2)", "a=log(1,2"])
def test_a_space_that_cannot_be_read_is_one_line(text):
    with pytest.raises(FairDiffError, match="^--vary: found a.*allowed: key=log"):
        tune.read_space([text])
