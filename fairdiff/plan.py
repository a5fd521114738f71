"""The plan: what a run is requested to do, read once from the configuration and its files, then frozen.

The builder, the trainer and the audit are handed the plan; none of them reads prompts or targets from the configuration.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

from fairdiff.config import Config
from fairdiff.errors import FairDiffError, blame
from fairdiff.files import write_text
from fairdiff.objective.target_files import WrittenTarget, read_target, table_to_fill_in
from fairdiff.objective.targets import Target, Targets
from fairdiff.portraits.prompt_set import PortraitsPrompts
from fairdiff.prompts import Prompt, PromptSet, read_prompts, with_phrase

Families = dict[str, list[Prompt]]  # family -> its prompts


@dataclass(frozen=True)
class Plan:
    """Attributes with their classes, the prompts of each kind, and the target of every prompt of people.

    train: prompts in the fixed order in which an epoch is shuffled, repeated as `prompts.families` says, including prompts
    without people. validation: () without validation. audit: prompts of people. named: some of them with a class in words,
    which their images should show. without_people: prompts whose images should not change.
    targets: the target of every prompt of people above. target_lines: the targets in words.
    """

    attributes: dict[str, tuple[str, ...]]
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    audit: tuple[Prompt, ...]
    named: tuple[Prompt, ...]
    without_people: tuple[Prompt, ...]
    targets: Targets
    target_lines: tuple[str, ...]

    @property
    def not_held_out(self) -> list[str]:
        """The subjects of audited prompts that training also uses, in any template."""
        trained = {_plain(prompt.subject) for prompt in self.train}
        return [prompt.subject for prompt in self.audit if _plain(prompt.subject) in trained]


def _plain(subject: str) -> str:
    """A subject with capitals and spaces normalised, as text encoders read it."""
    return " ".join(subject.casefold().split())


def make_plan(config: Config, training: bool = True) -> Plan:
    """Read everything that is requested; without `training` there are no training and validation prompts.

    Raises FairDiffError for a file or key that cannot be read, for a split without prompts of people, and for a prompt
    without a target.
    """
    embedded = PortraitsPrompts()
    _check_families(config, embedded)
    splits = [*(["train"] if training else []), "validation", config.audit.split]
    prompts = _read_splits(config, embedded, splits)
    train, named = _training_prompts(config, embedded, prompts["train"]) if training else ([], {})
    validation = []
    if training and config.validation.every:
        validation = _some(config, "validation", prompts["validation"], config.validation.prompts)
    audit = _some(config, config.audit.split, prompts[config.audit.split], config.audit.prompts)
    written = _written_target(config, embedded)
    return Plan(
        attributes=config.classes,
        train=tuple(train),
        validation=tuple(validation),
        audit=tuple(audit),
        named=tuple(_named(config, audit)),
        without_people=tuple(_unchanged(config, embedded, prompts[config.audit.split])),
        targets=_targets(config, written, [*(p for p in train if not p.names), *validation, *audit], named),
        target_lines=tuple(_target_lines(config, written)),
    )


def plan_of_prompts(config: Config, prompts: Sequence[Prompt]) -> Plan:
    """The plan of an audit of exactly these prompts."""
    people = [prompt for prompt in prompts if prompt.people and not prompt.names]
    written = _written_target(config, PortraitsPrompts())
    return Plan(
        attributes=config.classes,
        train=(),
        validation=(),
        audit=tuple(people),
        named=tuple(prompt for prompt in prompts if prompt.people and prompt.names),
        without_people=tuple(prompt for prompt in prompts if not prompt.people),
        targets=_targets(config, written, people, {}),
        target_lines=tuple(_target_lines(config, written)),
    )


def _read_splits(config: Config, embedded: PromptSet, splits: list[str]) -> dict[str, Families]:
    """The prompts of each split by family: from the user's file, or from families of the embedded set.

    A file is read only once, even if several splits use it, because it may change while the run continues.
    """
    own, template = config.prompts, config.prompts.template
    known = tuple(dict.fromkeys([*embedded.families, *own.families]))
    read: dict[str, list[Prompt]] = {}
    found: dict[str, Families] = {}
    for split in splits:
        path = getattr(own, split)
        if not path:
            found[split] = {family: embedded.prompts(family, split, template) for family in own.families}
            continue
        if path not in read:
            read[path] = read_prompts(path, template, key=f"prompts.{split}", families=known)
        found[split] = {}
        for prompt in read[path]:
            found[split].setdefault(prompt.family, []).append(prompt)
    return found


def _training_prompts(
    config: Config, embedded: PromptSet, families: Families
) -> tuple[list[Prompt], dict[Prompt, Prompt]]:
    """Training prompts in a fixed shuffle, and for each prompt with a class in words the same prompt without it.

    They are each family's prompts repeated as `prompts.families` says, some with a class in words, and prompts without
    people.
    """
    repeated = [p for family, some in families.items() for p in some * config.prompts.families.get(family, 1)]
    people = shuffled([prompt for prompt in repeated if prompt.people])
    _require_people(config, "train", people)
    classes = _classes_in_words(config)
    without = config.prompts.without_people if config.loss.image else 0.0  # they learn by the image term alone
    share = config.prompts.named if classes and config.loss.align else 0.0
    each = len(people) / (1 - without - share)
    named, different, own_texts = {}, list(dict.fromkeys(people)), {prompt.text for prompt in people}
    for i in range(round(each * share)):
        name, cls, phrase = classes[i % len(classes)]
        plain = different[i // len(classes) % len(different)]
        prompt = with_phrase(plain, phrase, f"{name}.{cls}")
        if prompt.text not in own_texts:  # a file may have such prompts itself
            named[prompt] = plain
    own = [prompt for prompt in repeated if not prompt.people] if without else []
    if without and not own:
        some = embedded.without_people("train")
        own = [some[i % len(some)] for i in range(round(each * without))]
    return shuffled([*people, *named, *own]), named


def _some(config: Config, split: str, families: Families, limit: int | None) -> list[Prompt]:
    """Validation or test prompts of people without repetition, family by family, `limit` of each family (None: all)."""
    some = families.values()
    found = [p for own in some for p in different_first(shuffled([p for p in own if p.people]))[:limit]]
    _require_people(config, split, found)
    return found


def _require_people(config: Config, split: str, prompts: list[Prompt]) -> None:
    if not prompts:
        file = getattr(config.prompts, split)
        raise FairDiffError(f"prompts.{split}: found {file} with no prompt of people, allowed: one or more")


def _unchanged(config: Config, embedded: PromptSet, families: Families) -> list[Prompt]:
    """Audited prompts without people: the file's own, or the embedded set's."""
    own = [p for some in families.values() for p in some if not p.people]
    return (own or embedded.without_people(config.audit.split))[: config.audit.without_people]


def _named(config: Config, audit: list[Prompt]) -> list[Prompt]:
    """The first audited prompts with each class in words, attribute by attribute."""
    some = audit[: config.audit.named or 0]
    classes, own = _classes_in_words(config), {prompt.text for prompt in audit}  # a file may have such prompts itself
    named = [with_phrase(p, phrase, f"{name}.{cls}") for name, cls, phrase in classes for p in some]
    return [prompt for prompt in named if prompt.text not in own]


def _classes_in_words(config: Config) -> list[tuple[str, str, str]]:
    """(attribute, class, words for a person of that class) for the attributes that have phrases."""
    return [
        (name, cls, attribute.phrases[cls])
        for name, attribute in config.attributes.items()
        if attribute.phrases
        for cls in attribute.classes
    ]


def _check_families(config: Config, embedded: PromptSet) -> None:
    """FairDiffError for an unknown family, and for a template that no prompt uses."""
    own = config.prompts
    files = [own.train, own.validation, own.test]
    for family in own.families:
        if not all(files) and family not in embedded.families:
            raise FairDiffError(
                f"prompts.families: found {family}, allowed: {', '.join(embedded.families)}, or families of files for "
                "train, validation and test"
            )
    if own.template != embedded.template and not any(files) and not any(map(embedded.takes_template, own.families)):
        taking = ", ".join(filter(embedded.takes_template, embedded.families))
        raise FairDiffError(
            f"prompts.template: found {own.template!r}, but {', '.join(own.families)} have words of their own; allowed: "
            f"with the family {taking}, or a file of subjects"
        )


def different_first(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts in an order in which each group has its first prompt before any group has its second.

    Prompts of one group show the same people, but an interval over prompts treats them as different.
    """
    met: Counter[str] = Counter()
    ranks = []
    for prompt in prompts:
        ranks.append(met[prompt.group] if prompt.group else 0)
        met[prompt.group] += 1
    return [prompt for _, prompt in sorted(zip(ranks, prompts, strict=True), key=lambda pair: pair[0])]


def shuffled(prompts: list[Prompt]) -> list[Prompt]:
    """A fixed pseudo-random order; copies of a prompt (`prompts.families`) are spread over it."""
    copies: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        copy = f" #{copies[prompt.text]}" if copies[prompt.text] else ""
        copies[prompt.text] += 1
        keys.append(hashlib.sha256((prompt.text + copy).encode()).hexdigest())
    return [prompt for _, prompt in sorted(zip(keys, prompts, strict=True), key=lambda pair: pair[0])]


def write_targets(config: Config) -> Path:
    """Write the new file `target.file`: a row for each subject of a training, with the shares of `target`."""
    file = config.target["file"]
    if not file or Path(file).suffix != ".csv" or Path(file).exists():
        raise FairDiffError(f"target.file: found {file}, allowed: the name of a new file that ends in .csv")
    plan = make_plan(replace(config, target=config.target | {"file": None}))
    subjects = dict.fromkeys(p.subject for p in [*plan.train, *plan.validation, *plan.audit] if p.people)
    write_text(Path(file), table_to_fill_in(subjects, {name: config.target[name] for name in config.attributes}))
    return Path(file)


def _written_target(config: Config, embedded: PromptSet) -> WrittenTarget | None:
    """The content of `target.file`; FairDiffError if `target.<attribute>` is set for an attribute that it covers."""
    file = config.target["file"]
    if file is None:
        return None
    classes = {name: [normalize("NFC", cls) for cls in own.classes] for name, own in config.attributes.items()}
    known = embedded.target_file(file)
    written = (
        read_target(known, classes, set(embedded.attributes) - set(classes)) if known else read_target(file, classes)
    )
    for name in written.attributes:
        shares = config.target[name]
        if max(shares.values()) - min(shares.values()) > 0.01:  # .333, .333, .334 are equal shares
            equal = " ".join(f"target.{name}.{cls}={1 / len(shares):.9g}" for cls in shares)
            raise FairDiffError(
                f"target.{name}: found {config.target[name]} (yours or the experiment's), but {written.source} sets its "
                f"shares too; allowed: one of them, or equal shares here: {equal}"
            )
    return written


def _targets(
    config: Config, written: WrittenTarget | None, prompts: list[Prompt], named: dict[Prompt, Prompt]
) -> Targets:
    """The target of every given prompt of people. Attributes that no file covers are independent of the others.

    named: prompts with a class in words. Their target is that of the same prompt without it, conditioned on this class.
    """
    usual = _usual_targets(config, written, prompts)
    rows = {}
    for prompt, plain in named.items():
        name, _, cls = prompt.names.partition(".")
        rows[prompt.text] = usual.of(plain.text).given(name, config.attributes[name].classes.index(cls))
    return Targets(usual.common, usual.rows | rows)


def _usual_targets(config: Config, written: WrittenTarget | None, prompts: list[Prompt]) -> Targets:
    covered = () if written is None else written.attributes
    rest = [name for name in config.attributes if name not in covered]
    marginals = {name: [float(config.target[name][c]) for c in config.attributes[name].classes] for name in rest}
    with blame("target"):
        free = Target.from_marginals(marginals)
    if written is None:
        return Targets(free)
    if written.key is None:
        return Targets(written.targets[""].times(free, *config.attributes))
    people = [prompt for prompt in prompts if prompt.people]
    written.require(people)
    different = {id(target): target for target in map(written.of, people)}  # equal rows of a table have one
    full = {key: target.times(free, *config.attributes) for key, target in different.items()}
    return Targets(None, {prompt.text: full[id(written.of(prompt))] for prompt in people})


def _target_lines(config: Config, written: WrittenTarget | None) -> list[str]:
    covered = () if written is None else written.attributes
    lines = [] if written is None else [f"{', '.join(covered)}: as in {config.target['file']}"]
    for name in config.attributes:
        if name not in covered:
            lines.append(f"{name}: " + ", ".join(f"{cls} {share:g}" for cls, share in config.target[name].items()))
    return lines
