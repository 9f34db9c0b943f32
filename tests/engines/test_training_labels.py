"""Losses, metrics and answers that transformers' trainers take from the labels and logits of compressed batches."""

import pytest
import torch
from architectures import LLAVA, LLAVA_NEXT, each_architecture
from torch.nn.functional import cross_entropy
from training import BUDGET, Rows, adapted, arguments, collator, trained
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from reccomp_hf import CompressedTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning")
SMOOTHING = 0.25
DYNAMIC = {"budget": None, "merged_tokens": 3}  # rows of different lengths
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class CompressedTrainer(CompressedTrainerMixin, Trainer):
    """As the guide shows."""


class CompressedSeq2SeqTrainer(CompressedTrainerMixin, Seq2SeqTrainer):
    """The one that generates."""


def built(architecture, **fields):
    torch.manual_seed(0)
    return architecture.build(**{"budget": BUDGET, "merged_tokens": 4, **fields})


def trainer(cls, architecture, model, rows, compute=None, **given):
    extra = {name: given.pop(name) for name in ("compute_loss_func", "preprocess_logits_for_metrics") if name in given}
    kind = Seq2SeqTrainingArguments if issubclass(cls, Seq2SeqTrainer) else None
    settings = arguments(*([kind] if kind else []), per_device_eval_batch_size=2, **given)
    batches, processor = collator(architecture.processor()), architecture.processor()
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": batches, "processing_class": processor}
    return cls(model, settings, compute_metrics=compute, **data, **extra)


@torch.no_grad()
def alone(architecture, model, rows):
    """The labels of each row's answer, and the logits that predict them, each row by itself."""
    found = []
    for index in range(len(rows)):
        short, _ = model.compress_inputs(**collator(architecture.processor())([rows[index]]))
        labels = short.pop("labels")[0, 1:]
        found.append((labels[labels != -100], model(**short).logits[0, :-1][labels != -100]))
    return found


def own_loss(outputs, labels, num_items_in_batch=None):
    """As the model computes it, with the labels that the trainer kept."""
    loss = cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch if num_items_in_batch is not None else loss / (labels[:, 1:] != -100).sum()


# ---- without the mixin ---------------------------------------------------------------------------------------------

KEEPING = {"smoothing": {"label_smoothing_factor": SMOOTHING}, "own loss": {"compute_loss_func": own_loss}}


@pytest.mark.parametrize("method", ["evaluate", "train"])
@pytest.mark.parametrize("options", KEEPING.values(), ids=KEEPING)
def test_a_trainer_that_keeps_the_labels_is_refused(options, method):
    run = trainer(Trainer, LLAVA, built(LLAVA), Rows(2), **options)
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor or compute_loss_func.*CompressedTrainerMixin, Train"
    ):
        getattr(run, method)()


def test_a_trainer_that_keeps_the_labels_runs_where_compression_is_off():
    for options in KEEPING.values():
        assert trainer(Trainer, LLAVA, built(LLAVA, enabled=False), Rows(2), **options).evaluate()["eval_loss"] > 0


# ---- losses --------------------------------------------------------------------------------------------------------


@each_architecture
def test_smoothing_reads_the_cut_labels(architecture):
    model, rows = built(architecture, **DYNAMIC).eval(), Rows(4)
    expected = []
    for pair in ((0, 1), (2, 3)):
        losses = []
        for labels, logits in (alone(architecture, model, rows)[index] for index in pair):
            logps = logits.log_softmax(-1)
            smooth = -logps.mean(-1) * SMOOTHING
            losses += (smooth - (1 - SMOOTHING) * logps[torch.arange(len(labels)), labels]).tolist()
        expected.append(sum(losses) / len(losses))
    run = trainer(CompressedTrainer, architecture, model, rows, label_smoothing_factor=SMOOTHING)
    assert run.evaluate()["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    plain = trainer(CompressedTrainer, architecture, model, rows).evaluate()["eval_loss"]
    assert abs(plain - sum(expected) / 2) > 1e-3


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_a_loss_of_ones_own_trains_as_the_models_own(adapter):
    weights, losses = [], []
    for options in ({}, {"compute_loss_func": own_loss}):
        model = adapted(LLAVA) if adapter else built(LLAVA)
        before = trained(model)
        run = trainer(CompressedTrainer, LLAVA, model, Rows(4), optim="sgd", learning_rate=1.0, **options)
        losses.append(run.evaluate()["eval_loss"])
        run.train()
        weights.append(trained(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, **CLOSE, msg=name)
    assert max(float((value - before[name]).abs().max()) for name, value in weights[1].items()) > 1e-2


# ---- metrics -------------------------------------------------------------------------------------------------------

WAYS = {
    "together": {},
    "accumulated": {"eval_accumulation_steps": 1},
    "with inputs and losses": {"include_for_metrics": ["inputs", "loss"]},
    "preprocessed": {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_metrics_see_labels_and_logits_of_the_same_places(options):
    model, rows, seen = built(LLAVA_NEXT, **DYNAMIC).eval(), Rows(3), []
    trainer(
        CompressedTrainer, LLAVA_NEXT, model, rows, compute=lambda given: seen.append(given) or {}, **options
    ).evaluate()
    (given,) = seen
    predictions = given.predictions if given.predictions.ndim == 2 else given.predictions.argmax(-1)
    assert predictions.shape == given.label_ids.shape
    for row, (labels, logits) in enumerate(alone(LLAVA_NEXT, model, rows)):
        kept = given.label_ids[row, 1:] != -100
        assert given.label_ids[row, 1:][kept].tolist() == labels.tolist()
        assert predictions[row, :-1][kept].tolist() == logits.argmax(-1).tolist()
    if given.inputs is not None:  # those that were passed
        batches = [collator(LLAVA_NEXT.processor())(pair) for pair in ([rows[0], rows[1]], [rows[2]])]
        passed = [ids for batch in batches for ids in batch["input_ids"]]
        for ids, found in zip(passed, given.inputs, strict=True):
            assert found[: len(ids)].tolist() == ids.tolist() and set(found[len(ids) :].tolist()) <= {-100}


def test_predict_and_text_alone():
    model = built(LLAVA)
    run = trainer(CompressedTrainer, LLAVA, model, Rows(2, images=0))
    found = run.predict(Rows(2, images=0))
    assert found.predictions.shape[:2] == found.label_ids.shape
    found = run.predict(Rows(2))
    assert found.predictions.shape[:2] == found.label_ids.shape


@pytest.mark.parametrize("cls", [Seq2SeqTrainer, CompressedSeq2SeqTrainer])
def test_a_trainer_that_generates_returns_the_uncut_prompt_and_the_answer(cls):
    model, rows, seen = built(LLAVA).eval(), Rows(2), []
    options = {"predict_with_generate": True, "generation_max_length": 140}
    run = trainer(cls, LLAVA, model, rows, compute=lambda given: seen.append(given) or {}, **options)
    loss = run.evaluate()["eval_loss"]
    batch = collator(LLAVA.processor())([rows[0], rows[1]])
    labels = batch.pop("labels")
    expected = model.generate(**batch, max_length=140)
    assert seen[0].predictions[:, : expected.shape[1]].tolist() == expected.tolist()
    assert seen[0].label_ids[:, : labels.shape[1]].tolist() == labels.tolist()
    assert loss == pytest.approx(model(**batch, labels=labels).loss.item(), rel=1e-5)
