"""The experiments and the models compose into valid configurations, and say what the paper says."""

import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_judges import uncalibrated

from fairdiff import builder
from fairdiff.cli.main import CONF, to_config
from fairdiff.config import Config
from fairdiff.describe import most_originals
from fairdiff.errors import FairDiffError
from fairdiff.files import flat
from fairdiff.plan import Plan, make_plan, shuffled
from fairdiff.portraits import occupations

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

EXPERIMENTS = {  # images a step, how sure of the original's class, attributes: the paper's; adapter
    "gender": (24, 0.9, ["gender"], "lora"),
    "gender_tokens": (24, 0.9, ["gender"], "soft_tokens"),
    "race": (32, 0.9, ["race"], "lora"),
    "gender_race": (32, 0.8, ["gender", "race"], "lora"),
    "gender_race_age": (40, 0.75, ["gender", "race", "age"], "lora"),
    "multi_concept": (40, 0.8, ["gender", "race"], "lora"),
}
PAPER = {  # image weight, face weight, steps of the released configurations
    "gender": (8, 1, 10_000),
    "gender_tokens": (8, 1, 10_000),
    "race": (6, 0.1, 12_000),
    "gender_race": (8, 0.1, 15_000),
    "gender_race_age": (8, 0.1, 15_000),
    "multi_concept": (8, 0.1, 15_000),
}
FORCED = {  # every key that differs between models, beside those of what looks at the images, see LOOKS
    "model.path", "model.device", "model.dtype", "model.sampling_dtype",
    "sampler.guidance", "sampler.train_steps", "sampler.audit_steps", "sampler.final_sigmas",
    "adapter.learning_rate", "adapter.rank", "steps",
    "gradient.type",  # how the steps weigh depends on how many the sampler has
    "validation.floor",  # what is compared, on the encoders
    "optimizer.schedule",  # how the rate falls depends on the number of steps
    "detector.input_size", "detector.crop_size", "micro_batch",  # pixels, memory
}  # fmt: skip
LOSSES = ("balanced", "balanced_faces", "balanced_tokens", "paper")
LOOKS = ("judge.", "features.", "audit.judge.")


def configure(*overrides: str) -> Config:
    with initialize_config_dir(CONF, version_base="1.3"):
        return to_config(compose("config", list(overrides)))


def planned(*overrides: str) -> Plan:
    return make_plan(configure(*overrides))


@pytest.mark.parametrize("model", ["portraits", "sd15"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_with_every_model(name, model):
    config = configure(f"model={model}", f"experiment={name}", *(["judge.path=x"] if model == "sd15" else []))
    batch, sure, attributes, adapter = EXPERIMENTS[name]
    assert (config.global_batch, config.loss.confident_class) == (batch, sure)
    image, face = {"soft_tokens": (17, 8), "lora": (40, 30)}[adapter]
    total = 75 + image + face
    assert config.loss.shares == pytest.approx({"align": 75 / total, "image": image / total, "face": face / total})
    assert list(config.attributes) == attributes and config.adapter.type == adapter
    assert config.noise_pool >= batch
    if adapter == "soft_tokens":
        assert config.adapter.tokens == 5
    else:
        assert config.adapter.parts == ["text_encoder", "unet"]
    uniform = {a: {c: 1 / len(t.classes) for c in t.classes} for a, t in config.attributes.items()}
    target = uniform | ({"age": {"young": 0.75, "old": 0.25}} if "age" in attributes else {})
    assert {a: config.target[a] for a in attributes} == target
    assert config.attributes[attributes[0]].keep_outside == (0.2 if attributes[0] == "gender" else 0.6)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_small_delta_and_a_model_changes_only_what_it_forces(name):
    lines = (Path(CONF) / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert len(lines) <= 10 and any("Shen et al." in line for line in lines)
    here, there = (flat(asdict(configure(f"model={m}", f"experiment={name}"))) for m in ("portraits", "sd15"))
    differ = {key for key in here | there if here.get(key) != there.get(key)}
    assert {key for key in differ if not key.startswith(LOOKS)} <= FORCED


def test_sd15_is_what_the_paper_says():
    config = configure("model=sd15", "experiment=gender", "judge.path=x")
    sampler = config.sampler
    assert (sampler.train_steps, sampler.audit_steps, sampler.guidance) == ([19, 23], 30, 7.5)
    assert config.adapter.learning_rate == 5e-5 and config.adapter.rank == 50
    assert config.model.padding == "max_length"  # as pipelines do
    assert (config.detector.type, config.detector.input_size, config.detector.crop_size) == ("mtcnn", 256, 224)
    assert config.judge.type == "hf" and config.judge.path == "x" and config.features.clip.startswith("ViT-H-14/")
    labels = [label for labels in config.judge.mapping["race"].values() for label in labels]
    assert len(labels) == 7 and len(config.judge.mapping["race"]) == 4
    assert configure("model=sd15", "sampler.audit_steps=8").sampler.audit_steps == 8  # the user's value wins


def test_the_gradient_is_the_users_then_the_models_then_the_adapters():
    def found(*overrides):
        return configure(*overrides).gradient.type

    assert found("adapter=soft_tokens") == "unit"
    assert found() == found("experiment=gender") == "solver"
    assert found("adapter=lora_text") == found("adapter=lora_unet") == found("adapter=lora_both") == "solver"
    assert found("model=sd15", "adapter=lora_text") == found("model=sd15", "experiment=gender") == "unit"
    for own in (["adapter=lora_text"], ["experiment=gender"], ["model=sd15", "adapter=lora_text"]):
        assert found(*own, "gradient.type=reference") == "reference"
        assert configure(*own).gradient.evaluations == 1
        assert configure(*own, "gradient.evaluations=null").gradient.evaluations is None


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_experiments_have_its_settings_on_stable_diffusion(name):
    config, plain = configure(f"experiment=paper_{name}", "judge.path=x"), configure(f"experiment={name}")
    loss = config.loss
    assert (loss.image, loss.face, config.steps) == PAPER[name] and loss.align == 1 and not loss.shares
    assert (loss.confidence, loss.confident_class) == (0.8, EXPERIMENTS[name][1])
    assert not loss.class_weights and loss.originals == 1
    assert config.model.path.endswith("stable-diffusion-v1-5") and config.sampler.train_steps == [19, 23]
    assert (config.gradient.type, config.gradient.evaluations) == ("unit", None)
    assert config.model.padding == "longest"  # as its code does
    assert config.prompts.per_step == 1 and config.prompts.without_people == 0
    assert (config.global_batch, config.target, config.attributes) == (plain.global_batch, plain.target, plain.attributes)
    optimizer = config.optimizer
    assert (optimizer.schedule, optimizer.weight_decay, optimizer.ema) == ("constant", 0.01, 0.996)
    adapter = config.adapter
    assert adapter.learning_rate == 5e-5 and adapter.type == EXPERIMENTS[name][3]
    assert adapter.tokens == 5 if adapter.type == "soft_tokens" else (adapter.parts, adapter.rank) == (["text_encoder"], 50)
    lines = (Path(CONF) / "experiment" / f"paper_{name}.yaml").read_text().splitlines()
    assert len(lines) <= 12 and "Shen et al. 2024" in lines[1]


@pytest.mark.slow
def test_what_a_loss_file_says_is_what_runs_with_every_adapter_and_model():
    """Only the share of images with a reference image depends on the model."""
    files = {kind: OmegaConf.to_container(OmegaConf.load(Path(CONF) / "loss" / f"{kind}.yaml")) for kind in LOSSES}
    for kind in LOSSES:
        below = files["balanced"] if files[kind].pop("defaults", None) == ["balanced", "_self_"] else {}
        written = below | files[kind] | {"originals": 0.25}
        for adapter in ("soft_tokens", "lora_text", "lora_unet", "lora_both"):
            for model in ("portraits", "sd15"):
                own = [f"loss={kind}", f"adapter={adapter}", f"model={model}", "judge.path=x"]
                assert asdict(configure(*own).loss) == written
                assert asdict(configure(*own, "experiment=gender").loss) == written
    assert configure("loss=paper", "loss.image=.5").loss.image == 0.5


def test_the_face_term_has_a_larger_share_with_the_unet_unless_the_user_chooses_a_loss():
    def face(*overrides):
        return configure(*overrides).loss.face

    assert face("adapter=lora_text") == face("adapter=soft_tokens") == 0.08
    assert face() == face("adapter=lora_unet") == face("model=sd15", "judge.path=x", "adapter=lora_both") == 0.3
    assert face("loss=balanced") == 0.08 and face("loss.face=.1") == 0.1
    assert face("loss=paper") == face("experiment=paper_gender", "adapter=lora_both", "judge.path=x") == 1


def test_a_term_that_is_left_out_leaves_its_share_to_the_others():
    def loss(*overrides):
        return configure("adapter=lora_text", *overrides).loss

    assert loss("loss.face=null").shares == pytest.approx({"align": 75 / 115, "image": 40 / 115})
    assert loss("loss.face=0").shares == loss("loss.face=null").shares  # measured only
    assert loss("loss.face=0").weights == {"align": 1, "image": 1, "face": 0}
    assert loss("loss.image=.75").shares["image"] == pytest.approx(75 / 158)
    assert loss("loss=paper").shares == {} and loss("loss=paper").weights == {"align": 1, "image": 8, "face": 1}


def test_batches_are_the_users_then_the_experiments():
    def batch(*overrides):
        config = configure(*overrides)
        return config.prompts.per_step, config.global_batch

    assert batch() == batch("adapter=lora_unet") == batch("model=sd15") == (1, 24)
    assert batch("experiment=gender_race") == batch("experiment=gender_race", "adapter=soft_tokens") == (1, 32)
    assert batch("prompts.per_step=2", "global_batch=12") == (2, 12)


@pytest.mark.parametrize("detector", ["mtcnn", "whole", "insightface"])
@pytest.mark.parametrize("judge", ["net", "hf", "open_clip"])
def test_every_judge_and_detector_can_be_chosen_for_training_and_audit(judge, detector):
    for model in ("portraits", "sd15"):
        chosen = [f"model={model}", f"judge={judge}", f"judge@audit.judge={judge}", f"detector={detector}"]
        config = configure(*chosen, "detector.root=x")
        assert config.judge == config.audit.judge and config.judge.type == judge and config.detector.type == detector
        size = {"portraits": (64, 64), "sd15": (256, 224)}[model]  # of the model's images, whoever finds the faces
        assert (config.detector.input_size, config.detector.crop_size) == size
    assert configure("audit.judge.path=x").audit.judge.path == "x"


def test_families_stand_in_training_as_often_as_asked_and_once_in_the_audit():
    config = configure("experiment=multi_concept", "audit=full", "prompts.named=0")
    train_prompts, test = make_plan(config).train, make_plan(config).audit
    each = len(occupations.prompts("styled", "train"))
    for family, repeats in config.prompts.families.items():
        texts = [p.text for p in train_prompts if p.family == family]
        assert len(texts) == repeats * len(set(texts)) == repeats * len(occupations.prompts(family, "train"))
        assert 0.95 <= len(texts) / each <= 1.05  # equally often
        assert [p.family for p in test].count(family) == len(occupations.prompts(family, "test"))
    assert sum(not p.people for p in train_prompts) / len(train_prompts) == pytest.approx(0.1, abs=0.01)
    assert len({p.text for p in test}) == len(test)
    assert {p.family for p in train_prompts[:60]} == {*config.prompts.families, "object"}  # copies are spread
    few = planned("experiment=multi_concept", "audit.prompts=3").audit
    assert [p.family for p in few] == [f for f in config.prompts.families for _ in range(3)]


@pytest.mark.parametrize("which", ["test", "validation"])
def test_an_audit_takes_its_split_and_each_occupation_before_any_second_title_of_one(which):
    rows = {occupations.occupation_of(p.subject) for p in occupations.prompts("occupation", which)}
    first = planned(f"audit.split={which}", f"audit.prompts={len(rows)}")
    assert {occupations.occupation_of(p.subject) for p in first.audit} == rows
    every = planned(f"audit.split={which}", "audit.prompts=null").audit
    assert len(every) == len(occupations.prompts("occupation", which)) > len(rows)
    assert first.without_people and {occupations.split(p.subject) for p in first.without_people} == {which}
    assert planned().validation == () and len(planned("validation.every=5").validation) == 10


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_prompts_without_people_are_trained_on_and_audited_apart_and_never_the_same_ones(share):
    plan = planned(f"prompts.without_people={share}", "validation.every=5")
    trained = [p for p in plan.train if not p.people]
    assert len(trained) / len(plan.train) == pytest.approx(share, abs=0.002)
    assert {p.text for p in trained} == {p.text for p in occupations.prompts("object", "train")}
    assert plan.validation and all(p.people for p in [*plan.validation, *plan.audit])
    audited = plan.without_people
    assert len(audited) == 6 and not {p.text for p in audited} & {p.text for p in trained}
    assert len(planned("audit.without_people=2").without_people) == 2


@pytest.mark.parametrize("own", [["prompts.without_people=0"], ["loss.image=null"], ["loss.image=0"]])
def test_without_an_image_term_or_a_share_every_training_prompt_shows_people(own):
    assert all(p.people for p in planned(*own).train)


def test_a_file_has_its_own_prompts_without_people_or_some_of_the_worlds(tmp_path):
    """The column `people` distinguishes them, whatever their family."""
    file = tmp_path / "own.csv"
    more = "".join(f"a photo of a baker of {n} cakes,occupation,\n" for n in range(44))
    file.write_text("prompt,family,people\na photo of a baker,occupation,yes\na photo of a red teapot,pots,No\n" + more)
    plan = planned(f"prompts.test={file}", f"prompts.train={file}", "audit.prompts=null", "prompts.named=0")
    assert all("baker" in p.text for p in plan.audit) and len(plan.audit) == 45
    assert [p.text for p in plan.without_people] == ["a photo of a red teapot"]
    assert [p.text for p in plan.train if not p.people] == ["a photo of a red teapot"]
    file.write_text("prompt,family,people\na photo of a baker,occupation,yes\n" + more)
    plan = planned(f"prompts.test={file}", f"prompts.train={file}", "prompts.named=0")
    joined = [p for p in plan.train if not p.people]
    assert len(joined) == 5 and {p.text for p in joined} < {p.text for p in occupations.prompts("object", "train")}
    assert {p.text for p in plan.without_people} < {p.text for p in occupations.prompts("object", "test")}


def test_prompts_that_name_a_class_are_the_first_audited_ones_with_each_class_in_words():
    plan = planned("experiment=gender_race", "audit.named=2")
    assert [p.names for p in plan.named[:4]] == ["gender.female"] * 2 + ["gender.male"] * 2 and len(plan.named) == 2 * (2 + 4)
    subject = plan.audit[0].subject
    assert plan.named[0].text.endswith(f"{subject}, a woman") and plan.named[4].text.endswith(f"{subject}, a White person")
    assert plan.audit[0].text == plan.named[0].text.replace("a woman", "a person") and plan.named[0].subject == subject
    assert planned("audit.named=null").named == ()
    for wrong in ("attributes.gender.phrases.female=3", "+attributes.gender.phrases.other=x"):
        with pytest.raises(FairDiffError, match=r"attributes.gender.phrases"):
            planned(wrong)


def test_a_share_of_the_training_prompts_names_a_class_which_is_their_target():
    plan = planned("experiment=gender_race", "prompts.named=.3", "target.race.White=.7", "target.race.Black=.3",
                   "target.race.Indian=0", "target.race.Asian=0")  # fmt: skip
    named = [p for p in plan.train if p.names]
    assert len(named) / len(plan.train) == pytest.approx(0.3, abs=0.01)
    assert sum(not p.people for p in plan.train) / len(plan.train) == pytest.approx(0.1, abs=0.01)
    usual = {p.text for p in plan.train if p.people and not p.names}
    counts = Counter(p.names for p in named)
    assert len(counts) == 6 and max(counts.values()) - min(counts.values()) <= 1
    assert len({p.text for p in named}) == len(named)
    for prompt in named:
        name, cls = prompt.names.split(".")
        assert prompt.text.split(", ")[0] + ", a person" in usual
        target = plan.targets.of(prompt.text)
        assert target.marginal(name)[plan.attributes[name].index(cls)] == pytest.approx(1)
        other = {"gender": "race", "race": "gender"}[name]
        assert target.marginal(other) == pytest.approx([0.5, 0.5] if other == "gender" else [0.7, 0.3, 0, 0])
    assert plan.targets.of(next(iter(usual))).marginal("gender") == pytest.approx([0.5, 0.5])
    assert not any(p.names for p in planned("prompts.named=0").train)
    assert not any(p.names for p in planned("~attributes.gender.phrases.female", "~attributes.gender.phrases.male").train)


def test_prompts_of_a_file_that_name_a_class_are_not_taken_twice(tmp_path):
    (tmp_path / "own.txt").write_text("a photo of a nurse, a person\na photo of a nurse, a woman\n")
    own = [f"prompts.{split}={tmp_path / 'own.txt'}" for split in ("train", "test")]
    plan = planned(*own, 'prompts.template="{}"', "prompts.without_people=0")
    for prompts in (plan.train, [*plan.audit, *plan.named]):
        texts = [prompt.text for prompt in prompts]
        assert len(texts) == len(set(texts))
    assert plan.targets.of("a photo of a nurse, a woman").marginal("gender") == pytest.approx([0.5, 0.5])


def test_published_settings_name_no_class_in_training():
    published = [f"paper_{name}" for name in EXPERIMENTS]
    assert all(configure(f"experiment={name}", "judge.path=x").prompts.named == 0 for name in published)


def test_trigger_words_are_audited_beside_other_families_and_never_trained_on():
    plan = planned("+prompts.families.trigger=1", "audit.prompts=5")
    assert [p.family for p in plan.audit] == ["occupation"] * 5 + ["trigger"] * 5
    assert plan.train == planned().train and plan.not_held_out == []
    alone = make_plan(configure("+prompts.families.trigger=1", "~prompts.families.occupation", "audit.prompts=null"), False)
    assert len(alone.audit) == len(occupations.TRIGGERS) and alone.train == ()
    with pytest.raises(FairDiffError, match=r"prompts.train: .*no prompt of people"):
        planned("+prompts.families.trigger=1", "~prompts.families.occupation")


def test_prompts_of_one_group_follow_those_of_others(tmp_path):
    """The column `group` of a file marks prompts that show the same people."""
    file = tmp_path / "own.csv"
    rows = "".join(f"{word} {n},{group}\n" for group, word in (("bakes", "baker"), ("", "cook")) for n in range(6))
    file.write_text("subject,group\n" + rows)
    audited = planned(f"prompts.test={file}", "audit.prompts=null").audit
    assert [p.group for p in audited].count("bakes") == 6 and len(audited) == 12
    assert [p.group for p in audited[:7]].count("bakes") == 1 and all(p.group for p in audited[7:])


def test_repeats_are_of_a_files_families_too_and_its_audit_asks_each_once(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("prompt,family\n" + "".join(f"a {f} {n},{f}\n" for f in ("sport", "dance") for n in range(20)))
    own = configure("experiment=multi_concept", f"prompts.train={file}", f"prompts.test={file}",
                    "prompts.without_people=0", "prompts.named=0")  # fmt: skip
    families = [p.family for p in make_plan(own).train]
    assert {f: families.count(f) for f in set(families)} == {"sport": 20 * 310, "dance": 20}
    assert [p.family for p in make_plan(own).audit].count("sport") == 20


def test_no_noise_is_met_so_often_that_few_pictures_are_learnt_by_heart():
    """The ratio is the images generated for a prompt over the size of its noise pool; the paper uses every noise once."""
    for overrides in (["experiment=gender"], ["experiment=gender_race_age"], ["adapter=lora_text"], []):
        for model in ("portraits", "sd15"):
            config = configure(f"model={model}", *overrides, *(["judge.path=x"] if model == "sd15" else []))
            visits = config.steps * config.prompts.per_step / len(make_plan(config).train)
            assert visits * config.global_batch / config.noise_pool <= (7 if model == "portraits" else 1)  # as the pages say


def test_the_budget_counts_whole_blocks_of_originals_and_those_of_the_validation():
    few = ["prompts.per_step=2", "steps=5", "global_batch=8", "sampler.train_steps=[6,7]", "loss.originals=1"]

    def most(prompts, *overrides):
        config = configure(*few, *overrides)
        plan = make_plan(config)
        return most_originals(config, replace(plan, train=plan.train[:prompts]))

    assert most(100, "noise_pool=16") == 5 * 2 * 8  # a slice a visit
    assert most(100, "noise_pool=12") == 80  # 8 of 12, never in part
    assert most(4, "steps=50", "noise_pool=20") == 4 * 16  # all pools, each slice with its own length
    watch = ["validation.every=5", "validation.prompts=3", "validation.images=20"]
    assert most(100, *watch, "noise_pool=16") == 80 + 3 * 24
    assert most(100, "noise_pool=16", "loss.originals=.3") == 5 * 2 * 3  # of 8: 3
    assert most(100, *watch, "noise_pool=16", "loss.originals=.3") == 5 * 2 * 3 + 3 * 24  # all that is validated on


def test_limits_count_people_of_each_family(tmp_path):
    file = tmp_path / "own.csv"
    objects = [f"a photo of thing {i},{'baker' if i % 2 else 'thing'},no" for i in range(40)]
    people = [f"a photo of {kind} {i},{kind},yes" for kind in ("baker", "sport") for i in range(4)]
    file.write_text("\n".join(["prompt,family,people", *objects, *people]) + "\n")
    found = planned(f"prompts.test={file}", "audit.prompts=3").audit
    assert [p.family for p in found] == ["baker"] * 3 + ["sport"] * 3


@pytest.mark.parametrize("which", ["train", "validation", "test"])
def test_a_split_without_people_is_refused(tmp_path, which):
    file = tmp_path / "own.csv"
    file.write_text("prompt,people\na photo of a red teapot,no\n")
    with pytest.raises(FairDiffError, match=f"prompts.{which}: found .*own.csv with no prompt of people"):
        planned(f"prompts.{which}={file}", *(["validation.every=10"] if which == "validation" else []))


@pytest.mark.parametrize("gap", ["{}", "{subject}"])
def test_whole_prompts_of_ones_own_leave_the_worlds_as_they_are(tmp_path, gap):
    file = tmp_path / "own.txt"
    file.write_text("a photo of a baker in Paris\n")
    plan = planned(f"prompts.train={file}", f'prompts.template="{gap}"', "prompts.named=0")
    assert [p.text for p in plan.train if p.people] == ["a photo of a baker in Paris"]
    assert plan.audit == planned().audit


def test_one_family_stays_in_the_order_it_always_had():
    plain = planned("prompts.without_people=0", "prompts.named=0").train
    assert [p.subject for p in plain[:3]] == [p.subject for p in shuffled(occupations.prompts("occupation", "train"))[:3]]
    again = planned("prompts.families.occupation=3", "prompts.without_people=0", "prompts.named=0").train
    firsts = list(dict.fromkeys(p.text for p in again))
    assert len(again) == 3 * len(plain) and set(firsts) == {p.text for p in plain}


def test_a_model_saved_with_another_solver_gets_a_linear_one(tiny_folder, tmp_path):
    """Stable Diffusion 1.5 comes with PNDM, which is not linear and is never used."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    pipeline.save_pretrained(tmp_path)
    model = builder.build_model(configure("model=sd15", f"model.path={tmp_path}", "model.device=cpu"))
    assert type(model.scheduler) is DPMSolverMultistepScheduler and model.padding == "max_length"
    assert (
        model.scheduler.config.timestep_spacing == "linspace"
        and model.scheduler.config.final_sigmas_type == "sigma_min"
    )
    assert model.scheduler.config.beta_schedule == "scaled_linear"


@pytest.mark.slow
def test_one_step_on_several_families_with_an_audit_of_each(tmp_path, monkeypatch):
    small = [
        "steps=1", "global_batch=16", "sampler.train_steps=[2,2]", "sampler.audit_steps=2", "gradient.evaluations=1",
        "audit.prompts=1", "audit.images_per_prompt=4", "audit.named=1", "audit.without_people=1",
        "cache=null", "detector=whole", f"audit.judge.path={uncalibrated(tmp_path / 'judge')}", "model.device=cpu",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=multi_concept", *small, f"hydra.run.dir={tmp_path / 'run'}"])
    train.task()
    (folder,) = (tmp_path / "run" / "audits").iterdir()
    audit = json.loads((folder / "audit.json").read_text())
    families = ["occupation", "styled", "descriptor", "sport"]
    assert list(audit["models"]["after"]["families"]) == families == list(audit["paired"]["families"])
    assert all(torch.isfinite(torch.tensor(entry["attributes"]["gender"]["bias"]["mean"]))
               for entry in audit["models"]["before"]["families"].values())  # fmt: skip
    assert "descriptor: gender bias" in (folder / "report.html").read_text()


def test_audited_prompts_that_are_trained_on_are_known_whatever_stands_around_them(tmp_path):
    for plan in (planned("experiment=multi_concept"), planned()):
        assert plan.not_held_out == []
    held_out = planned().audit[0].subject
    (tmp_path / "own.txt").write_text(f"{held_out.title()}\nastronaut\n")
    own = planned(f"prompts.train={tmp_path / 'own.txt'}", 'prompts.template="a portrait of {a} {}"', "audit=full")
    assert own.not_held_out == replace(own, audit=planned().audit).not_held_out == [held_out]


def test_prompts_that_lose_their_end_behind_the_soft_tokens_are_known(tiny_model):
    short, long = " ".join("a" * 33), " ".join("a" * 38)  # and a token at either end, of 40 that the tiny model reads
    assert tiny_model.overlong("", [short, long]) == []
    assert tiny_model.overlong("a a a ", ["a", short, long]) == [long]
