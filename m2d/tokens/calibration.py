"""What the commands that run calibration tokens through a teacher read from their options."""

import argparse

import torch
from torch import Tensor

from m2d.devices import compute_dtype, pick_device
from m2d.models.teacher import Teacher
from m2d.tokens.files import read_tokens


def calibration(
    args: argparse.Namespace, teacher: Teacher
) -> tuple[Tensor, torch.dtype, torch.device]:
    """--tokens [sequences, length], and what --dtype and --device say of the products.

    Raises UserError where the tokens are not this teacher's, or there is no such device.
    """
    tokens = read_tokens(args.tokens, teacher.config.vocab_size)
    device = pick_device(args.device)
    return tokens, compute_dtype(args.dtype, teacher.dtype, device), device
