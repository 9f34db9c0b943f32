"""Child process of test_remote_code: a checkpoint's code, not the package's, has to do the work.

`python remote_child.py blocked|installed JOB RESULTS`: JOB is JSON with `folders` (name -> path), `rows` (texts and
the number of pictures), `settings` (name -> settings by name) and `work` (a folder to write to).
"""

import json
import sys
import warnings
from pathlib import Path


class Blocker:
    """The package is not installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuse the package and everything in it."""
        if name.partition(".")[0] == "reccomp_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__" and sys.argv[1] == "blocked":
    sys.meta_path.insert(0, Blocker())

import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

torch.set_num_threads(1)
TRUST = {"trust_remote_code": True}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def encode(processor, rows):
    """A batch of the rows, with the fixed pictures of `tiny`."""
    images = tiny.pictures(rows["images"])
    return processor(images=images, text=rows["text"], return_tensors="pt", padding=True)


@torch.no_grad()
def answers(model, batch, settings):
    """Everything that two runs are compared by."""
    values = dict(batch)
    for name, setting in settings.items():
        output = model(**batch, token_recovery=setting)
        values |= {f"{name}.logits": output.logits, f"{name}.counts": output.visual_token_counts}
    values["ids"] = model.generate(**batch, **GREEDY)
    return values


def pipeline_text(pipe, question):
    """A pipeline's answer about an image."""
    chat = [tiny.turn("user", question, tiny.pictures(1))]
    return pipe(text=chat, generate_kwargs=GREEDY, return_full_text=False)[0]["generated_text"]


def load(auto, folder, **kwargs):
    """A model of which every weight came from the folder."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def origin(thing):
    """`package` or `remote`: where the class of an object was defined."""
    module = type(thing).__module__
    assert module.startswith(("reccomp_hf.", "transformers_modules.")), module
    return "package" if module.startswith("reccomp_hf.") else "remote"


def remote_run(name, folder, job, again):
    """Load by every Auto class, answer, save to `again`."""
    config = AutoConfig.from_pretrained(folder, **TRUST)
    model, processor = (
        load(AutoModelForImageTextToText, folder, **TRUST),
        AutoProcessor.from_pretrained(folder, **TRUST),
    )
    heads = ("AutoModelForVision2Seq", "AutoModelForMultimodalLM")  # each on the line that has it
    others = [load(getattr(transformers, name), folder, **TRUST) for name in heads if hasattr(transformers, name)]
    assert {type(other).__name__ for other in others} == {type(model).__name__}
    base = AutoModel.from_pretrained(folder, **TRUST)
    origins = {origin(thing) for thing in (config, model, processor, base, *others)}
    model.save_pretrained(again)
    processor.save_pretrained(again)
    batch = encode(processor, job["rows"])
    values = answers(model, batch, job["settings"][name])
    with torch.no_grad():
        values["states"] = base(**batch).last_hidden_state
    pipe = transformers.pipeline("image-text-to-text", model=again, **TRUST)
    values["text"] = pipeline_text(pipe, job["question"])
    values["again"] = pipe.model.generate(**encode(pipe.processor, job["rows"]), **GREEDY)
    return values, origins


def blocked(job):
    """Without the package."""
    results = {}
    for name, folder in job["folders"].items():
        with tiny.logged_warnings() as logged:
            values, origins = remote_run(name, folder, job, f"{job['work']}/{name}")
        results[name] = {"values": values, "origins": origins, "logged": logged}
    assert not [name for name in sys.modules if name.partition(".")[0] == "reccomp_hf"]
    return results


def installed(job):
    """Remote code first, then the package, then both."""
    results, remote = {}, {}
    for name, folder in job["folders"].items():
        processor = AutoProcessor.from_pretrained(folder, **TRUST)
        remote[name] = load(AutoModelForImageTextToText, folder, **TRUST), encode(processor, job["rows"])
    import reccomp_hf  # noqa: F401

    for name, folder in job["folders"].items():
        first, batch = remote[name]
        models, origins = [first], [origin(first)]
        for options in ({}, TRUST, {}):
            models.append(load(AutoModelForImageTextToText, folder, **options))
            processor = AutoProcessor.from_pretrained(folder, **options)
            origins += [(origin(models[-1]), origin(models[-1].config), origin(processor))]
            assert all(torch.equal(value, batch[key]) for key, value in encode(processor, job["rows"]).items())
        values = [answers(model, batch, job["settings"][name]) for model in models]
        results[name] = {"values": values, "origins": origins}
    return results


if __name__ == "__main__":
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", "The class `AutoModelForVision2Seq` is deprecated", FutureWarning)
    mode, job, results = sys.argv[1:]
    torch.save({"blocked": blocked, "installed": installed}[mode](json.loads(Path(job).read_text())), results)
