"""All captions of a pair are embedded, in one process and in several, cached or not."""

from pathlib import Path

import pytest
import torch

from clipft.config.settings import Settings
from clipft.data.positives import CaptionPositives
from clipft.data.shards.folders import validation_pairs
from clipft.embedding.embed import Embeddings, embed_pairs, embed_texts
from clipft.embedding.encoding import open_encoding, validation_preprocessing
from clipft.embedding.load import load_model
from clipft.embedding.towers import Shapes
from clipft.evaluation.evaluator import EvaluationSet
from tests.several_captions import captions_of, write_several
from tests.training.process_helpers import results

COUNTS = (1, 4, 2, 7)


def settings_of(folder: Path, **more) -> Settings:
    small = {"num_workers": 0, "precision": "fp32", "device": "cpu", "max_bad": 0.5}
    return Settings(model="tiny", data_dir=folder, **{**small, **more})


def embedded(settings, positives=None, processes=None):
    loaded, pairs = load_model(settings), validation_pairs(settings)
    preprocessing = validation_preprocessing(loaded.base.inputs, pairs, settings)
    how = open_encoding(loaded, pairs, preprocessing, settings, lambda note: None, Shapes())
    more = {} if positives is None else {"positives": positives(preprocessing)}
    more |= {} if processes is None else {"processes": processes}
    return loaded, embed_pairs(loaded, pairs, how, settings, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pairs in all, of which the sixth cannot be used."""
    folder = tmp_path_factory.mktemp("several")
    write_several(folder / "val" / "00000.tar", range(11), COUNTS, bad=[5])
    return folder


@pytest.mark.parametrize("cached", [True, False])
def test_every_caption_is_embedded_beside_its_image(folder, cached):
    settings = settings_of(folder, feature_cache=cached, micro_batch_size=3, scenario="zero_shot")
    loaded, found = embedded(settings)
    numbers = [number for number in range(11) if number != 5]
    assert found.numbers == tuple(numbers)
    expected = [(n, text) for n in numbers for text in captions_of(n, COUNTS[n % 4])]
    assert [found.numbers[row] for row in found.owners] == [number for number, _ in expected]
    theirs = embed_texts(loaded, [text for _, text in expected])
    torch.testing.assert_close(found.texts, theirs, rtol=0, atol=2e-6)
    shared = [row for row, (_, text) in enumerate(expected) if text.startswith("something")]
    assert len(shared) > 2
    assert torch.equal(found.texts[shared], found.texts[shared[:1]].expand(len(shared), -1))


def test_groups_are_those_of_each_caption(folder):
    def positives(preprocessing):
        return CaptionPositives(preprocessing.captions.pad_token_id)

    _, found = embedded(settings_of(folder), positives)
    alike = found.groups[:, None] == found.groups
    assert torch.equal(alike, (found.texts[:, None] == found.texts).all(2))


def test_one_caption_each_has_no_owners_and_one_round(tmp_path):
    write_several(tmp_path / "val" / "00000.tar", range(5), (1,))
    _, found = embedded(settings_of(tmp_path))
    assert found.owners is None
    assert len(found.texts) == 5
    assert list(found.rounds()) == [found]


def test_the_rounds_of_a_validation_give_each_caption_its_turn():
    texts = torch.arange(6.0)[:, None]
    owners = torch.tensor([0, 1, 1, 2, 2, 2])
    found = Embeddings(torch.eye(3), texts, (0, 1, 2), (), groups=owners * 10, owners=owners)
    rounds = list(found.rounds())
    assert [one.texts.flatten().tolist() for one in rounds] == [[0, 1, 3], [0, 2, 4], [0, 1, 5]]
    assert all(one.groups.tolist() == [0, 10, 20] and one.owners is None for one in rounds)


def test_an_evaluation_counts_all_captions(folder):
    settings = settings_of(folder, resamples=20)
    loaded = load_model(settings)
    found = EvaluationSet.open(loaded.base.inputs, settings).evaluate(loaded).evaluation
    captions = sum(COUNTS[number % 4] for number in range(11) if number != 5)
    assert (found.pairs, found.captions) == (10, captions)
    assert found.parts["paired"]["text_to_image"].queries == captions
    assert found.parts["paired"]["image_to_text"].candidates == captions


BODY = """
    import sys
    from pathlib import Path
    from tests.embedding.test_several_captions import embedded, settings_of
    settings = settings_of(Path("{folder}"), micro_batch_size=4)
    found = embedded(settings, processes=processes)[1]
    result = [found.owners.tolist(), found.texts.tolist(), found.numbers]
"""


def test_two_processes_embed_what_one_does(folder):
    _, alone = embedded(settings_of(folder, micro_batch_size=4))
    for owners, texts, numbers in results(BODY.format(folder=folder)):
        assert (owners, tuple(numbers)) == (alone.owners.tolist(), alone.numbers)
        torch.testing.assert_close(torch.tensor(texts), alone.texts, rtol=0, atol=2e-6)
