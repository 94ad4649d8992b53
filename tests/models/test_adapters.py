"""Every kind of adapter starts as the pretrained model, and PEFT alone can load it."""

import pytest
import torch
from peft import PeftModel

from clipft.config.scenarios import SCENARIOS
from clipft.config.sources import load_settings
from clipft.core.errors import ModelError
from clipft.models.pretrained import load_pretrained
from clipft.models.trainable import TARGETS, TrainableModel, adapt

KINDS = [
    {},
    {"lora_targets": "all"},
    {"lora_rslora": True, "lora_targets": "qkvo"},
    {"lora_dora": True},
    {"lora_init": "gaussian", "lora_targets": "mlp"},
    {"lora_init": "orthogonal"},
    {"lora_init": "olora"},
    {"lora_init": "pissa", "lora_targets": "all", "lora_rslora": True},
    {"lora_init": "pissa", "lora_dora": True},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))


def adapted(scenario="dual_lora", seed=0, **given) -> TrainableModel:
    settings = load_settings({"lora_r": "4", **given}, environ={}).values
    torch.manual_seed(seed)
    return adapt(load_pretrained("tiny"), SCENARIOS[scenario], settings).eval()


def trained(model: TrainableModel) -> TrainableModel:
    """Move all trainable weights away from their start, as training does."""
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pairs():
    inputs = load_pretrained("tiny").inputs
    side = inputs.image_size
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    texts = ["a red chair", "a lamp", "an oak table", "a blue sofa"]
    return pixels, torch.tensor(inputs.tokenizer(texts, padding=True)["input_ids"])


def embedded(model, pairs):
    with torch.no_grad():
        return torch.stack(model(*pairs))


@every_kind
def test_every_kind_of_adapter_starts_as_the_pretrained_model(kind, pairs):
    expected = embedded(adapted("zero_shot"), pairs)
    torch.testing.assert_close(embedded(adapted(**kind), pairs), expected, atol=2e-5, rtol=1e-4)


@every_kind
def test_weights_load_into_a_newly_adapted_model(kind, pairs):
    model = trained(adapted(**kind))
    again = adapted(**kind)
    again.load_trainable_state(model.trainable_state())
    assert torch.equal(embedded(again, pairs), embedded(model, pairs))


@every_kind
def test_peft_alone_opens_the_written_adapter(kind, pairs, tmp_path):
    model = trained(adapted(**kind))
    model.clip.save_pretrained(str(tmp_path))
    base = load_pretrained("tiny")
    torch.manual_seed(123)  # nothing of it may be random
    alone = PeftModel.from_pretrained(base.model, str(tmp_path)).eval()
    pixels = pairs[0].float() * model._gain + model._shift
    with torch.no_grad():
        images = alone.get_image_features(pixel_values=pixels).pooler_output
        texts = alone.get_text_features(input_ids=pairs[1]).pooler_output
    theirs = torch.nn.functional.normalize(torch.stack([images, texts]), dim=-1)
    torch.testing.assert_close(embedded(model, pairs), theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_go_on_the_named_maps_of_every_encoder_layer_only(targets):
    model = adapted("vision_lora", lora_targets=targets)
    found = {n.split(".lora_A")[0] for n, _ in model.trainable() if ".lora_A" in n}
    layers = model.clip.config.vision_config.num_hidden_layers
    assert len(found) == layers * len(TARGETS[targets])
    assert {name.rsplit(".", 1)[1] for name in found} == set(TARGETS[targets])
    assert all(".vision_model.encoder.layers." in name for name in found)


def test_rank_stabilized_scale():
    def scaling(**given):
        model = adapted(lora_r="16", lora_alpha="32", **given)
        return next(m.scaling["default"] for m in model.modules() if hasattr(m, "scaling"))

    assert scaling() == 2.0
    assert scaling(lora_rslora=True) == 8.0


def test_a_model_without_the_targets_is_refused():
    base = load_pretrained("tiny")
    for layer in base.model.vision_model.encoder.layers:
        layer.self_attn.query = layer.self_attn._modules.pop("q_proj")
        layer.self_attn.value = layer.self_attn._modules.pop("v_proj")
    settings = load_settings({}, environ={}).values
    with pytest.raises(ModelError, match="cannot adapt tiny"):
        adapt(base, SCENARIOS["vision_lora"], settings)


def test_a_rank_larger_than_the_matrix_works(pairs):
    expected = embedded(adapted("zero_shot"), pairs)
    wide = adapted(lora_r="1000")
    torch.testing.assert_close(embedded(wide, pairs), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scenario", ["dual_lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(scenario, pairs):
    """The loss and its gradients are equal, even with dropout, and fewer values are kept."""

    def step(model):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            images, texts = model.train()(*pairs)
            loss = (images @ texts.T * torch.arange(4.0)).sum()
        loss.backward()
        gradients = {n: p.grad for n, p in model.trainable() if p.grad is not None}
        return loss.item(), gradients, kept

    plain = step(trained(adapted(scenario, lora_dropout="0.3")))
    model = trained(adapted(scenario, lora_dropout="0.3"))
    model.clip.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = step(model)
    assert checkpointed[0] == plain[0]
    assert checkpointed[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(checkpointed[1][name], gradient), name
    assert checkpointed[2] < plain[2] / 2
