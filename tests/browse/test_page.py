"""The page in a real browser: searching, dropping a picture, judging with keys, and the tally.

Needs Chromium, and playwright of the dev packages; its own browsers are not used.
"""

import re
from collections.abc import Iterator

import pytest

from tests.browse.conftest import EXAMPLES, Served
from tests.conftest import jpeg
from tests.report.test_accessibility import AXE, BROWSER

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium")


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served: Served) -> Iterator[object]:
    """A fresh tab on the page; whatever its console reports is an error."""
    page = browser.new_page()
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(served.url)
    expect(page.locator("h1")).to_have_text("dual_lora on tiny")
    yield page
    page.close()
    assert problems == []


def search(page, words: str) -> None:
    page.fill("#words", words)
    page.press("#words", "Enter")
    expect(page.locator("#asked")).to_have_text(words)


def drop(page, data: bytes, name: str) -> None:
    script = """([bytes, name]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, [list(data), name])
    for event in ("dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


def test_words_are_searched_with_both_models_side_by_side(page, served):
    search(page, "a red chair")
    found = served.comparison.by_words("a red chair")
    expect(page.locator("#status")).to_have_text(found.summary())
    sizes = [page.locator(f"#list-{at} li").first.bounding_box() for at in (0, 1)]
    assert sizes[0]["width"] == sizes[1]["width"], "the images of one model are larger"
    for at, (name, images) in enumerate(
        {"Pretrained": found.pretrained, "Fine-tuned": found.fine_tuned}.items()
    ):
        expect(page.locator(f"#name-{at}")).to_have_text(name)
        items = page.locator(f"#list-{at} li")
        expect(items).to_have_count(len(images))
        for image, item in zip(images, items.all(), strict=True):
            expect(item.locator("small")).to_have_text(image.key)
            only_here = image.other_rank > len(images)
            expect(item.locator(".only")).to_have_count(int(only_here))
            moved = f"rank {image.other_rank}"
            if only_here or image.other_rank != image.rank:
                expect(item.locator(".where")).to_contain_text(moved)
    assert page.evaluate("document.querySelector('#list-0 img').decode().then(() => true)")


def test_a_dropped_picture_is_searched_with(page):
    from clipft.data.demo.catalogue import render_pair

    drop(page, jpeg(render_pair(7, 1003)), "chair.jpg")
    expect(page.locator("#asked")).to_have_text("Your picture")
    expect(page.locator("#asked-picture")).to_be_visible()
    for at in (0, 1):
        expect(page.locator(f"#list-{at} li small").first).to_have_text("01003")


def test_a_dropped_file_that_is_no_image_is_refused_in_words(browser, served):
    page = browser.new_page()
    page.goto(served.url)
    expect(page.locator("h1")).to_have_text("dual_lora on tiny")
    drop(page, b"%PDF-1.7", "list.pdf")
    expect(page.locator("#status")).to_contain_text("The image cannot be used")
    page.close()


def test_judging_with_keys_hides_the_models_and_counts_after_a_reload(page, served):
    before = served.judging.tally
    page.check("[name=mode][value=blind]")
    for key in ("1", "3"):
        page.keyboard.press("d")
        expect(page.locator("#judge")).to_be_visible()
        assert "tuned" not in page.locator("#results").inner_text().lower()
        expect(page.locator("#name-0")).to_have_text("A")
        page.keyboard.press(key)
        expect(page.locator("#status")).to_contain_text("Saved")
        expect(page.locator("#judge")).to_be_hidden()
        expect(page.locator("#name-0")).to_have_text(re.compile("^A: (pretrained|fine-tuned)$"))
        expect(page.locator("#next")).to_be_visible()
    assert served.judging.tally.judged == before.judged + 2
    assert served.judging.tally.same == before.same + 1
    assert len(served.judgments.read_text().splitlines()) >= 2
    page.reload()
    expect(page.locator("#count-same")).to_have_text(str(before.same + 1))
    expect(page.locator("#sentence")).to_have_text(served.judging.tally.sentence())


def test_a_verdict_that_is_given_twice_at_once_counts_once(page, served):
    before = served.judging.tally.judged
    page.check("[name=mode][value=blind]")
    page.click("#draw")
    expect(page.locator("#judge")).to_be_visible()
    page.evaluate("""() => {
        const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
        press("1"); press("1"); press("2");
    }""")
    expect(page.locator("#status")).to_contain_text("Saved: A is better")
    assert served.judging.tally.judged == before + 1
    page.click("#next")
    expect(page.locator("#judge")).to_be_visible()
    expect(page.locator("#next")).to_be_hidden()


def test_a_caption_of_the_data_can_be_tried(page):
    examples = page.locator("#examples button")
    expect(examples).to_have_count(2)
    examples.first.click()
    expect(page.locator("#asked")).to_have_text(EXAMPLES[0])
    expect(page.locator("#words")).to_have_value(EXAMPLES[0])
    expect(page.locator("#list-1 li")).to_have_count(8)
    expect(page.locator("#examples")).to_be_hidden()
    page.check("[name=mode][value=blind]")
    expect(page.locator("#about")).to_contain_text("from the 40 images")
    expect(page.locator("#examples")).to_be_hidden()


def test_a_digit_typed_into_the_words_is_no_verdict(page, served):
    before = served.judging.tally.judged
    page.check("[name=mode][value=blind]")
    page.click("#draw")
    expect(page.locator("#judge")).to_be_visible()
    page.focus("#words")
    page.keyboard.type("1 2")
    expect(page.locator("#words")).to_have_value("1 2")
    assert served.judging.tally.judged == before
    expect(page.locator("#judge")).to_be_visible()


def test_captions_with_markup_are_shown_as_text(page):
    markup = "<img src=x onerror=alert(1)> chair"
    search(page, markup)
    expect(page.locator("#asked img")).to_have_count(0)


@pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core (see .ci/run)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    script = "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
    search(page, f"a {scheme} chair")
    assert page.evaluate(script) == []
    page.check("[name=mode][value=blind]")
    page.click("#draw")
    expect(page.locator("#judge")).to_be_visible()
    assert page.evaluate(script) == []


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    search(page, "a wooden table")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
