# Token sequences of a teacher's tokenizer: for calibration, for perplexity, for distillation.
# in:  <results>/corpus/*.jsonl or the config's own files; nothing for a dataset of the hub
# out: <results>/{teacher}/tokens/{calibration,test,distillation}.safetensors

from m2d.tokens.text import text_files as files_below


def token_settings(wildcards):
    return teacher_of(wildcards)["tokens"][wildcards.tokens]


def dataset_of(wildcards):
    return config["datasets"][token_settings(wildcards)["dataset"]]


def text_files(wildcards):
    """The files behind a dataset, those in its folders one by one: a folder has no checksum."""
    dataset = dataset_of(wildcards)
    parts = [config["datasets"][name] for name in dataset.get("mix", [])] or [dataset]
    named = [Path(f) for part in parts for f in commands.text_files_of(config, part)]
    return [
        str(file)
        for name in named
        for file in (files_below([name]) if name.is_dir() else [name])
    ]


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
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=sized("make_tokens", "mem_mb"),
        runtime=sized("make_tokens", "runtime"),
    params:
        model=model_of,
        options=lambda wildcards: commands.token_options(token_settings(wildcards)),
        source=lambda wildcards: commands.text_options(config, dataset_of(wildcards)),
        code=teacher_code("m2d.tokens.tokenize"),
    shell:
        """
        m2d tokenize {params.model:q} {output:q} {params.source:q} {params.options:q} 2>{log:q}
        """
