"""Prompts: their text, their family, their subject and whom they show."""

import re
import unicodedata
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from fairdiff.errors import FairDiffError
from fairdiff.files import read_given, read_table

COLUMNS = ("prompt", "subject", "template", "family", "people", "group")
_GAP = re.compile(r"\{(|subject|a|A)\}")
# words whose first letter misleads: "a university professor", "a Ukrainian", "an honest person", "an 18-year-old"
_CONSONANT_SOUND = re.compile(
    r"uni(?![nm]|den)|unanim|unesco|unhcr|us[aeu]|usda|uk[ru]|ut[aeio]|ur[aeiou]|uv|uy|uig|ubiq|ufo|ugan|uefa|ucla"
    r"|eu|ewe|one\b|once",
    re.IGNORECASE,
)
_VOWEL_SOUND = re.compile(r"hon(?:est|ou?r)|hour|heir|x-?ray|8|1[18](?!\d)", re.IGNORECASE)
# capitals read letter by letter: "an HR manager", "a UX designer", "an X-ray technician", "an NYPD officer"
_LETTERS = re.compile(r"(?!(?:LAN|MAN|NUN|SIM|SPY)\b)(?:[A-Z]{1,3}|[B-DF-HJ-NP-TV-Z]{4,}|HVAC|NAACP|NCAA)(?![A-Za-z])")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its full text, its family ("occupation", "animal", ...) and its subject ("nurse").

    people: whether its images show people. The images of a prompt without people are only to stay as they are.
    group: prompts of one group show the same people, as synonyms do; "" for a prompt on its own.
    names: the class that the text names by itself, "gender.female"; "" for none.
    """

    text: str
    family: str
    subject: str
    people: bool = True
    group: str = ""
    names: str = ""


class PromptSet(Protocol):
    """Prompts that come with a model: families of subjects, each in three splits, and target tables for them.

    template: the words around a subject in a family that takes others. attributes: those that its target tables may have
    columns for.
    """

    template: str
    families: tuple[str, ...]
    attributes: tuple[str, ...]

    def prompts(self, family: str, split: str, template: str) -> list[Prompt]:
        """The prompts of a family in "train", "validation" or "test"; `template` where the family takes one."""

    def takes_template(self, family: str) -> bool:
        """Whether this family accepts templates other than `template`."""

    def without_people(self, split: str) -> list[Prompt]:
        """Prompts of a split that show no people."""

    def target_file(self, name: str) -> Path | None:
        """The table of target shares that has this name, None if there is none."""


def article(noun: str) -> str:
    """The English indefinite article of a noun phrase by sound, up to a short list of exceptions: "a" or "an"."""
    word = unicodedata.normalize("NFD", noun.lstrip(" \"'“‘("))  # an accent stands behind its letter
    if _LETTERS.match(word):
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if _VOWEL_SOUND.match(word):
        return "an"
    return "an" if word[:1].lower() in set("aeiouæœø") and not _CONSONANT_SOUND.match(word) else "a"


def with_article(noun: str) -> str:
    """The noun phrase after its article: "nurse" -> "a nurse", "old woman" -> "an old woman"."""
    return f"{article(noun)} {noun}"


def wrong_article(prompt: Prompt) -> bool:
    """Whether "a" or "an" stands before the subject where English has the other: of a template without `{a}`."""
    wrong = {"a": "an", "an": "a"}[article(prompt.subject)]
    return f" {wrong} {prompt.subject}".casefold() in f" {prompt.text}".casefold()


def fill(template: str, subject: str) -> str:
    """Put a subject into every `{}` (or `{subject}`) of a template, and "a" or "an" into `{a}`, as what follows needs.

    `{A}`: the same with a capital. Words are left as they are, so "a {}" may be of any language.
    Raises FairDiffError if the template has no gap or has braces that are none.
    """
    text = ""
    for i, part in reversed(list(enumerate(_parts(template)))):
        if i % 2 == 0:
            text = part + text
        elif part in ("a", "A"):
            text = (article(text) if part == "a" else article(text).capitalize()) + text
        else:
            text = subject + text
    return unicodedata.normalize("NFC", text)


@lru_cache
def _parts(template: str) -> list[str]:
    """Words and gaps by turns, from words to words: "{a} {}" -> ["", "a", " ", "", ""]."""
    parts = _GAP.split(template)
    words, gaps = "".join(parts[::2]), parts[1::2]
    if not {"", "subject"} & set(gaps) or "{" in words or "}" in words:
        raise FairDiffError(
            f"prompts.template: {template!r} needs a gap {{}} for the subject, and no braces but those of {{a}}, an article"
        )
    return parts


def with_phrase(prompt: Prompt, phrase: str, names: str) -> Prompt:
    """The prompt with a phrase in the place of its closing "a person", or at its end: "..., a woman"."""
    return replace(prompt, text=f"{prompt.text.removesuffix(', a person')}, {phrase}", names=names)


def takes_whole(template: str) -> bool:
    """Whether a template is only "{}", so that the lines of a file are whole prompts."""
    return template in ("{}", "{subject}")


@lru_cache
def near_miss(name: str, known: tuple[str, ...]) -> str:
    """The known name that this one is almost, as "Object" and "objects" are "object"; "" if it is one or like none."""
    if name in known:
        return ""
    close = get_close_matches(name.casefold(), [other.casefold() for other in known], 1, 0.85)
    return next((other for other in known if [other.casefold()] == close), "")


def read_prompts(
    path: str | Path,
    template: str | None = None,
    family: str = "custom",
    key: str = "prompts.file",
    families: tuple[str, ...] = (),
) -> list[Prompt]:
    """Read prompts from a text file (one a line; blank lines and lines that begin with # are skipped) or a CSV.

    A CSV has a column `prompt` (whole prompts) or a column `subject` put into `template` (or into its own column
    `template`). Further columns, none of them needed: `family`; `people`, "no" for prompts without people; `group`, see
    `Prompt`. With a template, the lines of a text file are subjects (the template "{}" takes them as whole prompts).
    key: what errors call the file. families: names that mean something elsewhere, which no family may be almost.
    Raises FairDiffError, in one line that names the file and the key, for a file that is missing, unreadable, of
    another kind or empty, for a missing column, for an empty cell, for a column or family that is almost a known one, and
    for a prompt that occurs twice: images are drawn by (seed, prompt), so a second copy would count the same images again.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".csv"):
        raise FairDiffError(f"{key}: {path}: the name must end in .txt or .csv")
    where = f"{key}: {path}"
    text = read_given(path, where)
    if path.suffix == ".csv":
        prompts = _from_csv(where, text, template, family, families)
    else:
        prompts = _from_lines(where, text, template, family)
    if not prompts:
        raise FairDiffError(f"{where}: holds no prompts")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.text in seen:
            raise FairDiffError(f"{where}: the prompt {prompt.text!r} occurs twice")
        seen.add(prompt.text)
    return prompts


def _from_lines(where: str, text: str, template: str | None, family: str) -> list[Prompt]:
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if line and not line.startswith("#")]
    opening = " ".join(_parts(template)[0].split()[:3]) if template else ""
    for line in kept:
        if " " in opening and line.startswith(opening):
            whole = "for whole prompts 'prompts.template=\"{}\"'"
            raise FairDiffError(f"{where}: {line!r} begins as prompts.template {template!r} does; {whole}")
    return [Prompt(line if template is None else fill(template, line), family, line) for line in kept]


def _from_csv(
    where: str, text: str, template: str | None, family: str, families: tuple[str, ...]
) -> list[Prompt]:
    columns, rows = read_table(text, where)
    if not {*columns} & {"prompt", "subject"}:
        raise FairDiffError(f"{where}: needs a column prompt or subject, found {sorted(columns)}")
    for column in columns:
        if almost := near_miss(column, COLUMNS):
            raise FairDiffError(f"{where}: found the column {column}, allowed: {almost}, or a name less like it")
    whole = "prompt" in columns
    if not whole and template is None and "template" not in columns:
        raise FairDiffError(f"{where}: prompts.template: a column subject needs a template (a setting or a column)")
    needed = ("prompt",) if whole else ("subject",) if "template" not in columns else ("subject", "template")
    known = families if "people" in columns else (*families, "object")
    prompts = []
    for number, cells in rows:
        place = f"{where}, line {number}"
        for key in needed:
            if not cells[key]:
                raise FairDiffError(f"{place}: the cell {key} is empty")
        kind = cells.get("family") or family
        if kind == "object" and "people" not in columns:  # what the name alone said before this release
            raise FairDiffError(f"{place}: family: found object, allowed with a column people (yes or no)")
        if almost := near_miss(kind, known):
            raise FairDiffError(f"{place}: family: found {kind}, allowed: {almost}, or a name less like it")
        people = (cells.get("people") or "yes").lower()
        if people not in ("yes", "no"):
            raise FairDiffError(f"{place}: people: found {cells['people']}, allowed: yes, no")
        full = cells["prompt"] if whole else fill(cells.get("template", template), cells["subject"])
        prompts.append(Prompt(full, kind, cells.get("subject") or full, people == "yes", cells.get("group", "")))
    return prompts
