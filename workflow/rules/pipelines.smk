# What a pipeline of the config consists of.


def runs_of(pipeline):
    """(teacher, student, variant) of every student of a pipeline, merged and distilled, once.

    Each student from those of its teachers that it goes with.
    """
    settings = config["pipelines"][pipeline]
    pairs = [(student, "merged") for student in settings["students"]]
    for entry in settings["distill"]:
        pairs += [(entry["student"], "merged"), (entry["student"], entry["recipe"])]
    if "best" in settings:
        for scoring in settings["scorings"]:
            for grouping in config["grid"]["groupings"]:
                student = f"best-{scoring}-{grouping}"
                pairs += [(student, "merged"), (student, settings["best"])]
    pairs += [(s, "refit") for s in dict.fromkeys(s for s, _ in pairs) if refit_of(s)]
    return [
        (teacher, *pair)
        for teacher in settings["teachers"]
        for pair in dict.fromkeys(pairs)
        if goes_with(config["students"].get(pair[0], {}), config["teachers"][teacher])
    ]


def moe_teachers_of(pipeline):
    """The teachers of a pipeline that have experts."""
    teachers = config["pipelines"][pipeline]["teachers"]
    return [teacher for teacher in teachers if has_experts(config["teachers"][teacher])]


def grids_of(pipeline):
    settings = config["pipelines"][pipeline]
    return expand(
        "<results>/{teacher}/grid/{scoring}.parquet",
        teacher=moe_teachers_of(pipeline),
        scoring=settings["scorings"],
    )


def models_of(pipeline):
    return [f"<results>/{t}/students/{s}/{v}" for t, s, v in runs_of(pipeline)]


def perplexities_of(pipeline):
    teachers = expand(
        "<results>/{teacher}/perplexity.json",
        teacher=config["pipelines"][pipeline]["teachers"],
    )
    return teachers + [f"{model}.perplexity.json" for model in models_of(pipeline)]


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
    chosen = [
        teacher
        for teacher, student, _ in runs_of(pipeline)
        if student_kind(config["students"].get(student, {}))
        not in ("random_ffn", "random_init")
    ]
    return expand(
        "<results>/{teacher}/tokens/calibration.safetensors",
        teacher=list(dict.fromkeys(chosen)),
    )


def results_of(pipeline):
    """What a pipeline leaves: tables, figures, and the cards of its students."""
    kinds = ["tables", "figures", *(["cards"] if models_of(pipeline) else [])]
    return [f"<results>/{kind}/{pipeline}" for kind in kinds]


def metrics_of(pipeline):
    """The training curves, which are in the folders of distilled students."""
    runs = runs_of(pipeline)
    return [
        f"{config['results']}/{t}/students/{s}/{v}/metrics.jsonl"
        for t, s, v in runs
        if v not in ("merged", "refit")
    ]


def statistics_of(pipeline):
    return expand(
        "<results>/{teacher}/statistics.parquet", teacher=moe_teachers_of(pipeline)
    )


def gram_of(pipeline):
    return expand(
        "<results>/{teacher}/gram.safetensors", teacher=moe_teachers_of(pipeline)
    )


def rankings_of(pipeline):
    """The rankings behind a pipeline's grids and students; see rules/rank.smk."""
    settings = config["pipelines"][pipeline]
    named = {student for _, student, _ in runs_of(pipeline)} & set(config["students"])
    scorings = {
        *settings["scorings"],
        *(config["students"][s].get("scoring") for s in named),
        *(name for s in named for name in config["students"][s].get("best_of", [])),
    }
    return ancient(
        expand(
            "<results>/{teacher}/rankings/{scoring}.json",
            teacher=moe_teachers_of(pipeline),
            scoring=sorted(scorings - {None}),
        )
    )
