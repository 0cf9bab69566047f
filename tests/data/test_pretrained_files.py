"""Pretrained models by their names: a server with the layout of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlearn.data.pretrained_files import find_pretrained
from fedlearn.errors import DataError

pytest.importorskip("huggingface_hub")
COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve the model ``me/bert`` as the Hub does; return its folder and the function that stops the server."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_bert.py").write_text("raise SystemExit")
    save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.respond(has_body=True)

        def do_HEAD(self):
            self.respond(has_body=False)

        def log_message(self, *args):
            """Keep the output of the test free of requests."""

        def respond(self, *, has_body):
            path, files = self.path.partition("?")[0], sorted(file.name for file in folder.iterdir())
            name = path.rsplit("/", 1)[1]
            status, headers, content = 200, {"X-Repo-Commit": COMMIT}, b""
            if path.startswith("/api/models/me/bert"):
                listed = [
                    {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "b" * 40} for f in files
                ]
                siblings = {"id": "me/bert", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                content = json.dumps(listed if "/tree/" in path else siblings).encode()
            elif path.startswith("/me/bert/resolve/") and name in files:
                content = (folder / name).read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            else:
                status, headers = 404, {"X-Error-Code": "RepoNotFound"}
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if has_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "cache"))

    def stop():
        server.shutdown()
        server.server_close()

    yield folder, stop
    stop()


def test_a_model_of_the_hub_comes_without_pickle_and_code_and_stays_in_the_cache(hub):
    folder, stop = hub
    found = find_pretrained("me/bert")
    assert sorted(file.name for file in found.folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert found.digest == find_pretrained(str(folder)).digest
    stop()
    assert find_pretrained("me/bert") == found


def test_an_unknown_name_and_a_machine_without_the_hub_say_what_to_do(hub):
    _, stop = hub
    advice = r"model\.path is me/other: no folder of this machine(.|\n)*advice    copy the folder of the model"
    with pytest.raises(DataError, match=advice):
        find_pretrained("me/other")
    stop()
    with pytest.raises(DataError, match=advice):
        find_pretrained("me/other")


@pytest.mark.parametrize("path", ["/nowhere/bert", "./bert", "../bert", "a/b/c", "owner/../etc", "-bert", "a b"])
def test_a_path_that_is_neither_a_folder_nor_a_name_is_never_asked_for(path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"no such folder"):
        find_pretrained(path)
