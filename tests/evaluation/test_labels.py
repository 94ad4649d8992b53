"""Labels and templates that the user names are there, or are refused by name."""

import unicodedata

import pytest

from clipft.config.prompts import TEMPLATES
from clipft.core.errors import UsageError
from clipft.evaluation.labels import choose_labels

DATA = ["chair", "Table", None, "lamp", "chair", "sofa bed"]


def chosen(labels, templates="furniture", found=DATA):
    return choose_labels(labels, templates, found, "category")


def refused(labels, templates="furniture", found=DATA) -> UsageError:
    with pytest.raises(UsageError) as caught:
        chosen(labels, templates, found)
    return caught.value


def test_without_a_list_the_labels_are_those_of_the_data():
    assert chosen(None).labels == ("Table", "chair", "lamp", "sofa bed")
    assert chosen(None, found=[None, None]) is None


def test_a_file_that_is_missing_is_not_taken_for_a_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("chair\ntable\nlamp\nsofa bed\n")
    error = refused("label.txt")
    assert "--labels label.txt: there is no such file" in error.message
    assert "did you mean labels.txt?" in error.hint
    assert refused(str(tmp_path / "none" / "labels.txt")).exit_code == 2
    assert chosen("labels.txt").labels == ("chair", "table", "lamp", "sofa bed")


def test_a_file_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "labels.txt").write_text("\ufeffchair\r\n\r\nlamp\r\n", encoding="utf-8")
    assert chosen("~/labels.txt").labels == ("chair", "lamp")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_a_label_or_template(tmp_path, encoding):
    labels, templates = tmp_path / "labels.txt", tmp_path / "templates.txt"
    labels.write_text("chair\nlamp\n", encoding=encoding)
    templates.write_text("a photo of a {}\n", encoding=encoding)
    found = chosen(str(labels), str(templates))
    assert (found.labels, found.templates) == (("chair", "lamp"), ("a photo of a {}",))


def test_labels_that_are_not_utf_8_are_refused(tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"K\xfcche\n")
    error = refused(str(tmp_path / "labels.txt"))
    assert "labels.txt: not UTF-8 text" in error.message


@pytest.mark.parametrize(
    ("labels", "wrong", "hint"),
    [
        ("tabel,chair", "'tabel'", "did you mean Table?"),
        ("chairs,lamp,table", "'chairs'", "did you mean chair?"),
        ("car,dog", "'car'", "the labels in the data are Table, chair, lamp, sofa bed"),
        ("chiar", "there is no such file, and no pair has this label", "did you mean chair?"),
    ],
)
def test_a_label_that_is_misspelled_is_refused_with_the_nearest(labels, wrong, hint):
    error = refused(labels)
    assert wrong in error.message and hint in error.hint


def test_labels_that_no_pair_has_may_be_among_the_choices():
    found = chosen("chair,table,lamp,sofa bed,car,dog")
    assert found.labels == ("chair", "table", "lamp", "sofa bed", "car", "dog")
    assert found.notes == ("2 of 6 labels were not found on any pair: car, dog",)


def test_pairs_whose_label_is_not_listed_are_counted():
    assert chosen("chair,lamp").notes == (
        "2 pairs with other labels (Table, sofa bed) are left out",
    )


def test_case_spaces_and_the_encoding_of_accents_do_not_matter():
    decomposed = unicodedata.normalize("NFD", "möbel")
    found = chosen("MÖBEL,sofa  bed", found=[decomposed, "Sofa bed"])
    assert [found.number(label) for label in (decomposed, "Sofa bed", "x", None)] == [
        0,
        1,
        None,
        None,
    ]


def test_labels_without_any_in_the_data_name_the_field():
    error = refused("chair,lamp", found=[None])
    assert "metadata field 'category'" in error.message and "--label-field" in error.hint


def test_templates_are_a_name_a_file_or_a_template(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a photo of a {}\na {}, seen from above\n")
    assert chosen("chair,lamp", "general").templates == TEMPLATES["general"]
    assert chosen("chair,lamp", "prompts.txt").templates == (
        "a photo of a {}",
        "a {}, seen from above",
    )
    assert chosen("chair,lamp", "a {}, on white").templates == ("a {}, on white",)
    assert "did you mean furniture?" in refused(None, "furnitur").hint
    assert "did you mean prompts.txt?" in refused(None, "prompt.txt").hint
    (tmp_path / "wrong.txt").write_text("a photo\n")
    assert "no {} in 'a photo'" in refused(None, "wrong.txt").message
    (tmp_path / "empty.txt").write_text("\n")
    assert "the file has no templates" in refused(None, "empty.txt").message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"M\xf6bel"])
def test_a_file_that_is_not_text_is_refused(tmp_path, content):
    file = tmp_path / "labels.txt"
    file.write_bytes(content)
    assert "cannot read" in refused(str(file)).message
