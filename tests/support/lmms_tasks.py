"""Tasks for the tests of the lmms-eval integration: scenes of the demo as lmms-eval's tasks, and the stock checkpoint.

`--include_path` of the folder that `write_tasks` fills has the tasks `scenes` (answers are generated) and
`scene_choices` (likelihoods are compared). lmms-eval imports this file's copy there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from reccomp_hf.measure.evaluation import Sample, demo_samples, normalize_answer

QUESTIONS = 45
_TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/scenes.parquet
  cache_dir: {folder}/cache
test_split: test
output_type: {output_type}
doc_to_visual: !function lmms_tasks.pictures
doc_to_text: question
doc_to_target: answer
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
_GENERATED = """
generation_kwargs:
  max_new_tokens: 16
process_results: !function lmms_tasks.score
"""
_CHOSEN = """
doc_to_choice: !function lmms_tasks.choices
"""


def samples() -> list[Sample]:
    """The questions."""
    return demo_samples(QUESTIONS)


def write_tasks(folder: Path) -> Path:
    """Write both tasks and their pictures."""
    import datasets

    asked = samples()
    columns = {
        "image": [sample.open() for sample in asked],
        "question": [sample.question for sample in asked],
        "answer": [sample.answers[0] for sample in asked],
    }
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "scenes.parquet")
    generated = _TASK.format(name="scenes", folder=folder, output_type="generate_until", metric="right") + _GENERATED
    chosen = _TASK.format(name="scene_choices", folder=folder, output_type="multiple_choice", metric="acc") + _CHOSEN
    (folder / "scenes.yaml").write_text(generated)
    (folder / "scene_choices.yaml").write_text(chosen)
    shutil.copy(__file__, folder)
    return folder


def pictures(row: dict[str, Any]) -> list[Any]:
    """For lmms-eval."""
    return [row["image"]]


def score(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """As `reccomp-hf eval` does."""
    return {"right": float(normalize_answer(results[0]) == normalize_answer(row["answer"]))}


def choices(row: dict[str, Any]) -> list[str]:
    """Answers of one token and of several, the right one among them."""
    return [row["answer"], *(word for word in ("yes", "a red circle", "N") if word != row["answer"])]


def save_stock(folder: Path) -> Any:
    """Write transformers' own LLaVA with the demo's weights, and its processor; returns the model."""
    from demo_model import demo_model  # not beside the copy
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    ours, processor = demo_model()
    kept = ("token_recovery", "auto_map", "model_type", "architectures")
    settings = {name: value for name, value in ours.config.to_dict().items() if name not in kept}
    stock = LlavaForConditionalGeneration(LlavaConfig(**settings)).eval().to(torch.float32)
    stock.load_state_dict({name: value for name, value in ours.state_dict().items() if "token_recovery." not in name})
    stock.generation_config = ours.generation_config
    stock.save_pretrained(folder)
    names = (
        "patch_size",
        "vision_feature_select_strategy",
        "chat_template",
        "image_token",
        "num_additional_image_tokens",
    )
    options = {name: getattr(processor, name) for name in names}
    LlavaProcessor(processor.image_processor, processor.tokenizer, **options).save_pretrained(folder)
    return stock


def wrapper(simple=False, **arguments):
    """The wrapper as lmms-eval finds it."""
    from lmms_eval.models import get_model

    return get_model("reccomp_hf", force_simple=simple)(**{"pretrained": "demo", **arguments})


def generation_request(model, content, place=0, images=(), **settings):
    """A request as lmms-eval makes it for a document of a task `asked`."""
    from lmms_eval.api.instance import Instance

    model.task_dict.setdefault("asked", {}).setdefault("test", {})[place] = None
    settings = {"max_new_tokens": 5, **settings}
    if model.is_simple:
        arguments = (content, settings, lambda _: list(images), place, "asked", "test")
    else:
        parts = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": content}]
        messages = [{"role": "user", "content": parts}] if isinstance(content, str) else content
        arguments = (str(content), lambda _: messages, settings, place, "asked", "test")
    return Instance("generate_until", arguments, 0, {"task": "asked", "doc_id": place, "repeats": 1})


def likelihood_request(model, question, answer, images, place=0):
    """The same for the likelihood of an answer."""
    from lmms_eval.api.instance import Instance

    model.task_dict.setdefault("asked", {}).setdefault("test", {})[place] = None
    arguments = (question, answer, lambda _: images, place, "asked", "test")
    return Instance("loglikelihood", arguments, 0, {"task": "asked", "doc_id": place, "repeats": 1})
