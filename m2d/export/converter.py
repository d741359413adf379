"""llama.cpp's converter, convert_hf_to_gguf.py, as it is installed: found, and run on a student."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from m2d.artifacts import read_json
from m2d.errors import UserError
from m2d.export.pre_tokenizer import pre_tokenizer_name

NAME = "convert_hf_to_gguf.py"
SDIST = "llama-cpp-python==0.3.36"
GET_IT = (
    f"give --converter FILE; it lies at the top of llama.cpp's source, which comes within "
    f"`pip download --no-deps --no-binary llama-cpp-python {SDIST}` (vendor/llama.cpp)"
)
# Run in its own process: the converter, with an answer for tokenizers that its hashes lack.
RUN = """
import importlib.util, sys
from pathlib import Path
file, pre, *arguments = sys.argv[1:]
sys.path.insert(0, str(Path(file).parent))
spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", file)
converter = sys.modules["convert_hf_to_gguf"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(converter)
base = sys.modules.get("conversion.base", converter).TextModel
known = base.get_vocab_base_pre
def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        if not pre:
            raise
        print("m2d: pre-tokenizer by its pattern:", pre, file=sys.stderr)
        return pre
base.get_vocab_base_pre = get_vocab_base_pre
sys.argv = [file, *arguments]
converter.main()
"""


def find_converter(given: str | None = None) -> Path:
    """The converter: as given (the file, or llama.cpp's folder), else the one on the PATH.

    Raises UserError with what to install.
    """
    if given is not None:
        file = Path(given)
        file = file / NAME if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"--converter {given}: no such file; {GET_IT}")
        return file.resolve()
    found = shutil.which(NAME)
    if found is None:
        raise UserError(f"llama.cpp's {NAME} is not on the PATH; {GET_IT}")
    return Path(found).resolve()


def stage(student: Path, folder: Path) -> None:
    """The student's files under `folder`, by links, without what would name code to run."""
    folder.mkdir()
    for file in student.resolve().iterdir():
        if file.is_dir() or file.suffix == ".py":
            continue
        target = folder / file.name
        if file.name in ("config.json", "tokenizer_config.json"):
            content = {k: v for k, v in read_json(file).items() if k != "auto_map"}
            target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        else:
            target.symlink_to(file.resolve())


def pre_tokenizer_of(student: Path) -> str | None:
    """llama.cpp's name for the student's pre-tokenizer by its pattern, where it has one."""
    file = student / "tokenizer.json"
    if not file.is_file():
        return None
    return pre_tokenizer_name(read_json(file))


def run_converter(
    converter: Path, student: Path, out: Path, kind: str, work: Path, pre: str | None = None
) -> bool:
    """Write the GGUF file `out`. Returns whether the pre-tokenizer had to be found by its pattern.

    kind: the converter's --outtype. work: a folder for temporary files. pre: llama.cpp's name for
    the pre-tokenizer, where the converter does not know it; else it is read off tokenizer.json.
    Raises UserError with the converter's last words where it fails.
    """
    staged = work / student.resolve().name
    stage(student, staged)
    pre = pre or pre_tokenizer_of(student)
    # The converter reads files only; nothing may be fetched.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", RUN, str(converter), pre or "", str(staged)]
    command += ["--outfile", str(out), "--outtype", kind]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode or not out.is_file():
        if "NotImplementedError: BPE pre-tokenizer was not recognized" in done.stderr:
            raise UserError(
                f"{student}: llama.cpp's converter does not know its pre-tokenizer, nor is its "
                "pattern one that m2d knows; give --pre NAME, one of those in llama.cpp's "
                "src/llama-vocab.cpp"
            )
        if missing := re.search(r"No module named '(\w+)'", done.stderr):
            raise UserError(f"llama.cpp's converter needs {missing[1]}: pip install {missing[1]}")
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise UserError(f"{student}: {NAME} failed ({words[-1].strip() if words else 'no word'})")
    return "m2d: pre-tokenizer by its pattern" in done.stderr
