"""The scripts find what they look for, on files made here."""

import io
import tarfile

import pytest
from PIL import Image

from tests.corpora import images, tars
from tests.corpora.isolated import outcomes


def behave(path):
    """Do what the name of the file says."""
    import os
    import sys
    import time

    if path.name == "crash":
        os._exit(9)
    if path.name == "hang":
        time.sleep(60)
    if path.name == "print":
        print("from a library", file=sys.stderr)
    return "well", ""


def test_crashes_hangs_and_printing_are_outcomes(tmp_path):
    paths = [tmp_path / name for name in ("a", "crash", "b", "hang", "c", "print")]
    found = list(outcomes(f"{__name__}:behave", paths, seconds=3))
    words = [(path.name, word) for path, word, _ in found]
    assert words[:3] == [("a", "well"), ("crash", "crashed"), ("b", "well")]
    assert words[3:6] == [("hang", "took more than 3 s"), ("c", "well"), ("print", "well")]
    assert found[6][1:] == ("printed to stderr", "from a library")


def test_images_are_decoded_or_refused_by_name(tmp_path):
    photo = Image.effect_noise((80, 60), 80)
    for kind in ("JPEG", "PNG", "TIFF", "TGA", "AVIF"):
        photo.convert("RGB").save(tmp_path / f"a.{kind.lower()}", kind)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "page.jpg").write_bytes(b"<html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    found = {path.name: (word, remark) for path, word, remark in images.check(tmp_path, 60)}
    assert {name for name, (word, _) in found.items() if word == "decoded"} == {
        *("a.jpeg", "a.png", "a.tiff", "a.avif")
    }
    assert found["page.jpg"] == ("refused", "not an image but a web page")
    assert found["a.tga"][1].startswith("TGA images are not read")
    assert found["cut.png"][0] == "refused"
    assert {word for word, _ in found.values()} <= images.GOOD


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_as_tarfile_reads_them_or_refused(tmp_path, kind):
    for name, content in (("short", 3), ("x" * 60 + "/" + "y" * 60, 600)):
        with tarfile.open(tmp_path / f"{name[:5]}.tar", "w", format=kind) as tar:
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = content
            tar.addfile(info, io.BytesIO(b"b" * content))
    whole = (tmp_path / "short.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "joined.tar").write_bytes(whole * 2)
    found = {path.name: word for path, word, _ in tars.check(tmp_path, 60)}
    assert found.pop("cut.tar") == "refused"
    assert {word.partition(",")[0] for word in found.values()} == {"read"}
