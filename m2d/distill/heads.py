"""A causal LM as its last hidden states and the head that makes logits of them.

Shape suffixes: C tokens, R some of them, H hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m2d.devices import dtype_name
from m2d.errors import UserError
from m2d.models.skeleton import decoder_of

# config keys by which families change their logits after the output embedding
DIVISORS = ("logits_scaling",)  # Granite
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
SOFTCAPS = ("final_logit_softcapping",)  # Gemma
UNPADDED = "unpadded_vocab_size"  # Inkling 2: tokens beyond it have no logits


class Head(NamedTuple):
    """What turns final hidden states into logits: softcap(x @ weight.T + bias), on x * multiplier.

    Attributes:
        weight_VH: the output embedding.
        bias_V: its bias, or None.
        multiplier: Granite divides its logits, Cohere multiplies them; 1 for most models.
        softcap: Gemma's final cap, z = softcap * tanh(z / softcap); None for most models.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    multiplier: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device) -> "Head":
        """The head on another device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return self._replace(weight_VH=self.weight_VH.to(device), bias_V=bias_V)

    def first(self, vocabulary: int) -> "Head":
        """The head's logits of the first `vocabulary` tokens alone."""
        if vocabulary >= len(self.weight_VH):
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary]
        return self._replace(weight_VH=self.weight_VH[:vocabulary], bias_V=bias_V)

    def products(self, hidden_CH: Tensor) -> Tensor:
        """hidden @ weight.T, [C, V], in the dtype of `hidden_CH`."""
        return torch.mm(hidden_CH, self.weight_VH.to(hidden_CH.dtype).t())

    def finish(self, products_RV: Tensor) -> Tensor:
        """float32 logits [R, V] of `products`; may overwrite them."""
        z_RV = products_RV.float()
        if self.bias_V is not None:
            z_RV += self.bias_V
        if self.multiplier != 1.0:
            z_RV *= self.multiplier
        if self.softcap is not None:
            z_RV = z_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_RV

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """float32 logits [C, V] of hidden states, multiplied in the dtype of `hidden_CH`."""
        return self.finish(self.products(hidden_CH))


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal LM, with what its config does to the logits."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    multiplier = 1.0
    for key in DIVISORS:
        multiplier /= getattr(config, key, None) or 1.0
    for key in FACTORS:
        multiplier *= getattr(config, key, None) or 1.0
    softcap = next((getattr(config, key) for key in SOFTCAPS if getattr(config, key, None)), None)
    head = Head(output.weight, getattr(output, "bias", None), multiplier, softcap)
    return head.first(getattr(config, UNPADDED, None) or len(output.weight))


def _run_base(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Any:
    # Llama 4's composite model has no base model; its decoder gives the same for text.
    base = decoder_of(model) if model.base_model is model else model.base_model
    return base(input_ids=input_ids, use_cache=False, **options)


def hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Hidden states after the last norm, [batch, length, H]."""
    return _run_base(model, input_ids).last_hidden_state


def states_after_layers(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, ...]:
    """Hidden states after each layer, [batch, length, H]; the last ones after the last norm."""
    found = _run_base(model, input_ids, output_hidden_states=True)
    return (*found.hidden_states[1:-1], found.last_hidden_state)


@torch.no_grad()
def check_head(model: PreTrainedModel, input_ids: Tensor, name: str) -> None:
    """Raise a UserError unless `head_of` gives the logits that the model itself gives.

    Families differ in what they do after the output embedding; one that is not known here must
    not be distilled with wrong logits.
    """
    ids = input_ids.to(model.device)
    own = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
    if not bool(own.isfinite().all()):
        kind = dtype_name(model.dtype)
        raise UserError(f"{name}: its logits are not finite in {kind}; do its weights fit in that?")
    hidden = hidden_states(model, ids).flatten(0, 1).to(own.device)
    ours = head_of(model).to(own.device).logits(hidden)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    same = ours.shape == own.shape
    if not same or not torch.allclose(ours, own, rtol=0, atol=tolerance * float(own.abs().max())):
        raise UserError(
            f"{name}: its logits are not its last hidden states times its output embedding "
            f"({type(model).__name__} changes them in a way that m2d does not know)"
        )
