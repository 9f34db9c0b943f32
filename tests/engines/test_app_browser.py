"""The page of `reccomp-hf app` in Chromium, as visitors use it: `pytest -m browser`."""

import pytest
from app_pages import CHROMIUM, Visitor, served

from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.app.limits import MAX_BYTES

pytestmark = pytest.mark.browser

QUESTION = "What letter is on the cyan sign?"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    pytest.importorskip("gradio")
    with served("demo", "--max-new-tokens", "8", folder=tmp_path_factory.mktemp("page")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path: apt-get install chromium")
    with playwright.sync_playwright() as library:
        opened = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, url):
    """Open the page; in the end nothing was fetched from elsewhere and the console has no errors."""
    visitors = []

    def call(**options):
        visitors.append(Visitor(browser, url, **options))
        return visitors[-1]

    yield call
    for visitor in visitors:
        assert (visitor.elsewhere, visitor.errors) == ([], [])
        visitor.context.close()


@pytest.fixture
def visitor(visit):
    return visit()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    draw_scene(1_000_000).image.save(path)
    return path


# ---- asking --------------------------------------------------------------------------------------------------------


def test_an_example_is_answered_with_and_without_compression(visitor):
    visitor.example(0)
    assert (visitor.answer("A"), visitor.answer("B")) == ("N", "N")
    assert (visitor.tokens("A"), visitor.tokens("B")) == (16, 144)
    for letter in "AB":
        words = visitor.tab.locator(f"#rc-panel-{letter}").inner_text()
        assert " of 144 visual tokens" in words and " ms" in words
    legend = visitor.tab.locator("#rc-panel-A figcaption").inner_text()
    assert "kept to cover the picture" in legend and "128 patches not read at all" in legend
    picture = visitor.tab.locator("#rc-panel-A img")
    assert picture.evaluate("image => image.complete && image.naturalWidth > 200")
    assert picture.get_attribute("alt").startswith("the patches chosen for this question: ")


def test_a_picture_of_ones_own_and_a_second_question(visitor, scene):
    visitor.upload(scene)
    visitor.wait_for_status("The picture has 96 x 96 pixels")
    visitor.ask(QUESTION)
    assert visitor.answer("A") == "N" and visitor.tokens("A") == 16
    visitor.ask("What color is the ring?")
    assert (visitor.answer("A"), visitor.answer("B")) == ("purple", "purple")
    assert visitor.tab.locator("#rc-question textarea").input_value() == ""
    back = visitor.tab.locator("#rc-panel-A .rc-back").inner_text()
    assert "What came back: 11 patches" in back and visitor.tokens("A") == 16 + 11
    rows = visitor.tab.locator("#rc-log tbody tr").all_inner_texts()
    assert len(rows) == 2 and QUESTION in rows[0] and "27 tokens, 11 came back" in rows[1]
    visitor.tab.get_by_role("button", name="New conversation").click()
    visitor.wait_for_status("A new conversation begins.")
    visitor.ask("What color is the ring?")
    assert visitor.tokens("A") == 16 and visitor.tab.locator("#rc-log tbody tr").count() == 1


def test_the_slider_and_the_menu_answer_again(visitor):
    visitor.example(0)
    visitor.tab.locator("#rc-budget-A input[type=number]").fill("40")
    visitor.wait_for_tokens("A", 40)
    visitor.tab.locator("#rc-menu-A input").focus()
    visitor.tab.keyboard.press("Tab")  # a menu that is left as it was changes nothing
    visitor.choose("B", "method divprune")
    visitor.wait_for_tokens("B", 16)
    assert visitor.tab.locator("#rc-budget-B input[type=number]").input_value() == "16"
    visitor.choose("B", "preset paper")
    visitor.tab.get_by_role("region", name="Answer with B: preset paper").wait_for()
    assert visitor.tokens("B") not in (16, 144)  # a number that depends on the picture
    assert visitor.tab.locator("#rc-budget-B input[type=number]").input_value() == "0"
    assert visitor.tokens("A") == 40


def test_heat_maps(visitor):
    visitor.example(1)
    visitor.tab.get_by_role("button", name="Heat maps").click()
    pictures = visitor.tab.locator("#rc-heat img")
    pictures.first.wait_for()
    assert [picture.get_attribute("alt").partition(":")[0] for picture in pictures.all()] == [
        "saliency of every patch",
        "relevance of every patch",
    ]


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_a_question_without_a_picture(visitor):
    visitor.tab.locator("#rc-question textarea").fill("What is this?")
    visitor.tab.locator("#rc-ask").click()
    visitor.wait_for_status("Choose a picture first.")
    assert visitor.tab.locator("#rc-question textarea").input_value() == "What is this?"


def test_a_file_that_is_not_a_picture(visitor, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear reader")
    (tmp_path / "letter.png").write_text("Dear reader")
    visitor.upload(tmp_path / "letter.png")
    visitor.wait_for_status("This file cannot be read as a picture: cannot identify image file, the formats")
    visitor.tab.get_by_role("button", name="Drop an image file here to upload").wait_for()
    visitor.upload(tmp_path / "letter.txt")
    visitor.tab.get_by_text("Invalid file type: letter.txt").wait_for()
    visitor.example(0)
    assert visitor.answer("A") == "N"


def test_a_picture_of_twenty_megabytes(visitor, tmp_path, scene):
    large = tmp_path / "large.png"
    large.write_bytes(scene.read_bytes() + bytes(2 * MAX_BYTES))
    visitor.upload(large)
    visitor.tab.get_by_text("exceed the maximum allowed size of 10.0 Mb").wait_for()
    visitor.upload(scene)
    visitor.wait_for_status("The picture has 96 x 96 pixels")


# ---- who visits ----------------------------------------------------------------------------------------------------


def test_two_visitors_at_once(visit):
    one, other = visit(), visit()
    one.tab.locator("#rc-examples button").nth(0).click()
    other.tab.locator("#rc-examples button").nth(2).click()
    one.wait_for_status(QUESTION)
    other.wait_for_status("Is there an orange circle?")
    assert (one.answer("A"), other.answer("A")) == ("N", "yes")
    other.ask("What color is the cross?")
    one.ask("What color is the ring?")
    assert (one.answer("A"), other.answer("A")) == ("purple", "cyan")
    assert one.tab.locator("#rc-log tbody tr").count() == other.tab.locator("#rc-log tbody tr").count() == 2


def test_the_keyboard_is_enough(visitor):
    active = (
        "() => { const e = document.activeElement; "
        "return e === document.body ? '' : `${e.innerText} ${e.getAttribute('aria-label')}` }"
    )

    def focus(words):
        for _ in range(60):
            visitor.tab.keyboard.press("Tab")
            if words in visitor.tab.evaluate(active):
                return
        raise AssertionError(f"Tab does not reach {words}")

    focus(QUESTION)
    outline = visitor.tab.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    visitor.tab.keyboard.press("Enter")
    visitor.wait_for_status(QUESTION)
    focus("range slider for Budget A")
    for _ in range(4):
        visitor.tab.keyboard.press("ArrowRight")
    moved = int(visitor.tab.locator("#rc-budget-A input[type=range]").input_value())
    assert 16 < moved <= 20
    visitor.wait_for_tokens("A", moved)
    visitor.tab.locator("#rc-question textarea").focus()
    visitor.tab.keyboard.type("What color is the ring?")
    visitor.tab.keyboard.press("Enter")
    visitor.wait_for_status("What color is the ring?")
    focus("Settings B")
    visitor.tab.keyboard.press("ArrowDown")
    visitor.tab.keyboard.press("Enter")
    visitor.tab.get_by_role("region", name="Answer with B: preset paper").wait_for()


@pytest.mark.parametrize("width", [390, 320])
def test_a_narrow_screen(visit, width):
    visitor = visit(width=width)
    visitor.example(0)
    assert visitor.answer("A") == "N"
    assert visitor.tab.evaluate("() => document.documentElement.scrollWidth") <= width
    size = visitor.tab.locator("#rc-panel-A img").bounding_box()
    assert 0.6 * width < size["width"] <= width
    button = visitor.tab.locator("#rc-ask").bounding_box()
    assert button["height"] >= 32 and button["width"] > 0.6 * width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_labels(visit, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    visitor = visit(scheme=scheme)
    visitor.example(0)
    visitor.ask("What color is the ring?")
    visitor.tab.get_by_role("button", name="Heat maps").click()
    visitor.tab.locator("#rc-heat img").first.wait_for()
    found = axe.Axe().run(visitor.tab).response["violations"]
    assert len(axe.Axe().run(visitor.tab, options={}).response["passes"]) > 20  # it has looked
    report = [(one["id"], one["impact"], [node["html"][:160] for node in one["nodes"]]) for one in found]
    assert report == [], "\n".join(map(str, report))


def test_the_space_runs_from_its_folder(browser, tmp_path):
    from reccomp_hf.engines.app.space import write_space

    write_space(tmp_path / "space", "demo")
    with served(script=tmp_path / "space" / "app.py", folder=tmp_path / "space", GRADIO_SERVER_PORT="0") as address:
        visitor = Visitor(browser, address)
        visitor.example(0)
        assert visitor.answer("A") == "N" and visitor.elsewhere == []
        visitor.context.close()
