# Teachers that the config names by a hub id, fetched into the Hugging Face cache (HF_HOME).
# out: <results>/{teacher}/downloaded, which says that the files are there


rule download_teacher:
    """Fetch a teacher, on the machine that runs Snakemake: compute nodes may have no network."""
    output:
        touch("<results>/{teacher}/downloaded"),
    log:
        "<logs>/download_teacher/{teacher}.log",
    benchmark:
        "<benchmarks>/download_teacher/{teacher}.tsv"
    localrule: True
    conda:
        ENVIRONMENT
    threads: 1
    params:
        model=model_of,
    shell:
        """
        env -u HF_HUB_OFFLINE m2d download {params.model:q} >{log:q} 2>&1
        """
