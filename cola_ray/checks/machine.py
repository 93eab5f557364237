"""What a job needs from this machine: folders to write, addresses that answer, GPUs, processors and memory.

folders(config, "rl_math")        a line for each fault: ``field = value: why; fix``
addresses(config, "rl_math")
machine(config, "rl_math")
silent(config, "rl_math")         services that do not answer; this check waits for answers
"""

import functools
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cola_ray.runs import provenance
from cola_ray.settings.config import Config, is_endpoint, value_at

TRAINING = ("rl_math", "rl_preference", "rl_agent", "sweep")
"""Jobs that train a policy by RL."""
STUDIES = ("evaluate", "diversity", "atlas", "capabilities")
"""Jobs that train nothing."""
GENERATING = (*TRAINING, "evaluate", "diversity", "atlas")
"""Jobs that run engines."""
_TIMEOUT_S = 3.0  # how long an address may take to answer
_FREE_GB = 1.0  # least free space for checkpoints and logs, and for tokenised shards and states
_TRIED_BYTES = 1 << 20  # written as a test, since a quota may be used up although the disk is not full
_PATH_MAX = 4096  # bytes that the system allows in a path
_LONGEST_BELOW = 256  # bytes that a run may add to the path of its folder


def folders(config: Config, job: str) -> Iterator[str]:
    """Check that the folders that the job writes can be created and written, by trying, and have some space."""
    yield from _folder("output_dir", config.output_dir, config, job)
    for field in provenance.CACHES:
        if value_at(config, field):
            yield from _folder(field, value_at(config, field), config, job)


def _folder(field: str, given: str, config: Config, job: str) -> Iterator[str]:
    if "://" in given:
        yield f"{field} = {given!r}: an address; give a folder, on which it may be mounted"
        return
    if given.startswith("~"):  # a shell does not expand ~ after a "=" or in quotes
        yield f"{field} = {given!r}: ~ is no folder of this name; write the whole path, or $HOME"
        return
    folder = Path(value_at(provenance.resolve(config, job), field))
    named = f"{field} = {str(folder)!r}"
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        yield f"{named}: {there} is a file; give a folder"
        return
    try:
        longest = max(len(os.fsencode(part)) for part in folder.parts)
        if longest > os.pathconf(there, "PC_NAME_MAX") or len(os.fsencode(folder)) + _LONGEST_BELOW > _PATH_MAX:
            yield f"{named}: too long a name for this file system; give a shorter one"
            return
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"{named}: {there} cannot be written ({str(error.strerror).lower()}); give a folder of yours"
        return
    free = shutil.disk_usage(there).free / 2**30
    if free < _FREE_GB:
        yield f"{named}: {free:.2f} GiB free there, and what is written needs {_FREE_GB:g} or more; make room"


_STORES = ("sqlite", "postgresql", "mysql", "mssql")


def addresses(config: Config, job: str) -> Iterator[str]:
    uri = config.tracking_uri
    wanted = "use http(s)://HOST[:PORT], sqlite:///FILE, another database's URI or a folder"
    why = _bad_url(uri)
    if why and uri and not uri.startswith(("sqlite:", *(f"{store}+" for store in _STORES))):
        yield f"tracking_uri = {uri!r}: {why}; {wanted}"
    elif uri and (uri.startswith("file:") or not urlsplit(uri).scheme):
        place = Path(urlsplit(uri).path)
        there = next((parent for parent in (place, *place.parents) if parent.exists()), Path())
        if uri.startswith("~") or not there.is_dir() or not os.access(there, os.W_OK) or _is_of_kernel(there):
            yield f"tracking_uri = {uri!r}: no folder can be made there; {wanted}"
    if uri.startswith("sqlite:"):
        file = Path(uri.removeprefix("sqlite:///"))
        if not uri.startswith("sqlite:///") or not file.name:
            yield f"tracking_uri = {uri!r}: names no file; use sqlite:///FILE"
        elif not file.parent.is_dir() or file.is_dir():
            yield f"tracking_uri = {uri!r}: no folder {file.parent}; make it, or give another file"
    if is_endpoint(config.task.reward_model) and _bad_url(config.task.reward_model):
        reward_model = config.task.reward_model
        yield f"task.reward_model = {reward_model!r}: {_bad_url(reward_model)}; use http(s)://HOST[:PORT]/PATH"
    address = config.cluster.address
    if not address or address in ("auto", "local"):
        return
    plain = re.fullmatch(r"[\w.-]+:(\d{1,5})", address) or re.fullmatch(r"\[[0-9A-Fa-f:]+\]:(\d{1,5})", address)
    if plain and 0 < int(plain[1]) < 65_536:
        return
    if "://" not in address or _bad_url(address) or urlsplit(address).scheme not in ("ray", "http", "https"):
        yield f"cluster.address = {address!r}: no address of a Ray cluster; use HOST:PORT, ray://HOST:PORT or auto"
    elif job != "reproduce" and urlsplit(address).scheme != "ray":
        yield (
            f"cluster.address = {address!r}: a dashboard, which takes jobs; submit with `ray job submit --address "
            f"{address} -- python jobs/...`, or use HOST:PORT"
        )


def _is_of_kernel(folder: Path) -> bool:
    """Whether this is a folder that even root cannot write into."""
    return folder.resolve().parts[1:2] in (("proc",), ("sys",))


def silent(config: Config, job: str) -> Iterator[str]:
    """Services that the job will use but whose addresses do not answer."""
    asked = {"cluster.address": config.cluster.address}  # MLflow may be absent: a run sends it the events later
    if job in ("rl_math", "rl_preference", "evaluate"):
        asked["task.reward_model"] = config.task.reward_model
    for field, value in asked.items():
        parts = urlsplit(value if "://" in value else f"tcp://{value}")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        if field != "cluster.address" and parts.scheme not in ("http", "https"):
            continue
        if parts.hostname and port and not (parts.scheme in getproxies() and not proxy_bypass(parts.hostname)):
            why = _unreachable(parts.hostname, port)
            if why:
                yield f"{field} = {value!r}: nothing answers at {parts.hostname}:{port} ({why}); start it, or mend this"


@functools.cache
def _unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), _TIMEOUT_S).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _bad_url(url: str) -> str:
    """Why this URL is not valid; empty for a valid one, and for text that is not a URL at all."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error).lower()
    known = ("http", "https", "ray", "file", "databricks", "databricks-uc", *_STORES)
    if not parts.scheme or (len(parts.scheme) == 1 and parts.path):
        return "has no scheme" if "://" in url else ""
    if parts.scheme not in known and parts.scheme.partition("+")[0] not in _STORES:
        return f"unknown scheme {parts.scheme}"
    if parts.scheme in ("http", "https", "ray") and (not parts.hostname or port == 0):
        return "names no host" if not parts.hostname else "names no port"
    return ""


def machine(config: Config, job: str) -> Iterator[str]:
    """Check GPUs and processors if the run starts its own cluster on this machine."""
    cluster, rollout = config.cluster, config.rollout
    ray = sys.modules.get("ray")
    if cluster.address not in ("", "local") or "RAY_ADDRESS" in os.environ or (ray and ray.is_initialized()):
        return
    for part in ("learner", "rollout", "service"):
        group = getattr(cluster, f"{part}_group")
        if group:
            yield (
                f"cluster.{part}_group = {group!r}: nodes of a cluster, and this job starts one of this machine alone; "
                "leave it out, or give cluster.address"
            )
    if cluster.learner_placement == "STRICT_SPREAD" and cluster.learner_ranks > 1 and job not in STUDIES:
        yield (
            f"cluster.learner_placement = 'STRICT_SPREAD': {cluster.learner_ranks} ranks on a node each, and this "
            "machine is one; leave it out, or give cluster.address"
        )
    if cluster.use_gpu:
        there = _num_gpus()
        ranks = cluster.learner_ranks if job not in STUDIES else 0
        engines = rollout.num_workers * rollout.tensor_parallel_size if job in GENERATING else 0
        needed = ranks + engines
        if there < max(needed, 1):
            has = "no GPU" if there == 0 else f"{there} of them"
            yield (
                f"cluster.use_gpu = True: this machine has {has}, and this job needs {max(needed, 1)} (learner ranks "
                f"{ranks}, engines {engines}); lower these, leave it out, or give cluster.address"
            )
        return
    if rollout.tensor_parallel_size > 1:
        yield (
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: GPUs that an engine spans, and "
            "cluster.use_gpu is False; use 1"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    if job in GENERATING and rollout.num_workers * rollout.kv_cache_mb > memory:
        yield (
            f"rollout.kv_cache_mb = {rollout.kv_cache_mb}: of each of {rollout.num_workers} engines, and this machine "
            f"has {memory} MiB; use less"
        )
    cores = os.cpu_count() or 1
    most = max(16, 4 * cores)
    counts = {
        "cluster.learner_ranks": cluster.learner_ranks,
        "cluster.threads_per_process": cluster.threads_per_process,
        "critic.replicas": config.critic.replicas,
        "data.processes": config.data.processes,
        "replay.shards": config.replay.shards,
        "rollout.environment_processes": rollout.environment_processes,
        "rollout.num_workers": rollout.num_workers,
    }
    for field, count in counts.items():
        if count > most:
            yield f"{field} = {count}: this machine has {cores} cores; use at most {most}, or give cluster.address"


def _num_gpus() -> int:
    """Number of NVIDIA GPUs visible to a process here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
    if visible is None:
        return there
    return min(there, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))
