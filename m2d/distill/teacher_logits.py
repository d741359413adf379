"""A teacher's outputs on a token file, stored for the distillation of many students.

`m2d teacher-logits TEACHER OUT --tokens FILE`, then `m2d distill ... --teacher-logits OUT` for each
student, which then needs neither the teacher's weights nor its time. The work can be shared: with
`--part 2/8` a job makes every eighth shard, beginning with the second.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from m2d.artifacts import sha256_of
from m2d.claims import claim, clear
from m2d.devices import announce, compute_dtype, dtype_name, pick_device
from m2d.distill.loading import device_map, expand_routing
from m2d.distill.logits import (
    KINDS,
    check_index,
    outputs_of,
    shard_path,
    shard_rows,
    write_index,
    write_shard,
)
from m2d.errors import UserError
from m2d.models.fingerprint import fingerprint
from m2d.models.hub import name_of
from m2d.models.teacher import dtype_of, locate, read_config
from m2d.options import add_compute_options, positive, seed
from m2d.progress import progress, say
from m2d.tokens.dataset import PackedTokens


def part(text: str) -> tuple[int, int]:
    """I/N as (I - 1, N) (an argparse type)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N with 1 <= I <= N")
    return int(match[1]) - 1, int(match[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the folder to write, or to go on with")
    parser.add_argument("--tokens", type=Path, required=True, help="token file from m2d tokenize")
    parser.add_argument("--kind", choices=KINDS, default="top", help="(top)")
    parser.add_argument("--size", type=positive, default=64, help="tokens or draws kept, n (64)")
    parser.add_argument("--teacher-top-k", type=positive, help="experts per token (its own)")
    parser.add_argument("--rows", type=positive, default=1024, help="sequences of a shard (1024)")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="of the shards")
    parser.add_argument("--seed", type=seed, default=0, help="of the draws (0)")
    parser.add_argument(
        "--device-map", type=device_map, metavar="MAP", help="spread the teacher: auto, or JSON"
    )
    add_compute_options(parser)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    from m2d.distill.heads import check_head, head_of, hidden_states
    from m2d.models.load import check_model, load_model

    folder = locate(args.teacher)
    _, config = read_config(folder)
    check_model(folder, config)  # before anything is written
    vocabulary = config.get_text_config().vocab_size
    if args.size > vocabulary:
        raise UserError(f"--size {args.size}: the vocabulary has {vocabulary} tokens")
    if args.teacher_top_k:
        expand_routing(config, args.teacher_top_k, folder)
    tokens = PackedTokens(args.tokens, seed=0)
    tokens.check_vocabulary(vocabulary)
    own, device = dtype_of(config, folder), pick_device(args.device)
    dtype = compute_dtype(args.dtype, own, device)
    index: dict[str, Any] = {
        "format": 1,
        "kind": args.kind,
        "size": args.size,
        "seed": args.seed if args.kind == "sampled" else None,
        "teacher": Path(name_of(args.teacher)).name,
        "teacher_config_sha256": sha256_of(folder / "config.json"),
        "teacher_fingerprint": fingerprint(folder),
        "teacher_top_k": args.teacher_top_k,
        "tokens_sha256": sha256_of(args.tokens),
        "vocabulary": vocabulary,
        "sequences": tokens.sequences,
        "length": tokens.length,
        "rows_of_shard": args.rows,
        "dtype": dtype_name(dtype),
    }
    check_index(args.out, index)
    first, step = args.part
    mine = list(shard_rows(tokens.sequences, args.rows))[first::step]
    missing = [item for item in mine if not shard_path(args.out, item[0]).exists()]
    if missing:
        where = args.device_map or device
        announce(args.teacher, own, dtype, device)
        model = load_model(folder, config, dtype, where, narrow=True)
        head = head_of(model).to(device)
        stored = tokens.rows()
        check_head(model, torch.from_numpy(stored[0:1].astype("int64"))[:, :16], args.teacher)
    for number, rows in progress(missing, "teacher outputs, shards"):
        # A shard's draws depend on its number alone, not on which job makes it.
        generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + number)
        parts = []
        for start in range(rows.start, rows.stop, args.batch):
            batch = stored[start : min(start + args.batch, rows.stop)]
            ids = torch.from_numpy(batch.astype("int64")).to(device)
            hidden_TH = hidden_states(model, ids).flatten(0, 1).to(device)
            made = outputs_of(hidden_TH, head, args.kind, args.size, generator)
            parts.append([x.cpu().unflatten(0, tuple(ids.shape)) for x in made])
        ids, log_p = (torch.cat(column) for column in zip(*parts, strict=True))
        shard = shard_path(args.out, number)
        with claim(shard):  # parts of several divisions have it in common
            write_shard(shard, ids, log_p, vocabulary, index)
    for number, _ in mine:
        clear(shard_path(args.out, number))
    write_index(args.out, index)  # of a part that has no shard
    say(f"{args.out}: {len(mine)} shards of {tokens.sequences} sequences, {args.kind} {args.size}")
