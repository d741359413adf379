"""What the rule that fetches teachers asks of the hub, by the installed command and no network."""

import fnmatch
import shlex
import subprocess
import sys

import huggingface_hub.cli.download
import pytest
from huggingface_hub.cli.hf import app
from workflow_project import REPOSITORY

WANTED = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
]
UNWANTED = ["original/model.safetensors", "original/config.json", "pytorch_model.bin", "README.md"]


def test_the_files_of_a_teacher_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--printshellcmds", "--nolock"]
    command += ["--cores", "1", "--forcerun", "download_teacher"]
    command += ["--", "results/gpt-oss-20b/downloaded"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    _, _, shell = told.stdout.partition("env -u HF_HUB_OFFLINE hf ")
    words = shlex.split(shell.partition(">")[0].replace("\\\n", " "))
    asked: dict[str, object] = {}

    def snapshot_download(**arguments: object) -> str:
        asked.update(arguments)
        return "/nowhere"

    monkeypatch.setattr(huggingface_hub.cli.download, "snapshot_download", snapshot_download)
    app.main(args=words, standalone_mode=False)
    assert asked["repo_id"] == "openai/gpt-oss-20b"

    def fetched(name: str) -> bool:
        matches = (
            any(fnmatch.fnmatch(name, pattern) for pattern in asked[key])  # type: ignore[attr-defined]
            for key in ("allow_patterns", "ignore_patterns")
        )
        return list(matches) == [True, False]

    assert [name for name in WANTED if not fetched(name)] == []
    assert [name for name in UNWANTED if fetched(name)] == []
