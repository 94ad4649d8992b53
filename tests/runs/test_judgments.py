"""The file of judgments survives a kill, and its tally counts each query once."""

import json

import pytest

from clipft.core.errors import StorageError
from clipft.runs.judgments import Judgment, Tally, append_judgment, read_judgments


def judged(query: str, outcome: str, epoch: int = 2) -> Judgment:
    shown = {"fine_tuned": ["a.jpg"], "pretrained": ["b\udcff.jpg"]}
    return Judgment(query, outcome, epoch, "fine_tuned", shown, "data", "2026-01-01T00:00:00+00:00")


def test_the_last_judgment_of_a_query_counts(tmp_path):
    path = tmp_path / "judgments.jsonl"
    for query, outcome in (("a", "same"), ("b", "pretrained"), ("a", "fine_tuned")):
        append_judgment(path, judged(query, outcome))
    assert read_judgments(path, 2) == {"a": "fine_tuned", "b": "pretrained"}
    assert len(path.read_text().splitlines()) == 3, "nothing is ever overwritten"


def test_judgments_of_other_weights_do_not_count(tmp_path):
    path = tmp_path / "judgments.jsonl"
    append_judgment(path, judged("a", "same", epoch=1))
    append_judgment(path, judged("b", "same", epoch=2))
    assert read_judgments(path, 2) == {"b": "same"}


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path, kept):
    path = tmp_path / "judgments.jsonl"
    append_judgment(path, judged("a", "same"))
    whole = path.read_bytes()
    append_judgment(path, judged("b", "same"))
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    append_judgment(path, judged("c", "neither"))
    assert read_judgments(path, 2) == {"a": "same", "c": "neither"}


def test_lines_of_something_else_are_passed_over(tmp_path):
    path = tmp_path / "judgments.jsonl"
    lines = [{"query": "x", "outcome": "great", "epoch": 2}, {"epoch": 2}, [1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_judgments(path, 2) == {}
    assert read_judgments(tmp_path / "none", 2) == {}


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "judgments.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        append_judgment(tmp_path / "judgments.jsonl", judged("a", "same"))


def test_a_tally_says_what_it_is_worth():
    tally = Tally.of(
        {
            **{f"f{n}": "fine_tuned" for n in range(8)},
            **{f"p{n}": "pretrained" for n in range(3)},
            **{"s": "same", "n": "neither"},
        }
    )
    content = tally.to_dict()
    assert (content["judged"], content["decided"]) == (13, 11)
    assert content["share"] == pytest.approx(8 / 11)
    assert tally.sentence() == (
        "The fine-tuned model was preferred in 8 of 11 decided blind judgments: 73%, 95% "
        "interval 43% to 90%, sign test p = 0.227. This may be chance."
    )
    clear = Tally(fine_tuned=20).sentence()
    assert "p < 0.001" in clear and "chance" not in clear
    assert Tally(same=2).to_dict()["share"] is None
    assert "No model was preferred in 2 blind judgments" in Tally(same=2).sentence()
    assert Tally().sentence() == "Nothing has been judged yet."
