"""Running a checkpoint's own code in a process of its own, and the package's answers to compare with."""

import json
import os
import subprocess
import sys

import remote_child
import tiny
import torch
import transformers
from architectures import ROWS, call
from paths import SUPPORT
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

UNASKED = ("slow image processor", "AutoModelForVision2Seq", "Device set to use")  # what 4.57 logs in any case
ROWS_OF_CALL = {"text": call(ROWS)["text"], "images": len(call(ROWS)["images"])}


def run_child(mode, folders, work, path, settings_of):
    """The results of `remote_child`, which runs where nothing of this process can be found."""
    job = {"folders": {name: str(folder) for name, folder in folders.items()}, "work": str(work / "again")}
    job |= {
        "rows": ROWS_OF_CALL,
        "settings": {name: settings_of(name) for name in folders},
        "question": tiny.SENTENCES[0],
    }
    (work / "job.json").write_text(json.dumps(job))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "COV"))}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, SUPPORT / "remote_child.py", mode, work / "job.json", work / "results.pt"]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "results.pt", weights_only=False)


def expected_of(folder, settings):
    """What the package answers."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    batch = remote_child.encode(processor, ROWS_OF_CALL)
    values = remote_child.answers(model, batch, settings)
    with torch.no_grad():
        values["states"] = transformers.AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    values["again"] = values["ids"]
    values["text"] = remote_child.pipeline_text(pipeline("image-text-to-text", model=str(folder)), tiny.SENTENCES[0])
    return values


def unexpected(lines):
    return [line for line in lines if not any(word in line for word in UNASKED)]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name
