"""`use_cuda_graph` and `--cuda-graph` serve every way to run a model, shown with the recorder for CPUs."""

import copy
import json

import demo_model
import pytest
import torch
from predictions import read_lines, save_pictures, write_lines
from safetensors.torch import load_file
from tape import TapeRecorder
from transformers import pipeline

import reccomp_hf
from reccomp_hf.core import graphs
from reccomp_hf.demo import draw_scene

pytest_plugins = ("command_line",)

QUESTIONS = ["What letter is on the cyan sign?", "What letter is on the red sign?"]


@pytest.fixture
def recorders(monkeypatch):
    """The recorders that `use_cuda_graph` makes."""
    made = []

    class Noted(TapeRecorder):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(graphs, "CudaRecorder", Noted)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_lines(folder / "data.jsonl", save_pictures(folder, 4))


def pictures():
    return [draw_scene(1_000_000 + number).image for number in range(2)]


def ask_conversation(model, processor):
    conversation = reccomp_hf.Conversation(model, processor)
    first = conversation.ask(QUESTIONS[0], pictures()[0], max_new_tokens=4)
    return [first, conversation.ask(QUESTIONS[1], max_new_tokens=4)]


def ask_pipeline(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture, question in zip(pictures(), QUESTIONS, strict=True)
    ]
    return [pipe(text=turn, max_new_tokens=4)[0]["generated_text"][-1]["content"] for turn in turns]


def embed(model, processor):
    found = reccomp_hf.embed_images(model, processor, pictures(), QUESTIONS)
    return [(one.embeds.round(decimals=4).tolist(), one.places.tolist()) for one in found]


@pytest.mark.parametrize("use", [ask_conversation, ask_pipeline, embed])
def test_one_line_serves_every_use(use, recorders):
    model, processor = demo_model.demo_model()
    model = copy.deepcopy(model)
    wanted = use(model, processor)
    model.use_cuda_graph()
    for _ in range(2):
        assert use(model, processor) == wanted
    (recorder,) = recorders
    assert 0 < recorder.recorded < recorder.replayed


def test_predict(run, data, recorders, tmp_path):
    outputs = [tmp_path / "eager.jsonl", tmp_path / "graphs.jsonl"]
    for output, options in zip(outputs, [(), ("--cuda-graph",)], strict=True):
        common = ("--model", "demo", "--device", "cpu", "--max-new-tokens", "3", "--batch-size", "2")
        assert run("predict", data, "--output", output, *common, *options)[0] == 0
    assert read_lines(outputs[0]) == read_lines(outputs[1])
    assert [recorder.replayed for recorder in recorders] == [4]  # two batches, each a front and a prefill


def test_eval(run, recorders, tmp_path):
    found = []
    for options in ((), ("--cuda-graph",)):
        file = tmp_path / f"{len(found)}.json"
        common = ("--settings", "off,balanced:0.1,paper", "--limit", "6", "--device", "cpu")
        assert run("eval", "demo", *common, "--json", file, *options)[0] == 0
        found.append(json.loads(file.read_text()))
    accuracies = [{name: facts["accuracy"] for name, facts in report["settings"].items()} for report in found]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 3
    assert sum(recorder.replayed for recorder in recorders) > 0


def test_embed(run, data, recorders, tmp_path):
    folders = [tmp_path / "eager", tmp_path / "graphs"]
    for folder, options in zip(folders, [(), ("--cuda-graph",)], strict=True):
        assert run("embed", "demo", data, folder, "--device", "cpu", *options)[0] == 0
    for file in sorted(folders[0].glob("*.safetensors")):
        tensors, others = load_file(file), load_file(folders[1] / file.name)
        torch.testing.assert_close(others["image_embeds"], tensors["image_embeds"])
    assert [recorder.recorded for recorder in recorders] == [1]


def test_serve(run, recorders, monkeypatch):
    loaded = []
    monkeypatch.setattr("reccomp_hf.engines.server.listening.Server.run", lambda self, sockets: None)
    monkeypatch.setattr(
        "reccomp_hf.engines.server.answering.Service.__init__",
        lambda self, name, model, *others, **limits: loaded.append(model),
    )
    monkeypatch.setattr("reccomp_hf.engines.server.app.build_app", lambda *arguments: None)
    monkeypatch.setattr("reccomp_hf.engines.server.listening.Server.__init__", lambda *arguments: None)
    for options in ((), ("--cuda-graph",)):
        assert run("serve", "demo", "--port", "0", "--device", "cpu", *options)[0] == 0
    assert [model._graphs is not None for model in loaded] == [False, True] and len(recorders) == 1
