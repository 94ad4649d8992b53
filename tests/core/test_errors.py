import pickle

from clipft.core.errors import ClipftError, DataError, did_you_mean, first_line, unknown_choice


def test_each_error_has_an_exit_code_of_its_own():
    kinds = ClipftError.__subclasses__()
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(DataError("no pairs", "add some")))
    assert (type(error), error.message, error.hint) == (DataError, "no pairs", "add some")


def test_what_a_line_announces_is_added_to_it():
    assert first_line(ValueError("it failed\n  a report")) == "it failed"
    assert first_line(ValueError("it failed for:\n  a reason\n  a report")) == (
        "it failed for: a reason"
    )
    assert first_line(ValueError("it failed:")) == "it failed:"


def test_a_close_name_is_suggested():
    assert did_you_mean("colour", {"color", "size"}) == "did you mean color?"
    assert did_you_mean("epoch", ["epochs"], lambda name: f"--{name}") == "did you mean --epochs?"
    assert did_you_mean("weight", {"color", "size"}) == ""
    assert unknown_choice("ful", ["full", "lora"]) == (
        "must be one of full, lora (did you mean full?)"
    )
