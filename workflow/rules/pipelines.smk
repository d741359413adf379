# What the pipelines of the config consist of, as paths; see m2d/pipeline/runs.py.


def grids_of(pipeline):
    return expand(
        "<results>/{teacher}/grid/{scoring}.parquet",
        teacher=runs.with_experts(config, pipeline),
        scoring=config["pipelines"][pipeline]["scorings"],
    )


def models_of(pipeline):
    return [
        f"<results>/{teacher}/students/{student}/{variant}"
        for teacher, student, variant in runs.runs_of(config, pipeline)
    ]


def perplexities_of(pipeline):
    teachers = expand(
        "<results>/{teacher}/perplexity.json",
        teacher=config["pipelines"][pipeline]["teachers"],
    )
    return teachers + [f"{model}.perplexity.json" for model in models_of(pipeline)]


def scores_of(model, tasks):
    return [f"{model}.eval/{task}.json" for task in tasks]


def evaluations_of(pipeline):
    settings = config["pipelines"][pipeline]
    teachers = expand("<results>/{teacher}/teacher", teacher=settings["teachers"])
    return [
        file
        for model in [*teachers, *models_of(pipeline)]
        for evaluation in settings["evaluations"]
        for file in scores_of(model, config["evaluations"][evaluation]["tasks"])
    ]


def calibrations_of(pipeline):
    """The calibration tokens of the teachers whose students were chosen by them."""
    return expand(
        "<results>/{teacher}/tokens/calibration.safetensors",
        teacher=runs.calibrated(config, pipeline),
    )


def results_of(pipeline):
    """What a pipeline leaves: tables, figures, and the cards of its students."""
    kinds = ["tables", "figures", *(["cards"] if models_of(pipeline) else [])]
    return [f"<results>/{kind}/{pipeline}" for kind in kinds]


def metrics_of(pipeline):
    """The training curves, which are in the folders of distilled students."""
    return [
        f"{config['results']}/{teacher}/students/{student}/{recipe}/metrics.jsonl"
        for teacher, student, recipe in runs.distilled(runs.runs_of(config, pipeline))
    ]


def statistics_of(pipeline):
    return expand(
        "<results>/{teacher}/statistics.parquet",
        teacher=runs.with_experts(config, pipeline),
    )


def gram_of(pipeline):
    return expand(
        "<results>/{teacher}/gram.safetensors",
        teacher=runs.with_experts(config, pipeline),
    )


def rankings_of(pipeline):
    """The rankings behind a pipeline's grids and students; see rules/rank.smk."""
    return ancient(
        expand(
            "<results>/{teacher}/rankings/{scoring}.json",
            teacher=runs.with_experts(config, pipeline),
            scoring=runs.scorings_used(config, pipeline),
        )
    )
