"""The machine itself: versions, memory, disk, rights, and the device that training asks for."""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from medfl import PROTOCOL, __version__
from medfl.check.finding import Finding
from medfl.check.scope import Scope
from medfl.errors import ResourceError
from medfl.files import existing
from medfl.machine import cores, memory
from medfl.training import Device

GB = 1e9
PYTHON = (3, 11)
LEAST_MEMORY = 4 * GB
LEAST_DISK = 2 * GB  # of logs and records beside the states
COPIES = 3  # of a state: the old one, the new one, and one being written
LEAST_SHARED = 60e6  # bytes; Docker gives 64 MB


def findings(scope: Scope, need: float) -> list[Finding]:
    """
    Args:
        need: bytes of the images in memory.
    """
    return [_versions(scope), _memory(need), _disk(scope), _shared(), _rights(scope), _cores(scope), _device(scope)]


def _versions(scope: Scope) -> Finding:
    have = f"Python {platform.python_version()}, medfl {__version__}, torch {torch.__version__}"
    counts = {"python": float(f"{sys.version_info.major}.{sys.version_info.minor:02}"), "protocol": PROTOCOL}
    if sys.version_info < PYTHON:
        return Finding("host", "versions", "fail", have, "medfl needs Python 3.11.", "Use medfl's image.", counts)
    invited = scope.invitation
    if invited is not None and invited.medfl != __version__:
        why = f"The study was made with medfl {invited.medfl}; another release may be refused by the coordinator."
        return Finding("host", "versions", "warn", have, why, f"Install medfl {invited.medfl}.", counts)
    return Finding("host", "versions", "pass", have, counts=counts)


def _memory(need: float) -> Finding:
    free, wanted = memory(), LEAST_MEMORY / 2 + 3 * need  # the data list's images, a copy on their way, and the model
    what = f"{free / GB:.1f} GB of memory free; the images take {need / GB:.2f} GB of it"
    counts = {"free_gb": round(free / GB, 1), "images_gb": round(need / GB, 3)}
    if free >= max(wanted, LEAST_MEMORY):
        return Finding("host", "memory", "pass", what, counts=counts)
    fix = f"Free memory or take a machine with {max(wanted, LEAST_MEMORY) / GB:.0f} GB; or data.size smaller."
    why = "All images are held in memory while training."
    return Finding("host", "memory", "fail" if free < 2 * need else "warn", what, why, fix, counts)


def _disk(scope: Scope) -> Finding:
    need = LEAST_DISK + COPIES * state_bytes(scope)
    free = shutil.disk_usage(existing(scope.site.state)).free
    what = f"{free / GB:.1f} GB free where the site's state is kept, {need / GB:.1f} GB needed"
    counts = {"free_gb": round(free / GB, 1), "need_gb": round(need / GB, 1)}
    if free >= need:
        return Finding("host", "disk", "pass", what, counts=counts)
    why = "The state between rounds, logs and the audit log are written there; a full disk stops the site."
    return Finding("host", "disk", "fail", what, why, "Free space, or move the site's folder to another disk.", counts)


def state_bytes(scope: Scope) -> float:
    """An upper bound of what stays at the site between two rounds: the method's tensors twice, and its optimizer's."""
    from medfl.workshop import new_method

    method = new_method(scope.study)
    return float(4 * sum(tensor.nbytes for tensor in method.state_dict().values()))


def _shared() -> Finding:
    path = Path("/dev/shm")  # noqa: S108  the system's own
    if not path.is_dir():
        why, fix = "PyTorch may need it.", "Mount a tmpfs there."
        return Finding("host", "shared memory", "warn", "There is no /dev/shm.", why, fix)
    size = shutil.disk_usage(path).total
    counts, what = {"mb": round(size / 1e6)}, f"{size / 1e6:.0f} MB in /dev/shm"
    if size >= LEAST_SHARED:
        return Finding("host", "shared memory", "pass", what, counts=counts)
    fix = "Give the container shm_size: 256m."
    return Finding("host", "shared memory", "warn", what, "PyTorch may need more.", fix, counts)


def _rights(scope: Scope) -> Finding:
    folder = existing(scope.site.state)
    if not os.access(folder, os.W_OK):
        fix = f"Make {folder} writable for this user."
        return Finding("host", "rights", "fail", f"{folder} cannot be written.", "The site's state goes there.", fix)
    if os.geteuid() == 0:
        why = "A flaw in any library would have the whole machine."
        return Finding("host", "rights", "warn", "This runs as root.", why, "Take an ordinary user.", {"root": 1})
    return Finding("host", "rights", "pass", "Runs as an ordinary user, who can write the state.", counts={"root": 0})


def _cores(scope: Scope) -> Finding:
    have, threads = cores(), scope.study.training.threads
    counts, what = {"cores": have, "threads": threads}, f"{have} processor cores, {threads} threads asked for"
    if threads <= have:
        return Finding("host", "processor", "pass", what, counts=counts)
    fix = f"threads: {have} in site.yaml."
    return Finding("host", "processor", "warn", what, "More threads than cores are slower.", fix, counts)


def _device(scope: Scope) -> Finding:
    plan, asked = scope.study.training, scope.site.device
    try:
        where = Device.choose(plan.device, plan.precision, plan.channels_last)
        torch.ones(8, 8, device=where.device).sum().item()
    except (ResourceError, RuntimeError) as error:  # a driver that does not fit says so in a RuntimeError
        why, fix = "site.yaml asks for it.", "Install the driver, share the GPU with the container, or device: auto."
        return Finding("gpu", "device", "fail", str(error).splitlines()[0], why, fix, {"cuda": 0})
    if where.device.type == "cpu":
        what = "Training on the CPU, as site.yaml asks." if asked == "cpu" else "No GPU is seen: training on the CPU."
        return Finding("gpu", "device", "pass", what, counts={"cuda": 0})
    free, total = torch.cuda.mem_get_info(where.device)
    what = f"{torch.cuda.get_device_name(where.device)}, {free / GB:.0f} of {total / GB:.0f} GB free"
    counts = {"cuda": 1, "free_gb": round(free / GB, 1), "total_gb": round(total / GB, 1)}
    if free < LEAST_MEMORY:
        fix = "End the other programs on it, or choose another with CUDA_VISIBLE_DEVICES."
        return Finding("gpu", "device", "warn", what, "Another program uses the GPU.", fix, counts)
    return Finding("gpu", "device", "pass", what, counts=counts)
