"""A chat request to both programs' OpenAI servers, on a student of the demo teacher."""

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import m2d
from m2d.export.command import export
from m2d.export.engine import free_port, serving

DEMO = Path(__file__).parents[2] / "workflow" / "resources" / "demo-teacher"
QUESTION = "Return the number of"
START_SECONDS = 600


def demo_student(root: Path) -> Path:
    """A student of the demo teacher, bfloat16, where it is not yet."""
    out = root / "student"
    if not out.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        text = root / "text.jsonl"
        card = (DEMO / "README.md").read_text(encoding="utf-8")
        text.write_text(json.dumps({"text": card}) + "\n")
        m2d.convert(DEMO, out, text=[text], sequences=4, length=64)
    return out


def ask(address: str, **fields: Any) -> str:
    """The answer to QUESTION in a chat, greedy."""
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "temperature": 0,
        **fields,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


@contextlib.contextmanager
def vllm_server(python: Path, student: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's OpenAI server on a student, while the block runs."""
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", student]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--served-model-name", "student"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as heard:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=heard, stderr=heard, env=environment
        )
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while process.poll() is None and time.monotonic() < end:
                with (
                    contextlib.suppress(urllib.error.URLError, ConnectionError),
                    urllib.request.urlopen(f"{address}/health", timeout=5),
                ):
                    break
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait()


def answers(root: Path, python: Path, converter: Path) -> dict[str, str]:
    """Program -> what its server said."""
    student = demo_student(root)
    file = root / "student.gguf"
    if not file.exists():
        export(student, file, "f32", converter=str(converter))
    with serving(file, 256, 1) as engine:
        said = {"llama.cpp": ask(engine.address)}
    with vllm_server(python, student, root / "vllm-server.log") as address:
        said["vLLM"] = ask(address, model="student")
    return said
