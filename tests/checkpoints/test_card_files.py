"""Cards as files: an unedited one is rendered again, and what a person wrote is left alone."""

import pytest
from architectures import LLAVA_NEXT
from huggingface_hub import ModelCard, metadata_load
from saved import save_checkpoint

from reccomp_hf.checkpoints.cards import CardFacts, is_unedited, may_be_replaced, render_card, write_card
from reccomp_hf.cli.main import main

BASES = ["llava-hf/llava-1.5-7b-hf", "openai/clip-vit-large-patch14-336"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a fixed budget; its README.md is written over by the tests."""
    return save_checkpoint(tmp_path_factory.mktemp("cards") / "mine", budget=25)


@pytest.fixture
def readme(folder):
    path = folder / "README.md"
    path.unlink(missing_ok=True)
    return path


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
        FileExistsError, match=r"edited by a person and is left unchanged.*--stdout.*force=True \(--force\)"
    ):
        write_card(folder)
    assert readme.read_text(encoding="utf-8") == edited
    write_card(folder, force=True)
    assert is_unedited(readme.read_text(encoding="utf-8"))


def test_what_the_hub_and_transformers_do_to_a_card_is_not_an_edit(folder, readme):
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


def test_only_compressed_checkpoints_have_a_card(tmp_path):
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no config\.json"):
        render_card(tmp_path)
    LLAVA_NEXT.shared_stock().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a compressed LLaVA: its model_type is 'llava_next'"):
        render_card(tmp_path)
    with pytest.raises(ValueError, match="give source alone"):
        render_card(CardFacts("mine", LLAVA_NEXT.compressed().config), license="mit")


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
        ([folder], "is left unchanged"),
        ([folder, "--license", "My Own"], "is left unchanged"),
        ([folder, "--license", "My Own", "--force"], "license must be an identifier"),
        ([tmp_path], "has no config.json"),
    ):
        assert main(["card", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["card", str(folder), "--license", "mit", "--force", "--measure"]) == 0
    text = " ".join(readme.read_text(encoding="utf-8").split())
    assert "The weights: `mit`." in text and "Measured on 8 drawn scenes" in text
