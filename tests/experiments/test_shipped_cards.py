"""The cards of `model_cards/` and of the demo checkpoints are what is rendered today."""

from paths import MODEL_CARDS

from reccomp_hf.checkpoints.cards import CardFacts
from reccomp_hf.demo import CHECKPOINTS, checkpoint_folder
from reccomp_hf.experiments import shipped_cards
from reccomp_hf.measure.published import FULL_SIZE


def test_the_shipped_cards_are_what_is_rendered(tmp_path):
    paths = shipped_cards.write_shipped(tmp_path)
    assert sorted(path.name for path in paths) == sorted(path.name for path in MODEL_CARDS.glob("*.md"))
    for path in paths:
        stale = f"{path.name} is stale: run `python -m reccomp_hf.experiments.shipped_cards`"
        assert path.read_text(encoding="utf-8") == (MODEL_CARDS / path.name).read_text(encoding="utf-8"), stale
    for name in CHECKPOINTS:
        beside = (checkpoint_folder(name) / "README.md").read_text(encoding="utf-8")
        assert beside == (MODEL_CARDS / f"{name}.md").read_text(encoding="utf-8"), f"copy model_cards/{name}.md there"


def test_the_module_writes_them_into_the_folder_that_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped_cards, "SHIPPED", ("llava-1.5-7b",))
    facts = CardFacts("some-name", FULL_SIZE["llava-1.5-7b"].config())
    monkeypatch.setattr(shipped_cards, "demo_facts", lambda _: facts)
    assert shipped_cards.main([str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / f"{name}.md") for name in ("llava-1.5-7b", "demo", "demo-global")
    ]
