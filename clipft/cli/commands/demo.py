"""``clipft demo``."""

import shutil
import time
from pathlib import Path

from clipft.cli.console import Output, end
from clipft.cli.options import command
from clipft.config.fields import Section, setting
from clipft.config.settings import DEMO
from clipft.config.sources import LoadedSettings
from clipft.core.common import counted


class DemoOptions(Section):
    title = "Demo"
    pairs: int = setting(3000, "Number of products to render.", metavar="N", ge=64)
    render_only: bool = setting(False, "Render and pack the catalogue, then stop.")


@command(
    "model",
    "scenario",
    "epochs",
    "effective_batch_size",
    "lr",
    "num_workers",
    "device",
    "seed",
    "output_dir",
    options=DemoOptions,
    profile=DEMO,
)
def demo(loaded: LoadedSettings, options: DemoOptions, out: Output) -> None:
    """Run everything in a minute, without network, data or GPU.

    Renders a furniture catalogue, packs it, evaluates the tiny CLIP model that is included in
    clipft, fine-tunes it, and shows the improvement. All files stay in --output-dir.

    Examples:

        clipft demo
        clipft demo --scenario vision_lora --epochs 4
    """
    from clipft.cli.preflight import import_libraries
    from clipft.models.source import check_model

    check_model(loaded.values.model)
    started = time.perf_counter()
    folder = loaded.values.output_dir
    data = _make_catalogue(folder, options.pairs, loaded.values.seed, out)
    if options.render_only:
        out.result({"data_dir": str(data)})
        following = ("train", "--mini-train", "--model", "tiny", "--data-dir", data)
        end(out, {"catalogue": data}, following)
        return
    import_libraries()
    from clipft.cli.answers import FigureOptions
    from clipft.cli.running import run_training

    changes = {"data_dir": data, "output_dir": folder / "runs", "processes": 1}
    settings = loaded.values.model_copy(update=changes)
    run_training(LoadedSettings(settings, loaded.origins), out, FigureOptions())
    out.note(f"Total time: {time.perf_counter() - started:.0f} s.")


def _make_catalogue(folder: Path, pairs: int, seed: int, out: Output) -> Path:
    """Render and pack the catalogue, unless an earlier demo did; return the folder of shards."""
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
    stamp.touch()  # last: a demo that was stopped before this renders again
    return data
