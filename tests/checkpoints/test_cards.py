"""Model cards: what they say is true of the checkpoint, what they show runs, and nobody's words are overwritten."""

import dataclasses
import re
import shlex

import pytest
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from huggingface_hub import ModelCard, metadata_load
from paths import MODEL_CARDS

from reccomp_hf.checkpoints.cards import (
    CardFacts,
    content,
    is_unedited,
    license_of,
    may_be_replaced,
    render_card,
    shipped,
    write_card,
)
from reccomp_hf.checkpoints.cards.content import field_descriptions, field_rows, recipe
from reccomp_hf.cli.main import main
from reccomp_hf.cli.options import setting
from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.methods.registry import get_method, method_names
from reccomp_hf.core.settings import PRESETS
from reccomp_hf.demo import CHECKPOINTS, checkpoint_folder
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
}


def save(folder, architecture=LLAVA, **fields):
    architecture.build(**fields).save_pretrained(folder)
    architecture.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a fixed budget; its README.md is written over by the tests."""
    return save(tmp_path_factory.mktemp("cards") / "mine", budget=25)


@pytest.fixture
def readme(folder):
    path = folder / "README.md"
    path.unlink(missing_ok=True)
    return path


def blocks(card, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def full_size(name="llava-1.5-7b", preset="balanced", **fields):
    entry = FULL_SIZE[name]
    return CardFacts("some-name", entry.config(preset, **fields), (entry.base_model, entry.clip), entry.license)


# ---- what is shipped -----------------------------------------------------------------------------------------------


def test_the_shipped_cards_are_what_is_rendered(tmp_path):
    paths = shipped.write_shipped(tmp_path)
    assert sorted(path.name for path in paths) == sorted(path.name for path in MODEL_CARDS.glob("*.md"))
    for path in paths:
        stale = f"{path.name} is stale: run `python -m reccomp_hf.checkpoints.cards.shipped`"
        assert path.read_text(encoding="utf-8") == (MODEL_CARDS / path.name).read_text(encoding="utf-8"), stale
    for name in CHECKPOINTS:
        beside = (checkpoint_folder(name) / "README.md").read_text(encoding="utf-8")
        assert beside == (MODEL_CARDS / f"{name}.md").read_text(encoding="utf-8"), f"copy model_cards/{name}.md there"


def test_a_measured_count_enters_the_cost():
    counts = {"pictures": 8, "stock": 576, "mean": 70.4, "least": 60, "most": 80, "visual": 50, "text": 20.4}
    facts = dataclasses.replace(full_size(preset="paper"), counts={**counts, "coverage": 0, "merged": 0})
    assert "Compressed are 70 visual tokens, the average measured above." in " ".join(render_card(facts).split())
    assert "| prompt, tokens | 636 | 130 |" in render_card(facts)
    assert "Assumed is the paper's average" in " ".join(render_card(full_size(preset="paper")).split())


def test_the_module_writes_them_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "SHIPPED", ("llava-1.5-7b",))
    monkeypatch.setattr(shipped, "demo_facts", lambda _: full_size())
    assert shipped.main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / f"{name}.md") for name in ("llava-1.5-7b", "demo", "demo-global")
    ]


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


def test_a_visual_only_model_is_no_merge(folder):
    data = ModelCard(render_card(folder, base_model=BASES[:1])).data.to_dict()
    assert (data["base_model"], data["license"]) == (BASES[:1], "llama2")
    assert "base_model_relation" not in data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model": ["./llava", "clip"]}, "'./llava' is no id that a repository on the Hub can have"),
        ({"base_model": ["llava"]}, "'llava' is no full id on the Hub: write owner/name"),
        ({"repo": "me/my/model"}, "'me/my/model' is no id"),
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
    new = dataclasses.make_dataclass("New", [("brand_new", int, 3)], bases=(TokenRecoveryConfig,), init=False)
    section = TokenRecoveryConfig()
    section.__class__ = new
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fields", [{}, {"visual_heads": "mean"}, {"enabled": False, "outlier_threshold": 2.5}])
def test_the_command_makes_the_section(preset, fields):
    section = TokenRecoveryConfig.from_preset(preset, **fields)
    name, overrides = recipe(section)
    assert TokenRecoveryConfig.from_preset(name, **overrides) == section
    assert len(overrides) <= len(fields)
    (command,) = blocks(render_card(full_size(preset=preset, **fields)), "bash")
    assert command.split()[:4] == ["reccomp-hf", "convert", *BASES]
    assert f"--preset {name}" in command
    assert command.count("--set ") == len(overrides)


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
        assert f"The method is `{name}`, which is none of a paper's" in shown
    preset, overrides = recipe(facts.section)
    assert TokenRecoveryConfig.from_preset(preset, **overrides).to_dict() == {
        **facts.section.to_dict(),
        "text_encoder_config": None,
    }
    (command,) = blocks(card, "bash")
    words = shlex.split(command.replace("\\\n", " "))
    told = dict(setting(words[place + 1]) for place, word in enumerate(words) if word == "--set")
    assert told == overrides


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
    assert "Stock: 576 per picture. Here: 64 (11.1%), always." in render_card(full_size())
    assert "Here: 64 (11.1%), always." in render_card(full_size(preset="paper", method="pooling_3x3"))
    dynamic = render_card(full_size(preset="paper"))
    assert "How many stay was not measured for this card" in dynamic
    assert "Assumed is the paper's average of 9.7%" in " ".join(dynamic.split())
    tiled = render_card(full_size("llava-v1.6-mistral-7b"))
    assert "| 640 x 480 | 1 + 4 | 2,304 + 36 | 64 + up to 36 |" in tiled
    assert "LLaVA-NeXT fine-tuned its vision tower" in tiled


# ---- the file ------------------------------------------------------------------------------------------------------


def test_an_unedited_card_is_refreshed_and_keeps_what_it_knew(folder, readme):
    assert write_card(folder, base_model=BASES, repo="me/first") == readme
    first = readme.read_text(encoding="utf-8")
    assert "me/first" in first
    write_card(folder)
    assert readme.read_text(encoding="utf-8") == first
    write_card(folder, license="mit", repo="you/second", name="mine")
    data, text = metadata_load(readme), readme.read_text(encoding="utf-8")
    assert (data["base_model"], data["license"]) == (BASES, "mit")
    assert "\n# mine\n" in text and "you/second" in text and "me/first" not in text
    assert not list(folder.glob(".README*"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("## Limits", "## Known limits"),
        lambda text: text.replace("- token-compression", "- my-tag"),
        lambda text: text + "\nAnd one more thing.\n",
        lambda text: text.partition("<!--")[0],
        lambda text: "# My model\n\nWritten by hand.\n",
        lambda text: text.replace("tags:", "tags: ["),
        lambda text: "---\n- a list\n---\n# My model\n",
        lambda text: "---\nlicense: mit\n---\n",
    ],
)
def test_what_a_person_wrote_is_left_alone(folder, readme, edit):
    write_card(folder)
    edited = edit(readme.read_text(encoding="utf-8"))
    readme.write_text(edited, encoding="utf-8")
    with pytest.raises(
        FileExistsError, match=r"edited by a person and is left as it is.*--stdout.*force=True \(--force\)"
    ):
        write_card(folder)
    assert readme.read_text(encoding="utf-8") == edited
    write_card(folder, force=True)
    assert is_unedited(readme.read_text(encoding="utf-8"))


def test_what_the_hub_and_transformers_do_to_a_card_is_no_edit(folder, readme):
    write_card(folder, base_model=BASES)
    text = readme.read_text(encoding="utf-8")
    ModelCard.load(readme).save(readme)  # as push_to_hub of transformers does
    assert is_unedited(readme.read_text(encoding="utf-8"))
    assert is_unedited(text.replace("\n", "\r\n"))
    reordered = ModelCard(text)
    reordered.data.__dict__ = dict(reversed(reordered.data.__dict__.items()))
    reordered._original_order = None  # of huggingface_hub 2
    assert str(reordered) != text
    assert is_unedited(str(reordered))


def test_the_card_that_transformers_generates_gives_way(folder, readme, monkeypatch):
    from transformers.utils import hub

    def absent(*args, **kwargs):
        raise hub.EntryNotFoundError("none")

    monkeypatch.setattr(hub.ModelCard, "load", absent)
    generated = hub.create_and_tag_model_card("me/model", ["some-tag"])
    assert may_be_replaced(str(generated)) and may_be_replaced("")
    generated.save(readme)
    write_card(folder)
    assert is_unedited(readme.read_text(encoding="utf-8"))
    generated.text = generated.text.replace("[More Information Needed]", "It was trained on cats.", 1)
    assert not may_be_replaced(str(generated))


def test_what_is_no_checkpoint_of_ours_has_no_card(tmp_path):
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no config\.json"):
        render_card(tmp_path)
    LLAVA_NEXT.shared_stock().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no compressed LLaVA: its model_type is 'llava_next'"):
        render_card(tmp_path)
    with pytest.raises(ValueError, match="give source alone"):
        render_card(full_size(), license="mit")


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_and_prints(folder, readme, capsys):
    assert main(["card", str(folder), "--base-model", BASES[0], "--base-model", BASES[1], "--repo", "me/mine"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Wrote {readme}.") and f"reccomp-hf push {folder} me/mine" in out
    written = readme.read_text(encoding="utf-8")
    readme.write_text("Mine.\n", encoding="utf-8")
    settings = ["--base-model", BASES[0], "--base-model", BASES[1], "--repo", "me/mine", "--stdout"]
    assert main(["card", str(folder), *settings]) == 0
    assert capsys.readouterr().out == written
    assert readme.read_text(encoding="utf-8") == "Mine.\n"


def test_errors_of_the_command_are_one_line(folder, readme, tmp_path, capsys):
    readme.write_text("Mine.\n", encoding="utf-8")
    for arguments, message in (
        ([folder], "is left as it is"),
        ([folder, "--license", "My Own"], "is left as it is"),
        ([folder, "--license", "My Own", "--force"], "license must be an identifier"),
        ([tmp_path], "has no config.json"),
    ):
        assert main(["card", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["card", str(folder), "--license", "mit", "--force", "--measure"]) == 0
    text = " ".join(readme.read_text(encoding="utf-8").split())
    assert "The weights: `mit`." in text and "Measured on 8 drawn scenes" in text
