"""TRL's trainers of preferences and rewards read compressed images, and score what was sampled on the same tokens."""

import copy
import functools
import tempfile

import pytest
import torch
from datasets import Dataset
from demo_model import demo_model
from peft import LoraConfig
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from reccomp_hf import CompressedTrainerMixin
from reccomp_hf.demo import checkpoint_folder, draw_scene, questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore"),  # TRL's notes on its own features
]
SEEDS = range(7, 11)
BUDGET = 16
LORA = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)")


class CompressedGRPOTrainer(CompressedTrainerMixin, GRPOTrainer):
    """As the guide shows."""


class CompressedRLOOTrainer(CompressedTrainerMixin, RLOOTrainer):
    """As the guide shows."""


def fresh():
    return AutoModelForImageTextToText.from_pretrained(checkpoint_folder("demo"), dtype=torch.float32)


def options(cls, **given):
    common = {"output_dir": tempfile.mkdtemp(), "max_steps": 1, "per_device_train_batch_size": 2, "bf16": False}
    common |= {"report_to": "none", "use_cpu": True, "learning_rate": 1e-2, "save_strategy": "no"}
    common |= {"gradient_checkpointing": False, "disable_tqdm": True, "logging_strategy": "no", "max_grad_norm": 0}
    return cls(**{**common, **given})


def turn(role, text):
    return [{"role": role, "content": text}]


def rows(kind):
    """Questions about scenes, of different lengths."""
    found = []
    for seed in SEEDS:
        scene = draw_scene(seed)
        asked = questions(scene, seed)[seed % 3]
        row = {"images": [scene.image], "prompt": turn("user", asked.text)}
        if kind == "pairs":
            row |= {"chosen": turn("assistant", asked.answer), "rejected": turn("assistant", "three blue rings")}
        elif kind == "labels":
            row |= {
                "completion": turn("assistant", asked.answer if seed % 2 else "three blue"),
                "label": seed % 2 == 1,
            }
        found.append(row)
    return Dataset.from_list(found)


class Watch:
    """The widths of the sequences that language models read, and the visual tokens in the prompts of `forward`."""

    def __init__(self, *models):
        self.widths = []
        for model in models:
            model.model.language_model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            self.widths.append(kwargs["inputs_embeds"].shape[1])


def seed_of(pixels):
    """The seed of the scene that an image shows."""
    images = demo_model()[1].image_processor
    shown = {seed: images(draw_scene(seed).image, return_tensors="pt")["pixel_values"][0] for seed in SEEDS}
    (found,) = [seed for seed, values in shown.items() if torch.equal(values, pixels)]
    return found


@torch.no_grad()
def log_probability(model, pixels, prompt, completion):
    """Of a completion, by a hand-written loop over a single row on the compressed prompt."""
    seed = seed_of(pixels)
    question = demo_model()[1].encode_questions([questions(draw_scene(seed), seed)[seed % 3].text])
    short, _ = model.compress_inputs(input_ids=prompt[None], pixel_values=pixels[None], **question)
    embeds = torch.cat([short["inputs_embeds"], model.get_input_embeddings()(completion[None])], 1)
    first, count = short["inputs_embeds"].shape[1], len(completion)
    following = short["position_ids"].max() + 1 + torch.arange(count)
    positions = torch.cat([short["position_ids"], following[None]], 1)
    logits = model(inputs_embeds=embeds, position_ids=positions).logits[0].log_softmax(-1)
    return sum(float(logits[first - 1 + at, token]) for at, token in enumerate(completion))


def changed(model, before):
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# ---- pairs and labels ----------------------------------------------------------------------------------------------


def preferring(trainer, config, kind, model, reference=None, **given):
    return trainer(
        model,
        reference,
        options(config, max_length=None),
        train_dataset=rows(kind),
        processing_class=demo_model()[1],
        **given,
    )


dpo = functools.partial(preferring, DPOTrainer, DPOConfig, "pairs")
kto = functools.partial(preferring, KTOTrainer, KTOConfig, "labels")


@pytest.mark.parametrize("make", [dpo, kto], ids=["dpo", "kto"])
def test_a_step_reads_few_tokens_and_trains(make):
    model, reference = fresh(), fresh()
    before, watch = snapshot(model), Watch(model, reference)
    loss = make(model, reference).train().training_loss
    assert loss == loss and abs(loss) < 1e3
    assert watch.widths and max(watch.widths) < 144 / 2
    assert any("language_model" in name for name in changed(model, before))


@pytest.mark.parametrize("budget", [BUDGET, None], ids=["fixed", "dynamic"])
def test_log_probabilities_of_pairs_are_those_of_single_rows(budget):
    model = fresh().eval()
    model.config.token_recovery = model.config.token_recovery.replace({"budget": budget})
    trainer = dpo(model, copy.deepcopy(model))
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    found = torch.cat([chosen, rejected])
    singles = []
    for ids, attended, kept, pixels in zip(
        batch["input_ids"],
        batch["attention_mask"].bool(),
        batch["completion_mask"].bool(),
        batch["pixel_values"],
        strict=True,
    ):
        singles.append(log_probability(model, pixels, ids[attended & ~kept], ids[kept]))
    assert len({seed_of(pixels) for pixels in batch["pixel_values"]}) > 1
    torch.testing.assert_close(found, torch.tensor(singles), rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_labelled_rows_are_those_of_single_rows():
    """Those of the policy and of the reference, for the row's completion and for the one of the divergence."""
    policy, reference = fresh(), fresh()
    reference.lm_head.weight.data.mul_(0.5)
    trainer, calls = kto(policy, reference), []

    def see(module, args, kwargs, output):
        calls.append((module, kwargs, output.log_probs.detach().sum(-1)))

    hooks = [model.eval().register_forward_hook(see, with_kwargs=True) for model in (policy, reference)]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._compute_loss(policy, batch, False)
    for hook in hooks:
        hook.remove()
    assert [module for module, _, _ in calls] == [policy, policy, reference, reference]
    assert len({seed_of(pixels) for pixels in batch["pixel_values"]}) > 1
    for module, given, found in calls:
        singles = []
        for ids, attended, labels, pixels in zip(
            given["input_ids"], given["attention_mask"].bool(), given["labels"], given["pixel_values"], strict=True
        ):
            kept = labels != -100
            singles.append(log_probability(module, pixels, ids[attended & ~kept], ids[kept]))
        torch.testing.assert_close(found, torch.tensor(singles), rtol=1e-4, atol=1e-4)
    by_call = [found for _, _, found in calls]
    assert not torch.allclose(by_call[0], by_call[1]) and not torch.allclose(by_call[1], by_call[3])


def test_the_reference_of_an_adapter_is_the_model_without_it():
    model = fresh()
    watch = Watch(model)
    trainer = dpo(model, peft_config=LORA)
    trainer.train()
    assert max(watch.widths) < 144 / 2
    values = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert values and any(value.any() for value in values)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    plain = dpo(fresh(), fresh())
    torch.testing.assert_close(
        reference, torch.cat(plain.compute_ref_log_probs(plain.ref_model, batch)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("make", [dpo, kto], ids=["dpo", "kto"])
def test_nothing_changes_where_compression_is_off(make):
    model = fresh()
    model.config.token_recovery = model.config.token_recovery.replace({"enabled": False})
    watch = Watch(model)
    make(model, fresh()).train()
    assert min(watch.widths) > 144


# ---- rewards -------------------------------------------------------------------------------------------------------


def reward(completions, **kwargs):
    return [float(number % 2) for number in range(len(completions))]


REWARDED = {"grpo": (CompressedGRPOTrainer, GRPOConfig), "rloo": (CompressedRLOOTrainer, RLOOConfig)}


def rewarded(name, model, cls=None, peft_config=None, **given):
    usual, config = REWARDED[name]
    settings = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.5, "beta": 0.1, **given}
    return (cls or usual)(
        model=model,
        reward_funcs=reward,
        peft_config=peft_config,
        args=options(config, **settings),
        train_dataset=rows("prompts"),
        processing_class=demo_model()[1],
    )


@pytest.mark.parametrize("name", REWARDED)
def test_answers_are_scored_on_the_tokens_that_they_were_sampled_from(name):
    torch.manual_seed(0)
    model = fresh()
    start = copy.deepcopy(model)  # TRL's own forward, once it is there, stays bound to the first model
    before, watch, scored = snapshot(model), Watch(model), []
    trainer = rewarded(name, model)
    works = trainer._get_per_token_logps_and_entropies

    def score(scorer, ids, mask, kept, *args, **kwargs):
        found = works(scorer, ids, mask, kept, *args, **kwargs)
        scored.append((ids, mask, kept, found[0].detach().clone(), kwargs["pixel_values"]))
        return found

    trainer._get_per_token_logps_and_entropies = score
    loss = trainer.train().training_loss
    assert loss == loss and abs(loss) < 1e3
    assert watch.widths and max(watch.widths) < 144 / 2
    assert any("language_model" in name for name in changed(model, before))
    ids, mask, kept, logps, pixels = scored[0]
    assert len(ids) > 1
    start.eval().lm_head.weight.data.div_(trainer.temperature)
    for row in range(len(ids)):
        prompt = ids[row, :-kept][mask[row, :-kept].bool()]
        completion = ids[row, -kept:][mask[row, -kept:].bool()]
        found = float((logps[row] * mask[row, -kept:]).sum())
        assert found == pytest.approx(log_probability(start, pixels[row], prompt, completion), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", REWARDED)
def test_the_language_model_reads_the_same_prompt_when_it_samples_and_when_it_scores(name):
    torch.manual_seed(0)
    model, read = fresh(), []

    def see(module, args, kwargs):
        embeds, mask, places = kwargs["inputs_embeds"].detach(), kwargs["attention_mask"], kwargs["position_ids"]
        if embeds.shape[1] > 1:
            kept = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            read.append([(embeds[row, kept[row]], places[row, kept[row]]) for row in range(len(embeds))])

    model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    rewarded(name, model).train()
    sampled, scored = read[0], read[1]
    assert len(sampled) == len(scored) == 2
    for (prompt, places), (whole, whole_places) in zip(sampled, scored, strict=True):
        assert len(prompt) < len(whole)
        assert torch.equal(prompt, whole[: len(prompt)])
        assert torch.equal(places, whole_places[: len(prompt)])


@pytest.mark.parametrize("name", REWARDED)
def test_rewarded_trainers_read_every_token_where_compression_is_off(name):
    torch.manual_seed(0)
    model = fresh()
    model.config.token_recovery = model.config.token_recovery.replace({"enabled": False})
    watch = Watch(model)
    rewarded(name, model, beta=0.0).train()
    assert min(watch.widths) > 144


class PlainGRPOTrainer(GRPOTrainer):
    """TRL's own."""


class PlainRLOOTrainer(RLOOTrainer):
    """TRL's own."""


PLAIN = {"grpo": PlainGRPOTrainer, "rloo": PlainRLOOTrainer}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["model", "adapter"])
@pytest.mark.parametrize("name", PLAIN)
def test_without_the_mixin_a_trainer_that_loses_the_question_is_refused_when_it_is_built(name, adapter):
    with pytest.raises(ValueError, match=r"recovery_input_ids.*CompressedTrainerMixin, GRPOTrainer"):
        rewarded(name, fresh(), PLAIN[name], peft_config=adapter)


@pytest.mark.parametrize(
    "fields", [{"enabled": False}, {"text_share": 0, "budget": BUDGET}], ids=["off", "images alone"]
)
def test_without_the_mixin_a_choice_that_reads_no_question_trains(fields, caplog):
    model = fresh()
    model.config.token_recovery = fields
    watch = Watch(model)
    rewarded("grpo", model, PlainGRPOTrainer, beta=0.0).train()
    assert caplog.text.count("with a reference (beta above 0) end in a TypeError") == 1
    assert (max(watch.widths) < 144 / 2) == fields.get("enabled", True)


def test_scoring_without_the_question_is_an_error():
    """The model was built with another section than the one that it is trained with."""
    model = fresh()
    model.config.token_recovery = {"enabled": False}
    trainer = rewarded("grpo", model, PlainGRPOTrainer, beta=0.0)
    model.config.token_recovery = {"enabled": True}
    with pytest.raises(ValueError, match=r"recovery_input_ids.*CompressedTrainerMixin, GRPOTrainer"):
        trainer.train()
