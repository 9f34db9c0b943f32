"""Fields of token recovery that a request to vLLM's server has in the wrong place, which vLLM itself would ignore."""

import time

import pytest

from reccomp_hf.core.settings import FIELDS
from reccomp_hf.engines.vllm.checks import REQUEST_KEYS, check_body


def chat(part=None, **message):
    parts = [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text", "text": "Why?", **(part or {})},
    ]
    return {"role": "user", "content": parts, **message}


GOOD = {
    "model": "demo",
    "messages": [{"role": "system", "content": "Be brief."}, chat()],
    "temperature": 0,
    "max_tokens": 5,
    "add_special_tokens": True,
    "stream_options": {"include_usage": True},
    "mm_processor_kwargs": {"token_recovery": {"budget": 4}, "budget": 4},  # vLLM calls `check_request` for these
    "metadata": {"budget": "4", "extra_body": "a user's own"},
    "vllm_xargs": {"method": "a user's own"},
}
AT_THE_TOP = r'write \{"mm_processor_kwargs": \{"%s": \.\.\.\}\} at the top of the body'


@pytest.mark.parametrize(
    "body",
    [
        GOOD,
        {"model": "demo", "input": "What is token_recovery?", "text": {"format": {"type": "text"}}},
        {"messages": [[chat()], [chat()]]},
        *({"messages": messages} for messages in (None, 5, "budget", [None, 5, [[{"budget": 4}]]], {"budget": 4})),
        {"messages": [{"role": "user", "content": {"budget": 4}}]},
        *(None, [], "budget", 4, [{"budget": 4}], {}),  # refused by vLLM
        {"version": 3, "conversation": "a", "thinking_token_budget": 9, "": 1, "b": 1},
    ],
)
def test_other_bodies_are_let_through(body):
    check_body(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *(({name: 4}, rf"field '{name}' in the body: {AT_THE_TOP % name}") for name in REQUEST_KEYS),
        ({"budget": 4}, r'\'budget\' in the body: write .*"token_recovery": \{"budget": \.\.\.\}\}\} at the top'),
        ({"text_share": 0.5}, r"may set only the budget; the server sets other fields, --hf-overrides"),
        (
            {"token_recovry": {}},
            rf"'token_recovry' .*'token_recovery'\? If so, {AT_THE_TOP % 'token_recovery'}",
        ),
        ({"recovery-text": "a"}, r"did you mean 'recovery_text'"),
        ({"BUDGET": 4}, r"did you mean 'budget'"),
        ({"mmProcessorKwargs": {}}, r"did you mean 'mm_processor_kwargs'"),
        (
            {"mm_processor_kwarg": {}},
            r"mean 'mm_processor_kwargs'\? If so, write \{\"mm_processor_kwargs\": \.\.\.\}",
        ),
        ({"mm_procesor_kwargs": None}, r"did you mean 'mm_processor_kwargs'"),
        ({"extra_body": {"mm_processor_kwargs": {}}}, r"'extra_body' in the body: OpenAI's Python client puts"),
        (
            {"messages": [chat(), chat(mm_processor_kwargs={})]},
            r"'mm_processor_kwargs' in messages\[1\]: write",
        ),
        ({"messages": [chat(part={"recovery_turns": "all"})]}, r"'recovery_turns' in messages\[0\]\.content\[1\]"),
        ({"messages": [[chat()], [chat(budget=4)]]}, r"'budget' in messages\[1\]\[0\]"),
        (
            {"input": [{"role": "user", "content": [{"budget": 4}]}]},
            r"'budget' in input\[0\]\.content\[0\]",
        ),
    ],
)
def test_misplaced_fields_are_refused(body, message):
    for whole in (body, {**GOOD, **body}):
        with pytest.raises(ValueError, match=message) as raised:
            check_body(whole)
        assert len(str(raised.value)) < 400


def test_every_field_of_the_section_is_refused_but_its_version():
    """A request's own `version` may mean anything."""
    for name in FIELDS:
        try:
            check_body({name: None})
            assert name == "version"
        except ValueError as error:
            assert repr(name) in str(error)


def test_completions_have_no_images():
    check_body({"prompt": "A", "max_tokens": 1}, pictures=False)
    for name in ("mm_processor_kwargs", "budget", "extra_body"):
        with pytest.raises(ValueError, match=f"'{name}' in the body: these requests have no images, ask for a chat"):
            check_body({"prompt": "A", name: {}}, pictures=False)


def test_many_names_and_long_ones_take_no_time():
    """A near name is looked for among the first thousand, an exact one among all."""
    many = {f"n{number:06}": number for number in range(300_000)}
    start = time.perf_counter()
    check_body({"a" * 10**7: 1})
    check_body({"messages": [many]})
    with pytest.raises(ValueError, match="'budget' in messages"):
        check_body({"messages": [{**many, "budget": 4}]})
    assert time.perf_counter() - start < 10
