"""The judge of a benchmark's free answers: asked for before work begins, and then by lmms-eval's tasks through here.

lmms-eval's tasks take a failed request, or a reply that they cannot read, for the worst score. So they are given the
address of this process, which holds the key, asks the judge, tries again while it is overloaded, stops the run where it
stays away, hands each verdict on in the form that the tasks read, counts the replies that are none, and keeps all
verdicts on disk: an interrupted run pays for none of them twice.
"""

import hashlib
import http.client
import http.server
import json
import os
import re
import secrets
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark
from llava.answer_log import AnswerLog
from llava.config import JudgeConfig
from llava.errors import UserError

KEY = "OPENAI_API_KEY"
VERDICTS = "verdicts"
"""What stands in the place of a setting in the events of a judge's progress."""

PAUSES = (1, 2, 4, 8, 16, 32, 60)
"""Seconds to wait for a judge that is overloaded or out of reach: less in all than the tasks' patience, 5 minutes."""

_PATTERNS = {
    "pred": re.compile(r"\bpred['\"]*\s*:\s*['\"]*(yes|no)\b", re.IGNORECASE),
    "score": re.compile(r"\bscore['\"]*\s*:\s*['\"]*([0-5](?:\.\d+)?)\b", re.IGNORECASE),
}
_WORST = {"pred": "no", "score": "0"}


class Judge:
    """Asks the judge of `config` for what `benchmark.verdict` names, once for each request; `folder` keeps verdicts.

    Raises:
        UserError: there is no key.
    """

    def __init__(self, config: JudgeConfig, benchmark: Benchmark, folder: Path, resume: bool = True) -> None:
        self.config, self.benchmark = config, benchmark
        self.key = os.environ.get(KEY, "")
        if not self.key:
            raise UserError(
                f"{benchmark.name} has its answers scored by a judge, a language model behind an OpenAI-compatible "
                f"address. Set the environment variable {KEY} to its key (any text, if it asks for none); the judge "
                f"is {config.model} at {config.base_url}, unless evaluation.judge.model and evaluation.judge.base_url "
                "say otherwise."
            )
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        self.log = AnswerLog(folder, hashlib.sha256(repr(config).encode()).hexdigest())
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.verdicts, self.unusable, self.models = 0, 0, set[str]()

    def check(self) -> None:
        """Ask one short question.

        Raises:
            UserError: the judge does not answer; the message says what to mend.
        """
        self._post({"messages": [{"role": "user", "content": "Say yes."}], "temperature": 0, "max_tokens": 64})

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """A chat completion with the judge's verdict as the only content, in the form that lmms-eval's tasks read.

        Raises:
            UserError: the judge cannot be asked.
        """
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        with self.lock:
            record = self.log.get(key)
        if record is None:
            record = self._ask(request)
            with self.lock:
                self.log.add(key, record)
        found = {name: _PATTERNS[name].search(record["content"]) for name in self.benchmark.verdict}
        usable = all(found.values())
        with self.lock:
            self.verdicts += 1
            self.unusable += not usable
            self.models.add(record["model"])
        verdict = {name: match[1].lower() if usable and match else _WORST[name] for name, match in found.items()}
        content = ", ".join(f"'{name}': " + (repr(v) if name == "pred" else v) for name, v in verdict.items())
        return {"model": record["model"], "choices": [{"message": {"role": "assistant", "content": f"{{{content}}}"}}]}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the judge says, and which model says it is speaking; nothing where it refuses this one request."""
        try:
            for pause in PAUSES:
                try:
                    return self._post(request)
                except _OverloadedError:
                    time.sleep(pause)
            return self._post(request)
        except _RefusedError:
            return {"content": "", "model": self.config.model}

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        url, model = f"{self.config.base_url.rstrip('/')}/chat/completions", self.config.model
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        post = urllib.request.Request(url, json.dumps(request | {"model": model}).encode(), headers)
        try:
            with urllib.request.urlopen(post, timeout=60) as response:
                answer = json.load(response)
                return {"content": str(answer["choices"][0]["message"]["content"]), "model": str(answer.get("model"))}
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise UserError(f"The judge at {url} refuses the key in {KEY} (HTTP {error.code}).") from None
            said = " ".join(error.read().decode(errors="replace").replace(self.key, KEY).split())[:200]
            message = f"The judge at {url} answers a request to the model {model} with HTTP {error.code}: {said}."
            if error.code in (408, 409, 429) or error.code >= 500:
                raise _OverloadedError(message) from None
            kind = _RefusedError if error.code == 400 else UserError
            raise kind(f"{message} Check evaluation.judge.base_url and evaluation.judge.model.") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _OverloadedError(
                f"The judge at {url} cannot be reached ({reason}). Check evaluation.judge.base_url and the network."
            ) from None
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"What answers at {url} does not speak OpenAI's chat completions. Check evaluation.judge.base_url."
            ) from None


class _OverloadedError(UserError):
    """The judge may answer later."""


class _RefusedError(UserError):
    """The judge takes exception to what it was asked, as filters of content do."""


@contextmanager
def serve(judge: Judge, report: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, str]]:
    """While the block runs, let processes ask `judge` that have the environment variables that this gives.

    They are those that lmms-eval's judged tasks read, with a key that is good for this address alone. `report` is
    called, from several threads, with events of progress and of errors as `eval.worker` writes them.
    """
    key = secrets.token_hex()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != f"Bearer {key}":
                return self._send(401, {})
            try:
                reply = judge.reply(request)
                report({"setting": VERDICTS, "rank": 0, "done": judge.verdicts, "total": 0})
                self._send(200, reply)
            except UserError as error:
                report({"error": f"{error} Verdicts and answers are kept: run the same command again to go on."})
                self._send(503, {})

        def do_GET(self) -> None:
            counts = {"verdicts": judge.verdicts, "unusable": judge.unusable, "models": sorted(judge.models)}
            judge.forget()
            self._send(200, counts)

        def _send(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the terminal clear."""

    local = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "API_TYPE": "openai",
            "OPENAI_API_URL": f"http://127.0.0.1:{server.server_port}",
            KEY: key,
            "MODEL_VERSION": judge.config.model,
            "NO_PROXY": local,
            "no_proxy": local,
        }
    finally:
        server.shutdown()
        server.server_close()


def judge_report(config: JudgeConfig) -> dict[str, Any]:
    """Who judged, and what came of it since the last report, asked for by the process that runs the tasks."""
    with urllib.request.urlopen(os.environ["OPENAI_API_URL"], timeout=60) as response:
        return {"base_url": config.base_url, "model": config.model, **json.load(response)}
