# Align: every FFN of a student trained on the teacher's residual stream, where the config asks for it.
# in:  a teacher, <results>/{teacher}/students/{student}/merged/ (or refit/, where the config has it),
#      tokens/calibration.safetensors
# out: <results>/{teacher}/students/{student}/align/
#
# A job that is killed goes on after its last finished layer (in .align.layers-*/ until then).


def unaligned(wildcards):
    """The student that alignment starts from."""
    settings = choices.settings_of(config, wildcards.student)
    variant = "refit" if "refit" in settings else "merged"
    return f"<results>/{wildcards.teacher}/students/{wildcards.student}/{variant}"


rule align_student:
    """Train one student's FFNs, layer by layer."""
    input:
        student=unaligned,
        tokens="<results>/{teacher}/tokens/calibration.safetensors",
        choice=choice_of,
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/align"),
    log:
        "<logs>/align_student/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/align_student/{teacher}/{student}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("align_student", "gpu"),
        mem_mb=sized("align_student", "mem_mb"),
        runtime=sized("align_student", "runtime"),
    params:
        model=model_of,
        steps=lambda wildcards: student_of(wildcards)["align"],
        options=compute_options,
        code=teacher_code("m2d.refit.align"),
    shell:
        """
        m2d align {input.student:q} {params.model:q} {output:q} --tokens {input.tokens:q} \
            --steps {params.steps:q} {params.options:q} 2>{log:q}
        """
