import numpy as np
import pytest
import yaml

from classifiers.labels import FAIRFACE, read_labels

ATTRIBUTES = {"gender": ("female", "male"), "race": ("White", "Black", "Indian", "Asian"), "age": ("young", "old")}


def write(folder, name: str, *lines: str):
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_ones_own_table_in_any_order_of_columns_with_gaps(tmp_path):
    write(tmp_path, "labels.csv", "age,image,gender,split", "old,a/0.png,male,train", ",1.png,female,", "young, 2.png ,,val")
    found = read_labels(tmp_path, ATTRIBUTES)
    assert found.names == ("a/0.png", "1.png", "2.png") and found.splits == ("train", "", "val")
    assert {name: label.tolist() for name, label in found.labels.items()} == {"gender": [1, 0, -1], "age": [1, -1, 0]}
    assert found.of_split("val").names == ("2.png",) and found.of_split("all").names == found.names
    assert found.of_split("val").labels["age"].tolist() == [0] and found.files[0] == tmp_path / "a" / "0.png"
    with pytest.raises(ValueError, match="found train, val, but split test is requested; allowed: all"):
        found.of_split("test")


def test_fairface_as_it_comes(tmp_path):
    head = "file,age,gender,race,service_test"
    write(tmp_path, "fairface_label_train.csv", head, "train/1.jpg,50-59,Male,East Asian,True")
    write(tmp_path, "fairface_label_val.csv", head, "val/1.jpg,3-9,Female,Latino_Hispanic,False")
    found = read_labels(tmp_path, ATTRIBUTES)
    assert found.layout == "FairFace" and found.names == ("train/1.jpg", "val/1.jpg")
    assert found.of_split("train").labels["race"].tolist() == [3]
    assert {k: v.tolist() for k, v in found.labels.items()} == {"gender": [1, 0], "race": [3, 0], "age": [1, 0]}
    seven = {"race": ("Latino_Hispanic", "East Asian", "White")}  # its own classes may be asked for too
    assert read_labels(tmp_path, seven).labels["race"].tolist() == [1, 0]


def test_the_merging_of_fairfaces_labels_is_that_of_its_judges():
    with open("conf/judge/hf.yaml", encoding="utf-8") as file:
        mapping = yaml.safe_load(file)["mapping"]
    by_class = {
        name: {c: [label for label, own in labels.items() if own == c] for c in mapping[name]}
        for name, labels in FAIRFACE.items()
    }
    assert by_class == mapping


def celeba(folder, *rows: str):
    (folder / "img_align_celeba").mkdir(exist_ok=True)
    return write(folder, "list_attr_celeba.txt", str(len(rows)), "Bald Male Young ", *rows)


def test_celeba_as_it_comes(tmp_path):
    celeba(tmp_path, "000001.jpg -1  1 -1", "000002.jpg  1 -1  1")
    found = read_labels(tmp_path, ATTRIBUTES)
    assert found.names == ("img_align_celeba/000001.jpg", "img_align_celeba/000002.jpg") and found.splits == ("", "")
    assert {k: v.tolist() for k, v in found.labels.items()} == {"gender": [1, 0], "age": [1, 0]}
    write(tmp_path, "list_eval_partition.txt", "000001.jpg 0", "000002.jpg 2")
    assert read_labels(tmp_path, ATTRIBUTES).splits == ("train", "test")


def test_a_held_out_part_depends_on_names_alone_and_is_a_fifth(tmp_path):
    write(tmp_path, "labels.csv", "image,gender", *(f"{i}.png,male" for i in range(2000)))
    found = read_labels(tmp_path, ATTRIBUTES).with_held_out()
    assert 0.17 < np.mean([split == "val" for split in found.splits]) < 0.23
    some = read_labels(tmp_path, ATTRIBUTES).rows(np.arange(2000) >= 1000).with_held_out()
    assert some.splits == found.splits[1000:]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,gender"], "labels.csv without a label of gender, race, age"),
        (["image,gneder", "0.png,male"], "labels.csv without a label of gender, race, age"),
        (["file,gender", "0.png,male"], "labels.csv: found the columns file, gender, image is missing"),
        ([""], "labels.csv: found the columns , image is missing"),
        (["image,gender", "0.png,male", "1.png,man"], "labels.csv:3: gender is 'man', allowed: female, male"),
        (["image,gender", "0.png,male", "0.png,female"], "0.png stands in its labels twice"),
        (["image,gender", "0.png,male,old"], "labels.csv:2: found more cells than columns"),
        (["image,gender", ",male"], "labels.csv:2: names no image"),
        (["image,gender,split", "0.png,male,dev"], "labels.csv:2: split is 'dev', allowed: train, val, test"),
        (["image,gender", '0.png,"male'], "labels.csv: cannot read it"),
    ],
)
def test_a_wrong_table_is_one_line_naming_file_and_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as error:
        read_labels(write(tmp_path, "labels.csv", *lines), ATTRIBUTES)
    assert "\n" not in str(error.value)


def test_other_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="found no labels, allowed: a folder with labels.csv, fairface_label_train.csv"):
        read_labels(tmp_path, ATTRIBUTES)
    with pytest.raises(ValueError, match="list_attr_celeba.txt:4: Male is 0, allowed: 1, -1"):
        read_labels(celeba(tmp_path, "1.jpg 1 1 1", "2.jpg 1 0 1"), ATTRIBUTES)
    with pytest.raises(ValueError, match="list_attr_celeba.txt:3: found 2 cells, allowed: 3"):
        read_labels(celeba(tmp_path, "1.jpg 1 1"), ATTRIBUTES)
    (tmp_path / "labels.csv").write_bytes(b"image,gender\n\xff\xfe,male\n")
    with pytest.raises(ValueError, match="labels.csv: is not UTF-8 text"):
        read_labels(tmp_path, ATTRIBUTES)
