"""Files of a compressed checkpoint that hold what a model cannot use: the file, the value, and what to do."""

import json
import shutil

import pytest
import tiny
from architectures import LLAVA, LLAVA_NEXT

from reccomp_hf.checkpoints.info import describe
from reccomp_hf.checkpoints.loading import load
from reccomp_hf.checkpoints.processors import check_generation_config
from reccomp_hf.cli import main as cli


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of each architecture."""
    return {a.name: a.save_converted(tmp_path_factory.mktemp(a.name), budget=24) for a in (LLAVA, LLAVA_NEXT)}


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made["llava"], tmp_path / "model")


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_the_files_that_convert_writes_are_taken(made, name):
    assert describe(made[name], "x")["model_type"] == f"{name}_reccomp"


@pytest.mark.parametrize("name", ["vision_config", "text_config"])
@pytest.mark.parametrize("value", [None, [], "clip"], ids=["null", "list", "text"])
def test_a_part_of_the_config_that_is_no_object_is_refused(folder, name, value):
    """Null would stand for the sizes of a CLIP-L and a Llama of 7 billion parameters."""
    change(folder / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config.json: {name} must be an object, got "):
        describe(folder, "x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "patch_size must be an int above 0, got 0: correct it in processor_config.json"),
        ({"patch_size": "4"}, "patch_size must be an int above 0, got '4'"),
        ({"patch_size": 4.0}, "patch_size must be an int above 0, got 4.0"),
        (
            {"patch_size": 7},
            r"writes \d+ placeholders for an image of 40 x 40 pixels, but the model gives 100 features",
        ),
        ({"patch_size": None}, "cannot read an image .* correct"),
        ({"vision_feature_select_strategy": "cls"}, "must be 'default' or 'full', got 'cls'"),
        ({"num_additional_image_tokens": "1"}, "num_additional_image_tokens must be an int, 0 or more, got '1'"),
        ({"num_additional_image_tokens": 5}, "writes 104 placeholders"),
    ],
    ids=str,
)
def test_settings_of_placeholders_that_do_not_fit_are_refused(folder, fields, message):
    change(folder / "processor_config.json", **fields)
    for read in (lambda: describe(folder, "x"), lambda: load(str(folder), {})):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize(
    "fields",
    [{"crop_size": {"height": 0, "width": 0}}, {"image_mean": [0.5]}, {"size": {"shortest_edge": 20}}],
    ids=str,
)
def test_an_image_processor_that_cannot_make_the_models_images_is_refused(folder, fields):
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    if "image_processor" in settings:
        settings["image_processor"] |= {"do_center_crop": "crop_size" in fields, **fields}
        path.write_text(json.dumps(settings))
    else:
        change(folder / "preprocessor_config.json", **fields, do_center_crop="crop_size" in fields)
    with pytest.raises(ValueError, match=r"processor.*(cannot read an image|makes images of|cannot be loaded)"):
        describe(folder, "x")


def test_a_model_and_a_processor_of_which_one_alone_reads_the_question_are_refused(folder, tmp_path):
    change(folder / "config.json", token_recovery=None)
    with pytest.raises(ValueError, match=r"processor has CLIP's tokenizer, but config.json has no token_recovery"):
        describe(folder, "x")
    other = LLAVA.save_converted(tmp_path / "other", budget=24)
    change(other / "processor_config.json", recovery_max_length=None)
    with pytest.raises(ValueError, match=r"config.json has a .*text_encoder_config, but the processor has no"):
        describe(other, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object, got list"),
        ("{", "is not valid JSON"),
        ('{"eos_token_id": "x"}', "eos_token_id must be a token's id or a list of ids, got 'x'"),
        ('{"eos_token_id": []}', "eos_token_id must be a token's id or a list of ids"),
        ('{"pad_token_id": [3]}', "pad_token_id must be a token's id, got"),
        ('{"max_new_tokens": "20"}', "max_new_tokens must be an int, got '20'"),
        ('{"temperature": "hot"}', "temperature must be a number, got 'hot'"),
        ('{"do_sample": 1}', "do_sample must be true or false, got 1"),
    ],
)
def test_a_damaged_generation_config_is_refused(folder, text, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"generation_config.json.*{message}"):
        describe(folder, "x")


def test_generation_configs_of_published_models_are_taken(tmp_path):
    fields = {"eos_token_id": [2, 32007], "pad_token_id": 32001, "temperature": 1, "top_p": None, "new_one": {}}
    check_generation_config(tmp_path)  # there is none
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    check_generation_config(tmp_path)


def test_convert_refuses_a_damaged_generation_config(tmp_path, capsys):
    llava, clip = LLAVA.save_sources(tmp_path)
    (llava / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert cli.main(["convert", str(llava), str(clip), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "generation_config.json: eos_token_id must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for", "TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{{ a.b.c }}", "'a' is"),
    ],
)
def test_a_damaged_chat_template_is_named(folder, tmp_path, capsys, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    tiny.pictures(1)[0].save(tmp_path / "a.png")
    assert cli.main(["ask", str(folder), str(tmp_path / "a.png"), "How many?", "--max-new-tokens", "1"]) == 2
    error = capsys.readouterr().err
    assert "correct chat_template.jinja" in error and reason in error
