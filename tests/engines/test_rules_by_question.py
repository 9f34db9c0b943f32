"""Rules by question in what asks many questions at once: predict, serve, embed, eval and the trainers' mixin."""

import concurrent.futures
import copy
import json
import re

import demo_model
import pytest
import torch
from architectures import LLAVA
from chat_client import chat, client_of, data_url, running
from predictions import read_lines, save_pictures, write_lines

import reccomp_hf
from reccomp_hf.checkpoints.loading import load
from reccomp_hf.core.rules import find_rule
from reccomp_hf.data.rows import open_rows
from reccomp_hf.engines.predict import predict
from reccomp_hf.engines.predict.answering import ModelAnswerer
from reccomp_hf.engines.predict.batching import plan_batches
from reccomp_hf.engines.predict.questions import Columns, Questions
from reccomp_hf.engines.server import answering
from reccomp_hf.engines.server.answering import Service
from reccomp_hf.measure.benchmark.batches import noise_batch
from reccomp_hf.measure.evaluation import demo_samples, evaluate

pytest_plugins = ("command_line",)

RULES = [{"begins": "How many", "budget": 30}, {"begins": ["is there", "are there"], "method": "trim", "budget": 5}]
COMMON = 12
TOKENS = {0: 30, 1: 5, -1: COMMON}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo checkpoint with rules."""
    target = tmp_path_factory.mktemp("rules") / "checkpoint"
    model, processor = demo_model.demo_model()
    model = copy.copy(model)
    model.config = copy.deepcopy(model.config)
    model.config.token_recovery = {"budget": COMMON, "rules": RULES}
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder), {}, "cpu")


def tokens_of(question):
    return TOKENS[find_rule(RULES, question)]


@torch.no_grad()
def answer_alone(question, image):
    """The answer of the plain demo model under the settings that the question's rule gives."""
    model, processor = demo_model.demo_model()
    rule = find_rule(RULES, question)
    fields = {"budget": COMMON} if rule < 0 else {name: RULES[rule][name] for name in RULES[rule] if name != "begins"}
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, token_recovery=fields)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_predict_answers_rows_of_different_rules_in_one_batch(loaded, tmp_path):
    rows = save_pictures(tmp_path, 12)
    data = write_lines(tmp_path / "data.jsonl", rows)
    predict(*loaded, data, tmp_path / "out.jsonl", batch_size=12, max_new_tokens=8)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["visual_tokens"] for line in lines] == [tokens_of(row["question"]) for row in rows]
    assert {line["visual_tokens"] for line in lines} == set(TOKENS.values())
    for row, line, sample in zip(rows, lines, demo_samples(36)[::3], strict=True):
        assert line["answer"] == answer_alone(row["question"], sample.open())
    predict(*loaded, data, tmp_path / "fixed.jsonl", max_new_tokens=1, token_recovery={"budget": 9})
    assert {line["visual_tokens"] for line in read_lines(tmp_path / "fixed.jsonl")} == {9}
    rules = [{"begins": "how", "budget": 3}]  # those of the call, not of the checkpoint
    predict(*loaded, data, tmp_path / "own.jsonl", max_new_tokens=1, token_recovery={"rules": rules})
    for row, line in zip(rows, read_lines(tmp_path / "own.jsonl"), strict=True):
        assert line["visual_tokens"] == (3 if row["question"].startswith("How") else COMMON)


def test_a_run_resumes_under_the_same_rules_only(loaded):
    first, other = (ModelAnswerer(*loaded, "", 8, {"rules": rules}).fingerprint() for rules in (RULES, RULES[:1]))
    assert first == ModelAnswerer(*loaded, "", 8, {}).fingerprint()
    assert {name for name in first if first[name] != other[name]} == {"token_recovery.rules"}


def test_batches_are_planned_by_the_rules_tokens(loaded, tmp_path):
    model, processor = loaded
    texts = ["Is there a red ring?", "What color is it?", "How many are there?"]
    rows = [{"image": save_pictures(tmp_path, 1)[0]["image"], "question": text} for text in texts]
    questions = Questions(open_rows(write_lines(tmp_path / "data.jsonl", rows)), Columns(), processor)
    plan = plan_batches(questions, model.config, model.config.token_recovery, processor, 1)
    assert plan.batches == [[2], [1], [0]]


def test_a_server_answers_requests_of_different_rules_in_one_batch(loaded, monkeypatch):
    monkeypatch.setattr(answering, "_WINDOW", 0.5)
    sizes = []
    prepare = Service.prepare

    def counted(self, requests):
        sizes.append(len(requests))
        return prepare(self, requests)

    monkeypatch.setattr(Service, "prepare", counted)
    samples = demo_samples(6)
    with running(Service("demo", *loaded)) as server:
        client = client_of(server)

        def ask(sample, **fields):
            extra = {"extra_body": {"token_recovery": fields}} if fields else {}
            messages = chat(sample.question, data_url(sample.open()))
            return client.chat.completions.create(model="demo", messages=messages, max_tokens=8, **extra)

        with concurrent.futures.ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(ask, samples))
        assert max(sizes) > 1
        for sample, answer in zip(samples, answers, strict=True):
            assert answer.choices[0].message.content.strip() == answer_alone(sample.question, sample.open())
        counts = [prompt_tokens(loaded, sample) for sample in samples]
        assert [answer.usage.prompt_tokens for answer in answers] == counts
        several = next(sample for sample in samples if sample.question.startswith("How many"))
        whole = ask(several).usage.prompt_tokens
        assert ask(several, budget=4).usage.prompt_tokens == whole - 26
        assert ask(several, rules=[{"begins": "how", "budget": 7}]).usage.prompt_tokens == whole - 23
        with pytest.raises(Exception, match=r"rules\[0\] changes no field"):
            ask(several, rules=[{"begins": "how"}])
        client.close()


def prompt_tokens(loaded, sample):
    _, processor = loaded
    text = f"USER: <image>\n{sample.question} ASSISTANT:"
    turn = [{"type": "image"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    return len(processor.tokenizer(text).input_ids) - 1 + tokens_of(sample.question)


def test_embeddings_of_different_rules(loaded):
    samples = demo_samples(6)
    pictures, questions = [sample.open() for sample in samples], [sample.question for sample in samples]
    results = reccomp_hf.embed_images(*loaded, pictures, questions)
    assert [len(result.embeds) for result in results] == list(map(tokens_of, questions))
    rules = [{"begins": "how", "budget": 3}]
    for picture, question, result in zip(pictures, questions, results, strict=True):
        (alone,) = reccomp_hf.embed_images(*loaded, [picture], [question])
        torch.testing.assert_close(alone.embeds, result.embeds, atol=1e-5, rtol=1e-4)
        assert alone.places.equal(result.places)
        (own,) = reccomp_hf.embed_images(*loaded, [picture], [question], {"rules": rules})
        assert len(own.embeds) == (3 if question.startswith("How") else COMMON)


def test_an_evaluation_reads_the_rules_of_each_setting(loaded):
    samples = demo_samples(12)
    rules = [{"begins": "how", "budget": 3}]
    settings = ["stored", "stored:9", f"stored+rules={json.dumps(rules)}", f"paper:20+rules={json.dumps(rules)}"]
    results = evaluate(*loaded, samples, settings, batch_size=6, max_new_tokens=4, progress=False).results
    stored, fixed, own, paper = (results[name] for name in settings)
    assert stored.tokens.tolist() == [tokens_of(sample.question) for sample in samples]
    assert set(fixed.tokens.tolist()) == {9}
    counting = [sample.question.startswith("How") for sample in samples]
    assert own.tokens.tolist() == [3 if counts else COMMON for counts in counting]
    assert paper.tokens.tolist() == [3 if counts else 20 for counts in counting]
    for sample, answer in zip(samples, stored.answers, strict=True):
        assert answer == answer_alone(sample.question, sample.open())


def shown_by(run, *command):
    code, out, err = run(*command)
    assert code == 0, err
    return out


def test_what_the_commands_show(folder, run):
    facts = shown_by(run, "info", folder)
    assert 'rule 0              "How many": budget 30' in facts
    assert 'rule 1              "is there", "are there": budget 5, method "trim"' in facts
    assert "144 become 12 (8%); by rule: 30, 5" in " ".join(facts.split())
    assert json.loads(shown_by(run, "info", folder, "--json"))["token_recovery"]["rules"] == RULES
    cost = shown_by(run, "cost", folder)
    assert "the most that a rule of the checkpoint allows" in cost
    assert re.search(r"^  visual tokens +144 +30$", cost, flags=re.MULTILINE)
    card = shown_by(run, "card", folder, "--stdout", "--no-measure")
    assert '| `rules` | `{"begins": "How many", "budget": 30}`<br>`{"begins": ["is there"' in card
    assert "every image becomes at most 30 tokens instead of 144" in " ".join(card.split())
    assert "Here: at most 30 (20.8%), by rule." in card
    shown = shown_by(run, "eval", folder, "--settings", "stored", "--limit", "6", "--max-new-tokens", "2")
    assert 'stored, rule 0: "How many": budget 30' in shown
    assert "off, rule" not in shown


def test_other_fields_for_a_command_set_the_rules_aside(folder):
    for fields, rules in (({}, RULES), ({"position_ids": "compact"}, RULES), ({"budget": 4}, [])):
        model, processor = load(str(folder), fields, "cpu")
        assert model.config.token_recovery.rules == processor.recovery_rules == rules


@torch.no_grad()
def test_a_benchmarks_random_questions_have_no_rule():
    model = LLAVA.build(budget=COMMON, rules=RULES)
    assert model(**noise_batch(model, 2)).visual_token_counts.tolist() == [COMMON] * 2
