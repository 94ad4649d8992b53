"""The gradient of a step must be that of one large batch, however it is split."""

from dataclasses import replace

import pytest
import torch

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.memory import MemoryBudget
from clipft.data.batch import Batch
from clipft.data.positives import CaptionPositives, Positives
from clipft.embedding.load import LoadedModel, load_model
from clipft.embedding.towers import Towers, make_towers
from clipft.models.device import Precision
from clipft.models.pretrained import load_pretrained
from clipft.training.step.gradcache import ExactAccumulation, LocalAccumulation
from clipft.training.step.losses import make_loss
from clipft.training.step.tower_pass import GraphMemory

OFF = torch.amp.GradScaler("cpu", enabled=False)
PAIRS = 12
NO_ROOM, ALL_ROOM = 0, 1 << 40


def load(scenario: str, **given: str) -> LoadedModel:
    given = {"lora_dropout": "0", "model": "tiny", "scenario": scenario, "device": "cpu", **given}
    loaded = load_model(load_settings({"precision": "fp32", **given}, environ={}).values)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from LoRA's start, where half the gradients are 0
        for _, parameter in loaded.model.trainable():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    loaded.model.train()
    return loaded


def pad_token_id(loaded: LoadedModel) -> int:
    return int(loaded.base.inputs.tokenizer.eos_token_id)


def accumulation(
    loaded: LoadedModel, kind=ExactAccumulation, room: int = NO_ROOM, towers: Towers | None = None
):
    settings = load_settings({}, environ={}).values
    return kind(
        model=loaded.model,
        towers=towers or make_towers(loaded, 1, pad_token_id(loaded)),
        loss=make_loss(settings, loaded.model),
        positives=Positives(),
        scaler=OFF,
        graphs=GraphMemory(lambda: MemoryBudget(room, over_graph=1.0)),
    )


@pytest.fixture(scope="module")
def pairs() -> Batch:
    return make_pairs()


def make_pairs() -> Batch:
    """Captions of different lengths; the fifth and the ninth are the same."""
    base = load_pretrained("tiny")
    generator = torch.Generator().manual_seed(3)
    size = base.inputs.image_size
    pixels = torch.randint(0, 256, (PAIRS, 3, size, size), dtype=torch.uint8, generator=generator)
    texts = [f"a {'very ' * (i % 5)}red chair number {i}" for i in range(PAIRS)]
    texts[8] = texts[4]
    ids = torch.tensor(base.inputs.tokenizer(texts, padding=True)["input_ids"])
    return Batch(pixels, ids, tuple(range(PAIRS)))


def cut(batch: Batch, micro: int) -> list[Batch]:
    return [
        Batch(
            batch.pixel_values[i : i + micro],
            batch.input_ids[i : i + micro],
            batch.numbers[i : i + micro],
        )
        for i in range(0, len(batch), micro)
    ]


def gradients(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in loaded.model.trainable() if p.grad is not None}
    loaded.model.zero_grad(set_to_none=True)
    return found


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("room", [NO_ROOM, ALL_ROOM])
@pytest.mark.parametrize("micro", [1, 2, 5, 12])
@pytest.mark.parametrize("scenario", [n for n, s in SCENARIOS.items() if s.trains])
def test_exact_is_one_big_batch_in_transformers_own_words(scenario, micro, room, pairs):
    loaded = load(scenario)
    model = loaded.model
    pixels = pairs.pixel_values.float() * model._gain + model._shift
    output = model.clip(input_ids=pairs.input_ids, pixel_values=pixels, return_loss=True)
    output.loss.backward()
    expected = gradients(loaded)
    loss = accumulation(loaded, room=room)(0, cut(pairs, micro))
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert_same(gradients(loaded), expected)


def test_exact_with_matryoshka_is_one_big_batch(pairs):
    loaded = load("dual_lora")
    at_once, cut_up = accumulation(loaded, room=ALL_ROOM), accumulation(loaded)
    for step in (at_once, cut_up):
        step.loss = replace(step.loss, dimensions=(64, 32))
    loss = at_once(0, [pairs]).item()
    expected = gradients(loaded)
    assert cut_up(0, cut(pairs, 5)).item() == pytest.approx(loss, rel=1e-5)
    assert_same(gradients(loaded), expected)


@pytest.mark.parametrize("micro", [1, 4, 12])
@pytest.mark.parametrize("scenario", ["dual_lora", "text_lora"])
def test_masks_belong_to_the_pairs_whatever_the_micro_batches(scenario, micro, pairs):
    loaded = load(scenario, lora_dropout="0.3")
    at_once = accumulation(loaded, room=ALL_ROOM)
    expected_loss = at_once(7, [pairs]).item()
    expected = gradients(loaded)
    step = accumulation(loaded)
    assert step(7, cut(pairs, micro)).item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same(gradients(loaded), expected)
    assert step(8, cut(pairs, micro)).item() != pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("extra", [{}, {"lora_targets": "all"}, {"lora_dora": "true"}])
def test_kept_and_repeated_graphs_give_the_same_bits(extra, pairs):
    loaded = load("dual_lora", lora_dropout="0.2", **extra)
    results = []
    for room in (NO_ROOM, 600_000, ALL_ROOM):
        step = accumulation(loaded, room=room)
        losses = [step(i, cut(pairs, 3)).item() for i in (0, 1)]
        results.append((losses, gradients(loaded)))
    for losses, found in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(found[name], g) for name, g in results[0][1].items())


def test_as_many_graphs_are_kept_as_there_is_room_for(pairs):
    loaded = load("dual_lora")
    towers = make_towers(loaded, 1, pad_token_id(loaded))
    encoded = []

    def counting(inputs):
        encoded.append(torch.is_grad_enabled())
        return loaded.model.encode_images(inputs)

    counted = Towers(replace(towers.images, encode_inputs=counting), towers.texts)
    batches = cut(pairs, 3)
    step = accumulation(loaded, room=ALL_ROOM, towers=counted)
    step(0, batches)
    assert encoded == [True] * 4
    graph_bytes = step.graphs.bytes_per_cell["images"] * 3
    encoded.clear()
    halved = accumulation(loaded, room=int(graph_bytes * 2.5), towers=counted)
    halved(0, batches)
    assert encoded == [True, True, False, False, True, True]
    encoded.clear()
    assert halved.graphs.halve()
    halved(1, batches)
    assert encoded == [True] + [False] * 3 + [True] * 3  # the first is kept in any case
    assert not halved.graphs.halve()


def test_what_a_graph_holds_is_counted(pairs):
    """Compared with what a projection and a normalization are known to save."""
    loaded = load("linear_probe")
    step = accumulation(loaded, room=ALL_ROOM)
    step(0, [pairs])
    width = loaded.base.model.config.vision_config.hidden_size
    dimension = loaded.base.model.config.projection_dim
    # The features, what the projection makes of them, and its norm before and after the clamp
    expected = 4 * (width + dimension + 2)
    assert step.graphs.bytes_per_cell["images"] == expected


def test_a_caption_that_comes_twice_is_encoded_once_and_short_ones_are_not_filled(pairs):
    loaded = load("dual_lora")
    chunks = make_towers(loaded, 1, pad_token_id(loaded)).texts.make_chunks(cut(pairs, 4)).chunks
    widths = [chunk.inputs.shape[1] for chunk in chunks]
    assert sum(len(chunk.keys) for chunk in chunks) == PAIRS - 1
    assert widths == sorted(widths) and widths[0] < widths[-1] == pairs.input_ids.shape[1]


def test_positives_by_caption_reach_the_loss(pairs):
    loaded = load("dual_lora")
    step = replace(accumulation(loaded), positives=CaptionPositives(pad_token_id(loaded)))
    images, texts = loaded.model(pairs.pixel_values, pairs.input_ids)
    groups = torch.tensor([*range(8), 4, *range(9, 12)])
    expected = make_loss(load_settings({}, environ={}).values, loaded.model)(images, texts, groups)
    expected.backward()
    wanted = gradients(loaded)
    assert step(0, cut(pairs, 5)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(loaded), wanted)


def test_bf16_autocast_changes_nothing_between_the_passes(pairs):
    loaded = load("linear_probe")
    loaded = replace(loaded, precision=Precision("bf16", torch.device("cpu")))
    at_once = accumulation(loaded)(0, [pairs])
    expected = gradients(loaded)
    cut_up = accumulation(loaded)(0, cut(pairs, 6))
    assert cut_up.item() == pytest.approx(at_once.item(), rel=2e-2)
    for name, gradient in gradients(loaded).items():
        similarity = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.99


def test_frozen_weights_in_the_dtype_of_autocast_change_no_bit(pairs):
    cast = load("dual_lora", precision="bf16")
    plain = load("dual_lora")
    weight = cast.model.clip.base_model.model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert weight.dtype == torch.bfloat16
    for encode, inputs in (
        ("encode_images", pairs.pixel_values),
        ("encode_texts", pairs.input_ids),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (getattr(m.model, encode)(inputs) for m in (cast, plain))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("room", [NO_ROOM, ALL_ROOM])
def test_local_is_the_mean_of_the_micro_batches_own_losses(room, pairs):
    loaded = load("dual_lora")
    loss = make_loss(load_settings({}, environ={}).values, loaded.model)
    batches = cut(pairs, 5)
    parts = [loss(*loaded.model(b.pixel_values, b.input_ids)) * len(b) / PAIRS for b in batches]
    sum(parts).backward()
    expected = gradients(loaded)
    step = accumulation(loaded, LocalAccumulation, room)
    assert step(0, batches).item() == pytest.approx(sum(parts).item(), rel=1e-5)
    assert_same(gradients(loaded), expected)


def test_the_random_state_outside_does_not_matter(pairs):
    step = accumulation(load("dual_lora", lora_dropout="0.5"))
    torch.manual_seed(1)
    one = step(3, cut(pairs, 6)).item()
    torch.manual_seed(2)
    assert step(3, cut(pairs, 6)).item() == one
