"""Laws of the targets: marginals, permutation, closed form against transport; files, relaxation, a prompt's own row."""

import time
from itertools import permutations

import numpy as np
import pytest
import torch
from tiny import NoFaces, composed, make_trainee

from fairdiff import build
from fairdiff.errors import FairDiffError
from fairdiff.portraits import labour, world
from fairdiff.prompts import Prompt
from fairdiff.step import label_faces
from fairdiff.target_files import read_target
from fairdiff.targets import (
    Target,
    Targets,
    assign,
    drawn_counts,
    every_count,
    expected_binary,
    expected_joint,
    mean_plan,
    smallest_batch,
)


def probabilities(faces, classes, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes) * 0.5, faces)


@pytest.mark.parametrize(
    "marginals", [{"r": [0.4, 0.3, 0.2, 0.1]}, {"g": [0.3, 0.7], "r": [0.25] * 4, "a": [0.75, 0.25]}]
)
def test_plan_has_the_right_marginals(marginals):
    target = Target.from_marginals(marginals)
    probs = {n: probabilities(24, len(s), i) for i, (n, s) in enumerate(marginals.items())}
    plan = expected_joint(probs, target, np.random.default_rng(0), draws=500)
    assert np.allclose(plan.reshape(24, -1).sum(1), 1)
    counts = plan.reshape(24, -1).sum(0)
    assert np.abs(counts - 24 * target.table.ravel()).max() < 0.5  # 24 p up to Monte Carlo error


def test_binary_expected_counts_equal_the_target_share():
    assert expected_binary(probabilities(24, 2)[:, 1], 0.3)[:, 1].sum() == pytest.approx(24 * 0.3)


def test_labels_follow_a_permutation_of_the_faces():
    target = Target.from_marginals({"g": [0.5, 0.5], "r": [0.25] * 4})
    probs = {"g": probabilities(16, 2, 1), "r": probabilities(16, 4, 2)}
    order = np.random.default_rng(3).permutation(16)
    straight = assign(probs, target, np.random.default_rng(0))
    shuffled = assign({k: v[order] for k, v in probs.items()}, target, np.random.default_rng(0))
    for name in probs:
        assert (straight.classes[name][order] == shuffled.classes[name]).all()
        assert np.allclose(straight.confidence[name][order], shuffled.confidence[name])


def test_a_batch_that_already_meets_the_target_keeps_its_classes():
    classes = np.arange(24) % 4
    probs = np.full((24, 4), 0.01) + 0.96 * np.eye(4)[classes]
    labels = assign({"r": probs}, Target.from_marginals({"r": [0.25] * 4}), np.random.default_rng(0))
    kept = labels.kept("r", 0.8)
    assert kept.sum() >= 8
    assert (labels.classes["r"][kept] == classes[kept]).all()


def test_a_joint_target_that_is_no_product_is_met():
    table = np.array([[0.5, 0.0], [0.0, 0.5]])  # class 0 of one attribute goes with class 0 of the other
    probs = {"x": probabilities(20, 2, 4), "y": probabilities(20, 2, 5)}
    plan = expected_joint(probs, Target(("x", "y"), table), np.random.default_rng(0), draws=300)
    assert plan[:, 0, 1].sum() == plan[:, 1, 0].sum() == 0


def test_no_faces_give_no_labels():
    labels = assign({"g": np.zeros((0, 2))}, Target.from_marginals({"g": [0.5, 0.5]}), np.random.default_rng(0))
    assert len(labels.classes["g"]) == len(labels.confidence["g"]) == 0


def test_smallest_batch_is_the_first_with_a_confident_label():
    for share in (0.1, 0.25, 0.5):
        faces = smallest_batch(share, 0.8)
        probs = np.linspace(0.1, 0.9, faces)
        assert expected_binary(probs, share)[:, 1].max() >= 0.8
        assert expected_binary(probs[1:], share)[:, 1].max() < 0.8


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        Target.from_marginals({"g": [0.5, 0.6]})


WHICH = ("train", "test")
CLASSES = {"gender": ["female", "male"], "race": ["White", "Black", "Indian", "Asian"]}
TABLE = np.array([[0.30, 0.10, 0.05, 0.05], [0.05, 0.05, 0.10, 0.30]])


def law(probs, target, kind, draws=256):
    """The plan by all count vectors ("exact") or by drawn ones ("drawn")."""
    faces, shares = len(next(iter(probs.values()))), target.table.ravel()
    rng = np.random.default_rng(1)
    counts = every_count(faces, shares) if kind == "exact" else drawn_counts(faces, shares, rng, draws)
    return mean_plan(probs, target.table.shape, *counts)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
@pytest.mark.parametrize("kind,error", [("exact", 1e-9), ("drawn", 0.03)])
def test_transport_agrees_with_the_closed_form(share, kind, error):
    probs = probabilities(12, 2)
    target = Target.from_marginals({"gender": [1 - share, share]})
    plan = law({"gender": probs}, target, kind, draws=4000)
    assert np.abs(expected_binary(probs[:, 1], share) - plan).max() < error


def test_drawn_samples_approach_all_samples():
    probs = {"r": probabilities(6, 3)}
    target = Target.from_marginals({"r": [0.5, 0.3, 0.2]})
    assert np.abs(law(probs, target, "exact") - law(probs, target, "drawn", 4000)).max() < 0.03


def test_every_count_is_the_multinomial_distribution():
    shares = np.array([0.5, 0.0, 0.3, 0.2])
    counts, weights = every_count(5, shares)
    assert len(np.unique(counts, axis=0)) == len(counts) == 21 and (counts.sum(1) == 5).all()
    assert weights.sum() == pytest.approx(1) and np.allclose(weights @ counts, 5 * shares)
    assert (every_count(3, np.array([0.0, 1.0]))[0] == [[0, 3]]).all()


def test_each_plan_is_the_cheapest_of_all_assignments():
    probs = probabilities(5, 3, 2)
    counts = np.array([2, 1, 2])
    plan = mean_plan({"r": probs}, (3,), counts[None], np.ones(1))
    cost = np.linalg.norm(probs[:, None] - np.eye(3)[None], axis=2)
    columns = np.repeat(np.arange(3), counts)
    cheapest = min(sum(cost[f, columns[c]] for f, c in enumerate(p)) for p in permutations(range(5)))
    assert (plan * cost).sum() == pytest.approx(cheapest)


@pytest.mark.parametrize("kind", ["exact", "drawn"])
def test_the_order_of_attributes_and_classes_changes_no_label(kind):
    probs = {"gender": probabilities(6, 2, 1), "race": probabilities(6, 4, 2)}
    straight = Target(("gender", "race"), TABLE)
    turned = Target(("race", "gender"), TABLE.T[::-1])
    mirrored = {"race": probs["race"][:, ::-1], "gender": probs["gender"]}
    if kind == "exact":
        a, b = law(probs, straight, kind), law(mirrored, turned, kind)
        assert np.allclose(a, b.transpose(0, 2, 1)[:, :, ::-1])
    else:  # the samples differ, the expectation does not
        a, b = law(probs, straight, kind, 2000), law(mirrored, turned, kind, 2000)
        assert np.abs(a - b.transpose(0, 2, 1)[:, :, ::-1]).max() < 0.08


def test_a_joint_table_sums_to_its_marginals_in_any_order():
    target = Target(("gender", "race"), TABLE)
    assert np.allclose(target.marginal("gender"), 0.5) and np.allclose(
        target.marginal("race"), [0.35, 0.15, 0.15, 0.35]
    )
    assert np.array_equal(target.marginal("race", "gender"), TABLE.T)
    both = Target.from_marginals({"age": [0.75, 0.25]}).times(target, "gender", "age", "race")
    assert np.allclose(both.marginal("gender", "race"), TABLE) and np.allclose(both.marginal("age"), [0.75, 0.25])


def test_sixteen_corners_and_sixty_four_faces_take_no_time():
    target = Target.from_marginals({"g": [0.5, 0.5], "r": [0.25] * 4, "a": [0.75, 0.25]})
    probs = {n: probabilities(64, k, k) for n, k in (("g", 2), ("r", 4), ("a", 2))}
    began = time.process_time()
    assign(probs, target, np.random.default_rng(0))
    assert time.process_time() - began < 0.5  # 24 ms of one core


def test_relaxation_goes_from_the_target_to_the_models_own_shares():
    asked = Target(("gender",), np.array([0.5, 0.5]))
    own, calls = np.array([0.1, 0.9]), []

    def measure(prompt):
        calls.append(prompt)
        return None if prompt == "no faces" else own

    assert Targets(asked, relaxation=0.0, own=measure).of("a nurse") is asked and calls == []
    assert np.allclose(Targets(asked, relaxation=1.0, own=measure).of("a nurse").table, own)
    assert np.allclose(Targets(asked, relaxation=0.25, own=measure).of("a nurse").table, [0.4, 0.6])
    assert Targets(asked, relaxation=1.0, own=measure).of("no faces") is asked


def test_the_audit_gets_joints_only_where_they_are_no_product():
    groups = {"gender": ("gender",), "race": ("race",), "gender×race": ("gender", "race")}
    common = Targets(Target(("race", "gender"), TABLE.T)).audited(groups, ["x", "y"])
    assert np.allclose(common["gender×race"], TABLE.ravel()) and common["gender"].shape == (2,)
    product = Target.from_marginals({"gender": [0.3, 0.7], "race": [0.25] * 4})
    assert set(Targets(product).audited(groups, ["x"])) == {"gender", "race"}
    rows = Targets(None, {"x": product, "y": Target(("gender", "race"), TABLE)}).audited(groups, ["y", "x"])
    assert rows["gender×race"].shape == (2, 8) and np.allclose(rows["gender"], [[0.5, 0.5], [0.3, 0.7]])


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
    assert set(written.targets) == set(world.OCCUPATIONS) and len(written.targets) == 200
    for i, name in enumerate(world.OCCUPATIONS):
        assert np.allclose(written.targets[name].table, world.labour_shares(i)["race"], atol=2e-4)


def test_a_row_reaches_the_labels_of_its_prompt(tmp_path, tiny_model):
    """Through build and the step: one prompt's row asks for women only, the other's for men only."""
    (tmp_path / "people.txt").write_text("nurse\nchef\n")
    (tmp_path / "t.csv").write_text("subject,female,male\nchef,0,1\nnurse,1,0\n")
    config = composed(f"target.file={tmp_path / 't.csv'}", *(f"prompts.{w}={tmp_path / 'people.txt'}" for w in WHICH))
    targets = build.build_targets(config, build.build_prompts(config, "train"))
    trainee = make_trainee(tiny_model)
    trainee.objective = build.build_objective(config, targets)
    for prompt in build.build_prompts(config, "train"):
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        target = trainee.objective.target.of(prompt.text)
        labels, _ = label_faces([trainee.judges.see(images)], target, 64, torch.Generator().manual_seed(0))
        assert (labels.classes["gender"] == {"nurse": 0, "chef": 1}[prompt.subject]).all()


def test_the_labour_target_leaves_age_to_its_own_shares():
    config = composed("attribute=[race,age,gender]", "target.file=labour", "target.age={young:.75,old:.25}")
    assert build.target_lines(config) == ["race, gender: as in labour", "age: young 0.75, old 0.25"]
    for which in WHICH:
        prompts = build.build_prompts(config, which)
        targets = build.build_targets(config, prompts)
        assert targets.attributes == ("race", "age", "gender")
        for prompt in prompts:
            shares = world.labour_shares(world.OCCUPATIONS.index(prompt.subject))
            assert np.allclose(targets.asked(prompt.text).marginal("gender"), shares["gender"], atol=2e-4)
            assert np.allclose(targets.asked(prompt.text).marginal("age"), [0.75, 0.25])


def test_own_shares_come_from_the_whole_pool_once(tiny_model):
    trainee = make_trainee(tiny_model, attributes=("gender", "race"))
    own = trainee.originals.shares("a photo of the face of a nurse", 6, 3, ("gender", "race"))
    rows = trainee.originals.get("a photo of the face of a nurse", list(range(6)), 3)
    assert own.shape == (2, 4) and own.sum() == pytest.approx(1)
    assert np.allclose(own.sum(0), rows["probs.race"].double().mean(0), atol=1e-6)
    assert trainee.originals.sampled == 8  # two blocks of 4
    trainee.judges.detector = NoFaces()
    assert trainee.originals.shares("a photo of the face of a chef", 4, 3, ("gender",)) is None


@pytest.mark.parametrize("relaxation", [0, 1, 0.5])
def test_a_trainee_relaxes_towards_what_its_own_originals_show(tiny_model, relaxation):
    config = composed(
        f"target.relaxation={relaxation}", "target={gender:{female:.8,male:.2}}", "cache=null", "prompts.train_limit=2",
        "global_batch=4", "noise_pool=8", "sampler.train_steps=[2,5]",
    )  # fmt: skip
    trainee = build.build_trainee(config, tiny_model, make_trainee(tiny_model, "lora_text").judges)
    prompt = build.build_prompts(config, "train")[0].text
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
        prompts = build.build_prompts(config, "train")
        judges.classifier.config, judges.encoders, judges.embedder = {}, [], None
        found.append(build.training_fingerprint(config, tiny_model, judges, prompts))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["target.file=labour", "target.gender.female=.7", "target.gender.male=.3"], "labour.csv sets its shares too"),
        (["target.file=labour", "attribute=[age]"], "labour.csv: no column of shares, allowed: age.young, age.old"),
        (["target.joint={female:0.5,male:0.6}"], "target.joint: shares sum to 1.1, allowed: 1"),
        (["target.joint=half"], "target.joint: found 'half', allowed: a list of rows or nested shares"),
        (["target.file=labour", "prompts.train=FILE"], "labour.csv: no row for the subject 'astronaut', found 200"),
    ],
)
def test_targets_that_do_not_fit_the_run_are_one_line(tmp_path, overrides, says):
    (tmp_path / "people.txt").write_text("astronaut\nnurse\n")
    config = composed(*(o.replace("FILE", str(tmp_path / "people.txt")) for o in overrides))
    with pytest.raises(FairDiffError) as caught:
        build.build_targets(config, build.build_prompts(config, "train"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_inline_joint_reaches_training_and_audit():
    config = composed("attribute=[gender,age]", "target.joint={female:{young:.4,old:.1},male:{young:.2,old:.3}}")
    targets = build.build_targets(config, build.build_prompts(config, "train"))
    assert np.allclose(targets.of("anything").table, [[0.4, 0.1], [0.2, 0.3]])
    assert np.allclose(targets.audited({"gender×age": ("gender", "age")}, [])["gender×age"], [0.4, 0.1, 0.2, 0.3])
