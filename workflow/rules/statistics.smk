# What the calibration tokens say of the experts: everything about choosing them follows from this.
# in:  a teacher, <results>/{teacher}/tokens/calibration.safetensors
# out: <results>/{teacher}/statistics.parquet, gram.safetensors


rule compute_statistics:
    """Routing statistics of every layer and expert."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/statistics.parquet",
    log:
        "<logs>/compute_statistics/{teacher}.log",
    benchmark:
        "<benchmarks>/compute_statistics/{teacher}.tsv"
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        gpu=sized("compute_statistics", "gpu"),
        mem_mb=sized("compute_statistics", "mem_mb"),
        runtime=sized("compute_statistics", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        options=compute_options,
        code=code("m2d.stages.stats"),
    shell:
        """
        m2d stats {params.model} {output} --calibration {input.calibration} {params.options} 2>{log}
        """


rule compute_gram:
    """Gram statistics: inner products of all experts' outputs, weights and router rows."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        teacher=teacher_files,
    output:
        "<results>/{teacher}/gram.safetensors",
    log:
        "<logs>/compute_gram/{teacher}.log",
    benchmark:
        "<benchmarks>/compute_gram/{teacher}.tsv"
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        gpu=sized("compute_gram", "gpu"),
        mem_mb=sized("compute_gram", "mem_mb"),
        runtime=sized("compute_gram", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        options=compute_options,
        code=code("m2d.stages.gram"),
    shell:
        """
        m2d gram {params.model} {output} --calibration {input.calibration} {params.options} 2>{log}
        """
