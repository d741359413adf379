"""Names on disk to names of the class, where transformers' patterns meet what is not theirs."""

from transformers.core_model_loading import WeightRenaming

from m2d.models.names import Named, Names

KNOWN = frozenset({"model.norm.weight", "model.layers.0.self_attn.kv_norm.weight"})
# As DeepSeek-V4 has them: the repository's names on the left.
RENAMINGS = (
    WeightRenaming(source_patterns=r"\.attn\.", target_patterns=".self_attn."),
    WeightRenaming(source_patterns=r"\.norm\.", target_patterns=".kv_norm."),
)


def test_a_name_of_the_class_itself_stays() -> None:
    """The last norm looks like the repository's norm of keys and values, as stock loading knows."""
    names = Names(RENAMINGS, KNOWN, "model")
    assert names.of(["model.norm.weight", "layers.0.attn.norm.weight", "norm.weight"]) == {
        "model.norm.weight": Named("model.norm.weight"),
        "layers.0.attn.norm.weight": Named("model.layers.0.self_attn.kv_norm.weight"),
        "norm.weight": Named("model.norm.weight"),
    }
