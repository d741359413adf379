"""Speed and memory of a MoE teacher and its dense student in llama.cpp, as GGUF files.

    python benchmarks/serving.py TEACHER STUDENT --converter FILE [--types f16 q8_0] [--threads 1]

Needs xllamacpp or llama-server. Tokens per second are llama.cpp's own; each number is the best of
REPEATS requests of the same prompt. Memory is the server's resident set after them.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from m2d.export.command import export
from m2d.export.engine import serving
from m2d.models.teacher import read_config

PROMPT, ANSWER, REPEATS = 256, 256, 5


def resident_bytes(process: int) -> int:
    """Of a process of this machine: what it has in memory, files that it maps included."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {process} has no VmRSS")


def measure(file: Path, vocabulary: int, threads: int) -> dict[str, Any]:
    """Tokens per second of reading a prompt and of writing, and memory."""
    draw = random.Random(0)
    prompt = [draw.randrange(1, vocabulary) for _ in range(PROMPT)]
    reading, writing = [], []
    with serving(file, PROMPT + ANSWER + 1, threads) as engine:
        for _ in range(REPEATS):
            answer = engine.ask(
                "/completion",
                prompt=prompt,
                n_predict=ANSWER,
                ignore_eos=True,
                temperature=0,
                cache_prompt=False,
            )
            reading.append(answer["timings"]["prompt_per_second"])
            writing.append(answer["timings"]["predicted_per_second"])
        memory = resident_bytes(engine.process.pid)
    return {
        "file": file.stat().st_size,
        "prompt_per_second": max(reading),
        "predicted_per_second": max(writing),
        "resident": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py, or its folder")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="keep the GGUF files here, and take those there")
    args = parser.parse_args()
    print("| model | type | file, MB | prompt, tokens/s | answer, tokens/s | resident, MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = args.keep or Path(folder)
        for kind in args.types:
            for name, model in (("teacher", args.teacher), ("student", args.student)):
                file = root / f"{name}-{kind}.gguf"
                if not file.exists():
                    export(model, file, kind, converter=args.converter)
                vocabulary = read_config(model)[1].get_text_config().vocab_size
                found = measure(file, vocabulary, args.threads)
                print(
                    f"| {name} | {kind} | {found['file'] / 1e6:.1f} "
                    f"| {found['prompt_per_second']:,.0f} | {found['predicted_per_second']:,.0f} "
                    f"| {found['resident'] / 1e6:.0f} |",
                    flush=True,
                )
                if args.keep:
                    (root / f"{name}-{kind}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
