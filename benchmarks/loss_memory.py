"""Memory and time of the chunked loss against full logits, at a real vocabulary.

Both versions run forward and backward on the same tensors, each in a process of its own, so that
the peak of one cannot hide in the other's; the runs alternate and each version's best time counts,
so that a busy machine does not decide. Memory is the peak of the process above what the inputs
themselves take.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import clock_of, compute_on, device_option, report
from torch import Tensor

from m2d.distill.heads import Head
from m2d.distill.loss import distillation_loss


def full_logits(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """Forward KL on full logits, as a training loop would write it."""
    z = (student @ head.to(student.dtype).t()).float()
    with torch.no_grad():
        t = (teacher @ teacher_head.t()).float().log_softmax(-1)
    return torch.nn.functional.kl_div(z.log_softmax(-1), t, reduction="sum", log_target=True)


def chunked(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    on, narrow = student.device.type, student.dtype == torch.bfloat16
    with torch.autocast(on, torch.bfloat16, enabled=narrow):
        return distillation_loss(student, Head(head), teacher, Head(teacher_head))


VERSIONS = {"full": full_logits, "chunked": chunked}


def resident_bytes(kind: str) -> int:
    """VmRSS (now) or VmHWM (the peak since the last reset) of this process; Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def worker(version: str, tokens: int, hidden: int, vocabulary: int, device: torch.device) -> None:
    """Measure one forward and backward on each line of stdin; answer with a JSON line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_device(device)
    compute, on_gpu = compute_on(device), device.type == "cuda"
    clock = clock_of(False, device)[0]
    student = torch.randn(tokens, hidden).to(compute).requires_grad_()
    head = (torch.randn(vocabulary, hidden) * 0.05).requires_grad_()
    teacher = torch.randn(tokens, hidden).to(compute)
    teacher_head = (torch.randn(vocabulary, hidden) * 0.05).to(compute)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        reset_peak()
        before = resident_bytes("VmRSS")
    for _ in sys.stdin:
        student.grad = head.grad = None
        start, cpu = clock(), time.process_time()
        loss = VERSIONS[version](student, head, teacher, teacher_head)
        (loss / tokens).backward()
        seconds = clock() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
        result = {
            "seconds": seconds,
            "busy_seconds": seconds if on_gpu else time.process_time() - cpu,
            "bytes": peak - before,
            "loss": loss.item() / tokens,
        }
        print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    device_option(parser)
    parser.add_argument("--worker", choices=VERSIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.tokens, args.hidden, args.vocabulary, args.device)
        return
    shape = ["--tokens", args.tokens, "--hidden", args.hidden, "--vocabulary", args.vocabulary]
    shape += ["--device", args.device]
    runs: dict[str, list[dict]] = {name: [] for name in VERSIONS}
    processes = {}
    for name in VERSIONS:
        command = [sys.executable, __file__, "--worker", name, *map(str, shape)]
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    for _ in range(args.repeats):
        for name, process in processes.items():
            process.stdin.write("run\n")
            process.stdin.flush()
            runs[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    best = {name: min(run["busy_seconds"] for run in results) for name, results in runs.items()}
    peak = {name: max(run["bytes"] for run in results) for name, results in runs.items()}
    on_cpu = args.device.type == "cpu"
    clock = "CPU" if on_cpu else "wall"
    how = (
        f"{args.tokens} tokens, hidden size {args.hidden}, vocabulary {args.vocabulary}; bf16 "
        "products, float32 softmax, 1 thread; "
    )
    report(
        "chunked loss / full logits, memory",
        peak["chunked"] / peak["full"],
        "<= 0.33",
        how + f"peak {'resident ' if on_cpu else ''}memory above the inputs, a process each",
        megabytes={name: round(value / 1e6) for name, value in peak.items()},
        loss={name: results[0]["loss"] for name, results in runs.items()},
    )
    report(
        "chunked loss / full logits, time",
        best["chunked"] / best["full"],
        "<= 1.1",
        how + f"{clock} time of forward and backward, best of {args.repeats} alternating runs",
        seconds={name: round(value, 4) for name, value in best.items()},
    )


if __name__ == "__main__":
    main()
