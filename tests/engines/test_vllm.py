"""LLaVA-1.5 in vLLM answers as in transformers: the same ids, whatever is asked together, before, or again.

Run with `pytest -m vllm` where vLLM is installed.
"""

import functools

import pytest
import torch
import vllm_engines
from PIL import Image
from vllm_engines import ask, copy_checkpoint, engine, forget, prompt, reference, run
from vllm_scenes import BUDGET, PAIRS, PAPER, QUESTIONS, SCENES, embeddings, environment, requests, scene, user  # noqa: F401

from reccomp_hf.demo import checkpoint_folder
from reccomp_hf.engines.vllm.budgets import budget_to_tensor

# What vLLM and its dependencies warn about when they are imported is not ours.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model at consecutive positions; the question takes all patches that stand out for it."""
    target = tmp_path_factory.mktemp("demo") / "checkpoint"
    fields = {"position_ids": "compact", "text_limit": "outliers", "text_by": "similarity"}
    return copy_checkpoint(checkpoint_folder("demo"), target, budget=BUDGET, **fields)


@pytest.fixture(scope="module")
def transformers(folder):
    """The model and the processor that give the expected answers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(transformers):
    """Greedy ids of a prompt in transformers."""
    model, processor = transformers

    @functools.lru_cache
    def ids(text, numbers=(), budget=None, **call):
        inputs = processor(images=[*map(scene, numbers)] or None, text=text, return_tensors="pt", **call)
        return reference(model, inputs, **({} if budget is None else {"budget": budget}))

    return ids


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder, enable_mm_embeds=True, limit_mm_per_prompt={"image": 3}) as llm:
        yield llm


@pytest.fixture
def fresh(llm):
    forget(llm)
    return llm


def test_answers_are_those_of_transformers(fresh, expected):
    wanted = [expected(user(question), (number,)) for number, question in PAIRS]
    assert len({tuple(ids) for ids in wanted}) > 6  # the pictures and the questions matter
    cold, warm, reversed_ = ask(fresh, requests()), ask(fresh, requests()), ask(fresh, requests()[::-1])
    assert cold == warm == reversed_[::-1] == wanted
    assert [ask(fresh, [request])[0] for request in requests()[:4]] == wanted[:4]


def test_prompts_hold_the_budget_and_prefixes_are_reused(fresh, transformers):
    (first,), (again,) = run(fresh, requests(PAIRS[:1])), run(fresh, requests(PAIRS[:1]))
    image_token = transformers[0].config.image_token_id
    assert first.prompt_token_ids.count(image_token) == BUDGET
    assert first.num_cached_tokens == 0
    block = fresh.llm_engine.vllm_config.cache_config.block_size
    assert again.num_cached_tokens == (len(again.prompt_token_ids) - 1) // block * block


def test_a_question_left_out_of_the_hash_gives_wrong_answers(fresh, expected, monkeypatch):
    """The control: without it the tests above would prove nothing about caches."""
    processor = fresh.renderer.mm_processor
    stock = type(processor)._get_mm_hashes

    def without_question(inputs):
        import dataclasses

        kept = {key: value for key, value in inputs.hf_processor_mm_kwargs.items() if key != "recovery_text"}
        return stock(processor, dataclasses.replace(inputs, hf_processor_mm_kwargs=kept))

    monkeypatch.setattr(processor, "_get_mm_hashes", without_question)
    answers = ask(fresh, requests())
    monkeypatch.undo()
    forget(fresh)
    wrong = sum(
        ids != expected(user(question), (number,)) for ids, (number, question) in zip(answers, PAIRS, strict=True)
    )
    assert wrong >= 2
    assert ask(fresh, requests()) == [expected(user(question), (number,)) for number, question in PAIRS]


def test_several_pictures_of_a_prompt_get_its_question(fresh, expected):
    numbers = [SCENES[:2], SCENES[2:], SCENES[1:3], SCENES[:3]]
    batch = [prompt(user(q, len(n)), [*map(scene, n)]) for n in numbers for q in QUESTIONS[:2]]
    assert ask(fresh, batch) == [expected(user(q, len(n)), n) for n in numbers for q in QUESTIONS[:2]]


def test_a_prompt_without_pictures(fresh, expected):
    text = user("Is there a red circle?", 0)
    assert ask(fresh, [prompt(text), *requests(PAIRS[:2])]) == [
        expected(text),
        *(expected(user(question), (number,)) for number, question in PAIRS[:2]),
    ]


@pytest.mark.parametrize(("budget", "tokens"), [(4, 4), (0.05, 7), (BUDGET, BUDGET), (1, 1)])
def test_a_request_may_have_a_smaller_budget(llm, expected, budget, tokens):
    outputs = run(llm, [*requests(PAIRS[:8], token_recovery={"budget": budget}), *requests(PAIRS[:8])])
    wanted = [expected(user(q), (n,), budget) for n, q in PAIRS[:8]]
    wanted += [expected(user(q), (n,)) for n, q in PAIRS[:8]]
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    held = [len(output.prompt_token_ids) for output in outputs]
    assert [after - before for before, after in zip(held[:8], held[8:], strict=True)] == [BUDGET - tokens] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_recovery": {"budget": BUDGET + 1}}, r"budget of 17 is 17 tokens of an image, more than the 16"),
        ({"token_recovery": {"budget": 0.5}}, r"budget of 0.5 is 72 tokens of an image, more than the 16"),
        ({"token_recovery": {"budget": 1.0}}, r"budget of 1.0 is 144 tokens"),
        ({"token_recovery": {"budget": 0}}, r"budget must be null, an int >= 1 or a float"),
        ({"token_recovery": {"budget": None}}, r"budget must be an int >= 1"),
        ({"token_recovery": {"text_share": 0.0}}, r"may set only the budget.*--hf-overrides"),
        ({"token_recovery": 8}, r"may set only the budget"),
        ({"recovery_turns": "first"}, r"recovery_turns must be 'last' or 'all'"),
        ({"token_recovry": {"budget": 4}}, r"Unknown field 'token_recovry'.*did you mean 'token_recovery'"),
        ({"budget": 4}, r"Unknown field 'budget' in mm_processor_kwargs; write \{'token_recovery': \{'budget': 4\}\}"),
        ({"size": {"height": 4096, "width": 4096}}, r"Unknown field 'size'.*a request may set token_recovery"),
        ({"crop_size": 4096}, r"Unknown field 'crop_size'"),
        ({"return_tensors": "np"}, r"Unknown field 'return_tensors'"),
        ({"recovery_text": 3}, r"recovery_text in mm_processor_kwargs must be a string or a list of strings, got 3"),
        ({"recovery_text": ["a", 3]}, r"must be a string or a list of strings, got \['a', 3\]"),
        ({"recovery_turns": 3}, r"recovery_turns in mm_processor_kwargs must be a string, got 3"),
        ({"recovery_text": " "}, r"Row 0 has an image but no question"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(llm, expected, arguments, message):
    with pytest.raises(ValueError, match=message):
        ask(llm, requests(PAIRS[:1], **arguments))
    assert ask(llm, requests(PAIRS[:1])) == [expected(user(PAIRS[0][1]), PAIRS[0][:1])]


def test_the_question_may_be_given_apart_from_the_prompt(llm, expected):
    text, (first, second) = user("Answer briefly."), QUESTIONS[:2]
    got = ask(llm, [prompt(text, scene(SCENES[0]), recovery_text=question) for question in (first, second)])
    assert got == [expected(text, SCENES[:1], recovery_text=question) for question in (first, second)]
    assert ask(llm, [prompt(text, scene(SCENES[0]), recovery_text=[first, second])]) == [
        expected(text, SCENES[:1], recovery_text=((first, second),))
    ]
    dialogue = f"{user(first)} N</s>USER: {second} ASSISTANT:"
    got = ask(llm, [prompt(dialogue, scene(SCENES[0]), recovery_turns=turns) for turns in ("last", "all")])
    assert got == [expected(dialogue, SCENES[:1], recovery_turns=turns) for turns in ("last", "all")]


def test_questions_longer_than_the_text_encoder_reads(llm, expected):
    """They are read in several windows, together with short questions in the same step."""
    long = " ".join([*QUESTIONS, *QUESTIONS[::-1]] * 2)
    pairs = [(SCENES[0], long), (SCENES[0], QUESTIONS[0]), (SCENES[1], long)]
    assert ask(llm, requests(pairs)) == [expected(user(question), (number,)) for number, question in pairs]


def test_chat_messages(llm, transformers):
    model, processor = transformers
    from vllm import SamplingParams

    def messages(kind, picture):
        image = {"type": "image_pil", "image_pil": picture} if kind == "vllm" else {"type": "image", "image": picture}
        return [
            {"role": "user", "content": [image, {"type": "text", "text": QUESTIONS[0]}]},
            {"role": "assistant", "content": [{"type": "text", "text": "N"}]},
            {"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}]},
        ]

    for turns in (slice(0, 1), slice(None)):
        asked = [messages("vllm", scene(number))[turns] for number in SCENES]
        settings = SamplingParams(temperature=0, max_tokens=vllm_engines.NEW_TOKENS)
        outputs = llm.chat(asked, settings, use_tqdm=False)
        for number, output in zip(SCENES, outputs, strict=True):
            inputs = processor.apply_chat_template(
                messages("transformers", scene(number))[turns],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            assert list(output.outputs[0].token_ids) == reference(model, dict(inputs))


def test_embeddings_of_any_length(fresh, transformers, expected):
    """Compressed outside by the paper's dynamic counts: every picture has its own, also within a prompt and a step."""
    cases = [(SCENES[:1], QUESTIONS[0]), (SCENES[1:3], QUESTIONS[1]), (SCENES[2:3], QUESTIONS[2])]
    batch, wanted, lengths = [], [], []
    for numbers, question in cases:
        text = user(question, len(numbers))
        tokens, ids = embeddings(transformers, text, numbers, **PAPER)
        batch.append(prompt(text, tokens))
        wanted.append(ids)
        lengths += map(len, tokens)
    whole, ids = embeddings(transformers, user(QUESTIONS[0]), SCENES[:1], enabled=True, budget=144, merged_tokens=0)
    batch, wanted = [*batch, prompt(user(QUESTIONS[0]), whole)], [*wanted, ids]
    assert len({*lengths}) == len(lengths)
    assert len(whole[0]) == 144
    assert ask(fresh, batch) == wanted
    assert ask(fresh, [*batch, *requests(PAIRS[:3])]) == wanted + [expected(user(q), (n,)) for n, q in PAIRS[:3]]
    with pytest.raises(ValueError, match="compressed already"):
        ask(fresh, [prompt(user(QUESTIONS[0]), whole, token_recovery={"budget": 8})])


def test_what_is_not_finite_is_refused(llm, transformers, expected):
    """Embeddings in the front end, which goes on; features of the engine's own tower by an error."""
    text = user(QUESTIONS[0])
    tokens, _ = embeddings(transformers, text, SCENES[:1], **PAPER)
    with pytest.raises(ValueError, match="image_embeds of image 0 hold NaN or infinity"):
        ask(llm, [prompt(text, [tokens[0].index_fill(0, torch.tensor([1]), float("nan"))])])
    for wrong in (tokens[0][:0], tokens[0].long()):
        with pytest.raises(ValueError, match=r"image_embeds of image 0 must be floats.* of at least one token, got"):
            ask(llm, [prompt(text, [wrong])])
    assert ask(llm, requests(PAIRS[:1])) == [expected(user(PAIRS[0][1]), (PAIRS[0][0],))]
    inputs = transformers[1](images=[scene(SCENES[0])], text=text, return_tensors="pt")
    inputs["pixel_values"][..., 5, 5] = float("inf")

    def refusal(model):
        given = {key: inputs[key] for key in inputs if key == "pixel_values" or key.startswith("recovery_")}
        try:
            model.embed_multimodal(**given, recovery_budget=[budget_to_tensor(None)])
        except ValueError as error:
            return str(error)

    (message,) = llm.apply_model(refusal)
    assert "features of image 0 hold NaN or infinity" in message


def test_pictures_of_several_requests_go_through_the_tower_together(fresh, expected):
    from reccomp_hf.engines.vllm.models import TOWER_TILES

    seen: list[int] = []

    def watch(model):
        embeddings = model.vision_tower.vision_model.embeddings
        return embeddings.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    (handle,) = fresh.apply_model(watch)
    ask(fresh, requests([PAIRS[0], PAIRS[4], PAIRS[8], PAIRS[12]]))
    assert seen == [4]
    forget(fresh)
    seen.clear()
    batch = [*requests(PAIRS), *requests(PAIRS[:3], token_recovery={"budget": 4})]
    answers = ask(fresh, batch)
    handle.remove()
    assert sum(seen) == len(batch)
    assert max(seen) == TOWER_TILES  # of as many requests, each of one picture
    assert len(seen) <= 6
    assert answers[: len(PAIRS)] == [expected(user(question), (number,)) for number, question in PAIRS]


def test_questions_of_other_lengths_are_padded_as_the_processor_pads_them():
    from reccomp_hf.engines.vllm.models import _question, _RequestImage

    given = [
        (torch.tensor([[1, 5, 9, 9]]), torch.tensor([[1, 1, 1, 0]]), torch.tensor([4])),
        (torch.tensor([[1, 5, 6, 7, 8, 9], [1, 3, 9, 9, 9, 9]]), torch.ones(2, 6, dtype=torch.long), torch.tensor([])),
    ]
    images = [_RequestImage(torch.empty(0), (1, 1), 4, question) for question in given]
    question = _question(images, torch.arange(2))
    assert question.input_ids.shape == (2, 2, 6)
    assert question.input_ids[:, 0].tolist() == [[1, 5, 9, 9, 9, 9], [1, 5, 6, 7, 8, 9]]
    assert question.windows.tolist() == [[True, False], [True, True]]


METHODS = {
    "recoverable": {"merged_tokens": 4, "text_limit": "share", "text_share": 0.5, "coverage_by": "place"},
    "last": {"text_relevance": "last", "visual_layer": -1, "visual_heads": "mean"},
    "penultimate": {"text_relevance": "penultimate", "text_relevance_sign": -1},
    **{
        name: {"method": name}
        for name in (
            *("visual", "prumerge", "prumerge_plus", "visionzip", "trim", "vispruner", "divprune", "cdpruner"),
            *("scope", "holov", "hiprune", "mmtok"),
        )
    },
    "random": {"method": "random"},
    "share": {"budget": 0.2},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_tokens_of_transformers(llm, transformers, name):
    """Compares the engine's model itself with `compress_inputs`: the same patches, and features that agree."""
    (reference_model, processor), fields = transformers, METHODS[name]
    texts, pictures = [user(question) for question in QUESTIONS], [scene(number) for number in SCENES]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        short, record = reference_model.compress_inputs(**inputs, token_recovery=fields)
    wanted = short["inputs_embeds"][short["input_ids"] == reference_model.config.image_token_id]

    def tokens(model):
        before, model.config.token_recovery = model.config.token_recovery, fields
        try:
            given = {key: inputs[key] for key in inputs if key == "pixel_values" or key.startswith("recovery_")}
            with torch.inference_mode():
                return model.embed_multimodal(**given, recovery_budget=[budget_to_tensor(None)] * len(SCENES))
        finally:
            vars(model.config)["token_recovery"] = before

    (outputs,) = llm.apply_model(tokens)
    assert [len(output) for output in outputs] == record.counts.tolist()
    torch.testing.assert_close(torch.cat(list(outputs)), wanted, rtol=1e-4, atol=1e-4)


def test_a_picture_may_have_any_size(llm, expected, transformers):
    model, processor = transformers
    picture = scene(SCENES[0]).resize((150, 70), Image.Resampling.BICUBIC)
    wanted = reference(model, processor(images=picture, text=user(QUESTIONS[1]), return_tensors="pt"))
    assert ask(llm, [prompt(user(QUESTIONS[1]), picture)]) == [wanted]
