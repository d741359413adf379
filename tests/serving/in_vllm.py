"""Run by vLLM's own interpreter: log-probabilities and greedy tokens of students, as .npz files.

    python in_vllm.py JOBS.json     a list of {"model": FOLDER, "ids": [...], "greedy": N,
                                    "out": FILE, "tensor_parallel": 1}

One process for all of them, since vLLM takes long to start. What it refuses is `refused` in FILE.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)


def run(job: dict[str, Any]) -> None:
    import numpy as np
    import vllm
    from vllm import LLM, SamplingParams

    model = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=-1,
        enable_prefix_caching=False,
        tensor_parallel_size=job["tensor_parallel"],
    )
    asked = SamplingParams(
        max_tokens=job["greedy"], temperature=0, prompt_logprobs=-1, ignore_eos=True
    )
    (answer,) = model.generate([{"prompt_token_ids": job["ids"]}], asked, use_tqdm=False)
    places = answer.prompt_logprobs[1:]  # the first token has none
    rows = np.full((len(places), max(map(max, places)) + 1), -np.inf)
    for place, found in enumerate(places):
        for token, told in found.items():
            rows[place, token] = told.logprob
    np.savez(
        job["out"],
        log_probabilities=rows,
        greedy=np.array(answer.outputs[0].token_ids),
        version=vllm.__version__,
    )


def main() -> None:
    import numpy as np
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run(job)
        except Exception as error:
            np.savez(job["out"], refused=str(error).strip().splitlines()[0])
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
