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
from common import clock_of, compute_on, device_option, report
from safetensors.torch import save_file
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from m2d.devices import dtype_name
from m2d.distill.trainer import Recipe, make_trainer
from m2d.models.widen import widen
from m2d.tokens.dataset import PackedTokens

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
        self,
        teacher: Any,
        student: Any,
        batches: Sequence[torch.Tensor],
        clock: Any,
        autocast: bool,
    ) -> None:
        self.teacher, self.student, self.batches, self.clock = teacher, student, batches, clock
        self.autocast = autocast
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
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
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
    device_option(parser)
    parser.add_argument("--wall", action="store_true", help="wall time, on an idle machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compute, on_gpu = compute_on(args.device), args.device.type == "cuda"
    precision = "bf16" if compute == torch.bfloat16 else "fp32"
    teacher = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)).bfloat16().to(args.device)
    if compute != torch.bfloat16:
        widen(teacher, compute)
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
        teacher_dtype=dtype_name(compute),
        precision=precision,
        gradient_checkpointing=False,
        compile=False,
        strategy="single",
        processes=1,
        seed=0,
    )
    ids = torch.randint(0, VOCABULARY, (args.batch, args.length))
    wall = args.wall or on_gpu
    clock = clock_of(False, args.device)[0] if wall else time.process_time
    batches = ids.to(args.device).split(args.device_batch)
    bare_student = copy.deepcopy(student).to(args.device)
    parts = Parts(teacher, bare_student, batches, clock, precision == "bf16")
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
        f"{'wall' if wall else 'CPU'} time, 1 thread, {precision}, "
        f"{args.batch // args.device_batch} batches of {args.device_batch * args.length} tokens a "
        f"step; medians of {args.steps - 1} steps, each followed by the bare parts",
        seconds={name: round(value, 3) for name, value in median.items()},
    )


if __name__ == "__main__":
    main()
