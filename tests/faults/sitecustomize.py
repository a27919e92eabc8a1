"""Faults for tests, without a hook in the product: put this directory on PYTHONPATH before Ray starts.

Python imports `sitecustomize` when it starts, so every worker process of that Ray gets it. It wraps a few functions of
vla_ray as their modules are imported. What goes wrong is read from the JSON file that VLA_RAY_TEST_FAULTS names, at
every call, so a test may change it while its cluster lives:

    kill_once    {"<point>": "<frame id>"}: the process ends by SIGKILL there, once per point (a marker file remembers)
    kill_always  [frame ids]: the process ends by SIGKILL whenever one of these is processed
    kill_decode  [frame ids]: the process ends by SIGKILL whenever the picture of one of these is decoded
    raise        {"<frame id>": "message"}: a RuntimeError whenever this frame is processed
    full_disk    "text": every write whose path contains it fails with ENOSPC, once half of it is written
    refuse_start "message": constructing a replica raises a CheckpointError
    delay_s      seconds that every batch, or every optimiser step, takes longer
    out_of_memory  step before which a training worker runs out of memory
    raise_train  [step, "message"]: a RuntimeError in every training worker before this step

Points of training: `train` ("<rank>:<step>", before an optimiser step) and `rename` (a name: that file or directory
would be renamed next, and `last/` is already out of the way). Every start of a training worker is a line `starts`
beside the faults.

Points: `decode` (a picture), `process` (before a batch), `writing` (half a payload written), `processed` (payloads
durable, rows not), `committed` (rows durable, the driver does not know).
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FAULTS = Path(os.environ.get("VLA_RAY_TEST_FAULTS", "/nonexistent"))


def faults() -> dict[str, Any]:
    try:
        return json.loads(FAULTS.read_text())
    except (OSError, ValueError):  # none, or being replaced at this moment
        return {}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def my_turn(point: str, ids: Iterable[str]) -> bool:
    """Whether this process is the one to die at this point."""
    if faults().get("kill_once", {}).get(point) not in set(ids):
        return False
    try:
        os.close(os.open(FAULTS.with_name(f"killed-{point}"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wrap_replicas(*names: str) -> Callable[[Any], None]:
    def wrap(module: Any) -> None:
        for name in names:
            wrap_replica(getattr(module, name))

    return wrap


def wrap_replica(replica: Any) -> None:
    start, process = replica.__init__, replica.process

    def faulty_start(self: Any, *args: Any) -> None:
        if message := faults().get("refuse_start"):
            from vla_ray.errors import CheckpointError

            raise CheckpointError(message)
        start(self, *args)

    def faulty_process(self: Any, frames: Any, targets: Any) -> Any:
        ids, now = [f.frame.ref.frame_id for f in frames], faults()
        if set(ids) & set(now.get("kill_always", ())):
            die()
        if my_turn("process", ids):
            die()
        time.sleep(now.get("delay_s", 0.0))
        for frame_id in ids:
            if frame_id in now.get("raise", {}):
                raise RuntimeError(now["raise"][frame_id])
        rows = process(self, frames, targets)
        if my_turn("processed", ids):
            die()
        return rows

    replica.__init__, replica.process = faulty_start, faulty_process


def wrap_decode(module: Any) -> None:
    load = module.Decoder.load

    def faulty_load(self: Any, frame: Any) -> Any:
        frame_id = frame.ref.frame_id
        if frame_id in faults().get("kill_decode", ()) or my_turn("decode", [frame_id]):
            die()
        return load(self, frame)

    module.Decoder.load = faulty_load


def wrap_decode_samples(module: Any) -> None:
    decoded = module.SampleDecoder._decoded

    def faulty_decoded(self: Any, frame: Any, row: Any, start: float) -> Any:
        frame_id = frame.ref.frame_id
        if frame_id in faults().get("kill_decode", ()) or my_turn("decode", [frame_id]):
            die()
        return decoded(self, frame, row, start)

    module.SampleDecoder._decoded = faulty_decoded


def wrap_work(module: Any) -> None:
    commit = module.commit

    def faulty_commit(run_dir: Any, rows: Any, schema: Any) -> Any:
        name = commit(run_dir, rows, schema)
        if my_turn("committed", [row["frame_id"] for row in rows]):
            die()
        return name

    module.commit = faulty_commit


def wrap_files(module: Any) -> None:
    fill = module._fill

    def faulty_fill(file: Any, data: Any) -> None:
        name = os.readlink(f"/proc/self/fd/{file.fileno()}")
        full, victim = faults().get("full_disk"), faults().get("kill_once", {}).get("writing", "")
        if full and full in name:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        scene, _, stem = victim.rpartition("/")
        if f"/{scene}_" in name and f"/.{stem}_" in name and my_turn("writing", [victim]):
            file.write(b"half of it")
            file.flush()
            die()
        fill(file, data)

    module._fill = faulty_fill


def wrap_loop(module: Any) -> None:
    one = module.Loop._one

    def faulty_one(self: Any, batches: Any, window: Any) -> None:
        now, step = faults(), self.step + 1
        if my_turn("train", [f"{self.workers.rank}:{step}"]):
            die()
        if now.get("out_of_memory") == step:
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if now.get("raise_train", [None])[0] == step:
            raise RuntimeError(now["raise_train"][1])
        time.sleep(now.get("delay_s", 0.0))
        one(self, batches, window)

    module.Loop._one = faulty_one


def wrap_session(module: Any) -> None:
    run_worker = module.run_worker

    def counted(spec: Any, workers: Any, stream: Any) -> None:
        with FAULTS.with_name("starts").open("a") as file:
            file.write(f"{workers.rank} {spec.directory}\n")
        run_worker(spec, workers, stream)

    module.run_worker = counted


def wrap_checkpoints(module: Any) -> None:
    def hook(event: str, arguments: Any) -> None:
        if event == "os.rename":
            old = Path(os.fsdecode(arguments[0]))
            if old.with_name(".last.old").exists() and my_turn("rename", [old.name]):
                die()

    sys.addaudithook(hook)


WRAP: dict[str, Callable[[Any], None]] = {
    "vla_ray.stages.capture": wrap_replicas("CaptureReplica"),
    "vla_ray.stages.explain": wrap_replicas("OnlineExplainer", "PayloadExplainer"),
    "vla_ray.stages.infer": wrap_replicas("PredictReplica"),
    "vla_ray.stages.decode": wrap_decode,
    "vla_ray.stages.decode_samples": wrap_decode_samples,
    "vla_ray.stages.work": wrap_work,
    "vla_ray.storage.files": wrap_files,
    "vla_ray.training.loop": wrap_loop,
    "vla_ray.training.session": wrap_session,
    "vla_ray.training.checkpoints": wrap_checkpoints,
}


class Hook(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and wraps it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in WRAP:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: Any) -> None:
            load(module)
            WRAP[name](module)

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


if FAULTS.name != "nonexistent":
    sys.meta_path.insert(0, Hook())
