"""Time of a distillation step against its parts: a bare teacher forward and a bare student step.

Within one run of the real trainer, every training step (data, teacher, student, loss, clipping,
AdamW, metrics) is followed, on batches of the same size and number, by a bare forward of the
teacher to its logits and a bare forward and backward of a copy of the student with the usual
next-token loss. A step accumulates four batches, where the paper's recipe has 96. The medians are
compared. CPU time by default, so that a busy machine does not decide. Prints one JSON line.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import COMPUTE, report
from safetensors.torch import save_file
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from m2d.devices import dtype_name
from m2d.distill.recipe import Recipe
from m2d.distill.trainer import make_trainer
from m2d.models.widen import widen
from m2d.tokens.dataset import PackedTokens

PRECISION = "bf16" if torch.bfloat16 == COMPUTE else "fp32"
VOCABULARY = 32_768
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


class Parts(TrainerCallback):
    """Times each step from the end of the last one, then the bare parts on the same machine."""

    def __init__(
        self, teacher: Any, student: Any, batches: Sequence[torch.Tensor], clock: Any
    ) -> None:
        self.teacher, self.student, self.batches, self.clock = teacher, student, batches, clock
        self.seconds: dict[str, list[float]] = {"step": [], "teacher": [], "student": []}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds["step"].append(self.clock() - self.start)
        start = self.clock()
        with torch.no_grad():
            for ids in self.batches:
                self.teacher(input_ids=ids, use_cache=False)
        self.seconds["teacher"].append(self.clock() - start)
        start = self.clock()
        for ids in self.batches:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=PRECISION == "bf16"):
                loss = self.student(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        self.student.zero_grad()
        self.seconds["student"].append(self.clock() - start)
        self.start = self.clock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--wall", action="store_true", help="wall time, on an idle machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)).bfloat16()
    if torch.bfloat16 != COMPUTE:
        widen(teacher, COMPUTE)
    student = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    recipe = Recipe(
        steps=args.steps,
        batch=args.batch,
        device_batch=args.device_batch,
        learning_rate=1e-4,
        min_learning_rate=1e-5,
        warmup_steps=0,
        decay_steps=0,
        decay="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        loss="forward_kl",
        loss_implementation="chunked",
        temperature=1.0,
        cross_entropy_weight=0.0,
        teacher_top_k=None,
        teacher_dtype=dtype_name(COMPUTE),
        precision=PRECISION,
        gradient_checkpointing=False,
        compile=False,
        strategy="single",
        processes=1,
        seed=0,
    )
    ids = torch.randint(0, VOCABULARY, (args.batch, args.length))
    clock = time.perf_counter if args.wall else time.process_time
    parts = Parts(teacher, copy.deepcopy(student), ids.split(args.device_batch), clock)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.safetensors"
        save_file({"input_ids": ids.repeat(args.steps, 1)}, file)
        tokens = PackedTokens(file, seed=0, items=args.steps * args.batch)
        vocabulary = student.config.vocab_size
        make_trainer(student, teacher, tokens, recipe, Path(folder), [parts], vocabulary).train()
    # The first step also sets up the optimizer's state.
    median = {name: statistics.median(times[1:]) for name, times in parts.seconds.items()}
    bare = median["teacher"] + median["student"]
    report(
        "distillation step / its parts",
        median["step"] / bare,
        "<= 1.1",
        f"{'wall' if args.wall else 'CPU'} time, 1 thread, {PRECISION}, "
        f"{args.batch // args.device_batch} batches of {args.device_batch * args.length} tokens a "
        f"step; medians of {args.steps - 1} steps, each followed by the bare parts",
        seconds={name: round(value, 3) for name, value in median.items()},
    )


if __name__ == "__main__":
    main()
