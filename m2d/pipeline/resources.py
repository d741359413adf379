"""What one job of the workflow needs, from sizes alone: arithmetic, memory, disk.

Sizes are what `m2d inspect TEACHER --json` prints (workflow/resources/sizes/). The workflow asks
for resources by these numbers and `m2d estimate` adds them up, so nothing here imports torch.

Legend: P parameters of the teacher, A those that a token passes, L those of its largest layer, U
those outside its layers, S those of the student; E experts, k of them selected, e parameters of an
expert, M layers with experts, H hidden size, V vocabulary, W width of the student's FFN; T tokens;
b bytes per number. A product with a matrix of n parameters takes 2n operations a token, forward;
backward takes twice that. Attention's own products and the optimizer's are left out: they are
small beside these, and `utilization` is measured without them too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from m2d.errors import UserError
from m2d.options import AUTO
from m2d.pipeline.schema import HardwareSettings as Hardware

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = 2e9  # main memory of Python, torch and its libraries
CONTEXT = 2e9  # a GPU's memory that CUDA and its libraries take
LOSS = 2e9  # a GPU's memory for chunks of logits
BUCKETS = 1e9  # gradients on their way between GPUs
MEMORY_RATE = 5e9  # bytes per second that experts are merged at, in main memory
TOKENIZER_RATE = 3e5  # tokens per second of text read and cut

Sizes = Mapping[str, Any]


def item_bytes(dtype: str, sizes: Sizes) -> int:
    """Bytes of a number of a teacher with these sizes, by the config's dtype."""
    return BYTES[sizes["dtype"] if dtype == AUTO else dtype]


@dataclass(frozen=True)
class Need:
    """Of one job. Bytes, except where said."""

    flops: float = 0.0
    tokens: float = 0.0
    """Tokens that pass through a model."""
    memory: float = PROCESS
    """Main memory of one node."""
    gpu_memory: float = 0.0
    """Of every GPU."""
    read: float = 0.0
    """From disk."""
    write: float = 0.0
    """What stays on disk."""
    scratch: float = 0.0
    """On disk while the job runs."""
    other_seconds: float = 0.0
    """Time besides arithmetic and disk."""
    gpus: int = 0
    """GPUs in use together; 0 for a job without."""

    def seconds(self, hardware: Hardware) -> float:
        """Time at the stated speeds, one thing after the other."""
        speed = hardware.flops * hardware.utilization * max(self.gpus, 1)
        disk = (self.read + self.write) / (hardware.disk_gb_per_second * 1e9)
        return self.flops / speed + disk + self.other_seconds


@cache
def read_sizes(file: str) -> Sizes:
    """The sizes of a teacher. Raises UserError where the file is not from `m2d inspect --json`."""
    try:
        sizes = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); m2d inspect TEACHER --json") from None
    if not isinstance(sizes, dict) or "layer_parameters" not in sizes:
        raise UserError(f"{file}: not from m2d inspect TEACHER --json; make it again")
    return sizes


def streamed(sizes: Sizes, item: int, tokens: float) -> float:
    """A GPU's memory for a teacher that passes through layer by layer: (2L + U) b + T H b."""
    weights = 2 * sizes["layer_parameters"] + sizes["trunk_parameters"]
    return CONTEXT + LOSS + (weights + tokens * sizes["hidden_size"]) * item


def host(sizes: Sizes, item: int) -> float:
    """Main memory that reads tensors one by one: a few of the largest layer's."""
    return PROCESS + (2 * sizes["layer_parameters"] + sizes["trunk_parameters"]) * item


def tokenized(tokens: float) -> Need:
    """A token file: int64 numbers, of a text of about four bytes each."""
    return Need(read=4 * tokens, write=8 * tokens, other_seconds=tokens / TOKENIZER_RATE)


def statistics(sizes: Sizes, item: int, tokens: float) -> Need:
    """Routing statistics: 2 A T."""
    return Need(
        flops=2 * sizes["active_parameters"] * tokens,
        tokens=tokens,
        memory=host(sizes, item),
        gpu_memory=streamed(sizes, item, tokens),
        read=sizes["teacher_parameters"] * item,
        gpus=1,
    )


def gram(sizes: Sizes, item: int, tokens: float) -> Need:
    """Gram statistics: every expert on every token, 2 P T, and their products, M E^2 H T."""
    products = sizes["num_moe_layers"] * sizes["num_experts"] ** 2 * sizes["hidden_size"]
    return Need(
        flops=(2 * sizes["teacher_parameters"] + products) * tokens,
        tokens=tokens,
        memory=host(sizes, item),
        gpu_memory=streamed(sizes, item, tokens),
        read=sizes["teacher_parameters"] * item,
        write=sizes["num_moe_layers"] * 3 * sizes["num_experts"] ** 2 * 4,
        gpus=1,
    )


def distinct_students(top_k: int, keeps: list[int], groupings: int, scalings: int) -> int:
    """Students of a grid that differ: at K = k every expert is its own group, however grouped."""
    return scalings * sum(1 if keep == top_k else groupings for keep in keeps)


def grid(
    sizes: Sizes, item: int, tokens: float, keeps: list[int], groupings: int, scalings: int
) -> Need:
    """Perplexity of a grid's distinct students: 2 S T each, and M K e b of experts merged."""
    top_k = sizes["top_k"]
    count = distinct_students(top_k, keeps, groupings, scalings)
    kept = scalings * sum(keep * (1 if keep == top_k else groupings) for keep in keeps)
    student = sizes["student_parameters"] * item
    experts = sizes["num_moe_layers"] * sizes["expert_parameters"] * item
    return Need(
        flops=2 * sizes["student_parameters"] * tokens * count,
        tokens=tokens * count,
        # All experts stay in memory from one student to the next.
        memory=PROCESS + sizes["teacher_parameters"] * item + student,
        gpu_memory=CONTEXT + LOSS + student,
        read=sizes["teacher_parameters"] * item,
        other_seconds=kept * experts / MEMORY_RATE,
        gpus=1,
    )


def merge(sizes: Sizes, item: int, keep: int) -> Need:
    """A student written tensor by tensor: K of E experts read, S b written."""
    dropped = sizes["num_moe_layers"] * (sizes["num_experts"] - keep) * sizes["expert_parameters"]
    return Need(
        memory=host(sizes, item),
        read=(sizes["teacher_parameters"] - dropped) * item,
        write=sizes["student_parameters"] * item,
    )


def refit(sizes: Sizes, item: int, tokens: float) -> Need:
    """Closed form: teacher and student on every token, 2 (A + S) T, and M times 2 W^2 T."""
    width = sizes["students"][0]["intermediate_size"]
    student = sizes["student_parameters"]
    normal = sizes["num_moe_layers"] * 2 * width**2
    return Need(
        flops=(2 * (sizes["active_parameters"] + student) + normal) * tokens,
        tokens=tokens,
        memory=host(sizes, item),
        # The student's hidden states beside the teacher's; float64 normal equations and factor.
        gpu_memory=streamed(sizes, item, 2 * tokens) + 3 * 8 * width**2,
        read=(sizes["teacher_parameters"] + student) * item,
        write=student * item,
        gpus=1,
    )


def align(sizes: Sizes, item: int, tokens: float, trained: float) -> Need:
    """Refit, and every FFN trained on `trained` tokens: 6 of its parameters each, in float32."""
    width, hidden = sizes["students"][0]["intermediate_size"], sizes["hidden_size"]
    block = 3 * width * hidden
    need = refit(sizes, item, tokens)
    return replace(
        need,
        flops=need.flops + 6 * block * sizes["num_moe_layers"] * trained,
        # Weights, gradients, momentum and the trained copy; what every token should come to.
        gpu_memory=need.gpu_memory + 16 * block + 2 * 4 * tokens * hidden,
    )


def perplexity_of_teacher(sizes: Sizes, item: int, tokens: float) -> Need:
    """2 A T, the teacher layer by layer."""
    return statistics(sizes, item, tokens)


def perplexity_of_student(parameters: int, item: int, tokens: float) -> Need:
    """2 S T, the student in memory."""
    return Need(
        flops=2 * parameters * tokens,
        tokens=tokens,
        memory=PROCESS + parameters * item,
        gpu_memory=CONTEXT + 2 * LOSS + parameters * item,
        read=parameters * item,
        gpus=1,
    )


def evaluation(parameters: int, active: int, item: int, tokens: float, hardware: Hardware) -> Need:
    """lm-eval: 2 A T, the model whole, on as many GPUs as hold it."""
    whole = parameters * item
    capacity = hardware.gpu_memory_gb * 1e9
    gpus = max(1, ceil(whole / (capacity - CONTEXT - 2 * LOSS)))
    return Need(
        flops=2 * active * tokens,
        tokens=tokens,
        memory=PROCESS + whole,
        gpu_memory=CONTEXT + 2 * LOSS + whole / gpus,
        read=whole,
        gpus=gpus,
    )


def active_parameters(sizes: Sizes, recipe: Mapping[str, Any]) -> int:
    """A, with as many experts as a recipe's `teacher_top_k` has a token pass."""
    active = int(sizes["active_parameters"])
    if "teacher_top_k" in recipe:
        extra = recipe["teacher_top_k"] - sizes["top_k"]
        active += extra * sizes["expert_parameters"] * sizes["num_moe_layers"]
    return active


def teacher_logits(
    sizes: Sizes, item: int, recipe: Mapping[str, Any], tokens: float, hardware: Hardware
) -> Need:
    """Teacher outputs, 2 A T, the model whole; n numbers of 2 bytes and n ids of 2 or 4 a token."""
    active, whole = active_parameters(sizes, recipe), sizes["teacher_parameters"]
    need = evaluation(whole, active, item, tokens, hardware)
    number = 2 + (2 if sizes["vocab_size"] <= 2**16 else 4)
    return replace(need, write=tokens * recipe["teacher_logits"]["size"] * number)


def distillation(
    sizes: Sizes, item: int, recipe: Mapping[str, Any], length: int, hardware: Hardware
) -> Need:
    """Teacher forward 2 A, student forward and backward 6 S (8 S where activations are recomputed).

    Every GPU holds the teacher; where its outputs are stored, A and P are 0. ZeRO-2 shards the
    student's gradients, float32 weights and Adam's two moments: P b + 2 S + 16 S / GPUs.
    Activations: 24 H + 8 W bytes per token and layer, or 2 H and one layer's where they are
    recomputed. Checkpoints: two of 14 S bytes.

    GPUs: the recipe's, else the fewest that hold it and are done within `hardware.hours`.
    """
    student, layers = sizes["student_parameters"], sizes["num_layers"]
    hidden, width = sizes["hidden_size"], sizes["students"][0]["intermediate_size"]
    device_batch = recipe.get("device_batch", 1)
    stored = "teacher_logits" in recipe
    active = 0 if stored else active_parameters(sizes, recipe)
    again = recipe.get("gradient_checkpointing", False)
    tokens = recipe["steps"] * recipe.get("batch", device_batch) * length
    layer = 24 * hidden + 8 * width
    activations = device_batch * length * (layers * 2 * hidden + layer if again else layers * layer)
    teacher = 0 if stored else sizes["teacher_parameters"] * item

    def need(gpus: int) -> Need:
        on_node = min(gpus, hardware.gpus_per_node)
        states = 2 * student + 16 * student / gpus
        return Need(
            flops=(2 * active + (8 if again else 6) * student) * tokens,
            tokens=tokens,
            # Every process reads the student in float32 before it is on its GPU.
            memory=PROCESS * on_node + 4 * student * on_node + 4e9,
            gpu_memory=CONTEXT + LOSS + BUCKETS + teacher + states + activations,
            read=teacher + student * item,
            write=student * item,
            scratch=2 * 14 * student,
            gpus=gpus,
        )

    if "gpus" in recipe:
        return need(max(recipe["gpus"], 1))
    choices = [need(gpus) for gpus in gpu_counts(recipe, hardware)]
    fits = [n for n in choices if n.gpu_memory <= hardware.gpu_memory_gb * 1e9]
    soon = [n for n in fits if n.seconds(hardware) <= hardware.hours * 3600]
    return (soon[:1] or fits[-1:] or choices[-1:])[0]


def gpu_counts(recipe: Mapping[str, Any], hardware: Hardware) -> list[int]:
    """Numbers of GPUs that a step's sequences can be shared out to: 1, 2, 4, ... or whole nodes."""
    device_batch = recipe.get("device_batch", 1)
    shares = recipe.get("batch", device_batch) // device_batch
    node = hardware.gpus_per_node
    within = [2**i for i in range(node.bit_length()) if 2**i < node]
    counts = [*within, *(node * nodes for nodes in range(1, hardware.max_nodes + 1))]
    return [count for count in counts if shares % count == 0]
