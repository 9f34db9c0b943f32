"""What test_hub_convert runs in a process of its own: a stranger who does not have the package loads from the Hub.

`python hub_child.py NAME PROMPT RESULT` loads NAME with `trust_remote_code` and saves its logits of a picture and the
prompt.
"""

import sys

import tiny
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class Blocker:
    """The package is not installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuse the package and everything in it."""
        if name.partition(".")[0] == "reccomp_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@torch.no_grad()
def main(name, prompt, result):
    """Load, answer, save."""
    sys.meta_path.insert(0, Blocker())
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    inputs = processor(images=tiny.pictures(1)[0], text=prompt, return_tensors="pt")
    torch.save({"logits": model(**inputs).logits, "module": type(model).__module__}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
