"""Settings of the whole process, which threads leave in another order than they came."""

import pytest
from transformers.utils import logging

from reccomp_hf.checkpoints.quiet import quiet
from reccomp_hf.data.tables import _reading


@pytest.fixture
def as_before():
    """The level of transformers' log, and its progress bars, as they were."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def test_the_last_thread_restores_what_the_first_found(as_before):
    logging.set_verbosity(logging.INFO)
    logging.enable_progress_bar()
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()


def test_bars_that_one_thread_shows_stay_hidden_for_the_other(as_before):
    logging.enable_progress_bar()
    with quiet(progress_bars=True):
        assert logging.is_progress_bar_enabled()
        with quiet():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled()


def test_an_error_restores_them_too(as_before):
    logging.set_verbosity(logging.INFO)
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert logging.get_verbosity() == logging.INFO


def test_readers_of_tables_share_the_level_of_their_log(tmp_path):
    datasets = pytest.importorskip("datasets")
    before = datasets.logging.get_verbosity()
    first, second = _reading(tmp_path, "A file"), _reading(tmp_path, "A file")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert datasets.logging.get_verbosity() == datasets.logging.CRITICAL
    second.__exit__(None, None, None)
    assert datasets.logging.get_verbosity() == before
