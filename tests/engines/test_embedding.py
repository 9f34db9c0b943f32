"""`embed_images` and `reccomp-hf embed`: an engine receives what our model reads."""

import base64
import io
import json

import demo_model
import pytest
import tiny
import torch
from architectures import each_architecture, prompt_of
from PIL import Image
from safetensors.torch import load_file

import reccomp_hf
from reccomp_hf.demo import checkpoint_folder, draw_scene

pytest_plugins = ("command_line",)

QUESTIONS = tiny.SENTENCES[:3]
EMBEDDING_SETTINGS = {
    "dynamic": {"outlier_neighbors": 8},
    "budget": {"budget": 20, "text_relevance": "value"},
    "original": {"budget": 20, "position_ids": "original"},
    "none merged": {"budget": 0.3, "merged_tokens": 0, "position_ids": "original"},
}
each_setting = pytest.mark.parametrize("fields", EMBEDDING_SETTINGS.values(), ids=EMBEDDING_SETTINGS)


def stock_logits(architecture, ids, result):
    """Of the stock language model with a picture's embeddings in place of its placeholders (1, L)."""
    stock, is_image = architecture.shared_stock(), ids == architecture.compressed().config.image_token_id
    first = int(is_image.long().argmax())
    before, behind = ids[:first], ids[first + int(is_image.sum()) :]
    table, count = stock.get_input_embeddings(), len(result.embeds)
    embeds = torch.cat([table(before), result.embeds, table(behind)]).unsqueeze(0)
    positions = torch.arange(embeds.shape[1])
    if result.places is not None:
        behind_places = torch.arange(len(behind)) + first + result.placeholders
        positions = torch.cat([positions[:first], first + result.places, behind_places])
    assert first + count + len(behind) == embeds.shape[1]
    states = stock.model.language_model(
        inputs_embeds=embeds, attention_mask=torch.ones(1, embeds.shape[1]), position_ids=positions.unsqueeze(0)
    )
    return stock.lm_head(states.last_hidden_state)


@each_setting
@each_architecture
@torch.no_grad()
def test_the_stock_language_model_reads_what_ours_reads(architecture, fields):
    model, processor, pictures = architecture.compressed(), architecture.processor(), tiny.pictures(8)[:3]
    results = reccomp_hf.embed_images(model, processor, pictures, QUESTIONS, fields)
    counts = set()
    for picture, question, result in zip(pictures, QUESTIONS, results, strict=True):
        inputs = processor(images=picture, text=prompt_of(question, 1), return_tensors="pt")
        positions = {} if result.places is None else {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
        output = model(**inputs, **positions, token_recovery=fields)
        logits = stock_logits(architecture, inputs["input_ids"][0], result)
        torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)
        tokens = int(output.visual_token_counts.sum() + output.newline_counts.sum())
        assert len(result.embeds) == tokens < result.placeholders
        assert result.placeholders == int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert (result.places is not None) == (fields.get("position_ids") == "original")
        counts.add(tokens)
    assert fields.get("budget") is not None or len(counts) > 1


@each_architecture
def test_the_encoder_alone_gives_the_same(architecture, tmp_path):
    folder = architecture.save_converted(tmp_path, "balanced", budget=20)
    whole = architecture.model_class.from_pretrained(folder).eval()
    with tiny.logged_warnings() as remarks:
        encoder = reccomp_hf.load_image_encoder(folder)
    assert remarks == [] and not encoder.training
    assert not any(".layers." in name for name, _ in encoder.language_model.named_parameters())
    pictures = tiny.pictures(8)[:3]
    for fields in (None, {"budget": None, "position_ids": "compact"}):
        ours, theirs = (
            reccomp_hf.embed_images(model, architecture.processor(), pictures, QUESTIONS, fields)
            for model in (whole, encoder)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.embeds, other.embeds)
            assert (one.places is None) == (fields is not None)
            assert one.places is None or torch.equal(one.places, other.places)
    half = reccomp_hf.load_image_encoder(folder, {"budget": 7}, dtype=torch.bfloat16)
    (result,) = reccomp_hf.embed_images(half, architecture.processor(), pictures[:1], QUESTIONS[:1])
    assert result.embeds.dtype == torch.bfloat16 and len(result.embeds) >= 7


def test_the_encoder_keeps_the_answer():
    """The trained model answers from embeddings that the encoder alone made."""
    model, processor = demo_model.demo_model()
    encoder = reccomp_hf.load_image_encoder(checkpoint_folder("demo"), dtype=torch.float32)
    question = "What letter is on the cyan sign?"
    (result,) = reccomp_hf.embed_images(
        encoder, processor, [draw_scene(1_000_000).image], [question], {"position_ids": "compact"}
    )
    start, end = (
        processor.tokenizer(text, return_tensors="pt", add_special_tokens=first)["input_ids"]
        for first, text in ((True, "USER: "), (False, f"\n{question} ASSISTANT:"))
    )
    table = model.get_input_embeddings()
    embeds = torch.cat([table(start), result.embeds.unsqueeze(0), table(end)], dim=1)
    ids = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert processor.decode(ids[0], skip_special_tokens=True).strip() == "N"


def test_the_part_of_a_message_for_vllm():
    table = torch.randn(100, 8, dtype=torch.bfloat16)
    part = reccomp_hf.image_embeds_part(table[3:7])
    assert part["type"] == "image_embeds"
    data = base64.b64decode(part["image_embeds"], validate=True)
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), table[3:7])
    assert len(data) < 100 * 8 * 2 + 500  # not the whole table
    with pytest.raises(ValueError, match=r"shape \(tokens, width\), got \(1, 4, 8\)"):
        reccomp_hf.image_embeds_part(table[None, 3:7])


@each_architecture
def test_what_cannot_be_embedded(architecture):
    model, processor, pictures = architecture.compressed(), architecture.processor(), tiny.pictures(2)
    with pytest.raises(ValueError, match="one question per image, got 2 images and 1 questions"):
        reccomp_hf.embed_images(model, processor, pictures, ["?"])
    with pytest.raises(ValueError, match="got 0 images and 0 questions"):
        reccomp_hf.embed_images(model, processor, [], [])
    with pytest.raises(ValueError, match="no question for the text encoder"):
        reccomp_hf.embed_images(model, processor, pictures, ["What?", " "])
    with pytest.raises(ValueError, match="enabled is false"):
        reccomp_hf.embed_images(model, processor, pictures, ["?", "?"], {"enabled": False})


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A file of three rows about two pictures."""
    for number, picture in enumerate(tiny.pictures(2)):
        picture.save(tmp_path / f"{number}.png")
    rows = [
        {"id": "first/../one", "image": "0.png", "question": QUESTIONS[0], "answers": ["red"]},
        {"image": "1.png", "question": QUESTIONS[1]},
        {"image": "0.png", "question": QUESTIONS[2]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "rows.jsonl"


def test_the_command_writes_a_file_for_each_row(run, converted, data, tmp_path):
    settings = ["--budget", "0.2", "--set", "position_ids=original", "--batch-size", "2"]
    (tmp_path / "deep" / ".embeds-abc.unfinished").mkdir(parents=True)  # of a killed run, which is removed
    code, out, err = run("embed", converted, data, tmp_path / "deep" / "embeds", *settings)
    assert (code, err) == (0, "")
    assert "3 files of (tokens, 32) in float32, 20.0 of 100.0 tokens on average, and index.jsonl" in out
    assert "position_ids=compact" in out
    index = [json.loads(line) for line in (tmp_path / "deep/embeds/index.jsonl").read_text("utf-8").splitlines()]
    assert [(row["id"], row["image"], row["question"]) for row in index] == [
        ("first/../one", "0.png", QUESTIONS[0]),
        (1, "1.png", QUESTIONS[1]),
        (2, "0.png", QUESTIONS[2]),
    ]
    model = reccomp_hf.LlavaRecCompForConditionalGeneration.from_pretrained(converted).eval()
    processor = reccomp_hf.LlavaRecCompProcessor.from_pretrained(converted)
    pictures = [tiny.pictures(2)[number] for number in (0, 1, 0)]
    fields = {"budget": 0.2, "position_ids": "original"}
    for row, result in zip(index, reccomp_hf.embed_images(model, processor, pictures, QUESTIONS, fields), strict=True):
        tensors = load_file(tmp_path / "deep/embeds" / row["file"])
        assert sorted(tensors) == ["image_embeds", "places"]
        torch.testing.assert_close(tensors["image_embeds"], result.embeds, rtol=1e-5, atol=1e-5)
        assert torch.equal(tensors["places"], result.places)
        assert (row["tokens"], row["placeholders"]) == (20, 100)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["embeds"]


def test_the_command_in_another_dtype(run, converted, data, tmp_path):
    code, out, _ = run("embed", converted, data, tmp_path / "embeds", "--dtype", "bfloat16", "--limit", "1")
    assert code == 0 and "embeds: 1 file of" in out and "position_ids" not in out
    (file,) = (tmp_path / "embeds").glob("*.safetensors")
    tensors = load_file(file)
    assert list(tensors) == ["image_embeds"] and tensors["image_embeds"].dtype == torch.bfloat16
    assert tensors["image_embeds"].shape == (24, 32)


def test_what_the_command_refuses(error, converted, data, tmp_path):
    before, whole = sorted(tmp_path.iterdir()), data.read_text("utf-8")
    output = tmp_path / "embeds"

    def changed(**fields):
        rows = [json.loads(line) for line in whole.splitlines()]
        rows[1] |= fields
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return error("embed", converted, data, output)

    assert "rows.jsonl, line 2: the question is missing or empty, got ' '" in changed(question=" ")
    assert "line 2: id must be a string or an integer, got [1]" in changed(id=[1])
    assert "line 2: id must be a string or an integer, got True" in changed(id=True)
    assert "line 2: the id 'first/../one' is already the id of rows.jsonl, line 1" in changed(id="first/../one")
    assert "line 2: the picture no.png cannot be read: no such file" in changed(image="no.png")
    assert "line 2: image must be the path of a picture, got 3" in changed(image=3)
    broken = tmp_path / "1.png"
    picture = broken.read_bytes()
    Image.new("RGB", (400_000, 8)).save(broken)
    assert "line 2: the picture 1.png cannot be read: it has 400000 x 8 pixels; the longer side" in changed()
    Image.new("RGB", (32, 32)).save(broken, "EPS")
    assert "line 2: the picture 1.png cannot be read: cannot identify image file, the formats that" in changed()
    broken.write_bytes(picture[: len(picture) // 2])  # its header is whole
    assert "line 2: the picture 1.png cannot be read" in changed()
    broken.write_bytes(picture)
    data.write_text(whole, encoding="utf-8")
    for option in ("--batch-size", "--limit"):
        assert f"{option}: expected a whole number of at least 1" in error(
            "embed", converted, data, output, option, "0"
        )
    assert "exists and is not an empty folder" in error("embed", converted, data, tmp_path)
    assert "enabled is false" in error("embed", converted, data, output, "--set", "enabled=false")
    assert sorted(tmp_path.iterdir()) == before
