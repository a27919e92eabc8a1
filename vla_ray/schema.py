"""Every table on disk, column by column. Nothing else in the package spells out an Arrow type.

Units are part of the name or of the comment; a column that does not apply to a row is null, never a magic number.
"""

from __future__ import annotations

import pyarrow as pa

PAYLOAD_SCHEMA_VERSION = 1

# Status of a row. `degenerate`: the scalar has a value but no gradient (standstill, straight road), so no map exists.
OK, FAILED, DEGENERATE = "ok", "failed", "degenerate"

# The nine kinematic scalars of targets/kinematics.py, every one reported for every frame.
KINEMATIC_COLUMNS = (
    "curv_energy",  # 1/m^2
    "curv_diff",  # 1/m^2
    "lateral_offset",  # m, right positive
    "longitudinal_progress",  # m
    "forward_speed",  # m/s
    "acc_energy",  # (m/s^2)^2
    "brake_energy",  # (m/s^2)^2
    "jerk_energy",  # (m/s^3)^2
    "yaw_rate_energy",  # (rad/s)^2
)

# One row per (frame, target): the key of a run. Written by actors to ledger/, folded by the driver into metrics/.
METRICS = pa.schema(
    [
        pa.field("frame_id", pa.string(), nullable=False),  # <scene>/<stem>
        pa.field("target", pa.string(), nullable=False),
        pa.field("scene", pa.string()),
        pa.field("tag", pa.string()),  # the frame's stem
        pa.field("image_path", pa.string()),
        pa.field("mode", pa.string()),  # action | text
        pa.field("status", pa.string(), nullable=False),  # ok | failed | degenerate
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("attempt", pa.int32()),  # 1 for a frame that worked at once
        pa.field("target_scalar", pa.float64()),
        *(pa.field(name, pa.float64()) for name in KINEMATIC_COLUMNS),
        pa.field("text", pa.string()),
        pa.field("input_speed_mps", pa.float64()),
        pa.field("route_end_x", pa.float64()),  # m forward
        pa.field("route_end_y", pa.float64()),  # m right
        pa.field("route_length", pa.float64()),  # m along the predicted route
        pa.field("num_tiles", pa.int32()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_generated_tokens", pa.int32()),  # including the end-of-sequence token
        pa.field("decode_s", pa.float64()),  # seconds per stage, a batch's time divided by its frames
        pa.field("generate_s", pa.float64()),
        pa.field("forward_s", pa.float64()),
        pa.field("backward_s", pa.float64()),
        pa.field("write_s", pa.float64()),
        pa.field("payload_path", pa.string()),  # relative to the run directory
        pa.field("payload_bytes", pa.int64()),
    ]
)
