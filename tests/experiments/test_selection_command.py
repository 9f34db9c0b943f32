"""`python -m reccomp_hf.experiments.selection`: a table, JSON and a plot of either measurement."""

import json

import pytest

from reccomp_hf.experiments.selection import choosing, scaling
from reccomp_hf.experiments.selection.__main__ import main


def test_choosing(monkeypatch, capsys, tmp_path):
    small = dict(choosing.compare_choosing.__wrapped__.__kwdefaults__, patches=144, width=16, batch_sizes=(1, 2))
    monkeypatch.setattr(choosing.compare_choosing.__wrapped__, "__kwdefaults__", small)
    files = tmp_path / "selection.json", tmp_path / "selection.svg"
    assert main(["--repeats", "2", "--seed", "3", "--json", str(files[0]), "--plot", str(files[1])]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("recover_tokens at (144, 16) on cpu (") and not err
    assert "released code / ours" in out and "plain loop / ours" in out
    assert sum(line.startswith("  dynamic") for line in out.splitlines()) == 2
    assert out.endswith(f"\nWrote {files[0]} and {files[1]}.\n")
    settings = json.loads(files[0].read_text())["settings"]
    assert (settings["rounds"], settings["seed"], settings["clock"]) == (2, 3, "wall clock")
    assert "<svg" in files[1].read_text()


def test_scaling(monkeypatch, capsys, tmp_path):
    small = dict(scaling.measure_scaling.__wrapped__.__kwdefaults__, patches=36, width=8)
    small["axes"] = {"batch": (1, 2), "patches": (36, 49, 64, 81)}
    monkeypatch.setattr(scaling.measure_scaling.__wrapped__, "__kwdefaults__", small)
    for name in ("budget 64", "balanced"):  # 64 tokens of 36 patches cannot be
        monkeypatch.setitem(scaling.SCALED, name, scaling.SCALED[name].replace({"budget": 16}))
    output = tmp_path / "scaling.json"
    assert main(["--scaling", "--repeats", "2", "--cpu-time", "--json", str(output)]) == 0
    out = capsys.readouterr().out
    assert "patches: 36, 49, 64, 81; N log N would be 1.2" in out and "merging: clustering the rest" in out
    assert json.loads(output.read_text())["settings"]["clock"] == "CPU seconds"


def test_a_bad_option_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--repeats", "0"])
    assert "--repeats: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
