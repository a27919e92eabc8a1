"""What Ray reads from the environment when it is imported: import this first, wherever ray is imported."""

from __future__ import annotations

import os
from pathlib import Path

TOKEN = Path.home() / ".ray" / "auth_token"
# A started cluster asks for its token by default, but clients do not offer it unless told to.
if TOKEN.is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
# `uv run` would otherwise ship the working directory and run uv again in every worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Threads of OpenMP spin while they wait for each other, for milliseconds: on a machine whose cores have other work as
# well (decoding, another job) a replica with two threads then takes tens of times as long. Read by Ray's workers when
# they load torch; a cluster that runs already needs it where it was started.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray Train: these two need the dashboard, which jobs do without ...
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")
# ... a dead worker is noticed sooner than every two seconds, and a cluster that has to grow takes minutes.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
