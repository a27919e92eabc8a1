"""Every table on disk, column by column. Nothing else in the package spells out an Arrow type.

Units are part of the name or of the comment; a column that does not apply to a row is null, never a magic number.
"""

from __future__ import annotations

import pyarrow as pa

PAYLOAD_SCHEMA_VERSION = 2

# Status of a row. `degenerate`: the scalar has a value but no gradient (standstill, straight road), so no map exists.
# `skipped`: there is nothing to ask (an instruction that has no opposite).
OK, FAILED, DEGENERATE, SKIPPED = "ok", "failed", "degenerate", "skipped"

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
        pa.field("frame", pa.string()),  # all that is known of the frame: FrameRef as JSON
        pa.field("geometry", pa.string()),  # how its tiles lie on the picture: TileGeometry as JSON
        pa.field("mode", pa.string()),  # action | text
        pa.field("status", pa.string(), nullable=False),  # ok | failed | degenerate
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("attempt", pa.int32()),  # 1 for a frame that worked at once
        pa.field("target_scalar", pa.float64()),
        *(pa.field(name, pa.float64()) for name in KINEMATIC_COLUMNS),
        pa.field("text", pa.string()),
        pa.field("text_ids", pa.list_(pa.int32())),  # the generated tokens, including the end of sequence
        pa.field("token_index", pa.int32()),  # which of them a text target explains
        pa.field("route", pa.list_(pa.float32())),  # m: x0, y0, x1, y1 ...
        pa.field("speed_wps", pa.list_(pa.float32())),  # m, every 0.25 s
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

# One row per (frame, target, method), in `maps/<hash>.parquet`; a row counts only if the metrics row of its frame and
# target names its file as `payload_path`. Values are float16 times `scale`, a power of two.
MAPS = pa.schema(
    [
        pa.field("frame_id", pa.string(), nullable=False),
        pa.field("scene", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("direction", pa.string()),  # positive | negative | signed | none: which evidence is shown
        pa.field("rows", pa.int32()),  # of the grid over the canvas (patches, or image tokens)
        pa.field("columns", pa.int32()),
        pa.field("values", pa.list_(pa.float16())),  # row by row
        pa.field("thumbnail", pa.list_(pa.float16())),  # of the tile that shows the whole picture, square
        pa.field("standard_error", pa.list_(pa.float16())),  # of `values`, where the method estimates them
        pa.field("scale", pa.float32()),
        pa.field("geometry", pa.string()),  # TileGeometry as JSON
        # Where the relevance in the language model lies (attention methods): shares that sum to 1.
        pa.field("share_image", pa.float32()),
        pa.field("share_text", pa.float32()),  # generated text
        pa.field("share_prompt", pa.float32()),
        pa.field("share_queries", pa.float32()),
        pa.field("share_cls", pa.float32()),  # of the vision tower's relevance: on CLS tokens, which no map shows
        pa.field("completeness_error", pa.float32()),  # integrated gradients: |sum - change| / |change|
        pa.field("forwards", pa.int32()),  # passes that the method took on its own
    ]
)

# One row per (frame, target, subject, measure), in `faithfulness/<hash>.parquet`, referred to like MAPS.
SCORES = pa.schema(
    [
        pa.field("frame_id", pa.string(), nullable=False),
        pa.field("scene", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),  # a method, a baseline, or a perturbation of the picture
        pa.field("measure", pa.string(), nullable=False),  # early, lift, route_m ...: stages/scores.py lists them
        pa.field("at", pa.float64()),  # for curves: the share of cells hidden
        pa.field("value", pa.float64()),  # null where it is not defined for this frame
    ]
)

# One row per sample of a prepared CAST dataset, samples/<split>/<shard>.parquet. See data/cast/sample.py.
ACTION_UNITS = "waypoint spacings: 1.0 is one average step, metres = value * scale_m; x forward, y left, robot frame"
SAMPLES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("recording", pa.string(), nullable=False),
        pa.field("t", pa.int32(), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("instructions", pa.list_(pa.string()), nullable=False),
        pa.field("actions", pa.list_(pa.float32()), nullable=False),  # x0 y0 x1 y1 ...
        pa.field("valid", pa.list_(pa.bool_()), nullable=False),
        pa.field("scale_m", pa.float32()),
        pa.field("image", pa.binary(), nullable=False),  # PNG or JPEG
    ],
    metadata={"units": ACTION_UNITS},
)

# One row per (sample, variant of its instruction): the key of an inference run, `frame_id` and `target` as in METRICS.
# `predictions.parquet` has the same columns in the order of the dataset, with the file's metadata (see below).
GIVEN = "given"  # the variant that is the sample's own instruction
PREDICTIONS = pa.schema(
    [
        pa.field("frame_id", pa.string(), nullable=False),  # the sample's id
        pa.field("target", pa.string(), nullable=False),  # given | permuted | opposite | an atomic command
        pa.field("number", pa.int32()),  # place in the manifest, from 0; part of the picture's name
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        pa.field("recording", pa.string()),
        pa.field("t", pa.int32()),
        pa.field("instruction", pa.string()),  # as asked
        pa.field("picture", pa.string()),  # hash of the picture: samples that have the same see the same
        pa.field("image_path", pa.string()),  # of the picture, relative to the run; null if none was kept
        pa.field("status", pa.string(), nullable=False),  # ok | failed | skipped
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("predicted", pa.list_(pa.float32())),  # x0 y0 x1 y1 ..., units; null if failed
        pa.field("actions", pa.list_(pa.float32())),  # the right ones; null where there are none
        pa.field("valid", pa.list_(pa.bool_())),  # per step; false after the end of the episode
        pa.field("scale_m", pa.float32()),  # metres per unit; null if unknown
        pa.field("probability", pa.list_(pa.float32())),  # of each chosen bin, x0 y0 ...
        pa.field("entropy", pa.list_(pa.float32())),  # nats, of the distribution that it was chosen from
        pa.field("samples", pa.list_(pa.float32())),  # K sampled predictions one after the other; null if none
        pa.field("decode_s", pa.float64()),  # seconds per stage, a batch's time divided by its samples
        pa.field("predict_s", pa.float64()),
    ],
    metadata={"units": ACTION_UNITS},
)


def prediction_columns(num_steps: int) -> list[str]:
    """Columns of predictions.csv, those of the original inference script."""
    steps = [f"{kind}_{axis}_{k}" for k in range(num_steps) for kind in ("pred", "target") for axis in "xy"]
    return [
        *("sample_id", "image_filename", "image_path", "instruction", "predicted_actions", "target_actions"),
        *steps,
        *("overall_mse", "overall_mae", "overall_rmse", "overall_success_rate"),
    ]
