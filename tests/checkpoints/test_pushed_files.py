"""A push sends the files of a checkpoint, and no other file of the machine."""

import json
import shutil

import pytest
from architectures import LLAVA
from conversions import converted

from reccomp_hf.checkpoints import completeness
from reccomp_hf.checkpoints import hub as package_hub


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "tokenizer.json", "vision_reccomp.py", "recovery_tokenizer", "LICENSE"]
)
def test_links_are_not_followed(tmp_path, name):
    folder, secret = shutil.copytree(converted(LLAVA), tmp_path / "model"), tmp_path / "secret"
    if (folder / name).exists():
        shutil.move(folder / name, secret)
    else:
        secret.write_text("secret")
    before = secret.read_bytes() if secret.is_file() else None
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name} is a link to .*secret. Only weight files may be links"):
        package_hub.push(folder, "me/model")
    assert before is None or secret.read_bytes() == before


def test_weight_files_may_be_links(tmp_path):
    folder = shutil.copytree(converted(LLAVA), tmp_path / "model")
    files = completeness.files_of(folder)
    for path in folder.glob("*.safetensors"):
        path.symlink_to(shutil.move(path, tmp_path / path.name))
    completeness.check_checkpoint(folder)
    assert completeness.files_of(folder) == files


def test_an_index_names_files_of_its_folder_only(tmp_path):
    folder = shutil.copytree(converted(LLAVA), tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copyfile(next(folder.glob("*.safetensors")), tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), ".x.safetensors"):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], "key": name}}))
        with pytest.raises(ValueError, match="is not a file of its folder"):
            package_hub.push(folder, "me/model")
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "key": "credentials.json"}}))
    (folder / "credentials.json").write_text("{}")
    with pytest.raises(ValueError, match=r"credentials\.json cannot be read"):
        package_hub.push(folder, "me/model")
