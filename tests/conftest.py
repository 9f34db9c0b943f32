"""Every test runs offline: hub clients are set offline, and a connection that leaves the machine's own sockets raises.

The one exception is the `hub` fixture, a server in the test's own process.
"""

import gc
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # tests look at them

import hypothesis
import pytest

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine must not fail a test
hypothesis.settings.load_profile("suite")

OPEN_PORTS: set[int] = set()
"""Ports of 127.0.0.1 on which a server of this process listens."""

EXPERIMENTS = Path(__file__).parent / "experiments"


class SkippedModule(pytest.Module):
    """A module of tests of code that is not installed."""

    def collect(self) -> Iterator[Any]:
        """Report the module as skipped, without importing it."""
        reason = "reccomp_hf.experiments is not in the wheel; it needs an editable install of the checkout"
        raise pytest.skip.Exception(reason, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip tests/experiments where the installed package has no experiments."""
    if EXPERIMENTS in module_path.parents and not importlib.util.find_spec("reccomp_hf.experiments"):
        return SkippedModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare every test work that grows with what was imported.

    Pytest attaches its handlers to each logger that does not propagate, three times a test, and torch has about eighty
    of them. The garbage collector would look at all imported modules again and again. Transformers writes each config
    that it reads as text, for a line of its log that is not shown.
    """
    import torch  # not above: the process that hands tests out to others does not need it
    import transformers

    torch.set_num_threads(1)
    transformers.PretrainedConfig.__repr__ = object.__repr__
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
            logger.propagate = True
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # after the module's fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Spare later modules the same for what this one imported and left, dynamo's records above all."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that is neither a local AF_UNIX socket nor the `hub` fixture's."""

    def guarded(original: str):
        connect = getattr(socket.socket, original)

        def call(self: socket.socket, address: Any) -> object:
            ours = self.family == socket.AF_INET and address[0] == "127.0.0.1" and address[1] in OPEN_PORTS
            if not ours and self.family != getattr(socket, "AF_UNIX", None):
                raise RuntimeError(f"tests must not use the network; got a connection to {address!r}")
            return connect(self, address)

        return call

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))


@pytest.fixture(autouse=True)
def no_threads_are_left_over() -> Iterator[None]:
    """Threads that a command was given would make all later tests slower, which run on all cores already."""
    yield
    sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def no_precision_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 4.57 asks accelerate for bfloat16 by an environment variable, which would outlive a test."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub of our own that the client takes for the real one, with an empty cache, logged in as "me"."""
    import fake_hub
    import hub_client

    with fake_hub.FakeHub() as server:
        OPEN_PORTS.add(server.port)
        hub_client.point_at(monkeypatch, server.url, tmp_path / "hf-home")
        yield server
        hub_client.forget_connections()
        OPEN_PORTS.discard(server.port)
    assert not server.mistakes, server.mistakes[0]
