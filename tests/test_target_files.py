"""Target files: joint tables and rows per prompt, from the file to a built run."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase as LETTERS
from unicodedata import normalize

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import composed, make_trainee

from fairdiff import builder
from fairdiff.config import Config
from fairdiff.errors import FairDiffError
from fairdiff.objective.target_files import read_target
from fairdiff.plan import make_plan
from fairdiff.portraits import distribution, labour, occupations
from fairdiff.prompts import Prompt
from fairdiff.training.step import label_faces

PLAIN = "prompts.named=0"  # training prompts as they are given
ROOT = Path(__file__).resolve().parent.parent
WHICH = ("train", "test")
CLASSES = {"gender": ["female", "male"], "race": ["White", "Black", "Indian", "Asian"]}
TABLE = np.array([[0.30, 0.10, 0.05, 0.05], [0.05, 0.05, 0.10, 0.30]])
JOINT = "race,share,gender\n" + "".join(
    f"{r},{TABLE[g, k]},{s}\n" for g, s in enumerate(CLASSES["gender"]) for k, r in enumerate(CLASSES["race"])
)
NESTED = "".join(
    f"{s}: {{{', '.join(f'{r}: {TABLE[g, k]}' for k, r in enumerate(CLASSES['race']))}}}\n"
    for g, s in enumerate(CLASSES["gender"])
)
LISTED = "".join(
    f"- {{gender: {s}, race: {r}, share: {TABLE[g, k]}}}\n"
    for g, s in enumerate(CLASSES["gender"])
    for k, r in enumerate(CLASSES["race"])
)


@pytest.mark.parametrize("name,text", [("t.csv", JOINT), ("t.yaml", NESTED), ("t.yml", LISTED)])
def test_a_joint_table_is_read_from_any_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    written = read_target(tmp_path / name, CLASSES)
    assert written.key is None and written.attributes == ("gender", "race")
    assert np.allclose(written.of(Prompt("a nurse", "x", "nurse")).table, TABLE)


def test_rows_belong_to_their_prompts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("subject,male,family,female\nnurse,.1,work,.9\ncarpenter,.95,work,.0501\n")
    written = read_target(path, CLASSES)
    assert written.attributes == ("gender",)
    assert np.allclose(written.of(Prompt("a nurse", "x", "nurse")).table, [0.9, 0.1])
    assert written.of(Prompt("a carpenter", "x", "carpenter")).table.sum() == pytest.approx(1, abs=1e-12)
    path.write_text('prompt,gender.female,gender.male\n"a nurse, smiling",1,0\n')
    assert read_target(path, CLASSES).of(Prompt("a nurse, smiling", "x", "y")).table[0] == 1
    path.write_text("subject,gender,share\nnurse,female,.8\nchef,male,.7\nnurse,male,.2\nchef,female,.3\n")
    joint = read_target(path, {"gender": CLASSES["gender"]})
    assert np.allclose(joint.of(Prompt("a chef", "x", "chef")).table, [0.3, 0.7])


BAD = {
    "gone.csv": (None, "cannot read it: No such file"),
    "kind.json": ("[]", r"ending '\.json', allowed: \.csv"),
    "empty.csv": ("", "holds no rows"),
    "header.csv": ("subject,female,male\n", "holds no rows"),
    "empty.yaml": ("", "found None"),
    "broken.yaml": ("female: {", "is not YAML"),
    "latin.csv": (b"subject,female,male\ncaf\xe9,1,0\n", "not UTF-8"),
    "what.csv": ("female,male\n1,0\n", "needs a column share, prompt or subject, found female, male"),
    "class.csv": ("subject,female,man\nnurse,.5,.5\n", r"found the column man, allowed: .*gender\.male"),
    "unasked.csv": ("subject,female,male,age.old\nnurse,.5,.5,1\n", r"found the column age\.old, allowed"),
    "half.csv": ("subject,female\nnurse,.5\n", r"no column for gender\.male, found female"),
    "none.csv": ("subject,family\nnurse,x\n", "no column of shares"),
    "sum.csv": ("subject,female,male\nnurse,.5,.6\n", r"line 2 \('nurse'\): gender: shares sum to 1\.1, allowed: 1"),
    "word.csv": (
        "subject,female,male\nnurse,half,.5\n",
        r"line 2 .*female: found 'half', allowed: 0, or a number in \[1e-06, 1\]",
    ),
    "tiny.csv": ("subject,female,male\nnurse,1e-320,1\n", r"female: found '1e-320', allowed: 0, or"),
    "tiny.yaml": (NESTED.replace("0.3,", "1.0e-320,", 1), "female × White: share: found 1e-320, allowed: 0, or"),
    "huge.yaml": (NESTED.replace("0.3,", f"{10**400},", 1), r"share: found 10+\.\.\."),
    "digits.yaml": (NESTED.replace("0.3,", f"{'9' * 9000},", 1), "is not YAML: Exceeds the limit"),
    "date.yaml": ("2024-99-99", "is not YAML"),
    "twice.yaml": (NESTED + NESTED[: NESTED.index("\n") + 1], "is not YAML: the key female stands there twice"),
    "inner.yaml": (NESTED.replace("Black", "White"), "the key White stands there twice"),
    "list.yaml": ("- [1]: 2\n", "is not YAML"),
    "nested.yaml": ("[" * 1500 + "]" * 1500, "is nested too deep"),
    "bomb.yaml": ("a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(LETTERS)), "found"),
    "rows.yaml": ("- &a [x, x]\n- {gender: *a, race: White, share: 1}\n", "found .*, allowed: a list of rows"),
    "long.yaml": ("x: 1\n" * 300_000, "it has 2 MB, allowed: at most 1"),
    "lines.csv": ("subject,female,male\nnurse\u2028chef,1,0\n", r"line 2: found the control character U\+2028"),
    "nan.csv": ("subject,female,male\nnurse,nan,.5\n", "found 'nan'"),
    "short.csv": ("subject,female,male\nnurse,.5\n", "male: found ''"),
    "long.csv": ("subject,female,male\nnurse,.5,.5,.5\n", "line 2: found more cells than columns"),
    "twice.csv": ("subject,female,male\nnurse,1,0\nnurse,0,1\n", "line 3: the subject 'nurse' stands there twice"),
    "column.csv": ("subject,female,female\nnurse,1,0\n", "the column female stands there twice"),
    "same.csv": ("subject,female,gender.female\nnurse,1,0\n", r"column gender\.female, which says .* already"),
    "key.csv": ("subject,female,male\n,1,0\n", "line 2: the cell subject is empty"),
    "axis.csv": ("gender,share\nfemale,1\n", "no column race, found gender, share"),
    "more.csv": ("gender,race,age,share\nfemale,White,old,1\n", "found the column age, allowed: gender, race, share"),
    "cell.csv": (
        JOINT.replace("Asian", "Martian"),
        "line 5: race: found 'Martian', allowed: White, Black, Indian, Asian",
    ),
    "again.csv": (JOINT + "White,.1,female\n", "line 10: female × White stands there twice"),
    "less.csv": (JOINT.rsplit("\n", 2)[0] + "\n", "no share for male × Asian"),
    "total.csv": (JOINT.replace("0.3,female", "0.5,female"), "shares sum to 1.2, allowed: 1"),
    "flat.yaml": ("female: 0.5\nmale: 0.5\n", "female: found 0.5, allowed: a share for each class of race"),
    "deep.yaml": (NESTED.replace("0.3,", "{a: 1},", 1), r"female × White: share: found \{'a': 1\}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_target_files_get_one_line_that_names_them(tmp_path, name):
    content, says = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FairDiffError, match=says) as caught:
        read_target(tmp_path / name, CLASSES)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"target.file: {tmp_path / name}")


def test_one_class_name_in_two_attributes_needs_its_attribute(tmp_path):
    path = tmp_path / "t.csv"
    classes = {"hair": ["dark", "other"], "eyes": ["dark", "other"]}
    path.write_text("subject,dark,other\nnurse,.5,.5\n")
    with pytest.raises(FairDiffError, match="column dark, which says no class"):
        read_target(path, classes)
    path.write_text("subject,eyes.dark,eyes.other\nnurse,.5,.5\n")
    assert read_target(path, classes).attributes == ("eyes",)


def test_the_shipped_labour_table_is_what_its_command_writes():
    assert labour.FILE.read_text() == labour.table()
    written = read_target(labour.FILE, {"race": list(occupations.CLASSES["race"])}, ["gender"])
    assert set(written.targets) == set(occupations.TITLES) and len(written.targets) > 600
    for title in occupations.TITLES:
        shares = distribution.labour_shares(occupations.occupation_of(title))
        assert np.allclose(written.targets[title].table, shares["race"], atol=2e-4)


def test_a_row_reaches_the_labels_of_its_prompt(tmp_path, tiny_model):
    """One prompt's row requests women only, the other's men only, through the build and the step."""
    (tmp_path / "people.txt").write_text("nurse\nchef\n")
    (tmp_path / "t.csv").write_text("subject,female,male\nchef,0,1\nnurse,1,0\n")
    config = composed(PLAIN, f"target.file={tmp_path / 't.csv'}", *(f"prompts.{w}={tmp_path / 'people.txt'}" for w in WHICH))
    plan, trainee = make_plan(config), make_trainee(tiny_model)
    trainee.objective = builder.build_objective(config, plan)
    for prompt in plan.train:
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        target = trainee.objective.target.of(prompt.text)
        labels, _ = label_faces([trainee.perception.classify_faces(images)], target, torch.Generator().manual_seed(0))
        assert (labels.classes["gender"] == {"nurse": 0, "chef": 1}[prompt.subject]).all()


def test_the_labour_target_leaves_age_to_its_own_shares():
    config = composed(PLAIN, "attribute=[race,age,gender]", "target.file=labour", "target.age={young:.75,old:.25}")
    plan = make_plan(config)
    assert plan.target_lines == ("race, gender: as in labour", "age: young 0.75, old 0.25")
    assert plan.targets.attributes == ("race", "age", "gender")
    prompts = [p for p in [*plan.train, *plan.audit] if p.people]
    assert {p.text for p in prompts} == set(plan.targets.rows)
    for prompt in prompts:
        shares = distribution.labour_shares(occupations.occupation_of(prompt.subject))
        assert np.allclose(plan.targets.of(prompt.text).marginal("gender"), shares["gender"], atol=2e-4)
        assert np.allclose(plan.targets.of(prompt.text).marginal("age"), [0.75, 0.25])


@pytest.fixture
def training_of(tiny_model):
    """Return the identity of a training with such overrides on a tiny model."""
    perception = make_trainee(tiny_model).perception
    perception.classifier.config, perception.encoders, perception.embedder = {}, [], None

    def training_of(*overrides: str) -> str:
        config = composed(*overrides)
        return builder.training_fingerprint(config, make_plan(config), tiny_model, perception)

    return training_of


def test_the_content_of_a_target_file_is_part_of_the_runs_fingerprint(tmp_path, training_of):
    file, found = tmp_path / "t.csv", []
    for female in (0.3, 0.4, 0.3):
        file.write_text(f"gender,share\nfemale,{female}\nmale,{1 - female}\n")
        found.append(training_of(f"target.file={file}"))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    "overrides,matter",
    [
        ([], False),
        (["optimizer.schedule=linear"], True),  # the learning rate of every step
        (["validation.every=2"], True),  # the last step is a validation, wherever it lies
    ],
)
def test_how_many_steps_there_are_counts_where_it_changes_them(training_of, overrides, matter):
    keys = [training_of("optimizer.schedule=constant", *overrides, f"steps={n}") for n in (4, 8)]
    assert (keys[0] != keys[1]) == matter


def test_an_audit_the_memory_and_the_device_leave_a_training_what_it_is(training_of):
    other = ["audit=full", "audit.seed=1", "judge@audit.judge=hf", "micro_batch=3", "memory_gb=12", "model.device=cuda"]
    keys = {training_of(*some) for some in ([], *([one] for one in [*other, "resume=false", "cache=null"]))}
    assert len(keys) == 1 and training_of("loss.image=.5") not in keys


def test_a_saved_adapter_counts_by_its_tensors(tmp_path):
    """A run that is audited again writes its adapter again, and the order in the header of safetensors is random."""

    def key(*overrides):
        return builder.adapter_fingerprint(composed("adapter=lora_text", f"adapter.path={tmp_path}", *overrides))

    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, file, metadata={"one": "1", "two": "2"})
    first, content = key(), file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    turned = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(content[:8] + turned + content[8 + length :])
    assert file.read_bytes() != content and key() == first != key("adapter.scale=.5")
    save_file({"a": torch.ones(2), "c": torch.zeros(3)}, file)
    assert key() != first
    file.write_bytes(content[:-2])
    with pytest.raises(FairDiffError, match="^adapter.path: .*pytorch_lora_weights.safetensors: cannot read"):
        key()


def test_the_detectors_weights_count_and_not_their_place():
    config = composed()
    detector = builder.build_detector(config)
    key = builder.detector_fingerprint(config, detector)
    assert builder.detector_fingerprint(composed("detector.root=elsewhere"), detector) == key
    assert builder.detector_fingerprint(composed("detector.expand=2"), detector) != key
    next(detector.parameters()).data[0] += 1e-3
    assert builder.detector_fingerprint(config, detector) != key


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["target.file=labour", "target.gender.female=.7", "target.gender.male=.3"], "labour.csv sets its shares too"),
        (["target.file=labour", "attribute=[age]"], "labour.csv: no column of shares, allowed: age.young, age.old"),
        (["target.file=HERE/sum.yaml"], "sum.yaml: shares sum to 1.1, allowed: 1"),
        (["target.file=HERE/half.yaml"], "half.yaml: found 'half', allowed: a list of rows or nested shares"),
        (["target.file=labour", "prompts.train=HERE/own.txt"], "labour.csv: no row for 1 of 26 subjects: 'astronaut'"),
    ],
)
def test_targets_that_do_not_fit_the_run_are_one_line(tmp_path, overrides, says):
    (tmp_path / "own.txt").write_text("astronaut\nnurse\n")
    (tmp_path / "sum.yaml").write_text("{female: 0.5, male: 0.6}\n")
    (tmp_path / "half.yaml").write_text("half\n")
    config = composed(*(o.replace("HERE", str(tmp_path)) for o in overrides))
    with pytest.raises(FairDiffError) as caught:
        make_plan(config)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_nested_table_reaches_training_and_audit(tmp_path):
    (tmp_path / "joint.yaml").write_text("female: {young: 0.4, old: 0.1}\nmale: {young: 0.2, old: 0.3}\n")
    targets = make_plan(composed(PLAIN, "attribute=[gender,age]", f"target.file={tmp_path / 'joint.yaml'}")).targets
    assert np.allclose(targets.of("anything").table, [[0.4, 0.1], [0.2, 0.3]])
    assert np.allclose(targets.audited({"gender×age": ("gender", "age")}, [])["gender×age"], [0.4, 0.1, 0.2, 0.3])


def own(tmp_path, subjects: str, table: str, *overrides: str) -> Config:
    """Return a configuration with these subjects, for training and audit, and this target file."""
    (tmp_path / "own.txt").write_text(subjects, encoding="utf-8")
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    files = [f"prompts.{which}={tmp_path / 'own.txt'}" for which in WHICH]
    return composed(PLAIN, *files, f"target.file={tmp_path / 't.csv'}", *overrides)


def test_rows_that_are_missing_are_told_at_once_and_shortened(tmp_path):
    subjects = "".join(f"subject {i}\n" for i in range(135))
    with pytest.raises(FairDiffError) as caught:
        make_plan(own(tmp_path, subjects, "subject,female,male\nsubject 3,1,0\nsubject 7,1,0\n"))
    message = str(caught.value)
    assert "no row for 133 of 135 subjects: 'subject " in message and "and 128 more" in message and len(message) < 600
    assert "a row *" in message and "python scripts/target_file.py" in message


def test_a_row_of_its_own_goes_before_that_of_all_others(tmp_path):
    plan = make_plan(own(tmp_path, "nurse\nchef\nbaker\n", "subject,female,male\n*,.4,.6\nchef,.3,.7\n"))
    found = {p.subject: plan.targets.of(p.text).table.tolist() for p in plan.train}
    assert found == {"nurse": [0.4, 0.6], "chef": [0.3, 0.7], "baker": [0.4, 0.6]}
    joint = "subject,gender,share\n*,female,.4\n*,male,.6\nchef,female,.3\nchef,male,.7\n"
    assert found == {
        p.subject: target.table.tolist()
        for plan in [make_plan(own(tmp_path, "nurse\nchef\nbaker\n", joint))]
        for p in plan.train
        for target in [plan.targets.of(p.text)]
    }


def test_a_row_finds_its_prompt_in_whatever_form_the_accents_are(tmp_path):
    for one, other in (("NFC", "NFD"), ("NFD", "NFC")):
        table = normalize(other, "subject,female,male\ninfirmière,.9,.1\nchef,.3,.7\n")
        plan = make_plan(own(tmp_path, normalize(one, "infirmière\nchef\n"), table))
        assert {p.subject: plan.targets.of(p.text).table[0] for p in plan.train} == {"infirmière": 0.9, "chef": 0.3}


def test_rows_of_equal_shares_have_one_target(tmp_path):
    """So a table of 400,000 rows is read in seconds."""
    config = own(tmp_path, "a\nb\nc\n", "subject,female,male\na,.4,.6\nb,.4,.6\nc,.5,.5\n")
    assert len({id(target) for target in make_plan(config).targets.rows.values()}) == 2


def test_a_table_to_fill_in_is_written_once_and_fits_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    import target_file

    (tmp_path / "own.txt").write_text('nurse\nchef, "the best"\n', encoding="utf-8")
    overrides = [f"prompts.{which}={tmp_path / 'own.txt'}" for which in WHICH]
    overrides += ["attribute=[gender,age]", "target.age={young:.75,old:.25}", f"target.file={tmp_path / 'new.csv'}"]
    monkeypatch.setattr(sys, "argv", ["target_file.py", *overrides, f"hydra.run.dir={tmp_path}"])
    target_file.task()
    assert str(tmp_path / "new.csv") in capsys.readouterr().out
    head, *rows = (tmp_path / "new.csv").read_text(encoding="utf-8").splitlines()
    assert head == "subject,gender.female,gender.male,age.young,age.old"
    assert set(rows[:2]) == {"nurse,0.5,0.5,0.75,0.25", '"chef, ""the best""",0.5,0.5,0.75,0.25'}
    plan = make_plan(composed(PLAIN, *(o for o in overrides if "target.age" not in o)))
    assert np.allclose(plan.targets.of(plan.train[0].text).table, [[0.375, 0.125]] * 2)
    with pytest.raises(SystemExit):
        target_file.task()
    assert "new.csv, allowed: the name of a new file" in capsys.readouterr().err
