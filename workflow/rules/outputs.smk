# A teacher's outputs, stored once for all students of a recipe with `teacher_outputs`.
# in:  a teacher, <results>/{teacher}/tokens/distillation.safetensors
# out: <results>/{teacher}/outputs/{outputs}/{part}-of-{parts}.done, beside index.json and the shards
#
# The shards are no outputs of the rule: Snakemake would remove those of a killed job, which is to go
# on with the next. Hence the flags, and a job before them that clears away what is out of date.


rule clear_outputs:
    """Remove stored outputs of other tokens, code or weights."""
    input:
        tokens="<results>/{teacher}/tokens/distillation.safetensors",
        teacher=teacher_files,
    output:
        touch("<results>/{teacher}/outputs/{outputs}/cleared"),
    log:
        "<logs>/clear_outputs/{teacher}/{outputs}.log",
    localrule: True
    conda:
        "../envs/m2d.yaml"
    params:
        options=outputs_options,
        code=code("m2d.stages.outputs"),
    shell:
        """
        (cd "$(dirname {output})" && rm -rf index.json shard-* .shard-* *.done) 2>{log}
        """


rule store_outputs:
    """Run a teacher over its share of the distillation tokens, and store its distributions."""
    input:
        cleared="<results>/{teacher}/outputs/{outputs}/cleared",
        tokens="<results>/{teacher}/tokens/distillation.safetensors",
        teacher=teacher_files,
    output:
        touch("<results>/{teacher}/outputs/{outputs}/{part}-of-{parts}.done"),
    log:
        "<logs>/store_outputs/{teacher}/{outputs}/{part}-of-{parts}.log",
    benchmark:
        "<benchmarks>/store_outputs/{teacher}/{outputs}/{part}-of-{parts}.tsv"
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        gpu=sized("store_outputs", "gpu"),
        mem_mb=sized("store_outputs", "mem_mb"),
        runtime=sized("store_outputs", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        options=outputs_options,
        spread=lambda wildcards, resources: (
            "--device-map auto" if (resources.get("gpu") or 0) > 1 else ""
        ),
        code=code("m2d.stages.outputs"),
    shell:
        """
        m2d outputs {params.model} "$(dirname {output})" --tokens {input.tokens} \
            --part {wildcards.part}/{wildcards.parts} {params.spread} {params.options} 2>{log}
        """


rule complete_outputs:
    """Say that all shares of a teacher's outputs are there."""
    input:
        parts_of_outputs,
    output:
        touch("<results>/{teacher}/outputs/{outputs}/complete"),
    localrule: True
