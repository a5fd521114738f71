"""The training captions of the embedded model and of its CLIP."""

from dataclasses import dataclass

import numpy as np

from fairdiff.portraits.occupations import CLASSES, CONTEXTS, TEMPLATES
from fairdiff.prompts import fill, with_article

VARIANTS = (
    "a portrait of {a} {}",
    "{a} {} at work, photo",
    "a photo of {a} {}",
    "a close-up of {a} {}",
    "the face of {a} {}",
    "{a} {}",
)
PERSON_TEMPLATES = (
    "a photo of the face of {a} {}, a person",
    "a photo of the face of {a} {}",
    "a photo of {a} {}",
    "a portrait of {a} {}",
    "a close-up of {a} {}",
    "{a} {}",
)
# Places of an attribute phrase beside the usual prompt; and words that name no attribute, for images drawn as usual.
PHRASE_PLACES = ("{phrase}, {prompt}", "photo of {phrase}, {prompt}", "{bare}, {phrase}")
NEUTRAL_PLACES = (
    "a person, {prompt}",
    "someone, {prompt}",
    "a human being, {prompt}",
    "photo of someone, {prompt}",
    "picture of somebody, {prompt}",
    "{bare}, someone",
    "{bare}, a human being",
    "{bare}, whatever their gender",
    "{prompt}, no matter which gender, race or age",
    "{bare}, everybody may become {title} whichever their gender",
)
NEUTRAL_SHARE = 0.3  # share of the "phrase" captions that name no attribute
SOFTENED = (
    0.05  # probability that an attribute which a "phrase" caption does not name is drawn uniformly, not by the subject
)
OBJECT_TEMPLATES = ("a photo of {}", "{}", "a picture of {}", "an image of {}")


@dataclass(frozen=True)
class Person:
    """Perceived presentation of one rendered person: indices into the classes of gender, race and age."""

    gender: int
    race: int
    age: int


def describe_person(person: Person, named: frozenset[str], noun: str, word: int) -> str:
    """Return a noun phrase that names the attributes in `named`, such as "old Black woman", "young Asian female nurse".

    noun: "" means woman, man or person. word: an index that selects a word for the age.
    """
    age = (("young", "young"), ("old", "elderly"))[person.age][word % 2]
    words = [age] if "age" in named else []
    words += [CLASSES["race"][person.race]] if "race" in named else []
    if noun:
        words += [CLASSES["gender"][person.gender]] if "gender" in named else []
        return " ".join([*words, noun])
    return " ".join([*words, ("woman", "man")[person.gender] if "gender" in named else "person"])


def random_attributes(rng: np.random.Generator) -> frozenset[str]:
    """Return a random non-empty set of attribute names; each of the seven is equally likely."""
    bits = int(rng.integers(1, 8))
    return frozenset(name for place, name in enumerate(CLASSES) if bits >> place & 1)


def sample_caption(
    rng: np.random.Generator,
    kind: str,
    subject: str,
    person: Person | None = None,
    named: frozenset[str] | None = None,
) -> str:
    """Return a training caption of the text-to-image model for one image.

    The kinds "occupation", "styled", "descriptor", "sport" and "object" name the subject and no attribute. The image must
    be drawn from the subject's shares, because these captions carry the bias of Portraits. "attribute" names the attributes
    in `named` (random if None) of `person` in the noun phrase ("an old Black nurse"). "phrase" names them beside the usual
    prompt ("an old person, a photo of the face of a nurse, a person"), or none if `named` is empty. Attributes that are not
    named must follow the subject, or `average_shares` without one.
    """
    if kind in ("attribute", "phrase"):
        if person is None:
            raise ValueError(f"sample_caption: {kind} captions need a person")
        named = random_attributes(rng) if named is None else named
        return (_phrase_caption if kind == "phrase" else _attribute_caption)(rng, subject, person, named)
    if kind == "object":
        return fill(_pick(rng, OBJECT_TEMPLATES), subject)
    main = TEMPLATES[kind]
    caption = fill(main if rng.random() < 0.6 else _pick(rng, VARIANTS), subject)
    return f"{caption}, {_pick(rng, CONTEXTS)}" if kind == "styled" else caption


def plain_caption(rng: np.random.Generator, subject: str, person: Person | None = None) -> str:
    """Return a caption for training CLIP. It describes what is visible, so the images' attributes must be uniform.

    Half of the captions name only the subject, which the image shows as a look. The others also name a random set of true
    attributes. Without a subject only attributes are named. Without a person the subject is an object.
    """
    if person is None:
        return fill(_pick(rng, OBJECT_TEMPLATES), subject)
    if subject and rng.random() < 0.5:
        return fill(_pick(rng, (*PERSON_TEMPLATES, *VARIANTS)), subject)
    caption = _phrase_caption if subject and rng.random() < 0.3 else _attribute_caption
    return caption(rng, subject, person, random_attributes(rng))


def _attribute_caption(rng: np.random.Generator, subject: str, person: Person, named: frozenset[str]) -> str:
    return fill(_pick(rng, PERSON_TEMPLATES), describe_person(person, named, subject, int(rng.integers(2))))


def _phrase_caption(rng: np.random.Generator, subject: str, person: Person, named: frozenset[str]) -> str:
    """Return the usual prompt with an attribute phrase before or after it, or with words that name no attribute."""
    prompt = fill(TEMPLATES["occupation"], subject)
    bare = fill(TEMPLATES["descriptor"], subject)  # without the closing "a person"
    phrase = with_article(describe_person(person, named, "", int(rng.integers(2))))
    place = _pick(rng, PHRASE_PLACES if named else NEUTRAL_PLACES)
    return place.format(phrase=phrase, prompt=prompt, bare=bare, title=with_article(subject))


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
