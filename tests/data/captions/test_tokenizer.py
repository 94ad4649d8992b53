# ruff: noqa: RUF001
import csv
import random
import string
from functools import cache
from pathlib import Path

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipft.data.captions.cleaning import clean_like_clip, compared
from clipft.data.captions.template import clean_text
from clipft.data.captions.tokenizer import CaptionEncoder, padded
from clipft.models.pretrained import load_inputs
from tests.models.checkpoints import clip_tokenizer, siglip_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_inputs("tiny").tokenizer


TEXTS = st.lists(st.text(max_size=60).map(lambda t: t.replace("<|", "< |")), min_size=1, max_size=8)
ODD = (
    *("ﬁne ﬂoor", "ＬＯＵＤ　ＮＯＩＳＥ", "“curly” ‘quotes’", "ﬀ", "Ⅻ", "½", "…", "é", "e\u0301"),
    *("Ã¼ber", "voilÃ\xa0 tout", "â€™s", "Ã©", "a\x85", "\x9d", "\ufffd", "\ud800"),
    *("a\0b", "\x1b[31mred", "\u200b", "a\ufeff", "x\ty", "a\r\nb", "\u2028", "\xa0"),
    *("&amp;amp;", "&eacute;", "<b>bold &amp; big</b>", "&nbsp;", "&#8217;", "&bull;"),
    *("ΟΔΟΣ", "İstanbul", "naïve", "日本語", "🪑", "it's", "I'LL"),
)


@given(TEXTS)
def test_ids_are_those_of_the_tokenizer_itself(tokenizer, texts):
    encoder = CaptionEncoder(tokenizer, 10_000)
    cleaned = [encoder.clean(text) for text in texts]
    assert [caption.ids for caption in encoder(texts)] == tokenizer(cleaned)["input_ids"]


def open_clips(text):
    start, end = reference().all_special_ids
    return [start, *reference().encode(text), end]


@cache
def reference():
    return open_clip.tokenizer.SimpleTokenizer()


def garments():
    table = Path(__file__).parents[4] / "shared" / "data" / "garments" / "products.csv"
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return sorted({row[name] for row in rows for name in ("description", "description_html")})


def test_ids_are_those_of_clips_own_tokenizer():
    draw = random.Random(1)
    odd = [" ".join(draw.sample(ODD, draw.randint(1, 4))) for _ in range(200)]
    texts = [*ODD, *odd, "<p>Sale &amp; more</p>\n<p>&bull; 20% off</p>", *garments()]
    encoded = CaptionEncoder(clip_tokenizer(), 100_000)([clean_text(text) for text in texts])
    different = [t for t, own in zip(texts, encoded, strict=True) if own.ids != open_clips(t)]
    assert different == []


@given(st.text(alphabet=string.printable.replace("&", "").split("\t")[0]))
def test_the_quick_path_changes_nothing_but_case(text):
    assert clean_like_clip(text) == text
    assert " ".join(text.lower().split()) == open_clip.tokenizer._clean_lower(text)


@given(st.text())
def test_cleaned_text_is_that_of_open_clip(text):
    expected = open_clip.tokenizer._clean_lower(text)
    assert " ".join(clean_like_clip(text).lower().split()) == expected


@given(
    st.lists(
        st.sampled_from(["Stühle ", "für ", "Ã", "¼", "â", "€", "\x99", "É", "ß", "à ", "ΟΔΟΣ "])
        | st.text(st.characters(min_codepoint=32, max_codepoint=0x17F), max_size=4)
        | st.text(st.sampled_from("長い木、椅。「子」のテーブルчёΣς½«»–—°²  "), max_size=6)
    ).map("".join)
)
@settings(max_examples=300)
def test_ordinary_letters_are_cleaned_as_by_open_clip(text):
    assert " ".join(clean_like_clip(text).lower().split()) == open_clip.tokenizer._clean_lower(text)


def test_other_models_keep_the_rule_of_their_own_processor(tmp_path):
    texts = ["a “red” chair &amp; ＬＯＵＤ", "lamp"]
    tokenizer = siglip_tokenizer(tmp_path, texts * 9)
    encoded = CaptionEncoder(tokenizer, 64)(texts)
    assert [caption.ids for caption in encoded] == tokenizer(texts)["input_ids"]


def test_captions_called_equal_have_equal_ids():
    encoder = CaptionEncoder(clip_tokenizer(), 77)
    for one, other in (("ΟΔΟΣ", "οδος"), ("Cafe\u0301", "CAFÉ"), ("A  chair", "a chair")):
        assert compared(one) == compared(other)
        assert encoder([one])[0].ids == encoder([other])[0].ids
    assert compared("  Oak\ttable ") == compared("oak Table")
    assert compared("oak table.") != compared("oak table")


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


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("luma" + "2024" * 40, 77),  # digits are words of their own
        ("LUMA" + "qwzx" * 60, 77),
        ("素敵な木の椅子と長い机" * 20, 77),
        ("كرسيخشبيجميل" * 30, 77),
        ("🪑" * 60, 77),
        ("a red chair " + "qwzx" * 60, 77),
    ],
)
def test_a_caption_without_spaces_is_cut_between_characters(tokenizer, text, kept):
    encoder = CaptionEncoder(tokenizer, 77)
    (caption,) = encoder([text])
    assert kept - 4 <= len(caption.ids) <= kept < caption.length
    read = tokenizer.decode(caption.ids, skip_special_tokens=True).replace(" ", "")
    assert "\ufffd" not in read  # no half of a character
    assert encoder.clean(text).lower().replace(" ", "").startswith(read)


@given(TEXTS, st.integers(4, 20))
def test_ids_fit_whatever_the_text(tokenizer, texts, context):
    encoder = CaptionEncoder(tokenizer, context)
    for caption in encoder(texts):
        assert 2 <= len(caption.ids) <= context
        assert caption.ids[0] == tokenizer.bos_token_id
        assert caption.ids.index(encoder.eos_token_id) == len(caption.ids) - 1


def test_texts_are_padded_to_the_longest_with_the_end_token():
    assert padded([[1, 9], [1, 5, 6, 9]], 9).tolist() == [[1, 9, 9, 9], [1, 5, 6, 9]]
