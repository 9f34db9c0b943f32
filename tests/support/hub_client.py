"""Pointing the installed Hub client at another server."""

import contextlib
import importlib
import os
import time
import types
from pathlib import Path

from huggingface_hub import hf_api
from huggingface_hub.utils import _http

import reccomp_hf

# Imported here, so that no test is the first to import them and leaves them with that test's settings.
MODULES = (
    "huggingface_hub.constants",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
    "transformers.dynamic_module_utils",
    "transformers.pipelines",
    "transformers.utils",
    "transformers.utils.hub",
)
SLEEPERS = ("huggingface_hub.file_download", "huggingface_hub.utils._http")


def point_at(monkeypatch, url, home, token="hf_me", offline=False):
    """As if the process had started with `environment(...)`: these settings are read when the modules are imported."""
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HUGGINGFACE_CO_RESOLVE_ENDPOINT": url,
        "HF_HOME": str(home),
        **dict.fromkeys(("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"), str(home / "hub")),
        "default_cache_path": str(home / "hub"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": offline,
        "_is_offline_mode": offline,
        "_hf_api": None,  # transformers 5 makes one of the settings and keeps it
    }
    for module in map(importlib.import_module, MODULES):
        for name in settings.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, settings[name])
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    no_waiting = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in map(importlib.import_module, SLEEPERS):
        monkeypatch.setattr(module, "time", no_waiting)
    forget_connections()


def forget_connections():
    """Drop the client's open connections: one made for an offline client refuses for ever on 0.36."""
    (_http.close_session if hasattr(_http, "close_session") else _http.reset_sessions)()


def environment(url, home, token="hf_me", **more):
    """The environment of a process that takes `url` for the Hub and keeps its cache in `home`."""
    package = str(Path(reccomp_hf.__file__).parents[1])
    ours = ("HF_", "TRANSFORMERS_", "HUGGING")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    return {**kept, **settings, **quiet, **more}


@contextlib.contextmanager
def offline(monkeypatch):
    """As if the process had started with HF_HUB_OFFLINE=1."""
    with monkeypatch.context() as patch:
        for name, module in (("HF_HUB_OFFLINE", "huggingface_hub.constants"), ("_is_offline_mode", MODULES[-1])):
            patch.setattr(importlib.import_module(module), name, True, raising=False)
        forget_connections()
        yield
    forget_connections()
