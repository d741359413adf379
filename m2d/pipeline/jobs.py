"""Jobs of the workflow to their needs, and needs to what is asked of a queue."""

from collections.abc import Mapping
from math import ceil, isfinite
from typing import Any

from m2d.errors import UserError
from m2d.pipeline.resources import (
    Hardware,
    Need,
    Sizes,
    align,
    distillation,
    evaluation,
    gram,
    grid,
    item_bytes,
    merge,
    perplexity_of_student,
    perplexity_of_teacher,
    read_sizes,
    refit,
    statistics,
    teacher_logits,
    tokenized,
)
from m2d.pipeline.settings import evaluation_jobs, logits_names
from m2d.pipeline.student_settings import student_kind

# What is asked for above the estimate; every further attempt asks for as much again.
MEMORY_MARGIN = 1.25
TIME_MARGIN = 2.0
START_MINUTES = 15
ALIGN_TOKENS = 4096  # of a step of `m2d align`
CPU_RULES = {"make_tokens", "merge_student", "merge_neurons", "initialise_student"}

Names = Mapping[str, str]


def hardware_of(config: Mapping[str, Any]) -> Hardware:
    """The config's `hardware`."""
    return Hardware(**config["hardware"])


def sizes_of(config: Mapping[str, Any], teacher: str) -> Sizes | None:
    """The sizes of a teacher, None where the config names no file of them."""
    file = config["teachers"][teacher].get("sizes")
    return read_sizes(file) if file else None


def need_of(config: Mapping[str, Any], rule: str, names: Names) -> Need | None:
    """What a job needs; None for a teacher without sizes.

    names: the job's wildcards; for a rule that scores a model, `evaluation` as well.
    """
    sizes = sizes_of(config, names["teacher"])
    if sizes is None:
        return None
    teacher, hardware = config["teachers"][names["teacher"]], hardware_of(config)
    item, tokens = item_bytes(teacher["dtype"], sizes), teacher["tokens"]

    def amount(use: str) -> int:
        return int(tokens[use]["sequences"] * tokens[use]["length"])

    if rule == "make_tokens":
        return tokenized(amount(names["tokens"]))
    if rule == "compute_statistics":
        return statistics(sizes, item, amount("calibration"))
    if rule == "compute_gram":
        return gram(sizes, item, amount("calibration"))
    if rule == "compute_share":
        part = ceil(amount("calibration") / int(names["shares"]))
        return (gram if names["kind"] == "gram" else statistics)(sizes, item, part)
    if rule == "measure_grid":
        methods = (len(config["grid"]["groupings"]), len(config["grid"]["scalings"]))
        return grid(sizes, item, amount("test"), teacher["keeps"], *methods)
    if rule == "measure_teacher":
        return perplexity_of_teacher(sizes, item, amount("test"))
    if rule == "evaluate_teacher":
        total, active = sizes["teacher_parameters"], sizes["active_parameters"]
        return evaluation(total, active, item, scored_tokens(config, names), hardware)
    if rule == "store_teacher_logits":
        recipe = logits_names(config)[names["logits"]]
        item = item_bytes(recipe.get("teacher_dtype", teacher["dtype"]), sizes)
        part = ceil(amount("distillation") / int(names["parts"]))
        return teacher_logits(sizes, item, recipe, part, hardware)
    if rule in ("measure_neurons", "fold_teacher"):
        return gram(sizes, item, amount("calibration"))
    if rule == "prune_student":
        return statistics(sizes, item, amount("calibration"))
    student = config["students"].get(names["student"], {})
    sizes = with_student(sizes, student)
    parameters = sizes["student_parameters"]
    if rule in ("merge_student", "merge_neurons"):
        return merge(sizes, item, student.get("keep", sizes["num_experts"]))
    if rule == "initialise_student":
        return merge(sizes, item, 0)
    if rule == "refit_student":
        return refit(sizes, item, amount("calibration"))
    if rule == "align_student":
        return align(sizes, item, amount("calibration"), student["align"] * ALIGN_TOKENS)
    if rule == "measure_student":
        return perplexity_of_student(parameters, item, amount("test"))
    if rule == "evaluate_student":
        return evaluation(parameters, parameters, item, scored_tokens(config, names), hardware)
    if rule == "distill_student":
        recipe = config["recipes"][names["recipe"]]
        return distillation(sizes, item, recipe, tokens["distillation"]["length"], hardware)
    raise KeyError(rule)


def with_student(sizes: Sizes, student: Mapping[str, Any]) -> Sizes:
    """A teacher's sizes with those of one student of the config, of any width or pruned."""
    if student_kind(student) == "d2d":
        return with_pruned(sizes, student)
    width, parameters = sizes["students"][0]["intermediate_size"], sizes["student_parameters"]
    per_neuron = 3 * sizes["hidden_size"] * sizes["num_moe_layers"]
    if "groups" in student:
        more = (student["groups"] - sizes["top_k"]) * sizes["expert_width"]
    elif "width" in student:
        more = student["width"] - sizes["top_k"] * sizes["expert_width"]
    elif "params" in student:
        more = (student["params"] - parameters) // per_neuron
    else:
        return sizes
    return {
        **sizes,
        "student_parameters": parameters + more * per_neuron,
        "students": [{"intermediate_size": width + more}],
    }


def with_pruned(sizes: Sizes, student: Mapping[str, Any]) -> Sizes:
    """A dense teacher's sizes with those of a pruned student: heads keep their size.

    A layer has the projections of attention, norms of queries and keys, an FFN and two norms.
    """
    hidden, width, head = student["hidden_size"], student["intermediate_size"], sizes["head_dim"]
    attention = 2 * hidden * head * (student["heads"] + student["kv_heads"]) + 2 * head
    layer = attention + 3 * hidden * width + 2 * hidden
    ends = 2 * sizes["vocab_size"] * hidden + hidden
    return {
        **sizes,
        "num_layers": student["layers"],
        "hidden_size": hidden,
        "student_parameters": student["layers"] * layer + ends,
        "students": [{"intermediate_size": width}],
    }


def scored_tokens(config: Mapping[str, Any], names: Names) -> float:
    """Tokens that lm-eval has a model read, as the config states them; tasks share them alike.

    names["evaluation"] is the job's, as in m2d.pipeline.settings.evaluation_jobs.
    """
    evaluation, tasks = evaluation_jobs(config)[names["evaluation"]]
    settings = config["evaluations"][evaluation]
    return float(settings["tokens"]) * len(tasks) / len(settings["tasks"])


def resources_of(
    config: Mapping[str, Any], rule: str, names: Names, attempt: int
) -> dict[str, int | str | None]:
    """What a job asks of the queue: gpu, gres, nodes, processes (GPUs a node), mem_mb, runtime.

    The teacher's `resources` (for distillation the recipe's own keys) override what follows from
    sizes.
    Memory (MB, of a node) and run time (minutes) are multiplied by the attempt; a distillation's
    memory is doubled once, and its time is at most `hardware.hours` in each, since it goes on from
    its checkpoint. GPUs of one node are `gpu`; of several nodes, `gres` on each.
    """
    hardware = hardware_of(config)
    distilling = rule == "distill_student"
    teacher = config["teachers"][names["teacher"]]
    stated = config["recipes"][names["recipe"]] if distilling else teacher.get("resources", {})
    need = need_of(config, rule, names) or Need()
    uses_gpu = rule not in CPU_RULES
    gpus = (stated.get("gpus", need.gpus)) if uses_gpu else 0
    memory = stated.get("mem_mb", rounded(need.memory / 1e6 * MEMORY_MARGIN, 500))
    minutes = need.seconds(hardware) / 60 * TIME_MARGIN + START_MINUTES
    runtime = stated.get("runtime", rounded(minutes, 5))
    if distilling:
        runtime = stated.get("runtime", min(runtime, ceil(hardware.hours * 60)))
    nodes = max(1, ceil(gpus / hardware.gpus_per_node))
    each = gpus // nodes
    return {
        "gpu": gpus if nodes == 1 else None,
        "gres": f"gpu:{each}" if nodes > 1 else None,
        "nodes": nodes,
        "processes": each,
        "mem_mb": memory * (min(attempt, 2) if distilling else attempt),
        "runtime": runtime * (1 if distilling else attempt),
    }


def rounded(value: float, step: int) -> int:
    """Up to a multiple of `step`. Raises UserError where that is no number."""
    if not isfinite(value):
        raise UserError(
            "a job would take longer than can be counted; look at flops and utilization"
        )
    return ceil(value / step) * step
