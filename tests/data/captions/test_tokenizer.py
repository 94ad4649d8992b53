import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.models.pretrained import load_inputs


@pytest.fixture(scope="module")
def tokenizer():
    return load_inputs("tiny").tokenizer


TEXTS = st.lists(st.text(max_size=60).map(lambda t: t.replace("<|", "< |")), min_size=1, max_size=8)


@given(TEXTS)
def test_ids_are_those_of_the_tokenizer_itself(tokenizer, texts):
    encoded = CaptionEncoder(tokenizer, 10_000)(texts)
    assert [caption.ids for caption in encoded] == tokenizer(texts)["input_ids"]


def test_long_captions_are_truncated_between_words(tokenizer):
    words = [f"wonderful{chr(97 + i % 26)}" for i in range(60)]
    (caption,) = CaptionEncoder(tokenizer, 77)([" ".join(words)])
    assert caption.length > 77 >= len(caption.ids)
    assert caption.ids[-1] == tokenizer.eos_token_id
    kept = tokenizer.decode(caption.ids, skip_special_tokens=True).split()
    assert kept == words[: len(kept)]
    assert len(tokenizer(" ".join(words[: len(kept) + 1]))["input_ids"]) > 77  # no word less


def test_a_word_longer_than_the_model_takes_is_cut_inside(tokenizer):
    (caption,) = CaptionEncoder(tokenizer, 16)(["qwx" * 200])
    assert len(caption.ids) == 16
    assert caption.ids[-1] == tokenizer.eos_token_id


@given(TEXTS, st.integers(4, 20))
def test_ids_fit_whatever_the_text(tokenizer, texts, context):
    encoder = CaptionEncoder(tokenizer, context)
    for caption in encoder(texts):
        assert 2 <= len(caption.ids) <= context
        assert caption.ids[0] == tokenizer.bos_token_id
        assert caption.ids.index(encoder.eos_token_id) == len(caption.ids) - 1


def test_texts_are_padded_to_the_longest_with_the_end_token():
    assert padded([[1, 9], [1, 5, 6, 9]], 9).tolist() == [[1, 9, 9, 9], [1, 5, 6, 9]]
