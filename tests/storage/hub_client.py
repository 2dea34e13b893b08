"""A client of the server that speaks the Hub's routes: processes of their own, with a cache of their own."""

import json
import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path


class Served:
    """The server and a client's cache."""

    def __init__(self, url, home):
        self.url, self.home = url, home

    def bytes(self, part=""):
        told = json.loads(urllib.request.urlopen(f"{self.url}/served").read())
        return sum(n for path, n in told.items() if part in path)

    def run(self, code, **more):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **more,
        }
        code = f"from merganser.weights import hub\nfrom merganser.weights.open import *\n{code}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=self.home)

    def says(self, code, **more):
        result = self.run(code, **more)
        assert result.returncode == 0, result.stderr
        assert result.stderr == "", "no bars where there is no terminal"
        return result.stdout.strip()

    def fails(self, code, **more):
        result = self.run(code, **more)
        assert result.returncode != 0
        return result.stderr.strip().splitlines()[-1]


@contextmanager
def serving(folder, home):
    """Serve the repositories in ``folder`` to clients that keep what they fetch in ``home``."""
    home.mkdir()
    script = Path(__file__).with_name("hub_server.py")
    running = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, text=True)
    try:
        yield Served(running.stdout.readline().strip(), home)
    finally:
        running.kill()
        running.wait()
