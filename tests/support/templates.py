"""Chat templates of several families, and CLIP's windows of a question as they are defined."""

import tiny

RECOVERY_NAMES = ["recovery_input_ids", "recovery_attention_mask", "recovery_words"]
QUESTION = "What is the colour of the square?"

NEWLINE_VICUNA = tiny.VICUNA_TEMPLATE.replace("'ASSISTANT:'", "'\nASSISTANT:'").replace(
    "message['role'].upper()", "('\nASSISTANT' if message['role'] == 'assistant' else 'USER')"
)
CONTENT = (
    "{% macro content(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{% endmacro %}"
)
EACH = "{% for message in messages %}"
MISTRAL = (
    CONTENT + "<s>" + EACH + "{% if message['role'] == 'assistant' %} {{ content(message) }}</s>"
    "{% elif message['role'] == 'user' %}[INST] {{ content(message) }} [/INST]"
    "{% else %}<<SYS>>\n{{ content(message) }}<</SYS>>\n\n{% endif %}{% endfor %}"
)
CHATML = (
    CONTENT + EACH + "<|im_start|>{{ message['role'] }}\n{{ content(message) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    CONTENT + "<|begin_of_text|>" + EACH + "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ content(message) }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
STRINGS_ONLY = EACH + "[{{ message['role'] }}] {{ message['content'] }} [end]{% endfor %}"
TEMPLATES = {
    "vicuna": tiny.VICUNA_TEMPLATE,
    "vicuna-newline": NEWLINE_VICUNA,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "llama3": LLAMA3,
}
UNUSABLE_TEMPLATES = {
    "none": None,
    "raises": "{{ raise_exception('one turn only') }}",
    "syntax error": "{% for %}",
    "one turn": "{{ messages[0]['content'] }}",
    "no opening": EACH + "{{ message['content'] }}{% endfor %}",
    "only named": {"tool_use": tiny.VICUNA_TEMPLATE},
}


def clip_windows(*questions, most=77):
    """The definition in plain Python: windows of up to 75 tokens, wrapped, padded on the right as far as needed."""
    tokenizer, wrapped = tiny.clip_tokenizer(), []
    for question in questions:
        tokens = tokenizer.tokenize(question)
        for at in range(0, len(tokens), most - 2):
            body = tokenizer.convert_tokens_to_ids(tokens[at : at + most - 2])
            wrapped.append([tokenizer.bos_token_id, *body, tokenizer.eos_token_id])
    wrapped = wrapped or [[]]
    length = next(length for length in (*range(8, most, 8), most) if length >= max(map(len, wrapped)))
    ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in wrapped]
    return ids, [[1] * len(row) + [0] * (length - len(row)) for row in wrapped]
