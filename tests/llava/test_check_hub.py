"""`check` on hub names: config and headers come over the network, the weights do not. The hub is a server of ours."""

import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from published import write_checkpoint, write_sparse

from llava.assets import tiny_model_path
from llava.cli import main
from llava.model.hub import resolve_folder

NAME = "lmms-lab/llava-onevision-qwen2-7b-ov"
COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository `NAME`.

    Attributes:
        sent: bytes sent of each file.
        forbidden: how the names of files end that nobody may read.
        cache: where the client keeps what it downloads.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.cache = folder, cache
        self.sent: dict[str, int] = {}
        self.forbidden = ""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(file.name for file in self.server.folder.iterdir())
        resolved = re.fullmatch(f"/{NAME}/resolve/[^/]+/(.+)", path)
        if path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [{"type": "file", "path": name, "oid": name, "size": self.size(name)} for name in files]
            self.send(200, json.dumps(tree).encode(), with_body)
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in files]
            self.send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif resolved and self.server.forbidden and resolved[1].endswith(self.server.forbidden):
            self.send(403, b"", with_body)
        elif resolved and resolved[1] in files:
            self.send_file(resolved[1], with_body)
        else:
            code = "EntryNotFound" if resolved else "RepoNotFound"
            self.send(404, b"", with_body, {"X-Error-Code": code})

    def send_file(self, name: str, with_body: bool) -> None:
        start, end, status = 0, self.size(name) - 1, 200
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(wanted[1]), 206
            end = min(end, int(wanted[2] or end))
            headers["Content-Range"] = f"bytes {start}-{end}/{self.size(name)}"
        if with_body:
            self.server.sent[name] = self.server.sent.get(name, 0) + end - start + 1
            assert end - start < 20e6, f"all of {name} was asked for"
        with (self.server.folder / name).open("rb") as file:
            file.seek(start)
            self.send(status, file.read(end - start + 1) if with_body else b"", with_body, headers, end - start + 1)

    def send(self, status: int, body: bytes, with_body: bool, headers=None, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def size(self, name: str) -> int:
        return (self.server.folder / name).stat().st_size

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "repository", NAME, tiny_model_path())


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    server = Hub(folder, tmp_path / "cache")
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llava.model.hub.HfApi", partial(HfApi, address))
    monkeypatch.setattr(
        "llava.model.hub.snapshot_download", partial(snapshot_download, endpoint=address, cache_dir=server.cache)
    )
    yield server
    server.shutdown()
    server.server_close()


def check(capsys, name=NAME):
    status = main(["check", name])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_only_headers_of_the_weights_are_fetched(hub, capsys):
    status, output, errors = check(capsys)
    assert (status, errors) == (0, "")
    assert f"{NAME} would load." in output
    assert "4 files, 16.1 GB of bfloat16" in output
    weights = {name: sent for name, sent in hub.sent.items() if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert max(weights.values()) < 200_000
    assert not {"training_args.bin", "README.md"} & hub.sent.keys()


def test_what_is_wrong_on_the_hub_is_named(hub, folder, capsys):
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(b"\0" * 100)
    write_sparse(shards[3], {"lm_head.weight": (152064, 3583)})
    status, output, errors = check(capsys)
    assert (status, errors) == (2, "")
    problems = [line for line in output.splitlines() if line.startswith("- ")]
    assert len(problems) == 4
    assert f"{shards[0].name}, which is missing" in problems[0]
    assert f"{shards[1].name} of {NAME} on the hub is damaged" in problems[1]
    assert f"{NAME} lacks" in problems[2]
    assert "lm_head.weight is (152064, 3583) instead of (152064, 3584)" in problems[3]


def test_pickled_weights_are_not_downloaded(hub, folder, capsys):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert_one_error(check(capsys), "pickled weights (pytorch_model.bin)")
    assert "pytorch_model.bin" not in hub.sent


def test_a_name_that_the_hub_does_not_have(hub, capsys):
    assert_one_error(check(capsys, "nobody/no-such-model"), "could not be fetched from the Hugging Face hub")


def test_without_a_network(hub, capsys):
    hub.shutdown()
    hub.server_close()
    assert_one_error(check(capsys), "could not be fetched from the Hugging Face hub")


def test_weights_that_may_not_be_read(hub, capsys):
    hub.forbidden = ".safetensors"
    assert_one_error(check(capsys), "could not be fetched from the Hugging Face hub (403 Forbidden")


def test_a_cached_checkpoint_is_checked_without_a_network(hub, folder, capsys, monkeypatch):
    assert check(capsys)[0] == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_one_error(check(capsys), "could not be fetched")  # the weights are not here
    (snapshot,) = hub.cache.glob(f"*/snapshots/{COMMIT}")
    for file in folder.glob("*.safetensors"):
        (snapshot / file.name).symlink_to(file)
    assert check(capsys)[0] == 0


def assert_one_error(result, words):
    status, output, errors = result
    assert (status, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert words in errors


@pytest.mark.parametrize("kinds", [[".safetensors"], [".bin"], [".safetensors", ".bin"]])
def test_a_checkpoint_is_downloaded_with_one_kind_of_weights(hub, folder, kinds):
    """Hubs often hold the same weights twice."""
    for path in folder.glob("model*"):
        path.unlink()
    weights = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
    for kind in kinds:
        (folder / weights[kind]).write_bytes(kind.encode())
    local = resolve_folder(NAME)
    assert local.is_relative_to(hub.cache)
    assert {path.name for path in local.iterdir() if path.name in weights.values()} == {weights[kinds[0]]}
    assert (local / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (local / weights[kinds[0]]).read_bytes() == kinds[0].encode()
