"""Names on disk to names of the class, where transformers' patterns meet what is not theirs."""

from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming

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


def test_a_tensor_may_be_turned_cut_or_shared_out() -> None:
    """As Ernie 4.5 VL's router, its correction bias, and its list of text's and images' experts."""
    text, images = ("model.layers.0.mlp.text.", "model.layers.0.mlp.images.")
    known = {f"{path}{name}" for path in (text, images) for name in ("bias", "experts.down_proj")}
    converters = (
        WeightConverter("mlp.gate", "mlp.text.gate", [Transpose(0, 1)]),
        WeightConverter("mlp.bias", ["mlp.text.bias", "mlp.images.bias"], [Chunk(dim=0)]),
        WeightConverter(
            "experts.*.down_proj.weight",
            ["text.experts.down_proj", "images.experts.down_proj"],
            [Chunk(dim=0)],
        ),
    )
    counts = {f"{text}experts.down_proj": 3, f"{images}experts.down_proj": 2}
    names = Names(converters, frozenset({*known, f"{text}gate"}), "model", counts)
    disk = "model.layers.0.mlp."
    assert names.of([f"{disk}gate", f"{disk}bias"]) == {
        f"{disk}gate": Named(f"{text}gate", turned=(0, 1)),
        f"{disk}bias": Named(f"{text}bias", others=(f"{images}bias",)),
    }
    experts = [f"{disk}experts.{number}.down_proj.weight" for number in range(5)]
    assert [named.name for named in names.of(experts).values()] == [
        *(f"{text}experts.{number}.down_proj.weight" for number in range(3)),
        *(f"{images}experts.{number}.down_proj.weight" for number in range(2)),
    ]
