"""Evaluation: scores of one model on lm-eval's tasks, in lm-eval's own JSON.

Tasks are lm-eval's (winogrande, hellaswag, arc_easy, arc_challenge, mmlu, wikitext, ...) or YAML
definitions in a folder of one's own (`include`). Data comes from the hub, from HF_HOME, or from a
local folder per dataset (`datasets`, see `m2d.evaluate.datasets`).

The hf backend is what the tests run. vllm needs a GPU; the tests check only what it is given.
"""

import argparse
import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2d.artifacts import write_json
from m2d.errors import UserError
from m2d.evaluate.datasets import local_datasets, replaced
from m2d.evaluate.names import task_name
from m2d.options import AUTO, DTYPES, positive
from m2d.progress import say

# Of the machine and the moment, not of the model: the same evaluation gives the same file.
UNSAVED = (
    "date",
    "git_hash",
    "pretty_env_info",
    "upper_git_hash",
    "total_evaluation_time_seconds",
    "eot_token_id",
)


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    backend: str = "hf",
    include: str | Path | None = None,
    datasets: str | Path | None = None,
    dataset_folders: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    batch_size: str = "auto",
    dtype: str = AUTO,
    device: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """lm-eval's results of `model` (folder or hub id) for each of `tasks`, by name.

    `datasets` is a folder with one for each dataset; `dataset_folders` names single ones by their
    hub ids, and comes first. `shots` is the number of few-shot examples (None: what each task
    defines); `limit` evaluates only the first documents of each task; `model_args` go to the
    backend as they are. The model is loaded once. Raises UserError for an unknown task, a model or
    dataset that is missing, and a backend that is not installed.
    """
    # lm-eval and what it imports take seconds, so bad input is refused first.
    _check_tasks(tasks)
    _check_model(model)
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--backend vllm: vllm is not installed; pip install vllm, or use hf")
    import torch
    import transformers
    from lm_eval import evaluator
    from lm_eval.api.registry import get_model
    from lm_eval.utils import handle_non_serializable

    from m2d.devices import announce, compute_dtype, computed_on, dtype_name, pick_device
    from m2d.evaluate.backends import check_for_others, one_reader
    from m2d.models.fingerprint import fingerprint
    from m2d.models.teacher import dtype_of, locate, read_config

    _quieten()
    if backend == "hf":  # vllm picks its own, and dislikes a process that has touched CUDA
        folder = locate(model, config_only=True)
        _, config = read_config(folder)  # transformers is told of EMO's classes
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        stored, where = dtype_of(config, folder), pick_device(device)
        computed_in = compute_dtype(dtype, stored, where)
        announce(model, stored, computed_in, where)
        dtype = dtype_name(computed_in)
        if device == "cuda" and torch.cuda.device_count() > 1:
            # A job has several GPUs where one cannot hold the model.
            model_args = {"parallelize": True, **(model_args or {})}
    else:
        check_for_others(model)
    manager = _task_manager(tasks, include)
    with local_datasets(datasets, include, dataset_folders or {}):
        loaded = {task: _load_task(manager, task, shots) for task in tasks}
    arguments: dict[str, Any] = {"pretrained": model, "dtype": dtype, **(model_args or {})}
    try:
        kind = get_model(backend)
        if backend == "hf":
            kind = one_reader(kind)
        language_model = kind.create_from_arg_obj(
            arguments, {"batch_size": batch_size, "max_batch_size": None, "device": device}
        )
    except OSError as error:
        raise UserError(f"{model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    results = {}
    for task, definition in loaded.items():
        say(f"evaluate {task} ({'default' if shots is None else shots}-shot) on {model}")
        with contextlib.ExitStack() as stack:
            # collect_env takes seconds (it runs pip and lscpu), and neither text is saved.
            stack.enter_context(replaced(evaluator, "add_env_info", lambda storage: None))
            stack.enter_context(replaced(evaluator, "get_git_commit_hash", lambda: None))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            result = evaluator.simple_evaluate(
                language_model,
                tasks=definition,
                num_fewshot=shots,
                batch_size=batch_size,
                device=device,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
        if result is None:
            raise UserError("evaluation runs in one process; start it without torchrun")
        result["config"].update({"model": backend, "model_args": arguments})
        result["transformers_version"] = transformers.__version__
        result["lm_eval_version"] = importlib.metadata.version("lm_eval")
        result["dtype"] = dtype
        result["computed_on"] = computed_on(pick_device(device))
        result["model_fingerprint"] = fingerprint(locate(model))
        plain = json.loads(json.dumps(result, default=handle_non_serializable))
        results[task] = _portable(plain, include)
    return results


def _check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what cannot be a task's name: it names the file of scores, and a folder of lm-eval."""
    for task in tasks:
        try:
            task_name(task)
        except ValueError as error:
            raise UserError(f"--task {task[:100]!r}: {error}") from None


def _check_model(model: str) -> None:
    """Refuse a local path that holds no model; anything else is left to the hub."""
    folder = Path(model)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: no config.json in it; give a model folder or a hub id")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{model}: no such folder; give a model folder or a hub id (owner/name)")


def _task_manager(tasks: Sequence[str], include: str | Path | None) -> Any:
    """A TaskManager that knows `tasks`, reading as few of lm-eval's definitions as possible.

    Indexing all 15,000 YAML files takes 6 seconds; a task's own folder a few milliseconds.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise UserError(f"--include {include}: no such folder; give one that holds task YAML files")
    root = Path(lm_eval.tasks.__file__).parent
    folders = {root / name for task in tasks for name in (task, task.split("_")[0])}
    paths: list[str | Path] = sorted(folder for folder in folders if folder.is_dir())
    paths += [Path(include)] if include is not None else []
    manager = TaskManager(include_path=paths, include_defaults=False)
    if all(task in manager.all_tasks for task in tasks):
        return manager
    manager = TaskManager(include_path=str(include) if include is not None else None)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists all"
            raise UserError(f"--task {task}: lm-eval knows no such task; {hint}")
    return manager


def _load_task(manager: Any, task: str, shots: int | None) -> list[Any]:
    """The task or group named `task` with its data, as simple_evaluate takes them."""
    try:
        loaded = manager.load(task)
    except KeyError as error:
        raise UserError(f"--task {task}: its dataset has no split {error}") from None
    wanted = shots or 0
    for name, part in loaded["tasks"].items() if wanted else ():
        # lm-eval would go on with no examples at all, or fail while it draws them.
        if part.config.num_fewshot == 0 or part.OUTPUT_TYPE == "loglikelihood_rolling":
            raise UserError(f"--shots {shots}: {name} takes no examples; leave --shots away")
        available = len(part.sampler.df) if hasattr(part, "sampler") else wanted
        if available < wanted:
            raise UserError(f"--shots {shots}: {name} has only {available} examples to draw from")
    groups = loaded.get("groups", {})
    return [groups[task]] if task in groups else list(loaded["tasks"].values())


def _quieten() -> None:
    """Keep lm-eval to errors, and to the first few of each module's warnings about the model, such
    as of prompts cut to the model's context.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name in ("lm_eval.models.huggingface", "lm_eval.models.vllm_causallms"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.filters.clear()
        logger.addFilter(_first(3))


def _first(most: int) -> Callable[[logging.LogRecord], bool]:
    """A logging filter that lets the first few records pass."""
    left = iter(range(most))
    return lambda record: next(left, None) is not None


def _portable(value: Any, include: str | Path | None) -> Any:
    """`value` without what is of this machine or moment: times, and paths of task definitions."""
    if isinstance(value, dict):
        return {key: _portable(item, include) for key, item in value.items() if key not in UNSAVED}
    if isinstance(value, list):
        return [_portable(item, include) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        if "/lm_eval/tasks/" in value:
            return "lm_eval/tasks/" + value.split("/lm_eval/tasks/", 1)[1]
        if include is not None and Path(value).is_relative_to(Path(include).resolve()):
            return str(Path(value).relative_to(Path(include).resolve()))
    return value


def _key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value read as JSON where it is (an argparse type)."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("out", type=Path, help="results.json, or a folder for several tasks")
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME",
        help="lm-eval task or group; repeat it to load the model once: OUT/NAME.json for each",
    )
    parser.add_argument("--shots", type=int, help="few-shot examples (default: the task's own)")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--include", type=Path, help="folder with task YAML files of your own")
    parser.add_argument(
        "--datasets", type=Path, help="folder with OWNER/NAME or NAME for each dataset of the tasks"
    )
    parser.add_argument(
        "--dataset",
        action="append",
        type=_key_value,
        default=[],
        metavar="NAME=FOLDER",
        help="the folder of one dataset, such as allenai/winogrande=/data/winogrande",
    )
    parser.add_argument("--limit", type=positive, help="only the first N documents of each task")
    parser.add_argument("--batch-size", default="auto", help="a number or auto (default: auto)")
    parser.add_argument("--dtype", choices=(AUTO, *DTYPES), default=AUTO)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--model-arg",
        action="append",
        type=_key_value,
        default=[],
        metavar="KEY=VALUE",
        help="passed to the backend, such as tensor_parallel_size=4 for vllm",
    )


def main(args: argparse.Namespace) -> None:
    if args.shots is not None and args.shots < 0:
        raise UserError(f"--shots {args.shots}: must be at least 0")
    if not (args.batch_size.split(":")[0] == "auto" or args.batch_size.isdecimal()):
        raise UserError(f"--batch-size {args.batch_size}: must be a number or auto")
    if len(set(args.task)) != len(args.task):
        raise UserError("--task: the same task is named twice")
    to_folder = len(args.task) > 1
    if to_folder and args.out.suffix == ".json":
        raise UserError(f"{args.out}: several tasks need a folder, not one .json file")
    results = evaluate(
        args.model,
        args.task,
        shots=args.shots,
        backend=args.backend,
        include=args.include,
        datasets=args.datasets,
        dataset_folders={name: str(folder) for name, folder in args.dataset},
        limit=args.limit,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        model_args=dict(args.model_arg),
    )
    for task, result in results.items():
        write_json(args.out / f"{task}.json" if to_folder else args.out, result)
