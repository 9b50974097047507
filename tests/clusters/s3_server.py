"""`python s3_server.py MOOD_FILE`: moto's S3 on a free port of the loopback, which it prints; the file says its mood.

Moods: "well"; "frozen" (accepts, answers once it is well again); "busy" (every third request gets 503); "expired KEY"
(refuses one access key as expired); "forbidden" (403 for everything).
"""

import itertools
import sys
import time
from pathlib import Path

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}</Message></Error>"


class Moody:
    """WSGI: moto's application behind a mood."""

    def __init__(self, mood: Path) -> None:
        self.application = DomainDispatcherApplication(create_backend_app)
        self.mood, self.numbers = mood, itertools.count()

    def __call__(self, environ, start_response):
        while (mood := self.mood.read_text().split())[0] == "frozen":
            time.sleep(0.05)
        refused = ""
        if mood[0] == "busy" and next(self.numbers) % 3 == 0:
            refused = "503 SlowDown"
        elif mood[0] == "forbidden":
            refused = "403 AccessDenied"
        elif mood[0] == "expired" and f"Credential={mood[1]}/" in environ.get("HTTP_AUTHORIZATION", ""):
            refused = "400 ExpiredToken"
        if not refused:
            return self.application(environ, start_response)
        body = ERROR.format(refused.split()[1]).encode()
        start_response(refused, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Moody(Path(sys.argv[1])), threaded=True)
    print(server.port, flush=True)
    server.serve_forever()
