"""A folder carries all the code that it needs: `trust_remote_code=True` without the package gives the same answers."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from architectures import ARCHITECTURES, MODEL_SETTINGS, each_architecture
from paths import DATA, INSTALLED, SUPPORT
from remote_runs import assert_same, expected_of, run_child, unexpected
from saved import older_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import reccomp_hf
from reccomp_hf.core import remote_code
from reccomp_hf.core.compat import IS_V5
from reccomp_hf.core.remote_code import write_remote_code
from reccomp_hf.demo import checkpoint_folder

ALL = {**MODEL_SETTINGS, **{name: {"method": name} for name in ("pooling_2x2", "base_tile")}}
FEW = {name: MODEL_SETTINGS[name] for name in ("paper", "spread")}
HEADS = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")
RULES = [{"begins": "how many", "budget": 12}]  # fits one row of ROWS
WRITERS = ("saved", "4x", "5x")  # model.save_pretrained here, and files of either line with the code added


def written(architecture, writer, folder):
    """A folder with code, as `writer` leaves it."""
    if writer == "saved":
        built = folder.with_suffix(".built")
        architecture.compressed().save_pretrained(built)
        architecture.processor().save_pretrained(built)
        config = json.loads((built / "config.json").read_text())
        config["token_recovery"]["rules"] = RULES
        (built / "config.json").write_text(json.dumps(config))
        for cls in (architecture.model_class, architecture.processor_class):
            cls.from_pretrained(built).save_pretrained(folder)
        return folder
    folder.mkdir()
    source = DATA / f"checkpoint_{writer}" / architecture.name
    for file in source.rglob("*"):
        if file.is_file() and file.name != "expected.safetensors":
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    write_remote_code(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with code by architecture and writer."""
    root = tmp_path_factory.mktemp("folders")
    rows = [(architecture, writer) for architecture in ARCHITECTURES for writer in WRITERS]
    return {
        f"{architecture.name}-{writer}": written(architecture, writer, root / f"{architecture.name}-{writer}")
        for architecture, writer in rows
    }


def settings_of(name):
    return ALL if name.endswith("saved") else FEW


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Folders with code of an older layout."""
    root = tmp_path_factory.mktemp("older")
    return {f"{row.name}-older": older_checkpoint(row, root / f"{row.name}-older") for row in ARCHITECTURES}


@pytest.fixture(scope="module")
def without_package(folders, older, tmp_path_factory):
    """Results of all folders in one process."""
    work = tmp_path_factory.mktemp("without")
    results = run_child("blocked", {**folders, **older}, work, [str(SUPPORT)], settings_of)
    return {**results, "work": work / "again"}


@each_architecture
@pytest.mark.parametrize("writer", [*WRITERS, "older"])
def test_the_same_answers_without_the_package(architecture, writer, folders, older, without_package):
    name = f"{architecture.name}-{writer}"
    folder, result = {**folders, **older}[name], without_package[name]
    assert result["origins"] == {"remote"}
    assert unexpected(result["logged"]) == []
    settings = settings_of(name)
    expected = expected_of(folder, settings)
    if writer == "older":
        assert (expected.pop("recovery_words") >= -1).all()  # the older code does not write it
    assert_same(expected, result["values"])
    assert len({tuple(expected[f"{setting}.counts"].tolist()) for setting in settings}) >= len(settings) // 2


@each_architecture
@pytest.mark.parametrize("writer", WRITERS)
def test_remote_code_saves_the_files_it_was_loaded_from(architecture, writer, folders, without_package):
    folder, again = (
        base / f"{architecture.name}-{writer}"
        for base in (folders[next(iter(folders))].parent, without_package["work"])
    )
    code = {file.name: file.read_bytes() for file in folder.glob("*.py")}
    assert code == {file.name: file.read_bytes() for file in again.glob("*.py")}
    files = [json.loads((base / "config.json").read_text()) for base in (folder, again)]
    assert files[0]["auto_map"] == files[1]["auto_map"]
    if writer == "saved":
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        assert names == sorted(str(file.relative_to(again)) for file in again.rglob("*") if file.is_file())
        for name in names:
            assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_package_and_remote_code_in_one_process(folders, tmp_path):
    chosen = {name: folder for name, folder in folders.items() if name.endswith("saved")}
    results = run_child("installed", chosen, tmp_path, [str(SUPPORT), str(INSTALLED)], lambda name: FEW)
    for result in results.values():
        trusted = "package" if transformers.__version__ >= "5" else "remote"  # 5.x prefers what is registered
        package = ("package",) * 3
        assert result["origins"] == ["remote", package, (trusted,) * 3, package]
        for values in result["values"][1:]:
            assert_same(result["values"][0], values)


@each_architecture
def test_with_the_package_nothing_is_asked_and_nothing_is_logged(architecture, folders, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail(f"asked {args}"))
    folder = folders[f"{architecture.name}-saved"]
    with tiny.logged_warnings() as logged:
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        pipe = pipeline("image-text-to-text", model=str(folder))
        model.save_pretrained(tmp_path)
    assert unexpected(logged) == []
    assert type(model) is type(pipe.model) is architecture.model_class
    assert type(processor) is architecture.processor_class
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@each_architecture
def test_auto_map_names_classes_that_the_files_hold(architecture, folders):
    folder = folders[f"{architecture.name}-saved"]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    auto_map |= json.loads((folder / "processor_config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoProcessor", *HEADS} == auto_map.keys()
    for reference in auto_map.values():
        module, name = reference.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        assert hasattr(reccomp_hf, name)


def test_the_files_need_only_what_transformers_needs(folders):
    needed = {"__future__", "huggingface_hub", "numpy", "packaging", "torch", "transformers", *sys.stdlib_module_names}
    needed.add("PIL")  # which transformers' own processors of images need
    for file in {file.name: file for folder in folders.values() for file in folder.glob("*.py")}.values():
        imports = get_imports(file)
        assert set(imports) <= needed, file.name
        assert "from . import" not in file.read_text(encoding="utf-8"), file.name  # which transformers does not follow


CORE = Path(remote_code.__file__).parent


def test_the_flat_files_are_the_core_line_by_line():
    """Only relative imports differ, and entry files end with the list of the others."""
    sources = remote_code.flat_sources()
    modules = [file for file in CORE.rglob("*.py") if file.name != "__init__.py"]
    names = {"_".join(file.relative_to(CORE).with_suffix("").parts) + "_reccomp.py": file for file in modules}
    assert sources.keys() == names.keys()
    assert {"methods_trim_reccomp.py", "compat_reccomp.py", "modeling_llava_reccomp.py"} < sources.keys()
    for name, file in names.items():
        original, flat = (text.splitlines() for text in (file.read_text(encoding="utf-8"), sources[name]))
        for line, (ours, written) in enumerate(zip(original, flat, strict=False), 1):
            assert ours == written or re.match(r"\s*from \.", ours), f"{name}:{line}"
            assert not re.match(r"\s*from \.(\.|\w+\.)", written), f"{name}:{line}"  # no sub-folder, no parent
            assert ours.partition(" import ")[2] == written.partition(" import ")[2], f"{name}:{line}"


@each_architecture
def test_every_entry_file_names_all_others(architecture, folders):
    """Transformers 4.57 copies out of a local folder only the files that an entry file names itself."""
    folder = folders[f"{architecture.name}-saved"]
    names = {file.stem for file in folder.glob("*.py")}
    for entry in ("configuration", "modeling_llava", "modeling_llava_next", "processing"):
        file = folder / f"{entry}_reccomp.py"
        assert set(get_relative_imports(file)) == names - {file.stem}
        assert {Path(needed).stem for needed in get_relative_import_files(file)} >= names - {file.stem}


@each_architecture
def test_code_of_an_older_layout_is_replaced(architecture, folders, tmp_path):
    """Files that an older version wrote are removed; other files stay."""
    saved = folders[f"{architecture.name}-saved"]
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    old = {"configuration_reccomp.py": "from .methods import A", "methods.py": "from .methods_trim import B"}
    old |= {"methods_trim.py": "B = 1", "processing_reccomp.py": "from .gone import C", "notes.py": "mine"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    write_remote_code(tmp_path)
    names = {file.name for file in tmp_path.glob("*.py")}
    assert names == {file.name for file in saved.glob("*.py")} | {"notes.py"}
    assert (tmp_path / "notes.py").read_text() == "mine"


@each_architecture
def test_code_is_written_into_a_folder_without_any(architecture, folders, tmp_path):
    saved = folders[f"{architecture.name}-saved"]
    bare = tmp_path / "bare"
    bare.mkdir()
    names = ("config.json", "processor_config.json")
    for name in names:
        fields = json.loads((saved / name).read_text())
        fields.pop("auto_map")
        (bare / name).write_text(json.dumps(fields))
    (bare / "notes.py").write_text("mine")
    files = write_remote_code(bare)
    assert {file.name for file in files} == {file.name for file in saved.glob("*.py")}
    assert all(file.read_bytes() == (saved / file.name).read_bytes() for file in files)
    assert all(json.loads((bare / name).read_text()) == json.loads((saved / name).read_text()) for name in names)
    assert (bare / "notes.py").read_text() == "mine"
    before = {file: file.read_bytes() for file in bare.iterdir()}
    write_remote_code(bare)
    assert {file: file.read_bytes() for file in bare.iterdir()} == before


@each_architecture
def test_code_is_written_next_to_a_model_without_a_processor(architecture, folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders[f"{architecture.name}-saved"] / "config.json").read_bytes())
    names = {file.name for file in write_remote_code(str(tmp_path))}
    assert names == {file.name for file in folders[f"{architecture.name}-saved"].glob("*.py")}


def test_code_next_to_a_stock_model_is_refused(tmp_path):
    tiny.llava_config().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model of type 'llava', not 'llava_reccomp' or 'llava_next_reccomp'.*convert"
    ):
        write_remote_code(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_remote_code(tmp_path / "nowhere")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@each_architecture
def test_a_repository_named_by_the_hub_is_not_kept(architecture):
    """Configs that come from the Hub say where their code came from; a copy brings its own."""
    config = architecture.compressed().config
    fields = config.to_dict()
    fields["auto_map"] = {**{name: f"org/name--{value}" for name, value in fields["auto_map"].items()}, "Other": "a.B"}
    again = architecture.config_class.from_dict(fields)
    assert again.to_dict()["auto_map"] == {**config.to_dict()["auto_map"], "Other": "a.B"}


@pytest.mark.parametrize("trust", [None, True, False])
def test_the_shipped_demo_loads_by_the_package_whatever_code_is_trusted(trust):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_folder("demo"), trust_remote_code=trust)
    assert type(model) is reccomp_hf.LlavaRecCompForConditionalGeneration


@pytest.mark.parametrize("trust", [None, True, False])
def test_programs_that_read_auto_map_find_the_class_of_the_shipped_demo(trust):
    # 4.57 would look for the code that `auto_map` names in the demo's folder
    expected = remote_code.model_auto_map("llava_reccomp") if IS_V5 else {}
    assert reccomp_hf.LlavaRecCompConfig().auto_map == expected
    trl = pytest.importorskip("trl.trainer.utils")  # the trainers' reference models are made so
    model = trl.create_model_from_path(str(checkpoint_folder("demo")), trust_remote_code=trust)
    assert type(model) is reccomp_hf.LlavaRecCompForConditionalGeneration
