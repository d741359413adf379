# Distillation: a student trained on its teacher's distributions.
# in:  a teacher, <results>/{teacher}/students/{student}/merged/ (or refit/, where the config has it),
#      tokens/distillation.safetensors; teacher-logits/{logits}/ for a recipe that has them stored
# out: <results>/{teacher}/students/{student}/{recipe}/
#
# A job that is killed goes on from its last checkpoint when it is started again; one that would run
# out of time saves a checkpoint and stops before, and its next attempt goes on. Checkpoints lie
# beside the output, in .{recipe}.checkpoints-*, until it is complete.
#
# On how many GPUs and nodes it runs is no parameter: another number repeats nothing.


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
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        gpu=sized("distill_student", "gpu"),
        gres=sized("distill_student", "gres"),
        nodes=sized("distill_student", "nodes"),
        processes=sized("distill_student", "processes"),
        mem_mb=sized("distill_student", "mem_mb"),
        runtime=sized("distill_student", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        launcher=launcher(),
        options=recipe_options,
        code=code("m2d.distill.run"),
    shell:
        """
        {params.launcher} {resources.nodes} {resources.processes} {resources.runtime} \
            distill {input.student} {params.model} {output} \
            --tokens {input.tokens} {params.options} 2>{log}
        """
