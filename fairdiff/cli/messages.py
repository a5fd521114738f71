"""Turn an error into one line that says what is allowed, and name the replacements of old keys."""

import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import get_origin

from omegaconf import OmegaConf

from fairdiff.config import AttributeConfig, Config
from fairdiff.errors import FairDiffError

_PACKAGE = Path(__file__).resolve().parent.parent
_TOP = _PACKAGE.parent / "conf"  # its place in a clone; a wheel has it in the package
CONF = str(_TOP if _TOP.is_dir() else _PACKAGE / "conf")
OWN_ATTRIBUTE = (
    "; an attribute of one's own is a file like conf/attribute/gender.yaml in a folder `attribute` of one's own folder, "
    "chosen with --config-dir <that folder> 'attribute=[<its name>]'"
)


KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}  # OmegaConf's words for a type
_MICRO = "micro_batch, which sets decoding, replay and audit"
_LITERAL = "nothing, it is only measured, by scripts/bench.py"
# Old keys, and old choices of files (those with "="), with their replacements; each is kept for one release
RENAMED = {
    "adapter.alpha": "adapter.rank, which alpha always equals",
    "audit.batch_size": _MICRO,
    "audit.judge=": "judge@audit.judge=net, hf or open_clip",
    "audit.judge.paths": "audit.judge.path={<attribute>: <path>}",
    "audit.unrelated_images": "audit.images_per_prompt, of which prompts without people have 16 or fewer",
    "audit.unrelated_prompts": "audit.without_people",
    "audit/judge": "judge@audit.judge=net, hf or open_clip",
    "checkpoint_every": "nothing, a checkpoint is written every 10 steps",
    "decode_batch": _MICRO,
    "detector=portraits": "detector=mtcnn",
    "experiment=debias": "experiment=gender",
    "features=": "model=sd15 for photographs, or features.clip, features.encoder, features.identity",
    "gradient=": "gradient.type=unit, reference or solver, and gradient.evaluations",
    "gradient.detach": _LITERAL,
    "gradient.last": _LITERAL,
    "gradient.type=autograd": _LITERAL,
    "gradient.type=truncated": _LITERAL,
    "judge.paths": "judge.path={<attribute>: <path>}",
    "judge=embedded": "judge=net",
    "loss.balance={": "loss.align, loss.image, loss.face, which are shares with loss.balance=true",
    "loss.balance.align": "loss.align, a share with loss.balance=true",
    "loss.balance.face": "loss.face, a share with loss.balance=true",
    "loss.balance.image": "loss.image, a share with loss.balance=true",
    "loss.draws": "nothing, there are 256 where transport is not exact",
    "optimizer=": "optimizer.schedule, optimizer.weight_decay, optimizer.ema of AdamW, the only one",
    "optimizer.max_grad_norm": "nothing, gradients are not clipped",
    "optimizer.warmup": "nothing, optimizer.schedule begins at the full rate",
    "prompts=": "prompts.families, or files as prompts.train, prompts.validation, prompts.test",
    "prompts.train_limit": "prompts.train, a file of fewer",
    "replay_batch": _MICRO,
    "sampler=": "model=portraits or sd15, or sampler.guidance, sampler.audit_steps and the like",
    "target.joint": "target.file, a YAML file that holds the same",
    "target.relaxation": "nothing, shares in between are written as target.<attribute> or in target.file",
    "validation.sampler_steps": "sampler.audit_steps",
}


def instead(override: str) -> str:
    """Return "; in its place: ..." for an old override, "" for any other."""
    for old, new in RENAMED.items():
        if f"{override}=".startswith(old if "=" in old else (f"{old}=", f"{old}.")):
            return f"; in its place: {new}"
    return ""


def like(key: str) -> str:
    """Return "; allowed: ..." for an unknown key: its replacement, or the most similar keys, or all keys of its section."""
    if new := instead(key):
        return new
    *path, last = key.split(".")
    if path[:1] == ["target"]:
        file = Path(CONF, "attribute", f"{path[-1]}.yaml")
        classes = OmegaConf.load(file).attributes[path[-1]].classes if len(path) == 2 and file.exists() else []
        known = ", ".join(".".join([*path, name]) for name in classes)
        return f"; allowed: {known or 'target.<attribute>.<class> of the attributes in attribute=[...], target.file'}"
    if path[:1] == ["attributes"]:
        known = [f.name for f in fields(AttributeConfig)]
        close = [] if last in known else get_close_matches(last, known, 3, 0.6)
        return f"; allowed: {', '.join('.'.join([*path, name]) for name in close)}" if close else OWN_ATTRIBUTE
    here: type = Config
    for i, name in enumerate([*path, last]):
        kinds = {f.name: f.type for f in fields(here)} if is_dataclass(here) else {}
        if get_origin(kinds.get(name)) is dict:  # Hydra appends new keys to a mapping
            rest = [*path, last][i + 1 :] or ["<key>"]
            return f"; a new one is written with a plus, as in +{'.'.join([*path[:i], name, *rest])}=<value>"
        parent, here = here, kinds.get(name, type(None))
    names = [f.name for f in fields(parent)] if is_dataclass(parent) else []
    close = get_close_matches(last, names, 3, 0.6) or names
    return f"; allowed: {', '.join('.'.join([*path, name]) for name in close)}" if names else ""


def one_line(error: Exception) -> str:
    """Return the messages of an error and of its cause on one line, without Hydra's advice."""
    texts = [str(error)]
    cause = error.__cause__
    if cause is not None and not isinstance(error, FairDiffError) and str(cause) not in texts[0]:
        texts.append(str(cause))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    noise = ("Set the environment", "object_type=", "reference_type=", "To append", "provider=", "Config search path")
    keep = [s for s in lines if s and not s.startswith(noise)]
    first = keep[0] if keep else ""
    if key := re.search(r"Could not override '([\w./]+)'", first):
        return f"{key[1]}: there is no such key{like(key[1])}"
    if (file := re.search(r"In '(\w+)/([^']+)'", first)) and f"Key '{file[1]}' not in 'Config'" in keep:
        return f"{file[1]}/{file[2]}.yaml: its first line has to be `# @package _global_`, or it sets keys of {file[1]} only"
    olds = re.findall(r"Error merging override \+*(.+)", first)
    olds += ["=".join(found) for found in re.findall(r"Could not find '(\w+)/(\w+)'", first)]
    olds += [joint.join(found) for joint in "=." for found in re.findall(r"^([\w.]+): found (\w+),", first)]
    for old in olds:
        if new := instead(old):
            return f"{old}: there is no such thing any more{new}"
    group = re.search(r"Could not find '(.+)/([^/']+)'", first)
    if group and keep[1:2] == [f"Available options in '{group[1]}':"]:
        return f"{group[1]}: found {group[2]}, allowed: {', '.join(keep[2:])}"
    merged = re.fullmatch(r"Error merging override \+*([^=]+)=.*", first)
    wrong = r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)"
    if merged and (value := re.search(wrong, " ".join(keep[1:]))):
        return f"{merged[1]}: found {value[1]}, allowed: {KINDS.get(value[2], value[2])}"
    if "not a subclass of AttributeConfig" in "".join(keep):
        return keep[0].split(";")[0] + OWN_ATTRIBUTE
    if "Config. value" in "".join(keep):
        keep.append("its keys are set one by one")
    if group := re.search(r"Could not load '(\w+)/([^']+)'", first):  # Hydra lists no options for lists
        known = ", ".join(sorted(p.stem for p in Path(CONF, group[1]).glob("*.yaml")))
        return f"{group[1]}: found {group[2]}, allowed: {known}, or a file of --config-dir"
    return "; ".join(keep)
