"""Prompts with their text, family and subject; English articles; reading of prompt files."""

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
# words whose first letter does not determine the article: "a university professor", "an honest person", "an 18-year-old"
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

    people: whether its images show people. Images of a prompt without people shall not change.
    group: prompts of one group show the same people, such as synonyms; "" for none.
    names: the class that the text names, such as "gender.female"; "" for none.
    """

    text: str
    family: str
    subject: str
    people: bool = True
    group: str = ""
    names: str = ""


class PromptSet(Protocol):
    """The prompt set of an embedded model: families of subjects, each in three splits, and target tables for them.

    template: the default template. attributes: the attributes for which its target tables may have columns.
    """

    template: str
    families: tuple[str, ...]
    attributes: tuple[str, ...]

    def prompts(self, family: str, split: str, template: str) -> list[Prompt]:
        """Return the prompts of a family in "train", "validation" or "test", with `template` if the family takes one."""

    def takes_template(self, family: str) -> bool:
        """Return whether `template` applies to this family."""

    def without_people(self, split: str) -> list[Prompt]:
        """Return the prompts without people of a split."""

    def target_file(self, name: str) -> Path | None:
        """Return the path of the target table of this name, None if there is none."""


def article(noun: str) -> str:
    """Return the English indefinite article of a noun phrase, "a" or "an", by rules of sound with a list of exceptions."""
    word = unicodedata.normalize("NFD", noun.lstrip(" \"'“‘("))  # an accent follows its letter
    if _LETTERS.match(word):
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if _VOWEL_SOUND.match(word):
        return "an"
    return "an" if word[:1].lower() in set("aeiouæœø") and not _CONSONANT_SOUND.match(word) else "a"


def with_article(noun: str) -> str:
    """Return the noun phrase with its article: "nurse" -> "a nurse", "old woman" -> "an old woman"."""
    return f"{article(noun)} {noun}"


def wrong_article(prompt: Prompt) -> bool:
    """Return whether the subject follows the wrong one of "a" and "an", as a template without `{a}` may cause."""
    wrong = {"a": "an", "an": "a"}[article(prompt.subject)]
    return f" {wrong} {prompt.subject}".casefold() in f" {prompt.text}".casefold()


def fill(template: str, subject: str) -> str:
    """Put a subject into every `{}` (or `{subject}`) of a template, and "a" or "an" into `{a}`, by the following word.

    `{A}` is the article with a capital. All other words are left as they are, so "a {}" may be in any language.
    Raises FairDiffError if the template has no gap for the subject, or other braces.
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
    """Return alternating words and gaps, beginning and ending with words: "{a} {}" -> ["", "a", " ", "", ""]."""
    parts = _GAP.split(template)
    words, gaps = "".join(parts[::2]), parts[1::2]
    if not {"", "subject"} & set(gaps) or "{" in words or "}" in words:
        raise FairDiffError(
            f"prompts.template: {template!r} needs a gap {{}} for the subject, and no braces but those of {{a}}, an article"
        )
    return parts


def with_phrase(prompt: Prompt, phrase: str, names: str) -> Prompt:
    """Return the prompt with a phrase instead of its final ", a person", or else appended: "..., a woman"."""
    return replace(prompt, text=f"{prompt.text.removesuffix(', a person')}, {phrase}", names=names)


def takes_whole(template: str) -> bool:
    """Return whether a template is only its gap, so that the lines of a file are whole prompts."""
    return template in ("{}", "{subject}")


@lru_cache
def near_miss(name: str, known: tuple[str, ...]) -> str:
    """Return the known name that this one probably means ("Object", "objects": "object"), "" if it is known or like none."""
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
    """Read prompts from a text file (one per line; blank lines and lines that begin with # are skipped) or a CSV.

    A CSV has a column `prompt` (whole prompts), or a column `subject` for `template` or for its own column `template`.
    Optional columns: `family`; `people`, "no" for prompts without people; `group`, see `Prompt`. With a template, the lines
    of a text file are subjects; with the template "{}" they are whole prompts.
    key: the key that error messages name. families: known names; a family that is probably a misspelt one is an error.
    Raises FairDiffError, in one line that names the file and the key, for a file that is missing, unreadable, of another
    type or empty, for a missing column, an empty cell, or a misspelt column or family, and for a repeated prompt: its images
    depend on (seed, prompt), so a second copy would count the same images again.
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
        if kind == "object" and "people" not in columns:  # before this release it meant people=no
            raise FairDiffError(f"{place}: family: found object, allowed with a column people (yes or no)")
        if almost := near_miss(kind, known):
            raise FairDiffError(f"{place}: family: found {kind}, allowed: {almost}, or a name less like it")
        people = (cells.get("people") or "yes").lower()
        if people not in ("yes", "no"):
            raise FairDiffError(f"{place}: people: found {cells['people']}, allowed: yes, no")
        full = cells["prompt"] if whole else fill(cells.get("template", template), cells["subject"])
        prompts.append(Prompt(full, kind, cells.get("subject") or full, people == "yes", cells.get("group", "")))
    return prompts
