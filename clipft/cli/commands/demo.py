"""``clipft demo``."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from clipft.cli.console import Output, end
from clipft.cli.options import settings_command
from clipft.config.settings import DEMO
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted

Pairs = Annotated[
    int,
    typer.Option("--pairs", min=64, metavar="N", help="Products to render", rich_help_panel="Demo"),
]
RenderOnly = Annotated[
    bool,
    typer.Option("--render-only", help="Make the catalogue and stop", rich_help_panel="Demo"),
]


@settings_command(
    "model",
    "scenario",
    "epochs",
    "effective_batch_size",
    "lr",
    "num_workers",
    "device",
    "seed",
    "output_dir",
    profile=DEMO,
)
def demo(
    loaded: LoadedSettings, out: Output, pairs: Pairs = 3000, render_only: RenderOnly = False
) -> None:
    """See it all in a minute: no network, no data, no GPU.

    Renders a furniture catalogue, packs it, measures the tiny CLIP that comes with clipft,
    fine-tunes it, and shows the gain. Everything is left in --output-dir.

    Examples:

        clipft demo
        clipft demo --scenario vision_lora --epochs 4
    """
    started = time.perf_counter()
    folder = loaded.values.output_dir
    data = _make_catalogue(folder, pairs, loaded.values.seed, out)
    if render_only:
        out.result({"data_dir": str(data)})
        following = ("train", "--mini-train", "--model", "tiny", "--data-dir", data)
        end(out, {"catalogue": data}, following)
        return
    from clipft.cli.running import run_training

    settings = loaded.values.model_copy(update={"data_dir": data, "output_dir": folder / "runs"})
    alone = settings.model_copy(update={"processes": 1})
    run_training(LoadedSettings(alone, loaded.origins), out, ())
    out.note(f"{time.perf_counter() - started:.0f} s in all.")


def _make_catalogue(folder: Path, pairs: int, seed: int, out: Output) -> Path:
    """Render and pack, unless an earlier demo left the same catalogue; returns the shards."""
    data = folder / "data"
    stamp = folder / f"catalogue-{pairs}-{seed}"
    if stamp.exists() and data.is_dir():
        out.note(f"Using the catalogue in {data}.")
        return data
    from clipft.data.demo.catalogue import write_catalogue
    from clipft.data.packing.options import PackOptions
    from clipft.data.packing.pack import pack

    raw = folder / "raw"
    for old in (*folder.glob("catalogue-*"), raw, data):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    with out.progress(f"Rendering {counted(pairs, 'product')}") as report:
        write_catalogue(raw, pairs, seed, report)
    with out.progress("Packing them into shards") as report:
        pack(raw, data, PackOptions(seed=seed), report)
    stamp.touch()
    return data
