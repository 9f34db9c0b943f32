"""Training reads compressed pictures: under transformers' Trainer by itself, under TRL's SFTTrainer with our mixin."""

import json
import subprocess
import sys

import pytest
import torch
import training_child
from architectures import LLAVA, each_architecture, labels_of
from paths import SUPPORT
from torch.nn.functional import cross_entropy
from training import (
    BUDGET,
    CompressedSFTTrainer,
    Rows,
    adapted,
    collator,
    sft_trainer,
    trained,
    trainer,
    watched,
)
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# PEFT 0.21, TRL 1.16 and these tests use names that transformers 5.23 changed and 4.57 has.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
]
TINY_BATCH = 2
SGD = {"optim": "sgd", "learning_rate": 1.0}  # unlike Adam it does not blow small gradients up


def text_length(architecture, rows):
    """Tokens of the longest row without its image placeholders, and placeholders of the whole data."""
    batch = collator(architecture.processor())(list(rows))
    placeholder = batch["input_ids"] == architecture.compressed().config.image_token_id
    return int((batch["attention_mask"].bool() & ~placeholder).sum(-1).max()), int(placeholder.sum())


def close(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or CLOSE), msg=name)


@each_architecture
def test_trainer_reads_few_tokens_and_learns(architecture):
    rows, model = Rows(4, images=2), adapted(architecture)
    text, placeholders = text_length(architecture, rows)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run = trainer(architecture, model, rows, max_steps=8, learning_rate=2e-2, lr_scheduler_type="constant")
    loss = run.evaluate(rows)["eval_loss"]
    with watched(model) as seen:
        run.train()
    assert run.evaluate(rows)["eval_loss"] < loss - 0.1  # the frozen head has small weights
    assert seen.projected == [TINY_BATCH * 2 * BUDGET] * 8  # exactly the budget, of every picture
    newlines = 0 if architecture is LLAVA else 2 * 4 * 10  # at most one for each row of patches
    assert max(seen.lengths) <= text + 2 * BUDGET + newlines < placeholders // len(rows)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert all("lora_" in name for name in changed)
    assert {part for part in ("projector", "language_model") if any(part in name for name in changed)} == {
        "projector",
        "language_model",
    }
    assert not any("vision_tower" in name or "token_recovery" in name for name in changed)


@each_architecture
def test_sft_trainer_compresses_with_and_without_the_mixin(architecture):
    rows = Rows(4)
    text, placeholders = text_length(architecture, rows)
    losses = {}
    for cls in (SFTTrainer, CompressedSFTTrainer):
        model = adapted(architecture)
        run = sft_trainer(cls, architecture, model, rows, max_steps=1)
        with watched(model) as seen:
            run.train()
            losses[cls] = run.evaluate()["eval_loss"]
        assert seen.projected[0] == TINY_BATCH * BUDGET
        assert max(seen.lengths) <= text + BUDGET + 40 * (architecture is not LLAVA) < placeholders // len(rows)
        assert any("lora_B" in name and value.any() for name, value in trained(model).items())
    assert losses[SFTTrainer] == losses[CompressedSFTTrainer]


def test_the_mixin_trains_as_forward_does():
    weights = {}
    for name in ("forward", "mixin"):
        model = adapted(LLAVA, merged_tokens=4, position_ids="original")
        if name == "forward":
            trainer(LLAVA, model, Rows(4), **SGD).train()
        else:
            sft_trainer(CompressedSFTTrainer, LLAVA, model, Rows(4), **SGD).train()
        weights[name] = trained(model)
    close(weights["mixin"], weights["forward"])
    before = trained(adapted(LLAVA))
    assert max(float((value - before[name]).abs().max()) for name, value in weights["forward"].items()) > 1e-2


def test_the_mixin_passes_batches_without_pictures_on():
    model, rows = adapted(LLAVA), Rows(2, images=0)
    run = sft_trainer(CompressedSFTTrainer, LLAVA, model, Rows(2), max_steps=1)
    batch = collator(LLAVA.processor())(list(rows))
    with torch.no_grad():
        expected = model(**batch).loss
    assert torch.isfinite(expected)
    torch.testing.assert_close(run.compute_loss(model.eval(), dict(batch)).detach(), expected, **CLOSE)


def test_accumulated_steps_equal_a_large_batch():
    weights = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = adapted(LLAVA)
        trainer(LLAVA, model, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **SGD).train()
        weights.append(trained(model))
    close(weights[1], weights[0])
    close(weights[2], weights[0])


@each_architecture
@pytest.mark.parametrize("cls", ["Trainer", "SFTTrainer"])
def test_gradient_checkpointing_changes_nothing(architecture, cls):
    weights = []
    for checkpointing in (False, True):
        model = adapted(architecture)
        options = {"gradient_checkpointing": checkpointing, "max_steps": 1}
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        if cls == "Trainer":
            trainer(architecture, model, Rows(2), **options).train()
        else:
            sft_trainer(CompressedSFTTrainer, architecture, model, Rows(2), **options).train()
        weights.append(trained(model))
    close(weights[1], weights[0])


def test_a_cache_is_left_out_under_gradient_checkpointing():
    model, batch = LLAVA.build(budget=BUDGET).train(), LLAVA.encode()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    output = model(**batch, labels=labels_of(model, batch), use_cache=True)
    assert output.past_key_values is None
    output.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


@pytest.mark.parametrize("cls", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_bfloat16(cls, weights):
    model = adapted(LLAVA).to(getattr(torch, weights))
    if cls == "Trainer":
        run = trainer(LLAVA, model, Rows(2), bf16=True, max_steps=4)
    else:
        run = sft_trainer(CompressedSFTTrainer, LLAVA, model, Rows(2), bf16=True, max_steps=4)
    before, loss = trained(model), run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < loss
    assert all(torch.isfinite(value).all() for value in trained(model).values())
    assert any(not torch.equal(value, before[name]) for name, value in trained(model).items())


@each_architecture
def test_gradients_are_true_through_kept_and_merged_tokens(architecture):
    model = architecture.build(budget=12, merged_tokens=5).double().train()
    model.token_recovery.text_encoder.float()  # on 4.57 CLIP's causal mask is float32 at most
    batch = architecture.encode([("What is on the left?", 1)])
    batch["pixel_values"] = batch["pixel_values"].double()
    labels = labels_of(model, batch)
    projected, projector = [], model.model.multi_modal_projector

    def loss_of_the_batch():
        """In float64 from the logits on, which the model's own loss is not."""
        short, _ = model.compress_inputs(**batch, labels=labels)
        target = short.pop("labels")[:, 1:].flatten()
        return cross_entropy(model(**short).logits[:, :-1].flatten(0, 1), target)

    hook = projector.register_forward_hook(lambda module, args, output: projected.append(output))
    loss = loss_of_the_batch()
    hook.remove()
    projected[0].retain_grad()
    loss.backward()
    record = model.recover(**batch)[0]
    assert int(record.counts.sum()) == 12
    assert int(record.centre_mask.sum()) == 5  # the merged ones
    assert (projected[0].grad.reshape(12, -1).abs().sum(-1) > 0).all()  # of both kinds, each
    generator = torch.Generator().manual_seed(0)
    for weight in projector.parameters():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (2e-5, -2e-5):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                losses.append(loss_of_the_batch())
                weight.sub_(direction, alpha=step)
        slope = (losses[0] - losses[1]) / 4e-5  # norms of the language model are float32 inside
        torch.testing.assert_close((weight.grad * direction).sum(), slope, rtol=2e-3, atol=1e-4)
    assert all(value.grad is None for name, value in model.named_parameters() if name.startswith("token_recovery"))


def test_two_processes_equal_one(tmp_path):
    """Two ranks of two rows a step end where one process of four rows ends. Their environment is that of torchrun."""
    result = tmp_path / "result.json"
    command = [sys.executable, SUPPORT / "training_child.py", result]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, facts in json.loads(result.read_text(encoding="utf-8")).items():
        assert facts["ranks"] == 2
        assert facts["projected"] == [2 * BUDGET] * 2
        alone, seen = training_child.train(kind, ranks=1)
        assert seen == [4 * BUDGET] * 2
        ours = torch.tensor(facts["weights"])
        before = torch.cat([value.flatten() for value in trained(adapted(LLAVA)).values()])
        assert (alone - before).abs().max() > 1e-2
        torch.testing.assert_close(ours, alone, **CLOSE)


def test_labels_on_placeholders_make_the_reported_loss_small():
    """TRL labels them in rows of plain messages: the trainer divides by labels that were cut."""
    model, rows = adapted(LLAVA), [Rows(2)[index] for index in range(2)]
    messages = [{"images": row["images"], "messages": row["prompt"] + row["completion"]} for row in rows]
    batch = DataCollatorForVisionLanguageModeling(LLAVA.processor())(messages)
    short, _ = model.compress_inputs(**batch)
    kept, uncut = (int((labels[:, 1:] != -100).sum()) for labels in (short["labels"], batch["labels"]))
    assert kept == uncut - 2 * (100 - BUDGET)
    run = trainer(LLAVA, model)
    with torch.no_grad():
        reported = run.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(uncut))
        torch.testing.assert_close(reported, model(**batch).loss * kept / uncut, **CLOSE)


ERRORS = {
    "no question": ({"question": " "}, {}, "Row 0 has an image but no question for the text encoder"),
    "truncated": ({}, {"max_length": 64}, "2 image.s. need 200.*without a max_length that cuts it off"),
}


@pytest.mark.parametrize(("rows", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(rows, options, message):
    model = adapted(LLAVA)
    run = trainer(LLAVA, model, Rows(2, **rows))
    run.data_collator = collator(LLAVA.processor(), **options)
    with pytest.raises(ValueError, match=message):
        run.train()
    run = sft_trainer(CompressedSFTTrainer, LLAVA, model, Rows(2, **rows), **options)
    with pytest.raises(ValueError, match=message):
        run.train()


def test_a_collator_without_our_processor_is_refused():
    run = trainer(LLAVA, adapted(LLAVA), Rows(2))
    run.data_collator = collator(LLAVA.stock_processor())
    with pytest.raises(ValueError, match="Text recovery needs the question: recovery_input_ids is None"):
        run.train()
