"""The mean of several models' weights is exact: its change is the mean of their changes."""

from pathlib import Path

import pytest
import torch

from clipft.config.settings import Settings
from clipft.core.errors import UsageError
from clipft.evaluation.soup.mixing import Member, check_mixable, mixed_settings, mixed_state
from clipft.models.huggingface import merged
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import adapt
from clipft.runs.checkpoint import save_checkpoint

BASE = {"name": "tiny", "fingerprint": "f" * 64}


def adapted(settings: Settings):
    torch.manual_seed(1)
    return adapt(load_pretrained("tiny"), settings.declared_scenario, settings).eval()


def member(folder: Path, seed: int, **given) -> tuple[Member, dict[str, torch.Tensor]]:
    """A model with random weights, saved, and all weights of it after merging."""
    settings = Settings(model="tiny", seed=seed, **given)
    model = adapted(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.trainable():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    path = folder / f"{seed}.pt"
    content = {"epoch": 1, "model_state_dict": model.trainable_state(), "base_model": BASE}
    save_checkpoint(path, {**content, "settings": settings.model_dump(mode="json")})
    return Member(path, path, settings), merged(model).state_dict()


def mixture(members: list[Member]) -> dict[str, torch.Tensor]:
    """All weights of the mean of ``members``, as a model of clipft."""
    model = adapted(mixed_settings(members))
    model.load_trainable_state(mixed_state(members, model.trainable_state()))
    return merged(model).state_dict()


@pytest.mark.parametrize(
    "given",
    [
        [{"scenario": "full"}] * 3,
        [{"scenario": "linear_probe"}] * 2,
        [{"scenario": "dual_lora"}] * 2,
        [{"lora_r": 4, "lora_alpha": 3}, {"lora_r": 8, "lora_rslora": True}, {}],
        [{"lora_targets": "qkvo", "logit_scale": "trained"}, {"lora_targets": "mlp"}],
        [{"scenario": "vision_lora"}, {"scenario": "text_lora"}, {"scenario": "dual_lora"}],
    ],
    ids=["full", "projections", "LoRA", "ranks and scales", "layers", "towers"],
)
def test_the_weights_of_the_mixture_are_the_mean_of_the_merged_weights(given, tmp_path):
    made = [member(tmp_path, seed, **each) for seed, each in enumerate(given)]
    members, weights = zip(*made, strict=True)
    check_mixable(members, [{}] * len(members))
    found = mixture(list(members))
    for name, weight in found.items():
        if weight.is_floating_point():
            expected = torch.stack([each[name] for each in weights]).double().mean(0).float()
            torch.testing.assert_close(weight, expected, atol=2e-6, rtol=1e-5, msg=name)


def test_one_member_alone_is_itself_to_the_bit(tmp_path):
    alone, weights = member(tmp_path, 3, lora_r=4)
    found = mixture([alone])
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def content(**given) -> dict:
    return {"base_model": BASE, "data": "a;1", **given}


@pytest.mark.parametrize(
    ("settings", "found", "said"),
    [
        ({"scenario": "full"}, {}, "trains full instead of LoRA"),
        ({"lora_dora": True}, {}, "DoRA, whose adapters cannot be averaged"),
        ({"lora_init": "pissa"}, {}, "--lora-init pissa"),
        ({"scenario": "zero_shot"}, {}, "trained nothing"),
        ({"image_size": 64}, {}, "has image_size 64 instead of 0"),
        ({"caption": "{name}"}, {}, "has caption '{name}' instead of '{caption}'"),
        ({}, {"base_model": {"name": "other", "fingerprint": "0"}}, "began with other"),
        ({}, {"data": "b;2"}, "was trained on other pairs than one"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_a_line(settings, found, said):
    members = [
        Member(Path("one"), Path("one"), Settings()),
        Member(Path("two"), Path("two"), Settings(**settings)),
    ]
    with pytest.raises(UsageError) as refused:
        check_mixable(members, [content(), content(**found)])
    assert said in refused.value.message and "two" in refused.value.message
    assert "\n" not in refused.value.message
