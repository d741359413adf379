# A teacher's outputs, stored once for all students of a recipe with `teacher_logits`.
# in:  a teacher, <results>/{teacher}/tokens/distillation.safetensors
# out: <results>/{teacher}/teacher-logits/{logits}/{part}-of-{parts}.done, beside index.json and the shards
#
# The shards are no outputs of the rule: Snakemake would remove those of a killed job, which is to go
# on with the next. Hence the flags, and a job before them that clears away what is out of date.


def parts_of_logits(wildcards):
    settings = logits_names(config)[wildcards.logits]["teacher_logits"]
    return expand(
        "<results>/{{teacher}}/teacher-logits/{{logits}}/{part}-of-{parts}.done",
        part=range(1, settings["parts"] + 1),
        parts=settings["parts"],
    )


def logits_options(wildcards):
    recipe = logits_names(config)[wildcards.logits]
    return commands.logits_options(recipe, teacher_of(wildcards))


rule clear_teacher_logits:
    """Remove stored outputs of other tokens, code or weights."""
    input:
        tokens="<results>/{teacher}/tokens/distillation.safetensors",
        teacher=teacher_files,
    output:
        touch("<results>/{teacher}/teacher-logits/{logits}/cleared"),
    log:
        "<logs>/clear_teacher_logits/{teacher}/{logits}.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        options=logits_options,
        code=teacher_code("m2d.distill.teacher_logits"),
    shell:
        """
        (cd "$(dirname {output:q})" && rm -rf index.json shard-* .shard-* *.done) 2>{log:q}
        """


rule store_teacher_logits:
    """Run a teacher over its share of the distillation tokens, and store its distributions."""
    input:
        cleared="<results>/{teacher}/teacher-logits/{logits}/cleared",
        tokens="<results>/{teacher}/tokens/distillation.safetensors",
        teacher=teacher_files,
    output:
        touch("<results>/{teacher}/teacher-logits/{logits}/{part}-of-{parts}.done"),
    log:
        "<logs>/store_teacher_logits/{teacher}/{logits}/{part}-of-{parts}.log",
    benchmark:
        "<benchmarks>/store_teacher_logits/{teacher}/{logits}/{part}-of-{parts}.tsv"
    priority: FIRST
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=sized("store_teacher_logits", "gpu"),
        mem_mb=sized("store_teacher_logits", "mem_mb"),
        runtime=sized("store_teacher_logits", "runtime"),
    params:
        model=model_of,
        options=logits_options,
        spread=lambda wildcards, resources: (
            ["--device-map", "auto"] if (resources.get("gpu") or 0) > 1 else []
        ),
        code=teacher_code("m2d.distill.teacher_logits"),
    shell:
        """
        m2d teacher-logits {params.model:q} "$(dirname {output:q})" --tokens {input.tokens:q} \
            --part {wildcards.part:q}/{wildcards.parts:q} {params.spread:q} {params.options:q} 2>{log:q}
        """


rule complete_teacher_logits:
    """Say that all shares of a teacher's outputs are there."""
    input:
        parts_of_logits,
    output:
        touch("<results>/{teacher}/teacher-logits/{logits}/complete"),
    localrule: True
