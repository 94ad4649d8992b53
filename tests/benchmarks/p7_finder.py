"""P7: check that the batch finder finds the largest micro-batch within a memory limit.

    python tests/benchmarks/p7_finder.py [--quick] [--json FILE]

Runs dual_lora on a CLIP with random weights on the CPU under RLIMIT_DATA. The peer is an
exhaustive search in steps of 8, with one forward and one backward pass each, until memory runs
out. Each runs in its own process, whose limit is the data segment after loading plus a fixed
amount.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import arguments, write_figures

sys.path.insert(0, str(Path(__file__).parents[2]))

GIB = 1 << 30
EFFECTIVE, STEP = 4096, 8
GOAL, MOST_PROBES = 0.05, 10


@dataclass(frozen=True)
class Row:
    """``true_largest`` is from the exhaustive search. ``given_back_mib`` is the resident memory
    after the search minus that before the first probe."""

    name: str
    limit_gib: float
    true_largest: int
    found_largest: int
    distance: str
    probes: int
    over_limit: int
    given_back_mib: int
    chosen: int
    met: bool


SIZES = {
    "tiny, 64 pixels": (128, 64, 32, 0.5),
    "hidden 384/256, 12 layers, 224 pixels": (384, 256, 32, 1.5),
    "hidden 384/256, 12 layers, 224 pixels, more": (384, 256, 32, 3.0),
}


def make_model(folder: Path, vision: int, text: int, patch: int, pixels: int) -> None:
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from tests.models.checkpoints import clip_tokenizer

    torch.manual_seed(0)
    layers = 12 if pixels == 224 else 4
    config = CLIPConfig(
        projection_dim=256,
        vision_config={
            "hidden_size": vision,
            "intermediate_size": vision * 4,
            "num_attention_heads": vision // 64,
            "num_hidden_layers": layers,
            "image_size": pixels,
            "patch_size": patch,
        },
        text_config={
            "hidden_size": text,
            "intermediate_size": text * 4,
            "num_attention_heads": text // 64,
            "num_hidden_layers": layers,
        },
    )
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    square = {"height": pixels, "width": pixels}
    CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size=square).save_pretrained(folder)


def measure(name: str, quick: bool) -> Row:
    vision, text, patch, limit = SIZES[name]
    pixels = 64 if "64 pixels" in name else 224
    if quick:
        limit /= 2
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), vision, text, patch // (2 if pixels == 64 else 1), pixels)
        true = child("exhaust", folder, limit)["largest"]
        found = child("find", folder, limit)
    # The exhaustive search finds the true largest size only with the precision of its step
    nearest = min(max(found["largest"], true), true + STEP - 1)
    distance = found["largest"] / nearest - 1
    over = sum(not probe["fits"] for probe in found["probes"])
    met = abs(distance) <= GOAL and len(found["probes"]) <= MOST_PROBES
    return Row(
        name,
        limit,
        true,
        found["largest"],
        f"{distance:+.1%}",
        len(found["probes"]),
        over,
        found["after"] - found["before"] >> 20,
        found["chosen"],
        met,
    )


def child(mode: str, folder: str, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", mode, folder, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{mode} ended with {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def in_child(mode: str, folder: str, limit: float) -> None:
    import resource

    import psutil

    from clipft.config.sources import load_settings
    from clipft.embedding.load import load_model
    from clipft.training.finder.probe import ModelProbe, measure

    flags = {"model": folder, "scenario": "dual_lora", "device": "cpu", "precision": "fp32"}
    settings = load_settings(flags, environ={}).values
    loaded = load_model(settings)
    probe = ModelProbe.of(loaded, settings)
    probe(2)  # a warm-up: libraries allocate on first use
    me = psutil.Process()
    before = me.memory_info().rss
    most = me.memory_info().data + int(limit * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    if mode == "exhaust":
        print(json.dumps({"largest": exhaustive(probe)}))
        return
    found = measure(probe, EFFECTIVE, lambda tried: None)
    after = me.memory_info().rss
    print(json.dumps({**found.to_dict(), "before": before, "after": after}))


def exhaustive(probe: Any) -> int:
    from clipft.core.memory import give_back
    from clipft.core.out_of_memory import memory_ran_out

    def passes(size: int) -> bool:
        try:
            probe._step(probe._batch(size))
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            return False
        return True

    largest = 0
    for size in range(STEP, EFFECTIVE + 1, STEP):
        fits = passes(size)
        probe.model.zero_grad(set_to_none=True)
        give_back(probe.device)
        if not fits:
            return largest
        largest = size
    return largest


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return in_child(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    options = arguments(__doc__).parse_args()
    names = list(SIZES)[: 1 if options.quick else None]
    rows = [measure(name, options.quick) for name in names]
    for row in rows:
        print(row)
    if options.json:
        write_figures(options.json, "P7", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
