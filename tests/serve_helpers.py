"""What the tests of the service share: its application, and a server in a process of its own with a client for it."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from recbole_raserec import Recommender
from recbole_raserec.serving.http import Settings

TOKEN = "a-token-of-the-tests"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = Settings(
    token=TOKEN,
    trusted_hosts="testserver",
    max_body=20_000,
    max_sequences=4,
    max_history=50,
    max_k=20,
    max_candidates=30,
    max_events=6,
)


def fresh(planted_run, directory):
    """A copy of the shared run's checkpoint."""
    shutil.copytree(planted_run.ours.directory, directory)
    return directory


@contextmanager
def application(planted_run, directory):
    """A recommender behind an application, on a copy of the shared run's checkpoint."""
    from fastapi.testclient import TestClient

    from recbole_raserec.serving.http.app import create_app

    recommender = Recommender.load(fresh(planted_run, directory), "cpu", journal=True)
    app = create_app(recommender, LIMITS)
    yield SimpleNamespace(client=TestClient(app), app=app, recommender=recommender, directory=directory)
    app.state.service.stop()


class Server:
    """``recbole-raserec serve`` on a free port; its log goes into `log`."""

    def __init__(self, directory, log, *options):
        self._log = open(log, "ab")  # noqa: SIM115
        environment = {**os.environ, "RECBOLE_RASEREC_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        root = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
        code = "import sys; from recbole_raserec.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "serve", str(directory), "--port=0", "--device=cpu"]
        self.process = subprocess.Popen(
            [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.log = Path(log)

    def wait(self):
        """Until it answers."""
        line = self.process.stdout.readline()
        found = re.search(r"http://127.0.0.1:(\d+)$", line.strip())
        assert found, f"{line!r} {self.log.read_text()}"
        self.port = int(found[1])
        return self

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def post(self, path, body, token=TOKEN, connection=None):
        """Status and answer of one request; a body of bytes goes as it is."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        connection = connection or self.connect()
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def peak(self):
        """MiB of the largest memory it has had, and MiB at the moment."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return [int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024 for name in ("VmHWM", "VmRSS")]

    def end(self, number=signal.SIGTERM):
        """Send it a signal, and its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.process.stdout.close()
        self._log.close()
        return code
