"""Invalid settings, batches and calls are refused with a message that names the cause."""

import pytest
import tiny
import torch
import transformers
from architectures import CACHE, ROWS, each_architecture, generate
from transformers import DynamicCache, SiglipVisionConfig

from reccomp_hf import TokenRecoveryConfig

SECTIONS = {
    "near miss": ({"budgit": 8}, r"Unknown token_recovery field 'budgit'; did you mean 'budget'\?"),
    "no near miss": ({"zzz": 1}, "Unknown token_recovery field 'zzz'; known fields are .*budget"),
    "budget 0": ({"budget": 0}, r"budget must be null, an int >= 1 or a float in \(0, 1\], got 0"),
    "budget 1.5": ({"budget": 1.5}, "budget must be .* got 1.5"),
    "budget true": ({"budget": True}, "budget must be .* got True"),
    "budget text": ({"budget": "64"}, "budget must be .* got '64'"),
    "negative budget": ({"budget": -3}, "budget must be .* got -3"),
    "text share": ({"text_share": 1.2}, r"text_share must be a number in \[0, 1\], got 1.2"),
    "merged tokens": ({"merged_tokens": -1}, "merged_tokens must be an int >= 0, got -1"),
    "neighbours": ({"outlier_neighbors": 0}, "outlier_neighbors must be an int >= 1, got 0"),
    "relevance": ({"text_relevance": "first"}, "text_relevance must be 'last' or 'penultimate' or 'value'"),
    "sign": ({"text_relevance_sign": 2}, "text_relevance_sign must be 1 or -1, got 2"),
    "positions": ({"position_ids": "gaps"}, "position_ids must be 'compact' or 'original', got 'gaps'"),
    "visual layer": ({"visual_layer": 0}, "visual_layer must be an int < 0, got 0"),
    "enabled": ({"enabled": "no"}, "enabled must be true or false, got 'no'"),
    "version": ({"version": 2}, "version must be 1, got 2; a newer section needs a newer reccomp_hf"),
    "authors budget": ({"method": "authors", "budget": 64}, "'authors' .*needs budget=None, got 64"),
    "authors positions": (
        {"method": "authors", "position_ids": "original"},
        "'authors' .*needs position_ids='compact', got 'original'",
    ),
    "text encoder": ({"text_encoder_config": {"model_type": "bert"}}, "model_type 'clip_text_model', got 'bert'"),
    "text encoder's width": (
        {"text_encoder_config": {"model_type": "clip_text_model", "hidden_size": 0}},
        r"text_encoder_config.hidden_size must be an int >= 1, got 0",
    ),
    "text encoder's activation": (
        {"text_encoder_config": {"model_type": "clip_text_model", "hidden_act": "no_such"}},
        "text_encoder_config.hidden_act must be an activation of transformers, got 'no_such'",
    ),
}
each_section = pytest.mark.parametrize(("fields", "message"), SECTIONS.values(), ids=SECTIONS)


@each_section
def test_invalid_sections_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenRecoveryConfig(**fields)


@each_architecture
@each_section
def test_invalid_sections_of_a_model_are_refused(architecture, fields, message):
    with pytest.raises(ValueError, match=message):
        architecture.config_class(token_recovery=fields)
    model = architecture.compressed()
    with pytest.raises(ValueError, match=message):
        model(**architecture.encode(), token_recovery=fields)
    with pytest.raises(ValueError, match=message):
        generate(model, architecture.encode(), token_recovery=fields)
    before = model.config.token_recovery
    with pytest.raises(ValueError, match=message):
        model.config.token_recovery = fields
    assert model.config.token_recovery == before


def test_invalid_presets_are_refused():
    with pytest.raises(ValueError, match="Unknown preset 'papers'; choose one of 'paper', 'authors', 'balanced'"):
        TokenRecoveryConfig.from_preset("papers")
    with pytest.raises(ValueError, match="did you mean 'coverage_share'"):
        TokenRecoveryConfig.from_preset("balanced", coverage_shares=0.5)


@each_architecture
@pytest.mark.parametrize("value", [3, "paper", [1]], ids=str)
def test_a_section_is_a_mapping(architecture, value):
    for call in (
        lambda: architecture.config_class(token_recovery=value),
        lambda: architecture.compressed()(**architecture.encode(), token_recovery=value),
    ):
        with pytest.raises(ValueError, match=f"token_recovery must be a mapping of fields.*{type(value).__name__}"):
            call()


# Settings that only a model can refuse.
REFUSED_BY_A_MODEL = {
    "method": (
        {"method": "magic"},
        "Unknown token_recovery.method 'magic'; known methods are 'recoverable', 'authors'",
    ),
    "budget": ({"budget": 10_000}, r"budget is 10000, but an image has only \d+ patches"),
    "visual layer": ({"visual_layer": -9}, "visual_layer is -9, but the vision tower has only 4 blocks"),
}


@each_architecture
@pytest.mark.parametrize(("fields", "message"), REFUSED_BY_A_MODEL.values(), ids=REFUSED_BY_A_MODEL)
def test_settings_beyond_the_model_are_refused(architecture, fields, message):
    with pytest.raises(ValueError, match=message):
        architecture.build(**fields)
    with pytest.raises(ValueError, match=message):
        architecture.compressed()(**architecture.encode(), token_recovery=fields)


@each_architecture
def test_a_call_cannot_change_the_text_encoder(architecture):
    other = {**architecture.text_config(), "num_hidden_layers": 1}
    for setting in ({"text_encoder_config": other}, {"text_encoder_config": None}):
        with pytest.raises(ValueError, match="text_encoder_config belongs to the weights"):
            architecture.compressed()(**architecture.encode(), token_recovery=setting)


CONFIGS = {
    "layers": ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer must be one int below .* got \[-2, -1\]"),
    "last layer": ({"vision_feature_layer": -1}, "vision_feature_layer must be one int below the last .* got -1"),
    "last layer, from the front": ({"vision_feature_layer": 4}, "below the last of the 4 blocks .* got 4"),
    "a layer too many": ({"vision_feature_layer": 5}, "below the last of the 4 blocks .* got 5"),
    "a layer too many, from the end": (
        {"vision_feature_layer": -6},
        "below the last of the 4 blocks .* got -6",
    ),
    "class token": ({"vision_feature_select_strategy": "full"}, "select_strategy must be 'default' .* got 'full'"),
}


@each_architecture
@pytest.mark.parametrize(("fields", "message"), CONFIGS.values(), ids=CONFIGS)
def test_unsupported_feature_selections_are_refused(architecture, fields, message):
    config = architecture.compressed().config.to_dict()
    with pytest.raises(ValueError, match=message):
        architecture.model_class(architecture.config_class(**{**config, **fields}))
    for call in (
        architecture.compressed(),
        architecture.compressed().generate,
        architecture.compressed().compress_inputs,
    ):
        with pytest.raises(ValueError, match=message):
            call(**architecture.encode(), **fields)


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("layer", [-5, 0, 3])
def test_features_of_every_block_below_the_last_are_supported(architecture, layer):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    short, record = model.compress_inputs(**batch, vision_feature_layer=layer, token_recovery={"budget": 8})
    assert record.counts.sum() == 8
    assert torch.isfinite(short["inputs_embeds"]).all()


@each_architecture
def test_a_vision_tower_without_class_token_is_refused(architecture):
    config = architecture.compressed().config.to_dict()
    config["vision_config"] = SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"class token; the vision tower is 'siglip_vision_model', which is not supp"):
        architecture.model_class(architecture.config_class(**config))


PICTURES = ("pixel_values", "image_sizes")


def pictures_of(rows):
    """Makes a batch hold the pictures of other rows."""

    def changed(architecture, batch):
        return {**batch, **{name: value for name, value in architecture.encode(rows).items() if name in PICTURES}}

    return changed


def placeholders_moved(architecture, batch):
    """A batch whose first row has seven placeholders too few, and the second as many too many."""
    ids, image = batch["input_ids"].clone(), architecture.compressed().config.image_token_id
    ids[0, (ids[0] == image).nonzero().flatten()[:7]] = 9
    ids[1, -7:] = image
    return {**batch, "input_ids": ids}


def without_question_of(row):
    """Makes one row have no question."""

    def changed(architecture, batch):
        mask = batch["recovery_attention_mask"].clone()
        mask[row] = 0
        return {**batch, "recovery_attention_mask": mask}

    return changed


def without_questions(architecture, batch):
    return {name: value for name, value in batch.items() if not name.startswith("recovery")}


def question_ids(part):
    """Makes a batch hold a part of its questions' ids alone."""

    def changed(architecture, batch):
        return {**batch, "recovery_input_ids": part(batch["recovery_input_ids"]), "recovery_attention_mask": None}

    return changed


def mask_of_another_shape(architecture, batch):
    return {**batch, "recovery_attention_mask": batch["recovery_attention_mask"][..., :-1]}


def pixel(value, picture):
    """Makes one pixel of a picture NaN or infinite."""

    def changed(architecture, batch):
        pixels = batch["pixel_values"].clone()
        pixels[(picture, *[0] * (pixels.ndim - 2), -1)] = value
        return {**batch, "pixel_values": pixels}

    return changed


def no_pictures(architecture, batch):
    sizes = {"image_sizes": batch["image_sizes"][:0]} if "image_sizes" in batch else {}
    return {**batch, "pixel_values": batch["pixel_values"][:0], **sizes}


FINITE = r"features of image {} hold NaN or infinity: check its pixel_values, which must be finite"
COUNTS = r"prompts hold \d+ image placeholder tokens, \d+ image\(s\) need \d+"
SHAPE = r"recovery_input_ids must have shape \(rows, windows, length\) with 4 rows, got \("
# Name -> the rows of a batch, what is changed in it, and the message.
BATCHES = {
    "too many pictures": (ROWS[:1], pictures_of(ROWS[1:2]), COUNTS),
    "too few pictures": (ROWS[1:2], pictures_of(ROWS[:1]), COUNTS),
    "a picture without a placeholder": (ROWS[2:3], pictures_of(ROWS[:1]), COUNTS),
    "half a picture in a row": (
        [(tiny.SENTENCES[0], 1)] * 2,
        placeholders_moved,
        r"Row 0 holds \d+ image placeholder tokens, which is not a",
    ),
    "no questions": (ROWS, without_questions, "needs the question: recovery_input_ids is None"),
    "no question in a row": (ROWS, without_question_of(1), "Row 1 has an image but no question"),
    "questions of fewer rows": (ROWS, question_ids(lambda ids: ids[:2]), SHAPE),
    "a question's mask of another shape": (
        ROWS,
        mask_of_another_shape,
        r"recovery_attention_mask must have the shape of recovery_input_ids \(4, \d+, \d+\), got \(4, ",
    ),
    "a pixel is NaN": (ROWS, pixel(torch.nan, 2), FINITE.format(2)),
    "a pixel is infinite": (ROWS[:2], pixel(torch.inf, 0), FINITE.format(0)),
    "a pixel is minus infinity": (ROWS[:1], pixel(-torch.inf, 0), FINITE.format(0)),
    "no pictures": (ROWS[:1], no_pictures, "pixel_values hold no image"),
    "questions without windows": (ROWS, question_ids(lambda ids: ids[:, 0]), SHAPE),
}


@each_architecture
@pytest.mark.parametrize(("rows", "change", "message"), BATCHES.values(), ids=BATCHES)
def test_batches_that_do_not_fit_are_refused(architecture, rows, change, message):
    model, batch = architecture.compressed(), change(architecture, architecture.encode(rows))
    for call in (model, model.compress_inputs, model.recover, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**batch)


@each_architecture
def test_questions_that_are_not_needed_may_be_missing(architecture):
    model, batch = architecture.compressed(), architecture.encode()
    model(**without_question_of(2)(architecture, batch))  # row 2 has no picture
    model(**without_questions(architecture, batch), token_recovery={"budget": 8, "text_share": 0.0})


@each_architecture
def test_authors_needs_a_question(architecture):
    config = architecture.compressed().config.to_dict()
    config["token_recovery"] = {"method": "authors"}
    model, batch = architecture.model_class(architecture.config_class(**config)), architecture.encode()
    with pytest.raises(ValueError, match="'authors' needs a question"):
        model(**batch)


@torch.no_grad()
@each_architecture
def test_a_full_prompt_with_a_filled_cache_is_refused(architecture):
    model, batch, cache = architecture.compressed(), architecture.encode(ROWS[:1]), DynamicCache()
    model(**batch, **{CACHE: cache}, use_cache=True)
    assert cache.get_seq_length() > 0
    for call in (model, model.generate, model.compress_inputs):
        with pytest.raises(ValueError, match=rf"non-empty {CACHE}: it holds the shortened prompt"):
            call(**batch, **{CACHE: cache})
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=rf"hold image placeholders, but {CACHE} is not empty: it holds"):
        model.generate(**prompt, **{CACHE: cache})


@each_architecture
def test_assistant_models_are_refused(architecture):
    model, batch = architecture.compressed(), architecture.encode(ROWS[:1])
    with pytest.raises(ValueError, match="assistant_model does not work on a compressed prompt"):
        model.generate(**batch, assistant_model=architecture.shared_stock())


@each_architecture
def test_original_positions_under_flash_attention_are_refused(architecture):
    model, batch = architecture.build(position_ids="original"), architecture.encode()
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    for call in (model, model.generate, model.compress_inputs):
        with pytest.raises(ValueError, match="'original' leaves gaps, which flash_attention_2 treats as packed"):
            call(**batch)
    model.compress_inputs(**batch, token_recovery={"position_ids": "compact"})


# Name -> arguments made of the model and a batch, and the message.
UNSUITABLE = {
    "a mask of two dimensions more": (
        lambda model, batch: {"attention_mask": torch.ones(4, 1, *[batch["input_ids"].shape[1]] * 2)},
        r"attention_mask must have the shape of input_ids \(4, \d+\)",
    ),
    "labels of another length": (
        lambda model, batch: {"labels": batch["input_ids"][:, 1:]},
        r"labels must have the shape of input_ids \(4, \d+\) with images, got \(4, \d+\)",
    ),
    "labels of fewer rows": (
        lambda model, batch: {"labels": batch["input_ids"][:2]},
        r"labels must have the shape of input_ids \(4, \d+\) with images, got \(2, \d+\)",
    ),
    "embeddings too": (
        lambda model, batch: {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])},
        "Images need input_ids with their placeholders, and no inputs_embeds",
    ),
    "no ids": (lambda model, batch: {"input_ids": None}, "Images need input_ids with their placeholders"),
}


@each_architecture
@pytest.mark.parametrize(("arguments", "message"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_inputs_that_cannot_be_shortened(architecture, arguments, message):
    model, batch = architecture.compressed(), architecture.encode()
    for call in (model, model.compress_inputs):
        with pytest.raises(ValueError, match=message):
            call(**{**batch, **arguments(model, batch)})


def test_models_of_other_families_are_not_sources(tmp_path):
    import reccomp_hf

    text = transformers.LlamaForCausalLM(tiny.llava_config().text_config)
    with pytest.raises(ValueError, match="llava must be of model_type 'llava' or 'llava_next', got 'llama'"):
        reccomp_hf.convert(text, None, tmp_path / "new")


def test_a_section_is_not_changed_in_place():
    section = TokenRecoveryConfig()
    with pytest.raises(AttributeError, match=r"cannot be changed in place: got bugdet = 36"):
        section.bugdet = 36
    assert not hasattr(section, "bugdet")
