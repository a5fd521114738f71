"""What is asked of a run, read off its configuration: the prompts of each split and the target of every prompt."""

import hashlib
from collections import Counter

from fairdiff.config import Config
from fairdiff.errors import FairDiffError, blame
from fairdiff.objective.target_files import WrittenTarget, inline_target, read_target
from fairdiff.objective.targets import Target, Targets
from fairdiff.portraits import labour, world
from fairdiff.prompts import Prompt, fill, read_prompts, takes_whole


def prompts(config: Config, which: str, limit: int | None = None) -> list[Prompt]:
    """Training, validation or test prompts in a fixed shuffle: the user's file, or families of the embedded world.

    In training a family's prompts stand as often as `prompts.families` says, a file's too, and the share
    `prompts.without_people` of all shows no people. Else each stands once, family by family, `limit` of each (None: all).
    Validation and test are of people: prompts without people are `unrelated`.
    """
    families = _families(config, which)
    people = [[prompt for prompt in some if prompt.people] for some in families.values()]
    if which == "train":
        found = shuffled([prompt for some in people for prompt in some])[: config.prompts.train_limit]
        found = shuffled(found + _without_people(config, families.get("object", []), len(found)))
    else:
        found = [prompt for some in people for prompt in different_first(shuffled(some))[:limit]]
    if not any(prompt.people for prompt in found):
        file = getattr(config.prompts, which)
        raise FairDiffError(f"prompts.{which}: found {file} with no prompt of people, allowed: one or more")
    return found


def validated(config: Config) -> list[Prompt]:
    """The prompts that training validates on, [] without validation."""
    return prompts(config, "validation", config.validation.prompts) if config.validation.every else []


def audited(config: Config) -> list[Prompt]:
    """The prompts of people that are audited: of the split `audit.split`."""
    return prompts(config, config.audit.split, config.audit.prompts)


def _without_people(config: Config, own: list[Prompt], people: int) -> list[Prompt]:
    """Training prompts that show nobody, beside so many of people: the file's own, or enough of the world's.

    None without an image term, the only thing they learn.
    """
    share = config.prompts.without_people
    if not config.loss.image or not share:
        return []
    if own:
        return own
    some = world.prompts("object", "train")
    count = round(people * share / (1 - share))
    return [some[i % len(some)] for i in range(count)]


def different_first(prompts: list[Prompt]) -> list[Prompt]:
    """The same prompts so that each occupation has its first title before any has its second.

    Titles of one occupation show the same people: prompts of different ones are what an interval over prompts takes them for.
    """
    met: Counter[int] = Counter()
    ranks = []
    for prompt in prompts:
        row = world.occupation_of(prompt.subject)
        ranks.append(0 if row is None else met[row])
        met[row] += 1
    return [prompt for _, prompt in sorted(zip(ranks, prompts, strict=True), key=lambda pair: pair[0])]


def unrelated(config: Config) -> list[Prompt]:
    """Audited prompts without people, which an adapter must leave as they are: the file's own, or the world's."""
    split = config.audit.split
    own = _families(config, split).get("object", []) if getattr(config.prompts, split) else []
    return (own or world.prompts("object", split))[: config.audit.unrelated_prompts]


def not_held_out(trained: list[Prompt], audited: list[Prompt]) -> list[str]:
    """The subjects of audited prompts that are also trained on, in whatever words around them."""
    subjects = {prompt.subject.casefold() for prompt in trained}
    return [prompt.subject for prompt in audited if prompt.subject.casefold() in subjects]


def _families(config: Config, which: str) -> dict[str, list[Prompt]]:
    """The prompts of a split by family; in training each as often as asked."""
    path, template = getattr(config.prompts, which), config.prompts.template
    _check_template(config)
    families: dict[str, list[Prompt]] = {}
    if path:
        for prompt in read_prompts(path, template, key=f"prompts.{which}"):
            families.setdefault(prompt.family, []).append(prompt)
    for family in config.prompts.families:
        if not path:
            families[family] = _of_world(family, which, template)
    if which != "train":
        return families
    return {family: some * config.prompts.families.get(family, 1) for family, some in families.items()}


def _check_template(config: Config) -> None:
    """FairDiffError for a template into which nothing is put."""
    own, template = config.prompts, config.prompts.template
    if template != world.TEMPLATES["occupation"] and not (own.train or own.validation or own.test):
        if "occupation" not in own.families:
            raise FairDiffError(
                f"prompts.template: found {template!r}, but {', '.join(own.families)} have words of their own; allowed: "
                "with the family occupation, or a file of subjects"
            )


def _of_world(family: str, which: str, template: str) -> list[Prompt]:
    """The embedded world's prompts; occupations in the user's template."""
    some = world.prompts(family, which)
    if family == "occupation" and template != world.TEMPLATES[family] and not takes_whole(template):
        return [Prompt(fill(template, p.subject), p.family, p.subject) for p in some]
    return some


def shuffled(prompts: list[Prompt]) -> list[Prompt]:
    """A fixed order that looks random; copies of one prompt (`prompts.families`) are spread over it."""
    copies: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        copy = f" #{copies[prompt.text]}" if copies[prompt.text] else ""
        copies[prompt.text] += 1
        keys.append(hashlib.sha256((prompt.text + copy).encode()).hexdigest())
    return [prompt for _, prompt in sorted(zip(keys, prompts, strict=True), key=lambda pair: pair[0])]


def written_target(config: Config) -> WrittenTarget | None:
    """The content of `target.file` or `target.joint`; FairDiffError if `target.<attribute>` is set for what it covers."""
    file, joint = config.target["file"], config.target["joint"]
    classes = {name: list(attribute.classes) for name, attribute in config.attributes.items()}
    if file is None and joint is None:
        return None
    if file == "labour":
        written = read_target(labour.FILE, classes, set(world.CLASSES) - set(classes))
    else:
        written = inline_target(joint, classes) if file is None else read_target(file, classes)
    for name in written.attributes:
        shares = config.target[name]
        if max(shares.values()) - min(shares.values()) > 0.01:  # .333, .333, .334 are equal shares
            equal = " ".join(f"target.{name}.{cls}={1 / len(shares):.9g}" for cls in shares)
            raise FairDiffError(
                f"target.{name}: found {config.target[name]} (yours or the experiment's), but {written.source} sets its "
                f"shares too; allowed: one of them, or equal shares here: {equal}"
            )
    return written


def targets(config: Config, some: list[Prompt]) -> Targets:
    """The target of every given prompt of people, without relaxation.

    Attributes that no file covers are independent of the rest.
    """
    written = written_target(config)
    covered = () if written is None else written.attributes
    rest = [name for name in config.attributes if name not in covered]
    marginals = {name: [float(config.target[name][c]) for c in config.attributes[name].classes] for name in rest}
    with blame("target"):
        free = Target.from_marginals(marginals)
    if written is None:
        return Targets(free)
    if written.key is None:
        return Targets(written.targets[""].times(free, *config.attributes))
    return Targets(None, {p.text: written.of(p).times(free, *config.attributes) for p in some if p.people})


def target_lines(config: Config) -> list[str]:
    """The target asked for, in words."""
    written = written_target(config)
    covered = () if written is None else written.attributes
    lines = [] if written is None else [f"{', '.join(covered)}: as in {config.target['file'] or 'target.joint'}"]
    for name in config.attributes:
        if name not in covered:
            lines.append(f"{name}: " + ", ".join(f"{cls} {share:g}" for cls, share in config.target[name].items()))
    mixed = config.target["relaxation"]
    if mixed:
        lines.append(
            f"trained towards {mixed:g} of the model's own shares and {1 - mixed:g} of these; audited against these"
        )
    return lines
