"""Conversations for tests: settings, chat templates, and readers of what goes through the language model."""

import pytest
import tiny
from transformers.generation.streamers import BaseStreamer

from reccomp_hf import Conversation

PICTURES = tiny.pictures(3)
QUESTIONS = ["What is the colour of the small square?", "Is the cat on the left?", "How many red circles are there?"]
SETTINGS = {
    "paper": {},
    "budget": {"budget": 24, "merged_tokens": 4},
    "original": {"budget": 0.25, "coverage_share": 0.25, "text_relevance": "value", "position_ids": "original"},
    "off": {"enabled": False},
}
TEMPLATES = {
    "vicuna": tiny.VICUNA_TEMPLATE,
    # The template writes the start token, an end token after an answer, and answers in capitals, unlike the model.
    "spelled": "<s>{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}{{ part['text'] | upper }}</s>"
    "{% else %}{{ part['text'] }}\n{% endif %}{% endfor %}{% endfor %}assistant:",
}
REWRITES = "{{ messages | length }} " + tiny.VICUNA_TEMPLATE
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
each_mode = pytest.mark.parametrize("mode", ["rebuild", "append", "keep"])


class Listener(BaseStreamer):
    """A streamer that collects the ids it receives."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


class Reader:
    """Embeddings and positions of every call of the language model."""

    def __init__(self, model):
        self.embeds, self.positions = [], []
        self.hook = model.model.language_model.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, module, args, kwargs):
        self.embeds.append(kwargs["inputs_embeds"][0])
        self.positions.append(kwargs["position_ids"].flatten().tolist())

    @property
    def read(self):
        return [len(positions) for positions in self.positions]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def start(architecture, mode, setting=None, template="vicuna", **arguments):
    processor = architecture.processor(chat_template=TEMPLATES.get(template, template))
    return Conversation(architecture.compressed(), processor, mode, setting, **arguments)


def ask(conversation, question, images=None, new_tokens=4, **options):
    """Ids of the whole conversation after a question."""
    listener = Listener()
    options = {"do_sample": False, "max_new_tokens": new_tokens, **options}
    conversation.ask(question, images, streamer=listener, **options)
    assert listener.ended
    return listener.ids


def messages_of(conversation, question, pictures):
    """The conversation as chat messages with its pictures; `pictures` per turn."""
    turns = [*((turn.question, turn.answer) for turn in conversation.turns), (question, None)]
    messages = []
    for (text, answer), images in zip(turns, pictures, strict=False):
        messages.append(tiny.turn("user", text, images))
        messages += [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return messages


def encode(conversation, question, pictures, **options):
    return conversation.processor.apply_chat_template(
        messages_of(conversation, question, pictures),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def single_call(model, inputs, new_tokens=4, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, **options)[0].tolist()
