"""How long a call takes, and how much memory. Speeds are compared side by side: the calls take
turns, after a round that warms up."""
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

from tokprune import prefill, with_room

STEPS = 8                       # tokens decoded at a time


def now(device) -> float:
    """Milliseconds; on a CUDA device, when everything in its queue is done. Only the device that is
    given is asked: a question to another one would open a context there."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def time_in_turns(calls: dict, rounds: int, device) -> dict[str, dict]:
    """Milliseconds of each call, by its name: {"median", "low", "high"} of so many rounds, after
    one that warms up. The calls take turns in this order, in the next round in reverse."""
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
    """As 12.3 [12.0, 13.1]."""
    return f"{ms['median']:.{digits}f} [{ms['low']:.{digits}f}, {ms['high']:.{digits}f}]"


def time_call(call, rounds: int, device) -> dict:
    """`time_in_turns` of one call."""
    return time_in_turns({"": call}, rounds, device)[""]


def time_prefill(model, stream, schedules: dict[str, tuple], rounds: int) -> dict[str, dict]:
    """Milliseconds from the input of layer 0 to the first logits, by the name of the schedule."""
    calls = {}
    for name, schedule in schedules.items():
        calls[name] = lambda schedule=schedule: model.logits(prefill(model, stream, schedule))
    return time_in_turns(calls, rounds, stream.x.device)


def decode(model, full):
    """STEPS tokens behind a stream past the last layer, whose cache is copied first."""
    token = full.ids[-1:][None]
    stream = with_room(full)
    for _ in range(STEPS):
        stream = model.run(model.append(stream, token))
        model.logits(stream)


def matrix_rate(like: torch.Tensor, rounds: int = 5) -> float:
    """FLOPs a second of a large square matrix product, on that tensor's device, in its precision.
    """
    n = 8192 if like.device.type == "cuda" else 2048
    a = torch.ones(n, n, device=like.device, dtype=like.dtype)
    ms = time_call(lambda: a @ a, rounds, like.device)["low"]
    return 2 * n ** 3 / ms * 1000


def extra_memory(call, device) -> int:
    """The most bytes that torch holds for a call at once, beside what it held before."""
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
    """What the cache of a stream keeps in memory: the storages its tensors lie in, each once."""
    storages = {}
    for kv in stream.cache:
        for tensor in (kv.keys, kv.values):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def device_name(device) -> str:
    """The GPU with its driver and CUDA version, or the CPU's model where Linux tells it."""
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
