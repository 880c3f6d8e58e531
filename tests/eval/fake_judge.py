"""A judge on 127.0.0.1 that speaks OpenAI's chat completions, for tests."""

import http.server
import json
import threading
from contextlib import contextmanager


@contextmanager
def fake_judge(reply):
    """Serve `reply`, which is given a request and returns the text of the answer, or an HTTP status and a body.

    Gives the base URL and the list that the headers and bodies of all requests are added to.
    """
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), request))
            said = reply(request)
            status, body = said if isinstance(said, tuple) else (200, completion(said))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def completion(text):
    return json.dumps({"model": "fake-1", "choices": [{"message": {"role": "assistant", "content": text}}]})
