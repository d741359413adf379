"""Distillation by transformers' Trainer: one process, DDP, or DeepSpeed ZeRO-2 and ZeRO-3.

The loss is the sum over a micro-batch divided by the tokens of the whole step, so that one
process, gradient accumulation and several processes give the same gradients.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import SaveStrategy

from m2d.artifacts import flush_to_disk, fsync
from m2d.distill.checkpoints import checkpoints_in, seal
from m2d.distill.heads import Head, head_of, hidden_states, states_after_layers
from m2d.distill.liger import liger_loss
from m2d.distill.logits import StoredLogits
from m2d.distill.loss import distillation_loss, hidden_state_loss, stored_loss
from m2d.distill.optimizers import OPTIMIZERS
from m2d.distill.recipe import Recipe
from m2d.tokens.dataset import PackedTokens

KEPT_CHECKPOINTS = 2
WEIGHTS = "student.pt"


class StudentLoss(nn.Module):
    """The student and its loss in one forward, as DDP and ZeRO need it.

    ZeRO-3 gathers the parameters that are read inside the forward of the module it wraps, so the
    output head must be used here and not in the trainer.
    """

    def __init__(self, student: PreTrainedModel, recipe: Recipe, vocabulary: int) -> None:
        """vocabulary: the tokens that student and teacher have in common, the first ones of both.

        Both are padded, and not always alike; the distributions are over the common part.
        """
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.vocabulary = vocabulary

    def forward(
        self,
        input_ids: Tensor,
        teacher_states: tuple[Tensor, ...] | None = None,
        teacher_head: Head | None = None,
        stored_BLn: tuple[Tensor, Tensor] | None = None,
        counted_BL: Tensor | None = None,
    ) -> Tensor:
        """Summed loss over the micro-batch, float32 scalar.

        The teacher is given by its hidden states and head, or by stored ids and probabilities.
        teacher_states: [batch, length, H], those of `states_of`; the last ones go to the head.
        counted_BL: the positions that the loss is over; all without it.
        """

        def flat(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if counted_BL is None else x[counted_BL]

        states = self.states_of(self.student, input_ids)
        student_TH = flat(states[-1])
        student_head = head_of(self.student).first(self.vocabulary)
        if stored_BLn is not None:
            ids_Tn, p_Tn = map(flat, stored_BLn)
            return stored_loss(student_TH, student_head, ids_Tn, p_Tn)
        assert teacher_states is not None
        assert teacher_head is not None
        teacher_head = teacher_head.first(self.vocabulary)
        sides = (student_TH, student_head, flat(teacher_states[-1]), teacher_head)
        loss = self.divergence_of(sides, input_ids, flat)
        if weight := self.recipe.hidden_loss_weight:
            both = (tuple(map(flat, each)) for each in (states, teacher_states))
            loss = loss + weight * hidden_state_loss(*both)
        return loss

    def states_of(self, model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, ...]:
        """The hidden states that the loss compares: after each layer, or the last alone."""
        if self.recipe.hidden_loss_weight:
            return states_after_layers(model, input_ids)
        return (hidden_states(model, input_ids),)

    def divergence_of(
        self,
        sides: tuple[Tensor, Head, Tensor, Head],
        input_ids: Tensor,
        flat: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The summed loss of the distributions. sides: student's and teacher's states and heads."""
        divergence, temperature = self.recipe.loss, self.recipe.temperature
        if self.recipe.loss_implementation == "liger":
            return liger_loss(
                *sides,
                divergence=divergence,
                temperature=temperature,
                compiled=self.recipe.compile,
            )
        labels = None
        if self.recipe.cross_entropy_weight:
            labels = torch.full_like(input_ids, -100)
            labels[:, :-1] = input_ids[:, 1:]
        return distillation_loss(
            *sides,
            divergence=divergence,
            temperature=temperature,
            labels_T=None if labels is None else flat(labels),
            cross_entropy_weight=self.recipe.cross_entropy_weight,
        )


class DistillationTrainer(Trainer):
    """Trainer whose loss compares the student with a frozen teacher.

    Checkpoints appear under their final name only when complete; the last two are kept.
    """

    # The loss is divided by the tokens of the whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: StudentLoss,
        *,
        teacher: PreTrainedModel | StoredLogits,
        recipe: Recipe,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.student_loss = model  # self.model may be wrapped
        self.tokens: PackedTokens = kwargs["train_dataset"]
        self.counted_of = (-1, 0)  # a step, and what the loss counts in it
        self.teacher = teacher
        self.teacher_head: Head | None = None
        if not isinstance(teacher, StoredLogits):
            # A teacher may be spread over devices; its hidden states follow to the student's.
            self.teacher_head = head_of(teacher).to(self.args.device)
        self.recipe = recipe

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This process's share of the step's mean loss, times the number of processes.

        DDP and DeepSpeed average the gradients over processes, hence the factor.
        """
        ids = inputs["input_ids"]
        if isinstance(self.teacher, StoredLogits):
            rows = [self.teacher[row] for row in inputs["row"].tolist()]
            stored = tuple(torch.stack(column).to(ids.device) for column in zip(*rows, strict=True))
            loss = model(ids, stored_BLn=stored, counted_BL=inputs.get("counted"))
        else:
            with torch.no_grad():
                states = self.student_loss.states_of(self.teacher, ids)
            states = tuple(state.to(ids.device) for state in states)
            loss = model(ids, states, self.teacher_head, counted_BL=inputs.get("counted"))
        loss = loss / self.counted_in_step() * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def counted_in_step(self) -> int:
        """The positions that the loss of the present step is over, in all processes."""
        step, batch = self.state.global_step, self.recipe.batch
        if self.counted_of[0] != step:
            found = self.tokens.counted_in(range(step * batch, (step + 1) * batch))
            self.counted_of = (step, max(found, 1))
        return self.counted_of[1]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return f"{self.args.output_dir}/.partial"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        work = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        partial = work / ".partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(partial / name)
            flush_to_disk(partial / name)
            shutil.rmtree(work / name, ignore_errors=True)
            (partial / name).rename(work / name)
            fsync(work)
            for old in checkpoints_in(work)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights for resuming. DeepSpeed's own checkpoint holds them already."""
        if not self.is_deepspeed_enabled and self.args.should_save and output_dir:
            torch.save(self.student_loss.state_dict(), Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = torch.load(
            Path(resume_from_checkpoint) / WEIGHTS, map_location="cpu", weights_only=True
        )
        self.student_loss.load_state_dict(weights)

    def trained_weights(self) -> dict[str, Tensor]:
        """The student's weights, gathered; called by every process, complete on the first one."""
        if self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.deepspeed)
        else:
            state = self.student_loss.state_dict()
        # Else transformers would partition whatever model is made next.
        unset_hf_deepspeed_config()
        return {name.removeprefix("student."): value for name, value in (state or {}).items()}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def zero2() -> dict[str, Any]:
    """DeepSpeed's settings for ZeRO-2."""
    return deepspeed_config({"stage": 2, "contiguous_gradients": True})


def zero3() -> dict[str, Any]:
    """DeepSpeed's settings for ZeRO-3."""
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    return deepspeed_config({"stage": 3, "contiguous_gradients": True, **gather})


ZERO_STAGES = {"zero2": zero2, "zero3": zero3}


def deepspeed_config(zero: dict[str, Any]) -> dict[str, Any]:
    """What the stages share. No optimizer and no scheduler: Trainer supplies those."""
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "steps_per_print": 10**9,
    }


def training_arguments(recipe: Recipe, work: Path, device: torch.device) -> TrainingArguments:
    """The Trainer's settings of a recipe; `work` takes the checkpoints."""
    zero = ZERO_STAGES.get(recipe.strategy)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.device_batch,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": recipe.decay_steps,
            "decay_type": recipe.decay,
            "min_lr_ratio": recipe.min_learning_rate / recipe.learning_rate,
        },
        warmup_steps=recipe.warmup_steps,
        bf16=recipe.precision == "bf16",
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # PackedTokens is in training order already
        save_strategy=SaveStrategy.NO,  # m2d.distill.watch says when
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        deepspeed=zero() if zero else None,
    )
    # One process drives one device, also where it sees several: never torch's DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def make_trainer(
    student: PreTrainedModel,
    teacher: PreTrainedModel | StoredLogits,
    tokens: PackedTokens,
    recipe: Recipe,
    work: Path,
    callbacks: list[Any],
    vocabulary: int,
) -> DistillationTrainer:
    """A trainer that is ready to run. `student` is float32, `teacher` in its own dtype.

    vocabulary: the tokens that both have, the first ones of each.
    """
    if not isinstance(teacher, StoredLogits):
        teacher.eval().requires_grad_(False)
        if recipe.compile:
            teacher.base_model.compile()
    student.train()
    if recipe.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    if recipe.compile:
        student.base_model.compile()
    trainer = DistillationTrainer(
        model=StudentLoss(student, recipe, vocabulary),
        args=training_arguments(recipe, work, student.device),
        data_collator=collate,
        train_dataset=tokens,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=OPTIMIZERS[recipe.optimizer](recipe.learning_rate),
        teacher=teacher,
        recipe=recipe,
    )
    trainer.remove_callback(PrinterCallback)  # m2d.distill.watch shows the progress
    return trainer
