"""The page of `reccomp-hf app` without Gradio: its settings, limits, conversations, pictures, and its gate."""

import asyncio
import dataclasses
import json
import re
import threading

import pytest
import torch
from architectures import LLAVA_NEXT
from demo_model import demo_model
from PIL import Image

from reccomp_hf import Conversation
from reccomp_hf.core.settings import PRESETS
from reccomp_hf.demo import draw_scene
from reccomp_hf.engines.app import limits, pictures, talks
from reccomp_hf.engines.app.choices import OFF, OWN, Menu
from reccomp_hf.engines.app.limits import Refused, check_question, read_picture
from reccomp_hf.engines.app.talks import Talks, Visit

QUESTIONS = ["What letter is on the cyan sign?", "What color is the ring?"]
SCENE = draw_scene(1_000_000).image


@pytest.fixture
def desk():
    return Talks(*demo_model(), max_new_tokens=8)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def menu():
    return Menu(demo_model()[0].config)


def test_the_own_settings_change_nothing(menu):
    assert menu.entries()[0] == ("own settings (recoverable)", OWN)
    assert (menu.own_tokens, menu.most, menu.usual) == (16, 144, 16)
    assert menu.fields(OWN, 16) == {}
    assert menu.fields(OWN, 40) == {"budget": 40}
    assert menu.fields(OWN, 0) == {"budget": None}
    assert menu.fields(OFF, 0) == {"enabled": False}
    assert menu.tokens_for(OFF, 16) == 144 and menu.tokens_for("method:divprune", 144) == 16


def test_every_entry_gives_settings_that_the_model_takes(menu, desk):
    for _, entry in menu.entries():
        tokens = menu.tokens_for(entry, menu.own_tokens)
        chosen = menu.takes_budget(entry) == "none" or entry in ("preset:paper", "preset:authors")
        assert (tokens == 0) == (chosen and entry != OFF)
        asked = desk.ask(Visit(SCENE, QUESTIONS[:1]), entry, tokens)
        assert asked.turns[0].answer and 0 < asked.turns[0].visual_tokens <= 144
        if tokens:
            assert asked.turns[0].visual_tokens <= tokens


def test_a_preset_replaces_the_whole_section(menu):
    section = menu.section.replace(menu.fields("preset:paper", 0))
    assert section.budget is None and section.text_relevance == "last" and section.position_ids == "compact"
    fixed = menu.section.replace(menu.fields("preset:balanced", 30))
    assert fixed.budget == 30 and all(getattr(fixed, k) == v for k, v in PRESETS["balanced"].items() if k != "budget")


def test_what_is_not_in_the_menu_is_refused(menu, desk):
    for entry, tokens in (("method:none", 4), ("preset:none", 4), ("x", 4), (OWN, 145), (OWN, -1)):
        with pytest.raises(ValueError, match=r"menu|from 0 to 144"):
            menu.fields(entry, tokens)
        with pytest.raises(Refused, match="These settings do not work here"):
            desk.ask(Visit(SCENE, QUESTIONS), entry, tokens)


def test_a_tiled_model_may_read_all_its_tiles():
    config = LLAVA_NEXT.build().config
    patches, pixels = (
        (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
        config.vision_config.image_size,
    )
    largest = max(high * wide for high, wide in config.image_grid_pinpoints) // pixels**2
    assert Menu(config).most == patches * (1 + largest) > patches


# ---- limits --------------------------------------------------------------------------------------------------------


def test_pictures_are_bounded(tmp_path, monkeypatch):
    file = tmp_path / "picture.png"
    Image.new("RGB", (3000, 30)).save(file)
    assert read_picture(str(file)).size == (limits.LONGEST_SIDE, 20)
    monkeypatch.setattr(limits, "MAX_PIXELS", 89_999)
    with pytest.raises(Refused, match=r"cannot be read as a picture: it has 3000 x 30 pixels, the largest .* 89,999"):
        read_picture(str(file))
    monkeypatch.setattr(limits, "MAX_BYTES", 100)
    with pytest.raises(Refused, match="a picture may have 0 MB"):
        read_picture(str(file))


@pytest.mark.parametrize("kind", ["TIFF", "PDF", "text"])
def test_other_formats_are_refused(tmp_path, kind):
    file = tmp_path / "picture.png"
    if kind == "text":
        file.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    else:
        SCENE.save(file, kind)
    with pytest.raises(Refused, match="the formats that are read are PNG, JPEG, WEBP, GIF, BMP"):
        read_picture(str(file))


def test_questions_are_bounded(desk):
    assert check_question("  What? ") == "What?"
    with pytest.raises(Refused, match="Write a question"):
        check_question(" \n")
    with pytest.raises(Refused, match="has 501 characters; it may have 500"):
        check_question("x" * 501)
    with pytest.raises(Refused, match="at most 8 questions"):
        desk.ask(Visit(SCENE, QUESTIONS * 5), OWN, 16)
    with pytest.raises(Refused, match="Choose a picture first"):
        desk.ask(Visit(None, QUESTIONS), OWN, 16)


# ---- conversations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["append", "rebuild", "keep"])
def test_answers_are_those_of_a_conversation(desk, mode):
    model, processor = demo_model()
    expected = Conversation(model, processor, mode)
    for number, question in enumerate(QUESTIONS):
        expected.ask(question, None if number else SCENE, max_new_tokens=8)
    asked = desk.ask(Visit(SCENE, QUESTIONS, mode), OWN, 16)
    seen = [(turn.answer, turn.visual_tokens, turn.recovered) for turn in asked.turns]
    assert seen == [(turn.answer, turn.visual_tokens, turn.recovered) for turn in expected.turns]
    assert asked.most == 144 and len(asked.seconds) == 2 and all(0 < second < 60 for second in asked.seconds)


def test_only_what_is_new_is_asked(desk, monkeypatch):
    asked, ask = [], Conversation.ask
    monkeypatch.setattr(
        Conversation, "ask", lambda self, text, *rest, **more: asked.append(text) or ask(self, text, *rest, **more)
    )
    visit = Visit(SCENE, QUESTIONS[:1])
    desk.ask(visit, OWN, 16)
    longer = dataclasses.replace(visit, questions=QUESTIONS)
    desk.ask(longer, OWN, 16)
    assert asked == QUESTIONS
    desk.ask(longer, OWN, 20)  # other settings: the whole conversation
    desk.ask(longer, OWN, 16)  # held
    assert asked == QUESTIONS * 2
    desk.ask(Visit(SCENE, QUESTIONS[:1]), OWN, 16)  # another visitor
    assert asked == [*QUESTIONS * 2, QUESTIONS[0]]


def test_few_conversations_are_held(desk, monkeypatch):
    monkeypatch.setattr(talks, "MAX_TALKS", 2)
    first = Visit(SCENE, QUESTIONS[:1])
    before = desk.ask(first, OWN, 16)
    for _ in range(3):
        desk.ask(Visit(SCENE, QUESTIONS[:1]), OWN, 16)
    assert len(desk._held) == 2
    longer = dataclasses.replace(first, questions=QUESTIONS)  # its conversation is asked again
    assert [turn.answer for turn in desk.ask(longer, OWN, 16).turns] == [before.turns[0].answer, "purple"]


def test_visitors_are_answered_one_at_a_time(desk, monkeypatch):
    inside, most, ask = [0], [0], Conversation.ask

    def slow(self, *arguments, **options):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return ask(self, *arguments, **options)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(Conversation, "ask", slow)
    answers = {}

    def visitor(number):
        answers[number] = desk.ask(Visit(SCENE, [QUESTIONS[number % 2]]), OWN, 16).turns[-1].answer

    threads = [threading.Thread(target=visitor, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and [answers[number] for number in range(6)] == ["N", "purple"] * 3


def test_too_little_memory_is_a_sentence_and_frees_what_is_held(desk, monkeypatch):
    desk.ask(Visit(SCENE, QUESTIONS[:1]), OWN, 16)

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Conversation, "ask", full)
    with pytest.raises(Refused, match="not enough memory"):
        desk.ask(Visit(SCENE, QUESTIONS[:1]), OWN, 16)
    assert not desk._held


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_a_panel_names_every_mark_and_shows_what_came_back(desk):
    asked = desk.ask(Visit(SCENE, QUESTIONS), OWN, 16)
    html = pictures.panel(asked, desk.processor, "A: own")
    counts = asked.turns[-1].records[0].stage_counts()
    assert f"{counts['text']} fit the question" in html and f"{counts['coverage']} kept to cover" in html
    assert f"What came back: {asked.turns[-1].recovered} patches" in html
    assert html.count("<img ") == html.count(' alt="') == 2
    assert "not read at all" not in html  # tokens of the first question are read too
    full = pictures.panel(desk.ask(Visit(SCENE, QUESTIONS), OFF, 0), desk.processor, "B: off")
    assert "all 144 patches are read" in full and "came back" not in full


def test_words_of_visitors_are_escaped(desk):
    visit = Visit(SCENE, ["<script>alert(1)</script>"])
    asked = desk.ask(visit, OWN, 16)
    asked.turns[0].answer = "<b>x</b>"
    everything = (
        pictures.panel(asked, desk.processor, "<i>A</i>") + pictures.log([("A", asked)]) + pictures.note("<u>")
    )
    assert not re.search("<(script|b|i|u)>", everything) and "&lt;script&gt;" in everything


def test_heat_maps_are_bright_where_the_scores_are_high(desk):
    asked = desk.ask(Visit(SCENE, QUESTIONS[1:]), OWN, 16)
    record = asked.turns[0].records[0]
    heat = pictures._heat(pictures.regions_of(SCENE, [record], desk.processor), record.text_similarity)
    cells = torch.tensor(list(heat.convert("L").resize((12, 12), Image.Resampling.BOX).tobytes()), dtype=torch.float)
    best, worst = record.text_similarity[0].topk(20).indices, (-record.text_similarity[0]).topk(20).indices
    assert cells[best].mean() > cells[worst].mean() + 40
    assert "do not read the question" not in pictures.heat_maps(asked, desk.processor)
    without = dataclasses.replace(
        asked, turns=[dataclasses.replace(asked.turns[0], records=[dataclasses.replace(record, text_similarity=None)])]
    )
    assert "do not read the question" in pictures.heat_maps(without, desk.processor)


def test_a_tiled_picture_is_drawn_with_its_details():
    model, processor = LLAVA_NEXT.build(), LLAVA_NEXT.processor()
    processor.chat_template = processor.chat_template or demo_model()[1].chat_template
    desk = Talks(model, processor, max_new_tokens=2)
    asked = desk.ask(Visit(Image.new("RGB", (90, 60), "red"), ["What is this?"]), OWN, desk.menu.own_tokens)
    assert pictures.panel(asked, processor, "A").count("<img ") == 1
    assert pictures.heat_maps(asked, processor).count("<img ") >= 1
    assert asked.most == desk.ask(Visit(Image.new("RGB", (90, 60), "red"), ["?"]), OFF, 0).turns[0].visual_tokens


# ---- the gate ------------------------------------------------------------------------------------------------------


def through(gate, path, method="GET", body=b"", **headers):
    """Status and text of a response; the application behind the gate answers 200 with the body it receives."""
    sent, parts = (
        [],
        [{"type": "http.request", "body": body[:7], "more_body": True}, {"type": "http.request", "body": body[7:]}],
    )

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    usual = {"host": "127.0.0.1", "content-length": str(len(body))}
    given = {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


@pytest.fixture
def gate(tmp_path):
    starlette = pytest.importorskip("starlette.responses")
    from reccomp_hf.engines.app.gate import Gate

    async def app(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await starlette.PlainTextResponse(body)(scope, receive, send)

    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "mine.png").write_text("a picture")
    (tmp_path / "secret").write_text("a secret")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "secret")
    return Gate(app, tmp_path / "uploads", frozenset(["127.0.0.1"]))


def test_the_gate_opens_for_what_the_page_needs(gate, tmp_path):
    mine = str(tmp_path / "uploads" / "mine.png")
    body = json.dumps({"data": [{"path": mine, "meta": {}}, "What?"]}).encode()
    assert through(gate, "/gradio_api/queue/join", "POST", body) == (200, body.decode())
    for path in ("/", "/config", "/assets/a.js", "/gradio_api/queue/data", f"/gradio_api/file={mine}"):
        assert through(gate, path)[0] == 200
    assert through(gate, "/gradio_api/upload", "POST", b"x" * 200_000)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/monitoring", "/docs", "/openapi.json", "/gradio_api/info", "/gradio_api/proxy=https://example.com/a"),
        *("/gradio_api/run/answer", "/gradio_api/call/answer", "/gradio_api/process_recording", "/gradio_api/file/a"),
        *("/gradio_api/component_server", "/gradio_api/deep_link", "/custom", "/gradio_api/queue/join/../../x"),
    ],
)
def test_other_routes_are_closed(gate, path):
    assert through(gate, path) == (404, "This page has nothing there.")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "{up}/../secret",
        "{up}/%2e%2e/secret",
        "{up}/link.png",
        "https://example.com/a.png",
        "mine.png",
        "\0",
        "x" * 9000,
    ],
)
def test_no_other_file_is_read(gate, tmp_path, name):
    name = name.replace("{up}", str(tmp_path / "uploads"))
    assert through(gate, f"/gradio_api/file={name}")[0] == 403
    body = json.dumps({"data": [None, {"nested": [{"path": name}]}]}).encode()
    status, text = through(gate, "/gradio_api/queue/join", "POST", body)
    assert (status, text) == (403, "A request may name only pictures that were uploaded.")


def test_requests_are_bounded_and_come_from_the_page(gate):
    assert through(gate, "/gradio_api/queue/join", "POST", b"{}" + b" " * 100_000)[0] == 413
    assert through(gate, "/gradio_api/upload", "POST", b"", content_length=str(limits.MAX_BYTES + 20_000))[0] == 413
    assert through(gate, "/gradio_api/queue/join", "POST", b"{}", content_length="")[0] == 413
    assert through(gate, "/gradio_api/queue/join", "POST", b"[" * 90_000)[0] == 400
    assert through(gate, "/gradio_api/queue/join", "POST", b"{'x'}")[0] == 400
    assert through(gate, "/", host="evil.example")[0] == 403
    assert through(gate, "/gradio_api/queue/join", "POST", b"{}", origin="https://evil.example")[0] == 403
