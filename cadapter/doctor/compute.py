"""What computes: GPUs and the ways between them, kernels, 4 bits, compiled code, and processes that work together."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from cadapter.doctor.findings import Finding, first_line, size

GPUS, BETWEEN, KERNELS, PROCESSES = "GPUs", "Between GPUs", "Kernels", "Processes"
NF4_ERROR = (0.05, 0.15)
"""Relative error of nf4 on normal random numbers: 0.09; outside of this, it is not quantised, or read wrongly."""
SECONDS = 60


def _devices() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _nvidia_smi(*arguments: str) -> str | None:
    """What ``nvidia-smi`` prints, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def check_gpus() -> Iterator[Finding]:
    """Which GPUs torch sees, and whether each computes."""
    import torch

    devices = _devices()
    if not devices:
        yield _why_no_gpu(torch)
        return
    driver = (_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0].strip()
    yield Finding(GPUS, "driver", "ok", f"{driver or 'version unknown'}, CUDA {torch.version.cuda} in torch")
    for device in devices:
        facts = torch.cuda.get_device_properties(device)
        words = f"{facts.name}, {size(facts.total_memory)}, compute capability {facts.major}.{facts.minor}"
        try:
            A = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
            right = torch.allclose((A @ A).float().cpu(), A.float().cpu() @ A.float().cpu(), atol=0.5, rtol=0.05)
            free, total = torch.cuda.mem_get_info(device)
        except Exception as error:
            remedy = "Install a PyTorch build for this GPU and its driver, see pytorch.org."
            yield Finding(GPUS, device, "broken", f"{words}: it cannot compute ({first_line(error)}).", remedy)
            continue
        if not right:
            yield Finding(GPUS, device, "broken", f"{words}: its products are wrong.", "Do not trust this card.")
        elif facts.major < 8:
            remedy = 'Train with dtype = "float32", or on a newer card.'
            yield Finding(GPUS, device, "warning", f"{words}: no bfloat16 in hardware, so it is slow.", remedy)
        elif free < 0.8 * total:
            remedy = "See nvidia-smi for who holds it."
            yield Finding(GPUS, device, "warning", f"{words}: only {size(free)} are free.", remedy)
        else:
            yield Finding(GPUS, device, "ok", f"{words}, {size(free)} free")


def _why_no_gpu(torch: Any) -> Finding:
    """Why torch sees no GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip(" -1"):
        return Finding(GPUS, "none", "ok", f"CUDA_VISIBLE_DEVICES={hidden!r} hides all; the CPU is used.")
    if _nvidia_smi("-L"):
        if torch.version.cuda is None:
            found, remedy = "torch was built without CUDA", "Install the PyTorch build for your GPU, see pytorch.org."
        else:
            found = f"torch (CUDA {torch.version.cuda}) cannot use it"
            remedy = "Update the driver, or install a PyTorch build for it; see nvidia-smi and pytorch.org."
        return Finding(GPUS, "none", "broken", f"This machine has an NVIDIA GPU, and {found}.", remedy)
    return Finding(GPUS, "none", "ok", "There is none here; the CPU is used, which is slow for all but tiny models.")


def check_peers() -> Iterator[Finding]:
    """Whether GPUs reach one another's memory, and whether what arrives is what was sent."""
    import torch

    from cadapter.training.nccl import nccl_settings

    devices = _devices()
    if len(devices) < 2:
        return
    pairs = list(permutations(range(len(devices)), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    needed = nccl_settings([torch.cuda.get_device_name(device) for device in devices], os.environ)
    links = _links(_nvidia_smi("topo", "-m") or "")
    if links:
        yield Finding(BETWEEN, "links", "ok", f"{links} (nvidia-smi topo -m)")
    if needed:
        words = " and ".join(f"{name}={value}" for name, value in needed.items())
        yield Finding(BETWEEN, "NCCL", "ok", f"These cards have no peer-to-peer transfers; cadapter sets {words}.")
    elif apart and os.environ.get("NCCL_P2P_DISABLE") != "1":
        words = f"{len(apart)} of {len(pairs)} pairs have no peer-to-peer transfers; data goes through host memory."
        yield Finding(BETWEEN, "peers", "warning", words, "If a run stands still at its start, set NCCL_P2P_DISABLE=1.")
    else:
        yield Finding(
            BETWEEN, "peers", "ok", f"all {len(pairs)} pairs reach one another" if not apart else "switched off"
        )
    wrong = [pair for pair in pairs if not _arrives(torch, *pair)]
    if wrong:
        words = f"What GPU {wrong[0][0]} sends does not arrive at GPU {wrong[0][1]} ({len(wrong)} pairs)."
        remedy = "Set NCCL_P2P_DISABLE=1, and switch ACS or IOMMU off in the machine's firmware."
        yield Finding(BETWEEN, "copies", "broken", words, remedy)
    else:
        yield Finding(BETWEEN, "copies", "ok", "arrive as they were sent")


def _arrives(torch: Any, source: int, target: int) -> bool:
    sent = torch.randn(1 << 20, device=f"cuda:{source}")
    return torch.equal(sent.to(f"cuda:{target}").cpu(), sent.cpu())


def _links(topology: str) -> str:
    """The kinds of links between GPUs in the matrix of ``nvidia-smi topo -m``: "NV18 (2 pairs)"."""
    rows = [line.split() for line in topology.splitlines() if line.startswith("GPU") and len(line.split()) > 1]
    counts: dict[str, int] = {}
    for number, row in enumerate(rows):
        for kind in row[number + 2 : len(rows) + 1]:
            counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({count} pair{'s' * (count > 1)})" for kind, count in counts.items())


def check_four_bit() -> Iterator[Finding]:
    """Whether bitsandbytes quantises and reads back a tensor, on the CPU and on the first GPU."""
    import torch
    from bitsandbytes import functional

    for device in ["cpu", *_devices()[:1]]:
        weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            back = functional.dequantize_4bit(packed, state)
        except Exception as error:
            remedy = "load_in_4bit cannot be used: install a bitsandbytes that has kernels for this CUDA version."
            yield Finding(KERNELS, f"4 bits on {device}", "broken", first_line(error), remedy)
            continue
        lost = ((back - weight).norm() / weight.norm()).item()
        stored = packed.numel() * packed.element_size()
        if stored == weight.numel() // 2 and NF4_ERROR[0] < lost < NF4_ERROR[1]:
            yield Finding(KERNELS, f"4 bits on {device}", "ok", f"nf4 keeps a tensor to {lost:.1%}")
        else:
            words = f"{stored} bytes of {weight.numel()} numbers, {lost:.1%} lost: this is no nf4."
            yield Finding(KERNELS, f"4 bits on {device}", "broken", words, "Install bitsandbytes again.")


def check_attention() -> Iterator[Finding]:
    """Which attention kernels run here."""
    import torch

    from cadapter.models.attention import time_kernels

    for device in _devices()[:1]:
        shape = type("Shape", (), {"num_attention_heads": 8, "hidden_size": 512})()
        found = time_kernels(shape, 1, 512, torch.bfloat16, torch.device(device))
        if found is None:
            yield Finding(KERNELS, "attention", "warning", "only PyTorch's plain kernel runs here, which is slow.")
        else:
            yield Finding(KERNELS, "attention", "ok", "PyTorch's " + ", ".join(found.milliseconds))
    if not _devices():
        yield Finding(KERNELS, "attention", "ok", "PyTorch's own, on the CPU")
    if importlib.util.find_spec("flash_attn") is None:
        yield Finding(KERNELS, "flash_attn", "ok", "not installed, and not needed: PyTorch's kernels are used")
        return
    try:
        version = getattr(importlib.import_module("flash_attn"), "__version__", "installed")
        yield Finding(KERNELS, "flash_attn", "ok", str(version))
    except BaseException as error:
        remedy = 'Remove it or install it again; until then set attn_implementation = "sdpa".'
        yield Finding(KERNELS, "flash_attn", "broken", f"cannot be imported: {first_line(error)}", remedy)


def check_compile() -> Iterator[Finding]:
    """Whether torch.compile makes code that runs; blocks are compiled on GPUs only."""
    import torch

    for device in _devices()[:1]:
        try:
            inputs = torch.arange(64.0, device=device)
            right = torch.equal(torch.compile(lambda x: x * 2 + 1)(inputs), inputs * 2 + 1)
        except Exception as error:
            remedy = "Install a C compiler (gcc) and triton, or set compile = false."
            yield Finding(KERNELS, "torch.compile", "broken", first_line(error), remedy)
            continue
        if right:
            yield Finding(KERNELS, "torch.compile", "ok", "compiled code runs")
        else:
            words = "compiled code gives wrong numbers."
            yield Finding(KERNELS, "torch.compile", "broken", words, "Set compile = false.")


def check_gloo() -> Iterator[Finding]:
    """Whether two processes of this machine find one another and add numbers up, as several stages would."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            remedy = "Bring the loopback interface up: ip link set lo up."
            yield Finding(PROCESSES, "loopback", "broken", f"127.0.0.1 cannot be used: {error.strerror}.", remedy)
            return
        port = probe.getsockname()[1]
    import torch.distributed  # noqa: F401  (before the fork, so that it is read once)

    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    workers = [fork.Process(target=_add_up, args=(rank, port, answers), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        found = [answers.get(timeout=SECONDS) for _ in workers]
    except Exception:
        found = ["they did not find one another"]
    for worker in workers:
        worker.kill()
        worker.join()
    if found == ["", ""]:
        yield Finding(PROCESSES, "gloo", "ok", "two processes of this machine work together")
    else:
        words = f"Two processes of this machine cannot work together: {next(filter(None, found))}."
        remedy = "Set GLOO_SOCKET_IFNAME=lo, or name this host in /etc/hosts."
        yield Finding(PROCESSES, "gloo", "broken", words, remedy)


def _add_up(rank: int, port: int, answers: Any) -> None:
    """One of two processes: empty words if the sum is right."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    try:
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
        number = torch.tensor([rank + 1.0])
        dist.all_reduce(number)
        answers.put("" if number.item() == 3 else f"the sum of 1 and 2 is {number.item():g}")
        dist.barrier()
    except Exception as error:
        answers.put(first_line(error))
