"""Hostile files and kills, a few of each; `make fuzz` and `make kills` run thousands."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from m2d.artifacts import read_json
from m2d.choose.plan import plan_from_dict
from m2d.errors import UserError
from m2d.models.hub import licence_of
from m2d.statistics.files import read_gram, read_routing
from m2d.statistics.neurons import read_neurons
from m2d.statistics.shards import read_share
from m2d.tokens.files import read_tokens
from m2d.tokens.text import read_documents
from tests.fuzz import FAULTS, fuzz
from tests.kills import kills

ANY_JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=8), inner),
    max_leaves=12,
)
# A file made anew for each example may stand at the same path.
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# Seeds whose cases were once a traceback: numbers and words of another type than their readers
# thought, in a plan, a tokenizer_config.json, a chat template and a grid. Then an index of more
# shards than could be counted, a checkpoint with bytes of no tensor, and one of no layers.
ONCE_FAULTS = (50806, 51020, 51293, 51409, 51419, 51705, 52061, 52786, 52788)
ONCE_FAULTS += (710180, 900145, 900323)


def test_mutations_of_sound_files(tmp_path: Path) -> None:
    _, faults = fuzz([*range(5000, 5030), *ONCE_FAULTS], tmp_path)
    assert [f"{kind}: {case}\n{text[-500:]}" for case, kind, text in faults] == []
    assert "TRACEBACK" in FAULTS


def test_kills_at_file_system_events(tmp_path: Path) -> None:
    found = list(kills(26, tmp_path))
    assert len(found) >= 13
    assert [one for one in found if one[2]] == []


@pytest.mark.parametrize(
    "number", [10**400, -(10**400), float("inf"), float("nan"), 1e309, True, "1"]
)
def test_numbers_that_no_float_holds_are_no_weights(number: object) -> None:
    group = {"experts": [0], "weights": [1.0], "scale": number}
    plan = {
        "format": 1,
        "scoring": "s",
        "grouping": "g",
        "scaling": "u",
        "keep": 1,
        "layers": [{"layer": 0, "groups": [group]}],
    }
    with pytest.raises(UserError, match="scale is"):
        plan_from_dict(plan, num_experts=4)


@pytest.mark.parametrize(
    "reader", [read_tokens, read_gram, read_routing, read_neurons, read_share, read_json]
)
def test_any_bytes_are_read_or_refused(reader, tmp_path: Path) -> None:
    @QUICK
    @given(some.binary(max_size=64) | some.binary(max_size=40).map(lambda b: b"PAR1" + b + b"PAR1"))
    def check(data: bytes) -> None:
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(UserError) as caught:
            reader(tmp_path / "file")
            raise UserError("read")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500 + len(str(tmp_path))

    check()


@QUICK
@given(some.lists(ANY_JSON, max_size=5))
def test_any_rows_are_documents_or_skipped(tmp_path: Path, rows: list) -> None:
    import json

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        found = list(read_documents([tmp_path / "rows.jsonl"]))
    except UserError:
        return
    for document in found:
        assert document
        assert isinstance(document, str) or all(isinstance(m["role"], str) for m in document)


@QUICK
@given(ANY_JSON)
def test_any_json_is_a_plan_or_refused(content: object) -> None:
    with pytest.raises(UserError):
        plan_from_dict(content, num_experts=4, expert_width=8, layers=[0])


@QUICK
@given(some.text(max_size=60))
def test_any_front_matter_is_read(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n", errors="replace")
    assert all(isinstance(value, str) for value in licence_of(tmp_path).values())
