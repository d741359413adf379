# Fold: the router put into the experts' gates, for the students whose settings ask for it.
# in:  a teacher, <results>/{teacher}/tokens/calibration.safetensors
# out: <results>/{teacher}/fold/{fold}.safetensors, and the Gram statistics of experts folded so,
#      <results>/{teacher}/gram-fold-{fold}.safetensors


def folded(student):
    """What the files of a folded student's statistics and rankings have in their names."""
    return f"-fold-{student['fold']}" if student.get("fold") else ""


def fold_of(wildcards, fold):
    """The fold file; nothing where there is no fold."""
    return f"<results>/{wildcards.teacher}/fold/{fold}.safetensors" if fold else []


def fold_options(wildcards, input):
    return ["--fold", str(input.fold)] if input.fold else []


rule fold_teacher:
    """How much of its router every neuron's gate takes, by R2 on held-out tokens."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/fold/{fold}.safetensors",
    log:
        "<logs>/fold_teacher/{teacher}/{fold}.log",
    benchmark:
        "<benchmarks>/fold_teacher/{teacher}/{fold}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("fold_teacher", "gpu"),
        mem_mb=sized("fold_teacher", "mem_mb"),
        runtime=sized("fold_teacher", "runtime"),
    params:
        model=model_of,
        options=compute_options,
        code=teacher_code("m2d.refit.fold"),
    shell:
        """
        m2d fold {params.model:q} {output:q} --tokens {input.calibration:q} \
            --mode {wildcards.fold:q} {params.options:q} 2>{log:q}
        """


rule compute_folded_gram:
    """Gram statistics of folded experts."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        fold="<results>/{teacher}/fold/{fold}.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/gram-fold-{fold}.safetensors",
    log:
        "<logs>/compute_folded_gram/{teacher}/{fold}.log",
    benchmark:
        "<benchmarks>/compute_folded_gram/{teacher}/{fold}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("compute_gram", "gpu"),
        mem_mb=sized("compute_gram", "mem_mb"),
        runtime=sized("compute_gram", "runtime"),
    params:
        model=model_of,
        options=compute_options,
        code=teacher_code("m2d.statistics.gram"),
    shell:
        """
        m2d gram {params.model:q} {output:q} --tokens {input.calibration:q} \
            --fold {input.fold:q} {params.options:q} 2>{log:q}
        """
