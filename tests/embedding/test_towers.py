"""Which chunks pass through a tower, and that their shapes change nothing but the shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from clipft.config.sources import load_settings
from clipft.data.batch import Batch
from clipft.embedding.load import load_model
from clipft.embedding.towers import BoundedShapes, Shapes, make_towers

END = 49407


@given(
    lengths=st.lists(st.integers(2, 77), min_size=1, max_size=600),
    micro=st.integers(1, 512),
    effective=st.integers(1, 4096),
    max_rows=st.integers(1, 512),
)
def test_every_caption_is_in_one_chunk_that_has_room_for_it(lengths, micro, effective, max_rows):
    tokens = np.sort(np.array(lengths))
    for shapes in (Shapes(), BoundedShapes(micro, effective, 77)):
        places = list[int]()
        for start, end, rows, width in shapes.cut_captions(tokens, max_rows):
            assert 0 < end - start <= rows and tokens[end - 1] <= width <= 77
            places += range(start, end)
        assert places == list(range(len(tokens)))


@given(st.integers(0, 1000), st.sampled_from([96, 250, 1024]))
def test_a_run_meets_at_most_sixteen_shapes(seed, micro):
    """Also when pairs are skipped and captions repeat, as in a run over any catalogue."""
    draw, shapes = np.random.default_rng(seed), BoundedShapes(micro, 1024, 77)
    images, captions = set[int](), set[tuple[int, int]]()
    for _ in range(50):
        images.add(shapes.image_rows(int(draw.integers(1, micro, endpoint=True))))
        tokens = np.sort(draw.gamma(4, 6, draw.integers(512, 1024)).astype(int).clip(3, 77))
        captions |= {cut[2:] for cut in shapes.cut_captions(tokens, micro)}
    assert len(images) <= 4 and len(captions) <= 12


def test_halved_micro_batches_halve_the_chunks_of_captions():
    shapes = BoundedShapes(128, 4096, 77)
    rows = [{cut[2] for cut in shapes.cut_captions(np.full(200, 9), most)} for most in (128, 64)]
    assert rows == [{128}, {64}]


@pytest.fixture(scope="module")
def loaded():
    given = {"model": "tiny", "scenario": "dual_lora", "precision": "fp32", "lora_dropout": "0.2"}
    loaded = load_model(load_settings(given, environ={}).values)
    loaded.model.train()
    return loaded


def test_a_chunk_that_is_filled_up_has_the_embeddings_of_its_rows_and_their_gradient(loaded):
    end = int(loaded.base.inputs.tokenizer.eos_token_id)
    side = loaded.base.inputs.image_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (7, 3, side, side), dtype=torch.uint8, generator=generator)
    ids = torch.randint(5, 100, (7, 11), generator=generator)
    for row, length in enumerate((3, 5, 5, 8, 9, 10, 11)):
        ids[row, length - 1 :] = end
    batch, found = Batch(pixels, ids, tuple(range(7))), []
    for shapes in (Shapes(), BoundedShapes(16, 16, 32)):
        towers = make_towers(loaded, 3, end, shapes)
        for tower in (towers.images, towers.texts):
            made = tower.make_chunks([batch])
            rows = torch.cat([tower.encode(5, chunk) for chunk in made.chunks])[made.order]
            rows[:, :8].sum().backward()
            gradients = [p.grad for _, p in loaded.model.trainable() if p.grad is not None]
            found.append((made.chunks[0].inputs.shape, rows.detach(), gradients))
            loaded.model.zero_grad(set_to_none=True)
    for plain, filled in zip(found[:2], found[2:], strict=True):
        assert filled[0] != plain[0]
        torch.testing.assert_close(filled[1], plain[1], atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(filled[2], plain[2], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scenario", ["dual_lora", "full"])
def test_a_compiled_tower_is_one_graph_for_each_of_a_bounded_number_of_shapes(
    scenario, monkeypatch
):
    """Over steps of different sizes, whose captions have different lengths and repeat."""
    given = {"model": "tiny", "scenario": scenario, "precision": "fp32", "lora_dropout": "0.1"}
    loaded = load_model(load_settings(given, environ={}).values)
    loaded.model.train()
    torch._dynamo.reset()
    counters = [CompileCounter(), CompileCounter()]
    kinds, compile_ = iter(counters), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend=next(kinds), **how))
    end, side = int(loaded.base.inputs.tokenizer.eos_token_id), loaded.base.inputs.image_size
    shapes = BoundedShapes(8, 16, loaded.base.inputs.context_length)
    towers, met = make_towers(loaded, 1, end, shapes, compiled=True), (set(), set())
    draw = torch.Generator().manual_seed(0)
    for step, pairs in enumerate((8, 8, 7, 8, 5, 8, 8, 6)):
        pixels = torch.zeros(pairs, 3, side, side, dtype=torch.uint8)
        ids = torch.randint(5, 100, (pairs, 30), generator=draw)
        for row in ids:
            row[int(torch.randint(3, 30, (), generator=draw)) :] = end
        batch = Batch(pixels, ids, tuple(range(pairs)))
        for tower, seen in zip((towers.images, towers.texts), met, strict=True):
            for chunk in tower.make_chunks([batch]).chunks:
                seen.add(chunk.inputs.shape)
                tower.encode(step, chunk).sum().backward()
    assert [counter.frame_count for counter in counters] == [len(seen) for seen in met]
    assert len(met[0]) <= 4 and len(met[1]) <= 4
    assert all(rows == 8 for rows, _ in met[1])
