# Token sequences of a teacher's tokenizer: for calibration, for perplexity, for distillation.
# in:  <results>/corpus/*.jsonl or the config's own files; nothing for a dataset of the hub
# out: <results>/{teacher}/tokens/{calibration,test,distillation}.safetensors


rule make_tokens:
    """Cut text into token sequences of equal length."""
    input:
        text=text_files,
        teacher=teacher_files,
    output:
        "<results>/{teacher}/tokens/{tokens}.safetensors",
    log:
        "<logs>/make_tokens/{teacher}/{tokens}.log",
    benchmark:
        "<benchmarks>/make_tokens/{teacher}/{tokens}.tsv"
    conda:
        "../envs/m2d.yaml"
    threads: 1
    resources:
        mem_mb=sized("make_tokens", "mem_mb"),
        runtime=sized("make_tokens", "runtime"),
    params:
        model=lambda wildcards: teacher_of(wildcards)["model"],
        settings=token_settings,
        source=text_source,
        code=code("m2d.tokens.tokenize"),
    shell:
        """
        m2d tokenize {params.model} {output} {params.source} \
            --sequences {params.settings[sequences]} --length {params.settings[length]} 2>{log}
        """
