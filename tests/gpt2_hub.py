"""A hub of one model on the loopback address, as huggingface_hub sees it."""

import contextlib
import hashlib
import http.server
import json
import threading

REPOSITORY, COMMIT = "someone/tiny", "0" * 40


class Hub:
    """Serves files; answers with an error code for other names, or for every name if told to."""

    def __init__(self, files):
        self.files, self.error, self.requests = dict(files), None, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request):
        self.requests.append((request.command, request.path))
        status, code, body = 200, None, b""
        before, found, after = request.path.partition(REPOSITORY)
        file = after.removeprefix(f"/resolve/{COMMIT}/")
        if not found:
            status, code = 404, "RepoNotFound"
        elif self.error is not None:
            status, code = self.error
        elif before == "/api/models/" and after.startswith("/tree/"):
            entries = [{"path": name, "size": len(x)} for name, x in self.files.items()]
            body = json.dumps(
                [{"type": "file", "oid": COMMIT} | entry for entry in entries]
            ).encode()
        elif before == "/api/models/":  # older versions of huggingface_hub read the names here
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
        elif file in self.files:
            body = self.files[file]
        else:
            status, code = 404, "EntryNotFound"
        request.send_response(status)
        if code is not None:
            request.send_header("X-Error-Code", code)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def fetched(self):
        """Names of the files whose contents were asked for."""
        asked = [path for command, path in self.requests if command == "GET"]
        return [path.split("/")[-1] for path in asked if "/resolve/" in path]

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self):
        """From now on nobody answers."""
        self.server.shutdown()
        self.server.server_close()
