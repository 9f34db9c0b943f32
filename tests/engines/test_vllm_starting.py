"""Checkpoints that vLLM starts with or refuses; the advice of each refusal is tried."""

import contextlib
import functools
import json
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import torch
import vllm_engines
from conftest import OPEN_PORTS
from vllm_engines import ask, copy_checkpoint, drop_recovery_tokenizer, engine, prompt, renamed, server
from vllm_scenes import (  # noqa: F401
    BUDGET,
    PAIRS,
    PAPER,
    QUESTIONS,
    SCENES,
    embeddings,
    environment,
    loaded,
    requests,
    scene,
    user,
    wanted,
)

import reccomp_hf
from reccomp_hf.demo import checkpoint_folder

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

DEMO = checkpoint_folder("demo")
COMPACT = {"position_ids": "compact"}


@pytest.fixture(scope="module")
def demo():
    return loaded(DEMO)


REFUSED = {
    "positions of embeddings": (
        {},
        {"enable_mm_embeds": True},
        r'image_embeds do not say the positions.*--hf-overrides .*"position_ids": "compact"',
    ),
    "a divided tower": (
        {},
        {"tensor_parallel_size": 2},
        r"--tensor-parallel-size 2 divides among ranks: add --mm-encoder-tp-mode data",
    ),
    "speculation": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        r"with speculative decoding in vLLM",
    ),
    "dynamic": (
        {**COMPACT, "budget": None},
        {},
        r'budget is null.*--hf-overrides .*"budget": 64.*image_embeds, with --enable-mm-embeds .*"image": 0',
    ),
    "dynamic, embeddings too": ({**COMPACT, "budget": None}, {"enable_mm_embeds": True}, r"budget is null"),
    "no budget": (
        {**COMPACT, "method": "authors", "budget": None},
        {},
        r"'authors' has no budget.*\"method\": \"recoverable\", \"budget\": 64",
    ),
    "too large": ({**COMPACT, "budget": 145}, {}, r"budget is 145, but an image has only 144 patches"),
    "unknown field": (
        {**COMPACT, "budgets": 64},
        {},
        r"Unknown token_recovery field 'budgets'; did you mean 'budget'",
    ),
    "processor arguments": (
        COMPACT,
        {"mm_processor_kwargs": {"token_recovery": {"budget": 8}}},
        r"--mm-processor-kwargs contain 'token_recovery'.*--hf-overrides",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_start(name):
    fields, options, message = REFUSED[name]
    overrides = {"hf_overrides": {"token_recovery": fields}} if fields else {}
    with pytest.raises(ValueError, match=message), engine(DEMO, **overrides, **options):
        pass


def test_overrides_and_the_keys_of_modules(tmp_path, demo):
    """The refusals' advice for positions and for a dynamic checkpoint, on keys by the names of the modules."""
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", "modules", budget=None)
    fields = {**COMPACT, "budget": 24, "merged_tokens": 4, "text_limit": "share"}
    with engine(folder, hf_overrides={"token_recovery": fields}) as llm:
        assert ask(llm, requests()) == wanted(demo, **fields)


def test_a_visual_only_checkpoint_of_4x(tmp_path):
    """Without CLIP's text side; a question changes nothing, so that a picture is encoded once for all of them."""
    fields = {"method": "divprune", "text_encoder_config": None, "budget": BUDGET, **COMPACT}
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", "4x", **fields)
    ours, seen = loaded(folder), []
    with engine(folder) as llm:
        (handle,) = llm.apply_model(
            lambda model: model.vision_tower.vision_model.pre_layrnorm.register_forward_pre_hook(
                lambda module, args: seen.append(len(args[0]))
            )
        )
        assert ask(llm, requests()) == wanted(ours)
        handle.remove()
    assert sum(seen) == len(SCENES)


def test_switched_off_it_is_the_stock_model(demo):
    with engine(DEMO, hf_overrides={"token_recovery": {"enabled": False}}) as llm:
        assert ask(llm, requests()) == wanted(demo, enabled=False)
        with pytest.raises(ValueError, match=r"token recovery enabled; got 8 with enabled=False"):
            ask(llm, requests(PAIRS[:1], token_recovery={"budget": 8}))


def test_a_dynamic_checkpoint_serves_embeddings_alone(demo):
    """The other way out of a dynamic count: no vision tower is there, and pictures are refused."""
    from vllm.exceptions import VLLMValidationError

    batch, answers = [], []
    for number, question in PAIRS[:6]:
        tokens, ids = embeddings(demo, user(question), (number,), **PAPER, **COMPACT)
        batch, answers = [*batch, prompt(user(question), tokens)], [*answers, ids]
    assert len({len(request["multi_modal_data"]["image"][0]) for request in batch}) > 3
    options = {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    with engine(DEMO, hf_overrides={"token_recovery": {**PAPER, **COMPACT}}, **options) as llm:
        assert ask(llm, batch) == answers
        with pytest.raises(VLLMValidationError, match=r"At most 0 image"):
            ask(llm, requests(PAIRS[:1]))


def test_a_checkpoint_without_the_text_side_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", **COMPACT)
    weights = load_file(folder / "model.safetensors")
    weights.pop("token_recovery.visual_projection.weight")
    save_file(weights, folder / "model.safetensors")
    message = r"lacks 1 weights of CLIP's text encoder, among them token_recovery.visual_projection"
    with pytest.raises(ValueError, match=message), engine(folder):
        pass


def test_a_processor_without_the_text_sides_tokenizer_is_refused(tmp_path):
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", **COMPACT)
    drop_recovery_tokenizer(folder)
    message = r'has no recovery_tokenizer.*--hf-overrides .*"text_share": 0.0'
    with pytest.raises(ValueError, match=message), engine(folder):
        pass
    ours = loaded(folder)
    with engine(folder, hf_overrides={"token_recovery": {"text_share": 0.0}}) as llm:
        assert ask(llm, requests(PAIRS[:8])) == wanted(ours, PAIRS[:8], text_share=0.0)


def test_an_engine_in_a_process_of_its_own(tmp_path, demo, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = copy_checkpoint(DEMO, tmp_path / "checkpoint", "4x")
    with engine(folder) as llm:
        assert ask(llm, requests()) == ask(llm, requests()) == wanted(demo)
        smaller = requests(PAIRS[:4], token_recovery={"budget": 4})
        assert ask(llm, smaller) == wanted(demo, PAIRS[:4], budget=4)


def test_layouts_differ():
    """Of the keys that the three checkpoints above are written with."""
    key = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    names = {layout: renamed(key, layout) for layout in vllm_engines.LAYOUTS}
    assert len({*names.values()}) == 3, names


# ---- over HTTP -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    port = vllm_engines.free_port()
    options = ["--hf-overrides", json.dumps({"token_recovery": COMPACT}), "--served-model-name", "demo"]
    options += ["--trust-request-mm-kwargs", "--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 2}']
    OPEN_PORTS.add(port)
    with server(DEMO, port, root / "log", *options) as url:
        yield url
    OPEN_PORTS.discard(port)


def chat(address, question, pictures, whole=False, **body):
    """The answer's text to a question about pictures, or all of it, as OpenAI's clients ask; or status and message.

    A picture is the number of a scene, or its tokens (K, D). The template does not write the token that begins a
    sequence, which the processor puts in front.
    """
    parts = []
    for picture in pictures:
        if isinstance(picture, torch.Tensor):
            parts.append(reccomp_hf.image_embeds_part(picture))
            continue
        file = BytesIO()
        scene(picture).save(file, "PNG")
        url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    options = {"temperature": 0, "max_tokens": vllm_engines.NEW_TOKENS, "add_special_tokens": True}
    body = {"model": "demo", "messages": [message], **options, **body}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            return error.code, error.read().decode()
    return answer if whole else answer["choices"][0]["message"]["content"].strip()


def texts(demo, ids):
    return [demo[1].decode(row, skip_special_tokens=True).strip() for row in ids]


def test_several_clients_at_once(address, demo):
    pairs, barrier = [*PAIRS, *PAIRS[::-1]], threading.Barrier(8)

    def client(number):
        barrier.wait()
        return [chat(address, question, (scene_,)) for scene_, question in pairs[number::8]]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client, range(8)))
    right = texts(demo, wanted(demo, pairs, **COMPACT))
    assert answers == [right[number::8] for number in range(8)]


def test_the_prompt_over_http_is_the_processors(address, demo):
    model, processor = demo
    number, question = PAIRS[0]
    inputs = processor(images=scene(number), text=user(question), return_tensors="pt")
    short, _ = model.compress_inputs(**inputs, token_recovery=COMPACT)
    answer = chat(address, question, (number,), whole=True)
    assert answer["usage"]["prompt_tokens"] == short["input_ids"].shape[1]


def test_a_request_over_http_may_say_its_budget(address, demo):
    smaller = {"mm_processor_kwargs": {"token_recovery": {"budget": 4}}}
    answers = [chat(address, question, (number,), **smaller) for number, question in PAIRS[:8]]
    assert answers == texts(demo, wanted(demo, PAIRS[:8], budget=4, **COMPACT))
    larger = {"mm_processor_kwargs": {"token_recovery": {"budget": 17}}}
    status, message = chat(address, QUESTIONS[0], SCENES[:1], **larger)
    assert status == 400
    assert "budget of 17 is 17 tokens of an image, more than the 16" in message
    assert chat(address, QUESTIONS[0], SCENES[:1]) == "N"


HOSTILE = [
    *({"token_recovery": {"budget": budget}} for budget in (True, 0, "8", [8], {"budget": 8})),
    *({"token_recovery": {"budget": budget}} for budget in (float("inf"), 10**400, -1, 1.5)),
    *({"token_recovery": section} for section in (True, "x" * 10**7, {"budget": 4, "a": {"b": 1}})),
    *({name: 1} for name in ("size", "crop_size", "return_tensors", "budget", "token_recovry")),
    *({"recovery_text": text} for text in (5, {"a": {"a": [1]}}, [None], "", "x" * 10**6)),
    *({"recovery_turns": turns} for turns in ("first", ["all"], 1)),
    ["token_recovery"],
]


def test_hostile_requests_end_nothing(address, demo):
    """Each is a 400, also among others that are answered rightly."""
    right = texts(demo, wanted(demo, PAIRS, **COMPACT))
    with ThreadPoolExecutor(8) as pool:
        one = functools.partial(chat, address, QUESTIONS[0], SCENES[:1])
        refused = [pool.submit(one, mm_processor_kwargs=arguments) for arguments in HOSTILE]
        answers = [pool.submit(chat, address, question, (number,)) for number, question in PAIRS]
        assert [future.result() for future in answers] == right
    for arguments, future in zip(HOSTILE, refused, strict=True):
        status, message = future.result()
        assert (status, len(message) < 2000) == (400, True), (str(arguments)[:99], message[:999])
    assert one() == right[0]


def test_embeddings_over_http(address, demo):
    """With the paper's dynamic counts, along with images of the server's own budget; one prompt has two lengths."""
    cases = [(SCENES[:1], QUESTIONS[0]), (SCENES[1:2], QUESTIONS[0]), (SCENES[1:3], QUESTIONS[1])]
    made = [embeddings(demo, user(question, len(numbers)), numbers, **PAPER, **COMPACT) for numbers, question in cases]
    assert len({len(tokens) for embeds, _ in made for tokens in embeds}) > 2
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(chat, address, case[1], embeds) for case, (embeds, _) in zip(cases, made, strict=True)]
        plain = [pool.submit(chat, address, question, (number,)) for number, question in PAIRS[:3]]
    assert [future.result() for future in sent] == texts(demo, [ids for _, ids in made])
    assert [future.result() for future in plain] == texts(demo, wanted(demo, PAIRS[:3], **COMPACT))
