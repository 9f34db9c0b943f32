"""Visual tokens of an image, and those that it becomes."""

import pytest

from reccomp_hf.core.configuration import TokenRecoveryConfig
from reccomp_hf.core.counting import PICTURE, compressed_tokens, fixed_tokens, picture_tokens
from reccomp_hf.measure.published import FULL_SIZE

SEVEN = FULL_SIZE["llava-1.5-7b"].config("paper")


@pytest.mark.parametrize(
    ("picture", "tokens"),  # as the README's table has them, from stock LLaVA-NeXT
    [
        ((336, 336), (3, 1152, 24)),
        ((640, 480), (5, 2304, 36)),
        ((480, 640), (5, 2304, 48)),
        ((1000, 300), (4, 2160, 22)),
        ((300, 1000), (4, 2160, 72)),
        ((1920, 1080), (5, 1920, 28)),
    ],
)
def test_tokens_of_a_picture(picture, tokens):
    assert picture_tokens(FULL_SIZE["llava-v1.6-mistral-7b"].config(), picture) == tokens
    assert picture_tokens(SEVEN, picture) == (1, 576, 0)


def test_the_default_picture_is_640_by_480():
    config = FULL_SIZE["llava-v1.6-mistral-7b"].config()
    assert PICTURE == (640, 480)
    assert picture_tokens(config) == picture_tokens(config, (640, 480))


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"enabled": False}, 576),
        ({"budget": 64}, 64),
        ({"budget": 0.25}, 144),
        ({"budget": 1e-9}, 1),
        ({"method": "pooling_3x3"}, 64),
        ({}, 56),
        ({"method": "authors"}, 56),
    ],
)
def test_what_a_section_comes_to(fields, count):
    assert compressed_tokens(SEVEN, TokenRecoveryConfig(**fields)) == count
    assert fixed_tokens(SEVEN, TokenRecoveryConfig(**fields)) == (count if count != 56 else None)
