#!/usr/bin/env python
"""Mends the torchvision of the active environment, so that it imports along with a CPU build of torch.

PyPI's torchvision is built against CUDA. With a CPU torch its operators do not load, which it tolerates everywhere
but at two places: the fake kernels of `nms` and `qnms` are registered whether the operators exist or not, and the
import ends with "operator torchvision::nms does not exist". Its own `register_meta` asks first; the two use it after
this. Nothing that the tests run calls these operators. Running this again is an error: there is nothing to mend.
Torchvision's own requirements (numpy, Pillow) must be installed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

OPERATORS = ("nms", "qnms")


def main() -> int:
    """Edit the file and import torchvision; the exit status."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return _fail("torchvision is not installed in this environment")
    path = Path(spec.origin).with_name("_meta_registrations.py")
    if not path.is_file():
        return _fail(f"there is no {path}")
    original = text = path.read_text(encoding="utf-8")
    for name in OPERATORS:
        found = f'@torch.library.register_fake("torchvision::{name}")'
        if text.count(found) != 1:
            return _fail(f"{path} holds {found} {text.count(found)} times instead of once")
        text = text.replace(found, f'@register_meta("{name}")')
    path.write_text(text, encoding="utf-8")
    if subprocess.run([sys.executable, "-c", "import torchvision"], check=False).returncode:
        path.write_text(original, encoding="utf-8")
        return _fail("torchvision does not import even so (see above); its file is as it was")
    return 0


def _fail(reason: str) -> int:
    sys.stderr.write(f"mend_torchvision: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
