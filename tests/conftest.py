"""Every test runs offline: hub clients are told so, and a connection that leaves the machine's own sockets raises."""

import os
import socket

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that is not a local AF_UNIX socket."""

    def guarded(original: str):
        connect = getattr(socket.socket, original)

        def call(self: socket.socket, address: object) -> object:
            if self.family != getattr(socket, "AF_UNIX", None):
                raise RuntimeError(f"tests must not use the network; got a connection to {address!r}")
            return connect(self, address)

        return call

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
