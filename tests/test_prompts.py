"""Prompts: articles, templates, files, and one-line errors that name the file and the key."""

import ast
import os
import sys
from pathlib import Path
from unicodedata import normalize

import pytest
from tiny import composed

import fairdiff.prompts
from fairdiff import plan
from fairdiff.describe import warnings
from fairdiff.errors import FairDiffError
from fairdiff.files import MOST_LINES, MOST_MEGABYTES
from fairdiff.plan import make_plan
from fairdiff.prompts import Prompt, fill, read_prompts, with_article

PLAIN = "prompts.named=0"  # training prompts as they are given
SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    "phrase",
    [
        "a nurse",
        "an accountant",
        "an emergency medical technician",
        "an old Black woman",
        "an Asian man",
        "an Indian person",
        "an elderly person",
        "a university professor",
        "an uninvited person",
        "a user",
        "an umpire",
        "an usher",
        "a utility worker",
        "an honest person",
        "a human resources manager",
        "a housekeeper",
        "an hour-keeper",
        "an X-ray technician",
        "a European person",
        "a one-armed person",
        "an only child",
        "an unimportant person",
        "an HR manager",
        "an MRI technician",
        "an NYPD officer",
        "an HVAC technician",
        "an F1 driver",
        "an OB-GYN",
        "an R&B singer",
        "an EU official",
        "an AI researcher",
        "a US senator",
        "a UX designer",
        "a UN peacekeeper",
        "a U-boat captain",
        "a CEO",
        "a NASA engineer",
        "a UNESCO delegate",
        "a UNICEF worker",
        "a NURSE",
        "an ACTOR",
        "a man",
        "a Ukrainian",
        "a Uruguayan",
        "a Ugandan",
        "a Uyghur",
        "a urologist",
        "an urban planner",
        "a ukulele player",
        "a utopian",
        "a usability engineer",
        "an unidentified person",
        "an 18-year-old",
        "an 80-year-old",
        "a 17-year-old",
        "an élite chef",
        'an "old" person',
    ],
)
def test_article_follows_the_sound(phrase):
    assert with_article(phrase.split(" ", 1)[1]) == phrase


def test_an_article_is_chosen_where_the_template_asks_for_it():
    assert fill("a photo of the face of {a} {}, a person", "actor") == "a photo of the face of an actor, a person"
    assert fill("{A} {subject} at a desk", "nurse") == "A nurse at a desk"
    assert fill("{a} {} and {a} {}", "editor") == "an editor and an editor"
    assert fill("{a} young {}", "editor") == "a young editor"  # of the word that follows
    assert fill("a banana {}", "on ice") == "a banana on ice"


@pytest.mark.parametrize(
    "template,subject",
    [
        ("accanto a {}", "operaio"),
        ("una foto accanto a {subject}", "ingegnere"),
        ("il y a {} ici", "ouvrier"),
        ("a {} arca", "orvos"),
        ("a {}", "actor"),
    ],
)
def test_words_that_look_like_an_article_are_left_as_they_are(template, subject):
    assert fill(template, subject) == template.replace("{subject}", "{}").replace("{}", subject)


def test_a_template_whose_article_does_not_suit_is_warned_of(tmp_path, tiny_model):
    (tmp_path / "own.txt").write_text("actor\nnurse\n", encoding="utf-8")
    files = [f"prompts.{split}={tmp_path / 'own.txt'}" for split in ("train", "test")]
    said = warnings(make_plan(composed(PLAIN, *files, 'prompts.template="a portrait of a {}"')), tiny_model, "")
    assert any("1 prompts have the wrong article" in line and "'a portrait of a actor'" in line for line in said)
    said = warnings(make_plan(composed(PLAIN, *files, 'prompts.template="a portrait of {a} {}"')), tiny_model, "")
    assert not any("article" in line for line in said)


def test_fill_does_not_read_the_subject_as_a_template_or_a_pattern():
    assert fill("a photo of {}", r"a {brace} and \1") == r"a photo of a {brace} and \1"


@pytest.mark.parametrize("template", ["a photo", "", "a {occupation}", "a {} {", "a {0}"])
def test_templates_without_a_plain_gap_are_refused(template):
    with pytest.raises(FairDiffError, match=r"^prompts\.template: .*\{\}") as caught:
        fill(template, "nurse")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_lines_end_as_those_of_any_system(tmp_path, name, end):
    path, head = tmp_path / name, ["prompt"] if name.endswith("csv") else []
    path.write_bytes(end.join([*head, "a nurse", "a\ttall\u200dchef", ""]).encode())
    assert [p.text for p in read_prompts(path)] == ["a nurse", "a\ttall\u200dchef"]


@pytest.mark.parametrize("mark", "\u2028 \u2029 \x85 \x0c \x0b \x1c \x1d \x1e \x00 \x1b \x7f \x9f".split(" "))
def test_other_control_characters_are_refused_with_their_line(tmp_path, mark):
    """Python's splitlines ends lines there: four prompts became six, and a table row lost its last columns."""
    for name, text in (
        ("list.txt", f"a nurse\na chef{mark}a baker\n"),
        ("list.csv", f"prompt,family\na chef{mark}a baker,object\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="\n")
        with pytest.raises(FairDiffError, match=rf"{name}, line 2: .* character U\+{ord(mark):04X}"):
            read_prompts(tmp_path / name)


def test_accents_are_read_in_one_form(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / "own.txt").write_text(normalize(form, "infirmière\n"), encoding="utf-8")
        (prompt,) = read_prompts(tmp_path / "own.txt", normalize(form, "à côté de {}"))
        assert prompt == Prompt("à côté de infirmière", "custom", "infirmière")


def test_prompts_that_the_model_reads_as_one_are_warned_of(tmp_path, tiny_model):
    (tmp_path / "own.txt").write_text("a nurse\nA Nurse\na  nurse\na chef\n", encoding="utf-8")
    found = make_plan(composed(f"prompts.test={tmp_path / 'own.txt'}", 'prompts.template="{}"', "audit.without_people=1"))
    (line,) = [line for line in warnings(found, tiny_model, "") if "intervals" in line]
    assert "2 of 5 audited prompts" in line and line.count("nurse") + line.count("Nurse") == 2
    (tmp_path / "train.txt").write_text("A  NURSE\n", encoding="utf-8")
    own = [f"prompts.{split}={tmp_path / name}" for split, name in (("train", "train.txt"), ("test", "own.txt"))]
    assert len(make_plan(composed(*own, 'prompts.template="{}"')).not_held_out) == 3


@pytest.mark.parametrize(
    "family,almost",
    [("Object", "object"), ("objects", "object"), ("Occupation", "occupation"), ("sports", "sport"), ("pair", "pairs")],
)
def test_a_family_that_is_almost_a_known_one_is_refused(tmp_path, family, almost):
    (tmp_path / "own.csv").write_text(f"prompt,family\na nurse,work\na red car,{family}\n", encoding="utf-8")
    with pytest.raises(FairDiffError, match=f"line 3: family: found {family}, allowed: {almost}, or"):
        make_plan(composed("+prompts.families.pairs=2", *(f"prompts.{s}={tmp_path / 'own.csv'}" for s in SPLITS)))


@pytest.mark.parametrize("family", ["subject", "transport", "work", "custom", "pots", "sport"])
def test_a_family_of_ones_own_is_taken(tmp_path, family):
    (tmp_path / "own.csv").write_text(f"prompt,family\na nurse,{family}\n", encoding="utf-8")
    assert make_plan(composed(f"prompts.test={tmp_path / 'own.csv'}")).audit[0].family == family


def test_a_file_is_read_once_whatever_it_is_given_for(tmp_path, monkeypatch):
    """Reading again takes seconds, and the file may have changed or been removed."""
    (tmp_path / "own.csv").write_text("subject,people\nnurse,yes\nchef,yes\nteapot,no\n", encoding="utf-8")
    read = []

    def once(path, *args, **kwargs):
        prompts = read_prompts(path, *args, **kwargs)
        read.append(path)
        Path(path).unlink()
        return prompts

    monkeypatch.setattr(plan, "read_prompts", once)
    found = make_plan(composed(PLAIN, *(f"prompts.{s}={tmp_path / 'own.csv'}" for s in SPLITS), "validation.every=10"))
    assert len(read) == 1 and {p.subject for p in found.audit} == {p.subject for p in found.validation} == {"nurse", "chef"}
    assert [p.subject for p in found.without_people] == ["teapot"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(FairDiffError, match="list.txt: cannot read it: it is a folder, a pipe or a device"):
        read_prompts(tmp_path / "list.txt")


def test_a_file_of_any_size_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "list.csv").open("wb") as file:
        file.truncate((MOST_MEGABYTES + 70) * 10**6)
    with pytest.raises(FairDiffError, match=f"it has {MOST_MEGABYTES + 70} MB, allowed: at most {MOST_MEGABYTES}"):
        read_prompts(tmp_path / "list.csv")
    (tmp_path / "list.txt").write_bytes(b"a\n" * (MOST_LINES + 1))
    with pytest.raises(FairDiffError, match="holds 1,000,001 lines, allowed: 1,000,000"):
        read_prompts(tmp_path / "list.txt")


def test_text_file_with_and_without_template(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\ufeff# people\n\n  a nurse \r\nan actor\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a nurse", "an actor"]
    path.write_text("nurse\nactor\n")
    assert read_prompts(path, "{}") == read_prompts(path)  # a bare gap takes whole prompts
    assert [p.text for p in read_prompts(path, "{a} {}")] == ["a nurse", "an actor"]  # one with an article does not
    assert read_prompts(path, "a photo of {a} {}", "work") == [
        Prompt("a photo of a nurse", "work", "nurse"),
        Prompt("a photo of an actor", "work", "actor"),
    ]


def test_csv_columns(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('prompt,family\n"a nurse, smiling",work\na tree,\n')
    assert read_prompts(path, family="mine") == [
        Prompt("a nurse, smiling", "work", "a nurse, smiling"),
        Prompt("a tree", "mine", "a tree"),
    ]
    path.write_text("subject,women_pct\nactor,47.7\n")
    assert read_prompts(path, "{a} {}, a person") == [Prompt("an actor, a person", "custom", "actor")]
    path.write_text("subject,template\nactor,{a} {}\nnurse,the {}\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["an actor", "the nurse"]
    path.write_text("subject,people,group\nactor,Yes,stage\nteapot,no,\nnurse,,\n")
    assert [(p.subject, p.people, p.group) for p in read_prompts(path, "{a} {}")] == [
        ("actor", True, "stage"), ("teapot", False, ""), ("nurse", True, "")
    ]  # fmt: skip
    path.write_text("prompt,people,group\na red teapot,no,pots\n")
    assert read_prompts(path) == [Prompt("a red teapot", "custom", "a red teapot", people=False, group="pots")]


def test_own_prompts_reach_training_and_audit(tmp_path):
    (tmp_path / "mine.csv").write_text('prompt,family\n"two nurses, smiling",pair\na chef,\n')
    (tmp_path / "held_out.txt").write_text("astronaut\n")
    config = composed(PLAIN, f"prompts.train={tmp_path / 'mine.csv'}", f"prompts.test={tmp_path / 'held_out.txt'}")
    plan = make_plan(config)
    assert {(p.text, p.family) for p in plan.train} == {("two nurses, smiling", "pair"), ("a chef", "custom")}
    assert [(p.text, p.subject) for p in plan.audit] == [("a photo of the face of an astronaut, a person", "astronaut")]


@pytest.mark.parametrize(
    ("name", "content", "template", "says"),
    [
        ("gone.txt", None, None, "No such file"),
        ("list.json", "[]", None, r"\.txt or \.csv"),
        ("latin.txt", b"caf\xe9", None, "not UTF-8"),
        ("empty.txt", "\n# nothing\n", None, "holds no prompts"),
        ("empty.csv", "prompt\n", None, "holds no prompts"),
        ("blank.csv", "", None, "needs a column prompt or subject"),
        ("columns.csv", "text\na nurse\n", None, r"found \['text'\]"),
        ("bare.csv", "subject\nnurse\n", None, "needs a template"),
        ("cell.csv", "prompt,family\na nurse,x\n ,x\n", None, "line 3: the cell prompt is empty"),
        ("short.csv", "template,subject\na {},nurse\na {}\n", None, "line 3: the cell subject is empty"),
        ("people.csv", "subject,people\nactor,yes\nteapot,none\n", "a {}", "line 3: people: found none, allowed: yes, no"),
        ("twice.csv", "prompt,family,family\na nurse,x,y\n", None, "the column family stands there twice"),
        ("almost.csv", "prompt,Family\na nurse,x\n", None, "found the column Family, allowed: family, or"),
        ("twice.txt", "a nurse\na nurse\n", None, "'a nurse' occurs twice"),
        ("gap.txt", "nurse\n", "a photo", "needs a gap"),
    ],
)
def test_bad_files_get_one_line_that_names_them(tmp_path, name, content, template, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FairDiffError, match=says) as caught:
        read_prompts(path, template)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("prompts.")
    assert name == "gap.txt" or str(path) in message


def test_a_folder_is_no_prompt_file(tmp_path):
    folder = tmp_path / "list.txt"
    folder.mkdir()
    with pytest.raises(FairDiffError, match="cannot read"):
        read_prompts(folder)


def test_prompts_import_nothing_heavy():
    tree = ast.parse(Path(fairdiff.prompts.__file__).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert found <= {*sys.stdlib_module_names, "fairdiff.errors", "fairdiff.files"}
