"""llama.cpp on a GGUF file, spoken to over HTTP: its own llama-server, or that of xllamacpp.

It runs as a process of its own, on this machine's loopback address, until the block ends.
"""

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m2d.errors import UserError

START_SECONDS = 600.0  # a large file is read from a slow disk
# Far above any difference of logits: the token is certain, and its own probability is still told.
FORCED = 1e6
# The same server without its binary; the process ends with its standard input.
XLLAMACPP = """
import sys, xllamacpp
file, port, context, threads, exact = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path = file
parameters.port, parameters.n_ctx, parameters.n_parallel = int(port), int(context), 1
parameters.warmup = False
if int(exact):
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = off
if int(threads):
    parameters.cpuparams.n_threads = int(threads)
server = xllamacpp.Server(parameters)
sys.stdin.read()
"""


class Engine:
    """A running server."""

    def __init__(self, address: str, process: "subprocess.Popen[bytes]"):
        self.address, self.process = address, process

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """The answer to a POST of these JSON fields."""
        body = json.dumps(fields).encode()
        request = urllib.request.Request(
            self.address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's own token ids of a text, without those that a prompt begins with."""
        answer = self.ask("/tokenize", content=text, add_special=False, parse_special=True)
        return [int(token) for token in answer["tokens"]]

    def top(self, prompt: Sequence[int], count: int, safe: int) -> dict[int, float]:
        """Log-probabilities (nats) of the `count` likeliest tokens after a prompt, by id.

        safe: a token that is a whole character; the server tells nothing where it ends within one.
        """
        told = self._step(prompt, safe, count)
        assert told is not None, f"token {safe} is no whole character"
        return {int(entry["id"]): float(entry["logprob"]) for entry in told["top_logprobs"]}

    def log_probability(self, prompt: Sequence[int], token: int) -> float | None:
        """Log-probability (nats) of a token after a prompt; None where it ends within a character.

        The token is forced; what is told of it is its probability before that.
        """
        told = self._step(prompt, token, 1)
        return None if told is None else float(told["logprob"])

    def _step(self, prompt: Sequence[int], token: int, count: int) -> dict[str, Any] | None:
        answer = self.ask(
            "/completion",
            prompt=list(prompt),
            n_predict=1,
            n_probs=count,
            cache_prompt=True,
            samplers=[],
            logit_bias=[[token, FORCED]],
        )
        told: list[dict[str, Any]] = answer.get("completion_probabilities") or []
        if told and told[0]["id"] != token:
            raise UserError(f"llama.cpp's server did not take token {token}; another version?")
        return told[0] if told else None


def server_command() -> list[str] | None:
    """How the server is started, up to its options; None where neither is installed."""
    if importlib.util.find_spec("xllamacpp"):
        return [sys.executable, "-c", XLLAMACPP]
    binary = shutil.which("llama-server")
    return [binary] if binary else None


@contextlib.contextmanager
def serving(file: Path, context: int, threads: int = 0, exact: bool = False) -> Iterator[Engine]:
    """Serve a GGUF file while the block runs.

    context: tokens, prompt and answer together. threads: 0 for as many as llama.cpp takes itself.
    exact: attention in float32 throughout, where llama.cpp itself rounds to float16 on the way.
    Raises UserError where no server is installed, or it does not start.
    """
    command = server_command()
    if command is None:
        raise UserError(
            "llama.cpp is not installed: pip install xllamacpp, or put llama-server on the PATH"
        )
    port = free_port()
    if command[-1] == XLLAMACPP:
        command += [str(file), str(port), str(context), str(threads), str(int(exact))]
    else:
        command += ["-m", str(file), "--host", "127.0.0.1", "--port", str(port)]
        command += ["-c", str(context), "-np", "1", "--no-warmup"]
        command += ["-t", str(threads)] if threads else []
        command += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"] if exact else []
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            engine = Engine(f"http://127.0.0.1:{port}", process)
            wait_for(engine, file, log)
            yield engine
        finally:
            process.kill()
            process.wait()


def wait_for(engine: Engine, file: Path, log: Any) -> None:
    """Return when the server answers. Raises UserError with its last words where it gives up."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if engine.process.poll() is not None:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            faults = (
                [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no word"]
            )
            raise UserError(f"{file}: llama.cpp does not load it ({faults[0].strip()[-200:]})")
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(f"{engine.address}/health", timeout=5),
        ):
            return
        time.sleep(0.1)
    raise UserError(f"{file}: llama.cpp did not begin to serve it within {START_SECONDS:.0f} s")


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
