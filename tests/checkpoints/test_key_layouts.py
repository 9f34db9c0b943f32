"""The published LLaVAs at their full size, without a weight: every key of theirs has its place in our models.

The layout is written down by hand, as the index files of the llava-hf repositories list it, and goes through the
loading of the running transformers, on the meta device.
"""

import dataclasses

import pytest
import torch
import transformers

import reccomp_hf
from reccomp_hf.measure.published import FULL_SIZE, TEXT_ENCODER, VISION

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Text:
    """The sizes of a published language model, and the parameters of the whole in billions."""

    layers: int
    width: int
    inner: int
    key_width: int
    vocabulary: int
    billions: float
    tiled: bool = True
    biases: bool = False  # of queries, keys and values, as Qwen's have


PUBLISHED = {
    "llava-1.5-7b": Text(32, 4096, 11008, 4096, 32064, 7.06, tiled=False),
    "llava-1.5-13b": Text(40, 5120, 13824, 5120, 32064, 13.35, tiled=False),
    "llava-v1.6-vicuna-7b": Text(32, 4096, 11008, 4096, 32064, 7.06),
    "llava-v1.6-vicuna-13b": Text(40, 5120, 13824, 5120, 32064, 13.35),
    "llava-v1.6-mistral-7b": Text(32, 4096, 14336, 1024, 32064, 7.57),
    "llama3-llava-next-8b": Text(32, 4096, 14336, 1024, 128320, 8.36),
    "llava-v1.6-34b": Text(60, 7168, 20480, 1024, 64064, 34.75),
}
QWEN = Text(80, 8192, 24576, 8192, 152064, 72.7, biases=True)  # the shape of Qwen1.5-72B under a LLaVA-NeXT


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def clip_layers(prefix: str, layers: int, width: int) -> Shapes:
    """The transformer blocks of either side of a CLIP."""
    shapes: Shapes = {}
    for block in (f"{prefix}.{layer}" for layer in range(layers)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{name}", width, width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
        shapes |= norm(f"{block}.layer_norm1", width) | norm(f"{block}.layer_norm2", width)
    return shapes


def vision_tower() -> Shapes:
    """CLIP ViT-L/14 for 336 pixels."""
    prefix = "vision_tower.vision_model"
    return {
        f"{prefix}.embeddings.class_embedding": (1024,),
        f"{prefix}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{prefix}.embeddings.position_embedding.weight": (577, 1024),
        **norm(f"{prefix}.pre_layrnorm", 1024),
        **clip_layers(f"{prefix}.encoder.layers", 24, 1024),
        **norm(f"{prefix}.post_layernorm", 1024),
    }


def language_model(text: Text) -> Shapes:
    """A Llama, or a model of the same layout."""
    prefix, width = "language_model.model", text.width
    shapes: Shapes = {f"{prefix}.embed_tokens.weight": (text.vocabulary, width), f"{prefix}.norm.weight": (width,)}
    shapes["language_model.lm_head.weight"] = (text.vocabulary, width)
    rows = {"q_proj": width, "k_proj": text.key_width, "v_proj": text.key_width}
    for block in (f"{prefix}.layers.{layer}" for layer in range(text.layers)):
        shapes |= {f"{block}.self_attn.{name}.weight": (size, width) for name, size in rows.items()}
        shapes |= {f"{block}.self_attn.{name}.bias": (size,) for name, size in rows.items() if text.biases}
        shapes |= {f"{block}.self_attn.o_proj.weight": (width, width)}
        shapes |= {f"{block}.mlp.{name}.weight": (text.inner, width) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{block}.mlp.down_proj.weight": (width, text.inner)}
        shapes |= {f"{block}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def published(text: Text) -> Shapes:
    """All keys of a stock checkpoint, as its index lists them, with their shapes."""
    projector = linear("multi_modal_projector.linear_1", text.width, 1024)
    projector |= linear("multi_modal_projector.linear_2", text.width, text.width)
    newline: Shapes = {"image_newline": (text.width,)} if text.tiled else {}
    return {**vision_tower(), **projector, **newline, **language_model(text)}


def text_side() -> Shapes:
    """What our checkpoints add: the text side of CLIP ViT-L/14-336, under CLIP's own names."""
    encoder = "token_recovery.text_encoder"
    return {
        f"{encoder}.text_model.embeddings.token_embedding.weight": (49408, 768),
        f"{encoder}.text_model.embeddings.position_embedding.weight": (77, 768),
        **clip_layers(f"{encoder}.text_model.encoder.layers", 12, 768),
        **norm(f"{encoder}.text_model.final_layer_norm", 768),
        f"{encoder}.text_projection.weight": (768, 768),
        "token_recovery.visual_projection.weight": (768, 1024),
    }


def qwen_config():
    text = {"model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 24576, "num_hidden_layers": 80}
    text |= {"num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 152064}
    section = {"text_encoder_config": dict(TEXT_ENCODER)}
    return reccomp_hf.LlavaNextRecCompConfig(
        vision_config=dict(VISION), text_config=text, token_recovery=section, tie_word_embeddings=False
    )


def class_for(text: Text, owner=reccomp_hf, infix="RecComp"):
    return getattr(owner, f"Llava{'Next' if text.tiled else ''}{infix}ForConditionalGeneration")


def load(model_class, config, shapes: Shapes):
    """Give a class a checkpoint of these keys and shapes as `from_pretrained` would read it; no memory is used."""
    weights = {name: torch.empty(shape, device="meta", dtype=torch.float16) for name, shape in shapes.items()}
    return model_class.from_pretrained(
        None, config=config, state_dict=weights, device_map="meta", output_loading_info=True
    )


def test_every_published_model_is_here():
    assert PUBLISHED.keys() == FULL_SIZE.keys()


@pytest.mark.parametrize("name", [*PUBLISHED, "qwen"])
def test_every_published_key_has_its_place(name):
    text = PUBLISHED.get(name, QWEN)
    config = FULL_SIZE[name].config() if name in FULL_SIZE else qwen_config()
    stock, added = published(text), text_side()
    model, info = load(class_for(text), config, stock | added)
    assert not any(info.values()), info
    weights = model.state_dict()
    assert len(weights) == len(stock) + len(added)
    assert {name for name in weights if name.startswith("token_recovery.")} == added.keys()
    assert sum(value.numel() for value in weights.values()) == sum(map(numel, (stock | added).values()))
    assert sum(map(numel, stock.values())) / 1e9 == pytest.approx(text.billions, abs=0.006 if name != "qwen" else 0.5)
    assert weights["lm_head.weight"].shape == (text.vocabulary, text.width)
    assert {value.device.type for value in weights.values()} == {"meta"}


def numel(shape):
    return torch.Size(shape).numel()


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-v1.6-mistral-7b"])
def test_the_layout_is_the_one_that_the_stock_class_reads(name):
    """The list above is what transformers itself takes for a whole checkpoint, and needs no text encoder with us."""
    text, fields = PUBLISHED[name], FULL_SIZE[name].config(visual_only=True).to_dict()
    stock_class = class_for(text, transformers, "")
    config = stock_class.config_class.from_dict({**fields, "model_type": stock_class.config_class.model_type})
    model, info = load(stock_class, config, published(text))
    assert not any(info.values()), info
    ours, info = load(class_for(text), FULL_SIZE[name].config(visual_only=True), published(text))
    assert not any(info.values()), info
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == wanted


@pytest.mark.parametrize("lost", ["language_model.lm_head.weight", "token_recovery.visual_projection.weight"])
def test_a_key_that_is_not_there_is_noticed(lost):
    text, config = PUBLISHED["llava-1.5-7b"], FULL_SIZE["llava-1.5-7b"].config()
    shapes = published(text) | text_side()
    shapes["surplus.weight"] = shapes.pop(lost)
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlavaRecCompForConditionalGeneration"):
        load(class_for(text), config, shapes)
