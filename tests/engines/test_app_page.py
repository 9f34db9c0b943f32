"""The page of `reccomp-hf app` over HTTP, without a browser; it needs Gradio, see .ci/run."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import conftest
import pytest
import yaml
from app_pages import served
from demo_model import demo_model
from paths import INSTALLED

from reccomp_hf.demo import checkpoint_folder
from reccomp_hf.engines.app.running import open_page
from reccomp_hf.engines.app.space import requirements, write_space
from reccomp_hf.engines.app.talks import Talks

pytest_plugins = ("command_line",)
pytestmark = [
    pytest.mark.skipif(
        find_spec("gradio") is None, reason="gradio is not installed; .ci/run installs it for these tests"
    ),
    # Starlette's and Gradio's own words about each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def port():
    """The port of a page that runs in this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    conftest.OPEN_PORTS.add(number)
    with open_page(Talks(*demo_model(), max_new_tokens=8), "demo", port=number) as (_, url):
        assert url == f"http://127.0.0.1:{number}"
        yield number
    conftest.OPEN_PORTS.discard(number)


def get(port, path, method="GET", body=None, **headers):
    """Status, headers and text of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method, path, None if body is None else json.dumps(body), given)
    response = connection.getresponse()
    found = response.status, dict(response.headers), response.read().decode("utf-8", "replace")
    connection.close()
    return found


def test_the_page_fetches_nothing_from_elsewhere(port):
    status, headers, text = get(port, "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    loaded = re.findall(r"""<(?:script|link)[^>]*(?:src|href)=["']([^"']+)""", text)
    assert loaded and [one for one in loaded if "://" in one and "127.0.0.1" not in one] == []
    assert "fonts.googleapis" not in get(port, "/theme.css")[2]
    config = json.loads(get(port, "/config")[2])
    assert (config["analytics_enabled"], config["footer_links"]) == (False, [])


def test_files_of_the_machine_are_not_read(port):
    model = checkpoint_folder("demo") / "config.json"
    for name in (
        "/etc/passwd",
        "/../../../../etc/passwd",
        str(model),
        "../../../etc/passwd",
        os.path.abspath(__file__),
    ):
        for path in (
            f"/gradio_api/file={name}",
            f"/file={name}",
            f"/gradio_api/file/{name}",
            f"/assets/{name}",
            f"/static/{name}",
        ):
            status, _, text = get(port, path)
            assert status in (403, 404) and "root:" not in text and "token_recovery" not in text, path
    file = {"path": str(model), "meta": {"_type": "gradio.FileData"}}
    status, _, text = get(port, "/gradio_api/queue/join", "POST", {"data": [file], "fn_index": 0, "session_hash": "x"})
    assert (status, text) == (403, "A request may name only pictures that were uploaded.")


@pytest.mark.parametrize(
    "path", ["/gradio_api/run/answer", "/gradio_api/info", "/monitoring/summary", "/docs", "/config/"]
)
def test_gradios_other_routes_are_closed(port, path):
    assert get(port, path)[0] == 404


def test_other_sites_are_refused(port):
    assert get(port, "/", Host="evil.example")[0] == 403
    assert get(port, "/config", Origin="https://evil.example")[0] == 403


def test_starting_sends_nothing(tmp_path):
    source = """
import socket, sys
sent = []
connect = socket.socket.connect
def noted(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        sent.append(address)
    return connect(self, address)
socket.socket.connect = noted
asked = socket.getaddrinfo
def resolved(host, *rest, **more):
    if host not in ("127.0.0.1", "localhost", None):
        sent.append(host)
    return asked(host, *rest, **more)
socket.getaddrinfo = resolved
from reccomp_hf.checkpoints.loading import load
from reccomp_hf.engines.app.running import open_page
from reccomp_hf.engines.app.talks import Talks
import time
with open_page(Talks(*load("demo", {}, "cpu"), max_new_tokens=4), "demo", port=0) as (page, url):
    time.sleep(2)
    print(url.startswith("http://127.0.0.1:"), page.share, page.share_url, sent)
"""
    variables = {
        "PYTHONPATH": str(INSTALLED),
        "HF_HUB_OFFLINE": "0",
        "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_SHARE": "True",
    }
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["True False None []"], done.stderr


def test_pictures_are_deleted_when_the_page_ends(tmp_path, monkeypatch):
    with served("demo", folder=tmp_path, TMPDIR=str(tmp_path)) as url:
        port = int(url.rpartition(":")[2])
        monkeypatch.setattr(conftest, "OPEN_PORTS", {port})
        boundary = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\npicture\r\n--x--\r\n'
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/gradio_api/upload", boundary, {"Content-Type": "multipart/form-data; boundary=x"})
        (path,) = json.loads(connection.getresponse().read())
        connection.close()
        assert Path(path).read_text() == "picture" and Path(path).is_relative_to(tmp_path)
        assert get(port, f"/gradio_api/file={path}")[2] == "picture"
    assert list(tmp_path.glob("reccomp-app-*")) == []


def test_a_port_in_use_is_one_sentence(port, error):
    assert error("app", "demo", "--port", port) == (
        f"Cannot listen: port {port} of 127.0.0.1 is in use: choose another --port, or 0 for a free one."
    )
    assert error("app", "demo", "--port", "70000").startswith("--port must be from 0 (a free one) to 65535")
    assert error("app", "./nowhere", "--port", "0") == "./nowhere does not exist."
    assert error("app", "demo", "--port", "0", "--package", "x").startswith("--package belongs to --space DIR")


# ---- a Space -------------------------------------------------------------------------------------------------------


def test_a_space_is_complete(run, tmp_path):
    code, out, err = run("app", "demo", "--space", tmp_path / "space")
    assert (code, err) == (0, "") and f"Next: reccomp-hf push {tmp_path / 'space'} OWNER/NAME --space" in out
    space = tmp_path / "space"
    card = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (card["sdk"], card["sdk_version"], card["app_file"]) == ("gradio", version("gradio"), "app.py")
    assert card["license"] == "apache-2.0" and "models" not in card and len(card["short_description"]) <= 60
    pins = (space / "requirements.txt").read_text().splitlines()
    assert f"gradio=={version('gradio')}" in pins and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {pin.partition("==")[0] for pin in pins} >= {"torch", "transformers", "pillow", "gradio"}
    copied = {path.relative_to(space / "reccomp_hf").parts[0] for path in (space / "reccomp_hf").rglob("*.py")}
    assert {"core", "engines", "cli"} <= copied and "experiments" not in copied
    assert (space / "reccomp_hf/demo/checkpoints/demo/config.json").is_file()
    assert not (space / "reccomp_hf/demo/checkpoints/demo-global").exists()
    source = "import app, reccomp_hf; print(reccomp_hf.__file__)"
    done = subprocess.run([sys.executable, "-c", source], cwd=space, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(space / "reccomp_hf" / "__init__.py"), done.stderr


def test_a_space_of_a_hub_model_with_an_installed_package(tmp_path):
    line = "reccomp_hf[app] @ git+https://example.com/reccomp_hf"
    assert write_space(tmp_path / "space", "me/llava", line) == ["app.py", "requirements.txt", "README.md"]
    card = yaml.safe_load((tmp_path / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert card["models"] == ["me/llava"]
    assert (tmp_path / "space" / "requirements.txt").read_text().splitlines()[-1] == line == requirements(line)[-1]
    assert "'me/llava'" in (tmp_path / "space" / "app.py").read_text()


def test_spaces_that_could_not_run_are_refused(tmp_path, error):
    folder = checkpoint_folder("demo")
    assert f"push it with `reccomp-hf push {folder} OWNER/NAME`" in error("app", folder, "--space", tmp_path / "space")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "exists and is not an empty folder" in error("app", "demo", "--space", tmp_path / "full")
    assert "HF_HUB_OFFLINE is set" in error("app", "me/no-such-model", "--space", tmp_path / "space")
    assert not (tmp_path / "space").exists()
