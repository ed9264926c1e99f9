"""The machine a result was measured on, and the memory this process took at most."""
import datetime
import os
import platform
import resource
import sys
from collections.abc import Iterable
from typing import Any

import jax
import psutil

import tpllm
from tpllm.environment.software import cpu_model, describe_environment


def describe_machine(device: jax.Device) -> dict[str, Any]:
    """Date, versions, hardware and how busy it is; JSON-able."""
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "tpllm": tpllm.__version__,
            "python": platform.python_version(), **describe_environment(device.platform, device.device_kind), "cpu_model": cpu_model(),
            "num_cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "load_average": list(os.getloadavg())}


def peak_host_bytes() -> int:
    """The most memory this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_device_bytes(devices: Iterable[jax.Device]) -> int | None:
    """The most memory in use on any of the devices, or None where they do not tell (CPU devices use the host's)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return None if None in peaks else max(peaks)
