"""The published checkpoints' configs build the models that were published."""

import pytest

from reccomp_hf.measure.cost import parameter_counts
from reccomp_hf.measure.published import FULL_SIZE, full_size

# Parameters of the stock checkpoints in billions, as their repositories on the Hub show them.
PUBLISHED = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-v1.6-vicuna-7b": 7.06,
    "llava-v1.6-vicuna-13b": 13.35,
    "llava-v1.6-mistral-7b": 7.57,
    "llama3-llava-next-8b": 8.36,
    "llava-v1.6-34b": 34.75,
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_config_is_of_the_published_size(name):  # test_cost.py counts the parameters of the models themselves
    config = FULL_SIZE[name].config(visual_only=True)
    assert parameter_counts(config)["total"] / 1e9 == pytest.approx(PUBLISHED[name], abs=0.01)
    assert config.text_config.vocab_size % 64 == 0
    assert config.image_token_index < config.text_config.vocab_size


def test_the_text_encoder_is_clips():
    # openai/clip-vit-large-patch14-336 has 427.9 M parameters, the temperature among them.
    counts = parameter_counts(FULL_SIZE["llava-1.5-7b"].config())
    assert counts["vision_tower"] + counts["token_recovery"] + 1 == 427_944_193


def test_the_preset_and_its_fields_arrive():
    config = FULL_SIZE["llava-v1.6-mistral-7b"].config("balanced", budget=160)
    assert (config.model_type, config.token_recovery.budget) == ("llava_next_reccomp", 160)
    assert config.token_recovery.text_relevance == "value"
    assert config.token_recovery.text_encoder_config["max_position_embeddings"] == 77
    assert (config.text_config.model_type, config.text_config.num_key_value_heads) == ("mistral", 8)
    assert len(config.image_grid_pinpoints) == 5
    assert FULL_SIZE["llava-1.5-7b"].config().token_recovery.budget is None


def test_configs_do_not_share_what_can_be_changed():
    entry = FULL_SIZE["llava-1.5-7b"]
    entry.config().token_recovery.text_encoder_config["hidden_size"] = 1
    assert entry.config().token_recovery.text_encoder_config["hidden_size"] == 768


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match=r"Unknown configuration 'llava-2'; known ones are llava-1\.5-7b"):
        full_size("llava-2")
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        FULL_SIZE["llava-1.5-7b"].config(budgt=1)
