"""The script that mends torchvision next to a CPU build of torch, on a torchvision of two files."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / ".ci" / "mend_torchvision.py"
REGISTRATION = '@torch.library.register_fake("torchvision::{name}")\ndef {name}(): ...\n'

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="a source distribution has no .ci folder")


def torchvision_in(folder, operators, package=""):
    """A torchvision that registers some operators; returns the file that does."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(package)
    registrations = folder / "torchvision" / "_meta_registrations.py"
    registrations.write_text("".join(REGISTRATION.format(name=name) for name in operators))
    return registrations


def mend(folder):
    """Run the script where that torchvision is found."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)


def test_both_operators_are_registered_where_they_exist(tmp_path):
    registrations = torchvision_in(tmp_path, ("nms", "qnms"))
    ran = mend(tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (
        registrations.read_text() == '@register_meta("nms")\ndef nms(): ...\n@register_meta("qnms")\ndef qnms(): ...\n'
    )
    again = mend(tmp_path)
    assert again.returncode == 1
    assert 'register_fake("torchvision::nms") 0 times instead of once' in again.stderr


@pytest.mark.parametrize(
    ("operators", "package", "message"),
    [
        (("nms",), "", 'register_fake("torchvision::qnms") 0 times instead of once'),
        (("nms", "qnms"), "import no_such_module", "torchvision does not import even so"),
    ],
)
def test_what_cannot_be_mended_stays_and_is_told(operators, package, message, tmp_path):
    registrations = torchvision_in(tmp_path, operators, package)
    before = registrations.read_text()
    ran = mend(tmp_path)
    assert ran.returncode == 1 and message in ran.stderr
    assert registrations.read_text() == before
