"""A demo model is trained in a handful of steps: what it is made of, and that a killed run goes on where it was."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import weights_of
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

from reccomp_hf.demo import COLORS, LETTERS, SHAPES, TRAIN_SEEDS, VALIDATION_SEEDS, Scene, draw_scene, questions
from reccomp_hf.experiments.demo_models import loop
from reccomp_hf.experiments.demo_models.clip import ClipLoss, average_precision, new_clip, patches_inside
from reccomp_hf.experiments.demo_models.config import MODELS, SCALES, Stage, TrainingConfig
from reccomp_hf.experiments.demo_models.data import (
    batch_rows,
    cached_scenes,
    draw_scenes,
    file_in_place,
    pixel_values,
    scene_objects,
)
from reccomp_hf.experiments.demo_models.llava import LlavaLoss, conversations, new_llava, tower_features
from reccomp_hf.experiments.demo_models.packing import Packer
from reccomp_hf.experiments.demo_models.texts import TextTable, kinds, texts_about, truths
from reccomp_hf.experiments.demo_models.tokenizers import (
    CHAT_TEMPLATE,
    EOS_ID,
    answer_words,
    save_clip_tokenizer,
    save_llama_tokenizer,
)
from reccomp_hf.experiments.demo_models.train import main, train

STAGE = Stage(
    steps=4,
    images=4,
    learning_rate=1e-3,
    warmup_steps=2,
    horizon=6,
    cooldown_steps=2,
    weight_decay=0.05,
    evaluate_every=3,
)
TINY = TrainingConfig(
    image_size=96,
    patch_size=24,
    vision_width=16,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=1,
    decoder_layers=1,
    decoder_positions=128,
    heads=1,
    texts=8,
    letters_from=2,
    letter_texts=0.5,
    region_texts=6,
    questions=5,
    conversations_from=2,
    clip=STAGE,
    llava=STAGE,
    scenes=8,
    close_ups=6,
    close_ups_per_step=2,
    monitored_scenes=4,
    validation_scenes=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo-training")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return train("demo", TINY, folder / "whole", folder / "cache")


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> tuple:
    save_clip_tokenizer(folder / "clip-tokenizer")
    save_llama_tokenizer(folder / "llama-tokenizer")
    return tuple(AutoTokenizer.from_pretrained(folder / f"{name}-tokenizer") for name in ("clip", "llama"))


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed once in each of the two stages, after states were saved at every step."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    output, rate, calls = folder / "killed", loop.learning_rate, []

    def killed_in_every_third_step(stage: Stage, step: int) -> float:
        calls.append(step)
        if len(calls) in (3, 8):
            raise KeyboardInterrupt
        return rate(stage, step)

    monkeypatch.setattr(loop, "learning_rate", killed_in_every_third_step)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("demo", TINY, output, folder / "cache")
    again = train("demo", TINY, output, folder / "cache")
    assert calls == [0, 1, 2, 2, 3, 0, 1, 2, 2, 3]
    whole, resumed = weights_of(trained), weights_of(again)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    reports = [json.loads((path / "training.json").read_text()) for path in (trained, again)]
    assert reports[0] == reports[1]


def test_the_checkpoint_loads_whole_and_answers(trained: Path):
    model, info = AutoModelForImageTextToText.from_pretrained(trained, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(trained)
    turn = [{"type": "image"}, {"type": "text", "text": "What letter is on the red sign?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat letter is on the red sign? ASSISTANT:"
    inputs = processor(images=draw_scene(0).image, text=prompt, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def test_the_files_say_how_it_was_trained(trained: Path):
    facts = json.loads((trained / "training.json").read_text())
    assert facts["model"] == "demo"
    assert facts["box_supervision"] is True
    assert facts["scenes"] == 8
    assert facts["train_seeds"] == [TRAIN_SEEDS.start, TRAIN_SEEDS.start + 8]
    assert facts["validation"]["seeds"] == [VALIDATION_SEEDS.start, VALIDATION_SEEDS.start + 6]
    assert set(facts["validation"]["accuracy"]) == {"color", "shape", "exist", "count", "read"}
    assert [row["step"] for row in facts["clip_history"]] == [3, 4]
    assert facts["parameters"]["clip"] > 0
    assert {value.dtype for value in weights_of(trained).values()} == {torch.float16}
    assert "trained from scratch on 8 drawn scenes" in " ".join((trained / "README.md").read_text().split())
    assert not list(trained.glob("*.py"))  # nothing that the package has already
    assert not any("auto_map" in file.read_text() for file in trained.glob("*.json"))


def test_a_complete_run_is_left_alone(folder: Path, trained: Path):
    before = (trained / "training.json").stat().st_mtime_ns
    assert train("demo", TINY, folder / "whole", folder / "cache") == trained
    assert (trained / "training.json").stat().st_mtime_ns == before


def test_the_folder_of_another_run_is_refused(folder: Path, trained: Path):
    with pytest.raises(ValueError, match="holds a run with other settings of model"):
        train("demo-global", TINY, folder / "whole")
    with pytest.raises(ValueError, match="other settings of questions"):
        train("demo", dataclasses.replace(TINY, questions=4), folder / "whole")


def test_the_learning_rate_rises_falls_and_ends_at_zero():
    stage = dataclasses.replace(STAGE, steps=80, warmup_steps=10, horizon=110, cooldown_steps=20)
    rates = [loop.learning_rate(stage, step) for step in range(81)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(0.5e-3)
    assert rates[70] == pytest.approx(1e-3 * 0.5 * (1 + np.cos(0.6 * np.pi)) * 0.5)
    assert rates[80] == 0.0


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match=r"The loss of X is nan at step 0. Lower learning_rate."):
        loop.run_stage("X", model, lambda step: (torch.tensor(torch.nan), {}), dict, STAGE, tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 25}, "image_size must be a multiple of patch_size, but got 96 and 25"),
        ({"scenes": 3}, "A step takes 4 scenes, but scenes is 3"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_bad_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(ValueError, match=r"no demo model 'big' to train. Choose one of: demo, demo-global"):
        train("big", TINY, tmp_path)
    with pytest.raises(
        ValueError, match="There are 1000000 training seeds, but scenes and close_ups are 1000001 and 6"
    ):
        train("demo", dataclasses.replace(TINY, scenes=1_000_001), tmp_path)
    for extra, message in ((["--scenes", "5"], "takes 24 scenes"), (["--threads", "0"], "at least 1, got '0'")):
        with pytest.raises(SystemExit):
            main(["--model", "demo", "--output", str(tmp_path / "run"), *extra])
        assert message in capsys.readouterr().err


# ---- models --------------------------------------------------------------------------------------------------------


def test_the_models_are_alike_but_for_the_boxes():
    assert MODELS == {"demo": True, "demo-global": False}
    small, large = SCALES["small"], SCALES["llava-1.5"]
    assert (small.side, large.side) == (12, 24)
    assert {scale.text_width // scale.heads for scale in SCALES.values()} == {32}


def test_the_large_scale_builds_and_reads_enlarged_scenes(tokenizers: tuple):
    clip_tokenizer, llama_tokenizer = tokenizers
    config = dataclasses.replace(SCALES["llava-1.5"], vision_layers=2, text_layers=1, decoder_layers=1)
    clip = new_clip(config, clip_tokenizer)
    llava = new_llava(config, clip, len(llama_tokenizer))
    scenes = draw_scenes(range(1))
    features = tower_features(llava, scenes.pictures, config.image_size)
    assert features.shape == (1, 24 * 24, config.vision_width)
    packed = Packer(llama_tokenizer, 24 * 24, llava.device).pack([[questions(draw_scene(0), 0)]])
    logits, _ = LlavaLoss(llava)(features, packed)
    assert logits.shape == (2 * len(questions(draw_scene(0), 0)), len(llama_tokenizer))
    assert torch.isfinite(logits).all()
    assert int(packed.position_ids.max()) < config.decoder_positions


def test_packed_conversations_equal_single_ones(tokenizers: tuple):
    """The logits of every answer are those of its own conversation as the chat template writes it."""
    clip_tokenizer, tokenizer = tokenizers
    model = new_llava(TINY, new_clip(TINY, clip_tokenizer), len(tokenizer)).eval()
    scenes = [draw_scene(seed) for seed in (0, 5)]
    pictures = np.stack([np.asarray(scene.image) for scene in scenes])
    held = [[asked[:3], asked[3:4], asked[4:]] for asked in (questions(scene, 1) for scene in scenes)]
    pixels = pixel_values(pictures, 96, model.device)
    states = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    packed = Packer(tokenizer, 16, model.device).pack(held)
    logits, labels = LlavaLoss(model)(states[-2][:, 1:], packed)
    model.set_attn_implementation("eager")  # of transformers: ours is for packed conversations only
    row = 0
    for number, conversations_about_it in enumerate(held):
        for conversation in conversations_about_it:
            text = tokenizer.apply_chat_template(_messages(conversation), chat_template=CHAT_TEMPLATE, tokenize=False)
            ids = tokenizer(text.replace("<image>", "<image>" * 16), return_tensors="pt")
            single = model(**ids, pixel_values=pixels[number : number + 1]).logits[0]
            ends = (ids["input_ids"][0] == EOS_ID).nonzero()[:, 0]
            for end, item in zip(ends, conversation, strict=True):
                torch.testing.assert_close(logits[row : row + 2], single[end - 2 : end], atol=1e-5, rtol=1e-4)
                assert tokenizer.decode(labels[row : row + 2]) == f" {item.answer}</s>"
                row += 2
    assert row == len(labels)


@torch.no_grad()
def test_a_close_up_is_read_like_a_part_of_a_picture(tokenizers: tuple):
    """One as large as a picture, of which there is one place, is read like a picture."""

    class Large(TrainingConfig):
        close_up_side = TINY.side

    config = Large(**vars(TINY))
    module = ClipLoss(new_clip(config, tokenizers[0]), TextTable(tokenizers[0]), config, boxes=False).eval()
    pictures = draw_scenes(range(3)).pictures
    wanted = module.embed_pictures(pictures)[0]
    torch.testing.assert_close(module.embed_close_ups(pictures, np.random.default_rng(0)), wanted)
    small = ClipLoss(module.clip, module.table, TINY, boxes=False)
    near = draw_scenes(range(2), close_ups=True).pictures
    places = [small.embed_close_ups(near, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert places[0].equal(places[1])
    assert not torch.allclose(places[0], places[2])


def test_questions_are_shared_out_to_conversations():
    asked, rng = questions(draw_scene(0), 0), np.random.default_rng(0)
    held = [conversations(asked, rng) for _ in range(200)]
    for some in held:
        assert sorted(item.text for one in some for item in one) == sorted(item.text for item in asked)
    assert {len(one) for some in held for one in some} == {1, 2, 3, 4}


def test_an_answer_of_several_tokens_is_refused(tokenizers: tuple):
    question = dataclasses.replace(questions(draw_scene(0), 0)[0], answer="ultramarine")
    with pytest.raises(ValueError, match="The answer 'ultramarine' must be one token of the tokenizer, but is"):
        Packer(tokenizers[1], 16, torch.device("cpu")).pack([[[question]]])


# ---- data ----------------------------------------------------------------------------------------------------------


def test_drawn_scenes_are_kept_and_equal_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("reccomp_hf.experiments.demo_models.data._CHUNK", 2)
    one, two = (cached_scenes(tmp_path / str(processes), range(3, 8), processes) for processes in (1, 2))
    assert np.array_equal(one.pictures, two.pictures)
    assert np.array_equal(one.objects, two.objects)
    for row, seed in enumerate(range(3, 8)):
        scene = draw_scene(seed)
        assert Image.fromarray(one.pictures[row]).tobytes() == scene.image.tobytes()
        assert scene_objects(one.objects[row]) == scene.objects
    monkeypatch.setattr("reccomp_hf.experiments.demo_models.data.draw_scenes", None)  # nothing is drawn a second time
    assert np.array_equal(cached_scenes(tmp_path / "1", range(3, 8)).objects, one.objects)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(RuntimeError, match="killed"), file_in_place(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_every_epoch_takes_all_scenes_in_another_order():
    epochs = [[batch_rows(step, 4, 12, seed=0) for step in range(first, first + 3)] for first in (0, 3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])


def test_patches_inside_a_box():
    objects = np.full((1, 5, 6), -1)
    objects[0, 0] = (0, 0, -1, 20, 30, 30)  # x from 20 to 50, y from 30 to 60; centres at 12, 36, 60 and 84
    inside = patches_inside(objects, TINY)
    assert inside.shape == (1, 5, 16)
    assert np.flatnonzero(inside[0, 0]).tolist() == [5]
    assert not inside[0, 1:].any()


# ---- texts ---------------------------------------------------------------------------------------------------------


def test_texts_are_true_of_the_scenes_they_describe(tokenizers: tuple):
    table = TextTable(tokenizers[0])
    scenes = [draw_scene(seed) for seed in range(30)]
    true = truths(draw_scenes(range(30)).objects, table.kinds)
    texts = [text for kind in kinds() for text in texts_about(kind)]
    for row, scene in enumerate(scenes):
        for column, text in enumerate(texts):
            assert bool(true[row, column]) == _describes(text, scene), (text, scene.objects)


def test_more_texts_name_a_letter_when_asked_to(tokenizers: tuple):
    table, objects = TextTable(tokenizers[0]), draw_scenes(range(40)).objects
    shares = []
    for letters in (0.0, 0.9):
        rows = table.draw(objects, 2000, np.random.default_rng(0), letters)
        assert np.array_equal(rows, table.draw(objects, 2000, np.random.default_rng(0), letters))
        shares.append(float((table.kinds[rows, 2] >= 0).mean()))
    assert 0.1 < shares[0] < 0.3
    assert shares[1] > 0.6


def test_every_answer_is_one_token_and_every_word_is_known(tokenizers: tuple):
    clip_tokenizer, llama_tokenizer = tokenizers
    for word in answer_words():
        assert len(llama_tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    assert len(clip_tokenizer("What letter is on the orange sign?")["input_ids"]) == 10  # 7 words, ?, and both ends
    for text in ("Zürich, 7 tall ships", "漢字"):
        lower = clip_tokenizer.decode(clip_tokenizer(text)["input_ids"][1:-1])
        assert lower.replace(" ", "") == text.lower().replace(" ", "")
        assert llama_tokenizer.decode(llama_tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_average_precision():
    scores = np.array([0.9, 0.8, 0.7, 0.1])
    assert average_precision(scores, np.array([1, 0, 1, 0])) == pytest.approx((1 + 2 / 3) / 2, abs=1e-4)
    assert average_precision(scores, np.zeros(4)) == 0.0


def test_a_stock_clip_lies_beside(folder: Path, trained: Path):
    _, info = CLIPModel.from_pretrained(folder / "whole" / "stock" / "clip", output_loading_info=True)
    assert not info["missing_keys"]


def _messages(conversation: list) -> list[dict]:
    messages = []
    for turn, item in enumerate(conversation):
        asked = [{"type": "image"}] * (turn == 0) + [{"type": "text", "text": item.text}]
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": item.answer}]})
    return messages


def _describes(text: str, scene: Scene) -> bool:
    """Whether an object fits every color, shape and letter that a text names."""
    words = text.rstrip("?").split()
    colors, shapes = ({word for word in words if word in names} for names in (COLORS, SHAPES))
    letters = {words[place + 1].upper() for place, word in enumerate(words[:-1]) if word == "letter"} & set(LETTERS)
    return any(
        colors <= {item.color} and shapes <= {item.shape} and letters <= {item.letter} for item in scene.objects
    )
