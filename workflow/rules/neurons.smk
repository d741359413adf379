# Students of single neurons: what each neuron contributes, and the students made of the best.
# in:  a teacher, <results>/{teacher}/tokens/calibration.safetensors
# out: <results>/{teacher}/neurons/{neurons}.safetensors,
#      <results>/{teacher}/students/{student}/merged/, for students with the key `neurons`


rule measure_neurons:
    """Routed contribution of every intermediate neuron, and a greedy order where asked for."""
    input:
        calibration="<results>/{teacher}/tokens/calibration.safetensors",
        fold=lambda wildcards: fold_of(
            wildcards, wildcards.neurons.partition("-fold-")[2]
        ),
        teacher=teacher_files,
    output:
        "<results>/{teacher}/neurons/{neurons}.safetensors",
    log:
        "<logs>/measure_neurons/{teacher}/{neurons}.log",
    benchmark:
        "<benchmarks>/measure_neurons/{teacher}/{neurons}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("measure_neurons", "gpu"),
        mem_mb=sized("measure_neurons", "mem_mb"),
        runtime=sized("measure_neurons", "runtime"),
    params:
        model=model_of,
        neurons=lambda wildcards: commands.neurons_options(wildcards.neurons),
        options=compute_options,
        fold=fold_options,
        code=lambda wildcards: teacher_code(
            "m2d.statistics.neurons", neurons=[wildcards.neurons.split("-")[0]]
        )(wildcards),
    shell:
        """
        m2d neurons {params.model:q} {output:q} --tokens {input.calibration:q} \
            {params.neurons:q} {params.fold:q} {params.options:q} 2>{log:q}
        """


rule merge_neurons:
    """Write one student of single neurons."""
    input:
        neurons=lambda wildcards: (
            f"<results>/{wildcards.teacher}/neurons/"
            f"{commands.neurons_name(student_of(wildcards))}.safetensors"
        ),
        fold=lambda wildcards: fold_of(wildcards, student_of(wildcards).get("fold")),
        teacher=teacher_files,
    output:
        directory("<results>/{teacher}/students/{student}/merged"),
    log:
        "<logs>/merge_neurons/{teacher}/{student}.log",
    benchmark:
        "<benchmarks>/merge_neurons/{teacher}/{student}.tsv"
    wildcard_constraints:
        student=students_of_kind("neurons"),
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=sized("merge_neurons", "mem_mb"),
        runtime=sized("merge_neurons", "runtime"),
    params:
        model=model_of,
        choice=lambda wildcards: student_of(wildcards)["neurons"],
        size=lambda wildcards: as_options(student_of(wildcards), commands.SIZE_KEYS),
        fold=fold_options,
        code=lambda wildcards: teacher_code(
            "m2d.students.merge",
            scoring=[],
            grouping=[],
            scaling=[],
            neurons=[student_of(wildcards)["neurons"]],
        )(wildcards),
    shell:
        """
        m2d merge {params.model:q} {output:q} --neurons {input.neurons:q} \
            --choice {params.choice:q} {params.size:q} {params.fold:q} 2>{log:q}
        """
