"""Which calibration sequences judge what the others fitted."""

import torch
from torch import Tensor

HELD_OUT_EVERY = 8


def held_out_sequences(sequences: int, every: int = HELD_OUT_EVERY) -> Tensor:
    """Which sequences are held out, bool [sequences]: every n-th, at least one, never all."""
    step = min(every, sequences)
    return torch.arange(sequences) % step == step - 1
