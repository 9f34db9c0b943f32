"""Model cards: their facts are those of the checkpoint, and the code that they show runs."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny
from architectures import LLAVA, assert_clear_choices, each_architecture
from huggingface_hub import ModelCard
from saved import save_checkpoint

from reccomp_hf.checkpoints.cards import CardFacts, content, is_unedited, license_of, render_card
from reccomp_hf.checkpoints.cards.content import field_descriptions, field_rows
from reccomp_hf.checkpoints.cards.probe import measure_tokens
from reccomp_hf.checkpoints.conversion_record import ConversionRecord
from reccomp_hf.cli.options import setting
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.methods.registry import get_method, method_names
from reccomp_hf.core.remote_code import write_remote_code
from reccomp_hf.core.settings import PRESETS
from reccomp_hf.demo import EVALUATION_SEEDS, checkpoint_folder, draw_scene, questions
from reccomp_hf.measure.published import CLIP_VIT_L_336, FULL_SIZE

BASES = ["llava-hf/llava-1.5-7b-hf", CLIP_VIT_L_336]
SECTIONS = {
    "paper": {},
    "visual only": {"text_encoder_config": None},
    "share": {"budget": 0.25, "merged_tokens": 4},
    "saliency alone": {"budget": 16, "text_share": 0.0},
    "authors": {"method": "authors"},
    "pooling": {"method": "pooling_2x2"},
    "prumerge": {"method": "prumerge_plus", "budget": 32, "method_options": {"neighbors": 16}},
    "off": {"enabled": False},
    "rules": {"budget": 16, "rules": [{"begins": "how many", "budget": 24}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a fixed budget, which the tests leave as it is."""
    return save_checkpoint(tmp_path_factory.mktemp("cards") / "mine", budget=25)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, with the files that a push adds."""
    path = tmp_path_factory.mktemp("demo") / "reccomp-demo"
    shutil.copytree(checkpoint_folder("demo"), path)
    write_remote_code(path)
    return path


def blocks(card, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def full_size(name="llava-1.5-7b", preset="balanced", **fields):
    entry = FULL_SIZE[name]
    return CardFacts("some-name", entry.config(preset, **fields), (entry.base_model, entry.clip), entry.license)


# ---- metadata ------------------------------------------------------------------------------------------------------


def test_metadata():
    card = render_card(dataclasses.replace(full_size(), repo="me/llava-reccomp"))
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "llama2",
        "base_model": BASES,
        "base_model_relation": "merge",
        "tags": ["reccomp_hf", "token-compression"],
    }


def test_a_licence_that_is_not_known_is_said_to_be():
    data = ModelCard(render_card(dataclasses.replace(full_size(), license=None))).data.to_dict()
    link = f"https://huggingface.co/{BASES[0]}"
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "base-model", link)
    card = render_card(CardFacts("mine", LLAVA.compressed().config))
    data = ModelCard(card).data.to_dict()
    assert "license_link" not in data and "base_model" not in data and "base_model_relation" not in data
    assert "licence, which was not recorded" in " ".join(card.split())


def test_a_visual_only_model_is_not_a_merge(folder):
    data = ModelCard(render_card(folder, base_model=BASES[:1])).data.to_dict()
    assert (data["base_model"], data["license"]) == (BASES[:1], "llama2")
    assert "base_model_relation" not in data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model": ["./llava", "clip"]}, "'./llava' is not a valid id of a repository on the Hub"),
        ({"base_model": ["llava"]}, "'llava' is not a full id on the Hub: write owner/name"),
        ({"repo": "me/my/model"}, "'me/my/model' is not a valid id"),
        ({"license": "Apache 2"}, "license must be an identifier of the Hub .* got 'Apache 2'"),
    ],
)
def test_what_the_hub_would_not_take_is_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        render_card(folder, **settings)
    assert not (folder / ".README.md.new").exists()


def test_licences_of_base_models(tmp_path):
    assert license_of("llava-hf/llava-v1.6-mistral-7b-hf") == "apache-2.0"
    assert license_of("somebody/some-llava") is None
    assert license_of(tmp_path) is None
    for text, found in (
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: My Own\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("No metadata.\n", None),
    ):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert license_of(tmp_path) == found


# ---- text ----------------------------------------------------------------------------------------------------------


@each_architecture
@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_has_a_card_without_gaps(architecture, section):
    config = architecture.config_class.from_dict(architecture.compressed().config.to_dict())
    config.token_recovery = SECTIONS[section]
    card = render_card(CardFacts("some-name", config))
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined|nan\b", card)
    assert is_unedited(card)
    lines = [line for line in card.splitlines() if not line.startswith(("|", "    ", "model", "processor", "content"))]
    assert max(map(len, lines)) <= 125
    assert card.count("\n## ") == 9


def test_every_field_is_documented_and_explained_somewhere():
    names = {field.name for field in dataclasses.fields(TokenRecoveryConfig)}
    assert field_descriptions().keys() == names
    encoder = {"model_type": "clip_text_model", "max_position_embeddings": 77}
    sections = [TokenRecoveryConfig(**{"text_encoder_config": encoder, **fields}) for fields in SECTIONS.values()]
    explained = {row["name"] for section in sections for row in field_rows(section)}
    assert explained == names - {"version"}


def test_a_new_field_cannot_be_forgotten(monkeypatch):
    new = dataclasses.make_dataclass(
        "New", [("brand_new", int, 3)], bases=(TokenRecoveryConfig,), init=False, frozen=True
    )
    section = TokenRecoveryConfig()
    object.__setattr__(section, "__class__", new)
    with pytest.raises(KeyError, match="brand_new"):  # its description is missing
        field_rows(section)
    described = {**field_descriptions(), "brand_new": "It is `None` or new."}
    monkeypatch.setattr(content, "field_descriptions", lambda: described)
    assert field_rows(section)[-1] == {"name": "brand_new", "value": "`3`", "meaning": "It is `null` or new."}


@pytest.mark.parametrize(
    ("fields", "shown", "silent"),
    [
        ({}, {"outlier_threshold", "text_relevance", "budget"}, {"text_share", "coverage_share"}),
        ({"budget": 16}, {"text_share", "merged_tokens", "coverage_share"}, {"outlier_threshold"}),
        ({"budget": 16, "text_share": 0.0}, {"text_share", "visual_layer"}, {"text_relevance"}),
        ({"method": "pooling_3x3"}, {"method"}, {"visual_layer", "text_share", "budget"}),
        ({"enabled": False}, {"enabled"}, {"method", "budget"}),
        ({"method": "visionzip", "budget": 9}, {"visual_layer", "method_options", "budget"}, {"text_relevance"}),
        ({"method": "cdpruner", "budget": 9}, {"text_relevance"}, {"text_share", "visual_layer", "method_options"}),
        ({"method": "prumerge"}, {"visual_heads", "budget"}, {"text_relevance", "outlier_threshold"}),
    ],
)
def test_only_fields_that_matter(fields, shown, silent):
    encoder = {"model_type": "clip_text_model"}
    names = {row["name"] for row in field_rows(TokenRecoveryConfig(text_encoder_config=encoder, **fields))}
    assert shown <= names
    assert not silent & names


RECORDS = {
    "preset": (ConversionRecord("balanced"), "LLAVA CLIP mine --preset balanced"),
    "hub": (
        ConversionRecord("paper", {"budget": 25}, llava="org/llava@v2", clip="org/clip"),
        "org/llava@v2 org/clip mine --preset paper --set budget=25",
    ),
    "visual only": (
        ConversionRecord("paper", llava="org/llava", visual_only=True, dtype="float16"),
        "org/llava mine --preset paper --visual-only --dtype float16",
    ),
    "options": (
        ConversionRecord("paper", {"method": "prumerge", "method_options": {"neighbors": 8}}, clip="a/b", force=True),
        "LLAVA a/b mine --preset paper --set 'method=\"prumerge\"' --set 'method_options={\"neighbors\": 8}' --force",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_card_shows_the_recorded_command(name, tmp_path):
    record, words = RECORDS[name]
    record.write(tmp_path)
    record = ConversionRecord.read(tmp_path)
    config = LLAVA.config_class.from_dict(LLAVA.compressed().config.to_dict())
    config.token_recovery = TokenRecoveryConfig.from_preset(record.preset, **record.fields)
    card = render_card(CardFacts("mine", config, record=record))
    (command,) = blocks(card, "bash")
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(f"reccomp-hf convert {words}")
    assert max(map(len, command.splitlines())) <= 106
    assert "changed afterwards" not in card
    config.token_recovery = {"position_ids": "compact", "budget": 26}
    card = render_card(CardFacts("mine", config, record=record))
    assert blocks(card, "bash") == [command] and "Its settings were changed afterwards" in card


def test_sources_that_the_record_does_not_name_are_the_base_models(folder):
    record = ConversionRecord("paper")
    assert record.command("out", BASES)[2:5] == [*BASES, "out"]
    assert record.command("out", BASES[:1])[2:5] == [BASES[0], "CLIP", "out"]
    assert "Not recorded." in render_card(folder, base_model=BASES)


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"preset": "paper", "fields": "x"}', '{"preset": "paper", "author": "me"}']
)
def test_a_file_of_that_name_with_other_contents_is_not_a_record(text, tmp_path):
    assert ConversionRecord.read(tmp_path) is None
    (tmp_path / "conversion.json").write_text(text)
    assert ConversionRecord.read(tmp_path) is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fields", [{}, {"visual_heads": "mean"}, {"enabled": False, "outlier_threshold": 2.5}])
def test_the_command_makes_the_section(preset, fields):
    record = ConversionRecord(preset, fields, *BASES)
    section = TokenRecoveryConfig.from_preset(preset, **fields)
    assert record.describes(section)
    assert record.describes(section.replace({"text_encoder_config": LLAVA.text_config()}))  # it is the CLIP's
    assert not record.describes(section.replace({"merge_neighbors": 3}))
    command = shlex.split(" ".join(record.command("out")))
    given = dict(setting(command[place + 1]) for place, word in enumerate(command) if word == "--set")
    assert TokenRecoveryConfig.from_preset(command[command.index("--preset") + 1], **given) == section


def test_a_record_of_an_unknown_method_describes_nothing():
    assert not ConversionRecord("paper", {"method": "somebody's"}).describes(TokenRecoveryConfig())
    assert not ConversionRecord("newer").describes(TokenRecoveryConfig())


@pytest.mark.parametrize("name", method_names())
def test_a_card_says_whose_method_it_is(name):
    method = get_method(name)
    budget = {"budget": 64} if method.budget == "required" else {}
    options = {field.name: field.default for field in dataclasses.fields(method.options)} if method.options else {}
    facts = full_size(preset="paper", method=name, method_options=options, text_relevance="value", **budget)
    card = render_card(facts)
    shown = " ".join(card.split())
    if method.source:
        number = re.search(r"arXiv (\d+\.\d+)", method.source)[1]
        assert f"The method is {method.source.split(' (')[0]} (" in shown
        assert f"[{number}](https://arxiv.org/abs/{number})), which needs no training" in shown
    else:
        assert f"The method is `{name}`, which is not a published method" in shown


def test_numbers_have_their_source():
    seven, thirteen = (render_card(full_size(name)) for name in ("llava-1.5-7b", "llava-1.5-13b"))
    assert "| 69.01 | 55.51 | 1284.9 |" in seven and "Source: the paper's tables" in seven
    assert "whose settings are not this checkpoint's" in " ".join(seven.split())
    assert "whose settings" not in render_card(full_size(preset="paper"))
    assert "69.01" not in thirteen
    for card in (seven, thirteen):
        assert "Not measured: no benchmark was run" in card
        assert "**not measured**" in card.partition("## Cost")[2].partition("## Results")[0]


def test_fixed_counts_are_exact_and_others_are_not_guessed():
    assert "Stock: 576 per image. Here: 64 (11.1%), always." in render_card(full_size())
    assert "Here: 64 (11.1%), always." in render_card(full_size(preset="paper", method="pooling_3x3"))
    dynamic = render_card(full_size(preset="paper"))
    assert "The number of tokens kept was not measured for this card" in dynamic
    assert "is assumed to have the paper's average of 9.7%" in " ".join(dynamic.split())
    tiled = render_card(full_size("llava-v1.6-mistral-7b"))
    assert "| 640 x 480 | 1 + 4 | 2,304 + 36 | 64 + up to 36 |" in tiled
    assert "LLaVA-NeXT's vision tower was fine-tuned" in tiled


def test_a_measured_count_enters_the_cost():
    counts = {"pictures": 8, "stock": 576, "mean": 70.4, "least": 60, "most": 80, "visual": 50, "text": 20.4}
    facts = dataclasses.replace(full_size(preset="paper"), counts={**counts, "coverage": 0, "merged": 0})
    assert "The compressed prompt has 70 visual tokens, the average measured" in " ".join(render_card(facts).split())
    assert "| prompt, tokens | 636 | 130 |" in render_card(facts)
    assert "is assumed to have the paper's average" in " ".join(render_card(full_size(preset="paper")).split())


# ---- measuring -----------------------------------------------------------------------------------------------------


@each_architecture
def test_counts_are_those_of_the_whole_model(architecture, tmp_path):
    path = save_checkpoint(tmp_path / "paper", architecture, outlier_threshold=1.7)
    counts = measure_tokens(path, scenes=3)
    whole = _counts_of_the_whole_model(architecture, 3)
    assert counts["mean"] == pytest.approx(sum(whole) / 3)
    assert (counts["least"], counts["most"], counts["pictures"]) == (min(whole), max(whole), 3)
    stages = sum(counts[name] for name in ("visual", "text", "coverage", "merged"))
    assert stages == pytest.approx(counts["mean"])
    assert counts["mean"] < counts["stock"]
    card = " ".join(
        render_card(path).split()
    )  # the count depends on the picture: it is measured without being asked for
    assert "Measured on 8 drawn scenes" in card and "on average" in card
    assert "was not measured for this card" in render_card(path, measure=False)


def _counts_of_the_whole_model(architecture, scenes):
    found = []
    for index, seed in enumerate(EVALUATION_SEEDS[:scenes]):
        scene = draw_scene(seed)
        question = questions(scene, seed)[index].text
        text = f"USER: <image>\n{question} ASSISTANT:"
        inputs = architecture.processor()(images=[scene.image], text=[text], return_tensors="pt")
        setting, model = {"outlier_threshold": 1.7}, architecture.compressed()
        assert_clear_choices(model, inputs, setting)
        found += [int(record.counts.sum()) for record in model.recover(**inputs, token_recovery=setting)]
    return found


def test_where_there_is_nothing_to_measure(tmp_path):
    folder, bare = save_checkpoint(tmp_path / "whole", budget=25), tmp_path / "bare"
    LLAVA.build(budget=25).config.save_pretrained(bare)
    assert measure_tokens(bare) is None
    assert "These counts follow from the settings." in render_card(bare, measure=True)
    assert "of 100 patches 25.0 tokens are kept on average" in " ".join(render_card(folder, measure=True).split())
    assert "Measured" not in render_card(folder)  # 25 are always 25


# ---- the code that it shows ----------------------------------------------------------------------------------------


def test_the_code_runs(demo, tmp_path, monkeypatch, capsys):
    loading, remote = blocks(render_card(demo, repo="me/demo"))
    monkeypatch.chdir(tmp_path)
    tiny.pictures(1)[0].save("picture.jpg")
    names: dict[str, object] = {}
    exec(loading.replace("me/demo", str(demo)), names)
    assert capsys.readouterr().out.strip()
    assert names["model"].config.token_recovery.budget is not None
    assert remote.replace(", trust_remote_code=True", "").splitlines()[2:] == [
        line for line in loading.splitlines() if "from_pretrained" in line
    ]


def test_the_code_runs_without_the_package(demo, tmp_path):
    loading, remote = (block.replace("me/demo", str(demo)) for block in blocks(render_card(demo, repo="me/demo")))
    rest = loading.partition("processor = ")[2].partition("\n")[2]
    tiny.pictures(1)[0].save(tmp_path / "picture.jpg")
    hidden = "import sys\nsys.modules['reccomp_hf'] = None\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", hidden + remote + "from PIL import Image\n" + rest],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr


NASTY = [
    "</h1><script>x</script>",
    "a `b` **c** [d](e)",
    'x"); import os; os.remove("y',
    "one\n```\n# two",
    "$(rm -rf)",
]


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_on_a_card(name):
    record = ConversionRecord("balanced", {"budget": 25}, "a/b", "c/d; rm -rf x\n```", dtype="float16")
    facts = dataclasses.replace(full_size(), name=name, repo=None, record=record)
    card = render_card(facts)
    assert "<script>" not in card.replace("\\<script\\>", "") and "import os" not in "".join(blocks(card))
    [title] = re.findall(r"^# (.*)$", card.split("## How")[0], flags=re.MULTILINE)
    assert re.sub(r"\\(?=[^A-Za-z0-9 ])", "", title) == " ".join(name.split())
    for block in blocks(card):
        compile(block, "card", "exec")
    [command] = blocks(card, "bash")
    words = shlex.split(command)
    assert words[:3] == ["reccomp-hf", "convert", "a/b"] and re.fullmatch(r"[A-Za-z0-9._-]+", words[4])
    assert card.count("```") % 2 == 0
