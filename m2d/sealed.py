"""Numbers that are known to be what was written: finite when written, digested, compared when read.

A file of arrays carries a SHA-256 digest of them in its metadata, a student's folder one of every
file in its m2d.json. Small files are compared on every reading; `m2d verify` compares all.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2d.artifacts import read_json, reading, sha256_of
from m2d.errors import UserError

# Of a student's folder, what may change afterwards: the card is renewed with scores.
NOT_SEALED = ("m2d.json", "README.md")


def digest_of(arrays: Mapping[str, Any]) -> str:
    """Of named arrays: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype.str} {list(np.shape(value))}\n".encode())
        digest.update(array.data.cast("B") if array.size else b"")
    return digest.hexdigest()


def require_finite_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Raise a UserError where an array holds NaN or infinity."""
    for name, value in arrays.items():
        array = np.asarray(value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} holds NaN or infinity, so nothing is written; do the weights and "
                "the compute dtype go together (--dtype)?"
            )


def require_digest(
    path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Raise a UserError where arrays are not those that the metadata's digest is of."""
    recorded = metadata.get("sha256")
    if recorded is not None and recorded != digest_of(arrays):
        raise UserError(
            f"{path}: its numbers are not those that were written (the digest differs); the file "
            "was changed or damaged, make it again"
        )


def digest_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of a table's rows, their columns in any order."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def digest_of_record(record: Mapping[str, Any]) -> str:
    """Of what m2d.json says, but for its own digest, `record_sha256`."""
    rest = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a Parquet table whose metadata may have their digest, `rows_sha256`.

    Raises UserError where the file is unreadable, or the rows are not those that were written.
    """
    import pyarrow.parquet as pq

    with reading(path, "readable as Parquet"):
        table = pq.read_table(path)
        rows: list[dict[str, Any]] = table.to_pylist()
        recorded = notes_of(path).get("rows_sha256")
        if recorded is not None and recorded != digest_of_rows(rows):
            raise ValueError(
                "its numbers are not those that were written; it was changed or damaged, make it "
                "again"
            )
        return rows


def digests_in(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of a student's files, but for m2d.json, which holds these, and the card."""
    return {
        str(file.relative_to(folder)): sha256_of(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in NOT_SEALED
    }


def notes_of(file: str | Path) -> dict[str, Any]:
    """What a file of numbers (Parquet, safetensors) or a result (JSON) notes of how it was made."""
    with reading(file, "readable"), Path(file).open("rb") as stream:
        head = stream.read(9)
    if head[:4] == b"PAR1" or Path(file).suffix == ".parquet":
        import pyarrow.parquet as pq

        with reading(file, "readable as Parquet"):
            about = json.loads((pq.read_schema(file).metadata or {}).get(b"m2d", b"{}"))
    elif head[8:] == b"{" and head[:1] != b"{":
        from safetensors import safe_open

        with reading(file, "a readable safetensors file"), safe_open(file, "np") as opened:
            about = json.loads((opened.metadata() or {}).get("m2d", "{}"))
    else:
        about = read_json(file)
    return about if isinstance(about, dict) else {}


def noted_tokens(file: str | Path) -> str | None:
    """Digest of the tokens that a grid or perplexity was measured on; None where none is noted."""
    noted = notes_of(file).get("tokens_sha256")
    return noted if isinstance(noted, str) else None


def require_same_tokens(noted: Mapping[str, str | None]) -> None:
    """Raise a UserError where files, by name, note digests of different tokens."""
    first = {digest: file for file, digest in reversed(list(noted.items())) if digest}
    if len(first) > 1:
        *_, other, one = first.values()
        raise UserError(
            f"{other}: was measured on other tokens than {one}, so their perplexities are not "
            "comparable; measure them on one token file"
        )
