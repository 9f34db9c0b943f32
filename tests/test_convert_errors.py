"""`reccomp-hf convert` says what is wrong with its sources, before anything is written."""

import pytest

from reccomp_hf import cli
from reccomp_hf.demo import checkpoint_folder


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("./nowhere", "{clip}"), "llava: there is no folder ./nowhere"),
        (("{llava}", "./nowhere"), "clip: there is no folder ./nowhere"),
        (("{llava}", "{llava}"), "clip must be of model_type 'clip', got 'llava'"),
        (("{clip}", "{clip}"), "llava must be of model_type 'llava' or 'llava_next', got 'clip'"),
    ],
)
def test_convert_says_which_source_is_wrong(sources, message, tmp_path, capsys):
    folders = {name: str(checkpoint_folder(name)) for name in ("llava", "clip")}
    code = cli.main(["convert", *(source.format(**folders) for source in sources), str(tmp_path / "out")])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_authors_method_needs_a_clip(tmp_path, capsys):
    llava = str(checkpoint_folder("llava"))
    assert cli.main(["convert", llava, str(tmp_path / "out"), "--visual-only", "--preset", "authors"]) == 2
    assert "needs the question, and so a CLIP" in capsys.readouterr().err
