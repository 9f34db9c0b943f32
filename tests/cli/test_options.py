"""The options that commands share: values, defaults, and lists that stand in for modules which import torch."""

import argparse
import inspect

import pytest

from reccomp_hf import demo
from reccomp_hf.checkpoints import loading
from reccomp_hf.checkpoints.conversion import shards
from reccomp_hf.cli import choices, options
from reccomp_hf.core import counting
from reccomp_hf.engines.server import answering
from reccomp_hf.engines.vllm import throughput
from reccomp_hf.measure import benchmark, cost, evaluation, published

# ---- lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "original"),
    [
        (choices.CHECKPOINTS, demo.CHECKPOINTS),
        (choices.DTYPES, loading.DTYPES),
        (choices.DTYPES, shards.DTYPES),
        (choices.PUBLISHED, published.FULL_SIZE),
        (choices.COST_DTYPES, cost.DTYPES),
        (choices.COST_IMAGE_SIZE, counting.PICTURE),
        (choices.HARDWARE, cost.HARDWARE),
        (choices.BENCH_CONFIGS, benchmark.CONFIGS),
        (choices.BENCH_BATCH_SIZES, benchmark.BATCH_SIZES),
        (choices.BENCH_BUDGETS, benchmark.BUDGETS),
        (
            (choices.SERVE_BATCH_SIZE, choices.SERVE_WAITING, choices.SERVE_SECONDS),
            (answering.BATCH_SIZE, answering.WAITING, answering.SECONDS),
        ),
        (
            (choices.THROUGHPUT_CLIENTS, choices.THROUGHPUT_NEW_TOKENS, choices.THROUGHPUT_ROUNDS),
            (throughput.CLIENTS, throughput.NEW_TOKENS, throughput.ROUNDS),
        ),
        (
            choices.EVAL_METHODS,
            [name for name, fields in evaluation.named_settings().items() if "method" in fields and name != "pool"],
        ),
    ],
)
def test_a_list_equals_its_original(listed, original):
    assert list(listed) == list(original)


def test_a_default_equals_its_original():
    compare = inspect.signature(benchmark.compare).parameters
    assert compare["new_tokens"].default == choices.BENCH_NEW_TOKENS
    assert compare["rounds"].default == choices.BENCH_ROUNDS
    assert choices.DYNAMIC == benchmark.DYNAMIC
    assert choices.EVAL_BATCH_SIZE == evaluation.DEFAULT_BATCH_SIZE
    assert choices.EVAL_SETTINGS == evaluation.DEFAULT_SETTINGS


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("budget=64", ("budget", 64)),
        ("budget=0.5", ("budget", 0.5)),
        ("budget=null", ("budget", None)),
        ("enabled=false", ("enabled", False)),
        ("text_relevance=value", ("text_relevance", "value")),
        ('text_relevance="last"', ("text_relevance", "last")),
        ("method=a=b", ("method", "a=b")),
    ],
)
def test_set_takes_json_or_a_word(text, pair):
    assert options.setting(text) == pair


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("0.5", 0.5), (".5", 0.5), ("1", 1), ("dynamic", None)])
def test_a_budget_is_a_number_a_share_or_dynamic(text, value):
    budget = options.budget(text)
    assert (budget, type(budget)) == (value, type(value))


def test_lists_of_budgets_and_counts():
    assert options.budgets("dynamic,64,0.1,64") == ("dynamic", 64, 0.1)
    assert options.counts("4,1,4") == (4, 1)


@pytest.mark.parametrize("text", ["a.example", "localhost", "A-1.example", "127.0.0.1", "::1"])
def test_a_host_is_a_name_or_an_address(text):
    assert options.host_name(text) == text
    assert options.host_name("[::1]") == "::1"


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (options.setting, "budget", "expected field=value, got 'budget'"),
        (options.setting, "=1", "expected field=value"),
        (options.budget, "few", "a share of them or 'dynamic', got 'few'"),
        (options.budgets, "64,few", "expected tokens, shares or dynamic, .*got '64,few'"),
        (options.count, "0", "at least 1, got '0'"),
        (options.count, "1.5", "at least 1, got '1.5'"),
        (options.counts, "1,0", "as in 1,4,16, got '1,0'"),
        (
            options.host_name,
            "http://a.example",
            "without scheme, port or path, got 'http://a.example'",
        ),
        (options.host_name, "a.example:80", "got 'a.example:80'"),
        (options.host_name, "*.example", r"got '\*.example'"),
        (options.host_name, "", "got ''"),
        (options.image_size, "640", "width x height as in 640x480, got '640'"),
        (options.image_size, "0x480", "got '0x480'"),
    ],
)
def test_a_bad_value_is_named(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)


# ---- declaring -----------------------------------------------------------------------------------------------------


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    return parser.parse_args(arguments)


def test_only_options_that_are_given_replace_fields():
    assert options.section_fields(parsed()) == {}
    assert options.section_fields(parsed("--budget", "dynamic")) == {"budget": None}
    assert options.section_fields(parsed("--budget", "8", "--set", "budget=9")) == {"budget": 9}
    fields = options.section_fields(parsed("--preset", "balanced", "--budget", "0.5"))
    assert fields == {**options.preset_fields("balanced"), "budget": 0.5}
    assert "text_encoder_config" not in fields and fields["text_limit"] == "half_or_few"


def test_the_help_ends_with_defaults_worth_printing():
    parser = argparse.ArgumentParser(formatter_class=options.HelpFormatter)
    parser.add_argument("--count", default=0, help="a count")
    parser.add_argument("--none", help="no default")
    parser.add_argument("--flag", action="store_true", help="a flag")
    options.add_budget(parser, "a budget")
    options.add_settings(parser, "a field")
    lines = [line.strip() for line in parser.format_help().splitlines() if "  --" in line]
    lines = {line.split()[0]: line.split("  ")[-1].strip() for line in lines}
    assert lines["--count"] == "a count (default: 0)"
    assert (lines["--none"], lines["--flag"]) == ("no default", "a flag")
    assert "default" not in parser.format_help().replace("(default: 0)", "").replace("no default", "")
