"""Hostile files for every command: mutations of sound ones, and what comes of them.

A case is a sound input, a mutation of one of its files, and a command. Each runs in a child of this
process, with a limit of time and memory. Good are: an error in one short line with exit code 2, and
exit code 0 with outputs that hold no NaN. Everything else is a fault: a traceback, a hang, a crash,
an error of many lines, a number that is not finite.

`python -m tests.fuzz [CASES] [SEED]`, or `make fuzz`, prints the classes and each fault's case.
"""

import contextlib
import faulthandler
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.numpy import load_file, save_file

from m2d import cli
from tests.conftest import TEXT, make_teacher
from tests.family_formats import quantise
from tests.family_quantized import to_fp8, to_mxfp4
from tests.family_teachers import make
from tests.test_composite import make_composite

SECONDS = 60
LONGEST_LINE = 700
ERROR = re.compile(r"m2d( [\w-]+)?: error: ")


@dataclass(frozen=True)
class Case:
    """A command, the file of the sound inputs that is damaged, and how."""

    command: tuple[str, ...]
    file: str
    mutation: str
    seed: int

    def __str__(self) -> str:
        return f"{self.mutation}({self.file}, {self.seed}): m2d {' '.join(self.command)}"


# ---- sound inputs


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def make_sound(folder: Path) -> None:
    """One of every kind of file that commands read, by their own commands."""
    os.chdir(folder)
    for module, _ in cli.COMMANDS.values():
        importlib.import_module(module)  # once, and not in every child
    make_teacher(folder / "T")
    tokenizer = json.loads((folder / "T/tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (folder / "T/tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "T/README.md").write_text("---\nlicense: mit\n---\n# T\n")
    rows = [{"text": line} for line in TEXT.splitlines() * 20]
    chats = [{"messages": [{"role": "user", "content": row["text"]},
                           {"role": "assistant", "content": "yes"}]} for row in rows]  # fmt: skip
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "text.json").write_text(json.dumps(rows))
    (folder / "text.txt").write_text(TEXT * 20)
    pq.write_table(pa.Table.from_pylist(rows), folder / "text.parquet")
    assert run("tokenize", "T", "tokens", "--text", "text.txt", "--sequences", 4,
               "--length", 16) == 0  # fmt: skip
    make_others(folder)
    small = ("--tokens", "tokens")
    for command, out in (("stats", "stats"), ("gram", "gram"), ("neurons", "neurons")):
        assert run(command, "T", out, *small) == 0
    assert run("stats", "T", "share1", *small, "--share", "1/2", "--batch", 1) == 0
    assert run("stats", "T", "share2", *small, "--share", "2/2", "--batch", 1) == 0
    assert (
        run("rank", "ranking", "--statistics", "stats", "--gram", "gram", "--scoring", "reap") == 0
    )
    chosen = ("--statistics", "stats", "--gram", "gram", "--ranking", "ranking")
    results = folder / "R/t/students/s"
    (results / "merged.eval").mkdir(parents=True)
    (folder / "R/t/grid").mkdir()
    assert run("grid", "T", "R/t/grid/reap.parquet", *chosen, *small, "--keeps", "2,4") == 0
    assert run("merge", "T", "S", *chosen, "--grouping", "RR", "--scaling", "uniform",
               "--keep", 2) == 0  # fmt: skip
    shutil.copytree("S", results / "merged")
    assert run("perplexity", "S", *small, "--out", results / "merged.perplexity.json") == 0
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "arc_easy"}
    evaluation = {"results": {"arc_easy": scores}, "n-shot": {"arc_easy": 25},
                  "n-samples": {"arc_easy": {"effective": 10}},
                  "config": {"model_num_parameters": 1000, "model_dtype": "float32"}}  # fmt: skip
    (results / "merged.eval/arc_easy.json").write_text(json.dumps(evaluation))
    assert run("teacher-logits", "T", "L", *small, "--size", 8, "--rows", 2) == 0


# Quantised teachers, by folder, and the one with a vision tower.
QUANTISED = {"awq": "awq", "w4a16": "compressed w4a16 with zeros", "modelopt": "modelopt fp8"}
OTHERS = ("fp8", "mxfp4", *QUANTISED, "composite")


def make_others(folder: Path) -> None:
    """Small teachers of other layouts, and a config of the workflow for T."""
    to_fp8(make_teacher(folder / "fp8"), (16, 16), ("embed", "norm", "lm_head", "gate.weight"))
    to_mxfp4(make("gpt_oss", folder / "mxfp4"))
    for name, layout in QUANTISED.items():
        quantise(make_teacher(folder / name), layout)
    make_composite("qwen3_vl_moe", folder / "composite")
    with (folder / "config.yaml").open("w") as file, contextlib.redirect_stdout(file):
        assert run("init", "T", "--text", "text.txt", "--test", "text.json") == 0


GRID, PERPLEXITY, EVALUATION, RECORD = (
    "R/t/grid/reap.parquet", "R/t/students/s/merged.perplexity.json",
    "R/t/students/s/merged.eval/arc_easy.json", "R/t/students/s/merged/m2d.json",
)  # fmt: skip
CHOSEN = ("--statistics", "stats", "--gram", "gram", "--ranking", "ranking")
METHODS = ("--grouping", "WC", "--scaling", "proportional", "--keep", "4")
DISTILL = ("distill", "S", "T", "out", "--tokens", "tokens", "--steps", "1", "--batch", "2",
           "--device-batch", "2", "--precision", "fp32")  # fmt: skip
TABLES = ("--grid", GRID, "--perplexity", PERPLEXITY, "--evaluation", EVALUATION,
          "--provenance", RECORD)  # fmt: skip


def tokenize(file: str) -> tuple[str, ...]:
    return ("tokenize", "T", "out", "--text", file, "--sequences", "2", "--length", "16")


# file -> commands that read it; a file stands more than once to be damaged more often
READERS: list[tuple[str, tuple[str, ...]]] = [
    *((f, tokenize(f)) for f in ("text.jsonl", "chats.jsonl", "text.json", "text.txt",
                                 "text.parquet")),
    ("T/tokenizer.json", tokenize("text.txt")),
    ("T/tokenizer_config.json", tokenize("chats.jsonl")),
    ("T/config.json", ("inspect", "T")),
    ("T/config.json", ("convert", "T", "out", "--tokens", "tokens")),
    ("T/model.safetensors", ("convert", "T", "out", "--tokens", "tokens")),
    ("T/README.md", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("T/generation_config.json", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("tokens", ("stats", "T", "out", "--tokens", "tokens")),
    ("tokens", ("perplexity", "S", "--tokens", "tokens", "--out", "out")),
    ("tokens", DISTILL),
    ("stats", ("rank", "out", *CHOSEN[:4], "--scoring", "reap")),
    ("gram", ("rank", "out", *CHOSEN[:4], "--scoring", "gld_reap")),
    ("stats", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("ranking", ("merge", "T", "out", *CHOSEN, *METHODS)),
    ("neurons", ("merge", "T", "out", "--neurons", "neurons", "--width", "8")),
    ("share1", ("combine", "out", "share1", "share2")),
    ("S/plan.json", ("merge", "T", "out", "--plan", "S/plan.json")),
    ("S/m2d.json", DISTILL),
    ("S/config.json", ("perplexity", "S", "--tokens", "tokens", "--out", "out")),
    ("S/model.safetensors", ("perplexity", "S", "--tokens", "tokens", "--out", "out")),
    ("S/m2d.json", ("card", "S")),
    *((f, ("tables", "out", *TABLES)) for f in (GRID, PERPLEXITY, EVALUATION, RECORD)),
    (PERPLEXITY, ("card", "R/t/students/s/merged", "--perplexity", PERPLEXITY)),
    (EVALUATION, ("card", "R/t/students/s/merged", "--evaluation", EVALUATION)),
    ("L/index.json", (*DISTILL, "--teacher-logits", "L")),
    ("L/shard-00000.safetensors", (*DISTILL, "--teacher-logits", "L")),
]  # fmt: skip
# Of the seeds from here on these too; earlier seeds keep their cases.
FURTHER_FROM = 800_000
FURTHER: list[tuple[str, tuple[str, ...]]] = [
    *((f"{folder}/{file}", ("convert", folder, "out", "--tokens", "tokens"))
      for folder in OTHERS for file in ("config.json", "model.safetensors")),
    ("modelopt/hf_quant_config.json", ("stats", "modelopt", "out", "--tokens", "tokens")),
    *((f"{folder}/config.json", ("inspect", folder)) for folder in OTHERS),
    *((f"{folder}/model.safetensors", (*DISTILL[:2], folder, *DISTILL[3:], "--any-teacher"))
      for folder in OTHERS[:2]),
    *[("config.yaml", ("estimate", "all_t", "--config", "config.yaml"))] * 3,
    ("config.yaml", ("doctor", "all_t", "--config", "config.yaml")),
]  # fmt: skip


# ---- mutations: (file, random numbers) -> the file is another one

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**7, 2**31, 2**63, 10**400, 0.5, -0.0, math.nan, math.inf, "",
    "x", "../../x", "nan", "\ud800", "a" * 10**5, [], [[]], [None], {}, {"": {}}, {"a": [1, "b"]},
)  # fmt: skip


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all the values in JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(item, (*path, key))


def damage_json(content: Any, chance: random.Random) -> Any:
    """Another value, a missing or a further key somewhere in JSON."""
    places = list(places_in(content))
    shallow = [place for place in places if len(place) <= 2]
    path = chance.choice(shallow if chance.random() < 0.5 else places)
    if not path:
        return chance.choice(ODD)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    act = chance.randrange(4)
    if act == 0:
        del parent[path[-1]]
    elif act == 1 and isinstance(parent, dict):
        parent["further"] = chance.choice(ODD)
    else:
        parent[path[-1]] = chance.choice(ODD)
    return content


def some_bytes(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 1, 4, 50))):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)


def cut(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.choice((0, 1, 7, 8, 9, chance.randrange(len(data) + 1)))])


def doubled(file: Path, chance: random.Random) -> None:
    data = file.read_bytes()
    at = chance.randrange(len(data) + 1)
    file.write_bytes(data[:at] + data[chance.randrange(len(data) + 1) :] + data[at:])


def other_kind(file: Path, chance: random.Random) -> None:
    """What is no file, or a file of another kind, in its place."""
    target = file.with_name("moved-" + file.name)
    act = chance.randrange(8)
    file.rename(target)
    if act == 0:
        os.mkfifo(file)
    elif act == 1:
        file.mkdir()
    elif act == 2:
        file.symlink_to(file.name)
    elif act == 3:
        file.symlink_to("/dev/zero")
    elif act == 4:
        file.write_bytes(chance.randbytes(chance.randrange(3000)))
    elif act == 5:
        file.write_bytes(b"[" * 10**5)
    elif act == 6:
        file.write_bytes(b"\xff\xfe" + "x".encode("utf-16-le") * 100)
    # 7: it is missing


def json_value(file: Path, chance: random.Random) -> None:
    """JSON with an odd value; of JSON lines and headers of safetensors, one of their objects."""
    data = file.read_bytes()
    if file.suffix == ".jsonl":
        rows = data.decode().splitlines()
        at = chance.randrange(len(rows))
        for place in range(len(rows)) if chance.random() < 0.3 else [at]:
            rows[place] = json.dumps(damage_json(json.loads(rows[place]), chance))
        return void(file.write_text("\n".join(rows)))
    length = int.from_bytes(data[:8], "little") if len(data) > 8 else 0
    if file.suffix == ".yaml":
        content = damage_json(yaml.safe_load(data), chance)
        return void(file.write_text(yaml.safe_dump(content), errors="replace"))
    if data[8:9] == b"{" and length < len(data):
        header = damage_json(json.loads(data[8 : 8 + length]), chance)
        if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
            about = header["__metadata__"]
            key = next(iter(about), None)
            if (
                key
                and isinstance(about[key], str)
                and about[key][:1] == "{"
                and chance.random() < 0.5
            ):
                about[key] = json.dumps(damage_json(json.loads(about[key]), chance))
        text = json.dumps(header).encode()
        return void(file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :]))
    try:
        content = json.loads(data)
    except ValueError:
        return some_bytes(file, chance)
    return void(file.write_text(json.dumps(damage_json(content, chance))))


def void(_: object) -> None:
    return None


def array_value(file: Path, chance: random.Random) -> None:
    """A tensor or a column with odd numbers, another shape or another type."""
    data = file.read_bytes()
    if data[:4] == b"PAR1":
        table = pq.read_table(file)
        at = chance.randrange(table.num_columns)
        name, column = table.column_names[at], table.column(at)
        act = chance.randrange(5)
        if act == 0:
            table = table.drop_columns([name])
        elif act == 1:
            table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
        else:
            odd = (
                [None] * len(column),
                [{"a": 1}] * len(column),
                [math.nan] * len(column),
                [-1] * len(column),
                ["x"] * len(column),
                [chance.choice((1e300, math.inf)), *([1.0] * (len(column) - 1))],
            )
            table = table.set_column(at, name, pa.array(chance.choice(odd)))
        return pq.write_table(table.replace_schema_metadata(pq.read_schema(file).metadata), file)
    try:
        arrays = load_file(file)
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            notes = opened.metadata()
    except Exception:
        return json_value(file, chance)
    name = chance.choice(sorted(arrays))
    array, act = arrays[name].copy(), chance.randrange(7)
    if act == 0:
        del arrays[name]
        return save_file(arrays, file, notes)
    if act == 1:
        array = array.reshape(-1)
    elif act == 2:
        array = array[:0] if array.ndim else array
    elif act == 3:
        kinds = (np.uint8, np.bool_, np.float16, np.float64, np.int16, np.uint64, np.complex64)
        with np.errstate(all="ignore"):
            array = array.astype(chance.choice(kinds))
    elif array.size:
        values = (math.nan, math.inf, -1, 1e30, 0) if array.dtype.kind == "f" else (-1, 2**15, 0)
        places = slice(None) if chance.random() < 0.3 else chance.randrange(array.size)
        with np.errstate(all="ignore"):
            array.reshape(-1)[places] = np.asarray(chance.choice(values)).astype(array.dtype)
    arrays[name] = np.ascontiguousarray(array)
    return save_file(arrays, file, notes)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "some_bytes": some_bytes,
    "cut": cut,
    "doubled": doubled,
    "other_kind": other_kind,
    "json_value": json_value,
    "array_value": array_value,
}
# What the structure of a file lets through is where faults hide.
OFTEN = (*MUTATIONS, "json_value", "json_value", "array_value", "array_value")


def make_case(seed: int) -> Case:
    chance = random.Random(seed)
    readers = READERS + FURTHER if seed >= FURTHER_FROM else READERS
    file, command = chance.choice(readers)
    return Case(command, file, chance.choice(OFTEN), seed)


# ---- running a case


def outcome(case: Case, sound: Path, place: Path) -> tuple[str, str]:
    """The class of what came of a case, and what was printed."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    MUTATIONS[case.mutation](place / case.file, random.Random(case.seed))
    return outcome_of(case.command, place)


def outcome_of(command: Sequence[str], place: Path) -> tuple[str, str]:
    """The class of what came of a command, run in a folder, and what was printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        child = os.fork()
        if not child:
            in_child(command, place, printed)
        ended = wait_for(child)
        printed.seek(0)
        text = printed.read()
    if not ended[0]:
        return "HANG", text
    code = os.waitstatus_to_exitcode(ended[1])
    if code < 0:
        return "CRASH", f"signal {-code}\n{text}"
    if code == 2:
        lines = [line for line in text.strip().splitlines() if ERROR.match(line)]
        if len(lines) != 1 or len(lines[0]) > LONGEST_LINE:
            return "LINES", text
        return ("left over" if left_over(place) else "one line"), text
    # 1: what verify looked at is not as it was written; what doctor looked at lacks something.
    if code and not (code == 1 and command[0] in ("doctor", "verify") and "Traceb" not in text):
        return "TRACEBACK", text
    return ("NOT FINITE" if not_finite(place) else "taken"), text


def wait_for(child: int) -> tuple[int, int]:
    """What waitpid says of a child that ended; (0, 0) of one that hung, which is killed.

    It hangs when it has computed for SECONDS, or has not computed for as long. A busy machine
    makes neither happen.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    used, since = -1.0, time.monotonic()
    while True:
        ended = os.waitpid(child, os.WNOHANG)
        if ended[0]:
            return ended
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        now, waits = (int(fields[11]) + int(fields[12])) / ticks, fields[0] != "R"
        if now > used or not waits:
            used, since = now, time.monotonic()
        if now > SECONDS or time.monotonic() - since > SECONDS:
            os.kill(child, signal.SIGUSR1)  # in_child: where it is
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 0, 0
        time.sleep(0.01)


def in_child(command: Sequence[str], place: Path, printed: Any) -> None:
    """Run the command in this process, which ends."""
    code = 70
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
        faulthandler.register(signal.SIGUSR1, file=printed, all_threads=True)
        sys.stdout = sys.stderr = os.fdopen(2, "w", errors="replace", closefd=False)
        memory = 16 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        os.chdir(place)
        code = cli.main(list(command))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code or 0)


def left_over(place: Path) -> bool:
    """Whether a refused command left an output, or a part of one."""
    return (place / "out").exists() or any(place.glob(".out*"))


def not_finite(place: Path) -> bool:
    """Whether an output holds a number that is not finite."""
    out = place / "out"
    for file in [out, *out.rglob("*")] if out.is_dir() else [out] if out.exists() else []:
        if not file.is_file():
            continue
        head = file.read_bytes()[:9]
        if head[:4] == b"PAR1":
            for column in pq.read_table(file).columns:
                if pa.types.is_floating(column.type):
                    values = column.to_numpy()[column.is_valid().to_numpy()]
                    if not np.isfinite(values).all():
                        return True
        elif head[8:9] == b"{":
            from safetensors.torch import load_file as load

            for name, tensor in load(file).items():
                # What is carried over from beside the text model may hold infinities.
                bad = torch.isnan if "visual" in name else lambda x: ~torch.isfinite(x)
                if tensor.is_floating_point() and bad(tensor.float()).any():
                    return True
        elif file.suffix == ".json" or head[:1] == b"{":
            text = file.read_text(errors="replace")
            if "NaN" in text or "Infinity" in text:
                return True
    return False


FAULTS = ("TRACEBACK", "HANG", "CRASH", "LINES", "NOT FINITE", "left over")


def fuzz(seeds: Sequence[int], folder: Path) -> tuple[Counter[str], list[tuple[Case, str, str]]]:
    """The classes of these cases, and every fault's case, class and output."""
    sound = folder / "sound"
    sound.mkdir()
    back = Path.cwd()
    try:
        make_sound(sound)
    finally:
        os.chdir(back)
    classes: Counter[str] = Counter()
    faults = []
    for seed in seeds:
        case = make_case(seed)
        kind, text = outcome(case, sound, folder / "case")
        classes[kind] += 1
        if kind in FAULTS:
            faults.append((case, kind, text))
            print(f"{kind}: {case}", file=sys.stderr)
        if sum(classes.values()) % 100 == 0:
            print(f"{sum(classes.values())} of {len(seeds)}: {dict(classes)}", file=sys.stderr)
    return classes, faults


def main() -> int:
    cases, seed = map(int, (sys.argv[1:] + ["3000", "900000"][len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="m2d-fuzz-") as folder:
        classes, faults = fuzz(range(seed, seed + cases), Path(folder))
    for case, kind, text in faults:
        print(f"\n{kind}: {case}\n" + "\n".join(text.strip().splitlines()[-12:]))
    print()
    for kind, count in classes.most_common():
        print(f"{count:6d}  {kind}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
