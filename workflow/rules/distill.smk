# Distillation: a student trained on its teacher's distributions.
# in:  a teacher, <results>/{teacher}/students/{student}/merged/ (pruned/ or initial/ of a baseline; refit/
#      or align/, where the config has it),
#      tokens/distillation.safetensors; teacher-logits/{logits}/ for a recipe that has them stored
# out: <results>/{teacher}/students/{student}/{recipe}/
#
# A job that is killed goes on from its last checkpoint when it is started again; one that would run
# out of time saves a checkpoint and stops before, and its next attempt goes on. Checkpoints lie
# beside the output, in .{recipe}.checkpoints-*, until it is complete.
#
# On how many GPUs and nodes it runs is no parameter, nor what starts it: another repeats nothing.

import shlex

from m2d.pipeline.settings import logits_name


def undistilled(wildcards):
    """The student that distillation starts from: repaired where the config asks for it."""
    variant = runs.undistilled(config, wildcards.student)
    return f"<results>/{wildcards.teacher}/students/{wildcards.student}/{variant}"


def recipe_of(wildcards):
    return config["recipes"][wildcards.recipe]


def logits_folder(wildcards):
    """The folder of a recipe's stored outputs; None where it has none."""
    if "teacher_logits" not in recipe_of(wildcards):
        return None
    name = logits_name(recipe_of(wildcards))
    return f"{config['results']}/{wildcards.teacher}/teacher-logits/{name}"


def stored_logits(wildcards):
    """What says that a recipe's stored outputs are complete."""
    folder = logits_folder(wildcards)
    return f"{folder}/complete" if folder else []


def recipe_options(wildcards):
    return commands.recipe_options(recipe_of(wildcards), logits_folder(wildcards))


def distill_code(wildcards):
    uses = by_recipe(recipe_of(wildcards))
    return teacher_code("m2d.distill.run", **uses)(wildcards)


# What starts a distillation.
LAUNCHER = commands.launcher_words(config.get("launcher", script("launch.sh")))


rule distill_student:
    """Train one student on its teacher's outputs."""
    input:
        student=undistilled,
        tokens="<results>/{teacher}/tokens/distillation.safetensors",
        logits=stored_logits,
        choice=choice_of,
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/{recipe}"),
    log:
        "<logs>/distill_student/{teacher}/{student}/{recipe}.log",
    benchmark:
        "<benchmarks>/distill_student/{teacher}/{student}/{recipe}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("distill_student", "gpu"),
        gres=sized("distill_student", "gres"),
        nodes=sized("distill_student", "nodes"),
        processes=sized("distill_student", "processes"),
        mem_mb=sized("distill_student", "mem_mb"),
        runtime=sized("distill_student", "runtime"),
        # As words of a shell, quoted; a resource, since another launcher repeats nothing.
        launcher=shlex.join(LAUNCHER),
    params:
        model=model_of,
        options=recipe_options,
        code=distill_code,
    shell:
        """
        {resources.launcher} {resources.nodes:q} {resources.processes:q} {resources.runtime:q} \
            distill {input.student:q} {params.model:q} {output:q} \
            --tokens {input.tokens:q} {params.options:q} 2>{log:q}
        """
