"""How long a call takes, how much memory, and what the device can do. Speeds are compared side by
side: the calls take turns, after a round that warms up."""
import os
import platform
import re
import shutil
import subprocess
import time
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from tokprune import in_turn, prefill, with_room

STEPS = 8                       # tokens decoded at a time


def now(device) -> float:
    """Return milliseconds, on a CUDA device when everything in its queue is done.

    Synchronizes only this device: touching another would create a CUDA context on it.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def time_in_turns(calls: dict, rounds: int, device) -> dict[str, dict]:
    """Return the milliseconds of each call, by its name: {"median", "low", "high"} of so many
    rounds, after one that warms up. The calls take turns, every other round in reverse."""
    ms = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds + 1):
        for name in order:
            start = now(device)
            calls[name]()
            ms[name].append(now(device) - start)
        order.reverse()
    return {name: spread(times[1:]) for name, times in ms.items()}


def spread(ms: list[float]) -> dict:
    return {"median": float(np.median(ms)), "low": min(ms), "high": max(ms)}


def span(ms: dict, digits: int = 1) -> str:
    """Format as "12.3 [12.0, 13.1]"."""
    return f"{ms['median']:.{digits}f} [{ms['low']:.{digits}f}, {ms['high']:.{digits}f}]"


def time_call(call, rounds: int, device) -> dict:
    """Return what `time_in_turns` finds of one call."""
    return time_in_turns({"": call}, rounds, device)[""]


def time_prefill(model, stream, schedules: dict[str, tuple], rounds: int) -> dict[str, dict]:
    """Return milliseconds from the input of layer 0 to the first logits, by schedule's name."""
    calls = {}
    for name, schedule in schedules.items():
        calls[name] = lambda schedule=schedule: model.logits(prefill(model, stream, schedule))
    return time_in_turns(calls, rounds, stream.x.device)


def decode(model, full_stream):
    """Decode STEPS tokens behind a stream past the last layer; no answer ends it early."""
    token = in_turn(full_stream.ids[:, -1:], len(full_stream.x))
    stream = with_room(full_stream)
    for _ in range(STEPS):
        stream = model.run(model.append(stream, token))
        model.logits(stream)


# ---- what the device can do ----------------------------------------------------------------------

def matrix_rate(like: torch.Tensor, rounds: int = 5) -> float:
    """Return the FLOPs a second of a large square matrix product, on that tensor's device, in its
    precision. Of random numbers: a GPU multiplies constant ones faster."""
    n = 8192 if like.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=like.device, dtype=like.dtype)
    ms = time_call(lambda: a @ a, rounds, like.device)["low"]
    return 2 * n ** 3 / ms * 1000


def copy_rate(device, rounds: int = 5) -> float:
    """Return the bytes a second that a large copy reads and writes on the device."""
    size = 2 ** 31 if torch.device(device).type == "cuda" else 2 ** 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = time_call(lambda: target.copy_(source), rounds, device)["low"]
    return 2 * size / ms * 1000


def floor_ms(layer_flops: list[float], layer_bytes: list[float], rate: float,
             bandwidth: float) -> float:
    """Return the least milliseconds of a prefill: a layer takes at least the time of its FLOPs at
    `rate` and that of reading its weights once at `bandwidth`, whichever is longer."""
    seconds = [max(n / rate, size / bandwidth) for n, size in zip(layer_flops, layer_bytes)]
    return 1000 * sum(seconds)


# ---- memory, and the device's name ---------------------------------------------------------------

def extra_memory(call, device) -> int:
    """Return the most bytes that torch holds for a call at once, beside what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ["KINETO_LOG_LEVEL"] = "6"        # or the profiler says when it starts and stops
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def cache_bytes(stream) -> int:
    """Return the memory of a stream's cache: the storages its tensors lie in, each once."""
    storages = {}
    for kv in stream.cache:
        for tensor in (kv.keys, kv.values):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def device_name(device) -> str:
    """Return the GPU with its driver and CUDA version, or the CPU's model where Linux tells it."""
    if torch.device(device).type == "cuda":
        driver = "unknown"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            printed = subprocess.run(query, capture_output=True, text=True).stdout.split()
            driver = printed[0] if printed else driver
        name = torch.cuda.get_device_name(device)
        return f"{name}, driver {driver}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        if model:
            return model[1]
    return platform.machine()
