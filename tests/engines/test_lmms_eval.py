"""lmms-eval runs on the compressed model: the same answers, scores and token counts as our own evaluation.

These tests need lmms-eval, in an environment of its own: `pytest -m lmms_eval` there, see `.ci/run`.
"""

import functools
import re
import shlex

import lmms_tasks
import numpy as np
import pytest
import tiny
import torch
from architectures import LLAVA_NEXT
from demo_model import demo_model
from lmms_runs import answers_of, command, read_output, run, tokens_of
from lmms_tasks import generation_request, likelihood_request, wrapper
from paths import ROOT
from PIL import Image

import reccomp_hf
from reccomp_hf.demo import checkpoint_folder, draw_scene
from reccomp_hf.measure.evaluation import evaluate

pytestmark = [pytest.mark.lmms_eval, pytest.mark.filterwarnings("default")]  # their warnings are theirs
QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tasks, for `--include_path`."""
    return lmms_tasks.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The stock checkpoint with the demo's weights, and its model."""
    target = tmp_path_factory.mktemp("stock")
    return target, lmms_tasks.save_stock(target)


@functools.cache
def reported(setting):
    """The result of `reccomp-hf eval` for the same questions."""
    return evaluate(*demo_model(), lmms_tasks.samples(), [setting], max_new_tokens=16, progress=False).results[setting]


def test_the_readmes_command_measures_the_compressed_model(folder, tmp_path):
    guide = (ROOT / "reccomp_hf/engines/lmms_eval.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^python (-m lmms_eval .*\\\n.*)$", guide, flags=re.MULTILINE)
    ours = {"llava-1.5-7b-reccomp": "demo", "mme,gqa": "scenes", "output_path logs": f"output_path {tmp_path}"}
    for theirs, here in ours.items():
        assert theirs in shown
        shown = shown.replace(theirs, here)
    command(*shlex.split(shown.replace("\\\n", "")), "--include_path", str(folder))
    results, rows = read_output(tmp_path)
    expected = reported("balanced")
    assert [row["filtered_resps"].strip() for row in rows] == expected.answers
    assert [bool(row["right"]) for row in rows] == expected.right.tolist()
    assert results["results"]["scenes"]["right,none"] == pytest.approx(expected.right.mean())
    assert expected.right.mean() > 0.5
    assert [row["token_counts"][0]["visual_tokens"] for row in rows] == expected.tokens.tolist() == [64] * len(rows)
    assert {row["token_counts"][0]["images"] for row in rows} == {1}
    for name in ("", "_min", "_max"):
        assert results["throughput"][f"avg_visual_tokens_per_image{name}"] == 64
    assert results["config"]["model_backend"] == "reccomp_hf.engines.lmms_eval.RecComp (chat)"


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ("", "stored"),
        ("preset=paper", "paper"),
        ("budget=14", "stored:14"),
        ('token_recovery={"budget":14,"text_share":0.25}', "stored:14+text_share=0.25"),
        ("budget=0.2,visual_layer=-2,text_relevance_sign=-1", "stored:0.2+visual_layer=-2+text_relevance_sign=-1"),
        ("preset=balanced:0.1,budget=null", "balanced:dynamic"),
        (
            'budget=null,method=prumerge,method_options={"neighbors":16}',
            'stored:dynamic+method=prumerge+method_options={"neighbors":16}',
        ),
        ("preset=cdpruner:16", "cdpruner:16"),
    ],
)
def test_arguments_set_what_they_say(folder, arguments, setting):
    _, samples = run("reccomp_hf", f"pretrained=demo,{arguments}".rstrip(","), folder, batch_size=6)
    expected = reported(setting)
    assert answers_of(samples) == expected.answers
    assert tokens_of(samples) == expected.tokens.tolist()
    assert [sample["right"] for sample in samples] == expected.right.tolist()


def test_the_dynamic_counts_differ_and_are_logged(folder):
    results, samples = run("reccomp_hf", "pretrained=demo,preset=paper", folder, batch_size=5)
    tokens = tokens_of(samples)
    assert len(set(tokens)) > 3 and max(tokens) < 144
    throughput = results["throughput"]
    assert throughput["avg_visual_tokens_per_image"] == pytest.approx(sum(tokens) / len(tokens))
    assert throughput["avg_visual_tokens_per_image_min"] == min(tokens)
    assert throughput["avg_visual_tokens_per_image_max"] == max(tokens)
    counts = [sample["token_counts"][0] for sample in samples]
    assert results["efficiency"]["overall"]["total_input_tokens"] == sum(count["input_tokens"] for count in counts)


def test_cached_responses_are_of_the_same_settings(folder, tmp_path):
    cached = {"batch_size": 8, "use_cache": str(tmp_path)}
    for budget, tokens in ((14, 14), (14, None), (7, 7)):
        _, samples = run("reccomp_hf", f"pretrained=demo,budget={budget}", folder, **cached)
        counts = [sample["token_counts"][0] for sample in samples]
        assert [count and count["visual_tokens"] for count in counts] == [tokens] * len(samples)
        assert answers_of(samples) == reported(f"stored:{budget}").answers


@pytest.mark.parametrize("batch_size", [1, 7])
def test_uncompressed_it_is_lmms_evals_own_llava(folder, stock, batch_size):
    _, samples = run("reccomp_hf", "pretrained=demo,enabled=False", folder, batch_size=batch_size)
    _, theirs = run("llava_hf", f"pretrained={stock[0]},device=cpu,device_map=cpu,dtype=float32", folder)
    assert [sample["filtered_resps"] for sample in samples] == [sample["filtered_resps"] for sample in theirs]
    assert [sample["token_counts"][0]["output_tokens"] for sample in samples] == [
        sample["token_counts"][0]["output_tokens"] for sample in theirs
    ]
    assert tokens_of(samples) == [144] * len(samples)


def test_no_wrapper_reads_a_compressed_checkpoint_uncompressed(stock):
    """`llava_hf` refuses it, and the generic one loads any LLaVA, stock ones too, as a model that cannot generate."""
    from lmms_eval.models import get_model

    with pytest.raises(KeyError, match="llava_reccomp"):
        get_model("llava_hf")(pretrained=str(checkpoint_folder("demo")), device="cpu", device_map="cpu")
    for source in (stock[0], checkpoint_folder("demo")):
        loaded = get_model("huggingface")(
            pretrained=str(source), device="cpu", device_map="cpu", trust_remote_code=True
        )
        assert not hasattr(loaded.model, "generate")


def test_what_is_logged_is_what_the_projector_gave():
    model = wrapper(budget=10, batch_size=4)
    projected = []
    model._model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: projected.append(args[0].shape))
    images = [draw_scene(seed).image for seed in (7, 8, 9)]
    asked = [generation_request(model, QUESTION, place, [image]) for place, image in enumerate(images)]
    results = model.generate_until(asked)
    assert isinstance(model._model, reccomp_hf.LlavaRecCompForConditionalGeneration)
    assert sum(shape[-2] for shape in projected) == sum(result.token_counts.visual_tokens for result in results) == 30


@pytest.mark.parametrize("simple", [False, True])
def test_rows_differ_in_pictures_and_lengths(simple, tmp_path):
    """Two pictures, one from a file, none, and a long question in one batch: each as if it were alone."""
    model = wrapper(simple, budget=12, position_ids="original", batch_size=4)
    first, second = (draw_scene(seed).image for seed in (11, 12))
    second.save(tmp_path / "second.png")
    rows = [
        (QUESTION, [first, second]),
        (f"{QUESTION} What letter is on the sign? How many objects are there?", [str(tmp_path / "second.png")]),
        ("Is there a red circle?", []),
        ("Is there a red circle?", [first]),
    ]
    asked = [generation_request(model, text, place, images) for place, (text, images) in enumerate(rows)]
    together = model.generate_until(asked)
    assert [result.token_counts.images for result in together] == [2, 1, 0, 1]
    assert [result.token_counts.visual_tokens for result in together] == [24, 12, 0, 12]
    ours, processor = demo_model()
    fields = {"budget": 12, "position_ids": "original"}
    for (text, images), result in zip(rows, together, strict=True):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        opened = [Image.open(image) if isinstance(image, str) else image for image in images] or None
        inputs = processor(images=opened, text=prompt, return_tensors="pt")
        ids = ours.generate(**inputs, max_new_tokens=5, token_recovery=fields)[0, inputs["input_ids"].shape[1] :]
        assert result.text == processor.decode(ids, skip_special_tokens=True)
        assert result.token_counts.output_tokens == len(ids)
        read = inputs["input_ids"].shape[1] - 132 * len(images)
        assert result.token_counts.input_tokens == read


def test_a_text_marks_where_pictures_stand():
    from reccomp_hf.engines.lmms_eval import _row_from_text

    first, second = Image.new("RGB", (9, 9)), Image.new("RGB", (10, 10))
    image = {"type": "image"}
    row = _row_from_text("<image>\nIs this <image> like it?", [first, second], "asked")
    texts = [{"type": "text", "text": text} for text in ("Is this ", " like it?")]
    assert row.messages == [{"role": "user", "content": [image, texts[0], image, texts[1]]}]
    assert row.images == [first, second]
    (message,) = _row_from_text("Alike?", [first, second], "asked").messages
    assert message["content"] == [image, image, {"type": "text", "text": "Alike?"}]


def test_images_are_upright_and_scaled_by_their_depth(tmp_path):
    """From tasks of chat messages and of text, as images and as files: all are read as the upright RGB image is."""
    models = [wrapper(), wrapper(simple=True)]  # lmms-eval first: it imports ours
    from reccomp_hf.engines.lmms_eval import _open_image

    scene, exif = draw_scene(7).image, Image.Exif()
    exif[0x0112] = 6  # its top is on the right
    scene.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    grey = scene.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name, expected in (("turned.png", scene), ("deep.png", grey.convert("RGB"))):
        for given in (str(tmp_path / name), Image.open(tmp_path / name)):
            assert (np.asarray(_open_image(given, "asked")) == np.asarray(expected)).all()
    for model in models:
        images = [str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png"), scene]
        requests = [generation_request(model, QUESTION, place, [image]) for place, image in enumerate(images)]
        assert len({result.text for result in model.generate_until(requests)}) == 1
        rows = [model._row(request.args) for request in requests]
        assert all((np.asarray(row.images[0]) == np.asarray(scene)).all() for row in rows)


def test_sampling_and_beams_are_passed_on():
    model = wrapper()
    settings = {"num_beams": 3, "temperature": 0.5, "top_p": 0.9}
    asked = [generation_request(model, QUESTION, images=[draw_scene(7).image], **settings)]
    calls, original = [], model._model.generate
    model._model.generate = lambda **kwargs: calls.append(kwargs) or original(**kwargs)
    model.generate_until(asked)
    wanted = {**settings, "max_new_tokens": 5, "do_sample": True}
    assert {name: calls[0][name] for name in wanted} == wanted


def expected_loss(model, processor, image, question, answer, fields):
    """Mean loss of an answer's tokens in one row without padding, and whether each is the likeliest."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    ids = processor.tokenizer(f" {answer}</s>", add_special_tokens=False, return_tensors="pt").input_ids
    short, _ = model.compress_inputs(**inputs, token_recovery=fields)
    with torch.no_grad():
        embeds = torch.cat([short["inputs_embeds"], model.get_input_embeddings()(ids)], dim=1)
        call = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64)}
        if "position_ids" in short:
            behind = short["position_ids"][:, -1:] + 1 + torch.arange(ids.shape[1])
            call["position_ids"] = torch.cat([short["position_ids"], behind], dim=1)
        logits = model(**call).logits[0, -ids.shape[1] - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0])
    return float(loss), bool((logits.argmax(-1) == ids[0]).all())


@pytest.mark.parametrize("fields", [{"budget": 14}, {"budget": 14, "position_ids": "original"}, {}])
def test_likelihoods_are_of_the_answers_tokens_behind_the_compressed_question(fields):
    model = wrapper(simple=True, batch_size=3, **fields)
    ours, processor = demo_model()
    rows = [(sample, answer) for sample in lmms_tasks.samples()[:6] for answer in (*sample.answers, "a red circle")]
    requests = []
    for place, (sample, answer) in enumerate(rows):  # as tasks give it: with a delimiter, or as a function
        given = f" {answer}" if place % 2 else lambda _, answer=answer: answer
        requests.append(likelihood_request(model, sample.question, given, [sample.open()], place))
    results = model.loglikelihood(requests)
    for (sample, answer), result in zip(rows, results, strict=True):
        loss, greedy = expected_loss(ours, processor, sample.open(), sample.question, answer, fields)
        assert result.text == (pytest.approx(loss, rel=1e-3, abs=1e-6), greedy)
        assert result.token_counts.images == 1
        assert not fields or result.token_counts.visual_tokens == 14
    assert {result.text[1] for result in results} == {True, False}


def test_uncompressed_likelihoods_are_the_stock_models(stock):
    model = wrapper(simple=True, enabled=False)
    image = draw_scene(7).image
    (result,) = model.loglikelihood([likelihood_request(model, QUESTION, "a red circle", [image])])
    processor = demo_model()[1]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=f"{prompt} a red circle</s>", return_tensors="pt")
    answer = processor.tokenizer(" a red circle</s>", add_special_tokens=False, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        logits = stock[1](**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    assert inputs["input_ids"][0, -len(answer) :].tolist() == answer.tolist()
    loss = torch.nn.functional.cross_entropy(logits[0, -len(answer) - 1 : -1], answer)
    assert result.text[0] == pytest.approx(float(loss), rel=1e-4)
    assert result.token_counts.visual_tokens == 144


def test_choices_are_scored(folder):
    results, samples = run(
        "reccomp_hf", "pretrained=demo,budget=14", folder, "scene_choices", batch_size=8, force_simple=True
    )
    assert results["results"]["scene_choices"]["acc,none"] == 1 - sum(not sample["acc"] for sample in samples) / len(
        samples
    )
    assert results["results"]["scene_choices"]["acc,none"] > 0.9
    assert all(len(sample["token_counts"]) in (3, 4) for sample in samples)
    assert results["config"]["model_backend"].endswith("RecCompSimple (simple)")


def test_simple_tasks_give_the_same_answers(folder):
    _, samples = run("reccomp_hf", "pretrained=demo,budget=14", folder, batch_size=8, force_simple=True)
    assert answers_of(samples) == reported("stored:14").answers


def test_a_plain_pair_would_be_a_string():
    from lmms_eval.api.instance import unwrap_generation_output

    assert unwrap_generation_output((0.5, True)) == ("(0.5, True)", None)


def test_llava_next_counts_newlines(tmp_path):
    checkpoint = LLAVA_NEXT.save_converted(tmp_path, budget=12)
    model = wrapper(pretrained=str(checkpoint), batch_size=2)
    images = tiny.pictures(2)
    asked = [generation_request(model, tiny.SENTENCES[place], place, [image]) for place, image in enumerate(images)]
    results = model.generate_until(asked)
    rows = [model._row(request.args) for request in asked]
    inputs = model._encode(rows, [model._prompt(row) for row in rows], "left")
    short, _ = model._model.compress_inputs(**inputs)
    expected = (short["input_ids"] == model._model.config.image_token_id).sum(-1).tolist()
    assert [result.token_counts.visual_tokens for result in results] == expected
    assert [result.token_counts.input_tokens for result in results] == short["attention_mask"].sum(-1).tolist()
    assert min(expected) > 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": ""}, "Name the checkpoint"),
        ({"batch_size": "auto"}, "batch_size must be an int >= 1, got 'auto'"),
        ({"budgt": 14}, "Unknown token_recovery field 'budgt'; did you mean 'budget'"),
        ({"budget": 1.5}, "budget must be null, an int >= 1 or a float in"),
        ({"token_recovery": "budget"}, "token_recovery must be a JSON object"),
        ({"preset": "balancd"}, "did you mean 'balanced'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        wrapper(**arguments)


def test_loading_follows_the_arguments():
    model = wrapper(dtype="bfloat16", attn_implementation="eager", device_map="cpu", budget=10)
    assert model._model.dtype == torch.bfloat16 and model.device == torch.device("cpu")
    assert model._model.config._attn_implementation == "eager"
    (result,) = model.generate_until([generation_request(model, QUESTION, images=[draw_scene(7).image])])
    assert result.token_counts.visual_tokens == 10


def test_a_stock_checkpoint_is_refused(stock):
    with pytest.raises(ValueError, match="is a stock LLaVA"):
        wrapper(pretrained=str(stock[0]))


def test_tasks_that_do_not_fit_are_refused(tmp_path):
    from lmms_eval.api.instance import Instance

    model, simple = wrapper(), wrapper(simple=True)
    video = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}, {"type": "text", "text": QUESTION}]}]
    with pytest.raises(ValueError, match="contains videos or audio"):
        model.generate_until([generation_request(model, video)])
    with pytest.raises(ValueError, match="contains a dict, but these models read only images"):
        simple.generate_until([generation_request(simple, QUESTION, images=[{"array": []}])])
    with pytest.raises(ValueError, match=r"film\.mp4 cannot be read as an image"):
        simple.generate_until([generation_request(simple, QUESTION, images=[str(tmp_path / "film.mp4")])])
    long = Image.new("RGB", (4000, 8))
    with pytest.raises(ValueError, match=r"an image cannot be read as an image \(it has 4000 x 8 pixels"):
        simple.generate_until([generation_request(simple, QUESTION, images=[long])])
    with pytest.raises(ValueError, match="1 images, but the text marks 2"):
        simple.generate_until([generation_request(simple, "<image><image>", images=[Image.new("RGB", (4, 4))])])
    with pytest.raises(NotImplementedError, match=r"answers tasks of one round only.*reccomp_hf\.Conversation"):
        model.generate_until_multi_round([])
    unasked = Instance("loglikelihood", ("", "yes"), 0, {"task": "asked", "doc_id": 0, "repeats": 1})
    with pytest.raises(ValueError, match="likelihoods without a question"):
        simple.loglikelihood([unasked])


def test_a_template_that_writes_answers_elsewhere_is_refused():
    model = wrapper(simple=True)
    model.processor.chat_template = "{{ messages | length }}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    request = likelihood_request(model, QUESTION, "yes", [draw_scene(7).image])
    with pytest.raises(ValueError, match="must write an answer after '1ASSISTANT:', but it wrote '2'"):
        model.loglikelihood([request])


def test_two_processes_share_the_work(folder, tmp_path):
    arguments = "--model reccomp_hf --model_args pretrained=demo,budget=14 --tasks scenes --batch_size 4 --log_samples"
    options = ["--include_path", str(folder), "--output_path", str(tmp_path)]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval")
    command(*launcher, *arguments.split(), *options, ACCELERATE_USE_CPU="1")
    results, rows = read_output(tmp_path)
    assert [row["doc_id"] for row in rows] == list(range(lmms_tasks.QUESTIONS))
    assert [row["filtered_resps"].strip() for row in rows] == reported("stored:14").answers
    written = sum(row["token_counts"][0]["output_tokens"] for row in rows)
    assert 0 < results["throughput"]["total_gen_tokens"] < written  # of the first process alone
