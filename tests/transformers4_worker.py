"""Run by the Python of an environment with transformers 4: the logits of model folders.

Arguments: a file with token ids, then pairs of a model folder and the file for its logits. Imports
nothing of m2d, as a user of the students would not.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4.")
transformers.logging.set_verbosity_error()
ids = load_file(sys.argv[1])["input_ids"]
for folder, out in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    with torch.no_grad():
        model, about = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        left = {key: sorted(names) for key, names in about.items() if names}
        assert not left, f"{folder}: {left}"
        save_file({"logits": model.eval()(ids).logits.contiguous()}, out)
