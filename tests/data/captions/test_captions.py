import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.data.captions.template import BadCaption, clean_caption
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.models.pretrained import load_inputs


def tokenize(tokenizer, texts, context):
    encoder = CaptionEncoder(tokenizer, context)
    return padded([encoded.ids for encoded in encoder(texts)], encoder.eos_token_id)


@pytest.fixture(scope="module")
def tokenizer():
    return load_inputs("tiny").tokenizer


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a chair", "a chair"),
        (b"\xef\xbb\xbfa chair\r\n", "a chair"),
        (b"a\x00chair", "achair"),  # as CLIP's own tokenizer reads it
        (b"  a \t\n chair ", "a chair"),
        ("Stühle 🪑 كرسي".encode(), "Stühle 🪑 كرسي"),
        ("a chair".encode("utf-16"), "a chair"),
        ("a chair".encode("utf-16-be"), "a chair"),  # without a mark
        ("\ufeffStühle".encode("utf-16-be"), "Stühle"),
        ("Stühle".encode("utf-32"), "Stühle"),
    ],
)
def test_captions_are_cleaned(data, text):
    assert clean_caption(data) == text


@pytest.mark.parametrize("data", [b"", b" \n\t", b"\x00", b"\xef\xbb\xbf"])
def test_empty_captions_are_refused(data):
    with pytest.raises(BadCaption, match="empty"):
        clean_caption(data)


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfea", "長い".encode("shift_jis")])
def test_captions_that_are_not_text_are_refused(data):
    with pytest.raises(BadCaption, match=r"the caption is not UTF-(8|16-LE) text"):
        clean_caption(data)


@pytest.mark.parametrize(
    "text",
    [
        "a <|endoftext|> chair",
        "a &lt;|endoftext|&gt; chair",
        "a <|startoftext|>",
        "<\x00|endoftext|>",
    ],
)
def test_the_name_of_a_special_token_is_plain_text(tokenizer, text):
    (ids,) = tokenize(tokenizer, [clean_caption(text.encode())], 77).tolist()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) > 3
    assert not special & set(ids[1:-1])


@given(data=st.binary(min_size=1, max_size=300))
def test_no_caption_can_end_the_text_early_or_outgrow_the_model(tokenizer, data):
    try:
        text = clean_caption(data)
    except BadCaption:
        return
    ids = tokenize(tokenizer, [text, "a " * 100], 77)
    end = tokenizer.eos_token_id
    assert ids.shape == (2, 77)
    first = ids[0].tolist()
    assert first[0] == tokenizer.bos_token_id
    length = first.index(end)
    assert set(first[length:]) == {end}  # after the end only padding
    alone = tokenize(tokenizer, [text], 77)[0].tolist()
    assert alone.index(end) == length


def test_texts_are_padded_to_the_longest_only(tokenizer):
    assert tokenize(tokenizer, ["a", "a b c"], 77).shape[1] < 10
