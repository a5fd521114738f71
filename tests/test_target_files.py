"""Targets as they are asked for: files, rows of a prompt, inline joints, the model's own shares, up to a built run."""

import numpy as np
import pytest
import torch
from tiny import NoFaces, composed, make_trainee

from fairdiff import build
from fairdiff import plan as asked
from fairdiff.diffusion.load import load_model
from fairdiff.errors import FairDiffError
from fairdiff.objective.target_files import read_target
from fairdiff.portraits import labour, world
from fairdiff.prompts import Prompt
from fairdiff.training.step import label_faces

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
        r"line 2 .*female: found 'half', allowed: a number in \[0, 1\]",
    ),
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
    written = read_target(labour.FILE, {"race": list(world.CLASSES["race"])}, ["gender"])
    assert set(written.targets) == set(world.TITLES) and len(written.targets) > 600
    for title in world.TITLES:
        shares = world.labour_shares(world.occupation_of(title))
        assert np.allclose(written.targets[title].table, shares["race"], atol=2e-4)


def test_a_row_reaches_the_labels_of_its_prompt(tmp_path, tiny_model):
    """Through build and the step: one prompt's row asks for women only, the other's for men only."""
    (tmp_path / "people.txt").write_text("nurse\nchef\n")
    (tmp_path / "t.csv").write_text("subject,female,male\nchef,0,1\nnurse,1,0\n")
    config = composed(f"target.file={tmp_path / 't.csv'}", *(f"prompts.{w}={tmp_path / 'people.txt'}" for w in WHICH))
    targets = asked.targets(config, asked.prompts(config, "train"))
    trainee = make_trainee(tiny_model)
    trainee.objective = build.build_objective(config, targets)
    for prompt in asked.prompts(config, "train"):
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        target = trainee.objective.target.of(prompt.text)
        labels, _ = label_faces([trainee.perception.classify_faces(images)], target, 64, torch.Generator().manual_seed(0))
        assert (labels.classes["gender"] == {"nurse": 0, "chef": 1}[prompt.subject]).all()


def test_the_labour_target_leaves_age_to_its_own_shares():
    config = composed("attribute=[race,age,gender]", "target.file=labour", "target.age={young:.75,old:.25}")
    assert asked.target_lines(config) == ["race, gender: as in labour", "age: young 0.75, old 0.25"]
    for which in WHICH:
        prompts = [p for p in asked.prompts(config, which) if p.people]
        targets = asked.targets(config, prompts)
        assert targets.attributes == ("race", "age", "gender")
        for prompt in prompts:
            shares = world.labour_shares(world.occupation_of(prompt.subject))
            assert np.allclose(targets.asked(prompt.text).marginal("gender"), shares["gender"], atol=2e-4)
            assert np.allclose(targets.asked(prompt.text).marginal("age"), [0.75, 0.25])


def test_own_shares_come_from_the_whole_pool_once(tiny_model):
    trainee = make_trainee(tiny_model, attributes=("gender", "race"))
    own = trainee.originals.shares("a photo of the face of a nurse", 6, 3, ("gender", "race"))
    rows = trainee.originals.get("a photo of the face of a nurse", list(range(6)), 3)
    assert own.shape == (2, 4) and own.sum() == pytest.approx(1)
    assert np.allclose(own.sum(0), rows["probs.race"].double().mean(0), atol=1e-6)
    assert trainee.originals.sampled == 8  # two blocks of 4
    trainee.perception.detector = NoFaces()
    assert trainee.originals.shares("a photo of the face of a chef", 4, 3, ("gender",)) is None


@pytest.mark.parametrize("relaxation", [0, 1, 0.5])
def test_a_trainee_relaxes_towards_what_its_own_originals_show(tiny_folder, tiny_model, relaxation):
    config = composed(
        f"target.relaxation={relaxation}", "target={gender:{female:.8,male:.2}}", "cache=null", "prompts.train_limit=2",
        "global_batch=4", "noise_pool=8", "sampler.train_steps=[2,5]",
    )  # fmt: skip
    trainee = build.build_trainee(config, tiny_model, make_trainee(load_model(tiny_folder)).judges)
    prompt = next(p.text for p in asked.prompts(config, "train") if p.people)
    got = trainee.objective.target.of(prompt).table
    assert trainee.originals.sampled == (8 if relaxation else 0)  # nothing is painted for relaxation 0
    own = trainee.originals.shares(prompt, 8, 3, ("gender",))  # at the middle of the range of steps
    assert trainee.originals.sampled == 8
    assert np.allclose(got, relaxation * own + (1 - relaxation) * np.array([0.8, 0.2])) and own.max() > 0.5


def test_the_content_of_a_target_file_is_part_of_the_runs_fingerprint(tmp_path, tiny_model):
    file, judges, found = tmp_path / "t.csv", make_trainee(tiny_model).judges, []
    for female in (0.3, 0.4, 0.3):
        file.write_text(f"gender,share\nfemale,{female}\nmale,{1 - female}\n")
        config = composed(f"target.file={file}")
        prompts = asked.prompts(config, "train")
        judges.classifier.config, judges.encoders, judges.embedder = {}, [], None
        found.append(build.training_fingerprint(config, tiny_model, judges, prompts))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    "overrides,matter",
    [
        ([], False),
        (["optimizer.schedule=linear"], True),  # the learning rate of every step
        (["validation.every=2"], True),  # the last step is a validation, wherever it lies
    ],
)
def test_how_many_steps_there_are_counts_where_it_changes_them(tiny_model, overrides, matter):
    judges = make_trainee(tiny_model).judges
    judges.classifier.config, judges.encoders, judges.embedder = {}, [], None
    configs = [composed("optimizer.schedule=constant", *overrides, f"steps={n}") for n in (4, 8)]
    keys = [build.training_fingerprint(c, tiny_model, judges, asked.prompts(c, "train")) for c in configs]
    assert (keys[0] != keys[1]) == matter


def test_the_detectors_weights_count_and_not_their_place(tmp_path):
    config = composed()
    detector = build.build_detector(config)
    key = build.eyes_key(config, detector)
    assert build.eyes_key(composed("detector.root=elsewhere"), detector) == key
    assert build.eyes_key(composed("detector.expand=2"), detector) != key
    next(detector.parameters()).data[0] += 1e-3
    assert build.eyes_key(config, detector) != key


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["target.file=labour", "target.gender.female=.7", "target.gender.male=.3"], "labour.csv sets its shares too"),
        (["target.file=labour", "attribute=[age]"], "labour.csv: no column of shares, allowed: age.young, age.old"),
        (["target.joint={female:0.5,male:0.6}"], "target.joint: shares sum to 1.1, allowed: 1"),
        (["target.joint=half"], "target.joint: found 'half', allowed: a list of rows or nested shares"),
        (["target.file=labour", "prompts.train=FILE"], "labour.csv: no row for the subject 'astronaut', found 812"),
    ],
)
def test_targets_that_do_not_fit_the_run_are_one_line(tmp_path, overrides, says):
    (tmp_path / "people.txt").write_text("astronaut\nnurse\n")
    config = composed(*(o.replace("FILE", str(tmp_path / "people.txt")) for o in overrides))
    with pytest.raises(FairDiffError) as caught:
        asked.targets(config, asked.prompts(config, "train"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_inline_joint_reaches_training_and_audit():
    config = composed("attribute=[gender,age]", "target.joint={female:{young:.4,old:.1},male:{young:.2,old:.3}}")
    targets = asked.targets(config, asked.prompts(config, "train"))
    assert np.allclose(targets.of("anything").table, [[0.4, 0.1], [0.2, 0.3]])
    assert np.allclose(targets.audited({"gender×age": ("gender", "age")}, [])["gender×age"], [0.4, 0.1, 0.2, 0.3])
