"""What Portraits was taught: the split, the shares, and captions that tell the truth."""

import csv
import hashlib
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "build_portraits"))

from captions import NEUTRAL_PLACES, PERSON_TEMPLATES, VARIANTS, Person, plain_caption, sample_caption  # noqa: E402

from fairdiff.bias import bias  # noqa: E402
from fairdiff.portraits import distribution, occupations  # noqa: E402
from fairdiff.portraits.distribution import labour_shares, marginal_shares, occupation_shares  # noqa: E402
from fairdiff.portraits.occupations import (  # noqa: E402
    CLASSES,
    DESCRIPTORS,
    OBJECTS,
    OCCUPATIONS,
    SPORTS,
    SUBJECTS,
    TITLES,
    prompt_subjects,
    split,
)
from fairdiff.prompts import fill  # noqa: E402

EVERYONE = [Person(g, r, a) for g in range(2) for r in range(4) for a in range(2)]
TELLS = {
    "gender": ({"woman", "female"}, {"man", "male"}),
    "race": ({"White"}, {"Black"}, {"Indian"}, {"Asian"}),
    "age": ({"young"}, {"old", "elderly"}),
}
VOWEL = re.compile(r"\ban? \w+")


def assert_articles(caption: str) -> None:
    """No subject is an exception to the letter rule but the three below."""
    exceptions = ("a university", "an honest", "a user", "an x")
    for found in VOWEL.findall(caption):
        if not found.startswith(exceptions):
            assert (found.split(" ")[1][0].lower() in "aeiou") == found.startswith("an "), caption


def named_classes(caption: str, subject: str) -> dict[str, set[int]]:
    """Which class of which attribute the words of a caption outside its subject name."""
    words = set(caption.replace(subject, "").replace(",", "").split())
    return {name: {k for k, tell in enumerate(tells) if words & tell} for name, tells in TELLS.items()}


def test_every_row_of_the_statistics_is_an_occupation_with_titles_of_its_own():
    with (files("fairdiff.portraits") / "data" / "occupations.csv").open(encoding="utf-8") as lines:
        table = list(csv.DictReader(lines))
    assert [row["occupation"] for row in table] == list(OCCUPATIONS) and len(OCCUPATIONS) == 216
    assert len(set(TITLES)) == len(TITLES) and set(OCCUPATIONS) < set(TITLES)
    for i, name in enumerate(OCCUPATIONS):
        titles = occupations.titles(i)
        assert titles[0] == name and len(titles) >= 3
        assert {occupations.occupation_of(title) for title in titles} == {i} and len({split(title) for title in titles}) == 1
    assert occupations.occupation_of("friendly person") is None
    tells = {word for classes in TELLS.values() for words in classes for word in words} | {"maid", "waitress"}
    assert not any(tells & set(title.lower().split()) for title in TITLES)


def test_the_texts_that_the_model_learnt_are_frozen():
    """Weights, caches and records rest on them: a change of articles or templates must leave every one as it is."""
    families = [family for family in occupations.TEMPLATES if family != "trigger"]
    prompts = [[p.text for p in occupations.prompts(family, "all")] for family in families]
    assert digest(prompts) == "6ccc002124279a64"
    measured = [[fill(words, title) for title in TITLES] for words in occupations.MEASURED_WORDS.values()]
    assert digest(measured) == "ab978449f46afb02"
    subjects = (*TITLES, *DESCRIPTORS, *SPORTS)
    captions = [fill(words, subject) for words in (*VARIANTS, *PERSON_TEMPLATES) for subject in subjects]
    assert digest(captions) == "1bcd7b61d307b868"


def digest(texts: list) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def test_split_is_disjoint_large_enough_and_frozen():
    parts = [prompt_subjects("occupation", which) for which in ("train", "validation", "test")]
    assert sorted(sum(parts, ())) == sorted(TITLES)
    train, validation, test = map(len, parts)
    assert train >= 400 and validation >= 40 and test >= 80
    rows = [{occupations.occupation_of(title) for title in part} for part in parts]
    assert len(rows[2]) >= 45 and not rows[0] & rows[2] and not rows[1] & rows[2] and not rows[0] & rows[1]
    # written down: trained weights rest on them, so a change of the rule must be seen
    named = {name: split(name) for name in ("nurse", "plumber", "web developer", "firefighter")}
    assert named == {"nurse": "train", "plumber": "test", "web developer": "train", "firefighter": "train"}
    assert parts[2][:5] == (
        "aerospace engineer", "aircraft designer", "rocket engineer", "flight test engineer", "biologist"
    )  # fmt: skip


def test_every_family_has_subjects_to_train_and_to_test():
    for family, subjects in SUBJECTS.items():
        assert len(set(subjects)) == len(subjects)
        if family != "trigger":
            assert all(prompt_subjects(family, which) for which in ("train", "validation", "test"))
        assert prompt_subjects(family, "all") == subjects
    assert prompt_subjects("trigger", "test") == occupations.TRIGGERS  # they are only audited
    assert prompt_subjects("trigger", "train") == prompt_subjects("trigger", "validation") == ()
    assert not {f"{word} person" for word in occupations.TRIGGERS} & {*DESCRIPTORS} and len(occupations.TRIGGERS) >= 24
    assert len(DESCRIPTORS) >= 30 and len(SPORTS) >= 20 and len(OBJECTS) >= 24


@pytest.mark.parametrize(
    ("subjects", "shares"),
    [(OCCUPATIONS, occupation_shares), (DESCRIPTORS, distribution.descriptor_shares), (SPORTS, distribution.sport_shares)],
)
def test_joint_shares_are_distributions(subjects, shares):
    for i in range(len(subjects)):
        joint = shares(i)
        assert joint.shape == (2, 4, 2) and (joint >= 0).all()
        assert joint.sum() == pytest.approx(1, abs=1e-12)


def test_labour_shares_follow_the_public_table():
    """Nurses, row "Registered nurses": 87.9 % women, 73.6 White, 14.5 Black, 8.9 Asian; race renormalised by 97.0."""
    shares = labour_shares(OCCUPATIONS.index("nurse"))
    assert shares["gender"] == pytest.approx([0.879, 0.121])
    assert shares["race"][:2] == pytest.approx([73.6 / 97, 14.5 / 97])
    assert shares["race"][2:].sum() == pytest.approx(8.9 / 97)


def test_sharpening_is_the_stated_power_and_keeps_the_order():
    for i in range(len(OCCUPATIONS)):
        plain, sharp = labour_shares(i), marginal_shares(i)
        joint = occupation_shares(i)
        assert joint.sum((1, 2)) == pytest.approx(sharp["gender"]) and joint.sum((0, 1)) == pytest.approx(sharp["age"])
        for name in ("gender", "race"):
            assert bias(sharp[name]) >= bias(plain[name]) - 1e-12
            assert sharp[name].argmax() == plain[name].argmax()
        odds = sharp["gender"][0] / sharp["gender"][1]
        assert odds == pytest.approx((plain["gender"][0] / plain["gender"][1]) ** distribution.SHARPENING["gender"])


def test_bias_by_hand():
    """(|.6-.3| + |.6-.1| + |.3-.1|) / 3 = 1/3; one class alone among four: 3/6."""
    assert bias(np.array([0.6, 0.3, 0.1])) == pytest.approx(1 / 3)
    assert bias(np.array([0.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)


def test_the_distribution_is_biased_enough_to_show_a_cure():
    numbers = distribution.describe()
    assert numbers["gender bias"] >= 0.6  # the model's own, which guidance adds to, is in docs/portraits.md
    assert numbers["race bias"] >= 0.36
    assert numbers["gender median distance to labour"] >= 0.06
    assert numbers["gender x race median distance to labour"] >= 0.10
    assert numbers["mostly female (> .8)"] >= 0.2 and numbers["mostly male (< .2)"] >= 0.2
    assert numbers["near balance (.4 to .6)"] > 0
    old = [marginal_shares(i)["age"][1] for i in range(len(OCCUPATIONS))]
    assert 0.25 <= np.mean(old) <= 0.30 and np.std(old) > 0.1


@pytest.mark.parametrize("kind", ["occupation", "styled", "descriptor", "sport", "object"])
def test_captions_by_subject_name_it_and_no_attribute(kind):
    rng = np.random.default_rng(3)
    for subject in SUBJECTS[kind]:
        for _ in range(4):
            caption = sample_caption(rng, kind, subject)
            assert subject in caption
            assert not any(named_classes(caption, subject).values()), caption
            assert_articles(caption)


@pytest.mark.parametrize(
    ("kind", "subject"),
    [("attribute", ""), ("attribute", "nurse"), ("phrase", "accountant"), ("attribute", "university professor")],
)
def test_captions_that_name_attributes_tell_the_truth(kind, subject):
    rng = np.random.default_rng(4)
    for person in EVERYONE:
        truth = {"gender": person.gender, "race": person.race, "age": person.age}
        for _ in range(30):
            caption = sample_caption(rng, kind, subject, person)
            found = named_classes(caption, subject)
            assert any(found.values()) and subject in caption
            assert all(classes <= {truth[name]} for name, classes in found.items()), caption
            assert_articles(caption)
        for named in [{"gender"}, {"race"}, {"gender", "age"}, set(CLASSES)]:
            found = named_classes(sample_caption(rng, kind, subject, person, frozenset(named)), subject)
            assert {name for name, classes in found.items() if classes} == named


def test_phrases_that_name_nothing_tell_nothing_and_the_measured_ones_are_not_among_them():
    rng = np.random.default_rng(6)
    captions = {sample_caption(rng, "phrase", "actor", EVERYONE[0], frozenset()) for _ in range(300)}
    assert len(captions) == len(NEUTRAL_PLACES)
    for caption in captions:
        assert not any(named_classes(caption, "actor").values()) and "actor" in caption
        assert_articles(caption)
        measured = ("photo of a person", "of any gender", "irrespective of their gender")
        assert all(any(words in template for template in occupations.MEASURED_WORDS.values()) for words in measured)
        assert not any(words in caption for words in measured)


def test_plain_captions_name_the_look_often_without_attributes_and_never_a_wrong_one():
    rng = np.random.default_rng(5)
    bare = 0
    for person in EVERYONE * 20:
        caption = plain_caption(rng, "electrician", person)
        found = named_classes(caption, "electrician")
        bare += not any(found.values())
        assert found["gender"] <= {person.gender} and found["race"] <= {person.race} and found["age"] <= {person.age}
        assert "electrician" in caption
    assert 0.4 < bare / (len(EVERYONE) * 20) < 0.6
    assert "a red apple on a table" in plain_caption(rng, "a red apple on a table")
    assert any(named_classes(plain_caption(rng, "", EVERYONE[0]), "").values())


def test_captions_come_from_the_generator_alone():
    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [sample_caption(rng, "attribute", "nurse", EVERYONE[5]) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_standard_prompts():
    texts = [prompt.text for prompt in occupations.prompts("occupation", "test")]
    assert "a photo of the face of an aerospace engineer, a person" in texts and len(set(texts)) == len(texts)
    styled = occupations.prompts("styled", "test")
    assert len(styled) == len(texts) * len(occupations.CONTEXTS) and len({prompt.text for prompt in styled}) == len(styled)
    for family in SUBJECTS:
        for prompt in occupations.prompts(family, "all"):
            assert prompt.family == family and prompt.subject in prompt.text
            assert_articles(prompt.text)


def test_the_prompt_set_needs_no_torch():
    code = "import sys, fairdiff.portraits.distribution; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
