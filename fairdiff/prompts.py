"""Prompts: their text, their family, their subject and whom they show."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fairdiff.errors import FairDiffError
from fairdiff.files import read_given, read_table

# "a {}" or "{subject}": the optional article before the gap is set to suit the subject
_GAP = re.compile(r"(?:\b(?P<article>an?|An?)\s+)?\{(?:subject)?\}")
# words whose first letter misleads: "a university professor", "an honest person"
_CONSONANT_SOUND = re.compile(r"(?:uni(?![nm])|use|usu|eu|ewe|one\b|once|ut[ei])", re.IGNORECASE)
_VOWEL_SOUND = re.compile(r"(?:hon(?:est|ou?r)|hour|heir|x-?ray)", re.IGNORECASE)


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
        """Whether the words around a subject of this family may be others than `template`."""

    def without_people(self, split: str) -> list[Prompt]:
        """Prompts of a split that show no people."""

    def target_file(self, name: str) -> Path | None:
        """The table of target shares that has this name, None if there is none."""


def article(noun: str) -> str:
    """The indefinite article of a noun phrase by sound, up to a short list of exceptions: "a" or "an"."""
    word = noun.strip()
    if _VOWEL_SOUND.match(word):
        return "an"
    return "an" if word[:1].lower() in set("aeiou") and not _CONSONANT_SOUND.match(word) else "a"


def with_article(noun: str) -> str:
    """The noun phrase after its article: "nurse" -> "a nurse", "old woman" -> "an old woman"."""
    return f"{article(noun)} {noun}"


def fill(template: str, subject: str) -> str:
    """Put a subject into every `{}` (or `{subject}`) of a template; "a {}" becomes "an {}" where needed.

    Raises FairDiffError if the template has no gap or has braces that are none.
    """
    rest, gaps = _GAP.subn("", template)
    if not gaps or "{" in rest or "}" in rest:
        raise FairDiffError(f"prompts.template: {template!r} needs a gap {{}} for the subject and no other braces")

    def put(match: re.Match[str]) -> str:
        found = match["article"]
        if found is None:
            return subject
        chosen = article(subject)
        return f"{chosen.capitalize() if found[0] == 'A' else chosen} {subject}"

    return _GAP.sub(put, template)


def with_phrase(prompt: Prompt, phrase: str, names: str) -> Prompt:
    """The prompt with a phrase in the place of its closing "a person", or at its end: "..., a woman"."""
    return replace(prompt, text=f"{prompt.text.removesuffix(', a person')}, {phrase}", names=names)


def takes_whole(template: str) -> bool:
    """Whether a template is nothing but its gap, without an article, so that the lines of a file are whole prompts."""
    found = _GAP.fullmatch(template)
    return found is not None and found["article"] is None


def read_prompts(
    path: str | Path, template: str | None = None, family: str = "custom", key: str = "prompts.file"
) -> list[Prompt]:
    """Read prompts from a text file (one a line; blank lines and lines that begin with # are skipped) or a CSV.

    A CSV has a column `prompt` (whole prompts) or a column `subject` put into `template` (or into its own column
    `template`). Further columns, none of them needed: `family`; `people`, "no" for prompts without people; `group`, see
    `Prompt`. With a template, the lines of a text file are subjects (the template "{}" takes them as whole prompts).
    key: what errors call the file.
    Raises FairDiffError, in one line that names the file and the key, for a file that is missing, unreadable, of
    another kind or empty, for a missing column, for an empty cell and for a prompt that occurs twice: images are
    drawn by (seed, prompt), so a second copy would count the same images again.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".csv"):
        raise FairDiffError(f"{key}: {path}: the name must end in .txt or .csv")
    text = read_given(path, f"{key}: {path}")
    prompts = (_from_csv if path.suffix == ".csv" else _from_lines)(f"{key}: {path}", text, template, family)
    if not prompts:
        raise FairDiffError(f"{key}: {path}: holds no prompts")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.text in seen:
            raise FairDiffError(f"{key}: {path}: the prompt {prompt.text!r} occurs twice")
        seen.add(prompt.text)
    return prompts


def _from_lines(where: str, text: str, template: str | None, family: str) -> list[Prompt]:
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    opening = " ".join(_GAP.split(template)[0].split()[:3]) if template else ""
    for line in kept:
        if " " in opening and line.startswith(opening):
            whole = "for whole prompts 'prompts.template=\"{}\"'"
            raise FairDiffError(f"{where}: {line!r} begins as prompts.template {template!r} does; {whole}")
    return [_prompt(template, line, family) for line in kept]


def _from_csv(where: str, text: str, template: str | None, family: str) -> list[Prompt]:
    columns, rows = read_table(text, where)
    if not {*columns} & {"prompt", "subject"}:
        raise FairDiffError(f"{where}: needs a column prompt or subject, found {sorted(columns)}")
    whole = "prompt" in columns
    if not whole and template is None and "template" not in columns:
        raise FairDiffError(f"{where}: prompts.template: a column subject needs a template (a setting or a column)")
    prompts = []
    for number, cells in rows:
        for key in ("prompt",) if whole else ("subject",) if "template" not in columns else ("subject", "template"):
            if not cells[key]:
                raise FairDiffError(f"{where}, line {number}: the cell {key} is empty")
        kind = cells.get("family") or family
        if whole:
            prompt = Prompt(cells["prompt"], kind, cells.get("subject") or cells["prompt"])
        else:
            prompt = _prompt(cells.get("template", template), cells["subject"], kind)
        if kind == "object" and "people" not in columns:  # what the name alone said before this release
            raise FairDiffError(
                f"{where}, line {number}: family: found object, allowed with a column people (yes or no)"
            )
        people = (cells.get("people") or "yes").lower()
        if people not in ("yes", "no"):
            raise FairDiffError(f"{where}, line {number}: people: found {cells['people']}, allowed: yes, no")
        prompts.append(replace(prompt, people=people == "yes", group=cells.get("group", "")))
    return prompts


def _prompt(template: str | None, subject: str, family: str) -> Prompt:
    return Prompt(subject if template is None else fill(template, subject), family, subject)
