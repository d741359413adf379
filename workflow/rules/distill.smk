# Distillation: a student trained on its teacher's distributions.
# in:  a teacher, <results>/{teacher}/students/{student}/merged/ (or refit/, where the config has it),
#      tokens/distillation.safetensors
# out: <results>/{teacher}/students/{student}/{recipe}/
#
# A job that is killed or runs out of time goes on from its last checkpoint when it is started
# again: checkpoints lie beside the output, in .{recipe}.checkpoints-*, until it is complete.


rule distill_student:
    """Train one student on its teacher's outputs."""
    input:
        student=undistilled,
        tokens="<results>/{teacher}/tokens/distillation.safetensors",
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
        gpu=lambda wildcards: recipe_of(wildcards)["gpus"],
        mem_mb=lambda wildcards, attempt: recipe_of(wildcards)["mem_mb"] * attempt,
        runtime=lambda wildcards, attempt: recipe_of(wildcards)["runtime"] * attempt,
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        launcher=launcher,
        options=recipe_options,
        code=code("m2d.stages.distill"),
    shell:
        """
        {params.launcher} distill {input.student} {params.model} {output} \
            --tokens {input.tokens} {params.options} 2>{log}
        """
