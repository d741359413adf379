"""What a distillation's recipe can say, on the command line as in the workflow's config."""

from typing import Annotated, Literal

from m2d.distill.divergences import DIVERGENCES
from m2d.distill.optimizers import OPTIMIZERS
from m2d.settings import (
    ComputeDtype,
    Count,
    MethodOf,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    Whole,
)


class DistillSettings(Section):
    """Options of `m2d distill`. docs/distillation.md has what the defaults were measured to be."""

    steps: Count | None = None
    """Optimizer steps; one pass over the tokens if left out."""
    batch: Count | None = None
    """Sequences of a step, on all GPUs; if left out, as many as leave 1,000 steps, at most 384."""
    device_batch: Count = 4
    """Sequences at a time on one GPU."""
    learning_rate: Positive | None = None
    """Peak of the schedule (warm-up, stable, decay); if left out, 1e-4, half of it for a refitted
    student and a quarter for an aligned one."""
    min_learning_rate: NotNegative | None = None
    """Start and end of the schedule; 0 if left out."""
    warmup_steps: Whole | None = None
    """Steps of linear warm-up; a thirtieth of all if left out."""
    decay_steps: Whole | None = None
    """Steps of decay at the end; 30 % of all if left out."""
    decay: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the decay."""
    optimizer: Annotated[str, MethodOf("optimizer")] = OPTIMIZERS.default
    """What takes the steps."""
    weight_decay: NotNegative = 0.0
    """Decay of matrices towards 0, times the learning rate."""
    max_grad_norm: NotNegative = 1.0
    """Clipping of gradients; 0 for none."""
    loss: Annotated[str, MethodOf("divergence")] = DIVERGENCES.default
    """Divergence between teacher and student."""
    loss_implementation: Literal["chunked", "liger"] = "chunked"
    """Our own, or liger-kernel's, from pip install 'm2d[liger]'."""
    temperature: Positive = 1.0
    """Of both distributions."""
    cross_entropy_weight: Share = 0.0
    """Share of the next-token loss."""
    hidden_loss_weight: NotNegative = 0.0
    """Weight of the hidden states' distance from the teacher's, added to the loss; 0 for none."""
    teacher_top_k: Count | None = None
    """Experts per token in the teacher (expanded routing); its own if left out."""
    teacher_dtype: ComputeDtype = "auto"
    """Of the teacher's products; auto: the checkpoint's where the device is fast in it, else
    float32."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the student's steps; auto: bf16 where the device is fast in it, else fp32."""
    strategy: Literal["auto", "ddp", "zero2", "zero3"] = "auto"
    """With several processes; auto is DeepSpeed ZeRO-2."""
    gradient_checkpointing: bool = False
    """Less memory, slower."""
    compile: bool = False
    """torch.compile both models."""
    seed: Seed = 0
    """Order of the tokens."""
