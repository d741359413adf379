"""lm-eval's backends on weights that m2d has read, or has checked.

The hf backend gets its model from the reader that statistics, distillation and perplexity use.
vLLM and llama.cpp's converter read the folder themselves, so it is checked before: that its tensors
are just those of the class and of its m2d.json, all finite, and that others resolve the same files.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.devices import pick_dtype
from m2d.errors import UserError
from m2d.models.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from m2d.models.digests import require_noted_weights
from m2d.models.load import beside_text, check_model, load_model
from m2d.models.teacher import dtype_of, locate, read_config
from m2d.progress import progress

# Arguments of lm-eval's own that ask for another way of loading.
OTHER_LOADERS = ("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "tp_plan", "load_in_4bit")


def one_reader(backend: type) -> Any:
    """lm-eval's hf backend with a model that m2d loads, and logits that must be numbers."""

    class OneReader(backend):
        def _get_config(self, pretrained: str, **_: Any) -> None:
            # Without the quantisation, which is the reader's business.
            self._config = read_config(locate(pretrained, config_only=True))[1]

        def _create_model(self, pretrained: str, **options: Any) -> None:
            if any(options.get(name) for name in OTHER_LOADERS):
                super()._create_model(pretrained, **options)
                return
            folder = locate(pretrained)
            _, config = read_config(folder)
            dtype = options.get("dtype")
            named = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
            where = "auto" if options.get("parallelize") else self._device
            chosen = pick_dtype(named, dtype_of(config, folder))
            self._model = load_model(folder, config, chosen, where, narrow=True)

        def _model_call(self, *args: Any, **keywords: Any) -> Tensor:
            logits = super()._model_call(*args, **keywords)
            # The largest one is NaN where any is, and a choice between NaN is no score.
            if not bool(torch.isfinite(logits.max())):
                raise UserError(f"{self.pretrained}: its logits are not finite; no score is given")
            return logits

    return OneReader


def check_for_others(model: str | Path) -> None:
    """Raise a UserError unless other programs will read of the folder what m2d would."""
    folder = locate(model)
    _, config = read_config(folder)
    if (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        raise UserError(
            f"{folder}: has both {SINGLE_NAME} and {INDEX_NAME}, and programs do not agree on "
            "which counts; remove the one that is out of date"
        )
    check_model(folder, config)
    require_noted_weights(folder)
    checkpoint, carried = Checkpoint(folder), beside_text(folder, config)
    names = sorted(set(checkpoint.entries) - carried)
    for name in progress(names, f"{folder.name}, tensors checked"):
        checkpoint.read(name)  # which refuses what is not finite
